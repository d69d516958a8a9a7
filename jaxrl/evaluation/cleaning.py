"""What cleaning of preference data found (PrefCleanBench, arXiv:2509.23564)."""

from collections.abc import Sequence
import pathlib

import numpy as np

from jaxrl import config as configs
from jaxrl.data import Source
from jaxrl.data.transforms import cleaning


def precision_recall(flagged: Sequence[bool], wrong: Sequence[bool]) -> tuple[float, float]:
  """The share of flagged labels that are wrong, and the share of wrong ones that are flagged.

  NaN where there are none to have a share of.
  """
  flagged, wrong = np.asarray(flagged, bool), np.asarray(wrong, bool)
  if flagged.shape != wrong.shape:
    raise ValueError(f"flags of shape {flagged.shape} do not go with truths of shape {wrong.shape}")
  both = np.sum(flagged & wrong)
  return tuple(float(both / n) if (n := np.sum(x)) else float("nan") for x in (flagged, wrong))


def right_labels(wrong: Sequence[bool], verdict: cleaning.Verdict) -> float:
  """The share of right labels among the rows that are left."""
  wrong = np.asarray(wrong, bool)
  return float(np.mean(~(wrong ^ verdict.flip)[verdict.keep]))


def measure(source: Source) -> dict[str, float]:
  """Precision, recall and right labels of a cleaned source whose noise `flip_labels` made.

  Raises:
    ValueError: it is not what `clean` returns, or its rows do not know whether they are wrong.
  """
  if not isinstance(source, cleaning.Cleaned):
    raise ValueError("the last of config.data.transforms has to be clean, for there is nothing to measure")
  try:
    wrong = [source.source[i][cleaning.MISLABELLED] for i in range(len(source.source))]
  except KeyError as error:
    raise ValueError(f"rows have no field {cleaning.MISLABELLED!r}: put flip_labels before clean") from error
  precision, recall = precision_recall(source.verdict.flagged, wrong)
  return dict(precision=precision, recall=recall, right_labels=right_labels(wrong, source.verdict),
              rows=float(len(source)))


def of_run(workdir: pathlib.Path) -> dict[str, float]:
  """`measure` of the training data of a run; of one that cleaned nothing, the share of right labels."""
  from jaxrl.training import inputs
  config = configs.of_run(pathlib.Path(workdir))
  source = inputs.open_split(config, "train")
  if isinstance(source, cleaning.Cleaned):
    return measure(source)
  wrong = [source[i].get(cleaning.MISLABELLED, False) for i in range(len(source))]
  return dict(right_labels=1 - float(np.mean(wrong)), rows=float(len(source)))
