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
Unreadable  pictures, of whatever kind, stop the program before training: one line, and a file that lists
            them all with the reasons. With --skip-unreadable they are left out, counted and listed.
Label       the position of the class in `classes`; -1 = unlabelled.

Importing this file does nothing.
"""

import contextlib
import errno
import functools
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
import stat
import textwrap
import threading
import time
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

from common import NAMED_DATA, Progress, UsageError, changed_images, printable, write_atomically
from toy import TOY_CLASSES, TOY_COUNT, TOY_VERSION, draw_toy

try:
    import fcntl
except ImportError:  # not on Windows: processes that pack the same do so beside each other
    fcntl = None

FORMAT = 2  # of a packed store; raise it when the same source would give other bytes
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
TRAIN, LABELED, UNLABELED = "train(ing)?", "(?<!un)labell?ed", "unl(ab(ell?ed)?)?"
SPLITS = {  # what the names of their folders say; see split_groups
    "train": rf"{TRAIN}([\W_]*{LABELED})?|{LABELED}([\W_]*{TRAIN})?",
    "val": "val(id(ation)?)?",
    "test": "test(ing)?|evaluation",
}
PARTS = SPLITS | {"unlabeled": rf"({TRAIN})?[\W_]*{UNLABELED}[\W_]*({TRAIN})?"}
WORD = rf"(?<![^\W\d_])({'|'.join(SPLITS.values())})(?![^\W\d_])"  # not as in oval
FILLER = re.compile(r"[\W\d_]|(data)?set|data|images?|imgs?|pictures?|photos?|split")  # what says nothing beside them
PASSED_OVER = re.compile(r"\.|[@#$](eadir|recycle|recently|snapshot|tmp)|"  # names of systems and tools
                         r"(__macosx|__pycache__|node_modules|lost\+found|system volume information)$", re.IGNORECASE)
TOOLS = [{"pyvenv.cfg"}, {"images.bin", "meta.pt"},  # what lies in folders of tools, packed images and runs
         *({"args.json", name} for name in ("metrics.jsonl", "log.txt", "last.pt"))]
MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(hei|hev|mif|msf|avi|crx)|....JXL ",
                   re.DOTALL)
RAW = re.compile(r"\.(hei[cf]|avif|jxl|dng|nef|cr[23]|arw|orf|rw2|raf)")  # what Pillow does not read
SHAPES = ("supported layouts: train/, val/, test/ folders of class folders, class folders without a split, "
          "loose images, food-11, and a folder that holds cifar-10-batches-py or cifar-100-python")


@dataclass
class Items:
    """One split of a source, before any picture is read."""

    labels: list                      # one int per image; for a `load`ed split, see there
    files: list                       # the images; for a `load`ed split the files it is read from
    load: Callable | None = None      # size -> (labels, names, iterator over (n, 3, s, s) uint8), or None
    tag: str = ""                     # whatever else the pixels depend on
    counts: tuple = (0, 0)            # labelled, unlabelled
    names: list = field(default_factory=list)  # of the files, below the folder of the source
    wrong: str = ""                   # why this split must not be used


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
    contents: dict = field(default_factory=dict)     # split -> [number of images, digest of their names and labels]


@dataclass
class Split:
    """One packed split; row i of everything is the same image."""

    images: torch.Tensor              # (N, 3, S, S) uint8, memory-mapped: do not write to it
    labels: torch.Tensor              # (N,) int64, -1 = unlabelled; the labelled ones come first
    aspect: torch.Tensor              # (N,) float32, width/height of the original
    paths: list                       # the file, or e.g. "cifar10/train/17"
    skipped: list = field(default_factory=list)  # left out: (file, why, whether the system refused to read it)
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


def open_source(data, root=None, download=False, holdout=0.1):
    """Recognises `data`: a name of NAMED_DATA, or a folder. Reads no picture.

    root      where the named sets lie or are downloaded to, default "./data".
    download  fetch a named set that is not there.
    holdout   fraction of the labelled training images that becomes the validation split when the source
              has none: of each class the first by a hash of their names, at least one if it has two. 0: none.
    returns   Source.
    raises    UsageError, one line, for anything that cannot be understood.
    """
    if not 0 <= holdout < 1:
        raise UsageError(f"--holdout {holdout}: must be at least 0 and below 1")
    data, root = os.path.expanduser(str(data)), os.path.abspath(os.path.expanduser(str(root or "./data")))
    if data == "toy":
        return open_toy()
    if data in NAMED_DATA:
        return open_named(data, root, download, holdout)
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
        return open_named(found[0], os.path.dirname(here) if inside else here, False, holdout)
    return open_folder(here, holdout)


def open_toy():
    splits = {}
    for split, count in TOY_COUNT.items():
        labels = [i % len(TOY_CLASSES) for i in range(count)]

        def load(size, split=split, labels=labels):
            return labels, [f"toy/{split}/{i}" for i in range(len(labels))], draw_toy(split, size)

        splits[split] = Items(labels, [], load, f"toy {TOY_VERSION} {split}", (count, 0))
    source = Source("toy", "toy", list(TOY_CLASSES), *STATISTICS["toy"], splits)
    return described(source, "toy: glyphs drawn by this program, grey, no download")


def open_named(name, root, download, holdout):
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
            return open_folder(base, holdout, name=name, rename=IMAGENETTE)
        return {"food101": open_food101, "stl10": open_stl10}.get(name, open_cifar)(name, base, holdout)
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


def open_cifar(name, base, holdout):
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
        names = [f"{name}/{part}/{i}" for i in rows.tolist()]
        if part == "train":
            rows = rows[hold_out(cifar.targets, names, holdout) == (split == "val")]
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)                   # (N, 3, 32, 32)
        return labels[rows].tolist(), [names[i] for i in rows], (images[chunk] for chunk in rows.split(1000))

    splits = {}
    for split in SPLITS:
        tag = json.dumps([name, split, holdout] if split != "test" else [name, split])
        splits[split] = Items([], files, lambda size, split=split: load(split), tag, counts[split])
    splits["val"] = splits["val"] if held else None
    source = Source(name, "cifar", list(classes), *STATISTICS[name], splits)
    return described(source, f"{name} in {base}", held_note(splits["val"], holdout))


def open_stl10(name, base, holdout):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images of 96 px, 8,000 test images."""
    with open(os.path.join(base, "class_names.txt")) as file:
        classes = file.read().split()
    labels = {part: stl10_labels(base, part, len(classes)) for part in ("train", "unlabeled", "test")}
    rows = {part: torch.arange(len(labels[part])) for part in labels}
    held = hold_out(labels["train"].tolist(), [f"stl10/train/{i}" for i in rows["train"].tolist()], holdout)
    splits = {
        "train": {"train": rows["train"][~held], "unlabeled": rows["unlabeled"]},
        "val": {"train": rows["train"][held]},
        "test": {"test": rows["test"]},
    }
    for split, chosen in splits.items():
        tag = json.dumps([split, holdout] if split != "test" else [split])
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


