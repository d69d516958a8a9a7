"""ROVER: the loss of a table of logits, token by token, its first step, and a tree of answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms

VOCABULARY = 5


def log_softmax(z):
  z = np.asarray(z, np.float64)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def ragged(seed, sequences=10):
  """Sequences over 5 tokens with gaps in their loss masks, several to a row, some not scored."""
  rng = np.random.default_rng(seed)
  lengths = np.concatenate([[2, 2], rng.integers(2, 9, sequences - 2)])
  trajectories = []
  for i, length in enumerate(lengths):
    mask = (np.arange(length) > 0) & (rng.random(length) < 0.8)
    mask[-1] |= i < 2  # singletons
    trajectories.append(Trajectory(rng.integers(0, VOCABULARY, length), mask, group=i % 3,
                                   reward=float(rng.integers(0, 2)), scored=i % 5 != 4))
  batch = pack(trajectories, row_length=16, min_rows=8, min_sequences=16)
  assert any(len(np.unique(row[row >= 0])) > 1 for row in batch.sequence_ids)
  advantage = chain([advantages.center_by_group])(batch, batch.rewards)
  return trajectories, batch.with_signals(advantages=np.asarray(advantage))


def read(table, batch):
  """What a model whose next token depends on the last one alone says of each token."""
  log_p = jax.nn.log_softmax(table)
  before = jnp.roll(batch.tokens, 1, axis=1)
  return log_p[before, batch.tokens], jnp.mean(log_p, axis=-1)[before]


def with_old(batch, old):
  logprobs, mean = read(jnp.float32(old), batch)
  return batch.with_signals(old_logprobs=logprobs, old_mean_logprobs=mean)


def loss_of(batch, rho, aggregation="token_mean"):
  term = sum_of_terms([functools.partial(objectives.random_policy_valuation, rho=rho)])
  weights, means = loss_weights(batch, aggregation), mean_weights(batch)

  def loss(table):
    logprobs, mean = read(table, batch)
    outputs = ModelOutputs(logprobs=logprobs, distribution={"mean_logprobs": mean})
    return term(outputs, batch, weights, means)
  return loss


def centred(trajectories):
  scored = [i for i, t in enumerate(trajectories) if t.scored]
  return {i: trajectories[i].reward - np.mean([trajectories[j].reward for j in scored
                                               if trajectories[j].group == trajectories[i].group])
          for i in scored}


def errors(trajectories, table, old, rho):
  """(state, token, Q - target) of every loss token, by the paper's equations."""
  drift = rho * (log_softmax(table) - log_softmax(old))  # [state, token]
  found = []
  for i, advantage in centred(trajectories).items():
    t = trajectories[i]
    at = np.nonzero(t.loss_mask)[0]
    for k, j in enumerate(at):
      later = 0.0
      if k + 1 < len(at):
        state = t.tokens[at[k + 1] - 1]  # what the next choice is made behind
        later = sum(drift[state, a] for a in range(VOCABULARY)) / VOCABULARY
      state, token = t.tokens[j - 1], t.tokens[j]
      found.append((state, token, drift[state, token] - (advantage + later)))
  return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_loss_and_gradient_are_those_of_the_equations(seed, rho):
  rng = np.random.default_rng(seed)
  old, table = rng.normal(size=(2, VOCABULARY, VOCABULARY))
  trajectories, batch = ragged(seed)
  batch = with_old(batch, old)
  (loss, metrics), gradient = jax.value_and_grad(loss_of(batch, rho), has_aux=True)(
      jnp.float32(table))
  found = errors(trajectories, table, old, rho)
  assert float(loss) == pytest.approx(np.mean([e ** 2 for *_, e in found]), rel=1e-4)
  p, expected = np.exp(log_softmax(table)), np.zeros_like(table)
  for state, token, error in found:  # the target is a constant
    expected[state] += 2 * rho * error * (np.eye(VOCABULARY)[token] - p[state]) / len(found)
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
  assert float(metrics["successor_value"]) != 0


