"""compar:IA: strengths against SciPy, closed forms and the truth of simulated votes; conversions by hand."""

import json

import numpy as np
import pytest
from scipy import optimize, stats

from jaxrl import cli
from jaxrl.data import BadRow, votes
from jaxrl.evaluation import arena
from jaxrl.tasks import open_task


def simulate(seed, strengths, count, *, draws=0.15, cue=0.0):
  """Matches of models with these log10 strengths; `cue` moves votes by so many logits per unit."""
  rng = np.random.default_rng(seed)
  models = len(strengths)
  a = rng.integers(0, models, count)
  b = (a + rng.integers(1, models, count)) % models
  x = rng.normal(size=count)
  won = rng.random(count) < 1 / (1 + 10 ** -(strengths[a] - strengths[b]) * np.exp(-cue * x))
  points = np.where(rng.random(count) < draws, 1.0, 2.0 * won)
  return arena.Matches(tuple(f"m{i:02}" for i in range(models)), a, b, points, x[:, None], ("cue",))


def without_cue(matches):
  return arena.Matches(matches.models, matches.first, matches.second, matches.points,
                       np.zeros((len(matches), 0)))


def scipy_fit(matches, ridge=0.0):
  """The same maximum, by BFGS from the equation of a single match at a time."""
  models = len(matches.models)

  def loss(theta):
    u = np.log(10) * theta[:models]
    d = u[matches.first] - u[matches.second] + matches.covariates @ theta[models:]
    like = matches.points * np.log(1 / (1 + np.exp(-d))) + (2 - matches.points) * np.log(1 / (1 + np.exp(d)))
    return -like.sum() + ridge / 2 * (u ** 2).sum() + theta[:models].sum() ** 2  # the mean is free: 0
  found = optimize.minimize(loss, np.zeros(models + len(matches.names)), method="BFGS",
                            options=dict(gtol=1e-7))
  return found.x


@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_strengths_and_coefficients_are_those_that_scipy_finds(ridge):
  matches = simulate(0, np.array([0.4, 0.1, 0.0, -0.5]), 400, cue=0.7)
  fit, expected = arena.bradley_terry(matches, ridge=ridge), scipy_fit(matches, ridge)
  np.testing.assert_allclose(fit.strengths, expected[:4], atol=1e-5)
  np.testing.assert_allclose(fit.coefficients, expected[4:], atol=1e-5)
  np.testing.assert_allclose(fit.scores, 1000 + 400 * fit.strengths)


def test_two_models_have_the_log_odds_of_the_points():
  matches = arena.Matches.of([("x", "y", 2)] * 5 + [("y", "x", 2)] * 2 + [("x", "y", 1)] * 3)
  theta = arena.bradley_terry(matches).strengths
  assert theta[0] - theta[1] == pytest.approx(np.log10((5 + 1.5) / (2 + 1.5)))


def test_a_draw_is_half_a_win_each_and_mirrored_rows_change_nothing():
  results = [("x", "y", 2), ("y", "z", 2), ("z", "x", 1), ("x", "z", 2), ("z", "y", 0), ("z", "x", 2)]
  halves = [row for a, b, points in results
            for row in ([(a, b, points)] * 2 if points != 1 else [(a, b, 2), (a, b, 0)])]
  mirrored = results + [(b, a, 2 - points) for a, b, points in results]
  expected = arena.bradley_terry(arena.Matches.of(results)).strengths
  for same in (halves, mirrored):
    np.testing.assert_allclose(arena.bradley_terry(arena.Matches.of(same)).strengths, expected, atol=1e-9)


def test_simulated_strengths_are_recovered_and_lie_in_their_intervals():
  inside, truth = [], np.random.default_rng(1).normal(0, 0.4, 12)
  for seed in range(4):
    content = arena.ranking(without_cue(simulate(seed, truth, 5000, draws=0.0)), resamples=60, seed=seed)
    found = {m["model"]: m for m in content["models"]}
    rows = [found[f"m{i:02}"] for i in range(12)]
    scores = 1000 + 400 * (truth - truth.mean())
    assert stats.spearmanr([m["score"] for m in rows], scores).statistic > 0.95
    inside += [m["interval"][0] <= s <= m["interval"][1] for m, s in zip(rows, scores)]
    assert [m["rank"] for m in content["models"]] == list(range(1, 13))
    assert all(m["rank_interval"][0] <= m["rank"] <= m["rank_interval"][1] for m in rows)
    assert sum(m["matches"] for m in rows) == 2 * 5000
  assert 0.85 <= np.mean(inside) <= 1.0  # 48 intervals of 95%


def test_draws_pull_strengths_together_and_leave_their_order():
  truth = np.array([0.6, 0.2, -0.2, -0.6])
  few, many = (arena.bradley_terry(without_cue(simulate(2, truth, 20000, draws=share))).strengths
               for share in (0.0, 0.5))
  assert list(np.argsort(few)) == list(np.argsort(many)) == list(np.argsort(truth))
  np.testing.assert_allclose(few, truth, atol=0.03)
  assert np.ptp(many) < 0.7 * np.ptp(few)


