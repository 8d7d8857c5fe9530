"""The folder of a run: args.json, metrics.jsonl, log.txt, and checkpoints, written by one program at a time."""

import contextlib
import itertools
import json
import os
import shutil
import time
from pathlib import Path

from common import UsageError
from harness.checkpoint import save
from harness.distributed import same

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def read_metrics(folder):
    """The rows of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            rows.append(json.loads(line))
    return rows


class Folder:
    """The place that --out names, or runs/<name>-<time>; nothing is written before make().

    resumes  whether a run stands there to go on with.
    raises   UsageError where it could not be made.
    """

    def __init__(self, out, name, resumes=False):
        self.unnamed, self.resumes, self.log = out is None, resumes, None
        self.path = Path(out or same(f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not self.there.is_dir() or not os.access(self.there, os.W_OK):
            raise UsageError(f"--out {self.path}: {self.there} is not a folder that can be written to")

    def make(self, needed, args, epoch):
        """Make and lock it; keep the metrics of a resumed run up to its checkpoint's epoch, write args.json.

        needed  bytes that the checkpoints will take.
        raises  UsageError where there is no space, another program trains there, or it cannot be written.
        """
        free = shutil.disk_usage(self.there).free
        if free < needed:
            raise UsageError(f"--out {self.path}: {free / 1e6:,.0f} MB free, checkpoints need "
                             f"{needed / 1e6:,.0f} MB; make room or choose another folder")
        try:
            named = self.path
            for number in itertools.count(2):
                try:
                    self.path.mkdir(parents=True, exist_ok=not self.unnamed)
                    break
                except FileExistsError:  # another run began in the same second
                    if not self.unnamed:
                        raise
                    self.path = Path(f"{named}-{number}")
            self._lock()
            # Epochs after the checkpoint are run again: their lines must not stand there twice.
            rows = [row for row in read_metrics(self.path) if row["epoch"] <= epoch] if self.resumes else []
            save(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
            save(self.path / "args.json", json.dumps(vars(args) | {"out": str(self.path)}, indent=1).encode())
        except OSError as error:
            raise UsageError(f"--out {self.path}: {error.strerror or error}") from None

    def _lock(self):
        """Keep other programs out while this one lives; where there are no locks, as on some NFS: not."""
        self.log = open(self.path / "log.txt", "a")
        try:
            if fcntl:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            flag, other = ("resume", "") if self.resumes else ("out", ", or name another folder")
            raise UsageError(f"--{flag} {self.path}: another program trains there; wait for its end{other}") from None
        except OSError:
            pass
        if not self.resumes and (self.path / "last.pt").exists():  # since the flags were read
            raise UsageError(f"--out {self.path}: holds a run already; --resume it, or name another folder")

    def append(self, name, text):
        try:
            with open(self.path / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"{self.path / name}: {error.strerror or error}; make room, then go on with "
                             f"--resume {self.path}") from None

    def close(self):
        """Leave it to other programs."""
        if self.log:
            self.log.close()
