"""Wrong uses of every program: one line that names the flag or file and the fix, exit code 2, nothing begun."""

import importlib
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import harness

TINY = ["--width", "4", "--image-size", "16", "--stem", "cifar", "--batch-size", "4", "--amp", "off", "--quiet",
        "--max-steps", "1", "--knn-every", "0"]


def picture(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), tuple(rng.randint(0, 255) for _ in range(3))).save(path)


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of things to get wrong; the programs run inside."""
    place, rng = tmp_path_factory.mktemp("place"), random.Random(0)
    for i in range(8):
        picture(place / "few" / f"class{i % 2}" / f"{i}.jpg", rng)
        picture(place / "loose" / f"{i}.jpg", rng)
        picture(place / "one" / "only" / f"{i}.jpg", rng)
        picture(place / "noval" / f"class{i}" / "0.jpg", rng)
        picture(place / "onlyval" / "val" / "a" / f"{i}.jpg", rng)
        for split in ("train", "val", "valid"):
            picture(place / "twice" / split / "a" / f"{i}.jpg", rng)
        picture(place / "newclass" / "train" / "a" / f"{i}.jpg", rng)
        picture(place / "newclass" / "val" / "b" / f"{i}.jpg", rng)
        picture(place / "mostlyloose" / f"{i}.jpg", rng)
        picture(place / "mostlyloose" / "old" / f"{i % 3}.jpg", rng)
        picture(place / "notrain" / "cat" / f"{i}.jpg", rng)
        picture(place / "notrain" / "val" / "cat" / f"{i}.jpg", rng)
    (place / "empty").mkdir()
    shutil.copytree(place / "few", place / "dirty")
    (place / "dirty" / "class0" / "text.jpg").write_text("this is no picture")
    (place / "file").write_text("a file")
    (place / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save({"model": Evil()}, place / "evil.pt")
    cache = ["--cache", str(place / "cache")]
    for name, data, more in (("simsiam", "few", ["--dim", "8"]), ("moco", "few", ["--queue-size", "8"]),
                             ("rotnet", "few", []), ("unlabelled", "loose", ["--dim", "8"])):
        method = importlib.import_module("simsiam" if name == "unlabelled" else name)
        method.main(["--data", str(place / data), "--out", str(place / name), *TINY, *cache, *more])
    flags = ["--checkpoint", str(place / "simsiam"), "--out", str(place / "linear"), "--max-steps", "1", "--quiet"]
    importlib.import_module("linear").main([*flags, "--amp", "off", *cache])
    old = torch.load(place / "simsiam" / "last.pt", weights_only=True)
    torch.save(old | {"version": 0}, place / "old.pt")
    torch.save({"weight": torch.zeros(3)}, place / "weights.pt")
    torch.save(common.ResNet18(stem="imagenet", width=4).state_dict(), place / "net.pt")
    torch.save(common.ResNet18(width=4).state_dict() | {"layer1.2.bn1.bias": torch.zeros(4)}, place / "deep.pt")
    return place


# program, flags, what the line must name
CASES = [
    # the data
    ("simsiam", "--data ./nowhere", "--data ./nowhere"),
    ("simsiam", "--data cifar11", "cifar11 cifar10"),
    ("simsiam", "--data cifar10", "--data cifar10 --download --data-root"),
    ("simsiam", "--data stl10 --data-root few", "stl10 --download"),
    ("simsiam", "--data empty", "empty"),
    ("simsiam", "--data file", "--data file"),
    ("simsiam", "--data onlyval", "onlyval train"),
    ("simsiam", "--data twice", "val valid"),
    ("simsiam", "--data newclass", "b"),
    ("simsiam", "--data mostlyloose", "mostlyloose 8 pictures"),
    ("simsiam", "--data notrain", "notrain train val supported"),
    ("simsiam", "--data dirty --batch-size 4", "text.jpg --skip-unreadable"),
    ("simsiam", "--data few --batch-size 7", "--batch-size 7 6"),
    ("moco", "--data few --batch-size 64", "--batch-size 64 6"),
    ("simsiam", "--data few --batch-size 4 --cache file", "file --cache"),
    ("simsiam", "--download", "--download --data"),
    # numbers and words
    ("simsiam", "--stem vgg", "--stem"),
    ("simsiam", "--learning-rate 1", "--learning-rate --lr?"),
    ("simsiam", "--epoch 5", "--epoch --epochs?"),
    # other programs' words; underscores are as good as dashes
    ("moco", "--moco_k 8", "--moco_k --queue-size?"),
    ("moco", "--save-steps 50", "--save-steps --keep-every?"),
    ("moco", "--pretrained net.pt", "--pretrained --init?"),
    ("simsiam", "--freeze", "--freeze linear.py --probe?"),
    ("rotnet", "--threshold=0.95", "--threshold --stop-at-accuracy?"),
    ("rotnet", "--batch_size=x", "--batch-size x"),
    ("linear", "--pretrained net.pt", "--pretrained --checkpoint?"),
    ("linear", "--init net.pt", "--init --weights?"),
    ("linear", "--optimizer adam", "adamw"),
    ("knn", "--neighbors grid.png", "--neighbours"),
    ("simsiam", "--seed 99999999999999999999", "--seed 99999999999999999999 at most"),
    ("simsiam", "--data few --epochs 1" + 30 * "0", "--epochs"),
    ("simsiam", "--data few --batch-size 4 --width 1000000000", "--width 1000000000"),
    ("simsiam", "--data few --batch-size 4 --width 4 --dim 1000000000000000000", "--dim 1000000000000000000"),
    ("moco", "--data few --batch-size 4 --width 4 --queue-size 1000000000000000000", "--queue-size"),
    ("simsiam", "--data few --batch-size 1000000000000000000", "--batch-size"),
    ("simsiam", "--data few --batch-size 4 --image-size 1000000000", "disk full"),
    ("simsiam", "--lr 1e308", "--lr 1e308"),
    ("moco", "--temperature 1e-300", "--temperature 1e-300"),
    ("simsiam", "--knn-k 1" + 30 * "0", "--knn-k"),
    ("simsiam", "--epochs many", "--epochs many"),
    ("simsiam", "--epochs 0", "--epochs 1"),
    ("simsiam", "--epochs 2.5", "--epochs 2.5"),
    ("simsiam", "--lr 0", "--lr 0"),
    ("simsiam", "--lr nan", "--lr nan"),
    ("simsiam", "--lr inf", "--lr inf"),
    ("simsiam", "--lr=-0.1", "--lr -0.1"),
    ("simsiam", "--lr 0.1 --step-lr 0.1", "--lr --step-lr"),
    ("simsiam", "--step-lr 0", "--step-lr 0"),
    ("linear", "--checkpoint simsiam --step-lr 1 --lr 1", "--lr --step-lr"),
    ("simsiam", "--batch-size 1", "--batch-size 2"),
    ("simsiam", "--weight-decay=-1", "--weight-decay"),
    ("simsiam", "--warmup-epochs=-1", "--warmup-epochs"),
    ("simsiam", "--seed=-1", "--seed"),
    ("simsiam", "--image-size 4", "--image-size 8"),
    ("simsiam", "--width 0", "--width"),
    ("simsiam", "--max-steps 0", "--max-steps"),
    ("simsiam", "--knn-every=-1", "--knn-every"),
    ("simsiam", "--knn-k 0", "--knn-k"),
    ("simsiam", "--knn-t 0", "--knn-t"),
    ("simsiam", "--knn-split train", "--knn-split val test"),
    ("simsiam", "--save-every 0", "--save-every"),
    ("simsiam", "--save-every 0min", "--save-every"),
    ("simsiam", "--save-every soon", "--save-every"),
    ("simsiam", "--amp int8", "--amp"),
    ("simsiam", "--amp fp16 --device cpu", "--amp fp16 bf16"),
    ("simsiam", "--device cuda:99", "--device cuda:99 auto"),
    ("simsiam", "--device tpu", "--device tpu auto"),
    ("simsiam", "--min-crop 0", "--min-crop"),
    ("simsiam", "--min-crop 1.5", "--min-crop 1"),
    ("simsiam", "--blur 2", "--blur"),
    ("simsiam", "--proj-layers 4", "--proj-layers"),
    ("moco", "--temperature 0", "--temperature"),
    ("moco", "--momentum-encoder 1.5", "--momentum-encoder"),
    ("moco", "--queue-size 0", "--queue-size"),
    ("moco", "--data few --batch-size 4 --bn-splits 3", "--bn-splits 3 2"),
    ("simclr", "--optimizer adam", "--optimizer"),
    ("simclr", "--optimizer lars", "--optimizer lars sgd --lr --step-lr"),
    ("simclr", "--jitter-strength 9", "--jitter-strength"),
    ("simclr", "--grey=-1", "--grey"),
    ("rotnet", "--stop-at-accuracy 0", "--stop-at-accuracy"),
    ("rotnet", "--stop-at-accuracy 0.95", "--stop-at-accuracy 0.95 25 95?"),
    ("rotnet", "--stop-at-accuracy 25", "--stop-at-accuracy 25 more"),
    ("rotnet", "--resume rotnet --stop-at-accuracy 0.95", "--stop-at-accuracy 0.95 25 95?"),
    ("rotnet", "--stop-at-accuracy 90 --knn-split test", "--stop-at-accuracy --knn-split"),
    ("rotnet", "--stop-at-accuracy 90 --data loose --batch-size 4", "--stop-at-accuracy validation"),
    ("rotnet", "--focal-gamma=-1", "--focal-gamma"),
    # where it goes
    ("simsiam", "--data few --batch-size 4 --out file", "--out file"),
    ("simsiam", "--data few --batch-size 4 --out file/below", "--out file/below"),
    ("simsiam", "--out " + 300 * "x", "--out too long"),
    ("simsiam", "--out=", "--out empty"),
    ("simsiam", "--resume " + 300 * "x", "--resume too long"),
    ("simsiam", "--out simsiam", "--out simsiam --resume"),
    ("simsiam", "--data few --batch-size 4 --views-png nowhere/views.png", "nowhere/views.png"),
    ("simsiam", "--data few --batch-size 4 --views-png views.xyz", "views.xyz"),
    # weights from elsewhere
    ("simsiam", "--init nowhere.pth", "nowhere.pth"),
    ("simsiam", "--init weights.pt", "weights.pt layer1.0.conv1.weight"),
    ("moco", "--init evil.pt", "evil.pt state_dict()"),
    ("simclr", "--init deep.pt", "deep.pt layer1.2.bn1.bias"),
    ("rotnet", "--init net.pt --stem cifar", "--stem cifar --init imagenet"),
    ("simsiam", "--init net.pt --width 8", "--width 8 --init 4"),
    ("simsiam", "--resume simsiam --init net.pt", "--init"),
    ("knn", "--weights deep.pt --data few", "deep.pt layer1.2.bn1.bias"),
    ("knn", "--weights net.pt --checkpoint simsiam", "--weights --checkpoint"),
    ("knn", "--weights net.pt --projector", "--weights --projector"),
    ("knn", "--checkpoint simsiam --image-size 8", "--image-size --checkpoint"),
    ("knn", "--checkpoint linear --projector", "--projector linear"),
    ("linear", "--weights weights.pt", "weights.pt layer1.0.conv1.weight"),
    ("linear", "--weights net.pt --stem cifar --data few", "--stem cifar --weights imagenet"),
    ("linear", "--from-scratch --data loose", "loose labelled"),
    # going on with a run
    ("simsiam", "--resume broken.pt", "broken.pt"),
    ("simsiam", "--resume nowhere", "nowhere"),
    ("simsiam", "--resume empty", "empty"),
    ("simsiam", "--resume evil.pt", "evil.pt code"),
    ("simsiam", "--resume weights.pt", "weights.pt"),
    ("simsiam", "--resume old.pt", "old.pt form"),
    ("simsiam", "--resume moco", "moco.py"),
    ("simsiam", "--resume simsiam --width 8", "--width 4"),
    ("simsiam", "--resume simsiam --batch-size 8", "--batch-size 4"),
    ("simsiam", "--resume simsiam --out elsewhere", "--out simsiam"),
    ("simsiam", "--resume simsiam --dim 16 --max-steps 2", "--resume projector.6.weight [8, [16,"),
    ("simsiam", "--seed 5 --resume", "--resume simsiam"),
    # kNN
    ("knn", "", "--checkpoint"),
    ("knn", "--checkpoint broken.pt", "broken.pt"),
    ("knn", "--checkpoint " + 300 * "x", "--checkpoint too long"),
    ("knn", "--checkpoint simsiam --k 1" + 30 * "0", "--k"),
    ("knn", "--checkpoint simsiam --layer layer5", "--layer"),
    ("knn", "--checkpoint simsiam --k 0", "--k"),
    ("knn", "--checkpoint simsiam --temperature 0", "--temperature"),
    ("knn", "--checkpoint rotnet --projector", "--projector rotnet"),
    ("knn", "--checkpoint simsiam --projector --layer layer3", "--projector --layer"),
    ("knn", "--checkpoint simsiam --split test", "test"),
    ("knn", "--checkpoint unlabelled", "labelled --neighbours"),
    ("knn", "--checkpoint simsiam --data ./nowhere", "--data ./nowhere"),
    ("knn", "--checkpoint simsiam --neighbours nowhere/grid.png", "--neighbours nowhere/grid.png"),
    ("knn", "--checkpoint simsiam --map map.jpg", "--map map.jpg .png"),
    ("knn", "--checkpoint simsiam --features nowhere/f.npz", "--features nowhere/f.npz"),
    ("knn", "--checkpoint simsiam --features f.csv", "--features f.csv .npz"),
    ("knn", "--checkpoint simsiam --map a.png --neighbours a.png", "--map a.png --neighbours"),
    ("knn", "--checkpoint simsiam --split train", "--split train --features"),
    # labels
    ("linear", "", "--checkpoint --weights --from-scratch"),
    ("linear", "--checkpoint nowhere", "nowhere"),
    ("linear", "--checkpoint linear", "--checkpoint simsiam"),
    ("linear", "--checkpoint simsiam --probe --finetune", "--finetune --probe"),
    ("linear", "--checkpoint simsiam --label-fraction 0", "--label-fraction"),
    ("linear", "--checkpoint simsiam --label-fraction 1.5", "--label-fraction"),
    ("linear", "--checkpoint simsiam --layer layer5", "--layer"),
    ("linear", "--checkpoint simsiam --finetune --layer layer2", "--layer --cached"),
    ("linear", "--checkpoint simsiam --no-validation", "--no-validation --test"),
    ("linear", "--checkpoint simsiam --test", "test honest validation"),
    ("linear", "--checkpoint simsiam --optimizer lars", "--optimizer --lr"),
    ("linear", "--checkpoint simsiam --stop-at-accuracy 0.95", "--stop-at-accuracy 0.95 50 95?"),
    ("linear", "--checkpoint simsiam --stop-at-accuracy 50", "--stop-at-accuracy 50 more"),
    ("linear", "--checkpoint simsiam --focal-gamma=-1", "--focal-gamma"),
    ("linear", "--checkpoint simsiam --batch-size 7", "--batch-size 7 6"),
    ("linear", "--checkpoint simsiam --data one", "one class"),
    ("linear", "--checkpoint simsiam --data loose", "loose labelled"),
    ("linear", "--checkpoint simsiam --data noval", "noval val"),
    # pictures, curves, weights
    ("predict", "", "--checkpoint"),
    ("predict", "--checkpoint linear", "images"),
    ("predict", "--checkpoint nowhere loose", "nowhere"),
    ("predict", "--checkpoint linear empty", "empty"),
    ("predict", "--checkpoint linear loose --json --csv", "--json --csv"),
    ("predict", "--checkpoint unlabelled loose", "labelled --neighbours"),
    ("predict", "--checkpoint linear loose --k 5", "--k classifier"),
    ("knn", f"--checkpoint simsiam --program {Path(common.__file__).with_name('moco.py')}", "moco.py simsiam"),
    ("knn", "--weights net.pt --program moco.py", "--program"),
    ("knn", "--checkpoint linear --projector", "--projector linear"),
    ("knn", "--checkpoint simsiam --data one", "two classes"),
    ("plot", "simsiam --diagnose --reference", "--diagnose --reference"),
    ("plot", "", "RUN"),
    ("plot", "nowhere", "nowhere"),
    ("plot", "few", "few"),
    ("plot", "simsiam --out curves.xyz", "--out curves.xyz .png"),
    ("plot", "simsiam --labels a b", "--labels"),
    ("export", "simsiam", "OUT"),
    ("export", "broken.pt backbone.pth", "broken.pt"),
    ("export", "simsiam backbone.onnx", "backbone.onnx .pth"),
]


@pytest.mark.parametrize("program, flags, words", CASES, ids=[f"{p} {f}" for p, f, _ in CASES])
def test_wrong_use(place, monkeypatch, capsys, program, flags, words):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    before, began = set(place.iterdir()), time.perf_counter()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(program).main(flags.split())
    out, err = capsys.readouterr()
    said = err.replace("\r", "\n").strip().splitlines()
    err = said.pop()
    assert end.value.code == 2, err
    assert "error: " in err and "Traceback" not in " ".join(said)
    assert not said or program == "predict"  # which says on stderr what it recognised before that
    assert all(word.lower() in err.lower() for word in words.split()), err
    assert "code from a checkpoint ran" not in out
    assert time.perf_counter() - began < 10
    assert set(place.iterdir()) - before <= {place / "cache"}  # no run was begun


def test_too_little_space_is_said_before_training(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SystemExit) as end:
        importlib.import_module("simsiam").main(["--data", "few", "--out", "full", *TINY, "--cache", "cache"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "--out full" in err and "make room" in err
    assert not (place / "full").exists()


def test_a_folder_of_one_class_and_one_without_validation_train(place, monkeypatch, capsys):
    """Neither is wrong for training without labels; what cannot be measured is said."""
    monkeypatch.chdir(place)
    for data, word in (("one", ""), ("noval", "no labelled val images")):
        flags = [flag for flag in TINY if flag != "--quiet"]
        importlib.import_module("simsiam").main(["--data", data, "--out", f"of-{data}", *flags, "--cache", "cache"])
        out = capsys.readouterr().out
        assert word in out and "next    python knn.py" in out  # linear.py would refuse them
        assert harness.load_checkpoint(f"of-{data}")["step"] == 1
