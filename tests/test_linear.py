"""linear.py: the step against the formula, frozen to the bit, honest splits, exact resumes, one figure everywhere."""

import argparse
import io
import json
import math
import os
import random
import shutil
import signal
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import harness
import knn
import linear
import pictures as sets
import predict
from pictures.sources import STATISTICS

COUNTS = {"train": (12, 20, 8), "val": (5, 9, 3), "test": (4, 2, 6)}
CLASSES = ("ape", "bee", "cat")


def draw(path, label, rng):
    """16 x 16 noise around a colour that leans towards the class, but not always enough."""
    tone = [rng.randint(60, 130) for _ in range(3)]
    tone[label] += 60
    pixels = bytes(min(255, max(0, tone[c] + rng.randint(-60, 60))) for _ in range(256) for c in range(3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (16, 16), pixels).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train, val and test of three classes, unequal in number, and unlabelled images beside them."""
    root, rng = tmp_path_factory.mktemp("pictures") / "zoo", random.Random(0)
    for split, counts in COUNTS.items():
        for label, count in enumerate(counts):
            for i in range(count):
                draw(root / split / CLASSES[label] / f"{i}.png", label, rng)
    for i in range(7):
        draw(root / "unlabeled" / f"{i}.png", i % 3, rng)
    return root


def make_pretrained(folder, pictures, seed=0, **changes):
    """A run folder with a last.pt as a method writes it: width 4, every weight and buffer moved from its start."""
    torch.manual_seed(seed)
    backbone = common.ResNet18(width=4)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(9)
    model = torch.nn.Module()
    model.backbone = backbone
    args = dict(image_size=16, stem="cifar", width=4, data=str(pictures), data_root=None, skip_unreadable=False,
                cache=str(pictures.parent / "cache"), knn_split="val")
    dataset = types.SimpleNamespace(classes=["x"], mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    state = harness.checkpoint.state_of(model, torch.optim.SGD(model.parameters(), 0.1),
                                        torch.amp.GradScaler("cpu", enabled=False), {},
                                        argparse.Namespace(**args | changes, method="simsiam"), dataset, 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    harness.checkpoint.save(folder / "last.pt", state)
    return folder


@pytest.fixture(scope="module")
def pretrained(pictures):
    return make_pretrained(pictures.parent / "pretrained", pictures)


def go(checkpoint, out, *flags):
    """Run linear.py quietly; returns the run's linear.pt."""
    linear.main(["--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu", "--amp", "off", "--quiet",
                 *map(str, flags)])
    return harness.load_checkpoint(out / "linear.pt")


def equal(one, two):
    """Whether two nested plain values are the same, tensors bit for bit."""
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


# ------------------------------------------------------------------------------------------------
# The classifier
# ------------------------------------------------------------------------------------------------


def features_by_hand(checkpoint, pictures, split):
    """Pooled features of every labelled picture of a split, in double, straight from the files."""
    backbone = harness.load_backbone(checkpoint).double()
    mean, std = (torch.tensor(checkpoint[k], dtype=torch.float64).view(3, 1, 1) for k in ("mean", "std"))
    rows, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((pictures / split / name).iterdir(), key=lambda p: int(p.stem)):
            pixels = torch.tensor(list(Image.open(path).tobytes()), dtype=torch.float64).view(16, 16, 3)
            rows.append(backbone(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None])[0].detach())
            labels.append(label)
    return torch.stack(rows), labels


@pytest.mark.parametrize("raw", [False, True])
def test_two_steps_equal_logistic_regression_by_hand(pretrained, pictures, tmp_path, raw):
    """Multinomial logistic regression in loops and double: gradient, momentum, cosine, standardised features."""
    saved = go(pretrained, tmp_path / "run", "--epochs", 2, "--lr", 3, "--eval-every", 2,
               *(["--raw-features"] if raw else []))
    f, labels = features_by_hand(harness.load_checkpoint(pretrained), pictures, "train")
    n, lr = len(f), 3 * len(f) / 256
    assert n == 40 == sum(COUNTS["train"])  # the unlabelled ones do not train
    m, s = (f[0] * 0, f[0] * 0 + 1) if raw else (f.mean(0), ((f - f.mean(0)) ** 2).mean(0).sqrt())
    common.seed_everything(0)
    start = linear.Classifier(common.ResNet18(width=4), "layer4", 3, frozen=True)
    w, b = start.fc.weight.detach().double(), start.fc.bias.detach().double()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(2):
        gw, gb = torch.zeros_like(w), torch.zeros_like(b)
        for z, label in zip((f - m) / s, labels, strict=True):
            e = torch.exp(w @ z + b)
            p = e / e.sum()
            p[label] -= 1
            gw, gb = gw + p[:, None] * z / n, gb + p / n
        vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
        rate = lr * (1 + math.cos(math.pi * step / 2)) / 2
        w, b = w - rate * vw, b - rate * vb
    torch.testing.assert_close(saved["classifier"]["weight"].double(), w / s, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(saved["classifier"]["bias"].double(), b - (w / s) @ m, rtol=1e-3, atol=1e-4)


def test_standardisation_is_folded_into_a_plain_linear_layer():
    torch.manual_seed(0)
    model = linear.Classifier(common.ResNet18(width=4), "layer2", 5, frozen=True).eval()
    features = 0.02 * torch.randn(300, 8) + torch.linspace(-3, 3, 8)
    features[:, 2] = 7.0  # a dead channel
    model.standardise(features)
    torch.nn.init.normal_(model.fc.weight)
    torch.nn.init.normal_(model.fc.bias)
    z = (features - model.mean) / model.std
    assert z[:, 2].abs().max() < 1e-3 and z.isfinite().all()
    torch.testing.assert_close(z[:, [0, 7]].std(0, correction=0), torch.ones(2), rtol=1e-3, atol=0)
    plain = model.plain()
    assert plain["weight"].shape == (5, 8) and plain["bias"].dtype == torch.float32
    expected = z.double() @ model.fc.weight.double().T + model.fc.bias.double()
    ours = features.double() @ plain["weight"].double().T + plain["bias"].double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)  # of logits around 10; float32 keeps 7 digits
    x = torch.randn(6, 3, 16, 16)
    f = model.backbone.features(x, ("layer2",))["layer2"]
    torch.testing.assert_close(F.linear(f, **plain), model(x), rtol=1e-4, atol=1e-2)


