"""Any image source -> one packed uint8 tensor per split, and batches from it.

    source  = data.open_source("./food-11")         recognise: fast, reads no picture
    dataset = data.pack(source, size=128)           decode everything once; milliseconds the next time
    batches = data.Batches(dataset.train, 256, device)
    for images, aspect, labels, index in batches.batches(epoch):  ...

Sources     "toy" (drawn here), cifar10, cifar100, stl10, imagenette, food101 (torchvision), or a folder
            recognised by its shape: train/val/test folders of class folders (also food-11 as published
            in 2021 and 2022), class folders without a split, loose images, unpacked CIFAR batches.
Packed      images (N, 3, S, S) uint8, memory-mapped from the cache folder. Every picture is squashed to
            S x S and remembers its width/height in `aspect`, so that a crop can be drawn in the original
            geometry and no side of the picture is lost. Labelled images come first.
Label       the position of the class in `classes`; -1 = unlabelled.

Importing this file does nothing.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import queue
import re
import shutil
import textwrap
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from common import NAMED_DATA, Progress, UsageError

FORMAT = 1  # of a packed store; raise it when the same source would give other bytes
MARKER = {  # what each set unpacks to, below the data root
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "stl10": ("stl10_binary",),
    "imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160"),
    "food101": ("food-101",),
}
STATISTICS = {  # per-channel mean and std of the training pixels
    "toy": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"),
          "test": ("test", "testing", "evaluation")}
LABELED, UNLABELED = ("labeled", "labelled"), ("unlabeled", "unlabelled")
SHAPES = ("understood are train/, val/, test/ folders of class folders, class folders without a split, "
          "loose images, food-11, and a folder that holds cifar-10-batches-py or cifar-100-python")


@dataclass
class Items:
    """One split of a source, before any picture is read."""

    labels: list                      # one int per image; for a `load`ed split, see there
    files: list                       # the images; for a `load`ed split the files it is read from
    load: Callable | None = None      # size -> (labels, names, iterator over (n, 3, s, s) uint8), or None
    tag: str = ""                     # whatever else the pixels depend on
    counts: tuple = (0, 0)            # labelled, unlabelled


@dataclass
class Source:
    """What `open_source` recognised. kind: "toy", "cifar", "stl10" or "photos", for the recipe tables."""

    name: str
    kind: str
    classes: list
    mean: tuple
    std: tuple
    splits: dict                      # "train", "val", "test" -> Items or None
    description: list = field(default_factory=list)  # lines to print


@dataclass
class Split:
    """One packed split; row i of everything is the same image."""

    images: torch.Tensor              # (N, 3, S, S) uint8, memory-mapped: do not write to it
    labels: torch.Tensor              # (N,) int64, -1 = unlabelled; the labelled ones come first
    aspect: torch.Tensor              # (N,) float32, width/height of the original
    paths: list                       # the file, or e.g. "cifar10/train/17"
    skipped: int = 0                  # unreadable files that were left out
    held: dict = field(default_factory=dict, repr=False)  # device -> the images there, shared by Batches

    def __len__(self):
        return len(self.images)


@dataclass
class Dataset:
    """What `pack` gives. A split that the source lacks, or that was not asked for, is None."""

    train: Split | None
    val: Split | None
    test: Split | None
    classes: list
    mean: tuple
    std: tuple
    size: int
    name: str
    kind: str


# ------------------------------------------------------------------------------------------------
# Recognising a source
# ------------------------------------------------------------------------------------------------


def open_source(data, root=None, download=False, holdout=0.1, seed=0):
    """Recognises `data`: a name of NAMED_DATA, or a folder. Reads no picture.

    root      where the named sets lie or are downloaded to, default "./data".
    download  fetch a named set that is not there.
    holdout   fraction of the labelled training images that becomes the validation split when the source
              has none: drawn per class from `seed`, at least one of every class that has two. 0: none.
    returns   Source.
    raises    UsageError, one line, for anything that cannot be understood.
    """
    if not 0 <= holdout < 1:
        raise UsageError(f"--holdout {holdout}: must be at least 0 and below 1")
    data, root = os.path.expanduser(str(data)), os.path.expanduser(str(root or "./data"))
    if data == "toy":
        return open_toy()
    if data in NAMED_DATA:
        return open_named(data, root, download, holdout, seed)
    if not os.path.isdir(data):
        if os.path.exists(data):
            raise UsageError(f"--data {data}: is a file; give the folder that holds the images")
        if os.sep in data or data.startswith("."):
            raise UsageError(f"--data {data}: folder not found")
        raise UsageError(f"--data {data}: no such folder, and none of the names {', '.join(NAMED_DATA)}")

    here = os.path.abspath(data)
    found = [n for n in MARKER for m in MARKER[n]
             if n != "imagenette" and (os.path.isdir(os.path.join(here, m)) or os.path.basename(here) == m)]
    if len(found) > 1:
        raise UsageError(f"--data {data}: holds {' and '.join(found)}; say which: "
                         f"--data {found[0]} --data-root {data}")
    if found:
        inside = os.path.basename(here) in MARKER[found[0]]
        return open_named(found[0], os.path.dirname(here) if inside else data, False, holdout, seed)
    return open_folder(data, holdout, seed)


def open_toy():
    splits = {}
    for split, count in TOY_COUNT.items():
        labels = [i % len(TOY_CLASSES) for i in range(count)]

        def load(size, split=split, labels=labels):
            return labels, [f"toy/{split}/{i}" for i in range(len(labels))], draw_toy(split, size)

        splits[split] = Items(labels, [], load, f"toy {TOY_VERSION} {split}", (count, 0))
    source = Source("toy", "toy", list(TOY_CLASSES), *STATISTICS["toy"], splits)
    return described(source, "toy: glyphs drawn by this program, grey, no download")


def open_named(name, root, download, holdout, seed):
    """The sets that torchvision knows. See `open_source`."""
    base = next((b for b in (os.path.join(root, m) for m in MARKER[name]) if os.path.isdir(b)), None)
    if base is None and download:
        fetch(name, root)
        base = next((b for b in (os.path.join(root, m) for m in MARKER[name]) if os.path.isdir(b)), None)
    if base is None:
        raise UsageError(f"--data {name}: not found in {root} (no folder {MARKER[name][0]} there); "
                         "fetch it with --download, or say where it is with --data-root")
    try:
        if name == "imagenette":
            return open_folder(base, holdout, seed, name=name, rename=IMAGENETTE)
        return {"food101": open_food101, "stl10": open_stl10}.get(name, open_cifar)(name, base, holdout, seed)
    except (OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(name, base, error) from error


def damaged(name, base, error):
    return UsageError(f"{base}: incomplete or damaged ({one_line(error)}); "
                      f"remove it and fetch {name} anew with --download")


def fetch(name, root):
    from torchvision import datasets
    try:
        if name == "stl10":
            datasets.STL10(root, split="test", download=True)
        elif name == "imagenette":
            datasets.Imagenette(root, split="train", size="320px", download=True)
        else:
            getattr(datasets, {"food101": "Food101"}.get(name, name.upper()))(root, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise UsageError(f"--download: cannot fetch {name} into {root} ({one_line(error)})") from error


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, strings and numbers, and refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def open_cifar(name, base, holdout, seed):
    """CIFAR-10 and -100 have no validation split: it comes from train, the test split stays whole."""
    with open(os.path.join(base, "batches.meta" if name == "cifar10" else "meta"), "rb") as file:
        classes = PlainUnpickler(file, encoding="latin1").load()[
            "label_names" if name == "cifar10" else "fine_label_names"]
    files = sorted(entry.path for entry in os.scandir(base) if entry.is_file())
    per_class = 50_000 // len(classes)
    held = held_count(per_class, holdout) * len(classes)
    counts = {"train": (50_000 - held, 0), "val": (held, 0), "test": (10_000, 0)}

    def load(split):
        from torchvision import datasets
        part = "test" if split == "test" else "train"
        try:  # torchvision compares every file with its published MD5 before it unpickles it
            cifar = getattr(datasets, name.upper())(os.path.dirname(base), train=part == "train")
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise damaged(name, base, error) from error
        labels, rows = torch.tensor(cifar.targets), torch.arange(len(cifar.targets))
        if part == "train":
            rows = rows[hold_out(labels, holdout, seed) == (split == "val")]
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)                   # (N, 3, 32, 32)
        names = [f"{name}/{part}/{i}" for i in rows.tolist()]
        return labels[rows].tolist(), names, (images[chunk] for chunk in rows.split(1000))

    splits = {}
    for split in SPLITS:
        tag = json.dumps([name, split, holdout, seed] if split != "test" else [name, split])
        splits[split] = Items([], files, lambda size, split=split: load(split), tag, counts[split])
    splits["val"] = splits["val"] if held else None
    source = Source(name, "cifar", list(classes), *STATISTICS[name], splits)
    return described(source, f"{name} in {base}", held_note(splits["val"], holdout))


def open_stl10(name, base, holdout, seed):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images of 96 px, 8,000 test images."""
    with open(os.path.join(base, "class_names.txt")) as file:
        classes = file.read().split()
    labels = {part: stl10_labels(base, part, len(classes)) for part in ("train", "unlabeled", "test")}
    rows = {part: torch.arange(len(labels[part])) for part in labels}
    held = hold_out(labels["train"], holdout, seed)
    splits = {
        "train": {"train": rows["train"][~held], "unlabeled": rows["unlabeled"]},
        "val": {"train": rows["train"][held]},
        "test": {"test": rows["test"]},
    }
    for split, chosen in splits.items():
        tag = json.dumps([split, holdout, seed] if split != "test" else [split])
        splits[split] = stl10_items(base, chosen, labels, tag)
    source = Source(name, "stl10", classes, *STATISTICS["imagenet"], splits)
    return described(source, f"stl10 in {base}", held_note(splits["val"], holdout))


