"""What the four methods share and no paper would mention, next to the one network they all train.

    ResNet18        the backbone, torchvision's names, an ImageNet or a CIFAR stem, any width
    TwoCrops        two random views of one batch
    AverageMeter    a running mean that lives on the device
    LRScheduler     the learning rate as a function of the step number alone
    the rest        flags, devices, progress, the folder of a run, checkpoints

Importing this file does nothing.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torchvision.utils import make_grid, save_image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------
# The network: ResNet-18 (He et al. 2015, arXiv 1512.03385)
# ------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, Fig. 5 left).

    x        (N, c_in, H, W) float.
    returns  (N, c_out, H/stride, W/stride).
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:  # the shortcut must change shape too ("option B")
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.relu(x)


class ResNet18(nn.Module):
    """ResNet-18 whose parameters bear torchvision's names, so that weights go both ways.

    num_classes         0: no classifier, the result is the pooled feature; else a linear layer `fc`.
    stem                "imagenet": 7x7 stride 2 and max-pool, a quarter of the side reaches layer1;
                        "cifar": 3x3 stride 1 and no max-pool, for pictures up to about 64 px.
    width               channels of layer1; the feature has 8 * width. 64 is ResNet-18 proper.
    zero_init_residual  start every block as the identity (its last BN gamma at 0), as SimSiam does.

    forward(x)          (N, 3, H, W) float -> (N, 8*width), or (N, num_classes).
    features(x, names)  one pass -> {name: (N, C)}, pooled outputs of "layer1" ... "layer4".
    raises              ValueError for an unknown stem.
    """

    def __init__(self, num_classes=0, stem="cifar", width=64, zero_init_residual=False):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)
        self.dim = 8 * width
        # oneDNN's channels_last convolutions of fewer than 8 channels corrupt the heap (torch 2.14, backward pass).
        self.contiguous = width < 8
        self.fc = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    @staticmethod
    def _stage(c_in, c_out, stride):
        return nn.Sequential(BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1))

    def _apply(self, fn, recurse=True):  # what .to(memory_format=...) does to each module
        super()._apply(fn, recurse)
        if self.contiguous:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return self

    def features(self, x, names=("layer4",)):
        pooled, x = {}, x.contiguous() if self.contiguous else x
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
            if name in names:
                pooled[name] = x.mean(dim=(2, 3))  # global average pooling: (N, C, H, W) -> (N, C)
        return pooled

    def forward(self, x):
        return self.fc(self.features(x)["layer4"])


# ------------------------------------------------------------------------------------------------
# The parts of a training loop
# ------------------------------------------------------------------------------------------------


class TwoCrops:
    """Two independent views of every image: `x1, x2 = TwoCrops(transform)(batch, ...)`.

    transform   called with the batch's arguments; it draws anew each time, an own draw per image.
    transform2  the second view's own transform, as in BYOL and Barlow Twins; None: the same again.
    returns     two tensors; row i of both comes from image i.
    """

    def __init__(self, transform, transform2=None):
        self.transforms = transform, transform if transform2 is None else transform2

    def __call__(self, *batch):
        return tuple(transform(*batch) for transform in self.transforms)


class AverageMeter:
    """The mean of a figure over an epoch, weighted by the images behind each value.

    The sum stays where the values are: `update` never makes the host wait for the device. Reading
    `avg` does, so read it when you print.
    """

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value, n=1):
        """value: float or scalar tensor, a mean over n images."""
        if torch.is_tensor(value):
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
        self.sum = self.sum + value * n
        self.count += n

    @property
    def avg(self):
        return float(self.sum) / self.count if self.count else float("nan")

    def mean(self):
        """`avg` over the images of all processes; every one of them must ask."""
        if not dist.is_initialized():
            return self.avg
        both = torch.stack([torch.as_tensor(self.sum), torch.as_tensor(self.count, device=self.sum.device)]).double()
        dist.all_reduce(both)
        return (both[0] / both[1]).item()


class LRScheduler:
    """Sets the learning rate from the step number alone, so a resumed run needs no state.

    optimizer     its groups get the rate; a group with "fix_lr": True keeps `lr` (SimSiam's predictor).
    lr            the rate after warm-up, already scaled to the batch size.
    total_steps   length of the whole run, in optimiser steps (not epochs).
    warmup_steps  the rate climbs linearly to `lr` over these; the first step takes lr / warmup_steps.
    kind          "cosine" to zero, "steps" (times `factor` at each of `milestones`), "constant".
    milestones    in steps, with kind "steps".
    Source        Loshchilov & Hutter 2017 (cosine, no restarts); Goyal et al. 2017 (warm-up).
    """

    def __init__(self, optimizer, lr, total_steps, warmup_steps=0, kind="cosine", milestones=(), factor=0.1):
        if kind not in ("cosine", "steps", "constant"):
            raise ValueError(f'kind must be "cosine", "steps" or "constant", got {kind!r}')
        self.optimizer, self.lr, self.kind, self.factor = optimizer, lr, kind, factor
        self.total_steps, self.warmup_steps, self.milestones = total_steps, warmup_steps, milestones

    def lr_at(self, step):
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.kind == "steps":
            return self.lr * self.factor ** sum(step >= milestone for milestone in self.milestones)
        return self.lr

    def step(self, step):
        """Call before the optimiser's step number `step` (from 0). Returns the scheduled rate."""
        lr = self.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr if group.get("fix_lr") else lr
        return lr


# ------------------------------------------------------------------------------------------------
# Randomness, devices, precision
# ------------------------------------------------------------------------------------------------


def seed_everything(seed):
    """Seed Python's and torch's global generators: they draw the initial weights."""
    random.seed(seed)
    torch.manual_seed(seed)


def reseed(generator, *numbers):
    """Seed a generator from whole numbers, for example (seed, step), mixed so that neighbours differ.

    The draws of a step then depend on these numbers alone: a resumed run repeats what the
    uninterrupted one would have drawn, and no two steps (or ranks) share a draw.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "little") >> 1)


def pick_device(name="auto"):
    """"auto" takes cuda, then mps, then cpu. Raises UsageError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name}: not available here; try --device auto") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN time its kernels once
        torch.set_float32_matmul_precision("high")
    return device


def pick_precision(name, device):
    """"auto" takes bf16 where the hardware multiplies it, else fp16 on CUDA, else float32.

    returns  (autocast, scaler): autocast() is a context for the forward pass; the GradScaler
             passes losses through unchanged unless the precision is fp16.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu" and _cpu_multiplies_bf16():
            name = "bf16"
        else:
            name = "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


def compile_model(model, run):
    """model.compile(), which goes on uncompiled (and says so) where torch.compile cannot work on this machine."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old: many kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:60]
        run.say(f"note    --compile does not work here, going on without: {reason}")
    else:
        model.compile()


