"""harness/health.py: healthy and sick runs of every method, and that a run says each thing once."""

import json
import sys

import pytest

import plot
import simclr
from harness import health
from harness.folder import read_metrics

ARGS = dict(batch_size=256, epochs=100, warmup_epochs=0.0, max_steps=None, lr=1.2, step_lr=None, usual_step_lr=1.2,
            knn_split="val", contents={"train": [4000, "a"], "val": [400, "b"]})
MOCO = dict(queue_size=4096, momentum_encoder=0.99)


def make_rows(untrained=None, steps=15, **figures):
    """Rows of a run of 15 steps an epoch; a figure is a list or one number for 20 epochs."""
    epochs = max([len(values) for values in figures.values() if isinstance(values, list)], default=20)
    rows = [dict(epoch=0, step=0, seconds=1.0, loss=None, knn=None) | (untrained or {})]
    for i in range(epochs):
        now = {name: values[i] if isinstance(values, list) else values for name, values in figures.items()}
        rows.append(dict(epoch=i + 1, step=steps * (i + 1), seconds=1.0, loss=6.0, knn=None) | now)
    return rows


def line(first, last, epochs=20):
    return [first + (last - first) * i / (epochs - 1) for i in range(epochs)]


CASES = {  # name: (flags beside ARGS, rows, what is wrong, what must stand in the words)
    # SimCLR: by chance 1/511 = 0.00196; its loss may begin above log(511) = 6.24
    "4 to 14 times chance": ({}, make_rows(loss=6.5, accuracy=line(0.008, 0.027)), None, ""),
    "chance": ({}, make_rows(loss=6.24, accuracy=0.002), "at chance", "--lr 0.6, now 1.2"),
    "within the noise of 4,000 images": ({}, make_rows(accuracy=0.0045), "at chance", "by chance 0.00196"),
    "outside it": ({}, make_rows(accuracy=0.006), None, ""),
    "90 steps": ({}, make_rows(accuracy=[0.002] * 6), None, ""),
    "105 steps": ({}, make_rows(accuracy=[0.002] * 7), "at chance", ""),
    "warming up": (dict(warmup_epochs=20.0), make_rows(accuracy=0.002), None, ""),
    "a fifth of the minutes": (dict(warmup_epochs=20.0, minutes=1.0), make_rows(accuracy=0.002, seconds=line(3, 60)),
                               "at chance", ""),
    "warming up for ever": (dict(warmup_epochs=60.0), make_rows(accuracy=[0.002] * 80), "at chance",
                            "--warmup-epochs 10, now 60 of 100 epochs"),
    "too high a rate": (dict(lr=9.6), make_rows(accuracy=0.002), "at chance", "--lr 1.2, now 9.6"),
    "too low a rate": (dict(lr=0.1), make_rows(accuracy=0.002), "at chance", "--lr 1.2, now 0.1"),
    "a rate per step": (dict(lr=None, step_lr=1.0, batch_size=64), make_rows(steps=62, accuracy=0.002), "at chance",
                        "--step-lr 0.5, now 1"),
    "the rule for small batches": (dict(lr=4.8, batch_size=64, lr_scaling="sqrt"),
                                   make_rows(steps=62, accuracy=0.002), "at chance", "--lr 2.4, now 4.8"),
    # MoCo: by chance 1/4097
    "old keys": (MOCO, make_rows(loss=line(7, 8.1), accuracy=line(0.08, 0.02)), "old keys of a picture",
                 "--queue-size 512, now 4096"),
    "old keys, moco.py --queue-size 4096 --epochs 8 on the toy set": (
        MOCO | dict(batch_size=64), make_rows(
            steps=62, loss=[6.68, 6.07, 6.13, 6.29, 6.39, 6.49, 6.70, 7.06],
            accuracy=[0.060, 0.262, 0.270, 0.205, 0.164, 0.145, 0.112, 0.0628]), "old keys of a picture",
        "from 0.205 to 0.0628"),
    "old keys, moco.py --batch-size 128 --epochs 20 --queue-size 4096 on 4,500 photos": (
        MOCO | dict(batch_size=128, epochs=20, contents={"train": [4500, "a"]}), make_rows(
            steps=35, loss=[7.31, 7.68, 7.13, 7.05, 6.95, 6.94, 7.03, 7.1, 7.1, 7.06, 7.0, 7.0, 6.99, 7.06, 7.12, 7.16,
                            7.19, 7.28, 7.35, 7.47],
            accuracy=[0.034, 0.021, 0.054, 0.065, 0.063, 0.052, 0.043, 0.04, 0.043, 0.055, 0.052, 0.057, 0.051, 0.053,
                      0.056, 0.056, 0.048, 0.039, 0.039, 0.023]), "old keys of a picture", "--queue-size 1024"),
    "a short queue": (MOCO | dict(queue_size=1024), make_rows(loss=line(6, 6.9), accuracy=line(0.08, 0.02)),
                      "learning rate too high", "--lr 0.6, now 1.2"),
    "a rate that is too high is not raised": (
        MOCO | dict(queue_size=1024, batch_size=64), make_rows(steps=62, loss=line(6, 6.9), accuracy=line(0.08, 0.02)),
        "learning rate too high", "--lr 0.6, now 1.2"),
    "accuracy falls and so does the loss": (MOCO | dict(queue_size=256), make_rows(
        loss=line(5, 4), accuracy=line(0.16, 0.05)), None, ""),
    "real keys fill the queue": (MOCO | dict(queue_size=65536, contents={"train": [150_000, "a"]}), make_rows(
        steps=585, loss=[8.0, 9.9], accuracy=[0.3, 0.1]), None, ""),
    "disagreeing keys": (MOCO | dict(queue_size=256, momentum_encoder=0.0), make_rows(loss=5.549, accuracy=0.0),
                         "at chance", "--momentum-encoder 0.99, now 0"),
    "48 pictures, much noise": (dict(MOCO, queue_size=32, batch_size=16, contents={"train": [48, "a"]}), make_rows(
        steps=3, loss=line(3.49, 3.4, 80), accuracy=[0.10, 0.20] * 40), None, ""),
    "few steps by --max-steps": (dict(max_steps=200), make_rows(accuracy=[0.002] * 13), "at chance",
                                 "--max-steps 800, now 200, for 200 steps are few"),
    "few steps": (dict(MOCO, queue_size=16, batch_size=16, contents={"train": [44, "a"]}), make_rows(
        steps=2, loss=[2.8] * 90, accuracy=0.1), "at chance", "--epochs 400, now 100, for 200 steps are few"),
    "4 validation pictures": (dict(knn_split="val", contents={"train": [44, "a"], "val": [4, "b"]}), make_rows(
        dict(knn=75.0), knn=25.0, accuracy=0.5), None, ""),
    "450 pictures, noise": (dict(MOCO, queue_size=128, batch_size=128, contents={"train": [450, "a"]}), make_rows(
        steps=3, loss=[4.5] * 40 + [4.24, 4.16, 4.17, 4.18, 4.25, 4.19],
        accuracy=[0.04] * 40 + [0.062, 0.078, 0.081, 0.047, 0.060, 0.060]), None, ""),
    # RotNet
    "three steps": ({}, make_rows(steps=3, rotation=[25.0]), None, ""),
    "one way up": ({}, make_rows(loss=1.386, rotation=26.0), "at chance", "rotation 26, by chance 25"),
    "some rotations": ({}, make_rows(loss=1.3, rotation=33.0), None, ""),
    "forgetting": ({}, make_rows(loss=line(0.9, 1.2), rotation=line(60, 40)), "learning rate too high", "53.7 to 40"),
    "four rotations of 900 images": (dict(contents={"train": [900, "a"]}), make_rows(steps=4, rotation=[28.5] * 40),
                                     None, ""),
    # SimSiam
    "spread": ({}, make_rows(loss=line(-0.1, -0.93), std=0.97), None, ""),
    "narrow": ({}, make_rows(loss=-0.9, std=0.41), "collapsed", "std 0.41"),
    "through z": (dict(no_stop_gradient=True), make_rows(loss=-0.9, std=0.41), "collapsed", "without --no-stop-gra"),
    "-0.97": (dict(no_predictor=True), make_rows(loss=-0.97, std=0.8), "collapsed", "without --no-predictor"),
    "-0.96 at the end": (dict(epochs=20), make_rows(loss=line(-0.1, -0.96), std=0.9), None, ""),
    "kNN falls by the noise of 60": (dict(contents={"train": [4000, "a"], "val": [60, "b"]}), make_rows(
        loss=line(-0.6, -0.599), std=0.97, knn=line(20, 15)), None, ""),
    "kNN falls": ({}, make_rows(dict(knn=12.0), loss=line(-0.7, -0.6), std=0.97, knn=line(40, 20)),
                  "learning rate too high", "knn fell from"),
    "a loss of BYOL": ({}, make_rows(loss=0.3, std=0.4), None, ""),
    # whatever the method
    "one direction": ({}, make_rows(dict(rank=9.0), rank=1.3, accuracy=0.1), "collapsed", "rank 1.30"),
    "one direction from the start": ({}, make_rows(dict(rank=1.2), rank=1.3, accuracy=0.1), None, ""),
    "far below untrained": ({}, make_rows(dict(knn=30.0), knn=12.0, accuracy=0.1), "collapsed", "untrained 30.0 %"),
    "one of 60 images less": (dict(contents={"train": [4000, "a"], "val": [60, "b"]}), make_rows(
        dict(knn=1.7), knn=0.0, accuracy=0.1), None, ""),
    "below untrained": (dict(epochs=50), make_rows(dict(knn=30.0), knn=24.0, accuracy=0.1), "worse than untrained", ""),
    "by chance": (dict(epochs=50), make_rows(dict(knn=30.0), knn=27.0, accuracy=0.1), None, ""),
    "before a third": ({}, make_rows(dict(knn=30.0), knn=24.0, accuracy=0.1), None, ""),
    "shortcut": (dict(epochs=50, no_color_jitter=True), make_rows(dict(knn=30.0), knn=24.0, accuracy=0.9),
                 "worse than untrained", "without --no-color-jitter"),
    "simclr.py --no-color-jitter on the toy set": (
        dict(epochs=20, no_color_jitter=True), make_rows(dict(knn=27.9), knn=29.6, accuracy=0.93),
        "solved by a shortcut", "accuracy 0.93, and knn 29.6 %, untrained 27.9 %; try without --no-color-jitter"),
    "nearly solved, and well": (dict(epochs=20), make_rows(dict(knn=27.9), knn=60.0, accuracy=0.93), None, ""),
    "a better layer": (dict(epochs=50), make_rows(dict(knn=30.0, knn_layer2=28.0), knn=20.0, knn_layer2=31.0,
                                                  rotation=60.0), None, ""),
    "measured now and then": (dict(epochs=50), make_rows(dict(knn=30.0), knn=[None] * 15 + [24.0] + [None] * 4,
                                                         accuracy=0.1), "worse than untrained", ""),
    "no labels": ({}, make_rows(rank=20.0, agreement=0.4, accuracy=0.1), None, ""),
    "a classifier": ({}, make_rows(loss=line(2, 3), top1=10.0), None, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_healthy_and_sick_runs(name):
    flags, rows, wrong, words = CASES[name]
    found = health.examine(ARGS | flags, rows)
    assert [finding.wrong.startswith(wrong) for finding in found] == [True] if wrong else found == []
    assert words in "".join(map(str, found))
    lines = health.diagnose(ARGS | flags, rows)
    well = ("healthy: loss", "too early", "no rule")
    assert lines == [str(finding) for finding in found] if found else lines[0].startswith(well)


def test_a_run_that_ended_too_soon_is_not_asked_to_go_on():
    args = ARGS | dict(epochs=3)
    assert health.diagnose(args, make_rows(accuracy=[0.002] * 2)) == [
        "too early to say: nothing is judged before the end of the epoch that has step 100"]
    assert health.diagnose(args, make_rows(accuracy=[0.002] * 3)) == [
        "too short to judge: nothing is before step 100, and the run has 45"]


@pytest.mark.parametrize("file", sorted(plot.REFERENCES.glob("*.jsonl")), ids=lambda file: file.stem)
def test_runs_that_went_well_were_never_warned(file):
    args, *rows = map(json.loads, file.read_text().splitlines())
    assert not any(health.examine(args, rows[: n + 1]) for n in range(len(rows)))
    assert health.diagnose(args, rows)[0].startswith("healthy: loss")


def test_a_warning_comes_once_and_again_after_it_had_gone():
    rows = make_rows(accuracy=[0.002] * 9 + [0.02] * 3 + [0.002] * 3)
    said = [rows[n]["epoch"] for n in range(len(rows)) if health.news(ARGS, rows[: n + 1])]
    assert said == [7, 13]


def test_a_short_run_of_the_toy_set(tmp_path, monkeypatch, capsys):
    """It is well and says nothing; what a rule finds in both epochs is said once. Nothing here needs matplotlib."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--width", "4", "--image-size", "16", "--batch-size", "40", "--max-steps", "200", "--knn-every", "0",
             "--warmup-epochs", "0", "--amp", "off", "--device", "cpu", "--epochs", "2"]
    for name in ("well", "ill"):
        if name == "ill":
            monkeypatch.setitem(health.RULES, "at chance", lambda facts: ("accuracy 0", health.rate(facts.args)))
        simclr.main([*flags, "--out", str(tmp_path / name)])
        rows = read_metrics(tmp_path / name)
        log = (tmp_path / name / "log.txt").read_text()
        capsys.readouterr()
        plot.main([str(tmp_path / name), "--diagnose"])
        out = capsys.readouterr().out
        if name == "ill":
            assert log.count("warning at chance: accuracy 0; try --lr 0.4, now 0.8") == log.count("warning") == 1
            assert out == f"{tmp_path / name}: at chance: accuracy 0; try --lr 0.4, now 0.8\n"
        else:
            assert "warning" not in log and "well: healthy: loss" in out and rows[-1]["accuracy"] > 4 / 79
            assert "(by chance 0.0127)" in out


def test_one_line_for_a_folder_that_cannot_be_judged(tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps(dict(method="simclr")))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(accuracy=0.1)))
    with pytest.raises(SystemExit) as end:
        plot.main([str(tmp_path), "--diagnose"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "lacks 'batch_size'" in err
