"""augment.py against torchvision: each operation given the same parameters, and each law of the draws."""

import contextlib
import functools
import itertools
import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import augment
import common

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=["CPU", "accelerator"])
def both(request, monkeypatch):
    """A test that asks for this runs twice: as on a CPU, and on the CPU as on an accelerator."""
    if request.param == "accelerator":
        monkeypatch.setattr(augment, "_all_at_once", lambda x: True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=12, side=24, seed=0):
    return torch.rand(n, 3, side, side, generator=generator(seed))


def assert_close(ours, theirs, atol=1e-5):
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    torch.testing.assert_close(ours.contiguous(), theirs.float().contiguous(), atol=atol, rtol=0)


def ks(a, b):
    """The two-sample Kolmogorov-Smirnov distance, in units of its value at a chance of about 1 in 10,000."""
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b])
    cdf_a = torch.searchsorted(a, points, right=True) / len(a)
    cdf_b = torch.searchsorted(b, points, right=True) / len(b)
    return ((cdf_a - cdf_b).abs().max() / (2.2 * math.sqrt(1 / len(a) + 1 / len(b)))).item()


# ------------------------------------------------------------------------------------------ draws
def philox(counter, key):
    """Philox4x64-10 of Salmon et al. 2011, Section 3.3 and Table 2, in Python's own integers: 4 numbers of 64 bits."""
    c, k, top = list(counter), list(key), (1 << 64) - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [b >> 64 ^ c[1] ^ k[0], b & top, a >> 64 ^ c[3] ^ k[1], a & top]
        k = [(k[0] + 0x9E3779B97F4A7C15) & top, (k[1] + 0xBB67AE8584CAA73B) & top]
    return c


