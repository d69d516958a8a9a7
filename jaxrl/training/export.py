"""The model of a run as a directory that others load."""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

import jax

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.models import adapters
from jaxrl.models import families
from jaxrl.models import peft
from jaxrl.models import pretrained
from jaxrl.training import inputs
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters


def export(workdir: str | os.PathLike, output: str | os.PathLike, *, dtype: str = "",
           merge_adapters: bool = False, max_shard_bytes: int = pretrained.MAX_SHARD_BYTES) -> list[str]:
  """Writes the newest checkpoint of a run with everything that `from_pretrained` wants.

  Of a model with adapters these alone are written, as PEFT reads them: in `output` the only one, or that
  called `default`, others in directories of their own below, each with a generation_config.json that says where
  answers end, which PEFT passes over. The base is the published model that the run
  began with; one that has been trained here is written too, to `output/base`.

  Parameters are read into the host's memory.

  Args:
    workdir: of the run.
    output: a directory that is not there yet, or is empty.
    dtype: of the stored numbers; "" is that of the run's parameters, of adapters float32.
    merge_adapters: write the whole model, with the adapters in its matrices.

  Returns:
    Lines that say what was written, and what of the model was not.

  Raises:
    ValueError: there is no such run, the directory is taken, or no published architecture computes
      what the model does; before any parameter is read.
    CheckpointError: the checkpoint is damaged.
  """
  place, output = pathlib.Path(workdir).absolute(), pathlib.Path(output).absolute()
  configs.check_run(place, f"--workdir={workdir}", "name that of a run that has saved a checkpoint")
  config = configs.of_run(place)
  tokenizer = data.load_tokenizer(place / "tokenizer")
  decoder = inputs.decoder_config(config.model, tokenizer)
  kept = {name: pretrained.read_json(place / sources.KEPT, name)
          for name in (pretrained.CONFIG, pretrained.GENERATION) if (place / sources.KEPT / name).exists()}
  if merge_adapters and not decoder.adapters:
    raise ValueError(f"--merge-adapters, but the run {workdir} has no adapters: leave it out")
  how = dict(dtype=dtype or config.model.param_dtype, imported=kept.get(pretrained.CONFIG),
             max_positions=inputs.longest(config.data, config.rollout))
  hf = pretrained.check_exportable(decoder, output, **how)
  apart = () if merge_adapters else decoder.adapters
  for adapter in apart:
    peft.check_exportable(decoder, adapter, hf["architectures"][0])
  host = sharding.make_mesh(devices=_host_device())
  wanted = {"params": states.abstract_parameters(decoder, host)["params"]}  # without a critic
  params = read_parameters(place / "checkpoints", wanted)
  summary = place / "summary.json"
  card = model_card(hf, config, json.loads(summary.read_text()) if summary.exists() else {})
  how |= dict(tokenizer=tokenizer, card=card, generation=kept.get(pretrained.GENERATION),
              stop_ids=_stop_ids(config, tokenizer), max_shard_bytes=max_shard_bytes)
  if apart:
    lines = _export_adapters(params, decoder, hf["architectures"][0], output, config, dtype or "float32", how)
  else:
    pretrained.save(adapters.merged(params, decoder.adapters), decoder, output, **how)
    lines = [f"{output}: {hf['architectures'][0]} in {how['dtype']}"]
  left = ["the critic"] * decoder.critic + [f"the head {families.VALUE!r}"] * (
      families.VALUE in dict(decoder.heads_on_top))
  left += ["the matrix of logits"] * (families.has_score(decoder) and not decoder.tie_embeddings)
  return [*lines, *[f"not written, for no published architecture has it: {what}" for what in left]]


def _stop_ids(config, tokenizer):
  """The tokens that end what the run has trained on and sampled."""
  phases = [configs.phase_config(config, name) for name in config.phases]
  return tuple(dict.fromkeys(i for phase in phases for i in (
      *inputs.builder(phase, tokenizer).stop_ids, *phase.rollout.stop_ids)))


def _export_adapters(params, decoder, architecture, output, config, dtype, how):
  """Writes adapters, and their base if nobody else has it."""
  imported = how["imported"] or {}
  # Published modules of a model that reads images too have other names than its text part alone.
  own = not sources.begins(config) or architecture not in imported.get("architectures", [architecture])
  base = str(output / peft.OWN_BASE) if own else config.model.source
  names = [adapter.name for adapter in decoder.adapters]
  root, lines = "default" if "default" in names else names[0] if len(names) == 1 else "", []
  with pretrained.writing(output) as partial:
    for adapter in decoder.adapters:
      place = partial / ("" if adapter.name == root else adapter.name)
      place.mkdir(exist_ok=True)
      peft.save(params, decoder, adapter, architecture, place, base=base, dtype=dtype)
      pretrained.write_json(place / pretrained.GENERATION, pretrained.ending(
          how["generation"] or {}, how["stop_ids"]))
      lines.append(f"{output / place.relative_to(partial)}: adapter {adapter.name!r} of rank {adapter.rank} in "
                   f"{dtype}, for {base}")
    how["tokenizer"].export(partial)
    (partial / "README.md").write_text(how["card"].replace(
        "library_name: transformers", "library_name: peft", 1), encoding="utf-8")
    if own:
      pretrained.save(params, decoder, partial / peft.OWN_BASE, **how)
      lines.append(f"{base}: {architecture} in {how['dtype']}, the base")
  return lines


def _host_device():
  try:
    return jax.local_devices(backend="cpu")[:1]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return jax.local_devices()[:1]


def model_card(hf: Mapping[str, Any], config: Any, summary: Mapping[str, Any]) -> str:
  """README.md of a model: what it is, what was measured, and the config that made it."""
  task = "text-generation" if hf["architectures"][0].endswith("CausalLM") else "text-classification"
  base = f"base_model: {config.model.source}\n" if "/" in config.model.source and not pathlib.Path(
      config.model.source).expanduser().exists() else ""
  rows = [f"| {phase['name']} ({phase['kind']}) | {name} | {_figure(phase['before'].get(name))} | "
          f"{_figure(value)} |"
          for phase in summary.get("phases", ()) for name, value in phase["after"].items()]
  table = ("| phase | metric | before | after |\n|---|---|---|---|\n" + "\n".join(rows)
           if rows else "The run had not finished a phase.")
  settings = json.dumps(configs.to_dict(config), indent=1)
  return (f"---\nlibrary_name: transformers\npipeline_tag: {task}\n{base}tags:\n- jaxrl\n---\n\n"
          f"# A model trained with jaxrl\n\n{hf['architectures'][0]}, phases "
          f"{', '.join(config.phases)}, on `{config.data.train}`.\n\n## Measured\n\n{table}\n\n"
          f"## Config\n\n```json\n{settings}\n```\n")


def _figure(value):
  return f"{value:.4g}" if isinstance(value, int | float) else ""
