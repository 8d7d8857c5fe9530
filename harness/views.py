"""The picture of --views-png."""

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from common import Draws, UsageError
from harness.distributed import is_main


class ViewsWritten(Exception):
    """--views-png is done, and with it the program."""


def write_views(run, views):
    """PNG of what the network sees: a row for each of 8 images, first the packed picture, then its views; ends the run.

    views    (images, aspect, random) -> a list of (N, 3, s, s) normalised floats, row i from image i; or all in one.
    raises   ViewsWritten when it is done; UsageError where it cannot be written.
    """
    if not is_main():
        raise ViewsWritten
    images, aspect, _, _ = next(run.batches.batches(0))
    shown = views(images, aspect, Draws(run.args.seed, 0))
    shown = shown.split(len(images)) if torch.is_tensor(shown) else shown
    mean, std = (torch.tensor(figures).view(1, 3, 1, 1) for figures in (run.dataset.mean, run.dataset.std))
    columns = [images[:8].cpu().float() / 255] + [view[:8].float().cpu() * std + mean for view in shown]
    side = max(96, *(column.shape[-1] for column in columns))             # small pictures are enlarged
    columns = [F.interpolate(column.contiguous(), size=(side, side)) for column in columns]
    tiles = torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1)
    try:
        save_image(tiles, run.args.views_png, nrow=len(columns), padding=4, pad_value=1.0)
    except (OSError, ValueError) as error:
        raise UsageError(f"{run.args.views_png}: cannot write the picture: {error}") from None
    if not run.args.quiet:
        print(f"wrote {run.args.views_png}: one image per row, then its {len(shown)} views")
    raise ViewsWritten
