"""rotnet.py: which way pictures turn, what may come before and after, losses by loops, and whole small runs."""

import argparse
import math
import shutil

import pytest
import torch
from PIL import Image

import common
import rotnet
from harness.folder import read_metrics
from pictures import Split

# ------------------------------------------------------------------------------------------------
# Rotations
# ------------------------------------------------------------------------------------------------


def asymmetric(n=3, side=4):
    """Images of which every pixel is another number."""
    return torch.arange(n * 3 * side * side, dtype=torch.float32).view(n, 3, side, side)


def turned_once(image):
    """A quarter turn counter-clockwise, pixel by pixel: the right edge becomes the top edge."""
    side = image.shape[-1]
    out = torch.empty_like(image)
    for row in range(side):
        for column in range(side):
            out[:, side - 1 - column, row] = image[:, row, column]
    return out


def turned(image, k):
    for _ in range(k):
        image = turned_once(image)
    return image


def make_args(**changes):
    args = dict(image_size=32, view_size=None, crop="pad", min_crop=0.2, one_rotation=False, flip_after_rotation=False)
    return argparse.Namespace(**(args | changes))


def test_an_asymmetric_image_fixes_labels_direction_and_layout():
    corner = torch.zeros(1, 3, 4, 4)
    corner[..., 0, 0] = 1  # top left: after quarter turns counter-clockwise bottom left, bottom right, top right
    x4, y4 = rotnet.rotation_batch(corner)
    places = [(0, 0), (3, 0), (3, 3), (0, 3)]
    assert y4.tolist() == [0, 1, 2, 3] and y4.dtype == torch.int64
    assert [tuple(x[0].nonzero()[0].tolist()) for x in x4] == places

    x = asymmetric()
    x4, y4 = rotnet.rotation_batch(x)
    assert x4.shape == (12, 3, 4, 4) and y4.shape == (12,) and x4.is_contiguous(memory_format=torch.channels_last)
    for k in range(4):
        for i in range(3):
            assert y4[3 * k + i] == k
            assert torch.equal(x4[3 * k + i], turned(x[i], k))
    # The authors' own words: transpose, then turn upside down.
    assert torch.equal(x4[3:6], x.transpose(2, 3).flip(2))
    with pytest.raises(ValueError, match="square"):
        rotnet.rotation_batch(torch.zeros(2, 3, 4, 5))


def test_one_rotation_draws_for_each_image():
    x = asymmetric(n=64)
    args = make_args(one_rotation=True)
    y = []
    for seed in (0, 0, 1):
        inputs, labels = rotnet.turn(x, torch.Generator().manual_seed(seed), args)
        assert inputs.shape == x.shape and inputs.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(inputs[i], turned(x[i], int(labels[i]))) for i in range(64))
        assert labels.bincount(minlength=4).min() >= 6
        y.append(labels)
    assert torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])
    x4, y4 = rotnet.turn(x, torch.Generator(), make_args())
    assert torch.equal(x4, rotnet.rotation_batch(x)[0]) and torch.equal(y4, rotnet.rotation_batch(x)[1])


