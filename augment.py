"""Random image operations on whole batches, on any device, each image with its own draw.

Images  (N, 3, H, W), uint8 (0-255) or float (0-1); results are new float32 tensors in [0, 1]. With inplace=True an
        operation may write into the float tensor it got, and return that: in a recipe this saves a copy.
        Given the same parameters, each operation equals torchvision's operation on one float tensor to 1e-5.
Draws   Made on the host, from an optional CPU torch.Generator, and then moved to the images. So a seed gives the same
        views on every device, images whose coin said no are skipped, and nothing here waits for a GPU.
Limits  No gradient goes back to the images. Where TF32 products are allowed on a GPU, crops, blurs and jitter are
        exact to about 1e-3, not 1e-5.

A recipe is a function of a batch and reads like the sentence in the paper:

    def view(images):
        x = random_resized_crop(images, 32, scale=(0.2, 1.0), flip=0.5)
        x = color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, inplace=True)
        x = random_grayscale(x, p=0.2, inplace=True)
        return normalize(x, mean, std)
"""

import functools
import math

import torch
import torch.nn.functional as F

CHUNK_PIXELS = 1 << 16    # pixels a chunk on a CPU: 64 images of 32x32, one of 224x224; 768 kB as float32
CHUNK_PIXELS_GPU = 1 << 22  # elsewhere: enough to keep a GPU busy, few enough to bound the memory in between
BLOCK = 64                # at most so many output pixels at once, where a matrix is a narrow band
RGB_TO_GRAY = (0.2989, 0.587, 0.114)                                            # luminance of ITU-R BT.601


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


def send(host, device):
    """Move a small host tensor. From pinned memory the copy is asynchronous: the host does not wait."""
    if device.type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Share(torch.Generator):
    """A generator for process `rank` of `world`, each of which holds an equal part of every batch.

    What draw() takes from it is this process's part of what one process would draw for the whole batch.
    """

    rank, world = 0, 1

    def of(self, rank, world):
        self.rank, self.world = rank, world
        return self


def draw(random, shape, generator, dim=0, **kind):
    """random(shape, generator=generator, **kind), for example of torch.rand; images lie along `dim`."""
    rank, n = getattr(generator, "rank", 0), shape[dim]
    shape = [*shape[:dim], n * getattr(generator, "world", 1), *shape[dim + 1:]]
    return random(shape, generator=generator, **kind).narrow(dim, rank * n, n)


def _uniform(n, low, high, generator):
    return draw(lambda shape, generator: torch.empty(shape).uniform_(low, high, generator=generator), (n,), generator)


def _heads(n, p, generator):
    """Toss a coin for each image: the host indices (M,) of those that said yes."""
    return (draw(torch.rand, (n,), generator) < p).nonzero().flatten()


