"""How torch's threads wait and where its memory comes from, on a CPU. Importing this sets both: before torch, which
reads the first once, so that the programs import it first of all. What the user's environment says is left alone.

GOMP_SPINCOUNT  Threads that wait for work spin, by default 300,000 rounds before they sleep. Beside other programs
                they take the cores from those with work: training stood at half its speed; alone it is no slower.
mallopt         glibc returns large blocks to the system at once, and every step faults all its activations in anew.
                Kept for the next step they cost nothing; the process stays as large as it once was.
"""

import ctypes
import os
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2  # of malloc.h


def wait_asleep():
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def keep_memory():
    names = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # another libc has another malloc
        return
    if not names & os.environ.keys() and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        libc.mallopt(MMAP_THRESHOLD, 1 << 30) or libc.mallopt(MMAP_THRESHOLD, 1 << 25)  # the most before glibc 2.35
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(TOP_PAD, 1 << 26)  # ask the system for more at a time


if sys.platform == "linux":
    wait_asleep()
    keep_memory()
