"""On a CUDA GPU the programs do what they do on a CPU; skipped where there is none."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import augment
import common
import knn
import pictures
from harness.folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["simsiam", "moco", "simclr", "rotnet"]
SMALL = ["--width", "16", "--batch-size", "64", "--max-steps", "6", "--knn-every", "0", "--quiet"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    for split, count in (("train", 256), ("val", 64), ("test", 64)):
        monkeypatch.setitem(pictures.TOY_COUNT, split, count)


def train(method, folder, *flags):
    """The rows of the metrics of six steps: of an epoch of four, and of half another."""
    importlib.import_module(method).main([*SMALL, "--cache", str(folder / "cache"), "--out", str(folder / "run"),
                                          *map(str, flags)])
    return read_metrics(folder / "run")


@pytest.mark.parametrize("compiled", [(), ("--compile",)], ids=["", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_a_cpu(method, compiled, tmp_path):
    """Views, weights and steps are the same; bf16, TF32 and --compile are less exact, but no more than that."""
    on = {device: train(method, tmp_path / device, "--device", device, *flags)[0]
          for device, flags in {"cpu": ["--amp", "off"], "cuda": compiled}.items()}
    assert on["cuda"]["loss"] == pytest.approx(on["cpu"]["loss"], rel=0.01, abs=0.002)
    log = (tmp_path / "cuda/run/log.txt").read_text()
    assert "bf16" in log or "fp16" in log
    assert "does not work" not in log


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_stopped_and_resumed(amp, tmp_path):
    whole = train("simclr", tmp_path, "--device", "cuda", "--amp", amp, "--keep-every", 1)[-1]
    importlib.import_module("simclr").main(["--resume", str(tmp_path / "run/epoch-0001.pt"), "--quiet"])
    row = read_metrics(tmp_path / "run")[-1]
    assert row["step"] == whole["step"] == 6 and row["loss"] == pytest.approx(whole["loss"], rel=0.002)
    assert "resumes at step 4" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("size", [32, 96])
def test_views_are_those_of_a_cpu(size):
    x = torch.randint(256, (16, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))

    def view(images):
        draws = common.Draws(0)
        y = augment.random_resized_crop(images, size, flip=0.5, interpolation="bicubic", generator=draws)
        y = augment.color_jitter(y, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=draws, inplace=True)
        y = augment.gaussian_blur(augment.random_grayscale(y, generator=draws), generator=draws)
        return augment.rotate(y, torch.arange(16) % 4).cpu()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        difference = (view(x) - view(x.cuda())).abs()
    finally:
        torch.set_float32_matmul_precision(before)
    # A CPU crops larger pictures in whole levels, which a hue may turn into a few.
    assert difference.mean() < (1e-5 if size <= augment.SMALL else 1 / 255)


def test_neighbours_are_those_of_a_cpu():
    bank, queries = (torch.randn(n, 32, generator=torch.manual_seed(n)) for n in (3000, 500))
    labels = torch.arange(3000) % 7
    here, there = (knn.knn_predict(queries.to(d), bank.to(d), labels.to(d), 7, 20).cpu() for d in ("cpu", "cuda"))
    assert (here.argmax(dim=1) == there.argmax(dim=1)).double().mean() > 0.98  # ties, and TF32


def test_one_process_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "simclr.py", *SMALL,
               "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.parametrize("flags", [["--cached"], ["--probe"], ["--finetune"]])
def test_what_a_gpu_trained_is_read_anywhere(flags, tmp_path, capsys):
    train("simclr", tmp_path, "--device", "cuda")
    for device in ("cuda", "cpu"):
        importlib.import_module("linear").main(
            ["--checkpoint", str(tmp_path / "run"), *flags, "--max-steps", "3", "--device", device, "--quiet",
             "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / device)])
    knn.main(["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--cache", str(tmp_path / "cache")])
    assert "top-1" in capsys.readouterr().out
