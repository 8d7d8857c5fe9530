"""harness/: flags, the folder of a run, checkpoints, weights from anywhere, and the wishes of a copied method, each in
a few lines of the loop that a method shows."""

import argparse
import copy
import errno
import importlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from test_resume import state

import augment
import common
import harness
import knn
import pictures
import simclr
import simsiam
from common import ResNet18, TwoCrops, UsageError
from harness import checkpoint, distributed, folder
from harness.command import Interrupted
from harness.flags import SHAPES, recipe_of, recipe_table
from harness.folder import read_metrics
from harness.log import Figures
from harness.parser import Parser, path
from harness.run import Run, compiled, set_up, state_of
from harness.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ("x", "not a whole number"), ("1.5", "not a whole number"), ("0", "at least 1"), ("11", "at most 10"),
])
def test_number_names_the_bound(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        harness.number(int, low=1, high=10)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1"])
def test_number_refuses_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError):
        harness.number(float, above=0)(text)


@pytest.mark.parametrize("given, filled", [
    ({}, (100, 10, 0.3)),
    ({"epochs": 10}, (10, 1, 0.3)),  # a shorter run climbs for a shorter while
    ({"epochs": 3}, (3, 0.3, 0.3)),  # a round number, as it is printed
    ({"epochs": 1000}, (1000, 10, 0.3)),
    ({"epochs": 3, "warmup_epochs": 2.0, "lr": 5.0}, (3, 2, 5)),
    ({"warmup_epochs": 0.0, "step_lr": 0.1}, (100, 0, None)),  # --lr plays no part then, nor does its scaling
])
def test_what_is_not_given_comes_from_the_recipe(given, filled):
    args = argparse.Namespace(**dict(epochs=None, warmup_epochs=None, lr=None, step_lr=None, lr_scaling=None) | given)
    harness.fill_flags(args, dict(warmup_epochs=10.0, epochs=100, lr=0.3, lr_scaling="sqrt"))
    assert (args.epochs, args.warmup_epochs, args.lr) == filled and (args.lr_scaling is None) == (args.lr is None)


@pytest.mark.parametrize("percent, chance, fix", [
    (0.95, 25, "did you mean 95?"), (0.95, 0.1, "did you mean 95?"), (1, 10, "did you mean 100?"),
    (25, 25, "take more"), (20, 25, "take more"), (0.2, 25, "take more"), (0.005, 0.1, "take more"),
    (25.1, 25, None), (95, 10, None), (None, 25, None),
])
def test_accuracies_that_stop_a_run_are_percent_above_chance(percent, chance, fix):
    if fix is None:
        return harness.check_stop(percent, chance)
    with pytest.raises(UsageError) as error:
        harness.check_stop(percent, chance)
    assert str(error.value).startswith(f"--stop-at-accuracy {percent:g}:") and str(error.value).endswith(fix)


@pytest.mark.parametrize("kind, text", [(int, "1" + "0" * 30), (int, "1" + "0" * 400), (int, "9223372036854775808"),
                                        (float, "1e308"), (float, "1e-300"), (float, "inf")])
