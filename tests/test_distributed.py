"""Two and three processes on the CPU (Gloo) against one."""

import argparse
import os
import shutil
import socket
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

import common
import harness
import moco
import pictures
import rotnet
import simclr
import simsiam
from harness import distributed
from harness.folder import read_metrics
from harness.log import Figures
from harness.run import Run, set_up

METHODS = {"simsiam": simsiam, "moco": moco, "simclr": simclr, "rotnet": rotnet}
N = 12  # images of a whole batch
TINY = ["--width", "4", "--batch-size", "12", "--amp", "off", "--device", "cpu", "--knn-k", "5", "--quiet",
        "--epochs", "2"]


# ------------------------------------------------------------------------------------------------
# What every process runs; a failure comes back as text
# ------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A backbone without BatchNorm: its outputs do not depend on how a batch is shared out."""

    def __init__(self):
        super().__init__()
        self.dim = 6
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.body(x)


def without_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)
    return module.double()


def make(name):
    torch.manual_seed(0)
    model = {"simsiam": lambda: simsiam.SimSiam(Plain(), dim=8, pred_dim=4),
             "moco": lambda: moco.MoCo(Plain(), dim=8, queue_size=20, bn_splits=1),
             "simclr": lambda: simclr.SimCLR(Plain(), dim=8, hidden_dim=10),
             "rotnet": lambda: rotnet.RotNet(Plain())}[name]()
    model = without_batch_norm(model)
    if name == "moco":
        model.queue = model.queue.float()  # as q and k, always
    return model


def loss_of(name, network, model, x1, x2, order):
    """The lines of each method's loop from the views to the loss."""
    if name == "simsiam":
        (p1, z1), (p2, z2) = network(x1), network(x2)
        return simsiam.symmetric_loss(p1, z1, p2, z2)
    if name == "moco":
        q, k = network(x1, x2, order)
        return moco.info_nce(q, k, model.queue, 0.2)
    if name == "simclr":
        z1, z2 = (distributed.gather_with_gradient(z) for z in network(torch.cat([x1, x2])).chunk(2))
        return simclr.nt_xent(z1, z2, 0.5)
    x4, y4 = rotnet.rotation_batch(x1)
    return rotnet.focal_loss(network(x4), y4)


def check_gradients(name):
    """Loss and every gradient equal those of one process with the joined batch."""
    g = torch.Generator().manual_seed(1)
    x1, x2 = torch.randn(2, N, 3, 8, 8, generator=g, dtype=torch.float64)
    order = torch.randperm(N, generator=g)
    alone = make(name)
    if name == "moco":  # by hand: k is what the key encoder gives, whatever way the rows take
        q, k = (nn.functional.normalize(f(x).float(), dim=1) for f, x in (
            (nn.Sequential(alone.backbone, alone.projector), x1), (alone.key_encoder, x2)))
        expected = moco.info_nce(q, k, alone.queue, 0.2)
    elif name == "simclr":
        expected = simclr.nt_xent(alone(x1), alone(x2), 0.5)
    else:
        expected = loss_of(name, alone, alone, x1, x2, order)
    expected.backward()

    model = make(name)
    network = distributed.parallel(model, torch.device("cpu"))
    loss = loss_of(name, network, model, distributed.mine(x1), distributed.mine(x2), order)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / distributed.size(), expected.detach(), rtol=1e-6, atol=1e-6)
    moved = 0
    for (label, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=label)
            moved += q.grad.abs().sum().item()
    assert moved > 0.01


def check_neighbours_of_gathered_rows():
    """What is added to gathered rows has its own gradient, not the sum over processes."""
    rows, w = torch.ones(N, 3, requires_grad=True), torch.full((N * distributed.size(), 3), 2.0, requires_grad=True)
    v = w * 1.0
    ((distributed.gather_with_gradient(rows) + v) ** 2).sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 6.0))
    assert torch.equal(rows.grad, torch.full_like(rows, 6.0 * distributed.size()))


def check_queues():
    """After several steps every process holds the same queue: all keys, in the order of the whole batch."""
    model, g = make("moco"), torch.Generator().manual_seed(2)
    expected = [model.queue.clone()]
    for _ in range(3):
        k = torch.randn(N, 8, generator=g)
        model.enqueue(distributed.gather(distributed.mine(k)))
        expected.append(k)
    rows = torch.cat(expected)[20:]
    assert int(model.pointer) == 3 * N % 20
    assert torch.equal(model.queue.roll(-int(model.pointer), 0), rows[-20:])
    queues = distributed.gather(model.queue)
    assert all(torch.equal(q, queues[:20]) for q in queues.chunk(distributed.size()))


