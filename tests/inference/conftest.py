"""A tiny model to ask."""

import json

import pytest
import transformers

from jaxrl import data
from jaxrl.inference import served
from tests.inference.asked import CHATML
from tests.models import published


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  """A directory as transformers writes it: a random model of two layers and a byte-level tokenizer."""
  place = tmp_path_factory.mktemp("tiny")
  tokenizer = data.train_bpe(["user assistant system hello there"] * 5, 280)
  tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  tokenizer.fast.chat_template = CHATML
  tokenizer.save(place)
  made = published.model(transformers.LlamaConfig(**dict(published.SHAPE, vocab_size=304)))
  made.save_pretrained(place)
  (place / "generation_config.json").write_text(json.dumps(
      dict(eos_token_id=[2, 5], do_sample=True, temperature=0.7, top_p=0.9)))
  return place


@pytest.fixture(scope="session")
def model(tiny):
  return served.load(str(tiny))
