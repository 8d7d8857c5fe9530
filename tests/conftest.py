"""Puts the repository's root on the path, so that tests import the files as a user's script would."""

import os
import sys
from pathlib import Path

# The networks of the tests are small: one thread is as fast, and does not wait for a core that others use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402

import common  # noqa: E402


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    """--amp auto tries what is faster on this machine: in the tests always float32."""
    monkeypatch.setattr(common, "bf16_gain", lambda width=64: 0.5)
