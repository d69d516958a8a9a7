"""Numbers over updates."""

import functools
import math

import pytest

from jaxrl import advantages, compose, objectives
from jaxrl.schedule import Schedule, read


@pytest.mark.parametrize("kind,expected", [
    ("linear", lambda x: 1 + 4 * x), ("cosine", lambda x: 5 - 4 * (1 + math.cos(math.pi * x)) / 2),
    ("constant", lambda x: 5 if x >= 1 else 1)])
@pytest.mark.parametrize("step", [0, 3, 5, 8, 13, 40])
def test_values_over_updates(kind, expected, step):
  x = min(max(step - 3, 0) / 10, 1)
  found = Schedule(kind, start=1.0, end=5.0, steps=10, delay=3)(step)
  assert float(found) == pytest.approx(expected(x), abs=1e-5)


def test_restarts_begin_again():
  saw = Schedule("linear", start=0.0, end=1.0, steps=4, restarts=True)
  assert [float(saw(step)) for step in range(6)] == [0, 0.25, 0.5, 0.75, 0, 0.25]


@pytest.mark.parametrize("spec,message", [
    (dict(schedule="linear", start=0, end=1), "needs steps"),
    (dict(schedule="linear", start=0, end=1, steps=0), "must be above 0"),
    (dict(schedule="lin", start=0, end=1, steps=2), "is none of linear"),
    (dict(schedule="linear", start=0, end=1, steps=2, stop=3), "has no field 'stop'")])
def test_what_is_no_schedule_is_refused_with_its_place(spec, message):
  with pytest.raises(ValueError, match=f"config.x.*{message}"):
    read(spec, "config.x")


def test_a_scheduled_argument_of_a_piece_is_a_number_at_each_update():
  spec = dict(name="entropy", coefficient=dict(schedule="linear", start=1.0, end=0.0, steps=10))
  piece = compose.build(spec, objectives)
  assert float(compose.at(piece, 5).keywords["coefficient"]) == 0.5
  assert compose.at(advantages.leave_one_out, 5) is advantages.leave_one_out


def test_signals_may_depend_on_keywords():
  assert compose.signals_of(objectives.clipped_surrogate) == ()
  assert compose.signals_of(functools.partial(objectives.clipped_surrogate, anchor="old")) == (
      "old_logprobs",)
  assert compose.signals_of(functools.partial(objectives.value_loss, clip=None)) == (
      "values", "returns")
