"""Frozen models that other runs have trained, of any shape, over the same tokens.

`config.frozen.teacher = dict(source=WORKDIR)` is the last policy of that run as it is now: a phase that
begins reads it, and checkpoints hold it and the workdir its shape, so that a phase continues with the same
one whatever becomes of the other. `config.reference.source` makes one the reference, as for distillation.
"""

from collections.abc import Iterable, Mapping
import json
import pathlib
import tempfile
from typing import Any

import jax

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.models import DecoderConfig
from jaxrl.training import frozen
from jaxrl.training import inputs
from jaxrl.training import jsonl
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters

KEPT = "others.json"  # of a workdir: config.model of each of those runs
OF_IDS = ("character_tokenizer.json", "tokenizer.json")  # files of tokenizers


def decoders(models: Mapping[str, frozen.Refresh], tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh,
             workdir: pathlib.Path | None = None) -> dict[str, DecoderConfig]:
  """The architectures of those models that have a source, by name.

  Args:
    models: says where each is.
    tokenizer: of this run.
    mesh: of this run.
    workdir: of this run, which may have begun and has kept them then.

  Raises:
    ValueError: there is no such run, it has other tokens, or it does not divide over the mesh.
  """
  kept = _kept(workdir) if workdir else {}
  return {name: _decoder(pathlib.Path(rule.source), kept.get(rule.source), tokenizer, mesh,
                         frozen.place_of(name)) for name, rule in models.items() if rule.source}


def keep(wanted: Iterable[str], workdir: pathlib.Path) -> None:
  """Writes into the workdir of this run what the models of others are; once, so that they may change.

  Args:
    wanted: workdirs of those runs.
    workdir: of this one.
  """
  kept = _kept(workdir)
  if not jax.process_index() and (new := set(wanted) - set(kept)):
    jsonl.write_json(workdir / KEPT, kept | {
        run: configs.to_dict(configs.of_run(pathlib.Path(run)).model) for run in sorted(new)}, exact=True)


def _kept(workdir):
  path = workdir / KEPT
  begun = path.exists() and (workdir / "config.json").exists()
  return json.loads(path.read_text(encoding="utf-8")) if begun else {}


def parameters(models: Mapping[str, frozen.Refresh], of: Mapping[str, DecoderConfig], mesh: jax.sharding.Mesh
               ) -> dict[str, Any]:
  """The last parameters of the runs, on a mesh.

  Args:
    models: says where each is.
    of: the architectures of those that are wanted.

  Raises:
    CheckpointError: a checkpoint is missing or damaged.
  """
  return {name: read_parameters(pathlib.Path(models[name].source) / "checkpoints",
                                states.abstract_parameters(decoder, mesh)) for name, decoder in of.items()}


def same_tokens(one: data.Tokenizer, other: data.Tokenizer) -> bool:
  """Whether the same texts have the same ids, whatever settings, as the date of chats, lie beside them."""
  return _ids(one) == _ids(other)


def _decoder(run, kept, tokenizer, mesh, where):
  where = f"{where}.source={str(run)!r}"
  decoder = inputs.decoder_config(kept or _model_of(run, tokenizer, where), tokenizer)
  try:
    sharding.check_divisible(decoder, mesh)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  return decoder


def _model_of(run, tokenizer, where):
  configs.check_run(run, where)
  if not any((run / "checkpoints").glob("[0-9]*")):
    raise ValueError(f"{where} has no checkpoint yet: name a run that has saved one")
  theirs = data.load_tokenizer(run / "tokenizer")
  if hasattr(tokenizer, "save") and not same_tokens(tokenizer, theirs):
    raise ValueError(f"{where} has another tokenizer (of {theirs.vocab_size} tokens, and here of "
                     f"{tokenizer.vocab_size}), so its probabilities are of other tokens: this run needs the "
                     "same config.tokenizer")
  return configs.of_run(run).model


def _ids(tokenizer):
  with tempfile.TemporaryDirectory() as scratch:
    tokenizer.save(scratch)
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(scratch).iterdir())
            if path.name in OF_IDS}
