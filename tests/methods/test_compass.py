"""COMPASS: votes, credibility and paths as loops in float64, and what credibility cannot do."""

import numpy as np
import pytest

from jaxrl import advantages, compose
from jaxrl import config as configs
from jaxrl.advantages.chain import credit
from jaxrl.batch import Task, Trajectory, pack
from jaxrl.rollouts import edits
from jaxrl.rollouts.semantic import number_answers


def batch_of(answers, groups, *, seed=0, scored=None, rewards=None):
  """Answers by id (-1 does not vote), with random gaps and entropies on 1 to 6 tokens."""
  rng = np.random.default_rng(seed)
  n = len(answers)
  scored = [True] * n if scored is None else scored
  rewards = [0.0] * n if rewards is None else rewards
  made = []
  for a, g, s, r in zip(answers, groups, scored, rewards):
    length = int(rng.integers(1, 7))
    made.append(Trajectory(
        rng.integers(0, 9, length + 1), [False] + [True] * length, group=int(g), scored=bool(s),
        reward=r, columns={"answer_id": float(a)},
        signals={"top2_gap": rng.random(length + 1), "entropy": rng.exponential(1.0, length + 1)}))
  return pack(made, row_length=16), made


def run(batch, count, **options):
  found = advantages.score_by_confidence(batch, batch.rewards, **options)
  return np.asarray(found.values)[:count], {k: float(v) for k, v in found.metrics.items()}


def by_hand(made, answers, kappa, weights=(1.0, 1.0)):
  """One group."""
  d = [np.asarray(t.signals["top2_gap"][1:], np.float64) for t in made]
  h = [np.asarray(t.signals["entropy"][1:], np.float64) for t in made]
  c = [np.exp(kappa * x.std()) for x in d]
  totals = {}
  for a, x in zip(answers, c):
    if a >= 0:
      totals[a] = totals.get(a, 0) + x
  winner = max(sorted(totals), key=totals.get) if totals else None
  values = []
  for a, x, g, e in zip(answers, c, d, h):
    credible = max((c[i] for i in range(len(c)) if answers[i] == winner), default=0) / max(c)
    values.append(weights[0] * credible * (a == winner) + weights[1] * (e * g).sum() / e.sum())
  return np.array(values), winner


