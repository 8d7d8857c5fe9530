"""Fills the blocks of code of docs/papers.md from the source.

    python docs/build.py           write what has changed                                       (make docs)
    python docs/build.py --check   change nothing; name the blocks that differ and exit with 1

What is filled is the block after a line `<!-- code FILE NAME TAG... -->`: what carries one of the tags in the class or
function NAME of FILE. What belongs to a tag:
    at the end of a statement   that statement; of a loop or a condition its first line
    in a comment                the comment and what follows it, to the next blank line or the end of the block;
                                in main(), where each statement is a step of its own, one statement
    in a docstring              the whole class or function, of the docstring the first line
The first statement of an `if` or `with` brings that line along. Between two places up to 8 lines are shown, or "...".
"""

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "papers.md"
MARKER = re.compile(r"^<!-- code (\S+) (\S+) ([^>]+?) -->\n(?:```python\n.*?^```\n)?", flags=re.M | re.S)


def scopes(tree, prefix=""):
    """Yields (MoCo.forward, its node) for all classes and functions, outer ones first."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield prefix + node.name, node
            yield from scopes(node, f"{prefix}{node.name}.")


def tagged(source):
    """Yields (number of a line below the header, innermost scope's name, its node, tags of the line)."""
    inner = {n: (name, node) for name, node in scopes(ast.parse(source))
             for n in range(node.lineno, node.end_lineno + 1)}
    for number, line in enumerate(source.splitlines(), 1):
        tags = re.findall(r"\[([A-Z][\d.]*)\]", line)
        if tags and number in inner:
            yield number, *inner[number], tags


def place(lines, name, scope, number):
    """The numbers of the lines that belong to a tag on line `number` of a class or function."""
    doc = scope.body[0] if ast.get_docstring(scope) else None
    if doc and doc.lineno <= number <= doc.end_lineno:
        return {*range(scope.lineno, doc.lineno + 1), *range(doc.end_lineno + 1, scope.end_lineno + 1)}
    home = {child: (node, block) for node in ast.walk(scope) for block in (getattr(node, "body", 0),
            getattr(node, "orelse", 0)) if isinstance(block, list) for child in block}
    first = last = number
    if lines[number - 1].lstrip().startswith("#"):
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        statement = min((s for s in home if s.lineno > number), key=lambda s: s.lineno)
        rest = home[statement][1][home[statement][1].index(statement):]
        last = statement.end_lineno
        for following in rest[1:] if name != "main" else ():
            if not all(lines[last:following.lineno - 1]):
                break
            last = following.end_lineno
    else:
        statement = min((s for s in home if s.lineno <= number <= s.end_lineno), key=lambda s: s.end_lineno - s.lineno)
        first = statement.lineno
        last = statement.body[0].lineno - 1 if hasattr(statement, "body") else statement.end_lineno
    parent, block = home[statement]
    if parent is not scope and statement is block[0]:
        first = parent.lineno
    return set(range(first, last + 1))


def excerpt(source, name, tags):
    """The lines of class or function `name` that carry one of the tags; LookupError where there is none."""
    lines, shown = source.splitlines(), set()
    for number, inside, scope, found in tagged(source):
        if inside == name and set(found) & set(tags):
            shown |= place(lines, name, scope, number)
    missing = set(tags) - set(re.findall(r"\[([A-Z][\d.]*)\]", "\n".join(lines[n - 1] for n in shown)))
    if missing:
        raise LookupError(f"{name} has no tag {sorted(missing)}")
    text, before = [], min(shown)
    for number in sorted(shown):
        gap, above = lines[before:number - 1], lines[before - 1]
        indent = re.match(" *", above)[0]
        if gap and above.lstrip().startswith('"""'):
            text.append(f'{indent}..."""')
        else:
            text += gap if len(gap) <= 8 else [f"{indent}..."]
        text.append(lines[number - 1])
        before = number
    return textwrap.dedent("\n".join(text)) + "\n"


def fill(text):
    """The page with every excerpt taken from the source."""
    def block(found):
        file, name, tags = found.groups()
        code = excerpt((ROOT / file).read_text(), name, tags.split())
        return f"<!-- code {file} {name} {tags} -->\n```python\n{code}```\n"
    return MARKER.sub(block, text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a block differs")
    args = parser.parse_args(argv)
    old = PAGE.read_text()
    new = fill(old)
    if args.check:
        drifted = [m[0].split("\n")[0] for m, n in zip(MARKER.finditer(old), MARKER.finditer(new), strict=True)
                   if m[0] != n[0]]
        print("\n".join([*drifted, "differ from the source: make docs"]) if drifted else "docs/papers.md is up to date")
        return int(bool(drifted))
    if new != old:
        PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