def _chunks(n, images):
    """Slices that cover 0..n, about equally long, each of no more images than a chunk may have pixels."""
    limit = CHUNK_PIXELS if images.device.type == "cpu" else CHUNK_PIXELS_GPU
    most = max(1, limit // (images.shape[2] * images.shape[3]))
    step = math.ceil(n / math.ceil(n / most)) if n else 1
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _replace(x, which, function, *values):
    """x[which] = function(copy of x[which], *values); x float32, which (M,) on the host, values (M, ...). Returns x."""
    which = send(which, x.device)
    with torch.autocast(x.device.type, enabled=False):               # bf16's 8 bits would spoil the picture
        for s in _chunks(len(which), x):
            x.index_copy_(0, which[s], function(x.index_select(0, which[s]), *(v[s] for v in values)))
    return x


def _block(size):
    """How many rows of a banded matrix of `size` rows make a block: all the same, but perhaps for the last."""
    return math.ceil(size / math.ceil(size / BLOCK))


def _two_products(out, wy, first_y, x, wx, first_x):
    """out[n, c] = Wy[n] @ x[n, c] @ Wx[n]^T, for matrices that are narrow bands.

    out      (n, 3, h, w), written to.  x (n, 3, H, W).
    wy, wx   (n, blocks, block, band): of each block of rows only a band of columns, all others are zero. Rows
             beyond h (or w) do not count.
    first_y, first_x  for each block the row (column) of x where its band begins.
    """
    n, _, height, width = x.shape
    wide = torch.empty(n, 3 * height, out.shape[3], device=x.device)
    lines = x.reshape(n, 3 * height, width)
    for b, j in enumerate(first_x):
        columns = wide[:, :, b * wx.shape[2]:(b + 1) * wx.shape[2]]
        w = wx[:, b, :columns.shape[2]]
        torch.bmm(lines[:, :, j:j + w.shape[2]], w.mT, out=columns)                         # (n, 3H, block)
    wide, out = wide.view(3 * n, height, -1), out.view(3 * n, *out.shape[2:])
    for b, j in enumerate(first_y):
        rows = out[:, b * wy.shape[2]:(b + 1) * wy.shape[2]]
        w = wy[:, b, None, :rows.shape[1]].expand(-1, 3, -1, -1).flatten(0, 1)              # (3n, block, band)
        torch.bmm(w, wide[:, j:j + w.shape[2]], out=rows)                                   # (3n, block, w)


# ------------------------------------------------------------------------------- crop, resize, flip
def crop_boxes(n, side, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), aspect=None, generator=None):
    """Draw n crops by the law of torchvision's RandomResizedCrop.

    side     pixels a side of the stored, square images.
    scale    range of the crop's area as a share of the image's, drawn uniformly.
    ratio    range of the crop's width/height in the original picture, drawn uniformly in the logarithm.
    aspect   (n,) host tensor, original width/height of images that were squashed to the square; None: 1. The law is
             applied to a picture of that shape with as many pixels as are stored, and its box squashed likewise.
    returns  (n, 4) float32 on the host: top, left, height, width in stored pixels; integers if aspect is 1.
    """
    if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"scale and ratio must be (low, high) with 0 < low <= high, got {scale} and {ratio}")
    root = _host(torch.ones(n) if aspect is None else aspect, (n,), "aspect").double().sqrt()
    full = torch.stack([side / root, side * root], dim=1).round().clamp(min=1)              # (n, 2): height, width

    # Ten tries at an area and a shape; the first that fits inside the image is taken.
    tries = draw(torch.rand, (2, n, 10), generator, dim=1, dtype=torch.float64)
    area = full.prod(1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * tries[0])       # (n, 10)
    shape = (math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * tries[1]).exp()
    crops = torch.stack([area / shape, area * shape], dim=2).sqrt().round()                 # (n, 10, 2)
    fits = ((crops > 0) & (crops <= full[:, None])).all(2)

    # An eleventh try that always fits: the largest central crop whose shape lies within `ratio`.
    largest = torch.stack([full[:, 1] / ratio[0], full[:, 0] * ratio[1]], dim=1).round().clamp(min=1).minimum(full)
    first = (fits.cumsum(1) == 0).sum(1)                        # 0-9: the first that fits; 10: none did
    crop = torch.cat([crops, largest[:, None]], dim=1)[torch.arange(n), first]              # (n, 2)

    place = draw(torch.rand, (2, n), generator, dim=1, dtype=torch.float64).T
    corner = torch.where(first[:, None] < 10, place * (full - crop + 1), (full - crop) / 2).floor()
    return (torch.cat([corner, crop], dim=1) * (side / full).repeat(1, 2)).float()          # (n, 4)


def _bands(start, length, sides, size, flip, reach):
    """The stored pixels that each block of output pixels looks at, on both axes: first and last + 1, (N, 2, blocks).

    start, length, flip  (N, 2, 1): as _resize_weights has them.  sides (2, 1): height and width of the images.
    reach                of the filter, in steps or pixels.
    """
    step = length / size                                                                    # (N, 2, 1)
    i = torch.arange(0, size, _block(size))                                                 # (blocks,)
    k = (i + _block(size)).clamp(max=size)
    i, k = torch.where(flip, size - k, i), torch.where(flip, size - i, k)                   # (N, 2, blocks)
    margin = reach * step.clamp(min=1)
    first = torch.maximum(start + (i + 0.5) * step - margin, start).floor()
    end = torch.minimum(start + (k - 0.5) * step + margin, start + length).ceil()
    return first.int(), end.minimum(sides).int()


