"""rePIRL: the gradient of the likelihood with sampled partition, returns by hand, and a chain."""

import asyncio
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, objectives, rollouts
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack, to_tokens
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


STEPS, ACTIONS = 3, 3
PATHS = np.array(list(np.ndindex((ACTIONS,) * STEPS)))  # all that can be done. [path, time]
STATES = np.concatenate([np.zeros((len(PATHS), 1), int), PATHS[:, :-1]], axis=1)  # the last action
PREFIXES = np.stack([np.zeros(len(PATHS), int), 1 + PATHS[:, 0], 4 + 3 * PATHS[:, 0] + PATHS[:, 1]], 1)


def of_paths(rewards):
  """p(path) ~ exp(sum of its rewards), in float64: the soft-optimal expert."""
  total = rewards[STATES, PATHS].sum(1)
  chance = np.exp(total - total.max())
  return chance / chance.sum()


def occupancy(chance):
  """Share of each state and action at each time."""
  found = np.zeros((STEPS, ACTIONS, ACTIONS))
  for time in range(STEPS):
    np.add.at(found[time], (STATES[:, time], PATHS[:, time]), chance)
  return found


def behind_a_prompt(per_path):
  return jnp.pad(per_path, ((0, 0), (1, 0)))


def template(samples, experts):
  """Samples of the policy in one group, and experts in another; a sequence a row."""
  batch = pack([Trajectory([0] * (STEPS + 1), [False] + [True] * STEPS, group=int(expert),
                           columns={"expert": float(expert)})
                for expert in np.arange(samples + experts) >= samples],
               row_length=STEPS + 1, min_rows=samples + experts)
  return jax.tree.map(jnp.asarray, batch)


def test_on_a_chain_reward_and_policy_learned_in_turn_have_the_expert_s_occupancy():
  """The state is the last action. Both models follow the pieces on 128 samples at each step, the
  policy from them alone; sums over the three tokens instead of means are a temperature of 1 / 3."""
  samples, experts = 128, len(PATHS)
  expert = of_paths(2 * np.random.default_rng(0).normal(size=(ACTIONS, ACTIONS)))
  empty = template(samples, experts)
  at = lambda x: jnp.zeros(empty.tokens.shape).at[:samples + experts].set(behind_a_prompt(x))
  weights = jnp.ones(empty.num_sequences).at[samples:samples + experts].set(expert)
  terms = sum_of_terms([objectives.reinforce,
                        functools.partial(objectives.fit_inverse_reward, decay=0.0)])

  def step(tables, xs):
    key, rate = xs
    policy = jax.nn.log_softmax(tables["policy"])
    chance = jnp.sum(policy[PREFIXES, PATHS], axis=1)
    drawn = jax.random.categorical(key, chance, shape=(samples,))
    paths = jnp.concatenate([drawn, jnp.arange(experts)])
    index = [jnp.asarray(x)[paths] for x in (PREFIXES, STATES, PATHS)]

    def outputs(tables):
      prefixes, states, actions = index
      return ModelOutputs(logprobs=at(jax.nn.log_softmax(tables["policy"])[prefixes, actions]),
                          action_values=at(tables["reward"][states, actions]))
    now = outputs(tables)
    batch = empty.replace(weights=weights).with_signals(
        logprobs=now.logprobs, action_values=now.action_values)
    found = run(batch, entropy=1.0, temperature=1 / STEPS, max_weight=1.0)
    batch = batch.with_signals(**found.signals, advantages=to_tokens(batch, found.values) / samples)

    def loss(tables):  # gradients of the expert's likelihood, and of return and entropy
      each = loss_weights(batch, "sequence_sum") * jnp.sum(batch.sequence_mask)
      return terms(outputs(tables), batch, each, mean_weights(batch))[0]
    gradient = jax.grad(loss)(tables)
    return jax.tree.map(lambda x, g: x - rate * g, tables, gradient), None
  tables = {"policy": jnp.zeros((13, ACTIONS)), "reward": jnp.zeros((ACTIONS, ACTIONS))}
  count = 1000
  rates = 0.5 * np.linspace(1, 0.02, count)
  tables, _ = jax.jit(functools.partial(jax.lax.scan, step))(
      tables, (jax.random.split(jax.random.key(1), count), jnp.float32(rates)))
  policy = np.asarray(jax.nn.log_softmax(tables["policy"]), np.float64)
  for chance in (of_paths(np.asarray(tables["reward"], np.float64)),
                 np.exp(policy[PREFIXES, PATHS].sum(1))):
    apart = 0.5 * np.abs(occupancy(chance) - occupancy(expert)).sum((1, 2))
    assert apart.max() < 0.05
  assert 0.5 * np.abs(occupancy(expert) - occupancy(np.full(27, 1 / 27))).sum((1, 2)).max() > 0.3


