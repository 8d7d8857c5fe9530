"""plot.py: which figure stands where, what a legend calls a run, and one line for every wrong use."""

import json
import os
import sys
from pathlib import Path

import pytest

import plot

UNTRAINED = dict(epoch=0, step=0, seconds=2.0, loss=None, lr=None, images_per_second=None, knn=30.0, knn_20=31.0)


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="matplotlib is not installed; only plot.py needs it")


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run("a", "moco", lr=0.1) -> the run folder a, below the current one; rows replace the usual ones."""
    monkeypatch.chdir(tmp_path)

    def make(name, method="simsiam", rows=None, losses=(-0.2, -0.6), **args):
        if rows is None:
            rows = [UNTRAINED] + [
                dict(UNTRAINED, epoch=i + 1, step=10 * (i + 1), seconds=2.0 + 50 * (i + 1), loss=loss, lr=0.2 - 0.1 * i,
                     knn=40.0 + i, std=0.98) for i, loss in enumerate(losses)]
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        saved = dict(method=method, data="toy", seed=0, lr=0.1, epochs=2, out=str(folder), resume=None) | args
        (folder / "args.json").write_text(json.dumps(saved))
        return folder

    return make


def make_linear(make_run, name, way, checkpoint, **args):
    rows = [dict(epoch=i, step=i, seconds=60.0 * i, loss=2.0 - i if i else None, lr=0.1 if i else None,
                 images_per_second=None, top1=10.0 + i, top5=50.0, train_top1=20.0 + i) for i in range(3)]
    return make_run(name, "linear", rows, way=way, checkpoint=str(checkpoint), **args)


def panels(figure):
    """{title: [(color, x, y), ...]}"""
    return {axes.get_title(loc="left"): [(line.get_color(), list(line.get_xdata()), list(line.get_ydata()))
                                         for line in axes.lines] for axes in figure.axes}


@pytest.fixture
def drawn(matplotlib):
    """drawn(folder, ...) -> the Figure of these runs under their own names."""

    def draw(*folders, against="epochs"):
        runs = [plot.read_run(folder) for folder in folders]
        return plot.draw(runs, plot.make_labels(runs), against)

    return draw


def test_every_figure_stands_in_its_panel(make_run, drawn):
    found = panels(drawn(make_run("a")))
    assert list(found) == ["loss", "kNN or top-1 accuracy, %", "learning rate",
                           "std of outputs (1: spread, 0: collapsed)"]
    blue = plot.COLOURS[0]
    assert found["loss"] == [(blue, [1, 2], [-0.2, -0.6])]
    assert found["kNN or top-1 accuracy, %"] == [(blue, [0, 1, 2], [30.0, 40.0, 41.0])]  # from the untrained network on
    assert found["learning rate"] == [(blue, [1, 2], [0.2, 0.1])]


def test_pre_training_against_from_scratch(make_run, drawn):
    simsiam = make_run("simsiam")
    tuned = make_linear(make_run, "tuned", "finetune", simsiam / "best.pt", lr=0.01)
    scratch = make_linear(make_run, "scratch", "from-scratch", simsiam)
    figure = drawn(tuned, scratch, simsiam)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["linear finetune", "linear from-scratch", "simsiam"]
    assert [line.get_color() for line in figure.legends[0].get_lines()] == list(plot.COLOURS[:3])
    accuracy = panels(figure)["kNN or top-1 accuracy, % (thin: training images)"]
    assert sorted(y[0] for _, _, y in accuracy) == [10.0, 10.0, 20.0, 20.0, 30.0]  # one percent axis for all
    lines = figure.axes[list(panels(figure)).index("kNN or top-1 accuracy, % (thin: training images)")].lines
    assert {line.get_linewidth() < 1 for line in lines if line.get_ydata()[0] == 20.0} == {True}
    assert {line.get_linewidth() < 1 for line in lines if line.get_ydata()[0] != 20.0} == {False}
    assert set(panels(drawn(tuned, scratch))) == {
        "loss", "kNN or top-1 accuracy, % (thin: training images)", "learning rate", "top-5 accuracy, %"}


def test_losses_of_held_out_images_stand_beside_those_of_training_images(make_run, drawn):
    """The articles' figure: the held-out loss of a transferred run and of one from scratch."""
    runs = [make_run(way, "linear", way=way, checkpoint="a", rows=[
        dict(epoch=i, step=i, seconds=60.0 * i, loss=2.0 - i if i else None, val_loss=2.5 - i, top1=10.0)
        for i in range(3)]) for way in ("finetune", "from-scratch")]
    turns = make_run("rotnet", "rotnet", rows=[
        dict(epoch=1, step=1, seconds=60.0, loss=1.0, rotation=30.0, test_loss=1.1, test_rotation=40.0)])
    figure = drawn(*runs)
    axes = figure.axes[list(panels(figure)).index("loss (thin: training images)")]
    thick, thin = ([line for line in axes.lines if (line.get_linewidth() < 1) == thin] for thin in (False, True))
    assert [list(line.get_ydata()) for line in thick] == [[2.5, 1.5, 0.5]] * 2  # from the untrained network on
    assert [list(line.get_ydata()) for line in thin] == [[1.0, 0.0]] * 2
    assert [line.get_linewidth() > 1 for line in figure.legends[0].get_lines()] == [True, True]
    found = panels(drawn(*runs, turns))
    assert [y for _, _, y in found["loss (rotnet) (thin: training images)"]] == [[1.1], [1.0]]
    assert [y for _, _, y in found["rotation accuracy, % (thin: training images)"]] == [[40.0], [30.0]]
    assert len(found["loss (linear) (thin: training images)"]) == 4
    assert "loss" in panels(drawn(make_run("alone")))  # nothing beside it: the title names no kind of images


