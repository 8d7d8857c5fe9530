"""Build the tables of README.md, RESULTS.md and results/log.md from what was measured: no figure is typed by hand.

    python bench/report.py            rewrites the tables
    python bench/report.py --check    exit code 1 where a page is not what it would write
    python bench/report.py --peers-png peers.png      draws a chart instead; --labels-png likewise

A table stands below its recipe, a comment: rows of bench/runs.py (of these names, or beginning so), and columns.

    <!-- table results/photos.jsonl sc-* si-old : name untrained loo_20 seconds flags -->
    ...
    <!-- end -->

A single figure, the mean alone, stands between `<!-- figure results/toy.jsonl simsiam knn -->` and `<!-- end -->`; the
end of each side of a comparison below `<!-- peers results/peers.json -->`, accuracies of bench/peers.py; its speed.json
or the medians of `bench/run.py --only training --json FILE` below `<!-- speed FILE -->`.
Runs whose names differ only in a last "-s0", "-s1", ... are seeds of one row: mean (min to max).
`flags` are those that not all rows of the table share; the shared ones stand below it.
"""

import fnmatch
import json
import re
import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.parser import Parser  # noqa: E402

PAGES = ("README.md", "RESULTS.md", "results/log.md")
BLOCK = re.compile(r"(<!-- (table|peers|speed) (\S+)(?: ([^>]*) : ([\w ]+))? -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) (\w+) -->).*?(<!-- end -->)")
TITLES = {"name": "run", "loo_20": "leave-one-out, k 20", "loo_200": "k 200", "knn": "kNN, k 200", "knn_10": "k 10",
          "untrained": "untrained", "agreement": "agreement", "rank": "rank", "flags": "flags", "seconds": "minutes",
          "linear": "linear.py"}
METHODS = {"simsiam": "SimSiam", "moco": "MoCo", "simclr": "SimCLR", "rotnet": "RotNet"}


def without_seed(name):
    return re.sub(r"-s\d+$", "", name)


def flags_of(command):
    """The program, and ["--lr 0.1", "--compile", ...] without the seed, which says nothing of a row of several."""
    program, *words = shlex.split(command)
    return program, [flag for flag in re.findall(r"--\S+(?: (?!--)\S+)*", " ".join(words)) if "--seed " not in flag]


def figure(values, name, spread=True):
    """The mean of some seeds; with the spread the smallest and the largest too."""
    values = [value / 60 if name == "seconds" else value for value in values if value is not None]
    digits = 2 if name in ("agreement", "accuracy", "loss", "std") else 1
    if not values:
        return "not measured"
    among = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if spread and len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{among}"


def table(rows, columns):
    """Lines of Markdown."""
    groups = {}
    for row in rows:
        if row["code"] == 0:
            groups.setdefault(without_seed(row["name"]), []).append(row)
    commands, shared = {}, []
    if "flags" in columns:
        commands = {name: flags_of(group[0]["command"]) for name, group in groups.items()}
        shared = [flag for flag in next(iter(commands.values()))[1] if all(flag in own for _, own in commands.values())]
    lines = ["| " + " | ".join(TITLES.get(name, name) for name in columns) + " |", "|---" * len(columns) + "|"]
    for name, group in groups.items():
        cells = []
        for column in columns:
            if column == "flags":
                program, flags = commands[name]
                cells.append("`" + " ".join([program, *(flag for flag in flags if flag not in shared)]) + "`")
            else:
                cells.append(name if column == "name" else figure([row.get(column) for row in group], column))
        lines.append("| " + " | ".join(cells) + " |")
    if "flags" in columns:
        lines += ["", f"All with `{' '.join(shared)}`."]
    return lines


def in_order(results):
    """The sides of a comparison, {"simclr-ours": its points, ...}: method by method, this project first."""
    return dict(sorted(results.items(), key=lambda one: (list(METHODS).index(one[0].split("-")[0]),
                                                         not one[0].endswith("-ours"))))


def peers_table(record):
    """Lines of Markdown: of each side of a comparison the untrained network, and the last point."""
    lines = ["| | images | minutes | kNN, k 10: untrained, trained | k 200 |", "|---" * 5 + "|"]
    for side, rows in in_order(record["results"]).items():
        first, last, (method, who) = rows[0], rows[-1], side.split("-")
        lines.append(f"| {METHODS[method]}, {who.replace('ours', 'this project')} | "
                     f"{last['step'] * record['settings']['batch_size']:,} | {last['seconds'] / 60:.1f} | "
                     f"{first['knn_10']:.1f}, {last['knn_10']:.1f} | {last['knn_200']:.1f} |")
    return lines


def peers_speeds(record):
    """[(pair, settings, {side: images/s}, ours/bare, ours/peer in each turn)] of bench/peers.py speed, medians but for
    the last; the sides are "bare", "ours" and "peer", in float32, then each at its best."""
    rows = []
    for pair, by_precision in record["results"].items():
        every = [(f"{amp.replace('off', 'float32')}{name.removeprefix('peer')}", name, seconds)
                 for amp, sides in by_precision.items() for name, seconds in sides.items()]
        plain = {name: ("float32", seconds) for name, seconds in by_precision["off"].items()}
        best = {side: min(((how, seconds) for how, name, seconds in every if name.startswith(side)),
                          key=lambda one: statistics.median(one[1])) for side in ("bare", "ours", "peer")}
        for how, sides in (("float32", plain), (f"best: {best['peer'][0]}", best)):
            rates = {side: record["settings"]["batch_size"] / statistics.median(sides[side][1]) for side in best}
            share, ratios = ([b / a for a, b in zip(sides["ours"][1], sides[side][1], strict=True)]
                             for side in ("bare", "peer"))
            rows.append((pair, how, rates, statistics.median(share), ratios))
    return rows


