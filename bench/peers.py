"""The same job done by this project and by what people use today, on the same machine.

    python bench/peers.py speed    --data-root DIR --out runs/peers
    python bench/peers.py accuracy --data-root DIR --out runs/peers [--images 500000 | --minutes 30]

Peers       lightly   its SimCLR, MoCo v2 and SimSiam: its transforms, heads, losses, momentum update and memory bank
            plain     SimCLR and RotNet as commonly written in one file: torchvision's transforms on PIL images
            Both read a torch DataLoader. See bench/rivals.py for what differs from their sources.
Same        the network (common.ResNet18, cifar stem) and its first weights, batch, number of images; SGD with momentum
            0.9 (RotNet: Nesterov), learning rate, warm-up, cosine, weight decay; temperature, MoCo's queue and m; of
            ours and lightly crops, grey and jitter (MoCo's crops from 0.08, as in its authors' notebook), and the width
            of SimCLR's and MoCo's heads
Own         how views are made (SimCLR's crops are bicubic here, bilinear at lightly), weights moved (SGD fused here,
            torch's default at the peers), networks fed (SimCLR's views in one forward or in two) and heads normalised;
            plain SimCLR's views (crops from 0.2, grey 0.1) and head (1024); losses, and their precision: in bf16 the
            peers' are computed in it, ours in float32. lightly's SimSiam has a hidden layer of 2048 in its projector,
            ours one as wide as the features, and the cosine for its predictor too, whose rate ours keeps
speed       images/s of whole steps (data, views, forward, backward, optimiser), beside those of the bare network: ours,
            forward, backward and optimiser on a batch that is there. The sides take short turns. A peer's workers live
            in its turns only, and what they prepare before the clock runs is used up by then. float32; then the best of
            each side: bf16 where common.bf16_gain() finds that it pays, and channels_last for the peers
accuracy    kNN (k 10 and 200) of the test split, from checkpoints, by the same code for both sides, when a training is
            over: no minute has an evaluation in it, nor imports, nor the packing of pictures. One seed: differences of
            a point or two may be its luck

The threads are those of OMP_NUM_THREADS, on a GPU one, once ours has had a turn; a peer's --workers are processes
beside them, ours has none: `taskset -c` gives both sides the same cores. What harness/threads.py sets, the peers have
too.

--out has speed.json, accuracy.json, accuracy.png (with matplotlib) and the runs. What is complete there is not run
again: the same command goes on where it was stopped, or killed, a training from its last checkpoint.
"""

import functools
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import harness  # isort: skip  # noqa: E402  # before torch: how threads wait, where memory comes from
import numpy as np  # noqa: E402
import torch  # noqa: E402
from report import peers_chart, peers_speeds  # noqa: E402
from rivals import PEERS, SIZE, Peer, bn_groups  # noqa: E402
from run import METHODS, now, optional, parts_of_a_step  # noqa: E402
from runs import commit, exit_code, machine  # noqa: E402
from torch.utils.data import RandomSampler  # noqa: E402

import common  # noqa: E402
import knn  # noqa: E402
import pictures  # noqa: E402
from harness import parser  # noqa: E402
from harness.checkpoint import save  # noqa: E402
from harness.run import Run  # noqa: E402

# Of both sides. lr per 256 images: 0.12 as in lightly's CIFAR-10 benchmark, 0.2 as in RotNet's paper; SimSiam's 0.06
# is that benchmark's at every batch size.
RECIPES = {
    "simclr": dict(lr=0.12, weight_decay=5e-4, temperature=0.5),
    "moco": dict(lr=0.12, weight_decay=5e-4, temperature=0.1, queue_size=4096, momentum_encoder=0.99),
    "simsiam": dict(lr=0.06, weight_decay=5e-4),
    "rotnet": dict(lr=0.2, weight_decay=5e-4),
}
OURS = {"simclr": dict(optimizer="sgd", lr_scaling="linear", min_crop=0.08, grey=0.2), "moco": dict(head="mlp"),
        "simsiam": {}, "rotnet": dict(schedule="cosine")}


