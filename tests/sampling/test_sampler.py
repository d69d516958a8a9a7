"""Samples, against the model's own distribution and against themselves in other company."""

import functools

from flax.core import meta
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxrl import sharding
from jaxrl.models.decoder import Decoder, DecoderConfig
from jaxrl.sampling import (Request, Sampler, SamplingParams, batching, compaction, device_call,
                            precision, stopping)

VOCAB = 12
PLAIN = DecoderConfig(vocab_size=VOCAB, layers=1, d_model=8, heads=2, kv_heads=2, d_ff=8)
DIALECT = DecoderConfig(
    vocab_size=VOCAB, layers=2, d_model=8, heads=4, kv_heads=2, d_ff=8, scan_layers=True,
    layer_types=("sliding", "full"), sliding_window=5, logit_soft_cap=3.0, qk_norm=True,
    tie_embeddings=False)
KEY = jax.random.key(5)


@functools.cache
def boxed(config):
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(1), ids, ids, ids)["params"]


@functools.cache
def parameters(config):
  """Random, and far from a uniform distribution over the vocabulary."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.8).astype(np.float32),
                      meta.unbox(boxed(config)))


@functools.cache
def sampler(config=PLAIN, **kwargs):
  return Sampler(config, **kwargs)


@functools.partial(jax.jit, static_argnames="config")
def _logits(config, params, tokens):
  model, index = Decoder(config), jnp.arange(tokens.shape[1])[None]
  hidden, _ = model.apply({"params": params}, tokens, index, jnp.ones_like(tokens))
  table = model.apply({"params": params}, method="vocabulary")
  return hidden[0] @ table.T


def uncached_logits(config, tokens):
  """Logits that follow each token of one sequence, without a cache. [length, vocab]"""
  padded = np.zeros((1, 128), np.int32)
  padded[0, :len(tokens)] = tokens
  logits = np.asarray(_logits(config, parameters(config), padded), np.float64)[:len(tokens)]
  cap = config.logit_soft_cap
  return cap * np.tanh(logits / cap) if cap else logits


def ask(prompt, n=1, key=(0,), **params):
  return Request(prompt, n, key, SamplingParams(**params))


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert (a.finish, a.text_end) == (b.finish, b.text_end)


# Compiling is what takes time here: most tests use the device shape of this mixture, 6 prompts x 6
# samples, prompts of at most 16 tokens, caches of 32.
MIXED = [
    ask([3, 1, 4], n=2, key=(7, 0, 0), max_tokens=6),
    ask([2] * 14, n=5, key=(7, 1, 0), max_tokens=30, temperature=0.7, stop_ids=(4, 0)),
    ask([9], n=3, key=(7, 1, 1), max_tokens=1),
    ask([5, 0, 5], n=1, key=(7, 2), max_tokens=20, temperature=0.0),
    ask([3, 1, 4], n=2, key=(7, 3, 0), max_tokens=6, top_k=3, stop_ids=(1,))]


def ask_six(count=6, **params):
  """`count` prompts with 6 samples each."""
  params = dict(max_tokens=30) | params
  return [ask([1, i], n=6, key=(i, 0), **params) for i in range(count)]


def flat(results):
  return [sample for samples in results for sample in samples]


@pytest.mark.parametrize("config", [PLAIN, DIALECT], ids=["plain", "dialect"])
def test_greedy_equals_the_uncached_argmax_and_logprobs_those_of_a_full_pass(config):
  for request, samples in zip(MIXED, sampler(config).sample(parameters(config), MIXED, KEY)):
    assert len(samples) == request.n
    for sample in samples:
      logits = uncached_logits(config, [*request.prompt, *sample.tokens])
      logits = logits[len(request.prompt) - 1:-1]
      temperature = request.params.temperature
      logprobs = special.log_softmax(logits / (temperature or 1.0), axis=-1)
      expected = np.take_along_axis(logprobs, sample.tokens[:, None], axis=-1)[:, 0]
      np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
      if temperature == 0:
        np.testing.assert_array_equal(sample.tokens, logits.argmax(axis=-1))


def test_a_sample_depends_neither_on_its_company_nor_on_the_order():
  together = sampler().sample(parameters(PLAIN), MIXED, KEY)
  backwards = sampler().sample(parameters(PLAIN), MIXED[::-1], KEY)
  alone = sampler().sample(parameters(PLAIN), [MIXED[1]], KEY)
  assert_same(flat(together), flat(backwards[::-1]))
  assert_same(alone[0], together[1])


def test_fewer_rows_at_a_time_and_more_streams_return_the_same_samples():
  requests = [ask([1, i], n=12, key=(i,), max_tokens=20) for i in range(6)]
  whole = sampler(streams=1).sample(parameters(PLAIN), requests, KEY)
  split, streamed = sampler(max_rows=6, streams=1), sampler(streams=2)
  for other, calls in ((split, 12), (streamed, 2)):
    assert_same(flat(whole), flat(other.sample(parameters(PLAIN), requests, KEY)))
    assert other.statistics.calls == calls


def test_whoever_reads_along_sees_samples_grow_into_what_they_are_without():
  requests = [ask([1, 2], n=3, key=(1,), max_tokens=60), ask([3], key=(2,), max_tokens=40)]
  seen = {}
  read = Sampler(PLAIN, chunk=4, streams=1).sample(
      parameters(PLAIN), requests, KEY, on_tokens=lambda request, sample, tokens: seen.setdefault(
          (request, sample), []).append(tokens.tolist()))
  plain = sampler(streams=1).sample(parameters(PLAIN), requests, KEY)
  assert_same(flat(read), flat(plain))
  assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 0)]
  for (request, sample), grown in seen.items():
    whole = plain[request][sample].tokens.tolist()
    assert all(whole[:len(tokens)] == tokens for tokens in grown) and grown[-1] == whole
    assert len(grown) >= len(whole) // 4  # a look every four tokens


def test_a_prefix_of_the_samples_is_what_fewer_samples_would_be():
  few, many = (sampler().sample(parameters(PLAIN), [ask([1, 2], n=n, key=(3,), max_tokens=20)],
                                KEY)[0] for n in (5, 6))
  assert_same(few, many[:5])


def test_keys_rows_and_token_indices_all_change_the_draw():
  keys = [(0, 1), (1, 0), (0, 1, 0), (0,), (2 ** 32 - 1,)]
  requests = [ask([1], n=6, key=key, max_tokens=30, temperature=50.0) for key in keys]
  drawn = [tuple(s.tokens) for s in flat(sampler().sample(parameters(PLAIN), requests, KEY))]
  assert len(set(drawn)) == 30 and all(len(set(tokens)) > 4 for tokens in drawn)


def test_pairs_of_tokens_have_the_joint_distribution_of_the_model():
  config = DecoderConfig(vocab_size=4, layers=1, d_model=8, heads=2, kv_heads=1, d_ff=8)
  n = 4096
  samples = sampler(config, max_rows=n).sample(
      parameters(config), [ask([2, 1], n=n, max_tokens=2, temperature=3.0)], KEY)[0]
  counts = np.zeros((4, 4))
  np.add.at(counts, tuple(np.array([sample.tokens for sample in samples]).T), 1)
  first = special.softmax(uncached_logits(config, [2, 1])[-1] / 3)
  second = np.array([special.softmax(uncached_logits(config, [2, 1, t])[-1] / 3) for t in range(4)])
  expected = n * first[:, None] * second
  assert expected.min() > 4
  assert stats.chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3


def test_the_stop_token_ends_a_sample_and_is_part_of_it_also_when_it_is_the_padding_id():
  limits = [30, 3, 2, 6, 4, 5]
  requests = [ask([1, i], n=6, key=(i, 0), max_tokens=limit, stop_ids=(0, 7))
              for i, limit in enumerate(limits)]
  ended = flat(sampler().sample(parameters(PLAIN), requests, KEY))
  free = flat(sampler().sample(parameters(PLAIN), ask_six(), KEY))
  assert {sample.finish for sample in ended} == {"stop", "length"}
  assert any(sample.tokens[-1] == 0 for sample in ended)
  for short, long, limit in zip(ended, free, np.repeat(limits, 6)):
    hits = np.flatnonzero(np.isin(long.tokens[:limit], (0, 7)))
    length = hits[0] + 1 if len(hits) else limit
    np.testing.assert_array_equal(short.tokens, long.tokens[:length])
    assert len(short.logprobs) == length and short.finish == ("stop" if len(hits) else "length")


def test_a_sampled_padding_id_is_an_ordinary_token():
  samples = flat(sampler().sample(parameters(PLAIN), ask_six(), KEY))
  assert any(0 in sample.tokens[:-1] for sample in samples)
  assert {(len(sample.tokens), sample.finish) for sample in samples} == {(30, "length")}


def test_decoding_stops_when_the_last_sample_ends(monkeypatch):
  monkeypatch.setattr(compaction, "MOVE", np.inf)
  requests = ask_six(stop_ids=tuple(range(9)), temperature=3.0)
  samples = flat(sampler().sample(parameters(PLAIN), requests, KEY))
  longest = max(len(sample.tokens) for sample in samples)
  assert 1 < longest < 30
  statistics = sampler().statistics
  assert statistics.slots == 36 * longest
  assert statistics.tokens == sum(len(sample.tokens) for sample in samples)
  assert statistics.waste == pytest.approx(1 - statistics.tokens / statistics.slots)


def test_a_cache_that_grows_gives_the_samples_of_one_that_need_not(monkeypatch):
  request = ask([1, 2, 3], n=6, max_tokens=40)
  grown = sampler(DIALECT).sample(parameters(DIALECT), [request], KEY)[0]
  monkeypatch.setattr(device_call, "CHUNK", 64)
  assert_same(grown, sampler(DIALECT).sample(parameters(DIALECT), [request], KEY)[0])


def long_tailed(rng, n, most):
  """Lengths whose maximum may be 16 times their median. [n]"""
  return np.clip(np.round(most / 16 * rng.lognormal(sigma=1.2, size=n)), 1, most).astype(int)


def test_few_rows_are_wasted_on_long_tailed_lengths_and_programs_are_few():
  tailed, rng, wasted, compiled = Sampler(PLAIN, streams=1), np.random.default_rng(0), [], []
  draws = [long_tailed(rng, 64, 128) for _ in range(3)]
  for lengths in draws * 2:
    requests = [ask([1, i % 10], key=(i,), max_tokens=int(length))
                for i, length in enumerate(lengths)]
    samples = flat(tailed.sample(parameters(PLAIN), requests, KEY))
    assert [len(sample.tokens) for sample in samples] == [r.params.max_tokens for r in requests]
    wasted.append(tailed.statistics.waste)
    compiled.append(tailed.statistics.compilations)
  assert np.mean(wasted) < 0.15 and sum(compiled) < 50
  assert not any(compiled[3:])  # lengths seen before


@pytest.mark.parametrize("config", [PLAIN, DIALECT], ids=["plain", "dialect"])
def test_rows_that_are_moved_together_give_the_samples_of_each_alone(config, monkeypatch):
  """24 and then 6 of 36 rows are left; the last have a copy of their prompt each."""
  monkeypatch.setattr(compaction, "SMALL", 0)
  requests = [ask([1] * (i + 1), n=6, key=(i,), max_tokens=limit, stop_ids=(3,) * (i == 1))
              for i, limit in enumerate((60, 40, 40, 5, 5, 5))]
  moved = Sampler(config, streams=1)
  together = flat(moved.sample(parameters(config), requests, KEY))
  assert moved.statistics.slots < 36 * 10 + 24 * 40 + 8 * 20
  monkeypatch.setattr(compaction, "MOVE", np.inf)
  still = Sampler(config, streams=1)
  assert_same(together, flat(still.sample(parameters(config), requests, KEY)))
  assert still.statistics.slots == 36 * 60


def test_stop_strings_are_found_in_rows_that_have_moved(monkeypatch):
  monkeypatch.setattr(compaction, "SMALL", 0)
  monkeypatch.setattr(device_call, "CHUNK", 16)
  requests = [ask([1, i], n=6, key=(i,), max_tokens=limit, stop_strings=("ba", "dg"))
              for i, limit in enumerate((60, 60, 60, 5, 5, 5))]
  moved = Sampler(PLAIN, streams=1, decode=spell)
  together = flat(moved.sample(parameters(PLAIN), requests, KEY))
  assert any(sample.finish == "stop" and len(sample.tokens) > 20 for sample in together)
  monkeypatch.setattr(compaction, "MOVE", np.inf)
  still = Sampler(PLAIN, streams=1, decode=spell)
  assert_same(together, flat(still.sample(parameters(PLAIN), requests, KEY)))
  assert moved.statistics.slots < still.statistics.slots


@pytest.mark.parametrize("config", [PLAIN, DIALECT], ids=["plain", "dialect"])
@pytest.mark.parametrize("dtypes, bound", [
    (("float32", "float32"), 1e-5), (("bfloat16", ""), 0.1), (("int8", ""), 0.1),
    (("", "bfloat16"), 0.1), (("", "int8"), 0.1)])
def test_reduced_precision_changes_the_log_probabilities_of_samples_a_little(
    config, dtypes, bound):
  reduced = Sampler(config, weights_dtype=dtypes[0], cache_dtype=dtypes[1])
  gaps = []
  for request, samples in zip(MIXED, reduced.sample(parameters(config), MIXED, KEY)):
    for sample in samples:
      logits = uncached_logits(config, [*request.prompt, *sample.tokens])
      logits = logits[len(request.prompt) - 1:-1]
      logprobs = special.log_softmax(logits / (request.params.temperature or 1.0), axis=-1)
      expected = np.take_along_axis(logprobs, sample.tokens[:, None], axis=-1)[:, 0]
      gaps.append(np.abs(sample.logprobs - expected))
  gap = np.concatenate(gaps).mean()
  assert gap < bound and (bound < 1e-3 or gap > 1e-4)


@given(st.integers(0, 1000), st.sampled_from([(0,), (1,), (0, 1)]))
def test_quantised_numbers_are_off_by_half_a_step_at_most(seed, axes):
  x = np.random.default_rng(seed).standard_t(2, size=(5, 4, 3)).astype(np.float32)
  integers, scale = precision.quantise(x, axes)
  scale = np.expand_dims(np.asarray(scale), axes)
  np.testing.assert_allclose(scale, np.abs(x).max(axis=axes, keepdims=True) / 127, rtol=1e-6)
  assert (np.abs(np.asarray(integers, np.float32) * scale - x) <= 0.501 * scale).all()


def test_sizes_of_moved_rows_are_a_ladder():
  rungs = [128]
  while rungs[-1]:
    rungs.append(compaction.rung_below(rungs[-1]))
  assert rungs == [128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1, 0]
  assert [compaction.rung_below(rows) for rows in (36, 7, 9, 100)] == [32, 6, 8, 96]


def test_other_settings_lengths_and_counts_in_the_same_buckets_compile_nothing(monkeypatch):
  monkeypatch.setattr(compaction, "MOVE", np.inf)  # rows of ended samples move to other sizes

  def run(requests):
    sampler().sample(parameters(PLAIN), requests, KEY)
    return sampler().statistics.compilations
  run(ask_six())
  assert run(ask_six(5, max_tokens=31, temperature=0.3, top_k=2)) == 0
  assert run(ask_six(max_tokens=20, top_p=0.5, min_p=0.1, stop_ids=(3, 4))) == 0
  assert run(ask_six(max_tokens=17, temperature=0.0)) == 0
  assert run([ask([2] * i, n=5, max_tokens=25) for i in range(1, 7)]) == 0


@pytest.mark.parametrize("config, shape", [(PLAIN, (8, 1, 1)), (DIALECT, (2, 2, 2))])
def test_samples_do_not_depend_on_the_mesh(config, shape):
  mesh = sharding.make_mesh(*shape)
  shardings = sharding.shardings_of(boxed(config), mesh)
  sharded = jax.device_put(parameters(config), shardings)
  alone = sampler(config).sample(parameters(config), MIXED, KEY)
  spread = Sampler(config, mesh=mesh).sample(sharded, MIXED, KEY)
  for left, right in zip(alone, spread):
    assert_same(left, right)


def spell(tokens):
  return "".join("abcdefghijkl"[t] * (1 + t % 2) for t in tokens)  # some tokens are two characters


def test_stop_strings_cut_at_the_first_token_that_completes_one(monkeypatch):
  strings, params = ("ba", "dg", "k"), dict(stop_ids=(8,), temperature=3.0)
  free = flat(sampler().sample(parameters(PLAIN), ask_six(**params), KEY))
  monkeypatch.setattr(device_call, "CHUNK", 16)  # chunks must not matter
  cut = flat(Sampler(PLAIN, decode=spell).sample(
      parameters(PLAIN), ask_six(stop_strings=strings, **params), KEY))
  found = 0
  for long, short in zip(free, cut):
    length = next((i for i in range(1, len(long.tokens) + 1)
                   if any(s in spell(long.tokens[:i]) for s in strings)), None)
    if length is None:
      assert_same([long], [short])
      continue
    found += 1
    np.testing.assert_array_equal(short.tokens, long.tokens[:length])
    text = spell(short.tokens)
    assert short.finish == "stop" and text[short.text_end:].startswith(strings)
    assert not any(s in text[:short.text_end] for s in strings)
  assert 10 < found < 36


def test_stop_strings_end_the_decoding_of_rows_that_contain_them():
  """Every sample would otherwise run to its 30 tokens."""
  stops = Sampler(PLAIN, decode=spell)
  samples = flat(stops.sample(parameters(PLAIN), ask_six(stop_strings=tuple("abcdefghijkl")), KEY))
  assert {len(sample.tokens) for sample in samples} == {1} and stops.statistics.slots == 36


def test_lengths_end_at_a_stop_token_or_at_the_limit():
  tokens = np.array([[1, 2, 3, 3], [4, 1, 3, 0], [1, 1, 3, 3]])  # [time, rows]
  stop_ids, max_tokens = np.array([[4, -1], [4, -1], [0, -1], [0, -1]]), np.array([3, 3, 2, 2])
  np.testing.assert_array_equal(stopping.lengths(tokens, stop_ids, max_tokens), [2, 3, 2, 2])
  np.testing.assert_array_equal(stopping.lengths(tokens[:1], stop_ids, max_tokens), np.ones(4))


@given(counts=st.lists(st.integers(1, 70), min_size=1, max_size=30), max_rows=st.integers(1, 64),
       streams=st.integers(1, 4), shards=st.integers(1, 16))
def test_every_sample_is_in_one_slot_of_a_call_that_is_not_too_large(counts, max_rows, streams,
                                                                     shards):
  requests = [ask([0] * (1 + n % 3), n=n, max_tokens=1) for n in counts]
  seen = []
  for slots, width in batching.layout(requests, max_rows, streams, shards):
    assert len(slots) * width <= max_rows
    for slot in slots:
      assert 1 <= slot.count <= width
      seen += [(slot.request, slot.first + i) for i in range(slot.count)]
  assert sorted(seen) == [(i, j) for i, n in enumerate(counts) for j in range(n)]


def test_more_devices_than_requests_share_the_samples_of_each():
  requests = [ask([1], n=16, max_tokens=1), ask([2], n=16, max_tokens=1)]
  (slots, width), = batching.layout(requests, 1024, shards=8)
  assert (len(slots), width) == (8, 4)  # one slot for each device, no padding
  (slots, width), = batching.layout(requests, 1024, shards=2)
  assert (len(slots), width) == (2, 16)


@given(st.integers(1, 10_000))
def test_buckets_hold_their_size_and_waste_at_most_a_third(size):
  assert size <= batching.fine_bucket(size) <= 1.5 * size


@pytest.mark.parametrize("make, message", [
    (lambda: ask([], max_tokens=1), "start it with a BOS token"),
    (lambda: ask([1], n=0, max_tokens=1), "n=0"),
    (lambda: ask([1], key=(-1,), max_tokens=1), "2\\*\\*32"),
    (lambda: SamplingParams(max_tokens=0), "max_tokens=0"),
    (lambda: SamplingParams(max_tokens=1, temperature=-1.0), "temperature=-1"),
    (lambda: SamplingParams(max_tokens=1, top_p=0.0), "top_p=0"),
    (lambda: SamplingParams(max_tokens=1, top_p=1e-300), "top_p=1e-300: use a share"),  # 0 in float32
    (lambda: SamplingParams(max_tokens=1, temperature=1e300), "temperature=1e.300: use 0"),  # infinite there
    (lambda: SamplingParams(max_tokens=2 ** 31), "max_tokens=2147483648: .* at most 2147483647"),
    (lambda: SamplingParams(max_tokens=1, top_k=2 ** 31), "top_k=2147483648"),
    (lambda: SamplingParams(max_tokens=1, stop_ids=(2 ** 31,)), "stop_ids=.2147483648"),
    (lambda: SamplingParams(max_tokens=1, stop_strings="end"), "tuple"),
    (lambda: sampler().sample({}, [ask([VOCAB], max_tokens=1)], KEY), "vocabulary of 12"),
    (lambda: sampler().sample({}, [ask([1], max_tokens=1, stop_strings=("x",))], KEY), "decode="),
    (lambda: sampler().sample({}, [ask([1], max_tokens=1)], jax.random.PRNGKey(0)), "typed"),
    (lambda: Sampler(PLAIN, max_rows=0), "max_rows=0"),
    (lambda: Sampler(PLAIN, chunk=3), "chunk=3: use a power of two"),
    (lambda: Sampler(PLAIN, weights_dtype="int4"), "rollout.weights_dtype='int4'"),
    (lambda: Sampler(PLAIN, cache_dtype="half"), "rollout.cache_dtype='half'"),
])
def test_what_cannot_be_served_is_refused_with_a_remedy(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_parameters_that_are_not_finite_are_reported():
  broken = jax.tree.map(lambda x: x * jnp.nan, parameters(PLAIN))
  with pytest.raises(FloatingPointError, match="parameters probably hold NaN"):
    sampler().sample(broken, ask_six(), KEY)
