"""Scripts of a benchmark import one another by their bare names, as when they are run."""

import pathlib
import sys

BENCH = str(pathlib.Path(__file__).parents[2] / "scripts" / "bench")
if BENCH not in sys.path:
  sys.path.insert(0, BENCH)
