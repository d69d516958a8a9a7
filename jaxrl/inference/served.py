"""A model to ask: that of a run, or a published one, with the way in which it wants to be asked."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.data import templates
from jaxrl.inference.recommended import recommended
from jaxrl.models import DecoderConfig
from jaxrl.models import adapters
from jaxrl.models import families
from jaxrl.models import peft
from jaxrl.models import pretrained
from jaxrl.models import rope_configs
from jaxrl.sampling import Request
from jaxrl.sampling import Sampler
from jaxrl.sampling import SamplingParams
from jaxrl.training import inputs
from jaxrl.training import pieces
from jaxrl.training import sources
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters
from jaxrl.training.reward_models import newest

FOR_WATCHING = 4  # tokens between two looks of the host while somebody reads along
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Answer:
  """One sample as text.

  Attributes:
    text: without stop string and special tokens.
    finish: `stop` or `length`.
    tokens, logprobs: with the stop token, see `sampling.Sample`. [length]
  """

  text: str
  finish: str
  tokens: np.ndarray
  logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
  """A model and its tokenizer.

  Attributes:
    identity: what tells it from others: where it is, and which checkpoint of a run.
    params: on the mesh.
    defaults: how it samples unless said otherwise, and where it stops.
    chats: prompts are messages of a chat, which its template writes.
    template: what a prompt is put into, parsed; None if that asks for more than a question.
    max_positions: tokens that it can read, 0 if nothing says so.
    unheeded: what it asks for that is not done, for people; empty if there is nothing.
  """

  identity: Mapping[str, Any]
  tokenizer: data.Tokenizer
  decoder: DecoderConfig
  params: Any
  mesh: jax.sharding.Mesh
  defaults: SamplingParams
  chats: bool
  template: Sequence[tuple[str, str | None]] | None = (("", "question"),)
  max_positions: int = 0
  unheeded: str = ""

  def prompt(self, text: str, system: str = "", raw: bool = False) -> list[int]:
    """Token ids of a prompt: a message of the user, or a text to continue.

    Args:
      text: of it.
      system: what the system says before it.
      raw: as it stands, without any template.

    Raises:
      ValueError: the tokenizer cannot write it.
    """
    if raw or not self.chats:
      if system:
        raise ValueError("--system is for models that are asked in a chat, and this one continues texts")
      start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
      found = start + self.tokenizer.encode(text if raw else self._filled(text))
      if not found:
        raise ValueError("the prompt is empty, and this tokenizer has no BOS to begin with: say something")
      return found
    return self.messages([{"role": "user", "content": self._filled(text)}], system)

  def _filled(self, text):
    if self.template is None:
      raise ValueError("config.data.prompt_template of this run asks for more than {question}: write the whole "
                       "prompt, as the run does, and pass --raw")
    return templates.fill(self.template, {"question": text})

  def messages(self, messages: Sequence[Mapping[str, str]], system: str = "") -> list[int]:
    """Token ids of a conversation that the model is to continue.

    Args:
      messages: of role and content.
      system: what the system says, unless the messages begin with that.

    Raises:
      ValueError: there is no chat template, or it refuses the messages.
    """
    if system and messages[0]["role"] != "system":
      messages = [{"role": "system", "content": system}, *messages]
    return self.tokenizer.render_chat(messages, add_generation_prompt=True)

  def check_length(self, prompt: Sequence[int], max_tokens: int) -> None:
    """Raises a ValueError if prompt and answer together are longer than the model, or its table of rotations,
    can read."""
    scaling = dict(self.decoder.rope_scaling)
    if scaling.get("rope_type") == "longrope":
      turned = max(scaling[rope_configs.ORIGINAL], self.decoder.rope_length)
      if len(prompt) + max_tokens > turned:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and with --max_tokens={max_tokens} more it "
                         f"would pass {turned}, above which this model turns all tokens by other factors (longrope) "
                         "than the ones it is asked with here: shorten one of them")
    if self.max_positions and len(prompt) + max_tokens > self.max_positions:
      raise ValueError(f"the prompt has {len(prompt)} tokens, and with --max_tokens={max_tokens} more it would "
                       f"pass the {self.max_positions} that the model can read: shorten one of them")

  def sampler(self, rows: int, watched: bool = False) -> Sampler:
    """What samples, as many rows at a time; if watched, in one thread and with short chunks."""
    how = dict(chunk=FOR_WATCHING, streams=1) if watched else {}
    return Sampler(self.decoder, mesh=self.mesh, max_rows=rows, decode=self.tokenizer.decode, **how)

  def answers(self, sampler: Sampler, prompts: Sequence[Sequence[int]], seeds: Sequence[int],
              how: SamplingParams, n: int = 1, *,
              on_text: Callable[[int, int, str], None] | None = None) -> list[list[Answer]]:
    """Samples; each is a function of prompt, seed, its number and how it is sampled, and nothing else.

    Args:
      sampler: of this model.
      prompts: token ids.
      seeds: of each prompt, in [0, 2**32).
      how: to sample.
      n: samples of each prompt.
      on_text: is given the number of a prompt and of a sample and the text so far, which only grows.
    """
    def on_tokens(request, sample, tokens):
      on_text(request, sample, shown(self._text(tokens, how), how.stop_strings))

    found = sampler.sample(
        self.params["params"], [Request(prompt, n, (seed,), how) for prompt, seed in zip(prompts, seeds)],
        jax.random.key(0), on_tokens=on_tokens if on_text else None)
    return [[Answer(self._text(s.tokens, how)[:s.text_end], s.finish, s.tokens, s.logprobs) for s in samples]
            for samples in found]

  def _text(self, tokens, how):
    """Text of tokens, without the one that stopped them."""
    stopped = len(tokens) and int(tokens[-1]) in how.stop_ids
    return self.tokenizer.decode(tokens[:-1] if stopped else tokens)


def shown(text: str, stop_strings: Sequence[str]) -> str:
  """As much of an unfinished text as is certain: no half character, no part of a stop string."""
  ends = [i for i in map(text.find, stop_strings) if i >= 0]
  if ends:
    return text[:min(ends)]
  text = text.rstrip("\ufffd")
  parts = {string[:length] for string in stop_strings for length in range(1, len(string))}
  return text[:len(text) - max((len(part) for part in parts if text.endswith(part)), default=0)]


def seed_of(seed: int, number: int) -> int:
  """The seed of one of many prompts, which gives the same samples when it is asked alone."""
  return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


# ------------------------------------------------------------------------------------------- loading


def load(model: str, *, dtype: str = "", tensor: int = 1, date: str = "") -> Model:
  """A model by the --workdir of a run, a directory as transformers or PEFT writes it, or a hub id.

  Args:
    model: which one; of a run, the newest checkpoint.
    dtype: of weights and computation; "" is that of the run, or as a published model is
      stored, float32 where that is in float16.
    tensor: devices that share one copy of it.
    date: what its chat template writes as the date; "" is that of the run, or today.

  Raises:
    ValueError: there is no such model, or it does not write text.
    CheckpointError: the checkpoint is damaged.
  """
  if dtype not in ("", *DTYPES):
    raise ValueError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}")
  try:
    mesh = sharding.make_mesh(tensor=tensor)
    place = pathlib.Path(model).expanduser().absolute()
    if place.is_dir() and not peft.is_adapter(place) and "phases" in pretrained.read_json(
        place, pretrained.CONFIG):
      return _of_run(place, dtype, mesh, date)
    return _published(model, dtype, mesh, date)
  except ValueError as error:
    text = str(error).replace("config.model.source", "--model").replace("--config.mesh.tensor", "--tensor")
    raise ValueError(text.replace("config.rollout.", "--")) from error


def _of_run(place, dtype, mesh, date):
  configs.check_run(place, f"--model={place}")
  config = configs.of_run(place)
  trained = [n for n in config.phases if configs.phase_config(config, n).kind != "evaluate"]
  if trained and configs.phase_config(config, trained[-1]).kind == "reward":
    raise ValueError(f"--model={place} is a run whose last phase, {trained[-1]}, trained a reward model, which "
                     "gives scores and writes no text: name a run that ends in another")
  tokenizer = data.load_tokenizer(place / "tokenizer")
  data.set_date(tokenizer, date, "--date")
  decoder = inputs.decoder_config(config.model, tokenizer)
  last = configs.phase_config(config, config.phases[-1])
  number = newest(place)
  defaults = pieces.sampling(last.rollout, inputs.builder(last, tokenizer).stop_ids)
  kept = place / sources.KEPT
  hf = pretrained.read_json(kept, pretrained.CONFIG) if kept.is_dir() else {}
  chats = bool(last.data.chat or last.data.messages)
  template = _asked(last.data.prompt_template)
  decoder, wanted = _wanted(decoder, "", mesh)
  params = read_parameters(place / "checkpoints", wanted)
  if dtype:
    decoder = dataclasses.replace(decoder, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
  return Model(dict(model=str(place), checkpoint=number), tokenizer, decoder, params, mesh, defaults,
               chats, template, hf.get("max_position_embeddings") or 0)


def _asked(template):
  """The template of a run's prompts, if a question is all that it asks for."""
  try:
    return templates.parse("prompt_template", template, ["question"])
  except ValueError:
    return None


