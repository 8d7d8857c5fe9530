"""What famous mistakes cost: SimCLR on CIFAR-10 as it should be, and with one thing wrong.

    python bench/mistakes.py --data cifar10 --knn-split test ...    simclr.py with these flags, but a fifth of what it
                                                                    trains on are test images
    python bench/mistakes.py score RUN ... >> results/mistakes-knn.jsonl

Mistakes that are flags, such as --stem imagenet, are lines of results/cifar.txt, for bench/runs.py. `score` prints a
row for each run: test images by the plain majority of their 10 nearest training images, by the cosine ("cosine"), by
the distance of features as long as they are ("euclidean"), by the loss's outputs instead of features ("projector").
"""

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import harness.threads  # isort: skip  # noqa: E402, F401  # before torch
import torch  # noqa: E402
from runs import commit, machine  # noqa: E402

import common  # noqa: E402
import harness  # noqa: E402
import knn  # noqa: E402
import simclr  # noqa: E402
from harness import weights  # noqa: E402
from harness.run import Run  # noqa: E402

K = 10


def leaky(dataset):
    """The training images, of which the last, a fifth of them at most, are replaced by test images."""
    train, test = dataset.train, dataset.test
    if test is None:
        raise common.UsageError("test images leak in with --knn-split test alone")
    count = min(len(test), len(train) // 5)
    images = torch.cat([train.images[:-count], test.images[:count]])
    return dataclasses.replace(train, images=images, held={})


def train(argv):
    """simclr.py, whose steps have test images among theirs; the bank of its kNN stays clean."""
    feed = Run.feed

    def leaking(run, dataset, batches):
        batches.split = leaky(dataset)
        feed(run, dataset, batches)

    with mock.patch.object(Run, "feed", leaking):
        return simclr.main(argv)


def majority(rows, labels, truth, classes):
    """Percent of queries most of whose neighbours are of their class. rows (Q, K), labels (M,), truth (Q,)."""
    votes = knn.vote(torch.zeros(rows.shape), rows, labels, classes, temperature=1.0)
    return round(100.0 * (votes.argmax(dim=1) == truth).double().mean().item(), 2)


def by_cosine(queries, bank):
    return knn.nearest(queries, bank, K)[1]


def by_distance(queries, bank):
    return torch.cat([torch.cdist(part, bank).topk(K, largest=False).indices for part in queries.split(1000)])


def score(run):
    """{"cosine": percent, "euclidean": ..., "projector": ...} of the test images of a run's data."""
    words = knn.parse_args(["--checkpoint", str(run), "--split", "test", "--amp", "off"])
    checkpoint, device = weights.load_pretrained(words), torch.device("cpu")
    _, dataset = knn.open_data(words, checkpoint, ("train", "test"))
    autocast, found = weights.precision(words, checkpoint, device), {}
    for words.projector, ways in ((False, {"cosine": by_cosine, "euclidean": by_distance}),
                                  (True, {"projector": by_cosine})):
        network, name = knn.network_of(checkpoint, words, device)
        queries, bank = (knn.extract(network, split, dataset, device, autocast)[name]
                         for split in (dataset.test, dataset.train))
        for way, nearest in ways.items():
            found[way] = majority(nearest(queries, bank), dataset.train.labels, dataset.test.labels,
                                  len(dataset.classes))
    return found


@harness.command
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] != ["score"]:
        return train(words)
    if not words[1:]:
        raise common.UsageError("score: name a run")
    for run in words[1:]:
        record = {"name": Path(run).name, "code": 0, "commit": commit(), "machine": machine()}
        print(json.dumps(record | score(run)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