def stl10_labels(base, part, classes):
    """(N,) labels of a pair of files: part_X.bin has 3*96*96 bytes an image, part_y.bin one byte, 1 to 10."""
    path = os.path.join(base, part + "_X.bin")
    count, rest = divmod(os.path.getsize(path), 3 * 96 * 96)
    labels = torch.full((count,), -1)
    if part != "unlabeled":
        labels = torch.tensor(list(Path(base, part + "_y.bin").read_bytes())) - 1
    if rest or not count or len(labels) != count or not -1 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{part}_X.bin has not the size it should")
    return labels


def stl10_items(base, chosen, labels, tag):
    """chosen: part -> rows of it."""
    def load(size):
        def chunks():
            for part, rows in chosen.items():
                flat = map_bytes(os.path.join(base, part + "_X.bin"), len(labels[part]) * 3 * 96 * 96)
                images = flat.view(-1, 3, 96, 96).transpose(2, 3)       # on disk column by column
                yield from (images[chunk] for chunk in rows.split(1000))

        names = [f"stl10/{part}/{i}" for part in chosen for i in chosen[part].tolist()]
        return here.tolist(), names, chunks()

    here = torch.cat([labels[part][rows] for part, rows in chosen.items()])
    files = [path for part in chosen for path in sorted(map(str, Path(base).glob(part + "_*.bin")))]
    labelled = int((here >= 0).sum())
    return Items([], files, load, tag, (labelled, len(here) - labelled)) if len(here) else None


