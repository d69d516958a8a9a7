"""RLCR: what the rule rewards, by grid search and by hand; metrics against SciPy and loops."""

import numpy as np
import pytest
from scipy import stats

from jaxrl import advantages, compose, rewards
from jaxrl import config as configs
from jaxrl.batch import Task, Trajectory
from jaxrl.evaluation import calibration, voting
from jaxrl.rewards import Criterion, Scorer
from jaxrl.rollouts import edits

TASK = Task(id="q", prompt=[1], answer="975")
PATTERN = r"(?P<answer>\d+)=(?P<confidence>.*)"


def answer(text):
  return Trajectory([1, 2], [False, True], text=text)


def scorer_of(spec, **read):
  config = configs.load(spec)
  reward = configs.to_dict(config.reward)
  for criterion in reward["criteria"]:
    criterion.update(read)
  return Scorer.from_config(reward)


@pytest.fixture(scope="module")
def reward():
  """The configured reward of a text, confidences written as numbers from 0 to 1."""
  scorer = scorer_of("configs/methods/rlcr.py", pattern=PATTERN, scale=1.0)
  return lambda *texts: [s.reward for s in scorer.score([(TASK, answer(t)) for t in texts])]


def test_the_reward_is_half_of_form_accuracy_and_brier(reward):
  texts = ["975=0.8", "975=0", "100=0.8", "100=0", "975=1", " 975=.5\n"]
  wanted = [0.5 + 0.5 + 0.5 * (1 - 0.2 ** 2), 0.5 + 0.5, 0.5 + 0.5 * (1 - 0.8 ** 2), 0.5 + 0.5, 1.5,
            0.5 + 0.5 + 0.5 * 0.75]
  np.testing.assert_allclose(reward(*texts), wanted)


@pytest.mark.parametrize("text", ["975", "975=", "975=1.01", "975=-0.1", "975=nan", "975=inf",
                                  "975=high", "=0.5", "x975=0.5", ""])
def test_another_form_earns_nothing_at_all(reward, text):
  assert reward(text) == [0.0]


def test_up_to_scale_and_shift_it_is_the_formula_of_the_paper(reward):
  q = np.linspace(0, 1, 21)
  for c, text in ((1, "975"), (0, "100")):
    found = np.array(reward(*[f"{text}={x:.2f}" for x in q]))
    np.testing.assert_allclose(2 * found - 2, c - (c - q) ** 2, atol=1e-9)


def expected_rewards(reward, p, q):
  """Mean reward of an answer that is right with chance p and stated with q. [p, q]"""
  right, wrong = (np.array(reward(*[f"{a}={x:.3f}" for x in q])) for a in ("975", "100"))
  return p[:, None] * right + (1 - p[:, None]) * wrong


def test_honesty_pays_most_and_the_likeliest_answer_pays_best(reward):
  p = q = np.linspace(0, 1, 101)
  found = expected_rewards(reward, p, q)
  np.testing.assert_array_equal(found.argmax(axis=1), np.arange(101))
  np.testing.assert_allclose(2 * found.max(axis=1) - 2, p ** 2, atol=1e-9)


def test_a_heavier_brier_score_would_reward_wrong_answers():
  p = np.linspace(0, 1, 1001)
  for weight in (0.5, 1.0, 2.0):  # at q = p the mean of c - weight * (c - q)^2 is this
    best = p - weight * p * (1 - p)
    assert (np.diff(best) > 0).all() == (weight <= 1)
  inside = p[1:-1]  # and the log score, which is not bounded
  log_score = inside + inside * np.log(inside) + (1 - inside) * np.log(1 - inside)
  assert inside[log_score.argmin()] == pytest.approx(1 / (1 + np.e), abs=2e-3)
  assert log_score.min() < -0.3


@pytest.mark.parametrize("weight,monotone", [(0.5, True), (1.0, False)])
def test_the_config_stays_within_the_bound_and_twice_as_much_would_not(weight, monotone):
  """The weight of the Brier score relative to accuracy is 1; at 2 a coin toss pays least."""
  reward = configs.to_dict(configs.load("configs/methods/rlcr.py").reward)
  for criterion in reward["criteria"]:
    criterion.update(pattern=PATTERN, scale=1.0)
  reward["aggregate"]["weights"]["calibration"] = weight
  scorer = Scorer.from_config(reward)
  p = q = np.linspace(0, 1, 51)
  found = expected_rewards(lambda *texts: [
      s.reward for s in scorer.score([(TASK, answer(t)) for t in texts])], p, q).max(axis=1)
  assert (np.diff(found) >= -1e-9).all() == monotone


def test_the_judge_sees_the_answer_alone_and_may_be_any_criterion():
  piece = compose.build(dict(name="correct_and_formed", scale=100.0, judge="numeric_answer",
                             pattern=r"(?P<answer>.+) @(?P<confidence>.+)"), rewards)
  task = Task(id="q", prompt=[1], answer="0.5")
  assert piece(task, answer("1/2 @90")).score == 1
  assert piece(task, answer("90 @0.5")).score == 0
  assert piece(Task(id="q", prompt=[1]), answer("1/2 @90")).status == "unscorable"


def test_the_baseline_leaves_the_confidence_unrewarded():
  scorer = scorer_of("configs/methods/rlcr.py:rlvr", pattern=PATTERN, scale=1.0)
  found = scorer.score([(TASK, answer(t)) for t in ("975=0.1", "975=0.9", "100=0.1", "975")])
  assert [s.reward for s in found] == [1.0, 1.0, 0.5, 0.0]
  assert [s.evidence["confidence"].status for s in found] == ["ok"] * 3 + ["unscorable"]
  assert all(s.scored for s in found)


