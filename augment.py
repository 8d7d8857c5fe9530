"""Random image operations on whole batches, on any device, each image with its own draw.

Images  (N, 3, H, W), uint8 (0-255) or float (0-1); results are new float32 tensors in [0, 1]. With inplace=True an
        operation may write into the float tensor it got, and return that: in a recipe this saves a copy.
        Given the same parameters, each operation equals torchvision's operation on one float tensor to 1e-5; but
        for crops of uint8 pictures of more than SMALL pixels a side on a CPU, which equal torchvision's on uint8
        tensors: to one level, 1/255, which is what two devices may differ by.
Draws   Made on the host, from an optional generator: common.Draws, or a CPU torch.Generator. So a seed gives the same
        views on every device, and nothing here waits for a GPU. An operation gets its numbers in one line, uniforms().
Speed   A CPU works only on the images whose coin said yes, a few at a time, while they are in its cache. An accelerator
        gets one call for all, since calls are what costs time there; a coin that said no picks a no-op.
Limits  No gradient goes back to the images. Where TF32 products are allowed on a GPU, crops, jitter and blur are
        exact to about 1e-3, not 1e-5.

A recipe is a function of a batch and reads like the sentence in the paper:

    def view(images):
        x = random_resized_crop(images, 32, scale=(0.2, 1.0), flip=0.5)
        x = color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, inplace=True)
        x = random_grayscale(x, p=0.2, inplace=True)
        return normalize(x, mean, std)
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F

SMALL = 48              # pixels a side up to which a CPU crops by products of matrices
CHUNK_PIXELS = 1 << 16  # pixels a chunk on a CPU: 64 images of 32x32, one of 224x224; 768 kB as float32
BLOCK = 32              # pixels that a CPU blurs at once along an axis: a blur looks at few others
RGB_TO_GRAY = (0.2989, 0.587, 0.114)                                            # luminance of ITU-R BT.601


# ---------------------------------------------------------------------------------------------- draws
host = torch.compiler.disable  # what is drawn on the host gains nothing from torch.compile; the operations do


@host
def uniforms(generator, n, k=1):
    """k random numbers for each of n images: (n, k) float64 on the host, uniform in [0, 1).

    generator  common.Draws, a CPU torch.Generator, or None: torch's global one.
    """
    if hasattr(generator, "uniforms"):
        return generator.uniforms(n, k)
    return torch.rand(n, k, generator=generator, dtype=torch.float64)


@host
def coins(generator, n, p):
    """(n,) bool on the host: for each of n images whether a coin said yes, with probability p."""
    return (uniforms(generator, n) < p).view(n)


# ---------------------------------------------------------------------------------------------- plumbing
def _check(images, square=False):
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 (0-255) or float (0-1), got {images.dtype}")
    if square and images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square, got {images.shape[2]}x{images.shape[3]} (height x width)")


def _host(values, shape, name, dtype=None):
    """A host tensor of the values, or a ValueError that names what has another shape or is not on the host."""
    values = torch.as_tensor(values, dtype=dtype)
    if values.shape != shape or values.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor {shape}, got {tuple(values.shape)}, {values.device}")
    return values


def _float(images, copy=False):
    """Contiguous float32 in [0, 1]; without a copy where it is that already, unless one is asked for."""
    _check(images)
    x = images.to(torch.float32, copy=copy, memory_format=torch.contiguous_format).contiguous()
    return x.div_(255) if images.dtype == torch.uint8 else x


@host
def send(values, device):
    """Move a small host tensor. From pinned memory the copy is asynchronous: the host does not wait."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "mps")  # MPS might copy only once the memory is reused


def _once(make):
    """Made once for all batches; anew in compiled code, so by the device: a copy from the host would wait for a GPU."""
    kept = functools.lru_cache(maxsize=64)(make)
    return lambda *args: make(*args) if torch.compiler.is_compiling() else kept(*args)


