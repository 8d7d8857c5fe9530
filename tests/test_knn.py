"""knn.py: the vote against loops and scikit-learn, features of every image once, honest evaluation."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

import common
import knn
import pictures


def by_loops(queries, bank, labels, classes, k, temperature):
    """Wu et al. 2018, section 3.4, in double precision, one query at a time."""
    scores = torch.zeros(len(queries), classes, dtype=torch.float64)
    for i, q in enumerate(queries.double()):
        s = torch.stack([q @ b / (q.norm() * b.norm()) for b in bank.double()])
        for j in sorted(range(len(bank)), key=lambda j: -s[j])[:k]:
            scores[i, labels[j]] += torch.exp(s[j] / temperature)
    return scores


@pytest.mark.parametrize("bank_size, k", [(50, 7), (700, 10), (703, 20)])  # by top-k alone; by groups of 16
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
    assert agree[0] == agree[1] and torch.equal(torch.get_rng_state(), before)
    shift, calls = 0, []
    monkeypatch.setattr(knn, "pair_view", lambda images, *_, generator: (
        calls.append(generator), images.float().roll(shift * (len(calls) % 2), 0))[1])
    for shift, share in ((0, 1.0), (1, 0.0)):  # noqa: B007  # read by the view
        assert knn.agreement(network, split, dataset, torch.device("cpu"), no_autocast, 0) == share
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
        assert row[0] == [0] * 3 or row[0] not in row[1:]
    assert all(row.count([0] * 3) <= 1 for row in inner if row[0] != [0] * 3 and [0] * 3 not in row[1:])
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


def test_top_5_counts_only_classes_that_got_a_vote(monkeypatch, capsys):
    labels, classes = torch.arange(6), [str(c) for c in range(6)]
    features = {"bank": torch.eye(6), "queries": torch.eye(6).roll(3, 0)}  # one vote: never the right class
    dataset = types.SimpleNamespace(train=make_split(6, labels), val=make_split(6, labels), classes=classes)
    dataset.train.paths, source = ["bank"] * 6, types.SimpleNamespace(description=[])
    monkeypatch.setattr(knn.weights, "load_pretrained", lambda args: {"args": {"skip_unreadable": False}})
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


def test_class_table_counts():
    lines = knn.class_table(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1]), ["cat", "dog", "emu"])
    assert lines[1].split() == ["cat", "3", "33.3", "%", "dog", "(2)"]
    assert lines[2].split() == ["dog", "1", "100.0", "%"]
    assert len(lines) == 3  # no emu was asked for