def open_food101(name, base, holdout, seed):
    found = {}
    for split in ("train", "test"):
        with open(os.path.join(base, "meta", split + ".json")) as file:
            found[split] = [(os.path.join(base, "images", *image.split("/")) + ".jpg", label)
                            for label, images in json.load(file).items() for image in images]
    return from_files(name, found, f"food101 in {base}", holdout, seed)


# ------------------------------------------------------------------------------------------------
# Recognising a folder by its shape
# ------------------------------------------------------------------------------------------------


def open_folder(folder, holdout, seed, name=None, rename=None):
    """Recognises the shape of `folder`. See `open_source`; rename: folder name -> class name."""
    ignored, notes = [], []
    found, shape = read_folder(folder, ignored, notes)
    if not any(found.values()):
        what = f"no images among {len(ignored):,} files" if ignored else "empty, no images found"
        raise UsageError(f"--data {folder}: {what}; {SHAPES}")
    if rename:
        found = {s: [(path, rename.get(c, c)) for path, c in items] for s, items in found.items()}
    if ignored:
        plural = "file that is no image" if len(ignored) == 1 else "files that are no images"
        notes.append(("ignored", f"{len(ignored):,} {plural}, such as {os.path.basename(ignored[0])}"))
    name = name or re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(folder))).strip("-.") or "images"
    return from_files(name, found, f"{folder}: {shape}", holdout, seed, notes)


def read_folder(folder, ignored, notes):
    """-> ({"train", "val", "test": list of (path, class name or None)}, the shape in words)."""
    subfolders, split_folders = visible_folders(folder), {}
    for split, names in SPLITS.items():
        matching = [s for s in subfolders if os.path.basename(s).lower() in names]
        if len(matching) > 1:
            names = " and ".join(map(os.path.basename, matching))
            raise UsageError(f"--data {folder}: {names} both look like the {split} split; rename one")
        if matching:
            split_folders[split] = matching[0]
    if "train" in split_folders:
        unlabeled = [s for s in subfolders if os.path.basename(s).lower() in UNLABELED]
        return read_splits(split_folders, unlabeled, ignored, notes)
    if split_folders and len(split_folders) == len(subfolders):
        raise UsageError(f"--data {folder}: has no train folder beside "
                         f"{' and '.join(map(os.path.basename, subfolders))}")

    loose = images_below(folder, ignored, deep=False)
    if len(subfolders) == 1 and not loose:  # an archive that unpacked into one more folder
        return read_folder(subfolders[0], ignored, notes)
    classes = read_classes(subfolders, ignored)
    if classes:
        note_loose(folder, loose, notes)
        return {"train": classes}, "class folders without a split"
    if loose:
        notes.append(("", "no labels: nothing to measure kNN accuracy with"))
    return {"train": [(path, None) for path in loose]}, "loose images"


