"""A trained reward model as a criterion."""

from collections.abc import Sequence
from typing import Any

from jaxrl.rewards.criterion import Criterion, declare, failed, ok


def check_heads(*, run, head=0, levels=0, ordered=False):
  """Refuses a run without a reward model, and numbers that its heads do not give.

  Raises:
    ValueError: naming the argument.
  """
  from jaxrl.training import reward_models
  if not run:
    raise ValueError("run='' has to name the --workdir of a run that has trained a reward model")
  heads = reward_models.check(run)
  head = reward_models.index_of(run, head)
  last = head + max(levels - 2 + ordered, 0)
  if levels == 1 or levels < 0:
    raise ValueError(f"levels={levels} has to be 0, or at least 2")
  if not 0 <= head <= last < heads:
    raise ValueError(f"head={head} and levels={levels} want the numbers {head} to {last}, but the "
                     f"model of run={str(run)!r} gives {heads}, counted from 0")


@declare(batched=True, check=check_heads)
def reward_model(pairs: Sequence[tuple[Any, Any]], mesh: Any, *, run: str, head: int | str = 0,
                 levels: int = 0, ordered: bool = False) -> list[Criterion]:
  """The score of a reward model that was trained here, see `jaxrl.objectives.reward_model`.

  All samples that wait for a judgement are scored together, on the devices that sample. Prompts are
  written anew, from the fields of the row and by the tokenizer and templates of the model's own run.

  Args:
    pairs: task and completion of every sample.
    mesh: of those devices.
    run: --workdir of the run that trained the model; its newest checkpoint counts.
    head: which number of its heads, in the order of its `heads_on_top` without the value; or the name of a
      head, "yes_no" for the log-odds of `config.model.verdict`.
    levels: of a model trained by `ordinal`, to get the expected rating, 1 to `levels`.
    ordered: as in `ordinal`.
  """
  from jaxrl.training import reward_models
  model, number = reward_models.RewardModel.load(run, mesh), reward_models.index_of(run, head)
  found = model.scores([(task, completion.text, completion.finish != "length")
                        for task, completion in pairs])
  return [failed(f"the model of {run} cannot read this: {x}") if isinstance(x, Exception)
          else ok(reward_models.rating(x, number, levels, ordered)) for x in found]
