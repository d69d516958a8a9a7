"""A trained process reward model as a criterion: one number from those of all steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.rewards.criterion import Criterion, declare, failed, ok
from jaxrl.rewards.trained import check_heads

REDUCTIONS = {"min": np.min, "product": np.prod, "mean": np.mean, "last": lambda p: p[-1]}


def _check(*, run, head=0, reduce="min"):
  if reduce not in REDUCTIONS:
    raise ValueError(f"reduce={reduce!r} is none of {', '.join(REDUCTIONS)}")
  check_heads(run=run, head=head)


@declare(batched=True, check=_check)
def process_reward(pairs: Sequence[tuple[Any, Any]], mesh: Any, *, run: str, head: int | str = 0,
                   reduce: str = "min") -> list[Criterion]:
  """The probability that the steps of a completion are right, by a model that was trained on
  `objectives.label_steps` (arXiv:2305.20050 takes the product, arXiv:2312.08935 the minimum).

  A completion is cut into steps at what ends them in the model's own data (`data.step_end`); the
  probabilities s(z) of all steps are the criterion's detail. An empty completion cannot be judged.

  Args:
    pairs: task and completion of every sample.
    mesh: of the devices that sample.
    run: --workdir of the run that trained the model.
    head: z, as in `reward_model`.
    reduce: "min", "product", "mean" or "last" of the probabilities.
  """
  from jaxrl.training import reward_models
  model, number = reward_models.RewardModel.load(run, mesh), reward_models.index_of(run, head)
  found = model.step_scores([(task, completion.text, completion.finish != "length")
                             for task, completion in pairs])
  return [_verdict(run, x, number, reduce) for x in found]


def _verdict(run, steps, number, reduce):
  if isinstance(steps, Exception):
    return failed(f"the model of {run} cannot read this: {steps}")
  p = 1 / (1 + np.exp(-steps[:, number].astype(np.float64)))
  return ok(float(REDUCTIONS[reduce](p)), " ".join(f"{x:.4f}" for x in p))
