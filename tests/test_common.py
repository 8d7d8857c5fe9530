"""common.py: the network against torchvision's, the schedule in closed form, meters, runs, checkpoints."""

import argparse
import errno
import functools
import importlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from PIL import Image

import common

# ------------------------------------------------------------------------------------------------
# ResNet18
# ------------------------------------------------------------------------------------------------


def test_resnet18_is_torchvisions_both_ways():
    torch.manual_seed(0)
    ours, theirs = common.ResNet18(1000, "imagenet"), torchvision.models.resnet18()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 3, 64, 64)
    for network in (ours, theirs):
        network.train()
        network(x).square().mean().backward()
    assert torch.equal(ours(x), theirs(x))
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name
    theirs.load_state_dict(common.ResNet18(1000, "imagenet").state_dict(), strict=True)


def test_resnet18_starts_as_torchvisions():
    for zero in (False, True):
        torch.manual_seed(3)
        ours = common.ResNet18(1000, "imagenet", zero_init_residual=zero)
        torch.manual_seed(3)
        theirs = torchvision.models.resnet18(zero_init_residual=zero)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_resnet18_without_classifier_gives_pooled_features():
    x = torch.randn(2, 3, 32, 32)
    network = common.ResNet18(stem="cifar", width=8).eval()
    assert network(x).shape == (2, 64)
    assert network.conv1(x).shape[-1] == 32  # the CIFAR stem keeps every pixel
    assert common.ResNet18(stem="imagenet", width=8).conv1(x).shape[-1] == 16
    layers = network.features(x, ("layer2", "layer4"))
    assert {name: f.shape[1] for name, f in layers.items()} == {"layer2": 16, "layer4": 64}
    assert torch.equal(layers["layer4"], network(x))
    with pytest.raises(ValueError, match="stem"):
        common.ResNet18(stem="imagnet")


NARROW = """
import torch, common
for width in range(1, 9):
    network = torch.nn.Sequential(common.ResNet18(stem="cifar", width=width)).to(memory_format=torch.channels_last)
    for _ in range(3):
        x = torch.randn(16, 3, 16, 16).to(memory_format=torch.channels_last)
        network(x).square().mean().backward()
    strides = [p.stride() for p in network.parameters() if p.dim() == 4]
    plain = [torch.empty(p.shape).stride() for p in network.parameters() if p.dim() == 4]
    assert (strides == plain) == (width < 8)
"""


def test_narrow_networks_keep_off_channels_last_and_do_not_crash():
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(common.__file__))
    done = subprocess.run([sys.executable, "-c", NARROW], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------
# TwoCrops, AverageMeter, LRScheduler, randomness
# ------------------------------------------------------------------------------------------------


def test_two_crops_draw_twice():
    generator = torch.Generator().manual_seed(0)
    x1, x2 = common.TwoCrops(lambda x, g: x + torch.rand(x.shape, generator=g))(torch.zeros(4), generator)
    assert not torch.equal(x1, x2)


def test_two_crops_give_each_view_its_own_transform():
    def view(sign, x, g):
        return x + sign * torch.rand(x.shape, generator=g)

    two_crops = common.TwoCrops(functools.partial(view, 1), functools.partial(view, -1))
    x1, x2 = two_crops(torch.zeros(4), torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    assert torch.equal(x1, torch.rand(4, generator=g)) and torch.equal(x2, -torch.rand(4, generator=g))  # in this order


def test_average_meter_weights_by_count_and_stays_a_tensor():
    meter = common.AverageMeter()
    meter.update(torch.tensor(1.0, requires_grad=True), 96)
    meter.update(torch.tensor(5.0), 32)  # a short last batch counts a third of a full one
    assert torch.is_tensor(meter.sum) and not meter.sum.requires_grad
    assert meter.avg == 2.0
    assert math.isnan(common.AverageMeter().avg)


def make_optimizer():
    w, v = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [w]}, {"params": [v], "fix_lr": True}], lr=9.0)


