"""The rules of the repository, checked on its files."""

import ast
import importlib
import operator
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py")) + ["pictures"]
METHODS = [name for name in ("simsiam", "moco", "simclr", "rotnet") if name in MODULES]
REQUIRED = {"torch", "torchvision", "PIL"}  # Pillow comes with torchvision
OPTIONAL = {"matplotlib", "tensorboard"}


def imports(name):
    for path in [ROOT / f"{name}.py"] if name != "pictures" else ROOT.glob("pictures/*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node in tree.body) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module, node in tree.body


@pytest.mark.parametrize("name", MODULES)
def test_only_the_required_packages_are_imported(name):
    for module, at_top in imports(name):
        top = module.split(".")[0]
        allowed = top in sys.stdlib_module_names or top in REQUIRED or top in MODULES
        assert allowed or (top in OPTIONAL and not at_top), f"{name}.py imports {module}"


def test_dependencies_point_one_way():
    rooms = {name: {m for m, _ in imports(name) if m in MODULES} for name in MODULES}
    assert rooms["common"] == set() and rooms["augment"] == set() and rooms["pictures"] == {"common"}
    assert rooms["knn"] <= {"common", "data", "pictures", "augment"}
    for name in METHODS:
        assert not rooms[name] & set(METHODS), f"{name}.py imports another method"


def test_the_files_of_pictures_import_each_other_one_way():
    seen, files = set(), {path.stem: path.read_text() for path in ROOT.glob("pictures/*.py")}
    needs = {name: set(re.findall(r"^from \.(\w+) import", text, flags=re.M)) for name, text in files.items()}
    while set(needs) - seen:
        ready = {name for name in set(needs) - seen if needs[name] <= seen}
        assert ready, f"a circle among {set(needs) - seen}"
        seen |= ready


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", METHODS)
def test_method_files_keep_their_form(name):
    text = (ROOT / f"{name}.py").read_text()
    assert 250 <= len(text.splitlines()) <= 430
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


def test_commands_of_the_readme_exist(capsys):
    """Every file that README and docs run is there, and every flag they give is one of that file's."""
    text = "".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]).replace("\\\n", " ")
    found = re.findall(r"python ((?:\w+/)?\w+\.py)([^\n`|]*)", text)
    assert found
    helps = {}
    for script, rest in found:
        path = ROOT / script.replace("mine.py", "simsiam.py")
        assert path.exists(), script
        if path not in helps:
            with pytest.raises(SystemExit):
                runpy.run_path(str(path))["main"](["--help"])
            helps[path] = capsys.readouterr().out
        help_text = helps[path]
        for flag in re.findall(r"--[a-z][a-z-]*", rest):
            assert flag in help_text, f"{script} has no {flag}"
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target
