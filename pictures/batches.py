"""One packed split and batches of it on any device, in an order that (seed, epoch) alone decides."""

import contextlib
import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from common import UsageError


@dataclass
class Split:
    """One packed split; row i of everything is the same image."""

    images: torch.Tensor              # (N, 3, S, S) uint8, memory-mapped: do not write to it
    labels: torch.Tensor              # (N,) int64, -1 = unlabelled; the labelled ones come first
    aspect: torch.Tensor              # (N,) float32, width/height of the original
    paths: list                       # the file, or e.g. "cifar10/train/17"
    skipped: list = field(default_factory=list)  # left out: (file, why, whether the system refused to read it)
    held: dict = field(default_factory=dict, repr=False)  # device -> the images there, shared by Batches

    def __len__(self):
        return len(self.images)


def labelled(split):
    """The labelled images of a split. They come first, so this is a view, not a copy."""
    count = int((split.labels >= 0).sum())
    if not (split.labels[:count] >= 0).all():
        raise ValueError("labelled images must come before unlabelled ones")
    return Split(split.images[:count], split.labels[:count], split.aspect[:count], split.paths[:count],
                 held=split.held)  # what is on the device already serves both


def check_batch(size, images, world=1):
    """raises  UsageError for a batch larger than all images to train on, or that processes cannot share equally."""
    if size > images:
        raise UsageError(f"--batch-size {size}: more than the {images} images to train on; take at most {images}")
    if size % world:
        raise UsageError(f"--batch-size {size}: of all processes together; it must be a multiple of their number, "
                         f"{world}: take {size // world * world or world}")


class Batches:
    """Batches of a split, on a device.

    split       Split.
    batch_size  images of one step, over all ranks.
    shuffle     a new order every epoch, a function of (seed, epoch) alone: nothing to save for a resume.
    drop_last   leave out the last, short batch. For training only; an evaluation counts every image.
    passes      over the split in an epoch, each in an order of its own.
    rank, world this process yields part `rank` of `world` of every batch (of a short one perhaps nothing).
    raises      UsageError with drop_last, if there is not one whole batch or it cannot be shared equally.
    """

    def __init__(self, split, batch_size, device="cpu", seed=0, shuffle=True, drop_last=True, rank=0, world=1,
                 passes=1):
        if drop_last:
            check_batch(batch_size, len(split), world)
        self.split, self.batch_size, self.device = split, batch_size, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # a thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.seed, self.shuffle, self.drop_last, self.rank, self.world = seed, shuffle, drop_last, rank, world
        self.passes = passes

    def __len__(self):
        """Steps per epoch."""
        return (self.passes * len(self.split) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size

    def order(self, epoch):
        """(passes * N,) int64: the rows in the order of this epoch."""
        if not self.shuffle:
            return torch.arange(len(self.split)).repeat(self.passes)
        orders, generator = [], torch.Generator()
        for number in range(self.passes * epoch, self.passes * (epoch + 1)):
            # The seed of (seed, number) is hashed, or pass 1 of seed 0 would be pass 0 of seed 1.
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            orders.append(torch.randperm(len(self.split), generator=generator))
        return torch.cat(orders)

    def batches(self, epoch, start=0):
        """Yields from step `start` of the epoch on:

        images (n, 3, S, S) uint8 and labels (n,) int64 on the device,
        aspect (n,) float32 and index (n,) int64, the rows of the split, on the host.
        """
        steps = self.order(epoch).split(self.batch_size)[start : len(self)]
        if not steps:
            return
        rows = [step.tensor_split(self.world)[self.rank] for step in steps]
        rows_there = torch.cat(rows).to(self.device).split([len(r) for r in rows])  # one transfer per epoch
        labels = self.split.labels.to(self.device)
        if not self.hold():
            pixels = prefetched(self.split.images, rows, self.device)
        else:
            images = self.split.held.get(self.device, self.split.images)
            pixels = (images.index_select(0, index) for index in rows_there)
        with contextlib.closing(pixels):  # ends the thread when the consumer stops early
            for index, there, x in zip(rows, rows_there, pixels, strict=True):
                yield x, self.split.aspect[index], labels[there], index

    def hold(self):
        """Puts the images on the device if they fit comfortably; says whether they are there."""
        images, held = self.split.images, self.split.held
        if self.device.type == "cpu":
            return True
        if len(held.get(self.device, ())) < len(images):  # of a labelled part, perhaps
            if images.numel() > 0.4 * free_memory(self.device):
                return False
            held[self.device] = images.to(self.device)
        return True


def free_memory(device):
    """Bytes; 0 where the device does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0


def prefetched(images, rows, device):
    """Yields images[index] on the device for each index of `rows`; a thread works up to three batches ahead.

    On CUDA the copies run on a stream of their own, beside the computation.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None

    def fetch(index):
        host = torch.empty(len(index), *images.shape[1:], dtype=torch.uint8, pin_memory=cuda)
        torch.index_select(images, 0, index, out=host)
        with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
            x = host.to(device, non_blocking=cuda)
            return x, stream.record_event() if cuda else None

    # A new thread starts on device 0.
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device if cuda else None, initargs=(device,)) as thread:
        ahead = deque(thread.submit(fetch, index) for index in rows[:3])
        for step in range(len(rows)):
            x, copied = ahead.popleft().result()
            if step + 3 < len(rows):
                ahead.append(thread.submit(fetch, rows[step + 3]))
            if cuda:
                torch.cuda.current_stream(device).wait_event(copied)
                x.record_stream(torch.cuda.current_stream(device))  # not to be reused while we compute on it
            yield x