def test_schedule_warms_up_then_follows_the_cosine():
    optimizer = make_optimizer()
    schedule = common.LRScheduler(optimizer, 0.4, total_steps=110, warmup_steps=10)
    expected = [0.4 * (s + 1) / 10 for s in range(10)]
    expected += [0.2 * (1 + math.cos(math.pi * s / 100)) for s in range(100)]
    for step, lr in enumerate(expected):
        assert schedule.step(step) == pytest.approx(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.param_groups[1]["lr"] == 0.4  # the predictor's rate stays, in warm-up too
    assert schedule.step(55) == pytest.approx(expected[55])  # no state: any step in any order


def test_schedule_in_steps_and_constant():
    steps = common.LRScheduler(make_optimizer(), 1.0, 200, kind="steps", milestones=(60, 120), factor=0.2)
    assert [steps.lr_at(s) for s in (0, 59, 60, 119, 120)] == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    assert common.LRScheduler(make_optimizer(), 0.3, 9, kind="constant").lr_at(8) == 0.3
    with pytest.raises(ValueError, match="kind"):
        common.LRScheduler(make_optimizer(), 1.0, 1, kind="linear")


def test_reseed_depends_on_every_number():
    draw = lambda *numbers: torch.rand(4, generator=common.reseed(torch.Generator(), *numbers)).tolist()  # noqa: E731
    assert draw(0, 7) == draw(0, 7)
    draws = [draw(0, 7), draw(0, 8), draw(1, 7), draw(7, 0), draw(0, 7, 0)]
    assert len({tuple(d) for d in draws}) == 5


def test_precision_and_device_errors():
    with pytest.raises(common.UsageError, match="--device cuda:77"):
        common.pick_device("cuda:77")
    with pytest.raises(common.UsageError, match="--amp fp16"):
        common.pick_precision("fp16", torch.device("cpu"))
    autocast, scaler = common.pick_precision("bf16", torch.device("cpu"))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not scaler.is_enabled()
    autocast, _ = common.pick_precision("off", torch.device("cpu"))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ("x", "not a whole number"), ("1.5", "not a whole number"), ("0", "at least 1"), ("11", "at most 10"),
])
def test_number_names_the_bound(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        common.number(int, low=1, high=10)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1"])
def test_number_refuses_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError):
        common.number(float, above=0)(text)


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
    common.fill_flags(args, dict(warmup_epochs=10.0, epochs=100, lr=0.3, lr_scaling="sqrt"))
    assert (args.epochs, args.warmup_epochs, args.lr) == filled and (args.lr_scaling is None) == (args.lr is None)


@pytest.mark.parametrize("given, hint", [
    ({}, "lower --lr (the rate per step is 0.6) or raise --warmup-epochs"),
    ({"epochs": 99}, "lower --lr (the rate per step is 0.6) or train longer"),
    ({"max_steps": 50}, "lower --lr (the rate per step is 0.6) or train longer"),
    ({"lr": 0.01}, "change --lr (the rate per step is 0.02) or raise --warmup-epochs"),
    ({"batch_size": 128}, "change --lr (the rate per step is 0.15) or raise --warmup-epochs"),  # small, not too high
    ({"epochs": 3, "warmup_epochs": 10.0}, "lower --warmup-epochs: 10 of 3 epochs are most of the run"),
    ({"lr": None, "step_lr": 0.6}, "lower --step-lr (the rate per step is 0.6) or raise --warmup-epochs"),
    ({"lr": None, "step_lr": 0.5}, "change --step-lr (the rate per step is 0.5) or raise --warmup-epochs"),
])
def test_hints_at_chance_fit_the_run(given, hint):
    args = dict(epochs=100, warmup_epochs=1.0, lr=0.3, step_lr=None, batch_size=512, max_steps=None)
    args = argparse.Namespace(**args | given)
    lr = args.step_lr or args.lr * args.batch_size / 256
    assert common.rate_hint(args, dict(epochs=100, lr=0.3, batch_size=512), lr) == hint


