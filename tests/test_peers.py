"""bench/peers.py: its machinery and the plain peers on a few pictures, and lightly's where it is installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import common
import pictures
import rotnet
import simclr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import peers  # noqa: E402
import rivals  # noqa: E402

NORMAL = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 pictures to train on and 16 to test with, of two classes, which differ in brightness."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for split, count in (("train", 64), ("test", 16)):
        for i in range(count):
            file = folder / split / f"class{i % 2}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 128 * (1 + i % 2), (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(file)
    return folder


@pytest.fixture
def flags(data, tmp_path):
    return ["--data", str(data), "--cache", str(data / "cache"), "--out", str(tmp_path / "out"), "--width", "4",
            "--batch-size", "16", "--workers", "0", "--device", "cpu", "--amp", "off"]


@pytest.fixture
def train(flags, tmp_path):
    """train(pair, folder's name, flags...) -> (its points, its last checkpoint)"""

    def start(pair, name, *more):
        args = peers.parse_args(["accuracy", *flags, "--only", pair, *more])
        dataset = pictures.pack(pictures.open_source(args.data, holdout=0.0), 32, args.cache, ("train", "test"), True)
        folder, device = tmp_path / name, torch.device("cpu")
        folder.mkdir(exist_ok=True)
        peers.train_peer(pair, args, dataset, device, folder)
        return (peers.points(pair.split("-")[0], args, dataset, device, folder),
                torch.load(folder / "last.pt", weights_only=True))

    return start


def test_the_plain_rotnet_has_our_inputs_and_labels():
    model = rivals.PlainRotNet(common.ResNet18(width=1), {}, 3, *NORMAL)
    model.upright = lambda x: x
    x = torch.rand(3, 3, 32, 32)
    inputs, labels = model.inputs(default_collate([model.transform(image) for image in x]))
    ours = rotnet.rotation_batch(x)
    assert torch.equal(inputs, ours[0]) and torch.equal(labels, ours[1])


def test_the_plain_simclr_has_our_loss():
    model = rivals.PlainSimCLR(common.ResNet18(width=1), {"temperature": 0.3}, 5, *NORMAL)
    model.backbone = model.head = torch.nn.Identity()
    z1, z2 = torch.randn(2, 5, 7)
    assert model([z1, z2]).item() == pytest.approx(simclr.nt_xent(z1, z2, 0.3).item(), rel=1e-5)


@pytest.mark.parametrize("pair", ["rotnet-plain", "moco-lightly"])
def test_a_stopped_peer_ends_where_one_that_was_not_does(train, monkeypatch, pair):
    if pair.endswith("lightly"):  # whose memory bank is in no state_dict
        pytest.importorskip("lightly")
    length, plain = ("--images", "96"), peers.save                                 # 6 steps, 4 an epoch
    rows, whole = train(pair, "whole", *length)
    assert [row["step"] for row in rows] == [0, 4, 6] and whole["step"] == 6
    assert all(rows[i]["seconds"] < rows[i + 1]["seconds"] for i in range(2))

    def killed(file, state):
        if state["step"] == 6:
            raise KeyboardInterrupt
        plain(file, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(peers, "save", killed)
        train(pair, "stopped", *length)
    again, stopped = train(pair, "stopped", *length)
    scores = [[{name: row[name] for name in ("step", "knn_10", "knn_200")} for row in r] for r in (rows, again)]
    assert scores[0] == scores[1]
    assert all(torch.equal(tensor, stopped["tensors"][name]) for name, tensor in whole["tensors"].items())


def test_minutes_end_both_sides(flags, tmp_path):
    peers.main(["accuracy", *flags, "--only", "simclr-plain", "--minutes", "0.02"])
    for side, rows in json.loads((tmp_path / "out/accuracy.json").read_text())["results"].items():
        assert rows[-1]["step"] > 0 and 0.6 < rows[-1]["seconds"] < 6, side


def test_accuracy_from_start_to_end_and_again(flags, tmp_path, monkeypatch, capfd):
    command = ["accuracy", *flags, "--only", "simclr-plain", "--images", "96"]
    peers.main(command)
    first = capfd.readouterr().out
    out = tmp_path / "out"
    results = json.loads((out / "accuracy.json").read_text())["results"]
    assert {side: [row["step"] for row in rows] for side, rows in results.items()} == {
        "simclr-ours": [0, 4, 6], "simclr-plain": [0, 4, 6]}
    assert results["simclr-ours"][0] == results["simclr-plain"][0]                  # the same untrained network
    saved = [torch.load(out / side / "last.pt", weights_only=True) for side in results]
    flags = saved[0]["args"]  # CIFAR's, of any pictures
    assert (flags["lr"], flags["temperature"], flags["blur"]) == (0.12, 0.5, 0)
    rates = [one["optimizer"]["param_groups"][0] for one in saved]
    assert rates[0]["lr"] == pytest.approx(rates[1]["lr"]) and rates[0]["weight_decay"] == rates[1]["weight_decay"]
    assert max(map(len, first.splitlines())) <= 80

    monkeypatch.setattr(peers, "measure_accuracy", None)                            # nothing is run again
    peers.main(command)
    assert capfd.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]
    with pytest.raises(SystemExit) as end:
        peers.main([*command, "--width", "8"])
    assert end.value.code == 2 and "holds a comparison with width 4, not 8" in capfd.readouterr().err


def test_the_untrained_network_is_that_of_the_method(flags):
    args = peers.parse_args(["accuracy", *flags, "--only", "simclr-plain", "--seed", "3"])
    for method, module in peers.METHODS.items():
        words = module.parse_args(peers.our_command(method, args, "off", "unused")[1:])
        peers.harness.fill_flags(words, module.RECIPES["cifar"])
        words.bn_splits, words.init = 2, None
        common.seed_everything(words.seed)
        theirs, mine = module.build_model(words).backbone.state_dict(), peers.first_backbone(method, args).state_dict()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_speed_has_every_side_in_every_turn(flags, tmp_path, capsys):
    peers.main(["speed", *flags, "--only", "rotnet-plain", "--rounds", "2", "--steps", "1"])
    sides = json.loads((tmp_path / "out" / "speed.json").read_text())["results"]["rotnet-plain"]["off"]
    assert set(sides) == {"ours", "bare", "peer", "peer, channels_last"}
    assert all(len(times) == 2 and min(times) > 0 for times in sides.values())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-2].startswith("rotnet-plain, float32")


def test_without_lightly_it_says_what_to_install(flags, monkeypatch, capsys):
    monkeypatch.setattr(peers, "optional", lambda name: None)
    with pytest.raises(SystemExit) as end:
        peers.main(["speed", *flags])
    assert end.value.code == 2
    assert "pip install lightly" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize("pair", [pair for pair in rivals.PEERS if pair.endswith("lightly")])
def test_lightly_learns_a_step(train, pair):
    pytest.importorskip("lightly")
    rows, last = train(pair, "run", "--images", "32")
    assert last["step"] == 2 and all(tensor.isfinite().all() for tensor in last["tensors"].values())
    common.ResNet18(width=4).load_state_dict(last["backbone"])
