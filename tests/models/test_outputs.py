"""What a state says about the next token is indexed by that token."""

import dataclasses
import functools

import jax
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest

from jaxrl.batch import Trajectory, pack
from jaxrl.models import DecoderConfig, init_parameters, model_outputs, unbox

CONFIG = DecoderConfig(vocab_size=23, layers=1, d_model=16, heads=2, kv_heads=2, d_ff=24,
                       logit_soft_cap=4.0, heads_on_top=(("score", 2), ("value", 1), ("cost", 1)))
EVERYTHING = ("entropy", "hidden", "values", "scores")


def batch_of(lengths):
  rng = np.random.default_rng(0)
  return pack([Trajectory(tokens=rng.integers(0, 23, size=n), loss_mask=np.zeros(n))
               for n in lengths], row_length=16)


@functools.cache
def parameters():
  params = jax.jit(functools.partial(init_parameters, CONFIG))(jax.random.key(0))
  return jax.tree.map(lambda x: x + 0.1, unbox(params))


BATCH = batch_of([5, 9, 1, 7, 2])
outputs_of = jax.jit(functools.partial(model_outputs, CONFIG),
                     static_argnames=("signals", "logprobs", "vocabulary_chunk"))


def test_every_output_is_about_its_own_token():
  outputs = outputs_of(parameters(), BATCH, signals=EVERYTHING, temperature=0.8, vocabulary_chunk=8)
  params = jax.tree.map(np.float64, parameters()["params"])
  hidden = np.float64(outputs.hidden)
  logits = 4.0 * np.tanh(hidden @ params["embedding"].T / 4.0) / 0.8
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  heads = {k: hidden @ params[f"{k}_head"]["kernel"] + params[f"{k}_head"]["bias"]
           for k in ("value", "score", "cost")}

  expected = {k: np.zeros(BATCH.tokens.shape) for k in ("logprobs", "entropy", "values")}
  for row, column in np.argwhere(BATCH.positions > 0):
    before = row, column - 1
    expected["logprobs"][row, column] = log_p[before][BATCH.tokens[row, column]]
    expected["entropy"][row, column] = -np.sum(np.exp(log_p[before]) * log_p[before])
    expected["values"][row, column] = heads["value"][before][0]
  for name, value in expected.items():
    np.testing.assert_allclose(getattr(outputs, name), value, atol=1e-5, err_msg=name)
  np.testing.assert_allclose(outputs.scores, np.concatenate([heads["score"], heads["cost"]], -1),
                             atol=1e-5)


def test_probabilities_of_all_continuations_sum_to_one():
  """Over the last token of a sequence: enumerates the vocabulary."""
  prompt = np.array([3, 1, 4])
  batch = pack([Trajectory(tokens=[*prompt, last], loss_mask=np.zeros(4)) for last in range(23)],
               row_length=16)
  logprobs = np.asarray(outputs_of(parameters(), batch).logprobs, np.float64)
  np.testing.assert_allclose(np.exp(logprobs[batch.positions == 3]).sum(), 1, rtol=1e-5)


def shapes(function, *args):
  """Shapes of all intermediate arrays, those of inner jaxprs included."""
  def visit(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.shape for v in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        yield from visit(inner)
  return list(visit(jax.make_jaxpr(function)(*args).jaxpr))


def test_only_what_is_asked_for_is_computed():
  def given(**kwargs):
    outputs = outputs_of(parameters(), BATCH, **kwargs)
    return [name for name, value in vars(outputs).items()
            if (value if isinstance(value, dict) else value is not None)]
  assert given() == ["logprobs"]
  assert given(signals=("scores",), logprobs=False) == ["scores"]

  def makes_logits(**kwargs):
    run = functools.partial(model_outputs, CONFIG, **kwargs)
    return any(shape[-1:] == (23,) for shape in shapes(run, parameters(), BATCH))
  assert makes_logits()
  assert not makes_logits(signals=("scores",), logprobs=False)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_logits_of_tokens_times_vocabulary(remat):
  config = dataclasses.replace(CONFIG, vocab_size=2000, heads_on_top=(), remat=remat,
                               scan_layers=True)
  params = unbox(jax.eval_shape(functools.partial(init_parameters, config), jax.random.key(0)))
  batch = batch_of([16] * 8)

  def loss(params):
    outputs = model_outputs(config, params, batch, signals=("entropy",), vocabulary_chunk=256)
    return outputs.logprobs.sum() + outputs.entropy.sum()

  largest = max(np.prod(shape) for shape in shapes(jax.value_and_grad(loss), params))
  assert largest < batch.tokens.size * 2000 / 4


def test_heads_read_the_hidden_state_in_float32():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  outputs = jax.jit(functools.partial(model_outputs, config, signals=("hidden", "values")))(
      parameters(), BATCH)
  head = jax.tree.map(np.float64, parameters()["params"]["value_head"])
  expected = np.float64(outputs.hidden) @ head["kernel"][:, 0] + head["bias"][0]
  rows, columns = np.nonzero(BATCH.positions > 0)
  np.testing.assert_allclose(outputs.values[rows, columns], expected[rows, columns - 1], atol=1e-5)


@pytest.mark.parametrize("signals, heads, message", [
    (("hidden@2",), (), r"'hidden@2', but config.model.layers=1: layers are 0, .* to 1, or -2 to -1"),
    (("hidden@-3",), (), "'hidden@-3', but config.model.layers=1"),
    (("hidden@last",), (), "'hidden@last' is written hidden@LAYER"),
    (("entropies",), (), "no signal 'entropies'; did you mean 'entropy'"),
    (("values",), (("score", 1),), r"add \('value', 1\) to config.model.heads_on_top"),
    (("scores",), (("value", 1),), r"add \('score', 1\) to config.model.heads_on_top")])
def test_signals_that_the_model_cannot_give_are_refused(signals, heads, message):
  config = dataclasses.replace(CONFIG, heads_on_top=heads)
  with pytest.raises(ValueError, match=message):
    model_outputs(config, parameters(), BATCH, signals=signals)
