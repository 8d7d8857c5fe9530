"""export.py: torchvision loads the file with strict=True and computes what the checkpoint's network computes."""

import argparse
import json

import pytest
import torch
import torchvision

import common
import export
import harness
import moco

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_checkpoint(path, backbone, stem, width, **extra):
    """A checkpoint of MoCo, whose backbone has SplitBatchNorm layers, all of them moved away from their start."""
    model = moco.MoCo(backbone, dim=8, queue_size=16, bn_splits=2)
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    args = argparse.Namespace(image_size=32, stem=stem, width=width, data="toy", method="moco")
    dataset = argparse.Namespace(classes=["cat", "dog", "emu"], mean=MEAN, std=STD)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = harness.checkpoint.state_of(model, optimizer, scaler, {}, args, dataset, 1, 1)
    harness.checkpoint.save(path, state | extra)
    return model.backbone.eval()


def linear(width, layer="layer4"):
    """What linear.py adds to a checkpoint of three classes; its weight is part of a large tensor."""
    dim = width * 2 ** (int(layer[-1]) - 1)
    classifier = {"weight": torch.randn(999, dim)[5:8], "bias": torch.randn(3)}
    return dict(method="linear", layer=layer, classifier=classifier)


def run_lines(out, replace_by_timm=False):
    """Executes the lines that the program printed, as a user would; returns the network they make."""
    lines = out.split("\n\n", 1)[1].splitlines()
    if replace_by_timm:
        place = lines.index("# With timm the first two lines are")
        lines = [line.removeprefix("# ") for line in lines[place + 1 : place + 3]] + lines[2:place]
    names = {}
    exec("\n".join(lines), names)  # not ours alone: what the user is told to type must run
    return names["net"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("classifier", [False, True])
def test_the_printed_lines_load_the_network(tmp_path, monkeypatch, capsys, stem, classifier, library):
    if library == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    extra = linear(64) if classifier else {}
    backbone = make_checkpoint(tmp_path / "last.pt", common.ResNet18(stem=stem), stem, 64, **extra)
    export.main([".", "net.pth"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    net = run_lines(out, replace_by_timm=library == "timm")
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(x)
        if classifier:
            expected = expected @ extra["classifier"]["weight"].T + extra["classifier"]["bias"]
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
        names = {"torch": torch, "net": net}
        exec(out.splitlines()[-1].removeprefix("# "), names)
        torch.testing.assert_close(names["encoder"](x).flatten(1), backbone(x), atol=1e-5, rtol=1e-5)
    assert library != "torchvision" or isinstance(net, torchvision.models.ResNet)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A linear.py run of width 4 in the current folder: linear.pt with a classifier, last.pt without one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    make_checkpoint(tmp_path / "run/last.pt", common.ResNet18(width=4), "cifar", 4)
    return make_checkpoint(tmp_path / "run/linear.pt", common.ResNet18(width=4), "cifar", 4, **linear(4))


def test_another_width_is_loaded_by_our_class(tiny, capsys):
    export.main(["run", "net.pth"])
    out = capsys.readouterr().out
    assert "width 4; common.ResNet18" in out and "torchvision.models" not in out and "timm" not in out
    net = run_lines(out)
    assert isinstance(net, common.ResNet18) and net.fc.weight.shape == (3, 32)
    torch.testing.assert_close(net.features(torch.ones(1, 3, 32, 32)), tiny.features(torch.ones(1, 3, 32, 32)))


def test_the_file_holds_tensors_alone_each_with_its_own_storage(tiny, tmp_path):
    export.main(["run", "net.pth"])
    state = torch.load("net.pth", weights_only=True)
    assert type(state) is dict and all(type(value) is torch.Tensor for value in state.values())
    assert all(value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    assert list(state) == list(common.ResNet18(num_classes=3, width=4).state_dict())


def test_the_classifier_stays_out_where_it_does_not_belong(tiny, tmp_path, capsys):
    export.main(["run", "net.pth", "--backbone-only"])
    export.main(["run/last.pt", "last.pth"])
    assert "note    its classifier" not in capsys.readouterr().out
    make_checkpoint(tmp_path / "middle.pt", common.ResNet18(width=4), "cifar", 4, **linear(4, "layer2"))
    export.main(["middle.pt", "middle.pth"])
    assert "its classifier reads layer2" in capsys.readouterr().out
    for name in ("net", "last", "middle"):
        assert not any(key.startswith("fc.") for key in torch.load(f"{name}.pth"))
        assert "layer" not in json.loads((tmp_path / f"{name}.json").read_text())


def test_the_description_beside(tiny, tmp_path):
    export.main(["run", "net.pth"])
    assert json.loads((tmp_path / "net.json").read_text()) == dict(
        method="linear", stem="cifar", width=4, image_size=32, mean=list(MEAN), std=list(STD),
        classes=["cat", "dog", "emu"], layer="layer4", crop_fraction=1.0)


def test_wrong_uses_end_in_one_clear_line_and_change_nothing(tiny, tmp_path, capsys):
    (tmp_path / "there.pth").write_text("precious")
    (tmp_path / "about.json").write_text("precious")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "run/copy.pth").hardlink_to(tmp_path / "run/last.pt")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "weights.pt")
    cases = [
        (["nowhere", "net.pth"], "nowhere"),
        (["empty", "net.pth"], "empty"),
        (["text.pt", "net.pth"], "text.pt"),
        (["weights.pt", "net.pth"], "weights.pt"),
        (["run"], "OUT"),
        (["run", "net.json"], "net.json: must end in .pth"),
        (["run", "there.pth"], "there.pth: exists"),
        (["run", "about.pth"], "about.json: exists"),
        (["run", "nowhere/net.pth"], "nowhere/net.pth: cannot be written"),
        (["run", "folder.pth", "--force"], "folder.pth: cannot be written"),
        (["run/last.pt", "run/copy.pth", "--force"], "the checkpoint itself"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, words in cases:
        with pytest.raises(SystemExit) as end:
            export.main(flags)
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and words in err, (flags, err)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("backbone, stem, width", [
    (common.ResNet18(width=4), "cifar", 8), (common.ResNet18(width=64), "imagenet", 64),
    (torchvision.models.resnet34(num_classes=2), "imagenet", 64), (torch.nn.Linear(3, 4), "cifar", 64)])
def test_another_backbone_is_refused(tmp_path, monkeypatch, capsys, backbone, stem, width):
    monkeypatch.chdir(tmp_path)
    backbone.dim = 8
    make_checkpoint(tmp_path / "last.pt", backbone, stem, width)
    with pytest.raises(SystemExit) as end:
        export.main([".", "net.pth"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and "last.pt: its backbone is not a ResNet-18" in err
    assert not (tmp_path / "net.pth").exists() and not (tmp_path / "net.json").exists()


def test_force_overwrites(tiny, tmp_path):
    (tmp_path / "net.pth").write_text("old")
    (tmp_path / "net.json").write_text("old")
    export.main(["run", "net.pth", "--force"])
    assert "fc.bias" in torch.load("net.pth") and json.loads((tmp_path / "net.json").read_text())["width"] == 4
