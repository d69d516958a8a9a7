"""E2C: tags, weights and certainty of two parts, and votes that execute each plan once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rewards, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, sum_of_terms

CONFIG = "configs/methods/e2c.py"


def random_batch(seed, *, tagged=True):
  """Ragged sequences of a plan and an execution each, some of them not scored or not tagged."""
  rng = np.random.default_rng(seed)
  trajectories = []
  for _ in range(8):
    length = int(rng.integers(2, 15))
    start = int(rng.integers(1, length))
    cut = int(rng.integers(start, length + 1))
    tags = np.where(np.arange(length) < start, 0, np.where(np.arange(length) < cut, 1, 2))
    mask = np.arange(length) >= start
    trajectories.append(Trajectory(
        tokens=rng.integers(0, 9, length), loss_mask=mask, reward=rng.normal(),
        behaviour_logprobs=np.where(mask, -rng.exponential(1.0, length), 0),
        tag_ids=tags * (tagged and rng.random() < 0.85), group=int(rng.integers(0, 3)),
        scored=bool(rng.random() < 0.85)))
  return pack(trajectories, row_length=16, min_rows=8, min_sequences=8)


def outputs_of(batch, seed):
  """Log-probabilities near the sampler's and entropies; not even numbers off the loss mask."""
  rng = np.random.default_rng(seed)
  moved = batch.behaviour_logprobs + 0.3 * rng.normal(size=batch.tokens.shape)
  entropies = rng.exponential(1.0, batch.tokens.shape)
  return (np.where(batch.loss_mask, moved, np.nan).astype(np.float32),
          np.where(batch.loss_mask, entropies, np.nan).astype(np.float32))


@pytest.mark.parametrize("seed", range(4))
def test_plans_and_executions_have_weights_of_their_own(seed):
  batch = random_batch(seed)
  weigh = jax.jit(functools.partial(advantages.weigh_plans, plan=2.5, execution=0.5))
  found = np.asarray(weigh(batch, batch.rewards))
  for r, c in np.ndindex(*batch.tokens.shape):
    weight = {0: 1.0, 1: 2.5, 2: 0.5}[int(batch.tag_ids[r, c])]
    reward = float(batch.rewards[batch.sequence_ids[r, c]])
    assert found[r, c] == pytest.approx(weight * reward if batch.loss_mask[r, c] else 0.0, rel=1e-6)
  spread = jnp.where(batch.loss_mask, batch.rewards[batch.sequence_ids], 0.0)
  np.testing.assert_array_equal(weigh(batch, spread), found)  # values per token too


def configured(batch):
  """Loss and its gradients in log-probabilities and entropies, as the config has them."""
  config = configs.load(CONFIG)
  pieces = [compose.build(dict(a), advantages) for a in config.advantage]
  terms = [compose.build(dict(t), objectives) for t in config.objective]
  batch = batch.with_signals(advantages=chain(pieces)(batch, batch.rewards))
  weights = loss_weights(batch, config.aggregation.kind)

  def loss(logprobs, entropies, rows=slice(None)):
    part = jax.tree.map(lambda x: x[rows] if x.shape[:2] == batch.tokens.shape else x, batch)
    return sum_of_terms(terms)(ModelOutputs(logprobs=logprobs[rows], entropy=entropies[rows]), part,
                               weights[rows], weights[rows])[0]
  return loss


