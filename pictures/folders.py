"""What lies in a folder of pictures, and which data set it is by the names of its folders."""

import contextlib
import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from common import UsageError, printable
from pictures.decoding import image_extensions

SPLITS = {"train": "training", "val": "validation", "test": "test"}  # and their titles
TRAIN, LABELED, UNLABELED = "train(ing)?", "(?<!un)labell?ed", "unl(ab(ell?ed)?)?"
PARTS = {  # what the names of their folders say; see split_groups
    "train": rf"{TRAIN}([\W_]*{LABELED})?|{LABELED}([\W_]*{TRAIN})?",
    "val": "val(id(ation)?)?",
    "test": "test(ing)?|evaluation",
    "unlabeled": rf"({TRAIN})?[\W_]*{UNLABELED}[\W_]*({TRAIN})?",
}
WORD = rf"(?<![^\W\d_])({'|'.join(PARTS[split] for split in SPLITS)})(?![^\W\d_])"  # not as in oval
FILLER = re.compile(r"[\W\d_]|(data)?set|data|images?|imgs?|pictures?|photos?|split")  # what says nothing beside them
SHAPES = ("supported layouts: train/, val/, test/ folders of class folders, class folders without a split, "
          "loose images, food-11, and a folder that holds cifar-10-batches-py or cifar-100-python")
PASSED_OVER = re.compile(r"\.|[@#$](eadir|recycle|recently|snapshot|tmp)|"  # names of systems and tools
                         r"(__macosx|__pycache__|node_modules|lost\+found|system volume information)$", re.IGNORECASE)
TOOLS = [{"pyvenv.cfg"}, {"images.bin", "meta.pt"},  # what lies in folders of tools, packed images and runs
         *({"args.json", name} for name in ("metrics.jsonl", "log.txt", "last.pt"))]
MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(hei|hev|mif|msf|avi|crx)|....JXL ",
                   re.DOTALL)
RAW = re.compile(r"\.(hei[cf]|avif|jxl|dng|nef|cr[23]|arw|orf|rw2|raf)")  # what Pillow does not read


class Folder:
    """A folder of pictures; what lies in it is listed once, in natural order. A link counts as what it leads to.

    Passed over are hidden files and folders, those of systems and tools, runs of this program, and folders that we
    are inside of. A link that leads nowhere is refused, unless its name is a picture's: it may have been a folder.
    """

    def __init__(self, path, inside=()):
        self.path, self.name, self.real = str(path), os.path.basename(path), os.path.realpath(path)
        self.inside = {*(inside or map(str, Path(self.real).parents)), self.real}
        self.below, self.images, self.others = [], [], []
        try:
            entries = {e.name: os.path.isdir(e) if e.is_symlink() else e.is_dir() for e in os.scandir(path)}
        except OSError as error:
            raise UsageError(f"{printable(path)}: cannot be read ({error.strerror})") from error
        self.of_tools = any(marks <= entries.keys() for marks in TOOLS)
        for name in sorted(entries, key=natural):
            file = os.path.join(self.path, name)
            if PASSED_OVER.match(name):
                continue
            if entries[name]:
                self.below.append(file)
            elif os.path.splitext(name)[1].lower() in image_extensions():
                self.images.append(file)
            elif os.path.islink(file) and not os.path.exists(file):
                raise UsageError(f"{printable(file)}: a broken link; repair or remove it")
            else:
                self.others.append(file)

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


def natural(text):
    """Sort key that takes numbers by their value: "2" before "10"."""
    return [int(t) if i % 2 else t.casefold() for i, t in enumerate(re.split(r"([0-9]+)", text))], text


def foreign_pictures(files):
    """Those that are pictures by their first bytes, or of a kind that Pillow does not read."""
    found, missed = [], Counter()
    for path in files:
        ending, start = os.path.splitext(path)[1].lower(), b""
        if not ending or missed[ending] < 100:  # text files beside a million pictures are not all opened
            with contextlib.suppress(OSError), open(path if os.path.isfile(path) else os.devnull, "rb") as file:
                start = file.read(16)
        if RAW.fullmatch(ending) or MAGIC.match(start):
            found.append(path)
        else:
            missed[ending] += 1
    return found


def no_images(files):
    plural = "file that is no image" if len(files) == 1 else "files that are no images"
    return printable(f"{len(files):,} {plural}, such as {os.path.basename(files[0])}")


def pictures_by(words, kinds):
    """kinds: one each. -> "3 pictures <words> 2 of the one, 1 of the other" """
    count = [f"{n:,} {kind}" for kind, n in Counter(kinds).items()]
    return f"{len(kinds):,} picture{'s' * (len(kinds) > 1)} {words} {some(count)}"


def some(words):
    return ", ".join(words[:3] + ["..."] * (len(words) > 3))


