"""The measuring programs run to their end and say what they should; how fast anything is, is no test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pictures

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))


def test_what_a_step_goes_to(tmp_path, monkeypatch, capsys):
    import run
    monkeypatch.setitem(pictures.TOY_COUNT, "train", 4000)  # it changes that; put back at the end
    for split in ("val", "test"):
        monkeypatch.setitem(pictures.TOY_COUNT, split, 20)
    run.main(["--quick", "--only", "training", "--width", "4", "--batch", "8", "--steps", "1", "--device", "cpu",
              "--json", str(tmp_path / "figures.json")])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 79 for line in lines)
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["what"].split()[0] for row in rows] == ["simsiam", "moco", "simclr", "rotnet"]
    for row in rows:
        assert set(row["shares"]) == {"network", "views", "loss", "optimizer"}
        assert all(len(times) == 3 and min(times) > 0 for times in row["parts"].values())


@pytest.fixture
def race(tmp_path):
    def start(*words):
        environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
        command = [sys.executable, str(ROOT / "bench/race.py"), "--out", str(tmp_path / "race"), *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return start


def test_a_race_ends_at_its_target_or_with_its_run(race, tmp_path):
    flags = ["--", "simclr.py", "--width", "4", "--max-steps", "8", "--knn-every", "2"]
    done = race("--target", "100", *flags)
    assert done.returncode == 1 and "not reached (exit code 0)" in done.stdout
    table = json.loads((tmp_path / "race/race.json").read_text())
    assert not table["reached"] and [row["epoch"] for row in table["rows"]] == [0, 1]
    metrics = [json.loads(line) for line in (tmp_path / "race/run/metrics.jsonl").read_text().splitlines()]
    evaluating = sum(row["knn_seconds"] for row in metrics)
    passed = table["rows"][1]["seconds"] - table["rows"][0]["seconds"]  # one evaluation lies between these rows
    whole = metrics[1]["seconds"] - metrics[0]["seconds"]
    assert passed == pytest.approx(whole - metrics[1]["knn_seconds"]) and evaluating > 0

    again = race("--target", "100", *flags)
    assert again.returncode == 2 and "holds a race already" in again.stderr
    (tmp_path / "race").rename(tmp_path / "first")
    done = race("--target", "1", *flags)  # the untrained network is better than that
    assert done.returncode == 0 and "1 % after" in done.stdout
    assert [row["epoch"] for row in json.loads((tmp_path / "race/race.json").read_text())["rows"]] == [0]
    wrong = race("--target", "1", "--", "nothing.py")
    assert wrong.returncode == 2 and "no such program" in wrong.stderr
