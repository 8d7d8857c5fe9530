"""A run that ends at any step and is resumed is the run that never ended; and what a run says when it must end."""

import argparse
import copy
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from PIL import Image

import common
import harness
from harness import checkpoint
from harness.folder import read_metrics
from harness.log import Figures

FLAGS = ["--width", "4", "--image-size", "16", "--stem", "cifar", "--epochs", "3", "--batch-size", "8", "--amp", "off",
         "--device", "cpu", "--knn-k", "5", "--quiet"]
METHODS = {"simsiam": ["--dim", "16", "--pred-dim", "8"], "moco": ["--queue-size", "32", "--dim", "16"],
           "simclr": ["--optimizer", "lars", "--lr", "0.1", "--dim", "16"], "rotnet": ["--one-rotation"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()).save(path)
    return folder


@pytest.fixture
def train(pictures, tmp_path, monkeypatch):
    """train("moco", flags...) trains in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pictures / ".cache"))

    def start(method, *flags):
        new = [] if "--resume" in flags else ["--data", pictures, *FLAGS, *METHODS[method]]
        importlib.import_module(method).main([str(flag) for flag in (*new, *flags)])

    return start


def state(folder):
    """All that must be the same, as one flat list: metrics without times, and the checkpoint without folder names."""
    saved = torch.load(f"{folder}/last.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "knn_seconds")}
            for row in read_metrics(folder)]
    flat = [("metrics", json.dumps(rows))]

    def walk(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in ("args", "seconds"):
                    walk(inner, f"{name}.{key}")
        elif isinstance(value, (list, tuple)) and any(torch.is_tensor(inner) for inner in value):
            for i, inner in enumerate(value):
                walk(inner, f"{name}[{i}]")
        else:
            flat.append((name, value.tolist() if torch.is_tensor(value) else value))

    walk(saved, "")
    return flat


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """The process gets a signal while it works on this step."""
    schedule = common.LRScheduler.step

    def patched(self, at):
        if at + 1 == step:
            os.kill(os.getpid(), number)
        return schedule(self, at)

    monkeypatch.setattr(common.LRScheduler, "step", patched)


@pytest.mark.parametrize("method", METHODS)
def test_ended_at_any_step_and_resumed_is_never_ended(train, monkeypatch, capsys, method):
    train(method, "--out", "whole")  # 36 training images: 4 steps an epoch, 12 in all
    arguments = ["--out", "ended"]
    for step in (2, 4, 7):  # in mid-epoch, at the end of an epoch, in mid-epoch again
        with monkeypatch.context() as patch:
            signal_at(patch, step)
            with pytest.raises(SystemExit) as end:
                train(method, *arguments)
        assert end.value.code == 128 + signal.SIGTERM
        assert f"saved at step {step};" in (err := capsys.readouterr().err) and "--resume ended" in err
        assert torch.load("ended/last.pt", weights_only=True)["step"] == step
        arguments = ["--resume", "ended"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # given back
    train(method, "--resume", "ended")
    for one, two in zip(state("whole"), state("ended"), strict=True):
        assert one == two
    assert [row["epoch"] for row in read_metrics("ended")] == [0, 1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_writes_to_the_flags_of_an_open_run(train, monkeypatch, method):
    opened, open_run = [], harness.open_run

    def kept(*args, **derived):
        run = open_run(*args, **derived)
        opened.append((run, copy.deepcopy(vars(run.args))))
        return run

    monkeypatch.setattr(harness, "open_run", kept)
    train(method, "--max-steps", "5")
    (run, before), = opened
    assert vars(run.args) == before


@pytest.mark.parametrize("method", METHODS)
def test_the_rate_per_step_holds_until_another_is_given(train, monkeypatch, method):
    rates, schedule = [], common.LRScheduler
    monkeypatch.setattr(common, "LRScheduler", lambda parts, lr, *args, **kinds: (
        rates.append(lr) or schedule(parts, lr, *args, **kinds)))
    scaling = ["--lr-scaling", "sqrt"] if method == "simclr" else []
    monkeypatch.setitem(METHODS, "simclr", ["--dim", "16"])  # LARS comes with a rate
    train(method, "--step-lr", "0.01", *scaling, "--max-steps", "1", "--knn-every", "0", "--out", "runs/one")
    flags = [*FLAGS, *METHODS[method], "--step-lr", "0.01", *scaling, "--max-steps", "1", "--knn-every", "0",
             "--data", harness.load_checkpoint("runs/one")["args"]["data"]]
    train(method, *flags, "--resume")  # finds its run
    train(method, "--resume", "runs/one", "--lr", "0.32", "--max-steps", "2")
    train(method, "--resume", "runs/one", "--max-steps", "3")
    train(method, "--resume", "runs/one", "--step-lr", "0.5", "--max-steps", "4")
    lr = 0.32 * (math.sqrt(8 / 256) if scaling else 8 / 256)
    assert rates == pytest.approx([0.01, 0.01, lr, lr, 0.5])
    log = open("runs/one/log.txt").read()
    assert ("note    --max-steps 2 (was 1), --lr 0.32: the learning rate goes from" in log
            and max(map(len, log.splitlines())) <= 79 and "None" not in log)
    assert "lr      0.01 per step of 8 images\n" in log and f"lr      {lr:g} per step of 8 images (0.32 per 256)" in log


@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_with_the_weights_of_init_and_needs_them_no_more(train, capsys, method):
    torch.manual_seed(7)
    net = common.ResNet18(width=4)
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, "net.pth")
    train(method, "--init", "net.pth", "--out", "run", "--max-steps", "1", "--lr", "1e-12", "--knn-every", "0")
    os.remove("net.pth")
    saved = harness.load_checkpoint("run")
    assert saved["args"]["init"] == os.path.abspath("net.pth")
    for name, value in net.named_parameters():
        torch.testing.assert_close(saved["backbone"][name], value.detach(), atol=1e-7, rtol=0)
        if method == "moco":  # the key encoder begins as a copy
            torch.testing.assert_close(saved["model"][f"key_encoder.0.{name}"], value.detach(), atol=1e-7, rtol=0)
    train(method, "--resume", "run", "--max-steps", "2")
    assert harness.load_checkpoint("run")["step"] == 2
    if hasattr(importlib.import_module(method).build_model(argparse.Namespace(**saved["args"] | {"init": None})),
               "projector"):
        importlib.import_module("knn").main(["--checkpoint", "run", "--projector", "--k", "3", "--amp", "off"])
    with pytest.raises(SystemExit):
        train(method, "--resume", "run", "--init", "other.pth")
    assert "--init: the run to resume has" in capsys.readouterr().err


def test_stem_and_width_are_those_of_init(train, capsys):
    import simsiam
    torch.save(common.ResNet18(stem="imagenet", width=6).state_dict(), "net.pth")
    args = simsiam.parse_args(["--init", "net.pth"])
    assert (args.stem, args.width, args.image_size) == ("imagenet", 6, None)
    for flags, words in ((["--stem", "cifar"], "--stem cifar: the network of --init has imagenet"),
                         (["--width", "8"], "--width 8: the network of --init has 6")):
        with pytest.raises(common.UsageError, match=words):
            simsiam.parse_args(["--init", "net.pth", *flags])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of a terminal")
def test_a_terminal_that_closes_saves_first(train, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    signal_at(monkeypatch, 2, signal.SIGHUP)
    signal_at(monkeypatch, 2, signal.SIGHUP)  # it may say so twice
    with pytest.raises(SystemExit) as end:
        train("simsiam", "--out", "run")
    assert end.value.code == 128 + signal.SIGHUP and harness.load_checkpoint("run")["step"] == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        train("simsiam", "--resume", "run", "--max-steps", "3")
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert harness.load_checkpoint("run")["step"] == 3


def test_kept_checkpoints_outlive_a_resume_and_can_be_told(train, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, 6)
        train("simsiam", "--out", "run", "--keep-every", "1", "--knn-every", "1")
    train("simsiam", "--resume", "run")
    kept = {path: harness.load_checkpoint(f"run/{path}")["epoch"] for path in os.listdir("run") if "epoch" in path}
    assert kept == {"epoch-0001.pt": 1, "epoch-0002.pt": 2, "epoch-0003.pt": 3}
    capsys.readouterr()
    importlib.import_module("knn").main(["--checkpoint", "run/epoch-0001.pt", "--k", "5", "--amp", "off"])
    assert f"top-1 {read_metrics('run')[1]['knn']:6.2f} %" in capsys.readouterr().out
    train("simsiam", "--resume", "run/epoch-0001.pt", "--epochs", "4")
    assert harness.load_checkpoint("run/epoch-0004.pt")["epoch"] == 4


def test_resume_finds_the_newest_run_of_the_same_command(train, monkeypatch, tmp_path, capsys):
    for name, flags in {"old": ["--seed", "1"], "new": ["--seed", "1"], "other": ["--seed", "2"]}.items():
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            signal_at(patch, 2, signal.SIGINT)
            train("simsiam", "--out", f"runs/{name}", *flags)
    os.utime("runs/old/last.pt", (1e9, 1e9))
    os.utime("runs/other/last.pt", (2e9, 2e9))
    flags = [*FLAGS, *METHODS["simsiam"], "--data", str(harness.load_checkpoint("runs/new")["args"]["data"])]
    train("simsiam", *flags, "--seed", "1", "--resume", "--amp", "auto", "--save-every", "10min")  # how, not what
    steps = {name: harness.load_checkpoint(f"runs/{name}")["step"] for name in ("old", "new", "other")}
    assert steps == {"old": 2, "new": 12, "other": 2}
    with pytest.raises(SystemExit) as end:
        train("simsiam", *flags, "--seed", "3", "--resume")
    assert end.value.code == 2 and "--resume: no run of simsiam" in capsys.readouterr().err


def test_a_run_that_torchrun_restarts_goes_on_or_begins_anew(train, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for _ in range(2):  # at first there is nothing to go on with
        train("simsiam", "--max-steps", "3", "--out", "run", "--amp", "auto")
    assert [row["step"] for row in read_metrics("run")] == [0, 3]
    for count in (1, 2):  # without --out it cannot know which, and takes none that is done
        train("simsiam", "--max-steps", "3")
        assert len(os.listdir("runs")) == count


def test_a_restart_goes_on_where_the_run_was_not_at_the_file_named_at_first(train, monkeypatch):
    flags = ["--resume", "run/epoch-0001.pt", "--max-steps"]
    train("simsiam", "--max-steps", "8", "--out", "run", "--keep-every", "1")
    os.utime("run/last.pt", (1e9, 1e9))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train("simsiam", *flags, "6")  # ended before it saved anything: last.pt is still the other way's
    os.utime("run/args.json", (2e9, 2e9))
    os.utime("run/last.pt", (3e9, 3e9))
    train("simsiam", *flags, "8")
    assert re.findall(r"^resumes at step (\d+)", open("run/log.txt").read(), flags=re.M) == ["4", "6"]


def test_minutes_between_checkpoints(train, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, content: (saved.append(content["step"]), save(path, content)))
    train("simsiam", "--save-every", "1e-9min", "--max-steps", "3", "--knn-every", "0")
    assert saved == [1, 2, 3]
    saved.clear()
    train("simsiam", "--save-every", "100min", "--knn-every", "0", "--out", "b")
    assert saved == [12]  # the end


def test_a_run_whose_images_changed_is_not_resumed_and_its_evaluation_says_so(train, pictures, tmp_path, capsys):
    import knn
    import linear
    shutil.copytree(pictures, "mine", ignore=shutil.ignore_patterns(".*"))
    train("simsiam", "--data", "mine", "--out", "run", "--epochs", "1")
    linear.main("--checkpoint run --out probe --epochs 1 --quiet --device cpu".split())
    os.rename("mine", "moved")  # where they lie now is said once, and stands in the run from then on
    train("simsiam", "--resume", "run", "--data", "moved", "--epochs", "2")
    train("simsiam", "--resume", "run", "--epochs", "3")
    assert [row["epoch"] for row in read_metrics("run")] == [0, 1, 2, 3]
    os.rename("moved", "mine")
    with pytest.raises(SystemExit):
        train("simsiam", "--resume", "run", "--data", "toy", "--epochs", "4")
    assert "which cannot change" in capsys.readouterr().err
    train("simsiam", "--resume", "run", "--data", "mine", "--epochs", "4")
    shutil.copy("mine/class0/0.png", "mine/class0/40.png")
    capsys.readouterr()
    for program in ("simsiam", "linear"):
        with pytest.raises(SystemExit) as end:
            importlib.import_module(program).main(["--resume", {"simsiam": "run", "linear": "probe"}[program],
                                                   "--epochs", "5"])
        assert end.value.code == 2
        assert "not those of the run any more (train: 36 then, 37 now)" in capsys.readouterr().err
    knn.main(["--checkpoint", "run", "--k", "5", "--device", "cpu"])
    linear.main("--checkpoint run --out other --epochs 1 --device cpu".split())
    assert capsys.readouterr().out.count("changed     images since this run was trained: train: 36 then, 37 now") == 2
    os.remove("mine/class0/40.png")
    train("simsiam", "--resume", "run", "--epochs", "5")
    assert [row["epoch"] for row in read_metrics("run")] == [0, 1, 2, 3, 4, 5]
    knn.main(["--checkpoint", "run", "--k", "5", "--device", "cpu"])
    assert "changed" not in capsys.readouterr().out
    # A run of before, which does not know its images: the epochs tell.
    old = torch.load("run/last.pt", weights_only=True)
    del old["args"]["contents"]
    torch.save(old, "run/last.pt")
    for i in range(40, 50):
        shutil.copy("mine/class0/0.png", f"mine/class0/{i}.png")
    with pytest.raises(SystemExit):
        train("simsiam", "--resume", "run", "--epochs", "6")
    assert "an epoch has 5 steps now, so step 20 is not in epoch 6 any more" in capsys.readouterr().err


def test_a_file_that_another_program_reads_is_replaced_once_it_is_free(tmp_path, monkeypatch):
    """On Windows, where os.replace then fails."""
    replace, left, pauses = os.replace, [2], []

    def busy(*paths):
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(time, "sleep", pauses.append)
    checkpoint.save(tmp_path / "last.pt", b"new")
    assert (tmp_path / "last.pt").read_bytes() == b"new" and len(pauses) == 2
    left[0] = 9
    with pytest.raises(common.UsageError, match="cannot be written: Access is denied; the one before it stays"):
        checkpoint.save(tmp_path / "last.pt", b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"] and len(pauses) == 5


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_gone_wrong_stops_at_its_step(train, monkeypatch, capsys, broken):
    import simsiam
    loss, calls = simsiam.symmetric_loss, []

    def breaks(*args, **kinds):
        calls.append(1)
        return loss(*args, **kinds) + (broken if len(calls) == 7 else 0)

    monkeypatch.setattr(simsiam, "symmetric_loss", breaks)
    with pytest.raises(SystemExit) as end:
        train("simsiam", "--out", "run")
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"loss is {broken} at step 7 (lr" in err and len(err.splitlines()) == 1
    assert len(calls) == 7
    good = torch.load("run/last.pt", weights_only=True)  # of the first epoch
    assert good["step"] == 4 and all(v.isfinite().all() for v in good["model"].values())


def test_the_alarm_names_the_first_bad_step_where_losses_are_read_late(train, monkeypatch, capsys):
    """As on a GPU, where the host does not look at every loss; no checkpoint may be written in between."""
    import simsiam
    loss, calls = simsiam.symmetric_loss, []

    def breaks(*args, **kinds):
        calls.append(1)
        return loss(*args, **kinds) + (float("nan") if len(calls) == 6 else 0)

    monkeypatch.setattr(simsiam, "symmetric_loss", breaks)
    monkeypatch.setattr(Figures, "due", lambda self: False)
    with pytest.raises(SystemExit):
        train("simsiam", "--out", "run")
    assert "at step 6 (lr" in capsys.readouterr().err
    assert torch.load("run/last.pt", weights_only=True)["step"] == 4


def test_out_of_memory_is_a_line(train, monkeypatch, capsys):
    import simsiam

    def too_much(*args, **kinds):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore\nlines")

    monkeypatch.setattr(simsiam, "symmetric_loss", too_much)
    with pytest.raises(SystemExit) as end:
        train("simsiam", "--out", "run")
    err = capsys.readouterr().err
    assert end.value.code == 2 and "--batch-size 8" in err and "lower one" in err and len(err.splitlines()) == 1


def test_a_disk_that_fills_up_leaves_the_former_checkpoint(train, monkeypatch, capsys):
    """A real failed write: the process may not write files beyond a size that the second checkpoint exceeds."""
    train("simsiam", "--out", "run", "--max-steps", "4")
    before = state("run")
    size = os.path.getsize("run/last.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(SystemExit) as end:
            train("simsiam", "--resume", "run", "--max-steps", "8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert end.value.code == 2 and "run/last.pt: cannot be written" in err and "the one before it stays" in err
    assert state("run")[1:] == before[1:]
    assert not [name for name in os.listdir("run") if name.startswith(".")]
    train("simsiam", "--resume", "run", "--max-steps", "8")
    assert harness.load_checkpoint("run")["step"] == 8


def test_a_new_weight_decay_holds_from_where_the_run_goes_on(train):
    train("simsiam", "--out", "run", "--max-steps", "2")
    train("simsiam", "--resume", "run", "--max-steps", "3", "--weight-decay", "0.05")
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["args"]["weight_decay"] == 0.05
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.05, 0.05]


def test_fp16_that_overflows_in_its_first_step_and_a_run_that_had_another_precision(train, monkeypatch):
    """On a CPU: fused SGD makes its buffers of memory that held something else."""
    import simsiam
    train("simsiam", "--out", "run", "--max-steps", "1", "--knn-every", "0")
    plain, loss, empty, calls = common.pick_precision, simsiam.symmetric_loss, torch.empty_like, []
    monkeypatch.setattr(common, "pick_precision", lambda *args, **kinds: (
        plain(*args, **kinds)[0], torch.amp.GradScaler("cpu", init_scale=2.0**120)))
    monkeypatch.setattr(simsiam, "symmetric_loss", lambda *args, **kinds: (
        loss(*args, **kinds) * (1e9 if calls.append(1) or len(calls) == 1 else 2.0**-100)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **kinds: empty(x, **kinds).fill_(1e30))
    for flags in (["--out", "new"], ["--resume", "run"]):
        calls.clear()
        train("simsiam", *flags, "--max-steps", "5", "--epochs", "3", "--knn-every", "0")
        saved = torch.load(f"{flags[1]}/last.pt", weights_only=True)
        assert saved["scaler"]["scale"] == 2.0**119  # once
        assert all(tensor.abs().max() < 1e6 for tensor in saved["model"].values())


def test_the_rate_of_an_epoch_leaves_its_evaluation_out(train, monkeypatch):
    import knn
    plain = knn.Monitor.__call__
    monkeypatch.setattr(knn.Monitor, "__call__",
                        lambda self, *args, **kinds: time.sleep(1) or plain(self, *args, **kinds))
    train("simsiam", "--out", "run", "--max-steps", "4", "--knn-every", "1")
    row = read_metrics("run")[-1]
    assert row["knn"] is not None and row["images_per_second"] > 8 * 4 / 1.0


def test_an_error_of_one_process_alone_is_said_by_it(monkeypatch, capsys):
    command = sys.modules["harness.command"]
    monkeypatch.setattr(command, "is_main", lambda: False)
    monkeypatch.setattr(command.dist, "get_rank", lambda: 3)

    @command.command
    def main(argv):
        raise argv

    for error in (command.OwnError("the loss is nan"), common.UsageError("no such folder")):
        with pytest.raises(SystemExit) as end:
            main(error)
        assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("process 3: ") and err.endswith("error: the loss is nan\n") and err.count("\n") == 1


def test_only_a_run_that_went_well_leaves_its_group(monkeypatch, capsys):
    from harness import distributed
    command, done = sys.modules["harness.command"], []
    monkeypatch.setattr(distributed, "joined", True)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(distributed.dist, name, lambda name=name: done.append(name))

    @command.command
    def main(argv):
        if argv:
            raise argv

    with pytest.raises(SystemExit):
        main(common.UsageError("no such folder"))
    assert done == []
    main()
    main()  # it is in none any more
    assert done == ["barrier", "destroy_process_group"]
