"""The rules of the repository, checked on its files."""

import ast
import importlib
import io
import operator
import re
import runpy
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
METHODS = ["simsiam", "moco", "simclr", "rotnet"]
AFTER = ["linear", "predict", "plot", "export"]  # what comes after training
PACKAGES = ["harness", "pictures"]
# Every file of the house by the name it is imported by: simsiam, harness, harness.run, forks.byol.
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for folder in (".", *PACKAGES, "forks") for path in sorted((ROOT / folder).glob("*.py"))}
REQUIRED = {"torch", "torchvision", "PIL", "numpy"}  # Pillow and numpy come with torchvision
OPTIONAL = {"matplotlib", "sklearn", "tensorboard"}


def room(name):
    """harness.run -> harness, forks.byol -> forks, common -> common."""
    return name.split(".")[0]


def imports(name):
    """Yields (what a file imports, whether it stands at the top); a file of ours by its whole name."""
    tree = ast.parse(FILES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, (room(name) * (node.level > 0), node.module)))
            for alias in node.names:  # a file of the package, or a name in it
                inner = f"{module}.{alias.name}"
                yield inner if inner in FILES else module, node in tree.body


def test_the_rooms_are_known():
    assert set(MODULES) == {*METHODS, *AFTER, "common", "augment", "knn"}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize("name", FILES)
def test_only_the_required_packages_are_imported(name):
    for module, at_top in imports(name):
        top = room(module)
        allowed = top in sys.stdlib_module_names or top in {*REQUIRED, *MODULES, *PACKAGES}
        assert allowed or (top in OPTIONAL and not at_top), f"{name} imports {module}"


MAY_IMPORT = {
    "common": set(), "augment": set(), "pictures": {"common"}, "harness": {"common", "augment", "pictures"},
    "knn": {"common", "augment", "pictures", "harness"},
    **dict.fromkeys((*METHODS, "forks"), {"common", "augment", "pictures", "harness", "knn"}),
}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in MAY_IMPORT])
def test_dependencies_point_one_way(name):
    ours = {room(module) for module, _ in imports(name)} & {*MODULES, *PACKAGES, "forks"}
    others = ours - {room(name)} if room(name) in PACKAGES else ours  # no method imports another
    assert others <= MAY_IMPORT[room(name)]


def test_imports_make_no_circle():
    """Nor do those inside functions; that a package's door stands before its files is no import of theirs."""
    graph = {name: {module for module, _ in imports(name)} & FILES.keys() for name in FILES}
    done = set()
    while graph.keys() - done:
        free = {name for name in graph.keys() - done if graph[name] <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free


def test_importing_does_nothing(tmp_path):
    names = ", ".join(name for name in FILES if room(name) != "forks")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def code_lines(path, first, last):
    """Lines from first to last that hold more than a comment."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return sum(first <= line <= last for line in lines)


@pytest.mark.parametrize("name", FILES)
def test_files_classes_and_functions_are_small(name):
    text, long = FILES[name].read_text(), []
    if room(name) in PACKAGES and len(text.splitlines()) > 350:
        long.append((name, len(text.splitlines())))
    for node in ast.walk(ast.parse(text)):
        most = {ast.ClassDef: 125, ast.FunctionDef: 55}.get(type(node))
        if most and node.end_lineno - node.lineno + 1 > most:
            long.append((node.name, node.end_lineno - node.lineno + 1))
    assert long == []


PLUMBING = r"harness\.|monitor|parse_args|run\.(place|begin|say|report)"


@pytest.mark.parametrize("name", METHODS)
def test_main_shows_the_paper(name):
    """At most 45 lines of code, at most 10 of them plumbing that stands before the loop; and the loop is in sight."""
    path = FILES[name]
    main = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "main")
    assert code_lines(path, main.lineno, main.end_lineno) <= 45
    loop, = (n for n in ast.walk(main) if isinstance(n, ast.For) and ast.unparse(n.iter) == "run.steps()")
    for words in ("schedule.step(", ".backward()", ".step(optimizer)", "run.record("):
        assert words in ast.unparse(loop)
    plumbing = []
    for node in ast.walk(main):
        if isinstance(node, ast.stmt) and main.lineno < node.lineno < loop.lineno:
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            lines = path.read_text().splitlines()[node.lineno - 1:last]
            plumbing += lines if re.search(PLUMBING, "\n".join(lines)) else []
    assert len(plumbing) <= 10, plumbing


@pytest.mark.parametrize("name", METHODS)
def test_method_files_keep_their_form(name):
    text = (ROOT / f"{name}.py").read_text()
    assert 200 <= len(text.splitlines()) <= 380
    header = ast.get_docstring(ast.parse(text))
    parts = ["Paper", "Idea", "Symbols", "Map", "Read on", "Recipe", "Published", "Departures", "Health"]
    places = [header.index(f"\n{part}") for part in parts]
    assert places == sorted(places)
    banners = re.findall(r"^# -{90,}\n# (\w+)", text, flags=re.M)
    assert banners == ["Flags", "Views", "Model", "Loss", "Training"]
    body = text[text.index('"""', 3):]
    in_header, in_body = (set(re.findall(r"\[[A-Z][\d.]*\]", part)) for part in (header, body))
    assert in_header == in_body, f"tags of the header or of the code alone: {in_header ^ in_body}"
    mapped = header[places[3]:places[4]]
    names = re.findall(r"([A-Za-z_][\w.]*)\(\)", mapped) + re.findall(r"->\s+([A-Z]\w+)", mapped)
    assert len(names) >= 5
    for function in names:
        operator.attrgetter(function)(importlib.import_module(name))  # AttributeError: the Map names what is not there


def test_requirements_are_ranges():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split(r"[<>=!~]", line)[0] for line in lines} == {"torch", "torchvision", "pytest"}
    assert all(">=" in line and "==" not in line for line in lines)


