"""The toy set: glyphs drawn by the program, so that anything can be tried without pictures of one's own.

    for images in draw_toy("train", size=32):  ...      (n, 3, S, S) uint8; image i is of class i % 10
"""

import math

import torch

TOY_VERSION = 4  # raise it when other pixels are drawn
TOY_COUNT = {"train": 4000, "val": 1000, "test": 1000}
TOY_CLASSES = ("disc", "ring", "square", "triangle", "plus", "T", "L", "crescent", "star", "two-bars")


def draw_toy(split, size):
    """Yields (n, 3, S, S) uint8: image i is a cut from an endless pattern of light copies of glyph i % 10.

    Images of a class differ in what random crops and colour jitter vary anyway: where the cut lies, its
    zoom, how dark the ground and how light the ink. So what two crops of an image share, and crops of other
    images lack, is the glyph, and a method that finds features common to two crops finds the class. When
    images were also dark on light, coloured, or irregular, methods told the images apart by that instead.
    Doubles, so that rounding is the same on every machine.
    """
    generator = torch.Generator().manual_seed(20_000 + list(TOY_COUNT).index(split))
    count = TOY_COUNT[split]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    # The image shows the plane from -1 to 1; a grid of 5 x 5 copies, 2/3 apart, always covers it.
    grid = torch.arange(-2, 3, dtype=torch.float64) * (2 / 3)
    zoom, shift = uniform(1 / 1.2, 1.2, count, 1), uniform(-1 / 3, 1 / 3, count, 2)
    x = zoom * (grid.repeat(5) + shift[:, :1] + uniform(-0.04, 0.04, count, 25))                # (N, 25)
    y = zoom * (grid.repeat_interleave(5) + shift[:, 1:] + uniform(-0.04, 0.04, count, 25))
    half = zoom * uniform(0.36, 0.42, count, 1) * uniform(0.9, 1.1, count, 25)                   # half a glyph's size
    angle = uniform(-math.pi / 10, math.pi / 10, count, 25)                                     # 18 degrees each way
    ground, ink = uniform(0.1, 0.3, count, 1, 1), uniform(0.7, 0.9, count, 1, 1)
    slope = uniform(-0.01, 0.01, count, 2, 1, 1)

    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1         # pixel centres
    step = max(10, 200 * 1024 // size**2 // 10 * 10)                                # images at a time
    for a in range(0, count, step):
        n = min(step, count - a)
        cover = torch.empty(n, size, size, dtype=torch.float64)
        for c, name in enumerate(TOY_CLASSES):
            rows = slice(a + c, a + n, 10)
            dx = axis - x[rows, :, None, None]                                      # (n/10, 25, 1, S)
            dy = axis[:, None] - y[rows, :, None, None]                             # (n/10, 25, S, 1)
            cos, sin = (f(angle[rows, :, None, None]) / half[rows, :, None, None] for f in (torch.cos, torch.sin))
            distance = glyph(name, dx * cos + dy * sin, dy * cos - dx * sin) * half[rows, :, None, None]
            # One pixel is 2/S wide: the edge is soft over that width.
            cover[c::10] = (0.5 - distance.amin(dim=1) * (size / 2)).clamp(0, 1)    # (n/10, S, S)
        rows = slice(a, a + n)
        grey = ground[rows] + (ink - ground)[rows] * cover                          # (n, S, S)
        grey = grey + slope[rows, 0] * axis + slope[rows, 1] * axis[:, None]
        grey = grey + uniform(-0.02, 0.02, n, size, size)
        yield (grey.clamp(0, 1) * 255).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)


def glyph(name, u, v):
    """About the distance to the edge of a glyph, negative inside. u to the right, v down, the glyph within -1..1."""
    def box(cu, cv, hu, hv):
        return torch.maximum((u - cu).abs() - hu, (v - cv).abs() - hv)

    def disc(cu, radius):  # r - R, but for a factor (r + R) / 2R that is 1 at the edge; no square root
        return ((u - cu) ** 2 + v**2 - radius**2) / (2 * radius)

    def edges(sides, inner):  # the largest and the second largest distance to lines around the origin
        first = second = torch.full_like(u, -math.inf)
        for i in range(sides):
            turn = 2 * math.pi * i / sides
            one = u * math.sin(turn) + v * math.cos(turn) - inner
            first, second = torch.maximum(first, one), torch.maximum(second, torch.minimum(first, one))
        return first, second

    return {
        "disc": lambda: disc(0, 0.72),
        "ring": lambda: disc(0, 0.6).abs() - 0.16,
        "square": lambda: box(0, 0, 0.64, 0.64),
        "triangle": lambda: edges(3, 0.45)[0],
        "plus": lambda: torch.minimum(box(0, 0, 0.78, 0.2), box(0, 0, 0.2, 0.78)),
        "T": lambda: torch.minimum(box(0, -0.52, 0.7, 0.2), box(0, 0.1, 0.2, 0.65)),
        "L": lambda: torch.minimum(box(-0.4, 0, 0.2, 0.72), box(0.05, 0.52, 0.65, 0.2)),
        "crescent": lambda: torch.maximum(disc(0, 0.78), -disc(0.4, 0.62)),
        "star": lambda: edges(5, 0.3)[1],  # a pentagram is where at least four of five half-planes meet
        "two-bars": lambda: torch.maximum((u.abs() - 0.45).abs() - 0.2, v.abs() - 0.72),
    }[name]()
