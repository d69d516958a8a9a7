"""Conversations as token ids, with a mask of exactly what the assistant says in them.

Where a template has `{% generation %}` blocks, its author has said what that is. Elsewhere it is found
by rendering: an answer begins where the rendering of what comes before it, made as for sampling, ends,
and goes to the token that ends its turn, such as `<|im_end|>`. So the model learns what it has to say
when it is asked in the same way, and what a template writes behind the turn is left to the template.
"""

import bisect
from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

Messages = Sequence[Mapping[str, Any]]
ASSISTANT = "assistant"
BESIDES = (("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking"))  # what is said too
PROBE = ({"role": "user", "content": "."}, {"role": ASSISTANT, "content": "."})
PRIVATE = range(0xE000, 0xF900)  # characters that no text has
ADVICE = ("give the tokenizer a template with {% generation %} ... {% endgeneration %} around what the "
          "assistant says")


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A rendered conversation.

  Attributes:
    tokens: up to the end of the last answer.
    said: which of them the assistant says. [length]
    start: the first token of the last answer.
    rewritten: numbers of messages of which the template keeps only a part once more follows, such as
      answers without the thinking before them: a model does not say them so, and they are not marked.
  """

  tokens: list[int]
  said: list[bool]
  start: int
  rewritten: tuple[int, ...] = ()


def message(given: Mapping[str, Any]) -> dict[str, Any]:
  """A message as templates get it: without nulls; an assistant that only calls tools has empty content."""
  found = {key: value for key, value in given.items() if value is not None}
  return {"content": "", **found} if calls(found) else found


def calls(message: Mapping[str, Any]) -> bool:
  """Whether the assistant calls tools in a message."""
  return message.get("role") == ASSISTANT and any(message.get(name) for name in BESIDES[0])


def conversation(tokenizer: Any, messages: Messages) -> Conversation:
  """A conversation that ends in an answer, as the tokenizer's template writes it.

  Args:
    tokenizer: a `PretrainedTokenizer`, or whatever has its methods for chats.
    messages: of role and content, and whatever else the template writes, such as `tool_calls`; the last one
      is the assistant's.

  Raises:
    ValueError: the template refuses the messages, leaves out a part of the last one, or does not let tell
      what the assistant says from the rest; names template and message, and says what to do.
  """
  if not messages or messages[-1]["role"] != ASSISTANT:
    raise ValueError("a conversation to learn from ends in a message of the assistant")
  if messages[0]["role"] == ASSISTANT:
    raise ValueError("the conversation begins with the assistant, and what it says first would be learned "
                     "from nothing: begin with a message of the user, or of the system")
  found = tokenizer.generation_mask(messages)
  _check_written(tokenizer, messages, found is not None)
  if found is not None:
    answers = [message["content"].strip() for message in messages if message["role"] == ASSISTANT]
    if all(answers) or len(_runs(found[1])) == len(answers):  # a block around an empty text marks nothing
      return _of_blocks(tokenizer, messages, *found)
  text = tokenizer.chat_text(messages, False)
  spans, rewritten = [], []
  for number, message in enumerate(messages):
    if message["role"] == ASSISTANT:
      start, end, whole = _span(tokenizer, messages, number, text)
      if whole:
        spans.append((start, end))
      else:
        rewritten.append(number)
  tokens, said, start = _tokens(tokenizer, text, spans)
  return _cut(tokens, said, tuple(rewritten), start)


def end_of_turn(tokenizer: Any) -> int | None:
  """The token with which the assistant's turns end; None where no template tells."""
  if not tokenizer.chats:
    return None
  try:
    last = conversation(tokenizer, PROBE).tokens[-1]
  except ValueError:
    return None
  return last if last in tokenizer.added_ids else None


