"""predict.py: answers equal to a computation by hand, in every form; files of all sorts; wrong uses."""

import argparse
import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw

import common
import harness
import knn
import pictures
import predict

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD, CLASSES = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), ["bread", "egg", "soup"]


def picture(seed, size=(40, 40)):
    """A bright bar somewhere on a dark ground, all drawn from the seed: no two sides or halves alike."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randint(0, 120) for _ in range(3)))
    x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
    box = [x * size[0], y * size[1], (x + 0.4) * size[0], (y + 0.2) * size[1]]
    ImageDraw.Draw(image).rectangle(box, fill=tuple(rng.randint(140, 255) for _ in range(3)))
    return image


def draw(path, seed, size=(40, 40), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, **save)
    return path


def write_checkpoint(path, *, method="linear", layer="layer2", classes=CLASSES, size=32, bank="toy", **changes):
    """A checkpoint with a network of random weights, and a classifier that pictures divide; -> what it holds."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.backbone = common.ResNet18(width=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = argparse.Namespace(data=str(bank), data_root="./data", cache=None, skip_unreadable=False, knn_split="val",
                              method=method, image_size=size, stem="cifar", width=4, seed=0)
    facts = argparse.Namespace(classes=classes, mean=MEAN, std=STD)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = harness.checkpoint.state_of(model, optimizer, scaler, {}, args, facts, 1, 1)
    if method == "linear":
        views = [(TF.pil_to_tensor(picture(seed)) / 255).double() for seed in range(9)]
        features = torch.stack([features_by_hand(state, view, layer) for view in views])
        weight = 0.3 * torch.randn(len(classes), features.shape[1]) / features.std(dim=0).float()
        state |= {"layer": layer, "classifier": {"weight": weight, "bias": -weight @ features.mean(dim=0).float()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | changes, path)
    return state | changes


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def ask(capsys):
    """ask(flags..., code=0) -> what the command wrote to stdout."""
    def run(*flags, code=0):
        given = predict.main([*map(str, flags), "--amp", "off", "--device", "cpu"])
        captured = capsys.readouterr()
        assert given == code, captured.err
        return captured.out

    return run


def features_by_hand(checkpoint, view, layer="layer2"):
    """view (3, s, s) in [0, 1] -> (C,) double, one picture through the network in double precision."""
    x = torch.stack([(view[c].double() - MEAN[c]) / STD[c] for c in range(3)])
    return harness.load_backbone(checkpoint).double().features(x[None], (layer,))[layer][0].detach()


def probabilities_by_hand(checkpoint, view):
    f, head = features_by_hand(checkpoint, view), checkpoint["classifier"]
    powers = [torch.exp(sum(w * v for w, v in zip(row.double(), f, strict=True)) + b.double())
              for row, b in zip(head["weight"], head["bias"], strict=True)]
    return [(power / sum(powers)).item() for power in powers]


def squashed(path, size=32):
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return TF.pil_to_tensor(image) / 255


# ---- answers -----------------------------------------------------------------------------------


def test_json_equals_a_computation_by_hand(ask, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run/linear.pt")
    files = [str(draw(tmp_path / f"{name}.png", name)) for name in (5, 3, 9, 1, 7, 2)]
    rows = json.loads(ask("--checkpoint", "run", "--json", *files))
    assert [row["file"] for row in rows] == files  # in the order given, not sorted
    assert len({row["class"] for row in rows}) > 1
    for row in rows:
        p = probabilities_by_hand(checkpoint, squashed(row["file"]))
        best, second, _ = sorted(range(3), key=lambda c: -p[c])
        assert (row["class"], row["class_index"], row["runner_up"]) == (CLASSES[best], best, CLASSES[second])
        assert row["probability"] == pytest.approx(p[best], abs=2e-5)
        assert row["runner_up_probability"] == pytest.approx(p[second], abs=2e-5)
        assert list(row["probabilities"]) == CLASSES
        assert list(row["probabilities"].values()) == pytest.approx(p, abs=2e-5) and "error" not in row


def test_csv_and_table_say_the_same_as_json(ask, tmp_path):
    write_checkpoint(tmp_path / "linear.pt")
    for i in range(4):
        draw(tmp_path / f"a, b/{i}.png", i)
    flags = ["--checkpoint", "linear.pt", "a, b", "gone.png"]
    rows = json.loads(ask(*flags, "--json", code=1))
    table = list(csv.DictReader(io.StringIO(ask(*flags, "--csv", code=1))))
    assert list(table[0]) == [*predict.FIELDS, "error"]
    for one, row in zip(table, rows, strict=True):
        assert one == {name: "" if row.get(name) is None else str(row[name]) for name in one}
    header, *lines = ask(*flags, code=1).splitlines()
    assert header.split() == ["file", "class", "prob.", "runner-up"]
    for line, row in zip(lines[:-1], rows[:-1], strict=True):
        shares = f"{100 * row['probability']:.1f} %", f"{100 * row['runner_up_probability']:.1f} %"
        assert line.split("  ")[0] == row["file"]
        rest = f"{row['class']} {shares[0]} {row['runner_up']} {shares[1]}"
        assert " ".join(line.removeprefix(row["file"]).split()) == rest
    assert lines[-1].split(maxsplit=1) == ["gone.png", "unreadable: No such file or directory"]
    write_checkpoint(tmp_path / "linear.pt", classes=["bread"])  # a single class has no runner-up
    assert ask(*flags, code=1).splitlines()[1].split() == ["a,", "b/0.png", "bread", "100.0", "%"]
    assert ask(*flags, "--csv", code=1).splitlines()[1] == '"a, b/0.png",bread,0,1.0,,,'


def test_accuracy_is_exactly_that_of_the_evaluation(ask, tmp_path):
    """Photos of every shape: the answers about a split are those of knn.extract on the packed split."""
    rng = random.Random(0)
    for split, count in (("train", 2), ("val", 21)):
        for i in range(count * 3):
            size = rng.randint(30, 300), rng.randint(30, 300)
            draw(tmp_path / "set" / split / CLASSES[i % 3] / f"{i}.jpg", i, size)
    checkpoint = write_checkpoint(tmp_path / "run/linear.pt", size=72)
    dataset = pictures.pack(pictures.open_source("set"), 72, quiet=True)
    dataset.mean, dataset.std = MEAN, STD
    autocast, _ = common.pick_precision("off", torch.device("cpu"))
    network = knn.Layers(harness.load_backbone(checkpoint), ("layer2",))
    features = knn.extract(network, dataset.val, dataset, torch.device("cpu"), autocast)["layer2"]
    head = checkpoint["classifier"]
    expected = (features @ head["weight"].T + head["bias"]).argmax(dim=1).tolist()
    rows = json.loads(ask("--checkpoint", "run", "--json", *dataset.val.paths))
    assert [row["class_index"] for row in rows] == expected and len(set(expected)) > 1


def test_without_a_classifier_the_training_images_vote(ask, tmp_path, capsys):
    for i in range(12):
        draw(tmp_path / "set/train" / CLASSES[i % 2] / f"{i}.png", i)
        draw(tmp_path / "set/val" / CLASSES[i % 2] / f"{i}.png", 100 + i)
    checkpoint = write_checkpoint(tmp_path / "run/last.pt", method="moco", classes=["x"], bank=tmp_path / "set")
    bank = sorted((tmp_path / "set/train").glob("*/*"))
    features = torch.stack([features_by_hand(checkpoint, squashed(file), "layer4") for file in bank])
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in bank])
    for k, temperature in ((5, 0.1), (200, 0.03)):
        rows = json.loads(ask("--checkpoint", "run", "--json", "set/val", "--k", k, "--temperature", temperature))
        assert len(rows) == 12
        for row in rows:
            query = features_by_hand(checkpoint, squashed(row["file"]), "layer4")
            votes = knn.knn_predict(query[None], features, labels, 2, min(k, 12), temperature)[0]
            share = (votes / votes.sum()).tolist()
            assert list(row["probabilities"].values()) == pytest.approx(share, abs=2e-3)
            assert list(row["probabilities"]) == CLASSES[:2]  # those of the images that vote
    for row in json.loads(ask("--checkpoint", "run", "--json", "set/val", "--k", 1)):
        assert row["probability"] == 1 and row["runner_up"] is row["runner_up_probability"] is None  # one vote
    predict.main(["--checkpoint", "run", "set/val", "--amp", "off"])
    captured = capsys.readouterr()
    assert "12 nearest of 12" in captured.err and captured.out.split()[:3] == ["file", "class", "prob."]


