"""Views a second on one core: augment.py against torchvision.transforms on decoded PIL images.

    python bench/augment.py [--quick] [--json FILE]

Both sides start from the same decoded images (ours: one uint8 tensor; torchvision: PIL images) and end in
normalised float32. The recipe is SimSiam's: RandomResizedCrop(0.2-1), flip, ColorJitter(.4, .4, .4, .1)
with p .8, grey with p .2, and for the larger images blur, sigma 0.1-2, with p .5. There torchvision's side
blurs with Pillow's GaussianBlur, as the paper's authors do: it is several times faster than torchvision's.
The sides take turns, so that a slow moment of the machine hits both; the ratio is taken turn by turn.
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
import sys
import time

import PIL
import torch
import torchvision
from PIL import ImageFilter
from torchvision import transforms as T

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import augment  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = [(32, 32, 256, False), (32, 32, 512, False), (128, 144, 64, True), (224, 256, 32, True)]


def ours(size, blur):
    def view(images):
        x = augment.random_resized_crop(images, size, scale=(0.2, 1.0), flip=0.5)
        x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8)
        x = augment.random_grayscale(x, p=0.2)
        if blur:
            x = augment.gaussian_blur(x, sigma=(0.1, 2.0), p=0.5)
        return augment.normalize(x, MEAN, STD)
    return view


def pillow_blur(image):
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def torchvisions(size, blur):
    view = T.Compose([
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        *([T.RandomApply([pillow_blur], p=0.5)] if blur else []),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ])
    return lambda pictures: torch.stack([view(picture) for picture in pictures])


def seconds(function, argument):
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    parser.add_argument("--json", metavar="FILE", help="also write the figures of every round here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    rounds = 3 if args.quick else 11

    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
          f"{platform.machine()}, one core")
    print(f"median (least-most) of {rounds} alternating rounds\n")
    print(f"{'pixels':<11}{'batch':>5}{'blur':>6}{'ours, views/s':>21}"
          f"{'torchvision':>20}{'ratio':>17}")
    report = []
    for size, stored, batch, blur in CASES:
        images = torch.rand(batch, 3, 8, 8)                         # smooth colours
        images = torch.nn.functional.interpolate(images, size=stored, mode="bicubic")
        images = images.clamp(0, 1).mul(255).byte()
        pictures = [T.functional.to_pil_image(image) for image in images]
        sides = ours(size, blur), torchvisions(size, blur)
        rates = [[], []]
        for turn in range(rounds + 1):
            for side, function, argument in zip(rates, sides, (images, pictures), strict=True):
                rate = batch / seconds(function, argument)
                if turn:                                            # the first round warms up
                    side.append(rate)
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        cells = [f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})" for r in rates]
        cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})")
        name = f"{stored}" if stored == size else f"{stored} -> {size}"
        print(f"{name:<11}{batch:>5}{'yes' if blur else 'no':>6}{cells[0]:>21}{cells[1]:>20}{cells[2]:>17}",
              flush=True)
        report.append({"stored": stored, "size": size, "batch": batch, "blur": blur,
                       "ours": rates[0], "torchvision": rates[1]})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "torchvision": torchvision.__version__,
                       "pillow": PIL.__version__, "views_per_second": report}, file, indent=1)


if __name__ == "__main__":
    main()