@pytest.mark.parametrize("kappa", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_groups_against_loops(kappa, seed):
  rng = np.random.default_rng(seed)
  groups = np.repeat(np.arange(5), [6, 3, 1, 7, 4])
  n = len(groups)
  answers, scored = rng.integers(-1, 3, n), rng.random(n) < 0.85
  answers[groups == 1] = -1  # nobody votes
  batch, made = batch_of(answers, groups, seed=seed, scored=scored)
  found, _ = run(batch, n, kappa=kappa, answer_weight=0.7, path_weight=0.4)
  for g in range(5):
    mine = np.flatnonzero((groups == g) & scored)
    if len(mine):
      expected, _ = by_hand([made[i] for i in mine], answers[mine], kappa, (0.7, 0.4))
      np.testing.assert_allclose(found[mine], expected, rtol=1e-4, atol=1e-5)
  assert not found[~scored].any()


def test_without_confidence_it_is_the_majority_and_ties_go_to_the_first():
  batch, _ = batch_of([0, 1, 1, 0, 2, -1], [0] * 6)
  found, _ = run(batch, 6, kappa=0.0, path_weight=0.0)
  np.testing.assert_allclose(found, [1, 0, 0, 1, 0, 0])
  batch, _ = batch_of([2, 1, 1, 2, 1], [0] * 5)
  np.testing.assert_allclose(run(batch, 5, kappa=0.0, path_weight=0.0)[0], [0, 1, 1, 0, 1])


@pytest.mark.parametrize("seed", range(12))
def test_gaps_that_do_not_vary_make_a_tie_whatever_the_lengths(seed):
  rng = np.random.default_rng(seed)
  gap, made = rng.random(), []
  for answer, length in enumerate(rng.integers(1, 60, 2)):
    made.append(Trajectory(
        np.ones(length + 1), [False] + [True] * length, columns={"answer_id": float(answer)},
        signals={"top2_gap": np.full(length + 1, gap), "entropy": np.ones(length + 1)}))
  found, _ = run(pack(made, row_length=64), 2, path_weight=0.0)
  np.testing.assert_allclose(found, [1, 0], atol=1e-5)


def test_a_confident_minority_can_win():
  batch, made = batch_of([0, 0, 1], [0] * 3)
  for t, gaps in zip(made, ([0.5, 0.5], [0.5, 0.5], [0.0, 1.0])):
    for name in ("tokens", "loss_mask", "behaviour_logprobs", "turn_ids", "tag_ids"):
      setattr(t, name, np.asarray([0, 1, 1], getattr(t, name).dtype))
    t.signals = {"top2_gap": np.array([0.9, *gaps]), "entropy": np.ones(3)}
  batch = pack(made, row_length=16)
  found, metrics = run(batch, 3, kappa=3.0, path_weight=0.0)  # exp(1.5) = 4.5 against 2
  np.testing.assert_allclose(found, [0, 0, 1], atol=1e-6)
  assert metrics["answer_credibility"] == pytest.approx(1.0)
  found, _ = run(batch, 3, kappa=1.0, path_weight=0.0)  # 1.65 against 2: credibility 1 / 1.65
  np.testing.assert_allclose(found, [np.exp(-0.5), np.exp(-0.5), 0], rtol=1e-5)


def test_credibility_has_no_effect_on_the_update_without_the_path():
  """It is one factor for a group, which division by the group's deviation cancels."""
  batch, made = batch_of([0, 0, 1, 0, 2], [0] * 5, seed=5)
  pieces = [dict(name="center_by_group"), dict(name="scale_by_group_std", epsilon=0.0)]
  chain = credit([compose.build(p, advantages) for p in pieces])
  values, metrics = run(batch, 5, kappa=2.0, path_weight=0.0)
  assert metrics["answer_credibility"] < 1 - 1e-3
  padded = np.zeros(batch.num_sequences, np.float32)
  padded[:5] = values
  plain = np.where(padded > 0, 1, 0).astype(np.float32)
  np.testing.assert_allclose(chain(batch, padded, {}).values, chain(batch, plain, {}).values,
                             rtol=1e-4, atol=1e-6)


def test_paths_are_between_0_and_1_and_right_labels_are_only_counted():
  batch, _ = batch_of([0, 0, 1, 1, 1], [0, 0, 1, 1, 1], seed=2, rewards=[1.0, 1.0, 0.0, 0.0, 0.0])
  found, metrics = run(batch, 5, answer_weight=0.0)
  assert (found > 0).all() and (found < 1).all()
  assert metrics["pseudo_label_right"] == pytest.approx(2 / 5)
  again, _ = run(batch.replace(rewards=1 - batch.rewards), 5, answer_weight=0.0)
  np.testing.assert_array_equal(found, again)


def test_answers_are_numbered_within_their_group():
  def answer(text, group, scored=True):
    return Trajectory([1, 2], [False, True], text=text, group=group, scored=scored, task_id="t")
  step = edits.Step([answer("7", 0), answer("8", 0), answer("7 ", 0), answer("", 0),
                     answer("8", 1), answer("7", 1, scored=False)],
                    {"t": Task("t", [1], answer="no")}, 0, {}, {})
  found = edits.apply([compose.build("jaxrl.rollouts.semantic:number_answers", edits)], step)
  assert [t.columns["answer_id"] for t in found] == [0, 1, 0, -1, 0, -1]
  assert compose.supplied_by(number_answers) == ((), ("answer_id",))
  with pytest.raises(ValueError, match="number_answers: pattern"):
    number_answers(step, pattern="(a)(b)")


def test_the_column_is_asked_for_with_a_remedy():
  batch, _ = batch_of([0], [0])
  with pytest.raises(ValueError, match="number_answers"):
    advantages.score_by_confidence(batch.replace(columns={}), batch.rewards)


def test_the_config_builds():
  config = configs.to_dict(configs.load("configs/methods/compass.py"))
  assert [a["name"] for a in config["advantage"]] == ["score_by_confidence", "center_by_group",
                                                       "scale_by_group_std"]