def test_draws_are_philox_of_the_row_and_of_what_was_drawn_before():
    # The first of the known answers that the authors publish with their code, Random123.
    assert philox([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    draws = common.Draws(3, 17, rank=2)
    key = [draws.key & (1 << 64) - 1, draws.key >> 64]
    for call, k in ((1, 6), (2, 1)):
        table = draws.uniforms(4, k)
        assert table.shape == (4, k) and table.dtype == torch.float64
        blocks = -(-k // 4)
        for row in range(4):                                      # numpy counts on before it computes: hence the + 1
            numbers = [number for block in range(blocks)
                       for number in philox([blocks * (2 * 4 + row) + block + 1, call, 0, 0], key)][:k]
            assert table[row].tolist() == [(number >> 11) / (1 << 53) for number in numbers]


def test_draws_are_uniform_and_independent_of_their_neighbours():
    def table(seed=0, step=0, calls=0, rank=0):
        draws = common.Draws(seed, step, rank=rank)
        for _ in range(calls):
            draws.uniforms(1, 4)
        return draws.uniforms(4000, 8)

    u = table()
    assert u.min() >= 0 and u.max() < 1
    even = torch.arange(len(u)).add(0.5).div(len(u))
    assert all(ks(column, even) < 1 for column in u.unbind(1))                              # each at 1 in 10,000
    others = {"seed": table(seed=1), "step": table(step=1), "view": table(calls=1), "process": table(rank=1)}
    others |= {"row": u.roll(1, 0)} | {f"column {shift}": u.roll(shift, 1) for shift in range(1, 5)}
    for name, v in others.items():                                       # correlation 0, within 4 standard deviations
        assert abs(torch.corrcoef(torch.stack([u.flatten(), v.flatten()]))[0, 1]) < 4 / math.sqrt(u.numel()), name
        wrapped = (u + v).flatten() % 1                                  # uniform too, if they are independent
        assert ks(wrapped, torch.arange(u.numel()).add(0.5).div(u.numel())) < 1, name


def test_a_permutation_is_the_same_in_every_process_and_a_new_one_each_time():
    one, other = common.Draws(1, 2), common.Draws(1, 2, rank=3)
    first = one.permutation(50)
    assert torch.equal(first, other.permutation(50)) and torch.equal(first.sort().values, torch.arange(50))
    assert not torch.equal(first, one.permutation(50))


# ------------------------------------------------------------------------------- crop, resize, flip
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(32, 32), (32, 8), (24, 70), (150, 130)])    # 70, 130: several blocks
def test_resized_crop_is_torchvisions(side, size, interpolation, both):
    x = images(16, side)
    boxes = augment.crop_boxes(16, side, scale=(0.02, 1.0), ratio=(0.4, 2.5), generator=generator(1))
    boxes[0] = torch.tensor([side - 1, 0, 1, 1])                                # one pixel, in a corner
    boxes[1] = torch.tensor([0, side - 2, side, 2])                          # all of the height, little width
    flip = torch.arange(16) % 3 == 0
    ours = augment.resized_crop(x, boxes, size, flip, interpolation)
    theirs = torch.stack([
        TF.resized_crop(x[i], *box, [size, size], InterpolationMode(interpolation), antialias=True)
        for i, box in enumerate(boxes.int().tolist())]).clamp(0, 1)
    theirs[flip] = theirs[flip].flip(3)
    assert_close(ours, theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side, size", [(60, 40), (64, 96), (130, 128)])
def test_larger_uint8_pictures_are_torchvisions_on_uint8_to_one_level(side, size, interpolation):
    x = (images(16, side) * 255).byte()
    boxes, flip = augment.crop_boxes(16, side, generator=generator(1)), torch.arange(16) % 3 == 0
    theirs = torch.stack([
        TF.resized_crop(x[i], *box, [size, size], InterpolationMode(interpolation), antialias=True)
        for i, box in enumerate(boxes.int().tolist())])
    theirs[flip] = theirs[flip].flip(3)
    levels = augment.resized_crop(x, boxes, size, flip, interpolation) * 255
    assert_close(levels, theirs, atol=1.001)
    assert torch.equal(levels.round(), levels) or (levels.round() - levels).abs().max() < 1e-4
    assert (levels - theirs.float()).abs().mean() < 0.01


def test_uint8_is_scaled_to_one_everywhere():
    u = (images(6) * 255).byte()
    x = u / 255.0
    boxes = augment.crop_boxes(6, 24, generator=generator())
    ones = torch.full((6,), 1.5)
    for name, args in [("resized_crop", (boxes, 16)), ("center_crop", (24,)), ("center_crop", (16,)),
                       ("blur", (ones, 5)),
                       ("normalize", (MEAN, STD)), ("rotate", (torch.arange(6),))]:
        function = getattr(augment, name)
        assert_close(function(u, *args), function(x, *args))
    for name, args in [("random_resized_crop", (16,)), ("random_horizontal_flip", ()), ("random_crop", ()),
                       ("color_jitter", (0.4, 0.4, 0.4, 0.1, 0.5)), ("random_grayscale", ()),
                       ("gaussian_blur", ()), ("solarize", ())]:
        function = getattr(augment, name)
        assert_close(function(u, *args, generator=generator(3)), function(x, *args, generator=generator(3)))


def torchvision_boxes(n, height, width, scale, ratio):
    torch.manual_seed(5)
    sampler = T.RandomResizedCrop(8, scale=scale, ratio=ratio)
    picture = torch.empty(3, height, width)
    drawn = [sampler.make_params([picture]) for _ in range(n)]
    return torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn]).double()


@pytest.mark.parametrize("aspect, scale, ratio", [
    (1.0, (0.08, 1.0), (3 / 4, 4 / 3)),
    (1.0, (0.2, 1.0), (3 / 4, 4 / 3)),
    (2.25, (0.08, 1.0), (3 / 4, 4 / 3)),            # 96 x 43 in the original; some tries fail
    (1.0, (0.5, 1.0), (0.25, 4.0)),                 # most tries fail: what the later tries draw matters
])
def test_crop_boxes_follow_torchvisions_law(aspect, scale, ratio):
    n, side = 3000, 64
    width, height = round(side * aspect ** 0.5), round(side / aspect ** 0.5)
    # Every other picture of the batch is upright: each is cropped by its own shape.
    aspects = torch.tensor([aspect, 1 / aspect]).repeat(n)
    boxes = augment.crop_boxes(2 * n, side, scale, ratio, aspects, generator(7)).double()[::2]
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= side
    assert torch.equal(boxes, boxes.round()) and boxes[:, 2:].min() >= 1
    # Theirs, of the original, rounded to pixels of the squashed image; then both in the original's pixels.
    scaling = torch.tensor([height / side, width / side] * 2).double()
    theirs = torchvision_boxes(n, height, width, scale, ratio)
    edges = torch.cat([theirs[:, :2], theirs[:, :2] + theirs[:, 2:]], dim=1).div(scaling).round()
    theirs = torch.cat([edges[:, :2], edges[:, 2:] - edges[:, :2]], dim=1) * scaling
    (t, x, h, w), (tt, xx, hh, ww) = (boxes * scaling).unbind(1), theirs.unbind(1)
    assert ks(h * w, hh * ww) < 1, "area"
    assert ks(w / h, ww / hh) < 1, "shape"
    assert ks(t, tt) < 1 and ks(x, xx) < 1, "place"
    assert ks((t + 0.5) / (height - h + 1), (tt + 0.5) / (height - hh + 1)) < 1, "place within its range"
    assert ks(h - w, hh - ww) < 1, "joint law of the sides"