@pytest.mark.parametrize("entropy", [0.0, 0.25, 1.0])
def test_the_weight_of_entropy_holds_the_policy_where_the_closed_form_has_it(entropy):
  """Three answers of a token, known rewards, and all answers in each batch by their chance: the optimum is
  softmax(reward / entropy), and without a weight one answer alone."""
  rewards, each = jnp.array([1.0, 0.5, 0.0]), [functools.partial(objectives.reinforce)]
  batch = jax.tree.map(jnp.asarray, pack(
      [Trajectory([0, a], [False, True], columns={"expert": 0.0}) for a in range(3)], row_length=2,
      min_rows=4, min_sequences=4))
  at = lambda x: jnp.zeros(batch.tokens.shape).at[:3, 1].set(x)

  def step(logits, _):
    log_p = jax.nn.log_softmax(logits)
    now = batch.replace(weights=jnp.zeros(4).at[:3].set(jnp.exp(log_p))).with_signals(
        logprobs=at(log_p), action_values=at(rewards))
    now = now.with_signals(advantages=to_tokens(now, run(now, entropy=entropy).values))

    def loss(logits):
      return 3 * sum_of_terms(each)(ModelOutputs(logprobs=at(jax.nn.log_softmax(logits))), now,
                                    loss_weights(now, "sequence_sum"), mean_weights(now))[0]
    return logits - jax.grad(loss)(logits), None
  logits, _ = jax.jit(functools.partial(jax.lax.scan, step, length=1000))(jnp.zeros(3))
  expected = jax.nn.softmax(rewards / entropy) if entropy else jnp.array([1.0, 0.0, 0.0])
  np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-3 if entropy else 0.01)


def test_the_sampled_partition_function_is_too_small_and_less_so_with_more_samples():
  """log Z of M samples is that of any one, R - log policy, less the log of M times its weight."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(ACTIONS, ACTIONS))
  proposal = of_paths(0.5 * rng.normal(size=(ACTIONS, ACTIONS)))
  ratio = rewards[STATES, PATHS].sum(1) - np.log(proposal)
  exact = np.log(np.exp(rewards[STATES, PATHS].sum(1)).sum())
  drawn = rng.choice(len(PATHS), size=4096, p=proposal)
  batch = template(len(drawn), 0).with_signals(
      action_values=behind_a_prompt(jnp.float32(rewards[STATES, PATHS][drawn])),
      logprobs=behind_a_prompt(jnp.float32(np.log(proposal)[drawn, None] / STEPS).repeat(STEPS, 1)))
  piece, biases = jax.jit(functools.partial(run, temperature=1 / STEPS, max_weight=1.0)), {}
  for m in (1, 2, 4, 16, 64):
    found = piece(batch.replace(group_ids=jnp.arange(len(drawn)) // m))
    weight = -np.asarray(found.signals["expert_preference"], np.float64)[:, -1]
    logs = ratio[drawn] - np.log(m * weight)
    np.testing.assert_allclose(logs.reshape(-1, m).std(1), 0, atol=1e-3)
    biases[m] = logs.mean() - exact
  pairs = np.logaddexp(ratio[:, None], ratio) - np.log(2)  # all samples of 1 and of 2, enumerated
  assert biases[1] == pytest.approx(proposal @ ratio - exact, abs=0.05)
  assert biases[2] == pytest.approx(proposal @ pairs @ proposal - exact, abs=0.05)
  assert biases[1] < biases[2] < biases[4] < biases[16] < biases[64] + 0.01
  assert biases[1] < -0.4 and abs(biases[64]) < 0.03


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