def _cpu_multiplies_bf16():
    # Without AMX tiles bf16 convolutions are slower than float32 (measured with avx512_bf16 alone: 0.8 times).
    # torch 2.8 has no public question.
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


NEWEST = "newest"  # --resume without a folder

# What --data understands besides folders.
NAMED_DATA = ("toy", "cifar10", "cifar100", "stl10", "imagenette", "food101")

# Kind of data -> what a network without a run takes: the same as in the methods' recipes.
SHAPES = {
    "toy": dict(image_size=32, stem="cifar", width=16),
    "cifar": dict(image_size=32, stem="cifar", width=64),
    "stl10": dict(image_size=96, stem="imagenet", width=64),
    "photos": dict(image_size=128, stem="imagenet", width=64),
}

# What articles and other programs call it, where the letters do not lead to our word for it.
WORDS = {
    "threshold": "--stop-at-accuracy", "early-stop": "--stop-at-accuracy", "early-stopping": "--stop-at-accuracy",
    "save-steps": "--keep-every", "save-freq": "--keep-every", "freeze": "linear.py --probe",
    "unfreeze": "linear.py --finetune", "moco-k": "--queue-size", "moco-m": "--momentum-encoder",
    "moco-t": "--temperature", "tau": "--temperature", "learning-rate": "--lr", "wd": "--weight-decay",
    "bs": "--batch-size", "b": "--batch-size", "arch": "--width (of a ResNet-18)", "gpu": "--device",
    "pretrained": "--checkpoint or --init", "ckpt": "--checkpoint or --init", "init": "--weights",
    "workers": "all cores work anyway", "num-workers": "all cores work anyway",
}


def printable(text):
    """One line for any terminal: line breaks, control characters and undecodable bytes of a file's name, escaped."""
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


class UsageError(Exception):
    """Something the user can fix: one line that names the flag or file and the fix."""

    def __init__(self, text):
        super().__init__(printable(text))


class Interrupted(Exception):
    """The run was told to end, by a signal or by a stdout that takes no more, and what it had reached is saved."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


PIPE_CLOSED = 141  # 128 + SIGPIPE: what shells expect of a program whose reader, `head` for instance, has left


def is_main():
    """Whether this process is the one that prints and writes: the only one, or torchrun's process 0."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def complain(message, code):
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    if is_main():
        with contextlib.suppress(OSError):  # the terminal has gone
            print(message, file=sys.stderr)
    sys.exit(code)


def silence_stdout():
    """Once it has failed: nothing goes there any more, and what still waits does not fail when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text, end="\n"):
    """print() to a stdout that may be gone: a run that has begun saves first, then ends."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        if not (Run.current and Run.current.started):
            raise
        silence_stdout()
        Run.current.tell(f"stdout: {error.strerror}", PIPE_CLOSED if isinstance(error, BrokenPipeError) else 2)


def command(main):
    """Turns what main() may raise for the user to read into one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapped(argv=None):
        name = Path(sys.argv[0]).name
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # closed, as by >&-
                setattr(sys, stream, open(os.devnull, "w"))
            if hasattr(getattr(sys, stream), "reconfigure"):  # a letter that the terminal lacks is escaped
                getattr(sys, stream).reconfigure(errors="backslashreplace")
        try:
            code = main(argv)
            sys.stdout.flush()  # what it does not take is said here, not when Python has ended
            return code
        except OSError as error:
            if error.errno is None:
                raise
            if error.filename is None:  # of what has no name, only stdout is written without a care
                silence_stdout()
            if isinstance(error, BrokenPipeError):
                sys.exit(PIPE_CLOSED)
            complain(f"{name}: error: {printable(str(error.filename or 'stdout'))}: {error.strerror}", 2)
        except UsageError as error:
            complain(f"{name}: error: {error}", 2)
        except Interrupted as error:
            complain(f"\n{error}", error.code)
        except KeyboardInterrupt:
            complain("\ninterrupted", 130)
        except (RuntimeError, MemoryError) as error:
            if dist.is_initialized() and ("gloo" in str(error).lower() or isinstance(error, dist.DistError)):
                complain(f"{name}: error: another process of this run ended; its own message says why. With torchrun "
                         "--max-restarts N the run goes on from its last checkpoint", 1)
            if not out_of_memory(error):
                raise
            fix = "; free some, or choose another --device"
            if Run.current:
                flags = vars(Run.current.args)
                sizes = ("batch_size", "image_size", "width", "dim", "pred_dim", "queue_size")
                fix = (f" with {', '.join(flag_text(n, flags[n]) for n in sizes if flags.get(n))}; lower one of them; "
                       "--stem imagenet and, on a GPU, --amp bf16 need less too")
            complain(f"{name}: error: out of memory{fix}", 2)
        finally:
            if Run.current:
                Run.current.close()

    return wrapped


def flag_text(name, value):
    """("lr", 0.1) -> "--lr 0.1"."""
    return f"--{name.replace('_', '-')} {value}"


def out_of_memory(error):
    """Whether torch (on a GPU or on the host) or Python could not get the memory it asked for."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "size calculation overflowed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Default values in the help, where they say something."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and flags whose default depends on the data.

    recipes  {kind of data: {flag: value}}; a flag that stands there starts as None, see fill_recipe.
    """

    def __init__(self, description, recipes=None):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)
        self.recipes = recipes or {"": {}}

    def flag(self, flag, meaning, recipes=None, group=None, **kind):
        """add_argument(flag, ...) whose help also says what each kind of data takes by default."""
        name, recipes = flag[2:].replace("-", "_"), recipes or self.recipes
        if all(name in recipe for recipe in recipes.values()):
            meaning += f" (default: {', '.join(f'{kind} {r[name]}' for kind, r in recipes.items())})"
        (group or self).add_argument(flag, help=meaning, **kind)

    def error(self, message):  # argparse prints the whole usage first
        complain(f"{self.prog}: error: {printable(message)}", 2)

    def exit(self, status=0, message=None):  # after --help
        sys.stdout.flush()
        super().exit(status, message)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, of flags that may be spelt with underscores; an unknown flag is refused before all else."""
        args = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        for i, arg in enumerate(args):
            name, *value = arg.split("=", 1)
            if arg == "--":  # what follows are no flags
                break
            if not re.match("--?[A-Za-z][^ ]*$", name) or name in self._option_string_actions:
                continue
            flag = name.replace("_", "-")
            if flag not in self._option_string_actions:
                self.error(f"{name}: no such flag{self._meant(flag)}")
            args[i] = "=".join([flag, *value])
        return super().parse_known_args(args, namespace)

    def _meant(self, flag):
        word, flags = flag.lstrip("-").lower(), [f.lstrip("-") for f in self._option_string_actions]
        here = (w for w in WORDS.get(word, "").split(" or ") if not w.startswith("--") or w.split()[0][2:] in flags)
        other = next(here, "") or "".join(f"--{near}" for near in difflib.get_close_matches(word, flags, 1))
        return f"; did you mean {other}?" if "--" in other else f"; {other or '--help lists them'}"

    def _check_value(self, action, value):  # argparse's names no nearest
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = difflib.get_close_matches(str(value).lower(), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"no such value: {value!r}{hint} (choose from {', '.join(choices)})")


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or float within [low, high], or strictly above `above`, that a tensor can hold.

    A whole number, be it a count or a seed, must fit int64; another float32, with room for a product or a quotient.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {word}") from None
        smallest, largest = (1, 2**63 - 1) if kind is int else (1e-30, 1e30)
        if value and not smallest <= abs(value) <= largest:  # nor is nan
            allowed = f"at most {largest}" if kind is int else f"from {smallest:g} to {largest:g}"
            raise argparse.ArgumentTypeError(f"{text[:80]} is out of range, {allowed}")
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        if too_low or (high is not None and value > high):
            bounds = [f"at least {low}"] if low is not None else []
            bounds += [f"above {above}"] if above is not None else []
            bounds += [f"at most {high}"] if high is not None else []
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds)}")
        return value

    return parse