def check_shuffling():
    """Keys come back to their images, and no process normalised the keys of just its own queries."""
    model = make("moco")
    seen = []
    model.key_encoder.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    x = torch.arange(N, dtype=torch.float64).view(N, 1, 1, 1).expand(N, 3, 8, 8) / N
    mine = distributed.mine(x)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    _, k = model(mine, mine, order)
    with torch.no_grad():
        expected = nn.functional.normalize(model.key_encoder(mine).float(), dim=1)
    torch.testing.assert_close(k, expected)
    met = {round(v * N) for v in seen[0][:, 0, 0, 0].tolist()}
    assert len(met) == len(mine) and met != {round(v * N) for v in mine[:, 0, 0, 0].tolist()}
    everything = distributed.gather(seen[0])[:, 0, 0, 0]
    assert torch.equal(everything.sort().values, x[:, 0, 0, 0])


def check_shares():
    """Every image once an epoch; draws that differ between processes and together are those of one process."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 4, 4).contiguous()
    split = pictures.Split(images, torch.zeros(50, dtype=torch.long), torch.ones(50), [""] * 50)
    rank, world = distributed.rank(), distributed.size()
    loader = pictures.Batches(split, N, "cpu", seed=0, rank=rank, world=world)
    mine = torch.cat([index for _, _, _, index in loader.batches(3)])
    everyone = distributed.gather(mine)
    assert len(everyone) == 48 and len(set(everyone.tolist())) == 48
    whole = torch.cat([index for _, _, _, index in pictures.Batches(split, N, "cpu", seed=0).batches(3)])
    parts = everyone.view(world, 4, N // world).transpose(0, 1)
    assert torch.equal(parts.reshape(-1), whole)  # the very batches of one process, in their order

    x = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    args = dict(image_size=16, view_size=None, min_crop=0.2, blur=0.5)
    for view in (simsiam.view, moco.view):
        arguments = type("Args", (), args | {"v1": False})
        views = []
        for share, part in ((common.Draws(7, 1, rank=rank), distributed.mine(x)), (common.Draws(7, 1), x)):
            views.append(view(part, torch.ones(len(part)), share, arguments, (0.5,) * 3, (0.25,) * 3))
        torch.testing.assert_close(distributed.gather(views[0]), views[1], rtol=1e-5, atol=1e-5)


def check_means():
    """The mean of a meter counts every image of every process, however many each has."""
    meter = common.AverageMeter()
    meter.update(torch.tensor(float(distributed.rank())), n=1 + distributed.rank())
    ranks = range(distributed.size())
    assert meter.mean() == pytest.approx(sum(r * (1 + r) for r in ranks) / sum(1 + r for r in ranks))
    figures = Figures(watchful=True)
    figures.count = 1
    figures.record(1, 0.1, loss=torch.tensor(1.0), tau=0.5 + distributed.rank())  # a plain number too
    assert figures.meters["tau"].mean() == pytest.approx(sum(0.5 + r for r in ranks) / len(ranks))


def check_precision():
    """Process 0 tries what is faster, and all take it."""
    common.bf16_gain = lambda width: {0: 1.5}[distributed.rank()]
    args = argparse.Namespace(device="cpu", amp="auto", data="toy", width=None, seed=0)
    autocast = set_up(args)[1]
    assert args.amp == "bf16" and autocast().fast_dtype == torch.bfloat16


def check_run(name, words):
    """A short run ends with the same weights on all processes, and SimCLR's loss sees the outputs of all."""
    models, rows, begin, loss = [], set(), Run.begin, simclr.nt_xent

    def look(run, model, *arguments, **kinds):
        models.append(model)
        return begin(run, model, *arguments, **kinds)

    def count(z1, *arguments):
        rows.add(len(z1))
        return loss(z1, *arguments)

    with mock.patch.object(Run, "begin", look), mock.patch.object(simclr, "nt_xent", count):
        METHODS[name].main(words)
    for label, p in models[0].named_parameters():
        first, last = distributed.gather(p.detach()[None])[[0, -1]]
        assert torch.equal(first, last), label
    assert rows == ({N} if name == "simclr" else set())