def test_crop_boxes_of_square_images_are_integers():
    boxes = augment.crop_boxes(500, 33, generator=generator())
    assert torch.equal(boxes, boxes.round())
    assert torch.equal(boxes, augment.crop_boxes(500, 33, aspect=torch.ones(500), generator=generator()))


@pytest.mark.parametrize("aspect, scale, ratio", [
    (1.0, (1.5, 2.0), (3 / 4, 4 / 3)),              # no try fits: all of the image
    (1.0, (1.0, 1.0), (2.0, 3.0)),                  # too wide a shape: all of the width
    (1.0, (1.0, 1.0), (0.2, 0.4)),                  # too high a shape: all of the height
    (4.0, (0.9, 1.0), (3 / 4, 4 / 3)),              # the image itself is wider than any crop may be
])
def test_crop_boxes_fall_back_to_torchvisions_central_crop(aspect, scale, ratio):
    side = 64
    width, height = round(side * aspect ** 0.5), round(side / aspect ** 0.5)
    boxes = augment.crop_boxes(5, side, scale, ratio, torch.full((5,), aspect), generator())
    ours = boxes * torch.tensor([height / side, width / side] * 2)
    # What a box of whole pixels of the squashed image cannot say better.
    assert_close(ours, torchvision_boxes(5, height, width, scale, ratio), atol=0.0 if aspect == 1 else aspect ** 0.5)


def test_random_resized_crop_flips_with_its_probability():
    ramp = torch.linspace(0, 1, 16).expand(1500, 3, 16, 16)
    for p in (0.0, 0.3, 1.0):
        y = augment.random_resized_crop(ramp, 8, flip=p, generator=generator())
        flipped = (y[..., 0] > y[..., -1]).all(2).all(1)
        assert abs(flipped.float().mean().item() - p) < 0.045


def test_center_crop(both):
    x = images(4, 32)
    assert torch.equal(augment.center_crop(x, 32), x)
    assert_close(augment.center_crop(x, 28, fraction=0.875), TF.center_crop(x, [28, 28]))
    assert_close(augment.center_crop(x, 14, fraction=0.875),
                 TF.resize(TF.center_crop(x, [28, 28]), [14, 14], antialias=True))
    # Originals 2:1 and 1:2: their central square is half of the stored width, or of the stored height.
    ours = augment.center_crop(x, 16, aspect=torch.tensor([2.0, 0.5, 1.0, 1.0]))
    theirs = [TF.resized_crop(x[i], *box, [16, 16], antialias=True)
              for i, box in enumerate([(0, 8, 32, 16), (8, 0, 16, 32), (0, 0, 32, 32), (0, 0, 32, 32)])]
    assert_close(ours, torch.stack(theirs))


def test_random_crop_is_a_window_of_the_padded_image_evenly_drawn():
    x = images(3000, 6) + 0.1
    y = augment.random_crop(x, padding=2, generator=generator())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = [padded[:, :, i:i + 6, j:j + 6] for i in range(5) for j in range(5)]
    windows = torch.stack(windows, dim=1)                                       # (N, 25, 3, 6, 6)
    hits = (windows == y[:, None]).flatten(2).all(2)
    assert (hits.sum(1) == 1).all()
    assert (hits.float().mean(0) - 1 / 25).abs().max() < 0.015


