"""Every command of docs/articles.md, run from first to last on small pictures."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "articles.md").read_text()
SECTIONS = {part.splitlines()[0]: re.findall(r"^python (\w+)\.py (.*)$", part, flags=re.M)
            for part in re.split(r"^## ", TEXT, flags=re.M)[1:]}
TINY = {  # flags that make a run small; those of the page stand before them
    **dict.fromkeys(("simsiam", "moco", "simclr", "rotnet"), "--width 8 --image-size 32 --stem cifar --batch-size 8 "
                    "--max-steps 4 --knn-k 5 --amp off --cache cache"),
    "linear": "--batch-size 8 --max-steps 4 --amp off --cache cache",
    "knn": "--k 3 --cache cache", "predict": "--cache cache",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with all that the commands name: food-11 as of 2021, loose pictures, somebody's weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(path, count):
        path.mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(path / f"{i}.png")

    for c in ("00", "01"):
        draw(tmp_path / "food-11" / "training" / "labeled" / c, 12)
        draw(tmp_path / "food-11" / "validation" / c, 4)
    draw(tmp_path / "food-11" / "training" / "unlabeled" / "00", 12)
    draw(tmp_path / "food-11" / "testing" / "00", 4)
    draw(tmp_path / "pictures", 40)
    (tmp_path / "pictures" / "0.png").rename(tmp_path / "pictures" / "cat.jpg")
    body = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    torch.save(body.state_dict(), tmp_path / "simclr.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("section", [name for name, commands in SECTIONS.items() if commands])
def test_the_journey_runs(section, home, capsys):
    for script, flags in SECTIONS[section]:
        flags = flags.replace("--data cifar10", "--data ./food-11").replace("--download", "")
        flags = re.sub(r"--epochs \d+", "", flags)
        if script == "plot":
            pytest.importorskip("matplotlib")
        tiny = TINY.get(script, "")
        if "--resume" in flags:
            tiny = "--max-steps 6"
        elif script == "linear" and "--from-scratch" in flags:
            tiny += " --width 8 --image-size 32 --stem cifar"
        elif "--weights" in flags:
            tiny += " --image-size 32"
        assert importlib.import_module(script).main(shlex.split(f"{flags} {tiny}")) in (None, 0)
    for script, flags in SECTIONS[section]:
        for folder in re.findall(r"--out (runs/\S+)", flags):
            assert (home / folder / ("linear.pt" if script == "linear" else "last.pt")).exists()
        for picture in re.findall(r"\S+\.png", flags):
            if script != "plot" or (home / picture).exists():
                assert Image.open(home / picture).size[0] > 100
    assert "Traceback" not in capsys.readouterr().err


def test_all_four_articles_are_there():
    assert sum(bool(commands) for commands in SECTIONS.values()) == 4
