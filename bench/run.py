"""How fast is it, against peers in the same run?        python bench/run.py [--quick] [--only views knn] [--json FILE]

    views      views per second of SimSiam's recipe on one core: augment.py against torchvision on decoded PIL images
    packing    images per second from 512-px JPEGs for 128-px training on one core: pictures/ against decoding whole
    losses     NT-Xent and InfoNCE, forward and backward, with peak memory, N = 256 to 4096 (InfoNCE on a CPU: 1024)
    knn        10,000 queries x 50,000 images x 512 features, k 200, against the bare product of matrices
    optimizer  a step of SGD and of LARS, and MoCo's moving average, for ResNet-18
    training   images per second of each method's own program, against forward and backward of the network alone, and
               what the rest of a step is spent on
    host       dispatched operations, those on the device + those on the host, of a view and of a step; nothing is timed

The sides of a comparison take turns, so that a slow moment of the machine hits both. "times as fast" is the median of
the turns' ratios, peer's time / ours, with the least and the greatest in brackets. torchvision and Pillow are always
compared with; lightly (NT-Xent), faiss and scikit-learn (kNN) where they are installed. views and packing run on the
CPU, the rest on --device.
"""

import argparse
import collections
import contextlib
import functools
import gc
import importlib
import inspect
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, is talkative

import harness  # isort: skip  # noqa: E402  # before torch: how threads wait, where memory comes from
import PIL  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchvision import transforms as T  # noqa: E402
from torchvision.io import write_jpeg  # noqa: E402

import augment  # noqa: E402
import common  # noqa: E402
import knn  # noqa: E402
import moco  # noqa: E402
import pictures  # noqa: E402
import rotnet  # noqa: E402
import simclr  # noqa: E402
import simsiam  # noqa: E402
from harness.parser import Parser, file_to_write, number  # noqa: E402
from harness.run import Run, compiled  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = {"simsiam": simsiam, "moco": moco, "simclr": simclr, "rotnet": rotnet}


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def optional(name):
    """A peer that may be missing: the module or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def now(device):
    """The clock, once the device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(work, device):
    start = now(device)
    work()
    return now(device) - start


def compare(sides, rounds, device):
    """Seconds of {name: function}, the sides in turn, after one turn to warm up: {name: [seconds, ...]}."""
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            taken = seconds(work, device)
            if turn:
                times[name].append(taken)
    return times


