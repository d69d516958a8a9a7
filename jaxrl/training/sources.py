"""What a run begins with: the published model `config.model.source`, adapters, or another run.

What it says of itself is written into the run's config, and its `config.json` is kept in the workdir,
so that a run continues, and is exported, without it. An adapter with a `source`, a directory in PEFT's format,
is filled in likewise; one that is named as `config.model.source` is an adapter `default` over its base.
"""

from collections.abc import Mapping
import copy
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
from jaxtyping import Array
import ml_collections

from jaxrl import config as configs
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import families
from jaxrl.models import peft
from jaxrl.models import pretrained
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters

KEPT = "source"  # of a workdir
ADAPTERS = "adapters.json"  # in it: the base, and the settings of adapters with a source


def filled(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config with what `config.model.source`, if there is one, says of itself: shape, dialect, tokenizer
  and where samples end.

  Raises:
    ValueError: there is no such model, it is not supported, or the config asks for another shape.
  """
  _check_adapter_sources(config)
  if not config.model.source:
    return config
  config, kept = copy.deepcopy(config), _kept_adapters(workdir)
  _name_base(config, kept, _has_begun(workdir))
  source, place = config.model.source, _place(config, workdir)
  hf = pretrained.read_json(place, pretrained.CONFIG)
  found = families.settings(hf)
  defaults = configs.import_file(configs.SHIPPED / "base.py").get_config().model
  _fill_adapters(config, kept, DecoderConfig(**found), families.architecture_of(hf))
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
  config.rollout.stop_ids = config.rollout.stop_ids or _all_stop_ids(config, place, kept)
  if config.tokenizer.kind == "character" and not config.tokenizer.alphabet:
    config.tokenizer.kind = "pretrained"
  return config


def of_adapters(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Where adapters come from, by name; of those that come from somewhere."""
  return {name: spec.get("source") for name, spec in config.model.adapters.items()
          if isinstance(spec, Mapping | ml_collections.ConfigDict) and spec.get("source")}


def _check_adapter_sources(config):
  for name, source in of_adapters(config).items():
    where = f"config.model.adapters.{name}.source={source!r}"
    if config.start:
      raise ValueError(f"{where}, but config.start={config.start!r} says what parameters to begin with: leave "
                       "one of them out")
    if not config.model.source:
      raise ValueError(f"{where} is named after the tensors of a published model: set config.model.source to it")


def _has_begun(workdir):
  return (workdir / "config.json").exists() and (workdir / KEPT).is_dir()


def _kept_adapters(workdir):
  path = workdir / KEPT / ADAPTERS
  return json.loads(path.read_text(encoding="utf-8")) if _has_begun(workdir) and path.exists() else {}


def _name_base(config, kept, began):
  """Makes a source that is an adapter the source of one, and its base the model's; what a run that has begun
  has kept says whether it was one."""
  source, own = config.model.source, [spec["source"] for spec in kept.get("adapters", {}).values()]
  if kept and source != kept["base"] and source in own:
    base = kept["base"]
  elif (kept or began or config.start
        or not peft.is_adapter(place := pretrained.resolve(source, weights=False))):
    return
  else:
    base = peft.base_of(place)
  if "default" in config.model.adapters:
    raise ValueError(f"config.model.source={source!r} is an adapter, which is called 'default', and "
                     "config.model.adapters has one of that name: call it otherwise")
  config.model.adapters["default"] = ml_collections.ConfigDict(dict(source=source))
  config.model.source = base


def _fill_adapters(config, kept, decoder, architecture):
  for name, source in of_adapters(config).items():
    if kept and name not in kept["adapters"]:
      raise ValueError(f"config.model.adapters.{name} is not among the adapters that the run began with, "
                       f"{sorted(kept['adapters'])}: continue it with those, or pass another --workdir")
    found = kept["adapters"][name] if kept else peft.settings(pretrained.resolve(source), decoder, architecture)
    own = configs.to_dict(config.model.adapters[name])
    if wrong := [f"{field}={own[field]!r}" for field in own if own[field] != configs.to_dict({
        "source": source, **found}).get(field)]:
      raise ValueError(f"config.model.adapters.{name} has {', '.join(wrong)}, but its source {source!r} says "
                       f"{found}: leave all but the source out")
    config.model.adapters[name] = ml_collections.ConfigDict(dict(found, source=source))


def stop_ids(place: pathlib.Path) -> tuple[int, ...]:
  """Tokens that end what the model says: chat models have several, and one of them is EOS.

  Without a generation_config.json, transformers takes those of config.json.

  Raises:
    ValueError: something else than ids.
  """
  path = place / pretrained.GENERATION
  path = path if path.exists() else place / pretrained.CONFIG
  ids = pretrained.read_json(place, path.name).get("eos_token_id") if path.exists() else None
  found = tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)
  if not all(type(i) is int and i >= 0 for i in found):
    raise ValueError(f"{path}: eos_token_id={ids!r} is no token id, nor a list of these")
  return found


