"""Optimisers of a config, as optax chains."""

from collections.abc import Mapping

import jax
import optax

from jaxrl.compose import nearest

OPTIMIZERS = {
    "adamw": lambda lr, c: optax.adamw(lr, c["b1"], c["b2"], c["epsilon"],
                                       weight_decay=c["weight_decay"], mask=_is_matrix),
    "lion": lambda lr, c: optax.lion(lr, c["b1"], c["b2"], weight_decay=c["weight_decay"],
                                     mask=_is_matrix),
    "adafactor": lambda lr, c: optax.adafactor(lr, multiply_by_parameter_scale=False),
    "sgd": lambda lr, c: optax.sgd(lr, momentum=c["b1"] or None),
}
DECAYING = ("adamw", "lion")  # those that know weight decay
NO_MATRIX = ("bias", "scale")  # names of parameters that are not decayed
SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(config: Mapping, steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then `schedule` down to `final_fraction` of it.

  Args:
    config: `config.optimizer`: learning_rate, schedule, warmup_steps, final_fraction.
    steps: updates of the phase, warm-up included.

  Raises:
    ValueError: an unknown schedule, or a warm-up that does not end within the phase.
  """
  peak, kind, warmup = config["learning_rate"], config["schedule"], config["warmup_steps"]
  if kind not in SCHEDULES:
    raise ValueError(f"config.optimizer.schedule={kind!r}{nearest(kind, SCHEDULES)}")
  if not 0 <= warmup < max(steps, 1):
    raise ValueError(f"config.optimizer.warmup_steps={warmup} must be 0 or more and less than "
                     f"the phase's steps={steps}: shorten it or train longer")
  rest = max(steps - warmup, 1)
  after = {"constant": optax.constant_schedule(peak),
           "linear": optax.linear_schedule(peak, peak * config["final_fraction"], rest),
           "cosine": optax.cosine_decay_schedule(peak, rest, config["final_fraction"])}[kind]
  if not warmup:
    return after
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, after], [warmup])


def build(config: Mapping, steps: int) -> optax.GradientTransformation:
  """Clipping by global norm (`clip_norm`, 0 is off), then the named optimiser.

  Args:
    config: `config.optimizer`.
    steps: updates of the phase.

  Raises:
    ValueError: an unknown name, a setting that the optimiser lacks, or a bad schedule.
  """
  name = config["name"]
  if name not in OPTIMIZERS:
    raise ValueError(f"config.optimizer.name={name!r}{nearest(name, OPTIMIZERS)}")
  if config["weight_decay"] and name not in DECAYING:
    raise ValueError(f"config.optimizer.weight_decay={config['weight_decay']}, but {name} has "
                     f"none: set it to 0, or use {' or '.join(DECAYING)}")
  optimizer = OPTIMIZERS[name](learning_rate(config, steps), config)
  if not config["clip_norm"]:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config["clip_norm"]), optimizer)


def _is_matrix(params):
  """Weight decay pulls on matrices, not on biases and norm scales.

  Names tell them apart, ranks do not: the bias of several heads has two axes, and `scan_layers`
  stacks the scales of all layers into one array.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not any(getattr(key, "key", None) in NO_MATRIX for key in path), params)