def open_food101(name, base, holdout):
    found = {}
    for split in ("train", "test"):
        with open(os.path.join(base, "meta", split + ".json")) as file:
            found[split] = [(os.path.join(base, "images", *image.split("/")) + ".jpg", label)
                            for label, images in json.load(file).items() for image in images]
    return from_files(name, base, found, f"food101 in {base}", holdout)


# ------------------------------------------------------------------------------------------------
# Recognising a folder by its shape
# ------------------------------------------------------------------------------------------------


def open_folder(path, holdout, name=None, rename=None):
    """Recognises the shape of a folder. See `open_source`; rename: folder name -> class name."""
    top, notes = Folder(path), []
    others = [file for folder in top.walk() for file in folder.others]
    foreign = foreign_pictures(others)
    if not top.pictures:
        what = (endings(foreign) if foreign else f"no images among {len(others):,} files" if others else
                "empty, no images found")
        raise UsageError(f"--data {path}: {what}; {SHAPES}")
    folder, found, shape = read_folder(top, notes)
    rename = {c: (rename or {}).get(c, c) for items in found.values() for _, c in items}
    found = {s: [(file, rename[c]) for file, c in items] for s, items in found.items()}
    left_out(top, [file for items in found.values() for file, _ in items], foreign, notes)
    useful = {*foreign, os.path.join(folder.path, "classes.txt")}
    useless = [file for file in others if file not in useful]
    if useless:
        notes.append(("ignored", no_images(useless)))
    name = name or re.sub(r"[^\w.-]+", "-", os.path.basename(path)).strip("-.") or "images"
    return from_files(name[:40], folder.path, found, f"{path}: {shape}", holdout, notes, "food-11" in shape)


def left_out(top, used, foreign, notes):
    """Says which pictures have no place in the shape that was recognised. raises: UsageError where most have none."""
    reasons = [endings(foreign)] if foreign else []
    real = functools.cache(os.path.realpath)  # links may lead to a folder in two ways
    there = {(real(os.path.dirname(file)), os.path.basename(file)) for file in used}
    unplaced = [os.path.dirname(file) for file in top.pictures
                if (real(os.path.dirname(file)), os.path.basename(file)) not in there]
    if unplaced:
        where = Counter(os.path.relpath(folder, os.path.dirname(top.path)) for folder in unplaced)
        reasons.append(f"{len(unplaced):,} picture{'s' * (len(unplaced) > 1)} beside what was recognised: "
                       f"{some(f'{n:,} in {folder}' for folder, n in where.items())}")
    if len(unplaced) + len(foreign) > len(used):
        raise UsageError(f"--data {top.path}: most pictures would be left out, {'; '.join(reasons)}; {SHAPES}")
    notes += [("left out", reason) for reason in reasons]


