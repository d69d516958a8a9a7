"""CMDP distillation: rewards by definition, gradients by enumeration, the optimum of a bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl import config as configs
from jaxrl.advantages.chain import credit
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * np.log(p / q), axis=-1)


def ragged(seed, count=10):
  rng = np.random.default_rng(seed)
  trajectories = []
  for i in range(count):
    length = (1, 2)[i] if i < 2 else int(rng.integers(2, 12))
    mask = (np.arange(length) > 0) & ((rng.random(length) < 0.85) | (i == 1))
    scale = 0.02 if i % 3 else 0.3
    trajectories.append(Trajectory(
        np.zeros(length), mask, reward=float(rng.integers(0, 2)), group=i % 3, scored=i % 4 != 3,
        signals={"reference_kl": scale * rng.exponential(1.0, length),
                 "logprobs": -rng.exponential(1.0, length),
                 "reference_logprobs": -rng.exponential(1.0, length)}))
  return pack(trajectories, row_length=16, min_rows=8, min_sequences=16)


@pytest.mark.parametrize("cost", ["kl", "log_ratio"])
@pytest.mark.parametrize("mode", ["replace", "keep"])
def test_rewards_are_those_of_the_definition(mode, cost):
  for seed in range(3):
    batch = ragged(seed)
    found = credit([functools.partial(advantages.constrain_divergence, budget=0.1, penalty=2.5,
                                      mode=mode, cost=cost)])(batch, batch.rewards, {})
    s, within, costs = batch.signals, [], []
    for i in np.nonzero(batch.sequence_mask)[0]:
      mine = (batch.sequence_ids == i) & batch.loss_mask
      per_token = s["reference_kl"] if cost == "kl" else s["logprobs"] - s["reference_logprobs"]
      c = per_token[mine].astype(np.float64).mean() if mine.any() else 0.0
      excess, r = max(0.0, c - 0.1), float(batch.rewards[i])
      wanted = r - 2.5 * excess if mode == "keep" else r if excess == 0 else -2.5 * (1 + excess)
      np.testing.assert_allclose(found.values[mine], wanted, rtol=1e-5)
      np.testing.assert_array_equal(found.signals["over_budget"][mine], excess > 0)
      within.append(excess == 0)
      costs.append(c)
    assert 0 < np.mean(within) < 1
    assert float(found.metrics["within_budget"]) == pytest.approx(np.mean(within))
    assert float(found.metrics["divergence"]) == pytest.approx(np.mean(costs), rel=1e-5)
    unscored = ~np.isin(batch.sequence_ids, np.nonzero(batch.sequence_mask)[0])
    assert not found.values[unscored].any() and not found.signals["over_budget"][unscored].any()


def test_a_group_that_is_all_over_budget_is_still_told_apart():
  costs = [0.5, 0.9, 0.3, 2.0]
  batch = pack([Trajectory([0] * 3, [False, True, True], reward=i % 2,
                           signals={"reference_kl": np.full(3, c)}) for i, c in enumerate(costs)])
  chain = [functools.partial(advantages.constrain_divergence, budget=0.1),
           advantages.center_by_group, advantages.scale_by_group_std]
  found = credit(chain)(batch, batch.rewards, {})
  of_sequence = [float(np.asarray(found.values)[(batch.sequence_ids == i) & batch.loss_mask][0])
                 for i in range(4)]
  assert np.all(np.diff(np.array(of_sequence)[np.argsort(costs)]) < 0)
  assert float(found.metrics["within_budget"]) == 0


SIZE = 3
STRINGS = [(0, a, b) for a in range(SIZE) for b in range(SIZE)]


def exact(table, teacher, reward, budget, penalty, mode):
  """Mean constrained reward over all strings of two tokens, in float64."""
  p, q = softmax(table), softmax(teacher)
  divergence, total = kl(p, q), 0.0
  for start, a, b in STRINGS:
    excess = max(0.0, (divergence[start] + divergence[a]) / 2 - budget)
    r = reward[a, b]
    r = r - penalty * excess if mode == "keep" else r if excess == 0 else -penalty * (1 + excess)
    total += p[start, a] * p[a, b] * r
  return total


@pytest.mark.parametrize("mode", ["replace", "keep"])
def test_both_parts_together_are_the_gradient_of_the_mean_reward(mode):
  rng = np.random.default_rng(1)
  table, teacher = rng.normal(size=(2, SIZE, SIZE))
  reward, penalty = rng.integers(0, 2, (SIZE, SIZE)), 1.3
  p = softmax(table)
  costs = np.sort(kl(p, softmax(teacher)) + kl(p, softmax(teacher))[0]) / 2
  budget = (costs[0] + costs[1]) / 2  # one first token in three keeps within it
  batch = pack([Trajectory(s, [False, True, True], reward=float(reward[s[1], s[2]]),
                           weight=p[0, s[1]] * p[s[1], s[2]]) for s in STRINGS])
  before = np.roll(batch.tokens, 1, axis=1)

  def read(table):
    log_p, log_q = jax.nn.log_softmax(table), jax.nn.log_softmax(jnp.float32(teacher))
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return ModelOutputs(logprobs=log_p[before, batch.tokens],
                        distribution={"reference_kl": divergence[before]})
  batch = batch.with_signals(reference_kl=read(jnp.float32(table)).get("reference_kl"))
  chain = [functools.partial(advantages.constrain_divergence, budget=budget, penalty=penalty,
                             mode=mode)]
  found = credit(chain)(batch, batch.rewards, {})
  assert float(found.metrics["within_budget"]) == pytest.approx(1 / 3)
  batch = batch.with_signals(advantages=found.values, **found.signals)
  terms = sum_of_terms([objectives.reinforce,
                        functools.partial(objectives.divergence_cost, penalty=penalty)])
  weights = [loss_weights(batch, kind) for kind in ("sequence_sum", "sequence_mean")]

  def loss(table):
    return len(STRINGS) * terms(read(table), batch, weights, mean_weights(batch))[0]
  gradient = np.asarray(jax.grad(loss)(jnp.float32(table)))
  for index in np.ndindex(SIZE, SIZE):
    ends = []
    for sign in (1, -1):
      moved = table.copy()
      moved[index] += sign * 1e-5
      ends.append(exact(moved, teacher, reward, budget, penalty, mode))
    assert -gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3, abs=1e-5)


def optimum(teacher, right, budget):
  """Largest reward of a prompt within its budget: the teacher tilted towards right answers."""
  def tilted(strength):
    p = teacher * np.exp(strength * right)
    return p / p.sum()
  low, high = 0.0, 50.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if kl(tilted(middle), teacher) < budget else (low, middle)
  return float(tilted(low) @ right)


@pytest.mark.parametrize("mode,penalty", [("replace", 1.0), ("replace", 3.0), ("keep", 1.0),
                                          ("keep", 3.0)])
def test_a_bandit_reaches_the_constrained_optimum_of_every_prompt(mode, penalty):
  """200 prompts of 16 arms, under a penalty of more than one size."""
  rng, prompts, arms, budget = np.random.default_rng(2), 200, 16, 0.3
  teacher = rng.dirichlet(np.ones(arms), prompts)
  right = (rng.random((prompts, arms)) < 0.4).astype(np.float64)
  pairs = [(x, a) for x in range(prompts) for a in range(arms)]
  batch = pack([Trajectory([x, a], [False, True], reward=right[x, a], group=x) for x, a in pairs])
  batch = jax.tree.map(jnp.asarray, batch)
  at = jnp.where(batch.loss_mask, jnp.roll(batch.tokens, 1, axis=1), 0), batch.tokens
  log_q = jnp.log(jnp.float32(teacher))
  chain = credit([functools.partial(advantages.constrain_divergence, budget=budget, penalty=penalty,
                                    mode=mode), advantages.center_by_group])
  terms = sum_of_terms([objectives.reinforce,
                        functools.partial(objectives.divergence_cost, penalty=penalty)])

  def read(logits):
    log_p = jax.nn.log_softmax(logits)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return ModelOutputs(logprobs=log_p[at], distribution={"reference_kl": divergence[at[0]]})

  @jax.jit
  def train(logits):
    def step(i, logits):
      now = read(logits)
      share = jnp.exp(jax.nn.log_softmax(logits)).reshape(-1)
      b = batch.replace(weights=jnp.zeros_like(batch.weights).at[:len(pairs)].set(share))
      b = b.with_signals(reference_kl=now.get("reference_kl"))
      found = chain(b, b.rewards, {})
      b = b.with_signals(advantages=found.values, **found.signals)
      weights = loss_weights(b, "sequence_mean")
      gradient = jax.grad(lambda z: terms(read(z), b, weights, weights)[0])(logits)
      return logits - len(pairs) * 0.5 / (1 + i / 200) * gradient
    return jax.lax.fori_loop(0, 3000, step, logits)

  p = softmax(np.asarray(train(log_q), np.float64))
  best = np.array([optimum(q, r, budget) for q, r in zip(teacher, right)])
  assert best.mean() > 0.3 + np.sum(teacher * right, axis=1).mean()
  assert np.sum(p * right, axis=1).mean() == pytest.approx(best.mean(), abs=0.005)
  np.testing.assert_allclose(np.sum(p * right, axis=1), best, atol=0.02)
  assert np.all(kl(p, teacher) < budget + 0.02)


def test_a_budget_of_sampled_log_ratios_caps_every_answer():
  """Why the KL of the whole vocabulary is the default: right answers of teacher mass q get at most
  min(1, e^d q)."""
  rng, arms, d = np.random.default_rng(3), 16, 0.3
  teacher = rng.dirichlet(np.ones(arms))
  right = rng.random(arms) < 0.4
  q = teacher[right].sum()
  best = np.where(right, np.exp(d) * teacher, teacher * (1 - np.exp(d) * q) / (1 - q))
  assert np.exp(d) * q < 1 and best.sum() == pytest.approx(1)

  def over(p):
    batch = pack([Trajectory([0, a], [False, True], signals={
        "logprobs": [0, np.log(p[a])], "reference_logprobs": [0, np.log(teacher[a])]})
        for a in range(arms)])
    found = advantages.constrain_divergence(batch, batch.rewards, budget=d, cost="log_ratio")
    flags = np.asarray(found.signals["over_budget"])
    return np.array([flags[(batch.sequence_ids == a) & batch.loss_mask][0] for a in range(arms)])
  assert not over(np.where(right, best * (1 - 1e-5), best)).any()
  assert best[right].sum() == pytest.approx(np.exp(d) * q)
  np.testing.assert_array_equal(over(np.where(right, best * 1.001, best)), right)
  tilted = softmax(np.log(teacher) + 2.0 * right)
  np.testing.assert_array_equal(over(tilted), tilted > np.exp(d) * teacher)


def test_within_the_budget_the_cost_has_no_gradient_and_micro_batches_add_up():
  batch = ragged(4)
  found = credit([advantages.constrain_divergence])(batch, batch.rewards, {})
  batch = batch.with_signals(**found.signals)
  weights, means = loss_weights(batch, "sequence_mean"), mean_weights(batch)
  term = sum_of_terms([functools.partial(objectives.divergence_cost, penalty=0.7)])

  def loss(kl, at):
    rows = jax.tree.map(lambda x: x[at] if x.shape == batch.tokens.shape else x, batch)
    return term(ModelOutputs(distribution={"reference_kl": kl}), rows, weights[at], means[at])[0]
  now = np.where(batch.loss_mask, 2 * batch.signals["reference_kl"], np.nan).astype(np.float32)
  whole, gradient = jax.value_and_grad(loss)(now, slice(None))
  expected = np.where(np.asarray(found.signals["over_budget"]) > 0, 0.7 * np.asarray(weights), 0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)
  assert expected.any() and np.any(batch.loss_mask & (expected == 0))
  parts = sum(float(loss(now[at], at)) for at in (slice(0, 2), slice(2, 3), slice(3, 8)))
  assert parts == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("wrong,message", [
    (dict(mode="drop"), "mode='drop'; valid are 'replace' and 'keep'"),
    (dict(cost="js"), "cost='js'; valid are 'kl' and 'log_ratio'"),
    (dict(penalty=0.0), "penalty=0.0 has to be above 0")])
def test_arguments_are_checked(wrong, message):
  batch = ragged(0)
  with pytest.raises(ValueError, match=message):
    advantages.constrain_divergence(batch, batch.rewards, **wrong)


def test_the_config_builds():
  config = configs.load("configs/methods/cmdp_distillation.py")
  pieces = [compose.build(dict(p), advantages) for p in config.advantage]
  assert compose.name_of(pieces[0]) == "constrain_divergence"
  assert compose.signals_of(pieces[0]) == ("reference_kl",)
  spec = dict(config.objective[1])
  assert spec.pop("aggregation") == "sequence_mean"
  term = compose.build(spec, objectives)
  assert term.keywords["penalty"] == pieces[0].keywords["penalty"]
