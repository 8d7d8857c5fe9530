"""Puts the repository's root on the path, so that tests import the files as a user's script would."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
