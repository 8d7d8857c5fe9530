"""common.py: the network against torchvision's, the schedule in closed form, meters, seeds, precision."""

import functools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
import torchvision

import common
from common import bf16_gain  # conftest.py puts another in its place

# ------------------------------------------------------------------------------------------------
# ResNet18
# ------------------------------------------------------------------------------------------------


def test_resnet18_is_torchvisions_both_ways():
    torch.manual_seed(0)
    ours, theirs = common.ResNet18(1000, "imagenet"), torchvision.models.resnet18()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 3, 64, 64)
    for network in (ours, theirs):
        network.train()
        network(x).square().mean().backward()
    assert torch.equal(ours(x), theirs(x))
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name
    theirs.load_state_dict(common.ResNet18(1000, "imagenet").state_dict(), strict=True)


def test_resnet18_starts_as_torchvisions():
    for zero in (False, True):
        torch.manual_seed(3)
        ours = common.ResNet18(1000, "imagenet", zero_init_residual=zero)
        torch.manual_seed(3)
        theirs = torchvision.models.resnet18(zero_init_residual=zero)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_resnet18_without_classifier_gives_pooled_features():
    x = torch.randn(2, 3, 32, 32)
    network = common.ResNet18(stem="cifar", width=8).eval()
    assert network(x).shape == (2, 64)
    assert network.conv1(x).shape[-1] == 32  # the CIFAR stem keeps every pixel
    assert common.ResNet18(stem="imagenet", width=8).conv1(x).shape[-1] == 16
    layers = network.features(x, ("layer2", "layer4"))
    assert {name: f.shape[1] for name, f in layers.items()} == {"layer2": 16, "layer4": 64}
    assert torch.equal(layers["layer4"], network(x))
    with pytest.raises(ValueError, match="stem"):
        common.ResNet18(stem="imagnet")


NARROW = """
import torch, common
for width in (1, 8, 12, 16):
    network = torch.nn.Sequential(common.ResNet18(stem="cifar", width=width)).to(memory_format=torch.channels_last)
    for _ in range(2):
        x = torch.randn(16, 3, 96, 96).to(memory_format=torch.channels_last)
        network(x).square().mean().backward()
    strides = [p.stride() for p in network.parameters() if p.dim() == 4]
    plain = [torch.empty(p.shape).stride() for p in network.parameters() if p.dim() == 4]
    assert (strides == plain) == (width < 16)
"""


def test_narrow_networks_keep_off_channels_last_and_do_not_crash():
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(common.__file__))
    done = subprocess.run([sys.executable, "-c", NARROW], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------
# TwoCrops, AverageMeter, LRScheduler, randomness
# ------------------------------------------------------------------------------------------------


def test_two_crops_draw_twice():
    generator = torch.Generator().manual_seed(0)
    x1, x2 = common.TwoCrops(lambda x, g: x + torch.rand(x.shape, generator=g))(torch.zeros(4), generator)
    assert not torch.equal(x1, x2)


def test_two_crops_give_each_view_its_own_transform():
    def view(sign, x, g):
        return x + sign * torch.rand(x.shape, generator=g)

    two_crops = common.TwoCrops(functools.partial(view, 1), functools.partial(view, -1))
    x1, x2 = two_crops(torch.zeros(4), torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    assert torch.equal(x1, torch.rand(4, generator=g)) and torch.equal(x2, -torch.rand(4, generator=g))  # in this order


def test_average_meter_weights_by_count_and_stays_a_tensor():
    meter = common.AverageMeter()
    meter.update(torch.tensor(1.0, requires_grad=True), 96)
    meter.update(torch.tensor(5.0), 32)  # a short last batch counts a third of a full one
    assert torch.is_tensor(meter.sum) and not meter.sum.requires_grad
    assert meter.avg == 2.0
    assert math.isnan(common.AverageMeter().avg)


def make_optimizer():
    w, v = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [w]}, {"params": [v], "fix_lr": True}], lr=9.0)


