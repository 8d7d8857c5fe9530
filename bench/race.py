"""How soon does a method reach a kNN accuracy?

    python bench/race.py --target 90 --out runs/race -- simclr.py --data cifar10 --data-root DIR --knn-split test ...
    python bench/race.py --target 80 --out runs/race -- simclr.py
    python bench/race.py --final --target 90 --out runs/challenge -- simclr.py --data cifar10 --knn-split test --compile

Starts the command after `--` with `--out OUT/run` and, unless it says otherwise, an evaluation after every epoch, and
prints kNN with 10 and with 200 neighbours against seconds: from the start of the process on, so that imports, packing
and compilation count, but without the evaluations, which are no part of training. Ends the run when the better of the
two reaches the target. The table stays in OUT/race.json. Exit code 1 if the target is never reached.

With --final no epoch is chosen: the whole schedule runs, and its end alone counts, with 10 neighbours whose votes weigh
the same. That is the public challenge on CIFAR-10 (dkobak/simclr-cifar10): 90 % on the test split, wall clock, one GPU;
there 500 epochs reach 90.3 % in 99 minutes on an A100, the mean of three runs.
"""

import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from harness.folder import read_metrics  # noqa: E402
from harness.parser import Parser, number  # noqa: E402


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--target", type=number(float, above=0, high=100), default=90.0, help="percent kNN")
    parser.add_argument("--final", action="store_true", help="only the end counts, k 10, unweighted votes")
    parser.add_argument("--out", required=True, help="folder of the race; the run is OUT/run")
    parser.add_argument("command", nargs="+", help="METHOD.py and its flags, after --")
    args = parser.parse_args(argv)
    run = Path(args.out) / "run"
    method, *flags = args.command
    # At so high a temperature all votes weigh the same, but for ties: there the nearer neighbours win.
    final = ["--knn-every", "1000000", "--knn-t", "1000"] if args.final else []
    if not (ROOT / method).is_file():
        parser.error(f"{method}: no such program; one of simsiam.py, moco.py, simclr.py, rotnet.py")
    if run.exists():
        parser.error(f"--out {args.out}: holds a race already")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"python {method} {' '.join(flags)}\ntorch {torch.__version__}, {machine}")
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / method), "--knn-every", "1", *flags, *final, "--out",
                                str(run), "--quiet", "--save-every", "1000000", "--knn-k", "200"])
    started, evaluating, table, reached, ended = None, 0.0, [], False, False
    try:
        while not ended:
            time.sleep(0.02)
            ended = process.poll() is not None  # asked before reading: no row is missed
            if started is None and (run / "args.json").exists():
                started = time.perf_counter() - began
            rows = read_metrics(run)
            for row in rows[len(table):]:
                if not table:
                    print(f"start-up {started:.1f} s\n\n{'epoch':>6}{'seconds':>10}{'kNN k 10':>11}{'k 200':>9}")
                evaluating += row.get("knn_seconds", 0.0)
                seconds = started + row["seconds"] - evaluating
                table.append({"epoch": row["epoch"], "seconds": seconds, "knn": row["knn"],
                              "knn_10": row.get("knn_10")})
                if row["knn"] is not None:
                    print(f"{row['epoch']:6}{seconds:10.1f}{row['knn_10']:10.2f}%{row['knn']:8.2f}%", flush=True)
                    reached = (row["epoch"] > 0 and row["knn_10"] >= args.target if args.final else
                               max(row["knn"], row["knn_10"]) >= args.target)
                if reached:
                    print(f"\n{args.target:g} % after {seconds:.1f} s of training, start-up included "
                          f"({row['seconds'] + started:.1f} s with evaluations)")
                    return 0
    finally:
        if process.poll() is None and not (args.final and reached):
            process.send_signal(signal.SIGTERM)
        process.wait()
        if table:
            record = {"command": args.command, "torch": torch.__version__, "machine": machine, "target": args.target,
                      "reached": reached, "rows": table}
            (Path(args.out) / "race.json").write_text(json.dumps(record, indent=1))
    print(f"\n{args.target:g} % was not reached (exit code {process.returncode})")
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is ended too
    sys.exit(main())
