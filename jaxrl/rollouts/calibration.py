"""The calibration of a batch in its metrics.

Edits; `config.rollout.edits` names them such as `jaxrl.rollouts.calibration:log_calibration`.
"""

import math

import numpy as np

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


def log_confidence(step: Step) -> list[Trajectory]:
  """Logs how well the probability of the batch's answers fits their verdicts, whatever trains them.

  An answer's confidence is exp(mean over its tokens of log p), as the policy drew it, and it is right at a
  reward of 1 (C2GSPG, arXiv:2509.23129).

  Args:
    step: the batch, which stays as it is. Samples without a reward or a token do not count.

  Returns:
    The trajectories. Metrics `brier` and `ece` (10 bins), and `mean_confidence`.
  """
  scored = [t for t in step.trajectories if t.scored and np.any(t.loss_mask)]
  if scored:
    q = [float(np.exp(np.mean(t.behaviour_logprobs[t.loss_mask], dtype=np.float64))) for t in scored]
    c = [float(t.reward >= 1) for t in scored]
    step.metrics |= dict(brier=calibration.brier_score(q, c),
                         ece=calibration.expected_calibration_error(q, c), mean_confidence=float(np.mean(q)))
  return step.trajectories
