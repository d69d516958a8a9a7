"""How `config.json` spells RoPE: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxrl.models.decoder_config import DecoderConfig

ORIGINAL = "original_max_position_embeddings"
LAYERS = ("full_attention", "sliding_attention")
TYPES = {  # type -> parameters that it needs, and those it may have; `rope` reads the same names
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (("factor", ORIGINAL),
             ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor", "factor", ORIGINAL), ("attention_factor",)),
}
SAME_TYPES = {name: name for name in TYPES}


@dataclasses.dataclass(frozen=True)
class Spelling:
  """What a family calls the parts of RoPE, and what they are where a config lacks them.

  Attributes:
    base, default: of the full layers.
    local: base of sliding layers, which have their own; 0 if they have not.
    share, all_heads: of each head that is rotated; "" if a family rotates all of it.
    types: names of the types of scaling that it knows, and what they mean.
    original: length before scaling, which the config says beside the scaling; 0 if it says so inside.
  """

  base: str = "rope_theta"
  default: float = 10_000.0
  local: float = 0.0
  share: str = ""
  all_heads: float = 1.0
  types: Mapping[str, str] = dataclasses.field(default_factory=lambda: SAME_TYPES)
  original: int = 0


# The first configs of Phi-3 say `su` and `yarn`, and transformers knows no other scaling of it.
PHI3 = Spelling(share="partial_rotary_factor", original=4096, types={
    "default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"})


def read(hf: Mapping[str, Any], spelling: Spelling) -> dict[str, Any]:
  """The fields of `DecoderConfig` that say how queries and keys are rotated.

  Raises:
    ValueError: a scaling that is unknown, lacks a parameter or has one too many, or a config that
      contradicts itself.
  """
  given = hf.get("rope_parameters") or {}
  by_layer = given.keys() & set(LAYERS)
  full = dict(given.get("full_attention") or {} if by_layer else given)
  old = dict(hf.get("rope_scaling") or {})
  theta = full.pop("rope_theta", None) or hf.get(spelling.base) or spelling.default
  if hf.get(spelling.base, theta) != theta or old.pop("rope_theta", theta) != theta:
    raise ValueError(f"{spelling.base}={hf.get(spelling.base)} and rope_parameters={given} contradict each "
                     "other")
  found = dict(rope_theta=float(theta), rope_fraction=_fraction(hf, full, old, spelling))
  if old and full and _scaling(old, hf, spelling) != _scaling(full, hf, spelling):
    raise ValueError(f"rope_scaling={old} and rope_parameters={full} contradict each other")
  found |= dict(rope_scaling=_scaling(full or old, hf, spelling), rope_local_theta=0.0)
  if spelling.local:
    local = dict(given.get("sliding_attention") or {})
    base = local.pop("rope_theta", None) or hf.get("rope_local_base_freq") or spelling.local
    if _scaling(local, hf, spelling):
      raise ValueError(f"rope_parameters of sliding_attention={local}: only rope_type 'default' is "
                       "supported there")
    found["rope_local_theta"] = float(base)
  elif by_layer:
    raise ValueError(f"rope_parameters={given} differ by layer, which this architecture does not")
  return found


def _fraction(hf, full, old, spelling):
  """The share of each head that is rotated; what says so is taken out of the scaling."""
  key = "partial_rotary_factor"
  inside = [parameters.pop(key) for parameters in (full, old) if parameters.get(key) is not None]
  said = [*inside, *(hf[name] for name in {key, spelling.share} if hf.get(name) is not None)]
  if any(share != said[0] for share in said):
    raise ValueError(f"{key} is {' and '.join(map(str, said))}, which contradict each other")
  share = float(said[0]) if said else spelling.all_heads
  if share != 1 and not spelling.share:
    raise ValueError(f"{key}={share} is not supported: this architecture rotates all of each head")
  return share


def _scaling(parameters, hf, spelling) -> tuple[tuple[str, Any], ...]:
  given = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items() if v is not None}
  old = given.pop("type", "default")
  kind = given.pop("rope_type", old)
  given.pop("rope_theta", None)
  if kind not in spelling.types:
    raise ValueError(f"RoPE scaling of type {kind!r} is not supported: it must be one of "
                     f"{', '.join(spelling.types)}")
  kind = spelling.types[kind]
  needed, more = TYPES[kind]
  if ORIGINAL in needed:
    _fill_lengths(given, kind, hf, spelling)
  missing = [key for key in needed if key not in given]
  unknown = sorted(given.keys() - {*needed, *more})
  if kind == "default" and set(unknown) <= {ORIGINAL}:
    return ()
  if missing or unknown:
    raise ValueError(f"RoPE scaling of type {kind!r} " + (
        f"lacks {', '.join(missing)}" if missing else
        f"with {', '.join(f'{k}={given[k]!r}' for k in unknown)} is not supported"))
  return (("rope_type", kind), *((key, given[key]) for key in (*needed, *more) if key in given))


def _fill_lengths(given, kind, hf, spelling):
  """What a config may say outside of its scaling: the length before it, and so the factor."""
  length = hf.get("max_position_embeddings")
  if spelling.original:
    given[ORIGINAL] = hf.get(ORIGINAL, spelling.original)
  elif length:
    given.setdefault(ORIGINAL, length)
  if length and kind != "llama3":
    given.setdefault("factor", length / given[ORIGINAL])


def write(decoder: DecoderConfig, spelling: Spelling) -> dict[str, Any]:
  """Entries of a config for transformers 4 and 5; the inverse of `read`."""
  scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in decoder.rope_scaling}
  share = {"partial_rotary_factor": decoder.rope_fraction} if spelling.share else {}
  full = {**(scaling or {"rope_type": "default"}), "rope_theta": decoder.rope_theta, **share}
  found = {spelling.base: decoder.rope_theta, "rope_scaling": scaling or None, "rope_parameters": full}
  if spelling.share:
    found[spelling.share] = decoder.rope_fraction
  if spelling.original and scaling:
    found[ORIGINAL] = scaling.get(ORIGINAL, spelling.original)
  if spelling.local:
    local = decoder.rope_local_theta or decoder.rope_theta
    found |= dict(rope_local_base_freq=local, rope_parameters=dict(
        full_attention=full, sliding_attention=dict(rope_type="default", rope_theta=local)))
  return found
