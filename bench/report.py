"""Build the tables of RESULTS.md and results/log.md from what was measured, so that no figure is typed by hand.

    python bench/report.py            rewrites the tables
    python bench/report.py --check    exit code 1 where a page is not what it would write

A table stands below its recipe, a comment: rows of bench/runs.py (of these names, or beginning so), and columns.

    <!-- table results/photos.jsonl sc-* si-old : name untrained loo_20 seconds flags -->
    ...
    <!-- end -->

A single figure, the mean alone, stands between `<!-- figure results/toy.jsonl simsiam knn -->` and `<!-- end -->`.
Runs whose names differ only in a last "-s0", "-s1", ... are seeds of one row: mean (min to max).
`flags` are those that not all rows of the table share; the shared ones stand below it.
"""

import fnmatch
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from harness.parser import Parser  # noqa: E402

PAGES = ("README.md", "RESULTS.md", "results/log.md")
TABLE = re.compile(r"(<!-- table (\S+) (.*?) : ([\w ]+) -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) (\w+) -->).*?(<!-- end -->)")
TITLES = {"name": "run", "loo_20": "leave-one-out, k 20", "loo_200": "k 200", "knn": "kNN, k 200", "knn_10": "k 10",
          "untrained": "untrained", "agreement": "agreement", "rank": "rank", "flags": "flags", "seconds": "minutes",
          "linear": "linear, cached"}


def without_seed(name):
    return re.sub(r"-s\d+$", "", name)


def flags_of(command):
    """["--lr 0.1", "--compile", ...] and the program; the seed apart, which says nothing of a row of several."""
    program, *words = shlex.split(command)
    return program, [flag for flag in re.findall(r"--\S+(?: (?!--)\S+)*", " ".join(words)) if "--seed " not in flag]


def figure(values, name, spread=True):
    """The mean of some seeds; with the spread the smallest and the largest too."""
    values = [value / 60 if name == "seconds" else value for value in values if value is not None]
    digits = {"agreement": 2, "seconds": 1}.get(name, 1)
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
    flags = {name: flags_of(group[0]["command"])[1] for name, group in groups.items()}
    shared = [flag for flag in next(iter(flags.values())) if all(flag in others for others in flags.values())]
    lines = ["| " + " | ".join(TITLES.get(name, name) for name in columns) + " |", "|---" * len(columns) + "|"]
    for name, group in groups.items():
        cells = []
        for column in columns:
            if column == "flags":
                own = [flag for flag in flags[name] if flag not in shared]
                cells.append(f"`{flags_of(group[0]['command'])[0]}" + "".join(f" {flag}" for flag in own) + "`")
            else:
                cells.append(name if column == "name" else figure([row.get(column) for row in group], column))
        lines.append("| " + " | ".join(cells) + " |")
    if "flags" in columns:
        lines += ["", f"All with `{' '.join(shared)}`."]
    return lines


def fill(text):
    """The text of a page with its tables and figures as the measurements have them."""
    def rows_of(file, names):
        rows = [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
        found = {row["name"]: row for name in names.split() for row in rows
                 if fnmatch.fnmatch(without_seed(row["name"]), name)}
        return list(found.values()) or sys.exit(f"{file}: no row has a name like {names}")

    def one_table(match):
        head, file, names, columns, end = match.groups()
        return head + "\n" + "\n".join(table(rows_of(file, names), columns.split())) + "\n\n" + end

    def one_figure(match):
        head, file, name, column, end = match.groups()
        return head + figure([row.get(column) for row in rows_of(file, name)], column, spread=False) + end

    return FIGURE.sub(one_figure, TABLE.sub(one_table, text))


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    check = parser.parse_args(argv).check
    stale = [page for page in PAGES if fill((ROOT / page).read_text()) != (ROOT / page).read_text()]
    if not check:
        for page in stale:
            (ROOT / page).write_text(fill((ROOT / page).read_text()))
    print("\n".join(f"{page}: {'differs' if check else 'written'}" for page in stale) or "as measured")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