def peak_megabytes(work, device):
    """What `work` allocates at once beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6


class Report:
    """Prints the rows of the table, 79 columns, and keeps them for the JSON file."""

    def __init__(self):
        self.rows = []
        print(f"{'what':<31}{'ours':>12}  {'peer':<18}{'times as fast':>16}")

    def row(self, section, what, times, work=1, unit="ms", **figures):
        """A line for each peer.

        times    {"ours": [seconds of each turn], peer: [...], ...}.
        work     how many units a turn does.  unit: "ms" prints the time of a turn, "/s" the units per second.
        figures  further measurements, for the JSON file.
        """
        ours = times["ours"]
        for peer, others in [(p, t) for p, t in times.items() if p != "ours"]:
            ratios = [b / a for a, b in zip(ours, others, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            mine, theirs = (self.figure(t, work, unit) for t in (ours, others))
            print(f"{what:<31}{mine:>12}  {f'{peer} {theirs}':<18}{ratio:>16}", flush=True)
            self.rows.append({"section": section, "what": what, "peer": peer, "unit": unit, "work": work,
                              "ours_seconds": ours, "peer_seconds": others, **figures})

    def operations(self, what, view, step):
        """view, step: {part: [operations on the device, on the host]}."""
        for name, counts in (("view", view), ("step", step)):
            device, host = (sum(both) for both in zip(*counts.values(), strict=True))
            print(f"{what}, {name}: {device} + {host} operations", flush=True)
            words = ", ".join(f"{part} {a} + {b}" for part, (a, b) in counts.items())
            print(textwrap.fill(words, 79, initial_indent="    ", subsequent_indent="    "), flush=True)
            self.rows.append({"section": "host", "what": f"{what}, {name}", "operations": dict(counts)})

    @staticmethod
    def figure(times, work, unit):
        taken = statistics.median(times)
        if unit == "ms":
            return f"{1000 * taken:,.{0 if taken >= 0.1 else 1}f} ms"
        return f"{work / taken:,.0f}{unit}"


# ------------------------------------------------------------------------------------------------
# views, packing: one core of the host
# ------------------------------------------------------------------------------------------------


def pillow_blur(image):
    # As the papers' authors do; several times faster than torchvision's own.
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def their_view(size, blur):
    view = T.Compose([
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        *([T.RandomApply([pillow_blur], p=0.5)] if blur else []),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ])
    return lambda pictures: torch.stack([view(picture) for picture in pictures])


def measure_views(report, rounds, device, batches=4):
    host = torch.device("cpu")
    for size, stored, batch, blur in [(32, 32, 256, False), (128, 144, 64, True), (224, 256, 32, True)]:
        images = F.interpolate(torch.rand(batch, 3, 8, 8), size=stored, mode="bicubic")          # smooth colours
        images = images.clamp(0, 1).mul(255).byte()
        pictures = [T.functional.to_pil_image(image) for image in images]
        recipe = argparse.Namespace(image_size=size, view_size=None, min_crop=0.2, blur=0.5 * blur)
        ours = functools.partial(simsiam.view, aspect=torch.ones(batch), generator=common.Draws(0), args=recipe,
                                 mean=MEAN, std=STD)
        theirs = their_view(size, blur)
        times = compare({"ours": lambda f=ours, x=images: [f(x) for _ in range(batches)],
                         "PIL": lambda f=theirs, x=pictures: [f(x) for _ in range(batches)]}, rounds, host)
        copies = peak_megabytes(lambda f=ours, x=images: f(x), host) / (batch * 3 * size * size * 4 / 1e6)
        report.row("views", f"views {size} px{', blur' if blur else ''}", times, batches * batch, "/s", copies=copies)
        print(f"    peak memory {copies:.1f} float copies of the views", flush=True)


def draw_jpegs(folder, count, side, finest):
    """Sums of noise at several scales, the finest of `finest` cells a side: more fine detail, less to gain."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        picture = torch.zeros(1, 3, side, side)
        for cells in [c for c in (4, 16, 64, 128, 256) if c <= finest]:
            noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
            picture += F.interpolate(noise, (side, side), mode="bilinear") * (4 / cells) ** 0.5
        pixels = ((picture[0] / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)                     # (3, side, side)
        write_jpeg(pixels, str(folder / f"{i:05d}.jpg"), quality=90)


def packed(folder, size):
    with tempfile.TemporaryDirectory() as cache:
        pictures.pack(pictures.open_source(folder), size, cache=cache, quiet=True, workers=1)


def decoded_whole(folder, size):
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR).tobytes()


def measure_packing(report, rounds, device):
    count = 100 if rounds < 5 else 1000
    for name, finest in (("smooth", 64), ("detailed", 256)):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            draw_jpegs(folder, count, 512, finest)
            times = compare({"ours": lambda f=folder: packed(f, 128), "whole": lambda f=folder: decoded_whole(f, 128)},
                            min(rounds, 5), torch.device("cpu"))
            report.row("packing", f"packing 512 -> 128 px, {name}", times, count, "/s")


# ------------------------------------------------------------------------------------------------
# losses, kNN, optimisers
# ------------------------------------------------------------------------------------------------


