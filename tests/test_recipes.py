"""What a paper's figures hang on and no formula shows: the views' strengths, what learns at which rate, the recipes."""

import argparse
import functools
import importlib

import pytest
import torch
from test_resume import FLAGS

import augment
import common
import linear
import moco
import rotnet
import simclr
import simsiam
from harness.run import Run

METHODS = {"simsiam": ["--dim", "16", "--pred-dim", "8"], "moco": ["--queue-size", "32"], "simclr": [], "rotnet": []}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train("moco", flags...): four steps an epoch."""
    monkeypatch.chdir(tmp_path)
    for split, count in {"train": 32, "val": 8}.items():
        monkeypatch.setitem(importlib.import_module("pictures").TOY_COUNT, split, count)

    def start(method, *flags):
        own = ["--data", "toy", "--cache", "cache", "--out", "run", "--knn-every", "0", *METHODS[method]]
        importlib.import_module(method).main([*FLAGS, *own, *flags])

    return start


@pytest.mark.parametrize("method, kind, paper", [
    (simsiam, "paper", dict(lr=0.05, weight_decay=1e-4, blur=0.5, proj_layers=3, min_crop=0.2, warmup_epochs=0.0)),
    (simsiam, "cifar", dict(lr=0.03, weight_decay=5e-4, blur=0.0, proj_layers=2, batch_size=512, epochs=800)),
    (moco, "paper", dict(lr=0.03, weight_decay=1e-4, queue_size=65536, momentum_encoder=0.999, temperature=0.2)),
    (moco, "cifar", dict(lr=0.03, weight_decay=5e-4, queue_size=4096, momentum_encoder=0.99, temperature=0.1)),
    (simclr, "paper", dict(lr=1.2, weight_decay=1e-6, temperature=0.1, min_crop=0.08, lr_scaling="sqrt")),
    (rotnet, "cifar", dict(lr=0.2, weight_decay=5e-4, schedule="steps", crop="pad", epochs=200))])
def test_recipes_are_those_of_the_papers(method, kind, paper):
    assert method.RECIPES[kind].items() >= paper.items()


@pytest.mark.parametrize("method, flags", [*((name, []) for name in METHODS), ("simclr", ["--optimizer", "lars"])])
def test_what_learns_and_how(train, monkeypatch, method, flags):
    seen, begin = [], Run.begin

    def look(run, model, optimizer, **kinds):
        seen.append((model, optimizer.param_groups, kinds.get("sync_bn", False)))
        return begin(run, model, optimizer, **kinds)

    monkeypatch.setattr(Run, "begin", look)
    train(method, "--max-steps", "1", "--weight-decay", "0.05", *flags)
    (model, groups, synchronised), = seen
    learning, fixed = ({id(p) for group in groups if group.get("fix_lr", False) in which for p in group["params"]}
                       for which in ((True, False), (True,)))
    assert learning == {id(p) for p in model.parameters() if p.requires_grad}
    assert fixed == ({*map(id, model.predictor.parameters())} if method == "simsiam" else set())
    assert all((group["momentum"], group["weight_decay"]) == (0.9, 0.05) for group in groups)
    assert synchronised == (method != "moco")


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_climbs_first(train, monkeypatch, method):
    rates, step = [], common.LRScheduler.step
    monkeypatch.setattr(common.LRScheduler, "step", lambda self, at: rates.append(step(self, at)) or rates[-1])
    train(method, "--step-lr", "0.1", "--warmup-epochs", "1")
    assert len(rates) == 12 and rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_simsiams_loss_is_between_different_views(train, monkeypatch):
    outputs, met, forward, loss = [], [], simsiam.SimSiam.forward, simsiam.symmetric_loss
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, x: outputs.append(forward(self, x)) or outputs[-1])
    monkeypatch.setattr(simsiam, "symmetric_loss", lambda *words, **kinds: met.append(words) or loss(*words, **kinds))
    train("simsiam", "--max-steps", "1")
    (first, second), ((p1, z1, p2, z2),) = outputs, met
    assert all(map(torch.equal, (p1, z1, p2, z2), (*first, *second))) and not torch.equal(z1, z2)


def test_rotnets_loss_is_focal_where_it_is_asked_for(train, monkeypatch):
    met, loss = [], rotnet.focal_loss
    monkeypatch.setattr(rotnet, "focal_loss", lambda *words: met.append(words[2:]) or loss(*words))
    train("rotnet", "--max-steps", "1", "--knn-every", "1", "--focal-gamma", "2", "--focal-alpha", "0.5")
    assert len(met) >= 3 and set(met) == {(2, 0.5)}  # in training and of the images held out


# ---- views -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, v1", [("simsiam", False), ("moco", False), ("moco", True)])
def test_views_take_the_papers_strengths(monkeypatch, method, v1):
    calls, names = {}, ("random_resized_crop", "color_jitter", "random_grayscale", "gaussian_blur")

    def spy(name, plain, x, *words, **kinds):
        calls[name] = words, kinds
        return plain(x, *words, **kinds)

    for name in names:
        monkeypatch.setattr(augment, name, functools.partial(spy, name, getattr(augment, name)))
    args = argparse.Namespace(image_size=32, min_crop=0.3, blur=0.4, v1=v1)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    importlib.import_module(method).view(pixels, torch.ones(2), common.Draws(0), args, (0.5,) * 3, (0.5,) * 3)
    first, last = ("random_grayscale", "color_jitter") if v1 else ("color_jitter", "random_grayscale")
    assert list(calls) == ["random_resized_crop", first, last, "gaussian_blur"]
    (_, crop), (strengths, jitter), (_, grey), (_, blur) = (calls[name] for name in names)
    assert (crop["scale"], crop["flip"], grey["p"], blur["p"]) == ((0.3, 1.0), 0.5, 0.2, 0.4)
    assert (strengths, jitter["p"]) == (((0.4, 0.4, 0.4, 0.4), 1.0) if v1 else ((0.4, 0.4, 0.4, 0.1), 0.8))


@pytest.mark.parametrize("name, crop", [("simsiam", ""), ("moco", ""), ("simclr", ""), ("rotnet", "pad"),
                                        ("rotnet", "resized"), ("linear", "pad"), ("linear", "resized")])
def test_views_know_the_shape_of_the_picture(name, crop):
    args = argparse.Namespace(image_size=32, min_crop=0.2, blur=0.0, grey=0.0, jitter_strength=0.0, v1=False,
                              no_color_jitter=True, crop=crop, flip_after_rotation=False)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    square, wide = (importlib.import_module(name).view(pixels, torch.full((4,), aspect), common.Draws(0), args,
                                                       (0.5,) * 3, (0.25,) * 3) for aspect in (1.0, 2.0))
    assert all(not torch.equal(a, b) for a, b in zip(square, wide, strict=True))


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_views_of_a_classifier_are_normalised_and_half_of_them_flipped(crop):
    ramp = (torch.arange(32) * 4 + 100).to(torch.uint8).expand(64, 3, 32, 32)  # brighter to the right
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    args = argparse.Namespace(crop=crop, image_size=32)
    x = linear.view(ramp, torch.ones(64), common.Draws(0), args, mean, std)
    grey = (x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))[:, :, 16]  # (64, 3, 32), a line
    torch.testing.assert_close(grey, grey[:, :1].expand(-1, 3, -1))
    assert 16 < (grey[:, 0, 8] > grey[:, 0, 24]).sum() < 48
