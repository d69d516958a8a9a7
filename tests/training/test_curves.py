"""The picture of a run is drawn from whatever rows there are."""

from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
import numpy as np
import pytest

from jaxrl.training.curves import draw, phase_spans, smooth

KEYS = ("loss", "reward", "greedy_accuracy", "pass_at_8", "entropy", "kl", "response_tokens",
        "tokens_per_second", "grad_norm")
VALUES = st.one_of(st.floats(-1e30, 1e30),
                   st.sampled_from(["NaN", "Infinity", "-Infinity", None, 0]))
ROWS = st.lists(st.builds(
    lambda phase, marked, metrics: {"phase": phase, **({"evaluation": True} if marked else {}),
                                    **metrics},
    st.sampled_from(["sft", "rl"]), st.booleans(), st.dictionaries(st.sampled_from(KEYS), VALUES)),
                max_size=6)


@settings(max_examples=8, deadline=None)
@given(rows=ROWS)
def test_any_rows_give_a_picture(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("curves") / "curves.png"
  draw([{"step": i // 2, **row} for i, row in enumerate(rows)], None, path)
  assert image.imread(path).shape[0] > 100
  assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def pixels(path, rows, summary=None):
  draw(rows, summary, path)
  return image.imread(path)


@pytest.mark.parametrize("key", ["loss", "reward", "greedy_accuracy", "pass_at_4", "entropy", "kl",
                                 "response_tokens", "tokens_per_second"])
def test_every_metric_that_is_promised_is_visible(tmp_path, key):
  rows = [{"step": n, "phase": "rl", "loss": 1.0} for n in range(1, 6)]
  without = pixels(tmp_path / "a.png", rows)
  with_key = pixels(tmp_path / "b.png", [{**row, key: 0.1 * row["step"]} for row in rows])
  assert with_key.shape != without.shape or (with_key != without).mean() > 1e-3


def test_the_picture_depends_on_the_rows_alone(tmp_path):
  rows = [{"step": n, "phase": "sft", "loss": 1 / n} for n in range(1, 40)]
  np.testing.assert_array_equal(pixels(tmp_path / "a.png", rows), pixels(tmp_path / "b.png", rows))


def test_phases_meet_and_evaluations_belong_to_none():
  rows = [{"step": 0, "phase": "start", "evaluation": True}]
  rows += [{"step": n, "phase": "sft"} for n in (1, 2, 3)]
  rows += [{"step": 3, "phase": "sft", "evaluation": True}]
  rows += [{"step": n, "phase": "rl"} for n in (4, 5)]
  assert phase_spans(rows) == [("sft", 0.0, 3.0), ("rl", 3.0, 5.0)]
  assert phase_spans([]) == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.floats(-100, 100), st.just(np.nan)), min_size=3, max_size=30),
       st.integers(1, 9))
def test_smoothing_is_the_mean_of_the_neighbours_that_exist(values, window):
  values = np.array(values)
  expected = []
  for i, value in enumerate(values):
    first = i - window // 2
    near = values[max(first, 0):max(first + window, 0)]
    near = near[np.isfinite(near)]
    expected.append(near.mean() if np.isfinite(value) else np.nan)
  np.testing.assert_allclose(smooth(values, window), expected, atol=1e-9)
