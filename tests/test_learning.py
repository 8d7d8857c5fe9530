"""Short seeded runs on a part of the drawn set: every method must learn."""

import importlib

import pytest

import pictures
from harness.folder import read_metrics

# flags, and by how many points of kNN the features must get better than those of the untrained network. Other seeds,
# precisions and numbers of threads gave more, mostly twice as much.
RUNS = {
    "simsiam": (["--epochs", "3", "--warmup-epochs", "0.3", "--batch-size", "32"], 4),
    "moco": (["--epochs", "8", "--warmup-epochs", "1", "--queue-size", "128"], 6),
    "simclr": (["--epochs", "2", "--warmup-epochs", "0.2"], 10),
    "rotnet": (["--epochs", "2", "--warmup-epochs", "0.4", "--lr", "0.4", "--max-steps", "55"], 6),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train("moco", flags...) on 1,500 glyphs and 500 for validation; returns the rows of its metrics."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pictures.TOY_COUNT, "train", 1500)
        patch.setitem(pictures.TOY_COUNT, "val", 500)

        def start(method, *flags):
            out = folder / "-".join((method, *flags)).replace(".", "_")
            plumbing = ["--cache", str(folder), "--out", str(out), "--quiet", "--device", "cpu"]
            importlib.import_module(method).main([*plumbing, "--width", "8", "--seed", "1", *flags])
            return read_metrics(out)

        yield start


@pytest.mark.parametrize("method", RUNS)
def test_a_short_run_learns(train, method):
    flags, margin = RUNS[method]
    rows = train(method, *flags, "--knn-every", "9")
    assert rows[0]["epoch"] == 0 and rows[-1]["knn"] > rows[0]["knn"] + margin
    if method == "simsiam":
        assert rows[-1]["std"] > 0.8
