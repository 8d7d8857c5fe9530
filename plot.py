"""Curves of runs: loss, accuracy, learning rate, health figures in one picture.

    python plot.py runs/simsiam-toy-... --out curves.png
    python plot.py runs/moco-... runs/simsiam-... --against seconds
    python plot.py runs/tuned runs/scratch --labels "pre-trained" "from scratch"
    python plot.py runs/simsiam-toy-... --only loss knn

    python plot.py runs/moco-... --reference         (over a run that went well: is my loss normal?)
    python plot.py runs/moco-... --diagnose          (no picture: is the run well, and if not, what to change)

Reads only what a run keeps beside its checkpoints (metrics.jsonl, args.json),
so runs may still be going on. Losses of different methods have nothing in common
but the word: each method gets an axis of its own. Curves need matplotlib.
"""

import collections
import io
import json
import math
import textwrap
from pathlib import Path

import common
import harness
from harness import flags, health
from harness.checkpoint import save
from harness.folder import read_metrics
from harness.parser import Parser, path

# What stands over the panels, in their order. Figures of one title share a panel; others get one each.
TITLES = {
    **dict.fromkeys(("val_loss", "test_loss", "loss"), "loss"),
    **dict.fromkeys(("knn", "top1", "train_top1"), "kNN or top-1 accuracy, %"),
    "lr": "learning rate",
    "rank": "effective rank of the features",
    "agreement": "share of held-out images whose views agree",
    "std": "std of outputs (1: spread, 0: collapsed)",
    "accuracy": "share of images whose own view is nearest",
    **dict.fromkeys(("val_rotation", "test_rotation", "rotation"), "rotation accuracy, %"),
    "top5": "top-5 accuracy, %",
    "class_mean": "accuracy, mean of the classes, %",
}
NOT_DRAWN = {"epoch", "step", "seconds", "images_per_second", "knn_20", "knn_10", "knn_seconds"}

# Okabe and Ito's palette without its yellow, which fades on white: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# Flags that say where and how often, not what was trained: they never tell two runs apart.
PLUMBING = flags.PLUMBING - {"data", "device", "amp", "compile"} | {"way", "test", "eval_every", "stop_at_accuracy"}

REFERENCES = Path(__file__).parent / "results" / "reference"  # METHOD-KIND*.jsonl: a line args.json, then metrics.jsonl

Run = collections.namedtuple("Run", "folder args rows")


def read_run(folder):
    """raises  UsageError for what is no run folder, or a run that has not finished an epoch yet."""
    try:
        run = Run(folder, json.loads(Path(folder, "args.json").read_text()), read_metrics(folder))
        found = all(row["epoch"] + row["seconds"] >= 0 for row in run.rows) and make_panels([run])
    except (OSError, ValueError, TypeError, KeyError):
        found = False
    if not found:
        raise common.UsageError(f"{folder}: not a run folder with figures; the first come with the end of an epoch")
    return run


def read_references(runs):
    """Of each run the reference of its method and kind of data with the most flags alike; raises UsageError if none."""
    found = {}
    for run in runs:
        name, best = f"{run.args['method']}-{run.args.get('kind')}", -1
        for file in sorted(REFERENCES.glob(f"{name}*.jsonl")):
            args, *rows = map(json.loads, file.read_text().splitlines())
            alike = sum(args.get(flag) == value for flag, value in run.args.items() if flag not in PLUMBING)
            if alike > best:
                best, reference = alike, Run(file.stem, args, rows)
        if best < 0:
            there = ", ".join(sorted(other.stem for other in REFERENCES.glob("*.jsonl"))) or "none"
            raise common.UsageError(f"--reference: there is none for {name.replace('-', ' on ')}; there are: {there}")
        found[reference.folder] = reference
    return list(found.values())


def flag_text(name, value):
    """("lr", 0.1) -> "lr 0.1", ("no_predictor", True) -> "no-predictor"; nothing for what is not set."""
    if value is None or value is False:
        return ""
    if isinstance(value, str):  # of a path its end, of a checkpoint the run too
        value = "/".join(Path(value).parts[-2 if value.endswith(".pt") else -1 :])
    return name.replace("_", "-") + ("" if value is True else f" {value}")


def make_labels(runs):
    """The method, and the first three flags that differ between its runs; where two are still alike, the folder."""
    labels, titles = [], [" ".join(filter(None, [run.args["method"], run.args.get("way")])) for run in runs]
    for run, title in zip(runs, titles, strict=True):  # "simsiam", ..., "linear finetune"
        group = [other.args for other, its in zip(runs, titles, strict=True) if its == title]
        differ = [name for name in run.args
                  if name not in PLUMBING and len({str(args.get(name)) for args in group}) > 1]
        labels.append(", ".join(filter(None, [title, *(flag_text(name, run.args[name]) for name in differ[:3])])))
    return [f"{label} ({run.folder})" if labels.count(label) > 1 else label
            for label, run in zip(labels, runs, strict=True)]