@pytest.mark.parametrize("percent, chance, fix", [
    (0.95, 25, "did you mean 95?"), (0.95, 0.1, "did you mean 95?"), (1, 10, "did you mean 100?"),
    (25, 25, "take more"), (20, 25, "take more"), (0.2, 25, "take more"), (0.005, 0.1, "take more"),
    (25.1, 25, None), (95, 10, None), (None, 25, None),
])
def test_accuracies_that_stop_a_run_are_percent_above_chance(percent, chance, fix):
    if fix is None:
        return common.check_stop(percent, chance)
    with pytest.raises(common.UsageError) as error:
        common.check_stop(percent, chance)
    assert str(error.value).startswith(f"--stop-at-accuracy {percent:g}:") and str(error.value).endswith(fix)


@pytest.mark.parametrize("kind, text", [(int, "1" + "0" * 30), (int, "1" + "0" * 400), (int, "9223372036854775808"),
                                        (float, "1e308"), (float, "1e-300"), (float, "inf")])
def test_number_refuses_what_no_tensor_holds(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
        common.number(kind, low=0)(text)


def test_path_expands_the_home_folder_and_refuses_what_no_system_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.path("~/x") == str(tmp_path / "x") and common.path("x~/y") == "x~/y"
    for text in ("x" * 300, "/x" * 4000, "", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            common.path(text)


def flags_parser():
    parser = common.Parser("", {"": {}})
    parser.flag("--batch-size", "", type=int)
    parser.flag("--temperature", "", type=float)
    parser.flag("--optimizer", "", choices=("sgd", "adamw"))
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
    ("--optimizer zzz", "no such value: 'zzz' (choose from sgd, adamw)"),
])
def test_an_unknown_flag_or_value_names_the_nearest(capsys, given, hint):
    with pytest.raises(SystemExit) as end:
        flags_parser().parse_args(given.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and hint in err and len(err.splitlines()) == 1


def test_clock():
    assert [common.clock(s) for s in (0, 75, 3675)] == ["0:00", "1:15", "1:01:15"]


# ------------------------------------------------------------------------------------------------
# The folder of a run, checkpoints
# ------------------------------------------------------------------------------------------------


class Source:
    name, description, contents = "pictures", ["12 pictures"], {}


class Dataset:
    classes, mean, std = ["a", "b"], (0.5,) * 3, (0.25,) * 3


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = common.ResNet18(stem="cifar", width=4)


def make_args(folder, **changes):
    args = dict(data="toy", out=str(folder), quiet=True, tensorboard=False, save_every=1, knn_split="val", lr=0.1,
                batch_size=4, amp="auto", image_size=32, stem="cifar", width=4, epochs=3, warmup_epochs=0.0,
                keep_every=None)
    return argparse.Namespace(**(args | changes))


def make_parts():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.backbone(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(autouse=True)
def signals_are_given_back():
    yield
    if common.Run.current:
        common.Run.current.close()


def start_run(args, checkpoint=None, parts=None):
    if common.Run.current:
        common.Run.current.close()
    run = common.Run("simsiam", args, Source, checkpoint)
    run.start(*(parts or make_parts()), Dataset, total_steps=9, epoch_steps=3, device=torch.device("cpu"), lr=0.1,
              chance="0")
    return run


def test_checkpoint_restores_everything(tmp_path):
    model, optimizer, scaler = parts = make_parts()
    run = start_run(make_args(tmp_path / "run"), parts=parts)
    run.save(3, 50.0, last=False)
    drawn = torch.rand(3)

    other, other_optimizer, _ = make_parts()
    checkpoint = common.load_checkpoint(tmp_path / "run", "simsiam")
    assert common.restore(checkpoint, other, other_optimizer, scaler) == 3
    assert torch.equal(torch.rand(3), drawn)
    for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    moments = [s["momentum_buffer"] for s in optimizer.state.values()]
    for p, s in zip(moments, other_optimizer.state.values(), strict=True):
        assert torch.equal(p, s["momentum_buffer"])
    backbone = common.load_backbone(checkpoint)
    assert not backbone.training
    assert checkpoint["epoch"] == 1 and checkpoint["classes"] == ["a", "b"]
    theirs = torchvision.models.resnet18().state_dict().keys() - {"fc.weight", "fc.bias"}
    assert checkpoint["backbone"].keys() == theirs - {k for k in theirs if "downsample" in k and "layer1" in k}


@pytest.mark.parametrize("changes, words", [
    ({}, ["lr      0.1 per step of 4 images (6.4 per 256)"]),
    ({"lr": None, "step_lr": 0.1}, ["lr      0.1 per step of 4 images", "step-lr 0.1"]),
    ({"warmup_epochs": 10.0}, ["note    --warmup-epochs 10 of 3 epochs: ", " 0.3 is usual"]),
    ({"warmup_epochs": 1.6}, ["note    --warmup-epochs 1.6 of 3 epochs: "]),
])
def test_rate_and_warm_up_are_said_at_the_start(tmp_path, changes, words):
    start_run(make_args(tmp_path, **{"lr": 6.4} | changes))
    log = (tmp_path / "log.txt").read_text().replace("\n        ", " ")
    assert all(word in log for word in words)
    assert ("note" in log) == ("warmup_epochs" in changes) and (" per 256)" in log) == ("step_lr" not in changes)


def test_best_is_kept_by_validation_only(tmp_path):
    run = start_run(make_args(tmp_path / "val"))
    for step, score in ((3, 50.0), (6, 60.0), (9, 55.0)):
        run.save(step, score, last=step == 9)
    assert common.load_checkpoint(tmp_path / "val" / "best.pt")["step"] == 6
    assert common.load_checkpoint(tmp_path / "val")["step"] == 9
    run = start_run(make_args(tmp_path / "test", knn_split="test"))
    run.save(3, 50.0, last=True)
    assert not (tmp_path / "test" / "best.pt").exists()


def test_kept_checkpoints_stay_and_need_their_space(tmp_path, monkeypatch):
    needed = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    for keep in (None, 2, 1):
        with pytest.raises(common.UsageError) as error:
            start_run(make_args(tmp_path / "full", keep_every=keep))
        needed.append(int(str(error.value).split("need ")[1].split(" MB")[0].replace(",", "")))
    monkeypatch.undo()
    assert needed == pytest.approx([needed[0], needed[0] * 4 / 3, needed[0] * 2], abs=1)  # 0, 1 and 3 of 3 epochs

    run = start_run(make_args(tmp_path / "run", keep_every=2))
    for step in (3, 5, 6, 9):
        run.save(step, None, last=step == 9)
    kept = [path.name for path in (tmp_path / "run").glob("epoch-*")]
    assert kept == ["epoch-0002.pt"] and common.load_checkpoint(tmp_path / "run" / kept[0])["step"] == 6


def test_save_every(tmp_path):
    run = start_run(make_args(tmp_path, save_every=2))
    run.save(3, None, last=False)
    assert not (tmp_path / "last.pt").exists()
    run.save(6, None, last=False)
    run.save(9, None, last=True)
    assert common.load_checkpoint(tmp_path)["step"] == 9


def row(run, epoch, knn=40.0, loss=1.0):
    if epoch:
        for meter, value in zip(run.begin_epoch(epoch - 1, 3 * epoch - 3, "loss", "std"), (loss, 0.9), strict=True):
            meter.update(torch.tensor(value))
        run.after_step(3 * epoch, 0.1, torch.tensor(loss))
    run.log(epoch=epoch, step=3 * epoch, lr=0.1, knn=knn)


def test_metrics_stand_once_after_a_resume(tmp_path):
    run = start_run(make_args(tmp_path))
    row(run, 0, knn=30.0)
    row(run, 1)
    run.save(3, 40.0, last=False)
    row(run, 2, knn=90.0)  # written, but the process dies before its checkpoint
    resumed = start_run(make_args(tmp_path), common.load_checkpoint(tmp_path))
    assert resumed.best == 40.0 and resumed.first == 30.0
    row(resumed, 2)
    rows = common.read_metrics(tmp_path)
    assert [r["epoch"] for r in rows] == [0, 1, 2] and rows[2]["knn"] == 40.0
    assert list(rows[1]) == ["epoch", "step", "seconds", "loss", "lr", "images_per_second", "knn", "std"]
    assert json.loads((tmp_path / "args.json").read_text())["width"] == 4


HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"


def test_a_folder_belongs_to_one_program_at_a_time(tmp_path):
    args = make_args(tmp_path)
    run = start_run(args)
    run.save(3, None, last=False)
    checkpoint = common.load_checkpoint(tmp_path)
    run.close()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "log.txt")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for saved, flag in ((None, "--out"), (checkpoint, "--resume")):
            with pytest.raises(common.UsageError, match=f"{flag} .*another program"):
                start_run(args, saved)
        other.kill()
    start_run(args, checkpoint)  # a killed one leaves no lock behind
    common.Run.current.close()
    with pytest.raises(common.UsageError, match="holds a run already"):  # it came after the flags were read
        start_run(args)


def test_a_folder_without_locks_trains(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "flock", none)
    start_run(make_args(tmp_path / "nfs"))
    monkeypatch.setattr(common, "fcntl", None)
    start_run(make_args(tmp_path / "windows"))


def test_a_resumed_run_says_how_its_rate_jumps(tmp_path):
    run = start_run(make_args(tmp_path, epochs=3))
    run.save(3, None, last=False)
    checkpoint = common.load_checkpoint(tmp_path)
    for epochs, lr, says in ((3, 0.05, False), (9, 0.1, False), (9, 0.05, True)):
        run = start_run(make_args(tmp_path, epochs=epochs), checkpoint)
        run.begin_epoch(1, 3, "loss")
        run.after_step(4, lr, torch.tensor(1.0))
        note = "--epochs 9 (was 3): the learning rate goes from 0.1 to 0.05"
        assert (note in (tmp_path / "log.txt").read_text()) == says


def test_a_resume_says_what_differs(tmp_path):
    def parts(width, classes):
        model = Model()
        model.backbone, model.fc = common.ResNet18(stem="cifar", width=width), torch.nn.Linear(8 * width, classes)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)

    run = start_run(make_args(tmp_path), parts=parts(4, 2))
    run.save(3, None, last=True)
    checkpoint = common.load_checkpoint(tmp_path)
    with pytest.raises(common.UsageError, match=r"backbone.conv1.weight was \(4, 3, 3, 3\) and is \(8, 3, 3, 3\); "):
        common.restore(checkpoint, *parts(8, 2), ["a", "b"])
    with pytest.raises(common.UsageError, match="the data had 2 classes and has 3, which differ in dog; "):
        common.restore(checkpoint, *parts(4, 3), ["a", "b", "dog"])