# ------------------------------------------------------------------------------------------------
# The two sides
# ------------------------------------------------------------------------------------------------


def our_command(method, args, amp, out):
    values = {**METHODS[method].RECIPES["cifar"], **RECIPES[method], **OURS[method], "data": args.data,
              "data_root": args.data_root, "cache": args.cache, "width": args.width, "batch_size": args.batch_size,
              "seed": args.seed, "amp": amp, "device": args.device, "knn_split": "test", "knn_every": 0,
              "save_every": "5min", "out": out}
    del values["epochs"]  # the caller says how long it trains
    if method == "moco":
        values["bn_splits"] = bn_groups(args.batch_size)
    elif method == "simclr":
        values["hidden_dim"] = 8 * args.width  # as wide as the features
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return [str(ROOT / f"{method}.py"), *words, "--quiet"]


def first_backbone(method, args):
    """The network that the method's own program begins with."""
    common.seed_everything(args.seed)
    return common.ResNet18(width=args.width, zero_init_residual=method in ("simclr", "simsiam"))


def peer_of(pair, args, *rest):
    method = pair.split("-")[0]
    return Peer(pair, first_backbone(method, args), RECIPES[method], args, *rest)


# ------------------------------------------------------------------------------------------------
# speed
# ------------------------------------------------------------------------------------------------


def measure_speed(pair, args, dataset, device):
    """{precision: {side: [seconds of a step, one figure a turn]}}."""
    return {amp: seconds_in_turns(pair, args, dataset, device, amp) for amp in dict.fromkeys(["off", args.amp])}


def seconds_in_turns(pair, args, dataset, device, amp):
    method, plain, times, others = pair.split("-")[0], Run.steps, {}, {}

    def timed(step, steps=args.steps):
        start = now(device)
        for _ in range(steps):
            step()
        return (now(device) - start) / steps

    def turn_of(peer):
        batches = iter(peer.loader(sampler=RandomSampler(dataset.train.labels, num_samples=2**40)))  # never the last
        for _ in range(2 * args.workers + 1):  # as many as the loader prepares in advance, and one
            peer.step(next(batches))
        workers = max(1, args.workers)  # which deliver their batches at a time: whole rounds of them
        return timed(lambda: peer.step(next(batches)), math.ceil(args.steps / workers) * workers)

    def begin(run, images):
        parts = parts_of_a_step(method, METHODS[method], run.args, device, run.autocast, images)
        others["bare"] = lambda: timed(lambda: (parts["network"](), parts["optimizer"]()))
        for name in ("peer", "peer, channels_last"):
            if name == "peer" or pair != "moco-lightly":  # whose SplitBatchNorm knows no other layout
                layout = torch.channels_last if "," in name else torch.preserve_format
                others[name] = functools.partial(turn_of, peer_of(pair, args, dataset, device, amp, layout))
        return {}

    def watched(run):
        """The method's own steps; between its turns come those of the others."""
        start = None
        for i, batch in enumerate(plain(run)):
            turn, within = divmod(i, args.steps)
            if within == 0:
                taken = {"ours": (now(device) - start) / args.steps} if turn else begin(run, batch[0])
                for name, seconds in {**taken, **{name: work() for name, work in others.items()}}.items():
                    times.setdefault(name, []).append(seconds)
                if turn <= 1:  # all have warmed up
                    times.clear()
                start = now(device)
            yield batch

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Run, "steps", watched):
        steps = (args.rounds + 1) * args.steps + 1
        METHODS[method].main([*our_command(method, args, amp, f"{folder}/run")[1:], f"--max-steps={steps}"])
    return times


