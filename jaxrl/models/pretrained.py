"""Directories of published models, in and out: `config.json`, safetensors and what lies beside them.

Tensors go one at a time from a file to the devices, and back; PyTorch is never needed. What each is
called is the business of `families` and `tensor_names`.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any, Protocol

from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl import sharding
from jaxrl.models import families
from jaxrl.models import tensor_names
from jaxrl.models.decoder_config import DecoderConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = ("*.json", "*.safetensors", "*.jinja")  # files of a repository, those of its top directory
WEIGHTS = ("*.safetensors",)
UNWANTED = ("*/*", "consolidated*")  # the same weights in other formats
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Computed here from the config: of RoPE, and masks in the first files of GPT-NeoX.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")
MAX_SHARD_BYTES = 5 * 10 ** 9
# Of config.json, what is of the directory that it lay in: where that was, and code beside it.
OF_ITS_DIRECTORY = ("_name_or_path", "auto_map")


class NotHere(ValueError):
  """A published model that is not on this machine and could not be downloaded."""


class Writer(Protocol):
  """What `save` asks of a tokenizer."""

  pad_id: int
  bos_id: int | None
  eos_id: int

  def export(self, directory: pathlib.Path) -> None:
    """Writes files that `transformers.AutoTokenizer` reads."""


def resolve(source: str, *, weights: bool = True) -> pathlib.Path:
  """The directory of a model: one on this machine, else that of a hub id in the cache of
  `huggingface_hub`, which downloads what is not there yet; no `weights` if they are not wanted.

  Raises:
    ValueError: there is no such directory, and the text is no id of a repository.
    NotHere: there is no such repository, or it cannot be reached; says which files to fetch and where
      to put them.
  """
  place = pathlib.Path(source).expanduser()
  if place.is_dir():
    return place
  if place.exists() or not HUB_ID.fullmatch(source):
    raise ValueError(f"config.model.source={source!r} is no directory (relative paths start at "
                     f"{pathlib.Path.cwd()}) and no id of the form OWNER/NAME")
  import huggingface_hub
  from huggingface_hub import constants
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        source, allow_patterns=[p for p in WANTED if weights or p not in WEIGHTS],
        ignore_patterns=list(UNWANTED)))
  except Exception as error:  # of the network, the hub or its cache: whatever it is, this is the remedy
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    raise NotHere(
        f"config.model.source={source!r} is no directory here, and as an id of {constants.ENDPOINT} it "
        f"could not be had ({why}). Where there is a network, run\n  hf download {source} "
        f"--include '*.json' '*.safetensors' '*.jinja' --local-dir {source.split('/')[-1]}\n"
        f"which fetches {CONFIG}, {GENERATION}, tokenizer.json, tokenizer_config.json, the chat template "
        f"and {SINGLE} (or the shards and {INDEX}); bring that directory here and set "
        f"config.model.source to it, or leave --local-dir out and bring {constants.HF_HUB_CACHE}") from error


def read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
  """A JSON file of a model.

  Raises:
    ValueError: it is not there, or cannot be read.
  """
  path = directory / name
  if not path.exists():
    raise ValueError(f"{directory} is not the directory of a model: it has no {name}, but "
                     f"{sorted(p.name for p in directory.iterdir())[:10]}")
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds no JSON object")
  return found


# ---------------------------------------------------------------------------------------------- in


def check(directory: pathlib.Path, decoder: DecoderConfig) -> list[str]:
  """Refuses files that do not hold the tensors of a decoder, from their headers alone.

  Returns:
    The names of tensors that are of no use to a text model: those that read images.

  Raises:
    ValueError: names tensors that are missing, unused, or of another shape or type.
  """
  return _plan(directory, decoder)[2]


def load_parameters(directory: pathlib.Path, decoder: DecoderConfig, abstract: PyTree) -> PyTree:
  """The parameters of a model, each in the buffers of the devices that want it.

  A tensor is read, turned, converted and sent before the next one is read.

  Args:
    directory: of a model, see `resolve`.
    decoder: made with the fields that `families.settings` found in its config.
    abstract: the tree `{"params": ...}` of arrays or `jax.ShapeDtypeStruct`, which say what type and
      sharding is wanted; parameters that no published model has may be left out.

  Returns:
    `{"params": ...}` with what the model has; value head and critic are no part of it.

  Raises:
    ValueError: as `check`; or a matrix of logits that is said to be tied and differs from the
      embedding.
  """
  table, files, _ = _plan(directory, decoder)
  wanted = {path: leaf for path, leaf in traverse_util.flatten_dict(abstract["params"]).items()}
  found: dict[tuple[str, ...], Any] = {}
  for file, names in files.items():
    with safetensors.safe_open(file, framework="numpy") as tensors:
      for name in names:
        for piece in table[name]:
          leaf = wanted[piece.path]
          value = _ours(tensors.get_slice(name), piece, leaf.dtype)
          if not piece.slot:
            found[piece.path] = send(value, leaf.sharding)
          else:
            found[piece.path] = _put(found.get(piece.path), value, piece.slot, leaf)
  bias = (f"{families.SCORE}_head", "bias")
  if bias in wanted and families.has_score(decoder) and (bias[0], "kernel") in found:
    found[bias] = send(np.zeros(wanted[bias].shape, wanted[bias].dtype), wanted[bias].sharding)
  return {"params": traverse_util.unflatten_dict(found)}


def _ours(tensor, piece, dtype):
  """Rows of a published tensor as a parameter here, in memory of its own."""
  first, last = piece.rows
  if piece.groups == 1:
    rows = tensor[first:last]
  else:
    rows = tensor[:]
    rows = rows.reshape(piece.groups, -1, *rows.shape[1:])[:, first:last].reshape(-1, *rows.shape[1:])
  rows = rows.T if piece.transpose else rows
  return np.array(rows, dtype, order="C").reshape(piece.shape)


def send(value: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
  """An array of the host on the devices that want it."""
  if where is None:
    return jax.device_put(value)
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _put(stack, value, slot, leaf):
  """A stack of layers or experts with one of them filled in, in the same buffers."""
  if stack is None:
    stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
  # One is split as the stack is, whose first axes are whole everywhere.
  where = leaf.sharding
  if isinstance(where, jax.sharding.NamedSharding):
    where = jax.NamedSharding(where.mesh, jax.P(*where.spec[len(slot):]))
  return _set(stack, send(value, where), slot)


@jax.jit
def _one_of(stack, slot):
  return stack[slot]


@functools.partial(jax.jit, donate_argnums=0)
def _set(stack, value, slot):
  start = (*slot, *[0] * value.ndim)
  return jax.lax.dynamic_update_slice(stack, value.reshape((1,) * len(slot) + value.shape), start)


def _plan(directory, decoder):
  """The table of tensors, in which file each one lies, and which are of other parts; all checked."""
  hf = read_json(directory, CONFIG)
  architecture = families.architecture_of(hf)
  table = tensor_names.tensors(decoder, architecture)
  headers = _headers(directory)
  ignored = [name for name in headers if name.startswith(tensor_names.ignored(architecture))]
  unused = [name for name in headers if name not in table and not BUFFERS.search(name)
            and name not in ignored]
  tied = tensor_names.unembedding_of(architecture)
  if decoder.tie_embeddings and tied in unused and not architecture.endswith("ForSequenceClassification"):
    _check_tied(headers, tied, tensor_names.embedding_of(architecture))
    unused.remove(tied)
  missing = [name for name in table if name not in headers]
  problems = [f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
  problems += [f"{_some(unused)} would not be used"] if unused else []
  for name, pieces in table.items():
    if name not in headers:
      continue
    _, shape, kind = headers[name]
    if shape != tensor_names.shape_of(pieces):
      problems.append(f"{name} has shape {list(shape)}, but config.json means "
                      f"{list(tensor_names.shape_of(pieces))}")
    elif kind not in FLOATS:
      problems.append(f"{name} has numbers of type {kind}; {', '.join(FLOATS)} can be read")
  if problems:
    more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
    raise ValueError(f"{directory} does not hold a {architecture} as its config.json says:\n  "
                     + "\n  ".join([*problems[:8], *more]))
  files: dict[pathlib.Path, list[str]] = {}
  for name in table:
    files.setdefault(headers[name][0], []).append(name)
  return table, files, ignored


def _some(names):
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _headers(directory) -> dict[str, tuple[pathlib.Path, tuple[int, ...], str]]:
  """File, shape and type of every tensor of a model."""
  found = {}
  for path, listed in _shards(directory).items():
    try:
      with safetensors.safe_open(path, framework="numpy") as tensors:
        names = list(tensors.keys())
        for name in names:
          part = tensors.get_slice(name)
          found[name] = (path, tuple(part.get_shape()), part.get_dtype())
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(f"{path} is damaged or incomplete: {error}") from error
    absent = [name for name in listed or () if name not in names]
    if absent:
      raise ValueError(f"{directory / INDEX} says that {path.name} has {_some(absent)}, but it has not: "
                       "files of two models, or an incomplete download")
  return found


def _shards(directory) -> dict[pathlib.Path, list[str] | None]:
  """Files with tensors, and which each must hold; None if nothing says so.

  Where both are, one file goes before an index, which may be of what lay there before: so it does for
  transformers.
  """
  if (directory / SINGLE).exists():
    return {directory / SINGLE: None}
  if (directory / INDEX).exists():
    by_file: dict[pathlib.Path, list[str] | None] = {}
    for name, file in read_json(directory, INDEX).get("weight_map", {}).items():
      by_file.setdefault(directory / file, []).append(name)
    lost = sorted(path.name for path in by_file if not path.exists())
    if lost or not by_file:
      raise ValueError(f"{directory / INDEX} names {', '.join(lost[:8]) or 'no files'}"
                       + (", which are not there: the download is incomplete" if lost else ""))
    return by_file
  raise ValueError(f"{directory} has no {SINGLE} and no {INDEX}: they were not downloaded, or the weights are "
                   "in another format, such as pytorch_model.bin, and must be converted: save_pretrained of "
                   "transformers does so. It has "
                   f"{sorted(p.name for p in directory.iterdir())[:10]}")


def _check_tied(headers, logits, embedding):
  """A stored copy of the embedding is no harm; another matrix means that the config is wrong."""
  def read(name):
    with safetensors.safe_open(headers[name][0], framework="numpy") as tensors:
      return tensors.get_tensor(name)
  if embedding in headers and not np.array_equal(read(logits), read(embedding)):
    raise ValueError(f"{headers[logits][0].parent}: config.json says tie_word_embeddings, but {logits} is "
                     f"stored and differs from {embedding}; set tie_word_embeddings to false in config.json "
                     "if the model was trained so")


# --------------------------------------------------------------------------------------------- out


def save(params: PyTree, decoder: DecoderConfig, directory: pathlib.Path, *, dtype: str,
         tokenizer: Writer, card: str, imported: Mapping[str, Any] | None = None,
         generation: Mapping[str, Any] | None = None, stop_ids: Sequence[int] = (), max_positions: int = 0,
         max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
  """Writes a model so that `from_pretrained` of `transformers` loads it; complete or not at all.

  Args:
    params: `{"params": ...}`; a critic and a value head are not written.
    directory: does not exist yet, or is empty.
    dtype: of the stored numbers: float32, bfloat16 or float16.
    tokenizer: writes its own files.
    card: text of README.md.
    imported, generation: config.json and generation_config.json of the model that training began
      with, which are kept as far as they still hold.
    stop_ids: tokens that answers end in, beside those of `generation`.
    max_positions: tokens that the model is for, see `families.hf_config`.
    max_shard_bytes: of tensors in one file; host memory holds one file's at a time.

  Raises:
    ValueError: see `check_exportable`; or a score with a bias, which no published model has.
  """
  hf = check_exportable(decoder, directory, dtype=dtype, imported=imported, max_positions=max_positions)
  leaves = traverse_util.flatten_dict(params["params"])
  bias = leaves.get((f"{families.SCORE}_head", "bias"))
  if families.has_score(decoder) and bias is not None and np.any(np.asarray(bias)):
    raise ValueError(f"the score has a bias of {float(np.asarray(bias).reshape(-1)[0]):g}, which published "
                     "reward models cannot hold: train with config.model.score_bias=False; it shifts all "
                     "scores alike, so where only differences matter it may be set to 0")
  tokens = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
  kept = {k: v for k, v in (imported or {}).items() if k in tokens and v is not None}
  hf |= {**tokens, **kept, "dtype": dtype, "torch_dtype": dtype}
  for name in OF_ITS_DIRECTORY:
    hf.pop(name, None)
  with writing(directory) as partial:
    write_json(partial / CONFIG, hf)
    write_json(partial / GENERATION, ending(generation or tokens, stop_ids))
    tokenizer.export(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    _write_tensors(leaves, tensor_names.tensors(decoder, hf["architectures"][0]), partial, dtype,
                   max_shard_bytes)


def ending(generation: Mapping[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
  """A generation_config.json with more tokens that answers end in."""
  says = generation.get("eos_token_id")
  says = says if isinstance(says, list) else [] if says is None else [says]
  stops = list(dict.fromkeys((*says, *stop_ids)))
  return {**generation, "eos_token_id": stops if len(stops) > 1 else stops[0]} if stop_ids else dict(generation)


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to write into, which becomes `directory` (not there yet, or empty) once all is written."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial",
                                          dir=directory.parent))
  try:
    partial.chmod(0o777 & ~_umask())
    yield partial
    if directory.exists():
      directory.rmdir()
    partial.rename(directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def check_exportable(decoder: DecoderConfig, directory: pathlib.Path, *, dtype: str,
                     imported: Mapping[str, Any] | None = None, max_positions: int = 0) -> dict[str, Any]:
  """What can be refused before any parameter is read -> the config.json to be.

  Raises:
    ValueError: the directory holds something, a type that cannot be stored, or a decoder that no
      published architecture is.
  """
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"{directory} is there already: name a directory that is not, or is empty")
  if dtype not in FLOATS.values():
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(FLOATS.values())}")
  return dict(families.hf_config(decoder, imported=imported, max_positions=max_positions))


def _umask():
  found = os.umask(0)
  os.umask(found)
  return found


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON file as it is read best."""
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(leaves, table, directory, dtype, max_shard_bytes):
  """Files of at most so many bytes each, with an index if there are several."""
  size = np.dtype(jnp.dtype(dtype)).itemsize
  bytes_of = {name: int(np.prod(tensor_names.shape_of(pieces))) * size for name, pieces in table.items()}
  shards = list(_shared_out(bytes_of, max_shard_bytes))
  index = {}
  for number, names in enumerate(shards, start=1):
    file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    tensors = {name: _theirs(leaves, table[name], dtype) for name in names}
    safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    index |= {name: file for name in names}
  if len(shards) > 1:
    write_json(directory / INDEX, {"metadata": {"total_size": sum(bytes_of.values())},
                                    "weight_map": index})


def _shared_out(bytes_of: Mapping[str, int], limit: int) -> Iterator[Sequence[str]]:
  names, total = [], 0
  for name, size in bytes_of.items():
    if names and total + size > limit:
      yield names
      names, total = [], 0
    names.append(name)
    total += size
  yield names


def _theirs(leaves, pieces, dtype):
  """The published tensor that is made of these pieces."""
  parts = []
  for piece in pieces:
    leaf = leaves[piece.path]
    if piece.slot:
      leaf = _one_of(leaf, piece.slot)
    value = np.asarray(sharding.to_host(leaf)).astype(jnp.dtype(dtype))
    if piece.transpose:
      value = value.reshape(piece.columns, -1).T
    parts.append(value.reshape(piece.groups, piece.rows[1] - piece.rows[0], -1))
  return np.ascontiguousarray(np.concatenate(parts, axis=1)).reshape(tensor_names.shape_of(pieces))
