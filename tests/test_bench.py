"""The measuring programs run to their end and say what they should; how fast anything is, is no test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pictures

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import report  # noqa: E402
import runs  # noqa: E402


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


def test_operations_are_counted_by_function_and_device(tmp_path, monkeypatch, capsys):
    import run

    def view(images, aspect, generator, args, mean, std):
        torch.rand(3, generator=torch.Generator()).add_(1)             # two on the host
        return run.augment.normalize(images, mean, std)

    plain, image = run.augment.normalize, torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="meta")
    run.augment.normalize(image, run.MEAN, run.STD)                    # makes what is made once
    with run.counted() as alone:
        run.augment.normalize(image, run.MEAN, run.STD)
    monkeypatch.setattr(run.simsiam, "view", view)
    run.main(["--only", "host", "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    first = rows[0]["operations"]
    assert first == {"rest": [0, 2], "normalize": alone["normalize"]} and first["normalize"][0] > 0
    assert run.augment.normalize is plain and rows[1]["operations"]["network"][0] > 100
    assert all(len(line) <= 79 for line in capsys.readouterr().out.splitlines())


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
    (tmp_path / "race").rename(tmp_path / "second")
    done = race("--target", "1", "--final", *flags)  # its end alone counts
    assert done.returncode == 0 and "1 % after" in done.stdout
    assert [row["epoch"] for row in json.loads((tmp_path / "race/race.json").read_text())["rows"]] == [0, 1]
    assert json.loads((tmp_path / "race/run/args.json").read_text())["knn_t"] == 1000  # votes weigh the same
    assert (tmp_path / "race/run/last.pt").exists()
    wrong = race("--target", "1", "--", "nothing.py")
    assert wrong.returncode == 2 and "no such program" in wrong.stderr


def test_a_race_that_is_told_to_end_takes_its_run_with_it(tmp_path):
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    flags = ["--", "simclr.py", "--width", "4", "--epochs", "1000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "bench/race.py"), "--out", str(tmp_path / "race"), *flags],
                               env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("     0"):  # the untrained network is scored
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 143 and (tmp_path / "race/run/last.pt").exists()
    assert len(json.loads((tmp_path / "race/race.json").read_text())["rows"]) >= 1


def test_the_pages_tables_are_those_of_the_measurements(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_row_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        report.rows_of("results/toy.jsonl", "simclr nosuch")
    assert end.value.code == 2 and capsys.readouterr().err == "results/toy.jsonl: no row has a name like nosuch\n"


def test_seeds_make_one_row_and_shared_flags_stand_below():
    rows = [dict(name=f"{name}-s{seed}", code=0, knn=knn + seed, seconds=90.0 + 60 * seed,
                 command=f"simclr.py --amp off --lr {lr} --seed {seed}")
            for name, knn, lr in (("a", 40.0, 0.1), ("b", 50.0, 0.2)) for seed in (0, 1)]
    rows.append(dict(name="c", code=1, command="moco.py"))  # it failed
    assert report.table(rows, ["name", "knn", "seconds", "flags"]) == [
        "| run | kNN, k 200 | minutes | flags |", "|---|---|---|---|",
        "| a | 40.5 (40.0 to 41.0) | 2.0 (1.5 to 2.5) | `simclr.py --lr 0.1` |",
        "| b | 50.5 (50.0 to 51.0) | 2.0 (1.5 to 2.5) | `simclr.py --lr 0.2` |", "", "All with `--amp off`."]


def test_leave_one_out_agrees_with_a_loop():
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=g), torch.randint(0, 3, (60,), generator=g)
    features[7], labels[50:] = features[3], -1  # a copy; some without a label
    right = {k: 0 for k in (4, 9)}
    for i in range(50):
        s = [(torch.cosine_similarity(features[i], features[j], dim=0).item(), j) for j in range(50) if j != i]
        for k in right:
            votes = torch.zeros(3)
            for cosine, j in sorted(s, reverse=True)[:k]:
                votes[labels[j]] += math.exp(cosine / 0.1)
            right[k] += int(votes.argmax() == labels[i])
    assert runs.leave_one_out(features, labels, 3, ks=(4, 9)) == {
        f"loo_{k}": pytest.approx(2.0 * count) for k, count in right.items()}


def test_a_list_of_runs_is_done_once(tmp_path):
    (tmp_path / "few.txt").write_text("# a comment\nthree linear.py --checkpoint RUNS/one --finetune --max-steps 1\n"
                                      "one simclr.py --data DATA --width 4 --max-steps 2  # short\ntwo nothing.py\n")
    command = [sys.executable, str(ROOT / "bench/runs.py"), str(tmp_path / "few.txt"), "--data", "toy", "--runs",
               str(tmp_path / "runs")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True,
                              env=dict(os.environ, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1"))
    one, three, two = map(json.loads, (tmp_path / "few.jsonl").read_text().splitlines())
    assert one["code"] == 0 and one["step"] == 2 and 0 < one["loo_20"] < 100 and one["untrained"] > 0
    assert one["command"] == "simclr.py --data DATA --width 4 --max-steps 2" and two["code"] == 2
    assert 0 < one["linear"] <= 100 and three["step"] == 1 and three["linear"] == three["top1"]
    assert done.stdout == ""
    logs = {file.stem: file.read_text() for file in (tmp_path / "few").iterdir()}
    assert logs == {name: (tmp_path / "runs/few" / name / "metrics.jsonl").read_text() for name in ("one", "three")}


def test_a_run_that_was_begun_with_other_flags_is_not_gone_on_with(tmp_path):
    run = tmp_path / "runs/few/one"
    run.mkdir(parents=True)
    (run / "last.pt").touch()
    Path(f"{run}.command").write_text("simclr.py --lr 1")
    (tmp_path / "few.txt").write_text("one simclr.py --lr 2\n")
    with pytest.raises(SystemExit, match="one: was begun as 'simclr.py --lr 1'"):
        runs.main([str(tmp_path / "few.txt"), "--runs", str(tmp_path / "runs")])


def test_a_run_with_a_leak_trains_on_test_images_and_is_scored(tmp_path, monkeypatch, capsys):
    import mistakes
    for split, count in {"train": 40, "val": 10, "test": 10}.items():
        monkeypatch.setitem(pictures.TOY_COUNT, split, count)
    seen, steps = [], mistakes.Run.steps

    def watched(run):
        for batch in steps(run):
            seen.append(batch[0].clone())
            yield batch

    monkeypatch.setattr(mistakes.Run, "steps", watched)
    out = tmp_path / "leak"
    mistakes.main(["--width", "4", "--batch-size", "20", "--epochs", "1", "--knn-split", "test", "--amp", "off",
                   "--cache", str(tmp_path), "--out", str(out), "--device", "cpu"])
    source = pictures.open_source("toy")
    clean = pictures.pack(source, 32, tmp_path, ("train", "test"))
    seen = {image.numpy().tobytes() for image in torch.cat(seen)}
    assert [sum(image.numpy().tobytes() in seen for image in split.images) for split in (clean.train, clean.test)] == [
        32, 8]
    capsys.readouterr()
    mistakes.main(["score", str(out)])
    row = json.loads(capsys.readouterr().out)
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["name"] == "leak" and {"code", "commit", "machine", "cosine", "euclidean", "projector"} < set(row)
    assert 0 <= metrics["knn_10"] <= 100 and 0 <= row["cosine"] <= 100
    bank = torch.zeros(12, 2)
    bank[:2] = torch.tensor([[9.0, 0.0], [0.1, 0.1]])  # the direction of the query, far away; and the other way round
    bank[2:] += torch.tensor([-1.0, 0.0])
    query = torch.tensor([[0.1, 0.0]])
    assert 0 not in mistakes.by_distance(query, bank) and mistakes.by_distance(query, bank)[0, 0] == 1
    assert mistakes.by_cosine(query, bank)[0, 0] == 0
    right = mistakes.majority(torch.tensor([[0, 1, 2], [0, 1, 2]]), torch.tensor([0, 1, 1]), torch.tensor([1, 0]), 2)
    assert right == 50.0
    for wrong, words in ((["score"], "name a run"), (["--data", str(tmp_path / "none")], "none")):
        with pytest.raises(SystemExit) as end:
            mistakes.main(wrong)
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_comparison_is_a_table():
    points = [dict(step=0, seconds=0.0, knn_10=28.0, knn_200=27.0),
              dict(step=100, seconds=90.0, knn_10=50.0, knn_200=49.0)]
    record = {"settings": {"batch_size": 256}, "results": {"simclr-ours": points, "simclr-lightly": points}}
    assert report.peers_table(record)[2:] == [
        f"| SimCLR, {side} | 25,600 | 1.5 | 28.0, 50.0 | 49.0 |" for side in ("this project", "lightly")]
    sides = {"bare": [4.0] * 3, "ours": [5.0, 5.0, 2.0], "peer": [10.0, 8.0, 8.0], "peer, channels_last": [8.0] * 3}
    speed = {"settings": {"batch_size": 40}, "results": {"moco-lightly": {"off": sides}}}
    assert report.speed_table(speed)[2:] == [  # medians 4, 5 and 8 seconds; the least and the greatest of three ratios
        "| MoCo, lightly | float32 | 10 | 8 | 80 % | 5 | 2.00 (1.60 to 4.00) |",
        "| MoCo, lightly | best: float32 | 10 | 8 | 80 % | 5 | 2.00 (1.60 to 4.00) |"]
    sides["peer, channels_last"][1:] = [7.0, 7.0]
    assert report.speed_table(speed)[3] == (
        "| MoCo, lightly | best: float32, channels_last | 10 | 8 | 80 % | 6 | 1.60 (1.40 to 3.50) |")
