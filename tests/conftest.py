"""Puts the repository's root on the path, so that tests import the files as a user's script would."""

import os
import sys
from pathlib import Path

# The networks of the tests are small: one thread is as fast, and does not wait for a core that others use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