@pytest.mark.parametrize("program", ["simsiam", "moco", "linear", "knn", "predict", "plot", "export", "bench/run"])
def test_help_fits_a_terminal(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{program}.py"))["main"](["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and text.count("--") > 2
    if program in ("simsiam", "moco"):
        assert "Idea" in text and "Departures" not in text
        assert re.findall(r"^(\w.*):$", text, re.M) == ["options", "data", "recipe", "run", f"of {program}.py alone",
                                                        "ablations"]


PAGES = [ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))


def commands(text):
    """Yields (script, its flags) of every command in a page: in blocks, in backticks, over lines, behind `--`.

    text  Markdown. `python`, `torchrun ...` and `bash` may stand before a script; in backticks nothing need.
    """
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^ *```\n(.*?)^ *```$", text, flags=re.M | re.S)
    lines = [re.sub(r" #.*", "", line).strip(" \t$") for line in "".join(blocks).splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in [*lines, *inline]:
        if not re.match(r"(python|torchrun|bash|(\w+/)?\w+\.(py|sh)\b)", line) or line.startswith("python -c"):
            continue
        found = re.split(r"(?<!\S)((?:\w+/)*\w+\.(?:py|sh))(?!\S)", line)
        script = None
        for word, rest in zip(found[1::2], found[2::2], strict=True):
            given = script is None or found[found.index(word) - 1].rstrip().endswith(" --")
            script = word if given else script      # `--program mine.py`: the value of a flag
            yield script, re.findall(r"(?<!\S)--[a-z][\w-]*", rest)


def test_commands_are_found_wherever_they_stand():
    page = """
```
python a.py --one \\
    --two 2   # b.py --no
torchrun --nproc_per_node=8 c.py --three
python bench/d.py --four -- e.py --five
python f.py --program mine.py --six
bash bench/g.sh OUT
```
and `h.py --seven`, `make it`, `--eight`.
"""
    assert list(commands(page)) == [
        ("a.py", ["--one", "--two"]), ("c.py", ["--three"]), ("bench/d.py", ["--four"]), ("e.py", ["--five"]),
        ("f.py", ["--program"]), ("f.py", ["--six"]), ("bench/g.sh", []), ("h.py", ["--seven"])]


def test_commands_of_the_pages_exist(capsys):
    """Every file that a page or the Makefile runs is there, every flag is one of that file's, every target there."""
    helps, makefile = {}, (ROOT / "Makefile").read_text()
    for page in [*PAGES, ROOT / "Makefile"]:
        text = page.read_text() if page in PAGES else f"```\n{makefile.replace('.venv/bin/', '')}```"
        for script, given in commands(text):
            path = ROOT / script.replace("mine.py", "simsiam.py")
            if script in ("METHOD.py", "FILE.py"):
                continue
            assert path.exists(), f"{page.name}: {script}"
            if path not in helps and path.suffix == ".py" and given:
                with pytest.raises(SystemExit):
                    runpy.run_path(str(path))["main"](["--help"])
                helps[path] = capsys.readouterr().out
            words = helps.get(path) or path.read_text()  # a shell script's flags stand in its head
            for flag in given:
                assert re.search(rf"{flag}(?![\w-])", words), f"{page.name}: {script} has no {flag}"
        for target in re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.M):
            assert re.search(rf"^{target}:", makefile, flags=re.M), f"{page.name}: make {target}"
    assert len(helps) > 10
