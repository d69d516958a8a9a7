"""How well a reward model trained on ratings tells better answers from worse ones."""

import pathlib

import numpy as np

from jaxrl.batch import Task
from jaxrl.tasks import open_task
from jaxrl.tasks import rated_addition
from jaxrl.training import reward_models

PROBLEMS = 300


def rating_quality(workdir: pathlib.Path) -> dict[str, float]:
  """Scores answers of known error counts to held-out problems of `tasks.rated_addition`.

  Returns:
    `pair_accuracy`: share of the problems whose answer with fewer errors has the higher score, ties half;
    `rank_correlation`: Spearman's, of score and -errors over all answers, of different problems too.
  """
  model = reward_models.RewardModel.load(workdir)
  term, knobs = _term_of(model.config), dict(model.config.data.task)
  rows = open_task("rated_addition", split="test", size=PROBLEMS, seed=1, **knobs)
  rng, asked, errors = np.random.default_rng(2602), [], []
  for row in (rows[i] for i in range(PROBLEMS)):
    for count in rng.permutation(4)[:2]:
      text = rated_addition.with_errors(rng, row["answer"], int(count))
      asked.append((Task(row["id"], [1], row["question"], row=row), text, True))
      errors.append(int(count))
  levels = term.get("levels", 0)
  scores = np.array([reward_models.rating(x, term.get("head", 0), levels, term.get("ordered", False))
                     for x in model.scores(asked)]).reshape(-1, 2)
  errors = np.array(errors).reshape(-1, 2)
  ahead = (scores[:, 0] - scores[:, 1]) * np.sign(errors[:, 1] - errors[:, 0])
  return {"pair_accuracy": float(np.mean((ahead > 0) + 0.5 * (ahead == 0))),
          "rank_correlation": float(np.corrcoef(_ranks(scores), _ranks(-errors))[0, 1])}


def _term_of(config):
  phase = config[config.phases[-1]]
  return dict((phase.get("objective") or config.objective)[0])


def _ranks(values):
  """Mean ranks of equal values."""
  _, inverse, counts = np.unique(values.reshape(-1), return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
