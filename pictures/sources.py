"""What `--data` names -> source: the splits, classes and files of a set, before any picture is read."""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from common import UsageError, printable
from pictures.decoding import map_bytes, one_line, open_image
from pictures.folders import SPLITS, is_food11, natural, recognise
from pictures.toy import TOY_CLASSES, TOY_COUNT, TOY_VERSION, draw_toy

NAMED = {  # name -> what it unpacks to below the data root, torchvision's class, and what that needs to fetch it all
    "cifar10": (("cifar-10-batches-py",), "CIFAR10", {}),
    "cifar100": (("cifar-100-python",), "CIFAR100", {}),
    "stl10": (("stl10_binary",), "STL10", {"split": "test"}),
    "imagenette": (("imagenette2", "imagenette2-320", "imagenette2-160"), "Imagenette", {"size": "320px"}),
    "food101": (("food-101",), "Food101", {}),
}
NAMED_DATA = ("toy", *NAMED)
STATISTICS = {  # per-channel mean and std of the training pixels
    "toy": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
}
FOOD11 = ["Bread", "Dairy product", "Dessert", "Egg", "Fried food", "Meat", "Noodles/Pasta", "Rice", "Seafood", "Soup",
          "Vegetable/Fruit"]
UNUSABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError)  # of damaged downloads


@dataclass
class Items:
    """One split of a source, before any picture is read."""

    labels: list                      # one int per image; may be empty where `load` gives them
    files: list                       # the images, or what `load` reads them from
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


def open_source(data, root=None, download=False, holdout=0.1):
    """Recognises `data`: a name of NAMED_DATA, or a folder. Reads no picture.

    root      where the named sets lie or are downloaded to, default "./data".
    download  fetch a named set that is not there.
    holdout   fraction of the labelled training images that becomes the validation split when the source
              has none: of each class the first by a hash of their names, at least one if it has two. 0: none.
    returns   Source.  raises: UsageError, one line, for anything that cannot be understood.
    """
    data, root = os.path.expanduser(str(data)), os.path.abspath(os.path.expanduser(str(root or "./data")))
    if data == "toy":
        return open_toy()
    if data in NAMED:
        return open_named(data, root, download, holdout)
    if not os.path.isdir(data):
        why = ("is a file; give the folder that holds the images" if os.path.exists(data) else
               "folder not found" if os.sep in data or data.startswith(".") else
               f"no such folder, and none of the names {', '.join(NAMED_DATA)}")
        raise UsageError(f"--data {data}: {why}")
    here = os.path.abspath(data)
    found = {name: root for name, (markers, *_) in NAMED.items() for marker in markers if name != "imagenette"
             for root, base in ((os.path.dirname(here), here), (here, os.path.join(here, marker)))
             if os.path.basename(base) == marker and os.path.isdir(base)
             if name != "food101" or os.path.isfile(os.path.join(base, "meta", "train.json"))}  # or it is one's own
    if len(found) > 1:
        raise UsageError(f"--data {data}: holds {' and '.join(found)}; say which: "
                         f"--data {next(iter(found))} --data-root {data}")
    return open_named(*found.popitem(), False, holdout) if found else open_folder(here, holdout)


def open_toy():
    def load(split, size):
        return splits[split].labels, [f"toy/{split}/{i}" for i in range(TOY_COUNT[split])], draw_toy(split, size)

    splits = {split: Items([i % len(TOY_CLASSES) for i in range(count)], [], functools.partial(load, split),
                           f"toy {TOY_VERSION} {split}", (count, 0)) for split, count in TOY_COUNT.items()}
    source = Source("toy", "toy", list(TOY_CLASSES), *STATISTICS["toy"], splits)
    return described(source, "toy: glyphs drawn by this program, grey, no download")


