"""Tokenizers: characters, byte-level BPE trained here, and those of `transformers`.

Text is only text: a special token that is spelled out in a question or an answer is encoded letter
by letter, so it cannot end a sequence. Special ids come from `bos_id`, `eos_id` and chat templates
alone (a template is filled before it is encoded, so there messages can spell out special tokens).
"""

from collections.abc import Iterable, Mapping, Sequence
import copy
import json
import pathlib
import re
from typing import Any, Protocol

from jaxrl.data import dates

PRINTABLE = "".join(map(chr, range(ord(" "), ord("~") + 1))) + "\n"
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
CHARACTER_FILE = "character_tokenizer.json"
DATE_FILE = "chat_date.txt"  # of the tokenizer of a run whose chat template writes the date
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokenizer(Protocol):
  """What jaxrl asks of a tokenizer.

  Attributes:
    vocab_size: one more than the largest id.
    pad_id, eos_id: may be equal.
    bos_id: None where sequences do not start with a token of their own.
    special_tokens: how special tokens are written in chat templates.
    chats: whether there is a chat template.
    writes_date: whether that writes the date, which is then the attribute `date`, YYYY-MM-DD.
  """

  vocab_size: int
  pad_id: int
  bos_id: int | None
  eos_id: int
  special_tokens: Sequence[str]
  chats: bool
  writes_date: bool

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, no special ones among them; ValueError for text it cannot write."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; special ids and ids beyond the vocabulary give no text."""

  def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
                  ) -> list[int]:
    """Token ids of a conversation; ValueError where the tokenizer has no chat template."""

  def leave_out(self, size: int) -> bool:
    """Leaves out the tokens from an id on, if they are special ones, and says whether."""

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes what `load_tokenizer` reads."""

  def export(self, directory: str | pathlib.Path) -> None:
    """Writes what `load_tokenizer` reads and `transformers.AutoTokenizer` as well."""


class CharacterTokenizer:
  """One token per character: ids 0, 1, 2 are padding, BOS and EOS; then the alphabet in order."""

  pad_id, bos_id, eos_id = 0, 1, 2
  special_tokens = ()
  chats = writes_date = False

  def __init__(self, alphabet: str = PRINTABLE):
    repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if repeated or not alphabet:
      raise ValueError(f"alphabet {alphabet!r}: " + (
          f"{''.join(repeated)!r} stands there more than once" if repeated else
          "it needs at least one character"))
    self.alphabet = alphabet
    self.vocab_size = len(alphabet) + 3
    self._ids = {c: i for i, c in enumerate(alphabet, start=3)}

  def encode(self, text: str) -> list[int]:
    """One id per character; ValueError names a character that is not in the alphabet."""
    try:
      return [self._ids[c] for c in text]
    except KeyError as error:
      character = error.args[0]
      raise ValueError(
          f"character {character!r} (U+{ord(character):04X}), at position {text.index(character)} "
          f"of {_excerpt(text, text.index(character))}, is not in the tokenizer's alphabet "
          f"{_excerpt(self.alphabet)}: add it to the alphabet, or train a BPE tokenizer, which "
          "takes any text") from None

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; special ids and ids beyond the vocabulary give no text."""
    return "".join(self.alphabet[i - 3] for i in _checked(ids) if 3 <= i < self.vocab_size)

  def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
                  ) -> list[int]:
    """Always refuses: characters have no chat template."""
    raise ValueError("a character tokenizer has no chat template: leave chat off, or use the "
                     "tokenizer of a chat model")

  def leave_out(self, size: int) -> bool:
    """Says whether there is none from an id on, for every one is needed."""
    return size >= self.vocab_size

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the alphabet to `character_tokenizer.json`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CHARACTER_FILE).write_text(json.dumps({"alphabet": self.alphabet}),
                                            encoding="utf-8")

  def export(self, directory: str | pathlib.Path) -> None:
    """Writes the alphabet, and a `tokenizer.json` with the same ids, which puts BOS in front
    and, as here, refuses characters that are not in the alphabet."""
    import tokenizers
    import transformers
    ids = {PAD: self.pad_id, BOS: self.bos_id, EOS: self.eos_id, **self._ids}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<|none|>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"(?m)."), "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    words.post_processor = _bos_in_front()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        clean_up_tokenization_spaces=False).save_pretrained(str(directory))
    self.save(directory)