def test_accuracies_by_hand():
    logits = torch.tensor([[3.0, 1, 2], [3, 1, 2], [3, 1, 2], [1, 2, 3], [0, 0, 0], [0, 0, 0]])
    truth = torch.tensor([0, 0, 0, 2, 1, 0])  # equal logits: the first class is the answer, so 0 for both
    scores = linear.accuracies(logits, truth)
    assert scores["top1"] == pytest.approx(100 * 5 / 6)
    assert scores["class_mean"] == pytest.approx(100 * (4 / 4 + 0 / 1 + 1 / 1) / 3)
    assert scores["top5"] == 100  # there are only three classes
    logits = torch.arange(7.0).expand(4, 7)
    scores = linear.accuracies(logits, torch.tensor([6, 2, 1, 0]))  # ranks 1, 5, 6, 7; class 3 has no image
    assert scores == {"top1": 25.0, "top5": 50.0, "class_mean": 25.0}


# ------------------------------------------------------------------------------------------------
# What trains and what does not
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["--cached", "--probe"])
def test_frozen_means_every_bit_of_weights_and_buffers(pretrained, tmp_path, way):
    before = harness.load_checkpoint(pretrained)["backbone"]
    saved = go(pretrained, tmp_path / "run", way, "--epochs", 3)
    assert equal(saved["backbone"], before) and equal(harness.load_checkpoint(tmp_path / "run")["backbone"], before)
    assert len(saved["optimizer"]["param_groups"][0]["params"]) == 2  # weight and bias of the linear layer
    assert saved["method"] == "linear" and saved["layer"] == "layer4"
    assert saved["args"]["way"] == way[2:] and saved["args"]["checkpoint"] == str(pretrained)


@pytest.mark.parametrize("broken", ["train mode", "weights"])
def test_a_backbone_that_is_not_frozen_is_found_out(pretrained, tmp_path, monkeypatch, broken):
    if broken == "train mode":
        monkeypatch.setattr(linear.Classifier, "train", torch.nn.Module.train)
    else:
        monkeypatch.setattr(linear, "make_optimizer", lambda args, parameters, lr: torch.optim.SGD(
            [*parameters, *Everything.backbone.requires_grad_().parameters()], lr, weight_decay=0.1))

        class Everything(linear.Classifier):
            def __init__(self, backbone, *args):
                super().__init__(backbone, *args)
                Everything.backbone = backbone

            def forward(self, x):
                return super().forward(x) + 0 * sum(p.sum() for p in self.backbone.parameters())

        monkeypatch.setattr(linear, "Classifier", Everything)
    with pytest.raises(RuntimeError, match="frozen backbone has changed"):
        go(pretrained, tmp_path / "run", "--probe", "--epochs", 1)


def test_fine_tuning_starts_at_the_checkpoint_and_moves_all_of_it(pretrained, tmp_path):
    before = harness.load_checkpoint(pretrained)["backbone"]
    still = go(pretrained, tmp_path / "still", "--finetune", "--max-steps", 1, "--lr", 1e-9)["backbone"]
    moved = go(pretrained, tmp_path / "moved", "--finetune", "--epochs", 1)["backbone"]
    for name, value in before.items():
        if name.endswith("weight"):
            torch.testing.assert_close(still[name], value, rtol=1e-4, atol=1e-5, msg=name)
            assert not torch.equal(moved[name], value), name
        elif name.endswith("running_mean"):
            assert not torch.equal(moved[name], value), name