def recognise(path):
    """What a folder of pictures is.

    returns  the data set's folder, {"train", "val", "test": list of (path, class name or None)}, its shape in words,
             and what else is to be said, (title, text) pairs.
    raises   UsageError if it is nothing that we know, or could be two things.
    """
    top, notes, left = Folder(path), [], []
    others = [file for folder in top.walk() for file in folder.others]
    foreign = foreign_pictures(others)
    if foreign:
        kinds = [os.path.splitext(file)[1] or "without an ending" for file in foreign]
        left.append(f"{pictures_by('of a kind or name that is not read,', kinds)}: convert or rename them")
    if not top.pictures:
        nothing = f"no images among {len(others):,} files" if others else "empty, no images found"
        raise refused(top, left[0] if left else nothing)
    folder, found, shape = read_folder(top, notes)
    real = functools.cache(os.path.realpath)  # links may lead to a folder in two ways
    used = {(real(os.path.dirname(file)), os.path.basename(file)) for items in found.values() for file, _ in items}
    unplaced = [os.path.dirname(file) for file in top.pictures
                if (real(os.path.dirname(file)), os.path.basename(file)) not in used]
    if unplaced:
        where = [f"in {os.path.relpath(there, os.path.dirname(top.path))}" for there in unplaced]
        left.append(pictures_by("beside what was recognised:", where))
    if len(unplaced) + len(foreign) > sum(map(len, found.values())):
        raise refused(top, f"most pictures would be left out, {'; '.join(left)}")
    useful = {*foreign, os.path.join(folder.path, "classes.txt")}
    useless = [file for file in others if file not in useful]
    notes += [("left out", text) for text in left]
    if useless:
        notes.append(("ignored", no_images(useless)))
    return folder.path, found, shape, notes


def refused(folder, why):
    return UsageError(f"--data {folder.path}: {why}; {SHAPES}")


def read_folder(folder, notes):
    """-> the folder without wrappers, found, shape. See `recognise`."""
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


def split_groups(folder):
    """{what the names of subfolders say beside the split: {split, or "unlabeled": folders}}, for all words in them.

    train_set and test-2017 stand in one group, train_station and test_tube each in its own.
    """
    groups = {}
    for sub in folder.folders:
        name = sub.name.casefold()
        for part, word in PARTS.items():
            if match := re.search(word, name):
                rest = tuple(FILLER.sub("", side) for side in (name[: match.start()], name[match.end() :]))
                groups.setdefault(rest, {}).setdefault(part, []).append(sub)
    return groups


def whole_groups(folder):
    return [group for group in split_groups(folder).values() if "train" in group and len(group) > 1]


def find_splits(folder):
    """{"train", "val", "test", "unlabeled": folders}, {} if there are no splits; UsageError where that is unclear."""
    filled, groups, whole = folder.filled, split_groups(folder), whole_groups(folder)
    if len(filled) == 1 and whole_groups(filled[0]):  # a wrapper, be it called train
        return {}
    for part in SPLITS:
        twice = [sub.name for group in whole for sub in group.get(part, ())]
        if len(twice) > 1:
            raise refused(folder, f"{' and '.join(twice[:2])} both look like the {part} split; rename one")
    if whole:
        beside = [f.name for f in filled if not any(f in subs for subs in whole[0].values())]
        if beside and not whole[0]["train"][0].filled:
            raise refused(folder, f"{whole[0]['train'][0].name} has no class folders, and beside it is {some(beside)}: "
                                  "are these splits or classes?")
        return whole[0]
    if filled and groups.get(("", ""), {}).get("train") == filled:
        return {"train": filled}
    # A word alone tells little: test_tube is a class. But val is none, nor what holds the classes of its siblings.
    for rest, group in groups.items():
        lone = [sub for part in SPLITS for sub in group.get(part, ())]
        for sub in lone:
            inside, beside = {f.name for f in sub.filled}, [f for f in filled if f is not sub]
            alike = inside & {f.name for other in beside for f in (other, *other.filled)}
            plain = rest == ("", "") and ("train" not in group or (inside and beside))
            if plain or (len(alike) > 1 and re.search(WORD, sub.name.casefold())) or len(group) > 1:
                raise refused(folder, f"has no {'val' if 'train' in group else 'train'} folder beside "
                                      f"{' and '.join(s.name for s in lone[:3])}: are these splits or classes?")
    return {}


def read_splits(splits, notes):
    """Of split folders -> found, shape. See `recognise`."""
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


def is_food11(classes):
    """Whether classes are the numbers 0 to 10, or 00 to 10."""
    return len(classes) == 11 and {(c or "").lstrip("0") for c in classes} == {"", *map(str, range(1, 11))}


def number_classes(found):
    """Gives loose images <class>_<n> their class, where all of train and val have few classes, the same, of several."""
    def number(path):
        match = re.match(r"([0-9]{1,2})_[0-9]+\.", os.path.basename(path))
        return match and match[1]

    classes, known = Counter(number(path) for path, _ in found["train"]), [*found["train"], *found.get("val", ())]
    if None in classes or not 0 < 2 * len(classes) <= len(found["train"]) or any(
            c or number(path) not in classes for path, c in known):
        return False
    for s, items in found.items():
        found[s] = [(path, number(path) if number(path) in classes else c) for path, c in items]
    return True


def read_split(folder):
    """Images of one split as (path, class name or None): of class folders, perhaps below `labeled`, or loose ones."""
    only = folder.filled[0] if len(folder.filled) == 1 and not folder.images else None
    if only and (only.name == folder.name or (only.name.isalpha() and FILLER.fullmatch(only.name.casefold()))):
        return read_split(only)  # images/, say, is no class
    unlabeled = [f for f in folder.filled if re.fullmatch(PARTS["unlabeled"], f.name.lower())]
    labeled = [f for f in folder.filled if re.fullmatch(LABELED, f.name.lower())]
    classes = [c for f in labeled for c in f.filled] or [f for f in folder.filled if f not in unlabeled]
    found = [(path, unicodedata.normalize("NFC", c.name)) for c in classes for path in c.pictures]
    found += [(path, None) for f in unlabeled for path in f.pictures]
    return found or [(path, None) for path in folder.images]