def test_number_refuses_what_no_tensor_holds(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
        harness.number(kind, low=0)(text)


def test_path_expands_the_home_folder_and_refuses_what_no_system_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/x") == str(tmp_path / "x") and path("x~/y") == "x~/y"
    for text in ("x" * 300, "/x" * 4000, "", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            path(text)


def flags_parser():
    parser = Parser("", {"": {}})
    parser.flag("--batch-size", "", type=int, default=None)
    parser.flag("--temperature", "", type=float, default=None)
    parser.flag("--optimizer", "", choices=("sgd", "adamw"), default=None)
    parser.add_argument("files", nargs="*")
    return parser


def test_underscores_are_dashes():
    args = flags_parser().parse_args(["--batch_size=4", "--temperature", "-1", "a_b", "--", "--batch_size"])
    assert (args.batch_size, args.temperature, args.files) == (4, -1.0, ["a_b", "--batch_size"])


@pytest.mark.parametrize("given, hint", [
    ("--batch_sise 4", "--batch_sise: no such flag; did you mean --batch-size?"),
    ("-b 4", "did you mean --batch-size?"),
    ("--moco-t 1", "did you mean --temperature?"), ("--Temperature=1", "did you mean --temperature?"),
    ("--freeze", "did you mean linear.py --probe?"), ("--zzz", "--zzz: no such flag; --help"),
    ("--threshold 1", "--threshold: no such flag; --help"),  # this program has nothing like it
    ("--optimizer adam", "'adam'; did you mean adamw? (choose from sgd, adamw)"),
])
def test_an_unknown_flag_or_value_names_the_nearest(capsys, given, hint):
    with pytest.raises(SystemExit) as end:
        flags_parser().parse_args(given.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and hint in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# A program as small as can be
# ------------------------------------------------------------------------------------------------

RECIPES = {"photos": dict(image_size=8, stem="cifar", width=4, epochs=3, batch_size=4, lr=6.4, weight_decay=0.0,
                          warmup_epochs=0.0, knn_every=1)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """16 training images of 8 x 8 px, 4 steps an epoch: of class a dark, of b brighter, brightest without a label."""
    root, g = tmp_path_factory.mktemp("zoo"), torch.Generator().manual_seed(0)
    for i in range(28):
        split, label = ("train", "val", "test")[(i > 15) + (i > 21)], i % 2
        loose = split == "train" and i > 11
        place = root / "unlabeled" if loose else root / split / "ab"[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 60, (8, 8, 3), generator=g) + (180 if loose else 80 * label)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{i}.png")
    return root


@pytest.fixture
def start(zoo, tmp_path, monkeypatch):
    """start(flags...) opens the run of a program, this file, on the zoo; it works in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    cache = zoo.with_name(f"{zoo.name}-cache")
    every = ["--data", zoo, "--cache", cache, "--device", "cpu", "--amp", "off", "--quiet"]

    def open_run(*flags, recipes=RECIPES):
        flags = flags if "--resume" in flags else (*every, *flags)
        return harness.open_run(harness.parse(harness.training_parser(__file__, "", recipes), flags), recipes)

    return open_run


class Tiny(torch.nn.Module):
    """A backbone of 52 numbers. more: as many beside it."""

    def __init__(self, dim=4, more=0):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, dim))
        self.backbone.dim = dim
        self.register_buffer("more", torch.zeros(more))

    def forward(self, x):
        return self.backbone(x)


class Wide(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.backbone = ResNet18(width=width)

    def forward(self, x):
        return self.backbone(x)


def loss_of(network, images, run):
    """A loss that depends on the images, on the draws of the step and on torch's global generator."""
    x = images.float() / 255 * augment.uniforms(run.random, len(images)).float()[..., None, None]
    return (network(x) - torch.rand(())).square().mean()


def update(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def steps(run, kill_at=None):
    """run.steps(); the process is told to end while it works on step `kill_at`, counted from 1."""
    for batch in run.steps():
        if run.step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def train(start, *flags, model=Tiny, loss=loss_of, lr=0.1, scores=None, kill_at=None, at_epoch=lambda run: None):
    """Train a model and return it. scores: {epoch: what is reported as kNN}.  at_epoch: called behind every report."""
    with start(*flags) as run:
        model = run.place(model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        network = run.begin(model, optimizer, chance="0.1")
        if run.step == 0:
            run.report(knn=(scores or {}).get(0))
        for images, _, _ in steps(run, kill_at):
            optimizer.param_groups[0]["lr"] = lr
            value = loss(network, images, run)
            update(value, optimizer)
            run.record(loss=value)
            if run.epoch_ends:
                run.report(knn=(scores or {}).get(run.epoch))
                at_epoch(run)
    return model


def resumes_bit_equal(main):
    """main(flags..., kill_at=None) ended in mid-epoch, at an epoch's end, in mid-epoch again, is the same at last."""
    main("--out", "whole")
    flags = ["--out", "ended"]
    for step in (2, 4, 7):
        with pytest.raises(Interrupted, match=f"saved at step {step};"):
            main(*flags, kill_at=step)
        assert harness.load_checkpoint("ended")["step"] == step
        flags = ["--resume", "ended"]
    main(*flags)
    for one, two in zip(state("whole"), state("ended"), strict=True):
        assert one == two


# ------------------------------------------------------------------------------------------------
# The folder of a run
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ([], ["lr      0.1 per step of 4 images (6.4 per 256)"]),
    (["--step-lr", "0.1"], ["lr      0.1 per step of 4 images", "step-lr 0.1"]),
    (["--warmup-epochs", "10"], ["note    --warmup-epochs 10 of 3 epochs: ", " 0.3 is usual"]),
    (["--warmup-epochs", "1.6"], ["note    --warmup-epochs 1.6 of 3 epochs: "]),
])
def test_rate_and_warm_up_are_said_at_the_start(start, flags, words):
    train(start, *flags, "--out", "run")
    log = Path("run/log.txt").read_text().replace("\n        ", " ")
    assert all(word in log for word in words)
    assert ("note" in log) == ("--warmup-epochs" in flags) and (" per 256)" in log) == ("--step-lr" not in flags)


def test_best_is_kept_by_validation_only(start):
    scores = {1: 50.0, 2: 60.0, 3: 55.0}
    train(start, "--out", "val", scores=scores)
    assert harness.load_checkpoint("val/best.pt")["step"] == 8
    assert harness.load_checkpoint("val")["step"] == 12
    train(start, "--out", "test", "--knn-split", "test", scores=scores)
    assert not Path("test/best.pt").exists() and harness.load_checkpoint("test")["step"] == 12


def test_kept_checkpoints_stay_and_need_their_space(start, monkeypatch):
    needed, usage = [], shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        for keep in ([], ["--keep-every", "2"], ["--keep-every", "1"]):
            with pytest.raises(UsageError) as error:
                train(start, "--out", "full", *keep, model=lambda: Tiny(more=2_500_000))  # 10 MB
            needed.append(int(str(error.value).split("need ")[1].split(" MB")[0].replace(",", "")))
    assert needed == pytest.approx([60, 80, 120], abs=1)  # 0, 1 and 3 of 3 epochs
    assert not Path("full").exists()

    train(start, "--out", "run", "--keep-every", "2")
    kept = [file.name for file in Path("run").glob("epoch-*")]
    assert kept == ["epoch-0002.pt"] and harness.load_checkpoint(f"run/{kept[0]}")["step"] == 8
    train(start, "--out", "short", "--keep-every", "2", "--max-steps", "6")
    assert not list(Path("short").glob("epoch-*"))  # its second epoch is no whole one


def test_what_lies_in_a_run_already_needs_no_space_once_more(start):
    model = Tiny(more=2_500_000)  # 10 MB
    new, resumed = (checkpoint.bytes_needed(model, argparse.Namespace(keep_every=1, resume=resume), 3, 1)
                    for resume in (None, "run/last.pt"))
    assert (new - resumed) / 2e7 == pytest.approx(2, abs=0.01) and resumed / 2e7 == pytest.approx(3, abs=0.01)


def test_weights_that_are_not_finite_are_not_saved(start):
    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.sum().clone()

        @staticmethod
        def backward(_, g):
            return g * torch.full((4, 4), math.nan)

    def loss(network, images, run):  # finite; its gradient in the last step of the second epoch is not
        return Gradient.apply(network(images.float())) * 0 if run.step == 7 else loss_of(network, images, run)

    with pytest.raises(UsageError, match="the weights are not finite after step 8: lower --lr.* stays in run"):
        train(start, "--out", "run", loss=loss)
    assert harness.load_checkpoint("run")["step"] == 4


def test_a_branch_that_is_left_leaves_no_best_network(start):
    train(start, "--out", "run", "--keep-every", "1", scores={0: 30.0, 1: 40.0, 2: 90.0})
    train(start, "--resume", "run/epoch-0001.pt", scores={2: 30.0, 3: 35.0})
    assert harness.load_checkpoint("run/best.pt")["step"] == 12
    assert "kNN     30.00 % untrained, 35.00 % at best" in Path("run/log.txt").read_text()


def test_signals_end_a_program_again_once_the_last_step_is_saved(start):
    default = signal.getsignal(signal.SIGTERM)
    with start("--out", "run") as run:
        model = run.place(Tiny())
        run.begin(model, torch.optim.SGD(model.parameters(), lr=0.1), chance="0.1")
        for _ in run.steps():
            assert signal.getsignal(signal.SIGTERM) != default
            run.record(loss=torch.zeros(()))
            if run.epoch_ends:
                run.report(knn=None)
        assert signal.getsignal(signal.SIGTERM) == default


def test_the_means_of_one_process_stand_for_those_of_all(start, monkeypatch):
    def save(run):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "size", lambda: 2)
            meters.append(state_of(run)["meters"]["loss"])
        meters.append(state_of(run)["meters"]["loss"])

    meters = []
    train(start, "--out", "run", "--epochs", "1", at_epoch=save)
    assert meters[0] == (2 * meters[1][0], 2 * meters[1][1]) and meters[1][1] == 16
    monkeypatch.setattr("harness.log.size", lambda: 2)
    figures = Figures(watchful=False)
    figures.begin({"loss": meters[0]})
    assert (figures.meters["loss"].sum, figures.meters["loss"].count) == meters[1]
    assert type(figures.meters["loss"].sum) is float  # MPS adds no float64 tensor


def test_save_every(start):
    seen = []

    def look(network, images, run):
        seen.append(harness.load_checkpoint("run")["step"] if Path("run/last.pt").exists() else None)
        return loss_of(network, images, run)

    train(start, "--out", "run", "--save-every", "2", loss=look)
    assert seen == [None] * 8 + [8] * 4 and harness.load_checkpoint("run")["step"] == 12


class Crash(Exception):
    pass


def test_metrics_stand_once_after_a_resume(start):
    def crash(run):
        if run.epoch == 2:  # its line is written, its checkpoint is not
            raise Crash

    with pytest.raises(Crash):
        train(start, "--out", "run", scores={0: 30.0, 1: 40.0, 2: 90.0}, at_epoch=crash)
    assert [row["knn"] for row in read_metrics("run")] == [30, 40, 90]
    train(start, "--resume", "run", scores={2: 35.0, 3: 36.0})
    rows = read_metrics("run")
    assert [(row["epoch"], row["knn"]) for row in rows] == [(0, 30), (1, 40), (2, 35), (3, 36)]
    assert list(rows[1])[:7] == ["epoch", "step", "seconds", "loss", "lr", "images_per_second", "knn"]
    assert json.loads(Path("run/args.json").read_text())["width"] == 4
    assert harness.load_checkpoint("run/best.pt")["step"] == 4  # of before: its score is known still
    assert "kNN     30.00 % untrained, 40.00 % at best" in Path("run/log.txt").read_text()


def test_means_of_an_epoch_go_on_after_a_resume(start):
    train(start, "--out", "whole")
    with pytest.raises(Interrupted):
        train(start, "--out", "run", kill_at=6)
    train(start, "--resume", "run")
    whole, run = ([row["loss"] for row in read_metrics(name)] for name in ("whole", "run"))
    assert whole == run and whole[0] is None


HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"


def test_a_folder_belongs_to_one_program_at_a_time(start):
    with pytest.raises(Interrupted):
        train(start, "--out", "run", kill_at=3)
    last = Path("run/last.pt").rename("last.pt")
    with subprocess.Popen([sys.executable, "-c", HOLDER, "run/log.txt"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UsageError, match="--out .*another program"):
            train(start, "--out", "run")
        shutil.copy(last, "run/last.pt")
        with pytest.raises(UsageError, match="--resume .*another program"):
            train(start, "--resume", "run")
        other.kill()
    train(start, "--resume", "run")  # a killed one leaves no lock behind
    shutil.copytree("run", "late")
    os.remove("late/last.pt")
    with pytest.raises(UsageError, match="holds a run already"):  # it came after the flags were read
        train(start, "--out", "late", model=lambda: shutil.copy(last, "late/last.pt") and Tiny())


def test_a_folder_without_locks_trains(start, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    train(start, "--out", "nfs")
    monkeypatch.setattr(folder, "fcntl", None)
    train(start, "--out", "windows")
    assert harness.load_checkpoint("nfs")["step"] == harness.load_checkpoint("windows")["step"] == 12


def test_a_resumed_run_says_how_its_rate_jumps(start):
    with pytest.raises(Interrupted):
        train(start, "--out", "run", kill_at=5)
    for number, (epochs, lr, says) in enumerate(((3, 0.05, False), (9, 0.1, False), (9, 0.05, True))):
        shutil.copytree("run", f"run{number}")
        train(start, "--resume", f"run{number}", "--epochs", epochs, lr=lr)
        note = "--epochs 9 (was 3): the learning rate goes from 0.1 to 0.05"
        assert (note in Path(f"run{number}/log.txt").read_text()) == says


def test_a_resume_says_what_differs(start):
    def classifier(classes):
        model = Wide()
        model.fc = torch.nn.Linear(32, classes)
        return model

    train(start, "--out", "run", model=lambda: classifier(2))
    with pytest.raises(UsageError, match=r"mismatch for backbone.conv1.weight: .*\[4, 3, 3, 3\].*\[8, 3, 3, 3\]"):
        train(start, "--resume", "run", model=lambda: Wide(8))
    saved, model = harness.load_checkpoint("run"), classifier(3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UsageError, match="the data had 2 classes and has 3, which differ in dog; "):
        checkpoint.restore(saved, model, optimizer, scaler, {}, ["a", "b", "dog"])


def test_the_log_takes_any_letter(start, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    train(start, "--out", "run", at_epoch=lambda run: run.say("日本 \udcff"))
    assert "日本 \\udcff\n".encode() in Path("run/log.txt").read_bytes()


def test_a_cut_off_last_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "lo')
    assert read_metrics(tmp_path) == [{"epoch": 0}]


def test_views_picture_shows_the_pixels(start, zoo, monkeypatch):
    """--views-png: a row an image, the packed picture, then every view; nothing is begun; one process writes it."""
    seen = {}

    def views(images, aspect, generator):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (run.dataset.mean, run.dataset.std))
        seen["images"] = images
        x = (images.float() / 255 - mean) / std
        return x, x.flip(3), x.flip(2)

    for main in (False, True):
        monkeypatch.setattr("harness.views.is_main", lambda main=main: main)
        with start("--views-png", "v.png") as run:
            run.begin(Tiny(), torch.optim.SGD(Tiny().parameters(), 0.1), chance="0", views=views)
        assert os.path.exists("v.png") == main
    picture = torchvision.transforms.functional.pil_to_tensor(Image.open("v.png")).float()
    assert picture.shape[1:] == (4 + 4 * 100, 4 + 4 * 100) and os.listdir(".") == ["v.png"]
    for row in range(4):
        tile = [picture[:, 4 + 100 * row:100 + 100 * row, 4 + 100 * i:100 + 100 * i] for i in range(4)]
        pixels = seen["images"][row].float().repeat_interleave(12, 1).repeat_interleave(12, 2)
        for shown, expected in zip(tile, (pixels, pixels, pixels.flip(2), pixels.flip(1)), strict=True):
            assert (shown - expected).abs().max() <= 1


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def test_checkpoint_restores_everything(start):
    def main(*flags, kill_at=None):
        with start(*flags) as run:
            model = run.place(Wide())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            network = run.begin(model, optimizer, chance="0")
            if run.step:
                return model, optimizer, torch.rand(3)
            for images, _, _ in steps(run, kill_at):
                loss = loss_of(network, images, run)
                update(loss, optimizer)
                run.record(loss=loss)
                parts[:] = model, optimizer

    parts = []
    with pytest.raises(Interrupted):
        main("--out", "run", kill_at=3)
    drawn, saved = torch.rand(3), harness.load_checkpoint("run", "test_harness")
    (model, optimizer), (other, other_optimizer, draws) = parts, main("--resume", "run")
    assert torch.equal(draws, drawn) and saved["step"] == 3
    for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    moments = [s["momentum_buffer"] for s in optimizer.state.values()]
    for p, s in zip(moments, other_optimizer.state.values(), strict=True):
        assert torch.equal(p, s["momentum_buffer"])
    backbone = harness.load_backbone(saved)
    assert not backbone.training
    assert saved["epoch"] == 0 and saved["classes"] == ["a", "b"]
    theirs = torchvision.models.resnet18().state_dict().keys() - {"fc.weight", "fc.bias"}
    assert saved["backbone"].keys() == theirs - {k for k in theirs if "downsample" in k and "layer1" in k}


def test_a_checkpoint_of_another_method_is_refused(start):
    train(start, "--out", "run")
    with pytest.raises(UsageError, match="test_harness.py"):
        harness.load_checkpoint("run", "moco")


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_a_strangers_file_is_refused_in_one_line(tmp_path, capsys):
    file = tmp_path / "x.pt"
    for content, reason in ((b"", "not a readable"), (b"hello", "not a readable"), (None, "could run code")):
        if content is None:
            torch.save({"model": Evil()}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(UsageError, match=reason) as error:
            harness.load_checkpoint(file)
        assert "\n" not in str(error.value)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError):
        harness.load_checkpoint(file)
    torch.save({"model": {}}, file)
    with pytest.raises(UsageError, match="not a checkpoint of this project"):
        harness.load_checkpoint(file)
    with pytest.raises(UsageError, match="no checkpoint there"):
        harness.load_checkpoint(tmp_path / "missing")
    assert "code from a checkpoint ran" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Weights from anywhere
# ------------------------------------------------------------------------------------------------


def named(state, before):
    return {f"{before}{name}": value for name, value in state.items()}


def without_pool(net):
    """Its children in a row, the max-pool left out too, as some write it for small pictures."""
    return torch.nn.Sequential(*[child for name, child in net.named_children() if name not in ("maxpool", "fc")])


# what is written for a network, the part of the note that says where it was found and what was left out
FORMS = {
    "torchvision": (lambda net: net.state_dict() | {"fc.weight": torch.ones(2, 32)}, "left out: fc"),
    "numbered": (lambda net: torch.nn.Sequential(*list(net.children())[:-1]).state_dict(), "width 4"),
    "numbered, classified": (lambda net: torch.nn.Sequential(*net.children(), torch.nn.Linear(3, 3)).state_dict(),
                             "left out: 9"),
    "numbered without pool": (lambda net: named(without_pool(net).state_dict(), "module.f."), "from module.f.*"),
    "module": (lambda net: named(net.state_dict(), "module."), "from module.*"),
    "beside a projector": (lambda net: {"model": named(net.state_dict(), "encoder.") | {"proj.0.bias": torch.ones(1)},
                                        "epoch": 3}, "from model.encoder.*; left out: model.proj"),
    "two encoders": (lambda net: {"state_dict": named(net.state_dict(), "module.encoder_q.") |
                                  named(ResNet18(width=4).state_dict(), "module.encoder_k.")},
                     "left out: state_dict.module.encoder_k"),
    "half": (lambda net: {name: value.half() for name, value in net.state_dict().items()}, "width 4"),
    "without counters": (lambda net: {name: value for name, value in net.state_dict().items() if "num_" not in name},
                         "width 4"),
}


def some_network(stem):
    """A ResNet18 of which every weight and buffer is a multiple of 1/64, so that half precision has it too."""
    net = ResNet18(stem=stem, width=4)
    for value in net.state_dict().values():
        value.copy_((64 * torch.rand(value.shape)).round() / 64)
    return net


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_form_are_understood(tmp_path, monkeypatch, form, stem):
    net, (write, words) = some_network(stem), FORMS[form]
    monkeypatch.chdir(tmp_path)  # a path as long as this may fill a line of its own
    torch.save(write(net), "net.pth")
    found = load_weights("net.pth")
    assert (found["stem"], found["width"]) == (stem, 4)
    assert words in " ".join(found["note"].split()) and max(map(len, found["note"].splitlines()[1:]), default=0) < 80
    for name, value in net.state_dict().items():
        assert "num_batches" in name or torch.equal(found["backbone"][name], value), name


def test_weights_of_torchvision_and_of_our_runs(start, tmp_path):
    theirs = torchvision.models.resnet18().eval()
    encoder = torch.nn.Sequential(*list(theirs.children())[:-1])
    x = torch.randn(2, 3, 64, 64)
    for tensors in (theirs.state_dict(), encoder.state_dict()):
        torch.save(tensors, tmp_path / "theirs.pth")
        ours = harness.load_backbone(load_weights(tmp_path / "theirs.pth"))
        torch.testing.assert_close(ours(x), encoder(x).flatten(1), atol=1e-5, rtol=1e-5)
    model = train(start, "--out", "run", model=Wide, scores={3: 50.0})
    for file in ("run", "run/best.pt"):
        found = load_weights(file)
        assert "left out" not in found["note"]
        assert all(torch.equal(v, found["backbone"][name]) for name, v in model.backbone.state_dict().items())


@pytest.mark.parametrize("change, reason", [
    ({"conv1.weight": None}, "conv1.weight is missing"),
    ({"conv1.weight": torch.zeros(4, 1, 7, 7)}, r"conv1.weight is \(4, 1, 7, 7\); .* \(64, 3, 7, 7\)"),
    ({"layer4.1.bn2.running_var": None}, 'Missing key.*"layer4.1.bn2.running_var"'),
    ({"layer1.2.conv1.weight": torch.zeros(4, 4, 3, 3)}, 'Unexpected key.*"layer1.2.conv1.weight"'),  # ResNet-34
    ({"layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}, r"layer1.0.conv1.weight: .*\[4, 4, 1, 1\]"),  # 50
    ({"layer1.0.conv1.weight": None}, "no ResNet-18 in it"),
])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change, reason):
    state = ResNet18(width=4).state_dict() | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "net.pth")
    with pytest.raises(UsageError, match=rf"net.pth: .*{reason}") as error:
        load_weights(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


def test_a_network_without_a_run_is_shaped_as_in_the_recipes():
    for name in ("simsiam", "moco", "simclr", "rotnet"):
        for kind, recipe in importlib.import_module(name).RECIPES.items():
            shape = SHAPES[{"paper": "photos", "paper-cifar": "cifar"}.get(kind, kind)]
            assert shape.items() <= recipe.items(), (name, kind)


# ------------------------------------------------------------------------------------------------
# What a copied method may wish for
# ------------------------------------------------------------------------------------------------


def test_a_teacher_that_moves_at_the_end_of_the_loop_is_saved_and_restored(start):
    last = {}

    def main(*flags, kill_at=None):
        with start(*flags) as run:
            model = run.place(Tiny())
            teacher = last["teacher"] = copy.deepcopy(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            network = run.begin(model, optimizer, chance="0", teacher=teacher)
            for images, _, _ in steps(run, kill_at):
                loss = loss_of(network, images, run) + loss_of(teacher, images, run).detach()
                update(loss, optimizer)
                run.record(loss=loss)
                if run.epoch_ends:
                    run.report()
                with torch.no_grad():
                    for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                        slow.lerp_(fast, 0.1)

    with pytest.raises(Interrupted):
        main("--out", "first", kill_at=3)
    saved = harness.load_checkpoint("first")["states"]["teacher"]
    assert all(torch.equal(value, saved[name]) for name, value in last["teacher"].state_dict().items())
    resumes_bit_equal(main)


def test_alternating_steps_with_two_optimizers(start):
    last = {}

    def main(*flags, kill_at=None):
        with start(*flags) as run:
            model = run.place(Tiny())
            first = torch.optim.SGD([model.backbone[2].weight], lr=0.1, momentum=0.9)
            second = last["second"] = torch.optim.Adam([model.backbone[2].bias], lr=0.01)
            network = run.begin(model, first, chance="0", second=second)
            for images, _, _ in steps(run, kill_at):
                loss = loss_of(network, images, run)
                update(loss, second if run.step % 2 else first)
                run.record(loss=loss)
                if run.epoch_ends:
                    run.report()

    resumes_bit_equal(main)
    (theirs,) = harness.load_checkpoint("ended")["states"]["second"]["state"].values()
    (ours,) = last["second"].state.values()
    assert theirs["step"] == ours["step"] == 6 and torch.equal(theirs["exp_avg"], ours["exp_avg"])


def test_gradients_may_gather_over_parts_of_a_batch(start):
    def plain(network, images):
        return network(images.float() / 255).square().mean()

    def main(parts, out):
        with start("--out", out) as run:
            model = run.place(Tiny())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            network = run.begin(model, optimizer, chance="0")
            for images, _, _ in run.steps():
                optimizer.zero_grad()
                total = 0
                for part in images.chunk(parts):
                    loss = plain(network, part) / parts
                    loss.backward()
                    total += loss.detach()
                optimizer.step()
                run.record(loss=total)
                if run.epoch_ends:
                    run.report()
        return model

    one, two = main(1, "one"), main(2, "two")
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert [r["loss"] for r in read_metrics("one")] == pytest.approx([r["loss"] for r in read_metrics("two")], abs=1e-5)


def test_labels_come_with_their_images(start):
    found = []
    with start("--out", "run") as run:
        optimizer = torch.optim.SGD((model := run.place(Tiny())).parameters(), lr=0.1)
        network = run.begin(model, optimizer, chance="0")
        for images, aspect, labels in run.steps():
            assert len(images) == len(aspect) == len(labels) == 4
            found += zip(labels.tolist(), images.float().mean(dim=(1, 2, 3)).tolist(), strict=True)
            loss = loss_of(network, images, run)
            run.record(loss=loss)
    assert len(found) == 3 * 16 and [label for label, _ in found].count(-1) == 3 * 4
    assert all(label == (0 if light < 70 else 1 if light < 160 else -1) for label, light in found)


def test_more_than_two_views(start):
    def main(*flags):
        with start(*flags) as run:
            def view(images, aspect, generator):
                return images.float() / 255 * augment.uniforms(generator, len(images)).float()[..., None, None]

            large, small = TwoCrops(view), TwoCrops(lambda *batch: view(*batch)[..., ::2, ::2])
            model = run.place(Tiny())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            network = run.begin(model, optimizer, chance="0", views=lambda *batch: [*large(*batch), *small(*batch)])
            for images, aspect, _ in run.steps():
                views = [*large(images, aspect, run.random), *small(images, aspect, run.random)]
                seen.append([view.shape[-1] for view in views])
                loss = torch.stack([network(view) for view in views]).std(dim=0).mean()
                update(loss, optimizer)
                run.record(loss=loss)

    seen = []
    main("--views-png", "views.png")
    assert Image.open("views.png").width == 4 + 5 * 100 and not seen
    main("--out", "run")
    assert seen == [[8, 8, 4, 4]] * 12


def test_a_score_of_another_name(tmp_path):
    """Images without files, and a score that is not called kNN."""
    args = harness.parse(harness.training_parser(__file__, "", RECIPES),
                         ["--out", str(tmp_path / "run"), "--device", "cpu", "--amp", "off", "--quiet"])
    harness.fill_flags(args, RECIPES["photos"])
    source = types.SimpleNamespace(name="noise", kind="photos", description=["16 images of noise"], contents={})
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    split = pictures.Split(images, torch.arange(16) % 2, torch.ones(16), [""] * 16)
    dataset = types.SimpleNamespace(train=split, val=split, classes=["a", "b"], mean=(0.5,) * 3, std=(0.25,) * 3)
    with Run(args, source, *set_up(args), score="mine", title="mine", best="top.pt") as run:
        run.feed(dataset, pictures.Batches(split, 4, "cpu", args.seed))
        model = run.place(Tiny())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        network = run.begin(model, optimizer, chance="0")
        run.report(mine=5.0)
        for images, _, _ in run.steps():
            loss = loss_of(network, images, run)
            update(loss, optimizer)
            run.record(loss=loss)
            if run.epoch_ends:
                run.report(mine=(50.0, 70.0, 60.0)[run.epoch - 1], spread=1.5)
    assert harness.load_checkpoint(tmp_path / "run/top.pt")["step"] == 8 and not (tmp_path / "run/best.pt").exists()
    rows = read_metrics(tmp_path / "run")
    assert [row["mine"] for row in rows] == [5, 50, 70, 60] and "knn" not in rows[1]
    log = (tmp_path / "run/log.txt").read_text()
    assert "mine 70.00 %" in log and "spread 1.500" in log and "mine    5.00 % untrained, 70.00 % at best" in log


def test_a_run_may_stop_early_and_go_on(start):
    def main(*flags, stop_at=None):
        with start(*flags) as run:
            model = run.place(Tiny())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            network = run.begin(model, optimizer, chance="0")
            for images, _, _ in run.steps():
                loss = loss_of(network, images, run)
                update(loss, optimizer)
                run.record(loss=loss)
                if run.epoch_ends:
                    run.report(stop="here, for a reason" if run.epoch == stop_at else None)

    main("--out", "whole")
    main("--out", "ended", "--save-every", "100", stop_at=2)
    assert harness.load_checkpoint("ended")["step"] == 8 and len(read_metrics("ended")) == 2
    assert "stopped here, for a reason\n" in Path("ended/log.txt").read_text()
    main("--resume", "ended")
    assert state("whole") == state("ended")


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc, self.backbone.dim = torch.nn.Identity(), 512

    def forward(self, x):
        return self.backbone(x)


def test_a_backbone_of_torchvision_trains_and_is_evaluated(start):
    def main(*flags):
        with start(*flags) as run:
            monitor = knn.Monitor(run)
            model = run.place(Theirs())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            network = run.begin(model, optimizer, chance="0")
            for images, _, _ in run.steps():
                loss = loss_of(network, images, run)
                update(loss, optimizer)
                run.record(loss=loss)
                if run.epoch_ends:
                    run.report(**monitor(model.backbone))

    main("--out", "run", "--knn-k", "5", "--max-steps", "2")
    main("--resume", "run", "--max-steps", "4")
    assert all(row["knn"] is not None for row in read_metrics("run"))
    saved = harness.load_checkpoint("run")
    assert saved["step"] == 4
    Theirs().backbone.load_state_dict(saved["backbone"])


def test_a_backbone_is_rebuilt_by_the_program_that_is_named(start, capsys):
    model = train(start, "--out", "run")
    saved = harness.load_checkpoint("run")
    with pytest.raises(UsageError, match="test_harness run is no ResNet18; .*--program FILE.py") as error:
        harness.load_backbone(saved)
    assert "\n" not in str(error.value)
    Path("mine.py").write_text("from test_harness import Tiny\ndef build_model(args):\n    return Tiny(args.width)\n")
    backbone = harness.load_backbone(saved, program="mine.py")
    x = torch.rand(2, 3, 8, 8)
    assert not backbone.training and torch.equal(backbone(x), model.backbone(x))
    Path("other.py").write_text("from test_harness import Tiny\ndef build_model(args):\n    return Tiny(5)\n")
    Path("empty.py").write_text("")
    for program, words in (("other.py", "not the one that other.py builds"), ("nowhere.py", "no such Python file"),
                           ("empty.py", "has no build_model")):
        with pytest.raises(UsageError, match=words):
            harness.load_backbone(saved, program=program)


def no_dim():
    model = Tiny()
    del model.backbone.dim
    return model


@pytest.mark.parametrize("model", [no_dim, lambda: torch.nn.Linear(2, 2)])
def test_a_model_without_a_backbone_of_known_width_is_refused(start, model):
    with pytest.raises(UsageError, match=r"backbone.dim: .*\(N, backbone.dim\)") as error:
        train(start, "--out", "run", model=model)
    assert "\n" not in str(error.value) and not Path("run").exists()


def test_recipes_and_flags_that_do_not_match_are_refused():
    both = {kind: dict(RECIPES["photos"]) for kind in ("toy", "photos")}
    both["photos"]["lambd"] = 0.005
    with pytest.raises(UsageError, match=r"RECIPES\['photos'\] has 'lambd'.* no flag --lambd\b") as error:
        harness.parse(harness.training_parser(__file__, "", both), [])
    assert "\n" not in str(error.value)
    parser = harness.training_parser(__file__, "", both)
    with pytest.raises(UsageError, match=r"--lambd: .* no default, .*RECIPES\['toy'\] has no 'lambd'") as error:
        parser.flag("--lambd", "weight of what is not on the diagonal", type=harness.number(float, above=0))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"--lr: .* no default, .*RECIPES\['toy'\] has no 'lr'"):
        harness.training_parser(__file__, "", both | {"toy": {name: both["toy"][name] for name in both["toy"]
                                                                if name != "lr"}})
    both["toy"]["lambd"] = 0.01
    parser = harness.training_parser(__file__, "", both)
    parser.flag("--lambd", "weight of what is not on the diagonal", type=harness.number(float, above=0))
    assert harness.parse(parser, []).lambd is None
    assert "(default: toy 0.01, photos 0.005)" in " ".join(parser.format_help().split())


def test_recipe_list_prints_a_table_of_the_defaults(capsys):
    both = {"toy": dict(lr=0.1, batch_size=4), "photos": dict(lr=0.25, batch_size=8, queue=2)}
    assert recipe_table(both) == ["                    toy      photos", "--lr                0.1      0.25",
                                  "--batch-size        4        8", "--queue             -        2"]
    with pytest.raises(SystemExit) as end:
        simsiam.parse_args(["--recipe", "list"])
    out = capsys.readouterr().out.splitlines()
    assert end.value.code in (0, None) and out[0].split() == ["toy", "cifar", "stl10", "photos", "paper"]
    assert max(map(len, out)) < 80 and any(line.startswith("--min-crop") for line in out)


@pytest.mark.parametrize("flags, lr", [((), 6.4), (("--recipe", "paper"), 3.2), (("--recipe=paper", "--lr", "1"), 1.0)])
def test_recipe_paper_takes_the_papers_settings_for_photos(start, flags, lr):
    both = RECIPES | {"paper": RECIPES["photos"] | {"lr": 3.2}}
    with start(*flags, "--out", "run", recipes=both) as run:
        assert run.args.lr == lr


def test_recipe_paper_of_simclr_on_cifar_is_appendix_b9():
    import simclr

    def recipe(kind):
        source = types.SimpleNamespace(kind=kind, splits={"train": pictures.Items([], [], counts=(0, 45_000))})
        return recipe_of(simclr.parse_args(["--recipe", "paper"]), simclr.RECIPES, source)
    assert recipe("cifar").items() >= dict(optimizer="lars", lr=1.0, lr_scaling="linear", weight_decay=1e-6,
                                           min_crop=0.08, grey=0.2, temperature=0.5, epochs=1000).items()
    assert recipe("photos") == simclr.RECIPES["paper"]


def test_recipe_paper_where_there_is_none_is_refused(start):
    with pytest.raises(UsageError, match="--recipe paper: test_harness.py has none"):
        start("--recipe", "paper", "--out", "run")


@pytest.mark.parametrize("images, batch, queue", [
    (48, 16, 16), (500, 128, 128), (513, 256, 256), (4500, 256, 1024), (70_000, 256, 4096)])
def test_few_images_make_a_small_batch_and_queue(images, batch, queue):
    source = types.SimpleNamespace(kind="photos", description=[], splits={"train": pictures.Items(
        [], [], counts=(0, images))})
    args = types.SimpleNamespace(data="few", recipe=None, batch_size=None, queue_size=None)
    table = {kind: dict(batch_size=256, queue_size=4096) for kind in ("photos", "paper")}
    assert recipe_of(args, table, source) == dict(batch_size=batch, queue_size=queue)
    assert f"--queue-size {queue}, not 4096" in " ".join(" ".join(source.description).split()) or queue == 4096
    args.batch_size, source.description = 40, []  # given: not said again
    recipe_of(args, table, source)
    assert "--batch-size" not in " ".join(source.description)
    args.recipe = "paper"
    assert recipe_of(args, table, source) == dict(batch_size=256, queue_size=4096)


def test_data_of_a_kind_without_a_recipe_is_refused(start):
    with pytest.raises(UsageError, match="RECIPES.*photos"):
        start("--out", "run", recipes={"toy": RECIPES["photos"]})


def test_flags_stay_as_they_are_once_the_run_is_open(start):
    with start("--out", "run", "--max-steps", "6") as run:
        before = copy.deepcopy(vars(run.args))
        assert None not in (before["lr"], before["epochs"], before["warmup_epochs"], before["kind"])
        optimizer = torch.optim.SGD((model := run.place(Tiny())).parameters(), lr=0.1)
        network = run.begin(model, optimizer, chance="0")
        for images, _, _ in run.steps():
            loss = loss_of(network, images, run)
            update(loss, optimizer)
            run.record(loss=loss)
            if run.epoch_ends:
                run.report(knn=20.0)
    assert vars(run.args) == before


def test_a_fork_in_any_folder_is_a_method_of_its_own(start, zoo, tmp_path, capsys):
    shutil.copy(ROOT / "simsiam.py", tmp_path / "mine.py")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path / "cache"))
    tiny = "--width 4 --image-size 8 --stem cifar --dim 8 --pred-dim 4 --batch-size 4 --max-steps 2 --knn-every 0"
    done = subprocess.run([sys.executable, "mine.py", "--data", zoo, "--device", "cpu", *tiny.split()], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("mine-") and harness.load_checkpoint(run)["method"] == "mine"
    assert json.loads((run / "args.json").read_text())["method"] == "mine"
    with pytest.raises(SystemExit) as end:
        importlib.import_module("simsiam").main(["--resume", str(run)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "a run of mine.py, not of simsiam.py: that one" in err and len(err.splitlines()) == 1


def test_amp_auto_is_tried_once_and_a_resumed_run_keeps_it(tmp_path, monkeypatch, capsys):
    flags = ["--width", "4", "--image-size", "16", "--knn-every", "0", "--device", "cpu", "--cache", str(tmp_path)]
    for gain, more in ((1.5, ["--out", str(tmp_path / "run")]), (0.5, ["--resume", str(tmp_path / "run")])):
        monkeypatch.setattr(common, "bf16_gain", lambda width, gain=gain: {4: gain}[width])
        simclr.main([*flags, "--max-steps", str(int(4 - 2 * gain)), *more])
        assert "on cpu, bf16 (bf16: 1.5 times as fast)" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run/args.json").read_text())["amp"] == "bf16"


def test_compile_takes_static_shapes_and_a_machine_that_cannot_goes_on_without(tmp_path, monkeypatch):
    asked, marks, flags = [], [], ["--width", "4", "--image-size", "16", "--knn-every", "0", "--device", "cpu", "--amp",
                                   "off", "--cache", str(tmp_path), "--max-steps", "2", "--compile", "--quiet"]

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nnor anything else")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    for compiler, note in ((lambda function, **_: function, "may not pay"), (no_compiler, "without: no C++ compiler")):
        monkeypatch.setattr(torch, "compile", compiler)
        simclr.main([*flags, "--out", str(tmp_path / note[:3])])
        assert note in " ".join((tmp_path / note[:3] / "log.txt").read_text().split())
    assert asked == [{"mode": None, "dynamic": False}] and len(marks) == 4  # one for each step


def test_compile_makes_cuda_graphs_in_one_process_on_a_gpu(monkeypatch):
    asked, gpu = [], argparse.Namespace(type="cuda")
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.append(mode) or function)
    monkeypatch.setattr(torch, "ones", lambda n, device: n)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, dynamic: asked.append(mode))
    for together in (False, True):
        monkeypatch.setattr(distributed, "together", lambda together=together: together)
        compiled(torch.nn.Linear(1, 1), None, argparse.Namespace(args=argparse.Namespace(compile=True), device=gpu))
    assert asked == ["reduce-overhead", "reduce-overhead", None, None]