def test_from_scratch_takes_the_shape_but_no_weight_of_the_checkpoint(pretrained, pictures, tmp_path):
    other = make_pretrained(tmp_path / "other", pictures, seed=5)
    one, two = (go(folder, tmp_path / f"run-{i}", "--from-scratch", "--epochs", 1)
                for i, folder in enumerate((pretrained, other)))
    assert equal(one["model"], two["model"]) and equal(one["optimizer"], two["optimizer"])
    tuned = go(other, tmp_path / "tuned", "--finetune", "--epochs", 1, "--lr", 0.2)
    assert not torch.equal(tuned["backbone"]["conv1.weight"], one["backbone"]["conv1.weight"])
    assert one["width"] == 4 and one["image_size"] == 16


@pytest.mark.parametrize("way, clipped", [("--finetune", True), ("--from-scratch", True), ("--probe", False)])
def test_the_gradient_of_a_whole_network_is_clipped(pretrained, pictures, tmp_path, monkeypatch, way, clipped):
    norms, plain, loss = [], torch.optim.SGD.step, F.cross_entropy

    def step(self, *rest):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return plain(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **rest: 100 * loss(*args, **rest))  # far above 1
    go(pretrained, tmp_path / "run", way, "--epochs", 2, "--lr", 0.01)
    assert norms and all(norm == pytest.approx(1, abs=1e-3) if clipped else norm > 2 for norm in norms)


