"""Random parameters that one kernel draws, whatever their number.

An initializer draws each parameter by itself, under a key of its own. XLA compiles all these draws, and the
derivations of their keys, one by one: for a decoder of four layers that takes a CPU twice as long as to compile
its update. Here an initializer that was traced is run with all of its draws made together, and its keys derived
together, which gives the same numbers.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import jax
from jax.extend import core
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval as pe
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

MOST = 1 << 24  # numbers that are drawn together: they exist twice, before and after they are taken apart
CHUNK = 1024  # numbers, of one draw each
FOLD = "random_fold_in"  # what JAX calls `fold_in` in a trace
NORMAL, UNIFORM, BY_NORMAL = "_normal", "_uniform", "erf_inv"  # and what it makes of `normal`: see `_draws_of`
CUSTOM = "custom_"  # what such equations begin with
LEAST, ROOT = np.nextafter(np.float32(-1), np.float32(0)), np.float32(np.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Draw:
  """Normal numbers that a trace draws.

  Attributes:
    key: variable of what they are drawn with.
    out: variable that they are, divided by `factor`.
    within: variables on the way that nothing else reads.
  """

  key: core.Var
  out: core.Var
  factor: np.float32
  within: tuple[core.Var, ...] = ()

  @property
  def size(self) -> int:
    """How many they are."""
    return math.prod(self.out.aval.shape)


def at_once(traced: jax.stages.Traced) -> Callable[[Array], PyTree]:
  """A function that a program was traced of, with its draws of normal numbers made together.

  Draws that are not from a threefry key to float32, or are inside of loops, stay where they are; so do all if
  they are more numbers than `MOST`, if another setting of JAX (`jax_threefry_partitionable`) gives other
  numbers, or where derivatives are defined.

  Args:
    traced: of a function of one array.
  """
  jaxpr, _ = pe.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.out_avals), instantiate=True)
  draws = _draws_of(jaxpr)
  custom = any(equation.primitive.name.startswith(CUSTOM) for equation in jaxpr.eqns)
  alone = custom or sum(draw.size for draw in draws) > MOST or not jax.config.jax_threefry_partitionable

  def run(argument):
    if alone or not draws:
      found = core.jaxpr_as_fun(traced.jaxpr)(argument)
    else:
      found = _together(jaxpr, draws, traced.jaxpr.consts, argument)
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), found)
  return run


def _together(jaxpr, draws, consts, argument):
  """The results of a trace: first the keys of its draws, then all of these, then the rest."""
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, argument)))

  def of(variable):
    return variable.val if isinstance(variable, core.Literal) else values[variable]

  def evaluate(equations):
    for equation in equations:
      if any(variable in values for variable in equation.outvars):
        continue  # derived or drawn with others
      if _is_fold(equation):
        _derive(equation, jaxpr.eqns, values)
        continue
      out = equation.primitive.bind(*map(of, equation.invars), **equation.params)
      values.update(zip(equation.outvars, out if equation.primitive.multiple_results else [out]))

  evaluate(_before(draws, jaxpr))
  for draw, x in zip(draws, _drawn([of(draw.key) for draw in draws], [draw.size for draw in draws])):
    values[draw.out] = draw.factor * x.reshape(draw.out.aval.shape)
    values.update(dict.fromkeys(draw.within))
  evaluate(jaxpr.eqns)
  return [of(variable) for variable in jaxpr.outvars]


def _draws_of(jaxpr):
  """The draws of a trace: `normal` as one program, or its parts where an initializer has put them together."""
  readers = collections.Counter(
      x for equation in jaxpr.eqns for x in equation.invars if not isinstance(x, core.Literal))
  readers.update(x for x in jaxpr.outvars if not isinstance(x, core.Literal))
  maker, found = {out: equation for equation in jaxpr.eqns for out in equation.outvars}, []
  for equation in jaxpr.eqns:
    if _is_program(equation, NORMAL):
      found.append(Draw(equation.invars[0], equation.outvars[0], ROOT))
    elif equation.primitive.name == BY_NORMAL and isinstance(uniform := equation.invars[0], core.Var):
      if uniform in maker and _is_program(maker[uniform], UNIFORM) and readers[uniform] == 1:
        found.append(Draw(maker[uniform].invars[0], equation.outvars[0], np.float32(1), (uniform,)))
  return found


def _is_program(equation, name):
  """Whether it is JAX's own program of that name, from a threefry key to float32."""
  if equation.primitive.name != "jit" or equation.params["name"] != name:
    return False
  key, out = equation.invars[0].aval, equation.outvars[0].aval
  if str(key.dtype) != "key<fry>" or key.shape != () or out.dtype != jnp.float32:
    return False
  own = _program_of(name, out.shape)
  return (str(equation.params["jaxpr"]) == str(own.params["jaxpr"])
          and [getattr(x, "val", None) for x in equation.invars[1:]] == [x.val for x in own.invars[1:]])


