"""forks/barlowtwins.py and forks/byol.py: losses against loops over the equations, and the whole life of a copied file.

That they train, end, go on, are evaluated and told apart by their names proves what harness/ promises to a copy.
"""

import argparse
import copy
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from PIL import Image

import augment
import common
import knn
import pictures
import simsiam
from forks import barlowtwins, byol
from harness import checkpoint, distributed
from harness.folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FORKS = {"barlowtwins": barlowtwins, "byol": byol}
HEADS = {"barlowtwins": ["--dim", "16"], "byol": ["--dim", "16", "--hidden-dim", "8"]}


def outputs(rows=7, channels=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, rows, channels, generator=g, dtype=torch.float64)
    return one.requires_grad_(), (0.5 * one.detach() + other + 3).requires_grad_()


def compare(ours, theirs, variables):
    """Both losses and their gradients agree; ours is computed in float32."""
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, variables), torch.autograd.grad(theirs, variables), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


# ------------------------------------------------------------------------------------------------
# Barlow Twins
# ------------------------------------------------------------------------------------------------


def barlow_by_loops(z1, z2, lambda_):
    """Eq. 1 and 2 as they stand, on columns whose mean over the batch is taken away."""
    n, d = z1.shape
    z1, z2 = ([[z[b, i] - z[:, i].mean() for i in range(d)] for b in range(n)] for z in (z1, z2))
    total = 0.0
    for i in range(d):
        for j in range(d):
            product = sum(z1[b][i] * z2[b][j] for b in range(n))
            lengths = sum(z1[b][i] ** 2 for b in range(n)) ** 0.5 * sum(z2[b][j] ** 2 for b in range(n)) ** 0.5
            c = product / lengths
            total = total + ((1 - c) ** 2 if i == j else lambda_ * c**2)
    return total


@pytest.mark.parametrize("lambda_", [0.0, 5e-3, 0.7])
def test_barlow_loss_and_gradients_equal_the_equations(lambda_):
    z1, z2 = outputs()
    compare(barlowtwins.barlow_twins_loss(z1, z2, lambda_), barlow_by_loops(z1, z2, lambda_), (z1, z2))


def test_barlow_closed_forms():
    d, lambda_ = 4, 0.1
    loss = barlowtwins.barlow_twins_loss
    # Columns of a Hadamard matrix but for the first: centred, of unit variance, unrelated.
    h = torch.tensor([[1.0]])
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    z = h[:, 1:1 + d]                                                   # (8, 4)
    assert loss(z, z, lambda_).item() == pytest.approx(0, abs=1e-6)     # C is the identity
    assert loss(5 * z + 2, 0.1 * z - 7, lambda_).item() == pytest.approx(0, abs=1e-3)  # neither scale nor mean count
    assert loss(z, -z, lambda_).item() == pytest.approx(4 * d, rel=1e-4)
    copies = z[:, :1].expand(-1, d)
    assert loss(copies, copies, lambda_).item() == pytest.approx(lambda_ * d * (d - 1), rel=1e-4)
    assert loss(z, h[:, 4:4 + d].roll(1, dims=1), 0.0).item() == pytest.approx(d, rel=1e-4)  # C_ii = 0: chance
    same, others = barlowtwins.agreement(z, z)
    assert same.item() == pytest.approx(1, abs=1e-4) and others.item() == pytest.approx(0, abs=1e-4)
    assert barlowtwins.agreement(copies, copies)[1].item() == pytest.approx(1, abs=1e-4)