def test_the_log_takes_any_letter(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    run = start_run(make_args(tmp_path))
    run.say("日本 \udcff")
    assert (tmp_path / "log.txt").read_bytes().endswith("日本 \\udcff\n".encode())


def test_a_cut_off_last_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "lo')
    assert common.read_metrics(tmp_path) == [{"epoch": 0}]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = start_run(make_args(tmp_path))
    with pytest.raises(common.UsageError, match="loss is nan at step 3 .*--lr"):
        row(run, 1, loss=float("nan"))


def test_a_failed_write_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    run = start_run(make_args(tmp_path))
    run.save(3, None, last=True)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(common.UsageError, match="No space left"):
        run.save(6, None, last=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


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
        with pytest.raises(common.UsageError, match=reason) as error:
            common.load_checkpoint(file)
        assert "\n" not in str(error.value)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(common.UsageError):
        common.load_checkpoint(file)
    torch.save({"model": {}}, file)
    with pytest.raises(common.UsageError, match="not a checkpoint of this project"):
        common.load_checkpoint(file)
    with pytest.raises(common.UsageError, match="no checkpoint there"):
        common.load_checkpoint(tmp_path / "missing")
    assert "code from a checkpoint ran" not in capsys.readouterr().out


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
                                  named(common.ResNet18(width=4).state_dict(), "module.encoder_k.")},
                     "left out: state_dict.module.encoder_k"),
    "half": (lambda net: {name: value.half() for name, value in net.state_dict().items()}, "width 4"),
    "without counters": (lambda net: {name: value for name, value in net.state_dict().items() if "num_" not in name},
                         "width 4"),
}