def test_from_scratch_needs_no_run(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--from-scratch", "--data", str(pictures), "--amp", "off", "--device", "cpu"]
    linear.main([*flags, "--width", "4", "--image-size", "16", "--max-steps", "1", "--out", str(tmp_path / "run")])
    saved = harness.load_checkpoint(tmp_path / "run/linear.pt")
    assert (saved["width"], saved["image_size"], saved["stem"]) == (4, 16, "imagenet")  # as photos have
    assert saved["mean"] == STATISTICS["imagenet"][0] and saved["args"]["checkpoint"] is None
    linear.main(["--resume", str(tmp_path / "run"), "--max-steps", "2", "--quiet"])
    assert harness.load_checkpoint(tmp_path / "run")["step"] == 2
    predict.main(["--checkpoint", str(tmp_path / "run"), "--json", str(pictures / "val/ape/0.png")])
    knn.main(["--checkpoint", str(tmp_path / "run"), "--k", "3"])
    capsys.readouterr()
    for wrong, words in ((["--checkpoint", str(tmp_path / "run"), "--finetune"], "alone is taken by --weights"),
                         (["--data", str(pictures)], "or --from-scratch"),
                         (["--weights", str(tmp_path / "run"), "--width", "8"], "--width 8: the network of --weights")):
        with pytest.raises(SystemExit):
            linear.main(wrong)
        assert words in capsys.readouterr().err
    go_on = ["--weights", str(tmp_path / "run"), "--image-size", "16", "--data", str(pictures), "--epochs", "1"]
    linear.main([*go_on, "--quiet", "--out", str(tmp_path / "second")])
    assert equal(harness.load_checkpoint(tmp_path / "second")["backbone"],
                 harness.load_checkpoint(tmp_path / "run")["backbone"])


def test_from_scratch_without_data_is_toy(monkeypatch, tmp_path):
    """Shape and data are those that the methods take without a flag."""
    args, _ = linear.parse_args(["--from-scratch"])
    assert args.data == "toy" and args.image_size is args.stem is args.width is None


@pytest.mark.parametrize("way", ["--cached", "--probe", "--finetune", "--from-scratch"])
def test_weights_alone_are_as_good_as_their_run(pretrained, pictures, tmp_path, monkeypatch, way):
    """The file a stranger would write, at the size and with the statistics of the run."""
    saved = harness.load_checkpoint(pretrained)
    torch.save({f"backbone.{name}": value for name, value in saved["backbone"].items()}, tmp_path / "net.pth")
    monkeypatch.setitem(STATISTICS, "imagenet", (saved["mean"], saved["std"]))
    flags = [way, "--max-steps", 2, "--cache", pictures.parent / "cache"]
    whole = go(pretrained, tmp_path / "whole", *flags)
    linear.main(["--weights", str(tmp_path / "net.pth"), "--data", str(pictures), "--image-size", "16", "--quiet",
                 "--out", str(tmp_path / "alone"), "--device", "cpu", "--amp", "off", *map(str, flags)])
    alone = harness.load_checkpoint(tmp_path / "alone/linear.pt")
    assert equal(whole["model"], alone["model"]) and alone["args"]["weights"] == str(tmp_path / "net.pth")
    assert "weights" in (tmp_path / "alone/log.txt").read_text().split()
    (tmp_path / "net.pth").unlink()
    linear.main(["--resume", str(tmp_path / "alone"), "--max-steps", "3", "--quiet"])  # it is needed no more


@pytest.mark.parametrize("layer, c", [("layer1", 4), ("layer3", 16)])
def test_layer(pretrained, tmp_path, layer, c):
    saved = go(pretrained, tmp_path / "run", "--layer", layer, "--epochs", 1)
    assert saved["layer"] == layer and saved["classifier"]["weight"].shape == (3, c)


# ------------------------------------------------------------------------------------------------
# Labels and splits
# ------------------------------------------------------------------------------------------------


def test_label_subsets_are_stratified_seeded_and_nested():
    labels = torch.tensor([2] * 300 + [0] * 50 + [1] * 3)[torch.randperm(353, generator=torch.manual_seed(0))]
    parts = {f: linear.label_subset(labels, f, seed=0) for f in (0.001, 0.01, 0.1, 0.5, 1.0)}
    sizes = {f: labels[rows].bincount().tolist() for f, rows in parts.items()}
    assert sizes == {0.001: [1, 1, 1], 0.01: [1, 1, 3], 0.1: [5, 1, 30], 0.5: [25, 2, 150], 1.0: [50, 3, 300]}
    chain = [set(rows.tolist()) for rows in parts.values()]
    assert all(small <= large for small, large in zip(chain, chain[1:], strict=False))
    assert torch.equal(parts[0.1], linear.label_subset(labels, 0.1, seed=0))
    assert not torch.equal(parts[0.1], linear.label_subset(labels, 0.1, seed=1))


def test_a_part_keeps_images_and_labels_together():
    split = sets.Split(torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 2, 2),
                       torch.arange(60) // 20, torch.arange(60) / 10, [str(i) for i in range(60)])
    part = linear.take_part(split, 0.25, seed=3)
    for i, path in enumerate(part.paths):
        assert part.images[i, 0, 0, 0] == int(path) and part.labels[i] == int(path) // 20
        assert part.aspect[i] == split.aspect[int(path)]
    assert len(part) == 15 and linear.take_part(split, 1.0, seed=3) is split


def test_an_epoch_of_few_labels_shows_each_of_them_equally_often():
    features = torch.arange(10.0)[:, None]
    split = sets.Split(features, torch.arange(10) % 2, torch.ones(10), [""] * 10)
    batches = sets.Batches(split, 7, seed=0, drop_last=False, passes=4)
    epochs = [list(batches.batches(epoch)) for epoch in (0, 1)]
    assert len(batches) == len(epochs[0]) == 6  # 40 images in sevens, the last short
    for epoch in epochs:
        assert torch.cat([x for x, _, _, _ in epoch]).flatten().long().bincount().tolist() == [4] * 10
        assert all(torch.equal(x.flatten().long() % 2, labels) for x, _, labels, _ in epoch)
    orders = [tuple(batches.order(epoch).view(4, 10)[i].tolist()) for epoch in (0, 1) for i in range(4)]
    assert len(set(orders)) == 8  # no pass repeats another's order
    later = list(batches.batches(1, start=4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(later, epochs[1][4:], strict=True))


def test_label_fraction_of_a_run(pretrained, tmp_path):
    saved = go(pretrained, tmp_path / "run", "--label-fraction", 0.25, "--epochs", 2, "--probe")
    log = (tmp_path / "run/log.txt").read_text()
    assert "trains  on 10 labelled images, 4 passes per epoch" in log  # 3, 5 and 2
    assert saved["args"]["batch_size"] == 10 and saved["args"]["label_fraction"] == 0.25
    row = harness.folder.read_metrics(tmp_path / "run")[-1]
    assert row["step"] == 8 and json.loads((tmp_path / "run/scores.json").read_text())["val"]["images"] == 17


@pytest.mark.parametrize("way", ["--cached", "--probe"])
def test_both_frozen_ways_standardise(pretrained, pictures, tmp_path, way):
    model = go(pretrained, tmp_path / "run", way, "--max-steps", 1)["model"]
    f, _ = features_by_hand(harness.load_checkpoint(pretrained), pictures, "train")
    torch.testing.assert_close(model["mean"].double(), f.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model["std"].double(), f.std(0, correction=0), rtol=1e-3, atol=1e-4)


def test_a_short_last_batch_counts_as_the_images_it_has(pretrained, tmp_path, monkeypatch):
    seen, progress = [], common.Progress
    monkeypatch.setattr(common, "Progress", lambda *words, **kinds: seen.append(kinds["per_step"]) or progress(
        *words, **kinds))
    go(pretrained, tmp_path / "run", "--probe", "--batch-size", 39, "--epochs", 1)
    go(pretrained, tmp_path / "tuned", "--finetune", "--batch-size", 16, "--epochs", 1)  # which drops it
    assert seen == [20, 16]  # of 40 in two steps


def test_fine_tuning_climbs_and_decays(pretrained, tmp_path, monkeypatch):
    rates, step = [], common.LRScheduler.step
    monkeypatch.setattr(common.LRScheduler, "step", lambda self, at: rates.append(step(self, at)) or rates[-1])
    saved = go(pretrained, tmp_path / "run", "--finetune", "--epochs", 3, "--warmup-epochs", 1, "--batch-size", 10,
               "--step-lr", 0.1)
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    group, = saved["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_the_labels_of_a_resumed_run_are_those_of_its_seed(pretrained, tmp_path, capsys):
    go(pretrained, tmp_path / "run", "--label-fraction", 0.25, "--epochs", 1)
    with pytest.raises(SystemExit):
        linear.main(["--resume", str(tmp_path / "run"), "--seed", "1", "--epochs", "2"])
    assert "--seed" in capsys.readouterr().err


def opened_splits(monkeypatch):
    seen, pack = [], sets.pack

    def spy(source, size, cache=None, splits=("train", "val"), *args):
        seen.extend(splits)
        return pack(source, size, cache, splits, *args)

    monkeypatch.setattr(sets, "pack", spy)
    return seen


def test_the_test_split_is_opened_and_scored_only_on_demand(pretrained, tmp_path, monkeypatch):
    seen = opened_splits(monkeypatch)
    go(pretrained, tmp_path / "without", "--epochs", 2)
    assert seen == ["train", "val"]
    go(pretrained, tmp_path / "with", "--epochs", 2, "--test")
    assert seen[2:] == ["train", "val", "test"]
    scores = json.loads((tmp_path / "with/scores.json").read_text())
    assert {name: s["images"] for name, s in scores.items()} == {"val": 17, "test": 12}
    one, two = (harness.load_checkpoint(tmp_path / n / "linear.pt") for n in ("without", "with"))
    assert equal(one["model"], two["model"])  # looking at it changes nothing
    assert all("test" not in name for row in harness.folder.read_metrics(tmp_path / "with") for name in row)


def test_validation_chooses_the_weights(pretrained, tmp_path):
    saved = go(pretrained, tmp_path / "run", "--epochs", 30, "--eval-every", 1, "--lr", 8)
    rows = harness.folder.read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(31)) and rows[0]["loss"] is None
    assert {"epoch", "step", "seconds", "loss", "lr", "images_per_second", "top1", "top5", "class_mean",
            "train_top1", "val_loss"} == set(rows[1])
    best = max(row["top1"] for row in rows[1:])
    chosen = next(row for row in rows[1:] if row["top1"] == best)
    assert saved["step"] == chosen["step"] < 30
    scores = json.loads((tmp_path / "run/scores.json").read_text())["val"]
    assert scores == {"images": 17, **{k: pytest.approx(chosen[k], abs=1e-5) for k in ("top1", "top5", "class_mean")}}


@pytest.mark.parametrize("gamma, alpha", [(0, 1), (2, 0.5)])
def test_losses_of_training_and_validation_images(pretrained, pictures, tmp_path, gamma, alpha):
    """By hand, and in double: of the first step, when nothing is known yet, and of validation images after it."""
    flags = ["--epochs", 1, "--eval-every", 1, "--raw-features", "--focal-gamma", gamma, "--focal-alpha", alpha]
    saved = go(pretrained, tmp_path / "run", *flags)
    f, labels = features_by_hand(harness.load_checkpoint(pretrained), pictures, "val")
    weight, bias = (saved["classifier"][name].double() for name in ("weight", "bias"))
    p = [torch.softmax(weight @ x + bias, dim=0)[label] for x, label in zip(f, labels, strict=True)]
    expected = sum(-alpha * (1 - q) ** gamma * q.log() for q in p) / len(p)
    untrained, row = harness.folder.read_metrics(tmp_path / "run")
    assert row["val_loss"] == pytest.approx(expected.item(), rel=1e-3)
    chance = alpha * (2 / 3) ** gamma * math.log(3)
    assert row["loss"] == pytest.approx(chance, rel=0.1) and untrained["val_loss"] == pytest.approx(chance, rel=0.1)
    formula = "alpha (1 - 1/3)^gamma log(3)" if gamma else "log(3)"
    assert f"loss {formula} = {chance:.3g}, top-1 33.3 %" in (tmp_path / "run/log.txt").read_text()


def test_stops_after_the_evaluation_that_reaches_an_accuracy(pretrained, tmp_path, monkeypatch, capsys):
    flags = ["--epochs", 8, "--eval-every", 2, "--save-every", 8, "--finetune"]
    whole = go(pretrained, tmp_path / "whole", *flags)
    scores = iter((20.0, 50.0, 70.0, 80.0))  # of the untrained network; after 2, 4 and 6 epochs
    with monkeypatch.context() as patch:
        patch.setattr(linear, "accuracies", lambda logits, truth: dict(top1=next(scores, 80.0), top5=0, class_mean=0))
        saved = go(pretrained, tmp_path / "run", *flags, "--stop-at-accuracy", 70)
    rows = harness.folder.read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 2, 4] and saved["epoch"] == 4
    assert harness.load_checkpoint(tmp_path / "run")["epoch"] == 4 and (tmp_path / "run/scores.json").exists()
    assert "stopped 70.00 % of validation images are right: --stop-at-accuracy 70" in (
        tmp_path / "run/log.txt").read_text()
    linear.main(["--resume", str(tmp_path / "run"), "--stop-at-accuracy", "100", "--quiet"])
    resumed = harness.load_checkpoint(tmp_path / "run")
    assert resumed["epoch"] == 8 and equal(resumed["model"], harness.load_checkpoint(tmp_path / "whole")["model"])
    assert whole["classes"] == resumed["classes"]


def test_a_rate_per_step(pretrained, tmp_path):
    flags = ["--schedule", "steps", "--epochs", 1, "--max-steps", 1, "--optimizer", "adamw"]  # needs no --lr besides
    for folder, rate in (("one", ["--step-lr", 0.01]), ("two", ["--lr", 0.01 * 256 / 40])):
        go(pretrained, tmp_path / folder, *flags, *rate)
    one, two = (harness.load_checkpoint(tmp_path / folder) for folder in ("one", "two"))
    assert equal(one["model"], two["model"]) and harness.folder.read_metrics(tmp_path / "one")[-1]["lr"] == 0.01


def test_without_validation_the_last_weights_count(pretrained, pictures, tmp_path, monkeypatch):
    # Class folders without a split: a tenth would be held out, and here it is not.
    shutil.copytree(pictures / "train", tmp_path / "zoo/train")
    shutil.copytree(pictures / "test", tmp_path / "zoo/test")
    seen = opened_splits(monkeypatch)
    saved = go(pretrained, tmp_path / "all", "--no-validation", "--test", "--data", tmp_path / "zoo", "--epochs", 20)
    assert seen == ["train", "test"] and saved["args"]["knn_split"] == "test"
    assert equal(saved["model"], harness.load_checkpoint(tmp_path / "all")["model"])
    assert "on 40 labelled images" in (tmp_path / "all/log.txt").read_text()
    assert all(row["top1"] is None for row in harness.folder.read_metrics(tmp_path / "all"))
    assert json.loads((tmp_path / "all/scores.json").read_text()).keys() == {"test"}
    go(pretrained, tmp_path / "held", "--data", tmp_path / "zoo", "--epochs", 1)
    assert "on 36 labelled images" in (tmp_path / "held/log.txt").read_text()


@pytest.mark.parametrize("way", ["--cached", "--finetune"])
def test_predict_finds_the_printed_accuracy(pretrained, pictures, tmp_path, capsys, way):
    go(pretrained, tmp_path / "run", way, "--epochs", 3, "--test")
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    for split in ("val", "test"):
        files = sorted(str(path) for path in (pictures / split).rglob("*.png"))
        capsys.readouterr()
        predict.main(["--checkpoint", str(tmp_path / "run"), "--json", "--device", "cpu", "--amp", "off", *files])
        answers = json.loads(capsys.readouterr().out)
        right = sum(answer["class"] == os.path.basename(os.path.dirname(answer["file"])) for answer in answers)
        assert 100 * right / len(files) == pytest.approx(scores[split]["top1"])


def test_other_data_bring_their_classes_and_keep_the_networks_view(pretrained, pictures, tmp_path):
    shutil.copytree(pictures / "train/ape", tmp_path / "two/one")
    shutil.copytree(pictures / "train/cat", tmp_path / "two/other")
    saved = go(pretrained, tmp_path / "run", "--data", tmp_path / "two", "--epochs", 1)
    assert saved["classes"] == ["one", "other"] and saved["classifier"]["weight"].shape == (2, 32)
    assert saved["mean"] == (0.4, 0.5, 0.6) and saved["args"]["data"] == str(tmp_path / "two")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def figures(folder):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "knn_seconds")}
            for row in harness.folder.read_metrics(folder)]


