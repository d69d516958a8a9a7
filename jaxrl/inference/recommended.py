"""How a published model wants to be sampled: its `generation_config.json`, as `generate` of transformers reads it."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from jaxrl import data
from jaxrl.models import pretrained
from jaxrl.sampling import SamplingParams
from jaxrl.training import sources

# Of an answer, unless something says otherwise; half of what a model can read, if that is less.
MAX_TOKENS = 512
# What is done here, with the types of it; where sampling is off, OFF says which values say nothing.
DONE = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float), "min_p": (int, float),
        "max_new_tokens": (int,)}
OFF = {"temperature": (1,), "top_k": (0, 50), "top_p": (1,), "min_p": (0,)}
READ = (*DONE, "do_sample", "eos_token_id", "stop_strings")
# What is not done, but is nothing with a value of 1; with others it is nothing if it is false.
ONE = ("repetition_penalty", "encoder_repetition_penalty", "typical_p", "num_beams", "num_beam_groups",
       "num_return_sequences", "guidance_scale")
# What changes how answers are computed, or what is returned beside them, and not the answers.
HARMLESS = (
    "transformers_version", "_from_model_config", "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "renormalize_logits",
    "remove_invalid_values", "early_stopping", "length_penalty", "use_mtp", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size")


def recommended(place: pathlib.Path, tokenizer: data.Tokenizer, max_positions: int = 0
                ) -> tuple[SamplingParams, str]:
  """How a published model samples and where it stops, and what its file asks for in vain.

  A file that does not say `do_sample` means the most likely token, temperature 0, as for transformers; what it
  says of `top_p` and the like holds once a temperature is given. What it leaves out is off, also `top_k`, for
  which transformers would take 50. Without a file, samples are those of the model itself.

  Args:
    place: of the model.
    tokenizer: of it.
    max_positions: tokens that it can read, 0 if nothing says so.

  Raises:
    ValueError: values that nobody can sample with, by file and name.
  """
  path = place / pretrained.GENERATION
  says = pretrained.read_json(place, pretrained.GENERATION) if path.exists() else {"do_sample": True}
  turn, ends = data.end_of_turn(tokenizer), sources.stop_ids(place)
  try:
    found = {name: _number(name, says[name]) for name in DONE if says.get(name) is not None}
    most = min(MAX_TOKENS, max_positions // 2 or MAX_TOKENS)
    found["max_tokens"] = found.pop("max_new_tokens", most)
    found["temperature"] = found.get("temperature", 1.0) if says.get("do_sample") else 0.0
    stops = (tokenizer.eos_id, *ends, *([] if turn is None else [turn]))
    how = SamplingParams(**found, stop_ids=tuple(dict.fromkeys(stops)),
                         stop_strings=_strings(says.get("stop_strings")))
  except ValueError as error:
    raise ValueError(f"{path}: {str(error).replace('sampling.', '', 1)}") from error
  return how, _unheeded(path, says)


def _number(name, value):
  if isinstance(value, bool) or not isinstance(value, DONE[name]):
    raise ValueError(f"{name}={value!r} is not {'a number' if float in DONE[name] else 'a whole number'}")
  return value


def _strings(given):
  found = [given] if isinstance(given, str) else given or ()
  if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
    raise ValueError(f"stop_strings={given!r} is no text, nor a list of these")
  return tuple(found)


def _unheeded(path: pathlib.Path, says: Mapping[str, Any]) -> str:
  """One line with what a file asks for and does not get; empty if there is nothing."""
  lost = {name: value for name, value in says.items() if name not in (*READ, *HARMLESS) and value
          and not (name in ONE and value == 1) and not (name == "max_length" and says.get("max_new_tokens"))}
  unused = {} if says.get("do_sample") else {
      name: says[name] for name in OFF if says.get(name) is not None and says[name] not in OFF[name]}
  lines = [f"asks for {_named(lost)}, which {'is' if len(lost) == 1 else 'are'} not done here"] if lost else []
  lines += [f"says {_named(unused)} without do_sample, so answers are of the most likely tokens unless you give "
            "a --temperature"] if unused else []
  return f"{path} {', and '.join(lines)}" if lines else ""


def _named(values):
  return ", ".join(f"{name}={value!r}" for name, value in values.items())


def in_force(how: SamplingParams, given: Mapping[str, Any], samples: int) -> list[str]:
  """What somebody should know about settings: all of them, and those that change nothing.

  Args:
    how: to sample.
    given: on the command line.
    samples: of each prompt.
  """
  fields = dataclasses.asdict(how)
  stops, strings = fields.pop("stop_ids"), fields.pop("stop_strings")
  lines = [", ".join(f"{name} {value:g}" for name, value in fields.items())
           + f", stops at {', '.join(map(repr, (*stops, *strings)))}"]
  if how.temperature == 0:
    if vain := [f"--{name}" for name in OFF if name != "temperature" and given.get(name)]:
      lines.append(f"{', '.join(vain)}: without effect at temperature 0, which takes the most likely token; "
                   "give a --temperature")
    if samples > 1:
      lines.append(f"the {samples} samples of a prompt are the same at temperature 0: give a --temperature")
  return lines
