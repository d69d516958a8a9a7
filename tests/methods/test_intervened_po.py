"""IPO: where a trace was lost, how it is mended, and that the shared part of a pair cancels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import objectives
from jaxrl.batch import ModelOutputs, Task, pack
from jaxrl.objectives.aggregate import loss_weights
from jaxrl.rollouts import Rollouts, repaired_trace
from jaxrl.rollouts.interventions import good_ratios, token_at
from jaxrl.sampling import SamplingParams
from jaxrl.tasks import cues
from tests.methods.conftest import Characters, TablePolicy, TableScorer

FAITH = 0.9
ROW = dict(good=0.25, faith=FAITH)


def chain(text):
  """The Markov chain of a trace: a, b or a cue, then a or b, then the end that the cue promised."""
  body = text.split("?", 1)[1]
  if body[-1:] in ("!", "."):
    return {"$": 1.0}
  cue = next((c for c in body if c in "+-"), "")
  if not cue:
    return {"a": 0.3, "b": 0.3, "+": 0.4 * ROW["good"], "-": 0.4 * (1 - ROW["good"])}
  end = {"!": 0.3 * FAITH, ".": 0.3 * (1 - FAITH)} if cue == "+" else {
      "!": 0.3 * (1 - FAITH), ".": 0.3 * FAITH}
  return {"a": 0.35, "b": 0.35, **end}


def well(text):
  return float(text.endswith("!"))


class Likelihood:
  def logprobs(self, params, sequences):
    found = []
    for tokens in sequences:
      text = "".join(map(chr, tokens))
      found.append(np.array([0, 0] + [np.log(max(chain(text[:i]).get(text[i], 0), 1e-9))
                                      for i in range(2, len(text))], np.float32))
    return found


def play(episode, tasks=200, max_tokens=40, next=chain):
  made = Rollouts(episode, TablePolicy(next), Characters(), TableScorer(well), max_failure_rate=0.0,
                  likelihood=Likelihood(),
                  sampling=SamplingParams(max_tokens=max_tokens, stop_ids=(ord("$"),)))
  problems = [Task(id=str(i), prompt=[48 + i % 10, ord("?")]) for i in range(tasks)]
  found = made.run({"params": "policy"}, problems, base_key=None)
  by_task = {}
  for t in found:
    by_task.setdefault(t.group, []).append(t)
  return list(by_task.values())


def mend(**options):
  arguments = dict(triggers=["+", "ab+"], detector="jaxrl.tasks.cues:bad_cue", max_tokens=40) | options
  return play(functools.partial(repaired_trace, **arguments))


def body(t):
  return "".join(map(chr, t.tokens[t.prompt_length:])).rstrip("$")


def by_enumeration(prefix):
  """P(good | prefix): the chain's recursion solved for its four states."""
  lost = dict.fromkeys(("none", "+", "-"), 0.0)
  for _ in range(300):  # value iteration over the states
    lost = {"none": 0.6 * lost["none"] + 0.4 * (ROW["good"] * lost["+"] + (1 - ROW["good"]) * lost["-"]),
            "+": 0.7 * lost["+"] + 0.3 * FAITH, "-": 0.7 * lost["-"] + 0.3 * (1 - FAITH)}
  return lost[next((c for c in prefix if c in "+-"), "none")]


@pytest.mark.parametrize("prefix", ["", "ab", "a+", "a-b", "-", "+a+"])
def test_the_chance_of_a_prefix_is_that_of_the_chain(prefix):
  assert cues.chance(ROW, prefix) == pytest.approx(by_enumeration(prefix), abs=1e-9)


def test_estimated_ratios_fall_at_the_planted_cue():
  seen = []

  async def episode(ctx, task):
    trace, = await ctx.sample(task.prompt)
    ratios = await good_ratios(ctx, task, trace, range(len(trace.tokens) - trace.prompt_length), samples=32)
    seen.append((trace.text, ratios))
    return [trace]
  play(episode, tasks=40)
  errors = []
  for text, ratios in seen:
    exact = [cues.chance(ROW, text[:n]) if text[:n] != text else well(text) for n in range(len(ratios))]
    errors += list(np.array(ratios) - exact)
    cue = next(i for i, c in enumerate(text) if c in "+-")
    drops = np.diff(ratios)
    if text[cue] == "+":
      assert np.argmax(drops[:-1]) == cue  # of 0.65, more than seven standard deviations
    elif len(drops) > 1:
      assert drops[cue] < 0 and exact[cue + 1] <= 0.1
  assert np.sqrt(np.mean(np.square(errors))) < 0.5 / np.sqrt(32)


def test_pairs_share_what_comes_before_the_cue_and_the_loss_begins_there():
  pairs = [p for p in mend() if len(p) == 2]
  assert len(pairs) > 60
  for mended, trace in pairs:
    first = trace.prompt_length + body(trace).index("-")
    assert trace.tokens[first] == ord("-")
    np.testing.assert_array_equal(mended.tokens[:first], trace.tokens[:first])
    rest = body(mended)[first - trace.prompt_length:]
    assert rest.startswith(("+", "ab+"))
    assert mended.text == body(mended) and mended.text.endswith("!") and not body(trace).endswith("!")
    for t, preference in ((mended, 1.0), (trace, 0.0)):
      np.testing.assert_array_equal(t.loss_mask, np.arange(len(t.tokens)) >= first)
      assert t.columns["preference"] == preference and t.scored and t.columns["repairs"] >= 1
      expected = Likelihood().logprobs(None, [t.tokens])[0]
      np.testing.assert_allclose(t.behaviour_logprobs[first:], expected[first:], atol=1e-6)


