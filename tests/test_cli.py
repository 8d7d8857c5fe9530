"""Whole journeys, as subprocesses from another folder, on real picture files."""

import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image, ImageDraw

import knn
import pictures

ROOT = Path(__file__).resolve().parent.parent
CIFAR = ROOT.parent / "shared" / "cifar-10-batches-py"
TINY = ["--width", "4", "--epochs", "2", "--batch-size", "8", "--image-size", "32", "--stem", "cifar",
        "--dim", "32", "--pred-dim", "8", "--amp", "off", "--knn-k", "5"]


@pytest.fixture
def run(tmp_path):
    """run("simsiam.py", flags...) in an empty folder, its own cache; returns the finished process."""
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1")

    def start(script, *flags, code=0, wait=True):
        script = script if Path(script).is_absolute() else ROOT / script
        command = [sys.executable, str(script), *map(str, flags)]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return subprocess.CompletedProcess(command, code, out, err)

    start.environment = environment
    return start


def draw(path, label, rng):
    """A photo-like JPEG of its own size: class 0 shows an ellipse, class 1 a cross, on a random ground."""
    size = rng.randint(40, 90), rng.randint(40, 90)
    image = Image.new("RGB", size, tuple(rng.randint(0, 120) for _ in range(3)))
    pen, ink = ImageDraw.Draw(image), tuple(rng.randint(150, 255) for _ in range(3))
    w, h = size
    if label == 0:
        pen.ellipse([w * 0.2, h * 0.2, w * 0.8, h * 0.8], fill=ink)
    else:
        pen.line([0, 0, w, h], fill=ink, width=8)
        pen.line([0, h, w, 0], fill=ink, width=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


@pytest.fixture
def food(tmp_path):
    """A folder of the shape of food-11 as published in 2021."""
    rng, root = random.Random(0), tmp_path / "food-11"
    for split, count in (("training/labeled", 12), ("validation", 5), ("testing", 3)):
        for label in (0, 1):
            for i in range(count):
                draw(root / split / f"{label:02}" / f"{label}_{i}.jpg", label, rng)
    for i in range(10):
        draw(root / "training/unlabeled/00" / f"{i}.jpg", i % 2, rng)
    return root


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_then_knn_from_another_folder(run, food, tmp_path):
    out = run("simsiam.py", "--data", "food-11", "--out", "run", *TINY).stdout
    assert max(map(len, out.splitlines())) <= 80
    assert "24 labelled" in out and "10 unlabelled" in out and "10 labelled" in out  # training, validation
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["step"] for row in rows] == [0, 4, 8]  # 34 images in batches of 8: unlabelled ones train too
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert checkpoint["classes"] == ["00", "01"] and checkpoint["method"] == "simsiam"

    report = run("knn.py", "--checkpoint", "run/last.pt", "--k", "5", "3", "--amp", "off", "--neighbours",
                 "grid.png").stdout
    assert max(map(len, report.splitlines())) <= 80
    assert f"top-1 {rows[-1]['knn']:6.2f} %" in report  # the command and the monitor agree
    assert "10 val images against 24 training images" in report
    assert Image.open(tmp_path / "grid.png").width > 500
    out = run("knn.py", "--checkpoint", "run", "--projector", "--split", "test", "--k", "3").stdout
    assert "6 test images" in out and "32 features" in out


