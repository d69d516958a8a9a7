"""SeaPO: what an injected error is, when it is sure to be worse, and which pairs are kept."""

import functools
import json

import numpy as np
import pytest
from scipy import stats

from jaxrl.batch import Task
from jaxrl.evaluation.flaws import flaw_rates
from jaxrl.rollouts import EpisodeFailure, Rollouts, best_and_flawed
from jaxrl.sampling import SamplingParams
from jaxrl.tasks import scratchpad_addition as sums
from tests.methods.conftest import Characters, TablePolicy, TableScorer

KINDS = sums.FLAWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thought", [True, False])
def test_an_error_is_of_its_kind_and_nothing_else_changes(kind, thought):
  rng = np.random.default_rng(0)
  for _ in range(200):
    a, b = (int(x) for x in rng.integers(0, 100, 2))
    right = f"+{str(a + b)[::-1]}={a + b}" if thought else f"={a + b}"
    row = dict(a=a, b=b)
    assert sums.flaw_of(row, right) == "" and sums.check(row, right)
    text = sums.flawed(rng, right, kind)
    if text is None:
      assert not thought and kind != "correctness"
      continue
    assert sums.flaw_of(row, text) == kind and not sums.check(row, text)
    if kind == "logic":
      assert text.split("=")[0] == right.split("=")[0]
    if kind == "hallucination":
      more = int(text.split("=")[0].rsplit("+", 1)[1])
      assert int(text.split("=")[1]) == a + b + more and text.startswith(right.split("=")[0])
    if kind != "hallucination":  # one digit of each part
      assert len(text) == len(right)
      assert sum(x != y for x, y in zip(text.split("=")[1], right.split("=")[1])) == 1
  assert sums.flawed(rng, "nonsense", kind) is None


def test_other_forms_and_kinds():
  row = dict(a=12, b=39)
  assert [sums.flaw_of(row, t) for t in ("", "51", "+15=", "=51x", "+15=51=51")] == ["form"] * 5
  assert [sums.flaw_of(row, t) for t in ("=51", "+15=51", "=52", "+25=52", "+15=52", "+15+=51", "+15+3=54")
          ] == ["", "", "correctness", "correctness", "logic", "hallucination", "hallucination"]
  with pytest.raises(ValueError, match="kind='typo'"):
    sums.flawed(np.random.default_rng(0), "=51", "typo")


def test_flawed_solutions_are_as_common_as_the_knob_says():
  rows = [sums.sample(np.random.default_rng(i), scratchpad=1.0, flaws=0.3) for i in range(2000)]
  found = [sums.flaw_of(r, r["solution"]) for r in rows]
  for kind in KINDS:
    assert abs(found.count(kind) / 2000 - 0.1) < 4 * np.sqrt(0.09 / 2000)
  plain = [sums.sample(np.random.default_rng(i), scratchpad=1.0) for i in range(50)]
  assert all(not sums.flaw_of(r, r["solution"]) for r in plain)


def test_an_injected_error_is_worse_more_surely_than_the_worst_of_n():
  """Check 1: scores are quality + noise; the worst of n may be no worse, a flawed answer loses delta.

  The chance that the rejected answer is truly worse: for n = 2 it has a closed form, an orthant of a
  normal distribution; the injected one is kept if its score is lower.
  """
  rng = np.random.default_rng(0)
  spread, noise, draws = 0.2, 1.0, 200_000

  def worse(n, delta):
    quality = rng.normal(0, spread, (draws, n))
    score = quality + rng.normal(0, noise, (draws, n))
    best, worst = score.argmax(1), score.argmin(1)
    at = np.arange(draws)
    natural = np.mean(quality[at, worst] < quality[at, best])
    flawed = quality[at, best] - delta
    kept = flawed + rng.normal(0, noise, draws) < score[at, best]
    injected = np.mean((flawed < quality[at, best])[kept])
    return natural, injected, kept.mean()
  natural, injected, _ = worse(2, 1.0)
  rho = spread / np.hypot(spread, noise)  # of the differences of qualities and of scores
  assert natural == pytest.approx(0.5 + np.arcsin(rho) / np.pi, abs=0.005)
  assert injected == 1.0
  assert natural < worse(8, 1.0)[0] < 0.75
  # Without a drop the injected answer is no worse, and the filter keeps what noise happens to dislike:
  # the best of two scores is above a fresh one of the same quality with probability 2/3 at no spread.
  spread = 1e-9
  assert worse(2, 0.0)[1] == 0.0 and worse(2, 0.0)[2] == pytest.approx(2 / 3, abs=0.005)


# ---------------------------------------------------------------------------------------- episodes


def sums_of(text):
  """12 is right; r or w first, or an answer that takes no error."""
  body = text.split("?", 1)[1]
  return {"": {"=": 0.9, "x": 0.1}, "=": {"5": 0.5, "7": 0.5}}.get(body, {"$": 1.0})


