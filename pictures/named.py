"""Sources by name: the toy set, the sets that torchvision fetches, and folders, which are recognised by their shape."""

import json
import os
import pickle
from pathlib import Path

import torch

from common import UsageError

from .decoding import one_line
from .folders import open_folder
from .sources import STATISTICS, Items, Source, described, from_files, held_count, hold_out
from .store import map_bytes
from .toy import TOY_CLASSES, TOY_COUNT, TOY_VERSION, draw_toy

NAMED = {  # name -> what it unpacks to below the data root, torchvision's class, and what that needs to fetch it all
    "cifar10": (("cifar-10-batches-py",), "CIFAR10", {}),
    "cifar100": (("cifar-100-python",), "CIFAR100", {}),
    "stl10": (("stl10_binary",), "STL10", {"split": "test"}),
    "imagenette": (("imagenette2", "imagenette2-320", "imagenette2-160"), "Imagenette", {"size": "320px"}),
    "food101": (("food-101",), "Food101", {}),
}
NAMED_DATA = ("toy", *NAMED)
IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
}
UNUSABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError)  # of damaged downloads


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
    if data in NAMED:
        return open_named(data, root, download, holdout)
    if not os.path.isdir(data):
        if os.path.exists(data):
            raise UsageError(f"--data {data}: is a file; give the folder that holds the images")
        if os.sep in data or data.startswith("."):
            raise UsageError(f"--data {data}: folder not found")
        raise UsageError(f"--data {data}: no such folder, and none of the names {', '.join(NAMED_DATA)}")

    here = os.path.abspath(data)
    found = {name: os.path.dirname(here) if os.path.basename(here) == marker else here
             for name, (markers, *_) in NAMED.items() for marker in markers if name != "imagenette"
             if os.path.isdir(os.path.join(here, marker)) or os.path.basename(here) == marker}
    if len(found) > 1:
        raise UsageError(f"--data {data}: holds {' and '.join(found)}; say which: "
                         f"--data {next(iter(found))} --data-root {data}")
    if found:
        return open_named(*found.popitem(), False, holdout)
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
    markers, fetcher, options = NAMED[name]

    def there():
        return next((base for base in (os.path.join(root, marker) for marker in markers) if os.path.isdir(base)), None)

    if download and not there():
        from torchvision import datasets
        try:
            getattr(datasets, fetcher)(root, download=True, **options)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
            raise UsageError(f"--download: cannot fetch {name} into {root} ({one_line(error)})") from error
    base = there()
    if base is None:
        raise UsageError(f"--data {name}: not found in {root} (no folder {markers[0]} there); "
                         "fetch it with --download, or say where it is with --data-root")
    try:
        if name == "imagenette":
            return open_folder(base, holdout, name=name, rename=IMAGENETTE)
        return {"food101": open_food101, "stl10": open_stl10}.get(name, open_cifar)(name, base, holdout)
    except UNUSABLE as error:
        raise damaged(name, base, error) from error


def damaged(name, base, error):
    return UsageError(f"{base}: incomplete or damaged ({one_line(error)}); "
                      f"remove it and fetch {name} anew with --download")


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, strings and numbers, and refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def open_cifar(name, base, holdout):
    """CIFAR-10 and -100 have no validation split: it comes from train, the test split stays whole."""
    meta, key = ("batches.meta", "label_names") if name == "cifar10" else ("meta", "fine_label_names")
    with open(os.path.join(base, meta), "rb") as file:
        classes = PlainUnpickler(file, encoding="latin1").load()[key]
    files = sorted(entry.path for entry in os.scandir(base) if entry.is_file())
    held = held_count(50_000 // len(classes), holdout) * len(classes)

    def load(split):
        from torchvision import datasets
        part = "test" if split == "test" else "train"
        try:  # torchvision compares every file with its published MD5 before it unpickles it
            cifar = getattr(datasets, name.upper())(os.path.dirname(base), train=part == "train")
        except UNUSABLE as error:
            raise damaged(name, base, error) from error
        labels, rows = torch.tensor(cifar.targets), torch.arange(len(cifar.targets))
        names = [f"{name}/{part}/{i}" for i in rows.tolist()]
        if part == "train":
            rows = rows[hold_out(cifar.targets, names, holdout) == (split == "val")]
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)                   # (N, 3, 32, 32)
        return labels[rows].tolist(), [names[i] for i in rows], (images[chunk] for chunk in rows.split(1000))

    splits = {}
    for split, count in {"train": 50_000 - held, "val": held, "test": 10_000}.items():
        tag = json.dumps([name, split, holdout] if split != "test" else [name, split])
        splits[split] = Items([], files, lambda size, split=split: load(split), tag, (count, 0)) if count else None
    source = Source(name, "cifar", list(classes), *STATISTICS[name], splits)
    return described(source, f"{name} in {base}", holdout)


def open_stl10(name, base, holdout):
    """STL-10: 5,000 labelled and 100,000 unlabelled training images of 96 px, 8,000 test images."""
    classes = Path(base, "class_names.txt").read_text().split()
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
    return described(source, f"stl10 in {base}", holdout)


def stl10_labels(base, part, classes):
    """(N,) labels of a pair of files: part_X.bin has 3*96*96 bytes an image, part_y.bin one byte, 1 to 10."""
    count, rest = divmod(os.path.getsize(os.path.join(base, part + "_X.bin")), 3 * 96 * 96)
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

        return here.tolist(), [f"stl10/{part}/{i}" for part in chosen for i in chosen[part].tolist()], chunks()

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