def test_at_the_old_policy_it_is_reinforce_with_step_two_rho():
  rng = np.random.default_rng(3)
  table = rng.normal(size=(VOCABULARY, VOCABULARY))
  trajectories, batch = ragged(3)
  batch = with_old(batch, table)
  (loss, metrics), gradient = jax.value_and_grad(loss_of(batch, 1.7), has_aux=True)(
      jnp.float32(table))
  weights, means = loss_weights(batch, "token_mean"), mean_weights(batch)

  def reinforce(table):
    outputs = ModelOutputs(logprobs=read(table, batch)[0])
    return sum_of_terms([objectives.reinforce])(outputs, batch, weights, means)[0]
  expected = jax.grad(reinforce)(jnp.float32(table))
  assert np.abs(expected).max() > 0.01
  np.testing.assert_allclose(gradient, 2 * 1.7 * expected, rtol=1e-4, atol=1e-6)
  squares = [centred(trajectories)[i] ** 2 for i, t in enumerate(trajectories) if t.scored
             for _ in range(int(t.loss_mask.sum()))]
  assert float(loss) == pytest.approx(np.mean(squares), rel=1e-5)
  assert abs(float(metrics["action_value"])) + abs(float(metrics["successor_value"])) < 1e-6


def test_one_update_per_batch_is_unclipped_grpo_at_twice_the_rate():
  """Exact gradients over all strings of two tokens: the off-policy steps are what is new."""
  strings = [(0, a, b) for a in range(VOCABULARY) for b in range(VOCABULARY)]
  rewards = {(0, 1, 2): 1.0, (0, 3, 0): 1.0}

  def everything(table):
    log_p = log_softmax(table)
    weights = np.exp([log_p[s[0], s[1]] + log_p[s[1], s[2]] for s in strings])
    batch = pack([Trajectory(s, [False, True, True], weight=w) for s, w in zip(strings, weights)],
                 row_length=16)
    reward = np.zeros(batch.num_sequences, np.float32)
    reward[:len(strings)] = [rewards.get(s, 0.0) for s in strings]
    success = float(np.sum(weights * reward[:len(strings)]))
    return batch.with_signals(advantages=np.where(
        batch.loss_mask, (reward - success)[batch.sequence_ids], 0)), success

  curves = []
  for method, rate in (("rover", 200.0), ("grpo", 400.0)):
    table, curve = np.zeros((VOCABULARY, VOCABULARY)), []
    for _ in range(6):
      batch, success = everything(table)
      batch = with_old(batch, table)
      if method == "rover":
        gradient = jax.grad(lambda x: loss_of(batch, 1.0)(x)[0])(jnp.float32(table))
      else:
        behaviour = batch.replace(behaviour_logprobs=batch.signals["old_logprobs"])
        term = sum_of_terms([functools.partial(objectives.clipped_surrogate, low=1.0, high=1e6)])
        gradient = jax.grad(lambda x: term(
            ModelOutputs(logprobs=read(x, behaviour)[0]), behaviour,
            loss_weights(batch, "token_mean"), mean_weights(batch))[0])(jnp.float32(table))
      table = table - rate * np.asarray(gradient, np.float64)
      curve.append(success)
    curves.append(curve)
  assert curves[0][-1] > 3 * curves[0][0]
  np.testing.assert_allclose(*curves, rtol=1e-3)


def test_the_successor_is_a_constant_and_off_the_mask_nothing_is_read():
  rng = np.random.default_rng(4)
  _, batch = ragged(4)
  batch = with_old(batch, rng.normal(size=(VOCABULARY, VOCABULARY)))
  shape = batch.tokens.shape
  for garbage in (np.nan, np.inf, -np.inf):
    fields = [np.where(batch.loss_mask, rng.normal(size=shape), garbage) for _ in range(2)]

    def total(fields):
      outputs = ModelOutputs(logprobs=fields[0], distribution={"mean_logprobs": fields[1]})
      values, metrics = objectives.random_policy_valuation(outputs, batch)
      return jnp.sum(values), metrics
    (_, metrics), (to_logprobs, to_mean) = jax.value_and_grad(total, has_aux=True)(
        [jnp.float32(f) for f in fields])
    assert np.all(np.isfinite(to_logprobs)) and not np.any(np.asarray(to_mean))
    assert not np.asarray(to_logprobs)[~batch.loss_mask].any()
    assert all(np.all(np.isfinite(x)) for x in metrics.values())


def test_micro_batches_add_up():
  rng = np.random.default_rng(5)
  old, table = rng.normal(size=(2, VOCABULARY, VOCABULARY))
  _, batch = ragged(5)
  batch = with_old(batch, old)
  outputs = ModelOutputs(logprobs=read(table, batch)[0],
                         distribution={"mean_logprobs": read(table, batch)[1]})
  term = sum_of_terms([objectives.random_policy_valuation])
  weights, means = loss_weights(batch, "token_mean"), mean_weights(batch)
  whole = term(outputs, batch, weights, means)[0]

  def rows(tree, at):
    return jax.tree.map(lambda x: x[at] if x.shape == batch.tokens.shape else x, tree)
  parts = [term(rows(outputs, at), rows(batch, at), weights[at], means[at])[0]
           for at in (slice(0, 1), slice(1, 3), slice(3, 8))]
  assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("rho", [0.0, -1.0])
