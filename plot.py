"""Curves of runs: loss, accuracy, learning rate, health figures in one picture.

    python plot.py runs/simsiam-toy-... --out curves.png
    python plot.py runs/moco-... runs/simsiam-... --against seconds
    python plot.py runs/tuned runs/scratch --labels "pre-trained" "from scratch"

Reads only what a run keeps beside its checkpoints (metrics.jsonl, args.json),
and so also draws runs that are still going on. The legend names runs by method
and by the flags that differ. Losses of different methods have nothing in common
but the word: each method gets an axis of its own. Needs matplotlib.
"""

import collections
import io
import json
import math
import textwrap
import warnings
from pathlib import Path

import common

ENDINGS = (".png", ".pdf", ".svg")

# What stands over the panels, in their order. Figures of one title share a panel; a figure that is not listed gets
# a panel of its own.
TITLES = {
    "val_loss": "loss",
    "test_loss": "loss",
    "loss": "loss",
    "knn": "accuracy, %",
    "top1": "accuracy, %",
    "train_top1": "accuracy, %",
    "lr": "learning rate",
    "std": "std of outputs (1: spread, 0: collapsed)",
    "accuracy": "share of images whose own view is nearest",
    "val_rotation": "rotation accuracy, %",
    "test_rotation": "rotation accuracy, %",
    "rotation": "rotation accuracy, %",
    "top5": "top-5 accuracy, %",
    "class_mean": "accuracy, mean of the classes, %",
}
NOT_DRAWN = {"epoch", "step", "seconds", "images_per_second", "knn_20", "knn_10", "knn_seconds"}
FROM_ZERO = {"lr", "std", "accuracy"}  # a close-up of a healthy std would look like a drama

# Okabe and Ito's palette without its yellow, which fades on white: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")

# Flags that say where and how often, not what was trained: they never tell two runs apart.
PLUMBING = {"method", "way", "data_root", "download", "cache", "skip_unreadable", "out", "resume", "quiet",
            "tensorboard", "views_png", "save_every", "keep_every", "knn_every", "test", "confusion", "eval_every",
            "stop_at_accuracy"}

Run = collections.namedtuple("Run", "folder args rows")

# ------------------------------------------------------------------------------------------------
# Runs and their names
# ------------------------------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, (int, float))


def read_args(folder):
    """The flags of a run, {} where they cannot be read: they only serve to name it."""
    try:
        args = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return {}
    return args if isinstance(args, dict) else {}