def work(rank, world, port, folder, jobs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.join("cpu")
    distributed.joined = False  # the group is this test's: no run ends it
    outcomes = {}
    for title, function, arguments in jobs:
        try:
            function(*arguments)
            outcomes[title] = ""
        except BaseException:
            outcomes[title] = traceback.format_exc()
    torch.save(outcomes, Path(folder) / f"outcomes-{world}-{rank}.pt")
    dist.destroy_process_group()


def launch(world, folder, jobs):
    """Run jobs [(title, function, arguments)] on `world` processes: {title: what went wrong, or ""}."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (world, port, str(folder), jobs), nprocs=world)
    every = [torch.load(folder / f"outcomes-{world}-{rank}.pt") for rank in range(world)]
    return {title: "".join(o[title] for o in every) for title, _, _ in jobs}


# ------------------------------------------------------------------------------------------------
# The tests
# ------------------------------------------------------------------------------------------------


CHECKS = {
    **{f"gradients of {name}": (check_gradients, (name,)) for name in METHODS},
    "neighbours of gathered rows": (check_neighbours_of_gathered_rows, ()),
    "queues": (check_queues, ()),
    "shuffling": (check_shuffling, ()),
    "shares": (check_shares, ()),
    "means": (check_means, ()),
    "precision": (check_precision, ()),
}


def flags(folder, name):
    return [*TINY, "--data", str(folder / "pictures"), "--image-size", "16", "--stem", "cifar", "--cache",
            str(folder / "cache"), "--out", str(folder / f"{name}-2"), "--max-steps", "4", "--knn-every", "1"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Everything that two processes do, in one start: checks, and a short run of each method."""
    folder = tmp_path_factory.mktemp("distributed")
    g = torch.Generator().manual_seed(0)
    from PIL import Image
    for i in range(40):
        path = folder / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()).save(path)
    jobs = [(title, function, arguments) for title, (function, arguments) in CHECKS.items()]
    for name in METHODS:
        more = ["--bn-splits", "2", "--queue-size", "24"] if name == "moco" else []
        jobs.append((f"run of {name}", check_run, (name, flags(folder, name) + more)))
    return folder, launch(2, folder, jobs)


@pytest.mark.parametrize("title", [*CHECKS, *(f"run of {name}" for name in METHODS)])
def test_two_processes_equal_one(outcomes, title):
    assert outcomes[1][title] == ""


def test_runs_are_written_once_and_go_on_with_one_or_three_processes(outcomes):
    folder, _ = outcomes
    jobs = []
    for name, method in METHODS.items():
        rows = read_metrics(folder / f"{name}-2")
        assert [(row["epoch"], row["step"]) for row in rows] == [(0, 0), (1, 3), (2, 4)]
        assert all(row["knn"] is not None for row in rows)
        assert harness.load_checkpoint(folder / f"{name}-2", name)["step"] == 4
        shutil.copytree(folder / f"{name}-2", folder / name)
        resume = ["--resume", str(folder / name), "--max-steps"]
        method.main([*resume, "6"])  # on one process
        jobs.append((name, method.main, ([*resume, "8", "--epochs", "3"],)))
    assert set(launch(3, folder, jobs).values()) == {""}
    for name in METHODS:
        assert harness.load_checkpoint(folder / name, name)["step"] == 8
        assert [row["epoch"] for row in read_metrics(folder / name)] == [0, 1, 2, 3]


def test_moco_on_two_processes_loses_what_one_process_loses(outcomes):
    """Groups of BatchNorm, keys, queue, views and order are the same: so is the loss, but for rounding."""
    folder, _ = outcomes
    alone = [*flags(folder, "moco"), "--bn-splits", "2", "--queue-size", "24"]
    alone[alone.index("--out") + 1] = str(folder / "moco-1")
    moco.main(alone)
    one, two = (read_metrics(folder / f"moco-{n}") for n in (1, 2))
    assert [row["loss"] for row in two][1:3] == pytest.approx([row["loss"] for row in one][1:], abs=1e-4)


def test_wrong_numbers_of_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)
    with pytest.raises(common.UsageError, match="--batch-size 12.*multiple of their number, 5: take 10"):
        pictures.check_batch(12, 40, distributed.size())


def test_a_launcher_need_not_say_the_place_on_the_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():  # set by hand, or by a scheduler: no group yet
        monkeypatch.setenv(name, value)
    assert distributed.is_main() and distributed.join("cpu") == torch.device("cpu") and not distributed.together()
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    distributed.join("cpu")
    try:
        assert distributed.together() and distributed.size() == 1
        with distributed.leader_first():
            pass
    finally:
        distributed.leave()


def test_a_launcher_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "launched", lambda: True)
    with pytest.raises(common.UsageError, match="--device cuda:1: .* CUDA_VISIBLE_DEVICES"):
        distributed.join("cuda:1")


def test_one_process_needs_no_torch_distributed(monkeypatch):
    monkeypatch.setattr(distributed, "dist", argparse.Namespace(is_available=lambda: False))  # all such a build has
    x = torch.ones(4, 2)
    assert distributed.is_main() and distributed.size() == 1 and distributed.rank() == 0 and distributed.same(3) == 3
    assert distributed.gather(x) is x and distributed.gather_with_gradient(x) is x
    assert distributed.parallel(x, x.device) is x