def advantage_of(batch, i):
  same = np.nonzero(batch.sequence_mask & (batch.group_ids == batch.group_ids[i]))[0]
  own = np.array([batch.rewards[j] for j in same], np.float64)
  spread = own.std(ddof=1) if len(own) > 1 else 0.0
  return (float(batch.rewards[i]) - own.mean()) / (spread + 1e-4) if spread else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_weighted_surrogate_plus_the_entropy_of_executions(seed):
  batch = random_batch(seed)
  logprobs, entropies = outputs_of(batch, seed)
  loss = configured(batch)
  (value, gradients) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(logprobs, entropies)
  mask = batch.loss_mask & batch.sequence_mask[batch.sequence_ids]
  tokens, expected = mask.sum(), 0.0
  slopes = np.zeros((2, *batch.tokens.shape))
  for r, c in zip(*np.nonzero(mask)):
    tag = int(batch.tag_ids[r, c])
    weight, advantage = {0: 1, 1: 2, 2: 1}[tag], advantage_of(batch, batch.sequence_ids[r, c])
    ratio = np.exp(np.float64(logprobs[r, c]) - np.float64(batch.behaviour_logprobs[r, c]))
    plain, clipped = ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage
    expected += (-weight * min(plain, clipped) + 0.01 * (tag == 2) * entropies[r, c]) / tokens
    slopes[0, r, c] = -weight * plain / tokens if plain <= clipped else 0.0
    slopes[1, r, c] = 0.01 * (tag == 2) / tokens
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
  for gradient, slope in zip(gradients, slopes):
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-6)
  halves = sum(float(loss(logprobs, entropies, rows)) for rows in (slice(0, 3), slice(3, 8)))
  assert halves == pytest.approx(float(value), rel=1e-4, abs=1e-6)  # micro-batches add up


def test_without_tags_it_is_grpo():
  batch = random_batch(3, tagged=False)
  logprobs, entropies = outputs_of(batch, 3)
  parent = configs.load("configs/grpo.py")
  credit = chain([compose.build(dict(a), advantages) for a in parent.advantage])
  terms = [compose.build(dict(t), objectives) for t in parent.objective]
  own = batch.with_signals(advantages=credit(batch, batch.rewards))
  weights = loss_weights(own, "token_mean")
  expected = sum_of_terms(terms)(ModelOutputs(logprobs=logprobs), own, weights, weights)[0]
  assert configured(batch)(logprobs, entropies) == pytest.approx(float(expected), rel=1e-5)


def test_descent_makes_executions_certain_and_leaves_plans_alone():
  batch = random_batch(0)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(*batch.tokens.shape, 5)))

  def entropy(logits):
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)

  def loss(logits):
    term, metrics = objectives.execution_entropy(ModelOutputs(entropy=entropy(logits)), batch,
                                                 coefficient=0.3)
    return jnp.sum(term), metrics
  gradient, metrics = jax.grad(loss, has_aux=True)(logits)
  moved = entropy(logits - 0.1 * gradient) - entropy(logits)
  executed = batch.loss_mask & (batch.tag_ids == 2)
  assert executed.any() and np.all(np.asarray(moved)[executed] < 0)
  assert not np.any(np.asarray(moved)[~executed])
  np.testing.assert_allclose(metrics["execution_entropy"], np.where(executed, entropy(logits), 0))


def test_the_boundary_parts_an_answer(play):
  def table(text):
    body = text.split("?")[1]
    if body.endswith("$"):
      return {"$": 1.0}
    return {"a": 0.4, "b": 0.3, ">": 0.2, "$": 0.1}
  episode = functools.partial(rollouts.plan_then_execute, samples=8, boundary=">")
  played = play(episode, table, lambda text: 1.0, tasks=10)
  bounded = 0
  for t in played.trajectories:
    body = "".join(map(chr, t.tokens)).split("?")[1]
    plan, bar, execution = body.partition(">")
    tags = [1] * len(plan + bar) + [2] * len(execution) if bar else [0] * len(body)
    assert t.tag_ids.tolist() == [0] * t.prompt_length + tags
    assert t.loss_mask.tolist() == [False] * t.prompt_length + [True] * len(body)
    bounded += bool(bar)
  assert len(played.trajectories) == 80 and 20 < bounded < 79


PLANS = {"+": 0.45, "-": 0.35, "*": 0.2}


def skeletons(text):
  """A plan of an operator and the boundary, and six tokens of execution: right behind "+"."""
  body = text.split("?")[1]
  if not body:
    return PLANS
  if len(body) == 1:
    return {">": 1.0}
  return {"r" if body[0] == "+" else "w": 1.0} if len(body) < 7 else {"$": 1.0}


