"""Rotary position embeddings and their scaling rules."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from jaxrl import chips

SPAN = 1024  # of positions, in each of two tables


def frequencies(width: int, theta: float, scaling: Mapping[str, object], length: int = 0) -> np.ndarray:
  """Angular frequencies of the rotated pairs. [width / 2]

  Args:
    width: dimension of one head, as far as it is rotated.
    theta: base; pair i turns by `theta ** (-2 i / width)` radians per position (RoFormer,
      arXiv:2104.09864).
    scaling: empty, or `rope_type` and its parameters under the names of Hugging Face configs:
      `linear` (`factor`; arXiv:2306.15595) or `llama3` (`factor`, `low_freq_factor`,
      `high_freq_factor`, `original_max_position_embeddings`; Llama 3.1): wavelengths longer than
      `original / low_freq_factor` are slowed down by `factor`, those shorter than
      `original / high_freq_factor` stay, and between them the two are blended. `yarn` (`factor`,
      `original_max_position_embeddings`, `beta_fast` 32, `beta_slow` 1, `truncate` True;
      arXiv:2309.00071): pairs that turn more than `beta_fast` times in the original length stay,
      those that turn less than `beta_slow` times are slowed down by `factor`, and between them the
      two are blended by index, whose ends are rounded outwards if `truncate`. `longrope`
      (`short_factor`, `long_factor`, `original_max_position_embeddings`; arXiv:2402.13753): every
      pair is slowed down by a factor of its own.
    length: tokens of the longest sequence: above the original one, `longrope` takes `long_factor`.

  Raises:
    ValueError: unknown `rope_type` or missing parameter.
  """
  base = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  if not scaling:
    return base.astype(np.float32)
  kind = scaling.get("rope_type")
  try:
    if kind == "linear":
      return (base / scaling["factor"]).astype(np.float32)
    if kind == "llama3":
      low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
      turns = scaling["original_max_position_embeddings"] * base / (2 * math.pi)
      keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
      return (keep * base + (1 - keep) * base / scaling["factor"]).astype(np.float32)
    if kind == "yarn":
      keep = 1 - _ramp(width, theta, scaling)
      return (keep * base + (1 - keep) * base / scaling["factor"]).astype(np.float32)
    if kind == "longrope":
      long = length > scaling["original_max_position_embeddings"]
      factors = np.asarray(scaling["long_factor" if long else "short_factor"], np.float64)
      if len(factors) != width // 2:
        raise ValueError(f"config.model.rope_scaling of type {kind!r} has {len(factors)} factors, but "
                         f"{width // 2} pairs are rotated")
      return (base / factors).astype(np.float32)
  except KeyError as error:
    raise ValueError(f"config.model.rope_scaling of type {kind!r} needs {error}") from error
  raise ValueError(f"config.model.rope_scaling: rope_type={kind!r} is none of linear, llama3, yarn, "
                   "longrope")


def _ramp(width, theta, scaling):
  """How far each pair is on its way from staying to being slowed down, 0 to 1 (YaRN, equation 23)."""
  def index(turns):  # of the pair that turns so often in the original length
    return (width * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi))
            / (2 * math.log(theta)))
  low, high = index(scaling.get("beta_fast", 32)), index(scaling.get("beta_slow", 1))
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  return np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0.0, 1.0)


def attention_factor(scaling: Mapping[str, object]) -> float:
  """What cosines and sines are multiplied with, so that scores are multiplied with its square.

  It is `attention_factor` if the scaling has it. `yarn` has else `m(1)`, or `m(mscale) /
  m(mscale_all_dim)` with both of them, where `m(s) = 1 + s log(factor) / 10`; `longrope` has
  `sqrt(1 + log(factor) / log(original_max_position_embeddings))`; both 1 up to a `factor` of 1.
  """
  kind, factor = scaling.get("rope_type"), scaling.get("factor") or 1.0
  if kind not in ("yarn", "longrope"):
    return 1.0
  if scaling.get("attention_factor") is not None:
    return float(scaling["attention_factor"])
  if factor <= 1:
    return 1.0
  if kind == "longrope":
    return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))

  def m(scale):
    return 1 + 0.1 * scale * math.log(factor)
  one, other = scaling.get("mscale"), scaling.get("mscale_all_dim")
  return m(one) / m(other) if one and other else m(1)


def turns(positions: Int[Array, "rows length"], frequency: Float[Array, "half"]
          ) -> tuple[Float[Array, "rows length half"], Float[Array, "rows length half"]]:
  """Cosines and sines of the angles at each position below `SPAN ** 2`, which all layers share."""
  if chips.platform() == "cpu":
    return _from_tables(positions, frequency)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def _from_tables(positions, frequency):
  """By the sum of two angles, those of multiples of `SPAN` and of what is left.

  XLA's CPU backend would compute cosines and sines of its own for each head of each layer, forward
  and backward, which takes a tenth of an update of a small model; what is read it keeps.
  """
  near = np.arange(SPAN, dtype=np.float64)[:, None] * frequency  # [SPAN, half]
  cos, sin = _read(near, positions % SPAN)
  far_cos, far_sin = _read(SPAN * near, positions // SPAN)
  return cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin


def _read(angles, index):
  return [jnp.asarray(f(angles), jnp.float32)[index] for f in (np.cos, np.sin)]


def rotate(x: Float[Array, "rows length heads width"],
           turns: tuple[Float[Array, "rows length half"], Float[Array, "rows length half"]]
           ) -> Float[Array, "rows length heads width"]:
  """Turns queries or keys by their positions; pairs are (i, i + half), as in Llama, and what lies
  behind them stays."""
  cos, sin = (t[:, :, None, None] for t in turns)
  if (rotated := 2 * cos.shape[-1]) < x.shape[-1]:
    return jnp.concatenate([rotate(x[..., :rotated], turns), x[..., rotated:]], axis=-1)
  # The halves are an axis and not concatenated, which XLA's CPU backend cannot vectorise.
  halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
  swapped = jnp.flip(halves, axis=-2) * jnp.array([[-1.0], [1.0]], jnp.float32)
  return (halves * cos + swapped * sin).astype(x.dtype).reshape(x.shape)
