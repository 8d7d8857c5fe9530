"""--tensorboard: the figures of metrics.jsonl, readable by TensorBoard's own reader; without the package one line."""

import sys
import time

import pytest

import pictures
import simsiam
from harness.folder import read_metrics

FLAGS = "--width 4 --batch-size 20 --epochs 2 --dim 8 --pred-dim 4 --device cpu --amp off --quiet --tensorboard".split()


def test_the_figures_are_those_of_the_metrics(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    for split in pictures.TOY_COUNT:
        monkeypatch.setitem(pictures.TOY_COUNT, split, 40)
    simsiam.main([*FLAGS, "--cache", str(tmp_path), "--out", str(tmp_path / "run")])
    events = reader.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    rows = read_metrics(tmp_path / "run")
    for name in ("loss", "knn", "std", "lr"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name])) for row in rows if row.get(name) is not None], name
        assert len(written) >= 2


def test_epochs_that_run_again_stand_there_once(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    for split in pictures.TOY_COUNT:
        monkeypatch.setitem(pictures.TOY_COUNT, split, 40)
    simsiam.main([*FLAGS, "--cache", str(tmp_path), "--out", str(tmp_path / "run"), "--keep-every", "1"])
    time.sleep(1.1)  # the name of a file of events has the second in which it was begun
    simsiam.main(["--resume", str(tmp_path / "run/epoch-0001.pt")])
    events = reader.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("knn")] == [row["step"] for row in read_metrics(tmp_path / "run")]


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as end:
        simsiam.main([*FLAGS, "--out", str(tmp_path / "run")])
    assert end.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
