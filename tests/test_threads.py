"""harness/threads.py: it comes before torch in every program, the user's words win, memory stays and does not grow."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ["simsiam", "moco", "simclr", "rotnet", "knn", "linear", "predict", "export", "forks/byol",
            "forks/barlowtwins", "bench/run"]
OURS = re.compile("GOMP_|OMP_WAIT|MALLOC_|GLIBC_TUNABLES")
linux = pytest.mark.skipif(sys.platform != "linux", reason="what is set is glibc's and libgomp's")


def child(code, *words, **environment):
    """What a child prints that has no such setting but these."""
    plain = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    done = subprocess.run([sys.executable, "-c", code, *words], env={**plain, "PYTHONPATH": str(ROOT), **environment},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FIRST = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "torchvision"):
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
runpy.run_path(sys.argv[1], run_name="imported")
"""


@linux
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_threads_are_set_before_torch_is_looked_for(program):
    assert child(FIRST, str(ROOT / f"{program}.py")) == ["10000"]


def test_no_program_is_forgotten():
    found = {path.relative_to(ROOT).with_suffix("").as_posix() for folder in (".", "forks")
             for path in ROOT.glob(f"{folder}/*.py") if re.search("^import torch$", path.read_text(), flags=re.M)}
    assert found - {"common", "augment"} <= set(PROGRAMS)


@linux
def test_the_users_own_words_win():
    assert child(FIRST, str(ROOT / "knn.py"), GOMP_SPINCOUNT="7") == ["7"]
    assert child(FIRST, str(ROOT / "knn.py"), OMP_WAIT_POLICY="active") == ["None"]


FAULTS = """
import resource, runpy, sys
runpy.run_path(sys.argv[1])  # alone: the door of the harness imports torch, which takes seconds
if sys.argv[2:]:
    import torch
block = (lambda: torch.ones(1 << 24)) if sys.argv[2:] else (lambda: bytearray(b"x") * (1 << 26))  # 64 MB
for i in range(20):
    if i == 10:  # aligned blocks leave slivers between them, until the list that keeps those is full
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
OWN = [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}, {"MALLOC_TOP_PAD_": "131072"},
       {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]


@linux
def test_memory_is_kept_unless_the_user_says_otherwise():
    faults = lambda *torch, **own: int(child(FAULTS, str(ROOT / "harness/threads.py"), *torch, **own)[0])  # noqa: E731
    assert faults() < 1000 and faults("torch") < 1000  # of 160,000 pages
    for own in OWN:
        assert faults(**own) > 10_000, own


STEPS = """
import pathlib, sys, pictures, simclr
from harness.run import Run
plain = Run.steps
def watched(run):
    for batch in plain(run):
        if run.step in (50, 199):
            status = pathlib.Path("/proc/self/status").read_text()
            print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
        yield batch
Run.steps = watched
pictures.TOY_COUNT.update(train=640, val=64)
simclr.main(["--width", "8", "--batch-size", "32", "--epochs", "10", "--knn-every", "1", "--amp", "off", "--quiet",
             "--device", "cpu", "--image-size", "16", "--cache", sys.argv[1], "--out", sys.argv[1] + "/run"])
"""


@linux
def test_a_run_does_not_grow(tmp_path):
    early, late = (int(kilobytes) / 1024 for kilobytes in child(STEPS, str(tmp_path)))
    print(early, late)
    assert late < early + 32  # MB; eight evaluations lie between them
