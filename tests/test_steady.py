"""The steady loop: no step waits for the device, and no epoch leaves memory behind."""

import contextlib
import gc
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import pictures
from harness.log import Figures
from harness.plan import Plan
from harness.run import Run
from pictures import batches

COMMANDS = [
    ("simsiam", "--blur", "0.5"),
    ("moco", "--blur", "0.5"),
    ("moco", "--symmetric", "--v1", "--bn-splits", "2"),
    ("simclr", "--blur", "0.5"),
    ("simclr", "--optimizer", "lars", "--lr", "1"),
    ("rotnet",),
    ("rotnet", "--crop", "resized", "--one-rotation", "--flip-after-rotation"),
]


class NoWaiting(TorchDispatchMode):
    """Raises where host tensors meet tensors of the device, unless the copy goes on beside the host.

    The device is "meta", whose tensors have shapes but no numbers: whatever needs a number of theirs on the host
    (item, nonzero, a boolean mask, a copy back) raises by itself.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim]
        devices = {x.device.type for x in tensors}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        asynchronous = kwargs.get("non_blocking") or (function is torch.ops.aten.copy_.default and args[-1] is True)
        if tensors and len(devices) > 1 and not asynchronous:
            raise AssertionError(f"{function} takes {sorted(devices)}: the host would wait for the device")
        return function(*args, **kwargs)


class EndOfEpoch(Exception):
    pass


def train_on_nothing(tmp_path, monkeypatch, method, *flags):
    """Five steps on the device "meta", the last four of them watched."""
    watch, autocast, steps = contextlib.ExitStack(), torch.autocast, Run.steps

    def watched(run):
        for batch in steps(run):
            if run.step == 1:  # the first step may make what later ones keep
                watch.enter_context(NoWaiting())
            if run.step == 5:
                raise EndOfEpoch
            yield batch

    monkeypatch.setattr(Run, "steps", watched)
    monkeypatch.setattr(Figures, "due", lambda figures: False)  # once a second a loss is looked at, on purpose
    monkeypatch.setattr(Plan, "due", lambda plan, step: False)  # and those of the first two steps, for their time
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 40)  # so the images lie there
    monkeypatch.setattr(torch, "autocast", lambda kind, **rest: autocast("cpu" if kind == "meta" else kind, **rest))
    sgd = torch.optim.SGD  # "meta" has no fused kernels
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **rest: sgd(*args, **rest))
    monkeypatch.setitem(pictures.TOY_COUNT, "train", 96)
    with pytest.raises(EndOfEpoch), watch:  # whatever is raised, the watch ends
        importlib.import_module(method).main(
            ["--device", "meta", "--width", "8", "--batch-size", "16", "--knn-every", "0", "--quiet",
             "--cache", str(tmp_path), "--out", str(tmp_path / "run"), *flags])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, command):
    train_on_nothing(tmp_path, monkeypatch, *command)


@pytest.mark.parametrize("mistake", [
    lambda loss: loss.item(),
    lambda loss: loss[None][loss[None] > 0],
    lambda loss: loss[None].expand(4)[torch.arange(2)],
    lambda loss: torch.ones(3).to(loss.device),
])
def test_a_step_that_waits_is_found(tmp_path, monkeypatch, mistake):
    update = common.AverageMeter.update

    def wrong(meter, value, n=1):
        mistake(value)
        update(meter, value, n)

    monkeypatch.setattr(common.AverageMeter, "update", wrong)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        train_on_nothing(tmp_path, monkeypatch, "simclr")


def test_an_epochs_rate_counts_steps_that_are_done(tmp_path, monkeypatch):
    """On a GPU losses are looked at now and then, but always before the clock of an epoch is read."""
    look, events = Figures.first_wrong, []

    def look_as_on_a_gpu(figures):
        events.append("waits")
        return look(figures)

    monkeypatch.setattr(Figures, "due", lambda figures: False)
    monkeypatch.setattr(Figures, "first_wrong", look_as_on_a_gpu)
    monkeypatch.setattr(common.Progress, "update", lambda line, done, **figures: events.append(done))
    for split in pictures.TOY_COUNT:
        monkeypatch.setitem(pictures.TOY_COUNT, split, 40)
    importlib.import_module("simclr").main(
        ["--width", "4", "--batch-size", "20", "--max-steps", "3", "--epochs", "2", "--device", "cpu", "--quiet",
         "--knn-every", "0", "--cache", str(tmp_path), "--out", str(tmp_path / "run")])
    for step in (2, 3):  # the end of the first epoch, and of the run
        assert events[events.index(step) - 1] == "waits"


@pytest.mark.parametrize("method", ["simsiam", "moco", "simclr", "rotnet"])
def test_no_epoch_leaves_tensors_behind(tmp_path, monkeypatch, method):
    held, report = [], Run.report

    def count(run, *args, **scores):
        gc.collect()
        held.append(sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), torch.Tensor)))
        return report(run, *args, **scores)

    monkeypatch.setattr(Run, "report", count)
    for split in pictures.TOY_COUNT:
        monkeypatch.setitem(pictures.TOY_COUNT, split, 200)
    importlib.import_module(method).main(
        ["--width", "4", "--batch-size", "100", "--epochs", "4", "--device", "cpu", "--quiet",
         "--cache", str(tmp_path), "--out", str(tmp_path / "run")])
    assert len(held) == 5 and held[2] == held[3] == held[4]
