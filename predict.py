"""The class of picture files: by a linear.py run, or by the nearest training images.

    python predict.py --checkpoint runs/linear-food-11-... photo.jpg folder/
    python predict.py --checkpoint runs/moco-food-11-... folder/ --csv > out.csv

Classifier  a run of linear.py: the softmax of its logits.
Votes       any other run: the labelled training images nearest to a picture
            vote, as in knn.py; the probability is the share of the votes.
            Without labels there is no class; --neighbours still works.
Pictures    pass through the very code that evaluates: answers about the files
            of a split have exactly the accuracy that was printed for it.
Output      on stdout the answers alone, as a table, or with --json or --csv;
            on stderr everything else.
Exit code   0; 1 where a file could not be read (its line says why); 2 for a
            wrong use.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import data
import knn

CHUNK = 500  # files read, forwarded and answered at a time
SHOWN = 20   # queries in the picture of --neighbours
FIELDS = ("file", "class", "class_index", "probability", "runner_up", "runner_up_probability")

# ------------------------------------------------------------------------------------------------
# Flags and files
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=common.path, help="picture files, and folders of them")
    add("--checkpoint", required=True, type=common.path,
        help="a run folder or one of its .pt files; of a linear.py run, its linear.pt")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects, with the probability of every class")
    form.add_argument("--csv", action="store_true", help="comma-separated values with a header")
    add("--neighbours", metavar="PNG", type=common.png_file,
        help=f"draw up to {SHOWN} of the pictures beside their nearest training images")
    add("--data", type=common.path, help="training images that vote and are shown (default: those of the run)")
    add("--data-root", type=common.path, help="where a named data set lies (default: that of the run)")
    add("--cache", type=common.path, help="folder for packed training images (default: that of the run)")
    add("--k", type=common.number(int, low=1), default=200, help="neighbours that vote, all if there are fewer")
    # Votes are exp(similarity / temperature): below 0.02 they would leave the range of float32.
    add("--temperature", type=common.number(float, low=0.02), default=0.1, help="of the votes")
    add("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="forward precision")
    return parser.parse_args(argv)


def list_files(arguments):
    """The files to answer about, in order: those named, whatever their ending, and all pictures below folders."""
    files, others = [], []
    for argument in arguments:
        if not os.path.isdir(argument):
            files.append(argument)
            continue
        folder = data.Folder(argument)
        other = [file for inner in folder.walk() for file in inner.others]
        foreign = data.foreign_pictures(other)  # a line each; where it cannot be read, that is said
        files += folder.pictures + foreign
        others += sorted({*other} - {*foreign})
    if not files:
        raise common.UsageError(f"{', '.join(arguments)}: no images found there")
    if others:
        print(f"passed over: {data.no_images(others)}")
    return files


def read_files(files, size, pool):
    """Decodes files in threads, as data.pack does.

    returns  a data.Split of those that could be read, in order, and {position in files: why not} of the others.
    """
    images, aspect, unreadable = torch.empty(len(files), 3, size, size, dtype=torch.uint8), torch.ones(len(files)), {}

    def decode(i):
        try:
            images[i], aspect[i] = data.decode(files[i], size)
        except Exception as error:  # broken files raise almost anything
            unreadable[i] = data.one_line(error, files[i])

    list(pool.map(decode, range(len(files))))
    kept = [i for i in range(len(files)) if i not in unreadable]
    labels = torch.full((len(kept),), -1)
    return data.Split(images[kept], labels, aspect[kept], [files[i] for i in kept]), unreadable


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


def answers(files, unreadable, probabilities, classes):
    """Yields one dictionary per file: FIELDS and "probabilities", or what is wrong with it under "error".

    probabilities  (N, classes) double, a row for each file that is not in `unreadable`.
    """
    # Stable: of equal probabilities the first class wins, as with argmax.
    order = iter(probabilities.sort(dim=1, descending=True, stable=True).indices[:, :2].tolist())
    shares = iter(probabilities.tolist())
    for i, file in enumerate(files):
        row = {**dict.fromkeys(FIELDS), "file": file}
        if i in unreadable:
            yield row | {"error": unreadable[i]}
            continue
        best, exact = next(order), next(shares)
        best, share = best[:1] + [c for c in best[1:] if exact[c] > 0], [round(p, 6) for p in exact]
        if best:  # without labelled training images there is no class
            row |= {"class": classes[best[0]], "class_index": best[0], "probability": share[best[0]]}
        if len(best) > 1:  # no other class, or none that got a vote
            row |= {"runner_up": classes[best[1]], "runner_up_probability": share[best[1]]}
        yield row | {"probabilities": dict(zip(classes, share, strict=True))}


class Table:
    """One line per file, in 80 columns or the width of a wider terminal. title: of the probabilities."""

    def __init__(self, out, files, classes, title):
        def widest(names):
            return max(sum(columns(data.printable(name))) for name in names)

        self.out, self.columns = out, max(80, shutil.get_terminal_size().columns) - 1
        self.name = min(widest(["class", *classes]), self.columns // 5)  # stands there twice
        self.file = min(widest(["file", *files]), self.columns - 2 * self.name - 21)
        print(f"{'file':{self.file}}  {'class':{self.name}}  {title:>7}  runner-up", file=out)

    def write(self, row):
        file, half = fit(row["file"], self.file), self.name // 2
        if "error" in row:
            lines = textwrap.wrap(f"unreadable: {data.printable(row['error'])}", self.columns - self.file - 2)
            print(f"{file}  " + ("\n" + " " * (self.file + 2)).join(lines), file=self.out)
            return
        line = file.rstrip()
        if row["class"] is not None:
            line = f"{file}  {fit(row['class'], self.name, half)}  {100 * row['probability']:5.1f} %"
        if row["runner_up"] is not None:
            line += f"  {fit(row['runner_up'], self.name, half)}  {100 * row['runner_up_probability']:4.1f} %"
        print(line, file=self.out)

    def close(self):
        pass


class Csv:
    """A header, then one line per file; without the probabilities of all classes."""

    def __init__(self, out):
        self.writer = csv.DictWriter(out, [*FIELDS, "error"], extrasaction="ignore", lineterminator="\n")
        self.writer.writeheader()

    def write(self, row):
        self.writer.writerow(row)

    def close(self):
        pass


class Json:
    """One list, one object per line, written as it comes: no number of files fills the memory."""

    def __init__(self, out):
        self.out, self.before = out, "[\n"

    def write(self, row):
        self.out.write(self.before + json.dumps(row))
        self.before = ",\n"

    def close(self):
        self.out.write("\n]\n")


def columns(text):
    """How many a terminal takes for each character: two for wide ones, as in Chinese, none for accents on others."""
    return [0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else
            2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text]


def fit(text, width, head=0):
    """One line of exactly `width` columns: padded, or cut after its first `head` columns to keep its end."""
    text = unicodedata.normalize("NFC", data.printable(text))  # letters that macOS took apart put together
    if sum(columns(text)) > width:
        first = sum(total <= head for total in itertools.accumulate(columns(text)))
        last = sum(total <= width - head - 3 for total in itertools.accumulate(reversed(columns(text))))
        text = text[:first] + "..." + text[len(text) - last :]
    return text + " " * (width - sum(columns(text)))


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """-> the checkpoint, its layer, and its classifier {"weight", "bias"}, or None for a pre-training run.

    path     a file or a run folder; linear.pt goes before last.pt.
    raises   UsageError, also where classifier, classes and network do not fit together.
    """
    inside = Path(path) / "linear.pt"
    path = inside if inside.exists() else path
    checkpoint = common.load_checkpoint(path)
    if "classifier" not in checkpoint:
        if checkpoint["method"] == "linear":
            raise common.UsageError(f"{path}: holds no classifier; give the run's linear.pt")
        return checkpoint, "layer4", None
    layer, classifier = checkpoint.get("layer"), checkpoint["classifier"]
    dims = {f"layer{i + 1}": checkpoint["width"] * 2**i for i in range(4)}
    wanted = {"weight": (len(checkpoint["classes"]), dims.get(layer)), "bias": (len(checkpoint["classes"]),)}
    found = {name: tuple(classifier[name].shape) if name in classifier else None for name in wanted}
    if found != wanted:
        raise common.UsageError(f"{path}: {len(checkpoint['classes'])} classes and the {dims.get(layer)} features of "
                                f"{layer} do not fit its classifier, {found['weight']}; make it anew with linear.py")
    return checkpoint, layer, classifier


def open_bank(args, checkpoint):
    """-> the labelled training images of --data or of the run, as a Split, and their class names.

    Where none is labelled, all of them and no names, if there are --neighbours to show.
    """
    source, dataset = knn.open_data(args, checkpoint, ("train",))
    print("\n".join(source.description))
    bank = data.labelled(dataset.train)
    if len(bank) > 0:
        return bank, dataset.classes
    if not args.neighbours:
        raise common.UsageError(f"--data {args.data or checkpoint['args']['data']}: has no labelled training images, "
                                "and without them there is no class to tell; name others, or --neighbours PNG")
    return dataset.train, []


def by_classifier(features, weight, bias):
    """(N, C) -> (N, K): the softmax of the logits; in double, where unequal logits keep unequal probabilities."""
    return F.linear(features, weight, bias).cpu().double().softmax(dim=1)


def by_vote(features, bank_features, bank_labels, num_classes, k, temperature):
    """(N, C) -> (N, K): each class's share of the votes of the k nearest images of the bank."""
    votes = knn.knn_predict(features, bank_features, bank_labels, num_classes, k, temperature)
    return F.normalize(votes.cpu().double(), p=1, dim=1)


