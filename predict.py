"""The class of picture files: by a linear.py run, or by the nearest training images.

    python predict.py --checkpoint runs/linear-cached-food-11-... photo.jpg folder/
    python predict.py --checkpoint runs/moco-food-11-... folder/ --csv > out.csv

A run of linear.py answers with the softmax of its classifier. Of any other run
the nearest labelled training images vote, as in knn.py; the probability is the
share of the votes, and without labels there are --neighbours alone. Pictures
pass through the code that evaluates: answers about the files of a split have the
accuracy that was printed for it. Exit code 1: some files could not be read.
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import argparse
import contextlib
import csv
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import knn
import pictures
from harness.checkpoint import file_of
from harness.parser import Parser, number, path, png_file
from harness.weights import precision, program_flag

CHUNK = 500  # files read, forwarded and answered at a time: no number of files fills the memory
SHOWN = 20  # queries in the picture of --neighbours
FIELDS = ("file", "class", "class_index", "probability", "runner_up", "runner_up_probability")


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=path, help="picture files, and folders of them")
    add("--checkpoint", required=True, type=path, help="a run folder or one of its .pt files")
    program_flag(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects, with the probability of every class")
    form.add_argument("--csv", action="store_true", help="comma-separated values with a header")
    add("--neighbours", metavar="PNG", type=png_file, help="draw some beside their nearest training images")
    add("--data", type=path, help="training images that vote and are shown (default: those of the run)")
    add("--data-root", type=path, help="where a named data set lies (default: that of the run)")
    add("--cache", type=path, help="folder for packed training images (default: that of the run)")
    add("--skip-unreadable", action="store_true", help="go on without training images that cannot be read")
    add("--k", type=number(int, low=1), help="neighbours that vote, all if there are fewer (default: 200)")
    add("--temperature", type=number(float, low=0.02), help="of the votes (default: 0.1)")
    add("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="forward precision")
    return parser.parse_args(argv)


def list_files(arguments):
    """The files to answer about, in order: those named, whatever their ending, and all pictures below folders."""
    files = []
    for argument in arguments:
        if not Path(argument).is_dir():
            files.append(argument)
            continue
        folder = pictures.Folder(argument)
        others = [file for inner in folder.walk() for file in inner.others]
        foreign = pictures.foreign_pictures(others)  # a line each; where it cannot be read, that is said
        files += folder.pictures + foreign
        if len(others) > len(foreign):
            print(f"passed over: {pictures.no_images(sorted({*others} - {*foreign}))}")
    if not files:
        raise common.UsageError(f"{', '.join(arguments)}: no images found there")
    return files


def read_files(files, size):
    """-> a pictures.Split of those that could be read, in order, and {file: why not} of the others."""
    images, aspect, bad = torch.empty(len(files), 3, size, size, dtype=torch.uint8), torch.ones(len(files)), {}
    sum(pictures.decode_all(files, images, aspect, bad))
    kept = [i for i in range(len(files)) if i not in bad]
    split = pictures.Split(images[kept], torch.full((len(kept),), -1), aspect[kept], [files[i] for i in kept])
    return split, {file: why for file, why, _ in bad.values()}


def open_bank(args, checkpoint):
    """-> the labelled training images of --data or of the run, and their classes; without labels all, and no class."""
    source, dataset = knn.open_data(args, checkpoint, ("train",))
    print("\n".join(source.description))
    bank = pictures.labelled(dataset.train)
    if len(bank) == 0 and not args.neighbours:
        raise common.UsageError(f"--data {source.name}: no labelled training images vote; take others, or --neighbours")
    return (bank, dataset.classes) if len(bank) else (dataset.train, [])


def answers(files, size, classes, classify):
    """Yields a dictionary per file: FIELDS and "probabilities", or what is wrong with it under "error"."""
    for start in range(0, len(files), CHUNK):
        chunk = files[start : start + CHUNK]
        split, unreadable = read_files(chunk, size)
        rows = iter(classify(split) if len(split) else ())
        for file in chunk:
            answer = {**dict.fromkeys(FIELDS), "file": file}
            if file in unreadable:
                yield answer | {"error": unreadable[file]}
                continue
            probabilities = next(rows)
            # Stable: of equal probabilities the first class wins, as with argmax.
            order = probabilities.argsort(descending=True, stable=True)[:2].tolist()
            share = [round(p, 6) for p in probabilities.tolist()]
            if order:  # without labelled training images there is no class
                answer |= {"class": classes[order[0]], "class_index": order[0], "probability": share[order[0]]}
            if len(order) > 1 and probabilities[order[1]] > 0:  # else no other class got a vote
                answer |= {"runner_up": classes[order[1]], "runner_up_probability": share[order[1]]}
            yield answer | {"probabilities": dict(zip(classes, share, strict=True))}


def cell(text, width):
    """One line of exactly `width` characters; of a longer text the end, by which names of files differ."""
    text = common.printable(text)
    return f"{text:{width}}" if len(text) <= width else "..." + text[len(text) - width + 3 :]


def table_line(row):
    """One row of answers() in 79 columns at most."""
    line = cell(row["file"], 31)
    if "error" in row:
        return f"{line}  unreadable: {row['error']}"[:79]
    for name, share in (("class", "probability"), ("runner_up", "runner_up_probability")):
        if row[name] is not None:
            line += f"  {cell(row[name], 13)}  {100 * row[share]:5.1f} %"
    return line.rstrip()


def write(out, rows, args):
    """Rows on `out` as they come: a table, --csv or --json. Returns {file: class} of the files that could be read."""
    writer, named = csv.DictWriter(out, [*FIELDS, "error"], extrasaction="ignore", lineterminator="\n"), {}
    if args.csv:
        writer.writeheader()
    elif not args.json:
        print(f"{'file':31}  {'class':13}    prob.  runner-up", file=out)
    for place, row in enumerate(rows):
        if args.json:
            out.write((",\n" if place else "[\n") + json.dumps(row))
        elif args.csv:
            writer.writerow(row)
        else:
            print(table_line(row), file=out)
        if "error" not in row:
            named[row["file"]] = row["class"]
    out.write("\n]\n" if args.json else "")
    return named


def predict(args, out):
    """Answers about every file on `out`; returns the exit code, 1 where a file could not be read."""
    checkpoint = harness.load_checkpoint(file_of(args.checkpoint, "linear.pt"))
    layer, classifier = checkpoint.get("layer", "layer4"), checkpoint.get("classifier")  # "weight", "bias", or None
    if classifier and args.data and not args.neighbours:
        raise common.UsageError(f"--data {args.data}: a classifier asks no training images; --neighbours shows them")
    if classifier and (args.k or args.temperature):
        raise common.UsageError("--k, --temperature: a classifier does not vote; for votes give the pre-training run")
    files, classes, size = list_files(args.images), checkpoint["classes"], checkpoint["image_size"]
    device = common.pick_device(args.device)
    autocast = precision(args, checkpoint, device)
    network = knn.Layers(harness.load_backbone(checkpoint, device, args.program), (layer,))
    # --data may be of another kind, but the network wants pictures prepared as those it was trained on.
    view = argparse.Namespace(size=size, mean=checkpoint["mean"], std=checkpoint["std"])

    def extract(split):  # -> (N, C)
        return knn.extract(network, split, view, device, autocast)[layer]

    def classify(split):  # -> (N, K) double, in which unequal logits keep unequal probabilities
        features, probabilities = extract(split), torch.empty(len(split), 0)
        if classifier:
            weight, bias = (classifier[name].to(device) for name in ("weight", "bias"))      # (K, C), (K,)
            probabilities = F.linear(features, weight, bias).cpu().double().softmax(dim=1)
        elif classes:
            votes = knn.knn_predict(features, bank_features, bank.labels, len(classes), k, args.temperature or 0.1)
            probabilities = F.normalize(votes.cpu().double(), p=1, dim=1)
        if not probabilities.isfinite().all():
            raise common.UsageError(f"{args.checkpoint}: the network's output is not finite; try --amp off")
        return probabilities

    if args.neighbours or not classifier:
        bank, bank_classes = open_bank(args, checkpoint)
        bank_features = extract(bank)                                                        # (M, C)
    if not classifier:
        classes, k = bank_classes, min(args.k or 200, len(bank))
        print(f"no classifier: the {k:,} nearest of {len(bank):,} labelled training images vote\n" if classes else
              "no classifier, no labelled training images: no class to tell\n")
    named = write(out, answers(files, size, classes, classify), args)
    if args.neighbours and named:
        queries, _ = read_files(list(named)[:: math.ceil(len(named) / SHOWN)], size)
        # A class that the bank lacks has a number that none of its images has; -1: no class to tell.
        number = {None: -1} | {name: i for i, name in enumerate(bank_classes)}
        queries.labels = torch.tensor([number.get(named[file], len(number)) for file in queries.paths])
        knn.neighbour_grid(args.neighbours, queries, bank, extract(queries), bank_features, rows=SHOWN)
        frames = "green: of the class that was predicted" if bank_classes else "grey: they have no labels"
        print(f"\nwrote {args.neighbours}: {len(queries)} of {len(files):,} pictures beside their neighbours; {frames}")
    return int(len(named) < len({*files}))


@harness.command
def main(argv=None):
    args, out = parse_args(argv), sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8", errors="surrogateescape")  # names of files may be any bytes
    with contextlib.redirect_stdout(sys.stderr):  # whatever others print on the way
        return predict(args, out)


if __name__ == "__main__":
    sys.exit(main())