class Rate(argparse.Action):
    """--lr or --step-lr: the one that is given replaces whichever a resumed run has saved."""

    def __call__(self, parser, args, value, flag=None):
        args.lr = args.step_lr = None
        setattr(args, self.dest, value)


def path(text):
    """An argparse type: a file or folder that is there or could be; ~ stands for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    text = os.path.expanduser(text)
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # others say it with more words
        pass
    except (OSError, ValueError) as error:  # too long; a null character
        short = text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"
        raise argparse.ArgumentTypeError(f"{short}: {getattr(error, 'strerror', error)}") from None
    return text


def absolute_path(text):
    """The same, for what a run may be asked for from another folder."""
    return os.path.abspath(path(text))


def png_file(text):
    """An argparse type: a picture to write, checked before any work."""
    text = path(text)
    file, folder = Path(text), Path(text).absolute().parent
    if file.suffix.lower() != ".png" or file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} must be a .png file in a folder that can be written to")
    return text


def save_interval(text):
    """An argparse type: "3" epochs -> 3; "10min" stays what it is."""
    minutes = text.endswith("min")
    value = number(float if minutes else int, **({"above": 0} if minutes else {"low": 1}))(text.removesuffix("min"))
    return text if minutes else value


def training_parser(doc, recipes, without=()):
    """The flags that every method offers, but those in `without`; `recipes` is the method's table of defaults."""
    parser = Parser(doc, recipes)
    whole, real = functools.partial(number, int), functools.partial(number, float)

    def add(flag, meaning, **kind):
        if flag not in without:
            parser.flag(flag, meaning, **kind)

    add("--data", f"folder of pictures, or {', '.join(NAMED_DATA)}", type=path, default="toy")
    add("--data-root", "where cifar10 ... food101 lie or are downloaded to", type=path, default="./data")
    add("--download", "fetch the named data set into --data-root", action="store_true")
    add("--cache", "folder for packed pictures (default: in the user's cache folder)", type=path)
    add("--skip-unreadable", "go on without pictures that cannot be read; they are counted and listed",
        action="store_true")
    add("--image-size", "side of a view in pixels; too small: what tells classes apart is gone",
        type=whole(low=8))
    add("--stem", "first layers: cifar up to about 64 px, imagenet above; cifar on large views is slow "
        "and runs out of memory", choices=("cifar", "imagenet"))
    add("--width", "channels of layer1; 64 is ResNet-18", type=whole(low=1))
    add("--epochs", "passes over the training images", type=whole(low=1))
    add("--batch-size", "images per step", type=whole(low=2))
    rates = parser.add_mutually_exclusive_group()
    add("--lr", "learning rate per 256 images; that of a step is in proportion to the batch size; too high: the loss "
        "stays at chance or turns NaN", type=real(above=0), action=Rate, group=rates)
    add("--step-lr", "instead of --lr: the learning rate per step, whatever the batch size, as most articles give it",
        type=real(above=0), action=Rate, group=rates)
    add("--weight-decay", "L2 penalty", type=real(low=0))
    add("--warmup-epochs", "epochs over which the learning rate climbs; the default shrinks with --epochs",
        type=real(low=0))
    add("--seed", "random seed for weights, data order and views", type=whole(low=0), default=0)
    add("--device", "auto (cuda, mps, cpu), or one of them, or cuda:1", default="auto")
    add("--amp", "precision of the forward pass", choices=("auto", "bf16", "fp16", "off"), default="auto")
    add("--compile", "torch.compile: a minute or more at first, faster steps after", action="store_true")
    add("--init", "weights that the backbone starts from, then with their stem and width: a run, or a file of a "
        "ResNet-18 with torchvision's names", metavar="FILE", type=absolute_path)
    add("--out", "folder of the run (default: runs/<method>-<data>-<time>)", type=path)
    add("--resume", "folder or checkpoint of a run to go on with; its flags hold unless given anew; without "
        "a folder: the newest run below runs/ that has the flags given here", metavar="RUN", nargs="?",
        const=NEWEST, type=path)
    add("--save-every", "epochs between checkpoints, or minutes: 10min", type=save_interval, default=1)
    add("--keep-every", "epochs between checkpoints that are kept, as epoch-0050.pt: --checkpoint, --resume take them",
        type=whole(low=1))
    add("--knn-every", "epochs between kNN evaluations, 0: never; each costs a tenth of an epoch or more",
        type=whole(low=0))
    add("--knn-k", "neighbours that vote", type=whole(low=1), default=200)
    add("--knn-t", "temperature of their votes", type=real(low=0.02), default=0.1)
    add("--knn-split", "test: train on every training image and query the test split, as published CIFAR "
        "curves do; then it chooses nothing and there is no best.pt", choices=("val", "test"), default="val")
    add("--views-png", "write what the network sees, one row per image, and exit", metavar="FILE", type=png_file)
    add("--quiet", "print nothing but errors; log.txt still has it all", action="store_true")
    add("--tensorboard", "write the figures for TensorBoard too", action="store_true")
    add("--max-steps", "end after this many steps; the schedule is fitted to it", type=whole(low=1))
    return parser


