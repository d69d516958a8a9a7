"""Optimisers of a config, as optax chains."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl import compose
from jaxrl import transforms as pieces
from jaxrl.compose import nearest
from jaxrl.schedule import Schedule
from jaxrl.training import master
from jaxrl.transforms.start import PhaseStart

OPTIMIZERS = {
    "adamw": lambda lr, c: optax.adamw(lr, c["b1"], c["b2"], c["epsilon"],
                                       weight_decay=c["weight_decay"], mask=_is_matrix,
                                       mu_dtype=_moments_dtype(c)),
    "lion": lambda lr, c: optax.lion(lr, c["b1"], c["b2"], weight_decay=c["weight_decay"],
                                     mask=_is_matrix, mu_dtype=_moments_dtype(c)),
    "adafactor": lambda lr, c: optax.adafactor(lr, multiply_by_parameter_scale=False),
    "sgd": lambda lr, c: optax.sgd(lr, momentum=c["b1"] or None),
}
DECAYING = ("adamw", "lion")  # those that know weight decay
OF_MOMENTS = ("adamw", "lion")  # those whose first moment can have another type
NO_MATRIX = ("bias", "scale")  # names of parameters that are not decayed
SCHEDULES = ("constant", "linear", "cosine")
MOMENTS_DTYPES = ("", "bfloat16")
MASTER_DTYPES = ("", "float32")
PLACES = ("gradient", "update")  # before clipping, after the optimiser


def learning_rate(config: Mapping, steps: int, own: Schedule | None = None) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then `schedule` down to `final_fraction` of it.

  Args:
    config: `config.optimizer`: learning_rate, schedule, warmup_steps, final_fraction.
    steps: updates of the phase, warm-up included.
    own: of `config.schedules`, in place of `learning_rate` and `schedule`; the warm-up is a factor.

  Raises:
    ValueError: an unknown schedule, two of them, or a warm-up that does not end within the phase.
  """
  peak, kind, warmup = config["learning_rate"], config["schedule"], config["warmup_steps"]
  if kind not in SCHEDULES:
    raise ValueError(f"config.optimizer.schedule={kind!r}{nearest(kind, SCHEDULES)}")
  if not 0 <= warmup < max(steps, 1):
    raise ValueError(f"config.optimizer.warmup_steps={warmup} must be 0 or more and less than "
                     f"the phase's steps={steps}: shorten it or train longer")
  if own is not None:
    if kind != "constant":
      raise ValueError(f"config.optimizer.schedule={kind!r}, and config.schedules has another for the "
                       "learning rate: leave one of them out")
    return lambda step: own(step) * jnp.minimum((step + 1) / (warmup + 1), 1)
  rest = max(steps - warmup, 1)
  after = {"constant": optax.constant_schedule(peak),
           "linear": optax.linear_schedule(peak, peak * config["final_fraction"], rest),
           "cosine": optax.cosine_decay_schedule(peak, rest, config["final_fraction"])}[kind]
  if not warmup:
    return after
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, after], [warmup])


def build(config: Mapping, steps: int, transforms: Sequence[Callable] = (),
          rate: Schedule | None = None) -> optax.GradientTransformation:
  """Clipping by global norm (`clip_norm`, 0 is off), then the named optimiser; all of it on a master of the
  parameters, if there is to be one.

  Args:
    config: `config.optimizer`.
    steps: updates of the phase.
    transforms: as `read_transforms` gives them; those of gradients come before clipping, those of
      updates last.
    rate: of `config.schedules`.

  Raises:
    ValueError: an unknown name, a setting that the optimiser lacks, or a bad schedule.
  """
  name = config["name"]
  if name not in OPTIMIZERS:
    raise ValueError(f"config.optimizer.name={name!r}{nearest(name, OPTIMIZERS)}")
  if config["weight_decay"] and name not in DECAYING:
    raise ValueError(f"config.optimizer.weight_decay={config['weight_decay']}, but {name} has "
                     f"none: set it to 0, or use {' or '.join(DECAYING)}")
  _check_types(config)
  optimizer = OPTIMIZERS[name](learning_rate(config, steps, rate), config)
  if config["clip_norm"]:
    optimizer = optax.chain(optax.clip_by_global_norm(config["clip_norm"]), optimizer)
  if transforms:
    chain = {place: [(_key(i, piece), piece()) for i, piece in enumerate(transforms)
                     if _place(piece) == place] for place in PLACES}
    optimizer = optax.named_chain(*chain["gradient"], ("optimizer", optimizer), *chain["update"])
  return master.with_master(optimizer) if config.get("master_dtype") else optimizer


def read_transforms(config: Mapping, references: Callable[[Any, str], Sequence[Any]]
                    ) -> list[Callable]:
  """The pieces that `config.optimizer.transforms` lists; a call of one makes the transformation.

  Args:
    config: `config.optimizer`.
    references: makes what a piece with the keyword `references` is given, of what the config says
      there and of where it says so.

  Raises:
    ValueError: unknown names or arguments, or a place that there is not.
  """
  found = []
  for i, spec in enumerate(config["transforms"]):
    where = f"config.optimizer.transforms[{i}]"
    piece = compose.build(spec, pieces, where=where)
    if _place(piece) not in PLACES:
      raise ValueError(f"{where}.on={_place(piece)!r}{nearest(str(_place(piece)), PLACES)}")
    if "references" in piece.keywords:
      piece = functools.partial(piece, references=references(piece.keywords["references"],
                                                             f"{where}.references"))
    found.append(piece)
  return found


def begin(transforms: Sequence[Callable], opt_state: Any, start: PhaseStart) -> Any:
  """The state of an optimiser with transformations, once those have looked at the phase's start."""
  if isinstance(opt_state, master.Master):
    return opt_state._replace(inner=begin(transforms, opt_state.inner, start))
  return type(opt_state)({**opt_state, **{
      _key(i, piece): compose.begun(piece, opt_state[_key(i, piece)], start)
      for i, piece in enumerate(transforms)}})


def _moments_dtype(config):
  return config.get("moments_dtype") or None


def _check_types(config):
  for field, valid in (("moments_dtype", MOMENTS_DTYPES), ("master_dtype", MASTER_DTYPES)):
    value = config.get(field, "")
    if value not in valid:
      raise ValueError(f"config.optimizer.{field}={value!r} must be {valid[1]!r}, or '' to leave it out")
  if config.get("moments_dtype") and config["name"] not in OF_MOMENTS:
    raise ValueError(f"config.optimizer.moments_dtype={config['moments_dtype']!r}, but {config['name']} "
                     "has no moments of a type of their own: set it to '', or use "
                     f"{' or '.join(OF_MOMENTS)}")


def _key(index, piece):
  return f"{index}_{compose.name_of(piece)}"


def _place(piece):
  """Where in the chain a transformation stands: its keyword `on`, or before clipping."""
  on = inspect.signature(piece).parameters.get("on")
  return "gradient" if on is None else on.default


def _is_matrix(params):
  """Weight decay pulls on matrices, not on biases and norm scales.

  Names tell them apart, ranks do not: the bias of several heads has two axes, and `scan_layers`
  stacks the scales of all layers into one array.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not any(getattr(key, "key", None) in NO_MATRIX for key in path), params)