def some_network(stem):
    """A ResNet18 of which every weight and buffer is a multiple of 1/64, so that half precision has it too."""
    net = common.ResNet18(stem=stem, width=4)
    for value in net.state_dict().values():
        value.copy_((64 * torch.rand(value.shape)).round() / 64)
    return net


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_form_are_understood(tmp_path, monkeypatch, form, stem):
    net, (write, words) = some_network(stem), FORMS[form]
    monkeypatch.chdir(tmp_path)  # a path as long as this may fill a line of its own
    torch.save(write(net), "net.pth")
    found = common.load_weights("net.pth")
    assert (found["stem"], found["width"]) == (stem, 4)
    assert words in " ".join(found["note"].split()) and max(map(len, found["note"].splitlines()[1:]), default=0) < 80
    for name, value in net.state_dict().items():
        assert "num_batches" in name or torch.equal(found["backbone"][name], value), name


def test_weights_of_torchvision_and_of_our_runs(tmp_path):
    theirs = torchvision.models.resnet18().eval()
    encoder = torch.nn.Sequential(*list(theirs.children())[:-1])
    x = torch.randn(2, 3, 64, 64)
    for state in (theirs.state_dict(), encoder.state_dict()):
        torch.save(state, tmp_path / "theirs.pth")
        ours = common.load_backbone(common.load_weights(tmp_path / "theirs.pth"))
        torch.testing.assert_close(ours(x), encoder(x).flatten(1), atol=1e-5, rtol=1e-5)
    model, *_ = parts = make_parts()
    start_run(make_args(tmp_path / "run"), parts=parts).save(3, 50.0, last=True)
    for path in (tmp_path / "run", tmp_path / "run" / "best.pt"):
        found = common.load_weights(path)
        assert "left out" not in found["note"]
        assert all(torch.equal(v, found["backbone"][name]) for name, v in model.backbone.state_dict().items())


