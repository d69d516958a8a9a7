"""Config files: loading, overrides from the command line, and the settings of one phase.

A config file is Python with `get_config()` or `get_config(variant)`. Sections at its top level hold
for all phases; a phase is a section of its own, named in `config.phases`, that states its `kind`,
its `steps` and whatever differs from the top level. `configs/base.py` lists every field there is.
"""

import ast
from collections.abc import Mapping, Sequence
import contextlib
import copy
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
from typing import Any

import ml_collections

from jaxrl.compose import nearest

SHIPPED = pathlib.Path(__file__).parents[1] / "configs"
PHASE_FIELDS = ("kind", "steps", "until")
# What all phases share: the same in each, so a phase cannot set it for itself.
SHARED = ("seed", "phases", "start", "data", "tokenizer", "model", "mesh", "compilation_cache",
          "reward", "evaluate.problems", "rollout.max_rows", "rollout.weights_dtype",
          "rollout.cache_dtype", "checkpoint.keep")
# Where any field may be added: knobs, texts and arguments, which whoever reads them checks.
OPEN = re.compile(r"config(\.\w+)?\.(data\.task|data\.held_out_task|rollout\.templates|"
                  r"rollout\.episode|evaluate\.episode|reward\.aggregate(\.weights)?|"
                  r"frozen(\.\w+)?|adapters(\.\w+)?)|.*\[\d+\]")


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

  A config may import others as `from configs import grpo`: those that ship with jaxrl, and those in
  its own directory when that is named `configs`.

  Raises:
    ValueError: no such file, no `get_config`, a variant that it does not know, or a field that
      `configs/base.py` has and this config lacks, or the reverse.
  """
  name, _, variant = spec.partition(":")
  path = pathlib.Path(name)
  if not path.exists() and path.parts[:1] == (SHIPPED.name,):
    path = SHIPPED.parent / path  # one that came with the package
  if path.suffix != ".py" or not path.is_file():
    beside = [str(p) for p in path.parent.glob("*.py") if p.name != "__init__.py"]
    raise ValueError(f"--config={name}: no such Python file in {pathlib.Path.cwd()}"
                     f"{nearest(name, beside)}")
  module = import_file(path.resolve())
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={name}: the file has no get_config()")
  parameters = list(inspect.signature(module.get_config).parameters.values())
  if variant and not parameters:
    raise ValueError(f"--config={spec}: {name} has no variants; drop ':{variant}'")
  if not variant and parameters and parameters[0].default is inspect.Parameter.empty:
    raise ValueError(f"--config={name}: it needs a variant, --config={name}:VARIANT")
  config = module.get_config(*[variant] if variant else [])
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(f"--config={spec}: get_config() returned a {type(config).__name__}; start "
                     "from `config = base.get_config()` and return config")
  check_fields(config)
  return config


def check_fields(config: ml_collections.ConfigDict) -> None:
  """Refuses fields that nothing would read, and missing ones.

  Raises:
    ValueError: the field, with the nearest one that there is.
  """
  base = import_file(SHIPPED / "base.py").get_config()
  phases = [key for key in config if key in config.get("phases", ())
            or (_is_section(config[key]) and "kind" in config[key])]
  _check_section(config, base, "config", extra=phases)


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
  """Sets fields in place: `{"optimizer.learning_rate": "3e-4", "objective[0].low": "0.1"}`.

  A field of a phase, `{"rl.optimizer.b2": "0.99"}`, need not stand in its section yet.

  Raises:
    ValueError: a field that does not exist (with the nearest that does), a value of another type,
      or a field that every phase sets for itself, so that the override would do nothing.
  """
  for path, text in overrides.items():
    parts = _parts(path)
    if parts[0] in config.get("phases", ()) and _is_section(config.get(parts[0])):
      _inherit(config, parts, path)
    container, key, where = config, None, "config"
    for part in parts:
      if key is not None:
        container, where = container[key], _join(where, key)
      key = _key(container, part, where, path)
    new = _is_section(container) and key not in container
    container[key] = _convert(None if new else container[key], text, f"config.{path}")
  for path in overrides:
    _check_not_shadowed(config, path)


def phase_names(config: ml_collections.ConfigDict) -> list[str]:
  """The names of the phases in order.

  Raises:
    ValueError: there is none, or one that cannot be told from another.
  """
  names = list(config.phases)
  if not names:
    raise ValueError("config.phases is empty; name at least one, such as ('sft', 'rl')")
  for name in names:
    if not isinstance(name, str) or name == "start":  # the name of the evaluation before the first
      raise ValueError(f"config.phases names {name!r}, which cannot be the name of a phase; take "
                       "another word")
    if names.count(name) > 1:
      raise ValueError(f"config.phases names {name!r} {names.count(name)} times; a phase is run "
                       f"once, so give the next a name and a section of its own")
  return names


def phase_config(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
  """The settings of one phase: the top level with the phase's own section laid over it.

  Raises:
    ValueError: no such section, or a field in it that neither phases nor the top level have, that
      all phases share, or that has another type.
  """
  if name not in config:
    raise ValueError(f"config.phases names {name!r}, but there is no section config.{name}"
                     f"{nearest(name, config)}")
  merged = copy.deepcopy(config)
  own = config[name]
  if not _is_section(own) or "kind" not in own:
    raise ValueError(f"config.{name} is a phase, so it needs 'kind': config.{name} = "
                     "dict(kind=..., steps=...)")
  if "steps" not in own and own.kind != "evaluate":
    raise ValueError(f"config.{name} is a phase of kind {own.kind!r}, so it needs 'steps'")
  for path in SHARED:
    if _has(own, _parts(path)):
      raise ValueError(f"config.{name}.{path} would change nothing, because all phases share it: "
                       f"set config.{path}")
  _lay_over(merged, own, f"config.{name}", extra=PHASE_FIELDS)
  return merged


def to_dict(config: Any) -> Any:
  """Plain dicts and lists, as JSON would give them back.

  Raises:
    ValueError: something in it is no plain data.
  """
  return json.loads(json.dumps(_plain(config), default=_no_plain_data))


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """`path: old -> new` for every leaf in which two plain configs differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [line for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [line for i, pair in enumerate(zip(old, new))
            for line in differences(*pair, f"{path}[{i}]")]
  return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def check_run(run: pathlib.Path, name: str,
              mend: str = "name the --workdir of a run that has saved a checkpoint") -> None:
  """Refuses what is no run that has saved something.

  Args:
    run: its workdir.
    name: of the setting that says it, and its value.
    mend: what to do about it.

  Raises:
    ValueError: a file of a run is missing; says which.
  """
  for needed in ("config.json", "tokenizer", "checkpoints"):
    if not (run / needed).exists():
      raise ValueError(f"{name} has no {needed}: {mend}")


def of_run(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run, whatever version made it."""
  return ml_collections.ConfigDict(with_defaults(json.loads((workdir / "config.json").read_text())))


def with_defaults(plain: dict[str, Any]) -> dict[str, Any]:
  """A plain config of an earlier version, with what `configs/base.py` has had since at its default."""
  base = to_dict(import_file(SHIPPED / "base.py").get_config())

  def filled(own, default, where):
    if not (isinstance(own, dict) and isinstance(default, dict)) or OPEN.fullmatch(where):
      return own
    return {**{k: v for k, v in default.items() if k not in own},
            **{k: filled(v, default.get(k), f"{where}.{k}") for k, v in own.items()}}
  sections = {k: v for k, v in base.items() if isinstance(v, dict) and k in plain}
  return {**plain, **{k: filled(plain[k], v, f"config.{k}") for k, v in sections.items()}}


def import_file(path: pathlib.Path):
  """A config file as a module, with `configs` as one package of its directory and what ships."""
  directory = next((p for p in path.parents if p.name == "configs"), None)
  root = directory.parent if directory else path.parent
  if str(root) not in sys.path:
    sys.path.insert(0, str(root))
  package = importlib.import_module("configs")
  own = [str(directory)] if directory else []
  package.__path__ = list(dict.fromkeys([*own, *package.__path__, str(SHIPPED)]))
  name = ".".join(("configs", *path.relative_to(directory).with_suffix("").parts)
                  if directory else ("jaxrl_config", path.stem))
  loader = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(loader)
  loader.loader.exec_module(module)
  sys.modules[f"jaxrl_config:{path}"] = module  # for `jaxrl.programs`, which asks whose code is loaded
  return module


def _plain(value):
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def _is_section(value):
  return isinstance(value, Mapping | ml_collections.ConfigDict)


def _parts(path):
  return re.findall(r"[^.\[\]]+", path)


def _join(where, key):
  return f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}"


def _no_plain_data(value):
  raise ConfigError(f"the config holds {value!r}; use text, numbers, lists and dicts only, so that "
                   "it can be written down, and name functions as 'module:function'")


def _check_section(section, base, where, extra=()):
  for key in section:
    if key not in base and key not in extra:
      raise ValueError(f"{where} has an unknown field {key!r}{nearest(key, base)}")
  for key in base:
    if key not in section:
      raise ValueError(f"{where} lacks {key!r}; start from configs.base.get_config()")
    if not _is_section(base[key]):
      continue
    if not _is_section(section[key]):
      raise ValueError(f"{where}.{key}={section[key]!r}, but it is a section; write dict(...)")
    if not OPEN.fullmatch(f"{where}.{key}"):
      _check_section(section[key], base[key], f"{where}.{key}")


def _inherit(config, parts, path):
  """Writes a field that a phase inherits into its own section, so that it can be set there."""
  own, base, where = config[parts[0]], config, f"config.{parts[0]}"
  for number, part in enumerate(parts[1:], start=2):
    if not _is_section(own) or not _is_section(base) or OPEN.fullmatch(where):
      return
    if part not in own and part in base:
      section = _is_section(base[part]) and number < len(parts)
      own[part] = ml_collections.ConfigDict() if section else copy.deepcopy(base[part])
    if part not in own:
      raise ValueError(f"--config.{path}: {where} has no field {part!r}"
                       f"{nearest(part, [*own, *base])}")
    own, base, where = own[part], base.get(part), f"{where}.{part}"


def _key(container, part, where, path):
  if _is_section(container):
    if part in container or OPEN.fullmatch(where):
      return part
    raise ValueError(f"--config.{path}: {where} has no field {part!r}{nearest(part, container)}")
  if isinstance(container, list):
    if part.isdecimal() and int(part) < len(container):
      return int(part)
    raise ValueError(f"--config.{path}: {where} is a list of {len(container)}; [{part}] is not in "
                     "it")
  raise ValueError(f"--config.{path}: {where} is {container!r} and has no fields")


def _convert(old, text, path):
  if isinstance(old, str):
    return text
  try:
    value = ast.literal_eval(_Dicts().visit(ast.parse(text.strip(), mode="eval")))
  except (ValueError, SyntaxError):
    value = {"true": True, "false": False}.get(text.lower(), text)
  if old is None:
    return value
  if _is_section(old) and isinstance(value, dict) and OPEN.fullmatch(path):
    return value
  if _is_section(old) and value is None and path.endswith(".until"):
    return None  # the phase then makes all its steps
  if _is_section(old):
    raise ValueError(f"--{path}={text}: this is a section; set its fields, such as "
                     f"--{path}.{next(iter(old), 'field')}=...")
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if isinstance(old, list | tuple) and isinstance(value, list | tuple):
    return type(old)(value)
  if isinstance(old, bool) and isinstance(value, bool):
    return value
  if isinstance(old, float) and number:
    return float(value)
  if isinstance(old, int) and not isinstance(old, bool) and number and float(value).is_integer():
    return int(value)
  takes = ("a list such as \"['a', 'b']\"" if isinstance(old, list | tuple) else "True or False"
           if isinstance(old, bool) else "a number" if isinstance(old, float) else "a whole number")
  raise ValueError(f"--{path}={text}: {path} is {old!r}, so it takes {takes}")


class _Dicts(ast.NodeTransformer):
  """`dict(name=...)`, as configs write it, in the form that `ast.literal_eval` reads."""

  def visit_Call(self, node):
    self.generic_visit(node)
    if isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
      return ast.Dict([k.arg and ast.Constant(k.arg) for k in node.keywords],
                      [k.value for k in node.keywords])
    return node


def _check_not_shadowed(config, path):
  phases = [p for p in config.get("phases", ()) if _is_section(config.get(p))]
  if phases and all(_has(config[p], _parts(path)) for p in phases):
    raise ValueError(f"--config.{path} would change nothing, because every phase sets it: use "
                     + " or ".join(f"--config.{p}.{path}=..." for p in phases))


def _has(section, parts):
  for part in parts:
    if isinstance(section, list):
      return True
    if not _is_section(section) or part not in section:
      return False
    section = section[part]
  return True


def _lay_over(base, own, where, extra: Sequence[str] = ()):
  for key in own:
    here = f"{where}.{key}"
    if key not in base and key not in extra and not OPEN.fullmatch(where):
      raise ValueError(f"{where} has an unknown field {key!r}{nearest(key, [*base, *extra])}")
    if key in base and key not in extra and _is_section(base[key]) != _is_section(own[key]):
      kind = "a section, dict(...)" if _is_section(base[key]) else "no section"
      raise ValueError(f"{here}={_plain(own[key])!r}, but this is {kind}")
    another = OPEN.fullmatch(here) and "name" in own[key]  # another function, with its arguments
    if _is_section(own[key]) and key in base and not another:
      _lay_over(base[key], own[key], here)
      continue
    try:
      base[key] = copy.deepcopy(own[key])
    except TypeError as error:
      raise ValueError(f"{here}={own[key]!r} has another type than {base[key]!r} at the top level"
                       ) from error
