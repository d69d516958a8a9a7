"""NSR and PSR: exact gradients on an enumerable policy, what the filter leaves, logits' directions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms
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


VARIANTS = ((1.0, 0.0, 1.0), (0.0, -1.0, 1.0), (0.1, -1.0, 1.1), (1.0, -1.0, 2.0))


def test_expected_gradients_of_all_variants_are_proportional():
  """On policy and unclipped: E[1{right} grad log pi] = -E[1{wrong} grad log pi]."""
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3)), jnp.float32)
  strings, probability = enumerated(logits)
  right = np.array([(a + b) % 3 == 0 for a, b in strings])
  batch = batch_of(right.astype(float))
  exact = jax.grad(lambda z: jnp.sum(jnp.where(right, enumerated(z)[1], 0)))(logits)
  for lam, wrong, factor in VARIANTS:
    weights = np.asarray(advantages.weigh_verdicts(batch, batch.rewards, right=lam, wrong=wrong)
                         )[:len(strings)]
    surrogate = lambda z: jnp.sum(probability * weights * jnp.log(enumerated(z)[1]))
    np.testing.assert_allclose(jax.grad(surrogate)(logits), factor * exact, rtol=1e-4, atol=1e-6)


def test_proportions_hold_off_policy_too_until_ratios_are_clipped():
  """One token: the gradient of E_old[ratio * A] is that of the moved policy's success, whatever the old
  one was. A clip cuts other answers among right ones than among wrong ones."""
  rng = np.random.default_rng(5)
  old = rng.normal(size=9)
  moved, behaviour = jnp.float32(old + 0.5 * rng.normal(size=9)), np.asarray(jax.nn.log_softmax(old))
  right = np.arange(9) % 3 == 0
  batch = pack([Trajectory([0, a], [False, True], [0, behaviour[a]], reward=float(right[a]),
                           weight=np.exp(behaviour[a])) for a in range(9)], row_length=2, min_rows=9)
  exact = jax.grad(lambda z: jnp.sum(jnp.where(right, jax.nn.softmax(z), 0)))(moved)

  def ascent(right, wrong, clip):
    credit = chain([functools.partial(advantages.weigh_verdicts, right=right, wrong=wrong)])
    now = batch.with_signals(advantages=credit(batch, batch.rewards))
    objective = sum_of_terms([functools.partial(objectives.clipped_surrogate, low=clip, high=clip)])

    def loss(z):
      logprobs = jnp.zeros(batch.tokens.shape).at[:9, 1].set(jax.nn.log_softmax(z))
      return objective(ModelOutputs(logprobs=logprobs), now, loss_weights(now, "sequence_sum"),
                       mean_weights(now))[0]
    return -9 * np.asarray(jax.grad(loss)(moved))
  for lam, wrong, factor in VARIANTS:
    np.testing.assert_allclose(ascent(lam, wrong, 1e6), factor * exact, rtol=1e-4, atol=1e-6)
  psr, nsr = ascent(1.0, 0.0, 0.2), ascent(0.0, -1.0, 0.2)
  assert psr @ nsr < 0.9 * np.linalg.norm(psr) * np.linalg.norm(nsr)


def test_the_direction_of_logits_is_the_paper_s():
  z = jnp.asarray([0.5, -0.3, 1.2, 0.1])
  p = jax.nn.softmax(z)
  for sign in (1.0, -1.0):  # right, wrong; token 2 was sampled
    step = jax.grad(lambda z: sign * jax.nn.softmax(z)[2])(z)
    expected = -sign * p[2] * p
    expected = expected.at[2].set(sign * p[2] * (1 - p[2]))
    np.testing.assert_allclose(step, expected, rtol=1e-5)


def entropy_among_right(right, wrong, step, seeds=100):
  """12 actions, 4 right, a uniform start and 4 samples an update, until P(right) is 0.85."""
  batch = batch_of([0.0, 1.0])
  by_verdict = np.asarray(advantages.weigh_verdicts(batch, batch.rewards, right=right, wrong=wrong))
  rng, z = np.random.default_rng(0), np.zeros((seeds, 12))
  for _ in range(20_000):
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    going = p[:, :4].sum(1) < 0.85
    if not going.any():
      break
    drawn = np.minimum((np.cumsum(p, 1)[:, None] < rng.random((seeds, 4, 1))).sum(-1), 11)
    weight = by_verdict[(drawn < 4).astype(int)] * going[:, None]
    z += step / 4 * (np.einsum("sn,sna->sa", weight, np.eye(12)[drawn]) - weight.sum(1)[:, None] * p)
  q = p[:, :4] / p[:, :4].sum(1, keepdims=True)
  return -(q * np.log(np.maximum(q, 1e-300))).sum(1).mean()


NOISE = {0.2: (1.10, 1.20, 1.38, 1.386), 1.0: (0.79, 0.94, 1.36, 1.386), 3.0: (0.58, 0.76, 1.32, 1.386)}


@pytest.mark.parametrize("step", NOISE)
def test_noise_alone_keeps_more_of_the_right_answers_the_less_right_ones_are_rewarded(step):
  """Entropy among right ones in the end: PSR < REINFORCE < W-REINFORCE < NSR, as far apart as steps are
  long."""
  found = [entropy_among_right(*weights, step) for weights in ((1, 0), (1, -1), (0.1, -1), (0, -1))]
  assert found == sorted(found)
  np.testing.assert_allclose(found, NOISE[step], atol=0.1)
  np.testing.assert_allclose(found[3], np.log(4), atol=0.01)


def test_the_filter_takes_the_other_verdict_out_of_batch_and_denominators():
  config = configs.to_dict(configs.load("configs/methods/nsr.py"))
  keep = compose.build(config["rollout"]["edits"][0], edits)
  group = [Trajectory([1] * (n + 1), [False] + [True] * n, reward=r)
           for n, r in ((5, 1.0), (2, 0.0), (1, 0.0))]
  kept = rollouts.edits.apply([keep], rollouts.edits.Step(group, {}, 0, {}, {}))
  assert [t.scored for t in kept] == [False, True, True]
  weights = loss_weights(pack(kept), config["aggregation"]["kind"])
  np.testing.assert_allclose(weights[weights > 0], [1 / 3] * 3)  # tokens of wrong answers alone


@pytest.mark.parametrize("variant, right, edits_", [("", 0.0, 1), (":psr", 1.0, 1),
                                                    (":w_reinforce", 0.1, 0)])
def test_the_variants(variant, right, edits_):
  config = configs.load(f"configs/methods/nsr.py{variant}")
  assert config.advantage[0]["right"] == right and len(config.rollout.edits) == edits_
  with pytest.raises(ValueError, match="'psr' and 'w_reinforce'"):
    configs.load("configs/methods/nsr.py:nsr")