def test_barlow_correlations_are_float32_inside_autocast():
    z1, z2 = (z.detach().float() for z in outputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = barlowtwins.cross_correlation(z1, z2)
    assert inside.dtype == torch.float32 and torch.equal(inside, barlowtwins.cross_correlation(z1, z2))


def batch_norm(x, weight, bias):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("layers", [2, 3])
def test_barlow_projector_equals_the_papers(layers):
    args = argparse.Namespace(stem="cifar", width=4, dim=24, proj_layers=layers)
    model = barlowtwins.build_model(args).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    z, h, w = model(x), model.backbone(x), dict(model.projector.named_parameters())
    for i in range(layers - 1):
        h = batch_norm(h @ w[f"{3 * i}.weight"].T, w[f"{3 * i + 1}.weight"], w[f"{3 * i + 1}.bias"]).clamp(min=0)
    torch.testing.assert_close(z, h @ w[f"{3 * layers - 3}.weight"].T)
    assert len(w) == 3 * layers - 2  # no BatchNorm, no bias on the output


# ------------------------------------------------------------------------------------------------
# BYOL
# ------------------------------------------------------------------------------------------------


def byol_by_loops(p, z):
    """Eq. 2 as it stands: the squared distance of the two unit vectors."""
    def unit(v):
        return [x / sum(y * y for y in v) ** 0.5 for x in v]
    return sum(sum((a - b) ** 2 for a, b in zip(unit(p[i]), unit(z[i]), strict=True)) for i in range(len(p))) / len(p)


def test_byol_loss_and_gradients_equal_the_equation_and_none_goes_into_the_target():
    p, z = outputs()
    compare(byol.byol_loss(p, z), byol_by_loops(p, z.detach()), (p,))
    byol.byol_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().sum() > 0


def test_byol_closed_forms():
    g = torch.Generator().manual_seed(0)
    p, far = torch.randn(2, 4000, 64, generator=g)
    assert byol.byol_loss(p, 3 * p).item() == pytest.approx(0, abs=1e-5)  # length does not count
    assert byol.byol_loss(p, -p).item() == pytest.approx(4, abs=1e-5)
    assert byol.byol_loss(p, far).item() == pytest.approx(2, abs=0.02)    # chance, of each view


def test_tau_climbs_from_its_base_to_one():
    assert byol.target_tau(0.9, 0, 100) == pytest.approx(0.9)
    assert byol.target_tau(0.9, 50, 100) == pytest.approx(0.95)
    assert byol.target_tau(0.9, 100, 100) == pytest.approx(1)
    assert byol.target_tau(0.9, 25, 100) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)
    assert byol.target_tau(1.0, 7, 100) == 1


def make_byol(**changes):
    args = dict(stem="cifar", width=4, dim=6, hidden_dim=10, no_predictor=False)
    return byol.build_model(argparse.Namespace(**(args | changes)))


def test_ema_moves_every_parameter_of_the_target_and_no_buffer():
    torch.manual_seed(0)
    model = make_byol()
    model(torch.randn(4, 3, 16, 16))  # moves the buffers of both
    with torch.no_grad():
        for parameter in model.online_parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(model.target.state_dict())
    byol.ema_update(model.target.parameters(), model.online_parameters(), 0.75)
    online = nn.Sequential(model.backbone, model.projector).state_dict()
    moving = dict(model.target.named_parameters())
    assert moving.keys() == dict(nn.Sequential(model.backbone, model.projector).named_parameters()).keys()
    for name, value in model.target.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * online[name] if name in moving else before[name]
        torch.testing.assert_close(value, expected)


def test_byol_forward_equals_the_papers_heads():
    torch.manual_seed(0)
    model = make_byol().double()
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.mul_(1.5)
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    p, z = model(x)

    def mlp(h, w, name):
        h = batch_norm(h @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"], w[f"{name}.1.weight"], w[f"{name}.1.bias"])
        return h.clamp(min=0) @ w[f"{name}.3.weight"].T + w[f"{name}.3.bias"]

    w = dict(model.named_parameters())
    torch.testing.assert_close(p, mlp(mlp(model.backbone(x), w, "projector"), w, "predictor"))
    torch.testing.assert_close(z, mlp(model.target[0](x), w, "target.1"))
    assert p.requires_grad and not z.requires_grad
    model = make_byol(no_predictor=True)
    p, z = model(x.float())
    torch.testing.assert_close(p, z)  # the target begins as a copy


# ------------------------------------------------------------------------------------------------
# A life
# ------------------------------------------------------------------------------------------------


def make_pictures(folder):
    g = torch.Generator().manual_seed(0)
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """train("byol", flags...) trains in the folder of the test, two epochs of four steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / ".cache"))
    common_flags = ["--data", str(images), "--width", "4", "--image-size", "16", "--stem", "cifar", "--epochs", "2",
                    "--batch-size", "8", "--amp", "off", "--device", "cpu", "--knn-k", "5", "--quiet"]

    def start(method, *flags):
        new = [] if "--resume" in flags else [*common_flags, *HEADS[method]]
        FORKS[method].main([*new, *flags])

    return start


def tensors(value, name=""):
    """Yields (name, tensor or plain value) of all of a checkpoint but its flags and its clock."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("args", "seconds"):
                yield from tensors(inner, f"{name}.{key}")
    else:
        yield name, value


@pytest.mark.parametrize("method", FORKS)
def test_killed_and_resumed_is_never_killed(train, monkeypatch, capsys, method):
    train(method, "--out", "whole")
    arguments, schedule = ["--out", "ended"], common.LRScheduler.step
    for step in (2, 4, 7):  # in mid-epoch, at the end of an epoch, in mid-epoch again
        def signalled(self, at, step=step):
            if at + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return schedule(self, at)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(common.LRScheduler, "step", signalled)
            train(method, *arguments)
        assert end.value.code == 128 + signal.SIGTERM and f"saved at step {step};" in capsys.readouterr().err
        arguments = ["--resume", "ended"]
    train(method, *arguments)
    one, two = (dict(tensors(torch.load(f"{name}/last.pt", weights_only=True))) for name in ("whole", "ended"))
    assert one.keys() == two.keys() and one[".method"] == method and one[".step"] == 8
    for name, value in one.items():
        assert torch.equal(value, two[name]) if torch.is_tensor(value) else str(value) == str(two[name]), name
    rows = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "knn_seconds")}
             for row in read_metrics(name)] for name in ("whole", "ended")]
    assert rows[0] == rows[1] and [row["epoch"] for row in rows[0]] == [0, 1, 2]


