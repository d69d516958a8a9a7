"""Octopus: what is recombined, chosen, rewarded and trained on."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose, objectives, rollouts
from jaxrl import config as configs
from jaxrl.batch import ModelOutputs, Task, Trajectory, pack
from jaxrl.rollouts import Rollouts
from jaxrl.rollouts.corrections import correction_reward, select
from jaxrl.sampling import SamplingParams
from tests.methods.conftest import Characters, TablePolicy, TableScorer


def two_letters(text):
  """An answer r or w, perhaps ";" and another; a third now and then."""
  body = text.split("?")[1]
  if not body or body[-1] == ";":
    return {"r": 0.4, "w": 0.6}
  return {"$": 1.0} if body.count(";") == 2 else {";": 0.7, "$": 0.3}


class Likelihood:
  """The table's own log-probabilities of given tokens."""

  def logprobs(self, params, sequences):
    found = []
    for tokens in sequences:
      text = "".join(map(chr, tokens))
      found.append(np.array([0, 0] + [math.log(two_letters(text[:i]).get(text[i], 1e-9))
                                      for i in range(2, len(text))], np.float32))
    return found


def play(samples=6, tasks=30, max_tokens=6, next=two_letters, **options):
  episode = functools.partial(rollouts.recombined_corrections, samples=samples, separator=";",
                              max_tokens=max_tokens, **options)
  made = Rollouts(episode, TablePolicy(next), Characters(), TableScorer(lambda t: t == "r"),
                  max_failure_rate=0.0, likelihood=Likelihood(),
                  sampling=SamplingParams(max_tokens=max_tokens, stop_ids=(ord("$"),)))
  problems = [Task(id=str(i), prompt=[65 + i, ord("?")]) for i in range(tasks)]
  found = made.run({"params": "policy"}, problems, base_key=None)
  by_task = collections.defaultdict(list)
  for t in found:
    by_task[t.task_id].append(t)
  return list(by_task.values())


def body(t):
  return "".join(map(chr, t.tokens[t.prompt_length:])).rstrip("$")


def trained(t):
  return "".join(map(chr, t.tokens[t.loss_mask])).rstrip("$")


REWARDS = {"r": 0.45, "w": -0.45, "w;r": 1.0, "r;r": 0.55, "w;w": 0.1, "r;w": -0.125}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_group_doubles_and_its_rewards_and_masks_are_those_of_the_paper(stage):
  for group in play(stage=stage):
    answers = [t for t in group if not (t.tag_ids == 3).any()]
    anchors = [t for t in group if (t.tag_ids == 3).any()]
    assert len(answers) == 12 and len({t.group for t in answers}) == 1
    masked = [t for t in answers if ";" in body(t) and stage == 1]
    assert [body(t) for t in anchors] == [body(t)[0] for t in masked]
    assert len({t.group for t in group}) == 1 + len(anchors)
    for t in answers:
      assert t.reward == pytest.approx(REWARDS[body(t)])
      whole = ";" not in body(t) or (stage == 2 and body(t)[0] == body(t)[2])
      assert trained(t) == (body(t) if whole else body(t)[2])
      assert t.evidence["corrected"].score == (body(t) == "w;r")
    assert sum(t.weight for t in answers) / len(group) == pytest.approx(1.0)
    assert np.mean([t.reward for t in group]) == pytest.approx(np.mean([t.reward for t in answers]))


def test_spliced_answers_come_from_both_halves_of_one_task_with_the_policys_log_probabilities():
  for group in play(stage=2):
    originals, spliced = group[:6], group[6:]
    firsts = {body(t)[0] for t in originals}
    seconds = {body(t)[2] for t in originals if ";" in body(t)}
    for t in spliced:
      text = "".join(map(chr, t.tokens))
      if seconds and ";" in body(t):
        assert body(t)[0] in firsts and body(t)[2] in seconds
      for i in range(t.prompt_length, len(text)):
        assert t.behaviour_logprobs[i] == pytest.approx(
            math.log(two_letters(text[:i]).get(text[i], 1e-9)), abs=1e-5)


def test_no_correction_to_recombine_repeats_samples():
  for group in play(next=lambda text: {"$": 1.0} if text[-1] in "rw" else {"r": 0.5, "w": 0.5}):
    assert len(group) == 12 and {body(t) for t in group[6:]} <= {body(t) for t in group[:6]}


@pytest.mark.parametrize("right,counts,expected", [
    (2, dict(wc=9, cc=9, cw=9, ww=9), dict(wc=3, cc=3, cw=1, ww=1)),  # half is 3
    (2, dict(wc=1, cc=9, cw=2, ww=1), dict(wc=1, cc=4, cw=2, ww=1)),  # the last cc fills up
    (8, dict(wc=9, cc=9, cw=9, ww=9), dict(cw=1, ww=7)),
    (7, dict(wc=2, cc=0, cw=3, ww=2), dict(wc=2, cw=3, ww=2)),
    (0, dict(wc=1, cc=1, cw=0, ww=0), dict(wc=1, cc=1))])
def test_the_quota(right, counts, expected):
  kinds = dict(wc=(0, 1), cc=(1, 1), cw=(1, 0), ww=(0, 0))
  pairs = [kinds[k] for k, n in counts.items() for _ in range(n)]
  chosen = select(pairs, 8, right, np.random.default_rng(0))
  assert len(set(chosen)) == len(chosen)
  assert collections.Counter(pairs[i] for i in chosen) == {kinds[k]: n for k, n in expected.items()}


def test_rewards_are_capped_for_copies_and_bad_forms():
  assert correction_reward(True, True, same=True) == pytest.approx(0.9 * 0.5 + 0.1)
  assert correction_reward(False, True, first_formed=False) == pytest.approx(0.0)
  assert correction_reward(False, True, second_formed=False) == pytest.approx(0.45)
  assert correction_reward(True, False) == pytest.approx(-0.225 + 0.1)


def test_only_anchors_are_held_near_the_reference():
  rng = np.random.default_rng(1)
  made = []
  for i, length in enumerate([5, 3, 7, 4]):
    tags = np.full(length, 3 if i % 2 else 2)
    made.append(Trajectory(np.arange(length), np.arange(length) > 0, tag_ids=tags, group=i,
                           scored=i != 3))
  batch = pack(made, row_length=8)
  reference, logprobs = rng.normal(size=(2, *batch.tokens.shape)).astype(np.float32)
  batch = batch.with_signals(reference_logprobs=reference)

  def total(x):
    return jnp.sum(objectives.anchor_first_answers(ModelOutputs(logprobs=x), batch, beta=0.3)[0])
  d = np.where((batch.tag_ids == 3) & batch.loss_mask, (logprobs - reference).astype(np.float64), 0)
  np.testing.assert_allclose(total(logprobs), 0.3 * np.sum(np.exp(-d) - 1 + d), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(total)(logprobs), 0.3 * (1 - np.exp(-d)), atol=1e-5)


def test_bad_arguments_are_refused():
  with pytest.raises(rollouts.EpisodeFailure, match="stage=3"):
    play(stage=3)


def test_the_config_builds_both_stages():
  config = configs.load("configs/methods/octopus.py")
  for name, stage in (("rl", 1), ("whole", 2)):
    phase = configs.phase_config(config, name)
    built = compose.build(configs.to_dict(phase.rollout.episode), rollouts)
    assert built.keywords["stage"] == stage
    terms = [compose.build(configs.to_dict(t), objectives) for t in phase.objective]
    assert len(terms) == 3 - stage
