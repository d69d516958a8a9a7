"""rePIRL: the gradient of the likelihood with sampled partition, returns by hand, and a chain."""

import asyncio
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, objectives, rollouts
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack
from jaxrl.models import DecoderConfig, init_parameters, model_outputs, unbox
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms


def batch_of(prompts=3, samples=4, *, seed=0, scored=0.9):
  """Groups of samples, each with an expert in a group of its own."""
  rng = np.random.default_rng(seed)
  made = []
  for g in range(prompts):
    for k in range(samples + 1):
      n, expert = int(rng.integers(1, 6)), k == samples
      made.append(Trajectory(
          rng.integers(0, 9, n + 1), [False] + [True] * n, group=2 * g + expert,
          reward=float(rng.random() < 0.5), scored=expert or bool(rng.random() < scored),
          columns={"expert": float(expert)},
          signals={"action_values": rng.normal(size=n + 1),
                   "logprobs": -rng.exponential(1.0, n + 1)}))
  return pack(made, row_length=16), made


def run(batch, **options):
  return advantages.inverse_rewards(batch, batch.rewards, **options)


def test_the_term_s_gradient_is_that_of_the_expert_s_likelihood():
  """J = mean over prompts of R_expert - log mean_j exp(R_j - log policy_j), R means over tokens."""
  batch, made = batch_of(scored=1.0)
  found = run(batch, max_weight=1.0)
  batch = batch.with_signals(**found.signals)
  objective = sum_of_terms([functools.partial(objectives.fit_inverse_reward, decay=0.0)])

  def loss(values):
    return objective(ModelOutputs(action_values=values), batch, loss_weights(batch, "sequence_mean"),
                     mean_weights(batch))[0]
  gradient = np.asarray(jax.grad(loss)(jnp.asarray(batch.signals["action_values"])))

  def likelihood(values):
    total = 0.0
    for g in range(3):
      of = [i for i, t in enumerate(made) if t.group == 2 * g]
      expert = next(i for i, t in enumerate(made) if t.group == 2 * g + 1)

      def mean(i, x):
        at = (np.asarray(batch.sequence_ids) == i) & np.asarray(batch.loss_mask)
        return x[at].mean()
      logits = [mean(i, values) - mean(i, np.asarray(batch.signals["logprobs"], float)) for i in of]
      total += mean(expert, values) - np.log(np.mean(np.exp(logits)))
    return total / len(made)  # sequence_mean divides by the sequences
  values = np.asarray(batch.signals["action_values"], np.float64)
  for index in zip(*np.nonzero(batch.loss_mask)):
    ends = []
    for sign in (1, -1):
      moved = values.copy()
      moved[index] += sign * 1e-5
      ends.append(likelihood(moved))
    assert -gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("entropy, outcome", [(0.001, 0.0), (0.5, 0.0), (0.1, 2.0)])
def test_returns_are_those_of_the_equation_and_experts_have_none(entropy, outcome):
  batch, made = batch_of(seed=2)
  found = run(batch, entropy=entropy, outcome=outcome)
  own = np.array([t.scored and not t.columns["expert"] for t in made])
  level = np.mean([v for t, mine in zip(made, own) if mine for v in t.signals["action_values"][1:]])
  returns = np.array([
      np.sum(t.signals["action_values"][1:] - level - entropy * t.signals["logprobs"][1:])
      + outcome * t.reward for t in made])
  values = np.asarray(found.values)[:len(made)]
  np.testing.assert_allclose(values[own], returns[own] - returns[own].mean(), rtol=1e-4, atol=1e-4)
  assert not values[~own].any()


def test_a_reward_that_is_the_same_everywhere_prefers_no_length():
  batch, _ = batch_of(seed=6)
  alike = batch.with_signals(action_values=jnp.full_like(batch.signals["action_values"], 3.0))
  np.testing.assert_allclose(run(alike, entropy=0.0).values, 0, atol=1e-5)


def test_weights_sum_to_1_for_each_prompt_unless_capped():
  batch, made = batch_of(seed=3)
  for cap in (1.0, 0.3):
    signal = np.asarray(run(batch, max_weight=cap).signals["expert_preference"])
    for g in range(3):
      weights = []
      for i, t in enumerate(made):
        at = (np.asarray(batch.sequence_ids) == i) & np.asarray(batch.loss_mask)
        if t.group == 2 * g + 1:
          assert (signal[at] == 1).all()
        elif t.group == 2 * g and t.scored:
          assert len(set(signal[at].tolist())) == 1
          weights.append(-signal[at][0])
      assert max(weights) <= cap + 1e-6
      assert sum(weights) == pytest.approx(1.0, abs=1e-5) if cap == 1.0 else sum(weights) <= 1


