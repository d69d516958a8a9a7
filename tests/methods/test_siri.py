"""SIRI: cycles of a length cap, what it does to rewards, and that the sampler compiles once."""

import functools
import math

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts, schedule
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import Task, pack
from jaxrl.models.decoder import Decoder, DecoderConfig
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Request, Sampler, SamplingParams

CONFIG = "configs/methods/siri.py"
MOST, LEAST, CYCLE = 16384, 8192, 640
CYCLES = schedule.CYCLES


def cap(kind, step):
  return float(schedule.Schedule(kind, start=MOST, end=LEAST, steps=CYCLE)(step))


def paper(kind, step):
  """The cap as the paper defines it by cases of the phase."""
  phase = 2 * math.pi * (step % CYCLE) / CYCLE
  middle, half = (MOST + LEAST) / 2, (MOST - LEAST) / 2
  if kind == "stair-cycle":
    return LEAST if phase < math.pi else MOST
  if kind == "cosine-cycle":
    return middle + half * math.cos(phase)
  if phase < math.pi / 4 or phase >= 7 * math.pi / 4:
    return MOST
  if phase < 3 * math.pi / 4:
    return middle + half * math.cos(2 * (phase - math.pi / 4))
  if phase < 5 * math.pi / 4:
    return LEAST
  return middle + half * math.cos(2 * (phase - 3 * math.pi / 4))


@pytest.mark.parametrize("kind", CYCLES)
def test_cycles_are_the_papers(kind):
  for step in [*range(0, CYCLE, 16), 79, 81, 239, 241, 319, 321, 399, 401, 559, 561, 639]:
    assert cap(kind, step) == pytest.approx(paper(kind, step), abs=0.02), step


