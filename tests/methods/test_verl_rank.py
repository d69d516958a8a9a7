"""VERL: ranks against singular values in float64, and the bounds and memory of the bonus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.advantages.chain import credit, initial_carried
from jaxrl.advantages.hidden_rank import effective_rank, rank_growth
from jaxrl.batch import Trajectory, pack
from jaxrl.training import builders

WIDTH = 12


def svd_rank(states):
  """The paper's number, from singular values."""
  states = np.asarray(states, np.float64)
  if len(states) < 2:
    return 0.0
  s = np.linalg.svd(states - states.mean(0), compute_uv=False)
  q = s / (s.sum() + 1e-8)
  return float(np.exp(-np.sum(q * np.log(q + 1e-8))))


def svd_growth(states, stride):
  """(acceleration, velocity, rank) by the paper's sums, one prefix after the other."""
  m = [svd_rank(states[:j * stride + 1]) for j in range(1, len(states)) if j * stride < len(states)]
  v = [m[j] - np.mean(m[:j]) for j in range(1, len(m))]
  a = [v[j] - v[j - 1] for j in range(1, len(v))]
  return [np.mean(a) if a else 0.0, np.mean(v) if v else 0.0, svd_rank(states)]


def ragged(seed, count=9, longest=14):
  """Sequences of hidden states, several to a row, with gaps in masks; the states that count."""
  rng = np.random.default_rng(seed)
  trajectories = []
  for i in range(count):
    length = (2, 1)[i] if i < 2 else int(rng.integers(3, longest + 2))
    mask = (np.arange(length) > 0) & ((rng.random(length) < 0.85) | (i == 0))
    trajectories.append(Trajectory(rng.integers(0, 9, length), mask, group=i % 2,
                                   reward=rng.normal(), scored=i % 4 != 3))
  batch = pack(trajectories, row_length=16, min_rows=8, min_sequences=16)
  hidden = np.cumsum(rng.normal(size=(*batch.tokens.shape, WIDTH)), axis=1).astype(np.float32)
  states = [hidden[(batch.sequence_ids == i) & batch.loss_mask] for i in range(count)]
  return batch.with_signals(hidden=hidden), states


@functools.partial(jax.jit, static_argnames=("stride", "where", "max_tokens", "from_zero"))
def run(batch, values, carried, **kwargs):
  return advantages.favour_hidden_rank(batch, values, carried, **kwargs)


def remembered(means, batches=1):
  return {"means": jnp.float32(means), "batches": jnp.int32(batches)}


def bonus_of(x, mu, gain, scale=1.0):
  d = np.clip((np.array(x) - mu) / (np.abs(mu) + 1e-8), -5, 5)
  rho = 1 / (1 + np.exp(-gain * d[0]))
  weights = rho * np.array([0, 0, 1]) + (1 - rho) * np.array([0, 1, 0])
  return scale * np.sum(weights * np.tanh(d))


