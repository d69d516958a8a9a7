"""Built-in verifiable toy tasks with difficulty knobs, held-out splits and an oracle each.

A task is a module with three functions: `sample(rng, *, knobs...)` draws a row with its `question`,
`answer` and `solution`; `check(row, completion)` says whether a completion solves it; `key(row)` is
the same text for rows that must not sit on both sides of a split. `dataset.TASKS` lists them.
"""

from jaxrl.tasks.dataset import open_task
from jaxrl.tasks.dataset import oracle
from jaxrl.tasks.dataset import ToyDataset