def test_losses_of_other_methods_get_their_own_axis(make_run, drawn):
    found = panels(drawn(make_run("a"), make_run("b", "moco", losses=(5.0, 4.0)), make_run("c", losses=(-0.1, -0.5))))
    assert [y for _, _, y in found["loss (simsiam)"]] == [[-0.2, -0.6], [-0.1, -0.5]]
    assert [y for _, _, y in found["loss (moco)"]] == [[5.0, 4.0]]
    assert len(found["kNN or top-1 accuracy, %"]) == 3


def test_scales(make_run, drawn):
    figure = drawn(make_run("a"))
    axes = dict(zip(panels(figure), figure.axes, strict=True))
    low, high = axes["std of outputs (1: spread, 0: collapsed)"].get_ylim()
    assert low < 0 and high > 1.05  # 0.98 is no collapse and must not look like one


@pytest.mark.parametrize("against, last, label", [("epochs", 1, "epochs"), ("seconds", 10.0, "time, minutes")])
def test_the_horizontal_axis(make_run, drawn, against, last, label):
    figure = drawn(make_run("a", rows=[UNTRAINED, dict(UNTRAINED, epoch=1, seconds=600.0)]), against=against)
    (_, x, _), = panels(figure)["kNN or top-1 accuracy, %"]
    assert x[-1] == last and figure.get_supxlabel() == label


@pytest.mark.parametrize("flags, expected", [
    ([{}], ["simsiam"]),
    ([{"lr": 0.1}, {"lr": 0.3}], ["simsiam, lr 0.1", "simsiam, lr 0.3"]),
    ([{"no_predictor": False}, {"no_predictor": True}], ["simsiam", "simsiam, no-predictor"]),
    ([{"data": "/somewhere/food-11"}, {"data": "toy"}], ["simsiam, data food-11", "simsiam, data toy"]),
    ([{"method": "moco", "lr": 1}, {"method": "simsiam"}], ["moco", "simsiam"]),  # the method tells them apart
    ([{"data_root": "a", "quiet": True}, {"data_root": "b", "stop_at_accuracy": 90.0}], ["simsiam (0)", "simsiam (1)"]),
    ([{"method": "linear", "way": "probe", "checkpoint": "r/moco/last.pt"},
      {"method": "linear", "way": "probe", "checkpoint": "r/moco/epoch-0050.pt"},
      {"method": "linear", "way": "finetune", "checkpoint": "r/simclr/last.pt", "lr": 9}],
     ["linear probe, checkpoint moco/last.pt", "linear probe, checkpoint moco/epoch-0050.pt", "linear finetune"]),
    # Another data set comes with another recipe: not all of it is said.
    ([{"data": "toy", "lr": 1, "epochs": 1, "seed": 1}, {"data": "b", "lr": 2, "epochs": 2, "seed": 2}],
     ["simsiam, data toy, seed 1, lr 1", "simsiam, data b, seed 2, lr 2"]),
    ([{"contents": {"train": [1]}}, {"contents": {"train": [2]}}], ["simsiam (0)", "simsiam (1)"]),
])
def test_shortest_names(make_run, monkeypatch, flags, expected):
    for i, args in enumerate(flags):
        make_run(str(i), **args)
    labels = plot.make_labels([plot.read_run(str(i)) for i in range(len(flags))])
    assert labels == expected


def test_only_some_figures(matplotlib, make_run, capsys):
    runs = [plot.read_run(make_run("a"))]
    assert list(panels(plot.draw(runs, ["a"], only=["std", "knn_20"]))) == [plot.TITLES["std"], "knn 20"]
    with pytest.raises(SystemExit) as end:
        plot.main(["a", "--only", "knn", "rank"])
    assert end.value.code == 2
    assert "--only rank: no such figure in these runs; there are epoch, " in capsys.readouterr().err


def test_many_runs_differ_in_more_than_colour(make_run, drawn):
    figure = drawn(*[make_run(str(i), seed=i) for i in range(16)])
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 16
    assert len({line.get_linestyle() for line in drawn("0", "1").axes[0].lines}) == 1