@_once
def _constant(values, device, *shape):
    """A few float32 numbers of a shape."""
    return torch.stack([torch.full((), float(value), device=device) for value in values]).view(shape)


@_once
def _range(begin, end, device):
    """begin, begin + 1, ... below end, float32."""
    return torch.arange(begin, end, device=device, dtype=torch.float32)


def _all_at_once(x):
    """Whether an operation runs once on all images; else only on those that it changes."""
    return x.device.type != "cpu"


def _chunks(n, images):
    """Slices that cover 0..n, about equally long, of images that fit a CPU's cache; one of all images elsewhere."""
    most = n if _all_at_once(images) else max(1, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    step = math.ceil(n / math.ceil(n / most)) if n else 1
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _replace(x, which, function, *values):
    """x[which] = function(x[which], *values[which]) in place; the function may change what it gets.

    x  (N, 3, H, W) float32.  which: (N,) bool on the host.  values: (N, ...), on x's device.
    """
    which = which.nonzero().flatten()
    for rows in (which[s] for s in _chunks(len(which), x)):
        some = x[rows[0]:rows[0] + 1] if len(rows) == 1 else x.index_select(0, rows)    # one large image stays in place
        new = function(some, *(v[rows] for v in values)).expand_as(some)
        if new.data_ptr() != some.data_ptr() or len(rows) > 1:
            x.index_copy_(0, rows, new)
    return x


def _where(x, which, function):
    """function(x) for the images that `which`, (N,) bool on the host, says; the others as they are. May change x."""
    if _all_at_once(x):
        return torch.where(send(which.view(-1, 1, 1, 1), x.device), function(x), x)
    return _replace(x, which, function)


# ------------------------------------------------------------------------------- crop, resize, flip
@host
def crop_boxes(n, side, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), aspect=None, generator=None):
    """Draw n crops by the law of torchvision's RandomResizedCrop.

    side     pixels a side of the stored, square images.
    scale    range of the crop's area as a share of the image's, drawn uniformly.
    ratio    range of the crop's width/height in the original picture, drawn uniformly in the logarithm.
    aspect   (n,) host tensor, original width/height of images that were squashed to the square; None: 1. The law is
             applied to a picture of that shape with as many pixels as are stored; the squashed box's edges are
             rounded to whole pixels.
    returns  (n, 4) float32 on the host: top, left, height, width in stored pixels, whole numbers.
    """
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"scale and ratio must be (low, high) with 0 < low <= high, got {scale} and {ratio}")
    squashed = aspect is not None and set(_host(aspect, (n,), "aspect").tolist()) != {1.0}
    full = torch.full((n, 2), float(side), dtype=torch.float64)                             # height, width
    if squashed:
        root = aspect.double().sqrt()
        full = torch.stack([side / root, side * root], dim=1).round_().clamp_(min=1)

    # Ten tries at an area and a shape; the first that fits inside the image is taken.
    area, shape, place = uniforms(generator, n, 22).split([10, 10, 2], dim=1)
    whole = full.prod(1, keepdim=True)
    area = torch.addcmul(whole * scale[0], whole, area, value=scale[1] - scale[0])          # (n, 10)
    shape = torch.pow(ratio[1] / ratio[0], shape).mul_(ratio[0])
    crops = torch.stack([area / shape, area * shape], dim=2).sqrt_().round_().clamp_(min=1)  # (n, 10, 2)
    fits, first = (crops <= full[:, None]).all(2).max(1)        # (n,): whether any fits, and the first that does
    crop = crops[torch.arange(n), first]                                                    # (n, 2)
    corner = torch.addcmul(place, place, full - crop).floor_()                     # of full - crop + 1 places
    if not fits.all():
        # An eleventh try that always fits: the largest central crop whose shape lies within `ratio`.
        largest = torch.stack([full[:, 1] / ratio[0], full[:, 0] * ratio[1]], dim=1).round_().clamp_(min=1)
        crop = torch.where(fits[:, None], crop, largest.minimum(full))
        corner = torch.where(fits[:, None], corner, ((full - crop) / 2).floor_())
    if squashed:
        begin, end = (torch.stack([corner, corner + crop]) * (side / full)).round_()
        corner = begin.clamp_(max=side - 1)
        crop = end.maximum(corner + 1) - corner
    return torch.cat([corner, crop], dim=1).float()                                         # (n, 4)