@pytest.mark.parametrize("change, reason", [
    ({"conv1.weight": None}, "conv1.weight is missing"),
    ({"conv1.weight": torch.zeros(4, 1, 7, 7)}, r"conv1.weight is \(4, 1, 7, 7\); .* \(64, 3, 7, 7\)"),
    ({"layer4.1.bn2.running_var": None}, "layer4.1.bn2.running_var is missing"),
    ({"layer1.2.conv1.weight": torch.zeros(4, 4, 3, 3)}, "layer1.2.conv1.weight is one too many"),  # ResNet-34
    ({"layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}, r"layer1.0.conv1.weight is \(4, 4, 1, 1\), not"),  # 50
    ({"layer1.0.conv1.weight": None}, "no ResNet-18 in it"),
])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, change, reason):
    state = common.ResNet18(width=4).state_dict() | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "net.pth")
    with pytest.raises(common.UsageError, match=rf"net.pth: .*{reason}") as error:
        common.load_weights(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


def test_a_whole_module_is_refused_with_the_fix(tmp_path):
    torch.save(common.ResNet18(width=4), tmp_path / "net.pth")
    with pytest.raises(common.UsageError, match=r"could run code; save a state_dict\(\)"):
        common.load_weights(tmp_path / "net.pth")


def test_a_network_without_a_run_is_shaped_as_in_the_recipes():
    for name in ("simsiam", "moco", "simclr", "rotnet"):
        for kind, recipe in importlib.import_module(name).RECIPES.items():
            assert common.SHAPES[kind].items() <= recipe.items(), (name, kind)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    run = start_run(make_args(tmp_path))
    run.save(3, None, last=True)
    with pytest.raises(common.UsageError, match="simsiam.py"):
        common.load_checkpoint(tmp_path, "moco")


def test_views_picture_shows_the_pixels(tmp_path):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    view = (images.float() / 255 - 0.5) / 0.25
    common.save_views(tmp_path / "v.png", images, [view, view.flip(3)], (0.5,) * 3, (0.25,) * 3)
    picture = torchvision.transforms.functional.pil_to_tensor(Image.open(tmp_path / "v.png")).float()
    tile = [picture[:, 4:100, 4 + 100 * i : 100 + 100 * i] for i in range(3)]
    assert (tile[0] - tile[1]).abs().max() <= 1
    assert (tile[0] - tile[2].flip(2)).abs().max() <= 1