def test_large_rewards_stay_finite():
  batch, _ = batch_of(seed=4)
  values = 1e4 * batch.signals["action_values"]
  found = run(batch.with_signals(action_values=values), temperature=0.1)
  assert np.isfinite(found.values).all()
  assert np.isfinite(found.signals["expert_preference"]).all()


def test_the_term_and_its_decay():
  batch, _ = batch_of(seed=5)
  batch = batch.with_signals(**run(batch).signals)
  values = jnp.asarray(batch.signals["action_values"])
  term = functools.partial(objectives.fit_inverse_reward, coefficient=0.7, decay=0.2)
  loss, _ = term(ModelOutputs(action_values=values), batch)
  c = np.asarray(batch.signals["expert_preference"], float)
  expected = 0.7 * (0.1 * np.asarray(values, float) ** 2 - c * np.asarray(values, float))
  np.testing.assert_allclose(loss, np.where(batch.loss_mask, expected, 0), rtol=1e-5, atol=1e-6)


def test_on_a_chain_the_recovered_reward_gives_the_expert_s_choices():
  """Three states, three actions each: reward tables and policy in turn, exact softmax policies."""
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(3, 3)) * 2
  expert = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
  r = np.zeros((3, 3))
  for _ in range(4000):
    policy = np.exp(r) / np.exp(r).sum(1, keepdims=True)
    r += 0.5 * (expert - policy)  # the likelihood's gradient with the exact partition function
  policy = np.exp(r) / np.exp(r).sum(1, keepdims=True)
  assert 0.5 * np.abs(policy - expert).sum(1).max() < 0.05


def test_the_reward_of_a_token_knows_the_token():
  """`action_values` are read at the token, `values` before it, by one head of the critic."""
  config = DecoderConfig(vocab_size=9, layers=1, d_model=16, heads=2, kv_heads=1, d_ff=16, critic=True)
  params = unbox(init_parameters(config, jax.random.key(0)))
  tokens = np.arange(6) % 5
  batch = pack([Trajectory(tokens, [False] + [True] * 5)], row_length=8)
  other = pack([Trajectory(np.append(tokens[:-1], 7), [False] + [True] * 5)], row_length=8)
  found, changed = (model_outputs(config, params, b, signals=("values", "action_values"),
                                  logprobs=False) for b in (batch, other))
  np.testing.assert_allclose(found.values[0, 2:6], found.action_values[0, 1:5], rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(found.values, changed.values, atol=1e-7)
  assert found.action_values[0, 5] != changed.action_values[0, 5]
  plain = DecoderConfig(vocab_size=9, layers=1, d_model=16, heads=2, kv_heads=1, d_ff=16)
  with pytest.raises(ValueError, match="action_values"):
    model_outputs(plain, params, batch, signals=("action_values",))


def test_the_expert_is_the_task_s_solution_in_a_group_of_its_own():
  class Context:
    async def sample(self, prompt, n, train):
      return [Trajectory([*prompt, 2], [False, train]) for _ in range(n)]

    def solved(self, task):
      return Trajectory([*task.prompt, 5, 6], [False, True, True], prompt_length=1)

    async def logprobs(self, prompt, completion, model):
      assert (list(prompt), list(completion), model) == ([1], [5, 6], "policy")
      return np.array([-0.5, -0.25])
  found = asyncio.run(rollouts.group_and_expert(Context(), Task(id="t", prompt=[1]), samples=2))
  assert [t.columns["expert"] for t in found] == [0, 0, 1]
  assert [t.group for t in found] == [0, 0, 1] and found[2].tokens.tolist() == [1, 5, 6]
  assert found[2].behaviour_logprobs.tolist() == [0, -0.5, -0.25]


def test_without_experts_it_says_what_is_missing():
  batch, _ = batch_of()
  with pytest.raises(ValueError, match="group_and_expert"):
    run(batch.replace(columns={}))


def test_the_config_has_a_critic():
  config = configs.load("configs/methods/repirl.py")
  assert config.model.critic and config.objective[1]["aggregation"] == "sequence_mean"
