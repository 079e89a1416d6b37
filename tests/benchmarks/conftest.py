"""The benchmarks are scripts, not a package: their folder goes where they expect it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