def open_named(name, root, download, holdout):
    """The sets that torchvision knows. See `open_source`."""
    markers, fetcher, options = NAMED[name]

    def there():
        return next(filter(os.path.isdir, (os.path.join(root, marker) for marker in markers)), None)

    if download and not there():
        try:
            getattr(datasets, fetcher)(root, download=True, **options)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
            raise UsageError(f"--download: cannot fetch {name} into {root} ({one_line(error)})") from error
    base = there()
    if base is None:
        raise UsageError(f"--data {name}: not found in {root} (no folder {markers[0]} there); "
                         "fetch it with --download, or say where it is with --data-root")
    with sound(name, base):
        if name == "imagenette":
            return open_folder(base, holdout, name=name, rename=IMAGENETTE)
        return {"food101": open_food101, "stl10": open_stl10}.get(name, open_cifar)(name, base, holdout)


@contextlib.contextmanager
def sound(name, base):
    """Says in a line that the files of a named set are damaged, whatever reading them raises."""
    try:
        yield
    except UNUSABLE as error:
        raise UsageError(f"{base}: incomplete or damaged ({one_line(error)}); "
                         f"remove it and fetch {name} anew with --download") from error


def open_cifar(name, base, holdout):
    cifar = getattr(datasets, NAMED[name][1])
    meta = Path(base, cifar.meta["filename"])
    if not check_integrity(meta, cifar.meta["md5"]):  # unpickled, another file could do anything
        raise ValueError(f"{meta.name} is not the published one")
    classes = pickle.loads(meta.read_bytes(), encoding="latin1")[cifar.meta["key"]]

    def read(part):
        with sound(name, base):  # torchvision compares every file with its published MD5 before it unpickles it
            here = cifar(os.path.dirname(base), train=part == "train")
        return here.targets, torch.from_numpy(here.data).permute(0, 3, 1, 2)        # (N, 3, 32, 32)

    parts = {part: dict.fromkeys(range(len(classes)), count // len(classes))
             for part, count in (("train", 50_000), ("test", 10_000))}
    source = Source(name, "cifar", classes, *STATISTICS[name], {})
    return from_arrays(source, base, parts, "*", read, [name], holdout)


def open_stl10(name, base, holdout):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images of 96 px, 8,000 test images."""
    classes = Path(base, "class_names.txt").read_text().split()

    def read(part):
        """Of two files: part_X.bin has 3*96*96 bytes an image, column by column, part_y.bin one byte, 1 to 10."""
        path = os.path.join(base, part + "_X.bin")
        count, rest = divmod(os.path.getsize(path), 3 * 96 * 96)
        labels = [-1] * count
        if part != "unlabeled":
            labels = [byte - 1 for byte in Path(base, part + "_y.bin").read_bytes()]
        if rest or not count or len(labels) != count or max(labels) >= len(classes):
            raise ValueError(f"{part}_X.bin has not the size it should")
        return labels, map_bytes(path, count * 3 * 96 * 96).view(-1, 3, 96, 96).transpose(2, 3)

    parts = {part: Counter(read(part)[0]) for part in ("train", "unlabeled", "test")}
    source = Source(name, "stl10", classes, *STATISTICS["imagenet"], {})
    return from_arrays(source, base, parts, "{}_*.bin", read, [], holdout)


def from_arrays(source, base, parts, files, read, tag, holdout):
    """Fills in a set of arrays. It has no validation split: that comes from the part "train"; "test" stays whole.

    parts  "train", "test" and perhaps "unlabeled" -> {label: number of images}; files: pattern of their names.
    read   part -> (list of N labels, (N, 3, s, s) uint8).
    """
    def load(split, size):
        labels, names, chosen = [], [], []
        for part in members[split]:
            here, images = read(part)
            called, rows = [f"{source.name}/{part}/{i}" for i in range(len(here))], torch.arange(len(here))
            if part == "train":
                rows = rows[hold_out(here, called, holdout) == (split == "val")]
            labels += [here[i] for i in rows.tolist()]
            names += [called[i] for i in rows.tolist()]
            chosen.append((images, rows))
        return labels, names, (images[chunk] for images, rows in chosen for chunk in rows.split(1000))

    members = {"train": [part for part in parts if part != "test"], "val": ["train"], "test": ["test"]}
    total = {part: sum(classes.values()) for part, classes in parts.items()}
    held = sum(held_count(count, holdout) for count in parts["train"].values())
    counts = {"train": (total["train"] - held, total.get("unlabeled", 0)), "val": (held, 0), "test": (total["test"], 0)}
    for split in SPLITS:
        paths = [str(path) for part in members[split] for path in Path(base).glob(files.format(part)) if path.is_file()]
        facts = json.dumps([*tag, split] + [holdout] * (split != "test"))
        source.splits[split] = Items([], sorted(paths), functools.partial(load, split), facts, counts[split])
    source.splits["val"] = source.splits["val"] if held else None
    return described(source, f"{source.name} in {base}", holdout)


def open_food101(name, base, holdout):
    found = {}
    for split in ("train", "test"):
        labels = json.loads(Path(base, "meta", split + ".json").read_text())
        found[split] = [(os.path.join(base, "images", *image.split("/")) + ".jpg", label)
                        for label, images in labels.items() for image in images]
    return from_files(name, base, found, f"food101 in {base}", holdout, [])


def open_folder(path, holdout, name=None, rename=None):
    """A folder, recognised by its shape. rename: folder name -> class name."""
    root, found, shape, notes = recognise(path)
    if rename:
        found = {s: [(file, rename.get(c, c)) for file, c in items] for s, items in found.items()}
    name = name or re.sub(r"[^\w.-]+", "-", os.path.basename(path)).strip("-.") or "images"
    return from_files(name[:40], root, found, f"{path}: {shape}", holdout, notes, "food-11" in shape)


def from_files(name, root, found, headline, holdout, notes, food=False):
    """Source of image files below `root`. found: {"train", "val", "test": list of (path, class name or None)}."""
    classes = sorted({c for _, c in found.get("train", ()) if c is not None}, key=natural)
    number, wrong = {c: i for i, c in enumerate(classes)} | {None: -1}, {}
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
        for split, side in (("val", True), ("train", False)):
            rows[split] = [item for item, out in zip(rows["train"], mask, strict=True) if out == side]
    splits = {}
    for split, items in rows.items():
        items = sorted(items, key=lambda item: item[1] < 0)  # stable: the labelled ones first
        labels, unlabelled = [label for _, label in items], sum(label < 0 for _, label in items)
        splits[split] = Items(labels, [path for path, _ in items], counts=(len(items) - unlabelled, unlabelled),
                              names=names(items), wrong=wrong.get(split, "")) if items else None
    kind, statistics = kind_of(splits["train"], classes)
    classes = name_classes(root, classes, food, notes)
    notes += [("", text) for text in wrong.values()]
    return described(Source(name, kind, list(map(printable, classes)), *statistics, splits), headline, held, notes)


def kind_of(train, classes):
    """CIFAR exported as image files is still CIFAR; everything else is photos."""
    typical = {10: "frog", 100: "aquarium_fish"}.get(len(classes))
    for path in train.files[:20] if typical in classes else ():
        with contextlib.suppress(Exception), open_image(path) as image:  # the first that is not broken
            if image.size == (32, 32):
                return "cifar", STATISTICS[f"cifar{len(classes)}"]
            break
    return "photos", STATISTICS["imagenet"]


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


def described(source, headline, held=0, notes=()):
    """Fills in source.description, what was recognised in lines of at most 78 columns, and source.contents.

    held: the fraction that was held out, if the source has no validation split.  notes: (title, text) pairs.
    """
    rows = [("data", headline)]
    for split, title in SPLITS.items():
        items = source.splits[split]
        labelled, unlabelled = items.counts if items else (0, 0)
        text = f"{labelled:,} labelled" + (f", {unlabelled:,} unlabelled" if unlabelled else "") + " images"
        rows.append((title, text if items else "none"))
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