def forward_backward(loss, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return lambda: loss(*leaves).backward()


def measure_losses(report, rounds, device):
    lightly, sizes = optional("lightly.loss"), (256, 1024, 4096)
    if device.type == "cpu" and rounds < 5:
        sizes = (256, 1024)
    for n in sizes:
        z1, z2 = torch.randn(2, n, 128, device=device)
        sides = {"ours": forward_backward(lambda a, b: simclr.nt_xent(a, b, 0.5), z1, z2)}
        if lightly:
            sides["lightly"] = forward_backward(lightly.NTXentLoss(0.5), z1, z2)
        else:  # what the loss costs at least: its product of matrices, forward and backward
            def product(a, b):
                z = torch.cat([a, b])
                return (z @ z.T).sum()
            sides["product"] = forward_backward(product, z1, z2)
        times = compare(sides, rounds if n < 4096 else min(rounds, 5), device)
        peak = peak_megabytes(sides["ours"], device)
        report.row("losses", f"NT-Xent N {n}, {peak:,.0f} MB", times, peak_megabytes=peak)
    queue = F.normalize(torch.randn(65536, 128, device=device), dim=1)
    for n in sizes if device.type == "cuda" else sizes[:-1]:
        q, k = F.normalize(torch.randn(2, n, 128, device=device), dim=2)
        sides = {"ours": forward_backward(lambda a, k=k: moco.info_nce(a, k, queue, 0.2), q),
                 "product": forward_backward(lambda a: (a @ queue.T).sum(), q)}
        times = compare(sides, min(rounds, 3), device)
        peak = peak_megabytes(sides["ours"], device)
        report.row("losses", f"InfoNCE N {n}, K 65536, {peak:,.0f} MB", times, peak_megabytes=peak)


def measure_knn(report, rounds, device):
    asked = 2_000 if rounds < 5 and device.type == "cpu" else 10_000
    bank, queries = torch.randn(50_000, 512, device=device), torch.randn(asked, 512, device=device)
    labels = torch.randint(0, 10, (50_000,), device=device)

    def product():
        unit = F.normalize(bank, dim=1)
        for part in F.normalize(queries, dim=1).split(500):
            part @ unit.T

    sides = {"ours": lambda: knn.knn_predict(queries, bank, labels, 10, 200), "product": product}
    faiss, sklearn = optional("faiss"), optional("sklearn.neighbors")
    if faiss and device.type == "cpu":
        index = faiss.IndexFlatIP(512)
        index.add(F.normalize(bank, dim=1).numpy())
        unit = F.normalize(queries, dim=1).numpy()
        sides["faiss"] = lambda: index.search(unit, 200)
    if sklearn and device.type == "cpu":
        model = sklearn.KNeighborsClassifier(200, metric="cosine").fit(bank.numpy(), labels.numpy())
        sides["sklearn"] = lambda: model.predict_proba(queries.numpy())
    times = compare(sides, min(rounds, 5), device)
    peak = peak_megabytes(sides["ours"], device)
    report.row("knn", f"kNN {asked // 1000}k x 50k x 512, {peak:,.0f} MB", times, peak_megabytes=peak)


def measure_optimizers(report, rounds, device):
    def prepared():
        model = common.ResNet18().to(device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    model, other = prepared(), prepared()
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4).step  # torch's choice
    fused = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True).step
    lars = simclr.LARS(other.parameters(), 0.1, weight_decay=1e-4).step

    def one_by_one():
        with torch.no_grad():
            for k, q in zip(model.parameters(), other.parameters(), strict=True):
                k.mul_(0.99).add_(q, alpha=0.01)

    for name, sides in {
        "SGD, fused": {"ours": fused, "SGD": plain},
        "LARS": {"ours": lars, "SGD": plain},
        "EMA": {"ours": lambda: moco.ema_update(model.parameters(), other.parameters(), 0.99), "loop": one_by_one},
    }.items():
        report.row("optimizer", f"{name}, ResNet-18", compare(sides, 3 * rounds, device))


# ------------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------------


