"""Which rows are decoded further when some samples have ended."""

import numpy as np

from jaxrl.models.cached_attention import Rows

MOVE = 2  # steps of decoding that take as long as moving the rows, roughly
SMALL = 4096  # tokens at most that a call may draw whose rows are not worth programs of other sizes


def rung_below(rows: int) -> int:
  """The next lower of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, ...

  Each size is a program. Between two of them an eighth of the rows is dead on average.
  """
  if rows <= 4:
    return max(rows - 1, 0)
  half = 2 ** ((rows - 1).bit_length() - 1)  # of the power of two that is at least `rows`
  return max(size for size in (half, half * 3 // 2) if size < rows)


def fewest(rows: int, remaining: int) -> int:
  """At how many live samples the rows should be moved together, 0 if that cannot pay.

  Depends on nothing else, such as the programs that there are already: the same call is computed in
  the same way at any time, to the last bit.

  Args:
    rows: that are decoded now.
    remaining: tokens that any of them may still get.
  """
  fewer = rung_below(rows)
  return fewer if (rows - fewer) * remaining >= MOVE * rows else 0


def places(owners: np.ndarray, lengths: np.ndarray, samples: int) -> Rows:
  """Where rows in any order are found among the prompts.

  Args:
    owners: the prompt of each row; no more than `samples` rows belong to one. [rows]
    lengths: tokens of each prompt. [prompts]
    samples: places per prompt.
  """
  row_of = np.zeros((len(lengths), samples), np.int32)
  cell_of = np.zeros(len(owners), np.int32)
  used = np.zeros(len(lengths), np.int32)
  for row, prompt in enumerate(owners):
    row_of[prompt, used[prompt]] = row
    cell_of[row] = prompt * samples + used[prompt]
    used[prompt] += 1
  return Rows(lengths, row_of, cell_of)
