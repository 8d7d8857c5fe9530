"""simsiam.py against the paper's equations, in double precision; the collapse it must and must not show."""

import argparse

import pytest
import torch

import common
import simsiam


def cosine(p, z):
    return sum(a * b for a, b in zip(p, z, strict=True)) / (sum(a * a for a in p) * sum(b * b for b in z)) ** 0.5


def paper_loss(p1, z1, p2, z2):
    """Eq. 1, 2 and 4 by loops over images; the z must come in detached."""
    n = len(p1)
    return sum(-cosine(p1[i], z2[i]) / 2 - cosine(p2[i], z1[i]) / 2 for i in range(n)) / n


def random_outputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def test_loss_and_gradients_equal_the_equations():
    p1, z1, p2, z2 = random_outputs()
    loss = simsiam.symmetric_loss(p1, z1, p2, z2)
    expected = paper_loss(p1, z1.detach(), p2, z2.detach())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, (p1, p2))
    theirs = torch.autograd.grad(expected, (p1, p2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_no_gradient_through_z_unless_asked():
    p1, z1, p2, z2 = random_outputs()
    simsiam.symmetric_loss(p1, z1, p2, z2).backward()
    assert z1.grad is None and z2.grad is None and p1.grad is not None and p2.grad is not None
    simsiam.symmetric_loss(p1, z1, p2, z2, stop_gradient=False).backward()
    assert z1.grad is not None and z2.grad is not None


def test_closed_forms():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(6, 9, generator=g)
    assert simsiam.negative_cosine(p, 3 * p).item() == pytest.approx(-1, abs=1e-6)  # length does not count
    assert simsiam.negative_cosine(p, -p).item() == pytest.approx(1, abs=1e-6)
    far = simsiam.negative_cosine(torch.randn(4000, 64, generator=g), torch.randn(4000, 64, generator=g))
    assert abs(far.item()) < 0.01  # chance


def test_output_std_is_1_when_spread_and_0_when_collapsed():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(512, 256, generator=g)
    assert simsiam.output_std(5 * z).item() == pytest.approx(1, abs=0.02)
    assert simsiam.output_std(z[:1].expand(512, -1)).item() == pytest.approx(0, abs=1e-6)


def make_model(**changes):
    args = dict(stem="cifar", width=4, dim=24, pred_dim=6, proj_layers=3, no_predictor=False)
    return simsiam.build_model(argparse.Namespace(**(args | changes)))


def batch_norm(x, weight=None, bias=None):
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return x if weight is None else x * weight + bias


@pytest.mark.parametrize("layers", [2, 3])
def test_forward_equals_the_papers_heads(layers):
    """The projection and prediction MLPs written out from Section 3, on the same weights."""
    torch.manual_seed(0)
    model = make_model(proj_layers=layers).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    p, z = model(x)
    w = {name: value for name, value in model.named_parameters() if not name.startswith("backbone")}
    h = model.backbone(x)
    for i in range(layers - 1):
        h = h @ w[f"projector.{3 * i}.weight"].T
        h = batch_norm(h, w[f"projector.{3 * i + 1}.weight"], w[f"projector.{3 * i + 1}.bias"]).clamp(min=0)
    expected_z = batch_norm(h @ w[f"projector.{3 * layers - 3}.weight"].T)
    torch.testing.assert_close(z, expected_z)
    h = expected_z @ w["predictor.0.weight"].T
    h = batch_norm(h, w["predictor.1.weight"], w["predictor.1.bias"]).clamp(min=0)
    torch.testing.assert_close(p, h @ w["predictor.3.weight"].T + w["predictor.3.bias"])
    expected_names = {"predictor.0.weight", "predictor.1.weight", "predictor.1.bias", "predictor.3.weight",
                      "predictor.3.bias"}
    assert {name for name in w if name.startswith("predictor")} == expected_names
    assert not any(name.startswith(f"projector.{3 * layers - 2}.") for name in w)  # the last BN has no scale


def test_step_equals_an_independent_double_precision_step():
    """Views forwarded apart, loss, gradients of every parameter: a whole step without our loss code."""
    torch.manual_seed(0)
    model = make_model().double()
    x1, x2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    (p1, z1), (p2, z2) = model(x1), model(x2)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(simsiam.symmetric_loss(p1, z1, p2, z2), parameters)
    (p1, z1), (p2, z2) = model(x1), model(x2)
    theirs = torch.autograd.grad(paper_loss(p1, z1.detach(), p2, z2.detach()), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


def test_every_block_starts_as_the_identity():
    model = make_model()
    gammas = [m.bn2.weight for m in model.backbone.modules() if isinstance(m, common.BasicBlock)]
    assert len(gammas) == 8 and all(g.abs().sum() == 0 for g in gammas)


def test_without_predictor_p_is_z():
    p, z = make_model(no_predictor=True)(torch.randn(4, 3, 16, 16))
    assert torch.equal(p, z)


def test_views_differ_and_are_normalised():
    args = argparse.Namespace(image_size=32, view_size=None, min_crop=0.2, blur=0.5)
    images = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    generator = torch.Generator().manual_seed(0)
    x = [simsiam.view(images, torch.ones(8), generator, args, mean, std) for _ in range(2)]
    assert x[0].shape == (8, 3, 32, 32) and x[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x[0], x[1])
    pixels = x[0] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert -1e-5 <= pixels.min() and pixels.max() <= 1 + 1e-5
