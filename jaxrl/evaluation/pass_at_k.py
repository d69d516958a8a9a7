"""pass@k: the chance that at least one of k samples is correct."""

import numpy as np


def pass_at_k(samples: int, correct: int, k: int) -> float:
  """Unbiased estimate from `samples` draws of which `correct` succeeded (arXiv:2107.03374, eq. 1).

    1 - C(samples - correct, k) / C(samples, k)

  Raises:
    ValueError: fewer samples than k, or more correct ones than samples.
  """
  if not 0 < k <= samples or not 0 <= correct <= samples:
    raise ValueError(f"pass@{k} needs at least {k} samples and at most that many correct ones; got "
                     f"{samples} samples, {correct} correct")
  if samples - correct < k:
    return 1.0
  return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))