def _check_written(tokenizer, messages, blocks):
  """Refuses what the assistant says beside its content if the template does not write it, or not as its own."""
  def said(messages):
    if not blocks:
      return tokenizer.chat_text(messages, False)
    return [token for token, own in zip(*tokenizer.generation_mask(messages)) if own]

  for number, given in enumerate(messages):
    for names in BESIDES if given["role"] == ASSISTANT else ():
      if any(given.get(name) for name in names):
        without = {key: value for key, value in given.items() if key not in names}
        if said([*messages[:number], given]) == said([*messages[:number], without]):
          what = next(name for name in names if given.get(name))
          raise ValueError(f"{_name(tokenizer)} does not write {what!r} of message {number} (assistant)"
                           f"{' into a {% generation %} block' * blocks}, so it would not be learned: take it "
                           "out of the row, or give the tokenizer a template that writes it")


def _of_blocks(tokenizer, messages, tokens, marked):
  """What `{% generation %}` blocks mark, to the token that ends the turn and no further: it is marked if they
  leave it out, and blanks behind it are not."""
  if not any(marked):
    raise ValueError(f"the {{% generation %}} blocks of {_name(tokenizer)} are empty for this conversation: "
                     "put them around the content of the assistant's messages")
  ending, said = _ending(tokenizer), [False] * len(tokens)
  for start, end in _runs(marked):
    end = _end_of_run(tokenizer, tokens, start, end, ending)
    said[start:end] = [True] * (end - start)
  found = _cut(tokens, said, ())
  content = tokenizer.written(tokenizer.encode(messages[-1]["content"]))
  _check_whole(tokenizer, content, tokenizer.written(found.tokens[found.start:]), len(messages) - 1)
  return found


def _runs(marked):
  """Where stretches of marked tokens begin and end."""
  edges = [i for i, (a, b) in enumerate(zip([0, *marked], [*marked, 0])) if bool(a) != bool(b)]
  return list(zip(edges[::2], edges[1::2]))


def _ending(tokenizer):
  """The token behind an answer of plain text, in a template with blocks; None if there is none."""
  try:
    tokens, marked = tokenizer.generation_mask(PROBE)
  except ValueError:  # a template that wants more than a question
    return None
  if not any(marked):
    return None
  start, end = _runs(marked)[-1]
  last = _without_blanks(tokenizer, tokens, start, end)
  return next((t for t in (tokens[last - 1], *tokens[end:end + 1]) if t in tokenizer.added_ids), None)


def _end_of_run(tokenizer, tokens, start, end, ending):
  """Where a marked stretch should end. Text may end in tokens that look like ends, such as `</think>`, and
  turns in others than the usual one, such as `<|eom_id|>`."""
  last = _without_blanks(tokenizer, tokens, start, end)
  follows = tokens[end] if end < len(tokens) else None
  if tokens[last - 1] == ending:
    return last
  if follows is not None and follows == ending:
    return end + 1
  if tokens[last - 1] in tokenizer.special_ids:
    return last
  return end + 1 if follows in tokenizer.special_ids else end


def _without_blanks(tokenizer, tokens, start, end):
  """The end of a stretch of tokens without blanks at its end, but for its first token."""
  while end - start > 1 and not tokenizer.written(tokens[end - 1:end]).strip():
    end -= 1
  return end


def _check_whole(tokenizer, content, said, number):
  """Refuses a message of which the template leaves out more than blanks."""
  content, said = ("".join(text.split()) for text in (content, said))
  if content not in said:
    same = bisect.bisect_left(range(1, len(content) + 1), True, key=lambda n: content[:n] not in said)
    raise ValueError(f"{_name(tokenizer)} does not write all of message {number} (assistant), which nothing "
                     f"follows: without blanks, {content[same:same + 60]!r} is missing, so it would not be "
                     "learned; take it out of the row, or give the tokenizer a template that keeps it")


def _cut(tokens, said, rewritten, start=None):
  """Without what follows the last answer, which begins at `start`; None: with the last run of what is said."""
  end = len(said) - said[::-1].index(True)
  tokens, said = tokens[:end], said[:end]
  if start is None:
    start = end - (said[::-1] + [False]).index(False)
  return Conversation(tokens, said, start, rewritten)


