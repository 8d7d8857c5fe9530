"""What famous mistakes cost: SimCLR on CIFAR-10 as it should be, and with one thing wrong.

    python bench/mistakes.py --data cifar10 --knn-split test ...    simclr.py with these flags, but a fifth of what it
                                                                    trains on are test images
    python bench/mistakes.py score RUN ... >> results/mistakes-knn.jsonl

Mistakes that are flags, such as --stem imagenet, are lines of results/cifar.txt, for bench/runs.py. `score` has a row a
run: test images by majority of their 10 nearest training images, by the cosine, as papers do ("cosine"), by the
distance of features as long as they are ("euclidean"), and by the loss's outputs instead of features ("projector").
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
from runs import commit  # noqa: E402

import harness  # noqa: E402
import knn  # noqa: E402
import pictures  # noqa: E402
import simclr  # noqa: E402
from harness import weights  # noqa: E402

K = 10


def leaky(dataset):
    """The training images, of which the last, a fifth of them at most, are replaced by test images."""
    train, test = dataset.train, dataset.test
    count = min(len(test), len(train) // 5)
    images = torch.cat([train.images[:-count], test.images[:count]])
    return dataclasses.replace(train, images=images, held={})


def train(argv):
    """simclr.py, whose steps have test images among theirs; the bank of its kNN stays clean."""
    packed, batches = [], pictures.Batches

    def pack(*words):
        packed.append(pictures.store.pack(*words))
        return packed[-1]

    def for_training(split, *words, **settings):  # evaluations name what they want: no shuffling
        return batches(split if "shuffle" in settings else leaky(packed[-1]), *words, **settings)

    with mock.patch.object(pictures, "pack", pack), mock.patch.object(pictures, "Batches", for_training):
        return simclr.main(argv)


def majority(similarity, rows, labels, truth, classes):
    votes = knn.vote(torch.zeros_like(similarity), rows, labels, classes, 1.0)
    return round(100.0 * (votes.argmax(dim=1) == truth).double().mean().item(), 2)


def euclidean(queries, bank, k):
    """Like knn.nearest(), by distance."""
    parts = (torch.cdist(part, bank).topk(k, largest=False) for part in queries.split(1000))
    distance, rows = zip(*parts, strict=True)
    return -torch.cat(distance), torch.cat(rows)


def score(run):
    """{"cosine": percent, "euclidean": ..., "projector": ...} of the test images of a run's data."""
    words = knn.parse_args(["--checkpoint", str(run), "--split", "test", "--amp", "off"])
    found = {}
    for projector in (False, True):
        words.projector = projector
        checkpoint = weights.load_pretrained(words)
        _, dataset = knn.open_data(words, checkpoint, ("train", "test"))
        device, labels = torch.device("cpu"), dataset.train.labels
        network, name = knn.network_of(checkpoint, words, device)
        autocast = weights.precision(words, checkpoint, device)
        queries, bank = (knn.extract(network, split, dataset, device, autocast)[name]
                         for split in (dataset.test, dataset.train))
        ways = {"projector": knn.nearest} if projector else {"cosine": knn.nearest, "euclidean": euclidean}
        for way, nearest in ways.items():
            found[way] = majority(*nearest(queries, bank, K), labels, dataset.test.labels, len(dataset.classes))
    return found


@harness.command
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] != ["score"]:
        return train(words)
    for run in words[1:]:
        print(json.dumps({"name": Path(run).name, "code": 0, "commit": commit(), **score(run)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