def read_splits(split_folders, unlabeled, ignored, notes):
    """Split folders; `unlabeled`: more folders of training images, beside the splits. See `read_folder`."""
    found, shape = {"train": read_split(split_folders["train"], True, ignored, notes)}, "split folders"
    numbered = any(os.path.dirname(path) == split_folders["train"] for path, _ in found["train"])
    if numbered:
        shape += " of <class>_<n> files, like food-11 of 2022"
    for split in [s for s in split_folders if s != "train"]:
        found[split] = read_split(split_folders[split], numbered, ignored, notes)
    inside = {os.path.basename(s).lower() for s in visible_folders(split_folders["train"])}
    if inside & {*LABELED, *UNLABELED}:
        shape += " with labelled and unlabelled images, like food-11 of 2021"
        # That set keeps all its test images in one folder "00", which is not their class.
        if len({c for _, c in found.get("test", ())}) == 1 < len({c for _, c in found["train"] if c}):
            found["test"] = [(path, None) for path, _ in found["test"]]
            notes.append(("", "the one folder of the test split is taken for no class"))
    found["train"] += [(path, None) for more in unlabeled for path in images_below(more, ignored)]
    return found, shape


def read_split(folder, numbered, ignored, notes):
    """Images of one split as (path, class name or None).

    From class folders, perhaps below `labeled`; those below `unlabeled` have none. Without such folders the
    images lie loose, and if `numbered`, <class>_<n>.jpg tells the class.
    """
    subfolders = visible_folders(folder)
    labeled = [s for s in subfolders if os.path.basename(s).lower() in LABELED]
    unlabeled = [s for s in subfolders if os.path.basename(s).lower() in UNLABELED]
    classes = [c for s in labeled for c in visible_folders(s)]
    classes = classes or [s for s in subfolders if s not in unlabeled]
    found = read_classes(classes, ignored)
    found += [(path, None) for s in unlabeled for path in images_below(s, ignored)]
    loose = images_below(folder, ignored, deep=False)
    if found:
        note_loose(folder, loose, notes)
        return found
    number = [re.match(r"([0-9]+)_", os.path.basename(path)) if numbered else None for path in loose]
    return [(path, match and match[1]) for path, match in zip(loose, number, strict=True)]


def read_classes(folders, ignored):
    """Class folders -> (path, folder name). An empty one is no class."""
    return [(path, os.path.basename(f)) for f in folders for path in images_below(f, ignored)]


def note_loose(folder, loose, notes):
    if loose:
        notes.append(("ignored", f"{len(loose):,} loose images beside the folders in {folder}"))


def natural(text):
    """Sort key that takes numbers by their value: "2" before "10"."""
    return [int(t) if i % 2 else t.casefold() for i, t in enumerate(re.split(r"([0-9]+)", text))], text


def hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def visible_folders(folder):
    try:
        names = [e.name for e in os.scandir(folder) if e.is_dir() and not hidden(e.name)]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from error
    return [os.path.join(folder, name) for name in sorted(names, key=natural)]


def images_below(folder, ignored, deep=True):
    """Paths of the images in `folder` and its subfolders, in natural order; other files go to `ignored`."""
    def refuse(error):
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})")

    extensions, seen, found = image_extensions(), set(), []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        identity = os.stat(here)
        if (identity.st_dev, identity.st_ino) in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted((f for f in folders if deep and not hidden(f)), key=natural)
        for name in sorted(files, key=natural):
            good = not hidden(name) and os.path.splitext(name)[1].lower() in extensions
            (found if good else ignored).append(os.path.join(here, name))
    return found


def image_extensions():
    """Of all formats that Pillow opens, save those it only knows by name, and EPS, which runs a program."""
    not_decoded = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
    known = Image.registered_extensions()
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in not_decoded}


