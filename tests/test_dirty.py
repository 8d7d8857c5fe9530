"""pictures among broken pictures, odd files, killed processes and full disks: right pictures or one clear line."""

import contextlib
import errno
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import pictures
from common import UsageError, printable
from pictures import decoding, folders, store

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
NOBODY = 65534


class Child:
    """A forked process that runs work(). `result` waits for it: what work() returned, or raises RuntimeError."""

    def __init__(self, work):
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                torch.set_num_threads(1)
                message = ["", work()]
            except BaseException as error:
                message = [type(error).__name__, str(error)]
            os.write(end, json.dumps(message).encode())
            os._exit(0)
        os.close(end)

    def result(self, timeout=60):
        if not select.select([self.pipe], [], [], timeout)[0]:
            os.kill(self.pid, signal.SIGKILL)
        with open(self.pipe, "rb") as pipe:
            message = pipe.read()
        status = os.waitpid(self.pid, 0)[1]
        if not message:
            raise RuntimeError(f"ended by signal {os.WTERMSIG(status)}")
        error, value = json.loads(message)
        if error:
            raise RuntimeError(f"{error}: {value}")
        return value


def coloured(path, label, number, mode="RGB", **save):
    """A picture that says of itself to which class it belongs and which one of it it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20 + number, 30), (80 * label + 20, 3 * number, 99)).convert(mode).save(path, **save)
    return path


@pytest.fixture
def folder(tmp_path):
    """Classes a, b, c of 12 pictures in train and 4 in val."""
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate("abc"):
            for i in range(count):
                coloured(tmp_path / "d" / split / name / f"{i}.png", label, i)
    return tmp_path / "d"


def packed(folder, cache, size=8, quiet=True, **options):
    return pictures.pack(pictures.open_source(folder), size, cache=cache, quiet=quiet, **options)


def check(split, count):
    """Every row of a split is what its path says: nothing lost, repeated or shifted."""
    assert len(split) == len(split.images) == len(split.labels) == len(split.aspect) == len(set(split.paths)) == count
    for image, label, aspect, path in zip(split.images, split.labels, split.aspect, split.paths, strict=True):
        assert "abc"[label] == Path(path).parent.name and (image[0] == 80 * int(label) + 20).all()
        number = int(image[1, 0, 0]) // 3
        assert number == int(Path(path).stem.split()[0]) and aspect == pytest.approx((20 + number) / 30)


def check_whole(dataset):
    check(dataset.train, 36)
    check(dataset.val, 12)


def refusal(folder, cache, **options):
    """The one line that ends the program; None if all is well."""
    try:
        packed(folder, cache, **options)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        return str(error)


def encoded(image, kind, **save):
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


# ---- odd but good ------------------------------------------------------------------------------


def test_odd_pictures_under_odd_names(tmp_path):
    red, folder = Image.new("RGB", (24, 12), (250, 0, 0)), tmp_path / "d"
    folder.mkdir()
    clear = Image.new("RGBA", (24, 12), (250, 0, 0, 0))
    palette = Image.new("P", (24, 12), 1)
    palette.putpalette([0, 0, 0, 250, 0, 0] + [0] * 762)
    blue = [Image.new("RGB", (24, 12), (0, 0, 250))]
    turned = red.getexif()
    turned[0x0112] = 6
    cases = {  # name -> content, wanted colour
        b"png called.jpg": (encoded(red, "PNG"), (250, 0, 0)),
        b"jpeg called.png": (encoded(red, "JPEG"), (250, 0, 0)),
        b"line\nbreak.png": (encoded(red, "PNG"), (250, 0, 0)),
        b"tab\t'quotes' \"$x\" \\.png": (encoded(red, "PNG"), (250, 0, 0)),
        "Bäume 樹木 🌳.PNG".encode(): (encoded(red, "PNG"), (250, 0, 0)),
        b"no utf-8 \xff\xfe.png": (encoded(red, "PNG"), (250, 0, 0)),
        b"-rf.png": (encoded(red, "PNG"), (250, 0, 0)),
        b"cmyk.jpg": (encoded(red.resize((640, 320)).convert("CMYK"), "JPEG"), (250, 0, 0)),
        b"palette.png": (encoded(palette, "PNG"), (250, 0, 0)),
        b"palette, clear.png": (encoded(palette, "PNG", transparency=1), (255, 255, 255)),
        b"rgba.png": (encoded(clear, "PNG"), (255, 255, 255)),
        b"la.png": (encoded(clear.convert("LA"), "PNG"), (255, 255, 255)),
        b"grey.png": (encoded(Image.new("L", (24, 12), 77), "PNG"), (77, 77, 77)),
        b"bits.png": (encoded(Image.new("1", (24, 12), 1), "PNG"), (255, 255, 255)),
        b"deep.png": (encoded(Image.new("I;16", (24, 12), 25700), "PNG"), (100, 100, 100)),
        b"big endian.tif": (encoded(Image.new("I;16B", (24, 12), 25700), "TIFF"), (100, 100, 100)),
        b"int.tif": (encoded(Image.new("I", (24, 12), 25700), "TIFF"), (100, 100, 100)),
        b"float.tif": (encoded(Image.new("F", (24, 12), 0.4), "TIFF"), (102, 102, 102)),
        b"moving.gif": (encoded(red, "GIF", save_all=True, append_images=blue), (250, 0, 0)),
        b"moving.png": (encoded(red, "PNG", save_all=True, append_images=blue), (250, 0, 0)),
        b"moving.webp": (encoded(red, "WEBP", save_all=True, append_images=blue), (250, 0, 0)),
        b"one.png": (encoded(red.resize((1, 1)), "PNG"), (250, 0, 0)),
        b"column.png": (encoded(red.resize((1, 4000)), "PNG"), (250, 0, 0)),
        b"row.jpg": (encoded(red.resize((4000, 1)), "JPEG"), (250, 0, 0)),
        b"upside.jpg": (encoded(red, "JPEG", exif=turned), (250, 0, 0)),
        b"exif.jpg": (encoded(red, "JPEG", exif=b"Exif\0\0II*\0garbage, garbage"), (250, 0, 0)),
        b"exif.png": (encoded(red, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff"), (250, 0, 0)),
        b"exif.webp": (encoded(red, "WEBP", exif=b"\0\1garbage"), (250, 0, 0)),
    }
    for name, (content, _) in cases.items():
        (folder / os.fsdecode(name)).write_bytes(content)
    shapes = {b"one.png": 1, b"column.png": 1 / 4000, b"row.jpg": 4000, b"upside.jpg": 0.5}
    for _ in range(2):  # packed, and found again
        source = pictures.open_source(folder)
        assert all(line.isprintable() for line in source.description)
        train = pictures.pack(source, 8, cache=tmp_path / "c", quiet=True).train
        assert {os.path.basename(os.fsencode(path)) for path in train.paths} == cases.keys() and not train.skipped
        for image, aspect, path in zip(train.images, train.aspect, train.paths, strict=True):
            name = os.path.basename(os.fsencode(path))
            wanted = torch.tensor(cases[name][1])
            assert (image.int() - wanted[:, None, None]).abs().max() <= 6, name
            assert aspect == pytest.approx(shapes.get(name, 2)), name


def test_class_names_of_any_bytes_can_be_printed(tmp_path):
    for name in (b"caf\xe9", b"two\nlines", "日本".encode()):
        coloured(tmp_path / "d" / os.fsdecode(name) / "0.png", 0, 1)
    source = pictures.open_source(tmp_path / "d", holdout=0)
    assert sorted(source.classes) == ["caf\\udce9", "two\\nlines", "日本"]
    for text in source.description + source.classes:
        text.encode()  # what print() does


def test_names_as_long_as_they_may_be(tmp_path):
    path = coloured(tmp_path / ("樹" * 80) / ("a" * 251 + ".png"), 0, 1)
    assert packed(path.parent, tmp_path / "c").train.paths == [str(path)]


def test_a_broken_first_picture_does_not_change_the_recipe(tmp_path):
    for c in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"):
        for i in range(2):
            (tmp_path / "d" / c).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "d" / c / f"{i}.png")
    for i in range(2):
        (tmp_path / f"d/airplane/{i}.png").write_bytes(b"")
    assert pictures.open_source(tmp_path / "d").kind == "cifar"


@pytest.mark.parametrize("kind, count, value", [
    (3, 1, b"\0\0"), (3, 1, b"\x09"), (3, 1, b"\xff\xff"), (3, 2, b"\6\0\3\0"), (2, 2, b"6"), (1, 1, b"\6"),
    (7, 4, b"\6"), (11, 1, b"\0\0\xc0\x40"), (5, 1, b"\xff\xff"), (99, 1, b"\6"), (3, 2**31, b"\6")])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's; pack() silences them too
def test_orientations_that_are_none(tmp_path, kind, count, value):  # of EXIF's types, and of wrong ones
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, kind, count, value, 0)
    Image.new("RGB", (24, 12)).save(tmp_path / "x.jpg", exif=exif)
    assert pictures.decode(tmp_path / "x.jpg", 8)[1] in (2, 0.5)


# ---- broken ------------------------------------------------------------------------------------


def claiming(kind, width, height):
    """A file of a few bytes that claims to be a huge picture."""
    if kind == "PNG":
        def chunk(name, body):
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    small = encoded(Image.new("RGB", (8, 8)), kind)
    if kind == "JPEG":
        i = small.index(b"\xff\xc0") + 5
        return small[:i] + struct.pack(">HH", height, width) + small[i + 4:]
    if kind == "PPM":
        return small.replace(b"8 8", b"%d %d" % (width, height))
    i, form = {"GIF": (6, "<HH"), "BMP": (18, "<ii"), "TGA": (12, "<HH")}[kind]
    return small[:i] + struct.pack(form, width, height) + small[i + struct.calcsize(form):]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux says how much memory is in use")
def test_tiny_files_that_claim_to_be_huge_are_refused_at_once(tmp_path):
    kinds = ["PNG", "JPEG", "GIF", "BMP", "TGA", "PPM"]
    for kind in kinds:
        (tmp_path / f"x.{kind.lower()}").write_bytes(claiming(kind, 60000, 60000))
    Image.init()

    def work():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))  # 256 MiB more, not 10 GB
        reasons = []
        for kind in kinds:
            try:
                pictures.decode(tmp_path / f"x.{kind.lower()}", 8)
            except Exception as error:
                reasons.append(pictures.one_line(error))
        return reasons

    started = time.time()
    reasons = Child(work).result(timeout=20)
    assert time.time() - started < 5
    assert len(reasons) == len(kinds) and all("3600000000 pixels" in reason for reason in reasons)


def test_an_honest_picture_of_100_megapixels(tmp_path):
    picture = Image.new("1", (10_000, 10_000), 1)
    picture.paste(0, (0, 0, 10_000, 5_000))
    (tmp_path / "d").mkdir()
    picture.save(tmp_path / "d/large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = packed(tmp_path / "d", tmp_path / "c").train
    assert train.images[0, :, 1].eq(0).all() and train.images[0, :, 6].eq(255).all() and not train.skipped


def test_huge_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    Image.new("1", (5_800, 5_800)).save(tmp_path / "x.png")
    running, most, to_rgb = [], [], decoding.to_rgb

    def counted(image):
        running.append(image)
        most.append(len(running))
        time.sleep(0.1)
        running.remove(image)
        return to_rgb(image.resize((8, 8)))

    monkeypatch.setattr(decoding, "to_rgb", counted)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda path: pictures.decode(path, 8), [tmp_path / "x.png"] * 3))
    assert most == [1, 1, 1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_files_cut_or_scratched_anywhere(tmp_path, kind):
    rng, path = random.Random(0), tmp_path / "x.jpg"
    whole = encoded(Image.effect_noise((40, 40), 90).convert("RGB"), kind)
    cut = [whole[:n] for n in sorted({*range(40), *range(40, len(whole), len(whole) // 40)})]
    scratched = []
    for _ in range(60):
        i = rng.randrange(len(whole) if rng.random() < 0.5 else 100)
        scratched.append(whole[:i] + bytes([rng.randrange(256)]) + whole[i + 1:])
    for content in cut + scratched:
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels, aspect = pictures.decode(path, 8)
            assert pixels.shape == (3, 8, 8) and 0 < aspect < float("inf")
        except Exception as error:
            reason = pictures.one_line(error, path)
            assert reason and reason.isprintable() and len(reason) <= 120, error
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception):  # noqa: B017 (each format raises its own)
        pictures.decode(path, 8)


def test_floats_without_a_range_are_refused(tmp_path):
    for value in (float("inf"), float("-inf"), float("nan")):
        Image.new("F", (4, 4), value).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match="brightness"):
            pictures.decode(tmp_path / "x.tif", 4)


def test_no_picture_starts_ghostscript(tmp_path, monkeypatch):
    gs = tmp_path / "bin/gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    with pytest.raises(Image.UnidentifiedImageError):
        pictures.decode(tmp_path / "x.jpg", 8)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception), Image.open(tmp_path / "x.jpg") as image:
        image.load()
    assert (tmp_path / "ran").exists()  # Pillow left to itself would have: the trap works
    assert ".eps" not in decoding.image_extensions()


def break_some(folder):
    """One of every kind of bad file, in both splits. -> {path: word of the reason}"""
    noise = encoded(Image.effect_noise((90, 90), 90).convert("RGB"), "JPEG")
    bad = {
        "train/a/0.png": (b"", "empty file"),
        "train/a/12.jpg": (b"Good morning.", "no image"),
        "train/a/13.jpg": (noise[:1500], "truncated"),
        "train/b/14.png": (encoded(Image.effect_noise((90, 90), 90), "PNG")[:3000], "truncated"),
        "train/b/15.png": (claiming("PNG", 60000, 60000), "pixels"),
        "val/b/16 new\nline.png": (b"x", "no image"),
        os.fsdecode(b"val/c/17 \xff.png"): (b"x", "no image"),
    }
    reasons = {}
    for name, (content, word) in bad.items():
        (folder / name).write_bytes(content)
        reasons[name] = word
    os.mkfifo(folder / "train/c/18.jpg")
    (folder / "train/c/19.jpg").symlink_to("nowhere.jpg")
    (folder / "val/c/20.jpg").symlink_to("20.jpg")
    plug = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder / "val/c")  # the path of a socket must be short
    plug.bind("21.jpg")
    os.chdir(here)
    plug.close()
    (folder / "train/c/22.jpg").symlink_to("/dev/zero")
    return reasons | {"train/c/18.jpg": "not a regular file", "train/c/19.jpg": "No such file",
                      "val/c/20.jpg": "symbolic links", "val/c/21.jpg": "not a regular file",
                      "train/c/22.jpg": "not a regular file"}


def test_all_bad_files_of_all_splits_are_listed_together(folder, tmp_path):
    reasons = break_some(folder)
    assert len(reasons) == 12

    text = Child(lambda: refusal(folder, tmp_path / "c")).result()  # can be ended should the pipe hold it
    assert "12 of 59 images cannot be read" in text and "and 9 more" in text  # 48 - 1 emptied + 12
    assert f"listed in {tmp_path}/c/d-unreadable.txt" in text and "--skip-unreadable" in text
    lines = (tmp_path / "c/d-unreadable.txt").read_text().split("\n")
    assert lines.pop() == ""
    listed = dict(line.split("\t") for line in lines)
    assert len(lines) == len(listed) == 12
    for name, word in reasons.items():
        assert word in listed[printable(f"{folder}/{name}")]


def test_going_on_without_bad_files_counts_them_all(folder, tmp_path, capsys, monkeypatch):
    break_some(folder)
    for start in range(2):
        d = packed(folder, tmp_path / "c", quiet=False, skip_unreadable=True)
        check(d.train, 35)
        check(d.val, 12)
        out = capsys.readouterr().out
        assert "left out 8 of 43 train images" in out and "left out 4 of 16 val images" in out
        assert "d-unreadable.txt" in out and ("packed" in out) == (start == 0)
        assert max(map(len, [line for line in out.splitlines() if "listed in" not in line])) < 80
    # What is mended comes in, even if it is as long and as old as before: a link, a permission, another file.
    coloured(folder / "train/c/nowhere.jpg", 2, 19, format="PNG")
    (folder / "train/c/nowhere.jpg").rename(folder / "train/c/.hidden")
    (folder / "train/c/19.jpg").unlink()
    (folder / "train/c/19.jpg").symlink_to(".hidden")
    (folder / "val/c/20.jpg").unlink()
    coloured(folder / "train/a/0.png", 0, 0)
    d = packed(folder, tmp_path / "c", skip_unreadable=True)
    check(d.train, 37)
    assert len(d.train.skipped) == 6 and len(d.val.skipped) == 3


def test_without_the_flag_the_second_start_refuses_at_once(folder, tmp_path, monkeypatch):
    (folder / "train/a/0.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UsageError, match="1 of 48 images cannot be read: .*a/0.png .empty file"):
            packed(folder, tmp_path / "c")
        monkeypatch.setattr(store, "decode", None)  # nothing is decoded again ...
    check(packed(folder, tmp_path / "c", skip_unreadable=True).train, 35)  # ... with the flag neither


def test_a_class_or_a_split_that_is_unreadable_as_a_whole(folder, tmp_path, capsys):
    for path in (folder / "train/b").iterdir():
        path.write_bytes(b"x")
    d = packed(folder, tmp_path / "c", quiet=False, skip_unreadable=True)
    assert "left out 12 of 36 train images that cannot be read; none is left of class b" in capsys.readouterr().out
    check(d.train, 24)
    assert d.classes == ["a", "b", "c"] and d.train.labels.unique().tolist() == [0, 2]
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"x")
    for _ in range(2):
        text = refusal(folder, tmp_path / "c", skip_unreadable=True)
        assert "24 of 48" in text and "nothing is left of the val split" in text
        assert len((tmp_path / "c/d-unreadable.txt").read_text().splitlines()) == 24


# ---- links and permissions ---------------------------------------------------------------------


def test_links_that_lead_nowhere_do_not_take_a_class_along(folder, tmp_path):
    (folder / "train/.#draft").symlink_to("nobody@host")  # an editor's lock
    (folder / "train/d").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UsageError, match="train/d: a broken link"):
        pictures.open_source(folder)
    (folder / "train/d").unlink()
    (folder / "train/a/more").symlink_to("more")  # to itself
    with pytest.raises(UsageError, match="a/more: a broken link"):
        pictures.open_source(folder)
    (folder / "train/a/more").unlink()
    check_whole(packed(folder, tmp_path / "c"))


def test_folders_that_lead_back_into_themselves(folder, tmp_path):
    (folder / "train/a/again").symlink_to(folder / "train/a")
    (folder / "train/b/up").symlink_to("..")        # the other classes do not become b
    (folder / "train/c/root").symlink_to("/")       # nor does the whole disk become c
    (folder / "train/c/elsewhere").symlink_to(tmp_path / "x")
    coloured(tmp_path / "x/12.png", 2, 12)
    (tmp_path / "x/back").symlink_to(folder)
    (folder / "train/a/x.jpg").mkdir()              # a folder, whatever its name says
    coloured(folder / "train/a/x.jpg/13.png", 0, 13)
    train = packed(folder, tmp_path / "c").train
    assert len(train) == 38 and train.labels.bincount().tolist() == [13, 12, 13]
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/x").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="no images found"):
        pictures.open_source(tmp_path / "loop")


def test_what_is_passed_over_is_said(tmp_path):
    for i in range(3):
        coloured(tmp_path / f"training/labeled/a/{i}.png", 0, i)
    coloured(tmp_path / "training/labeled/loose.png", 0, 0)
    coloured(tmp_path / "training/other/0.png", 0, 0)
    coloured(tmp_path / "validation/a/0.png", 0, 0)
    coloured(tmp_path / "extra/0.png", 0, 0)
    coloured(tmp_path / "loose.png", 0, 0)
    text = "\n".join(pictures.open_source(tmp_path).description)
    top = tmp_path.name
    words = f"left out 4 pictures beside what was recognised: 1 in {top}, 1 in {top}/extra, 1 in {top}/training/labeled"
    assert words in " ".join(text.split())


def test_pictures_that_are_not_read_for_their_name_or_kind(folder, tmp_path):
    for name in ("no ending", "photo.jpg?w=300"):
        shutil.copy(folder / "train/a/0.png", folder / "train/a" / name)
    (folder / "train/a/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "train/a/notes").write_text("no picture")
    os.mkfifo(folder / "train/a/pipe")  # nobody waits for it
    text = Child(lambda: " ".join(" ".join(pictures.open_source(folder).description).split())).result(timeout=20)
    assert "left out 3 pictures of a kind or name that is not read, 1 without an ending" in text
    assert "1 .HEIC, 1 .jpg?w=300: convert or rename them" in text
    assert "2 files that are no images, such as notes" in text
    for i in range(60):
        (folder / f"train/b/{i}.heic").touch()
    with pytest.raises(UsageError, match="most pictures would be left out, 63 pictures.*: convert or rename"):
        pictures.open_source(folder)


def test_many_that_are_not_read_take_no_longer_each(folder, monkeypatch):
    class Counted(list):
        looked = 0

        def __iter__(self):
            Counted.looked += 1
            return super().__iter__()

    monkeypatch.setattr(folders, "foreign_pictures", lambda files: Counted(files))
    for i in range(30):
        (folder / f"train/b/{i}.heic").touch()
    pictures.open_source(folder)
    assert Counted.looked < 10  # not once for each file


def test_most_pictures_are_never_left_out(tmp_path):
    for i in range(6):
        coloured(tmp_path / f"{i}.png", 0, i)
        coloured(tmp_path / f"old/{i % 5}.png", 0, i)
    with pytest.raises(UsageError, match="most pictures would be left out, 6 pictures beside what was recognised"):
        pictures.open_source(tmp_path)


def test_folders_of_systems_tools_and_runs_are_passed_over(folder, tmp_path):
    for name in ("__MACOSX/train/a", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints",
                 "train/a/@eaDir", "train/.trash", "runs/simsiam-1", "train/venv/site"):
        for i in range(30):
            coloured(folder / name / f"{i}.png", 0, i)
    (folder / "train/a/._0.png").touch()
    for name in ("runs/simsiam-1/args.json", "runs/simsiam-1/metrics.jsonl", "train/venv/pyvenv.cfg"):
        (folder / name).touch()
    for _ in range(2):
        check_whole(packed(folder, folder / "c"))
    assert not [line for line in pictures.open_source(folder).description if "left out" in line]


@pytest.fixture
def public():
    """A folder that another user can reach (pytest's belong to one user alone)."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    for parent, names, _ in os.walk(path):
        for name in names:
            os.chmod(os.path.join(parent, name), 0o777)
    shutil.rmtree(path)


def as_nobody(work):
    """work() of a user without privileges: root may read everything."""
    def drop():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return work()

    decoding.image_formats()  # its imports: the other user may not be able to read the installation
    return Child(drop).result()


def test_files_and_folders_without_permission(public):
    folder, cache = public / "d", public / "c"
    for label, name in enumerate("abc"):
        for i in range(4):
            coloured(folder / "train" / name / f"{i}.png", label, i)
    (folder / "train/b/2.png").chmod(0)

    def work(skip):
        try:
            d = packed(folder, cache, skip_unreadable=skip, splits=("train",))
            return sorted(d.train.paths)
        except UsageError as error:
            return str(error)

    text = as_nobody(lambda: work(False))
    assert "1 of 9 images cannot be read" in text and "b/2.png (Permission denied)" in text
    assert len(as_nobody(lambda: work(True))) == 8
    before = (folder / "train/b/2.png").stat()
    (folder / "train/b/2.png").chmod(0o644)
    assert (folder / "train/b/2.png").stat().st_mtime_ns == before.st_mtime_ns
    assert len(as_nobody(lambda: work(False))) == 9  # with the permission it is there, its time unchanged
    (folder / "train/b").chmod(0)
    text = as_nobody(lambda: work(True))
    assert "train/b: cannot be read (Permission denied)" in text


# ---- the cache ---------------------------------------------------------------------------------


def nothing_left(cache):
    assert not [path.name for path in cache.iterdir() if not path.name.startswith(("d-train-8-", "d-val-8-"))]
    return True


def counting(path, monkeypatch, slow=0.0):
    """Every decoded picture adds a byte to a file, in whatever process."""
    decode = store.decode

    def counted(*args):
        with open(path, "ab") as file:
            file.write(b".")
        time.sleep(slow)
        return decode(*args)

    monkeypatch.setattr(store, "decode", counted)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_pack_the_same_at_once(folder, tmp_path, monkeypatch, processes):
    counting(tmp_path / "count", monkeypatch, slow=0.002)
    go, start = os.pipe()

    def work():
        os.read(go, 1)
        check_whole(packed(folder, tmp_path / "c", workers=2))
        return True

    children = [Child(work) for _ in range(processes)]
    os.write(start, b"x" * processes)
    assert all(child.result() for child in children)
    assert 48 <= (tmp_path / "count").stat().st_size <= 48 * processes
    assert len(list((tmp_path / "c").iterdir())) == 2 and nothing_left(tmp_path / "c")


@pytest.mark.parametrize("moment", ["create_images", "decode", "fsync", "publish", "open_store"])
def test_killed_while_packing(folder, tmp_path, monkeypatch, moment):
    cache = tmp_path / "c"

    def work():
        place = os if moment == "fsync" else store
        function, calls = getattr(place, moment), []

        def deadly(*args):
            calls.append(args)
            if len(calls) == {"decode": 20, "open_store": 2}.get(moment, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        setattr(place, moment, deadly)
        packed(folder, cache)

    with pytest.raises(RuntimeError, match="signal 9"):
        Child(work).result()
    left = list(cache.glob(".packing-*"))
    assert left or moment == "open_store"  # that one is after the renaming
    for path in left:
        os.utime(path, (0, 0))
    check_whole(packed(folder, cache))
    assert nothing_left(cache)


def test_leftovers_of_a_day_ago_go_younger_ones_stay(folder, tmp_path):
    cache = tmp_path / "c"
    for name, hours in (("old", 25), ("young", 23)):
        (cache / f".packing-{name}").mkdir(parents=True)
        (cache / f".packing-{name}/images.bin").touch()
        os.utime(cache / f".packing-{name}", (time.time() - 3600 * hours,) * 2)
    (cache / ".packing-file").touch()
    (cache / ".packing-link").symlink_to(folder)
    os.utime(cache / ".packing-file", (0, 0))
    os.utime(cache / ".packing-link", (0, 0), follow_symlinks=False)
    check(packed(folder, cache, splits=("val",)).val, 12)
    assert [path.name for path in cache.glob(".packing-*")] == [".packing-young"]
    assert (folder / "train/a/0.png").exists()  # a link goes, not what it leads to


def test_an_interrupted_packing_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_a_source_that_changed_since(folder, tmp_path):
    check_whole(packed(folder, tmp_path / "c"))
    path = folder / "train/a/3.png"
    before = path.stat()
    other = encoded(Image.new("RGB", (20, 30), (1, 2, 3)), "PNG")
    path.write_bytes(other + bytes(before.st_size - len(other)) if len(other) < before.st_size else other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the length may be the same, the time is not
    d = packed(folder, tmp_path / "c")
    assert d.train.images[d.train.paths.index(str(path)), :, 0, 0].tolist() == [1, 2, 3]
    path.unlink()
    check(packed(folder, tmp_path / "c").train, 35)
    coloured(folder / "train/a/15.png", 0, 15)
    check(packed(folder, tmp_path / "c").train, 36)
    coloured(folder / "train/aa/0.png", 0, 0)  # a class more: the same validation files have other numbers
    assert packed(folder, tmp_path / "c").val.labels.tolist() == [0] * 4 + [2] * 4 + [3] * 4
    shutil.rmtree(folder / "train/aa")
    (folder / "train/b").rename(folder / "train/x")
    (folder / "train/c").rename(folder / "train/b")
    (folder / "train/x").rename(folder / "train/c")  # b and c change their names
    train = packed(folder, tmp_path / "c").train
    assert len(train) == 36 and not train.skipped
    for image, path in zip(train.images, train.paths, strict=True):
        assert image[0, 0, 0] == {"a": 20, "b": 180, "c": 100}[Path(path).parent.name]


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_source_that_changes_while_it_is_packed(folder, tmp_path, monkeypatch, change):
    decode, path = store.decode, folder / "train/a/3.png"

    def decode_and_change(name, size):
        if name.endswith("train/c/5.png"):
            coloured(path, 0, 4) if change == "rewritten" else path.unlink()
        return decode(name, size)

    monkeypatch.setattr(store, "decode", decode_and_change)
    with pytest.raises(UsageError, match="train images changed while"):
        packed(folder, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    monkeypatch.undo()
    d = packed(folder, tmp_path / "c")
    assert len(d.train) == (36 if change == "rewritten" else 35)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def damages(tmp_path):
    """name -> what is done to a store"""
    def evil(store):
        (store / "meta.pt").write_bytes(saved({"shape": [36, 8], "labels": Evil(tmp_path / "ran")}))

    def replace(store, make):
        shutil.rmtree(store)
        make(store)

    return {
        "meta cut": lambda store: os.truncate(store / "meta.pt", 700),
        "meta empty": lambda store: os.truncate(store / "meta.pt", 0),
        "meta garbage": lambda store: (store / "meta.pt").write_bytes(b"\x80\x02garbage" * 99),
        "meta of something else": lambda store: torch.save({"model": torch.ones(3)}, store / "meta.pt"),
        "meta a folder": lambda store: ((store / "meta.pt").unlink(), (store / "meta.pt").mkdir()),
        "meta evil": evil,
        "images cut": lambda store: os.truncate(store / "images.bin", 1000),
        "images longer": lambda store: os.truncate(store / "images.bin", 36 * 192 + 1),
        "images empty": lambda store: os.truncate(store / "images.bin", 0),
        "images gone": lambda store: (store / "images.bin").unlink(),
        "an empty folder": lambda store: replace(store, Path.mkdir),
        "a file": lambda store: replace(store, Path.touch),
        "a link nowhere": lambda store: replace(store, lambda path: path.symlink_to("nowhere")),
    }


def test_a_damaged_store_is_built_anew(folder, tmp_path):
    cache = tmp_path / "c"
    check_whole(packed(folder, cache))
    final = next(cache.glob("d-train-8-*"))
    for name, damage in damages(tmp_path).items():
        damage(final)
        assert store.open_store(final) is None, name
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch remarks on odd files: nothing of it reaches the user
            check_whole(packed(folder, cache))
        assert nothing_left(cache) and store.open_store(final) is not None, name
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(saved(Evil(tmp_path / "ran"))), weights_only=False)
    assert (tmp_path / "ran").exists()  # loaded carelessly, it would have run: the trap works


# ---- disks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(path, *options):
    """A small file system of its own in memory, for real."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a file system, and not in every container")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(folder, tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        for _ in range(2):
            text = refusal(folder, disk / "c", size=160)
            assert "disk full: 2.8 MB needed" in text and "--cache" in text
            assert not list((disk / "c").iterdir())
        check_whole(packed(folder, disk / "c"))  # and what fits is packed


def test_a_stdout_that_closes_is_no_fault_of_the_cache(folder, tmp_path, monkeypatch):
    def closed(*words, **kind):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(store, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        pictures.pack(pictures.open_source(folder), 16, cache=tmp_path / "cache")


def test_a_disk_that_others_fill_meanwhile(folder, tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        def work():
            decode = store.decode

            def fill(path, size):
                if path.endswith("a/3.png"):
                    with contextlib.suppress(OSError), open(disk / "other", "ab") as file:
                        while True:
                            os.write(file.fileno(), bytes(4096))
                return decode(path, size)

            store.decode = fill
            return refusal(folder, disk / "c", size=100)

        text = Child(work).result()  # its space is taken at the start, or it would die here; that for labels is gone
        assert "No space left on device" in text and "--cache" in text
        assert not list((disk / "c").iterdir())
        (disk / "other").unlink()
        check_whole(packed(folder, disk / "c", size=100))


def test_a_limit_of_file_sizes(folder, tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        return refusal(folder, tmp_path / "c")

    assert "File too large" in Child(work).result()
    assert not list((tmp_path / "c").iterdir())


def test_a_disk_that_cannot_be_written(folder, tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        check_whole(packed(folder, disk / "c"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        check_whole(packed(folder, disk / "c"))  # a store that is there can be read
        text = refusal(folder, disk / "c", size=9)
        assert "Read-only file system" in text and "--cache" in text


def test_a_cache_without_permission(public):
    cache = public / "c"
    cache.mkdir(mode=0o755)
    coloured(public / "d/0.png", 0, 0)

    def work():
        return refusal(public / "d", cache)

    cache.chmod(0o555)
    text = as_nobody(work)
    assert f"{cache} (Permission denied)" in text and "--cache" in text
    cache.chmod(0o777)
    assert as_nobody(work) is None and len(list(cache.iterdir())) == 1


def test_a_list_that_cannot_be_written(folder, tmp_path):
    (folder / "val/a/0.png").write_bytes(b"")
    (tmp_path / "c/d-unreadable.txt").mkdir(parents=True)  # in the way
    text = refusal(folder, tmp_path / "c")
    assert "d-unreadable.txt cannot be written" in text and "a/0.png (empty file)" in text
    check(packed(folder, tmp_path / "c", skip_unreadable=True).val, 11)


def test_a_user_without_a_home(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as in a container that runs under a number
    with pytest.raises(UsageError, match="--cache"):
        packed(folder, None)


# ---- batches of several processes --------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("count, size, world", [(50, 8, 3), (50, 8, 4), (49, 16, 8), (17, 16, 4), (3, 8, 4)])
def test_ranks_count_every_image_once(count, size, world, prefetch):
    images = torch.arange(count).byte().view(-1, 1, 1, 1).repeat(1, 3, 2, 2)
    split = pictures.Split(images, torch.arange(count) % 3, torch.arange(count) + 0.5, [str(i) for i in range(count)])

    def steps(rank, start=0, **options):
        batches = pictures.Batches(split, size, seed=1, rank=rank, world=world, **options)
        batches.hold = lambda: not prefetch
        found = list(batches.batches(4, start))
        assert len(found) == len(batches) - start  # every rank takes as many steps, or they would wait for ever
        for x, aspect, labels, index in found:
            assert x.shape == (len(index), 3, 2, 2) and x[:, 0, 0, 0].tolist() == index.tolist()
            assert labels.equal(index % 3) and aspect.equal(index + 0.5)
        return [index.tolist() for *_, index in found]

    shares = [steps(rank, drop_last=False) for rank in range(world)]
    alone = [index.tolist() for index in pictures.Batches(split, size, seed=1, drop_last=False).order(4).split(size)]
    for step, batch in enumerate(alone):  # the ranks in order are the batch of one process
        assert sum((share[step] for share in shares), []) == batch
    assert sorted(sum(sum(shares, []), [])) == list(range(count))
    assert [steps(rank, start=1, drop_last=False) for rank in range(world)] == [share[1:] for share in shares]
    if size % world == 0 and count >= size:  # training: equal shares, the short batch left out
        shares = [steps(rank) for rank in range(world)]
        assert all(len(share) == size // world for rank in shares for share in rank)
        assert sum((share[-1] for share in shares), []) == alone[count // size - 1]