def test_flip_before_keeps_the_classes_apart_and_flip_after_merges_two():
    picture = asymmetric(n=1)
    x = torch.cat([picture, picture.flip(3)] * 64)  # what a flip before the rotation makes of one picture

    def inputs_of_classes(**changes):
        x4, y4 = rotnet.turn(x, torch.Generator().manual_seed(0), make_args(**changes))
        return [{tuple(row.flatten().tolist()) for row in x4[y4 == k]} for k in range(4)]

    before = inputs_of_classes()
    assert [len(inputs) for inputs in before] == [2] * 4 and len(set.union(*before)) == 8
    for one_rotation in (False, True):
        after = inputs_of_classes(flip_after_rotation=True, one_rotation=one_rotation)
        assert after[1] == after[3] and len(after[1]) == 4
        assert not after[0] & after[1] and not after[0] & after[2]


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_views_are_flipped_before_the_rotation_or_not_at_all(crop):
    images = torch.zeros(64, 3, 48, 48, dtype=torch.uint8)
    images[..., 24:] = 255  # the right half is light
    images[..., :24, :] //= 2  # and the upper half darker
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    generator = torch.Generator().manual_seed(0)
    views = {}
    for after in (False, True):
        args = make_args(crop=crop, flip_after_rotation=after, min_crop=0.8)
        views[after] = rotnet.view(images, torch.ones(64), generator, args, mean, std)
    x = views[False]
    assert x.shape == (64, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    pixels = x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert -1e-5 <= pixels.min() and pixels.max() <= 1 + 1e-5
    assert len({tuple(view.flatten().tolist()) for view in x}) > 32  # every image has its own draw
    left_is_light = {after: (v[..., :16].mean((1, 2, 3)) > v[..., 16:].mean((1, 2, 3))).sum()
                     for after, v in views.items()}
    assert 16 < left_is_light[False] < 48 and left_is_light[True] == 0
    for v in views.values():  # nothing has been turned yet
        assert bool((v[..., :16, :].mean((1, 2, 3)) < v[..., 16:, :].mean((1, 2, 3))).all())


def test_pad_shifts_by_an_eighth_of_the_side_at_most():
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    images[..., 16, 16] = 255
    x = rotnet.view(images, torch.ones(400), torch.Generator().manual_seed(0), make_args(flip_after_rotation=True),
                    (0, 0, 0), (1, 1, 1))
    rows = {tuple(place) for place in (x[:, 0] > 0.5).nonzero()[:, 1:].tolist()}
    assert {row for row, _ in rows} == {column for _, column in rows} == set(range(12, 21))  # 4 px each way


# ------------------------------------------------------------------------------------------------
# Loss and accuracy
# ------------------------------------------------------------------------------------------------


def paper_loss(logits, y, gamma=0.0, alpha=1.0):
    """Eq. 3 (and the focal loss) by loops over inputs and classes."""
    total = 0
    for row, label in zip(logits, y.tolist(), strict=True):
        p = row[label].exp() / sum(value.exp() for value in row)
        total = total - alpha * (1 - p) ** gamma * p.log()
    return total / len(logits)


@pytest.mark.parametrize("gamma, alpha", [(0, 1), (0, 0.5), (2, 0.5), (0.5, 1), (5, 2)])
def test_loss_and_gradients_equal_the_equations(gamma, alpha):
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(12, 4, generator=g, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, 4, (12,), generator=g)
    loss, expected = rotnet.focal_loss(logits, y, gamma, alpha), paper_loss(logits, y, gamma, alpha)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    ours, = torch.autograd.grad(loss, logits)
    theirs, = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_loss_closed_forms():
    y = torch.tensor([0, 1, 2, 3, 3])
    assert rotnet.focal_loss(torch.zeros(5, 4), y).item() == pytest.approx(math.log(4), abs=1e-6)
    focal = rotnet.focal_loss(torch.zeros(5, 4), y, gamma=2, alpha=0.5).item()
    assert focal == pytest.approx(0.5 * 0.75**2 * math.log(4), abs=1e-6)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.cross_entropy(logits, y)
    assert rotnet.focal_loss(logits, y).item() == pytest.approx(plain.item(), abs=1e-6)
    assert rotnet.focal_loss(logits, y, gamma=1e-9).item() == pytest.approx(plain.item(), abs=1e-6)
    assert rotnet.focal_loss(logits.bfloat16(), y).dtype == torch.float32


def test_focal_loss_stays_finite_for_certain_answers():
    logits = (80 * torch.eye(4)).requires_grad_()
    y = torch.tensor([0, 1, 2, 0])  # three certain and right, one certain and wrong
    loss = rotnet.focal_loss(logits, y, gamma=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(20, abs=1e-3) and bool(logits.grad.isfinite().all())


class CornerReader(torch.nn.Module):
    """Tells the rotation by the light corner; always wrong for images whose middle is light."""

    def __init__(self):
        super().__init__()
        self.seen, self.modes = 0, set()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # its device is the model's

    def forward(self, x):
        self.seen += len(x)
        self.modes.add(self.training)
        logits = torch.stack([x[:, 0, 0, 0], x[:, 0, -1, 0], x[:, 0, -1, -1], x[:, 0, 0, -1]], dim=1)
        middle = x[:, 0, 8, 8] > 0.5
        return torch.where(middle[:, None], -logits, logits)


def test_rotation_scores_count_every_image_once_and_compile_nothing():
    images = torch.zeros(7, 3, 17, 17, dtype=torch.uint8)
    images[..., 0, 0] = 255
    images[6, :, 8, 8] = 255
    split = Split(images, torch.full((7,), -1), torch.ones(7), [])
    dataset = argparse.Namespace(mean=(0, 0, 0), std=(1, 1, 1), size=17)
    autocast, _ = common.pick_precision("off", torch.device("cpu"))
    for training in (True, False):
        model = CornerReader().train(training)
        model.compile(backend=lambda *_: pytest.fail("compiled"))
        loss, score = rotnet.rotation_scores(model, split, dataset, autocast, gamma=2, alpha=0.5, batch_size=3)
        p = [math.e / (math.e + 3)] * 6 + [math.exp(-1) / (math.exp(-1) + 3)]  # of the true rotation, image by image
        assert loss == pytest.approx(sum(-0.5 * (1 - q) ** 2 * math.log(q) for q in p) / 7)
        assert score == pytest.approx(100 * 24 / 28)  # batches of 3, 3, 1: their mean would be 66.7
        assert model.seen == 28 and model.modes == {False} and model.training == training


# ------------------------------------------------------------------------------------------------
# Model and step
# ------------------------------------------------------------------------------------------------


def test_step_equals_an_independent_double_precision_step():
    """Rotations and loss by loops, features by hand through the head: gradients of every parameter."""
    torch.manual_seed(0)
    model = rotnet.build_model(argparse.Namespace(stem="cifar", width=4)).double()
    assert [name for name, _ in model.named_children()] == ["backbone", "head"]
    assert model.head.weight.shape == (4, 32)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    parameters = list(model.parameters())
    x4, y4 = rotnet.rotation_batch(x)
    ours = torch.autograd.grad(rotnet.focal_loss(model(x4), y4), parameters)
    inputs = torch.stack([turned(image, k) for image in x for k in range(4)])  # in another order
    logits = model.backbone(inputs) @ model.head.weight.T + model.head.bias
    theirs = torch.autograd.grad(paper_loss(logits, torch.arange(12) % 4), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------

TINY = ["--device", "cpu", "--amp", "off", "--image-size", "16", "--stem", "cifar", "--width", "4",
        "--batch-size", "8", "--quiet"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """8 training and 3 validation pictures, light above and dark below."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 8), ("val", 3)):
        for i in range(count):
            image = Image.new("RGB", (20, 20), (20 * i, 30, 40))
            image.paste((220, 250 - 10 * i, 200), (0, 0, 20, 8 + i % 3))
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def train(pictures, out, *flags):
    rotnet.main(["--data", str(pictures), "--cache", str(out.parent / "cache"), "--out", str(out), *TINY, *flags])
    return read_metrics(out), torch.load(out / "last.pt", weights_only=True)


def test_recipe_of_the_paper(pictures, tmp_path):
    """Rates fall to a fifth at 30, 60 and 80 % of the run; Nesterov, momentum, decay; lr per 256 images."""
    rows, checkpoint = train(pictures, tmp_path / "run", "--recipe", "paper", "--epochs", "10", "--knn-every", "0")
    lr = 0.2 * 8 / 256
    assert [row["lr"] for row in rows] == pytest.approx([lr] * 3 + [lr / 5] * 3 + [lr / 25] * 2 + [lr / 125] * 2,
                                                        abs=1e-6)
    assert [row["step"] for row in rows] == list(range(1, 11))
    group, = checkpoint["optimizer"]["param_groups"]
    assert group["momentum"] == 0.9 and group["nesterov"] and group["weight_decay"] == 5e-4
    assert len(group["params"]) == sum(1 for name in checkpoint["model"] if name.endswith(("weight", "bias")))
    assert rotnet.RECIPES["cifar"]["lr"] * 128 / 256 == 0.1
    rows, _ = train(pictures, tmp_path / "cosine", "--recipe", "paper", "--epochs", "10", "--knn-every", "0",
                    "--schedule", "cosine")
    assert rows[5]["lr"] == pytest.approx(lr / 2, abs=1e-6)


@pytest.mark.parametrize("flags, inputs", [([], 32), (["--one-rotation"], 8)])
def test_a_step_trains_on_every_rotation(pictures, tmp_path, monkeypatch, flags, inputs):
    seen, logits, plain = [], [], rotnet.RotNet.forward

    def forward(self, x):
        seen.append((len(x), self.training))
        logits.append(plain(self, x))
        return logits[-1]

    monkeypatch.setattr(rotnet.RotNet, "forward", forward)
    rows, _ = train(pictures, tmp_path / "run", "--max-steps", "2", "--knn-every", "1", *flags)
    assert [n for n, training in seen if training] == [inputs] * 2
    assert [n for n, training in seen if not training] == [12] * 3  # 3 images, before and after 2 epochs
    assert all({"knn", "knn_layer2", "knn_layer3", "val_rotation"} <= row.keys() for row in rows)
    if inputs == 32:  # 8 images upright, then all by 90 degrees, ...
        right = [100 * (x.argmax(dim=1) == torch.arange(32) // 8).float().mean().item() for x in logits if len(x) == 32]
        assert [row["rotation"] for row in rows[1:]] == pytest.approx(right) and right != [0, 0]


def test_held_out_figures_bear_the_name_of_their_split(pictures, tmp_path):
    for i in range(2):
        (tmp_path / "zoo/test").mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"val/{'ab'[i]}/{i}.png", tmp_path / "zoo/test")
    shutil.copytree(pictures / "train", tmp_path / "zoo/train")
    for root, split in ((pictures, "val"), (tmp_path / "zoo", "test")):
        rows, _ = train(root, tmp_path / split, "--epochs", "1", "--knn-split", split)
        for row in rows:
            held = {name for name in row if name.endswith(("_rotation", "_loss"))}
            assert held == {f"{split}_rotation", f"{split}_loss"}
        assert rows[0][f"{split}_loss"] == pytest.approx(math.log(4), abs=0.7)


def test_stopped_at_an_accuracy_then_resumed_equals_never_stopped(pictures, tmp_path, monkeypatch):
    rows, whole = train(pictures, tmp_path / "whole", "--epochs", "3")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(rotnet, "rotation_scores", lambda *args: (1.0, 30.0))
        rows, stopped = train(pictures, tmp_path / "run", "--epochs", "3", "--knn-every", "5", "--save-every", "5",
                              "--stop-at-accuracy", "30")
    assert [row["epoch"] for row in rows] == [0, 1] and stopped["step"] == 1
    assert rows[1]["knn"] is not None  # the last epoch is evaluated, --knn-every or not
    assert "stopped" in (tmp_path / "run/log.txt").read_text()
    rotnet.main(["--resume", str(tmp_path / "run"), "--stop-at-accuracy", "100", "--quiet"])
    resumed = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert resumed["step"] == whole["step"] == 3
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_pictures_without_validation(pictures, tmp_path):
    rows, _ = train(pictures / "train/a", tmp_path / "run", "--batch-size", "4", "--epochs", "1")
    assert [row["knn"] for row in rows] == [None, None] and "val_rotation" not in rows[1]


def test_views_picture(pictures, tmp_path):
    for flags, columns in (([], 5), (["--one-rotation"], 2)):
        rotnet.main(["--data", str(pictures), "--cache", str(tmp_path), "--views-png", str(tmp_path / "views.png"),
                     *TINY, *flags])
        assert Image.open(tmp_path / "views.png").size == (4 + columns * 100, 4 + 8 * 100)