def test_only_elo_depends_on_the_order_of_matches():
  matches = without_cue(simulate(3, np.array([0.3, 0.0, -0.3]), 300))
  other = matches.take(np.random.default_rng(0).permutation(len(matches)))
  np.testing.assert_allclose(arena.bradley_terry(other).strengths, arena.bradley_terry(matches).strengths,
                             atol=1e-9)
  assert np.abs(arena.elo(other) - arena.elo(matches)).max() > 1
  assert arena.elo(other).sum() == pytest.approx(3000)


def test_elo_by_hand():
  matches = arena.Matches.of([("x", "y", 2), ("x", "y", 1), ("z", "x", 2)])
  x, y = 1020.0, 980.0
  surprise = 0.5 - 1 / (1 + 10 ** (-40 / 400))
  x, y = x + 40 * surprise, y - 40 * surprise
  last = 40 * (1 - 1 / (1 + 10 ** ((x - 1000) / 400)))
  np.testing.assert_allclose(arena.elo(matches), [x - last, y, 1000 + last])
  # Behind by far more than 400, a loss costs no less than at 400, and reduced steps are halves.
  long = arena.Matches.of([("x", "y", 2)] * 400)
  ratings = arena.elo(long)
  assert ratings[0] - ratings[1] > 1000
  np.testing.assert_allclose(ratings - arena.elo(long.take(np.arange(399))),
                             [40 / 11, -40 / 11])  # 1 - 1 / (1 + 10^-1)
  step = arena.elo(long.take(np.arange(31)), reduce=True) - arena.elo(long.take(np.arange(30)), reduce=True)
  ahead = np.clip(np.diff(arena.elo(long.take(np.arange(30)), reduce=True)[::-1])[0], -400, 400)
  assert step[0] == pytest.approx(20 * (1 - 1 / (1 + 10 ** (-ahead / 400))))


def test_who_never_loses_has_no_finite_strength_without_a_ridge():
  results = [("x", "y", 2), ("y", "x", 0), ("x", "z", 2), ("y", "z", 2), ("z", "y", 2)]
  matches = arena.Matches.of(results)
  assert arena.separated(matches) == ("x",)
  with pytest.raises(ValueError, match="x won, or lost, every single one; use ridge=0.01"):
    arena.bradley_terry(matches)
  theta = [arena.bradley_terry(matches, ridge=ridge).strengths for ridge in (0.01, 0.1, 10.0)]
  assert theta[0][0] > theta[1][0] > theta[2][0] > 0
  np.testing.assert_allclose(theta[1], scipy_fit(matches, 0.1)[:3], atol=1e-4)
  one_draw = arena.Matches.of([*results, ("z", "x", 1)])
  assert arena.separated(one_draw) == () and np.isfinite(arena.bradley_terry(one_draw).strengths).all()


def test_a_cue_biases_strengths_until_it_is_a_covariate():
  rng, truth = np.random.default_rng(4), np.array([0.3, 0.0, -0.3])
  plain = simulate(5, truth, 20000, draws=0.0)
  length = np.array([-1.0, 0.0, 1.0])  # the worst writes most
  cue = length[plain.first] - length[plain.second] + rng.normal(size=len(plain))
  d = np.log(10) * (truth[plain.first] - truth[plain.second]) + 0.8 * cue
  points = 2.0 * (rng.random(len(plain)) < 1 / (1 + np.exp(-d)))
  biased = arena.Matches(plain.models, plain.first, plain.second, points, cue[:, None], ("length",))
  fit = arena.bradley_terry(biased)
  np.testing.assert_allclose(fit.strengths, truth, atol=0.05)
  assert fit.coefficients[0] == pytest.approx(0.8, abs=0.05)
  blind = arena.bradley_terry(without_cue(biased)).strengths
  assert list(np.argsort(blind)) == [0, 1, 2]  # the wrong way round


def test_frugality_is_a_power_of_ten_around_the_median():
  found = arena.frugality(["x", "x", "y", "z"], [1.0, 3.0, 20.0, 200.0])
  assert found == pytest.approx(dict(x=-1.0, y=0.0, z=1.0))
  tokens = arena.frugality(["x", "x", "y", "z"], [1.0, 3.0, 20.0, 200.0], [10, 30, 10, 1])
  assert tokens == pytest.approx(dict(x=np.log10(0.1 / 2), y=0.0, z=2.0))


VOTE = dict(question="q", model_a="x", model_b="y", answer_a="long answer", answer_b="short", winner="b",
            flags_a=["useful", "incorrect"])