def test_interventions_mend_nearly_every_trace():
  found = mend(rounds=1)
  bad = [p for p in found if "-" in body(p[-1]) and not body(p[-1]).endswith("!")]
  share = np.mean([len(p) == 2 for p in bad])
  assert abs(share - FAITH) < 4 * np.sqrt(FAITH * (1 - FAITH) / len(bad))
  good = [p for p in found if body(p[-1]).endswith("!")]
  assert good and all(len(p) == 1 and not p[0].scored for p in good)


def test_a_second_cue_is_replaced_where_the_first_was_not_enough():
  def stubborn(text):  # falls back once after a single "+"
    body = text.split("?", 1)[1]
    if body[-1:] in ("!", "."):
      return {"$": 1.0}
    if not body:
      return {"-": 1.0}
    if body.endswith("-"):
      return {".": 1.0}
    return {"!": 1.0} if body.count("+") > 1 else {"-": 1.0}
  episode = functools.partial(repaired_trace, triggers=["+"], detector="jaxrl.tasks.cues:bad_cue",
                              max_tokens=9)
  (mended, trace), = play(episode, tasks=1, next=stubborn)
  assert body(trace) == "-." and body(mended) == "++!" and mended.columns["repairs"] == 2
  once = functools.partial(episode, rounds=1)
  (left,), = play(once, tasks=1, next=stubborn)
  assert not left.scored


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_shared_part_cancels_exactly(loss):
  """Check 3 of the card: logit and gradient of the whole traces are those of the suffixes."""
  rng = np.random.default_rng(0)
  losses = []
  pairs = [p for p in mend() if len(p) == 2][:12]
  whole = [p for p in mend(suffix=False) if len(p) == 2][:12]
  shape = None
  for made in (pairs, whole):
    batch = pack([t for p in made for t in p], row_length=128, together=True)
    if shape is None:
      shape = batch.tokens.shape
      noise = {}
      for t in (t for p in made for t in p):  # the same model: a prefix has the same log-probabilities
        for n in range(1, len(t.tokens) + 1):
          noise.setdefault(t.tokens[:n].tobytes(), rng.normal(size=2))
    assert batch.tokens.shape == shape
    policy, reference = np.zeros((2, *shape), np.float32)
    sequence = [t for p in made for t in p]
    for r, c in zip(*np.nonzero(batch.segment_ids)):
      t = sequence[batch.sequence_ids[r, c]]
      policy[r, c], reference[r, c] = noise[t.tokens[:batch.positions[r, c] + 1].tobytes()] - 2
    batch = batch.with_signals(reference_logprobs=reference)
    weights = loss_weights(batch, "sequence_mean")

    def total(logprobs, batch=batch, weights=weights):
      values, metrics = objectives.dpo(ModelOutputs(logprobs=logprobs), batch, loss=loss)
      return jnp.sum(weights * values), metrics["preference_margin"]
    (value, margins), gradient = jax.value_and_grad(total, has_aux=True)(policy)
    h = [np.asarray(margins)[batch.sequence_ids == i][-1] for i in range(len(sequence))]
    losses.append((value, h, np.asarray(gradient), batch, sequence))
  (a, h, own, _, _), (b, other_h, full, batch, sequence) = losses
  np.testing.assert_allclose(a, b, rtol=1e-5)
  np.testing.assert_allclose(h, other_h, rtol=1e-4, atol=1e-5)
  assert np.std(h) > 0.01
  # Log-probabilities of the shared part get opposite gradients in both traces of a pair.
  shared = batch.loss_mask & ~losses[0][3].loss_mask
  assert shared.any() and np.abs(full[shared]).max() > 0
  for i in range(0, len(sequence), 2):
    first, second = (np.sum(full[shared & (batch.sequence_ids == k)]) for k in (i, i + 1))
    np.testing.assert_allclose(first, -second, atol=1e-5)


def test_tokens_that_hold_characters():
  class Words:
    decode = staticmethod(lambda tokens: "".join({1: "ab", 2: "c", 3: "", 4: "def"}[t] for t in tokens))
  trace = type("Trace", (), dict(prompt_length=1, tokens=np.array([9, 1, 3, 2, 4])))
  assert [token_at(Words, trace, c) for c in range(6)] == [1, 1, 3, 4, 4, 4]


def test_the_task_draws_the_cues_that_it_says():
  rows = [cues.sample(np.random.default_rng(i), hard=0.5, good=0.5, faith=0.9) for i in range(2000)]
  for first, chance in (("h", 0.0), ("e", 0.5)):
    some = [r["solution"] for r in rows if r["question"][0] == first]
    assert abs(len(some) - 1000) < 100
    good = np.mean(["+" in s for s in some])
    assert abs(good - chance) < 0.07
    assert all((s.endswith("!") == cues.check({}, s)) and cues.bad_cue(s) == (
        s.index("-") if "-" in s else None) for s in some)
  faithful = np.mean([("+" in r["solution"]) == r["solution"].endswith("!") for r in rows])
  assert abs(faithful - 0.9) < 0.03
  assert not cues.check({}, "abc!") and not cues.check({}, "a-b?")