def _resize_weights(start, length, first, width, size, flip, interpolation):
    """The matrices that crop and resize both axes, as _two_products wants them: (n, 2, blocks, block, width).

    start, length  (n, 2, 1, 1, 1) the crop, in pixels of the stored image: top and left, height and width.
    first          (2, blocks, 1, 1) the stored pixel where each block's band begins; it is `width` pixels wide.
    flip           (n, 2, 1, 1, 1) bool, mirror the output on this axis.

    Output pixel i looks at the point c = start + (i + 1/2) * step, step = length / size. A stored pixel j,
    its centre at j + 1/2, counts by its distance |j + 1/2 - c|, measured in steps when the image shrinks (the
    filter widens and misses no pixel: antialiasing) and in stored pixels when it grows. Pixels outside the
    crop do not count; those that the edge of a fractional crop cuts count by their share inside.
    """
    i = (torch.arange(first.shape[1] * _block(size), device=start.device) + 0.5).view(first.shape[1], -1, 1)
    i = torch.where(flip, size - i, i)                                                  # (n, 2, blocks, block, 1)
    j = torch.arange(width, device=start.device) + 0.5 + first - start                  # (n, 2, blocks, 1, width)
    step = length / size
    inside = (length + 0.5 - j).clamp_(0, 1).mul_((j + 0.5).clamp_(0, 1))
    t = (j - i * step).div_(step.clamp(min=1)).abs_()                               # (n, 2, blocks, block, width)
    if interpolation == "bilinear":
        w = t.neg_().add_(1).clamp_(min=0)                                                 # 1 - t up to t = 1
    else:
        # Keys' cubic, a = -1/2: 1.5 t^3 - 2.5 t^2 + 1 on [0, 1], then -0.5 t^3 + 2.5 t^2 - 4 t + 2 on [1, 2].
        # Both are 0 at the end of their range that the clamp holds them at, so that their sum is the filter.
        t1, t2 = t.clamp(max=1), t.clamp(1, 2)
        w = (1.5 * t1 - 2.5) * t1 * t1 + 1 + ((-0.5 * t2 + 2.5) * t2 - 4) * t2 + 2
    w.mul_(inside)
    return w.div_(w.sum(4, keepdim=True))


def resized_crop(images, boxes, size, flip=None, interpolation="bilinear"):
    """Crop a box out of each image and resize it to size x size, antialiased; mirror some of them.

    boxes          (N, 4) host tensor: top, left, height, width in pixels; fractions are allowed.
    flip           (N,) bool host tensor: mirror left-right; None: none.
    interpolation  "bilinear", or "bicubic" (clamped to [0, 1]).
    returns        (N, 3, size, size) float32.

    Crop, resize and flip are linear on each axis, so that one matrix an axis does all: Wy @ image @ Wx^T.
    """
    _check(images)
    n, _, height, width = images.shape
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
    boxes = _host(boxes, (n, 4), "boxes", torch.float32)
    start, length = boxes[:, :2, None], boxes[:, 2:, None]                                  # (N, 2, 1)
    sides = torch.tensor([height, width])[:, None]
    if not bool(((start >= 0) & (length >= 1e-3) & (start + length <= sides + 5e-4)).all()):
        raise ValueError(f"boxes must lie within the {height}x{width} images and not be empty")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    flips = torch.zeros(n, 2, 1, dtype=torch.bool)
    if flip is not None:
        flips[:, 1, 0] = _host(flip, (n,), "flip")
    first, end = _bands(start, length, sides, size, flips, 1 if interpolation == "bilinear" else 2)

    out = torch.empty(n, 3, size, size, device=images.device)
    start, length, flips = (send(v, images.device)[..., None, None] for v in (start, length, flips))
    with torch.autocast(images.device.type, enabled=False):
        for s in _chunks(n, images):
            # One band a block that holds those of all images of the chunk; all blocks' bands have the same width.
            begin, stop = first[s].amin(0), end[s].amax(0)                                  # (2, blocks)
            width = (stop - begin).amax(1, keepdim=True)                                    # (2, 1)
            begin = begin.minimum(stop.amax(1, keepdim=True) - width)
            (rows, columns), ((high,), (wide,)) = begin.tolist(), width.tolist()
            begin = send(begin, images.device)[..., None, None]                             # (2, blocks, 1, 1)
            w = _resize_weights(start[s], length[s], begin, max(high, wide), size, flips[s], interpolation)
            wy, wx = w[:, 0, ..., :high], w[:, 1, ..., :wide]                           # (n, blocks, block, band)
            if images.dtype == torch.uint8:
                wy.div_(255)
            y0, x0 = min(rows), min(columns)
            x = images[s, :, y0:max(rows) + high, x0:max(columns) + wide]
            x = x.to(torch.float32, memory_format=torch.contiguous_format)
            _two_products(out[s], wy, [j - y0 for j in rows], x, wx, [j - x0 for j in columns])
    return out.clamp_(0, 1) if interpolation == "bicubic" else out