def _published(model, dtype, mesh, date):
  place = pretrained.resolve(model)
  base = pretrained.resolve(peft.base_of(place)) if peft.is_adapter(place) else place
  hf = pretrained.read_json(base, pretrained.CONFIG)
  architecture = families.architecture_of(hf)
  if architecture == families.BY_ARCHITECTURE[architecture].classifier:
    raise ValueError(f"--model={model} is a {architecture}, which gives scores and writes no text")
  tokenizer = data.load_tokenizer(place if (place / "tokenizer.json").exists() else base)
  data.set_date(tokenizer, date, "--date")
  longest = families.text_of(hf).get("max_position_embeddings") or 0
  beside = place if (place / pretrained.GENERATION).exists() else base
  defaults, unheeded = recommended(beside, tokenizer, longest)
  stored = hf.get("dtype") or hf.get("torch_dtype")
  dtype = dtype or ("bfloat16" if stored == "bfloat16" else "float32")  # which holds float16, too
  fields = dict(configs.import_file(configs.SHIPPED / "base.py").get_config().model)
  found = {k: v for k, v in families.settings(hf).items() if k != "heads_on_top"}
  if base != place:
    fields["adapters"] = dict(default=peft.settings(place, DecoderConfig(**found), architecture))
  decoder = inputs.decoder_config({**fields, **found}, tokenizer)
  decoder, wanted = _wanted(decoder, dtype, mesh)
  params = pretrained.load_parameters(base, decoder, wanted)
  if base != place:
    params = adapters.joined(params, peft.load(place, decoder, architecture, "default", wanted))
  named = str(place.absolute()) if pathlib.Path(model).expanduser().is_dir() else model
  return Model(dict(model=named), tokenizer, decoder, params, mesh, defaults, tokenizer.chats,
               max_positions=longest, unheeded=unheeded)


def _wanted(decoder, dtype, mesh):
  """The decoder, and what parameters of it are to be read."""
  if dtype:
    decoder = dataclasses.replace(decoder, dtype=dtype, param_dtype=dtype)
  sharding.check_divisible(decoder, mesh)
  return decoder, {"params": states.abstract_parameters(decoder, mesh)["params"]}