def parse_training(parser, argv, method, fixed=()):
    """Parse a program's flags; with --resume the saved run's flags stand in for the defaults.

    fixed    further flags that a resumed run cannot change.
    returns  (args, checkpoint): checkpoint is None for a fresh run.
    """
    def absolute(args):
        # The run may be resumed or evaluated from another folder.
        if args.data and args.data not in NAMED_DATA and os.path.isdir(args.data):
            args.data = os.path.abspath(args.data)
        args.data_root = args.data_root and os.path.abspath(args.data_root)
        args.cache = args.cache and os.path.abspath(args.cache)
        return args

    args = absolute(parser.parse_args(argv))
    if args.tensorboard:
        tensorboard_writer()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if args.resume == NEWEST or (args.resume is None and restarted):
        unset = object()
        everything = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        given = {name for name, value in vars(everything).items() if value is not unset} - {"resume", "out"}
        args.resume = newest_run(method, args, given)
        if args.resume is None and not restarted:
            parser.error(f"--resume: no run of {method} with these flags in {Path(args.out or 'runs')}; "
                         "name its folder")
    if args.resume is None:
        if args.download and args.data == "toy":
            parser.error("--download: toy is drawn, not downloaded; add --data cifar10, for instance")
        if args.out and (Path(args.out) / "last.pt").exists():
            parser.error(f"--out {args.out}: holds a run already; --resume it, or name another folder")
        if getattr(args, "init", None):
            take_shape(args, load_weights(args.init), "--init")
        return args, None
    checkpoint = load_checkpoint(args.resume, method)
    saved, folder = dict(checkpoint["args"]), checkpoint_path(args.resume).parent
    given = args.out
    for name in ("resume", "views_png"):
        saved.pop(name, None)
    args = absolute(parser.parse_args(argv, argparse.Namespace(**saved)))  # argparse keeps what is there
    if given and os.path.abspath(given) != os.path.abspath(folder):
        parser.error(f"--out {given}: a resumed run goes on in its own folder, {folder}")
    args.out, args.resume = str(folder), str(folder)
    for name in ("data", "image_size", "stem", "width", "batch_size", "knn_split", "init", *fixed):
        if getattr(args, name, None) != saved.get(name):
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: the run to resume has {saved.get(name)}, which cannot change")
    return args, checkpoint


def newest_run(method, args, given):
    """The folder of the newest run (that has a checkpoint) whose flags `given` have the values of args, or None."""
    found = []
    for file in [Path(args.out, "last.pt")] if args.out else Path("runs").glob("*/last.pt"):
        try:
            saved = json.loads((file.parent / "args.json").read_text())
            if saved["method"] == method and all(saved.get(name) == getattr(args, name) for name in given):
                found.append((file.stat().st_mtime, str(file.parent)))
        except (OSError, ValueError, KeyError):  # not a run of ours
            continue
    return max(found)[1] if found else None


def fill_flags(args, recipe):
    """Give every flag that is still None its value from a table of defaults."""
    for name, value in recipe.items():
        if name == "warmup_epochs":  # a run of fewer epochs than the table's warms up for a shorter while
            value = round(value * min(1, (args.epochs or recipe["epochs"]) / recipe["epochs"]), 3)
        if getattr(args, name) is None and not (name in ("lr", "lr_scaling") and args.step_lr):
            setattr(args, name, value)


def fill_recipe(args, recipe, source):
    """fill_flags() from the recipe of this kind of data.

    raises  UsageError where the source has fewer training images than a batch, or none; or where several
            processes cannot share a batch equally.
    """
    fill_flags(args, recipe)
    train = source.splits["train"]
    images = sum(train.counts) if train else 0
    if images < args.batch_size:
        raise UsageError(f"--batch-size {args.batch_size}: more than the {images} training images; "
                         f"take at most {images}")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if args.batch_size % world:
        raise UsageError(f"--batch-size {args.batch_size}: of all processes together; it must be a multiple of their "
                         f"number, {world}: take {args.batch_size // world * world or world}")


def changed_images(saved, source, splits):
    """In words, which splits have not the images any more that they had in the run whose flags are `saved`; or ""."""
    words = []
    for split in splits:
        before, now = (contents.get(split, [0]) for contents in (saved.get("contents", {}), source.contents))
        if "contents" in saved and before != now:
            words.append(f"{split}: {before[0]:,} then, {now[0]:,}{' others' * (before[0] == now[0])} now")
    return ", ".join(words)


def rate_hint(args, recipe, lr):
    """What to do about the rate of a run whose loss stays at chance, in words.

    recipe  of this kind of data.  lr: the rate per step, after warm-up.
    """
    if args.warmup_epochs > args.epochs / 2:
        return f"lower --warmup-epochs: {args.warmup_epochs:g} of {args.epochs} epochs are most of the run"
    usual, flag = recipe["lr"] * recipe["batch_size"] / 256, "lr" if args.lr else "step-lr"
    short = args.max_steps or args.epochs < recipe["epochs"]
    return (f"{'lower' if lr >= usual else 'change'} --{flag} (the rate per step is {lr:.3g}) or "
            f"{'train longer' if short else 'raise --warmup-epochs'}")


def check_stop(percent, chance):
    """raises  UsageError for a --stop-at-accuracy that chance alone reaches, or that is a share, 0.95 for 95 %."""
    low = max(1, chance)
    if percent is not None and percent <= low:
        fix = f"did you mean {100 * percent:g}?" if low < 100 * percent <= 100 else "take more"
        raise UsageError(f"--stop-at-accuracy {percent:g}: in percent, and chance alone reaches {chance:.3g}; {fix}")


def holdout(args):
    """The part of the training images held out where a source has no validation split."""
    return 0.0 if args.knn_split == "test" else 0.1


# ------------------------------------------------------------------------------------------------
# Progress and the folder of a run
# ------------------------------------------------------------------------------------------------


def clock(seconds):
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """One updating line: label, done/total, figures, rate, time left. Plain lines when piped.

    total     units of work; `unit` is what the rate counts, `per_step` of them a unit of work.
    quiet     prints nothing.
    """

    def __init__(self, total, label="", unit="images", quiet=False, per_step=1):
        self.total, self.label, self.unit, self.quiet, self.per_step = total, label, unit, quiet, per_step
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else 30.0  # seconds between prints
        self.restart(0)

    def restart(self, done, label=None):
        """Begin to measure the rate anew, at `done` (after an evaluation, say)."""
        self.label = self.label if label is None else label
        self.began, self.first, self.done = time.perf_counter(), done, done
        self.printed = self.updated = self.began

    @property
    def rate(self):
        """Units a second from the last restart to the last update."""
        return (self.done - self.first) * self.per_step / max(1e-9, self.updated - self.began)

    def update(self, done, **figures):
        """figures: floats or AverageMeters; meters are read only when a line is due."""
        self.done, self.updated = done, time.perf_counter()
        now = self.updated
        if self.quiet or now - self.printed < self.every:
            return
        self.printed = now
        words = [self.label, f"{done}/{self.total}"]
        for name, value in figures.items():
            words.append(f"{name} {value.avg if isinstance(value, AverageMeter) else value:.4g}")
        left = (self.total - done) * self.per_step / max(self.rate, 1e-9)
        words += [f"{self.rate:,.0f} {self.unit}/s", f"{clock(left)} left"]
        line = "  ".join(words)
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            line = "\r\x1b[K" + line[: columns - 1]
        show(line, end="" if self.terminal else "\n")

    def close(self):
        """Take the updating line away; what is printed next starts on a clean line."""
        if self.terminal and not self.quiet:
            show("\r\x1b[K", end="")