class Likelihood:
  def logprobs(self, params, sequences):
    return [np.full(len(tokens), -0.25, np.float32) for tokens in sequences]


def supervised_like():
  class Text(Characters):
    eos_id = ord("$")
  return Text()


def play(reward=lambda t: float(t == "=5"), next=sums_of, tasks=100, templates=None, **options):
  arguments = dict(samples=3, kinds=KINDS, flaw="jaxrl.tasks.scratchpad_addition:flawed") | options
  policy = TablePolicy(next)
  made = Rollouts(functools.partial(best_and_flawed, **arguments), policy, supervised_like(),
                  TableScorer(reward), max_failure_rate=0.0, likelihood=Likelihood(), templates=templates,
                  sampling=SamplingParams(max_tokens=6, stop_ids=(ord("$"),)))
  problems = [Task(id=str(i), prompt=[48 + i % 10, ord("?")], question=f"{i % 10}?")
              for i in range(tasks)]
  groups = {}
  for t in made.run({"params": "policy"}, problems, base_key=None):
    groups.setdefault(t.group, []).append(t)
  return list(groups.values()), policy


def body(t):
  return "".join(map(chr, t.tokens[t.prompt_length:]))


def test_the_best_is_preferred_to_itself_with_an_error():
  groups, _ = play()
  kept = [g for g in groups if g[0].scored]
  assert len(kept) > 20
  for best, worse in kept:
    assert body(best) == "=5$" and body(worse) in {f"={d}$" for d in "012346789"}
    assert [t.columns["preference"] for t in (best, worse)] == [1.0, 0.0]
    assert KINDS[int(best.columns["error_kind"])] == "correctness"  # others need a scratchpad
    assert worse.loss_mask.tolist() == best.loss_mask.tolist() == [False, False, True, True, True]
    np.testing.assert_array_equal(worse.behaviour_logprobs, [0, 0, -0.25, -0.25, -0.25])
  for group in groups:
    if not group[0].scored:
      assert not any(t.scored for t in group)
      assert len(group) == 1 or body(group[0]) == "=7$"  # nothing to lose
  kinds = [g[0].columns["error_kind"] for g in groups]
  assert stats.chisquare([kinds.count(float(k)) for k in range(3)]).pvalue > 1e-3


def test_pairs_that_the_reward_sees_no_error_in_are_dropped():
  value = {"=5": 0.5}
  groups, _ = play(reward=lambda t: value.get(t, 0.2), kinds=["correctness"], gap=0.25)
  assert any(g[0].scored for g in groups)
  groups, _ = play(reward=lambda t: value.get(t, 0.2), kinds=["correctness"], gap=0.3)
  assert not any(t.scored for g in groups for t in g)
  groups, _ = play(reward=lambda t: None, kinds=["correctness"])
  assert not any(t.scored for g in groups for t in g)


def test_the_policy_may_rewrite_its_own_answer():
  def writer(text):
    if text.startswith("spoil"):
      return {"$": 1.0} if text.endswith("=9") else ({"9": 1.0} if text.endswith(">=") else {"=": 1.0})
    return sums_of(text)
  groups, policy = play(next=writer, flaw="", rewrite="flaw", kinds=["logic"],
                        templates={"flaw": "spoil {question}{answer} {kind}>"})
  asked = {"".join(map(chr, r.prompt)) for r in policy.asked if r.prompt[0] == ord("s")}
  assert "spoil 3?=5 logic>" in asked
  kept = [g for g in groups if g[0].scored]
  assert kept and all(body(g[1]) == "=9$" for g in kept)


@pytest.mark.parametrize("options", [dict(kinds=()), dict(flaw=""), dict(rewrite="flaw")])
def test_what_makes_no_sense_is_refused(options):
  with pytest.raises(EpisodeFailure, match="best_and_flawed: kinds="):
    play(tasks=1, **options)


def test_rates_are_those_of_the_last_evaluation(tmp_path):
  texts = ["+15=51", "+15=52", "+25=52", "+15+3=54", "+15+4=55", "x"]
  (tmp_path / "summary.json").write_text(json.dumps(dict(phases=[dict(name="sft"), dict(name="rl")])))
  with pytest.raises(ValueError, match="no answers"):
    flaw_rates(tmp_path)
  (tmp_path / "samples").mkdir()
  for moment, some in (("sft", texts[:1]), ("rl", texts)):
    (tmp_path / "samples" / f"evaluation_{moment}.jsonl").write_text("".join(
        json.dumps(dict(prompt="12+39=", completion=text)) + "\n" for text in some))
  assert flaw_rates(tmp_path) == pytest.approx(
      dict(correctness=1 / 6, logic=1 / 6, hallucination=2 / 6, form=1 / 6))
