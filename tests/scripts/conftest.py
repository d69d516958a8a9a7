"""Scripts import one another by their bare names, as when they are run."""

import pathlib
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
for folder in (SCRIPTS, SCRIPTS / "bench"):
  if str(folder) not in sys.path:
    sys.path.insert(0, str(folder))
