"""T1: leave-one-out, the centred KL, detectors of degenerate answers, and the moving anchor."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages
from jaxrl import config as configs
from jaxrl.batch import Trajectory, pack
from jaxrl.rollouts import edits
from jaxrl.rollouts.degeneration import is_garbled, is_repetitive, punish_degenerate
from jaxrl.training import frozen
from tests.objectives.conftest import packed  # noqa: F401, a fixture


def test_the_kl_re_ranks_answers_and_shifts_none_on_the_whole(packed):
  for seed in range(4):
    batch, outputs = packed.batch(seed)
    batch = batch.with_signals(logprobs=outputs.logprobs)
    found = advantages.penalise_centred_kl(batch, batch.rewards, beta=0.3)
    values, scored = np.asarray(found.values, np.float64), np.asarray(batch.sequence_mask)
    kl = np.zeros(batch.num_sequences)
    for i, rows, columns in packed.sequences(batch):
      kl[i] = np.sum(np.asarray(outputs.logprobs, np.float64)[rows, columns]
                     - batch.signals["reference_logprobs"][rows, columns])
    mean = kl[scored].mean()
    np.testing.assert_allclose(values[scored], batch.rewards[scored] - 0.3 * (kl[scored] - mean),
                               rtol=1e-4, atol=1e-5)
    assert values[scored].sum() == pytest.approx(float(np.sum(batch.rewards[scored])), abs=1e-4)
    assert not values[~scored].any()
    assert float(found.metrics["centred_kl"]) == pytest.approx(mean, rel=1e-4, abs=1e-5)


def answer(text, *, reward=1.0, finish="stop", scored=True):
  tokens = [0, *map(ord, text)]
  return Trajectory(tokens, [False] + [True] * len(text), prompt_length=1, text=text, reward=reward,
                    finish=finish, scored=scored)


def punish(*group, **options):
  step = edits.Step(list(group), {}, 0, {}, {})
  return punish_degenerate(step, **options), step.metrics


def test_degenerate_answers_get_the_penalty_whatever_the_verifier_said():
  found, metrics = punish(answer("fine"), answer("abcabcabc"), answer("cut", finish="length"),
                          answer("bad\ufffd"), answer("abcabcabc", scored=False, reward=0.0),
                          answer("wrong", reward=0.0), ngram=3, times=3)
  assert [t.reward for t in found] == [1.0, -1.0, -1.0, -1.0, 0.0, 0.0]
  assert [t.scored for t in found] == [True, True, True, True, False, True]
  assert [t.evidence["degenerate"].score for t in found if t.scored] == [0, 1, 1, 1, 0]
  assert metrics == pytest.approx(dict(degenerate=3 / 5, repetitive=1 / 5, overlong=1 / 5,
                                       garbled=1 / 5))
  found, _ = punish(answer("cut", finish="length"), overlong=False, penalty=-2.0)
  assert found[0].reward == 1.0


@pytest.mark.parametrize("text, ngram, times, expected", [
    ("abcabcabc", 3, 3, True), ("abcabcabc", 3, 4, False), ("aaaa", 2, 3, True),
    ("aaaa", 2, 4, False), ("abcdef", 1, 2, False), ("ab", 3, 2, False), ("", 1, 2, False)])
def test_loops_are_n_grams_that_come_again(text, ngram, times, expected):
  assert is_repetitive([ord(c) for c in text], ngram, times) is expected


@pytest.mark.parametrize("text, scripts, expected", [
    ("plain text, 1 + 1 = 2\n\tand more", 1, False), ("na\u00efve", 1, False),
    ("\ufffd", 0, True), ("a\x00b", 0, True), ("\u0436 and b", 1, True), ("\u0436 and b", 2, False),
    ("\u0436 and b", 0, False), ("", 1, False)])
def test_garbled_text(text, scripts, expected):
  assert is_garbled(text, scripts) is expected


@pytest.mark.parametrize("options", [dict(ngram=0), dict(times=1), dict(scripts=-1)])
def test_numbers_out_of_range_are_refused(options):
  with pytest.raises(ValueError, match="punish_degenerate"):
    punish(answer("x"), **options)


@pytest.mark.parametrize("k", [4, 16, 64])
def test_leave_one_out_and_the_share_of_prompts_that_teach(packed, k):
  """n / (n - 1) of the deviation; the chance of a mixed group is 1 - p^K - (1 - p)^K."""
  rng = np.random.default_rng(k)
  for p in (0.02, 0.1, 0.5):
    rewards = (rng.random((100, k)) < p).astype(float)
    batch = pack([Trajectory([1, 2], [False, True], reward=r, group=g)
                  for g, row in enumerate(rewards) for r in row])
    found = np.asarray(advantages.leave_one_out(batch, batch.rewards))[:100 * k].reshape(100, k)
    expected = k / (k - 1) * (rewards - rewards.mean(1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    taught = np.mean(np.any(found != 0, axis=1))
    exact = 1 - p ** k - (1 - p) ** k
    assert abs(taught - exact) < 4 * math.sqrt(exact * (1 - exact) / 100) + 0.011


def variance_of_the_gradient(p, k):
  """On a Bernoulli bandit, over every number n of right answers among k, a group of the piece each."""
  right = np.arange(k) < np.arange(k + 1)[:, None]
  batch = pack([Trajectory([1, 2], [False, True])]).replace(
      rewards=right.ravel().astype(np.float32), group_ids=np.repeat(np.arange(k + 1), k),
      sequence_mask=np.ones(right.size, bool))
  advantage = np.asarray(jax.jit(advantages.leave_one_out)(batch, batch.rewards), np.float64)
  gradient = np.mean(advantage.reshape(k + 1, k) * (right - p), axis=1)  # of the logit of right
  chance = [math.comb(k, n) * p ** n * (1 - p) ** (k - n) for n in range(k + 1)]
  mean = np.dot(chance, gradient)
  assert mean == pytest.approx(p * (1 - p), rel=1e-5)  # unbiased
  return np.dot(chance, (gradient - mean) ** 2)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_the_variance_of_the_gradient_falls_as_one_over_k(p):
  """The gradient is the unbiased sample variance, K / (K - 1) m (1 - m), whose own is

    v (1 - 4 v) / K + 2 v^2 / (K (K - 1)),    v = p (1 - p)

  so it falls as 1 / K, but for p = 1/2, where only the second part is left."""
  v, sizes = p * (1 - p), np.array([4, 16, 64])
  found = [variance_of_the_gradient(p, k) for k in sizes]
  np.testing.assert_allclose(
      found, v * (1 - 4 * v) / sizes + 2 * v ** 2 / (sizes * (sizes - 1)), rtol=1e-3)
  if p < 0.5:
    np.testing.assert_allclose(sizes * found / (v * (1 - 4 * v)), 1, atol=0.1)


@pytest.mark.parametrize("reference", [dict(every=0), dict(every=1, decay=0.9)])
def test_a_moving_anchor_limits_speed_and_a_fixed_one_distance(reference):
  """Two actions, one rewarded, and a policy that is solved for at each round: its log-odds are the
  anchor's plus 1 / beta. An anchor whose logits follow adds eta / beta a round, without end."""
  beta, rounds, eta = 0.5, 200, 1 - reference.get("decay", 1.0)
  refresh = jax.jit(functools.partial(frozen.refresh, frozen.read(reference, {})))
  batch = pack([Trajectory([0, action], [False, True], reward=float(action)) for action in (0, 1)],
               row_length=2, min_rows=2)
  batch = jax.tree.map(jnp.asarray, batch)

  @jax.jit
  def solved(policy, anchor):
    """A Newton step of the policy, whose worth is the reward with the centred KL in it."""
    at = lambda logits: jnp.zeros((2, 2)).at[:, 1].set(jax.nn.log_softmax(logits))
    now = batch.with_signals(logprobs=at(policy), reference_logprobs=at(anchor))
    worth = advantages.penalise_centred_kl(now, now.rewards, beta=beta).values
    return policy + (worth - worth[0]) / beta
  policy, kept, odds = jnp.zeros(2), {"reference": jnp.zeros(2)}, []
  for step in range(1, rounds + 1):
    policy = solved(policy, kept["reference"])
    odds.append(float(policy[1] - policy[0]))
    kept = refresh(kept, policy, policy, step)
  np.testing.assert_allclose(odds, 1 / beta + eta / beta * np.arange(rounds), rtol=1e-4)


def test_the_config_moves_its_reference_every_update():
  config = configs.load("configs/methods/t1.py")
  assert (config.reference.every, config.reference.decay) == (1, 0.99)
  assert config.rollout.temperature == 1.1
  assert config.rollout.prompts * config.rollout.episode.samples == 256
