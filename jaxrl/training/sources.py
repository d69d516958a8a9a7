"""The published model that a run begins with: `config.model.source`.

What it says of itself is written into the run's config, and its `config.json` is kept in the workdir,
so that a run continues, and is exported, without it.
"""

import copy
import pathlib
import shutil
from typing import Any

import jax
from jaxtyping import Array
import ml_collections

from jaxrl import config as configs
from jaxrl.models import DecoderConfig
from jaxrl.models import families
from jaxrl.models import pretrained
from jaxrl.training import state as states

KEPT = "source"  # of a workdir


def filled(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config with what `config.model.source`, if there is one, says of itself: shape, dialect, tokenizer
  and where samples end.

  Raises:
    ValueError: there is no such model, it is not supported, or the config asks for another shape.
  """
  source = config.model.source
  if not source:
    return config
  place = _place(config, workdir)
  found = families.settings(pretrained.read_json(place, pretrained.CONFIG))
  defaults = configs.import_file(configs.SHIPPED / "base.py").get_config().model
  config = copy.deepcopy(config)
  heads = found.pop("heads_on_top", ())
  wrong = []
  for name, value in found.items():
    own, value = config.model[name], type(defaults[name])(value)
    if configs.to_dict(own) not in (configs.to_dict(defaults[name]), configs.to_dict(value)):
      wrong.append(f"config.model.{name}={own!r}, but that model has {value!r}")
    config.model[name] = value
  own = configs.to_dict(config.model.heads_on_top)
  if any(list(head) not in own for head in heads) and own:
    wrong.append(f"config.model.heads_on_top={own}, but that model has {heads}: list it too")
  config.model.heads_on_top = config.model.heads_on_top or heads
  if wrong:
    raise ValueError(f"config.model.source={source!r} contradicts other settings:\n  " + "\n  ".join(wrong)
                     + "\nleave them out of the config, or set them to what the model has")
  config.rollout.stop_ids = config.rollout.stop_ids or stop_ids(place)
  if config.tokenizer.kind == "character" and not config.tokenizer.alphabet:
    config.tokenizer.kind = "pretrained"
  return config


def stop_ids(place: pathlib.Path) -> tuple[int, ...]:
  """Tokens that end what the model says: chat models have several, and one of them is EOS."""
  if not (place / pretrained.GENERATION).exists():
    return ()
  ids = pretrained.read_json(place, pretrained.GENERATION).get("eos_token_id")
  return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _place(config, workdir):
  """Where the model's config.json is: the workdir of a run that has begun, of the one that this one
  starts with, or the model itself."""
  if (workdir / "config.json").exists() and (workdir / KEPT).is_dir():
    return workdir / KEPT
  start = pathlib.Path(config.start)
  if config.start and (start / KEPT).is_dir():
    return start / KEPT
  return pretrained.resolve(config.model.source, weights=False)


def begins(config: ml_collections.ConfigDict) -> bool:
  """Whether the first parameters are those of a published model, and not of another run or drawn."""
  return bool(config.model.source) and not config.start


def keep(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Copies what says what the model is, without its parameters, into the workdir; once."""
  if not config.model.source or jax.process_index():
    return
  place, kept = _place(config, workdir), workdir / KEPT
  if place != kept:
    kept.mkdir(parents=True, exist_ok=True)
    for name in (pretrained.CONFIG, pretrained.GENERATION):
      if (place / name).exists():
        shutil.copyfile(place / name, kept / name)


def parameters(source: str, decoder: DecoderConfig, rng: Array, mesh: jax.sharding.Mesh) -> Any:
  """The parameters of a published model on a mesh; a value head and a critic are drawn, as the key says.

  Raises:
    ConfigError: it cannot be found, or does not hold what the decoder needs.
  """
  with configs.as_config_errors():
    found = pretrained.load_parameters(pretrained.resolve(source), decoder,
                                       states.abstract_parameters(decoder, mesh))
  return states.complete(found, decoder, rng, mesh)
