"""What you read once, beside the four methods: the network they train and the parts of their loops.

    ResNet18        the backbone: torchvision's names, an ImageNet or a CIFAR stem, any width
    TwoCrops        two random views of one batch
    AverageMeter    a running mean that lives on the device;  Progress: the line that shows it
    LRScheduler     the learning rate as a function of the step number alone
    Draws           the random numbers of a step
    the rest        seeds, device, precision, and the one error that a user is meant to read

Importing this file does nothing.
"""

import functools
import hashlib
import math
import random
import re
import shutil
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

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


NO_CHANNELS_LAST = ("mps",)  # whose BatchNorm has wrong gradients there (torch up to 2.13, pytorch/pytorch#175189)


class ResNet18(nn.Module):
    """ResNet-18 whose parameters bear torchvision's names, so that weights go both ways.

    num_classes         0: no classifier, the result is the pooled feature; else a linear layer `fc`.
    stem                "imagenet": 7x7 stride 2 and max-pool, a quarter of the side reaches layer1;
                        "cifar": 3x3 stride 1 and no max-pool, for pictures up to about 64 px.
    width               channels of layer1; the feature has 8 * width. 64 is ResNet-18 proper.
    zero_init_residual  start every block as its shortcut (its last BN gamma at 0), as SimSiam does.

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
        # oneDNN's channels_last 1x1 convolutions of stride 2 corrupt the heap going backward if they have fewer than 16
        # channels (torch 2.14 on AVX-512, maps of 56 pixels a side or more).
        self.contiguous = width < 16
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
        self.contiguous |= self.conv1.weight.device.type in NO_CHANNELS_LAST
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

    transform   called with the batch's arguments; it draws anew each time, a draw of its own per image.
    transform2  the second view's own transform, as in BYOL and Barlow Twins; None: the same again.
    returns     two tensors; row i of both comes from image i.
    """

    def __init__(self, transform, transform2=None):
        self.transforms = transform, transform if transform2 is None else transform2

    def compile(self):
        """In place when first called, like nn.Module.compile. Not on a CPU, where augment.py decides image by image."""
        self.transforms = [torch.compile(transform, dynamic=False) for transform in self.transforms]

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
        if not (dist.is_available() and dist.is_initialized()):
            return self.avg
        both = torch.stack([torch.as_tensor(self.sum), torch.as_tensor(self.count, device=self.sum.device)]).double()
        dist.all_reduce(both)
        return (both[0] / both[1]).item()


def clock(seconds):
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """One updating line: label, done/total, figures, rate, time left. Plain lines when piped.

    total, first  units of work, and how many were done before; per_step: images of one, which the rate counts.
    quiet         prints nothing.  show: what prints, with print's arguments.
    """

    def __init__(self, total, label="", quiet=False, per_step=1, first=0, show=print):
        self.total, self.label, self.quiet, self.per_step = total, label, quiet, per_step
        self.first, self.done, self.show, self.terminal = first, first, show, sys.stdout.isatty()
        self.began = self.printed = self.updated = time.perf_counter()
        self.every = 1.0 if self.terminal else 30.0  # seconds between prints: reading a meter waits for a GPU

    @property
    def rate(self):
        """Images a second up to the last update."""
        return (self.done - self.first) * self.per_step / max(1e-9, self.updated - self.began)

    def update(self, done, **figures):
        """figures: floats or AverageMeters; meters are read only when a line is due."""
        self.done, self.updated = done, time.perf_counter()
        if self.quiet or self.updated - self.printed < self.every:
            return
        self.printed = self.updated
        words = [self.label, f"{done}/{self.total}"]
        for name, value in figures.items():
            words.append(f"{name} {value.avg if isinstance(value, AverageMeter) else value:.4g}")
        left = (self.total - done) * self.per_step / max(self.rate, 1e-9)
        line = "  ".join([*words, f"{self.rate:,.0f} images/s", f"{clock(left)} left"])
        if self.terminal:
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        self.show(line, end="" if self.terminal else "\n", flush=True)

    def close(self):
        """Take the updating line away; what is printed next starts on a clean line."""
        if self.terminal and not self.quiet:
            self.show("\r\x1b[K", end="", flush=True)


class LRScheduler:
    """Sets the learning rate from the step number alone, so a resumed run needs no state.

    optimizer     its groups get the rate; a group with "fix_lr": True keeps `lr` (SimSiam's predictor).
    lr            the rate after warm-up, already scaled to the batch size.
    total_steps   length of the whole run, in optimiser steps (not epochs).
    warmup_steps  the rate climbs linearly to `lr` over these; the first step takes lr / warmup_steps.
    kind          "cosine" to zero, "steps" (times `factor` at each of `milestones`).
    milestones    in steps, with kind "steps".
    Source        Loshchilov & Hutter 2017 (cosine, no restarts); Goyal et al. 2017 (warm-up).
    """

    def __init__(self, optimizer, lr, total_steps, warmup_steps=0, kind="cosine", milestones=(), factor=0.1):
        if kind not in ("cosine", "steps"):
            raise ValueError(f'kind must be "cosine" or "steps", got {kind!r}')
        self.optimizer, self.lr, self.kind, self.factor = optimizer, lr, kind, factor
        self.total_steps, self.warmup_steps, self.milestones = total_steps, warmup_steps, milestones

    def lr_at(self, step):
        if step < self.warmup_steps:
            return self.lr * min(step + 1, self.warmup_steps) / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * self.factor ** sum(step >= milestone for milestone in self.milestones)

    def step(self, step):
        """Call before the optimiser's step number `step` (from 0, fractions too). Returns the scheduled rate."""
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