def test_rotate_turns_counter_clockwise(both):
    x = images(9)
    k = torch.arange(9) - 2
    assert torch.equal(augment.rotate(x, k), torch.stack([x[i].rot90(int(k[i]), (1, 2)) for i in range(9)]))
    corner = torch.zeros(1, 3, 4, 4)
    corner[..., 0, -1] = 1                                                      # upper right -> upper left
    assert augment.rotate(corner, torch.tensor([1]))[0, 0, 0, 0] == 1


# ------------------------------------------------------------------------------------------- colour
class Chosen:
    """A generator whose numbers in one column are chosen; all others are 0.5."""

    def __init__(self, column, numbers):
        self.column, self.numbers = column, numbers

    def uniforms(self, n, k):
        table = torch.full((n, k), 0.5, dtype=torch.float64)
        table[:, self.column] = self.numbers
        return table


def adjusted(x, name, factor):
    """color_jitter with one operation alone, of these factors: of its range [0, 3], or [-0.5, 0.5] of the hue."""
    which = ["brightness", "contrast", "saturation", "hue"].index(name)
    strengths = [0.0] * 4
    strengths[which] = 0.5 if name == "hue" else 2.0
    numbers = factor.double() + 0.5 if name == "hue" else factor.double() / 3
    return augment.color_jitter(x, *strengths, generator=Chosen(4 if name == "hue" else which, numbers))


