"""CLPO: levels, the second group, the filter, and the weighted KL."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import compose, objectives, rollouts, tasks
from jaxrl import config as configs
from jaxrl.batch import Task
from jaxrl.evidence.methods import evidence_of
from jaxrl.objectives import kl
from jaxrl.rewards import Scored, ok
from jaxrl.rollouts import Rollouts, edits
from jaxrl.rollouts.engine import GROUPS_PER_EPISODE
from jaxrl.sampling import Sample, SamplingParams
from tests.objectives.conftest import packed  # noqa: F401, a fixture

TEMPLATES = dict(simplify="easier:{question}|{answer}", vary="other:{question}", rewritten="<{question}>")


class World:
  """Answers by prompt: texts in turn; "7" is right, "x" cannot be judged."""

  labels, has_workers = ["right"], False
  bos_id = None

  def __init__(self, answers):
    self.answers, self.asked = answers, []

  def encode(self, text):
    return [ord(c) for c in text]

  def decode(self, tokens):
    return "".join(map(chr, tokens))

  def sample(self, params, requests, base_key, *, on_done=None):
    return [self._one(r) for r in requests]

  def _one(self, request):
    prompt = "".join(map(chr, request.prompt))
    self.asked.append((prompt, request.n, request.params.max_tokens))
    texts = self.answers[prompt]
    return [Sample(np.array([ord(c) for c in texts[i % len(texts)]], np.int32),
                   np.full(len(texts[i % len(texts)]), -1.0, np.float32), "stop")
            for i in range(request.n)]

  def score(self, pairs, *, among=0):
    return [Scored(float(t.text == "7"), t.text != "x", {"right": ok(float(t.text == "7"))})
            for _, t in pairs]


def play(first, second=("7", "0"), rewriting="3+4", samples=4, **options):
  world = World({"q": first, "easier:3+4?|7": [rewriting], "other:3+4?": [rewriting],
                 f"<{rewriting}>": list(second)})
  episode = functools.partial(rollouts.rewrite_and_answer, samples=samples, rewrite_tokens=5, **options)
  made = Rollouts(episode, world, world, world, templates=TEMPLATES, max_failure_rate=0.0,
                  sampling=SamplingParams(max_tokens=9))
  task = Task(id="t", prompt=[ord("q")], question="3+4?", answer="7")
  return made.run({"params": None}, [task], base_key=None), world


@pytest.mark.parametrize("first, prompt, weight", [
    (["0"], "easier:3+4?|7", 0.5), (["7", "0", "0", "0"], "easier:3+4?|7", 0.5),
    (["7", "0"], "other:3+4?", 1.0), (["7", "7", "7", "0"], None, 1.0), (["7"], None, 1.0)])
def test_hard_questions_are_simplified_and_middling_ones_varied(first, prompt, weight):
  found, world = play(first)
  asked = [p for p, *_ in world.asked]
  assert asked == ["q"] + ([prompt, "<3+4>"] if prompt else [])
  assert [t.group for t in found] == [0] * 4 + [1] * 4 * bool(prompt)
  assert {t.columns["kl_weight"] for t in found} == {weight}
  if prompt:
    assert world.asked[1][1:] == (1, 5), "one rewriting, of so many tokens, which is not returned"
    assert all(t.loss_mask.sum() == 1 for t in found)


def test_an_oracle_rewrites_in_place_of_the_policy():
  found, world = play(["0"], oracle=(r"(\d)\+(\d).*", r"\1+\2"))
  assert [p for p, *_ in world.asked] == ["q", "<3+4>"], "which is not asked for a rewriting"
  assert [t.group for t in found] == [0] * 4 + [1] * 4
  assert all(t.evidence["rescued"].score == 1 for t in found[4:])
  _, world = play(["7"], oracle=("3", "4"))
  assert len(world.asked) == 1, "nor is an easy question rewritten"


def test_the_evidence_s_oracle_swaps_the_operands_of_every_question():
  pattern, replacement = evidence_of("clpo").arms["oracle"][1]["rollout.episode.oracle"]
  for row in tasks.open_task("addition", split="test", size=50, seed=0, digits=3, answer_format="reversed"):
    swapped = re.sub(pattern, replacement, row["question"])
    assert swapped == f"{row['b']}+{row['a']}=" and row["a"] + row["b"] == int(row["answer"][::-1])


def test_only_groups_with_a_contrast_are_trained_on_and_a_rewriting_can_rescue():
  found, _ = play(["0"], second=("7", "0"))
  assert [t.scored for t in found] == [False] * 4 + [True] * 4
  assert all(t.evidence["rescued"].score == 1 for t in found[4:])
  found, _ = play(["0"], second=("0",))
  assert not any(t.scored for t in found)
  assert all(t.evidence["rescued"].score == 0 for t in found[4:])
  found, _ = play(["7", "0"], second=("7", "0"))
  assert all(t.scored for t in found) and found[4].evidence["rescued"].score == 0
  found, _ = play(["7"])
  assert not any(t.scored for t in found), "an easy question teaches nothing"


def test_rates_of_rescued_questions_and_of_those_that_are_trained_on_by_level():
  """Never right and rescued, never right and not, hard and included, easy and not, and one without a judge."""
  played = [play(*texts)[0] for texts in ((["0"], ("7", "0")), (["0"], ("0",)),
                                          (["7", "0", "0", "0"], ("7",)), (["7"],), (["x"],))]
  for number, found in enumerate(played):
    for t in found:
      t.group += number * GROUPS_PER_EPISODE
  step = edits.Step([t for found in played for t in found], {}, 0, {}, {})
  log = compose.build(dict(configs.load("configs/methods/clpo.py").rollout.edits[0]), edits)
  assert edits.apply([log], step) == step.trajectories
  assert step.metrics == pytest.approx(dict(rescue_rate=1 / 2, included_hard=2 / 3, included_easy=0.0))


def test_a_leak_is_told():
  assert play(["0"], rewriting="7=3+4")[0][4].evidence["leaked"].score == 1
  assert play(["0"])[0][4].evidence["leaked"].score == 0


@pytest.mark.parametrize("mode, levels", [("hard", 1), ("medium", 0), ("none", 0), ("both", 1)])
def test_modes(mode, levels):
  assert len(play(["0"], mode=mode)[0]) == 4 + 4 * levels


def test_what_cannot_be_judged_decides_nothing():
  found, world = play(["x"])
  assert len(world.asked) == 1 and not any(t.scored for t in found)
  found, world = play(["x", "0", "x", "7"])  # one of two
  assert world.asked[1][0] == "other:3+4?"
  assert [t.scored for t in found[:4]] == [False, True, False, True]


@pytest.mark.parametrize("options", [dict(mode="easy"), dict(hard=0.8), dict(medium=1.2),
                                     dict(oracle=("(", "")), dict(oracle=("a", "b", "c"))])
def test_bad_settings_are_refused(options):
  with pytest.raises(rollouts.EpisodeFailure, match="rewrite_and_answer"):
    play(["0"], **options)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_share_of_questions_that_teach(p):
  """P(a group of 4 has both) = 1 - p^4 - (1 - p)^4."""
  rng, kept = np.random.default_rng(0), 0
  for _ in range(400):
    found, _ = play([("7" if r < p else "0") for r in rng.random(4)], mode="none")
    kept += found[0].scored
  exact = 1 - p ** 4 - (1 - p) ** 4
  assert abs(kept / 400 - exact) < 4 * np.sqrt(exact * (1 - exact) / 400)


def test_the_kl_has_a_weight_of_its_own_for_every_sequence(packed):
  for seed in range(3):
    batch, outputs = packed.batch(seed)
    weights = np.random.default_rng(seed).uniform(0, 1, batch.num_sequences).astype(np.float32)
    weighted = batch.replace(columns={"kl_weight": weights})
    plain, _ = kl(outputs, batch, beta=0.2)
    found, metrics = kl(outputs, weighted, beta=0.2, weight="kl_weight")
    for i, rows, columns in packed.sequences(batch):
      np.testing.assert_allclose(np.asarray(found)[rows, columns],
                                 weights[i] * np.asarray(plain)[rows, columns], rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], plain / 0.2, rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda o: jnp.sum(kl(o, weighted, beta=0.2, weight="kl_weight")[0]))(outputs)
    assert np.isfinite(gradient.logprobs).all()
    with pytest.raises(ValueError, match="weight='hard'"):
      kl(outputs, weighted, beta=0.2, weight="hard")


def test_the_toy_asks_for_another_question_with_the_same_answer():
  data = tasks.open_task("addition", split="train", size=200, seed=0, digits=2, rewrites=0.5)
  rewritings = [r for r in data if r["question"].startswith("=")]
  assert 70 < len(rewritings) < 130
  for row in rewritings:
    assert row["question"] == f"={row['a']}+{row['b']}=" and row["answer"] == f"{row['b']}+{row['a']}="


def test_the_config_builds():
  config = configs.to_dict(configs.load("configs/methods/clpo.py"))
  assert config["objective"][1]["weight"] == "kl_weight"
  episode = compose.build(config["rollout"]["episode"], rollouts)
  assert compose.supplied_by(episode) == ((), ("kl_weight",))
  compose.build(config["objective"][1], objectives)