def test_rho_is_checked(rho):
  _, batch = ragged(0)
  with pytest.raises(ValueError, match=f"rho={rho} has to be above 0"):
    objectives.random_policy_valuation(ModelOutputs(), batch, rho=rho)


def test_the_config_builds():
  config = configs.load("configs/methods/rover.py")
  assert config.rollout.updates == 4
  assert [compose.name_of(compose.build(dict(p), advantages)) for p in config.advantage] == [
      "center_by_group"]
  term, = [compose.build(dict(p), objectives) for p in config.objective]
  assert compose.signals_of(term) == ("mean_logprobs", "old_logprobs", "old_mean_logprobs")


WAYS, DEPTH = 4, 4  # a tree of 4^4 leaves; states by level, the root first
FIRST = np.array([0, 1, 5, 21, 85])


def paths(depth):
  """All strings of actions, and the states that they pass."""
  actions = np.array(list(np.ndindex((WAYS,) * depth)))
  before = np.stack([actions[:, :d] @ WAYS ** np.arange(d)[::-1] for d in range(depth)], axis=1)
  return actions, FIRST[:depth] + before


def values_of_the_piece(leaves):
  """Q where the loss over all leaves, with a free table as rho * drift, has its target: the equation
  Q(s, a) = r + mean_a' Q(s', a'), swept from the leaves up by the term's own gradient."""
  depth = round(np.log(len(leaves)) / np.log(WAYS))
  actions, states = paths(depth)
  batch = pack([Trajectory([0, *a], [False] + [True] * depth) for a in actions], row_length=depth + 1,
               min_rows=len(actions))
  last = np.pad(np.repeat(np.eye(depth)[-1:], len(actions), 0), ((0, 0), (1, 0)))
  zeros = np.zeros(batch.tokens.shape, np.float32)
  batch = batch.with_signals(advantages=np.float32(last * leaves[:, None]), old_logprobs=zeros,
                             old_mean_logprobs=zeros)
  # The reward is due at the last token alone, as behind it there is no value.

  def loss(table):
    at = table[states]
    drift = jnp.take_along_axis(at, actions[..., None], axis=2)[..., 0]
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (1, 0)))
    outputs = ModelOutputs(logprobs=pad(drift), distribution={"mean_logprobs": pad(at.mean(-1))})
    return jnp.sum(objectives.random_policy_valuation(outputs, batch)[0])
  gradient, table = jax.jit(jax.grad(loss)), np.zeros((FIRST[depth], WAYS))
  count = np.zeros_like(table)
  np.add.at(count, (states, actions), 1)
  for _ in range(depth):
    table = table - np.asarray(gradient(jnp.float32(table)), np.float64) / (2 * count)
  return table


def success(table, leaves, rho):
  """Of the policy softmax(Q / rho), and the chance of each leaf."""
  depth = round(np.log(len(leaves)) / np.log(WAYS))
  actions, states = paths(depth)
  p = np.exp(log_softmax((table - table.max(-1, keepdims=True)) / rho))
  chance = np.prod(p[states, actions], axis=1)
  return chance @ leaves, chance


def test_on_a_tree_the_values_are_those_of_uniform_play_and_rank_its_branches():
  leaves = np.zeros(WAYS ** DEPTH)
  right = [73, 106, 221, 245]
  leaves[right] = 1
  table = values_of_the_piece(leaves)
  for level in range(DEPTH):  # the share of rewarded leaves below, counted
    np.testing.assert_allclose(table[FIRST[level]:FIRST[level + 1]].ravel(),
                               leaves.reshape(WAYS ** (level + 1), -1).mean(1), atol=1e-6)
  found = [success(table, leaves, rho)[0] for rho in (1e-3, 0.05, 0.2, 1.0)]
  np.testing.assert_allclose(found, [1.0, 0.50, 0.16, 0.037], rtol=0.03)
  assert (success(table, leaves, 1e-3)[1][right] > 0.05).all(), "softly all solutions are kept"
  state = 0
  for level in range(DEPTH):  # greedily one
    choice = np.argmax(table[state])
    state = FIRST[level + 1] + WAYS * (state - FIRST[level]) + choice
  assert state - FIRST[DEPTH] in right