@pytest.mark.parametrize("seed,stride,max_tokens", [(0, 1, 64), (1, 2, 64), (2, 3, 7)])
def test_advantages_are_those_of_the_equations_on_ragged_batches(seed, stride, max_tokens):
  batch, states = ragged(seed)
  mu, kappa, gain = np.array([-0.2, 0.6, 2.0]), 1.5, 0.7
  found = run(batch, batch.rewards, remembered(mu), stride=stride, max_tokens=max_tokens,
              kappa=kappa, gain=gain, scale=0.8, update=0.25)
  ranks = [svd_growth(x[-max_tokens:], stride) for x in states]
  scored = np.nonzero(batch.sequence_mask)[0]
  for i in scored:
    a = float(batch.rewards[i])
    wanted = a + min(max(bonus_of(ranks[i], mu, gain, 0.8), 0), abs(a) / kappa)
    assert float(found.values[i]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
  mean = np.mean([ranks[i] for i in scored], axis=0)
  np.testing.assert_allclose(found.carried["means"], 0.75 * mu + 0.25 * mean, rtol=1e-3, atol=1e-4)
  logged = [found.metrics[k] for k in ("rank_acceleration", "rank_velocity", "rank")]
  np.testing.assert_allclose(logged, mean, rtol=1e-3, atol=1e-4)
  assert float(found.metrics["rank_bonus"]) > 0


@pytest.mark.parametrize("tokens,width", [(200, 32), (40, 64)])
def test_the_rank_is_that_of_singular_values_in_double_precision(tokens, width):
  rng = np.random.default_rng(3)
  for states in (rng.normal(size=(tokens, width)), rng.normal(size=(tokens, width)) + 20,
                 np.cumsum(rng.normal(size=(tokens, width)), axis=0),
                 np.outer(rng.normal(size=tokens), rng.normal(size=width)),
                 rng.normal(size=(tokens, 3)) @ rng.normal(size=(3, width))):
    for count in (1, 2, 7, tokens):
      padded = np.where(np.arange(tokens)[:, None] < count, states, 99.0)
      found = RANK(jnp.float32(padded), jnp.arange(tokens) < count)
      assert float(found) == pytest.approx(svd_rank(states[:count]), rel=5e-5)


RANK = jax.jit(effective_rank)


def test_known_ranks():
  """A Gaussian of 200 x 32, one line, and singular values 3 and 1 (squared, as RankMe has
  them,
  they would give 1.38)."""
  gaussian = np.random.default_rng(0).normal(size=(200, 32))
  whole = jnp.ones(200, bool)
  assert float(RANK(jnp.float32(gaussian), whole)) == pytest.approx(31.3, abs=0.15)
  line = np.outer(np.arange(200.0), np.ones(32))
  assert float(RANK(jnp.float32(line), whole)) == pytest.approx(1.0, abs=1e-3)
  cross = jnp.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  assert float(RANK(cross, jnp.ones(4, bool))) == pytest.approx(np.exp(entropy), rel=1e-5)


def test_the_rank_follows_the_length_of_an_answer_and_its_acceleration_does_not():
  """Random walks in 96 directions, more than they have steps: in 32 the rank stops at 17."""
  rng = np.random.default_rng(4)
  lengths = np.repeat([24, 40, 64], 8)
  grow = jax.jit(functools.partial(rank_growth, stride=4))
  found = []
  for length in lengths:
    walk = np.zeros((64, 96), np.float32)
    walk[:length] = np.cumsum(rng.normal(size=(length, 96)), axis=0)
    found.append(np.asarray(grow(walk, length)))
  acceleration, velocity, rank = np.transpose(found)
  assert np.corrcoef(rank, lengths)[0, 1] > 0.9 and np.corrcoef(velocity, lengths)[0, 1] > 0.9
  assert np.corrcoef(acceleration, lengths)[0, 1] < 0.5
  assert np.abs(acceleration).max() < 3 < np.ptp(rank)


@pytest.mark.parametrize("kappa", [1.0, 2.0, 10.0])
def test_no_advantage_changes_its_sign_or_by_more_than_its_share(kappa):
  batch, _ = ragged(5)
  values = np.where(np.arange(16) % 5 == 0, 0, batch.rewards).astype(np.float32)
  for mu in ([1e-6, 1e-6, 1e-6], [-3.0, 0.1, 1.0], [9.0, 9.0, 9.0]):
    found = np.asarray(run(batch, values, remembered(mu), stride=2, kappa=kappa, scale=7.0).values)
    assert np.all(found * values >= 0) and np.all(found >= values)
    assert np.all(found - values <= np.abs(values) / kappa + 1e-6)
  assert not np.any(found - values), "answers below all averages get nothing"


def test_the_first_batch_gets_no_bonus_and_the_averages_follow_earlier_batches():
  piece = functools.partial(advantages.favour_hidden_rank, stride=1, max_tokens=16)
  steps = jax.jit(credit([piece, advantages.center_by_batch]))
  carried, averages = initial_carried([piece]), None
  for seed in range(3):
    batch, states = ragged(seed)
    found = steps(batch, batch.rewards, carried)
    used, carried = averages, found.carried
    mean = np.mean([svd_growth(states[i], 1) for i in np.nonzero(batch.sequence_mask)[0]], axis=0)
    averages = mean if used is None else 0.7 * used + 0.3 * mean
    np.testing.assert_allclose(carried["favour_hidden_rank"]["means"], averages, rtol=1e-3,
                               atol=1e-4)
    assert (float(found.metrics["rank_bonus"]) > 0) == (seed > 0)
  nothing = batch.replace(sequence_mask=np.zeros(16, bool))
  after = steps(nothing, nothing.rewards, carried).carried["favour_hidden_rank"]
  np.testing.assert_array_equal(after["means"], carried["favour_hidden_rank"]["means"])


def test_it_reads_the_layer_that_it_names():
  batch, _ = ragged(4)
  piece = compose.build(dict(name="favour_hidden_rank", layer=-2, stride=1), advantages)
  assert compose.signals_of(piece) == ("hidden@-2",)
  hidden = batch.signals["hidden"]
  other = batch.with_signals(**{"hidden@-2": hidden}, hidden=np.zeros_like(hidden))
  mu = remembered([0.1, 0.1, 0.5])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5),
               jax.jit(piece)(other, other.rewards, mu), run(batch, batch.rewards, mu, stride=1))