def voted(plans, executions=8, **options):
  return functools.partial(rollouts.execute_distinct_plans, plans=plans, plan_tokens=2,
                           boundary=">", answer="([rw])", executions=executions, **options)


def test_votes_over_plans_find_what_self_consistency_finds_with_fewer_tokens(play):
  right = lambda text: float(text.endswith("r"))
  played = play(voted(9), skeletons, right, tasks=400)
  assert len(played.trajectories) == 400 and not any(t.loss_mask.any() for t in played.trajectories)
  # All votes of "+" are for "r", all others for "w": 9 whole answers would vote the same way.
  expected = sum(math.comb(9, k) * 0.45 ** k * 0.55 ** (9 - k) for k in range(5, 10))
  found = np.mean([t.reward for t in played.trajectories])
  assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)
  executed = sum(map(len, _drawn_plans(played)))
  assert played.policy.drawn == 400 * 9 * 2 + executed * 6
  assert played.policy.drawn < 400 * 9 * 8 / 2


def _drawn_plans(played):
  """The plans of each task, told by what was executed of them."""
  by_task = {}
  for request in played.policy.asked:
    text = "".join(map(chr, request.prompt))
    task, _, plan = text.partition("?")
    if plan:
      by_task.setdefault(task, []).append(plan)
  assert all(len(set(plans)) == len(plans) for plans in by_task.values())  # each kind once
  return [[p[0] for p in plans] for plans in by_task.values()]


def test_only_the_most_frequent_plans_are_executed(play):
  played = play(voted(60, executions=1), skeletons, lambda text: 0.0, tasks=30)
  assert all(len(plans) == 1 for plans in _drawn_plans(played))
  executed = [plan for plans in _drawn_plans(played) for plan in plans]
  assert executed.count("+") > executed.count("-") > 0 and "*" not in executed


def test_without_a_plan_or_an_answer_there_is_still_a_trajectory(play):
  no_plan = lambda text: {"x": 1.0}
  played = play(voted(3), no_plan, lambda text: 0.0, tasks=2)
  assert [t.text for t in played.trajectories] == ["xx", "xx"]
  no_answer = lambda text: {">": 1.0} if text[-1] == "?" else {"x": 0.5, "$": 0.5}
  played = play(voted(3), no_answer, lambda text: 0.0, tasks=2)
  assert all(t.text.startswith(">") for t in played.trajectories)


@pytest.mark.parametrize("episode", [
    functools.partial(rollouts.plan_then_execute, samples=2, boundary=""),
    functools.partial(rollouts.execute_distinct_plans, plans=2, plan_tokens=2, boundary="",
                      answer="(x)")])
def test_an_empty_boundary_is_refused(play, episode):
  with pytest.raises(RuntimeError, match="ends no plan"):
    play(episode, skeletons, lambda text: 0.0)


def test_a_negative_weight_is_refused():
  batch = random_batch(0)
  with pytest.raises(ValueError, match="execution=-1"):
    advantages.weigh_plans(batch, batch.rewards, execution=-1)


@pytest.mark.parametrize("text,score", [("456=975", 1), (" =975 ", 1), ("456=974", 0), ("975", 0),
                                        ("456=975=975", 0), ("", 0)])
def test_the_reward_reads_the_execution(text, score):
  criterion, = configs.load(CONFIG).reward.criteria
  spec = {k: v for k, v in dict(criterion).items() if k != "label"}
  judge = compose.build(spec, rewards)
  t = Trajectory([1, 2], [False, True], text=text)
  assert judge(Task(id="q", prompt=[1], answer="975"), t).score == score


def test_a_part_without_exactly_one_group_is_refused():
  with pytest.raises(ValueError, match="has 2 groups"):
    rewards.Scorer([dict(name="in_span", pattern="(a)(b)")], workers=0)


def test_the_config_builds():
  config = configs.load(CONFIG)
  built = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert built.func is rollouts.plan_then_execute and built.keywords["boundary"] == "="
  assert config.rollout.max_tokens >= len("456=1998") + 1