def no_images(files):
    plural = "file that is no image" if len(files) == 1 else "files that are no images"
    return printable(f"{len(files):,} {plural}, such as {os.path.basename(files[0])}")


def some(words):
    """The first three of several words, in a line."""
    words = list(words)
    return ", ".join(words[:3] + ["..."] * (len(words) > 3))


def endings(foreign):
    """What is said of pictures that are not read for their kind or name."""
    count = Counter(os.path.splitext(file)[1] or "without an ending" for file in foreign)
    return (f"{len(foreign):,} picture{'s' * (len(foreign) > 1)} of a kind or name that is not read, "
            f"{some(f'{n:,} {ending}' for ending, n in count.items())}: convert or rename them")


def read_folder(folder, notes):
    """-> the folder without wrappers, {"train", "val", "test": list of (path, class name or None)}, shape in words."""
    splits, filled = find_splits(folder), folder.filled
    sets = [f.name for f in sum(splits.values(), []) or filled
            if any(group.keys() & {"val", "test"} for group in whole_groups(f))]
    if sets and len(filled) > 1:
        raise refused(folder, f"{some(sets)} has splits of its own; give the folder of one data set")
    if splits:
        return folder, *read_splits(splits, notes)
    if len(filled) == 1 and (filled[0].filled or not folder.images):  # an archive that unpacked into one more folder
        return read_folder(filled[0], notes)
    found = read_split(folder)
    if any(c for _, c in found):
        return folder, {"train": found}, "class folders without a split"
    notes.append(("", "no labels: nothing to measure kNN accuracy with"))
    return folder, {"train": found}, "loose images"


def refused(folder, why):
    return UsageError(f"--data {folder.path}: {why}; {SHAPES}")


def split_groups(folder):
    """{what the names of subfolders say beside the split: {split, or "unlabeled": folders}}, for all words in them.

    train_set and test-2017 stand in one group, train_station and test_tube each in its own.
    """
    groups = {}
    for sub in folder.folders:
        name = sub.name.casefold()
        for part, word in PARTS.items():
            for match in itertools.islice(re.finditer(word, name), 1):
                rest = tuple(FILLER.sub("", side) for side in (name[: match.start()], name[match.end() :]))
                groups.setdefault(rest, {}).setdefault(part, []).append(sub)
    return groups


def whole_groups(folder):
    return [group for group in split_groups(folder).values() if "train" in group and len(group) > 1]


def find_splits(folder):
    """{"train", "val", "test", "unlabeled": folders}, {} if there are no splits; UsageError where that is unclear."""
    if len(folder.filled) == 1 and whole_groups(folder.filled[0]):  # a wrapper, be it called train
        return {}
    groups, whole = split_groups(folder), whole_groups(folder)
    for part in SPLITS:
        twice = [sub.name for group in whole for sub in group.get(part, ())]
        if len(twice) > 1:
            raise refused(folder, f"{' and '.join(twice[:2])} both look like the {part} split; rename one")
    if whole:
        beside = [f.name for f in folder.filled if not any(f in subs for subs in whole[0].values())]
        if beside and not whole[0]["train"][0].filled:
            raise refused(folder, f"{whole[0]['train'][0].name} has no class folders, and beside it is {some(beside)}: "
                                  "are these splits or classes?")
        return whole[0]
    alone = groups.get(("", ""), {}).get("train")
    if alone and alone == folder.filled:
        return {"train": alone}
    # A word alone tells little: test_tube is a class. But val is none, nor what holds the classes of its siblings.
    for rest, group in groups.items():
        lone = [sub for part in SPLITS for sub in group.get(part, ())]
        for sub in lone:
            inside, beside = {f.name for f in sub.filled}, [f for f in folder.filled if f is not sub]
            alike = inside & {f.name for other in beside for f in (other, *other.filled)}
            plain = rest == ("", "") and ("train" not in group or (inside and beside))
            if plain or (len(alike) > 1 and re.search(WORD, sub.name.casefold())) or len(group) > 1:
                raise refused(folder, f"has no {'val' if 'train' in group else 'train'} folder beside "
                                      f"{' and '.join(s.name for s in lone[:3])}: are these splits or classes?")
    return {}


def read_splits(splits, notes):
    """Of split folders -> found, shape. See `read_folder`."""
    found, shape = {s: read_split(splits[s][0]) for s in SPLITS if s in splits}, "split folders"
    if number_classes(found):
        shape += " of <class>_<n> files, like food-11 of 2022"
    elif any(re.fullmatch(f"{LABELED}|{PARTS['unlabeled']}", f.name.lower()) for f in splits["train"][0].filled):
        shape += " with labelled and unlabelled images, like food-11 of 2021"
        # That set keeps all its test images in one folder "00", which is not their class.
        if len({c for _, c in found.get("test", ())}) == 1 < len({c for _, c in found["train"] if c}):
            found["test"] = [(path, None) for path, _ in found["test"]]
            notes.append(("", "the one folder of the test split is taken for no class"))
    elif is_food11({c for _, c in found["train"]}) and {splits[s][0].name for s in found} >= {"training", "validation"}:
        shape += ", like food-11"
    found["train"] += [(path, None) for more in splits.get("unlabeled", ()) for path in more.pictures]
    return found, shape