class PretrainedTokenizer:
  """A fast tokenizer of `transformers` (a `PreTrainedTokenizerFast`).

  Attributes:
    fast: the wrapped tokenizer.
    name: of it, for messages.
    added_texts, added_ids: tokens beside those that were learned, special ones among them; long texts first,
      and none of blanks.
    special_ids: of those, the ones that are no text: `<|im_end|>`, but not `</think>`.
    date: what a chat template that asks for the date writes; the day on which this was made, until it is set.
  """

  def __init__(self, fast: Any):
    if not getattr(fast, "is_fast", False):
      raise ValueError(f"{type(fast).__name__} is not a fast tokenizer: convert it so that its "
                       "directory holds a tokenizer.json")
    if fast.eos_token_id is None:
      raise ValueError(f"the tokenizer {fast.name_or_path!r} names no EOS token, so no sequence "
                       "could end: set eos_token in its tokenizer_config.json")
    self.fast = fast
    self.eos_id = fast.eos_token_id
    begins = fast("").input_ids[:1] == [fast.bos_token_id]  # Pythia names one and begins without
    self.bos_id = fast.bos_token_id if begins else None
    self.pad_id = self.eos_id if fast.pad_token_id is None else fast.pad_token_id
    self.vocab_size = max(fast.get_vocab().values()) + 1
    self.special_tokens = tuple(fast.all_special_tokens)
    self.name = fast.name_or_path
    self.date = dates.today()
    added = {str(token): i for i, token in fast.added_tokens_decoder.items() if str(token).strip()}
    self.added_texts, self.added_ids = tuple(sorted(added, key=len, reverse=True)), frozenset(added.values())
    self.special_ids = self.added_ids & {*fast.all_special_ids, *(
        i for i, token in fast.added_tokens_decoder.items() if token.special)}
    self._text = copy.deepcopy(fast.backend_tokenizer)  # a copy: `fast` turns these switches itself
    self._text.encode_special_tokens = True  # that is, as text
    self._text.no_truncation()
    self._text.no_padding()

  @property
  def chats(self) -> bool:
    """Whether there is a chat template."""
    return bool(self.fast.chat_template)

  @property
  def writes_date(self) -> bool:
    """Whether the chat template writes the date."""
    return dates.asked_for(self.fast.chat_template)

  def encode(self, text: str) -> list[int]:
    """Token ids of a text; ValueError for a lone surrogate, which no UTF-8 text can hold."""
    _refuse_surrogates(text)
    return self._text.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids; special ids and ids beyond the vocabulary give no text."""
    return self._text.decode(_checked(ids), skip_special_tokens=True)

  def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
                  ) -> list[int]:
    """Token ids of a conversation, BOS included where the template writes it.

    Raises:
      ValueError: there is no chat template, or it refuses the messages (order of roles, ...).
    """
    return self.encode_chat(self.chat_text(messages, add_generation_prompt))

  def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """What the chat template writes; raises as `render_chat`."""
    return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

  def encode_chat(self, text: str) -> list[int]:
    """Token ids of what a template wrote, special tokens among them; none is added."""
    _refuse_surrogates(text)
    return self._known(self.fast(text, add_special_tokens=False).input_ids)

  def generation_mask(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]] | None:
    """Token ids, and which are in `{% generation %}` blocks; None where the template has none."""
    if not self.chats or not GENERATION.search(self.fast.get_chat_template()):
      return None
    found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return self._known(found["input_ids"]), list(found["assistant_masks"])

  def written(self, ids: Iterable[int]) -> str:
    """Text of token ids, special ones spelled out."""
    return self._text.decode(_checked(ids), skip_special_tokens=False)

  def leave_out(self, size: int) -> bool:
    """Leaves out the tokens from an id on, if they are special ones, and says whether.

    Gemma 3 1B reads no images, and its tokenizer has a token for them behind all that it has. A
    token for padding that was added to a tokenizer alone is another.
    """
    beyond = {i for i in self.fast.get_vocab().values() if i >= size}
    if beyond - self.special_ids or beyond & {self.bos_id, self.eos_id}:
      return False
    self.vocab_size = min(self.vocab_size, size)
    self.pad_id = self.eos_id if self.pad_id in beyond else self.pad_id
    return True

  def _known(self, ids):
    """Token ids that the model has."""
    if beyond := [i for i in ids if i >= self.vocab_size]:
      raise ValueError(f"the chat holds {self.written(beyond[:1])!r}, which is token {beyond[0]}, but "
                       f"the model has {self.vocab_size} tokens: take it out")
    return list(ids)

  def _apply(self, messages, **options):
    if not self.chats:
      raise ValueError(f"the tokenizer {self.name!r} has no chat template: leave chat "
                       "off, or put a chat_template.jinja into its directory")
    for message in messages:
      _refuse_surrogates(message["content"])
    import jinja2
    if self.writes_date:
      options["chat_template"] = dates.MACRO + self.fast.get_chat_template()
      options[dates.TABLE] = dates.table(self.date)
    try:
      return self.fast.apply_chat_template(list(messages), **options)
    except (jinja2.TemplateError, TypeError) as error:  # a TypeError where a field is not as it expects
      roles = [message["role"] for message in messages]
      raise ValueError(f"the chat template refuses messages of roles {roles}: {error}") from error

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes `tokenizer.json` and its configuration, and the date if that is written in chats."""
    self.fast.save_pretrained(str(directory))
    if self.writes_date:
      (pathlib.Path(directory) / DATE_FILE).write_text(self.date + "\n")

  def export(self, directory: str | pathlib.Path) -> None:
    """The same as `save`, but for the date: whoever loads it writes that of the day."""
    self.fast.save_pretrained(str(directory))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PretrainedTokenizer:
  """Trains a byte-level BPE tokenizer: any Unicode text comes back from `decode` unchanged.

  Every digit is a token of its own, so numbers are read by place value. The same texts in the same
  order give the same tokenizer.

  Args:
    texts: what merges are counted on; little text gives fewer tokens than asked for.
    vocab_size: largest number of tokens, 256 bytes and 3 special tokens included.
  """
  if vocab_size < 259:
    raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least 259 (256 "
                     f"bytes, {PAD}, {BOS} and {EOS})")
  import tokenizers
  import transformers
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], show_progress=False,
      initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
  bpe.post_processor = _bos_in_front()  # where others use it; here prompts are begun by hand
  return PretrainedTokenizer(transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS))