def print_speed(record):
    print(f"\n{'images/s, medians':<30}{'bare':>7}{'ours':>7}{'peer':>7}  ours/bare ours/peer")
    for pair, how, rates, share, ratios in peers_speeds(record):
        what = f"{pair}, {how}" if how == "float32" else f"  {how}"
        print(f"{what:<30}" + "".join(f"{rates[side]:7,.0f}" for side in ("bare", "ours", "peer"))
              + f"{share:11.2f}{statistics.median(ratios):6.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


# ------------------------------------------------------------------------------------------------
# accuracy
# ------------------------------------------------------------------------------------------------


def train_ours(method, args, dataset, folder):
    """The method's own program, as a user starts it."""
    command = [*our_command(method, args, args.amp, folder), f"--keep-every={args.every}"]
    if (folder / "last.pt").exists():
        places = [word for word in command if word.startswith(("--data-root", "--cache"))]
        command = [command[0], f"--resume={folder}", *places, "--quiet"]
    elif args.minutes:
        whole = METHODS[method].RECIPES[dataset.kind]["epochs"]  # of which the warm-up is a share
        command += [f"--minutes={args.minutes}", f"--warmup-epochs={args.warmup * whole:g}"]
    else:
        steps = max(1, args.images // args.batch_size)
        epochs = math.ceil(steps / (len(dataset.train) // args.batch_size))
        command += [f"--max-steps={steps}", f"--epochs={epochs}", f"--warmup-epochs={args.warmup * epochs:g}"]
    if code := exit_code(command):
        raise common.UsageError(f"{method}.py ended with exit code {code}; its own message says why")


def train_peer(pair, args, dataset, device, folder):
    """A plain loop, with checkpoints as ours makes them."""
    layout = torch.preserve_format if pair == "moco-lightly" else torch.channels_last  # see seconds_in_turns
    peer, last = peer_of(pair, args, dataset, device, args.amp, layout), folder / "last.pt"
    ours = pictures.Batches(dataset.train, args.batch_size, seed=args.seed)
    limit = 60 * args.minutes if args.minutes else math.inf
    total = 10_000 if args.minutes else max(1, args.images // args.batch_size)  # with --minutes, parts of the time
    schedule = common.LRScheduler(peer.optimizer, peer.lr, total, round(args.warmup * total))
    step, seconds = 0, 0.0
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        step, seconds = saved["step"], saved["seconds"]
        peer.optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, tensor in peer.tensors().items():
                tensor.copy_(saved["tensors"][name])
    start = time.perf_counter() - seconds  # saving counts, as in ours
    while seconds < limit and (args.minutes or step < total):
        # An epoch has its own random numbers: a resumed run draws those of one that was never stopped.
        epoch = step // len(ours)
        common.seed_everything(seed := (1_000_003 * args.seed + step) % 2**32)
        np.random.seed(seed)
        first, before = step, seconds
        for views in peer.loader(sampler=ours.order(epoch).tolist()):  # in our side's order
            schedule.step(total * seconds / limit if args.minutes else step)
            loss, step, seconds = peer.step(views), step + 1, time.perf_counter() - start
            if seconds >= limit or step == total and not args.minutes:
                break
        seconds = now(device) - start
        rate = (step - first) * args.batch_size / (seconds - before)
        print(f"  epoch {epoch + 1}, step {step:,}, loss {loss:.3f}, {rate:,.0f} images/s", flush=True)
        if not loss.isfinite():
            raise common.UsageError(f"the loss of {pair} is {loss.item()} at step {step:,}")
        state = {"step": step, "seconds": seconds, "backbone": peer.backbone_weights(), "tensors": peer.tensors(),
                 "optimizer": peer.optimizer.state_dict()}
        if step % (args.every * len(ours)) == 0:
            save(folder / f"epoch-{epoch + 1:04}.pt", state)
        save(last, state)


def points(method, args, dataset, device, folder):
    """[{step, seconds, knn_10, knn_200}] of a finished training; kept in points.json as they are found."""
    kept, backbone = folder / "points.json", common.ResNet18(width=args.width).to(device)
    rows = json.loads(kept.read_text()) if kept.exists() else []
    autocast, labels = common.pick_precision("off", device)[0], dataset.train.labels.to(device)
    for file in [None, *sorted(folder.glob("epoch-*.pt")), folder / "last.pt"]:
        saved = {"step": 0, "seconds": 0.0, "backbone": first_backbone(method, args).state_dict()}  # untrained
        if file:
            saved = torch.load(file, map_location=device, weights_only=True)
        if saved["step"] in [row["step"] for row in rows]:
            continue
        backbone.load_state_dict(saved["backbone"])
        bank, queries = (knn.extract(knn.Layers(backbone), split, dataset, device, autocast)["layer4"]
                         for split in (dataset.train, dataset.test))
        rows.append({"step": saved["step"], "seconds": saved["seconds"]})
        for k in (10, 200):
            votes = knn.knn_predict(queries, bank, labels, len(dataset.classes), min(k, len(labels))).cpu()
            rows[-1][f"knn_{k}"] = 100.0 * (votes.argmax(dim=1) == dataset.test.labels).double().mean().item()
        save(kept, json.dumps(rows).encode())
    return rows


def measure_accuracy(side, args, dataset, device):
    """The points of a side, "simclr-ours" or a pair's name, which trains where it has not done so."""
    folder, method = Path(args.out) / side, side.split("-")[0]
    folder.mkdir(exist_ok=True)
    print(f"\n{side:<17}{'images':>12}{'minutes':>10}{'kNN k 10':>12}{'k 200':>8}", flush=True)
    if not (folder / "trained").exists():
        if side in PEERS:
            train_peer(side, args, dataset, device, folder)
        else:
            train_ours(method, args, dataset, folder)
        (folder / "trained").touch()
    rows = points(method, args, dataset, device, folder)
    for row in rows:
        print(f"{'':<17}{row['step'] * args.batch_size:12,}{row['seconds'] / 60:10.2f}{row['knn_10']:12.2f}"
              f"{row['knn_200']:8.2f}", flush=True)
    return rows


def print_accuracy(results, args):
    print(f"\n{'kNN at the end':<17}{'ours, k 10':>11}{'k 200':>7}{'min':>8}{'peer, k 10':>12}{'k 200':>7}{'min':>8}"
          "  its k 10")
    for pair in args.only:
        ours, peer = results[f"{pair.split('-')[0]}-ours"], results[pair]
        cells = [f"{rows[-1]['knn_10']:{width}.2f}{rows[-1]['knn_200']:7.2f}{rows[-1]['seconds'] / 60:8.2f}"
                 for rows, width in ((ours, 11), (peer, 12))]
        goal = peer[-1]["knn_10"]
        soon = next((row["seconds"] for i, row in enumerate(ours) if min(r["knn_10"] for r in ours[i:]) >= goal), None)
        print(f"{pair:<17}{cells[0]}{cells[1]}" + (f"{soon / 60:10.2f}" if soon is not None else f"{'-':>10}"))
    print("its k 10: minutes after which ours stays at or above the peer's last kNN, k 10")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

# Flags that may be others when a comparison goes on, or that say nothing to it.
PLACES = ("comparison", "only", "out", "data_root", "cache")
FREE = {"speed": (*PLACES, "images", "minutes", "warmup", "every"),
        "accuracy": (*PLACES, "steps", "rounds")}


def parse_args(argv):
    words = parser.Parser(description=__doc__)
    add, whole, real = words.add_argument, parser.number(int, low=1), parser.number(float, above=0)
    add("comparison", choices=("speed", "accuracy"))
    add("--only", nargs="+", choices=list(PEERS), default=list(PEERS), help="pairs")
    add("--out", type=parser.path, default="runs/peers", help="folder")
    add("--data", type=parser.path, default="cifar10", help="or other small pictures with a test split")
    add("--data-root", type=parser.path, default="./data", help="where cifar10 lies")
    add("--cache", type=parser.path, help="folder for packed pictures")
    add("--width", type=whole, default=16, help="of the network; 64 is ResNet-18")
    add("--batch-size", type=parser.number(int, low=8), default=256, help="images per step")
    add("--workers", type=parser.number(int, low=0), default=max(1, min(8, os.cpu_count() - 1)),
        help="of a peer's DataLoader (default: 8, as in lightly's benchmark, or one less than there are cores)")
    add("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    add("--seed", type=parser.number(int, low=0), default=0)
    add("--steps", type=whole, default=8, help="speed: of a turn")
    add("--rounds", type=whole, default=5, help="speed: turns of each side")
    length = words.add_mutually_exclusive_group()
    length.add_argument("--images", type=whole, default=500_000, help="accuracy: seen by each side")
    length.add_argument("--minutes", type=real, help="accuracy: instead of --images; ours plans to use 99 %% of them")
    add("--warmup", type=parser.number(float, low=0, high=1), default=0.05, help="accuracy: share of the run")
    add("--every", type=whole, default=1, help="accuracy: epochs from point to point")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="of both sides; speed: float32 as well")
    args = words.parse_args(argv)
    if any(pair.endswith("lightly") for pair in args.only) and not optional("lightly"):
        words.error("lightly is not installed: pip install lightly, or --only simclr-plain rotnet-plain")
    return args


def opened(args, device):
    """The file of the comparison and what it holds; raises UsageError where that has other flags."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE[args.comparison]}
    settings |= {"recipes": RECIPES, "ours": OURS}
    settings["threads"], file = torch.get_num_threads(), Path(args.out) / f"{args.comparison}.json"
    if file.exists():
        record = json.loads(file.read_text())
        for name, value in settings.items():
            if value != (there := record["settings"].get(name)):
                raise common.UsageError(f"--out {args.out}: holds a comparison with {name} {there}, not {value}; name "
                                        "another folder")
        return file, record
    file.parent.mkdir(parents=True, exist_ok=True)
    faster = "bf16" if device.type == "cuda" else common.faster_precision(common.bf16_gain(args.width))
    amp = faster if args.amp == "auto" else args.amp
    record = {"settings": settings, "amp": amp, "places": {}, "results": {}}
    save(file, json.dumps(record, indent=1).encode())  # before anything is trained with these flags
    return file, record


def place():
    """Where and with what a side was measured."""
    names = ("torchvision", "PIL", "lightly")
    versions = (f"{name} {getattr(optional(name), '__version__', None)}" for name in names)
    return ", ".join([machine(), f"commit {commit()}", *versions])


@harness.command
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    source = pictures.open_source(args.data, args.data_root, holdout=0.0)
    dataset = pictures.pack(source, SIZE, args.cache, ("train", "test"))
    if dataset.test is None or min(split.labels.min() for split in (dataset.train, dataset.test)) < 0:
        raise common.UsageError(f"--data {args.data}: kNN wants a test split, and labels for all pictures")
    pictures.check_batch(args.batch_size, len(dataset.train))
    file, record = opened(args, device)
    args.amp, sides = record["amp"], args.only
    if args.comparison == "accuracy":  # each method's own run, which serves all of its peers, stands before theirs
        sides = dict.fromkeys(side for pair in args.only for side in (f"{pair.split('-')[0]}-ours", pair))
    for side in sides:
        if side not in record["results"]:
            measure = measure_speed if args.comparison == "speed" else measure_accuracy
            record["results"][side], record["places"][side] = measure(side, args, dataset, device), place()
            save(file, json.dumps(record, indent=1).encode())
    results = {side: record["results"][side] for side in sides}
    if args.comparison == "speed":
        print_speed({**record, "results": results})
    else:
        print_accuracy(results, args)
    if len(places := {record["places"][side] for side in sides}) > 1:
        print("not all in one place, so minutes do not compare:", *sorted(places), sep="\n  ")
    if args.comparison == "accuracy" and optional("matplotlib"):
        peers_chart(results, file.with_suffix(".png"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended too
    main()
