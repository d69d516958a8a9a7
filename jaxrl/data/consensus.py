"""Which free-text judgements several annotators share."""

from collections.abc import Sequence

import numpy as np


def agreed_principles(embeddings: Sequence[np.ndarray], *, threshold: float = 0.8) -> list[np.ndarray]:
  """Principles that every other annotator of the same answer has one like (RLBFF, arXiv:2509.21319).

  A principle is kept if for each of the others the largest cosine to one of theirs is above the threshold.

  Args:
    embeddings: of the principles of each annotator. [principles, width] each
    threshold: 0.7, 0.8 and 0.9 leave 95, 33 and 11 thousand of the paper's 1.2 million.

  Returns:
    Whether each is kept. [principles] each, bool

  Raises:
    ValueError: embeddings of different widths.
  """
  arrays = [np.asarray(x, np.float64) for x in embeddings]
  if len({x.shape[1:] for x in arrays}) > 1 or any(x.ndim != 2 for x in arrays):
    raise ValueError(f"agreed_principles compares embeddings [principles, width] of one width; their shapes "
                     f"are {', '.join(str(x.shape) for x in arrays)}")
  units = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in arrays]
  return [np.array([all(np.max(other @ x, initial=-np.inf) > threshold
                        for b, other in enumerate(units) if b != a) for x in own], bool)
          for a, own in enumerate(units)]