def _bos_in_front():
  """What makes a tokenizer of `transformers` begin texts as prompts begin here; BOS has id 1."""
  import tokenizers
  return tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])


def load_tokenizer(path: str | pathlib.Path) -> CharacterTokenizer | PretrainedTokenizer:
  """Loads what `save` wrote, or the tokenizer in the directory of a downloaded model.

  Args:
    path: the directory, or a file in it.

  Raises:
    ValueError: nothing is there, or nothing that can be read as a tokenizer.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise ValueError(f"no tokenizer at {path} (relative paths start at {pathlib.Path.cwd()}): name "
                     "a directory on this machine; `hf download` fetches that of a published model")
  directory = path.parent if path.is_file() else path
  if (directory / CHARACTER_FILE).exists():
    try:
      saved = json.loads((directory / CHARACTER_FILE).read_text(encoding="utf-8"))
      return CharacterTokenizer(saved["alphabet"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{directory / CHARACTER_FILE} is damaged: {error!r}") from error
  if not (directory / "tokenizer.json").exists():
    raise ValueError(f"{directory} holds neither {CHARACTER_FILE} nor tokenizer.json, but "
                     f"{sorted(p.name for p in directory.iterdir())[:10]}")
  import transformers
  try:
    fast = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
  except Exception as error:  # transformers and its Rust core raise whatever the damage provokes
    raise ValueError(f"{directory} holds a tokenizer.json that transformers cannot load: {error}"
                     ) from error
  found = PretrainedTokenizer(fast)
  if (directory / DATE_FILE).exists():
    found.date = dates.check((directory / DATE_FILE).read_text().strip(), str(directory / DATE_FILE))
  return found


def set_date(tokenizer: Tokenizer, date: str, name: str) -> None:
  """Makes the chat template write a date; nothing, if it is empty.

  Raises:
    ValueError: it is no day, or the template writes none; names the setting.
  """
  if date and not tokenizer.writes_date:
    raise ValueError(f"{name}={date}, but this tokenizer has no chat template that writes the date: leave it "
                     "out")
  if date:
    tokenizer.date = dates.check(date, name)


def _refuse_surrogates(text):
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"lone surrogate {text[error.start]!r}, at position {error.start} of "
                     f"{_excerpt(text, error.start)}, is not Unicode text") from None


def _checked(ids):
  ids = [int(i) for i in ids]
  if ids and min(ids) < 0:
    raise ValueError(f"token id {min(ids)} is negative")
  return ids


def _excerpt(text, position=0):
  start = max(position - 20, 0)
  return repr(text[start:start + 60]) + ("..." if len(text) > start + 60 else "")
