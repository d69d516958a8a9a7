"""FLOPs of matrix products in a traced program, every loop counted as often as it runs."""

import math

import jax
from jax.interpreters import partial_eval as pe

SUBPROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr")


def count(program: jax.stages.Traced, *, dynamic_trips: float = 1.0) -> float:
  """FLOPs over all devices, two per multiplication and addition; element-wise work counts nothing.

  Args:
    dynamic_trips: runs of the body of a loop whose length the program computes.
  """
  jaxpr = program.jaxpr.jaxpr
  used, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)  # as compilers do
  return _of(used, dynamic_trips)


def _of(jaxpr, trips):
  return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation, trips):
  name, p = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = p["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  if name == "ragged_dot_general":  # each row meets one of the groups
    (contracted, _), _ = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  if name == "cond":
    return max(_of(branch.jaxpr, trips) for branch in p["branches"])
  if name == "scan":
    return p["length"] * _of(p["jaxpr"].jaxpr, trips)
  if name == "while":
    return trips * _of(p["body_jaxpr"].jaxpr, trips)
  inside = sum(_of(getattr(p[key], "jaxpr", p[key]), trips) for key in SUBPROGRAMS if key in p)
  return inside * p["mesh"].size if name == "shard_map" else inside