class Run:
    """The folder of one run, what is written there and said on the terminal, and when.

    method      "simsiam", ...: in the folder's name and in every checkpoint.
    args        parsed flags, all plain values; written to args.json.
    source      of data.open_source: its name and description.
    checkpoint  of the run that is resumed, else None.
    score       the figure of log() by which `best` is chosen, percent; title: its name on the terminal.
    best        file that keeps the state with the best validation score.
    name        what the folder's name begins with, if it is not the method.
    Nothing is written before start(): pictures that cannot be read leave no empty folder behind.
    raises      UsageError where the folder could not be made.
    """

    current = None  # the run that this process is training, for the last words of `command`

    def __init__(self, method, args, source, checkpoint=None, score="knn", title="kNN", best="best.pt", name=None):
        self.method, self.args, self.checkpoint = method, args, checkpoint
        changed = checkpoint and changed_images(checkpoint["args"], source, ("train", args.knn_split))
        if changed:
            raise UsageError(f"--resume {args.resume}: the images are not those of the run any more ({changed}); bring "
                             "them back, or start a new run on those that are there now")
        args.contents = source.contents
        self.score, self.title, self.best_file = score, title, best
        self.unnamed = args.out is None
        if self.unnamed:
            box = [f"runs/{name or method}-{source.name}-{time.strftime('%Y%m%d-%H%M%S')}"]
            if dist.is_initialized():  # one folder for all processes
                dist.broadcast_object_list(box, src=0)
            args.out = box[0]
        self.folder, self.started, self.said, self.best, self.line = Path(args.out), False, [], None, None
        self.handlers, self.log_file, Run.current = {}, None, self
        self.there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not self.there.is_dir() or not os.access(self.there, os.W_OK):
            raise UsageError(f"--out {self.folder}: {self.there} is not a folder that can be written to")
        for line in source.description:
            self.say(line)

    @property
    def quiet(self):
        return self.args.quiet or not is_main()

    def say(self, text):
        """Print, and keep in log.txt."""
        if not is_main():
            return
        if self.line is not None:
            self.line.close()
        if not self.args.quiet:
            show(text)
        self.said.append(text)
        if self.started:
            self._append("log.txt", "".join(line + "\n" for line in self.said))
            self.said = []

    def _append(self, name, text):
        try:
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"{self.folder / name}: {error.strerror or error}; make room, then go on with "
                             f"--resume {self.folder}") from None

    def start(self, model, optimizer, scaler, dataset, total_steps, epoch_steps, device, lr, chance, extra=None):
        """Make the folder, or restore the run that stands there; print the recipe in one screen.

        model    has `.backbone`, a ResNet18.  lr: the rate after scaling to the batch.
        chance   the loss of a network that knows nothing, in words.
        extra    () -> dict: what else goes into the checkpoints.
        returns  the step to go on with, 0 for a new run.
        raises   UsageError where the folder cannot be written or lacks space, or the flags do not fit.
        """
        args, self.total_steps, self.epoch_steps = self.args, total_steps, epoch_steps
        self.parts, self.extra = (model, optimizer, scaler, dataset), extra or dict
        self.epochs = math.ceil(total_steps / epoch_steps)
        self.before, self.first, self.told = 0.0, None, None
        step = restore(self.checkpoint, model, optimizer, scaler, dataset.classes) if self.checkpoint else 0
        if step and step // epoch_steps != self.checkpoint["epoch"]:  # pictures that could not be read before, say
            raise UsageError(f"--resume {self.folder}: an epoch has {epoch_steps:,} steps now, so step {step:,} is not "
                             f"in epoch {self.checkpoint['epoch'] + 1:,} any more: the images changed; bring back "
                             "those of the run, or start a new one")
        self.jump = self._changed_rate(step)
        self.every_minutes = float(args.save_every[:-3]) if isinstance(args.save_every, str) else None
        self.began = self.saved = self.checked = time.perf_counter()
        self.writer, self.meters, self.unchecked, self.watches = None, {}, [], device.type == "cpu"
        if is_main():
            self._make_folder()
        self.started = True
        # The first signal waits for the end of the step, where all is saved; the second ends at once.
        # Of several processes only the first can save; the others end with it.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
                numbers.append(signal.SIGHUP)
            self.handlers = {number: signal.signal(number, self._stop) for number in numbers}

        plumbing = {"data", "data_root", "download", "cache", "out", "resume", "quiet", "tensorboard",
                    "views_png", "device", "amp", "compile", "save_every", "keep_every", "skip_unreadable", "knn_every",
                    "contents"}
        recipe = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                           if name not in plumbing and value not in (None, "val") and value is not False)
        precision = str(device) if args.amp == "auto" else f"{device}, {args.amp}"
        if dist.is_initialized():
            precision = f"{dist.get_world_size()} processes, {precision}"
        facts = {
            "recipe": recipe,
            "lr": f"{lr:g} per step of {args.batch_size} images" + (f" ({args.lr:g} per 256)" if args.lr else ""),
            "steps": f"{epoch_steps:,} per epoch, {total_steps:,} in all, on {precision}",
            "chance": f"loss {chance}",
            "writes": f"{self.folder}",
        }
        if args.warmup_epochs > args.epochs / 2:
            facts["note"] = (f"--warmup-epochs {args.warmup_epochs:g} of {args.epochs} epochs: the rate climbs for "
                             f"most of the run; {args.epochs / 10:g} is usual")
        if step:
            facts["resumes"] = f"at step {step:,}" + (": nothing is left to do" if step >= total_steps else "")
        for name, text in facts.items():
            self.say(textwrap.fill(text, 79, initial_indent=f"{name:8}", subsequent_indent=" " * 8,
                                   break_long_words=False, break_on_hyphens=False))
        return step

    def _changed_rate(self, step):
        """"flags, was rate" where flags change the schedule of the resumed run, else None."""
        saved = self.checkpoint["args"] if self.checkpoint else {}
        names = ("epochs", "max_steps", "lr", "step_lr", "warmup_epochs", "schedule")
        flags = [flag_text(n, value) + (f" (was {saved[n]})" if saved[n] is not None else "") for n in names
                 if n in saved and (value := getattr(self.args, n, None)) not in (None, saved[n])]
        return flags and step and (", ".join(flags), self.parts[1].param_groups[0]["lr"])

    def _make_folder(self):
        args = self.args
        # last.pt, best.pt, the one being written and those that stay; each has the weights and a momentum for most
        # of them.
        files, done = 3, self.checkpoint["epoch"] if self.checkpoint else 0
        if args.keep_every:
            files += self.total_steps // self.epoch_steps // args.keep_every - done // args.keep_every
        needed = 2 * files * sum(t.numel() * t.element_size() for t in self.parts[0].state_dict().values())
        free = shutil.disk_usage(self.there).free
        if free < needed:
            raise UsageError(f"--out {self.folder}: {free / 1e6:,.0f} MB free, checkpoints need "
                             f"{needed / 1e6:,.0f} MB; make room or choose another folder")
        try:
            for number in itertools.count(2):
                try:
                    self.folder.mkdir(parents=True, exist_ok=not self.unnamed)
                    break
                except FileExistsError:  # another run began in the same second
                    if not self.unnamed:
                        raise
                    self.folder = Path(f"{args.out}-{number}")
            args.out = str(self.folder)
            self._lock()
            if self.checkpoint:
                self._take_back()
            else:  # of a run that ended before its first checkpoint
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            flags = json.dumps({"method": self.method, **vars(args)}, indent=1)
            write_atomically(self.folder / "args.json", flags.encode())
        except OSError as error:
            raise UsageError(f"--out {self.folder}: {error.strerror or error}") from None
        self.writer = tensorboard_writer()(str(self.folder)) if args.tensorboard else None

    def _lock(self):
        """Keep other programs out of the folder while this one lives; where there are no locks, as on some NFS: not."""
        self.log_file = open(self.folder / "log.txt", "a")  # any file will do that is there anyway
        try:
            if fcntl:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            flag, other = ("resume", "") if self.checkpoint else ("out", ", or name another folder")
            raise UsageError(f"--{flag} {self.folder}: another program trains there; wait for its end{other}") from None
        except OSError:
            pass
        if not self.checkpoint and (self.folder / "last.pt").exists():  # since the flags were read
            raise UsageError(f"--out {self.folder}: holds a run already; --resume it, or name another folder")

    def _take_back(self):
        # Epochs after the checkpoint are run again: their lines must not stand there twice.
        rows = [row for row in read_metrics(self.folder) if row["epoch"] <= self.checkpoint["epoch"]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.folder / "metrics.jsonl", text.encode())
        scores = [row[self.score] for row in rows if row[self.score] is not None]
        self.first = scores[0] if scores else None
        self.best = max((row[self.score] for row in rows if row["epoch"] and row[self.score] is not None),
                        default=None)
        self.before = self.checkpoint["seconds"]

    def _stop(self, number, frame):
        name = signal.Signals(number).name
        # Of a terminal that closes, several may tell, one after the other.
        if self.told and self.told[0] in ("SIGINT", "SIGTERM") and name != "SIGHUP":
            raise KeyboardInterrupt
        self.tell(name, 128 + number)

    def tell(self, reason, code):
        """Let the run end after this step, saved, with this exit code."""
        if is_main():  # were another process to leave first, it would be missed
            self.told = self.told or (reason, code)

    def close(self):
        """Give signals back to whom they belonged, and the folder free."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.log_file:
            self.log_file.close()
        Run.current = None

    def begin_epoch(self, epoch, step, *names):
        """An AverageMeter for each of `names` ("loss" first), filled where a resumed run stopped in mid-epoch.

        epoch  from 0.  step: steps taken so far.
        """
        self.meters = {name: AverageMeter() for name in names}
        if self.checkpoint and step % self.epoch_steps and step == self.checkpoint["step"]:
            for name, (total, count) in self.checkpoint["meters"].items():
                self.meters[name].sum, self.meters[name].count = total, count
        label = f"epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}"
        self.line = Progress(self.total_steps, label, quiet=self.quiet, per_step=self.args.batch_size)
        self.line.restart(step)
        return list(self.meters.values())

    def after_step(self, step, lr, loss):
        """The progress line; an alarm if the loss is not finite; a checkpoint if the time or a signal asks for it.

        step    steps taken.  loss: scalar tensor of the last one.
        raises  UsageError for a loss that is NaN or infinite; Interrupted after a signal, when all is saved.
        """
        if self.jump:
            (flags, before), self.jump = self.jump, None
            if f"{before:.3g}" != f"{lr:.3g}":
                self.say(textwrap.fill(f"note    {flags}: the learning rate goes from {before:.3g} to {lr:.3g}", 79,
                                       subsequent_indent=" " * 8, break_on_hyphens=False))
        self.unchecked.append((step, lr, loss.detach()))
        # Looking at a loss makes the host wait for a GPU: there it is done about once a second, and at the end
        # of an epoch, so that the rate counts steps that are done and not only asked for.
        ends = step % self.epoch_steps == 0 or step == self.total_steps
        if self.watches or ends or time.perf_counter() - self.checked > 1:
            self._check()
        self.line.update(step, lr=lr, **self.meters)
        # At the end of an epoch its figures come first: save() does it.
        if step % self.epoch_steps and step < self.total_steps and (self.told or self._minutes_are_up()):
            self._write("last.pt", step)
            self._leave_if_told(step)

    def _check(self):
        pending, self.unchecked, self.checked = self.unchecked, [], time.perf_counter()
        if not pending or bool(torch.stack([loss for _, _, loss in pending]).isfinite().all()):
            return
        step, lr, loss = next(entry for entry in pending if not math.isfinite(entry[2]))
        scaler = self.parts[2]
        scale = f", loss scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
        saved = (self.folder / "last.pt").exists()
        raise UsageError(f"the loss is {loss.item()} at step {step} (lr {lr:.3g}{scale}): lower --lr, raise "
                         "--warmup-epochs, or try --amp off; " +
                         (f"the last good checkpoint stays in {self.folder}" if saved else "nothing was saved yet"))

    def _minutes_are_up(self):
        return self.every_minutes is not None and time.perf_counter() - self.saved > 60 * self.every_minutes

    def _leave_if_told(self, step):
        if self.told:
            reason, code = self.told
            raise Interrupted(code, f"{reason}: saved at step {step:,}; go on with\n"
                                    f"  python {Path(sys.argv[0]).name} --resume {self.folder}")

    def log(self, *, epoch, step, lr, **figures):
        """Print an epoch's line and append it to metrics.jsonl. Epoch 0 is the untrained network.

        figures  the score (percent, or None), further scores, health figures. Loss and health of the
                 meters of begin_epoch come along, means over all processes.
        returns  the row that was written.
        """
        self._check()
        rate = self.line.rate if epoch else None
        means = {name: meter.mean() for name, meter in self.meters.items()} if epoch else {}
        row = dict(epoch=epoch, step=step, seconds=self.seconds, loss=means.pop("loss", None), lr=lr,
                   images_per_second=rate, **{self.score: figures.pop(self.score)}, **means, **figures)
        if not is_main():
            return row
        written = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
        self._append("metrics.jsonl", json.dumps(written) + "\n")
        if self.writer is not None:
            for name, value in written.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()
        self._say_row(row, means | figures)
        return row

    @property
    def seconds(self):
        """Since the run began, interruptions left out."""
        return self.before + time.perf_counter() - self.began

    def _say_row(self, row, figures):
        width, epoch, score = len(str(self.epochs)), row["epoch"], row[self.score]
        words = [f"epoch {epoch:>{width}}/{self.epochs}" if epoch else "untrained".ljust(7 + 2 * width)]
        if row["loss"] is not None:
            words.append(f"loss {row['loss']:7.4f}")
        words += [f"{name} {value:.3f}" for name, value in figures.items()
                  if not name.startswith("knn") and value is not None]
        if score is not None:
            words.append(f"{self.title} {score:5.2f} %")
            self.first = score if epoch == 0 else self.first
        words += [f"{name[4:]} {value:5.2f} %" for name, value in figures.items()
                  if name.startswith("knn_layer") and value is not None]
        if row["images_per_second"] is not None:
            words.append(f"{row['images_per_second']:,.0f} images/s")
        words.append(clock(row["seconds"]))
        line = ""
        for word in words:  # a line that would pass 79 columns goes on below
            if len(line) - line.rfind("\n") + len(word) > 77:
                line += "\n" + " " * len(words[0])
            line += ("  " if line else "") + word
        self.say(line)

    def save(self, step, score, last):
        """last.pt every --save-every and at the end; the best file whenever validation improves; --keep-every's.

        score   of validation images, or None; a score from the test split never chooses a checkpoint.
        raises  UsageError where it cannot be written; Interrupted after a signal, when all is saved.
        """
        args, epoch = self.args, step // self.epoch_steps
        due = self._minutes_are_up() if self.every_minutes is not None else epoch % args.save_every == 0
        # The best file first: once last.pt stands, a resumed run takes this score for written.
        score = None if score is None else round(score, 6)  # as in metrics.jsonl, from where a resumed run has it
        if score is not None and args.knn_split == "val" and (self.best is None or score > self.best):
            self.best = score
            self._write(self.best_file, step)
        if args.keep_every and step % self.epoch_steps == 0 and epoch % args.keep_every == 0:
            self._write(f"epoch-{epoch:04}.pt", step)
        if last or due or self.told:
            self._write("last.pt", step)
        if not last:
            self._leave_if_told(step)

    def _write(self, name, step):
        self._check()  # no checkpoint of a broken network
        if is_main():
            model, optimizer, scaler, dataset = self.parts
            state = checkpoint_state(self.method, model, optimizer, scaler, step // self.epoch_steps, step,
                                     self.args, dataset)
            state["seconds"] = self.seconds
            state["meters"] = {name: (meter.sum, meter.count) for name, meter in self.meters.items()}
            save_checkpoint(self.folder / name, state | self.extra())
        if name == "last.pt":
            self.saved = time.perf_counter()

    def finish(self, next_command=None):
        """What was reached, where it is, what to do next."""
        score = self.best
        if self.args.knn_split == "test":
            scores = [row[self.score] for row in read_metrics(self.folder) if row[self.score] is not None]
            score = scores[-1] if scores else None
        if self.first is not None and score is not None:
            self.say(f"{self.title:8}{self.first:.2f} % untrained, {score:.2f} % "
                     f"{'at best' if self.args.knn_split == 'val' else 'at the end, test split'}")
        dataset = self.parts[3]
        splits = [getattr(dataset, split) for split in ("train", self.args.knn_split)]
        command = f"python linear.py --checkpoint {self.folder}"
        if len(dataset.classes) < 2 or not all(split and (split.labels >= 0).any() for split in splits):
            command = f"python knn.py --checkpoint {self.folder} --neighbours neighbours.png"  # needs no labels
        self.say(f"next    {next_command or command}")


def tensorboard_writer():
    """torch's SummaryWriter class, or one line that says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package: pip install tensorboard") from None
    return SummaryWriter


