"""NSR and PSR: exact gradients on an enumerable policy, what the filter leaves, logits' directions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import Trajectory, pack
from jaxrl.rollouts import edits


def batch_of(rewards, groups=None, scored=None):
  n = len(rewards)
  groups = [0] * n if groups is None else groups
  scored = [True] * n if scored is None else scored
  return pack([Trajectory([1, 2, 3], [False, True, True], reward=r, group=int(g), scored=bool(s))
               for r, g, s in zip(rewards, groups, scored)])


@pytest.mark.parametrize("right, wrong", [(1.0, 0.0), (0.0, -1.0), (0.1, -1.0)])
def test_an_advantage_is_a_constant_of_the_verdict_whatever_the_group(right, wrong):
  rng = np.random.default_rng(0)
  n = 17
  rewards, groups = (rng.random(n) < 0.4).astype(float), rng.integers(0, 4, n)
  scored = rng.random(n) < 0.8
  batch = batch_of(rewards, groups, scored)
  found = np.asarray(advantages.weigh_verdicts(batch, batch.rewards, right=right, wrong=wrong))[:n]
  np.testing.assert_allclose(found[scored], np.where(rewards[scored] == 1, right, wrong))
  assert not found[~scored].any()


def test_rewards_of_minus_one_and_one():
  batch = batch_of([1.0, -1.0, 0.0])
  found = advantages.weigh_verdicts(batch, batch.rewards, right=0.1, right_from=0.0)
  np.testing.assert_allclose(np.asarray(found)[:3], [0.1, -1.0, 0.1])


def test_it_is_a_baseline_of_its_own():
  pieces = [compose.build("weigh_verdicts", advantages), compose.build("center_by_group", advantages)]
  with pytest.raises(ValueError, match="2 baselines"):
    chain(pieces)


def enumerated(logits):
  """All strings of two tokens over three, with probabilities under a policy of independent rows."""
  p = jax.nn.softmax(logits, axis=-1)
  strings = list(itertools.product(range(3), repeat=2))
  return strings, jnp.stack([p[0, a] * p[1, b] for a, b in strings])


def test_expected_gradients_of_all_variants_are_proportional():
  """On policy and unclipped: E[1{right} grad log pi] = -E[1{wrong} grad log pi]."""
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3)), jnp.float32)
  strings, probability = enumerated(logits)
  right = np.array([(a + b) % 3 == 0 for a, b in strings])
  batch = batch_of(right.astype(float))
  exact = jax.grad(lambda z: jnp.sum(jnp.where(right, enumerated(z)[1], 0)))(logits)
  for lam, wrong, factor in ((1.0, 0.0, 1.0), (0.0, -1.0, 1.0), (0.1, -1.0, 1.1), (1.0, -1.0, 2.0)):
    weights = np.asarray(advantages.weigh_verdicts(batch, batch.rewards, right=lam, wrong=wrong)
                         )[:len(strings)]
    surrogate = lambda z: jnp.sum(probability * weights * jnp.log(enumerated(z)[1]))
    np.testing.assert_allclose(jax.grad(surrogate)(logits), factor * exact, rtol=1e-4, atol=1e-6)


def test_the_direction_of_logits_is_the_paper_s():
  z = jnp.asarray([0.5, -0.3, 1.2, 0.1])
  p = jax.nn.softmax(z)
  for sign in (1.0, -1.0):  # right, wrong; token 2 was sampled
    step = jax.grad(lambda z: sign * jax.nn.softmax(z)[2])(z)
    expected = -sign * p[2] * p
    expected = expected.at[2].set(sign * p[2] * (1 - p[2]))
    np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_noise_alone_keeps_more_of_the_right_answers_the_less_right_ones_are_rewarded():
  """12 actions, 4 right, uniform start, 4 samples a step until P(right) is 0.85: entropy among the
  right ones ends in the order PSR < REINFORCE < W-REINFORCE < NSR."""
  def entropy_of(right_weight, wrong_weight, seed):
    rng, z = np.random.default_rng(seed), np.zeros(12)
    for _ in range(20_000):
      p = np.exp(z - z.max())
      p /= p.sum()
      if p[:4].sum() >= 0.85:
        break
      for a in rng.choice(12, 4, p=p):
        weight = right_weight if a < 4 else wrong_weight
        z += 1.0 / 4 * weight * ((np.arange(12) == a) - p)
    q = p[:4] / p[:4].sum()
    return -(q * np.log(np.maximum(q, 1e-300))).sum()
  means = [np.mean([entropy_of(*weights, seed) for seed in range(60)])
           for weights in ((1, 0), (1, -1), (0.1, -1), (0, -1))]
  assert means == sorted(means) and means[0] < 1.0 and means[3] > 1.38


def test_the_filter_takes_the_other_verdict_out_of_batch_and_denominators():
  config = configs.to_dict(configs.load("configs/methods/nsr.py"))
  keep = compose.build(config["rollout"]["edits"][0], edits)
  group = [Trajectory([1, 2], [False, True], reward=r) for r in (1.0, 0.0, 0.0)]
  step = rollouts.edits.Step(group, {}, 0, {}, {})
  assert [t.scored for t in rollouts.edits.apply([keep], step)] == [False, True, True]


@pytest.mark.parametrize("variant, right, edits_", [("", 0.0, 1), (":psr", 1.0, 1),
                                                    (":w_reinforce", 0.1, 0)])
def test_the_variants(variant, right, edits_):
  config = configs.load(f"configs/methods/nsr.py{variant}")
  assert config.advantage[0]["right"] == right and len(config.rollout.edits) == edits_
  with pytest.raises(ValueError, match="'psr' and 'w_reinforce'"):
    configs.load("configs/methods/nsr.py:nsr")
