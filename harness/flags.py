"""The flags that every training program offers, their defaults by the kind of data, and those of a resumed run."""

import argparse
import contextlib
import json
import math
import os
import re
from functools import partial
from pathlib import Path

import pictures
from common import UsageError
from harness import checkpoint
from harness.log import tensorboard_writer
from harness.parser import Instead, Parser, absolute_path, flag_text, number, path, png_file, save_interval
from harness.weights import load_weights, take_shape

NEWEST = "newest"  # --resume without a folder

# Kind of data -> what a network without a run takes: the same as in the methods' recipes.
SHAPES = {
    "toy": dict(image_size=32, stem="cifar", width=16),
    "cifar": dict(image_size=32, stem="cifar", width=64),
    "stl10": dict(image_size=96, stem="imagenet", width=64),
    "photos": dict(image_size=128, stem="imagenet", width=64),
}
# What a resumed run cannot change; a program may name more, see parse().
FIXED = ("data", "recipe", "image_size", "stem", "width", "batch_size", "knn_split", "init")
# What does not belong to a recipe: where and how a run works, not what it computes.
PLUMBING = {"method", "kind", "data", "data_root", "download", "cache", "out", "resume", "quiet", "tensorboard",
            "views_png", "device", "amp", "compile", "save_every", "keep_every", "skip_unreadable", "knn_every",
            "contents", "bf16_gain", "usual_step_lr"}


def data_path(text):
    """An argparse type: --data; a folder's whole path, for a run may be asked for from another folder."""
    text = path(text)
    return text if text in pictures.NAMED_DATA or not os.path.isdir(text) else os.path.abspath(text)


def training_parser(file, doc, recipes, without=()):
    """A Parser with the flags that every method offers, but those in `without`.

    file     __file__ of the program: its name is the method's.  doc: __doc__.
    recipes  the method's table of defaults: kind of data -> flag -> value.
    """
    parser = Parser(re.split("\nS(?:ymbols|ources) ", doc)[0], recipes)
    parser.set_defaults(method=Path(file).stem)
    parser.usage, parser.title = "%(prog)s [flags]", "data"
    add, whole, real = partial(_add, parser, without), partial(number, int), partial(number, float)
    add("--data", f"folder of pictures, or {', '.join(pictures.NAMED_DATA)}", type=data_path, default="toy")
    add("--data-root", "where cifar10 ... food101 lie or are downloaded to", type=absolute_path, default="./data")
    add("--download", "fetch the named data set into --data-root", action="store_true")
    add("--cache", "folder for packed pictures (default: in the user's cache)", type=absolute_path, default=None)
    add("--skip-unreadable", "go on without pictures that cannot be read; they are counted and listed",
        action="store_true")
    parser.title = "recipe"
    add("--recipe", "paper: for photos the paper's values where ours differ on purpose, at a batch and image size "
        "for one GPU; list: print the defaults, and exit",
        choices=("paper", "list"), default=None)
    add("--image-size", "side of a view in pixels; too small: what tells classes apart is gone", type=whole(low=8))
    add("--view-size", "side of the training views, if another than that of --image-size, which evaluations keep; "
        "smaller ones train faster", type=whole(low=8), default=None)
    add("--stem", "first layers: cifar up to about 64 px, imagenet above; cifar on large views is slow "
        "and runs out of memory", choices=("cifar", "imagenet"))
    add("--width", "channels of layer1; 64 is ResNet-18", type=whole(low=1))
    length, rates = (parser.group("recipe").add_mutually_exclusive_group() for _ in range(2))
    add("--epochs", "passes over the training images", type=whole(low=1), action=Instead, group=length)
    add("--minutes", "instead of --epochs: as many steps as fit, the learning rate's schedule fitted to them while the "
        "run goes on. It counts from the first step's preparations to the last evaluation, like `seconds` in "
        "metrics.jsonl, interruptions left out; starting, packing pictures and what linear.py does last come on top",
        type=real(above=0), default=None, group=length)
    add("--batch-size", "images per step", type=whole(low=2))
    add("--lr", "learning rate of a batch of 256; that of a step grows with the batch; too high: the loss "
        "stays at chance or turns NaN", type=real(above=0), action=Instead, group=rates)
    add("--step-lr", "instead of --lr: the learning rate per step, whatever the batch size, as most articles give it",
        type=real(above=0), action=Instead, group=rates, default=None)
    add("--weight-decay", "L2 penalty", type=real(low=0))
    add("--warmup-epochs", "epochs over which the learning rate climbs; the default shrinks with --epochs; with "
        "--minutes the same share of the run as of the default --epochs",
        type=real(low=0))
    parser.title = "run"
    _run_flags(add, whole, real)
    parser.title = f"of {Path(file).name} alone"
    return parser


def _add(parser, without, flag, meaning, **kind):
    if flag not in without:
        parser.flag(flag, meaning, **kind)