def number_classes(found):
    """Gives loose images <class>_<n> their class, where all of train and val have few classes, the same, of several."""
    if any(c for s in ("train", "val") for _, c in found.get(s, ())):
        return False
    numbers = {s: [re.match(r"([0-9]{1,2})_[0-9]+\.", os.path.basename(path)) for path, _ in items]
               for s, items in found.items()}
    classes = Counter(match and match[1] for match in numbers["train"])
    if not classes or None in classes or len(numbers["train"]) < 2 * len(classes) or not {
            match and match[1] for match in numbers.get("val", ())} <= classes.keys():
        return False
    for s, items in found.items():
        found[s] = [(path, match[1] if match and match[1] in classes else c)
                    for (path, c), match in zip(items, numbers[s], strict=True)]
    return True


def read_split(folder):
    """Images of one split as (path, class name or None).

    From class folders, perhaps below `labeled`; those below `unlabeled` have none. Without such folders the images
    lie loose.
    """
    only = folder.filled[0] if len(folder.filled) == 1 and not folder.images else None
    if only and (only.name == folder.name or (only.name.isalpha() and FILLER.fullmatch(only.name.casefold()))):
        return read_split(only)  # images/, say, is no class
    unlabeled = [f for f in folder.filled if re.fullmatch(PARTS["unlabeled"], f.name.lower())]
    labeled = [f for f in folder.filled if re.fullmatch(LABELED, f.name.lower())]
    classes = [c for f in labeled for c in f.filled] or [f for f in folder.filled if f not in unlabeled]
    found = [(path, unicodedata.normalize("NFC", c.name)) for c in classes for path in c.pictures]
    found += [(path, None) for f in unlabeled for path in f.pictures]
    return found or [(path, None) for path in folder.images]


def natural(text):
    """Sort key that takes numbers by their value: "2" before "10"."""
    return [int(t) if i % 2 else t.casefold() for i, t in enumerate(re.split(r"([0-9]+)", text))], text


class Folder:
    """A folder of pictures; what lies in it is listed once, in natural order. A link counts as what it leads to.

    Passed over are hidden files and folders, those of systems and tools, runs of this program, and folders that we
    are inside of. A link that leads nowhere is an image (that cannot be read) if its name says so. Otherwise it may
    have been a folder of them, which must not be missing unnoticed.
    """

    def __init__(self, path, inside=()):
        self.path, self.name, self.real = str(path), os.path.basename(path), os.path.realpath(path)
        self.inside = {*(inside or map(str, Path(self.real).parents)), self.real}
        self.below, self.images, self.others, extensions = [], [], [], image_extensions()
        try:
            entries = [(e.name, os.path.isdir(e) if e.is_symlink() else e.is_dir()) for e in os.scandir(path)]
        except OSError as error:
            raise UsageError(f"{printable(path)}: cannot be read ({error.strerror})") from error
        for name, is_folder in sorted(entries, key=lambda entry: natural(entry[0])):
            file = os.path.join(self.path, name)
            if PASSED_OVER.match(name):
                continue
            is_image = os.path.splitext(name)[1].lower() in extensions
            (self.below if is_folder else self.images if is_image else self.others).append(file)
            if not is_folder and not is_image and os.path.islink(file) and not os.path.exists(file):
                raise UsageError(f"{printable(file)}: a broken link; repair or remove it")
        self.of_tools = any(marks <= {name for name, _ in entries} for marks in TOOLS)

    @functools.cached_property
    def folders(self):
        found = [Folder(path, self.inside) for path in self.below if os.path.realpath(path) not in self.inside]
        return [folder for folder in found if not folder.of_tools]

    def walk(self):
        """This folder and all below it; one that two links lead to comes once."""
        todo, seen = [self], set()
        while todo:
            here = todo.pop()
            if here.real not in seen:
                seen.add(here.real)
                yield here
                todo += reversed(here.folders)

    @functools.cached_property
    def pictures(self):
        return [path for folder in self.walk() for path in folder.images]

    @functools.cached_property
    def filled(self):
        """The folders in it that hold pictures."""
        return [folder for folder in self.folders if folder.pictures]


def foreign_pictures(files):
    """Those that are pictures by their first bytes, or of a kind that Pillow does not read."""
    found, missed = [], Counter()
    for path in files:
        ending = os.path.splitext(path)[1].lower()
        if RAW.fullmatch(ending) or ((not ending or missed[ending] < 100) and starts_as_picture(path)):
            found.append(path)
        else:  # text files beside a million pictures are not all opened
            missed[ending] += 1
    return found


