"""Losses: the terms that `config.objective` may list, each `(outputs, batch, *, ...)` -> per token.

A term returns `(values, metrics)`: a loss per token, and diagnostics per token by name. Off the
loss mask both are finite and pass no gradient. A term divides by nothing that depends on other
rows: `jaxrl.objectives.aggregate` weighs tokens, over the whole optimiser step, and adds terms up.
"""

from jaxrl.objectives.anchored_answers import anchor_first_answers
from jaxrl.objectives.anchored_entropy import anchored_entropy
from jaxrl.objectives.batch_preference import aot
from jaxrl.objectives.batch_preference import bco
from jaxrl.objectives.batch_preference import kto
from jaxrl.objectives.bounded import bounded_bradley_terry
from jaxrl.objectives.bounded import bounded_dpo
from jaxrl.objectives.by_label import dpo_by_label
from jaxrl.objectives.confidence import confident_policy_gradient
from jaxrl.objectives.constraints import divergence_cost
from jaxrl.objectives.critic import value_loss
from jaxrl.objectives.critique import critique_likelihood
from jaxrl.objectives.fairness import fairness
from jaxrl.objectives.next_tokens import next_tokens
from jaxrl.objectives.imitation import imitate_marked
from jaxrl.objectives.inverse import fit_inverse_reward
from jaxrl.objectives.labels import binary_label
from jaxrl.objectives.labels import label_steps
from jaxrl.objectives.nash import mnpo
from jaxrl.objectives.pairs_of_pairs import dpo_pop
from jaxrl.objectives.policy import clipped_surrogate
from jaxrl.objectives.policy import geometric_mean
from jaxrl.objectives.policy import reinforce
from jaxrl.objectives.preference import cpo
from jaxrl.objectives.preference import dpo
from jaxrl.objectives.preference import imitate_preferred
from jaxrl.objectives.preference import orpo
from jaxrl.objectives.preference import simpo
from jaxrl.objectives.regularisers import entropy
from jaxrl.objectives.regularisers import kl
from jaxrl.objectives.reward_model import beta_preference
from jaxrl.objectives.reward_model import bradley_terry
from jaxrl.objectives.reward_model import ordinal
from jaxrl.objectives.reward_model import plackett_luce
from jaxrl.objectives.reward_model import regress_attributes
from jaxrl.objectives.robust import rpo
from jaxrl.objectives.segments import execution_entropy
from jaxrl.objectives.supervised import cross_entropy
from jaxrl.objectives.valuation import random_policy_valuation
from jaxrl.objectives.value_systems import value_systems