def curve(run, name, against="epochs"):
    """The points of one figure, [(x, y), ...], time in minutes; epochs without it are passed over."""
    return [(row["seconds"] / 60 if against == "seconds" else row["epoch"], row[name])
            for row in run.rows if isinstance(row.get(name), (int, float))]


def make_panels(runs, only=None):
    """{title: [(number of the run, name of the figure), ...]}, in reading order. only: the figures to draw, or all."""
    methods, panels = {run.args["method"] for run in runs}, {}
    for name in dict.fromkeys([*TITLES, *(name for run in runs for row in run.rows for name in row)]):
        for number, run in enumerate(runs):
            if (name in only if only else name not in NOT_DRAWN) and curve(run, name):
                title = TITLES.get(name, name.replace("_", " "))
                if title == "loss" and len(methods) > 1:
                    title = f"loss ({run.args['method']})"
                panels.setdefault(title, []).append((number, name))
    return panels


def draw(runs, labels, against="epochs", only=None):
    """A matplotlib Figure that opens no window.

    runs     of read_run().  labels: one a run.  against: "epochs" or "seconds", the horizontal axis.
    only     names of the figures to draw; None: all.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = make_panels(runs, only)
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure((4.0 * columns, 2.7 * rows + 0.2 * len(runs)), dpi=150, layout="constrained")  # inches
    looks = [dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":", "-.")[i % 4] if len(runs) > 3 else "-")
             for i in range(len(runs))]
    for place, (title, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1, sharex=figure.axes[0] if place else None)
        names = {name for _, name in members}
        training = {name for name in names if name.startswith("train_") or names & {f"val_{name}", f"test_{name}"}}
        for number, name in members:
            points = curve(runs[number], name, against)
            axes.plot(*zip(*points, strict=True), **looks[number], linewidth=0.9 if name in training else 1.6,
                      marker="o" if len(points) <= 20 else None, markersize=3)  # one point alone shows
        if names <= {"lr", "std", "accuracy", "agreement"}:  # a close-up of a healthy std would look like a drama
            top = axes.dataLim.ymax or 1
            axes.set_ylim(-0.04 * top, 1.08 * top)
        axes.set_title(title + (" (thin: training images)" if training else ""), loc="left", fontsize=10)
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=against == "epochs")
    figure.supxlabel("time, minutes" if against == "seconds" else "epochs", fontsize=10)
    names = [textwrap.fill(label.replace("$", r"\$"), 46 * columns - 8) for label in labels]  # no formulas
    figure.legend([Line2D([], [], **look) for look in looks], names, loc="outside upper left", frameon=False)
    return figure


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=path, help="run folders; curves of all are laid over each other")
    add("--out", type=path, default="curves.png", help="file to write, ending in .png, .pdf or .svg")
    add("--against", choices=("epochs", "seconds"), default="epochs", help="horizontal axis; time is in minutes")
    add("--labels", nargs="+", metavar="NAME", help="names for the legend, one per run, in their order")
    add("--only", nargs="+", metavar="FIGURE", help="draw these alone, by their names in metrics.jsonl: loss, knn, ...")
    add("--reference", action="store_true", help="beside them the most similar run of the same method and kind of data "
        "in results/reference")
    add("--diagnose", action="store_true", help="instead of curves: is a run well, by which figures, what to change")
    args = parser.parse_args(argv)
    if not args.out.lower().endswith((".png", ".pdf", ".svg")):
        parser.error(f"--out {args.out}: the ending must be one of .png, .pdf, .svg")
    if args.diagnose and (args.only or args.reference or args.labels):
        parser.error("--diagnose draws nothing: leave --only, --reference and --labels out")
    if args.labels and len(args.labels) != len(args.runs):
        parser.error(f"--labels: {len(args.labels)} names for {len(args.runs)} runs; give one a run")
    return args


@harness.command
def main(argv=None):
    args = parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    if args.diagnose:
        for run in runs:
            try:
                lines = health.diagnose(run.args, run.rows)
            except (KeyError, TypeError) as error:
                raise common.UsageError(f"{run.folder}: args.json or metrics.jsonl lacks {error}") from None
            print("\n".join(f"{run.folder}: {line}" for line in lines))
        return
    for name in args.only or []:
        if not any(curve(run, name) for run in runs):
            there = sorted({name for run in runs for row in run.rows for name in row if curve(run, name)})
            raise common.UsageError(f"--only {name}: no such figure in these runs; there are {', '.join(there)}")
    references = read_references(runs) if args.reference else []
    labels = make_labels(runs + references)
    labels = (args.labels or labels[: len(runs)]) + [f"reference: {label}" for label in labels[len(runs):]]
    runs += references
    picture = io.BytesIO()
    try:
        draw(runs, labels, args.against, args.only).savefig(picture, format=args.out.rpartition(".")[2].lower())
    except ImportError:
        raise common.UsageError("curves need the package: pip install matplotlib") from None
    save(args.out, picture.getvalue())
    print(f"wrote {args.out}: {'; '.join(labels)}")


if __name__ == "__main__":
    main()