def starts_as_picture(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return bool(MAGIC.match(file.read(16)))
    except OSError:
        return False


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


def from_files(name, root, found, headline, holdout, notes=(), food=False):
    """Source of image files below `root`. found: {"train", "val", "test": list of (path, class name or None)}."""
    classes = sorted({c for _, c in found.get("train", ()) if c is not None}, key=natural)
    number, notes, wrong = {c: i for i, c in enumerate(classes)} | {None: -1}, list(notes), {}
    for split in ("val", "test"):
        path, c = next(((path, c) for path, c in found.get(split, ()) if c not in number), (None, None))
        if c and not classes:
            notes.append(("", f"the training images have no labels: those of the {split} images are not used"))
        elif c:
            like = [k for k in classes if k.casefold() == c.casefold()]
            fix = f'"{like[0]}" differs from it in case' if like else "add it to the training split or remove it"
            wrong[split] = f'{path}: class "{c}" of the {split} split has no training images; {fix}'
    if "val" in wrong:
        raise UsageError(wrong["val"])
    rows = {s: [(path, number.get(c, -1)) for path, c in found.get(s, ())] for s in SPLITS}
    if not rows["train"]:
        raise UsageError(f"--data {headline.split(':')[0]}: no images in the training split")

    def names(items):  # of the same files in a moved folder, or on a Mac, the same
        return [unicodedata.normalize("NFC", path[len(root) + 1 :].replace(os.sep, "/")) for path, _ in items]

    held = None
    if not rows["val"]:
        mask = hold_out([label for _, label in rows["train"]], names(rows["train"]), holdout).tolist()
        held = rows["val"] = list(itertools.compress(rows["train"], mask))
        rows["train"] = [item for item, out in zip(rows["train"], mask, strict=True) if not out]
    splits = {}
    for split, items in rows.items():
        items = sorted(items, key=lambda item: item[1] < 0)  # stable: the labelled ones first
        labels, unlabelled = [label for _, label in items], sum(label < 0 for _, label in items)
        splits[split] = Items(labels, [path for path, _ in items], counts=(len(items) - unlabelled, unlabelled),
                              names=names(items), wrong=wrong.get(split, "")) if items else None
    kind, statistics = kind_of(splits["train"], classes)
    classes = name_classes(root, classes, food, notes)
    source = Source(name, kind, list(map(printable, classes)), *statistics, splits)
    notes += [("", text) for text in wrong.values()]
    return described(source, headline, [*held_note(held, holdout), *notes])


def name_classes(root, classes, food, notes):
    """Their names: from classes.txt, one name per line, or those of food-11's numbers."""
    try:
        lines = Path(root, "classes.txt").read_text(encoding="utf-8-sig").splitlines() if classes else []
    except (OSError, ValueError):
        lines = []
    named = [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]
    if named and not {*named} & {*classes}:
        if len(named) == len({*named}) == len(classes):
            return named
        notes.append(("ignored", f"classes.txt: {len({*named})} names for {len(classes)} classes"))
    return FOOD11 if food and is_food11(classes) else classes


def is_food11(classes):
    """Whether classes are the numbers 0 to 10, or 00 to 10."""
    return len(classes) == 11 and {(c or "").lstrip("0") for c in classes} == {"", *map(str, range(1, 11))}


def kind_of(train, classes):
    """CIFAR exported as image files is still CIFAR; everything else is photos."""
    small, typical = False, {10: "frog", 100: "aquarium_fish"}
    for path in train.files[:20] if typical.get(len(classes)) in classes else ():
        with contextlib.suppress(Exception), open_image(path) as image:  # the first that is not broken
            small = image.size == (32, 32)
            break
    return ("cifar", STATISTICS[f"cifar{len(classes)}"]) if small else ("photos", STATISTICS["imagenet"])


def held_count(images, fraction):
    """How many of a class of `images` are held out: at least one if it has two, never all."""
    return 0 if fraction == 0 or images < 2 else min(max(round(images * fraction), 1), images - 1)


def hold_out(labels, names, fraction):
    """A mask (N,) of the labelled images that become the validation split: of each class the first by a hash.

    The hash is that of the name alone, so a file more or less lets at most one other image change sides.
    """
    ranked, mask = {}, torch.zeros(len(labels), dtype=torch.bool)
    hashes = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    for i in sorted(range(len(names)), key=hashes.__getitem__):
        ranked.setdefault(labels[i], []).append(i)
    for c, rows in ranked.items():
        mask[rows[: held_count(len(rows), fraction)] if c >= 0 else []] = True
    return mask


def held_note(held, holdout):
    text = f"validation: {holdout:.3g} of the labelled training images, held out per class"
    return [("", text)] if held else []


def described(source, headline, notes=()):
    """Fills in source.description, what was recognised in lines of at most 78 columns, and source.contents."""
    rows = [("data", headline)]
    for split, title in (("train", "training"), ("val", "validation"), ("test", "test")):
        labelled, unlabelled = source.splits[split].counts if source.splits[split] else (0, 0)
        text = f"{labelled:,} labelled" + (f", {unlabelled:,} unlabelled" if unlabelled else "") + " images"
        rows.append((title, text if labelled + unlabelled else "none"))
    classes = source.classes[:12] + (["..."] if len(source.classes) > 12 else [])
    rows.append(("classes", f"{len(source.classes)}: {', '.join(classes)}" if classes else "none"))
    for title, text in [*rows, *notes]:
        source.description += lines_of(title, text)
    for split, items in source.splits.items():
        if items is not None:
            digest = hashlib.sha256(repr((items.tag, items.counts, items.labels, items.names)).encode())
            source.contents[split] = [sum(items.counts), digest.hexdigest()[:16]]
    return source


def note_changes(source, data, saved, splits):
    """Has the description say whether the images of a run, of flags `saved`, are others now. data: --data, or None."""
    changed = changed_images(saved, source, splits)
    if changed and os.path.abspath(data or saved["data"]) == os.path.abspath(saved["data"]):
        source.description += lines_of("changed", f"images since this run was trained: {changed}; some that it trained "
                                                  "on may be validation images now")


def lines_of(title, text):
    return textwrap.wrap(printable(text), 78, break_on_hyphens=False, initial_indent=f"{title:<12}",
                         subsequent_indent=" " * 12)


IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
}
FOOD11 = ["Bread", "Dairy product", "Dessert", "Egg", "Fried food", "Meat", "Noodles/Pasta", "Rice", "Seafood", "Soup",
          "Vegetable/Fruit"]


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
    raises           UsageError: unreadable files (all of them listed in <cache>/<name>-unreadable.txt), a split
                     of which nothing can be read, a cache folder that cannot be written.
    """
    if size < 1:
        raise UsageError(f"--image-size {size}: must be at least 1")
    try:
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "unlabeled")
        cache = Path(cache or default).expanduser().absolute()
    except RuntimeError:  # a user without a home, in a container
        raise UsageError("no home folder to keep packed images in; choose a folder with --cache") from None
    packed = dict.fromkeys(SPLITS)
    for split in SPLITS:
        items = source.splits.get(split) if split in splits else None
        if items is not None:
            if items.wrong:
                raise UsageError(items.wrong)
            final = cache / f"{source.name}-{split}-{size}-{store_key(items, size)}"
            packed[split] = pack_split(final, split, items, size, quiet, workers)
    report_unreadable(packed, source, cache, skip_unreadable, quiet)
    for split, part in packed.items():
        if part is not None and not quiet:
            brightest = part.images[:: max(1, len(part) // 100)].flatten(1).amax(dim=1)  # of about a hundred
            if (brightest <= 16).float().mean() > 0.5:
                print(f"note    most {split} pictures are nearly black, at most 16 of 255; if they are deep ones "
                      "that fill few of\n        their bits, scale them first", flush=True)
    return Dataset(packed["train"], packed["val"], packed["test"], source.classes, source.mean, source.std,
                   size, source.name, source.kind)


def pack_split(final, split, items, size, quiet, workers):
    """The store `final` of one split as a Split, built if it is not there."""
    packed = open_store(final)
    try:
        if packed is not None and any(refused and readable(path, size) for path, _, refused in packed.skipped):
            discard(final)
            packed = None
        if packed is None:
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(final.parent)
        while packed is None:
            with packing_folder(final, quiet) as folder:
                packed = open_store(final)  # perhaps the work of the process that we waited for
                if packed is None and folder is not None:
                    started, write = time.perf_counter(), write_arrays if items.load else write_files
                    write(folder, items, size, f"packing {split}", quiet, workers)
                    if not final.name.endswith(store_key(items, size)):
                        raise UsageError(f"the {split} images changed while they were packed; start again once "
                                         "nothing writes to them any more")
                    packed = publish(folder, final)
                    if not quiet:
                        bad = f", {len(packed.skipped):,} unreadable" if packed.skipped else ""
                        print(f"packed {split}: {len(packed):,} images of {size} x {size} in "
                              f"{time.perf_counter() - started:.1f} s{bad}", flush=True)
    except BrokenPipeError:  # of stdout: nobody reads the progress any more
        raise
    except OSError as error:
        raise UsageError(f"cannot keep packed images in {final.parent} ({error.strerror or one_line(error)}); "
                         "make room there or choose another folder with --cache") from error
    return packed


def report_unreadable(packed, source, cache, skipping, quiet):
    """Lists what cannot be read, of all splits together, in a file, and says so; raises unless `skipping`."""
    counts = {s: (len(split), len(split.skipped)) for s, split in packed.items() if split is not None}
    bad = [(printable(path), why) for s in counts for path, why, _ in packed[s].skipped]
    if not bad:
        return
    listing = cache / f"{source.name}-unreadable.txt"
    where = f"listed in {listing}"
    try:
        write_atomically(listing, "".join(f"{path}\t{why}\n" for path, why in bad).encode())
    except OSError as error:
        where = f"{listing} cannot be written: {error.strerror}"
    empty = [s for s, (good, _) in counts.items() if not good]
    if empty or not skipping:
        first = "; ".join(f"{path} ({why})" for path, why in bad[:3])
        more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        fix = (f"nothing is left of the {' and '.join(empty)} split" if skipping
               else "or go on without them: --skip-unreadable")
        raise UsageError(f"{len(bad):,} of {sum(map(sum, counts.values())):,} images cannot be read: {first}{more} "
                         f"({where}); repair or remove them, {fix}")
    for s, (good, left_out) in counts.items():
        if left_out and not quiet:
            gone = sorted({*source.splits[s].labels} - {*packed[s].labels.tolist(), -1})
            print(f"left out {left_out:,} of {good + left_out:,} {s} images that cannot be read" +
                  (f"; none is left of class {', '.join(source.classes[c] for c in gone)}" if gone else ""))
    if not quiet:
        print(where, flush=True)


def store_key(items, size):
    """Changes when a file is added, removed, renamed, relabelled or written to, or when S changes."""
    digest = hashlib.sha256(repr((FORMAT, size, items.tag, items.labels)).encode())
    for path in items.files:
        try:
            found = os.stat(path)
            facts = found.st_size, found.st_mtime_ns
        except OSError:  # gone meanwhile: decoding will say so
            facts = None
        digest.update(repr((path, facts)).encode())
    return digest.hexdigest()[:20]


def map_bytes(path, count):
    """The file as a (count,) uint8 tensor that is read page by page when it is used."""
    try:
        return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)
    except RuntimeError:  # Linux refuses private mappings larger than its memory, not shared ones
        return torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8)


def open_store(folder):
    """-> Split, or None if there is no complete store.

    The meta file ends with its checksum: a label or path that changed would go unnoticed. The pixels have none.
    They were on the disk before the store got its name, reading them all would take as long as a start must not,
    and a flipped byte is a pixel of another shade.
    """
    try:
        content = (folder / "meta.pt").read_bytes()
        if content[-32:] != hashlib.sha256(content[:-32]).digest():
            return None
        meta = torch.load(io.BytesIO(content[:-32]), weights_only=True)
        count, size = meta["shape"]
        if os.path.getsize(folder / "images.bin") != count * 3 * size * size:
            return None
        pixels = map_bytes(folder / "images.bin", count * 3 * size * size) if count else torch.empty(0).byte()
        paths = meta["paths"].split("\0") if count else []
        return Split(pixels.view(count, 3, size, size), meta["labels"], meta["aspect"], paths, meta["skipped"])
    except Exception:  # absent or damaged, in whatever way: it is built anew
        return None


def create_images(folder, count, size):
    """A new images.bin with its disk space reserved: a mapping that meets a full disk kills the process."""
    needed, path = count * 3 * size * size, folder / "images.bin"
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"disk full: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, needed)
    try:
        return torch.from_file(str(path), shared=True, size=needed, dtype=torch.uint8).view(count, 3, size, size)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, one_line(error)) from error


def finish_store(folder, labels, aspect, paths, size, skipped=()):
    """Writes the meta file and sees to it that everything is on the disk."""
    buffer = io.BytesIO()
    torch.save({
        "shape": [len(paths), size],
        "labels": labels,
        "aspect": aspect,
        "paths": "\0".join(paths),  # one string: reading a million would take seconds
        "skipped": list(skipped),
    }, buffer)
    content = buffer.getvalue()
    (folder / "meta.pt").write_bytes(content + hashlib.sha256(content).digest())
    for name in ("images.bin", "meta.pt"):
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def packing_folder(final, quiet):
    """A folder beside `final` to pack into, locked; removed at the end unless it was published.

    Others who want to pack the same wait here, and get None if the folder is gone when their turn comes. A lock
    ends with its process: what a killed one left is recognised by that. Where the file system knows no locks,
    each process packs into a folder of its own.
    """
    folder = final.with_name(f".packing-{final.name}")
    folder.mkdir(exist_ok=True)
    try:
        lock = open(folder / "lock", "ab")
    except FileNotFoundError:  # published or removed at this moment
        yield None
        return
    with lock:
        try:
            lock_file(lock)
        except BlockingIOError:
            if not quiet:
                print("waiting for another process that packs the same images", flush=True)
            lock_file(lock, wait=True)
        except OSError:
            folder, lock = folder.with_name(f".packing-{uuid.uuid4().hex}"), None
            folder.mkdir()
        if not holds(lock, folder):
            yield None
            return
        try:
            yield folder
        finally:
            if holds(lock, folder):
                discard(folder)


def lock_file(file, wait=False):
    """Locks an open file until it is closed. raises: BlockingIOError if another has it, OSError without locks."""
    if fcntl is None:
        raise OSError("no locks on this system")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def holds(lock, folder):
    """Whether `lock` is still that of `folder`. (A published folder took its lock along.) Without locks: True."""
    try:
        return lock is None or os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
    except FileNotFoundError:
        return False


def publish(temporary, final):
    """Renames the finished store into place. Whoever comes second uses what stands there already."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            os.rename(temporary, final)  # atomic; fails if `final` is there
        packed = open_store(final)
        if packed is not None:
            return packed
        discard(final)  # a damaged one
    raise OSError(f"{final.name} cannot be replaced")