@pytest.mark.parametrize("kind", CYCLES)
def test_cycles_repeat_and_rounding_stays_within(kind):
  for step in range(0, CYCLE, 29):
    assert cap(kind, step) == cap(kind, step + CYCLE) == cap(kind, step + 5 * CYCLE)
    assert LEAST <= round(cap(kind, step)) <= MOST
  if kind != "stair-cycle":
    assert cap(kind, 0) == MOST and cap(kind, CYCLE // 2) == LEAST
    assert cap(kind, 3 * CYCLE) == MOST


def test_the_stair_cosine_has_no_jumps():
  values = [cap("stair-cosine-cycle", step) for step in range(60, CYCLE)]
  steepest = (MOST - LEAST) / 2 * 2 * 2 * math.pi / CYCLE
  assert max(abs(a - b) for a, b in zip(values, values[1:])) <= steepest + 0.01
  for joint in (80, 240, 400, 560):
    assert abs(cap("stair-cosine-cycle", joint - 1) - cap("stair-cosine-cycle", joint)) < 1


def test_a_delay_holds_the_start_of_a_cosine():
  late = schedule.Schedule("cosine-cycle", start=8.0, end=4.0, steps=10, delay=7)
  assert [float(late(step)) for step in (0, 6, 7, 12, 17)] == [8, 8, 8, 4, 8]


def test_a_cycle_that_restarts_is_refused():
  with pytest.raises(ValueError, match="config.x.*repeats itself"):
    schedule.read(dict(schedule="cosine-cycle", start=1, end=2, steps=3, restarts=True), "config.x")


def filler(text):
  """Re-checks "c" of random number, then the answer "r"."""
  return {"$": 1.0} if text.endswith("r") else {"c": 0.6, "r": 0.4}


def capped(samples, max_tokens):
  return functools.partial(rollouts.capped_group, samples=samples, max_tokens=max_tokens)


def test_an_answer_at_the_cap_counts_and_one_behind_it_does_not(play):
  answered = lambda text: float(text.endswith("r"))
  for length in (1, 3, 5):
    exact = lambda text, n=length: {"$": 1.0} if text.endswith("r") else (
        {"r": 1.0} if len(text) == 2 + n - 1 else {"c": 1.0})
    for limit, reward in ((length + 1, 1.0), (length, 1.0), (length - 1, 0.0)):
      if limit:
        t, = play(capped(1, limit), exact, answered).trajectories
        assert t.reward == reward and len(t.tokens) == 2 + min(limit, length + 1)
        assert t.finish == ("stop" if limit > length else "length")
        assert t.evidence["length_cap"].score == limit


def test_among_answers_of_all_lengths_those_that_fit_are_preferred(play):
  pieces = [compose.build(dict(a), advantages) for a in configs.load(CONFIG).advantage]
  played = play(capped(64, 3), filler, lambda text: float(text.endswith("r")), tasks=4)
  batch = pack(played.trajectories)
  values = np.asarray(chain(pieces)(batch, batch.rewards))
  share = 1 - 0.6 ** 3
  assert np.mean([t.reward for t in played.trajectories]) == pytest.approx(share, abs=0.12)
  for i, t in enumerate(played.trajectories):
    own = np.unique(values[(batch.sequence_ids == i) & batch.loss_mask])
    assert len(own) == 1 and (own[0] > 0) == (t.reward == 1)
    assert t.reward == float("r" in t.text) and len(t.text) <= 3


class Letters:
  encode = staticmethod(lambda text: [ord(c) for c in text])
  decode = staticmethod(lambda tokens: "".join(map(chr, tokens)))


def test_a_scheduled_cap_is_that_of_the_update(play):
  probe = play(capped(1, 4), filler, lambda text: 1.0)  # for its policy and scorer
  spec = dict(name="capped_group", samples=2,
              max_tokens=dict(schedule="cosine-cycle", start=12, end=6, steps=10))
  runs = Rollouts(compose.build(spec, rollouts), probe.policy, Letters, probe.scorer,
                  sampling=SamplingParams(max_tokens=12, stop_ids=(ord("$"),)))
  found = []
  for step in range(21):
    runs.run({"params": None}, [Task(id="0", prompt=[48, 63])], base_key=None, key=(step,),
             step=step)
    found.append(probe.policy.asked[-1].params.max_tokens)
  assert found == [round(9 + 3 * math.cos(2 * math.pi * step / 10)) for step in range(21)]
  assert found[0] == found[10] == 12 and found[5] == 6


def test_a_cap_without_room_is_refused(play):
  with pytest.raises(RuntimeError, match="leaves no room"):
    play(capped(1, 0.4), filler, lambda text: 1.0)


def test_a_cycle_of_caps_compiles_nothing_new():
  config = DecoderConfig(vocab_size=12, layers=1, d_model=8, heads=2, kv_heads=2, d_ff=8)
  ids = jnp.zeros((1, 4), jnp.int32)
  params = meta.unbox(Decoder(config).init(jax.random.key(0), ids, ids, ids))["params"]
  sampler = Sampler(config, streams=1)
  compiled = []
  for limit in (12, 11, 9, 7, 6, 8, 10, 12, 16):
    request = Request(prompt=[1, 2], n=4, key=(limit,),
                      params=SamplingParams(max_tokens=limit, stop_ids=(99,)))
    (samples,) = sampler.sample(params, [request], jax.random.key(3))
    assert [len(s.tokens) for s in samples] == [limit] * 4
    compiled.append(sampler.statistics.compilations)
  assert compiled[0] > 0 and compiled[1:] == [0] * 8


def test_the_config_builds_with_the_papers_clip_range():
  config = configs.load(CONFIG)
  built = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  first, lowest, last = (float(compose.at(built, step).keywords["max_tokens"])
                         for step in (0, 30, config.rl.steps))
  assert first == last == config.rollout.max_tokens >= len("+8991=1998") + 1
  assert len("=1998") + 1 == lowest < len("+975=579")
  term = compose.build(dict(config.objective[0]), objectives)
  assert term.keywords == dict(low=0.2, high=0.28)