def _crop(images, boxes, size, interpolation):
    """resized_crop() of boxes that fit; one of negative width begins at its right edge, so that it is mirrored."""
    n, side = len(images), images.shape[2]
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    # Zeros for MPS alone, whose baddbmm takes up NaNs even with beta=0 (torch up to 2.13, pytorch/pytorch#187521).
    new = torch.zeros if images.device.type == "mps" else torch.empty
    out = new(n, 3, size, size, device=images.device)
    function = _crop_together if side <= SMALL or _all_at_once(images) else _crop_singly
    with torch.autocast(images.device.type, enabled=False):                 # bf16's 8 bits would spoil the picture
        for s in _chunks(n, images):
            function(images[s], boxes[s], out[s], interpolation)
    return out.clamp_(0, 1) if interpolation == "bicubic" else out


def _crop_singly(images, boxes, out, interpolation):
    """torch's own kernel, picture by picture: for larger pictures, where it looks at fewer pixels."""
    size, crops = out.shape[2:], []
    for image, (top, left, height, width) in zip(images, boxes.int().tolist(), strict=True):
        crop = image[None, :, top:top + height, min(left, left + width):max(left, left + width)]
        if images.dtype == torch.uint8:
            crop = crop.contiguous(memory_format=torch.channels_last)                       # its fast kernel's layout
        crop = F.interpolate(crop, size, mode=interpolation, antialias=True)
        crops.append(crop.flip(3) if width < 0 else crop)
    out.copy_(torch.cat(crops))
    if images.dtype == torch.uint8:
        out.div_(255)


def _crop_together(images, boxes, out, interpolation):
    """Crop, resize and flip are linear on each axis, so that one matrix an axis does all: Wy @ image @ Wx^T.

    Output pixel i looks at the point c = start + (i + 1/2) * step, step = length / size. A stored pixel j,
    its centre at j + 1/2, counts by its distance |j + 1/2 - c|, measured in steps when the image shrinks (the
    filter widens and misses no pixel: antialiasing) and in stored pixels when it grows; outside the crop not at all.
    """
    n, side, size, device = len(images), images.shape[2], out.shape[2], images.device
    start, length = send(boxes.view(n, 2, 2, 1, 1), device).unbind(1)                       # (n, 2, 1, 1)
    step = length / size
    i = _range(0.5, size, device)[:, None]                                                  # (size, 1)
    j = _range(0.5, side, device) - start                                                   # (n, 2, 1, side)
    t = (j - i * step).div_(step.abs().clamp_(min=1)).abs_()                                # (n, 2, size, side)
    w = 1 - t
    if interpolation == "bilinear":
        w.clamp_(min=0)                                                                     # 1 - t up to t = 1
    else:
        # Keys' cubic, a = -1/2: 1.5 t^3 - 2.5 t^2 + 1 on [0, 1], -0.5 t^3 + 2.5 t^2 - 4 t + 2 on [1, 2], 0 beyond. With
        # p = max(0, 2 - t) and q = max(0, 1 - t), twice that is (1 - t) (p^2 + q (2 - 4 q)).
        p, q = (w + 1).clamp_(min=0), w.clamp(min=0)
        w.mul_((p * p).addcmul_(q, torch.rsub(q, 2, alpha=4)))
    w.mul_(length / j > 1)                              # 0 < j < length, or both negative (mirrored): within the crop
    wy, wx = w.div_(w.sum(3, keepdim=True)).unbind(1)                                       # (n, size, side)
    rows = images.to(torch.float32).contiguous().view(n, 3 * side, side)
    rows = torch.bmm(rows, wx.mT).view(3 * n, side, size)
    wy, out = wy.repeat(1, 3, 1).view(3 * n, size, side), out.view(3 * n, size, size)
    torch.baddbmm(out, wy, rows, beta=0, alpha=1 / 255 if images.dtype == torch.uint8 else 1, out=out)