def from_files(name, found, headline, holdout, seed, notes=()):
    """Source of image files. found: {"train", "val", "test": list of (path, class name or None)}."""
    classes = sorted({c for _, c in found.get("train", ()) if c is not None}, key=natural)
    number = {c: i for i, c in enumerate(classes)} | {None: -1}
    for split in ("val", "test"):
        for path, c in found.get(split, ()):
            if c not in number:
                raise UsageError(f'{path}: class "{c}" of the {split} split has no training images; '
                                 "add it to the training split or remove it")
    listed = {s: [(path, number[c]) for path, c in found.get(s, ())] for s in SPLITS}
    if not listed["train"]:
        raise UsageError(f"--data {headline.split(':')[0]}: no images in the training split")
    held = None
    if not listed["val"]:
        mask = hold_out(torch.tensor([label for _, label in listed["train"]]), holdout, seed).tolist()
        held = listed["val"] = list(itertools.compress(listed["train"], mask))
        listed["train"] = [item for item, out in zip(listed["train"], mask, strict=True) if not out]
    splits = {}
    for split, items in listed.items():
        items = sorted(items, key=lambda item: item[1] < 0)  # stable: the labelled ones first
        labels, unlabelled = [label for _, label in items], sum(label < 0 for _, label in items)
        counts = (len(items) - unlabelled, unlabelled)
        splits[split] = Items(labels, [path for path, _ in items], counts=counts) if items else None
    kind, statistics = kind_of(splits["train"], classes)
    source = Source(name, kind, classes, *statistics, splits)
    return described(source, headline, [*held_note(held, holdout), *notes])


def kind_of(train, classes):
    """CIFAR exported as image files is still CIFAR; everything else is photos."""
    small, typical = False, {10: "frog", 100: "aquarium_fish"}
    if typical.get(len(classes)) in classes:
        with contextlib.suppress(Exception), Image.open(train.files[0]) as image:  # broken ones: see `pack`
            small = image.size == (32, 32)
    return ("cifar", STATISTICS[f"cifar{len(classes)}"]) if small else ("photos", STATISTICS["imagenet"])


def held_count(images, fraction):
    """How many of a class of `images` are held out: at least one if it has two, never all."""
    return 0 if fraction == 0 or images < 2 else min(max(round(images * fraction), 1), images - 1)