def test_rewards_between_0_and_1_can_lead_the_values_astray():
  """One leaf of 1 in a branch with the mean 0.25, and a branch where all are 0.5."""
  leaves = np.array([[1, 0, 0, 0], [0.5] * 4, [0] * 4, [0] * 4]).ravel()
  table = values_of_the_piece(leaves)
  np.testing.assert_allclose(table[0], [0.25, 0.5, 0, 0], atol=1e-6)
  assert success(table, leaves, 1e-4)[0] == pytest.approx(0.5)  # and 1 could be had


@functools.cache
def trainer():
  """16 tables are trained on samples of the tree, each with four rewarded leaves of its own."""
  samples = 32
  template = jax.tree.map(jnp.asarray, pack(
      [Trajectory([0] * (DEPTH + 1), [False] + [True] * DEPTH)] * samples, row_length=DEPTH + 1,
      min_rows=samples))
  advantage = chain([advantages.center_by_group])
  actions, states = map(jnp.asarray, paths(DEPTH))

  def one(key, rover, rate, inner, rho, successor, steps=80):
    right = jax.random.choice(key, WAYS ** DEPTH, (4,), replace=False)
    rewarded = jnp.zeros(WAYS ** DEPTH).at[right].set(1.0)
    term = sum_of_terms([functools.partial(objectives.random_policy_valuation, rho=rho),
                         objectives.clipped_surrogate])

    def update(table, key):
      log_p = jax.nn.log_softmax(table)
      chance = jnp.exp(jnp.sum(log_p[states, actions], axis=1))
      leaf = jax.random.categorical(key, jnp.log(chance), shape=(samples,))
      at, chosen = jax.nn.one_hot(states[leaf], FIRST[DEPTH]), jax.nn.one_hot(actions[leaf], WAYS)

      def read(table):
        log_p = jnp.einsum("nds,sa->nda", at, jax.nn.log_softmax(table))
        pad = functools.partial(jnp.pad, pad_width=((0, 0), (1, 0)))
        return pad(jnp.sum(log_p * chosen, -1)), pad(log_p.mean(-1)) * successor
      old, old_mean = read(table)
      rewards = rewarded[leaf]
      batch = template.replace(rewards=rewards, behaviour_logprobs=old)
      batch = batch.with_signals(advantages=advantage(batch, rewards), old_logprobs=old,
                                 old_mean_logprobs=old_mean)
      weights = loss_weights(batch, "token_mean")
      each = [rover * weights, (1 - rover) * weights]

      def loss(table):
        logprobs, mean = read(table)
        outputs = ModelOutputs(logprobs=logprobs, distribution={"mean_logprobs": mean})
        return term(outputs, batch, each, each)[0]
      table = jax.lax.fori_loop(0, inner, lambda _, t: t - rate * jax.grad(loss)(t), table)
      share = chance[right] / jnp.sum(chance[right])
      return table, (jnp.sum(chance[right]), jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share))))
    return jax.lax.scan(update, jnp.zeros((FIRST[DEPTH], WAYS)), jax.random.split(key, steps))[1]
  return jax.jit(jax.vmap(one, in_axes=(0, *[None] * 5)))


def modes(rover, *, rate, inner=4, rho=1.0, successor=1.0):
  """The effective number of rewarded leaves where the success rate has reached .3, .6 and .9."""
  found, count = map(np.asarray, trainer()(jax.random.split(jax.random.key(0), 16), rover, rate, inner,
                                           rho, successor))
  reached = found[:, :, None] >= np.array([0.3, 0.6, 0.9])
  assert (reached.any(1).sum(0) >= [16, 16, 8]).all()
  return np.array([np.mean([c[r[:, i].argmax()] for c, r in zip(count, reached) if r[:, i].any()])
                   for i in range(3)])


def test_at_equal_success_many_inner_steps_or_a_large_rho_leave_more_solutions():
  """The value of the successor is one part of it, the square that is fitted another."""
  grpo = modes(0.0, rate=4.0)
  many, without = modes(1.0, rate=2.0, inner=16), modes(1.0, rate=2.0, inner=16, successor=0.0)
  large = modes(1.0, rate=2 / 3, rho=3.0)
  assert (many > grpo + 0.15).all() and (large > grpo + 0.3).all()
  assert (many > without + 0.05).all() and (without > grpo + 0.05).all()