def parts_of_a_step(method, module, args, device, autocast, images=None):
    """What a step of a method is made of, each part alone on data that are there already: {name: function}."""
    model = module.build_model(args).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, weight_decay=1e-4,
                                fused=device.type != "meta")
    compiled(model, None, argparse.Namespace(args=args, device=device, say=lambda text: None))
    n, size = args.batch_size, args.image_size
    if images is None:
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8).to(device)
    generator = common.Draws(0)

    def view():
        return module.view(images, torch.ones(n), generator, args, MEAN, STD)

    x = view()
    outputs = {"moco": lambda: model(x, x, torch.randperm(n, device=device))[:1],
               "simclr": lambda: [model(torch.cat([x, x]))],
               "simsiam": lambda: [model(x)[0], model(x)[0]],
               "rotnet": lambda: [model(rotnet.rotation_batch(x)[0])]}[method]

    def network():
        model.zero_grad()
        with autocast():
            results = outputs()
        torch.autograd.backward(results, [torch.randn_like(y) for y in results])

    a, b = torch.randn(2, n, 4 if method == "rotnet" else args.dim, device=device)
    loss = {"moco": lambda q: moco.info_nce(q, b, model.queue, args.temperature),
            "simclr": lambda z: simclr.nt_xent(z, b, args.temperature),
            "simsiam": lambda p: simsiam.symmetric_loss(p, b, p, b),
            "rotnet": lambda y: rotnet.focal_loss(y.repeat(4, 1), torch.arange(4, device=device).repeat(n))}[method]

    def update():
        optimizer.step()
        if method == "moco":
            moco.ema_update(model.key_encoder.parameters(), model.query_parameters(), 0.99)

    views = {"rotnet": lambda: rotnet.rotation_batch(view())}.get(method, lambda: (view(), view()))
    return {"network": network, "views": views, "loss": forward_backward(loss, a), "optimizer": update}


def seconds_of_a_step(module, flags, warm, steps, device):
    """Mean over `steps` steps of a method's own program, after `warm` others."""
    marks, plain = [], Run.steps

    def watched(run):
        for batch in plain(run):
            if run.step in (warm, warm + steps):
                marks.append(now(device))
            yield batch

    with mock.patch.object(Run, "steps", watched):
        module.main([str(flag) for flag in flags])
    return (marks[1] - marks[0]) / steps


def training_flags(given, steps, device, cache):
    """given: this program's flags."""
    return ["--data", "toy", "--image-size", given.size, "--batch-size", given.batch, "--width", given.width, "--stem",
            given.stem, "--max-steps", steps, "--knn-every", 0, "--quiet", "--device", device.type, "--cache", cache]


def measure_training(report, rounds, device, given):
    warm, steps, batch = 5, given.steps, given.batch
    last = warm + steps + 1  # begins when the one before it is done, and takes the end of the run
    pictures.TOY_COUNT["train"] = batch * last  # one epoch: no pause in between
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods:
            module, parts = METHODS[method], {}
            gc.collect()  # the method before: its memory would count as this one's
            flags = [*training_flags(given, last, device, folder), *["--compile"] * given.compile]
            times, peak = {"ours": []}, None
            for turn in range(min(rounds, 5)):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                out = f"{folder}/{method}-{turn}"
                times["ours"].append(seconds_of_a_step(module, [*flags, "--out", out], warm, steps, device))
                if turn == 0:
                    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else None
                    args = argparse.Namespace(**harness.load_checkpoint(out)["args"])
                    flags += ["--amp", args.amp]  # of all turns and parts, as the first one found
                    parts = parts_of_a_step(method, module, args, device, common.pick_precision(args.amp, device)[0])
                    for part in parts.values():
                        seconds(lambda part=part: [part() for _ in range(3)], device)
                for name, part in parts.items():
                    taken = seconds(lambda part=part: [part() for _ in range(steps)], device) / steps
                    times.setdefault(name, []).append(taken)
            report_training(report, f"{method} {given.size} px, bs {batch}, w {given.width}", times, batch, peak)


def report_training(report, what, times, batch, peak):
    """times: seconds of a step, "ours" of the whole, others of its parts.  peak: megabytes, or None."""
    shares = {name: statistics.median(b / a for a, b in zip(times["ours"], part, strict=True))
              for name, part in times.items() if name != "ours"}
    report.row("training", what, {name: times[name] for name in ("ours", "network")}, batch, "/s", parts=times,
               shares=shares, peak_megabytes=peak)
    print("    " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
          + f", rest {1 - sum(shares.values()):.1%}" + (f"; peak {peak:,.0f} MB" if peak else ""), flush=True)


