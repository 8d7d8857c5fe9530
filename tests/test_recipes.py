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
    (rotnet, "cifar", dict(lr=0.2, weight_decay=5e-4, schedule="steps", crop="pad", epochs=200)),
    (linear, "probe", dict(lr=0.1, batch_size=256, epochs=100, weight_decay=0.0))])
def test_recipes_are_those_of_the_papers(method, kind, paper):
    assert method.RECIPES[kind].items() >= paper.items()


@pytest.mark.parametrize("method, kind, measured", [
    (simclr, "cifar", dict(lr=0.03, weight_decay=5e-4, temperature=0.5, min_crop=0.2, grey=0.1, hidden_dim=1024)),
    (simclr, "photos", dict(lr=1.2, weight_decay=1e-6, temperature=0.1, min_crop=0.08, jitter_strength=0.5)),
    (simsiam, "photos", dict(lr=0.5, weight_decay=1e-4, warmup_epochs=10.0, batch_size=256)),
    (moco, "photos", dict(lr=0.03, weight_decay=1e-4, momentum_encoder=0.99, temperature=0.2, head="mlp")),
    (rotnet, "photos", dict(lr=0.4, batch_size=32, min_crop=0.5, schedule="cosine", warmup_epochs=10.0)),
    (linear, "finetune", dict(lr=0.2, weight_decay=5e-4, batch_size=128, warmup_epochs=5.0))])
def test_other_recipes_are_those_that_were_measured(method, kind, measured):
    assert method.RECIPES[kind].items() >= measured.items()


@pytest.mark.parametrize("method, flags", [*((name, []) for name in METHODS),
                                           ("simclr", ["--optimizer", "lars", "--lr", "0.1"])])
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
def test_the_stem_is_the_one_that_was_asked_for(train, method):
    train(method, "--max-steps", "1", "--image-size", "32", "--stem", "imagenet")
    assert torch.load("run/last.pt", weights_only=True)["backbone"]["conv1.weight"].shape[2:] == (7, 7)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_of_the_step_before_is_left(train, monkeypatch, method):
    steps = Run.steps

    def spoilt(run):
        for batch in steps(run):
            for p in run.model.parameters():
                p.grad = torch.full_like(p, float("nan")) if p.requires_grad else None
            yield batch

    monkeypatch.setattr(Run, "steps", spoilt)
    train(method, "--max-steps", "2")
    assert all(x.isfinite().all() for x in torch.load("run/last.pt", weights_only=True)["model"].values())


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_for_the_network_in_training_and_evaluation_but_not_for_the_loss(train, monkeypatch, method):
    seen, losses, features, record = set(), [], common.ResNet18.features, Run.record

    def look(network, *words):
        found = features(network, *words)
        seen.update((network.training, x.dtype) for x in found.values())
        return found

    monkeypatch.setattr(common.ResNet18, "features", look)
    monkeypatch.setattr(Run, "record", lambda run, *, loss, **figures: (
        losses.append(loss), record(run, loss=loss, **figures)))
    train(method, "--max-steps", "1", "--knn-every", "1", "--amp", "bf16")
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)} and losses[0].dtype == torch.float32


@pytest.mark.parametrize("method, flags", [*((name, []) for name in METHODS),
                                           ("simclr", ["--optimizer", "lars", "--lr", "0.1"]),
                                           ("linear", ["--finetune"])])