def same_runs(one, two):
    for name in ("last.pt", "linear.pt"):
        a, b = (harness.load_checkpoint(folder / name) for folder in (one, two))
        for key in ("model", "optimizer", "classifier", "step", "epoch", "rng"):
            assert equal(a[key], b[key]), (name, key)
    assert figures(one) == figures(two)


@pytest.mark.parametrize("way", ["--cached", "--probe", "--finetune"])
def test_a_signal_in_mid_epoch_and_a_resume_change_nothing(pretrained, tmp_path, monkeypatch, way):
    flags = [way, "--epochs", 3, "--batch-size", 8, "--eval-every", 1, "--label-fraction", 0.5]
    go(pretrained, tmp_path / "whole", *flags)
    schedule = common.LRScheduler.step

    def stop_in_7(self, step):
        if step == 6:  # from 0
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(self, step)

    monkeypatch.setattr(common.LRScheduler, "step", stop_in_7)
    with pytest.raises(SystemExit) as end:
        go(pretrained, tmp_path / "killed", *flags)
    monkeypatch.undo()
    assert end.value.code == 128 + signal.SIGTERM
    assert harness.load_checkpoint(tmp_path / "killed")["step"] == 7  # of five an epoch
    linear.main(["--resume", str(tmp_path / "killed"), "--quiet"])
    same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("write", [2, 3, 4, 5])
