"""Every command in a block of README.md and docs/*.md: run here on small pictures, or named with what runs it.

Small: sizes and lengths that a page names give way to others here, see small().
"""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import pictures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
METHODS = ("simsiam", "moco", "simclr", "rotnet", "mine", "barlowtwins", "byol")
SHAPE = " --width 8 --image-size 32 --stem cifar"
TINY = {  # flags that make a run small; those of the page stand before them
    **dict.fromkeys(METHODS, SHAPE + " --batch-size 16 --max-steps 4 --knn-k 5 --amp off --cache cache"),
    "linear": " --batch-size 8 --max-steps 4 --amp off --cache cache", "knn": " --k 3 --cache cache",
    "predict": " --cache cache",
}
ELSEWHERE = {  # what is not run here, and where it is
    r"make ": "the Makefile, by hand: tests/test_repo.py sees that its lines are commands that exist",
    r"python -m pip |python -m pytest ": ".ci/run",
    r"python -c ": "saves weights, as the fixture `once` does",
    r"torchrun ": "tests/test_gpu.py starts one process by it, tests/test_distributed.py two by themselves",
    r"bash bench/gpu.sh ": "by hand, on a GPU: RESULTS.md, Speed",
    r".* --device cuda": "tests/test_gpu.py, where there is a GPU",
    r"python bench/": "tests/test_bench.py and tests/test_peers.py; their output is in RESULTS.md",
    r".* --compile": "tests/test_gpu.py, where there is a GPU",
    r".* --resume$": "tests/test_resume.py",
}


def commands(text):
    """The commands in the blocks of a page, each on one line, without remarks."""
    blocks = "".join(re.findall(r"^ *```\w*\n(.*?)^ *```$", text, flags=re.M | re.S)).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip(" \t$") for line in blocks.splitlines())
    return [line for line in lines if re.match(r"(python|make|bash|torchrun|pip|git) ", line)]


def parts(page):
    """[(its name, commands)] of a page: where sections tell separate stories, these; else the page."""
    text = page.read_text()
    if page.name != "articles.md":
        return [(page.name, commands(text))]
    return [(part.splitlines()[0], commands(part)) for part in re.split(r"^## ", text, flags=re.M)[1:]]


PARTS = {name: lines for page in PAGES for name, lines in parts(page) if lines}


def draw(path, count):
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(count)
    for i in range(count):
        pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path / f"{i}.png")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with all that the commands name: food-11 as of 2021, loose pictures, somebody's weights, a run."""
    home = tmp_path_factory.mktemp("pages")
    for c in ("00", "01"):
        for split, count in (("training/labeled", 12), ("validation", 4), ("testing", 4)):
            draw(home / "food-11" / split / c, count)
    draw(home / "food-11/training/unlabeled/00", 12)
    shutil.copytree(home / "food-11", home / "photos")
    for name in ("pictures", "more-food", "folder"):
        draw(home / name, 40)
    shutil.copy(home / "pictures/0.png", home / "pictures/cat.jpg")
    shutil.copy(home / "pictures/1.png", home / "photo.jpg")
    body = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    torch.save(body.state_dict(), home / "simclr.pth")
    torch.save(torchvision.models.resnet18().state_dict(), home / "imagenet.pth")
    shutil.copy(ROOT / "simsiam.py", home / "mine.py")
    flags = f"--data {home}/food-11 --out {home}/RUN --quiet {TINY['moco']}".replace("--cache ", f"--cache {home}/")
    importlib.import_module("moco").main(shlex.split(flags))
    return home


@pytest.fixture
def home(once, tmp_path, monkeypatch):
    shutil.copytree(once, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    for split, count in (("train", 96), ("val", 32), ("test", 32)):
        monkeypatch.setitem(pictures.TOY_COUNT, split, count)
    return tmp_path / "home"


def program(script):
    """The module of a script, which lies here, in the repository or among its forks."""
    if script.startswith(("mine", "forks/")):
        path = Path(script) if script.startswith("mine") else ROOT / script
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return importlib.import_module(script.removesuffix(".py"))


def small(script, flags):
    """The flags of a command as this test has them: pictures that are here, few steps of a small network."""
    name = Path(script).stem
    flags = re.sub(r"--data (cifar10|stl10)", "--data ./food-11", flags)
    flags = re.sub(r"--(download|epochs \d+|minutes \d+|data-root \S+|cache \S+|label-fraction \S+)", "", flags)
    tiny = TINY.get(name, "")
    if "--recipe list" in flags:
        tiny = ""
    elif "--resume" in flags:
        tiny = " --max-steps 6"
    elif "--init imagenet.pth" in flags:
        tiny = tiny.replace(SHAPE, " --image-size 32")
    elif name == "linear" and "--from-scratch" in flags and "--checkpoint" not in flags:
        tiny += SHAPE
    elif "--weights" in flags:
        tiny += " --image-size 32"
    return shlex.split(flags + tiny)


@pytest.mark.parametrize("part", PARTS)
def test_the_commands_run(part, home, once, capsys):
    ran = 0
    for line in PARTS[part]:
        if any(re.match(pattern, line) for pattern in ELSEWHERE):
            continue
        script, _, flags = line.removeprefix("python ").partition(" > ")[0].partition(" ")
        if script == "plot.py" and importlib.util.find_spec("matplotlib") is None:
            continue
        for run in re.findall(r"(?<!--out )(?<!\S)runs/\w+", flags):  # made on another page
            if not Path(run).exists():
                shutil.copytree(once / "RUN", home / run)
        made = [Path(word) for word in re.findall(r"--(?:out|map|neighbours|views-png|features) (\S+)", flags)]
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        try:
            code = program(script).main(small(script, flags))
        except SystemExit as stop:
            code = stop.code
        assert not code, f"{line}\n{capsys.readouterr().err}"
        for path in made:
            if path.suffix == ".png":
                assert Image.open(path).size[0] > 100, line
            elif path.suffix != ".npz":
                path /= "linear.pt" if script == "linear.py" else "last.pt"
            assert path.exists(), line
        ran += 1
    assert "Traceback" not in capsys.readouterr().err
    assert ran


def test_all_four_articles_are_there():
    assert len({name for name, lines in parts(ROOT / "docs/articles.md") if lines}) == 4


def test_what_runs_elsewhere_is_still_on_a_page():
    lines = [line for found in PARTS.values() for line in found]
    for pattern in ELSEWHERE:
        assert any(re.match(pattern, line) for line in lines), pattern