def random_outcomes(seed, size=200):
  rng = np.random.default_rng(seed)
  q = rng.choice(np.linspace(0, 1, 11), size) if seed % 2 else rng.random(size)
  return q, (rng.random(size) < q ** 2).astype(float)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_metrics_agree_with_loops_and_with_scipy(seed):
  q, c = random_outcomes(seed)
  squares = sum((a - b) ** 2 for a, b in zip(q, c))
  assert calibration.brier_score(q, c) == pytest.approx(squares / 200)
  gap = 0.0
  for b in range(10):
    inside = [i for i in range(200) if b <= q[i] * 10 < b + 1 or (b == 9 and q[i] == 1)]
    if inside:
      gap += len(inside) / 200 * abs(np.mean(q[inside]) - np.mean(c[inside]))
  assert calibration.expected_calibration_error(q, c) == pytest.approx(gap)
  u = stats.mannwhitneyu(q[c == 1], q[c == 0]).statistic
  assert calibration.auroc(q, c) == pytest.approx(u / (c.sum() * (200 - c.sum())))


def test_one_confidence_for_all_is_calibrated_but_tells_nothing():
  c = np.array([1, 1, 1, 0, 0])
  assert calibration.expected_calibration_error(np.full(5, 0.6), c) == pytest.approx(0, abs=1e-12)
  assert calibration.auroc(np.full(5, 0.6), c) == 0.5
  assert np.isnan(calibration.auroc([0.2, 0.4], [1, 1]))


@pytest.mark.parametrize("q,c", [([0.5], [1, 0]), ([], []), ([1.2], [1]), ([0.5], [0.5])])
def test_what_is_no_calibration_is_refused(q, c):
  with pytest.raises(ValueError, match="calibration compares|confidences are from 0 to 1"):
    calibration.brier_score(q, c)


def test_a_sure_minority_outvotes_an_unsure_majority():
  assert voting.vote(["8", "9", "8"]) == "8"
  assert voting.vote(["8", "9", "8"], [0.2, 0.9, 0.3]) == "9"
  assert voting.vote([None, "9"], [5.0, 0.1]) == "9" and voting.vote([None]) is None
  assert voting.vote(["b", "a"]) == "b"
  with pytest.raises(ValueError, match="1 weights for 2 answers"):
    voting.vote(["a", "b"], [1.0])


def test_weighing_votes_with_honest_confidences_helps():
  """Answers that are right with chance p, stated truthfully; K = 8 votes, one wrong answer."""
  rng = np.random.default_rng(0)
  plain = weighted = 0
  for _ in range(3000):
    p = rng.beta(1.5, 1.5, 8)
    answers = np.where(rng.random(8) < p, "right", "wrong").tolist()
    # An honest statement is about the answer given: p is its chance where it is the right one.
    q = [x if a == "right" else 1 - x for a, x in zip(answers, p)]
    plain += voting.vote(answers) == "right"
    weighted += voting.vote(answers, q) == "right"
  assert weighted > plain


def test_a_batch_logs_its_calibration():
  q, c = random_outcomes(3, 30)
  trajectories = [answer("") for _ in range(32)]
  for t, a, b in zip(trajectories, q, c):
    t.evidence = {"confidence": Criterion(a), "correct": Criterion(b)}
  for t in trajectories[30:]:
    t.evidence = {"confidence": Criterion(0.0, "unscorable"), "correct": Criterion(0.0)}
  step = edits.Step(trajectories, {}, 0, {}, {})
  edit, = [compose.build(dict(e), edits)
           for e in configs.load("configs/methods/rlcr.py").rollout.edits]
  assert edits.apply([edit], step) == trajectories
  assert step.metrics["ece"] == calibration.expected_calibration_error(q, c)
  assert step.metrics["extreme_confidence"] == np.isin(q, (0, 1)).mean()
  trajectories[0].evidence = {"correct": Criterion(1.0)}
  with pytest.raises(ValueError, match="no criterion 'confidence'"):
    edit(step)


@pytest.mark.parametrize("options,message", [
    (dict(pattern="("), "not a regular expression"),
    (dict(pattern="(?P<answer>a)"), "needs the groups"),
    (dict(scale=0.0), "must be above 0"), (dict(judge="exactmatch"), "did you mean 'exact_match'")])
def test_criteria_that_make_no_sense_are_refused(options, message):
  spec = dict(name="brier", pattern=PATTERN) | options
  with pytest.raises(ValueError, match=message):
    Scorer([spec], workers=0)


def test_the_config_reads_what_its_warm_start_writes():
  config = configs.load("configs/methods/rlcr.py")
  scorer = scorer_of("configs/methods/rlcr.py")
  found, = scorer.score([(TASK, answer("975=250"))])
  assert found.evidence["confidence"].score == pytest.approx(250 / 999)
  assert found.reward == pytest.approx(1 + 0.5 * (1 - (1 - 250 / 999) ** 2))
  assert scorer.labels[0] == "correct"  # what evaluations call solved
  assert [dict(a)["name"] for a in config.advantage] == ["center_by_group"]
  assert config.rollout.max_tokens >= len("1998=999") + 1
  for piece in config.advantage:
    compose.build(dict(piece), advantages)
  with pytest.raises(ValueError, match="it has 'rlvr'"):
    configs.load("configs/methods/rlcr.py:rlvc")