def peers_speed_table(record):
    """Lines of Markdown."""
    lines = ["| | settings | network alone | this project | of it | peer | ours/peer (turns) |", "|---" * 7 + "|"]
    for pair, how, rates, share, ratios in peers_speeds(record):
        method, who = pair.split("-")
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {METHODS[method]}, {who} | {how} | {rates['bare']:,.0f} | {rates['ours']:,.0f} | "
                     f"{100 * share:.0f} % | {rates['peer']:,.0f} | {ratio} |")
    return lines


def speed_table(record):
    """Lines of Markdown: of each method images/s, those of the network alone, and the shares of a step."""
    if "results" in record:
        return peers_speed_table(record)
    parts = ("network", "views", "loss", "optimizer")
    lines = ["| | images/s | network alone | " + " | ".join(parts) + " | peak memory |", "|---" * 8 + "|"]
    for row in record["rows"]:
        whole, bare = (row["work"] / statistics.median(row[side]) for side in ("ours_seconds", "peer_seconds"))
        shares = (f"{100 * row['shares'][part]:.0f} %" for part in parts)
        lines.append(f"| {row['what']} | {whole:,.0f} | {bare:,.0f} | " + " | ".join(shares)
                     + (f" | {peak / 1e3:.1f} GB |" if (peak := row["peak_megabytes"]) else " | not measured |"))
    return lines


def rows_of(file, names):
    """The rows of a file of bench/runs.py that bear one of these names, or begin with it (`sc-*`), in that order."""
    rows = [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
    found = {}
    for name in names.split():
        these = {row["name"]: row for row in rows
                 if name == row["name"] or fnmatch.fnmatch(without_seed(row["name"]), name)}
        if not these:
            print(f"{file}: no row has a name like {name}", file=sys.stderr)
            sys.exit(2)
        found |= these
    return list(found.values())


def fill(text):
    """The text of a page with its tables and figures as the measurements have them."""
    def one_block(match):
        head, kind, file, names, columns, end = match.groups()
        if kind == "table":
            lines = table(rows_of(file, names), columns.split())
        else:
            lines = {"peers": peers_table, "speed": speed_table}[kind](json.loads((ROOT / file).read_text()))
        return "\n".join([head, *lines, "", end])

    def one_figure(match):
        head, file, name, column, end = match.groups()
        return head + figure([row.get(column) for row in rows_of(file, name)], column, spread=False) + end

    return FIGURE.sub(one_figure, BLOCK.sub(one_block, text))


def panels(count):
    """A matplotlib figure without a window, and its panels."""
    from matplotlib.figure import Figure

    figure = Figure((4.0 * count, 3.2), dpi=150, layout="constrained")
    found = figure.subplots(1, count, squeeze=False)[0]
    for axes in found:
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def peers_chart(results, file):
    """kNN against minutes, a panel a method. results: of bench/peers.py accuracy, {"simclr-ours": its points, ...}."""
    results = in_order(results)
    methods = list(dict.fromkeys(side.split("-")[0] for side in results))
    figure, all_axes = panels(len(methods))
    for method, axes in zip(methods, all_axes, strict=True):
        sides = {side: rows for side, rows in results.items() if side.startswith(f"{method}-")}
        for side, rows in sides.items():
            axes.plot([row["seconds"] / 60 for row in rows], [row["knn_10"] for row in rows], marker="o", markersize=3,
                      label=side.split("-")[1].replace("ours", "this project"))
        axes.axhline(next(iter(sides.values()))[0]["knn_10"], color="0.5", linestyle=":", label="untrained")
        axes.set_title(METHODS[method], loc="left", fontsize=10)
        axes.set(xlabel="minutes of training", ylabel="kNN, k 10, %")
        axes.legend(frameon=False)
    figure.savefig(file)


def labels_chart(rows, file):
    """Top-1 against the share of labels. rows: of bench/runs.py, "labels-WAY-PERCENT-s0", WAY one of linear.py's."""
    lines = {}
    for row in (row for row in rows if row["code"] == 0):
        _, way, percent = without_seed(row["name"]).split("-")
        lines.setdefault(way, {}).setdefault(float(percent), []).append(row["linear"])
    shares = sorted({share for points in lines.values() for share in points})
    figure, (axes,) = panels(1)
    for way, points in lines.items():
        means = {share: sum(found) / len(found) for share, found in sorted(points.items())}
        axes.plot(list(means), list(means.values()), marker="o", markersize=3,
                  label={"scratch": "from scratch", "finetune": "fine-tuned", "cached": "linear layer"}.get(way, way))
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="labels used", ylabel="top-1 of test images, %")
    axes.legend(frameon=False)
    figure.savefig(file)


def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    add("--peers-png", metavar="PNG", help="draw kNN against minutes, beside peers: seed 1, where there is one")
    add("--labels-png", metavar="PNG", help="draw top-1 against the share of labels, from results/cifar.jsonl")
    args = parser.parse_args(argv)
    if args.peers_png:
        first, second = (json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("peers", "peers-seed1"))
        return peers_chart(first["results"] | second["results"], args.peers_png)
    if args.labels_png:
        return labels_chart(rows_of("results/cifar.jsonl", "labels-cached-* labels-finetune-* labels-scratch-*"),
                            args.labels_png)
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    stale = {page: new for page, text in texts.items() if (new := fill(text)) != text}
    for page, text in stale.items():
        if not args.check:
            (ROOT / page).write_text(text)
    print("\n".join(f"{page}: {'differs' if args.check else 'written'}" for page in stale) or "as measured")
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