@pytest.mark.parametrize("method", FORKS)
def test_what_comes_after_training_takes_it(train, capsys, method):
    train(method, "--out", "run", "--epochs", "1")
    program = ["--program", str(ROOT / "forks" / f"{method}.py")]
    backbone = ["--checkpoint", "run", "--k", "5", "--device", "cpu", "--amp", "off"]
    knn.main(backbone)
    plain = capsys.readouterr().out
    assert f"top-1 {read_metrics('run')[1]['knn']:6.2f} %" in plain and "layer4, 32 features" in plain
    knn.main([*backbone, *program])
    assert capsys.readouterr().out == plain
    knn.main([*backbone, *program, "--projector"])
    assert "projector, 16 features" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        knn.main([*backbone, "--projector"])
    assert f"a {method} model has none, or its program is not known: --program FILE.py" in capsys.readouterr().err


@pytest.mark.parametrize("method", FORKS)
def test_a_linear_probe_takes_it(train, method):
    import linear
    train(method, "--out", "run", "--epochs", "1")
    linear.main(["--checkpoint", "run", "--out", "probe", "--epochs", "1", "--device", "cpu", "--quiet"])
    assert checkpoint.load("probe")["backbone"].keys() == checkpoint.load("run")["backbone"].keys()


def test_a_fork_goes_by_its_files_name(train, capsys):
    train("barlowtwins", "--max-steps", "1")
    (run,) = os.listdir("runs")
    assert run.startswith("barlowtwins-")
    with pytest.raises(SystemExit) as end:
        simsiam.main(["--resume", f"runs/{run}"])
    assert end.value.code == 2
    assert "a run of barlowtwins.py, not of simsiam.py: that one" in capsys.readouterr().err


