"""Judges: criteria that look at a sample, and aggregators that turn their evidence into a reward.

A criterion is a function `(task, completion, *, ...) -> float | bool | Criterion`; a config names
it as `dict(name="exact_match", ...)`, one of your own as `dict(name="my_module:my_reward", ...)`.
One that is declared `batched` is a function `(pairs, mesh, *, ...) -> list` of the same. An
aggregator is a function `(evidence, *, ...) -> float | None`. This package does not import JAX:
worker processes load it.
"""

from jaxrl.rewards.aggregate import product_gate, weighted_sum
from jaxrl.rewards.confidence import brier, confidence, correct_and_formed, well_formed
from jaxrl.rewards.continuations import continues_text
from jaxrl.rewards.criterion import Criterion, declare, failed, ok, unscorable
from jaxrl.rewards.numeric import numeric_answer
from jaxrl.rewards.process import process_reward
from jaxrl.rewards.scorer import RewardFailure, Scored, Scorer
from jaxrl.rewards.spans import in_span
from jaxrl.rewards.trained import reward_model
from jaxrl.rewards.verifiers import exact_match, finished, matches_format, overlong