def random_resized_crop(images, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0, aspect=None,
                        interpolation="bilinear", generator=None):
    """torchvision's RandomResizedCrop, then RandomHorizontalFlip(flip), in one step. See crop_boxes.

    images (N, 3, S, S) -> (N, 3, size, size) float32; flip is a probability; aspect (N,) host tensor or None.
    """
    _check(images, square=True)
    boxes = crop_boxes(len(images), images.shape[2], scale, ratio, aspect, generator)
    flips = draw(torch.rand, (len(images),), generator) < flip if flip > 0 else None
    return resized_crop(images, boxes, size, flips, interpolation)


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
    h, w = side * fraction * aspect.clamp(max=1), side * fraction * (1 / aspect).clamp(max=1)
    return resized_crop(images, torch.stack([(side - h) / 2, (side - w) / 2, h, w], dim=1), size)


def random_horizontal_flip(x, p=0.5, generator=None, inplace=False):
    """Mirror each image left-right with probability p."""
    return _replace(_float(x, copy=not inplace), _heads(len(x), p, generator), lambda x: x.flip(3))


def random_crop(x, padding=4, generator=None):
    """torchvision's RandomCrop(side, padding): shift each image by up to `padding` pixels, filling with 0."""
    x = _float(x)
    top, left = draw(functools.partial(torch.randint, 0, 2 * padding + 1), (2, len(x)), generator, dim=1)
    # All shifted images exist as views of the padded ones; pick one each.
    shifts = F.pad(x, [padding] * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # (N, 3, 2p+1, 2p+1, H, W)
    return shifts[torch.arange(len(x), device=x.device), :, send(top, x.device), send(left, x.device)]


def rotate(x, k):
    """Turn each (square) image counter-clockwise by k quarter turns, as torch.rot90; k (N,) host integers."""
    _check(x, square=True)
    k, x = _host(k, (len(x),), "k"), _float(x, copy=True)
    for turns in (1, 2, 3):
        _replace(x, (k % 4 == turns).nonzero().flatten(), functools.partial(torch.rot90, k=turns, dims=(2, 3)))
    return x


# ------------------------------------------------------------------------------------------- colour
def _gray(x):
    """(N, 3, H, W) -> (N, 1, H, W) luminance."""
    r, g, b = x.split(1, dim=1)
    return (r * RGB_TO_GRAY[0]).add_(g, alpha=RGB_TO_GRAY[1]).add_(b, alpha=RGB_TO_GRAY[2])


def _blend_matrices(factor, gray_share, mean_share):
    """Brightness, contrast and saturation as one formula, so that each image can do a different one.

    It is clamp(factor * x + (1 - factor) * base), where base is black (shares 0: brightness), the mean of the
    grey image (mean_share 1: contrast) or the grey image (gray_share 1: saturation): all linear in rgb.

    factor   host tensor (...); gray_share and mean_share of the same shape, or one number for all.
    returns  own (..., 3, 3) and mean (..., 1, 3): a pixel becomes clamp(own @ rgb + mean @ image's mean rgb).
    """
    luminance = torch.tensor([RGB_TO_GRAY])                                                 # (1, 3)
    factor, gray_share, mean_share = (torch.as_tensor(v)[..., None, None] for v in (factor, gray_share, mean_share))
    own = factor * torch.eye(3) + (1 - factor) * gray_share * luminance
    return own, (1 - factor) * mean_share * luminance


def _blend(x, own, mean, out):
    """out = _blend_matrices' own (n, 3, 3) and mean (n, 1, 3; None: zeros) applied to x (n, 3, H, W). Returns out."""
    pixels = x.flatten(2)                                                                   # (n, 3, HW)
    torch.bmm(own, pixels, out=out.flatten(2))
    if mean is not None:
        out.add_((mean @ pixels.mean(2, keepdim=True))[..., None])                          # (n, 1, 1, 1)
    return out.clamp_(0, 1)


def _hue_(x, shift):
    """In place: turn each image's hue by shift (n, 1, 1) of a full circle; HSV's value and saturation stay.

    This is HSV without its six cases. The hues H lie on a circle of length 6: red at 0, green at 2, blue at
    4. Stretch a pixel's colours to u, from 0 (the least) to 1 (the greatest): u_r is 1 within a distance of 1
    from red, falls to 0 at a distance of 2, and stays 0; u_g and u_b do so around their places. Backwards:
    on the way from red to its opposite, the greater of u_g and u_b rises to 1, then u_r falls to 0, then the
    lesser rises to 1, each over a distance of 1. So, on green's side of red if g > b, else on blue's,
        |H| = u_g + u_b + 1 - u_r = 1 + (g + b - r - low) / (high - low).
    """
    r, g, b = x.unbind(1)                                                           # views, each (n, H, W)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = torch.maximum(torch.maximum(r, g), b).sub_(low).clamp_(min=1e-12)  # grey has no hue; avoid 0 / 0
    h = (g + b).sub_(r).sub_(low).div_(chroma).add_(1)
    h.copysign_(g - b).add_(6 * shift)
    h.sub_((h / 6).floor_(), alpha=6)                                               # into [0, 6)
    # Forwards: u_g = clamp(2 - |h - 2|) = clamp(min(h, 4 - h)) in [0, 1]; u_b = clamp(min(h - 2, 6 - h));
    # u_r = clamp(max(2 - h, h - 4)) = -clamp(min(h - 2, 4 - h)) in [-1, 0].
    up, down = h - 2, 4 - h
    torch.addcmul(low, torch.minimum(up, down).clamp_(-1, 0), chroma, value=-1, out=r)
    torch.addcmul(low, torch.minimum(h, down).clamp_(0, 1), chroma, out=g)
    torch.addcmul(low, torch.minimum(up, down.add_(2)).clamp_(0, 1), chroma, out=b)
    return x


def _adjust(x, factor, gray_share, mean_share):
    x = _float(x)
    factor = _host(factor, (len(x),), "factor", torch.float32)
    own, mean = (send(v, x.device) for v in _blend_matrices(factor, gray_share, mean_share))
    with torch.autocast(x.device.type, enabled=False):
        return _blend(x, own, mean, out=torch.empty_like(x))


def adjust_brightness(x, factor):
    """factor * x, clamped; factor (N,) host tensor >= 0, where 1 changes nothing."""
    return _adjust(x, factor, 0, 0)


def adjust_contrast(x, factor):
    """factor * x + (1 - factor) * the mean of the grey image, clamped; factor (N,) host tensor >= 0."""
    return _adjust(x, factor, 0, 1)


def adjust_saturation(x, factor):
    """factor * x + (1 - factor) * the grey image, clamped; factor (N,) host tensor >= 0."""
    return _adjust(x, factor, 1, 0)


def adjust_hue(x, factor):
    """Turn the hue by factor, (N,) host tensor in [-0.5, 0.5] of a full circle."""
    x = _float(x, copy=True)
    return _hue_(x, send(_host(factor, (len(x),), "factor", torch.float32), x.device)[:, None, None])


def _jitter(hue_step, turns, x, is_contrast, own, mean, shift):
    """The four operations of color_jitter on images (n, 3, H, W) whose hue comes at step hue_step; x is used up.

    is_contrast (n, 4) host bool; own (n, 4, 3, 3) and mean (n, 4, 1, 3) of _blend_matrices, shift (n, 4, 1, 1):
    what each image has at each step.  turns: whether the hue is turned at all.
    """
    spare = torch.empty_like(x)
    for step in range(4):
        if step != hue_step:
            needed = is_contrast[:, step].any()  # the mean over the image, which only contrast looks at
            x, spare = _blend(x, own[:, step], mean[:, step] if needed else None, out=spare), x
        elif turns:
            x = _hue_(x, shift[:, step])
    return x


def color_jitter(x, brightness, contrast, saturation, hue, p=1.0, generator=None, inplace=False):
    """torchvision's RandomApply([ColorJitter(brightness, contrast, saturation, hue)], p), image by image.

    The first three factors are uniform in [max(0, 1 - strength), 1 + strength], the hue's in [-hue, hue];
    each image has its own order of the four operations, all 24 equally likely. Returns (N, 3, H, W) float32.
    """
    x = _float(x, copy=not inplace)
    if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
        raise ValueError("brightness, contrast and saturation must be >= 0, and hue within [0, 0.5], got "
                         f"{brightness}, {contrast}, {saturation}, {hue}")
    n = len(x)
    applies = draw(torch.rand, (n,), generator) < p
    ranges = [(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)] + [(-hue, hue)]
    factors = torch.stack([_uniform(n, *r, generator) for r in ranges], dim=1)              # (N, 4)
    order = draw(torch.rand, (n, 4), generator).argsort(dim=1)       # (N, 4): what comes first, second, ...

    # Images whose hue comes at the same step go together: their other three steps are blends, each its own.
    hue_step = (order == 3).int().argmax(dim=1).masked_fill(~applies, 4)                 # (N,); 4: left alone
    sort, counts = hue_step.argsort(), torch.bincount(hue_step, minlength=5).tolist()
    order = order[sort]
    factors = factors[sort].gather(1, order)                            # (N, 4): the factor at each step
    is_contrast = order == 1
    own, mean = _blend_matrices(factors, order == 2, is_contrast)                           # (N, 4, 3 or 1, 3)
    own, mean, shift = (send(v, x.device) for v in (own, mean, factors[..., None, None]))
    groups = zip(*(v.split(counts) for v in (sort, is_contrast, own, mean, shift)), strict=True)

    for step, (which, *values) in zip(range(4), groups, strict=False):              # the fifth stays as it is
        _replace(x, which, functools.partial(_jitter, step, hue > 0), *values)
    return x


def random_grayscale(x, p=0.2, generator=None, inplace=False):
    """Replace each image, with probability p, by its luminance."""
    return _replace(_float(x, copy=not inplace), _heads(len(x), p, generator), lambda x: _gray(x).expand(-1, 3, -1, -1))


def solarize(x, threshold=0.5, p=0.2, generator=None, inplace=False):
    """Turn pixels >= threshold into 1 - pixel, each channel by itself, in each image with probability p.

    threshold  in [0, 1]; 128 of 255 on uint8 is 0.5 here. What earlier operations gave is not rounded to 255ths first.
    Source     BYOL (appendix B) and Barlow Twins: p = 0 for one view, 0.2 for the other.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    return _replace(_float(x, copy=not inplace), _heads(len(x), p, generator),
                    lambda x: torch.where(x >= threshold, 1 - x, x))


# --------------------------------------------------------------------------------- blur, normalise
def blur(x, sigma, kernel_size):
    """Gaussian blur with reflected edges, each image its own width.

    sigma        (N,) host tensor, > 0, in pixels.
    kernel_size  odd number of taps; at most 2 * side - 1, for a reflection reaches no further than the image.
    returns      (N, 3, H, W) float32.

    A blur is linear on each axis: out = By @ x @ Bx^T. Row i of B holds the Gaussian around i; a tap that
    falls outside is added where the reflection puts it.
    """
    x = _float(x, copy=True)
    sigma = _host(sigma, (len(x),), "sigma", torch.float32)
    if bool((sigma <= 0).any()):
        raise ValueError("sigma must be greater than 0")
    return _blur(x, torch.arange(len(x)), sigma, kernel_size)


def _blur(x, which, sigma, kernel_size):
    """x[which] = blur(x[which], sigma, kernel_size), for host indices (M,) and sigmas (M,). Returns x."""
    most = 2 * min(x.shape[2:])
    if kernel_size % 2 != 1 or not 0 < kernel_size < most:
        raise ValueError(f"kernel_size must be odd and less than {most}, got {kernel_size}")
    if len(which) == 0:  # a recipe without blur
        return x
    sigma = send(sigma, x.device)[:, None]                                                 # (M, 1)
    radius = kernel_size // 2
    t = torch.arange(-radius, radius + 1, device=x.device)
    taps = (-0.5 * (t / sigma) ** 2).softmax(dim=1)                                         # (M, kernel)
    taps = F.threshold(taps, 1e-12, 0.0)       # denormal numbers would slow a CPU's products down fifteenfold

    def axis(side):
        """What _two_products wants to know of an axis: the columns in its band that a row's taps add to; the bands."""
        block = _block(side)
        rows = torch.arange(math.ceil(side / block) * block).clamp(max=side - 1)       # those beyond do not count
        band = min(side, block + 2 * radius)
        first = (rows[::block] - radius).clamp(0, side - band)                                # (blocks,)
        i = rows[:, None] + torch.arange(-radius, radius + 1)                                 # (rows, kernel)
        i = (side - 1) - ((side - 1) - i.abs()).abs()                                  # -1 is reflected to 1
        i = i.view(len(first), block, -1) - first[:, None, None]
        return send(i, x.device), first.tolist(), band

    axes = {side: axis(side) for side in x.shape[2:]}                                  # one, of a square image

    def blurred(x, taps):
        matrices = {}
        for side, (source, _, band) in axes.items():
            zeros = torch.zeros(len(taps), *source.shape[:2], band, device=x.device)    # (n, blocks, block, band)
            matrices[side] = zeros.scatter_add_(3, source.expand(len(taps), -1, -1, -1),
                                                taps[:, None, None].expand(-1, *source.shape))
        height, width = x.shape[2:]
        out = torch.empty_like(x)
        _two_products(out, matrices[height], axes[height][1], x, matrices[width], axes[width][1])
        return out

    return _replace(x, which, blurred, taps)


def gaussian_blur(x, sigma=(0.1, 2.0), p=0.5, kernel_size=None, generator=None, inplace=False):
    """Blur each image with probability p, by a sigma of its own, uniform in the range, in pixels.

    kernel_size  None: out to three of the largest sigma on either side, or to the edge of the image.
    """
    x = _float(x, copy=not inplace)
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma must be (low, high) with 0 < low <= high, got {sigma}")
    if kernel_size is None:
        kernel_size = 2 * min(math.ceil(3 * sigma[1]), min(x.shape[2:]) - 1) + 1
    heads, sigmas = _heads(len(x), p, generator), _uniform(len(x), *sigma, generator)
    return _blur(x, heads, sigmas[heads], kernel_size)


def normalize(x, mean, std):
    """(x - mean) / std for each channel; mean and std (3,), for x in [0, 1]. Returns channels_last."""
    _check(x)
    mean, std = (_host(v, (3,), "mean and std", torch.float32).view(1, 3, 1, 1) for v in (mean, std))
    mean, std = send(mean, x.device), send(std, x.device)
    out = torch.empty(x.shape, device=x.device, memory_format=torch.channels_last)
    for s in _chunks(len(x), x):
        out[s] = (_float(x[s]) - mean).div_(std)
    return out