@pytest.mark.parametrize("method", FORKS)
def test_it_runs_from_any_folder(method, images, tmp_path):
    program = str(ROOT / "forks" / f"{method}.py")
    done = subprocess.run([sys.executable, program, "--data", str(images), "--cache", str(tmp_path / "cache"),
                           "--views-png", "views.png", "--batch-size", "8"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and "wrote views.png: one image per row, then its 2 views" in done.stdout, done.stderr


@pytest.mark.parametrize("method", FORKS)
def test_the_two_views_have_recipes_of_their_own(train, monkeypatch, method):
    chances, (blur, solarize) = [], (augment.gaussian_blur, augment.solarize)

    def note(function, title):
        return lambda *batch, p, **kinds: chances.append((title, p)) or function(*batch, p=p, **kinds)

    monkeypatch.setattr(augment, "gaussian_blur", note(blur, "blur"))
    monkeypatch.setattr(augment, "solarize", note(solarize, "solarize"))
    train(method, "--max-steps", "1", "--knn-every", "0", "--blur1", "0.9", "--blur2", "0.3", "--solarize", "0.6")
    assert chances == [("blur", 0.9), ("solarize", 0.0), ("blur", 0.3), ("solarize", 0.6)]
    paper = FORKS[method].RECIPES["photos"]
    assert (paper["blur1"], paper["blur2"], paper["solarize"]) == (1.0, 0.1, 0.2)


@pytest.mark.parametrize("method, loss, pairs", [("barlowtwins", "barlow_twins_loss", [("z1", "z2")]),
                                                 ("byol", "byol_loss", [("p1", "z2"), ("p2", "z1")])])
def test_each_loss_is_between_different_views(train, monkeypatch, method, loss, pairs):
    fork, outputs, met = FORKS[method], [], []
    model, plain = {"barlowtwins": barlowtwins.BarlowTwins, "byol": byol.BYOL}[method], getattr(fork, loss)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda self, x: outputs.append(forward(self, x)) or outputs[-1])
    monkeypatch.setattr(fork, loss, lambda one, other, *more: met.append((one, other)) or plain(one, other, *more))
    train(method, "--max-steps", "1", "--knn-every", "0")
    (p1, z1), (p2, z2) = outputs if method == "byol" else [(None, z) for z in outputs]
    names = {"p1": p1, "p2": p2, "z1": z1, "z2": z2}
    assert len(met) == len(pairs) and not torch.equal(z1, z2)
    for (one, other), (first, second) in zip(met, pairs, strict=True):
        assert torch.equal(one, names[first]) and torch.equal(other, names[second])
        assert one.requires_grad and other.requires_grad == (method == "barlowtwins")


def test_the_target_follows_after_the_step_and_stays_put_at_tau_1(train):
    """At tau_base 0 it equals, after the first step, what that step made of the online network."""
    train("byol", "--out", "random", "--tau", "1", "--max-steps", "4", "--knn-every", "0")
    torch.manual_seed(0)
    begins = byol.build_model(argparse.Namespace(**checkpoint.load("random")["args"]))
    model = checkpoint.load("random")["model"]
    moved = 0.0
    for name, value in begins.named_parameters():
        if name.startswith("target"):
            assert torch.equal(model[name], value)
        else:
            moved += (model[name] - value).abs().sum().item()
    assert moved > 1
    train("byol", "--out", "one", "--tau", "0", "--max-steps", "1", "--knn-every", "0")
    model = checkpoint.load("one")["model"]
    for name, _ in begins.target.named_parameters():
        part, rest = name.split(".", 1)
        online = model[f"{'backbone' if part == '0' else 'projector'}.{rest}"]
        torch.testing.assert_close(model[f"target.{name}"], online, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Two processes
# ------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A model without BatchNorm: its outputs do not depend on how a batch is shared out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.body(x)


def two_processes(rank, port, images, folder):
    """The lines of the loop from views to gradients, against one process with the joined batch; then a whole run."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), XDG_CACHE_HOME=str(images / ".cache"))
    torch.set_num_threads(1)
    distributed.join("cpu")
    distributed.joined = False  # the group is this test's: no run ends it
    x1, x2 = torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    alone, model = Plain(), Plain()
    expected = barlowtwins.barlow_twins_loss(alone(x1), alone(x2), 0.1)
    expected.backward()
    network = distributed.parallel(model, torch.device("cpu"))
    z1, z2 = (distributed.gather_with_gradient(network(distributed.mine(x))) for x in (x1, x2))
    loss = barlowtwins.barlow_twins_loss(z1, z2, 0.1)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    losses, plain = [], barlowtwins.barlow_twins_loss
    barlowtwins.barlow_twins_loss = lambda z1, z2, lambda_: losses.append(len(z1)) or plain(z1, z2, lambda_)
    for method in FORKS:
        FORKS[method].main(["--data", str(images), "--out", str(folder / method), "--width", "4", "--image-size", "16",
                            "--batch-size", "8", "--device", "cpu", "--quiet", "--knn-k", "5", "--max-steps", "2",
                            "--amp", "off", *HEADS[method]])
    assert losses == [8, 8]  # the loop's loss sees the batch of both
    dist.destroy_process_group()


def test_on_two_processes_the_loss_is_that_of_the_whole_batch(images, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(two_processes, (port, images, tmp_path), nprocs=2)
    assert all(checkpoint.load(tmp_path / method, method)["step"] == 2 for method in FORKS)


# ------------------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------------------


LEARNS = {
    "barlowtwins": (["--dim", "64", "--lr", "0.2"], 5),
    "byol": (["--tau", "0.5"], 2.5),
}


@pytest.mark.parametrize("method", FORKS)
def test_a_short_run_learns(method, tmp_path, monkeypatch):
    """On a part of the drawn set; this seed and another gave at least twice the margin."""
    flags, margin = LEARNS[method]
    monkeypatch.setitem(pictures.TOY_COUNT, "train", 1500)
    monkeypatch.setitem(pictures.TOY_COUNT, "val", 500)
    FORKS[method].main(["--cache", str(tmp_path), "--out", str(tmp_path / "run"), "--quiet", "--device", "cpu",
                        "--width", "8", "--seed", "1", "--epochs", "4", "--warmup-epochs", "0.4", "--batch-size", "32",
                        "--knn-every", "9", *flags])
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["epoch"] == 0 and rows[-1]["knn"] > rows[0]["knn"] + margin
