"""Helpers beside these tests are imported by name (`oracle`, `checkpoints`)."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
