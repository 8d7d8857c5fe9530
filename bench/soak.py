"""Kill training runs at random moments, resume them, and compare the end with a run that was never disturbed.

    python bench/soak.py --kills 30

Every method, and linear.py fine-tuning a network, runs once undisturbed. Then the same command is started again
and ended by SIGKILL (mostly), SIGTERM or SIGINT at a random moment, --resume'd, ended again, and so on, the last time
left to finish. Weights, optimiser, queue, moving averages, random generators and metrics must then be bit-equal.
On the CPU; some ten minutes on two cores. Exit code 1 if anything differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import harness  # noqa: E402
from harness.folder import read_metrics  # noqa: E402
from harness.parser import Parser  # noqa: E402

SMALL = ["--data", "pictures", "--width", "4", "--image-size", "16", "--stem", "cifar", "--batch-size", "16", "--knn-k",
         "20", "--amp", "off", "--device", "cpu", "--quiet", "--save-every", "0.004min"]
RUNS = {
    "simsiam": ["simsiam.py", *SMALL, "--epochs", "6", "--dim", "64", "--pred-dim", "16"],
    "moco": ["moco.py", *SMALL, "--epochs", "6", "--symmetric", "--queue-size", "256"],
    "simclr": ["simclr.py", *SMALL, "--epochs", "6", "--optimizer", "lars", "--lr", "0.1"],
    "rotnet": ["rotnet.py", *SMALL, "--epochs", "4"],
    "linear": ["linear.py", "--finetune", "--checkpoint", "simsiam", "--amp", "off", "--device", "cpu", "--quiet",
               "--epochs", "8", "--batch-size", "16", "--save-every", "0.004min"],
}


def draw_pictures(folder):
    """600 small pictures of two classes, which differ in whether they vary from left to right."""
    g = torch.Generator().manual_seed(0)
    for i in range(600):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.rand(3, 16, 16 if i % 2 else 1, generator=g).expand(3, 16, 16)
        save_image(pixels.contiguous(), path)


def start(command, folder):
    environment = dict(os.environ, XDG_CACHE_HOME=str(folder / "cache"))
    return subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=folder, env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate()
    if process.returncode != 0:
        sys.exit(f"a run that was left alone ended with {process.returncode}:\n{out}{err}")


def disturb(process, run, rng, longest):
    """End the process at a random moment after its training began; what it was ended by, or None if it was done."""
    log = run / "log.txt"
    before = log.stat().st_size if log.exists() else 0  # it speaks once it listens to signals
    while process.poll() is None and (not log.exists() or log.stat().st_size == before):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, longest))
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    if process.poll() is not None:
        return finish(process)
    process.send_signal(number)
    _, err = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL, 128 + number):
        sys.exit(f"{signal.Signals(number).name} ended a run with {process.returncode}:\n{err}")
    return None if process.returncode == 0 else number


def differences(one, two, path=""):
    """Where two checkpoints differ, as text."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted({*one, *two}, key=str):
            if key in ("seconds", "images_per_second", "knn_seconds", "args"):  # times and the folder's name
                continue
            if key not in one or key not in two:
                yield f"{path}.{key} stands in one only"
            else:
                yield from differences(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)) and len(one) == len(two):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif torch.is_tensor(one):
        if not torch.equal(one, two):
            yield f"{path}: up to {(one.double() - two.double()).abs().max():.3g} apart"
    elif one != two:
        yield f"{path}: {one} and {two}"


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="in all, shared among the programs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args(argv)
    rng, share = random.Random(args.seed), -(-args.kills // len(args.only))
    total, bad, began = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        draw_pictures(folder / "pictures")
        for name, command in RUNS.items():
            needed = name == "simsiam" and "linear" in args.only
            if name not in args.only and not needed:
                continue
            finish(start([*command, "--out", name], folder))
            # So that about half of the way is left when the last of its ends has come.
            longest = read_metrics(folder / name)[-1]["seconds"] / share
            if name not in args.only:
                continue
            killed, kinds, at = folder / f"{name}-killed", [], []
            process = start([*command, "--out", killed.name], folder)
            while len(kinds) < share:
                number = disturb(process, killed, rng, longest)
                if number is None and process.poll() == 0:
                    break
                kinds.append(signal.Signals(number).name)
                resumable = (killed / "last.pt").exists()
                at.append(harness.load_checkpoint(killed)["step"] if resumable else 0)
                again = [command[0], "--resume", killed.name] if resumable else [*command, "--out", killed.name]
                process = start(again, folder)
            finish(process)
            one, two = ({**torch.load(f / "last.pt", weights_only=True), "metrics": read_metrics(f)}
                        for f in (folder / name, killed))
            found = list(differences(one, two))
            total, bad = total + len(kinds), bad + bool(found)
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
            print(f"{name:8} {len(kinds):3} ends ({counts}), resumed at steps {', '.join(map(str, at))} of "
                  f"{one['step']}: {'bit-equal' if not found else 'DIFFERENT'}", flush=True)
            print("\n".join(f"    {line}" for line in found[:8]), end="\n" if found else "")
    print(f"{total} ends, {bad} programs that differ, {time.perf_counter() - began:.0f} s")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