def test_killed_before_any_write_a_resumed_run_is_the_same(pretrained, tmp_path, monkeypatch, write):
    """Without warning, and between the writes of one epoch too: the best file and last.pt."""
    flags = ["--epochs", 4, "--eval-every", 1, "--save-every", 1, "--lr", 8]
    go(pretrained, tmp_path / "whole", *flags)
    save, calls = harness.checkpoint.save, []

    class Killed(BaseException):
        pass

    def die(path, state):
        calls.append(path)
        if len(calls) == write:
            raise Killed
        save(path, state)

    monkeypatch.setattr(harness.checkpoint, "save", die)
    with pytest.raises(Killed):
        go(pretrained, tmp_path / "killed", *flags)
    monkeypatch.undo()
    if not (tmp_path / "killed/last.pt").exists():
        go(pretrained, tmp_path / "killed", *flags)
    else:
        linear.main(["--resume", str(tmp_path / "killed"), "--quiet"])
    same_runs(tmp_path / "whole", tmp_path / "killed")


def test_a_resumed_run_needs_the_pre_training_run_no_more(pictures, tmp_path):
    folder = make_pretrained(tmp_path / "pretrained", pictures)
    go(folder, tmp_path / "run", "--epochs", 1)
    shutil.rmtree(folder)
    linear.main(["--resume", str(tmp_path / "run"), "--quiet", "--test"])  # nothing is left to train
    assert json.loads((tmp_path / "run/scores.json").read_text())["test"]["images"] == 12