def resized_crop(images, boxes, size, flip=None, interpolation="bilinear"):
    """Crop a box out of each image and resize it to size x size, antialiased; mirror some of them.

    boxes          (N, 4) host tensor: top, left, height, width in whole pixels.
    flip           (N,) bool host tensor: mirror left-right; None: none.
    interpolation  "bilinear", or "bicubic" (clamped to [0, 1]).
    returns        (N, 3, size, size) float32.
    """
    _check(images, square=True)
    boxes, side = _host(boxes, (len(images), 4), "boxes", torch.float32), images.shape[2]
    corner, length = boxes.split(2, dim=1)
    if not ((corner >= 0) & (length >= 1) & (corner + length <= side)).all() or not boxes.equal(boxes.round()):
        raise ValueError(f"boxes must be whole pixels within the {side}x{side} images, and not empty")
    return _crop(images, boxes if flip is None else _mirrored(boxes, flip), size, interpolation)


MIRROR = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, -1]])       # left + width, -width


@host
def _mirrored(boxes, which):
    """Boxes (n, 4); those that `which` (n,) says begin at their right edge and have a negative width."""
    return torch.where(_host(which, (len(boxes),), "flip")[:, None], boxes.mm(MIRROR), boxes)


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0, aspect=None,
                        interpolation="bilinear", generator=None):
    """torchvision's RandomResizedCrop, then RandomHorizontalFlip(flip), in one step. See crop_boxes.

    images (N, 3, S, S) -> (N, 3, size, size) float32; flip is a probability; aspect (N,) host tensor or None.
    """
    _check(images, square=True)
    boxes = crop_boxes(len(images), images.shape[2], scale, ratio, aspect, generator)
    if flip > 0:
        boxes = _mirrored(boxes, coins(generator, len(images), flip))
    return _crop(images, boxes, size, interpolation)


def center_crop(images, size, aspect=None, fraction=1.0):
    """The view for evaluation: the central square of the original picture, resized to size x size.

    aspect    (N,) host tensor, original width/height of images squashed to the square; None: 1.
    fraction  side of the central square, as a share of the original's shorter side.
    returns   (N, 3, size, size) float32; the same pixels where nothing is cropped or resized.
    """
    _check(images, square=True)
    n, side = len(images), images.shape[2]
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    aspect = _host(torch.ones(n) if aspect is None else aspect, (n,), "aspect", torch.float32)
    if size == side and fraction == 1 and bool((aspect == 1).all()):
        return _float(images, copy=True)
    # Of a picture a wide and 1 high, the square takes min(a, 1) of the height and min(1/a, 1) of the width.
    share = torch.stack([aspect.clamp(max=1), (1 / aspect).clamp(max=1)], dim=1)            # (N, 2)
    length = (side * fraction * share).round().clamp(min=1)
    return _crop(images, torch.cat([((side - length) / 2).floor(), length], dim=1), size, "bilinear")


def random_horizontal_flip(x, p=0.5, generator=None, inplace=False):
    """Mirror each image left-right with probability p."""
    heads = coins(generator, len(x), p)
    return _where(_float(x, copy=not inplace), heads, lambda x: x.flip(3))