@pytest.mark.parametrize("ending, magic", [("PNG", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_says_the_format(matplotlib, make_run, tmp_path, capsys, ending, magic):
    make_run("$x_{"), make_run("b", lr=1)
    plot.main(["$x_{", "b", "--out", f"curves.{ending}", "--labels", "$\\frac$", "_b"])  # no formula
    assert (tmp_path / f"curves.{ending}").read_bytes().startswith(magic)
    assert capsys.readouterr().out == f"wrote curves.{ending}: $\\frac$; _b\n"


def test_a_run_that_still_goes_on(make_run, drawn, tmp_path):
    folder = make_run("a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "step": 30, "sec')
    plot.main(["a"])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert panels(drawn(folder))["loss"][0][1] == [1, 2]


def test_no_window_can_open(make_run, drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # the part that has windows cannot be imported
    plot.main([str(make_run("a"))])


def test_wrong_uses_end_in_one_clear_line(matplotlib, make_run, tmp_path, capsys):
    make_run("run"), make_run("fresh", rows=[]), make_run("untrained", rows=[dict(UNTRAINED, knn=None, knn_20=None)])
    make_run("other", rows=[{"loss": 1.0}]), make_run("numbers", rows=[3])
    make_run("binary"), make_run("unnamed"), make_run("list")
    (tmp_path / "unnamed/args.json").unlink()
    (tmp_path / "list/args.json").write_text("[]")
    (tmp_path / "binary/metrics.jsonl").write_bytes(b"\x89PNG\xff")
    (tmp_path / "plain").mkdir()
    cases = [
        (["nowhere"], "nowhere: not a run folder"),
        (["plain"], "plain: not a run folder"),
        (["run", "fresh"], "fresh: not a run folder with figures"),
        (["untrained"], "untrained: not a run folder with figures"),
        (["other"], "other: not a run folder"),
        (["numbers"], "numbers: not a run folder"),
        (["binary"], "binary: not a run folder"),
        (["unnamed"], "unnamed: not a run folder"),
        (["list"], "list: not a run folder"),
        (["run", "--out", "curves.jpeg"], "--out curves.jpeg: the ending must be one of .png, .pdf, .svg"),
        (["run", "--out", "curves"], "--out curves: the ending"),
        (["run", "--out", "nowhere/curves.png"], "nowhere/curves.png: cannot be written: No such file"),
        (["run", "--labels", "a", "b"], "--labels: 2 names for 1 runs"),
        ([], "RUN"),
    ]
    for flags, words in cases:
        with pytest.raises(SystemExit) as end:
            plot.main(flags)
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and words in err, (flags, err)
    assert not list(tmp_path.rglob("*.png"))


def test_the_reference_stands_beside_a_run(matplotlib, make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "REFERENCES", tmp_path / "known")
    run, good = make_run("a", kind="toy"), make_run("b", kind="toy", lr=0.2, losses=(-0.3, -0.9))
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "simsiam-toy.jsonl").write_text((good / "args.json").read_text() + "\n"
                                                          + (good / "metrics.jsonl").read_text())
    assert plot.main([str(run), "--reference"]) is None
    assert capsys.readouterr().out == "wrote curves.png: simsiam, lr 0.1; reference: simsiam, lr 0.2\n"
    runs = [plot.read_run(run)]
    _, reference = panels(plot.draw(runs + plot.read_references(runs), ["", ""]))["loss"]
    assert reference[2] == [-0.3, -0.9]
    (tmp_path / "known" / "simsiam-toy-low.jsonl").write_text((run / "args.json").read_text() + "\n"
                                                              + (run / "metrics.jsonl").read_text())
    assert [Path(reference.folder).stem for reference in plot.read_references(runs)] == ["simsiam-toy-low"]
    with pytest.raises(SystemExit) as end:
        plot.main([str(make_run("c", "moco", kind="photos")), "--reference"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "none for moco on photos; there are: simsiam-toy, simsiam-toy-low" in err


def test_a_picture_that_cannot_be_written_leaves_the_one_before(make_run, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = str(make_run("a"))
    plot.main([run])
    before = Path("curves.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        plot.main([run, "--against", "seconds"])
    assert end.value.code == 2 and "curves.png: cannot be written: No space" in capsys.readouterr().err
    assert Path("curves.png").read_bytes() == before


def test_every_reference_is_a_run_of_its_name():
    for file in plot.REFERENCES.glob("*.jsonl"):
        args, *rows = map(json.loads, file.read_text().splitlines())
        assert file.stem.startswith(f"{args['method']}-{args['kind']}")
        assert rows[0]["epoch"] == 0 and rows[-1]["knn"] > 0
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)), "of one run, each epoch once"


def test_without_matplotlib_one_line_says_what_to_install(make_run, monkeypatch, capsys):
    make_run("a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        plot.main(["a"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "pip install matplotlib" in err and len(err.splitlines()) == 1