def discard(path):
    """Removes a folder or file, at once for everyone who looks for it."""
    aside = path.with_name(f".packing-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        os.rename(path, aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def remove_leftovers(cache):
    """Half-written stores of processes that were killed; without a lock to tell, those a day old."""
    for folder in cache.glob(".packing-*"):
        try:
            with open(folder / "lock", "rb+") as lock:
                lock_file(lock)
                discard(folder)
        except BlockingIOError:  # its process lives
            pass
        except OSError:
            with contextlib.suppress(OSError):
                if time.time() - folder.lstat().st_mtime > 86400:
                    discard(folder)


def write_arrays(folder, items, size, label, quiet, workers):
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
    finish_store(folder, torch.tensor(labels), torch.ones(len(names)), names, size)


def write_files(folder, items, size, label, quiet, workers):
    """Packs image files, in threads: Pillow decodes and resizes without holding Python's lock."""
    count = len(items.files)
    images, aspect, bad = create_images(folder, count, size), torch.ones(count), {}

    def decode_rows(rows):
        for i in rows:
            try:
                pixels, aspect[i] = decode(items.files[i], size)
                images[i] = pixels
            except Exception as error:  # broken files raise almost anything
                refused = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
                bad[i] = (items.files[i], one_line(error, items.files[i]), refused)
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

    kept = [i for i in range(count) if i not in bad]
    if bad:
        for new, old in enumerate(kept):  # close the gaps
            images[new] = images[old]
        del images
        os.truncate(folder / "images.bin", len(kept) * 3 * size * size)
    finish_store(folder, torch.tensor(items.labels)[kept], aspect[kept], [items.files[i] for i in kept], size,
                 [bad[i] for i in sorted(bad)])


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readable(path, size):
    try:
        return decode(path, size) is not None
    except Exception:
        return False


def one_line(error, path=""):
    """An exception in a few words, without the path that the line names anyway."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if os.path.isfile(path) and not os.path.getsize(path) else "no image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if getattr(error, "filename", None) not in (None, path):
        text += f": {error.filename}"
    text = printable(" ".join(text.split()))
    return text if len(text) <= 120 else text[:117] + "..."


# ------------------------------------------------------------------------------------------------
# Decoding one file
# ------------------------------------------------------------------------------------------------

TURNED = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HUGE = threading.Lock()  # pictures of more than 33 million pixels are decoded one at a time


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
        # On each core a picture of the largest size would need half a GB or more.
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


def open_image(path):
    """Pillow's image of a regular file, its pixels not read yet.

    Raises for everything else (a pipe would be waited for), and for pictures of more than 179 million pixels:
    a file of a few bytes can claim any number.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    return Image.open(path, formats=image_formats())  # by the file's content, whatever its name says


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
    range (32-bit scans, heights) is stretched from its own minimum to its maximum. Where the file states
    fewer bits, 12 say, and all is within them, 4095 is white.
    """
    image.info.pop("transparency", None)
    bits = significant_bits(image) if image.mode.startswith("I") else 0
    low, high = 0, 65535 if bits else 1
    image = image.convert("F")
    darkest, brightest = image.getextrema()
    if not math.isfinite(brightest - darkest):
        raise ValueError("infinite or undefined brightness")
    if 8 <= bits < 16 and brightest < 2**bits:
        high = 2**bits - 1
    if darkest < low or brightest > high:
        low, high = darkest, brightest
    scale = 255 / max(high - low, 1e-12)
    image = image.point(lambda v: v * scale + (0.5 - low * scale))  # + 0.5: `convert` cuts off
    return image.convert("L")


def significant_bits(image):
    """How many of a deep grey picture's bits its file says to have a meaning: PNG's sBIT, TIFF's BitsPerSample."""
    if image.format == "TIFF":
        return image.tag_v2.get(258, (16,))[0]
    stated = None
    if image.format == "PNG":
        with open(image.filename, "rb") as file:  # Pillow skips this chunk, which comes before the pixels
            stated = re.search(rb"\0\0\0\x01sBIT(.)", file.read(2**16).partition(b"IDAT")[0], re.DOTALL)
    return stated[1][0] if stated else 16


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
        """Steps per epoch."""
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
        rows_there = torch.cat(rows).to(self.device).split([len(r) for r in rows])  # one transfer per epoch
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
