"""What a source of pictures is known to hold before any is read, and what of it is held out for validation."""

import contextlib
import hashlib
import itertools
import os
import re
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import UsageError, printable

from .decoding import open_image

SPLITS = {"train": "training", "val": "validation", "test": "test"}  # and their titles
STATISTICS = {  # per-channel mean and std of the training pixels
    "toy": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
FOOD11 = ["Bread", "Dairy product", "Dessert", "Egg", "Fried food", "Meat", "Noodles/Pasta", "Rice", "Seafood", "Soup",
          "Vegetable/Fruit"]


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


def described(source, headline, held=0, notes=()):
    """Fills in source.description, what was recognised in lines of at most 78 columns, and source.contents.

    held: the fraction that was held out, if the source has no validation split.  notes: (title, text) pairs.
    """
    rows = [("data", headline)]
    for split, title in SPLITS.items():
        items = source.splits[split]
        labelled, unlabelled = items.counts if items else (0, 0)
        text = f"{labelled:,} labelled" + (f", {unlabelled:,} unlabelled" if unlabelled else "") + " images"
        rows.append((title, text if labelled + unlabelled else "none"))
        if items:
            digest = hashlib.sha256(repr((items.tag, items.counts, items.labels, items.names)).encode())
            source.contents[split] = [labelled + unlabelled, digest.hexdigest()[:16]]
    classes = source.classes[:12] + ["..."] * (len(source.classes) > 12)
    rows.append(("classes", f"{len(source.classes)}: {', '.join(classes)}" if classes else "none"))
    if held and source.splits["val"]:
        rows.append(("", f"validation: {held:.3g} of the labelled training images, held out per class"))
    for title, text in [*rows, *notes]:
        source.description += lines_of(title, text)
    return source


def lines_of(title, text):
    return textwrap.wrap(printable(text), 78, break_on_hyphens=False, initial_indent=f"{title:<12}",
                         subsequent_indent=" " * 12)


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


def natural(text):
    """Sort key that takes numbers by their value: "2" before "10"."""
    return [int(t) if i % 2 else t.casefold() for i, t in enumerate(re.split(r"([0-9]+)", text))], text


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

    held = 0 if rows["val"] else holdout
    if held:
        mask = hold_out([label for _, label in rows["train"]], names(rows["train"]), held).tolist()
        rows["val"] = list(itertools.compress(rows["train"], mask))
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
    return described(source, headline, held, [*notes, *(("", text) for text in wrong.values())])


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