PROGRAM = """
import torch
print("imported")
class Small(torch.nn.Sequential):
    dim = 6
def build_model(args):
    model = torch.nn.Module()
    model.backbone = Small(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return model
"""


def test_any_backbone_takes_the_program_that_the_user_names(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PROGRAM)
    make_pretrained(tmp_path / "run", pictures)
    state = torch.load("run/last.pt", weights_only=True)
    backbone = harness.weights.build_model(state, "mine.py").backbone
    torch.save(state | {"backbone": {name: value.detach() for name, value in backbone.state_dict().items()}},
               "run/last.pt")
    mine, plumbing = ["--program", "mine.py"], ["--device", "cpu", "--amp", "off"]

    def refused(program, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program.main([*flags, *plumbing])
        said = capsys.readouterr()
        assert end.value.code == 2 and "--program FILE.py" in said.err.splitlines()[-1]
        assert "imported" not in said.out + said.err

    for way in ("--cached", "--finetune", "--from-scratch"):
        refused(linear, "--checkpoint", "run", way)
        linear.main(["--checkpoint", "run", way, *mine, "--max-steps", "1", "--out", way[2:], "--quiet", *plumbing])
        assert harness.load_checkpoint(f"{way[2:]}/linear.pt")["classifier"]["weight"].shape == (3, 6)
    refused(linear, "--resume", "finetune", "--max-steps", "2")  # not even the program that the run remembers
    linear.main(["--resume", "finetune", "--max-steps", "2", *mine, "--quiet", *plumbing])
    assert harness.load_checkpoint("finetune")["step"] == 2
    refused(predict, "--checkpoint", "cached", str(pictures / "val"))
    assert predict.main(["--checkpoint", "cached", *mine, str(pictures / "val"), "--json", *plumbing]) == 0
    assert len(json.loads(capsys.readouterr().out.removeprefix("imported\n"))) == 17


def test_from_scratch_takes_no_network_of_another_shape_for_ours(pictures, tmp_path, capsys):
    """torchvision's ResNet-18 has our names."""
    folder = make_pretrained(tmp_path / "run", pictures)
    state = torch.load(folder / "last.pt", weights_only=True)
    wide = {name: value.detach() for name, value in common.ResNet18(width=8).state_dict().items()}
    torch.save(state | {"backbone": wide}, folder / "last.pt")
    with pytest.raises(SystemExit):
        linear.main(["--checkpoint", str(folder), "--from-scratch", "--max-steps", "1", "--out", str(tmp_path / "o")])
    assert "--program FILE.py" in capsys.readouterr().err


def test_two_runs_of_one_second_get_folders_of_their_own(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness.folder.time, "strftime", lambda form: "20260101-000000")
    for _ in range(3):
        linear.main(["--checkpoint", str(pretrained), "--epochs", "1", "--quiet"])
    name = "linear-cached-zoo-20260101-000000"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]
    saved = harness.load_checkpoint(tmp_path / f"runs/{name}-3/linear.pt")
    assert saved["args"]["out"] == f"runs/{name}-3"


@pytest.mark.parametrize("flags", [["--optimizer", "lars", "--lr", 5], ["--optimizer", "adamw", "--lr", 0.05]])
def test_other_optimisers_learn_too(pretrained, tmp_path, flags):
    go(pretrained, tmp_path / "run", "--epochs", 300, "--eval-every", 300, *flags)
    rows = harness.folder.read_metrics(tmp_path / "run")
    assert rows[-1]["loss"] < 0.8 * math.log(3)


def test_adamw_takes_the_weight_decay():
    args = argparse.Namespace(optimizer="adamw", weight_decay=0.3)
    assert linear.make_optimizer(args, [torch.nn.Parameter(torch.ones(2))], 0.1).param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("kind, crop", [("toy", "pad"), ("cifar", "pad"), ("stl10", "resized"), ("photos", "resized")])
def test_small_pictures_are_shifted_and_photos_cropped(kind, crop):
    args = argparse.Namespace(way="probe", kind=kind, step_lr=None, **dict.fromkeys(("crop", *linear.RECIPES["probe"])))
    linear.fill_recipe(args, 1000, 1000)
    assert args.crop == crop


