"""Names in configs become functions, and mistakes are named with their remedy."""

import functools
import sys
import types

import ml_collections
import pytest

from jaxrl import advantages, compose, objectives


def scale(x, *, factor: float, offset: float = 0.0):
  return factor * x + offset


@compose.needs("entropy", "values")
def curious(x):
  return x


@pytest.fixture
def package(monkeypatch):
  """A package of two pieces, one foreign function and one private one."""
  module = types.ModuleType("toy_pieces")
  for name, function in dict(scale=scale, curious=curious, _hidden=lambda x: x).items():
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, "toy_pieces.file"
    copy.__dict__.update(function.__dict__)
    setattr(module, name, copy)
  module.partial, module.constant = functools.partial, 3
  monkeypatch.setitem(sys.modules, "toy_pieces", module)
  return module


def test_a_spec_binds_its_arguments(package):
  assert compose.build(dict(name="scale", factor=3.0), package)(2.0) == 6.0
  assert compose.build(dict(name="scale", factor=3.0, offset=1.0), package)(2.0) == 7.0
  assert compose.build("curious", package)(2.0) == 2.0


def test_a_config_dict_is_a_spec_and_stays_as_it_was(package):
  spec = ml_collections.ConfigDict(dict(name="scale", factor=2.0))
  assert compose.build(spec, package)(5.0) == 10.0
  assert spec.to_dict() == dict(name="scale", factor=2.0)


def test_pieces_are_the_public_functions_of_the_package(package):
  assert set(compose.pieces(package)) == {"scale", "curious"}


def test_a_function_of_ones_own_is_named_by_its_module(package):
  spec = dict(name="toy_pieces:scale", factor=3.0)
  assert compose.build(spec, advantages)(2.0) == 6.0


@pytest.mark.parametrize("spec, message", [
    (dict(name="scal", factor=1.0), r"objective\[0\].*toy_pieces.*'scal'; did you mean 'scale'\?"),
    (dict(name="scal"), r"did you mean 'scale'\? valid are curious, scale; a function of your own"),
    (dict(name="zzz"), r"'zzz'; valid are curious, scale; .*'module:function'"),
    (dict(name="_hidden"), r"has no '_hidden'"),
    (dict(name="partial"), r"has no 'partial'"),
    (dict(name="scale", factr=1.0), r"no argument 'factr'; did you mean 'factor'\?"),
    (dict(name="scale", x=1.0, factor=1.0), r"no argument 'x'; valid are factor, offset"),
    (dict(name="curious", q=1.0), r"no argument 'q'; valid are none"),
    (dict(name="scale"), r"scale needs factor; write dict\(name='scale', factor=\.\.\.\)"),
    (dict(factor=1.0), r"objective\[0\] needs a name"),
    (dict(name=3), r"objective\[0\] needs a name"),
    ("no_such_module:f", r"objective\[0\]: cannot import 'no_such_module'.*import path"),
    ("toy_pieces:g", r"objective\[0\]: module 'toy_pieces' has no 'g'; valid are .*scale"),
    ("toy_pieces:constant", r"objective\[0\]: 'toy_pieces:constant' is not a function"),
])
def test_mistakes_are_named_with_their_remedy(package, spec, message):
  with pytest.raises(ValueError, match=message):
    compose.build(spec, package, where="objective[0]")


def test_long_lists_of_valid_names_are_cut():
  message = compose.nearest("zzz", [f"name_{i:03}" for i in range(100)])
  assert message.endswith("name_039 and 60 more") and "name_040" not in message


def test_needs_and_name_survive_building(package):
  built = functools.partial(compose.build("curious", package))
  assert compose.signals_of(built) == ("entropy", "values")
  assert compose.name_of(built) == "curious"
  assert compose.signals_of(compose.build(dict(name="scale", factor=1.0), package)) == ()


def test_pieces_of_credit_and_loss_are_found_by_their_names():
  assert set(compose.pieces(advantages)) >= {
      "center_by_batch", "center_by_group", "gae", "leave_one_out", "penalise_kl",
      "scale_by_batch_std", "scale_by_group_std", "truncate_importance", "whiten_tokens"}
  assert set(compose.pieces(objectives)) >= {
      "clipped_surrogate", "cross_entropy", "entropy", "geometric_mean", "kl", "reinforce",
      "value_loss"}


@pytest.mark.parametrize("spec, message", [
    (dict(name="kl", beta="0.1"), r"objective\[1\].beta='0.1', but kl takes a number there"),
    (dict(name="clipped_surrogate", high=True), r"\[1\].high=True, but clipped_surrogate takes"),
    (dict(name="clipped_surrogate", dual_clip=[3.0]), r"\[1\].dual_clip=\[3.0\], but clipped_surr"),
    (dict(name="entropy", coefficient=float("nan")), r"\[1\].coefficient=nan, but entropy takes")])
def test_what_has_to_be_a_number_is_one(spec, message):
  with pytest.raises(ValueError, match=message):
    compose.build(spec, objectives, where="objective[1]")


def test_numbers_schedules_and_none_are_numbers():
  half = dict(schedule="linear", start=0.1, end=0.2, steps=3)
  spec = dict(name="clipped_surrogate", low=half, high=1, dual_clip=None)
  built = compose.build(spec, objectives)
  assert built.keywords["high"] == 1 and float(built.keywords["low"](3)) == pytest.approx(0.2)
  compose.build(dict(name="reinforce", importance_cap=float("inf"), level="sequence"), objectives)


def test_what_takes_several_numbers_is_given_several():
  def spread(x, *, shares: tuple[float, float], either: float | str = 1.0):
    return x, shares, either
  module = types.SimpleNamespace(__name__=__name__, spread=spread)
  built = compose.build(dict(name="spread", shares=[0.5, 0.5], either="half"), module)
  assert built(1) == (1, [0.5, 0.5], "half")
