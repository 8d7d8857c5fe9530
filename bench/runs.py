"""Run a list of trainings, one after the other, and keep what each reached.

    python bench/runs.py results/photos.txt --data ../shared/photos

Each line of the list is `NAME METHOD.py FLAGS`; what stands after # is left out, DATA stands for --data, RUNS for the
folder of the list's runs, so that a line may begin with another's network: `probe linear.py --checkpoint RUNS/NAME`.
The runs lie in runs/LIST/NAME, where an interrupted one goes on; those that are done are skipped, so several of these
programs may work on one list at a time. Beside the list LIST/NAME.jsonl keeps the metrics of every epoch, and
LIST.jsonl a row: command, commit, machine, seconds, the last row of the metrics and, where it was pre-training, kNN
before training, kNN of the training images by leave-one-out (each against all others: more images than a validation
split has, so less noise) and `linear`, the top-1 of a linear layer on cached features (of linear.py, the top-1 that it
reports).
"""

import fcntl
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import harness.threads  # noqa: E402, F401, I001  # before torch
import numpy as np  # noqa: E402
import torch  # noqa: E402

import knn  # noqa: E402
from harness.folder import read_metrics  # noqa: E402
from harness.parser import Parser  # noqa: E402


def leave_one_out(features, labels, classes, ks=(20, 200)):
    """{"loo_20": percent, ...}: top-1 of every labelled row, its neighbours being all others. (N, C), (N,) tensors."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    similarity, rows = knn.nearest(features, features, min(max(ks) + 1, len(labels)))
    itself = rows == torch.arange(len(rows))[:, None]
    itself[~itself.any(dim=1), -1] = True  # hidden behind copies of itself: leave out the last
    similarity, rows = (x[~itself].view(len(labels), -1) for x in (similarity, rows))
    right = {k: knn.vote(similarity[:, :k], rows[:, :k], labels, classes, 0.1).argmax(dim=1) == labels for k in ks}
    return {f"loo_{k}": round(100.0 * hits.double().mean().item(), 2) for k, hits in right.items()}


def machine():
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{model} CPU"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit():
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def exit_code(command, **settings):
    """Run a Python program to its end; where this one is told to stop (Ctrl-C comes here alone), it is, and saves."""
    process = subprocess.Popen([sys.executable, *command], start_new_session=True, **settings)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


def score(run):
    """{"loo_20": ..., "linear": percent} of a finished run, or {} where its training images have no labels."""
    def call(*words):
        subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)

    if (run / "scores.json").exists():  # linear.py's
        return {"linear": next(iter(json.loads((run / "scores.json").read_text()).values()))["top1"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.npz"
        call(ROOT / "knn.py", "--checkpoint", run / "last.pt", "--split", "train", "--features", file)
        found = np.load(file)
    features, labels = torch.from_numpy(found["features"]), torch.from_numpy(found["labels"])
    if int(labels.amax()) < 1:  # none, or of one class
        return {}
    on_test = json.loads((run / "args.json").read_text())["knn_split"] == "test"
    if not (run / "linear/scores.json").exists():
        begin = ("--resume", run / "linear") if (run / "linear/last.pt").exists() else (
            "--checkpoint", run, "--out", run / "linear", *(("--no-validation", "--test") if on_test else ()))
        call(ROOT / "linear.py", *begin, "--quiet")
    return leave_one_out(features, labels, len(found["classes"])) | score(run / "linear")


def one(name, command, run, data, out, lock):
    words = command.replace("RUNS/", f"{run.parent}/")
    method, *flags = (word if word != "DATA" else data for word in shlex.split(words))
    begun = Path(f"{run}.command")
    if not (run / "last.pt").exists():
        begun.write_text(command)
        flags += ["--out", str(run)]
    elif begun.exists() and begun.read_text() != command:
        sys.exit(f"{name}: was begun as {begun.read_text()!r}; take that line again, or another name")
    else:
        flags = ["--resume", str(run)]
    print(f"{name}: python {method} {' '.join(flags)}", flush=True)
    record = {"name": name, "command": command, "commit": commit(), "machine": machine()}
    with open(f"{run}.log", "a") as log:  # the lock is the training's too: it holds as long as that lives
        code = exit_code([str(ROOT / method), *flags, "--quiet"], stdout=log, stderr=log, pass_fds=[lock.fileno()])
    if not 0 <= code < 128:
        sys.exit(f"{name}: ended by a signal; the same command goes on with it")
    rows = read_metrics(run)
    record["code"] = code
    if code == 0:
        record |= {"untrained": rows[0].get("knn"), **rows[-1], **score(run)}
        logs = out.with_suffix("")
        logs.mkdir(exist_ok=True)
        shutil.copy(run / "metrics.jsonl", logs / f"{name}.jsonl")
    with open(out, "a") as file:
        print(json.dumps(record), file=file)
    said = ", ".join(f"{key} {record[key]}" for key in ("loo_20", "untrained", "knn", "linear") if key in record)
    print(f"{name}: " + (f"{said}, {record['seconds']:.0f} s" if code == 0 else f"exit code {code}, see {run}.log"),
          flush=True)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("list", type=Path, help="the file of commands")
    parser.add_argument("--data", default="toy", help="what DATA stands for")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs (default: runs)")
    args = parser.parse_args(argv)
    if not args.list.is_file():
        parser.error(f"{args.list}: no such file")
    out, folder = args.list.with_suffix(".jsonl"), args.runs.absolute() / args.list.stem
    folder.mkdir(parents=True, exist_ok=True)
    while True:  # the list may have grown meanwhile
        lines = [line.split("#")[0].strip() for line in args.list.read_text().splitlines()]
        done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
        todo = [line.split(maxsplit=1) for line in lines if line and line.split()[0] not in done]
        waiting = {name for name, command in todo for other, _ in todo
                   if name != other in re.findall(r"RUNS/(\S+)", command)}  # for a run that they begin with
        for name, command in todo:
            if name in waiting:
                continue
            with open(folder / f"{name}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # another of these programs is at it
                if out.exists() and any(json.loads(line)["name"] == name for line in out.read_text().splitlines()):
                    continue
                one(name, command, folder / name, args.data, out, lock)
                break
        else:
            if not waiting:
                return 0
            time.sleep(5)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