def test_steps_fall_to_a_tenth_twice(pretrained, tmp_path):
    go(pretrained, tmp_path / "run", "--schedule", "steps", "--epochs", 10, "--eval-every", 1, "--lr", 30)
    rates = [row["lr"] / (30 * 40 / 256) for row in harness.folder.read_metrics(tmp_path / "run")[1:]]
    assert rates == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2)


def test_the_picture_of_a_confusion_matrix():
    truth, predicted = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    image = Image.open(io.BytesIO(linear.draw_confusion(predicted, truth, ["cat", "dog"], "title")))
    top, left = image.height - 12 - 2 * 80, image.height - 12 - 2 * 80 - 56  # 80 px a cell, 56 above the names
    colours = {(i, j): image.getpixel((left + 80 * j + 5, top + 80 * i + 5)) for i in range(2) for j in range(2)}
    assert colours[1, 1][2] > colours[1, 1][0] + 100  # all of the row: deep blue
    assert colours[0, 1][0] > colours[0, 1][2] + 50  # a quarter astray: red
    assert len(set(colours[1, 0])) == 1  # none: grey
    for k in (11, 101, 1000):
        names = [f"a class called {i}" for i in range(k)]
        image = Image.open(io.BytesIO(linear.draw_confusion(torch.arange(k), torch.arange(k), names, "title")))
        assert 900 < image.width < 4100 and abs(image.width - image.height) < 80


def wrong_uses(tmp_path, pretrained):
    """name -> (flags, what the line must name): those that need a finished run; others are in test_wrong_uses.py."""
    go(pretrained, tmp_path / "done", "--epochs", 1)
    run = ["--checkpoint", pretrained]
    return {
        "raw that would train": ([*run, "--from-scratch", "--raw-features"], ["--raw-features", "--probe"]),
        "crops of cached features": ([*run, "--crop", "pad"], ["--crop", "--probe"]),
        "nothing to stop by": ([*run, "--no-validation", "--test", "--stop-at-accuracy", "90"],
                               ["--stop-at-accuracy", "--no-validation"]),
        "another way resumed": (["--resume", "done", "--probe"], ["--probe", "--cached"]),
        "another layer resumed": (["--resume", "done", "--layer", "layer1"], ["--layer", "layer4"]),
        "folder taken": ([*run, "--out", "done"], ["--out", "--resume"]),
        "another width": ([*run, "--width", "8"], ["--width 8", "--checkpoint has 4"]),
        "another size": ([*run, "--image-size", "32", "--from-scratch"], ["--image-size 32", "16"]),
        "two networks": ([*run, "--weights", "done"], ["--weights", "--checkpoint"]),
        "other weights resumed": (["--resume", "done", "--weights", "done"], ["--weights", "None"]),
    }


def test_wrong_uses_end_in_one_clear_line(pretrained, tmp_path, monkeypatch, capsys):
    cases = wrong_uses(tmp_path, pretrained)
    monkeypatch.chdir(tmp_path)
    for name, (flags, words) in cases.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            linear.main([str(flag) for flag in flags])
        err = capsys.readouterr().err.replace("\r", "\n")
        assert end.value.code == 2, (name, err)
        assert len(err.strip().splitlines()) == 1, (name, err)
        assert all(word in err for word in words), (name, err)
    assert not (tmp_path / "runs").exists()  # nothing was begun
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit):
        linear.main(["--checkpoint", str(pretrained)])
    assert "torchrun" in capsys.readouterr().err


def test_what_a_user_sees(pretrained, tmp_path, capsys):
    linear.main(["--checkpoint", str(pretrained), "--out", str(tmp_path / "run"), "--epochs", "2", "--test"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line and str(pretrained) not in line) <= 79
    assert lines[-1] == f"next    python predict.py --checkpoint {tmp_path / 'run'} image.jpg"
    assert lines[-2].startswith("top-1") and "at best" in lines[-2]
    assert any(line.startswith("test    top-1") and "of 12 images" in line for line in lines[-7:])
    assert f"wrote   {tmp_path / 'run/linear.pt'}" in lines and Image.open(tmp_path / "run/confusion.png").size
    assert any(line.startswith("bee") for line in lines)


@pytest.mark.parametrize("images", [257, 450, 1000, 1001])
def test_no_step_of_an_epoch_is_lost_to_a_short_last_batch(images):
    """Of every way, and at most as many images as there are steps."""
    for way in ("cached", "probe", "finetune", "from-scratch"):
        recipe = linear.RECIPES[way]
        args = argparse.Namespace(way=way, kind="photos", step_lr=None, seed=0, **dict.fromkeys(("crop", *recipe)))
        passes = linear.fill_recipe(args, images, images)
        split = sets.Split(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), torch.zeros(images).long(),
                           torch.ones(images), [])
        batches = linear.make_batches(args, split, passes, torch.zeros(images, 2), torch.device("cpu"))
        steps = math.ceil(images / min(images, recipe["batch_size"]))
        seen = sum(len(labels) for _, _, labels, _ in batches.batches(0))
        assert len(batches) == steps and (seen == images if way in linear.FROZEN else images - seen < steps)