def _run_flags(add, whole, real):
    """How a run works, whatever it trains."""
    add("--seed", "random seed for weights, data order and views", type=whole(low=0), default=0)
    add("--device", "auto (cuda, mps, cpu), or one of them, or cuda:1", default="auto")
    add("--amp", "precision of the forward pass; auto on a CPU: the faster one of a short trial",
        choices=("auto", "bf16", "fp16", "off"), default="auto")
    add("--compile", "torch.compile: a minute or more at first, faster steps after", action="store_true")
    add("--init", "weights that the backbone starts from, then with their stem and width: a run, or a file of a "
        "ResNet-18 with torchvision's names", metavar="FILE", type=absolute_path, default=None)
    add("--out", "folder of the run (default: runs/<method>-<data>-<time>)", type=path, default=None)
    add("--resume", "folder or checkpoint of a run to go on with; its flags hold unless given anew; without "
        "a folder: the newest run below runs/ that has the flags given here", metavar="RUN", nargs="?",
        const=NEWEST, type=path, default=None)
    add("--save-every", "epochs between checkpoints, or minutes: 10min", type=save_interval, default=1)
    add("--keep-every", "epochs between checkpoints that are kept, as epoch-0050.pt: --checkpoint, --resume take them",
        type=whole(low=1), default=None)
    add("--knn-every", "epochs between kNN evaluations, 0: never; each costs a tenth of an epoch or more",
        type=whole(low=0))
    add("--knn-k", "neighbours that vote", type=whole(low=1), default=200)
    add("--knn-t", "temperature of their votes", type=real(low=0.02), default=0.1)
    add("--knn-split", "test: train on every training image and query the test split, as published CIFAR "
        "curves do; then it chooses nothing and there is no best.pt", choices=("val", "test"), default="val")
    add("--views-png", "write what the network sees, one row per image, and exit", metavar="FILE", type=png_file,
        default=None)
    add("--quiet", "print nothing but errors; log.txt still has it all", action="store_true")
    add("--tensorboard", "write the figures for TensorBoard too", action="store_true")
    add("--max-steps", "end after this many steps; the schedule is fitted to it", type=whole(low=1), default=None)


def parse(parser, argv, fixed=()):
    """Parse a training program's flags; with --resume the saved run's flags stand in for the defaults.

    fixed    further flags that a resumed run cannot change.
    returns  args; .resume is the checkpoint to go on with, or None. Flags of the recipes may be None still.
    """
    args = parser.parse_args(argv)
    for kind, recipe in parser.recipes.items():
        unknown = [name for name in recipe if name not in args]
        if unknown:
            raise UsageError(f"RECIPES[{kind!r}] has {unknown[0]!r}, and there is no flag "
                             f"--{unknown[0].replace('_', '-')}; add one, or take it out of the recipes")
    if getattr(args, "recipe", None) == "list":
        print("\n".join(recipe_table(parser.recipes)))
        parser.exit()
    if args.tensorboard:
        tensorboard_writer()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if restarted and args.resume not in (None, NEWEST):
        last = checkpoint.file_of(args.resume).with_name("last.pt")
        with contextlib.suppress(FileNotFoundError):  # saved since it took up the file named: that counts now
            if last.stat().st_mtime > last.with_name("args.json").stat().st_mtime:
                args.resume = str(last)
    if args.resume == NEWEST or (args.resume is None and restarted and args.out):
        unset = object()
        everything = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        given = {name for name, value in vars(everything).items() if value is not unset} - (PLUMBING - {"data"})
        args.resume = newest_run(args, given)
        if args.resume is None and not restarted:
            parser.error(f"--resume: no run of {args.method} with these flags in {Path(args.out or 'runs')}; "
                         "name its folder")
    if args.resume is not None:
        return _parse_resumed(parser, argv, args, fixed)
    if args.download and args.data == "toy":
        parser.error("--download: toy is drawn, not downloaded; add --data cifar10, for instance")
    if args.out and (Path(args.out) / "last.pt").exists():
        parser.error(f"--out {args.out}: holds a run already; --resume it, or name another folder")
    if getattr(args, "init", None):
        take_shape(args, load_weights(args.init), "--init")
    return args


def _parse_resumed(parser, argv, first, fixed):
    saved = dict(checkpoint.load(first.resume, first.method)["args"])
    file = checkpoint.file_of(first.resume)
    for name in ("resume", "views_png", "program"):  # what a checkpoint names is not imported, the user names it again
        saved.pop(name, None)
    args = parser.parse_args(argv, argparse.Namespace(**saved))  # argparse keeps what is there
    if first.out and os.path.abspath(first.out) != os.path.abspath(file.parent):
        parser.error(f"--out {first.out}: a resumed run goes on in its own folder, {file.parent}")
    args.out, args.resume = str(file.parent), str(file)
    moved = ["data"] if saved.get("contents") and os.path.isdir(args.data) else []  # saved_run() compares the pictures
    for name in (*FIXED, *fixed):
        if name not in moved and getattr(args, name, None) != saved.get(name):
            parser.error(f"--{name.replace('_', '-')}: the run to resume has {saved.get(name)}, which cannot change")
    return args