@pytest.mark.parametrize("layer, message", [
    (9, r"config.advantage\[2\] \(favour_hidden_rank\): signal 'hidden@9', but config.model.layers=4"),
    ("top", r"config.advantage\[2\].layer='top', but favour_hidden_rank takes a number")])
def test_a_layer_that_the_model_lacks_is_refused_before_anything_is_computed(layer, message, tmp_path):
  config = configs.load("configs/methods/verl_rank.py")
  config.advantage[-1]["layer"] = layer
  with pytest.raises(ValueError, match=message):
    builders.build_parts(config, tmp_path, print)


def test_averages_from_zero_are_a_share_of_the_first_batch():
  batch, states = ragged(6)
  found = run(batch, batch.rewards, remembered(np.zeros(3), 0), stride=1, from_zero=True)
  mean = np.mean([svd_growth(states[i], 1) for i in np.nonzero(batch.sequence_mask)[0]], axis=0)
  np.testing.assert_allclose(found.carried["means"], 0.3 * mean, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(found.values, batch.rewards)


def test_the_bonus_reaches_all_tokens_or_the_last():
  batch, _ = ragged(7)
  mu = remembered([0.1, 0.1, 0.5])
  by_sequence = np.asarray(run(batch, batch.rewards, mu, stride=1).values)
  per_token = np.where(batch.sequence_ids >= 0, batch.rewards[batch.sequence_ids], 0)
  everywhere = np.asarray(run(batch, per_token, mu, stride=1).values)
  last = np.asarray(run(batch, batch.rewards, mu, stride=1, where="last").values)
  assert np.any(by_sequence != batch.rewards)
  for i in np.nonzero(batch.sequence_mask)[0]:
    mine = (batch.sequence_ids == i) & batch.loss_mask
    np.testing.assert_array_equal(everywhere[mine], by_sequence[i])
    if mine.any():
      np.testing.assert_array_equal(last[mine][:-1], batch.rewards[i])
      assert last[mine][-1] == by_sequence[i]


def test_states_off_the_mask_and_of_unscored_sequences_do_not_matter():
  batch, _ = ragged(8)
  spoiled = np.where(batch.loss_mask[..., None], batch.signals["hidden"], 1e4).astype(np.float32)
  mu = remembered([0.1, 0.1, 0.5])
  before = run(batch, batch.rewards, mu, stride=1)
  after = run(batch.with_signals(hidden=spoiled), batch.rewards, mu, stride=1)
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("wrong", [dict(where="first"), dict(stride=0), dict(kappa=0.0),
                                   dict(update=0.0), dict(max_tokens=1)])
def test_arguments_are_checked(wrong):
  batch, _ = ragged(0)
  with pytest.raises(ValueError, match="favour_hidden_rank: " + "=".join(
      (k + "=" + repr(v)) for k, v in wrong.items())):
    advantages.favour_hidden_rank(batch, batch.rewards, remembered(np.zeros(3)), **wrong)


def test_the_config_builds():
  config = configs.load("configs/methods/verl_rank.py")
  pieces = [compose.build(dict(p), advantages) for p in config.advantage]
  assert compose.signals_of(pieces[-1]) == ("hidden",)
  assert initial_carried(pieces)["favour_hidden_rank"]["means"].shape == (3,)
  assert pieces[-1].keywords["max_tokens"] == config.rollout.max_tokens


@pytest.mark.parametrize("shape", [(64, 64), (40, 128), (200, 32)])
@pytest.mark.parametrize("decay", [0.9, 0.6, 0.3])
def test_the_rank_of_a_spectrum_that_decays(shape, decay):
  """Whose small singular values a float32 Gram matrix would lose: an error of half a percent."""
  rng, k = np.random.default_rng(3), min(shape)
  left, right = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in shape)
  states = ((left * decay ** np.arange(k)) @ right.T).astype(np.float32)
  found = RANK(jnp.asarray(states), jnp.ones(shape[0], bool))
  assert float(found) == pytest.approx(svd_rank(states), rel=5e-5)