def hold_out(labels, fraction, seed):
    """Stratified: a mask (N,) of the labelled images that become the validation split."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero().flatten()
        if c >= 0:
            chosen = torch.randperm(len(rows), generator=generator)[: held_count(len(rows), fraction)]
            mask[rows[chosen]] = True
    return mask


def held_note(held, holdout):
    text = f"validation: {holdout:.3g} of the labelled training images, held out per class"
    return [("", text)] if held else []


def described(source, headline, notes=()):
    """Fills in source.description: what was recognised, in lines of at most 78 columns."""
    rows = [("data", headline)]
    for split, title in (("train", "training"), ("val", "validation"), ("test", "test")):
        labelled, unlabelled = source.splits[split].counts if source.splits[split] else (0, 0)
        text = f"{labelled:,} labelled" + (f", {unlabelled:,} unlabelled" if unlabelled else "") + " images"
        rows.append((title, text if labelled + unlabelled else "none"))
    classes = source.classes[:12] + (["..."] if len(source.classes) > 12 else [])
    rows.append(("classes", f"{len(source.classes)}: {', '.join(classes)}" if classes else "none"))
    for title, text in [*rows, *notes]:
        source.description += textwrap.wrap(text, 78, break_on_hyphens=False,
                                            initial_indent=f"{title:<12}", subsequent_indent=" " * 12)
    return source


IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
}


# ------------------------------------------------------------------------------------------------
# Packing: decode once, keep the bytes
# ------------------------------------------------------------------------------------------------


def pack(source, size, cache=None, splits=("train", "val"), quiet=False, skip_unreadable=False, workers=None):
    """Decodes the splits asked for, or finds them in the cache. Other splits are not touched.

    size             S: the packed images are (N, 3, S, S).
    cache            folder, default $XDG_CACHE_HOME/unlabeled or ~/.cache/unlabeled.
    skip_unreadable  leave out files that cannot be decoded, instead of refusing the source.
    workers          threads that decode, default one per core that this process may use.
    returns          Dataset.
    raises           UsageError: unreadable files, a cache folder that cannot be written.
    """
    if size < 1:
        raise UsageError(f"--image-size {size}: must be at least 1")
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "unlabeled")
    cache = Path(cache or default).expanduser().absolute()
    packed = {}
    for split in SPLITS:
        items = source.splits.get(split) if split in splits else None
        if items is not None:
            final = cache / f"{source.name}-{split}-{size}-{store_key(items, size, skip_unreadable)}"
            items = pack_split(final, split, items, size, quiet, skip_unreadable, workers)
        packed[split] = items
    return Dataset(packed["train"], packed["val"], packed["test"], source.classes, source.mean, source.std,
                   size, source.name, source.kind)


def pack_split(final, split, items, size, quiet, skip_unreadable, workers):
    """The store `final` of one split as a Split, built if it is not there."""
    cache = final.parent
    packed = open_store(final)
    if packed is None:
        started = time.perf_counter()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            remove_leftovers(cache)
            temporary = cache / f".packing-{uuid.uuid4().hex}"
            temporary.mkdir()
            try:
                write = write_arrays if items.load else write_files
                write(temporary, items, size, f"packing {split}", quiet, skip_unreadable, workers)
                packed = publish(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise UsageError(f"cannot keep packed images in {cache} ({error.strerror or one_line(error)}); "
                             "make room there or choose another folder with --cache") from error
        if not quiet:
            print(f"packed {split}: {len(packed):,} images of {size} x {size} in "
                  f"{time.perf_counter() - started:.1f} s", flush=True)
    if packed.skipped and not quiet:
        print(f"left out {packed.skipped:,} unreadable images of the {split} split", flush=True)
    return packed


def store_key(items, size, skip_unreadable):
    """Changes when a file is added, removed, renamed, relabelled or written to, or when S changes."""
    digest = hashlib.sha256(repr((FORMAT, size, skip_unreadable, items.tag, items.labels)).encode())
    for path in items.files:
        try:
            stat = os.stat(path)
            facts = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        except OSError:  # gone meanwhile: decoding will say so
            facts = (os.path.abspath(path), None, None)
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def map_bytes(path, count):
    """The file as a (count,) uint8 tensor that is read page by page when it is used."""
    try:
        return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)
    except RuntimeError:  # Linux refuses private mappings larger than its memory, not shared ones
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8)


def open_store(folder):
    """-> Split, or None if there is no complete store."""
    try:
        meta = torch.load(folder / "meta.pt", weights_only=True)
        count, size, skipped = meta["shape"]
        paths = os.fsdecode(meta["paths"].encode("latin1")).split("\0")
        whole = os.path.getsize(folder / "images.bin") == count * 3 * size * size
        if not (whole and len(meta["labels"]) == len(meta["aspect"]) == len(paths) == count):
            return None
        images = map_bytes(folder / "images.bin", count * 3 * size * size).view(count, 3, size, size)
        return Split(images, meta["labels"], meta["aspect"], paths, skipped)
    except Exception:  # absent or damaged, in whatever way: it is built anew
        return None


def create_images(folder, count, size):
    """A new images.bin with its disk space reserved: a mapping that meets a full disk kills the process."""
    needed, path = count * 3 * size * size, folder / "images.bin"
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed")
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, needed)
    return torch.from_file(str(path), shared=True, size=needed, dtype=torch.uint8).view(count, 3, size, size)


def finish_store(folder, labels, aspect, paths, size, skipped):
    """Writes the meta file and sees to it that everything is on the disk."""
    buffer = io.BytesIO()
    torch.save({
        "shape": [len(paths), size, skipped],
        "labels": labels,
        "aspect": aspect,
        "paths": os.fsencode("\0".join(paths)).decode("latin1"),  # survives names that are no UTF-8
    }, buffer)
    (folder / "meta.pt").write_bytes(buffer.getvalue())
    for name in ("images.bin", "meta.pt"):
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())


def publish(temporary, final):
    """Renames the finished store into place. Whoever comes second uses what stands there already."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            os.rename(temporary, final)  # atomic; fails if `final` is there
        packed = open_store(final)
        if packed is not None:
            return packed
        aside = final.with_name(f".packing-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            os.rename(final, aside)  # a damaged one, out of the way
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{final.name} cannot be replaced")


def remove_leftovers(cache):
    """Half-written stores of processes that were killed, a day old at least."""
    for folder in cache.glob(".packing-*"):
        with contextlib.suppress(OSError):  # another process may be done with it at this moment
            if time.time() - folder.stat().st_mtime > 86400:
                shutil.rmtree(folder, ignore_errors=True)


def write_arrays(folder, items, size, label, quiet, skip_unreadable, workers):
    """Packs a split that comes as pixels already."""
    labels, names, chunks = items.load(size)
    images, done = create_images(folder, len(names), size), 0
    progress = Progress(len(names), label=label, unit="images", quiet=quiet)
    for chunk in chunks:                                                            # (n, 3, s, s)
        if chunk.shape[-1] != size:
            chunk = F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
            chunk = chunk.round().clamp(0, 255).to(torch.uint8)                     # (n, 3, S, S)
        images[done : done + len(chunk)] = chunk
        done += len(chunk)
        progress.update(done)
    progress.close()
    finish_store(folder, torch.tensor(labels), torch.ones(len(names)), names, size, 0)


def write_files(folder, items, size, label, quiet, skip_unreadable, workers):
    """Packs image files, in threads: Pillow decodes and resizes without holding Python's lock."""
    count = len(items.files)
    images, aspect, bad = create_images(folder, count, size), torch.ones(count), {}

    def decode_rows(rows):
        for i in rows:
            try:
                pixels, aspect[i] = decode(items.files[i], size)
                images[i] = pixels
            except Exception as error:  # broken files raise almost anything
                bad[i] = one_line(error, items.files[i])
        return len(rows)

    parts = [range(i, min(i + 16, count)) for i in range(0, count, 16)]
    progress, done = Progress(count, label=label, unit="images", quiet=quiet), 0
    pool = ThreadPoolExecutor(workers or usable_cores())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        try:
            for part in pool.map(decode_rows, parts):
                done += part
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()
    if bad and (not skip_unreadable or len(bad) == count):
        raise unreadable(bad, items.files, skip_unreadable)

    kept = [i for i in range(count) if i not in bad]
    if bad:
        for new, old in enumerate(kept):  # close the gaps
            images[new] = images[old]
        del images
        os.truncate(folder / "images.bin", len(kept) * 3 * size * size)
    labels = torch.tensor(items.labels)
    finish_store(folder, labels[kept], aspect[kept], [items.files[i] for i in kept], size, len(bad))


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unreadable(bad, files, skipping):
    first = "; ".join(f"{files[i]} ({bad[i]})" for i in sorted(bad)[:3])
    more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
    fix = "none is left" if skipping else "repair or remove them, or go on without them: --skip-unreadable"
    return UsageError(f"{len(bad):,} of {len(files):,} images cannot be read: {first}{more}; {fix}")


def one_line(error, path=""):
    """An exception in a few words, without the path that the line names anyway."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if os.path.getsize(path) == 0 else "no image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if getattr(error, "filename", None) not in (None, path):
        text += f": {error.filename}"
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."


# ------------------------------------------------------------------------------------------------
# Decoding one file
# ------------------------------------------------------------------------------------------------

TURNED = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path, size):
    """-> ((3, S, S) uint8 RGB, width/height of the upright original). Of an animation, the first frame.

    A JPEG much larger than S is decoded at 1/2, 1/4 or 1/8: its 8 x 8 blocks are cosine transforms, and a
    smaller inverse transform gives the smaller picture without computing the large one.
    """
    with Image.open(path) as image:
        width, height = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (size, size))  # never below S on either side
            image.load()
        else:
            image.load()
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
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = to_grey8(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image.convert("RGB")


def to_grey8(image):
    """Deep grey -> 8 bits, scaled. (`convert("L")` alone clips: all above 255 turns white.)

    16-bit integers are divided by 257, floats from 0 to 1 multiplied by 255; what lies outside such a
    range (32-bit scans, heights) is stretched from its own minimum to its maximum.
    """
    image.info.pop("transparency", None)
    whole = image.mode.startswith("I")
    low, high = 0, 65535 if whole else 1
    image = image.convert("F")
    darkest, brightest = image.getextrema()
    if darkest < low or brightest > high:
        low, high = darkest, brightest
    scale = 255 / max(high - low, 1e-12)
    image = image.point(lambda v: v * scale + (0.5 - low * scale))  # + 0.5: `convert` cuts off
    return image.convert("L")


# ------------------------------------------------------------------------------------------------
# The toy set
# ------------------------------------------------------------------------------------------------

TOY_VERSION = 4  # raise it when other pixels are drawn
TOY_COUNT = {"train": 4000, "val": 1000, "test": 1000}
TOY_CLASSES = ("disc", "ring", "square", "triangle", "plus", "T", "L", "crescent", "star", "two-bars")


def draw_toy(split, size):
    """Yields (n, 3, S, S) uint8: image i is a cut from an endless pattern of light copies of glyph i % 10.

    Images of a class differ in what random crops and colour jitter draw anew anyway: where the cut lies, its
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

    match name:
        case "disc":
            return disc(0, 0.72)
        case "ring":
            return disc(0, 0.6).abs() - 0.16
        case "square":
            return box(0, 0, 0.64, 0.64)
        case "triangle":
            return edges(3, 0.45)[0]
        case "plus":
            return torch.minimum(box(0, 0, 0.78, 0.2), box(0, 0, 0.2, 0.78))
        case "T":
            return torch.minimum(box(0, -0.52, 0.7, 0.2), box(0, 0.1, 0.2, 0.65))
        case "L":
            return torch.minimum(box(-0.4, 0, 0.2, 0.72), box(0.05, 0.52, 0.65, 0.2))
        case "crescent":
            return torch.maximum(disc(0, 0.78), -disc(0.4, 0.62))
        case "star":  # a pentagram is where at least four of five half-planes meet
            return edges(5, 0.3)[1]
        case _:  # two bars
            return torch.maximum((u.abs() - 0.45).abs() - 0.2, v.abs() - 0.72)


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


def labelled(split):
    """The labelled images of a split. They come first, so this is a view, not a copy."""
    count = int((split.labels >= 0).sum())
    if not bool((split.labels[:count] >= 0).all()):
        raise ValueError("labelled images must come before unlabelled ones")
    return Split(split.images[:count], split.labels[:count], split.aspect[:count], split.paths[:count],
                 held=split.held)  # what is on the device already serves both


class Batches:
    """Batches of a split, on a device.

    split       Split.
    batch_size  images of one step, over all ranks.
    shuffle     a new order every epoch, a function of (seed, epoch) alone: nothing to save for a resume.
    drop_last   leave out the last, short batch. For training only; an evaluation counts every image.
    rank, world this process yields part `rank` of `world` of every batch (of a short one perhaps nothing).
    raises      UsageError if there is not one whole batch, or if it cannot be shared equally.
    """

    def __init__(self, split, batch_size, device="cpu", seed=0, shuffle=True, drop_last=True,
                 rank=0, world=1):
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size}: must be at least 1")
        if drop_last and batch_size > len(split):
            raise UsageError(f"--batch-size {batch_size}: there are only {len(split)} images, not one step "
                             f"an epoch; choose at most {len(split)}")
        if drop_last and batch_size % world:
            raise UsageError(f"--batch-size {batch_size}: must be a multiple of the {world} processes")
        self.split, self.batch_size, self.device = split, batch_size, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # a thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.seed, self.shuffle, self.drop_last, self.rank, self.world = seed, shuffle, drop_last, rank, world
        self.prefetch = None  # True or False overrides the choice of `batches`

    def __len__(self):
        """Steps an epoch."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch):
        """(N,) int64: the rows in the order of this epoch."""
        if not self.shuffle:
            return torch.arange(len(self.split))
        # The seed of (seed, epoch) is hashed, or epoch 1 of seed 0 would be epoch 0 of seed 1.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(len(self.split), generator=generator)

    def batches(self, epoch, start=0):
        """Yields from step `start` of the epoch on:

        images (n, 3, S, S) uint8 and labels (n,) int64 on the device,
        aspect (n,) float32 and index (n,) int64, the rows of the split, on the host.
        """
        steps = self.order(epoch).split(self.batch_size)[start : len(self)]
        if not steps:
            return
        rows = [step.tensor_split(self.world)[self.rank] for step in steps]
        rows_there = torch.cat(rows).to(self.device).split([len(r) for r in rows])  # one transfer an epoch
        labels = self.split.labels.to(self.device)
        prefetch = self.prefetch
        if prefetch is None:
            prefetch = self.device.type != "cpu" and not self.hold()
        if prefetch:
            pixels = prefetched(self.split.images, rows, self.device)
        else:
            images = self.split.images if self.device.type == "cpu" else self.split.held[self.device]
            pixels = (images.index_select(0, index) for index in rows_there)
        try:
            for index, there, x in zip(rows, rows_there, pixels, strict=True):
                yield x, self.split.aspect[index], labels[there], index
        finally:
            pixels.close()  # ends the thread when the consumer stops early

    def hold(self):
        """Puts the images on the device if they fit comfortably; says whether they are there."""
        images, held = self.split.images, self.split.held
        there = held.get(self.device)
        if there is None or len(there) < len(images):
            if images.numel() > 0.4 * free_memory(self.device):
                return False
            held[self.device] = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
            for a in range(0, len(images), 4096):
                held[self.device][a : a + 4096] = images[a : a + 4096].to(self.device)
        return True


def free_memory(device):
    """Bytes; 0 where the device does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0


def prefetched(images, rows, device):
    """Yields images[index] on the device for each index of `rows`; one thread works two batches ahead.

    On CUDA the copies run on a stream of their own, beside the computation. What goes wrong in the thread
    is raised here; the thread ends when this generator does.
    """
    cuda = device.type == "cuda"
    ready, stop = queue.Queue(maxsize=2), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        try:
            if cuda:
                torch.cuda.set_device(device)  # a new thread starts on device 0
            stream = torch.cuda.Stream(device) if cuda else None
            for index in rows:
                if stop.is_set():
                    return
                host = torch.empty(len(index), *images.shape[1:], dtype=torch.uint8, pin_memory=cuda)
                torch.index_select(images, 0, index, out=host)
                with torch.cuda.stream(stream):  # does nothing for None
                    x = host.to(device, non_blocking=cuda)
                    put((x, stream.record_event() if cuda else None))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in rows:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            x, copied = item
            if cuda:
                torch.cuda.current_stream(device).wait_event(copied)
                x.record_stream(torch.cuda.current_stream(device))  # not to be reused while we compute on it
            yield x
    finally:
        stop.set()
        thread.join()
