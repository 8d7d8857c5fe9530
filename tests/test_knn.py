"""knn.py: the vote against loops and scikit-learn, features of every image once, honest evaluation."""

import errno
import io
import os
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

import augment
import common
import knn
import pictures
import predict
import simsiam


def by_loops(queries, bank, labels, classes, k, temperature):
    """Wu et al. 2018, section 3.4, in double precision, one query at a time."""
    scores = torch.zeros(len(queries), classes, dtype=torch.float64)
    for i, q in enumerate(queries.double()):
        s = torch.stack([q @ b / (q.norm() * b.norm()) for b in bank.double()])
        for j in sorted(range(len(bank)), key=lambda j: -s[j])[:k]:
            scores[i, labels[j]] += torch.exp(s[j] / temperature)
    return scores


@pytest.mark.parametrize("bank_size, k", [(50, 7), (700, 10), (703, 20)])
def test_vote_equals_the_loops(bank_size, k):
    g = torch.Generator().manual_seed(bank_size)
    queries, bank = torch.randn(9, 12, generator=g), 3 * torch.randn(bank_size, 12, generator=g)
    labels = torch.randint(0, 4, (bank_size,), generator=g)
    expected = by_loops(queries, bank, labels, 4, k, 0.1)
    torch.testing.assert_close(knn.knn_predict(queries, bank, labels, 4, k, 0.1).double(), expected, rtol=1e-4, atol=0)


def test_nearest_equals_a_full_sort_over_many_chunks():
    g = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(600, 8, generator=g), torch.randn(2011, 8, generator=g)
    similarity, rows = knn.nearest(queries, bank, 50)
    every = F.normalize(queries) @ F.normalize(bank).T
    expected = every.sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected.values[:, :50])
    torch.testing.assert_close(every.gather(1, rows), similarity)
    assert all(len(set(row)) == 50 for row in rows.tolist())


def test_predictions_equal_scikit_learn():
    neighbours = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    g = torch.Generator().manual_seed(1)
    queries, bank = torch.randn(300, 16, generator=g), torch.randn(5000, 16, generator=g)
    labels = (bank[:, 0] > 0).long() + 2 * (bank[:, 1] > 0).long()
    theirs = neighbours.KNeighborsClassifier(200, weights=lambda d: torch.exp((1 - torch.tensor(d)) / 0.1).numpy(),
                                             metric="cosine", algorithm="brute").fit(bank, labels)
    ours = knn.knn_predict(queries, bank, labels, 4, 200, 0.1).argmax(dim=1)
    assert ours.tolist() == theirs.predict(queries).tolist()


def test_k_is_clamped_with_a_warning_and_labels_are_checked():
    queries, bank, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
    with pytest.warns(UserWarning, match="k = 5 is used"):
        clamped = knn.knn_predict(queries, bank, labels, 2, k=200)
    torch.testing.assert_close(clamped, knn.knn_predict(queries, bank, labels, 2, k=5))
    with pytest.raises(ValueError, match="labels"):  # an unlabelled image must not vote as a class
        knn.knn_predict(queries, bank, torch.tensor([0, 1, -1, 1, 0]), 2, k=3)
    # the class count is the caller's: one that no query or neighbour has still gets its column
    assert knn.knn_predict(queries, bank, labels, 7, k=3).shape == (3, 7)


