"""How much faster is packing for training than decoding photos whole?        python bench/pack.py

Draws JPEGs of 512 px (smooth random textures, quality 90), then reads them in two ways, in turn, on one core:

    packed   data.py: decoded at a fraction of their size, the bytes written to a store for 128-px training
    whole    Pillow: decoded at full size, made RGB, resized; nothing written

and prints the median of the ratio over the rounds, for two textures: the more fine detail a picture has, the
more of the time goes into reading its coefficients, which both ways must do, and the less there is to gain.
Pure noise, which has them all, would be no photo.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.io import write_jpeg  # noqa: E402

import data  # noqa: E402


def draw(folder, count, side, finest):
    """Sums of noise at several scales, fine ones weaker, as in photos. -> bytes written

    finest  cells a side of the finest noise.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        picture = torch.zeros(1, 3, side, side)
        for cells in [c for c in (4, 16, 64, 128, 256) if c <= finest]:
            noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
            noise = F.interpolate(noise, (side, side), mode="bilinear")
            picture += noise * (4 / cells) ** 0.5
        pixels = ((picture[0] / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)             # (3, side, side)
        write_jpeg(pixels, str(folder / f"{i:05d}.jpg"), quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def packed(folder, size):
    with tempfile.TemporaryDirectory() as cache:
        data.pack(data.open_source(folder), size, cache=cache, quiet=True, workers=1)


def whole(folder, size):
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR).tobytes()


def timed(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def compare(name, folder, finest, args):
    """Measures both ways on one texture, in turn, and prints the rounds and the median."""
    kilobytes = draw(folder, args.images, args.side, finest) / args.images / 1000
    print(f"{name}: {kilobytes:.0f} kB an image")
    packed(folder, args.size), whole(folder, args.size)  # warm: imports done, files in memory
    ratios = []
    for i in range(args.rounds):
        fast, slow = timed(packed, folder, args.size), timed(whole, folder, args.size)
        ratios.append(slow / fast)
        print(f"  round {i + 1}   packed {args.images / fast:6.0f} images/s   "
              f"whole {args.images / slow:6.0f} images/s   {ratios[-1]:.2f} x", flush=True)
    print(f"  median    packed is {statistics.median(ratios):.2f} times as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="JPEGs to draw")
    parser.add_argument("--side", type=int, default=512, help="their pixels a side")
    parser.add_argument("--size", type=int, default=128, help="pixels a side to pack for")
    parser.add_argument("--rounds", type=int, default=5, help="times both ways are measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # one core for both, so that threads cannot help either
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    print(f"{args.images} JPEGs of {args.side} px for {args.size} px, one core")
    for name, finest in (("smooth", 64), ("detailed", 256)):
        with tempfile.TemporaryDirectory() as temporary:
            compare(name, Path(temporary), finest, args)


if __name__ == "__main__":
    main()
