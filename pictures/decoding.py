"""One picture file -> S x S pixels: any format that Pillow reads by itself, upright, in RGB."""

import contextlib
import functools
import math
import os
import stat
import threading

import torch
from PIL import Image, PngImagePlugin

from common import printable

TURNED = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HUGE = threading.Lock()  # pictures of more than 33 million pixels, half a GB or so, are decoded one at a time


@functools.cache
def image_formats():
    """What Pillow decodes by itself, the usual formats first. EPS would start another program, Ghostscript."""
    Image.preinit()
    Image.init()
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a picture's long text is no reason to refuse it
    return [name for name in Image.ID if name not in {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}]


@functools.cache
def image_extensions():
    return {ending for ending, name in Image.registered_extensions().items() if name in image_formats()}


def open_image(path):
    """Pillow's image, its pixels not read yet. Raises for more than 179 million: a few bytes can claim any number."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")  # a pipe would be waited for
    return Image.open(path, formats=image_formats())  # by the file's content, whatever its name says


def decode(path, size):
    """-> ((3, S, S) uint8 RGB, width/height of the upright original). Of an animation, the first frame.

    A JPEG much larger than S is decoded at 1/2, 1/4 or 1/8: its 8 x 8 blocks are cosine transforms, and a
    smaller inverse transform gives the smaller picture without computing the large one.
    """
    with open_image(path) as image:
        width, height = image.size
        scaled = image.format in ("JPEG", "MPO")
        if scaled:
            image.draft(None, (size, size))  # never below S on either side
        with HUGE if image.width * image.height > 2**25 else contextlib.nullcontext():
            image.load()
            if not scaled:
                width, height = image.size  # a TIFF turns itself upright while loading
            try:
                orientation = image.getexif().get(0x0112, 1)
            except Exception:  # a garbled EXIF block leaves the pixels readable
                orientation = 1
            image = to_rgb(image)
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)  # a triangle filter: antialiased
    if orientation in TURNED:  # a square may be turned after squashing as well as before
        image = image.transpose(TURNED[orientation])
        width, height = (height, width) if orientation >= 5 else (width, height)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)       # (S*S*3,)
    return pixels.view(size, size, 3).permute(2, 0, 1), width / height             # (3, S, S)


def to_rgb(image):
    """Any mode -> RGB. What is transparent shows white, as on a page."""
    if image.mode.startswith("I") or image.mode == "F":
        image = to_grey8(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy


def to_grey8(image):
    """Deep grey -> 8 bits, scaled. (`convert("L")` alone clips: all above 255 turns white.)

    16-bit integers are divided by 257, floats from 0 to 1 multiplied by 255; what lies outside such a
    range (32-bit scans, heights) is stretched from its own minimum to its maximum. In a TIFF of 12 bits 4095
    is white.
    """
    image.info.pop("transparency", None)
    bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
    low, high = 0, (2**bits - 1 if 8 <= bits < 16 else 65535) if image.mode.startswith("I") else 1
    image = image.convert("F")
    darkest, brightest = image.getextrema()
    if not math.isfinite(brightest - darkest):
        raise ValueError("infinite or undefined brightness")
    if darkest < low or brightest > high:
        low, high = darkest, brightest
    scale = 255 / max(high - low, 1e-12)
    image = image.point(lambda v: v * scale + (0.5 - low * scale))  # + 0.5: `convert` cuts off
    return image.convert("L")


def one_line(error, path=""):
    """An exception in a few words, without the path that the line names anyway."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if os.path.isfile(path) and not os.path.getsize(path) else "no image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if getattr(error, "filename", None) not in (None, path):
        text += f": {error.filename}"
    text = printable(" ".join(text.split()))
    return text if len(text) <= 120 else text[:117] + "..."


def map_bytes(path, count):
    """The file as a (count,) uint8 tensor that is read page by page when it is used."""
    try:
        return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)
    except RuntimeError:  # Linux refuses private mappings larger than its memory, not shared ones
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8)
