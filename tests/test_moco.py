"""moco.py against the papers' equations and their order of events; the queue, the two encoders, the BN groups."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import harness
import moco
from harness.folder import read_metrics


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that a second thread only gets in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------


def paper_loss(q, k, queue, temperature):
    """Eq. 1 by loops over queries and keys, the mean over queries."""
    total = 0
    for i in range(len(q)):
        own = (q[i] * k[i]).sum() / temperature
        others = [(q[i] * row).sum() / temperature for row in queue]
        total = total - (own.exp() / sum(score.exp() for score in [own, *others])).log()
    return total / len(q)


def unit_rows(n, c, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradient_equal_the_equation(temperature):
    q, k, queue = unit_rows(5, 6, 0).requires_grad_(), unit_rows(5, 6, 1), unit_rows(9, 6, 2)
    loss, expected = moco.info_nce(q, k, queue, temperature), paper_loss(q, k, queue, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(loss, q), torch.autograd.grad(expected, q)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_closed_forms():
    row = unit_rows(1, 8, 0)
    same = moco.info_nce(row.expand(4, -1), row.expand(4, -1), row.expand(63, -1), 0.2)
    assert same.item() == pytest.approx(math.log(64), rel=1e-6)  # all keys alike: chance, log(1 + K)
    # Own key in front, all others opposite: log(1 + K exp(-2 / T)); the other way round the sign of T's part turns.
    good = moco.info_nce(row.expand(4, -1), row.expand(4, -1), -row.expand(63, -1), 0.5)
    assert good.item() == pytest.approx(math.log(1 + 63 * math.exp(-4)), rel=1e-5)
    bad = moco.info_nce(row.expand(4, -1), -row.expand(4, -1), row.expand(63, -1), 0.5)
    assert bad.item() == pytest.approx(math.log(1 + 63 * math.exp(4)), rel=1e-5)


def test_contrastive_accuracy_counts_own_keys_and_takes_a_tie_for_a_miss():
    eye = torch.eye(4)
    assert moco.contrastive_accuracy(eye, eye, -eye) == 1
    assert moco.contrastive_accuracy(eye, eye[[0, 1, 3, 2]], eye[:3]) == 0  # a tie in rows 0 and 1
    assert moco.contrastive_accuracy(eye, eye, eye[:3]) == 0.25  # only row 3 has no equal in the queue
    q, key = unit_rows(64, 128, 1, torch.float32), unit_rows(1, 128, 0, torch.float32)  # equal keys, unequal rounding
    assert moco.contrastive_accuracy(q, key.expand(64, -1), key.expand(256, -1)) == 0


# ------------------------------------------------------------------------------------------------
# The key encoder
# ------------------------------------------------------------------------------------------------


def make_model(seed=0, **changes):
    args = dict(stem="cifar", width=4, dim=6, queue_size=10, head="mlp", bn_splits=3, batch_size=6)
    torch.manual_seed(seed)
    model = moco.build_model(argparse.Namespace(**(args | changes)))
    with torch.no_grad():  # weights of its own for either encoder, as after some training
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_both_encoders_start_alike_and_only_the_query_encoder_is_trained():
    model = moco.MoCo(common.ResNet18(width=4), dim=6, queue_size=10)
    pairs = list(zip(model.query_parameters(), model.key_encoder.parameters(), strict=True))
    assert all(torch.equal(q, k) and q.data_ptr() != k.data_ptr() for q, k in pairs)
    x_k = torch.randn(8, 3, 16, 16, requires_grad=True)  # even then no graph is kept for the keys
    q, k = model(torch.randn(8, 3, 16, 16), x_k, torch.randperm(8))
    assert not k.requires_grad and not model.queue.requires_grad
    assert not any(p.requires_grad for p in model.key_encoder.parameters())
    moco.info_nce(q, k, model.queue, 0.2).backward()
    assert all(p.grad is not None for p in model.query_parameters())
    assert all(p.grad is None for p in model.key_encoder.parameters())


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_ema_moves_the_keys_parameters_and_nothing_else(m):
    model = make_model()
    model(torch.randn(2, 6, 3, 16, 16)[0], torch.randn(6, 3, 16, 16) + 1)  # BatchNorm statistics part
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moco.ema_update(model.key_encoder.parameters(), model.query_parameters(), m)
    after = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in after.items():
        if name in parameters and name.startswith("key_encoder"):
            inside = name.split(".", 2)[2]  # key_encoder.0.<backbone> or key_encoder.1.<projector>
            query = before[("backbone." if name.startswith("key_encoder.0") else "projector.") + inside]
            expected = (m * before[name].double() + (1 - m) * query.double()).float()
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
            assert m != 0 or torch.equal(value, query)
        else:
            assert torch.equal(value, before[name]), name  # the query encoder, all statistics, the queue
    assert not torch.equal(after["backbone.bn1.running_mean"], after["key_encoder.0.bn1.running_mean"])


def plain(model, prefix, head):
    """An encoder with ordinary BatchNorm2d, from a MoCo's saved weights."""
    backbone, state = common.ResNet18(width=4), model.state_dict()
    own = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
    backbone.load_state_dict(own)
    w = {name[len(head):]: value for name, value in state.items() if name.startswith(head)}

    def encode(x):
        h = backbone(x)
        if "2.weight" in w:
            h = (h @ w["0.weight"].T + w["0.bias"]).clamp(min=0)
            return F.normalize(h @ w["2.weight"].T + w["2.bias"], dim=1)
        return F.normalize(h @ w["0.weight"].T + w["0.bias"], dim=1)

    return encode


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_forward_equals_plain_networks_on_separate_devices(head):
    """Every BN group as a GPU of its own with an ordinary network; keys dealt by `order`, given back in place."""
    model = make_model(head=head)
    encode_q, encode_k = plain(model, "backbone.", "projector."), plain(model, "key_encoder.0.", "key_encoder.1.")
    x_q, x_k = torch.randn(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    q, k = model(x_q, x_k, order)
    expected_q = torch.cat([encode_q(x_q[i:i + 3]) for i in (0, 3, 6)])
    expected_k = torch.empty_like(expected_q)
    for i in (0, 3, 6):
        expected_k[order[i:i + 3]] = encode_k(x_k[order[i:i + 3]]).detach()
    torch.testing.assert_close(q, expected_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k, expected_k, rtol=1e-4, atol=1e-5)
    # In groups of other neighbours a key is another: with plain BatchNorm, shuffling would do nothing.
    assert (k - model(x_q, x_k)[1]).abs().max() > 1e-2
    whole = make_model(head=head, bn_splits=1)
    torch.testing.assert_close(whole(x_q, x_k, order)[1], whole(x_q, x_k)[1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# BatchNorm over groups
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, sizes", [(12, [3, 3, 3, 3]), (10, [3, 3, 2, 2])])
def test_split_batch_norm_equals_loops_over_groups(rows, sizes):
    torch.manual_seed(0)
    layer = moco.SplitBatchNorm(5, 4).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = (3 * torch.randn(rows, 5, 3, 2, dtype=torch.float64) + 1).requires_grad_()
    y, expected, means, variances = layer(x), [], [], []
    for group in x.split(sizes):
        mean, var = group.mean((0, 2, 3)), group.var((0, 2, 3), unbiased=False)
        scaled = (group - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        expected.append(scaled * layer.weight[:, None, None] + layer.bias[:, None, None])
        means.append(0.1 * mean)
        variances.append(0.9 + 0.1 * group.var((0, 2, 3), unbiased=True))
    torch.testing.assert_close(y, torch.cat(expected))
    torch.testing.assert_close(layer.running_mean, sum(means) / 4)
    torch.testing.assert_close(layer.running_var, sum(variances) / 4)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, (x, layer.weight), grad) for out in (y, torch.cat(expected)))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="3 images .* 4"):
        layer(x[:3])


def test_split_batch_norm_weights_and_statistics_go_into_plain_batch_norm_and_back():
    torch.manual_seed(0)
    reference = common.ResNet18(width=4)
    reference(torch.randn(8, 3, 16, 16))  # statistics that are not the initial ones
    split = moco.split_batch_norm(common.ResNet18(width=4), 4)
    split.load_state_dict(reference.state_dict())
    layers = [m for m in split.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(layers) == 20 and all(isinstance(m, moco.SplitBatchNorm) and m.splits == 4 for m in layers)
    converted = moco.split_batch_norm(reference, 4)  # keeps what it finds
    x = torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(converted.eval()(x), split.eval()(x))
    split.train()(x)
    assert split.bn1.num_batches_tracked == 2
    back = common.ResNet18(width=4)
    back.load_state_dict(split.state_dict())
    assert list(back.state_dict()) == list(split.state_dict())
    torch.testing.assert_close(back.eval()(x), split.eval()(x))


def test_groups_suit_the_batch():
    assert [moco.bn_groups(None, n) for n in (512, 256, 128, 64, 32, 8, 7, 2)] == [8, 8, 4, 2, 2, 2, 1, 1]
    assert moco.bn_groups(4, 8) == 4 and moco.bn_groups(1, 1) == 1
    with pytest.raises(common.UsageError, match="--bn-splits 5.*--batch-size 8.*at most 4"):
        moco.bn_groups(5, 8)


# ------------------------------------------------------------------------------------------------
# The queue
# ------------------------------------------------------------------------------------------------


def test_queue_starts_as_unit_noise_wraps_and_is_saved():
    model = make_model()
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))
    assert model.queue.std() > 0.1
    expected, pointer = model.queue.clone(), 0
    for step in range(5):
        keys = unit_rows(4, 6, step, torch.float32)
        model.enqueue(keys)
        for row in keys:  # one after the other over the oldest
            expected[pointer], pointer = row, (pointer + 1) % 10
        assert torch.equal(model.queue, expected) and model.pointer == pointer
    other = make_model(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.queue, expected) and other.pointer == pointer