def make_split(n, labels=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.arange(n) % 2 if labels is None else labels
    return pictures.Split(images, labels, torch.ones(n), [f"{i}.png" for i in range(n)])


def make_dataset(**changes):
    values = dict(train=make_split(23), val=make_split(7, seed=1), test=None, classes=["a", "b"], mean=(0.5,) * 3,
                  std=(0.25,) * 3, size=8)
    return types.SimpleNamespace(**(values | changes))


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def make_monitor(dataset, k=200, said=None, **flags):
    """Monitor of a run that is before its first step; what the run says goes into the list `said`."""
    args = types.SimpleNamespace(**dict(knn_split="val", knn_every=1, knn_k=k, knn_t=0.1, seed=0) | flags)
    say = (said if said is not None else []).append
    run = types.SimpleNamespace(args=args, dataset=dataset, device=torch.device("cpu"), autocast=no_autocast, say=say)
    run.epoch, run.last = 0, False
    return knn.Monitor(run)


def test_every_image_counts_once_and_in_order():
    split = make_split(23)
    network = torch.nn.Module()
    network.forward = lambda x: {"mean": x.mean(dim=(2, 3))}
    features = knn.extract(network, split, make_dataset(), torch.device("cpu"), no_autocast, batch_size=10)["mean"]
    expected = (split.images.float() / 255 - 0.5).div(0.25).mean(dim=(2, 3))
    torch.testing.assert_close(features, expected)


def test_monitor_leaves_the_network_as_it_was():
    backbone = common.ResNet18(width=4)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    monitor = make_monitor(make_dataset(), k=5)
    backbone.train()
    first = monitor(backbone)
    assert backbone.training and backbone.layer4[1].bn2.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    again = monitor(backbone)
    assert again.pop("knn_seconds") > 0 and first.pop("knn_seconds") > 0
    assert again == first and set(first) == {"knn", "knn_20", "knn_10", "rank", "agreement"}


def test_monitor_counts_what_knn_predict_predicts():
    torch.manual_seed(0)
    dataset, backbone = make_dataset(train=make_split(60), val=make_split(31)), common.ResNet18(width=4)
    scores = make_monitor(dataset, k=40)(backbone)
    bank, queries = (knn.extract(knn.Layers(backbone), split, dataset, torch.device("cpu"), no_autocast)["layer4"]
                     for split in (dataset.train, dataset.val))
    for name, k in (("knn", 40), ("knn_20", 20), ("knn_10", 10)):
        right = knn.knn_predict(queries, bank, dataset.train.labels, 2, k).argmax(dim=1) == dataset.val.labels
        assert scores[name] == pytest.approx(100 * right.double().mean().item())


def test_monitor_scores_each_layer_at_its_temperature():
    torch.manual_seed(0)
    names, backbone = ("layer2", "layer3", "layer4"), common.ResNet18(width=4)
    dataset = make_dataset(train=make_split(60), val=make_split(31, seed=1))
    scores = knn.Monitor(make_monitor(dataset, k=40, knn_t=0.02).run, names)(backbone)
    bank, queries = (knn.extract(knn.Layers(backbone, names), split, dataset, torch.device("cpu"), no_autocast)
                     for split in (dataset.train, dataset.val))
    for layer in names:
        votes = knn.knn_predict(queries[layer], bank[layer], dataset.train.labels, 2, 40, 0.02).argmax(dim=1)
        right = 100 * (votes == dataset.val.labels).double().mean().item()
        assert scores["knn" if layer == "layer4" else f"knn_{layer}"] == pytest.approx(right)


def test_monitor_finds_the_class_that_is_in_the_pixels():
    def dark_or_bright(n):
        split = make_split(n)
        split.images = (split.images // 8 + 200 * split.labels.to(torch.uint8)[:, None, None, None]).to(torch.uint8)
        return split

    dataset = make_dataset(train=dark_or_bright(40), val=dark_or_bright(21))
    monitor = make_monitor(dataset, k=5)
    torch.manual_seed(0)
    assert monitor(common.ResNet18(width=16))["knn"] == 100.0


def test_unlabelled_images_neither_vote_nor_count():
    train = make_split(30, torch.cat([torch.arange(20) % 2, torch.full((10,), -1)]))
    dataset = make_dataset(train=train)
    monitor = make_monitor(dataset, k=5)
    assert len(monitor.bank) == 20 and monitor(common.ResNet18(width=4))["knn"] is not None
    unlabelled = make_dataset(train=make_split(9, torch.full((9,), -1)))
    said = []
    for blind in (unlabelled, make_dataset(val=None)):
        scores = make_monitor(blind, said=said)(common.ResNet18(width=4))
        assert scores["knn"] is None and 1 <= scores["rank"] <= 9 and 0 <= scores["agreement"] <= 1
    assert said == ["note    no kNN: no labelled training images", "note    no kNN: no labelled val images"]


@pytest.mark.parametrize("n, c", [(300, 16), (9, 24)])
def test_effective_rank_equals_the_formula_of_the_singular_values(n, c):
    g = torch.Generator().manual_seed(n)
    z = torch.randn(n, c, generator=g) * torch.logspace(0, -3, c) + 0.3  # not centred
    sigma = torch.linalg.svdvals(z.double())
    p = sigma / sigma.sum() + 1e-7
    assert knn.effective_rank(z) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)
    assert knn.effective_rank(torch.eye(c).repeat(2, 1)) == pytest.approx(c, rel=1e-4)  # orthogonal
    assert knn.effective_rank(torch.outer(torch.rand(n, generator=g), z[0])) == pytest.approx(1, abs=1e-3)  # one way
    assert knn.effective_rank(torch.zeros(n, c)) < 1.01


def test_agreement_counts_partners_and_leaves_the_generators_alone(monkeypatch):
    split, dataset = make_split(40), make_dataset()
    network = torch.nn.Module()
    network.forward = lambda x: {"pixels": x.flatten(1)}
    before = torch.get_rng_state()
    agree = [knn.agreement(network, split, dataset, torch.device("cpu"), no_autocast, seed) for seed in (0, 0, 1)]
    assert agree[0] == agree[1] < 1 and torch.equal(torch.get_rng_state(), before)
    shift, calls = 0, []
    monkeypatch.setattr(knn, "pair_view", lambda images, *_, generator: (
        calls.append(generator), images.float().roll(shift * (len(calls) % 2), 0))[1])
    for shift, share in ((0, 1.0), (1, 0.0)):  # noqa: B007  # read by the view
        assert knn.agreement(network, split, dataset, torch.device("cpu"), no_autocast, 0) == share
    assert calls[0].key != calls[1].key  # each view has draws of its own
    assert len(knn.some(make_split(2001), 1000)) == 667 and len(knn.some(split, 1000)) == 40


def test_evaluations_are_due_before_the_first_step_after_so_many_epochs_and_after_the_last():
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for every, due in ((2, {0, 2, 4, 6}), (5, {0, 5, 6}), (0, set())):
        monitor = make_monitor(make_dataset(), k=5, knn_every=every)
        for epoch in range(7):
            monitor.run.epoch, monitor.run.last = epoch, epoch == 6
            assert monitor.due == (epoch in due)
            assert (monitor(backbone)["knn"] is not None) == monitor.due
            assert (monitor(backbone, now=True)["knn"] is not None) == (every > 0)


def test_evaluation_view_is_the_central_square_of_the_original():
    images = torch.arange(256 * 3, dtype=torch.float32).view(1, 3, 16, 16).mul(255 / 768).to(torch.uint8)
    view = knn.evaluation_view(images, torch.ones(1), 16, (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(view, (images.float() / 255 - 0.5) / 0.25)
    wide = knn.evaluation_view(images, torch.tensor([2.0]), 8, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(wide, F.interpolate(images.float() / 255, size=(8, 16), mode="bilinear",
                                                   antialias=True, align_corners=False)[..., 4:12],
                               atol=0.02, rtol=0)


@pytest.mark.parametrize("size, share", [(64, 1.0), (72, 0.875), (128, 0.875)])
def test_evaluations_of_photos_show_seven_eighths(size, share):
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    view = knn.evaluation_view(images, torch.ones(2), size, (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(view, augment.center_crop(images, size, fraction=share))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the weights of some network, and a function that draws a grey picture there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    torch.save({f"module.{k}": v for k, v in common.ResNet18(width=4).state_dict().items()}, "net.pth")

    def draw(name, grey):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(name)

    return draw


def show(*flags):
    """Runs the command; returns the frames and the inner colours of the picture, each as rows of (R, G, B)."""
    knn.main(["--weights", "net.pth", "--image-size", "16", "--amp", "off", "--neighbours", "grid.png", *flags])
    picture = TF.pil_to_tensor(Image.open("grid.png"))
    frames, inner = picture[:, 3::104, 3::104], picture[:, 50::104, 50::104]
    return frames.permute(1, 2, 0).tolist(), inner.permute(1, 2, 0).tolist()


def test_weights_alone_are_judged_on_any_data(place, capsys):
    for split in ("train", "val"):
        for i in range(4):
            place(f"set/{split}/{'dark' if i % 2 else 'bright'}/{i}.png", 20 * i + 150 * (i % 2 == 0))
    show("--data", "set", "--k", "2")
    out = capsys.readouterr().out
    assert "weights net.pth: ResNet-18, stem cifar, width 4, from module.*" in out
    assert "4 val images against 4 training images" in out and "k 2    top-1" in out and "green: same class" in out


def test_pictures_without_labels_have_neighbours_and_never_themselves(place, capsys):
    for i in range(12):
        place(f"loose/{i}.png", 20 * i)
    place("loose/copy.png", 0)  # a picture's copy is a neighbour
    frames, inner = show("--data", "loose")
    out = capsys.readouterr().out
    assert "13 training images against 13 training" in out and "grey: no labels" in out
    assert out.count("no accuracy: it takes labelled training and labelled val images") == 1 and "top-1" not in out
    assert len(inner) == 10 and {len(row) for row in inner} == {9}
    assert all(max(frame) - min(frame) < 3 for row in frames for frame in row)
    for row in inner:
        assert row.count(row[0]) == (2 if row[0] == [0] * 3 else 1)  # the black one has its copy
    assert [0] * 3 in [row[0] for row in inner]
    with pytest.raises(SystemExit):
        knn.main(["--weights", "net.pth", "--image-size", "16", "--data", "loose"])
    assert "--neighbours PNG shows neighbours without" in capsys.readouterr().err


def test_neighbours_of_few_and_of_partly_labelled_pictures(place, capsys):
    for i in range(3):  # one a class: none can be held out
        place(f"few/{i}/0.png", 80 * i)
    frames, inner = show("--data", "few")
    assert [len(row) for row in inner] == [3] * 3  # itself, then the two others
    assert all(red > 2 * green for row in frames for red, green, _ in row[1:])
    for i in range(4):
        place(f"blind/train/{i % 2}/{i}.png", 80 * i)
        place(f"blind/test/{i}.png", 60 * i)
    frames, inner = show("--data", "blind", "--split", "test")
    assert "test images against 2 training" in capsys.readouterr().out and len(inner) == 4
    assert all(max(frame) - min(frame) < 3 for row in frames for frame in row)
    with pytest.raises(SystemExit):
        show("--data", "few", "--split", "test")
    assert "--split test: this data has no test images" in capsys.readouterr().err


def test_the_queries_are_those_of_the_run(place, capsys):
    for split in ("train", "test"):
        for i in range(12):
            place(f"set/{split}/{i % 2}/{i}.png", 20 * i)
    simsiam.main(["--data", "set", "--knn-split", "test", "--image-size", "16", "--width", "4", "--batch-size", "4",
                  "--max-steps", "1", "--amp", "off", "--quiet", "--out", "run"])
    knn.main(["--checkpoint", "run", "--k", "5"])
    assert "12 test images against 12 training images" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # other images may have a val split
        knn.main(["--checkpoint", "run", "--data", "set", "--k", "5"])
    assert "labelled val images, of two classes; --split test has them; --neigh" in capsys.readouterr().err


def test_other_pictures_are_normalised_as_those_of_the_run(place):
    for i in range(24):
        place(f"set/{i % 2}/{i}.png", 10 * i)
    args = types.SimpleNamespace(data="set", data_root=None, cache=None, image_size=None, skip_unreadable=False)
    saved = dict(data="toy", data_root=".", knn_split="val", skip_unreadable=False, cache=None)
    run = dict(args=saved, image_size=16, mean=(0.1,) * 3, std=(0.2,) * 3)
    _, dataset = knn.open_data(args, run, ("train", "val"))
    assert (dataset.mean, dataset.std) == ((0.1,) * 3, (0.2,) * 3)


def run(*flags):
    knn.main(["--weights", "net.pth", "--image-size", "16", "--amp", "off", *flags])


@pytest.mark.parametrize("split, labels", [("val", [0, 0, 1, 1]), ("train", [0, 0, 1, 1, -1, -1, -1]),
                                           ("test", [-1, -1, -1])])
def test_the_file_of_features_has_all_images_of_a_split_in_order(place, capsys, split, labels):
    for i in range(4):
        for folder in ("train", "val"):
            place(f"set/{folder}/{'ab'[i % 2]}/{i}.png", 50 * i + (folder == "val"))
        if i < 3:
            place(f"set/test/é{i}.png", 70 * i)
            place(f"set/train_unlabeled/{i}.png", 80 * i)
    run("--data", "set", "--split", split, "--features", "f.npz", "--k", "2")
    out = capsys.readouterr().out
    assert f"wrote f.npz: 32 features of {len(labels)} {'training' if split == 'train' else split} images" in out
    assert ("top-1" in out) == (split == "val")
    file = np.load("f.npz", allow_pickle=False)
    dataset = pictures.pack(pictures.open_source("set"), 16, splits=(split,))
    whole, backbone = getattr(dataset, split), common.ResNet18(width=4)
    backbone.load_state_dict({k.removeprefix("module."): v for k, v in torch.load("net.pth").items()})
    expected = knn.extract(knn.Layers(backbone), whole, dataset, torch.device("cpu"), no_autocast)["layer4"]
    assert set(file) == {"features", "files", "labels", "classes"} and file["features"].dtype == np.float32
    np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-6)
    assert file["labels"].tolist() == labels and file["labels"].dtype == np.int64
    assert file["files"].tolist() == whole.paths and file["classes"].tolist() == ["a", "b"]
    for path, label in zip(file["files"], labels, strict=True):
        assert label < 0 or f"/{'ab'[label]}/" in path


def test_features_and_map_of_loose_pictures(place, capsys, monkeypatch):
    monkeypatch.setattr(knn, "find_tsne", lambda: None)
    for i in range(5):
        place(f"loose/{i}.png", 50 * i)
    run("--data", "loose", "--features", "f.npz", "--map", "map.png")
    out = capsys.readouterr().out
    assert out.startswith("map     PCA;") and "wrote map.png: 5 of 5 training images" in out
    file, image = np.load("f.npz", allow_pickle=False), TF.pil_to_tensor(Image.open("map.png"))
    assert file["features"].shape == (5, 32) and file["labels"].tolist() == [-1] * 5 and len(file["classes"]) == 0
    assert [path[-5:] for path in file["files"]] == [f"{i}.png" for i in range(5)]
    assert image.shape == (3, 4 * 128, 4 * 128)  # a grid of 4 x 4, no legend
    inner = image[:, 64::128, 64::128].flatten(1).T.tolist()
    assert sorted(inner)[:5] == [[50 * i] * 3 for i in range(5)] and inner.count([255] * 3) == 11
    assert (image[:, 2::128, 64::128].flatten(1) == 165).all(dim=0).sum() == 5  # grey frames


def test_names_are_drawn_in_a_font_that_has_their_letters(monkeypatch):
    file = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(knn, "FONTS", ("nowhere.ttf", str(file)))
    plain, own = knn.font_for(["cat"], 16), knn.font_for(["Käfer", "Собака"], 16)
    assert plain.getname()[0] != "DejaVu Sans" and own.getname()[0] == "DejaVu Sans"
    assert knn.font_for(["Käfer", "猫"], 16).getname() == own.getname()  # no font here has all: most count
    assert knn.font_for(["猫"], 16).getname() == plain.getname() == knn.font_for([""], 16).getname()


def test_the_map_is_coloured_by_class_and_names_up_to_20():
    n = knn.ON_MAP + 100
    split = make_split(n, torch.arange(n) % 20)
    features = F.one_hot(split.labels, 20) + 0.1 * torch.randn(n, 20, generator=torch.Generator().manual_seed(0))

    def frames(classes, side):  # colours of the 1 + int((2 * 800) ** 0.5) cells a side
        image = TF.pil_to_tensor(Image.open(io.BytesIO(knn.draw_map(split, features, classes))))
        assert image.shape[1] == side and (image.shape[2] > side) == (len(classes) <= 20)
        colours = [tuple(c) for c in image[:, 2:side:43, 20:side:43].flatten(1).T.tolist()]
        named = [tuple(image[:, 20 + 26 * i, side + 20].tolist()) for i in range(20)] if len(classes) <= 20 else []
        return [c for c in colours if c != (255,) * 3], named

    shown, named = frames([f"class {i}" for i in range(20)], 41 * 43)
    assert len(shown) == knn.ON_MAP and len({*shown}) == 20 and {*shown} == {*named}
    assert all(20 < shown.count(colour) < 60 for colour in named)  # evenly chosen, though the classes stand in turn
    shown, _ = frames([f"class {i}" for i in range(21)], 41 * 43)
    assert len({*shown}) == 20


def test_the_plane_is_that_of_the_principal_components():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 8)) + 3
    centred = (x.double() - x.double().mean(dim=0)).numpy()
    _, _, v = np.linalg.svd(centred)
    expected = torch.from_numpy(np.abs(centred @ v[:2].T))
    torch.testing.assert_close(knn.plane(x).abs(), expected)
    assert knn.plane(x[:1]).tolist() == [[0, 0]]


def test_t_sne_of_few_and_of_two_groups():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) + 20 * (torch.arange(40) % 2)[:, None]
    y = knn.plane(x, knn.find_tsne())
    assert torch.equal(y, knn.plane(x, knn.find_tsne()))
    assert torch.equal(torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(dim=1) % 2, torch.arange(40) % 2)
    for n in (1, 3, 4, 5):
        assert knn.plane(x[:n], knn.find_tsne()).shape == (n, 2)
    for rank in range(3):  # 0: a collapsed network
        few = (torch.arange(9)[:, None] % 2 ** rank) * torch.eye(5)[rank]
        assert knn.plane(few + 1, knn.find_tsne()).isfinite().all()


def test_each_point_gets_the_nearest_cell_that_is_free():
    g = torch.Generator().manual_seed(0)
    points = torch.randn(60, 2, generator=g).double()
    points[:20] = points[0]  # alike
    cells, taken = knn.free_cells(points, 9), []
    low, high = np.quantile(points, 0.01, axis=0), np.quantile(points, 0.99, axis=0)
    for point, cell in zip(points.numpy(), cells.tolist(), strict=True):
        x, y = np.clip((point - low) / (high - low), 0, 1) * 8
        free = [(i, j) for i in range(9) for j in range(9) if [i, j] not in taken]
        best = min((i - x) ** 2 + (j - y) ** 2 for i, j in free)
        assert cell not in taken and (cell[0] - x) ** 2 + (cell[1] - y) ** 2 == pytest.approx(best)
        taken.append(cell)
    assert sorted(knn.free_cells(torch.ones(9, 2).double(), 3).tolist()) == [[i, j] for i in range(3) for j in range(3)]


def test_a_file_that_cannot_be_written_leaves_the_old_one(place, capsys, monkeypatch):
    place("loose/0.png", 0)
    Path("f.npz").write_text("old")
    run("--data", "loose", "--map", "map.png")  # packs, for which there is room

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        run("--data", "loose", "--features", "f.npz")
    assert end.value.code == 2 and "f.npz: cannot be written: No space left" in capsys.readouterr().err
    assert Path("f.npz").read_text() == "old" and not [*Path().glob(".f.npz*")]
    with pytest.raises(SystemExit):
        run("--data", "loose", "--neighbours", "grid.png")
    assert "grid.png: cannot be written: No space left" in capsys.readouterr().err and not Path("grid.png").exists()


def test_features_that_are_not_finite(place, capsys):
    place("loose/0.png", 0)
    torch.save({k: v * torch.nan if v.is_floating_point() else v for k, v in torch.load("net.pth").items()}, "net.pth")
    with pytest.raises(SystemExit) as end:
        run("--data", "loose", "--features", "f.npz")
    assert end.value.code == 2 and "not finite" in capsys.readouterr().err and not Path("f.npz").exists()


def test_a_network_that_is_lost_in_the_last_step_of_an_epoch_is_a_line(place, capsys):
    for i in range(12):
        place(f"set/{i % 2}/{i}.png", 20 * i)
    with pytest.raises(SystemExit) as end:
        simsiam.main(["--data", "set", "--image-size", "16", "--width", "4", "--batch-size", "8", "--step-lr", "1e9",
                      "--warmup-epochs", "0", "--max-steps", "1", "--amp", "off", "--quiet", "--out", "run"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "not finite" in err and len(err.splitlines()) == 1


def test_a_projector_of_another_program_is_refused(place, capsys):
    for i in range(12):
        place(f"set/{i % 2}/{i}.png", 20 * i)
    simsiam.main(["--data", "set", "--image-size", "16", "--width", "4", "--batch-size", "4", "--max-steps", "1",
                  "--amp", "off", "--quiet", "--out", "run"])
    Path("helper.py").write_text("from torch import nn\n")
    Path("mine.py").write_text("import helper, common\n\n\ndef build_model(args):\n"
                               "    model = helper.nn.Module()\n"
                               "    model.backbone = common.ResNet18(width=args.width)\n"
                               "    model.projector = helper.nn.Linear(32, 3)\n    return model\n")
    with pytest.raises(SystemExit) as end:  # which finds what stands beside it
        knn.main(["--checkpoint", "run", "--projector", "--program", "mine.py", "--k", "5", "--amp", "off"])
    assert end.value.code == 2 and "mine.py builds another model than that of this run" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_held_out_of_other_pictures_is_no_matter_of_the_run(place, capsys, split):
    for i in range(24):
        place(f"set/{'test' if i % 2 else 'train'}/{i // 2 % 2}/{i}.png", 10 * i)
        place(f"own/{i % 2}/{i}.png", 10 * i)
    simsiam.main(["--data", "set", "--knn-split", split, "--image-size", "16", "--width", "4", "--batch-size", "4",
                  "--max-steps", "1", "--amp", "off", "--quiet", "--out", "run"])
    knn.main(["--checkpoint", "run", "--data", "own", "--k", "5"])
    assert "2 val images against 22 training images" in capsys.readouterr().out
    predict.main(["--checkpoint", "run", "--data", "own", "own/0/0.png"])
    assert "nearest of 24" in capsys.readouterr().err


def test_evaluation_is_in_the_precision_that_the_run_was_told(monkeypatch):
    asked = []
    monkeypatch.setattr(knn.weights, "pick_precision", lambda name, *_: (asked.append(name), [None])[1])
    for device in ("cpu", "cuda"):
        for amp, taken in (("auto", "off"), ("auto", "bf16"), ("auto", "auto"), ("bf16", "off")):
            knn.weights.precision(types.SimpleNamespace(amp=amp), {"args": {"amp": taken}, "width": 4},
                                  torch.device(device))
    assert asked == ["off", "bf16", "auto", "bf16", "off", "auto", "auto", "bf16"]


def test_the_layer_and_the_temperature_are_those_asked_for(place, monkeypatch):
    for i in range(16):
        place(f"set/{'train' if i < 8 else 'val'}/{i % 2}/{i}.png", 15 * i)
    seen, vote = [], knn.vote
    monkeypatch.setattr(knn, "vote", lambda *words: (seen.append(words), vote(*words))[1])
    run("--data", "set", "--layer", "layer3", "--temperature", "0.03", "--k", "5")
    (similarity, *_, temperature), = seen
    backbone = common.ResNet18(width=4).eval()
    backbone.load_state_dict({k.removeprefix("module."): v for k, v in torch.load("net.pth").items()})
    source = pictures.open_source("set")
    dataset = pictures.pack(source, 16, quiet=True)
    with torch.no_grad():
        bank, queries = (torch.nn.functional.normalize(backbone.features(knn.evaluation_view(
            split.images, split.aspect, 16, dataset.mean, dataset.std), ("layer3",))["layer3"], dim=1)
            for split in (dataset.train, dataset.val))
    torch.testing.assert_close(similarity, (queries @ bank.T).topk(5).values, rtol=1e-3, atol=1e-3)
    assert temperature == 0.03


def test_top_5_counts_only_classes_that_got_a_vote(monkeypatch, capsys):
    labels, classes = torch.arange(6), [str(c) for c in range(6)]
    features = {"bank": torch.eye(6), "queries": torch.eye(6).roll(3, 0)}  # one vote: never the right class
    dataset = types.SimpleNamespace(train=make_split(6, labels), val=make_split(6, labels), classes=classes)
    dataset.train.paths, source = ["bank"] * 6, types.SimpleNamespace(description=[])
    monkeypatch.setattr(knn.weights, "load_pretrained", lambda args: {
        "args": {"skip_unreadable": False, "knn_split": "val"}, "width": 4, "method": "simclr"})
    monkeypatch.setattr(knn.weights, "load_backbone", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(knn, "open_data", lambda *_: (source, dataset))
    monkeypatch.setattr(knn, "extract", lambda network, split, *_: {
        "layer4": features["bank" if split.paths and split.paths[0] == "bank" else "queries"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn.main(["--checkpoint", "run", "--k", "1", "99", "6"])
    out = capsys.readouterr().out
    assert "k 1    top-1   0.00 %   top-5   0.00 %" in out
    assert out.count("k 6    top-1") == 1 and "there are 6 to vote: k is 6 where it is more" in out


def test_of_equal_votes_the_first_class_counts_as_in_training(capsys):
    args = types.SimpleNamespace(k=[12], temperature=0.1)
    same, labels = torch.ones(12, 4), torch.arange(12) % 6  # a collapsed network
    knn.print_accuracy(args, same, torch.zeros(12, dtype=torch.long), same, labels, [str(c) for c in range(6)])
    assert "k 12   top-1 100.00 %   top-5 100.00 %" in capsys.readouterr().out


def test_class_table_counts():
    lines = knn.class_table(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1]), ["cat", "dog", "emu"])
    assert lines[1].split() == ["cat", "3", "33.3", "%", "dog", "(2)"]
    assert lines[2].split() == ["dog", "1", "100.0", "%"]
    assert len(lines) == 3  # no emu was asked for