class Draws:
    """Uniform random numbers for the images of a batch.

    numbers  whole numbers, for example seed and step.  rank: of the process, which has part `rank` of the batch.
    They are a function of these, of an image's row in its part, and of how many draws came before: nothing has to be
    saved, every device gets the same, and each of many processes draws its own part of what one would draw.
    Source   Philox, a generator that computes its n-th number directly (Salmon et al. 2011), as numpy has it.
    """

    def __init__(self, *numbers, rank=0):
        digest = hashlib.blake2b(repr(numbers).encode(), digest_size=16).digest()
        self.key, self.rank, self.calls = int.from_bytes(digest, "little"), rank, 0

    def uniforms(self, n, k, rank=None):
        """The next k numbers in [0, 1) for each of the n images that a process has: (n, k) float64."""
        blocks, self.calls = math.ceil(k / 4), self.calls + 1          # Philox computes four numbers at a time
        counter = [blocks * n * (self.rank if rank is None else rank), self.calls, 0, 0]
        generator = np.random.Generator(np.random.Philox(key=self.key, counter=counter))
        return torch.from_numpy(generator.random((n, 4 * blocks))[:, :k])

    def permutation(self, n):
        """A random order of n rows, the same in every process: (n,) int64."""
        return self.uniforms(n, 1, rank=0)[:, 0].argsort()


def pick_device(name="auto"):
    """"auto" takes cuda, then mps, then cpu. Raises UsageError for a device that is not there, or cannot even add."""
    fix = "cpu" if name == "auto" else "auto"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what is asked of "the" GPU is asked of this one
        torch.ones(1, device=device).add_(1)  # which a GPU that is too old for this torch cannot do
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = re.split(r"\n|\. ", str(error))[0][:80].strip(" .")
        raise UsageError(f"--device {name}: {why}; try --device {fix}") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN time its kernels once
        torch.set_float32_matmul_precision("high")
    return device


def pick_precision(name, device, width=64):
    """"auto" takes bf16 where the hardware multiplies it, else fp16 on CUDA, else float32; a CPU is asked by trying.

    width    of the network, which the trial on a CPU has too.
    returns  (autocast, scaler): autocast() is a context for the forward pass; the GradScaler
             passes losses through unchanged unless the precision is fp16.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            name = faster_precision(bf16_gain(width)) if device.type == "cpu" else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


def faster_precision(gain):
    """For what bf16_gain() says. float32 is the more exact: bf16 must be worth it."""
    return "bf16" if gain > 1.1 else "off"


def bf16_gain(width=64, within=0.2):
    """How many times as fast as float32 this CPU trains a convolution in bf16, which most CPUs only emulate.

    Counted in seconds of this process: beside two busy programs they gave 1.20 to 1.31 in eight trials, where the
    wall's gave 1.3 to 6.2 (width 16, one thread, AMD EPYC). Windows counts them too coarsely.
    width    its channels, as in layer1; the batch shrinks as they grow.
    within   seconds for the turns beyond the second; the fastest of each precision counts.
    """
    width, best = max(16, width), {}  # of fewer channels see ResNet18
    with torch.random.fork_rng(devices=[]):  # the weights of the run are drawn later, whatever is measured
        block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    block.to(memory_format=torch.channels_last)
    x = torch.ones(max(2, min(64, 2**14 // width**2)), width, 16, 16).to(memory_format=torch.channels_last)
    x.requires_grad_()  # as behind another block
    clock = time.perf_counter if sys.platform == "win32" else time.process_time
    began, turn = time.perf_counter(), 0
    while turn < 2 or time.perf_counter() < began + within:
        for bf16 in (False, True):
            start = clock()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = block(x)
            y.sum().backward()
            taken = clock() - start
            best[bf16] = min(taken, best.get(bf16, taken))
        turn += 1
    return best[False] / best[True]


# ------------------------------------------------------------------------------------------------
# What a user is meant to read
# ------------------------------------------------------------------------------------------------


def printable(text):
    """One line for any terminal: line breaks, control characters and undecodable bytes of a file's name, escaped."""
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], text)


class UsageError(Exception):
    """Something the user can fix: one line that names the flag or file and the fix."""

    def __init__(self, text):
        super().__init__(printable(text))
