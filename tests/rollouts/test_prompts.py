"""Prompts that episodes write begin as those of the data do."""

import types

from jaxrl.data.tokenizers import CharacterTokenizer
from jaxrl.rollouts.context import EpisodeContext


def context(tokenizer):
  rollouts = types.SimpleNamespace(tokenizer=tokenizer, templates={"ask": "{question}=?"}, memory={})
  return EpisodeContext(rollouts, types.SimpleNamespace(step=0), 0)


def test_a_prompt_of_its_own_begins_with_bos_and_one_behind_others_does_not():
  tokenizer = CharacterTokenizer("12+=?")
  ctx = context(tokenizer)
  assert ctx.prompt("ask", question="1+2") == [tokenizer.bos_id, *tokenizer.encode("1+2=?")]
  assert ctx.render("ask", question="1+2") == tokenizer.encode("1+2=?")


def test_a_tokenizer_without_bos_gives_none():
  plain = types.SimpleNamespace(bos_id=None, encode=lambda text: list(text.encode()))
  assert context(plain).prompt("ask", question="1") == list(b"1=?")
