"""Preference losses of pairs that several people, or several tastes, have labelled."""

from jaxrl.batch import PREFERENCE, ModelOutputs, TokenBatch
from jaxrl.batch import column_of
from jaxrl.compose import needs, of_pairs, ranges
from jaxrl.objectives.aggregate import TermOutput
from jaxrl.objectives.pairs import preferences
from jaxrl.objectives.preference import dpo


@of_pairs
@ranges(lambda label: {label: (0, 1)})
@needs("reference_logprobs")
def dpo_by_label(outputs: ModelOutputs, batch: TokenBatch, *, label: str, beta: float = 0.1,
                 loss: str = "sigmoid") -> TermOutput:
  """DPO whose preferred answers are those of one label of several (MODPO's stages, arXiv:2310.03708,
  OrthAlign's, arXiv:2509.24610).

  Args:
    outputs, batch: as in `dpo`.
    label: column, equal in both answers of a pair, with the probability that the first of the row,
      whose `preference` is 1, is the better one.
    beta, loss: as in `dpo`.

  Returns and raises: as `dpo`.
  """
  p, first = column_of(batch, label, "dpo_by_label"), preferences(batch)
  mine = first * p + (1 - first) * (1 - p)
  return dpo(outputs, batch.replace(columns={**batch.columns, PREFERENCE: mine}), beta=beta, loss=loss)