def test_from_pictures_to_answers(run, food, tmp_path):
    """The whole journey on a folder of JPEGs: features, kNN, labels in three ways, answers, curves, weights."""
    flags = [*TINY, "--width", "64", "--image-size", "16", "--epochs", "1"]
    run("simsiam.py", "--data", "food-11", "--out", "pre", *flags)
    assert f"top-1 {metrics(tmp_path / 'pre')[-1]['knn']:6.2f} %" in run("knn.py", "--checkpoint", "pre", "--k", "5",
                                                                        "--amp", "off").stdout
    for way, more in (("cached", ["--test"]), ("finetune", ["--epochs", "1"]), ("from-scratch", ["--epochs", "1"])):
        out = run("linear.py", "--checkpoint", "pre", f"--{way}", "--out", way, "--amp", "off", *more).stdout
        assert max(map(len, out.splitlines())) <= 80
        scores = json.loads((tmp_path / way / "scores.json").read_text())
        rows = metrics(tmp_path / way)
        assert scores["val"]["top1"] == pytest.approx(max(row["top1"] for row in rows[1:]), abs=1e-4)  # the best epoch
        assert scores["val"]["images"] == 10 and ("test" in scores) == (way == "cached")
        assert f"top-1 {scores['val']['top1']:.2f} %" in out
        assert Image.open(tmp_path / way / "confusion.png").width > 100
        if way == "finetune":  # answers about the files have exactly the accuracy that was printed
            answers = json.loads(run("predict.py", "--checkpoint", way, "food-11/validation", "--json", "--amp",
                                     "off").stdout)
            right = sum(Path(answer["file"]).parent.name == answer["class"] for answer in answers)
            assert len(answers) == 10 and 100 * right / 10 == scores["val"]["top1"]

    if importlib.util.find_spec("matplotlib"):
        out = run("plot.py", "finetune", "from-scratch", "--out", "curves.png").stdout
        assert "linear finetune; linear from-scratch" in out and Image.open(tmp_path / "curves.png").width > 500

    run("export.py", "finetune", "net.pth")
    about = json.loads((tmp_path / "net.json").read_text())
    net = torchvision.models.resnet18(num_classes=2)
    net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    net.load_state_dict(torch.load(tmp_path / "net.pth"))
    answers = json.loads(run("predict.py", "--checkpoint", "finetune", "food-11/testing", "--json", "--amp",
                             "off").stdout)
    for answer in answers:  # torchvision's network on our view of the file gives our probabilities
        pixels, aspect = pictures.decode(tmp_path / answer["file"], about["image_size"])
        x = knn.evaluation_view(pixels[None], torch.tensor([aspect]), about["image_size"], about["mean"], about["std"])
        theirs = net.eval()(x).softmax(dim=1)[0]
        assert theirs[answer["class_index"]].item() == pytest.approx(answer["probability"], abs=1e-4)


def test_killed_and_resumed_equals_never_killed(run, food, tmp_path):
    flags = ["--data", food, *TINY, "--epochs", "3"]
    run("simsiam.py", *flags, "--out", "whole")
    process = run("simsiam.py", *flags, "--out", "killed", wait=False)
    deadline = time.time() + 90
    while not (tmp_path / "killed/last.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run("simsiam.py", "--resume", "killed")
    whole, resumed = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == resumed["step"] == 12
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for one, two in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "killed"), strict=True):
        for key in ("epoch", "step", "loss", "lr", "knn", "std"):
            assert one.get(key) == two.get(key)