def test_a_vote_becomes_a_pair_and_a_tie_a_soft_one():
  vote = votes.to_vote(VOTE, "f:1")
  assert votes.pair_of(vote) == dict(question="q", chosen="short", rejected="long answer", preference=1.0)
  tie = votes.to_vote({**VOTE, "winner": "both_equal"}, "f:1")
  assert tie.points == 1 and votes.pair_of(tie)["preference"] == 0.5
  assert votes.to_vote({**VOTE, "winner": "x"}, "f:1").points == 2
  a, b = votes.attributes_of(vote)
  assert (a["useful"], a["incorrect"], a["creative"]) == (1, 1, 0) and not any(b[f] for f in votes.FLAGS)
  assert votes.length_difference(vote) == pytest.approx((11 - 5) / 16)


@pytest.mark.parametrize("change, message", [
    (dict(winner="c"), "field 'winner' holds 'c'"), (dict(model_b="x"), "both hold 'x'"),
    (dict(flags_a=["usefull"]), "flags are a list of"), (dict(winner=None), "'winner'")])
def test_what_is_no_vote_is_refused_with_its_place(change, message):
  with pytest.raises(BadRow, match="f:7: .*" + message):
    votes.to_vote({**VOTE, **change}, "f:7")


def reaction(conversation, side, liked, *flags):
  return votes.to_reaction(dict(conversation=conversation, side=side, model_a="x", model_b="y",
                                question="q", answer=f"of {side}", liked=liked, flags=list(flags)), "f:1")


def test_reactions_become_matches_and_unpaired_labels():
  found = [reaction(1, "a", True, "useful"), reaction(1, "b", True),  # 2 : 1
           reaction(2, "a", True), reaction(2, "b", None, "creative"),  # 1 : 1
           reaction(3, "a", False, "superficial"), reaction(3, "a", True),  # -1 : 0
           reaction(4, "b", None, "complete", "incorrect")]  # 0 : -1, for "complete" counts nothing
  assert votes.matches_of(found) == [("x", "y", 2.0), ("x", "y", 0.0), ("x", "y", 2.0)]
  labels = [votes.unpaired_of(r) for r in found]
  assert [row and row["preference"] for row in labels] == [1, 1, 1, 1, 0, 1, None]
  assert labels[4] == dict(question="q", answer="of a", preference=0.0)


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_the_command_writes_a_ranking_a_table_and_a_picture(tmp_path, capsys):
  rng, rows = np.random.default_rng(0), []
  for _ in range(300):
    a, b = rng.permutation(3)[:2]
    points = 1 / (1 + np.exp(a - b))  # model 0 is best
    rows.append(dict(model_a=f"m{a}", model_b=f"m{b}", answer_a="u" * int(rng.integers(1, 9)), answer_b="vv",
                     winner="tie" if rng.random() < 0.2 else "a" if rng.random() < points else "b"))
  path = write(tmp_path / "votes.jsonl", rows)
  cli.main(["arena", f"--votes={path}", f"--out={tmp_path / 'out'}", "--length", "--resamples=20"])
  content = json.loads((tmp_path / "out/ranking.json").read_text())
  assert [m["model"] for m in content["models"]] == ["m0", "m1", "m2"] and content["matches"] == 300
  low, high = content["covariates"]["length"]["interval"]
  assert low < 0 < high
  assert "| 1 | m0 |" in capsys.readouterr().out and "length:" in (tmp_path / "out/ranking.md").read_text()
  assert (tmp_path / "out/ranking.png").stat().st_size > 1000
  with pytest.raises(SystemExit):
    cli.main(["arena", f"--votes={tmp_path / 'none.jsonl'}", f"--out={tmp_path}"])
  assert "no file" in capsys.readouterr().err


def test_users_of_the_toy_tie_as_rao_and_kupper_say():
  """P(a) = s(d - t), P(b) = s(-d - t), the rest are ties; checked without knowledge, d = 0."""
  source = open_task("votes", split="train", size=1500, seed=0, sharpness=0.0, threshold=1.0)
  ties = np.mean([source[i]["preference"] == 0.5 for i in range(len(source))])
  expected = 1 - 2 / (1 + np.e)
  assert abs(ties - expected) < 4 * np.sqrt(expected * (1 - expected) / len(source))
  decided = open_task("votes", split="test", size=100, seed=0, ties="drop", sharpness=1000.0)
  assert all(decided[i]["preference"] == 1 for i in range(100))


def test_resamples_that_a_covariate_decides_are_fitted_with_a_ridge_and_counted():
  """Two of 14 votes go against the covariate: resamples without them have no finite answer."""
  rng, results, lengths = np.random.default_rng(0), [], []
  for i in range(14):
    a, b = rng.choice(3, 2, replace=False)
    lengths.append(rng.normal())
    results.append(("xyz"[a], "xyz"[b], 2.0 * ((lengths[-1] > 0) != (i in (3, 8)))))
  found = arena.ranking(arena.Matches.of(results, {"length": lengths}), resamples=60)
  assert 0 < found["separated_resamples"] < 30
  low, high = found["covariates"]["length"]["interval"]
  assert low < found["covariates"]["length"]["coefficient"] < high < np.inf
