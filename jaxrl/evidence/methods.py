"""The methods: `configs/methods/<slug with underscores>.py`, one for each card."""

from collections.abc import Mapping
import dataclasses
import inspect
import json
import pathlib
import re
from typing import Any

from jaxrl import config as configs
from jaxrl.compose import nearest
from jaxrl.evidence import verdict

FOLDER = configs.SHIPPED / "methods"
PARENT = "configs/grpo.py"
FIELDS = ("reported", "overrides", "warm", "teachers", "arms", "claims", "measure")


@dataclasses.dataclass(frozen=True)
class Evidence:
  """How a method's claims are tested, as its config's `get_evidence()` says.

  Attributes:
    reported: what the paper reports, in one line.
    overrides: fields of the config, in all arms.
    warm: fields of the config of the warm start, and of all arms (task, model, tokenizer); None for
      arms that begin with random parameters.
    arms: config and overrides by name; `method` is the config itself.
    claims: what is compared.
    measure: `module:function`, called with the directory of every arm's finished run; the numbers that
      it returns by name are metrics `measured/NAME`. Empty for none.
    teachers: fields of the configs of further supervised runs, by name, beside those of `warm`; where an
      override is the text "{NAME}", arms get the workdir of that run.
  """

  reported: str
  overrides: Mapping[str, Any]
  warm: Mapping[str, Any] | None
  arms: Mapping[str, tuple[str, Mapping[str, Any]]]
  claims: list[verdict.Claim]
  measure: str = ""
  teachers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def slugs() -> list[str]:
  """All methods, by name."""
  return sorted(p.stem.replace("_", "-") for p in FOLDER.glob("*.py") if p.stem != "__init__")


def path_of(slug: str) -> pathlib.Path:
  """The config of a method.

  Raises:
    ValueError: there is none of that name.
  """
  if slug not in slugs():
    raise ValueError(f"there is no method {slug!r}{nearest(slug, slugs())}")
  return FOLDER / f"{slug.replace('-', '_')}.py"


def module_of(slug: str):
  """The config of a method as a module."""
  return configs.import_file(path_of(slug))


def evidence_of(slug: str) -> Evidence | None:
  """How the claims of a method are tested; None if no run tests them.

  Raises:
    ValueError: fields that mean nothing, or arms that claims do not find.
  """
  module = module_of(slug)
  if not hasattr(module, "get_evidence"):
    return None
  found, where = dict(module.get_evidence()), f"get_evidence() of configs/methods/{path_of(slug).name}"
  if unknown := set(found) - set(FIELDS):
    raise ValueError(f"{where} has an unknown field {sorted(unknown)[0]!r}"
                     f"{nearest(sorted(unknown)[0], FIELDS)}")
  own = f"configs/methods/{path_of(slug).name}"
  arms = {"method": (own, {})}
  for name, arm in found.get("arms", {"grpo": dict(config=PARENT)}).items():
    arm = dict(arm)
    arms[name] = (arm.pop("config", own), arm.pop("overrides", {}))
    if arm:
      raise ValueError(f"{where}: arm {name!r} has an unknown field {sorted(arm)[0]!r}; it has "
                       "config and overrides")
  return Evidence(found.get("reported", ""), found.get("overrides", {}), found.get("warm", {}), arms,
                  verdict.claims_of(found.get("claims", ()), list(arms), where),
                  found.get("measure", ""), found.get("teachers", {}))


def title(slug: str) -> str:
  """The first line of a config's docstring."""
  return (inspect.getdoc(module_of(slug)) or slug).splitlines()[0]


def parent_of(slug: str) -> str:
  """The config that a method's begins with, by its import."""
  text = path_of(slug).read_text()
  match = re.search(r"^from configs(?:\.(\w+))? import (\w+)", text, re.MULTILINE)
  if not match:
    raise ValueError(f"configs/methods/{path_of(slug).name} imports no other config to begin with")
  return "/".join(filter(None, ("configs", *match.groups()))) + ".py"


def differences(slug: str) -> list[str]:
  """`path: parent's -> own` for all that a method changes."""
  parent, own = (configs.to_dict(configs.load(str(spec)))
                 for spec in (parent_of(slug), path_of(slug)))
  return configs.differences(parent, own)


def result_of(slug: str, folder: pathlib.Path) -> dict[str, Any] | None:
  """What runs of the method came to, if they were made.

  Raises:
    ValueError: a file that cannot be read.
  """
  path = folder / f"{slug}.json"
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}): delete it, and measure again with jaxrl "
                     f"reproduce --method={slug}") from error


def parts_of(slug: str) -> list[str]:
  """The functions that a config's own fields name, beyond its parent's."""
  def names(value):
    if isinstance(value, dict):
      if isinstance(value.get("name"), str):
        yield value["name"]
      for inner in value.values():
        yield from names(inner)
    elif isinstance(value, list):
      for inner in value:
        yield from names(inner)
  parent, own = (list(names(configs.to_dict(configs.load(str(spec)))))
                 for spec in (parent_of(slug), path_of(slug)))
  return list(dict.fromkeys(name for name in own if name not in parent))
