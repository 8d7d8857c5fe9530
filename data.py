"""For the programs that still say `data`: the names of the package `pictures`."""

import os

from common import changed_images, printable  # noqa: F401
from pictures import *  # noqa: F403
from pictures import lines_of


def note_changes(source, data, saved, splits):
    """Has the description say whether the images of a run, of flags `saved`, are others now. data: --data, or None."""
    changed = changed_images(saved, source, splits)
    if changed and os.path.abspath(data or saved["data"]) == os.path.abspath(saved["data"]):
        source.description += lines_of("changed", f"images since this run was trained: {changed}; some that it trained "
                                                  "on may be validation images now")