# ------------------------------------------------------------------------------------------------
# host
# ------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Counts dispatched operations by `part`, on the device "meta" and on the host: {part: [device, host]}."""

    def __init__(self):
        super().__init__()
        self.part, self.counts = "rest", collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        self.counts[self.part][all(x.device.type != "meta" for x in tensors)] += 1
        return result

    def calls(self, name, function):
        """function, whose operations count as those of `name`, unless another of these called it."""

        @functools.wraps(function)
        def named(*args, **kwargs):
            outer, self.part = self.part, name if self.part == "rest" else self.part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = outer

        return named


@contextlib.contextmanager
def counted():
    """Counts by the function of augment.py that is at work; what none of them does is the rest."""
    counts = Counted()
    named = {name: counts.calls(name, function) for name, function in inspect.getmembers(augment, inspect.isfunction)}
    with mock.patch.multiple(augment, **named), counts:
        yield counts.counts


autocast_of_torch = torch.autocast


@mock.patch.object(torch, "autocast", lambda kind, **rest: autocast_of_torch("cpu", **rest))  # it knows no "meta"
def measure_host(report, rounds, device, batch=512):
    meta = torch.device("meta")
    for size, kind in ((32, "cifar"), (128, "photos")):
        for method in ("simsiam", "moco", "simclr"):
            module = METHODS[method]
            args = module.parse_args(["--image-size", str(size), "--batch-size", str(batch)])
            harness.fill_flags(args, module.RECIPES[kind])
            if method == "moco":
                args.bn_splits = moco.bn_groups(args.bn_splits, batch)
            images = torch.empty(batch, 3, size, size, dtype=torch.uint8, device=meta)
            aspect, generator = torch.ones(batch), common.Draws(0)
            module.view(images, aspect, generator, args, MEAN, STD)     # makes what is made once
            with counted() as view:
                module.view(images, aspect, generator, args, MEAN, STD)
            step, parts = {}, parts_of_a_step(method, module, args, meta, contextlib.nullcontext)
            for name in ("network", "views", "loss"):  # no fused optimizer knows "meta"
                with counted() as counts:
                    parts[name]()
                step[name] = [sum(both) for both in zip(*counts.values(), strict=True)]
            report.operations(f"{method} {size} px", view, step)


SECTIONS = {"views": measure_views, "packing": measure_packing, "losses": measure_losses, "knn": measure_knn,
            "optimizer": measure_optimizers, "training": measure_training, "host": measure_host}


@harness.command
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=f"what to measure: {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 11, of less, in four minutes")
    parser.add_argument("--device", default="auto", help="of all but views and packing")
    parser.add_argument("--size", type=number(int, low=8), default=32, help="of training: pixels a side")
    parser.add_argument("--batch", type=number(int, low=8), default=None,
                        help="of training: images per step (default: 64; 32 if --quick)")
    parser.add_argument("--width", type=number(int, low=1), default=16, help="of training: of the network")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="of training")
    parser.add_argument("--steps", type=number(int, low=1), default=None,
                        help="of training: a turn (default: 20; 5 if --quick)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help="of training")
    parser.add_argument("--compile", action="store_true", help="of training: with torch.compile, its time left out")
    parser.add_argument("--json", metavar="FILE", type=file_to_write(".json"),
                        help="also write the seconds of every turn here")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    rounds = 3 if args.quick else 11
    args.batch, args.steps = args.batch or (32 if args.quick else 64), args.steps or (5 if args.quick else 20)
    torch.manual_seed(0)
    random.seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"{name}\n{versions}\n{rounds} turns, fewer of what takes long\n")
    report, threads = Report(), torch.get_num_threads()
    for section in args.only:
        torch.set_num_threads(1 if section in ("views", "packing") else threads)
        more = (args,) if section == "training" else ()
        SECTIONS[section](report, rounds, device, *more)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": name, "versions": versions, "rows": report.rows}, indent=1))


if __name__ == "__main__":
    main()
