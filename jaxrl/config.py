"""Config files: loading, overrides from the command line, and the settings of one phase.

A config file is Python with `get_config()` or `get_config(variant)`. Sections at its top level hold
for all phases; a phase is a section of its own, named in `config.phases`, that states its `kind`,
its `steps` and whatever differs from the top level.
"""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import copy
import importlib.util
import inspect
import json
import pathlib
import re
import sys
from typing import Any

import ml_collections

from jaxrl.compose import nearest

PHASE_FIELDS = ("kind", "steps", "until")


class ConfigError(ValueError):
  """A mistake in a config or in what it names; the message is all that is needed to mend it."""


@contextlib.contextmanager
def as_config_errors():
  """Turns `ValueError` into `ConfigError`, where nothing but the config can be at fault."""
  try:
    yield
  except ValueError as error:
    raise ConfigError(str(error)) from error


def load(spec: str) -> ml_collections.ConfigDict:
  """Loads `path/to/file.py` or `path/to/file.py:variant`.

  Raises:
    ValueError: no such file, no `get_config`, or a variant that it does not know.
  """
  name, _, variant = spec.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f"--config={name}: no such file in {pathlib.Path.cwd()}")
  root = next((p.parent for p in path.resolve().parents if p.name == "configs"),
              path.resolve().parent)
  if str(root) not in sys.path:
    sys.path.insert(0, str(root))  # a config may import its parents: `from configs import grpo`
  loader = importlib.util.spec_from_file_location(f"jaxrl_config_{path.stem}", path)
  module = importlib.util.module_from_spec(loader)
  loader.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={name}: the file has no get_config()")
  takes_variant = bool(inspect.signature(module.get_config).parameters)
  if variant and not takes_variant:
    raise ValueError(f"--config={spec}: {name} has no variants; drop ':{variant}'")
  return module.get_config(*([variant] if takes_variant else []))


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
  """Sets fields in place: `{"optimizer.learning_rate": "3e-4", "objective[0].low": "0.1"}`.

  Raises:
    ValueError: a field that does not exist (with the nearest that does), a value of another type,
      or a field that every phase sets for itself, so that the override would do nothing.
  """
  for path, text in overrides.items():
    _check_not_shadowed(config, path)
    container, key, where = config, None, "config"
    for part in re.findall(r"[^.\[\]]+", path):
      if key is not None:
        container, where = container[key], _join(where, key)
      key = _key(container, part, where, path)
    container[key] = _convert(container[key], text, f"config.{path}")


def phase_config(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
  """The settings of one phase: the top level with the phase's own section laid over it.

  Raises:
    ValueError: no such section, or a field in it that neither phases nor the top level have.
  """
  if name not in config:
    raise ValueError(f"config.phases names {name!r}, but there is no section config.{name}"
                     f"{nearest(name, config)}")
  merged = copy.deepcopy(config)
  own = config[name]
  for field in ("kind", "steps"):
    if field not in own:
      raise ValueError(f"config.{name} is a phase, so it needs {field!r}")
  _lay_over(merged, own, f"config.{name}", extra=PHASE_FIELDS)
  return merged


def to_dict(config: Any) -> Any:
  """Plain dicts and lists, as JSON would give them back."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(config))


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """`path: old -> new` for every leaf in which two plain configs differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [line for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
  return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _join(where, key):
  return f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}"


def _key(container, part, where, path):
  if isinstance(container, Mapping | ml_collections.ConfigDict):
    if part in container:
      return part
    raise ValueError(f"--config.{path}: {where} has no field {part!r}{nearest(part, container)}")
  if isinstance(container, list):
    if part.isdecimal() and int(part) < len(container):
      return int(part)
    raise ValueError(f"--config.{path}: {where} is a list of {len(container)}; [{part}] is not in it")
  raise ValueError(f"--config.{path}: {where} is {container!r} and has no fields")


def _convert(old, text, path):
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = {"true": True, "false": False}.get(text.lower(), text)
  if isinstance(old, str):
    return text
  if isinstance(old, bool) or old is None:
    ok = old is None or isinstance(value, bool)
  elif isinstance(old, int | float):
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    ok = type(value) is type(old)
  elif isinstance(old, list | tuple):
    ok = isinstance(value, list | tuple)
    value = type(old)(value) if ok else value
  else:
    raise ValueError(f"--{path}={text}: this is a section; set its fields, such as "
                     f"--{path}.{next(iter(old), 'field')}=...")
  if not ok:
    raise ValueError(f"--{path}={text}: {path} is {old!r}, so it takes a {type(old).__name__}")
  return value


def _check_not_shadowed(config, path):
  phases = [p for p in config.get("phases", ()) if isinstance(config.get(p), Mapping
                                                              | ml_collections.ConfigDict)]
  parts = re.findall(r"[^.\[\]]+", path)
  if phases and all(_has(config[p], parts) for p in phases):
    raise ValueError(f"--config.{path} would change nothing, because every phase sets it: use "
                     + " or ".join(f"--config.{p}.{path}=..." for p in phases))


def _has(section, parts):
  for part in parts:
    if isinstance(section, list):
      return True
    if not isinstance(section, Mapping | ml_collections.ConfigDict) or part not in section:
      return False
    section = section[part]
  return True


def _lay_over(base, own, where, extra: Sequence[str] = ()):
  for key in own:
    if key not in base and key not in extra:
      raise ValueError(f"{where} has an unknown field {key!r}{nearest(key, [*base, *extra])}")
    section = isinstance(own[key], Mapping | ml_collections.ConfigDict)
    if section and key in base and key not in extra and "name" not in own[key]:
      _lay_over(base[key], own[key], f"{where}.{key}")
    else:
      base[key] = copy.deepcopy(own[key])
