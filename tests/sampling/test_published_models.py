"""Greedy samples of published models, from the cache, against `transformers.generate` with its own."""

import jax
import pytest
import torch

from jaxrl.models import pretrained
from jaxrl.sampling import Request, Sampler, SamplingParams
from tests.models import published

TOKENS = 64  # windows are 5 or 6, and prompts 24 and 11
NAMES = ("llama3_scaled_tied", "mistral_window", "qwen2_late_windows", "qwen3", "qwen3_moe_mixed", "gemma",
         "gemma2", "gemma3", "phi3_fused", "olmo2", "neox")


def lively(name):
  """A model that does not repeat one token, which would hide errors: layers say more than embeddings."""
  made = published.model(published.CONFIGS[name]())
  with torch.no_grad():
    for parameter, value in made.named_parameters():
      if "embed" in parameter:
        value *= 0.1
      if "norm" in parameter and parameter.endswith("weight") and not name.startswith("gemma"):
        value += 1  # which Gemma's norms do themselves
  made.generation_config.eos_token_id = None
  return made


@pytest.mark.parametrize("name", NAMES)
def test_transformers_generates_the_same_tokens(name, tmp_path):
  theirs = lively(name)
  theirs.save_pretrained(tmp_path)
  prompts = [published.tokens()[0], published.tokens()[1][:11]]

  # Where layers are alike they are stacked, which is also quicker to compile.
  decoder = published.decoder_of(tmp_path, rope_length=0, scan_layers="mixed" not in name)
  params = pretrained.load_parameters(tmp_path, decoder, published.abstract(decoder))["params"]
  how = SamplingParams(max_tokens=TOKENS, temperature=0.0)
  requests = [Request(prompt.tolist(), 1, (i,), how) for i, prompt in enumerate(prompts)]
  found = Sampler(decoder, streams=1).sample(params, requests, jax.random.key(0))

  for prompt, [sample] in zip(prompts, found, strict=True):
    with torch.no_grad():
      expected = theirs.generate(torch.tensor(prompt[None]), max_new_tokens=TOKENS, do_sample=False,
                                 use_cache=True)[0, len(prompt):].tolist()
    assert len(set(expected)) > 5
    assert sample.tokens.tolist() == expected