def test_a_batch_longer_than_the_queue_leaves_its_last_keys():
    model, keys = make_model(), unit_rows(23, 6, 0, torch.float32)
    model.enqueue(keys[:3])
    model.enqueue(keys)
    kept = {tuple(row) for row in model.queue.tolist()}
    assert kept == {tuple(row) for row in keys[-10:].tolist()}
    model.enqueue(keys[:1])  # and the oldest of them is the first to go
    assert tuple(keys[13].tolist()) not in {tuple(row) for row in model.queue.tolist()}


# ------------------------------------------------------------------------------------------------
# Views and flags
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v1", [False, True])
def test_views_differ_and_are_normalised(v1):
    args = argparse.Namespace(image_size=32, view_size=None, min_crop=0.2, blur=0.5, v1=v1)
    images = torch.randint(0, 256, (64, 3, 48, 48), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    generator = torch.Generator().manual_seed(0)
    x = [moco.view(images, torch.ones(64), generator, args, mean, std) for _ in range(2)]
    assert x[0].shape == (64, 3, 32, 32) and x[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x[0], x[1])
    pixels = x[0] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert -1e-5 <= pixels.min() and pixels.max() <= 1 + 1e-5
    # About a fifth is grey, in v1 too: jitter cannot give a grey picture its colours back.
    grey = (pixels.amax(1) - pixels.amin(1)).flatten(1).amax(1) < 1e-4
    assert 4 <= grey.sum() <= 24


def test_v1_takes_the_first_papers_values_unless_told_otherwise():
    args = moco.parse_args(["--v1"])
    assert (args.head, args.temperature, args.blur) == ("linear", 0.07, 0.0)
    args = moco.parse_args(["--v1", "--temperature", "0.1", "--head", "mlp"])
    assert (args.head, args.temperature) == ("mlp", 0.1)
    assert moco.parse_args([]).head is None  # v2: from the recipe table


# ------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """48 small pictures of two classes in a folder."""
    g = torch.Generator().manual_seed(0)
    for i in range(48):
        base = torch.randint(0, 256, (1, 1, 3) if i % 2 else (16, 16, 3), generator=g, dtype=torch.uint8)
        path = tmp_path / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(base.expand(16, 16, 3).contiguous().numpy()).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def train(pictures, tmp_path):
    """train("name", flags...) -> its rows of metrics."""

    def start(name, *flags):
        out = tmp_path / name
        tiny = ["--data", pictures, "--width", "4", "--image-size", "16", "--stem", "cifar", "--epochs", "3",
                "--batch-size", "8", "--queue-size", "64", "--dim", "16", "--amp", "off", "--device", "cpu"]
        if "--resume" not in flags:
            flags = [*tiny, "--out", out, "--cache", tmp_path / "cache", *flags]
        moco.main([str(flag) for flag in flags])
        return read_metrics(out)

    return start


def saved(tmp_path, name):
    return torch.load(tmp_path / name / "last.pt", weights_only=True)


def test_small_folder_trains_and_an_interrupted_run_goes_on_exactly(train, tmp_path, monkeypatch, capsys):
    whole = train("whole", "--symmetric")
    said = capsys.readouterr().out
    assert "loss log(1 + K) = 4.17" in said and "bn-splits 2" in said and "note    --queue-size" not in said
    assert max(map(len, said.splitlines())) <= 80 + len(str(tmp_path))
    state = saved(tmp_path, "whole")["model"]
    torch.testing.assert_close(state["queue"].norm(dim=1), torch.ones(64))

    loss, calls = moco.info_nce, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2 * 6 + 1:  # the first half of the seventh step, which is in the second epoch
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(moco, "info_nce", stops)
        train("part", "--symmetric")
    assert saved(tmp_path, "part")["epoch"] == 1
    resumed = train("part", "--resume", tmp_path / "part")
    other = saved(tmp_path, "part")["model"]
    assert list(other) == list(state)
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    keys = ("epoch", "step", "loss", "knn", "accuracy")
    assert [[row.get(key) for key in keys] for row in resumed] == [[row.get(key) for key in keys] for row in whole]
    harness.load_backbone(saved(tmp_path, "part"))  # into plain BatchNorm2d, strictly


@pytest.mark.parametrize("flags", [(), ("--symmetric",)])
def test_the_queue_holds_earlier_steps_keys_and_no_others(train, tmp_path, monkeypatch, flags):
    """Algorithm 1's order: every loss of a step sees the queue before that step's keys; then they go in once."""
    calls, loss = [], moco.info_nce

    def recorded(q, k, queue, temperature):
        calls.append((q.detach().clone(), k.clone(), queue.clone(), temperature))
        return loss(q, k, queue, temperature)

    monkeypatch.setattr(moco, "info_nce", recorded)
    rows = train("run", "--max-steps", "4", "--knn-every", "0", "--temperature", "0.3", *flags)
    halves = 2 if flags else 1
    assert len(calls) == 4 * halves
    pointer, queue, total = 0, calls[0][2].clone(), 0
    for step in range(4):
        both = calls[step * halves:(step + 1) * halves]
        assert all(torch.equal(call[2], queue) and call[3] == 0.3 for call in both)
        for _, keys, _, _ in reversed(both):  # k1, then k2
            for row in keys:
                queue[pointer], pointer = row, (pointer + 1) % 64
        total += sum(loss(*call) for call in both) / halves
    assert rows[-1]["loss"] == pytest.approx(total.item() / 4, abs=1e-5)  # chance stays log(1 + K)
    state = saved(tmp_path, "run")["model"]
    assert torch.equal(state["queue"], queue) and state["pointer"] == pointer == 4 * 8 * halves % 64
    if flags:  # the second half's queries are of the view that the first half's keys were of
        (q1, k2, _, _), (q2, k1, _, _) = calls[0][:4], calls[1][:4]
        near = [(a * b).sum(1).mean() for a, b in ((q1, k1), (q2, k2))]
        far = [(a * b).sum(1).mean() for a, b in ((q1, k2), (q2, k1))]
        assert min(near) > max(far)  # both encoders still are nearly the same


def test_ablations_change_what_they_name(train, tmp_path, monkeypatch):
    moments, ema, orders, equal, forward = [], moco.ema_update, [], [], moco.MoCo.forward
    monkeypatch.setattr(moco, "ema_update", lambda k, q, m: (moments.append(m), ema(k, q, m)))
    def recorded(self, x_q, x_k, order=None):
        orders.append(order)
        equal.append(torch.equal(self.key_encoder[0].conv1.weight, self.backbone.conv1.weight))
        return forward(self, x_q, x_k, order)

    monkeypatch.setattr(moco.MoCo, "forward", recorded)
    short = ["--max-steps", "3", "--knn-every", "0"]
    train("plain", *short)
    assert moments == [0.99] * 3 and len({tuple(order.tolist()) for order in orders}) == 3  # new every step
    assert all(sorted(order.tolist()) == list(range(8)) for order in orders)
    assert equal == [True, False, False]  # the first step has nothing to follow yet
    moments.clear(), orders.clear(), equal.clear()
    train("ablated", *short, "--no-shuffle-bn", "--momentum-encoder", "0")
    assert moments == [0] * 3 and orders == [None] * 3
    assert equal == [True] * 3  # the key encoder follows before its forward, so at m = 0 it is the query encoder
    rate = 0.32 * 8 / 256
    rows = train("steps", "--v1", "--lr", "0.32", "--epochs", "5", "--knn-every", "0")
    assert [row["lr"] for row in rows] == pytest.approx([rate, rate, rate, rate / 10, rate / 100], rel=1e-2)


def test_a_queue_that_is_no_multiple_of_the_batch_is_noted(train, capsys):
    train("long", "--queue-size", "200", "--max-steps", "1", "--knn-every", "0")
    assert "note    --queue-size 200" in capsys.readouterr().out