def newest_run(args, given):
    """The folder of the newest run (that has a checkpoint) whose flags `given` have the values of args, or None."""
    found = []
    for file in [Path(args.out, "last.pt")] if args.out else Path("runs").glob("*/last.pt"):
        try:
            saved = json.loads((file.parent / "args.json").read_text())
            if saved["method"] == args.method and all(saved.get(name) == getattr(args, name) for name in given):
                found.append((file.stat().st_mtime, str(file.parent)))
        except (OSError, ValueError, KeyError):  # not a run of ours
            continue
    return max(found)[1] if found else None


def recipe_table(recipes):
    """Lines: a flag, and its default for each kind of data."""
    names = dict.fromkeys(name for recipe in recipes.values() for name in recipe)
    rows = [("", *recipes), *((f"--{name.replace('_', '-')}", *(recipe.get(name, "-") for recipe in recipes.values()))
                              for name in names)]
    return ["".join(f"{str(cell):{9 if i else 20}}" for i, cell in enumerate(row)).rstrip() for row in rows]


def recipe_of(args, recipes, source):
    """The defaults for a source, as its number of images bears them.

    A batch is at most half of the images, MoCo's queue a quarter or a batch: powers of two, and the run says so.
    raises  UsageError where there is no such recipe.
    """
    kind, given = source.kind, f"--data {args.data}"
    if kind not in recipes:
        raise UsageError(f"{given}: RECIPES of {args.method}.py has no entry for its kind, {kind!r}")
    if args.recipe == "paper":
        names = (f"paper-{kind}", {"photos": "paper", "toy": None}.get(kind, kind))
        papers = next((name for name in names if name in recipes), None)
        if not papers:
            raise UsageError(f"--recipe paper: {args.method}.py has none for {given}")
        return recipes[papers]
    images = sum(source.splits["train"].counts)
    most = {name: 2 ** int(math.log2(max(2, images // part))) for name, part in (("batch_size", 2), ("queue_size", 4))}
    batch = args.batch_size or min(recipes[kind]["batch_size"], most["batch_size"])
    most["queue_size"] = max(most["queue_size"], batch)
    fewer = {name: size for name, size in most.items()
             if size < recipes[kind].get(name, 0) and getattr(args, name) is None}
    if fewer:
        source.description += pictures.lines_of("note", f"{images:,} images: by default " + ", ".join(
            f"{flag_text(name, size)}, not {recipes[kind][name]}" for name, size in fewer.items()))
    return recipes[kind] | fewer


def fill_flags(args, recipe):
    """Give every flag that is still None its value from a table of defaults; keep the table's rate, for health.py.

    raises  UsageError for another optimizer than the table's without a rate.
    """
    theirs = getattr(args, "optimizer", None) in (None, recipe.get("optimizer"))
    if not theirs and "optimizer" in recipe and not (args.lr or args.step_lr):
        raise UsageError(f"--optimizer {args.optimizer}: the default rate is for {recipe['optimizer']}; add --lr or "
                         "--step-lr")
    if {"lr", "batch_size"} <= recipe.keys() and theirs:
        share = recipe["batch_size"] / 256
        args.usual_step_lr = recipe["lr"] * (math.sqrt(share) if recipe.get("lr_scaling") == "sqrt" else share)
    for name, value in recipe.items():
        if name == "warmup_epochs":  # a run of fewer epochs than the table's warms up for a shorter while
            value = round(value * min(1, (args.epochs or recipe["epochs"]) / recipe["epochs"]), 3)
        if getattr(args, name) is None and not (name in ("lr", "lr_scaling") and args.step_lr):
            setattr(args, name, value)


def check_stop(percent, chance):
    """raises  UsageError for a --stop-at-accuracy that chance alone reaches, or that is a share, 0.95 for 95 %."""
    low = max(1, chance)
    if percent is not None and percent <= low:
        fix = f"did you mean {100 * percent:g}?" if low < 100 * percent <= 100 else "take more"
        raise UsageError(f"--stop-at-accuracy {percent:g}: in percent, and chance alone reaches {chance:.3g}; {fix}")


def stop_reason(percent, reached, what):
    """Why a run ends when of validation `what` (images, say) `reached` percent are right; None where it goes on."""
    if percent is not None and reached >= percent:
        return f"{reached:.2f} % of validation {what} are right: --stop-at-accuracy {percent:g}"


def holdout(args):
    """The part of the training images held out where a source has no validation split."""
    return 0.0 if args.knn_split == "test" else 0.1


def changed_images(saved, source, splits):
    """In words, which splits have not the images any more that they had in the run whose flags are `saved`; or ""."""
    pairs = {split: (saved["contents"].get(split, [0]), source.contents.get(split, [0])) for split in splits
             if "contents" in saved}
    return ", ".join(f"{split}: {before[0]:,} then, {now[0]:,}{' others' * (before[0] == now[0])} now"
                     for split, (before, now) in pairs.items() if before != now)


def note_changes(source, data, saved, splits):
    """Has the description say whether the images of a run, of flags `saved`, are others now. data: --data, or None."""
    changed = changed_images(saved, source, splits)
    if changed and os.path.abspath(data or saved["data"]) == os.path.abspath(saved["data"]):
        source.description += pictures.lines_of("changed", f"images since this run was trained: {changed}; some that "
                                                           "it trained on may be validation images now")