def test_a_scaled_loss_trains_the_same_weights(train, tmp_path, monkeypatch, method, flags):
    """fp16's scaler, by a power of two, about a network in float32."""
    pick, weights = common.pick_precision, []
    if method == "linear":
        train("simsiam", "--max-steps", "1")
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        monkeypatch.setattr(common, "pick_precision", lambda *words, s=scaler, **kinds: (pick(*words, **kinds)[0], s))
        out = str(tmp_path / f"run{len(weights)}")
        if method == "linear":
            linear.main(["--checkpoint", "run", "--out", out, "--quiet", "--device", "cpu", "--amp", "off",
                         "--batch-size", "8", "--max-steps", "3", *flags])
        else:
            train(method, "--max-steps", "3", "--out", out, *flags)
        weights.append(torch.load(f"{out}/last.pt", weights_only=True)["model"])
    assert scaler.get_scale() == 2.0**12 and all(torch.equal(weights[0][name], x) for name, x in weights[1].items())


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_climbs_first(train, monkeypatch, method):
    rates, step = [], common.LRScheduler.step
    monkeypatch.setattr(common.LRScheduler, "step", lambda self, at: rates.append(step(self, at)) or rates[-1])
    train(method, "--step-lr", "0.1", "--warmup-epochs", "1")
    assert len(rates) == 12 and rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_simsiams_loss_is_between_different_views(train, monkeypatch):
    outputs, met, stopped, forward, loss = [], [], [], simsiam.SimSiam.forward, simsiam.symmetric_loss
    monkeypatch.setattr(simsiam.SimSiam, "forward", lambda self, x: outputs.append(forward(self, x)) or outputs[-1])
    monkeypatch.setattr(simsiam, "symmetric_loss", lambda *words, stop_gradient: (
        met.append(words), stopped.append(stop_gradient), loss(*words, stop_gradient))[-1])
    train("simsiam", "--max-steps", "1")
    (first, second), ((p1, z1, p2, z2),) = outputs, met
    assert all(map(torch.equal, (p1, z1, p2, z2), (*first, *second))) and not torch.equal(z1, z2)
    train("simsiam", "--max-steps", "1", "--no-stop-gradient", "--out", "ablation")
    assert stopped == [True, False]


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
    args = argparse.Namespace(image_size=32, view_size=None, min_crop=0.3, blur=0.4, v1=v1)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    importlib.import_module(method).view(pixels, torch.ones(2), common.Draws(0), args, (0.5,) * 3, (0.5,) * 3)
    first, last = ("random_grayscale", "color_jitter") if v1 else ("color_jitter", "random_grayscale")
    assert list(calls) == ["random_resized_crop", first, last, "gaussian_blur"]
    (_, crop), (strengths, jitter), (_, grey), (_, blur) = (calls[name] for name in names)
    assert (crop["scale"], crop["flip"], grey["p"], blur["p"]) == ((0.3, 1.0), 0.5, 0.2, 0.4)
    assert blur["sigma"] == (0.1, 2.0)
    assert (strengths, jitter["p"]) == (((0.4, 0.4, 0.4, 0.4), 1.0) if v1 else ((0.4, 0.4, 0.4, 0.1), 0.8))


@pytest.mark.parametrize("name, crop", [("simsiam", ""), ("moco", ""), ("simclr", ""), ("rotnet", "pad"),
                                        ("rotnet", "resized"), ("linear", "pad"), ("linear", "resized")])
def test_views_know_the_shape_of_the_picture(name, crop):
    args = argparse.Namespace(image_size=32, view_size=None, min_crop=0.2, blur=0.0, grey=0.0, jitter_strength=0.0,
                              v1=False, no_color_jitter=True, crop=crop, flip_after_rotation=False)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    square, wide = (importlib.import_module(name).view(pixels, torch.full((4,), aspect), common.Draws(0), args,
                                                       (0.5,) * 3, (0.25,) * 3) for aspect in (1.0, 2.0))
    assert all(not torch.equal(a, b) for a, b in zip(square, wide, strict=True))


@pytest.mark.parametrize("method, flags", [*((name, []) for name in METHODS), ("rotnet", ["--crop", "resized"])])
def test_views_may_be_smaller_than_what_is_evaluated(train, monkeypatch, method, flags):
    seen, features = set(), common.ResNet18.features
    monkeypatch.setattr(common.ResNet18, "features", lambda network, x, *names: (
        seen.add((network.training, *x.shape[2:])), features(network, x, *names))[1])
    train(method, "--max-steps", "1", "--knn-every", "1", "--view-size", "12", *flags)
    assert seen == {(True, 12, 12), (False, 16, 16)}


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_views_of_a_classifier_are_normalised_and_half_of_them_flipped(crop):
    ramp = (torch.arange(32) * 4 + 100).to(torch.uint8).expand(64, 3, 32, 32)  # brighter to the right
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    args = argparse.Namespace(crop=crop, image_size=32)
    x = linear.view(ramp, torch.ones(64), common.Draws(0), args, mean, std)
    grey = (x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))[:, :, 16]  # (64, 3, 32), a line
    torch.testing.assert_close(grey, grey[:, :1].expand(-1, 3, -1))
    assert 16 < (grey[:, 0, 8] > grey[:, 0, 24]).sum() < 48