def _span(tokenizer, messages, number, text):
  """Where the text of an answer begins and ends in that of all, and whether all of it is there."""
  before = tokenizer.chat_text(messages[:number], True)
  who = f"message {number} (assistant)"
  if not text.startswith(before) or not before:
    same = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
    raise ValueError(
        f"{_name(tokenizer)} does not write what comes before {who} as it does when that is to be answered "
        f"({before[same:same + 40]!r} becomes {text[same:same + 40]!r}), so it cannot be told which tokens "
        f"are the assistant's: make a row of each answer, cut off behind it, put the system's text into the "
        f"first message of the user, or {ADVICE}")
  if any(messages[number].get(name) for names in BESIDES for name in names):
    return _span_of_all(tokenizer, messages, number, text, before)
  mark = next(c for c in map(chr, PRIVATE) if c not in text)
  marked = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1:]]
  _, found, after = tokenizer.chat_text(marked, False).rpartition(mark)
  if not found or not text[len(before):].endswith(after):
    raise ValueError(f"{_name(tokenizer)} does not write {who} where its content stands, or changes what "
                     f"comes behind with it: {ADVICE}")
  end = len(text) - len(after)
  closing = re.match(rf"\s*({'|'.join(map(re.escape, tokenizer.added_texts))})", after)
  if not closing:
    raise ValueError(f"{_name(tokenizer)} writes {after[:40]!r} behind {who}, which begins with no special "
                     "token, so nothing would teach the model to stop: let the template write eos_token, or "
                     "the token that ends a turn, behind the assistant's content")
  said, content = text[len(before):end], messages[number]["content"]
  whole = "".join(content.split()) in "".join(said.split())
  if number == len(messages) - 1:
    _check_whole(tokenizer, content, said, number)
  return len(before), end + closing.end(), whole


def _span_of_all(tokenizer, messages, number, text, before):
  """As `_span`, of a message with more than content: to the end of what is written up to it."""
  upto = tokenizer.chat_text(messages[:number + 1], False).rstrip()
  if not upto.endswith(tokenizer.added_texts):
    raise ValueError(f"{_name(tokenizer)} ends message {number} (assistant) in {upto[-40:]!r}, which is no "
                     "special token, so nothing would teach the model to stop: let the template write the "
                     "token that ends a turn there")
  said, content = upto[len(before):], messages[number]["content"]
  if number == len(messages) - 1:
    _check_whole(tokenizer, content, said, number)
    return len(before), len(text.rstrip()), True
  return len(before), len(upto), text.startswith(upto) and "".join(content.split()) in "".join(said.split())


def _tokens(tokenizer, text, spans):
  """Token ids of a text, which of them are in spans of characters, to the token, and where the last begins.

  All is encoded at once, if tokens end where spans do. Where one would reach over the edge of a span,
  as `("` may behind a template that writes `:`, the pieces are encoded by themselves: so they are when
  the model is asked, which reads the first and then begins with a token of its own.
  """
  edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
  starts = {start for start, _ in spans}
  pieces = [tokenizer.encode_chat(text[a:b]) for a, b in zip(edges, edges[1:])]
  apart = [token for piece in pieces for token in piece]
  whole = tokenizer.encode_chat(text)
  if apart == whole or tokenizer.written(apart) == tokenizer.written(whole):
    said = [start in starts for start, piece in zip(edges, pieces) for _ in piece]
    return apart, said, sum(map(len, pieces[:edges.index(spans[-1][0])]))
  counts = []  # pieces read otherwise when they are alone, as where a space is put in front of a text
  for edge in edges:
    head = tokenizer.encode_chat(text[:edge]) if edge else []
    if whole[:len(head)] != head:
      raise ValueError(f"{_name(tokenizer)} and its tokenizer write one token over the edge of an answer, "
                       f"{text[max(edge - 20, 0):edge]!r} + {text[edge:edge + 20]!r}: let the template end "
                       f"in a special token there, or {ADVICE}")
    counts.append(len(head))
  said = [start in starts for start, a, b in zip(edges, counts, counts[1:]) for _ in range(b - a)]
  return whole, said, counts[edges.index(spans[-1][0])]


def _name(tokenizer):
  return f"the chat template of {tokenizer.name!r}"