def draw_neighbours(path, shown, bank, bank_features, total):
    """shown: list of (images, predicted labels in the bank's numbering, aspect, features)."""
    if not shown:
        return print(f"\n{path} not written: no picture could be read")
    images, labels, aspect, features = (torch.cat(parts) for parts in zip(*shown, strict=True))
    queries = data.Split(images, labels, aspect, [])
    knn.neighbour_grid(path, queries, bank, features, bank_features, rows=SHOWN)
    print(f"\nwrote {path}: {len(images)} of {total:,} pictures, each with its nearest training images;\n" +
          ("green: of the class that was predicted" if bank.labels.amax() >= 0 else "grey: they have no labels"))


def predict(args, out):
    """Answers about every file on `out`; returns the exit code, 1 where a file could not be read."""
    checkpoint, layer, classifier = read_checkpoint(args.checkpoint)
    if classifier and args.data and not args.neighbours:
        raise common.UsageError(f"--data {args.data}: {args.checkpoint} has a classifier and asks no training images; "
                                "add --neighbours PNG to see them, or leave --data out")
    files, classes = list_files(args.images), checkpoint["classes"]
    device = common.pick_device(args.device)
    autocast, _ = common.pick_precision(args.amp, device)
    network = knn.Layers(common.load_backbone(checkpoint, device), (layer,))
    # --data may be of another kind, but the network wants pictures prepared as those it was trained on.
    view = argparse.Namespace(size=checkpoint["image_size"], mean=checkpoint["mean"], std=checkpoint["std"])

    if args.neighbours or not classifier:
        bank, bank_classes = open_bank(args, checkpoint)
        bank_features = knn.extract(network, bank, view, device, autocast)[layer]            # (M, C)
        number = {name: i for i, name in enumerate(bank_classes)}
    if classifier:
        weight, bias = (classifier[name].to(device) for name in ("weight", "bias"))          # (K, C), (K,)
        classify = functools.partial(by_classifier, weight=weight, bias=bias)
    elif not bank_classes:
        classes, classify = [], lambda features: features[:, :0].cpu()                       # (N, 0)
        print("no classifier and no labelled training images: no class to tell, neighbours alone\n")
    else:
        classes, k = bank_classes, min(args.k, len(bank))
        classify = functools.partial(by_vote, bank_features=bank_features, bank_labels=bank.labels,
                                     num_classes=len(classes), k=k, temperature=args.temperature)
        print(f"no classifier: the {k:,} nearest of {len(bank):,} labelled training images vote\n")

    writer = Csv(out) if args.csv else Json(out) if args.json else None
    writer = writer or Table(out, files, classes, "prob." if classifier else "votes")
    progress = common.Progress(len(files), "predicting", quiet=not sys.stderr.isatty())
    shown, readable, every = [], 0, math.ceil(len(files) / SHOWN)
    with ThreadPoolExecutor(data.usable_cores()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        for start in range(0, len(files), CHUNK):
            progress.update(start)
            chunk = files[start : start + CHUNK]
            split, unreadable = read_files(chunk, view.size, pool)
            probabilities = torch.empty(0, len(classes))
            if len(split):
                features = knn.extract(network, split, view, device, autocast)[layer]        # (N, C)
                probabilities = classify(features)                                           # (N, K)
                if not probabilities.isfinite().all():
                    raise common.UsageError(f"{args.checkpoint}: the network's output is not finite; try --amp off")
                if args.neighbours:
                    named = [-1] * len(split)  # no class to tell
                    if classes:  # one that the bank lacks has a number that none of its images has
                        named = [number.get(classes[c], len(number)) for c in probabilities.argmax(dim=1).tolist()]
                    some = slice(-readable % every, None, every)
                    shown.append((split.images[some], torch.tensor(named)[some], split.aspect[some], features[some]))
            readable += len(split)
            progress.close()
            for row in answers(chunk, unreadable, probabilities, classes):
                writer.write(row)
    writer.close()
    if args.neighbours:
        draw_neighbours(args.neighbours, shown, bank, bank_features, len(files))
    return int(readable < len(files))


@common.command
def main(argv=None):
    args, out = parse_args(argv), sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8", errors="surrogateescape")  # names of files may be any bytes
    with contextlib.redirect_stdout(sys.stderr):  # whatever others print on the way
        return predict(args, out)


if __name__ == "__main__":
    sys.exit(main())
