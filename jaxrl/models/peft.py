"""Adapters in the format of PEFT, in and out: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's matrices are ours transposed, `lora_A` [rank, inputs] and `lora_B` [outputs, rank], beside the modules
of the published model, whose names `families` knows. One tensor that is several matrices here (Phi-3's
queries, keys and values) has one `lora_A` there and three here, so such modules are refused.
"""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl import sharding
from jaxrl.models import families
from jaxrl.models import pretrained
from jaxrl.models import tensor_names
from jaxrl.models.adapters import A, B, BLOCK, Adapter
from jaxrl.models.decoder import DecoderConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN_BASE = "base"  # directory beside these, with a base that nobody else has
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
IN_MEMORY, IN_FILES = (f"base_model.model.{path}." for path in ("model.language_model", "language_model.model"))
# What a config may say only in one way. Dropout is of PEFT's training, not of the function.
FIXED = {"peft_type": ("LORA",), "bias": (None, "none"), "use_dora": (None, False), "lora_bias": (None, False),
         "fan_in_fan_out": (None, False), "modules_to_save": (None, []), "rank_pattern": (None, {}),
         "alpha_pattern": (None, {}), "target_parameters": (None, []), "trainable_token_indices": (None,),
         "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
         "alora_invocation_tokens": (None,), "megatron_config": (None,), "use_qalora": (None, False),
         "layer_replication": (None,), "arrow_config": (None,), "use_bdlora": (None,)}


def is_adapter(directory: pathlib.Path) -> bool:
  """Whether a directory holds an adapter and no model."""
  return (directory / CONFIG).exists() and not (directory / pretrained.CONFIG).exists()


def base_of(directory: pathlib.Path) -> str:
  """The model that an adapter is for: what its config names, or one that lies beside it.

  Raises:
    ValueError: it names none.
  """
  if (directory / OWN_BASE / pretrained.CONFIG).exists():
    return str(directory / OWN_BASE)
  found = pretrained.read_json(directory, CONFIG).get("base_model_name_or_path")
  if not found:
    raise ValueError(f"{directory / CONFIG} names no base_model_name_or_path: set config.model.source to the "
                     f"base, and config.model.adapters=dict(default=dict(source={str(directory)!r}))")
  return found


def settings(directory: pathlib.Path, decoder: DecoderConfig, architecture: str) -> dict[str, Any]:
  """The fields of `Adapter` that a directory holds, from its config and the headers of its tensors.

  Raises:
    ValueError: something that is not supported or does not fit the model, by name.
  """
  hf = pretrained.read_json(directory, CONFIG)
  for key, values in FIXED.items():
    if hf.get(key) not in values:
      raise ValueError(f"{directory / CONFIG} has {key}={hf.get(key)!r}, which is not supported: it must be "
                       f"{values[-1]!r} or absent")
  if missing := [key for key in ("r", "lora_alpha") if key not in hf]:
    raise ValueError(f"{directory / CONFIG} lacks {', '.join(missing)}")
  rank, table, found, problems = hf["r"], _modules(decoder, architecture), {}, []
  for name, (shape, kind) in _headers(directory).items():
    match = NAME.fullmatch(_as_stored(name))
    if not match or match[1] not in table:
      problems.append(f"{name} would not be used" + _fused(match and match[1], decoder, architecture))
      continue
    path, layer, inputs, outputs = table[match[1]]
    found.setdefault((layer, ".".join(path[1:])), set()).add(match[2])
    wanted = (rank, inputs) if match[2] == "A" else (outputs, rank)
    if shape != wanted or kind not in pretrained.FLOATS:
      problems.append(f"{name} is {kind}{list(shape)}, but {list(wanted)} in {', '.join(pretrained.FLOATS)} is "
                      "wanted")
  problems += [f"layer {layer} has one half only of {matrix}" for (layer, matrix), halves in found.items()
               if len(halves) != 2]
  layers, matrices = sorted({layer for layer, _ in found}), sorted({matrix for _, matrix in found})
  if len(found) != len(layers) * len(matrices):
    problems.append(f"layers differ in what is adapted: {len(found)} matrices, of kinds {', '.join(matrices)}, in "
                    f"layers {layers}")
  if problems or not found:
    raise ValueError(f"{directory} holds no adapter of this {architecture}:\n  "
                     + "\n  ".join(problems[:8] or ["it has no tensors"]))
  return dict(rank=rank, alpha=float(hf["lora_alpha"]), rank_stabilized=bool(hf.get("use_rslora")),
              targets="^({})$".format("|".join(map(re.escape, matrices))),
              layers=() if len(layers) == decoder.layers else tuple(layers))