def read_metrics(folder):
    """The rows of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# ------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain values only
# ------------------------------------------------------------------------------------------------


VERSION = 1  # of the checkpoints' form


def write_atomically(path, content):
    """Write bytes, or a state for torch.save, to a file beside; sync, rename: never half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name must survive a power cut too
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


def checkpoint_state(method, model, optimizer, scaler, epoch, step, args, dataset):
    """Everything needed to go on, and the backbone under torchvision's names.

    model    has `.backbone`, a ResNet18.  epoch: finished epochs.  step: optimiser steps taken.
    dataset  has classes, mean, std.  args: parsed flags, plain values.
    """
    return {
        "version": VERSION,
        "method": method,
        "model": model.state_dict(),
        "backbone": model.backbone.state_dict(),  # the same storages: written once
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
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


def save_checkpoint(path, state):
    """Write a checkpoint_state; a file that is there stays whole until the new one is.

    raises  UsageError where it cannot be written.
    """
    try:
        write_atomically(Path(path), state)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        stays = "; the one before it stays" if Path(path).exists() else ""
        raise UsageError(f"{path}: cannot write the checkpoint: {reason}{stays}") from None


def checkpoint_path(path):
    """A run folder stands for its last.pt."""
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path


def read_tensors(path):
    """Read what torch.save wrote, on the CPU, without running any code it may contain: (the file, its content).

    path     a file or a run folder.
    raises   UsageError where it is missing, damaged, or holds more than tensors and plain values.
    """
    file = checkpoint_path(path)
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
    """Whether a file's content is a checkpoint_state."""
    wanted = {"method", "model", "backbone", "args", "classes", "mean", "std", "image_size", "stem", "width"}
    return isinstance(content, dict) and wanted <= content.keys()


def load_checkpoint(path, method=None):
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
        raise UsageError(f"{file}: a {checkpoint['method']} run; go on with python {checkpoint['method']}.py")
    return checkpoint


def restore(checkpoint, model, optimizer, scaler, classes=None):
    """Put a checkpoint's state into freshly made objects, random generators too. Returns the step.

    classes  of the data: named where they, and not the flags, make another model than the saved one.
    """
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError):
        then, now = ({name: tuple(value.shape) for name, value in state.items()}
                     for state in (checkpoint["model"], model.state_dict()))
        name, saved = next((n for n in then | now if then.get(n) != now.get(n)), None), checkpoint["classes"]
        was, now = then.get(name, "not there"), now.get(name, "not there")
        fault = f"{name} was {was} and is {now}" if name else "it had another optimiser"
        fault += "; leave out the flags that it did not have"
        if classes is not None and (*was[:1], *now[:1]) == (len(saved), len(classes)):
            fault = (f"the data had {len(saved)} classes and has {len(classes)}, which differ in "
                     f"{', '.join(sorted({*classes} ^ {*saved}))[:200]}; restore the data, or start a new run")
        raise UsageError(f"--resume: not the model of this run: {fault}") from None
    scaler.load_state_dict(checkpoint["scaler"])
    version, state, gauss = checkpoint["rng"]["python"]
    random.setstate((version, tuple(state), gauss))
    torch.set_rng_state(checkpoint["rng"]["torch"])
    if torch.cuda.is_available() and len(checkpoint["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])
    return checkpoint["step"]


def named_tensors(value, name=""):
    """Yields (dotted name, tensor) for all tensors in nested dictionaries, in their order."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))


def load_weights(path):
    """The first ResNet-18 in a file, whoever wrote it.

    path     a file whose tensors bear torchvision's names, or the numbers that Sequential(*list(net.children())[:-1])
             gives; with anything before them, and with anything else in the file. Or a run of ours.
    returns  {"backbone", "stem", "width"} as in a checkpoint, and "note": a line about what was found and left out.
    raises   UsageError where it is missing, damaged, or has no ResNet-18.
    """
    file, content = read_tensors(path)
    tensors = dict(named_tensors(content["backbone"] if is_ours(content) else content))
    # What stands before the name of the first block stands before all names of the network.
    blocks = (re.fullmatch(r"((?:.+\.)?)(layer1|\d+)\.0\.conv1\.weight", name) for name in tensors)
    prefix, layer1 = next((block.groups() for block in blocks if block), (None, None))
    if prefix is None:
        raise UsageError(f"{file}: no ResNet-18 in it: no tensor is called layer1.0.conv1.weight, as in torchvision, "
                         "or 4.0.conv1.weight, as in a Sequential of its children")
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    numbers = sorted(filter(str.isdigit, numbers), key=int)  # of the children that have weights
    part_of = dict(zip(parts if layer1 == "layer1" else numbers, parts, strict=False))
    found, left = {}, {}
    for name, tensor in tensors.items():
        part, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and part in part_of:
            found[f"{part_of[part]}.{rest}"] = tensor
        else:  # up to the first word that is not the prefix's
            words = name.split(".")
            left[".".join(words[: len(os.path.commonprefix([words, prefix.split(".")])) + 1])] = True

    kernel = tuple(found["conv1.weight"].shape) if "conv1.weight" in found else ()
    stem = {(3, 7, 7): "imagenet", (3, 3, 3): "cifar"}.get(kernel[1:])
    if stem is None:
        raise UsageError(f"{file}: conv1.weight is {kernel or 'missing'}; ResNet-18 has (64, 3, 7, 7), for small "
                         "pictures (64, 3, 3, 3)")
    net = ResNet18(stem=stem, width=kernel[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    faults = [f"{name} is missing" for name in shapes
              if name not in found and not name.endswith("num_batches_tracked")]  # old files have none
    faults += [f"{name} is {tuple(tensor.shape)}, not {shapes[name]}" if name in shapes else f"{name} is one too many"
               for name, tensor in found.items() if tuple(tensor.shape) != shapes.get(name)]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UsageError(f"{file}: no ResNet-18 of width {kernel[0]}: {faults[0]}{more}")
    net.load_state_dict(found)
    note = f"{file}: ResNet-18, stem {stem}, width {kernel[0]}" + (f", from {prefix}*" if prefix else "")
    note += f"; left out: {', '.join(list(left)[:6])}{', ...' if len(left) > 6 else ''}" if left else ""
    return {"backbone": net.state_dict(), "stem": stem, "width": kernel[0],
            "note": textwrap.fill(printable(f"weights {note}"), 79, subsequent_indent=" " * 8, break_long_words=False,
                                  break_on_hyphens=False)}


def initialised(backbone, args):
    """The same backbone, a ResNet18; with --init it has those weights now. A resumed run has left them behind."""
    if getattr(args, "init", None) and not args.resume:
        weights = load_weights(args.init)
        backbone.load_state_dict(weights["backbone"])
        if is_main() and not args.quiet:
            print(weights["note"])
    return backbone


def load_pretrained(args):
    """The checkpoint that --checkpoint names; without it one of the same form, with the weights of --weights if given.

    There None stands for what no run tells: the data say it (see SHAPES).
    """
    if args.checkpoint:
        return load_checkpoint(args.checkpoint)
    saved = dict(data="toy", data_root=os.path.abspath("data"), cache=None, skip_unreadable=False, knn_split="val")
    unknown = dict.fromkeys(("method", "image_size", "stem", "width", "mean", "std", "note"))
    return {**unknown, "args": saved, **(load_weights(args.weights) if args.weights else {})}


def take_shape(args, pretrained, origin):
    """Give image size, stem and width their values from what a checkpoint or a file of weights says about them.

    origin   the flag that named it.  raises  UsageError where another value was given.
    """
    for name in ("image_size", "stem", "width"):
        given, has = getattr(args, name), pretrained.get(name)
        if given is not None and has not in (None, given):
            raise UsageError(f"--{name.replace('_', '-')} {given}: the network of {origin} has {has}; leave it out")
        setattr(args, name, given or has)


def load_backbone(checkpoint, device="cpu"):
    """The trained ResNet18 of a checkpoint, in eval mode, without a classifier."""
    backbone = ResNet18(stem=checkpoint["stem"], width=checkpoint["width"])
    backbone.load_state_dict(checkpoint["backbone"])
    return backbone.to(device, memory_format=torch.channels_last).eval()


# ------------------------------------------------------------------------------------------------
# Pictures to look at
# ------------------------------------------------------------------------------------------------


def save_views(path, images, views, mean, std, rows=8):
    """PNG of what the network sees: one row per image, first the packed picture, then its views.

    images  (N, 3, S, S) uint8.  views: list of (N, 3, s, s) normalised floats, row i from image i.
    """
    mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    columns = [images[:rows].cpu().float() / 255] + [view[:rows].float().cpu() * std + mean for view in views]
    side = max(96, *(column.shape[-1] for column in columns))             # small pictures are enlarged
    columns = [nn.functional.interpolate(column.contiguous(), size=(side, side)) for column in columns]
    tiles = torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1)
    try:
        save_image(make_grid(tiles, nrow=len(columns), padding=4, pad_value=1.0), path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot write the picture: {error}") from None
    print(f"wrote {path}: one image per row, then its {len(views)} views")
