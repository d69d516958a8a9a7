"""CE-PO: Jacobians that are known, means in closed form, and who is asked about which text."""

import functools

import numpy as np
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import rollouts
from jaxrl.batch import Task
from jaxrl.rewards import Criterion, Scored
from jaxrl.rollouts import influence
from jaxrl.rollouts import Rollouts
from jaxrl.sampling import Sample, SamplingParams

rng = np.random.default_rng(0)


@pytest.mark.parametrize("power", [-np.inf, -3.0, -0.5, 0.0, 0.2, 1.0, 7.0, np.inf])
def test_a_power_mean_lies_between_and_grows_with_power_and_values(power):
  values, weights = rng.uniform(0.01, 1, 4), rng.uniform(0.1, 2, 4)
  mean = influence.power_mean(values, weights, power)
  assert values.min() - 1e-12 <= mean <= values.max() + 1e-12
  assert mean <= influence.power_mean(values, weights, power + 0.5) + 1e-12
  raised = values.copy()
  raised[2] = min(1.0, values[2] + 0.3)
  assert mean <= influence.power_mean(raised, weights, power) + 1e-12
  assert mean == pytest.approx(influence.power_mean(values, 5 * weights, power))


def test_power_means_in_closed_form():
  values, weights = np.array([1.0, 0.005, 0.5, 0.25]), np.array([0.7, 0.1, 0.1, 0.1])
  assert influence.power_mean(values, weights, 0) == pytest.approx(np.prod(values ** weights))
  assert influence.power_mean(values, weights, 1e-7) == pytest.approx(np.prod(values ** weights),
                                                                      rel=1e-5)
  assert influence.power_mean(values, weights, 0.2) == pytest.approx((weights @ values ** 0.2) ** 5)
  assert influence.power_mean(values, weights, 1) == pytest.approx(weights @ values)
  wrong = np.array([0.0, 0.5, 0.5, 0.5])
  assert influence.power_mean(wrong, weights, 0.2) == pytest.approx((0.3 * 0.5 ** 0.2) ** 5)
  assert influence.power_mean(wrong, weights, 0) == influence.power_mean(wrong, weights, -2) == 0
  assert influence.power_mean([0.0] * 4, weights, 0.2) == 0
  assert influence.power_mean([0.0, 0.3], [0.0, 1.0], -1) == pytest.approx(0.3), "no weight, no say"


def test_a_residual_is_orthogonal_and_a_score_in_its_range():
  for _ in range(50):
    rows, width = rng.integers(1, 7, 2)
    j, mean = rng.normal(size=(2, rows, width))
    left = influence.residual(j, mean)
    assert np.vdot(left, mean) == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(left + np.vdot(j, mean) / np.vdot(mean, mean) * mean, j)
    score = influence.channel_score(j, left)
    values = np.linalg.svd(left, compute_uv=False) ** 2
    expected = 0.005 + 0.995 * np.sqrt(values[0] / values.sum() * np.sum(left ** 2) / np.sum(j ** 2)
                                       ) if values.sum() > 1e-20 else 0.005
    assert score == pytest.approx(expected) and 0.005 <= score <= 1
  assert influence.channel_score(j, influence.residual(j, 3 * j)) == pytest.approx(0.005, abs=1e-7)
  assert influence.channel_score(0 * j, 0 * j) == 0.005
  np.testing.assert_array_equal(influence.residual(j, 0 * j), j)
  one = np.outer(rng.normal(size=4), rng.normal(size=3))
  assert influence.channel_score(one, one) == pytest.approx(1), "one direction, and all of it left"


def test_what_goes_through_the_rationale_is_no_direct_effect():
  """A linear probe: log p(Y) follows X alone, or Z as well."""
  zx, xy = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
  u = np.mean(xy / np.linalg.norm(xy, axis=1, keepdims=True), axis=0)
  mediated = influence.direct_effect(zx, 2.5 * zx * u, xy)
  np.testing.assert_allclose(mediated, 0, atol=1e-12)
  own = rng.normal(size=(5, 3))
  own = influence.residual(own, zx * u)
  np.testing.assert_allclose(influence.direct_effect(zx, 2.5 * zx * u + own, xy), own, atol=1e-12)
  zeros = influence.direct_effect(zx, own, 0 * xy)
  np.testing.assert_array_equal(zeros, own, "nothing goes through a rationale without a say")


class World:
  """Scripted samples; gradients are those of a model that is linear in one-hot embeddings.

  d log p(token i) / d E[j] = strength[part of i, part of j] * (position code of i and j).
  """

  labels, has_workers = ["right"], False

  def __init__(self, answers, strength, reward=None):
    self.answers, self.strength, self.asked = answers, strength, []
    self.reward = reward or (lambda text: float(text.endswith("7")))

  def sample(self, params, requests, base_key, *, on_done=None):
    return [[Sample(np.array(self.encode(a), np.int32), np.full(len(a), -1.0, np.float32), "stop")
             for a in self.answers] for _ in requests]

  def score(self, pairs, *, among=0):
    return [Scored(self.reward(t.text), "?" not in t.text, {"right": Criterion(1.0)})
            for _, t in pairs]

  def embedding_gradients(self, params, texts, masks):
    return [self._one(text, np.asarray(mask)) for text, mask in zip(texts, masks)]

  def _one(self, tokens, mask):
    self.asked.append((self.decode(tokens), "".join(".x"[int(m)] for m in mask)))
    part = ["XYZ".index(self._part(c)) for c in self.decode(tokens)]
    found = np.zeros((len(tokens), 8))
    for i in np.flatnonzero(mask):
      for j in range(i):
        # Where a token stands decides the direction, so that shuffling what matters changes it.
        code = np.sin(np.arange(1, 9) * (1 + tokens[j] * (j + 1)))
        found[j] += self.strength.get("XYZ"[part[i]] + "XYZ"[part[j]], 0) * code
    return found

  def _part(self, c):
    return "Z" if c.islower() else "Y" if c.isdigit() else "X"

  def encode(self, text):
    return list(map(ord, text))

  def decode(self, tokens):
    return "".join(map(chr, tokens))