def load(directory: pathlib.Path, decoder: DecoderConfig, architecture: str, name: str, abstract: PyTree
         ) -> PyTree:
  """The matrices of an adapter on the devices, as a part of the parameters, for `adapters.joined`.

  Args:
    directory: checked by `settings`.
    decoder: with the adapter.
    architecture: of the base.
    name: of the adapter.
    abstract: `{"params": ...}` of arrays or `jax.ShapeDtypeStruct`, which say what sharding is wanted.
  """
  named = {(path, layer): module for module, (path, layer, *_) in _modules(decoder, architecture).items()}
  found = {}
  with safetensors.safe_open(directory / TENSORS, framework="numpy") as tensors:
    held = {_as_stored(name): name for name in tensors.keys()}
    for path, leaf in traverse_util.flatten_dict(abstract["params"]).items():
      if path[-2:-1] != (name,) or path[-1] not in (A, B):
        continue
      block = BLOCK.fullmatch(path[0])
      layers = [int(block[2])] if block[2] else range(decoder.layers)
      shape, values = leaf.shape if block[2] else leaf.shape[1:], []
      for layer in layers:
        key = _key(named[path[:-2], layer], path[-1])
        values.append(np.array(tensors.get_tensor(held[key]), np.float32).T.reshape(shape) if key in held
                      else np.zeros(shape, np.float32))
      value = values[0] if block[2] else np.stack(values)
      found[path] = pretrained.send(np.ascontiguousarray(value), leaf.sharding)
  return {"params": traverse_util.unflatten_dict(found)}


def check_exportable(decoder: DecoderConfig, adapter: Adapter, architecture: str) -> None:
  """Refuses adapters of modules that PEFT has no such matrices beside, and of reward models.

  Raises:
    ValueError: names them.
  """
  held = {path for path, *_ in _modules(decoder, architecture).values()}
  if families.has_score(decoder):
    raise ValueError(f"adapter {adapter.name!r}: the head {families.SCORE!r} is trained beside it, which its own "
                     "files would not hold: write the whole model with --merge-adapters")
  table = tensor_names.tensors(decoder, architecture)
  lost = sorted({pieces[0].name for pieces in table.values() for piece in pieces if piece.path[-1] == "kernel"
                 and piece.expert is None and adapter.covers(piece.path[:-1]) and piece.path[:-1] not in held})
  if lost:
    raise ValueError(f"adapter {adapter.name!r}: {lost[0]} is one tensor of {architecture} and several matrices "
                     "here, each with an adapter of its own, which PEFT cannot hold: write the whole model with "
                     "--merge-adapters")


def save(params: PyTree, decoder: DecoderConfig, adapter: Adapter, architecture: str, directory: pathlib.Path, *,
         base: str, dtype: str) -> None:
  """Writes config and tensors of an adapter into a directory that is there.

  Args:
    params: `{"params": ...}`.
    base: what PEFT loads it on: a directory or hub id.
    dtype: of the stored numbers.
  """
  leaves, tensors, matrices = traverse_util.flatten_dict(params["params"]), {}, set()
  for module, (path, layer, *_) in _modules(decoder, architecture).items():
    if (*path, adapter.name, A) not in leaves or adapter.layers and layer not in adapter.layers:
      continue
    matrices.add(module.rsplit(".", 1)[-1])
    for half in (A, B):
      value = np.asarray(sharding.to_host(leaves[(*path, adapter.name, half)]))
      value = value[layer] if path[0] == "blocks" else value
      value = value.reshape(-1, adapter.rank) if half == A else value.reshape(adapter.rank, -1)
      tensors[_key(module, half)] = np.ascontiguousarray(value.T.astype(jnp.dtype(dtype)))
  safetensors.numpy.save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
  pretrained.write_json(directory / CONFIG, dict(
      peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=adapter.rank,
      lora_alpha=adapter.alpha, lora_dropout=0.0, use_rslora=adapter.rank_stabilized,
      target_modules=sorted(matrices), layers_to_transform=list(adapter.layers) or None, layers_pattern=None,
      bias="none", fan_in_fan_out=False, init_lora_weights=True, modules_to_save=None, inference_mode=True,
      rank_pattern={}, alpha_pattern={}))


def _modules(decoder, architecture) -> Mapping[str, tuple[tuple[str, ...], int, int, int]]:
  """Published module -> path of the matrix here, layer, inputs and outputs; of modules that are one matrix."""
  return {name.removesuffix(".weight"): (pieces[0].path[:-1], pieces[0].layer, pieces[0].columns,
                                         pieces[0].rows[1])
          for name, pieces in tensor_names.tensors(decoder, architecture).items()
          if len(pieces) == 1 and pieces[0].layer is not None and pieces[0].expert is None
          and pieces[0].path[-1] == "kernel"}


def _fused(module, decoder, architecture):
  several = len(tensor_names.tensors(decoder, architecture).get(f"{module}.weight", ())) > 1
  return ", for that is several matrices here: merge it into its base with PEFT" if several else ""


def _as_stored(name):
  """Of a model that reads images too: PEFT names modules as they lie in memory, files as they once did."""
  return name.replace(IN_MEMORY, IN_FILES, 1)


def _key(module, half):
  return f"base_model.model.{module}.lora_{'A' if half == A else 'B'}.weight"


def _headers(directory) -> dict[str, tuple[tuple[int, ...], str]]:
  path = directory / TENSORS
  if not path.exists():
    raise ValueError(f"{directory} has {CONFIG} and no {TENSORS}; other formats, such as adapter_model.bin, must "
                     "be converted: save_pretrained of PEFT does so")
  try:
    with safetensors.safe_open(path, framework="numpy") as tensors:
      parts = {name: tensors.get_slice(name) for name in tensors.keys()}
      return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f"{path} is damaged or incomplete: {error}") from error