def random_crop(x, padding=4, generator=None):
    """torchvision's RandomCrop(side, padding): shift each image by up to `padding` pixels, filling with 0."""
    x = _float(x)
    top, left = (uniforms(generator, len(x), 2) * (2 * padding + 1)).long().unbind(1)
    # All shifted images exist as views of the padded ones; pick one each.
    shifts = F.pad(x, [padding] * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # (N, 3, 2p+1, 2p+1, H, W)
    return shifts[torch.arange(len(x), device=x.device), :, send(top, x.device), send(left, x.device)]


def rotate(x, k):
    """Turn each (square) image counter-clockwise by k quarter turns, as torch.rot90; k (N,) host integers."""
    _check(x, square=True)
    k, x = _host(k, (len(x),), "k"), _float(x, copy=True)
    for turns in (1, 2, 3):
        x = _where(x, k % 4 == turns, functools.partial(torch.rot90, k=turns, dims=(2, 3)))
    return x


# ------------------------------------------------------------------------------------------- colour
# Brightness, contrast and saturation are one formula, so that each image can do a different one:
# clamp(factor * x + (1 - factor) * base), where base is black, the mean of the grey image, or the grey image. All three
# are linear in rgb: BASES @ (r, g, b, mean r, mean g, mean b). The fourth base is that of nothing to be done.
BRIGHTNESS, CONTRAST, SATURATION, NOTHING, HUE, STILL = range(6)
EYE = torch.eye(3, 6)
BASES = torch.zeros(4, 3, 6)
BASES[SATURATION, :, :3] = BASES[CONTRAST, :, 3:] = torch.tensor(RGB_TO_GRAY)
# Of the 24 orders of color_jitter, and of a last one for images whose coin said no: the blends in three slots before
# the hue and in three after it; whether the hue is turned or stays; and its place (4: none).
ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
PLACES = [order.index(HUE) for order in ORDERS]
SLOTS = torch.tensor([[*order[:h], *[NOTHING] * (3 - h), *order[h + 1:], *[NOTHING] * h, HUE]
                      for order, h in zip(ORDERS, PLACES, strict=True)] + [[NOTHING] * 6 + [STILL]])    # (25, 7)
SLOT_BASES, HUE_PLACE = BASES[SLOTS[:, :6]], torch.tensor([*PLACES, 4])                     # (25, 6, 3, 6), (25,)


def _blend(x, own, mean, out):
    """out = a blend of x, both (n, 3, pixels), by the two halves of its matrices, (n, 3, 3) each. Returns out."""
    if _all_at_once(x) or mean.any():            # the mean over the image, which only contrast looks at
        torch.baddbmm(torch.bmm(mean, x.mean(2, keepdim=True)), own, x, out=out)
    else:
        torch.bmm(own, x, out=out)
    return out.clamp_(0, 1)


def _hue(x, shift, out):
    """out = the images of x (n, 3, pixels) with their hues turned; HSV's value and saturation stay. Returns out.

    shift  (n, 1, 1), of a circle of length 6; at most half of it.

    This is HSV without its six cases. The hues H lie on a circle of length 6: red at 0, green at 2, blue at
    4. Stretch a pixel's colours to u, from 0 (the least) to 1 (the greatest): u_r is 1 within a distance of 1
    from red, falls to 0 at a distance of 2, and stays 0; u_g and u_b do so around their places. Backwards:
    on the way from red to its opposite, the greater of u_g and u_b rises to 1, then u_r falls to 0, then the
    lesser rises to 1, each over a distance of 1. So, on green's side of red if g > b, else on blue's,
        |H| = u_g + u_b + 1 - u_r = 1 + (g + b - r - low) / (high - low).
    """
    r, g, b = x.split(1, dim=1)                                                     # views, each (n, 1, pixels)
    low = x.amin(1, keepdim=True)
    chroma = x.amax(1, keepdim=True).sub_(low).clamp_(min=1e-12)                    # grey has no hue; avoid 0 / 0
    h = (g + b).sub_(r).sub_(low).div_(chroma).add_(1)
    h.copysign_(g - b).add_(shift)
    h.sub_((h / 6).floor_(), alpha=6)                                               # into [0, 6)
    # Forwards: u_g = clamp(2 - |h - 2|), u_b = clamp(2 - |h - 4|), and u_r, where the circle ends, clamp(|h - 3| - 1).
    centre, sign, shift = (_constant(v, x.device, 3, 1) for v in ((3, 2, 4), (1, -1, -1), (-1, 2, 2)))
    u = (h - centre).abs_().mul_(sign).add_(shift).clamp_(0, 1)                     # (n, 3, pixels)
    return torch.addcmul(low, u, chroma, out=out)


def _jitter(before, after, turns, x, matrices, shift):
    """Of color_jitter: `before` blends, the hue (if it turns at all), `after` blends; x (n, 3, H, W) is used up.

    matrices (n, 6, 3, 6), as SLOTS has the blends; shift (n, 1, 1) as for _hue.
    """
    shape, x, (own, mean) = x.shape, x.flatten(2), (half.unbind(1) for half in matrices.split(3, dim=3))
    spare = torch.empty_like(x)
    for slot in (*range(before), *[None] * turns, *range(3, 3 + after)):
        x, spare = _hue(x, shift, spare) if slot is None else _blend(x, own[slot], mean[slot], spare), x
    return x.view(shape)


def color_jitter(x, brightness, contrast, saturation, hue, p=1.0, generator=None, inplace=False):
    """torchvision's RandomApply([ColorJitter(brightness, contrast, saturation, hue)], p), image by image.

    The first three factors are uniform in [max(0, 1 - strength), 1 + strength], the hue's in [-hue, hue];
    each image has its own order of the four operations, all 24 equally likely. Returns (N, 3, H, W) float32.
    """
    x = _float(x, copy=not inplace)
    if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
        raise ValueError("brightness, contrast and saturation must be >= 0, and hue within [0, 0.5], got "
                         f"{brightness}, {contrast}, {saturation}, {hue}")
    order, *values = _jitter_draws(len(x), (brightness, contrast, saturation), hue, p, generator)
    if p == 0:
        return x
    with torch.autocast(x.device.type, enabled=False):
        if _all_at_once(x):
            return _jitter(3, 3, hue > 0, x, *(send(v, x.device) for v in values))
        for place in range(4):              # images whose hue comes at the same place go together, without empty slots
            _replace(x, HUE_PLACE[order] == place, functools.partial(_jitter, place, 3 - place, hue > 0), *values)
    return x


@host
def _jitter_draws(n, strengths, hue, p, generator):
    """Of each image its order, (n,) rows of SLOTS, and what _jitter wants: matrices (n, 6, 3, 6), shift (n, 1, 1)."""
    u, coin = uniforms(generator, n, 7).float().split([6, 1], dim=1)
    # A number below p is uniform in [0, p): it is the coin and chooses one of the 24 orders. The coin says no: 24.
    order = (coin * (24 / max(p, 1e-9))).long().clamp_(max=24)[:, 0]
    low = torch.tensor([*(max(0.0, 1 - s) for s in strengths), 1.0, -6 * hue, 0.0])         # of BRIGHTNESS ... STILL
    high = torch.tensor([*(1.0 + s for s in strengths), 1.0, 6 * hue, 0.0])
    factors, shift = torch.lerp(low, high, u).gather(1, SLOTS[order]).view(-1, 7, 1, 1).split([6, 1], dim=1)
    return order, torch.lerp(SLOT_BASES[order], EYE, factors), shift[:, 0]


def random_grayscale(x, p=0.2, generator=None, inplace=False):
    """Replace each image, with probability p, by its luminance."""
    luminance = _constant(RGB_TO_GRAY, x.device, 3, 1, 1)
    heads = coins(generator, len(x), p)
    return _where(_float(x, copy=not inplace), heads, lambda x: (x * luminance).sum(1, keepdim=True))


def solarize(x, threshold=0.5, p=0.2, generator=None, inplace=False):
    """Turn pixels >= threshold into 1 - pixel, each channel by itself, in each image with probability p.

    threshold  in [0, 1]; 128 of 255 on uint8 is 0.5 here. What earlier operations gave is not rounded to 255ths first.
    Source     BYOL (appendix B) and Barlow Twins: p = 0 for one view, 0.2 for the other.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    heads = coins(generator, len(x), p)
    return _where(_float(x, copy=not inplace), heads, lambda x: torch.where(x >= threshold, 1 - x, x))


# --------------------------------------------------------------------------------- blur, normalise
def blur(x, sigma, kernel_size):
    """Gaussian blur with reflected edges, each image its own width.

    x            (N, 3, H, W).  sigma: (N,) on x's device, in pixels; 0: not at all.
    kernel_size  odd number of taps; at most 2 * side - 1, for a reflection reaches no further than the image.
    returns      (N, 3, H, W) float32.

    A blur is linear on each axis, and moved by a pixel it is the same: a matrix of `block` rows, row i with its taps at
    columns i to i + 2 * radius, does for one block of output pixels after the other.
    """
    x = _float(x)
    (n, _, height, width), radius = x.shape, kernel_size // 2
    t = _range(-radius, radius + 1, x.device)                                               # (taps,)
    taps = (-0.5 * (t / sigma.clamp(min=1e-6)[:, None]) ** 2).softmax(dim=1)                # (n, taps)
    taps = F.threshold(taps, 1e-12, 0.0)       # denormal numbers would slow a CPU's products down fifteenfold
    block = min(height, width) if _all_at_once(x) else min(height, width, BLOCK)
    reach = block + 2 * radius
    matrix = F.pad(taps, (block - 1, block - 1)).unfold(1, reach, 1).flip(1)                # (n, block, reach)
    lines = F.pad(x, [radius] * 4, mode="reflect").view(n, -1, width + 2 * radius)
    wide = x.new_empty(n, lines.shape[1], width)
    for i in (*range(0, width - block, block), width - block):
        torch.bmm(lines[:, :, i:i + reach], matrix.mT, out=wide[:, :, i:i + block])
    wide, matrix = wide.view(3 * n, -1, width), matrix.repeat(1, 3, 1).view(3 * n, block, reach)
    out = x.new_empty(3 * n, height, width)
    for i in (*range(0, height - block, block), height - block):
        torch.bmm(matrix, wide[:, i:i + reach], out=out[:, i:i + block])
    return out.view(n, 3, height, width)


def gaussian_blur(x, sigma=(0.1, 2.0), p=0.5, kernel_size=None, generator=None, inplace=False):
    """Blur each image with probability p, by a sigma of its own, uniform in the range, in pixels.

    kernel_size  None: out to three times the largest sigma on either side, or to the edge of the image.
    """
    x, most = _float(x, copy=not inplace), 2 * min(x.shape[2:])
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma must be (low, high) with 0 < low <= high, got {sigma}")
    if kernel_size is None:
        kernel_size = 2 * min(math.ceil(3 * sigma[1]), most // 2 - 1) + 1
    if kernel_size % 2 != 1 or not 0 < kernel_size < most:
        raise ValueError(f"kernel_size must be odd and less than {most}, got {kernel_size}")
    u, blurred = uniforms(generator, len(x), 2), functools.partial(blur, kernel_size=kernel_size)
    if p == 0:
        return x
    coin, u = u.float().unbind(1)
    sigmas = torch.where(coin < p, sigma[0] + (sigma[1] - sigma[0]) * u, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        return blurred(x, send(sigmas, x.device)) if _all_at_once(x) else _replace(x, sigmas > 0, blurred, sigmas)


def normalize(x, mean, std):
    """(x - mean) / std for each channel; mean and std (3,), for x in [0, 1]. Returns channels_last."""
    _check(x)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must be 3 numbers each, got {mean} and {std}")
    mean, std = (_constant(tuple(map(float, v)), x.device, 3, 1, 1) for v in (mean, std))
    out = torch.empty(x.shape, device=x.device, memory_format=torch.channels_last)
    for s in _chunks(len(x), x):
        out[s] = (_float(x[s]) - mean).div_(std)
    return out