def test_a_copied_method_runs(run, food, tmp_path):
    """Fork one file: copy it beside the others under another name, or elsewhere with them on the path."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for package in ("harness", "pictures"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "simsiam.py").rename(tmp_path / "mine.py")
    out = run(tmp_path / "mine.py", "--data", food, *TINY, "--max-steps", "2", "--out", "run").stdout
    assert "epoch 1/1" in out and (tmp_path / "run/last.pt").exists()


def test_loose_pictures_train_without_knn(run, tmp_path):
    for i in range(9):
        draw(tmp_path / "loose" / f"{i}.jpg", i % 2, random.Random(i))
    out = run("simsiam.py", "--data", "loose", "--out", "run", *TINY).stdout
    assert "no kNN" in out and "next    python knn.py --checkpoint run --neighbours" in out  # linear.py needs labels
    assert [row["knn"] for row in metrics(tmp_path / "run")] == [None] * 3
    following = out.splitlines()[-1].split()  # the command that is recommended works
    assert following[:3] == ["next", "python", "knn.py"]
    run(*following[2:])
    assert Image.open(tmp_path / "neighbours.png").width > 500


HOMES = {
    "simsiam": "--data=~/d --data-root=~/r --cache=~/c --out=~/o --views-png=~/v.png",
    "knn": "--checkpoint=~/r --data=~/d --data-root=~/r --cache=~/c --neighbours=~/n.png --map=~/m.png "
           "--features=~/f.npz",
    "linear": "--checkpoint=~/r --data=~/d --data-root=~/r --cache=~/c --out=~/o",
    "predict": "~/a.png ~/b.png --checkpoint=~/r --data=~/d --data-root=~/r --cache=~/c --neighbours=~/n.png",
    "export": "~/r ~/o.pth",
    "plot": "~/a ~/b --out=~/o.png",
}


@pytest.mark.parametrize("program", HOMES)
def test_every_path_may_begin_with_the_home_folder(monkeypatch, tmp_path, program):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(importlib.import_module(program), "inherit", lambda args: None, raising=False)  # no run there
    args = importlib.import_module(program).parse_args(HOMES[program].split())
    values = vars(args[0] if isinstance(args, tuple) else args).values()
    values = [str(part) for value in values for part in (value if isinstance(value, list) else [value])]
    assert sum(value.startswith(f"{tmp_path}/") for value in values) == HOMES[program].count("~")


def test_a_run_to_resume_may_begin_with_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        importlib.import_module("simsiam").main(["--resume=~/nowhere"])
    assert f"{tmp_path}/nowhere: no checkpoint" in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_show_is_escaped(run, tmp_path, monkeypatch):
    for i in range(16):
        draw(tmp_path / "set" / ("日本", "b")[i % 2] / f"{i}.jpg", i % 2, random.Random(i))
    monkeypatch.setitem(run.environment, "PYTHONIOENCODING", "latin-1")
    out = run("simsiam.py", "--data", "set", "--out", "run", *TINY, "--max-steps", "1").stdout
    assert "b, \\u65e5\\u672c" in out and "b, 日本" in (tmp_path / "run/log.txt").read_text(encoding="utf-8")
    assert "\\u65e5\\u672c" in run("knn.py", "--checkpoint", "run", "--k", "1").stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_no_more(run, food, tmp_path, monkeypatch, unbuffered):
    """A run saves, then ends in a line; the others end as a shell expects."""
    monkeypatch.setitem(run.environment, "PYTHONUNBUFFERED", unbuffered)
    process = run("simsiam.py", "--data", "food-11", "--out", "run", *TINY, wait=False)
    while not process.stdout.readline().startswith("chance"):  # `| grep -m 1 chance`
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 141
    err = process.stderr.read()
    assert err.split("\n")[1] == "stdout: Broken pipe: saved at step 1; go on with" and "Traceback" not in err
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 1

    process = run("knn.py", "--checkpoint", "run", wait=False)
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")
    for command in ("simsiam.py --resume run --quiet", "knn.py --checkpoint run", "predict.py --checkpoint run food-11",
                    "simsiam.py --data food-11 --batch-size 8"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, ROOT / command.split()[0], *command.split()[1:]], cwd=tmp_path,
                                  env=run.environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        said = done.stderr.splitlines()
        assert done.returncode == (0 if "--quiet" in command else 2), done.stderr
        assert "--quiet" in command or said[-1].endswith("error: stdout: No space left on device")
        assert "Traceback" not in done.stderr


def test_a_wrong_use_as_users_see_it(run):
    done = run("simsiam.py", "--data", "./nowhere", code=2)
    assert done.stderr.startswith("simsiam.py: error: --data ./nowhere") and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not CIFAR.exists(), reason="real CIFAR-10 is not in ../shared")
def test_a_few_steps_on_real_cifar10(run, tmp_path):
    out = run("simsiam.py", "--data", "cifar10", "--data-root", CIFAR.parent, "--width", "8", "--batch-size", "64",
              "--max-steps", "3", "--knn-every", "0", "--out", "run").stdout
    assert "45,000" in out and "5,000" in out
    assert metrics(tmp_path / "run")[-1]["step"] == 3
