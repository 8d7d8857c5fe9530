"""One process per device, under torchrun: what the processes of a run must agree on.

    torchrun --nproc_per_node=8 moco.py --data ./food-11

PyTorch's distributed engine does the work: NCCL between GPUs, Gloo between CPUs, gradients averaged by
DistributedDataParallel. Every process draws its own part of what one alone would draw (common.Draws), so a seed
trains the same run on one process and on eight, as far as the method allows. Process 0 alone prints, writes and
evaluates. Without torchrun functions return what they got.
"""

import contextlib
import datetime
import inspect
import os

import torch
import torch.distributed as dist
import torch.nn as nn

from common import UsageError, pick_device

joined = False  # by join(): whoever made the group ends it


def launched():
    """Whether torchrun, or another launcher, has started this process as one of a group."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def together():
    """Whether join() has made the group. (Some builds of torch, for Windows or Jetson, have no groups at all.)"""
    return dist.is_available() and dist.is_initialized()


def is_main():
    """Whether this process is the one that prints and writes: the only one, or the group's process 0."""
    return dist.get_rank() == 0 if together() else not launched() or os.environ["RANK"] == "0"


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if together() else 0


def size():
    """How many processes train together."""
    return dist.get_world_size() if together() else 1


def local_rank():
    """This process's number on its machine; a launcher that does not say starts one on each."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(name):
    """Join the process group that torchrun's environment describes; one process per device.

    name     as for common.pick_device; "auto" and "cuda" are a GPU for each process, which touches no other.
    returns  torch.device of this process. Without torchrun: that of the name.
    raises   UsageError where a machine has fewer GPUs than processes, or the name is that of one GPU.
    """
    if not launched():
        return pick_device(name)
    if name.startswith("cuda:"):
        raise UsageError(f"--device {name}: torchrun gives each process a GPU of its own; take --device cuda, and "
                         "CUDA_VISIBLE_DEVICES to choose among them")
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        local, there = local_rank(), torch.cuda.device_count()
        if local >= there:
            wanted = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
            raise UsageError(f"--nproc_per_node {wanted}: only {there} GPUs here; one process per GPU, or --device cpu")
        name = f"cuda:{local}"
    device = pick_device(name)
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device {device.type}: several processes need GPUs (cuda) or --device cpu")
    if not together():
        global joined
        joined = True
        # Evaluation, by process 0 alone, and packing may take long: the others wait for it.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6),
                                device_id=device if device.type == "cuda" else None)
    return device


def leave():
    """The end of a run that went well: all processes leave the group of join() together."""
    global joined
    if joined:
        dist.barrier()
        dist.destroy_process_group()
        joined = False


def parallel(model, device, sync_bn=False):
    """The model to call in the training loop: DistributedDataParallel around `model`, whose gradients are means.

    sync_bn  BatchNorm sees the batch of all processes. (torch has no such layer for CPUs: there each process
             normalises its own share.)
    """
    if not together():
        return model
    if sync_bn and device.type == "cuda" and size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place but for the root, which is no BatchNorm
    # Each process keeps running statistics of its own; those of process 0 are saved. (The flag that says so
    # has a new name in newer releases of torch.)
    wrap = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(wrap).parameters
    return wrap(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                **{"forward_sync_buffers" if new else "broadcast_buffers": False})


@contextlib.contextmanager
def leader_first():
    """The first process of each machine goes through alone (it packs pictures), then the others follow."""
    if together() and local_rank() > 0:
        dist.barrier()
    yield
    if together() and local_rank() == 0:
        dist.barrier()


def same(value):
    """Process 0's value, on every process; any plain value."""
    if not together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(x):
    """(N, ...) of each process -> (size * N, ...) in the order of ranks, on every process; no gradient."""
    if not together():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mine(x):
    """(size * N, ...) -> (N, ...), this process's rows of what gather() gave."""
    return x.chunk(size())[rank()]


class _GatherWithGradient(torch.autograd.Function):
    """gather() whose backward gives every process the gradients that all processes have for its rows."""

    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, gradient):
        # The rows of process r stand in everybody's loss. Keeping one's own part of the gradient only
        # would leave out what r's rows do as negatives elsewhere: 1/size of the truth.
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd may give others the same tensor
        dist.all_reduce(total)
        return mine(total)


def gather_with_gradient(x):
    """(N, ...) of each process -> (size * N, ...), on every process.

    The gradient of a row is the sum over all processes' losses. DistributedDataParallel takes the mean of the
    processes' gradients: together the gradient of the mean of their losses.
    """
    return _GatherWithGradient.apply(x) if together() else x