def read_run(folder):
    """raises  UsageError for what is no run folder, or a run that has not written a line yet."""
    folder = Path(folder)
    if not folder.is_dir():
        raise common.UsageError(f"{folder}: no such folder (expected a run folder with metrics.jsonl)")
    if not (folder / "metrics.jsonl").is_file():
        raise common.UsageError(f"{folder}: not a run folder, it holds no metrics.jsonl")
    try:
        rows = common.read_metrics(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise common.UsageError(f"{folder / 'metrics.jsonl'}: cannot be read: {reason}") from None
    if not all(isinstance(row, dict) and is_number(row.get("epoch")) and is_number(row.get("seconds"))
               for row in rows):
        raise common.UsageError(f"{folder / 'metrics.jsonl'}: not written by a run: lines without epoch or seconds")
    if not any(is_number(row[name]) for row in rows for name in row.keys() - NOT_DRAWN):
        raise common.UsageError(f"{folder / 'metrics.jsonl'}: no figures yet; wait for the first epoch to end")
    return Run(folder, read_args(folder), rows)


def method(run):
    """"simsiam", ..., "linear"; where args.json does not say, the folder's name up to the first dash."""
    return run.args.get("method") or run.folder.resolve().name.split("-")[0]


def headline(run):
    """The method; of a run of linear.py what was trained from what."""
    way = run.args.get("way")
    if way is None:
        return method(run)
    if way == "from-scratch":
        return "from scratch"
    start = Path(run.args.get("checkpoint") or run.args.get("weights") or "a checkpoint")
    start = start.parent if start.suffix == ".pt" else start
    pretrained = method(Run(start, read_args(start), []))
    return f"fine-tuned {pretrained}" if way == "finetune" else f"linear probe of {pretrained}"


def flag_text(name, value):
    """("lr", 0.1) -> "lr 0.1", ("no_predictor", True) -> "no-predictor"; nothing for what is not set."""
    flag = name.replace("_", "-")
    if value is None or value is False:
        return ""
    if isinstance(value, str):
        path = Path(value)
        value = path.parent.name if path.name in ("last.pt", "best.pt") else path.name
    return flag if value is True else f"{flag} {value}"


def make_labels(runs):
    """The shortest names that tell runs apart: headline, flags that differ within it, at last the folder."""
    labels = []
    for run in runs:
        group = [other for other in runs if headline(other) == headline(run)]

        def values(names, group=group):
            return [tuple(str(other.args.get(name)) for name in names) for other in group]

        names = [name for name in run.args if name not in PLUMBING and len(set(values([name]))) > 1]
        if len(names) > 3:  # other data come with another recipe: keep the flags that are needed
            kept = []
            for name in names:
                if len(set(values([*kept, name]))) > len(set(values(kept))):
                    kept.append(name)
            names = kept
        texts = [flag_text(name, run.args[name]) for name in names]
        labels.append(", ".join([headline(run), *filter(None, texts)]))
    twice = {label for label in labels if labels.count(label) > 1}
    return [f"{label} ({run.folder})" if label in twice else label
            for label, run in zip(labels, runs, strict=True)]


# ------------------------------------------------------------------------------------------------
# Panels
# ------------------------------------------------------------------------------------------------


def curve(run, name, against):
    """The points of one figure, ([x, ...], [y, ...]); epochs without it are passed over."""
    points = [(row[against], row[name]) for row in run.rows if is_number(row.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def make_panels(runs):
    """{title: [(number of the run, name of the figure), ...]}, in reading order."""
    figures = [(number, name) for number, run in enumerate(runs)
               for name in dict.fromkeys(name for row in run.rows for name in row)
               if name not in NOT_DRAWN and curve(run, name, "epoch")[0]]
    order = list(TITLES)
    figures.sort(key=lambda figure: order.index(figure[1]) if figure[1] in order else len(order))
    methods = {method(runs[number]) for number, name in figures if name == "loss"}
    panels = {}
    for number, name in figures:
        title = TITLES.get(name, name.replace("_", " "))
        if name.startswith("knn_"):
            title = f"kNN accuracy of {name[4:]}, %"
        if title == "loss" and len(methods) > 1:
            title = f"loss ({method(runs[number])})"
        panels.setdefault(title, []).append((number, name))
    return panels


def is_training(name, kinds):
    """Whether a figure is of training images and its panel, of these `kinds`, has the same of held-out ones."""
    return name.startswith("train_") or bool(kinds & {f"val_{name}", f"test_{name}"})


def time_unit(seconds):
    """The name and length of the unit in which a time reads best."""
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return name, length
    return "seconds", 1


def draw(runs, labels, against="epochs"):
    """A matplotlib Figure that opens no window.

    runs     of read_run().  labels: one a run.  against: "epochs" or "seconds", the horizontal axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = make_panels(runs)
    key, unit, length = "epoch", "epochs", 1
    if against == "seconds":
        key = "seconds"
        unit, length = time_unit(max(row["seconds"] for run in runs for row in run.rows))
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    names = [textwrap.fill(label, 60) for label in labels]
    longest = max(len(line) for name in names for line in name.splitlines())
    legend_columns = max(1, min(len(runs), 46 * columns // (longest + 8)))
    legend_rows = math.ceil(len(runs) / legend_columns)

    figure = Figure(figsize=(4.0 * columns, 2.7 * rows + 0.2 * legend_rows), dpi=150, layout="constrained")
    handles, axes = {}, None
    for place, (title, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1, sharex=axes)
        peaks, kinds = [], {name for _, name in members}
        for number, name in members:
            x, y = curve(runs[number], name, key)
            thin = is_training(name, kinds)
            line, = axes.plot(
                [value / length for value in x], y, linewidth=0.9 if thin else 1.6, alpha=0.6 if thin else 1.0,
                color=COLOURS[number % len(COLOURS)], linestyle=STYLES[number % 4] if len(runs) > 3 else "-",
                marker="o" if len(x) <= 20 else None, markersize=2 if thin else 3.5)  # one point alone shows
            handles.setdefault(number, line)
            peaks.append(max(y))
        if kinds == {"lr"} and max(peaks) > 20 * min(peaks) > 0:
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(peaks) / 100)  # a cosine that ends near 0 leaves by the bottom
        elif kinds <= FROM_ZERO:
            axes.set_ylim(-0.04 * max(peaks), 1.08 * max(peaks))
        if title == "accuracy, %":
            ways = [way for name, way in (("knn", "kNN"), ("top1", "top-1")) if name in kinds]
            title = f"{' or '.join(ways)} accuracy, %"
        note = " (thin: training images)" if any(is_training(name, kinds) for name in kinds) else ""
        axes.set_title(title + note, loc="left", fontsize=10)
        axes.margins(x=0.03)
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=unit == "epochs", steps=[1, 2, 5, 10]))
        if place + columns >= len(panels):
            axes.set_xlabel(unit if unit == "epochs" else f"time, {unit}")
    legend = figure.legend([handles[number] for number in sorted(handles)],
                           [names[number] for number in sorted(handles)],
                           loc="outside upper left", ncols=legend_columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold a $
    return figure


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=common.path, help="run folders; curves of all are laid over each other")
    add("--out", type=common.path, default="curves.png",
        help=f"file to write, of a kind that its ending says: {', '.join(ENDINGS)}")
    add("--against", choices=("epochs", "seconds"), default="epochs",
        help="the horizontal axis; long times are shown in minutes or hours")
    add("--labels", nargs="+", metavar="NAME", help="names for the legend, one per run, in their order")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.out.suffix.lower() not in ENDINGS:
        parser.error(f"--out {args.out}: the ending must be one of {', '.join(ENDINGS)}")
    if args.labels and len(args.labels) != len(args.runs):
        parser.error(f"--labels: {len(args.labels)} names for {len(args.runs)} runs; give one a run")
    return args


@common.command
def main(argv=None):
    args = parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise common.UsageError("curves need the package: pip install matplotlib") from None
    labels = args.labels or make_labels(runs)
    figure, picture = draw(runs, labels, args.against), io.BytesIO()
    with warnings.catch_warnings(record=True) as remarks:  # one for every letter and size
        figure.savefig(picture, format=args.out.suffix[1:].lower())
    if any("missing from font" in str(remark.message) for remark in remarks):
        print("note    the font lacks letters of these names and draws boxes; --labels gives others")
    try:
        common.write_atomically(args.out, picture.getvalue())
    except OSError as error:
        raise common.UsageError(f"--out {args.out}: cannot be written: {error.strerror or error}") from None
    print(f"wrote {args.out}: {'; '.join(labels)}")


if __name__ == "__main__":
    main()
