"""One answer from several."""

from collections.abc import Hashable, Sequence


def vote(answers: Sequence[Hashable], weights: Sequence[float] | None = None) -> Hashable:
  """The answer with the largest sum of weights (self-consistency, arXiv:2203.11171).

    argmax_a sum_{i: answer_i = a} weight_i

  Args:
    answers: one per sample; None does not vote.
    weights: one per sample, such as stated confidences (arXiv:2507.16806); None counts each as 1.

  Returns:
    The winner, of equal ones that which came first; None if nobody voted.

  Raises:
    ValueError: another number of weights.
  """
  weights = [1.0] * len(answers) if weights is None else list(weights)
  if len(weights) != len(answers):
    raise ValueError(f"vote: {len(weights)} weights for {len(answers)} answers; give one for each")
  totals: dict[Hashable, float] = {}
  for answer, weight in zip(answers, weights):
    if answer is not None:
      totals[answer] = totals.get(answer, 0.0) + weight
  return max(totals, key=totals.get) if totals else None