# ---- pictures ----------------------------------------------------------------------------------


def test_a_wide_picture_is_cut_not_squashed(ask, tmp_path):
    """One colour in the middle, others outside of the central square, which the network must not see."""
    checkpoint = write_checkpoint(tmp_path / "linear.pt")
    wide = Image.new("RGB", (160, 40), (20, 30, 90))
    wide.paste((190, 120, 60), (40, 0, 120, 40))  # wider than the square, for the filter blurs
    wide.save(tmp_path / "wide.png")
    (row,) = json.loads(ask("--checkpoint", "linear.pt", "--json", "wide.png"))
    middle = torch.tensor([190, 120, 60]).view(3, 1, 1).expand(3, 32, 32) / 255
    p = list(row["probabilities"].values())
    assert p == pytest.approx(probabilities_by_hand(checkpoint, middle), abs=1e-3)
    assert p != pytest.approx(probabilities_by_hand(checkpoint, squashed("wide.png")), abs=0.1)


def test_a_picture_turned_by_exif_has_the_answer_of_its_upright_copy(ask, tmp_path):
    write_checkpoint(tmp_path / "linear.pt")
    upright = draw(tmp_path / "upright.png", 4, (90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.open(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.open(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    flags = ["--checkpoint", "linear.pt", "--json"]
    one, two, lying = json.loads(ask(*flags, "upright.png", "turned.png", "lying.png"))
    shares = [list(row["probabilities"].values()) for row in (one, two, lying)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert shares[0] != pytest.approx(shares[2], abs=0.04)


# ---- files -------------------------------------------------------------------------------------


def test_folders_are_walked_in_natural_order(ask, tmp_path):
    write_checkpoint(tmp_path / "linear.pt")
    for name in ("f/10.png", "f/2.png", "f/sub/1.png", "f/.hidden.png", "f/.cache/1.png", "g/z.png"):
        draw(tmp_path / name, 0)
    (tmp_path / "f/notes.txt").write_text("no picture")
    (tmp_path / "f/sub/loop").symlink_to(tmp_path / "f")
    draw(tmp_path / "g/odd.ending", 0, format="PNG")
    rows = json.loads(ask("--checkpoint", "linear.pt", "--json", "g/z.png", "f", "g/odd.ending"))
    assert [row["file"] for row in rows] == ["g/z.png", "f/2.png", "f/10.png", "f/sub/1.png", "g/odd.ending"]
    assert all(row["class"] for row in rows)  # named by hand, a file is tried whatever its ending


def test_every_picture_of_a_folder_has_its_line_whatever_its_name(tmp_path, ask, capsys):
    write_checkpoint(tmp_path / "run/linear.pt")
    for name in ("no ending", "photo.jpg?w=300"):
        os.rename(draw(tmp_path / "x/a.png", 3), tmp_path / "x" / name)
    draw(tmp_path / "x/a.png", 5)
    (tmp_path / "x/phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "x/notes.txt").write_text("no picture")
    assert predict.main(["--checkpoint", "run", "x", "--json", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    rows = {os.path.basename(row["file"]): row.get("error") for row in json.loads(out)}
    assert rows == {"a.png": None, "no ending": None, "photo.jpg?w=300": None, "phone.heic": "no image"}
    assert "passed over: 1 file that is no image, such as notes.txt" in err


def test_unreadable_files_have_their_lines_and_stop_nothing(ask, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "linear.pt")
    good = [str(draw(tmp_path / f"{i}.png", i).name) for i in range(9)]
    flags = ["--checkpoint", "linear.pt", "--json"]
    alone = json.loads(ask(*flags, *good))
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    mixed = ["gone.png", *good[:4], "text.jpg", "empty.png", *good[4:], "cut.png"]
    for chunk in (500, 2):  # also where a whole chunk is unreadable
        monkeypatch.setattr(predict, "CHUNK", chunk)
        rows = json.loads(ask(*flags, *mixed, code=1))
        assert [row["file"] for row in rows] == mixed
        for one, two in zip(alone, [row for row in rows if "error" not in row], strict=True):
            assert one["file"] == two["file"] and one["class"] == two["class"]
            assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)
        errors = {row["file"]: row["error"] for row in rows if "error" in row}
        assert errors["gone.png"] == "No such file or directory" and errors["empty.png"] == "empty file"
        assert set(errors) == {"gone.png", "text.jpg", "empty.png", "cut.png"}
        assert all(row["class"] is row["probability"] is None for row in rows if "error" in row)
    assert "unreadable: no image" in ask("--checkpoint", "linear.pt", "text.jpg", code=1)


# ---- what one sees -----------------------------------------------------------------------------


def test_table_fits_80_columns_and_stays_aligned(ask, tmp_path):
    classes = ["bread with a great deal of butter", "bread with a great deal of cheese", "egg"]
    write_checkpoint(tmp_path / "linear.pt", classes=classes)
    names = ["a.png", "x" * 120 + "end.png", "line\nbreak\x1b[31m.png", "caf\u00e9.png"]
    for i, name in enumerate(names):
        draw(tmp_path / name, i)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    lines = ask("--checkpoint", "linear.pt", *names, "cut.png", "gone" * 20, code=1).splitlines()
    assert len(lines) == 1 + len(names) + 2 and not any("\x1b" in line for line in lines)
    assert all(len(line) <= 79 for line in lines)
    column, second = lines[0].index("class"), lines[0].index("runner-up")
    answers = [line for line in lines[1:] if "%" in line]
    assert len(answers) == len(names)
    for line in answers:
        for start in (column, second):
            assert line[start - 2 : start] == "  " and line[start] in ".e"
            assert any(end in line[start:] for end in ("utter", "heese", "egg"))  # cut, but still told apart
        assert line.index(" %") == answers[0].index(" %") == second - 4
    assert answers[1].startswith("...xxx") and "end.png" in answers[1] and "line\\nbreak\\x1b[31m.png" in answers[2]
    assert lines[-1].startswith("...") and lines[-1].endswith("  unreadable: No such file or directory")


def test_neighbours_are_framed_by_the_predicted_class(ask, tmp_path, capsys, monkeypatch):
    """Dark training images are "night", bright ones "day"; the classifier calls everything "day"."""
    monkeypatch.setattr(predict, "CHUNK", 7)  # the picture shows files of all chunks
    for i in range(5):  # one of each is held out
        for name, grey in (("night", 10 * i), ("day", 215 + 10 * i)):
            path = tmp_path / "set/train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (grey, grey, grey)).save(path)
    for i in range(50):
        query = Image.new("RGB", (128, 32), "black")
        query.paste((220 + i % 9, 235, 230), (32, 0, 96, 32))  # more than the central square
        query.save(tmp_path / f"{i}.png")
    flags = [f"{i}.png" for i in range(50)] + ["gone.png", "--neighbours", "grid.png", "--json"]
    # The classes of the run stand in another order than those of its data: names count, not numbers.
    write_checkpoint(tmp_path / "linear.pt", classes=["night", "day"], bank=tmp_path / "set",
                     classifier={"weight": torch.zeros(2, 8), "bias": torch.tensor([0.0, 9.0])})
    predict.main(["--checkpoint", "linear.pt", *flags, "--amp", "off"])
    captured = capsys.readouterr()
    assert {row["class"] for row in json.loads(captured.out)[:50]} == {"day"}
    assert "17 of 51" in captured.err and "set" in captured.err
    picture = TF.pil_to_tensor(Image.open("grid.png"))
    step = 96 + 6 + 2
    assert picture.shape[1:] == (2 + 17 * step, 2 + 9 * step)
    for row in range(17):
        frames = [tuple(picture[:, 3 + row * step, 3 + column * step].tolist()) for column in range(9)]
        bright = [picture[:, 50 + row * step, 50 + column * step].float().mean() > 128 for column in range(9)]
        assert max(frames[0]) - min(frames[0]) < 3  # the query's frame is grey
        assert picture[:, 50 + row * step, 8].min() > 200  # no black edges: shown as the network sees it
        for (red, green, _), day in zip(frames[1:], bright[1:], strict=True):
            assert green > 2 * red if day else red > 2 * green
        assert sum(bright[1:]) == 4
    write_checkpoint(tmp_path / "run/last.pt", method="simclr", bank=tmp_path / "set")
    assert json.loads(ask("--checkpoint", "run", *flags, code=1))[0]["class"] == "day"

    (tmp_path / "taken.png").mkdir()
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", "run", "0.png", "--json", "--neighbours", "taken.png"])
    captured = capsys.readouterr()
    assert captured.out == "" and "--neighbours: taken.png" in captured.err  # said before any work


def test_neighbours_need_no_labels(ask, tmp_path, capsys):
    for i in range(5):
        draw(tmp_path / f"loose/{i}.png", i)
    draw(tmp_path / "a.png", 9)
    bread = {"classifier": {"weight": torch.zeros(3, 8), "bias": torch.tensor([9.0, 0, 0])}}
    for method, answer, changes in (("simclr", None, {}), ("linear", "bread", bread)):
        write_checkpoint(tmp_path / "run.pt", method=method, bank=tmp_path / "loose", **changes)
        flags = ["--checkpoint", "run.pt", "a.png", "gone.png", "--neighbours", "grid.png"]
        rows = json.loads(ask(*flags, "--json", code=1))
        assert [row["class"] for row in rows] == [answer, None] and "error" in rows[1] and "error" not in rows[0]
        assert list(rows[0])[:6] == list(predict.FIELDS) and len(rows[0]["probabilities"]) == (3 if answer else 0)
        assert next(csv.DictReader(io.StringIO(ask(*flags, "--csv", code=1))))["class"] == (answer or "")
        predict.main([*flags, "--amp", "off"])
        captured = capsys.readouterr()
        assert captured.out.splitlines()[1].split()[:2] == ["a.png", *filter(None, [answer])]
        assert "grey: they have no labels" in captured.err
        assert ("no class to tell" in captured.err) == (answer is None)
        picture = TF.pil_to_tensor(Image.open("grid.png"))[:, 3, 3::104]
        assert picture.shape[1] == 6 and (picture.amax(0).int() - picture.amin(0)).max() < 3  # grey frames


def wrong_uses(tmp_path):
    """name -> (flags, what the line must name)"""
    write_checkpoint(tmp_path / "good/linear.pt")
    write_checkpoint(tmp_path / "infinite.pt", classifier={"weight": torch.full((3, 8), torch.inf),
                                                           "bias": torch.zeros(3)})
    draw(tmp_path / "loose/0.png", 0)
    write_checkpoint(tmp_path / "unlabelled/last.pt", method="rotnet", bank=tmp_path / "loose")
    write_checkpoint(tmp_path / "moved/last.pt", method="rotnet", bank="./moved-away")
    (tmp_path / "empty").mkdir()
    return {
        "no image": (["--checkpoint", "good"], ["images"]),
        "no checkpoint": (["loose"], ["--checkpoint"]),
        "checkpoint missing": (["--checkpoint", "nowhere", "loose"], ["nowhere"]),
        "no images in folder": (["--checkpoint", "good", "empty"], ["empty", "no images"]),
        "not finite": (["--checkpoint", "infinite.pt", "loose"], ["infinite.pt", "--amp off"]),
        "no labels": (["--checkpoint", "unlabelled", "loose"], ["--data", "no labelled"]),
        "data gone": (["--checkpoint", "moved", "loose"], ["moved-away"]),
        "data of no use": (["--checkpoint", "good", "loose", "--data", "toy"], ["--data", "--neighbours"]),
        "both forms": (["--checkpoint", "good", "loose", "--json", "--csv"], ["--json", "--csv"]),
        "no picture name": (["--checkpoint", "good", "loose", "--neighbours", "grid.txt"], ["--neighbours", ".png"]),
        "no such folder": (["--checkpoint", "good", "loose", "--neighbours", "no/grid.png"], ["--neighbours"]),
        "no such device": (["--checkpoint", "good", "loose", "--device", "cuda:99"], ["--device"]),
        "no neighbours": (["--checkpoint", "good", "loose", "--k", "0"], ["--k"]),
    }


def test_wrong_uses_end_in_one_clear_line(tmp_path, capsys):
    for name, (flags, words) in wrong_uses(tmp_path).items():
        with pytest.raises(SystemExit) as end:
            predict.main([*flags] if "--csv" in flags else [*flags, "--json"])
        captured = capsys.readouterr()
        *lines, last = captured.err.strip().splitlines()
        assert end.value.code == 2 and "error: " in last, (name, captured.err)
        assert all(word in last for word in words), (name, captured.err)
        assert not lines or name == "no labels", (name, captured.err)  # there its description comes first
        assert captured.out == "", name


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes, and signals, as on Linux")
def test_as_a_program_in_a_pipe(tmp_path):
    write_checkpoint(tmp_path / "linear.pt")
    name = b"caf\xe9.png"  # Latin-1
    draw(tmp_path / "0.png", 0)
    os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/" + name)
    command = [sys.executable, ROOT / "predict.py", "--checkpoint", "linear.pt", "--csv", *[name] * 600]
    environment = dict(os.environ, OMP_NUM_THREADS="1", LC_ALL="C", PYTHONUNBUFFERED="1")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert [process.stdout.readline().split(b",")[0] for _ in range(2)] == [b"file", name]
        process.stdout.close()  # as `| head -2` does, before the second chunk is answered
        assert process.stderr.read() == b""
