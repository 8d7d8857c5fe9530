"""simclr.py against the paper's equations, in double precision; LARS by hand; the schedule of a real run."""

import argparse
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import common
import simclr
from harness.folder import read_metrics


def cosine(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True)) / (sum(a * a for a in u) * sum(b * b for b in v)) ** 0.5


def paper_loss(z1, z2, temperature):
    """Eq. 1 and Algorithm 1 by loops, with the paper's order: views 1 and 2 of an image side by side."""
    z = [row for pair in zip(z1, z2, strict=True) for row in pair]
    total = 0.0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        others = sum(torch.exp(cosine(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(cosine(z[i], z[j]) / temperature) / others)
    return total / len(z)


def random_outputs(n=5, d=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_and_gradients_equal_the_equation(temperature):
    """Through both views of every pair, as partner and as negative: no gradient is cut off or halved."""
    z1, z2 = random_outputs()
    ours, theirs = simclr.nt_xent(z1, z2, temperature), paper_loss(z1, z2, temperature)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    ours, theirs = torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(theirs, (z1, z2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_closed_forms():
    n, temperature = 8, 0.5
    same = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).expand(n, -1)
    # All outputs alike: every one of the 2N - 1 others is as likely (2N, were self not masked).
    assert simclr.nt_xent(same, 3 * same, temperature).item() == pytest.approx(math.log(2 * n - 1), abs=1e-5)
    # Partners equal, all else orthogonal.
    z = torch.eye(n)
    expected = math.log(math.exp(1 / temperature) + 2 * n - 2) - 1 / temperature
    assert simclr.nt_xent(z, z, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert simclr.nt_xent(z, z, 0.01).item() == pytest.approx(0, abs=1e-6)
    # One pair has no negatives.
    assert simclr.nt_xent(z[:1], -z[:1], temperature).item() == pytest.approx(0, abs=1e-6)


def test_rows_i_and_i_plus_n_are_partners():
    s, partner = simclr.similarities(*random_outputs(n=3))
    assert s.shape == (6, 6) and partner.tolist() == [3, 4, 5, 0, 1, 2]
    assert (s.diagonal() == -math.inf).all() and torch.isfinite(s).sum() == 30  # masked in all four blocks
    with pytest.raises(ValueError, match="same shape"):
        simclr.nt_xent(torch.randn(4, 3), torch.randn(2, 3), 0.5)


def test_contrastive_accuracy_counts_both_directions():
    z1, z2 = torch.eye(4), torch.eye(4)
    assert simclr.contrastive_accuracy(z1, z2).item() == 1
    assert simclr.contrastive_accuracy(z1, z2.roll(1, 0)).item() == 0
    z2[0] = -z1[0]  # both views of image 0 miss, the other six outputs still find their partners
    assert simclr.contrastive_accuracy(z1, z2).item() == 0.75
    z = torch.randn(2, 500, 32, generator=torch.Generator().manual_seed(0))
    assert simclr.contrastive_accuracy(z[0], z[1]).item() < 0.01  # chance: 1/999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_stay_finite_and_exact(dtype):
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in random_outputs(n=64, d=32))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # even where the caller left autocast on
        loss = simclr.nt_xent(1000 * z1, z2, 0.01)     # exp(1 / 0.01) overflows float32, let alone fp16
        accuracy = simclr.contrastive_accuracy(z1, z1)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and accuracy == 1
    assert torch.isfinite(z1.grad).all() and torch.isfinite(z2.grad).all() and z1.grad.abs().max() > 0
    exact = simclr.nt_xent(z1.detach().double(), z2.detach().double(), 0.01)
    torch.testing.assert_close(loss.detach(), exact, rtol=1e-3, atol=0)


def test_memory_is_that_of_the_similarities():
    """No tensor of the forward or backward pass is larger than 2N x 2N."""
    n, d = 128, 64
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, tensor.numel() if torch.is_tensor(tensor) else 0)
            return result

    z1, z2 = (z.detach().float().requires_grad_() for z in random_outputs(n, d))
    with Watch():
        simclr.nt_xent(z1, z2, 0.5).backward()
    assert largest == 4 * n * n and z1.grad is not None


# ------------------------------------------------------------------------------------------------
# Model and views
# ------------------------------------------------------------------------------------------------


def make_model(**changes):
    args = dict(stem="cifar", width=4, dim=24, hidden_dim=40, proj_layers=2, no_projector=False)
    return simclr.build_model(argparse.Namespace(**(args | changes)))


def batch_norm(x, weight=None, bias=None):
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return x if weight is None else x * weight + bias


@pytest.mark.parametrize("layers", [2, 3])
def test_forward_equals_the_head_written_out(layers):
    torch.manual_seed(0)
    model = make_model(proj_layers=layers).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    w = {name: value for name, value in model.named_parameters() if name.startswith("projector")}
    h = model.backbone(x)
    for i in range(layers - 1):
        h = h @ w[f"projector.{3 * i}.weight"].T
        h = batch_norm(h, w[f"projector.{3 * i + 1}.weight"], w[f"projector.{3 * i + 1}.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), batch_norm(h @ w[f"projector.{3 * layers - 3}.weight"].T))
    assert len(w) == 3 * layers - 2  # no biases under a BatchNorm, no shift or scale at the output
    assert h.shape == (6, 40) and model(x).shape == (6, 24)


def test_ablation_without_projector():
    model = make_model(no_projector=True).eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(model(x), model.backbone(x)) and model(x).shape == (4, 32)


def test_every_block_starts_as_the_identity():
    gammas = [m.bn2.weight for m in make_model().backbone.modules() if isinstance(m, common.BasicBlock)]
    assert len(gammas) == 8 and all(g.abs().sum() == 0 for g in gammas)


def view_args(**changes):
    args = dict(image_size=32, view_size=None, min_crop=0.2, blur=0.5, grey=0.0, jitter_strength=1.0,
                no_color_jitter=False)
    return argparse.Namespace(**(args | changes))


def make_views(args, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return simclr.view(images, torch.ones(len(images)), generator, args, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def pixels(x):
    return x * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)


def test_views_differ_and_are_normalised():
    images = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    x = make_views(view_args(), images)
    assert x.shape == (8, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x, make_views(view_args(), images, seed=1))
    assert -1e-5 <= pixels(x).min() and pixels(x).max() <= 1 + 1e-5


def test_view_takes_the_papers_strengths(monkeypatch):
    """Jitter (.8, .8, .8, .2) s with p .8; bicubic crops; blur kernel a tenth of the side."""
    calls = {}

    def spy(name, real):
        def called(*args, **kwargs):
            calls[name] = (args[1:], kwargs)
            return real(*args, **kwargs)
        return called

    for name in ("random_resized_crop", "color_jitter", "random_grayscale", "gaussian_blur"):
        monkeypatch.setattr(augment, name, spy(name, getattr(augment, name)))
    images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    make_views(view_args(image_size=224, jitter_strength=0.75, min_crop=0.3, grey=0.15, blur=0.35), images)
    assert list(calls) == ["random_resized_crop", "color_jitter", "random_grayscale", "gaussian_blur"]
    crop, jitter, grey, blur = calls.values()
    assert crop[0] == (224,) and crop[1]["scale"] == (0.3, 1.0) and crop[1]["interpolation"] == "bicubic"
    assert crop[1]["flip"] == 0.5
    assert jitter[0] == pytest.approx((0.6, 0.6, 0.6, 0.15)) and jitter[1]["p"] == 0.8
    assert grey[1]["p"] == 0.15
    assert blur[1]["kernel_size"] == 23 and blur[1]["sigma"] == (0.1, 2.0) and blur[1]["p"] == 0.35


def test_without_colour_jitter_only_the_colours_differ():
    flat = torch.zeros(64, 3, 32, 32, dtype=torch.uint8) + torch.tensor([200, 90, 40], dtype=torch.uint8)[:, None, None]
    kept = pixels(make_views(view_args(blur=0.0, no_color_jitter=True), flat))
    colour = torch.tensor([200, 90, 40]).view(3, 1, 1) / 255
    torch.testing.assert_close(kept, colour.expand_as(kept), rtol=0, atol=1e-4)
    changed = (pixels(make_views(view_args(blur=0.0), flat)) - colour).abs().amax(dim=(1, 2, 3)) > 0.01
    assert 0.6 < changed.float().mean() < 0.95  # p = 0.8, an own draw for each image
    # A weak jitter of the same draws, so that the crops can be compared: they are the same.
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(make_views(view_args(jitter_strength=1e-6), images),
                               make_views(view_args(no_color_jitter=True), images), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# Optimiser and schedule
# ------------------------------------------------------------------------------------------------


def norm(values):
    return math.sqrt(sum(float(v) ** 2 for v in values))


def lars_by_hand(w, gradients, rates, momentum, weight_decay, eta, plain):
    """Steps on one parameter given as a list of floats, with one rate and gradient a step."""
    w, v = list(map(float, w)), [0.0] * len(w)
    for g, lr in zip(gradients, rates, strict=True):
        g, ratio = list(map(float, g)), 1.0
        if not plain:
            g = [a + weight_decay * b for a, b in zip(g, w, strict=True)]
            if norm(w) > 0 and norm(g) > 0:
                ratio = eta * norm(w) / norm(g)
        v = [momentum * a + lr * ratio * b for a, b in zip(v, g, strict=True)]
        w = [a - b for a, b in zip(w, v, strict=True)]
    return w


def test_lars_equals_steps_by_hand():
    """Three steps at changing rates: a matrix, a filter, a matrix that starts at zero, a bias, a zero gamma."""
    g = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "filter": (2, 3, 3, 3), "zero": (4, 2), "bias": (5,), "gamma": (6,)}
    start = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    start["zero"].zero_()
    start["gamma"].zero_()
    gradients = {name: [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
                 for name, shape in shapes.items()}
    gradients["matrix"][1].zero_()  # then the decay alone is the gradient
    rates = [0.3, 0.5, 0.1]
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = simclr.LARS(parameters.values(), lr=1.0, momentum=0.9, weight_decay=0.01, eta=0.02)
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        for name, w in parameters.items():
            w.grad = gradients[name][step].clone()
        optimizer.step()
    for name, w in parameters.items():
        expected = lars_by_hand(start[name].flatten(), [x.flatten() for x in gradients[name]], rates, 0.9, 0.01,
                                0.02, plain=name in ("bias", "gamma"))
        torch.testing.assert_close(w.detach().flatten(), torch.tensor(expected, dtype=torch.float64),
                                   rtol=1e-12, atol=1e-15, msg=name)
        assert (w.detach() != start[name]).all(), name
        assert torch.equal(w.grad, gradients[name][2])  # the decay is not left in the gradient


def test_lars_defaults_zero_gradients_and_refusals():
    w = torch.ones(2, 2, requires_grad=True)
    untouched = torch.ones(2, requires_grad=True)
    optimizer = simclr.LARS([w, untouched], lr=1.0)
    assert optimizer.defaults == dict(lr=1.0, momentum=0.9, weight_decay=0.0, eta=1e-3)
    w.grad = torch.zeros(2, 2)
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7 and torch.equal(w, torch.ones(2, 2))  # no 0 / 0
    with pytest.raises(ValueError, match="negative"):
        simclr.LARS([w], lr=-0.1)


def test_lars_goes_on_from_its_state():
    def run(w, optimizer, steps):
        for step in steps:
            w.grad = torch.full_like(w, 1.0 + step) + w.detach()
            optimizer.step()

    start = torch.arange(1.0, 7.0).reshape(2, 3)
    whole = start.clone().requires_grad_()
    optimizer = simclr.LARS([whole], lr=0.5, weight_decay=0.1)
    run(whole, optimizer, range(4))
    half = start.clone().requires_grad_()
    optimizer = simclr.LARS([half], lr=0.5, weight_decay=0.1)
    run(half, optimizer, range(2))
    resumed = half.detach().clone().requires_grad_()
    again = simclr.LARS([resumed], lr=9.0)
    again.load_state_dict(optimizer.state_dict())
    run(resumed, again, range(2, 4))
    assert torch.equal(whole, resumed)


def test_both_scaling_rules():
    assert simclr.scaled_lr(0.3, 4096, "linear") == pytest.approx(4.8)
    for batch in (64, 256, 1024):
        assert simclr.scaled_lr(1.2, batch, "sqrt") == pytest.approx(0.075 * math.sqrt(batch))
    assert simclr.scaled_lr(0.7, 256, "sqrt") == simclr.scaled_lr(0.7, 256, "linear")


# ------------------------------------------------------------------------------------------------
# Runs on the toy set
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """toy(name, flags...): a run on the toy set, packed once; returns its metrics."""
    folder = tmp_path_factory.mktemp("toy")

    def start(name, *flags):
        simclr.main(["--cache", str(folder), "--out", str(folder / name), "--quiet", "--seed", "1", *flags])
        return read_metrics(folder / name)

    start.folder = folder
    return start


def test_a_run_takes_one_forward_a_step_and_the_schedule_counts_steps(toy, monkeypatch):
    """LARS with square-root scaling: the rates that its steps saw, from the first to the last."""
    rates, passes, losses = [], [], []
    real_step, real_forward, real_loss = simclr.LARS.step, simclr.SimCLR.forward, simclr.nt_xent

    def step(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return real_step(self, closure)

    def forward(self, x):
        passes.append((x, real_forward(self, x)))
        return passes[-1][1]

    def loss(*z_and_temperature):
        losses.append(z_and_temperature)
        return real_loss(*z_and_temperature)

    monkeypatch.setattr(simclr.LARS, "step", step)
    monkeypatch.setattr(simclr.SimCLR, "forward", forward)
    monkeypatch.setattr(simclr, "nt_xent", loss)
    flags = ["--width", "4", "--batch-size", "16", "--optimizer", "lars", "--lr", "1.2", "--lr-scaling", "sqrt",
             "--epochs", "5", "--warmup-epochs", "1", "--max-steps", "20", "--knn-every", "0", "--temperature", "0.3"]
    rows = toy("schedule", *flags)
    top = 0.075 * math.sqrt(16)
    warm = [top * (i + 1) / 4 for i in range(4)]
    cosine = [top * 0.5 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]
    assert rates == pytest.approx(warm + cosine)
    assert len(passes) == len(losses) == 20  # both views in one forward, the first half view 1
    for (x, z), (z1, z2, temperature) in zip(passes, losses, strict=True):
        assert torch.equal(torch.cat([z1, z2]), z) and len(z1) == 16 and temperature == 0.3
        assert len(x) == 32 and not torch.equal(x[:16], x[16:])
    assert rows[-1]["lr"] == pytest.approx(rates[-1], abs=1e-6) and rows[-1]["step"] == 20
    log = (toy.folder / "schedule/log.txt").read_text()
    assert "log(2N - 1) = 3.43" in log and "0.3 per step of 16 images" in log


def test_a_resumed_run_keeps_its_optimizer(toy, capsys):
    toy("sgd", "--width", "4", "--max-steps", "1", "--knn-every", "0")
    with pytest.raises(SystemExit):
        simclr.main(["--resume", str(toy.folder / "sgd"), "--optimizer", "lars"])
    assert "--optimizer" in capsys.readouterr().err