@functools.lru_cache(maxsize=256)
def _program_of(name, shape):
  """How JAX traces a draw of one of the two names."""
  draw = {NORMAL: lambda key: jax.random.normal(key, shape, jnp.float32),
          UNIFORM: lambda key: jax.random.uniform(key, shape, jnp.float32, LEAST, np.float32(1))}[name]
  key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
  return next(equation for equation in jax.make_jaxpr(draw)(key).jaxpr.eqns
              if equation.primitive.name == "jit" and equation.params["name"] == name)


def _is_fold(equation):
  """Whether it derives one key of another."""
  return equation.primitive.name == FOLD and all(x.aval.shape == () for x in equation.invars)


def _before(draws, jaxpr):
  """The equations that the keys of draws come from."""
  needed, found = {draw.key for draw in draws}, []
  for equation in reversed(jaxpr.eqns):
    if needed & set(equation.outvars):
      found.append(equation)
      needed |= {x for x in equation.invars if not isinstance(x, core.Literal)}
  return reversed(found)


def _derive(equation, equations, values):
  """Adds what an equation derives from a key to the values, and what others derive from the same."""
  key = equation.invars[0]
  same = [other for other in equations if _is_fold(other) and other.invars[0] is key
          and isinstance(other.invars[1], core.Literal)]
  if equation not in same:
    values[equation.outvars[0]] = jax.random.fold_in(values[key], values[equation.invars[1]])
    return
  data = np.array([other.invars[1].val for other in same], np.uint32)
  derived = jax.vmap(jax.random.fold_in, (None, 0))(values[key], data)
  # The barrier keeps XLA from deriving each of them where it is used.
  derived = jax.lax.optimization_barrier(jax.random.key_data(derived))
  values.update(zip((other.outvars[0] for other in same),
                    jax.random.wrap_key_data(derived, impl=jax.random.key_impl(values[key]))))


def _drawn(keys: Sequence[Array], sizes: Sequence[int]) -> list[Float[Array, "size"]]:
  """`jax.random.normal(key, (size,)) / sqrt(2)` of each; number i depends on its key and on i alone."""
  chunks = [-(-size // CHUNK) for size in sizes]
  draw = np.repeat(np.arange(len(sizes), dtype=np.int32), chunks)
  first = np.concatenate([np.arange(count, dtype=np.uint32) * np.uint32(CHUNK) for count in chunks])
  place = first[:, None] + jax.lax.iota(jnp.uint32, CHUNK)
  words = jnp.stack([jax.random.key_data(key) for key in keys])[draw]
  high, low = (jnp.broadcast_to(words[:, i, None], place.shape) for i in range(2))
  bits = jnp.bitwise_xor(*threefry2x32_p.bind(high, low, jnp.zeros_like(place), place))
  # From here on what JAX does: 23 bits are the fraction of a number in [1, 2), moved to (-1, 1).
  fraction = jax.lax.bitcast_convert_type(bits >> 9 | jnp.uint32(0x3f800000), jnp.float32) - 1
  uniform = jnp.maximum(LEAST, fraction * (np.float32(1) - LEAST) + LEAST)
  # The barrier keeps XLA from drawing each where it is used.
  drawn = jax.lax.optimization_barrier(jax.lax.erf_inv(uniform).reshape(-1))
  ends = np.cumsum(chunks) * CHUNK
  return [drawn[end - count * CHUNK:][:size] for end, count, size in zip(ends, chunks, sizes)]
