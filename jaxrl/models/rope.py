"""Rotary position embeddings and their scaling rules."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from jaxrl import chips

SPAN = 1024  # of positions, in each of two tables


def frequencies(width: int, theta: float, scaling: Mapping[str, object]) -> np.ndarray:
  """Angular frequencies of the rotated pairs. [width / 2]

  Args:
    width: dimension of one head.
    theta: base; pair i turns by `theta ** (-2 i / width)` radians per position (RoFormer,
      arXiv:2104.09864).
    scaling: empty, or `rope_type` and its parameters under the names of Hugging Face configs:
      `linear` (`factor`; arXiv:2306.15595) or `llama3` (`factor`, `low_freq_factor`,
      `high_freq_factor`, `original_max_position_embeddings`; Llama 3.1): wavelengths longer than
      `original / low_freq_factor` are slowed down by `factor`, those shorter than
      `original / high_freq_factor` stay, and between them the two are blended.

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
  except KeyError as error:
    raise ValueError(f"config.model.rope_scaling of type {kind!r} needs {error}") from error
  raise ValueError(f"config.model.rope_scaling: rope_type={kind!r} is none of linear, llama3")


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
  """Turns queries or keys by their positions; pairs are (i, i + width / 2), as in Llama."""
  cos, sin = (t[:, :, None, None] for t in turns)
  # The halves are an axis and not concatenated, which XLA's CPU backend cannot vectorise.
  halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
  swapped = jnp.flip(halves, axis=-2) * jnp.array([[-1.0], [1.0]], jnp.float32)
  return (halves * cos + swapped * sin).astype(x.dtype).reshape(x.shape)