def test_schedule_warms_up_then_follows_the_cosine():
    optimizer = make_optimizer()
    schedule = common.LRScheduler(optimizer, 0.4, total_steps=110, warmup_steps=10)
    expected = [0.4 * (s + 1) / 10 for s in range(10)]
    expected += [0.2 * (1 + math.cos(math.pi * s / 100)) for s in range(100)]
    for step, lr in enumerate(expected):
        assert schedule.step(step) == pytest.approx(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.param_groups[1]["lr"] == 0.4  # the predictor's rate stays, in warm-up too
    assert schedule.step(55) == pytest.approx(expected[55])  # no state: any step in any order


def test_progress_counts_the_images_since_it_began(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    line = common.Progress(40, per_step=8, first=20, show=lambda text, **_: lines.append(text))
    line.terminal, line.every = False, 30.0
    now[0] = 40.0
    line.update(30)
    assert line.rate == 2.0 and lines[0].endswith("30/40  2 images/s  0:40 left")


def test_schedule_in_steps():
    steps = common.LRScheduler(make_optimizer(), 1.0, 200, kind="steps", milestones=(60, 120), factor=0.2)
    assert [steps.lr_at(s) for s in (0, 59, 60, 119, 120)] == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    with pytest.raises(ValueError, match="kind"):
        common.LRScheduler(make_optimizer(), 1.0, 1, kind="linear")


def test_a_device_that_cannot_add_is_refused_with_its_own_words(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore words")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(common.UsageError, match="cpu: CUDA error: no kernel image .* device; try --device auto$"):
        common.pick_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(common.UsageError, match="--device cuda: .*; try --device cpu$"):  # as auto has found
        common.pick_device()


def test_where_channels_last_is_broken_the_network_is_contiguous(monkeypatch):
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    outputs = []
    for broken in ((), ("cpu",)):
        monkeypatch.setattr(common, "NO_CHANNELS_LAST", broken)
        common.seed_everything(0)
        net = common.ResNet18(width=16).to("cpu", memory_format=torch.channels_last)
        seen = []
        net.bn1.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0].is_contiguous()))
        outputs.append(net(x))
        assert seen == [bool(broken)] and net.layer1[0].conv1.weight.is_contiguous() == bool(broken)
    torch.testing.assert_close(*outputs)


def test_averages_need_no_torch_distributed(monkeypatch):
    monkeypatch.setattr(common, "dist", types.SimpleNamespace(is_available=lambda: False))  # all that such a build has
    meter = common.AverageMeter()
    meter.update(3.0, 2)
    assert meter.mean() == 3.0


def test_precisions_of_a_cpu():
    with pytest.raises(common.UsageError, match="--amp fp16"):
        common.pick_precision("fp16", torch.device("cpu"))
    autocast, scaler = common.pick_precision("bf16", torch.device("cpu"))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not scaler.is_enabled()
    autocast, _ = common.pick_precision("off", torch.device("cpu"))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_cpu_takes_the_precision_that_a_trial_finds_faster(monkeypatch):
    def of_auto():
        with common.pick_precision("auto", torch.device("cpu"), 24)[0]():
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    for gain, dtype in {0.1: torch.float32, 1.05: torch.float32, 1.2: torch.bfloat16}.items():
        monkeypatch.setattr(common, "bf16_gain", lambda width, gain=gain: {24: gain}[width])
        assert of_auto() == dtype


def test_the_trial_of_bf16_takes_the_fastest_turn_of_each(monkeypatch):
    """Against a clock that tells what each precision takes: float32 3 s, bf16 2 s, one turn of it 9 s."""
    state, now, turns = torch.get_rng_state(), [0.0], []
    plain = torch.autocast

    def autocast(*args, enabled):
        turns.append(enabled)
        now[0] += (9 if len(turns) == 4 else 2) if enabled else 3
        return plain(*args, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(common.time, clock, lambda: now[0])
    assert bf16_gain(4, within=18) == pytest.approx(1.5) and turns == [False, True] * 3
    assert torch.equal(torch.get_rng_state(), state)  # or a run's weights would hang on its --amp


def test_clock():
    assert [common.clock(s) for s in (0, 75, 3675)] == ["0:00", "1:15", "1:01:15"]