def _all_stop_ids(config, place, kept):
  """Those of a model, and of the adapters over it; a run that has begun has kept all in one file."""
  more = [] if kept else [pretrained.resolve(source, weights=False) for source in of_adapters(config).values()]
  return tuple(dict.fromkeys(i for own in (place, *more) for i in stop_ids(own)))


def _place(config, workdir):
  """Where the model's config.json is: the workdir of a run that has begun, of the one that this one
  starts with, or the model itself."""
  if _has_begun(workdir):
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
    if of_adapters(config):
      path, ids = kept / pretrained.GENERATION, _all_stop_ids(config, place, {})
      says = pretrained.read_json(kept, path.name) if path.exists() else {}
      pretrained.write_json(path, pretrained.ending(says, ids))
      pretrained.write_json(kept / ADAPTERS, dict(base=config.model.source, adapters={
          name: configs.to_dict(config.model.adapters[name]) for name in of_adapters(config)}))


def parameters(source: str, decoder: DecoderConfig, rng: Array, mesh: jax.sharding.Mesh,
               of_adapters: Mapping[str, str] | None = None) -> Any:
  """The parameters of a published model on a mesh; a value head, a critic and new adapters are drawn, as
  the key says.

  Args:
    of_adapters: sources of adapters, by name.

  Raises:
    ConfigError: it cannot be found, or does not hold what the decoder needs.
  """
  with configs.as_config_errors():
    place, abstract = pretrained.resolve(source), states.abstract_parameters(decoder, mesh)
    found = pretrained.load_parameters(place, decoder, abstract)
    architecture = families.architecture_of(pretrained.read_json(place, pretrained.CONFIG))
    for name, own in (of_adapters or {}).items():
      found = adapters.joined(found, peft.load(pretrained.resolve(own), decoder, architecture, name, abstract))
  return states.complete(found, decoder, rng, mesh)


def check_start(config: ml_collections.ConfigDict, decoder: DecoderConfig) -> None:
  """Refuses to begin with a run whose adapters have other settings under the same names.

  Raises:
    ValueError: names the adapter.
  """
  if config.start:
    _merged_at_start(config.start, decoder)


def _merged_at_start(run, decoder):
  """Adapters of a run that the model does not have."""
  ours, found = {adapter.name: adapter for adapter in decoder.adapters}, []
  for adapter in adapters.read(configs.of_run(pathlib.Path(run)).model.adapters):
    if ours.get(adapter.name, adapter) != adapter:
      raise ValueError(f"config.model.adapters.{adapter.name} is {ours[adapter.name]}, but in config.start="
                       f"{run!r} it is {adapter}: use the same settings to train it further, or another name to "
                       "merge it and begin a new one")
    found += [adapter] if adapter.name not in ours else []
  return tuple(found)


def continued(run: str, decoder: DecoderConfig, params: Any, mesh: jax.sharding.Mesh) -> Any:
  """The last parameters of a run, for a model that may have other adapters.

  Those that the run has and the model has not are merged into its matrices.

  Args:
    params: of the model on the mesh: what the run does not have stays as it is there.

  Raises:
    CheckpointError: see `read_parameters`.
  """
  more = _merged_at_start(run, decoder)
  if not more:
    return read_parameters(pathlib.Path(run) / "checkpoints", params)
  both = dataclasses.replace(decoder, adapters=(*decoder.adapters, *more))
  wanted = adapters.joined(states.abstract_parameters(both, mesh), params)
  merge = jax.jit(lambda params: adapters.merged(params, more),
                  out_shardings=states.parameter_shardings(decoder, mesh))
  return merge(read_parameters(pathlib.Path(run) / "checkpoints", wanted))
