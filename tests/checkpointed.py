"""What the checkpoints of a run hold, for tests that compare runs bit by bit."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def arrays_of(workdir, number):
  """All arrays of a checkpoint, by path."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    restored = checkpointer.restore(workdir / "checkpoints" / str(number) / "state")
  return {jax.tree_util.keystr(path): np.asarray(x)
          for path, x in jax.tree_util.tree_leaves_with_path(restored)}
