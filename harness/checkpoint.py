"""Checkpoints: tensors and plain values only, written whole or not at all, read without running any code."""

import contextlib
import os
import random
import textwrap
import time
import warnings
from pathlib import Path

import torch

from common import UsageError
from harness.distributed import is_main

VERSION = 1  # of the checkpoints' form


def save(path, content):
    """Write bytes, or a state for torch.save, to a temporary file beside it, then sync and rename: never half a file.

    raises  UsageError where it cannot be written; a file that was there stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 0.5, 2.5, None):
            try:
                os.replace(aside, path)
                break
            except PermissionError:  # Windows, while another program reads the one before
                if pause is None:
                    raise
                time.sleep(pause)
        if hasattr(os, "O_DIRECTORY"):  # the new name must survive a power cut too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # some file systems refuse it
                os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        stays = "; the one before it stays" if path.exists() else ""
        raise UsageError(f"{path}: cannot be written: {reason}{stays}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def state_of(model, optimizer, scaler, states, args, dataset, epoch, step):
    """Everything needed to go on, and the backbone under its own names, torchvision's if it is a ResNet18.

    model    has `.backbone`.  states: {name: whatever else has a state_dict}.
    dataset  has classes, mean, std.  args: parsed flags, plain values.
    epoch    finished epochs.  step: optimiser steps taken.
    """
    return {
        "version": VERSION,
        "method": args.method,
        "model": model.state_dict(),
        "backbone": model.backbone.state_dict(),  # the same storages: written once
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "states": {name: part.state_dict() for name, part in states.items()},
        "epoch": epoch,
        "step": step,
        "rng": {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        "args": dict(vars(args)),
        "classes": list(dataset.classes),
        "mean": tuple(dataset.mean),
        "std": tuple(dataset.std),
        "image_size": args.image_size,
        "stem": args.stem,
        "width": args.width,
    }


def file_of(path, *names):
    """The file of a run folder: the first of `names` that is there, else last.pt. A file stands for itself."""
    path = Path(path)
    return next((path / name for name in names if (path / name).exists()), path / "last.pt") if path.is_dir() else path


def shapes(state):
    """{name: shape} of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def read_tensors(path):
    """Read what torch.save wrote, on the CPU, without running any code it may contain: (the file, its content).

    path     a file or a run folder.
    raises   UsageError where it is missing, damaged, or holds more than tensors and plain values.
    """
    file = file_of(path)
    if not file.exists():
        raise UsageError(f"{path}: no checkpoint there (expected a run folder with last.pt, or a .pt file)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd pickles; the line below says it all
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not what it should be
        reason = "it is not a readable checkpoint"
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds more than tensors and plain values, which could run code; save a state_dict() alone"
        if isinstance(error, PermissionError):
            reason = "permission denied"
        raise UsageError(f"{file}: refused, {reason}") from None
    return file, content


def is_ours(content):
    """Whether a file's content is a state_of()."""
    wanted = {"method", "model", "backbone", "args", "classes", "mean", "std", "image_size", "stem", "width"}
    return isinstance(content, dict) and wanted <= content.keys()


def load(path, method=None):
    """Read a checkpoint of ours.

    path     a file or a run folder.  method: refuse those of another method; None takes any.
    raises   UsageError where it is missing, damaged, not ours, or of another method.
    """
    file, checkpoint = read_tensors(path)
    if not is_ours(checkpoint):
        raise UsageError(f"{file}: not a checkpoint of this project; for weights alone, knn.py and linear.py have "
                         "--weights, the methods --init")
    if checkpoint.get("version") != VERSION:
        raise UsageError(f"{file}: form {checkpoint.get('version')} of checkpoints; this program reads form {VERSION}")
    if method is not None and checkpoint["method"] != method:
        raise UsageError(f"{file}: a run of {checkpoint['method']}.py, not of {method}.py: that one goes on with it")
    return checkpoint


def restore(checkpoint, model, optimizer, scaler, states, classes):
    """Put a checkpoint's state into freshly made objects, random generators too. Returns the step.

    classes  of the data: named where their number, and not the flags, makes another model than the saved one.
    raises   UsageError where the objects are not those of the run.
    """
    try:
        model.load_state_dict(checkpoint["model"])
        options = [{name: value for name, value in group.items() if name not in ("params", "lr")}
                   for group in optimizer.param_groups]  # weight decay, say: the flags', not the file's
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
        for name, part in states.items():
            part.load_state_dict(checkpoint["states"][name])
    except (RuntimeError, ValueError, KeyError) as error:
        why = textwrap.shorten(str(error), 300, placeholder=" ...") + "; leave out the flags that the run did not have"
        if len(classes) != len(checkpoint["classes"]):
            why = (f"the data had {len(checkpoint['classes'])} classes and has {len(classes)}, which differ in "
                   f"{', '.join(sorted({*classes} ^ {*checkpoint['classes']}))[:200]}; restore the data")
        raise UsageError(f"--resume: not the model of this run: {why}, or start a new run") from None
    if checkpoint["scaler"]:  # empty of a run that was not in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    random.setstate(checkpoint["rng"]["python"])
    torch.set_rng_state(checkpoint["rng"]["torch"])
    if torch.cuda.is_available() and len(checkpoint["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])
    return checkpoint["step"]


class Saver:
    """Which checkpoints a run keeps: last.pt every --save-every, the best by validation, those of --keep-every.

    folder   harness.folder.Folder.  args: the flags.
    collect  () -> the state to write.
    file     of the best score so far, `best`: that of a resumed run, or None.
    """

    def __init__(self, folder, args, collect, file, best):
        self.folder, self.args, self.collect, self.file, self.best = folder, args, collect, file, best
        self.minutes = float(args.save_every[:-3]) if isinstance(args.save_every, str) else None
        self.saved = time.perf_counter()

    def minutes_are_up(self):
        return self.minutes is not None and time.perf_counter() - self.saved > 60 * self.minutes

    def write(self, name="last.pt"):
        state = self.collect()
        if is_main():
            save(self.folder.path / name, state)
        if name == "last.pt":
            self.saved = time.perf_counter()

    def after_epoch(self, epoch, whole, score, now):
        """epoch: finished ones; whole: this one too.  score: of validation images, or None.  now: write last.pt anyway.

        A score from the test split never chooses a checkpoint.
        """
        due = self.minutes_are_up() if self.minutes is not None else epoch % self.args.save_every == 0
        # The best file first: once last.pt stands, a resumed run takes this score for written.
        score = None if score is None else round(score, 6)  # as in metrics.jsonl, from where a resumed run has it
        if score is not None and self.args.knn_split == "val" and (self.best is None or score > self.best):
            self.best = score
            self.write(self.file)
        if self.args.keep_every and whole and epoch % self.args.keep_every == 0:
            self.write(f"epoch-{epoch:04}.pt")
        if now or due:
            self.write()


def bytes_needed(model, args, epochs, done):
    """Of all checkpoints that a run of so many epochs, `done` of them, has at a time.

    The one being written, those that stay and, where they do not lie there yet, last.pt and the best; each has the
    weights and a momentum for most of them.
    """
    kept = epochs // args.keep_every - done // args.keep_every if args.keep_every else 0
    files = (1 if args.resume else 3) + kept
    return 2 * files * sum(t.numel() * t.element_size() for t in model.state_dict().values())
