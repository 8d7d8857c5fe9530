"""How soon does a method reach a kNN accuracy?

    python bench/race.py --target 90 --out runs/race -- simclr.py --data cifar10 --data-root DIR --knn-split test ...
    python bench/race.py --target 80 --out runs/race -- simclr.py

Starts the command after `--` with `--out OUT/run` and an evaluation after every epoch, and prints kNN with 10 and with
200 neighbours against seconds: from the start of the process on, so that imports, packing and compilation count, but
without the evaluations, which are no part of training. Ends the run when the better of the two reaches the target.
Exit code 1 if it never does.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


def training_seconds(rows, batch_size):
    """[seconds of training up to each row], from the steps between rows and the rate of each."""
    total, sums = 0.0, [0.0]
    for before, row in zip(rows, rows[1:], strict=False):
        total += (row["step"] - before["step"]) * batch_size / row["images_per_second"]
        sums.append(total)
    return sums


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=90.0, help="percent kNN")
    parser.add_argument("--out", required=True, help="folder of the race; the run is OUT/run")
    parser.add_argument("command", nargs="+", help="METHOD.py and its flags, after --")
    args = parser.parse_args(argv)
    run = Path(args.out) / "run"
    if run.exists():
        parser.error(f"--out {args.out}: holds a race already")
    began = time.perf_counter()
    method, *flags = args.command
    process = subprocess.Popen([sys.executable, str(ROOT / method), *flags, "--out", str(run), "--quiet",
                                "--save-every", "1000000", "--knn-k", "200"])
    started, printed, rows = None, 0, []
    try:
        while process.poll() is None or printed < len(rows):
            time.sleep(0.02)
            if started is None:
                started = time.perf_counter() - began if (run / "args.json").exists() else None
                continue
            rows = common.read_metrics(run)
            for i in range(printed, len(rows)):
                if i == 0:
                    batch_size = common.json.loads((run / "args.json").read_text())["batch_size"]
                    print(f"start-up {started:.1f} s\n\n{'epoch':>6}{'seconds':>10}{'kNN k 10':>11}{'k 200':>9}")
                row, seconds = rows[i], started + training_seconds(rows[: i + 1], batch_size)[-1]
                print(f"{row['epoch']:6}{seconds:10.1f}{row['knn_10']:10.2f}%{row['knn']:8.2f}%", flush=True)
                if max(row["knn"], row["knn_10"]) >= args.target:
                    process.send_signal(signal.SIGTERM)
                    process.wait()
                    print(f"\n{args.target:g} % after {seconds:.1f} s of training, start-up included "
                          f"({row['seconds'] + started:.1f} s with evaluations)")
                    return 0
            printed = len(rows)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    print(f"\n{args.target:g} % was not reached (exit code {process.returncode})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
