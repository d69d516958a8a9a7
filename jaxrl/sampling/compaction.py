"""Which rows are decoded further when some samples have ended."""

import numpy as np

from jaxrl.models.cached_attention import Rows

MOVE = 4  # steps of decoding that take as long as moving the rows, roughly


def rung_below(rows: int) -> int:
  """The next lower of 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, ...: each a program.

  Few sizes, and rows that are on average a tenth more than what is alive between two of them.
  """
  if rows <= 1:
    return 0
  if rows <= 6:
    return rows - 1
  eighth = 2 ** ((rows - 1).bit_length() - 3)  # of the power of two that is at least `rows`
  return max(eighth * k for k in (4, 5, 6) if eighth * k < rows)


def fewest(rows: int, remaining: int) -> int:
  """At how many live samples the rows should be moved together, 0 if that cannot pay.

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