def play(answers, strength, *, step=0, reward=None, **options):
  world = World(answers, strength, reward)
  episode = functools.partial(rollouts.influence_rewarded, samples=len(answers),
                              **dict(answer=r"(\d+)$", unit="token") | options)
  made = Rollouts(episode, world, world, world, sampling=SamplingParams(max_tokens=20),
                  likelihood=world, max_failure_rate=0.0)
  found = made.run({"params": None}, [Task("t", world.encode("abcd"), question="abcd")],
                   base_key=None, step=step, reference={"params": None})
  return found, world


def channels(t):
  return [t.evidence[f"influence_{name}"].score for name in ("zx", "xy", "zy")]


def test_texts_and_masks():
  found, world = play(["+-*7"], {"XZ": 1, "YX": 1}, draws=2, separator="|")
  plain = [text for text in world.asked if text[0] == "abcd|+-*|7"]
  assert {mask for _, mask in plain} == {".....xxx..", ".........x"}
  others = {text for text, _ in world.asked} - {"abcd|+-*|7"}
  assert 1 <= len(others) <= 4 and all(len(text) == 10 for text in others)
  for text in others:
    z, x, y = text.split("|")
    assert y == "7" and sorted(z) == sorted("abcd") and sorted(x) == sorted("+-*")
    assert (z == "abcd") != (x == "+-*"), "one cause is shuffled at a time"
  assert len(found) == 1 and found[0].loss_mask.sum() == 4


def test_a_mediated_answer_scores_by_its_rationale_and_a_direct_one_by_its_prompt():
  mediated = channels(play(["+-*/7"], {"XZ": 1, "YX": 1})[0][0])
  direct = channels(play(["+-*/7"], {"XZ": 1, "YZ": 1})[0][0])
  assert direct[2] > mediated[2] == 0.005 and mediated[1] > direct[1] == 0.005
  nothing = channels(play(["+-*/7"], {})[0][0])
  assert nothing == [0.005] * 3


def test_an_influence_that_does_not_depend_on_order_is_hardened_away():
  def by_place(self, tokens, mask):  # depends on the place alone, so on no word
    code = np.sin(np.outer(np.arange(len(tokens)) + 1, np.arange(1, 9)))
    return code * (np.arange(len(tokens)) < np.flatnonzero(mask)[0])[:, None]
  original, World._one = World._one, by_place
  try:
    hardened = channels(play(["+-*/7"], {})[0][0])
    soft = channels(play(["+-*/7"], {}, hardened=False)[0][0])
  finally:
    World._one = original
  assert hardened[:2] == pytest.approx([0.005] * 2, abs=1e-6) and min(soft) > 0.3


def test_rewards_are_the_power_mean_of_what_the_evidence_says():
  found, _ = play(["+-*7", "+-*8", "no", "7", "?+7"], {"XZ": 1, "YX": 1, "YZ": 0.5}, power=0.2)
  for t, acc in zip(found[:4], (1, 0, 0, 1)):
    expected = influence.power_mean((acc, *channels(t)), (0.7, 0.1, 0.1, 0.1), 0.2)
    assert t.reward == pytest.approx(expected) and t.scored
  assert channels(found[2]) == channels(found[3]) == [0.005] * 3, "no answer, or no rationale"
  assert not found[4].scored
  again, _ = play(["+-*7"], {"XZ": 1, "YX": 1, "YZ": 0.5})
  other, _ = play(["+-*7"], {"XZ": 1, "YX": 1, "YZ": 0.5}, step=5)
  assert channels(again[0]) == channels(found[0]), "the same draws at the same step"
  assert channels(other[0]) != channels(found[0])
  alone, _ = play(["+-*7", "+-*8"], {"XZ": 1}, weights=(1.0, 0.0, 0.0, 0.0))
  assert [t.reward for t in alone] == [1, 0]


def test_words_are_shuffled_as_words():
  _, world = play(["AB CD EF 7"], {"XZ": 1}, answer=r" (\d+)$", unit="word", draws=6)
  shuffled = {text[4:-1].strip() for text, _ in world.asked}
  assert len(shuffled) > 1 and all(sorted(s.split()) == ["AB", "CD", "EF"] for s in shuffled)


@pytest.mark.parametrize("options, message", [
    (dict(answer="7"), "has 0 groups"), (dict(answer="("), "no regular expression"),
    (dict(unit="line"), "unit='line'"), (dict(draws=0), "draws=0"),
    (dict(weights=(1, 0, 0)), "they are four"), (dict(weights=(0, 0, 0, 0)), "not all 0"),
    (dict(floor=1.0), "floor=1.0"), (dict(reward=lambda text: 2.0), "has the reward 2.0")])
def test_bad_settings_are_refused(options, message):
  with pytest.raises(rollouts.EpisodeFailure, match=message):
    play(["+7"], {}, **options)


def test_the_config_keeps_a_reference():
  config = configs.load("configs/methods/ce_po.py")
  episode = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert compose.signals_of(episode) == ("reference",)
