"""The calibration of a batch in its metrics.

An edit; `config.rollout.edits` names it `jaxrl.rollouts.calibration:log_calibration`.
"""

import math

from jaxrl.batch import Trajectory
from jaxrl.evaluation import calibration
from jaxrl.rollouts.edits import Step


def log_calibration(step: Step, *, confidence: str = "confidence", correct: str = "correct"
                    ) -> list[Trajectory]:
  """Logs how well the stated confidences of a batch fit what is right (RLCR, arXiv:2507.16806).

  Args:
    step: the batch, which stays as it is.
    confidence, correct: labels of the criteria that say how sure an answer is, 0 to 1, and whether
      it is right (a score of 1). Samples for which either has nothing to say do not count.

  Returns:
    The trajectories. Metrics `brier`, `ece` (10 bins), `auroc` where some are right and some wrong,
    and `extreme_confidence`, the share of confidences that are exactly 0 or 1.

  Raises:
    ValueError: there are no such criteria.
  """
  q, c = [], []
  for t in step.trajectories:
    if missing := {confidence, correct} - set(t.evidence):
      raise ValueError(f"log_calibration: config.reward has no criterion {sorted(missing)[0]!r}; "
                       f"its labels are {', '.join(t.evidence) or 'none'}")
    stated, right = t.evidence[confidence], t.evidence[correct]
    if stated.status == right.status == "ok":
      q.append(stated.score)
      c.append(float(right.score >= 1))
  if q:
    found = dict(brier=calibration.brier_score(q, c),
                 ece=calibration.expected_calibration_error(q, c), auroc=calibration.auroc(q, c),
                 extreme_confidence=sum(x in (0.0, 1.0) for x in q) / len(q))
    step.metrics |= {name: value for name, value in found.items() if not math.isnan(value)}
  return step.trajectories