@pytest.mark.parametrize("name, low, high", [
    ("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("hue", -0.5, 0.5)])
def test_adjustments_are_torchvisions(name, low, high, both):
    x = images(21)
    x[0] = x[0, :1]                                                             # grey
    x[1] = 0
    x[2] = (x[2] > 0.5).float()                                                # pure colours, ties everywhere
    x[3] = (x[3] * 3).round() / 3
    factor = torch.linspace(low, high, 21).roll(7)
    ours = adjusted(x, name, factor)
    theirs = [getattr(TF, f"adjust_{name}")(x[i], factor[i].item()) for i in range(21)]
    assert_close(ours, torch.stack(theirs))


def test_color_jitter_orders_are_torchvisions_and_evenly_drawn(monkeypatch, both):
    # Every operation gets a constant factor, so that only the order is left: 24 outcomes for one image.
    factors, draws = [1.6, 1.7, 0.2, 0.2], augment.uniforms

    def constant(generator, n, k=1):
        table = draws(generator, n, k)
        table[:, [0, 1, 2, 4]] = torch.tensor([0.8, 0.85, 0.1, 0.7]).double()   # of [0, 2] and, the hue's, [-0.5, 0.5]
        return table

    monkeypatch.setattr(augment, "uniforms", constant)
    n, operations = 4800, [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    x = images(1, 4)
    y = augment.color_jitter(x.expand(n, 3, 4, 4), 1, 1, 1, 0.5, generator=generator(3))
    outcomes = []
    for order in itertools.permutations(range(4)):
        z = x[0]
        for k in order:
            z = operations[k](z, factors[k])
        outcomes.append(z)
    outcomes = torch.stack(outcomes)                                            # (24, 3, 4, 4)
    hits = (y[:, None] - outcomes).abs().flatten(2).amax(2) < 1e-5              # (n, 24)
    assert hits.any(1).all(), "some image had its operations in no order, or twice"
    alike = (outcomes[:, None] - outcomes).abs().flatten(2).amax(2) < 2e-5  # a few orders give the same image
    assert alike.sum() < 48
    expected = n / 24 * alike.sum(1)
    assert (hits.sum(0) - expected).abs().max() < 4.5 * expected.max().sqrt()


@pytest.mark.parametrize("which, name, strength, low, high", [
    (0, "brightness", 0.4, 0.6, 1.4), (0, "brightness", 1.5, 0.0, 2.5),
    (1, "contrast", 0.8, 0.2, 1.8), (2, "saturation", 0.4, 0.6, 1.4), (3, "hue", 0.1, -0.1, 0.1)])
def test_color_jitter_factors_are_uniform_in_torchvisions_ranges(which, name, strength, low, high, both):
    n = 3000
    strengths = [0.0] * 4
    strengths[which] = strength
    x = torch.tensor([[0.30, 0.7], [0.2, 0.1], [0.10, 0.1]]).view(1, 3, 1, 2).expand(n, 3, 1, 2)
    ours = augment.color_jitter(x, *strengths, generator=generator())
    factor = torch.empty(n).uniform_(low, high, generator=generator(1))
    theirs = adjusted(x, name, factor)          # has a parity test of its own
    for channel in range(3):
        assert ks(ours[:, channel, 0, 0], theirs[:, channel, 0, 0]) < 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarize_is_torchvisions(threshold, both):
    x = images(8)
    x[0] = threshold                                                            # the threshold itself is turned
    assert torch.equal(augment.solarize(x, threshold, p=1.0), TF.solarize(x, threshold))
    assert torch.equal(augment.solarize(x, threshold, p=0.0), x)
    y, turned = augment.solarize(x[1:], 0.5, p=0.5, generator=generator(1)), TF.solarize(x[1:], 0.5)
    own = [torch.equal(a, b) or torch.equal(a, c) for a, b, c in zip(y, x[1:], turned, strict=True)]
    assert all(own), "an image is turned as a whole or not at all"


def test_solarize_on_bytes_turns_from_128_as_torchvision_does():
    u = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert_close(augment.solarize(u, p=1.0), TF.solarize(u, 128) / 255, atol=1e-6)


def changed(x, y):
    return (x - y).abs().flatten(1).amax(1) > 1e-5    # as on an accelerator a hue is turned by 0, and may be rounded


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_coins_have_their_probability_and_spare_the_others(p, both):
    x = images(2500, 6)
    for name, y in {
        "flip": augment.random_horizontal_flip(x, p, generator()),
        "grey": augment.random_grayscale(x, p, generator()),
        "jitter": augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p, generator()),
        "blur": augment.gaussian_blur(x, (0.5, 2.0), p, generator=generator()),
        "solarize": augment.solarize(x, 0.5, p, generator()),
    }.items():
        assert abs(changed(x, y).float().mean().item() - p) < 0.04, name
        assert p in (0.0, 1.0) or changed(x, y).any() and not changed(x, y).all(), name
    if p == 1.0:
        assert torch.equal(augment.random_horizontal_flip(x, p), x.flip(3))
        assert_close(augment.random_grayscale(x, p), TF.rgb_to_grayscale(x, num_output_channels=3))


# --------------------------------------------------------------------------------- blur, normalise
@pytest.mark.parametrize("height, width, kernel", [
    (24, 24, 5), (24, 20, 13), (8, 8, 15), (80, 70, 23), (9, 9, 1)])
def test_blur_is_torchvisions(height, width, kernel, both):
    x = torch.rand(10, 3, height, width, generator=generator())
    sigma = torch.linspace(0.1, 3.0, 10).roll(3)
    theirs = [TF.gaussian_blur(x[i], [kernel, kernel], [sigma[i].item()] * 2) for i in range(10)]
    assert_close(augment.blur(x, sigma, kernel), torch.stack(theirs))


def test_gaussian_blur_draws_sigma_uniformly_and_its_default_kernel_holds_the_largest():
    n = 2000
    dot = torch.zeros(1, 3, 21, 21)
    dot[..., 10, 10] = 1
    ours = augment.gaussian_blur(dot.expand(n, 3, 21, 21), (0.5, 2.0), p=1.0, generator=generator())
    sigma = torch.empty(n).uniform_(0.5, 2.0, generator=generator(1))
    wide = augment.blur(dot.expand(n, 3, 21, 21), sigma, 41)
    assert ks(ours[:, 0, 10, 10], wide[:, 0, 10, 10]) < 1
    assert ours[:, 0, 10, 3].count_nonzero() == 0                               # 7 > 3 * 2.0: the kernel ends
    assert ours[:, 0, 10, 4].count_nonzero() > n / 2
    augment.gaussian_blur(images(4, 3), p=1.0)                               # reflects no further than it may


def test_normalize_is_torchvisions_and_channels_last():
    x = images(80, 40)                                                          # more than one chunk
    y = augment.normalize(x, MEAN, STD)
    assert_close(y, TF.normalize(x, MEAN, STD))
    assert y.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- all of them
RANDOM = {
    "random_resized_crop": lambda x, g: augment.random_resized_crop(x, 10, flip=0.5, generator=g),
    "random_horizontal_flip": lambda x, g: augment.random_horizontal_flip(x, generator=g),
    "random_crop": lambda x, g: augment.random_crop(x, generator=g),
    "color_jitter": lambda x, g: augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=g),
    "random_grayscale": lambda x, g: augment.random_grayscale(x, generator=g),
    "gaussian_blur": lambda x, g: augment.gaussian_blur(x, generator=g),
    "solarize": lambda x, g: augment.solarize(x, generator=g),
}


@pytest.mark.parametrize("name", RANDOM)
def test_processes_draw_their_parts_of_what_one_would_draw(name):
    x = images(24, 12)
    whole = RANDOM[name](x, common.Draws(5, 1))
    parts = [RANDOM[name](part, common.Draws(5, 1, rank=rank)) for rank, part in enumerate(x.chunk(3))]
    assert_close(torch.cat(parts), whole, atol=1e-6)
    assert not torch.equal(whole, RANDOM[name](x, common.Draws(5, 2)))


@pytest.mark.parametrize("name", RANDOM)
def test_an_accelerator_gives_a_cpus_views(name, monkeypatch):
    small, large = images(30, 16), (images(5, 80) * 255).byte()
    draw = lambda x: RANDOM[name](x, common.Draws(5, 1))  # noqa: E731
    expected, larger = draw(small), draw(large)
    monkeypatch.setattr(augment, "_all_at_once", lambda x: True)
    assert_close(draw(small), expected)
    assert_close(draw(large), larger, atol=1.001 / 255 if name == "random_resized_crop" else 1e-5)


class Counted(TorchDispatchMode):
    """Counts the operations that are asked for with tensors on the device "meta", and those with host tensors alone."""

    def __init__(self):
        super().__init__()
        self.device = self.host = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = tree_flatten((args, kwargs, out))[0]
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" for leaf in leaves):
            self.device += 1
        else:
            self.host += 1
        return out


@pytest.mark.parametrize("size, blur, device, host", [(32, 0.0, 115, 75), (128, 0.5, 145, 85)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_accelerator_is_asked_for_few_operations(size, blur, device, host, interpolation, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # there is none for "meta"
    x, draws = torch.empty(512, 3, size, size, dtype=torch.uint8, device="meta"), common.Draws(0)

    def view():
        y = augment.random_resized_crop(x, size, (0.2, 1.0), flip=0.5, aspect=torch.ones(512),
                                        interpolation=interpolation, generator=draws)
        y = augment.color_jitter(y, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=draws, inplace=True)
        y = augment.random_grayscale(y, p=0.2, generator=draws, inplace=True)
        y = augment.gaussian_blur(y, p=blur, generator=draws, inplace=True)
        return augment.normalize(y, MEAN, STD)

    view()                                                                      # makes what is made once
    with Counted() as counted:
        assert view().shape == (512, 3, size, size)
    assert counted.device <= device and counted.host <= host


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_fixes_the_draws_and_the_global_seed_does_where_none_is_given(name):
    x = images(30)
    first = RANDOM[name](x, generator(1))
    torch.manual_seed(9)
    assert torch.equal(first, RANDOM[name](x, generator(1)))
    assert not torch.equal(first, RANDOM[name](x, generator(2)))
    g = generator(1)
    RANDOM[name](x, g)
    assert not torch.equal(first, RANDOM[name](x, g))                           # the next batch draws anew
    torch.manual_seed(9)
    first = RANDOM[name](x, None)
    torch.manual_seed(9)
    assert torch.equal(first, RANDOM[name](x, None))


@pytest.mark.parametrize("name", RANDOM)
def test_every_image_has_its_own_draw(name):
    x = images(1, 12).expand(200, 3, 12, 12)
    y = RANDOM[name](x, generator(1)).flatten(1)
    kinds = len(y.unique(dim=0))
    # Flip, grey and solarize have two outcomes, the padded crop 81; elsewhere small crops coincide, or coins say no.
    least = {"random_horizontal_flip": 2, "random_grayscale": 2, "solarize": 2, "random_crop": 60,
             "gaussian_blur": 80, "random_resized_crop": 150, "color_jitter": 140}[name]
    assert kinds >= least


@pytest.mark.parametrize("chunk", [1, 1 << 9, 1 << 30])
def test_results_do_not_depend_on_the_chunks(chunk, monkeypatch):
    x = images(23, 16)
    expected = {name: f(x, generator(4)) for name, f in RANDOM.items()}
    monkeypatch.setattr(augment, "CHUNK_PIXELS", chunk)
    for name, f in RANDOM.items():
        assert_close(f(x, generator(4)), expected[name], atol=1e-6)
    x = images(3, 50)
    boxes, sigma = augment.crop_boxes(3, 50, generator=generator()), torch.tensor([0.5, 1.0, 2.0])
    expected = augment.resized_crop(x, boxes, 40), augment.blur(x, sigma, 9)
    monkeypatch.setattr(augment, "BLOCK", 7)                                    # nor on the blocks
    assert_close(augment.resized_crop(x, boxes, 40), expected[0], atol=1e-6)
    assert_close(augment.blur(x, sigma, 9), expected[1], atol=1e-6)


def test_an_image_in_a_batch_comes_out_as_it_would_alone():
    x = images(9)
    boxes = augment.crop_boxes(9, 24, generator=generator())
    flip, factor = torch.arange(9) % 2 == 0, torch.linspace(0.1, 1.9, 9)
    for f in (lambda s: augment.resized_crop(x[s], boxes[s], 20, flip[s]),
              lambda s: adjusted(x[s], "contrast", factor[s]),
              lambda s: adjusted(x[s], "saturation", factor[s]),
              lambda s: adjusted(x[s], "hue", factor[s] / 4), lambda s: augment.blur(x[s], factor[s], 7)):
        together = f(slice(None))
        assert_close(together, torch.cat([f(slice(i, i + 1)) for i in range(9)]), atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_any_layout_and_size_and_the_input_stays_as_it_was(name, n):
    base = images(n, 14) if n else torch.zeros(0, 3, 14, 14)
    expected = RANDOM[name](base, generator(6))
    assert expected.shape[:2] == (n, 3) and expected.dtype == torch.float32
    for x in (base.contiguous(memory_format=torch.channels_last), base.permute(0, 1, 3, 2).contiguous().mT,
              torch.cat([base, base], 3)[..., :14], base.double(), base.clone()):
        before = x.clone()
        y = RANDOM[name](x, generator(6))
        assert_close(y, expected, atol=1e-6)
        assert torch.equal(x, before)
        if n:
            y.fill_(-1)                                                       # nor is the result a view of it
            assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["random_horizontal_flip", "color_jitter", "random_grayscale", "gaussian_blur",
                                  "solarize"])
def test_in_place_the_result_is_the_same_and_takes_no_other_memory(name):
    jitter = (0.4, 0.4, 0.4, 0.1) if name == "color_jitter" else ()
    x = images(30, 12)
    expected = getattr(augment, name)(x, *jitter, p=0.5, generator=generator(2))
    for given in (x.double(), (x * 255).byte(), x.contiguous(memory_format=torch.channels_last), x[:, :, :, :8]):
        before = given.clone()
        getattr(augment, name)(given, *jitter, p=0.5, generator=generator(2), inplace=True)
        assert torch.equal(given, before), "what has to be converted first is left as it was"
    y = getattr(augment, name)(x, *jitter, p=0.5, generator=generator(2), inplace=True)
    assert torch.equal(y, expected) and y.data_ptr() == x.data_ptr()


def test_a_tensor_of_torchvisions_own_kind_stays_as_it_was():
    x = tv_tensors.Image(images(5, 14))
    before = x.clone()
    for f in RANDOM.values():
        f(x, generator(6)).fill_(-1)
    augment.center_crop(x, 14).fill_(-1)
    assert torch.equal(x, before)


def test_without_hue_no_hue_is_turned():
    x = images(20, 8)
    assert torch.equal(augment.color_jitter(x, 0, 0, 0, 0, generator=generator()), x)


@pytest.mark.parametrize("n", [0, 1, 5, 24, 256])
def test_no_chunk_is_larger_than_it_may_be(n):
    for side in (8, 32, 150, 224, 300):
        x = torch.empty(1, 3, side, side).expand(n, 3, side, side)
        chunks = augment._chunks(n, x)
        assert [i for s in chunks for i in range(s.start, s.stop)] == list(range(n))
        sizes = [s.stop - s.start for s in chunks]
        assert all(size == 1 or size * side * side <= augment.CHUNK_PIXELS for size in sizes)


def test_results_are_float32_under_autocast_too():
    x = images(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for f in RANDOM.values():
            inside = f(x, generator(1))
            with torch.autocast("cpu", enabled=False):
                assert_close(inside, f(x, generator(1)), atol=1e-6)


@pytest.mark.parametrize("call, words", [
    (lambda x: augment.random_grayscale(x[0]), "N, 3, H, W"),
    (lambda x: augment.random_grayscale(x[:, :1]), "N, 3, H, W"),
    (lambda x: augment.color_jitter((x * 9).long(), 1, 1, 1, 0), "uint8"),
    (lambda x: augment.color_jitter(x, 1, 1, 1, 0.7), "hue"),
    (lambda x: augment.random_resized_crop(x[..., :5], 8), "square"),
    (lambda x: augment.random_resized_crop(x, 8, scale=(1.0, 0.2)), "scale"),
    (lambda x: augment.random_resized_crop(x, 8, aspect=torch.ones(3)), "aspect"),
    (lambda x: augment.random_resized_crop(x, 8, interpolation="nearest"), "interpolation"),
    (lambda x: augment.resized_crop(x, torch.zeros(2, 4), 8), "boxes"),
    (lambda x: augment.resized_crop(x, torch.tensor([[0, 0, 9, 5.0]]).expand(4, 4), 8), "boxes"),
    (lambda x: augment.rotate(x, torch.zeros(3)), "k must"),
    (lambda x: augment.gaussian_blur(x, (2.0, 0.1)), "sigma"),
    (lambda x: augment.gaussian_blur(x, kernel_size=4), "kernel_size"),
    (lambda x: augment.gaussian_blur(x, kernel_size=17, p=0.0), "kernel_size"),
    (lambda x: augment.resized_crop(x, torch.tensor([[8, 8, 1e-3, 1e-3]]).expand(4, 4), 8), "boxes"),
    (lambda x: augment.resized_crop(x, torch.tensor([[0, 0, 1e-30, 8]]).expand(4, 4), 8), "boxes"),
    (lambda x: augment.resized_crop(x, torch.tensor([[0, 0, 8.0, 8]]).expand(4, 4), 0), "size"),
    (lambda x: augment.center_crop(x, 8, fraction=1.5), "fraction"),
    (lambda x: augment.normalize(x, (0.5,), STD), "mean"),
    (lambda x: augment.solarize(x, threshold=128), "threshold"),
])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(images(4, 8))


def test_a_compiled_view_is_the_same_is_not_compiled_again_and_never_waits_for_a_gpu(monkeypatch):
    def backend(graph, _):
        assert all(node.target is not torch.tensor for node in graph.graph.nodes), "copied from the host each time"
        return graph

    def view(x, aspect, generator):
        x = augment.random_resized_crop(x, 12, flip=0.5, aspect=aspect, generator=generator)
        x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=generator, inplace=True)
        x = augment.random_grayscale(x, generator=generator, inplace=True)
        return augment.normalize(augment.gaussian_blur(x, generator=generator, inplace=True), MEAN, STD)

    monkeypatch.setattr(augment, "_all_at_once", lambda x: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    x, aspect = (images(8) * 255).byte(), torch.tensor([1.0, 1.5] * 4)
    two_crops = common.TwoCrops(view)
    two_crops.compile()
    for step in range(4):
        compiled = two_crops(x, aspect, common.Draws(0, step))
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
        assert_close(torch.stack(compiled), torch.stack(common.TwoCrops(view)(x, aspect, common.Draws(0, step))))
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_a_coin_that_said_yes_leaves_the_sigmas_uniform():
    dot = torch.zeros(3000, 3, 21, 21)
    dot[..., 10, 10] = 1
    ours = augment.gaussian_blur(dot, (0.5, 2.0), p=0.5, generator=generator())[:, 0, 10, 10]
    sigma = torch.empty(3000).uniform_(0.5, 2.0, generator=generator(1))
    assert ks(ours[ours < 1], augment.blur(dot, sigma, 13)[:, 0, 10, 10]) < 1


def test_a_coin_that_said_yes_leaves_all_orders_of_the_jitter_equally_likely():
    order = augment._jitter_draws(48_000, (0.4,) * 3, 0.1, 0.8, generator())[0].bincount(minlength=25)
    assert (order[:24] - 1600).abs().max() < 4.5 * 40 and abs(order[24] - 9600) < 4.5 * 88  # standard deviations
