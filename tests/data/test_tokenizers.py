import json
import os
import pathlib
import subprocess
import sys

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import transformers

from jaxrl import data

few = settings(max_examples=40, deadline=None)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
TEXTS = ["the cat sat on the mat, the dog ran", "a price of $12.50 or 1250 cents", "naïve café"] * 5
CHAT = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}<|bos|>{{ m.role }}:{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant:{% endif %}")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bpe():
  return data.train_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def chatty():
  tokenizer = data.train_bpe(TEXTS, 320)
  tokenizer.fast.chat_template = CHAT
  return tokenizer


@given(st.text(st.sampled_from(data.CharacterTokenizer().alphabet)))
@few
def test_characters_come_back(text):
  tokenizer = data.CharacterTokenizer()
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and len(ids) == len(text)
  assert all(3 <= i < tokenizer.vocab_size for i in ids)


def test_character_ids_follow_the_alphabet_and_specials_are_distinct():
  tokenizer = data.CharacterTokenizer("0123+é")
  assert tokenizer.encode("0é+") == [3, 8, 7] and tokenizer.vocab_size == 9
  assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
  assert tokenizer.decode([1, 3, 0, 8, 2, 99, 7]) == "0é+"


@pytest.mark.parametrize("alphabet,said", [("", "at least one"), ("abca", "'a' stands there more")])
def test_bad_alphabets_are_refused(alphabet, said):
  with pytest.raises(ValueError, match=said):
    data.CharacterTokenizer(alphabet)


def test_an_unknown_character_is_named_with_its_place():
  with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\), at position 3 of 'caféx'"):
    data.CharacterTokenizer("abcdefx").encode("caféx")
  with pytest.raises(ValueError, match=r"U\+0000"):
    data.CharacterTokenizer().encode("a\x00")


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_negative_ids_are_refused(kind, bpe):
  tokenizer = bpe if kind == "bpe" else data.CharacterTokenizer()
  with pytest.raises(ValueError, match="-1 is negative"):
    tokenizer.decode([5, -1])


@given(unicode_text)
@few
def test_any_unicode_text_comes_back_from_bpe(bpe, text):
  assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("text", [
    "", " ", "\n\n", "\x00", "a , b . n't", "👩‍👩‍👧‍👦", "\u202e\ufeff", "e\u0301", "<|eos|>",
    "<|pad|>x<|bos|>", "١٢٣ 456 ½", "the " * 500, " the  cat "])
def test_hard_text_comes_back_from_bpe_without_special_ids(bpe, text):
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert not set(ids) & {bpe.pad_id, bpe.bos_id, bpe.eos_id}
  assert max(ids, default=0) < bpe.vocab_size


def test_bpe_learns_words_and_splits_digits(bpe):
  assert len(bpe.encode("the cat")) < len("the cat") / 2
  assert len(bpe.encode("1250")) == 4
  assert bpe.vocab_size <= 320


def test_specials_and_foreign_ids_give_no_text(bpe):
  ids = bpe.encode("the cat")
  assert bpe.decode([bpe.bos_id, *ids, bpe.eos_id, bpe.pad_id, 10_000]) == "the cat"


def test_a_lone_surrogate_is_refused(chatty):
  for write in (chatty.encode, lambda text: chatty.render_chat([dict(role="user", content=text)],
                                                              True)):
    with pytest.raises(ValueError, match="lone surrogate .* at position 2"):
      write("ab\ud800c")


def test_training_is_deterministic_across_processes(bpe, tmp_path):
  script = (f"from jaxrl import data\ndata.train_bpe({TEXTS!r}, 320).save({str(tmp_path)!r})")
  subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT,
                 env={**os.environ, "PYTHONHASHSEED": "1"})
  assert (json.loads((tmp_path / "tokenizer.json").read_text())
          == json.loads(bpe.fast.backend_tokenizer.to_str()))


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(ValueError, match="vocab_size=258: a byte-level tokenizer needs at least 259"):
    data.train_bpe(TEXTS, 258)
  assert data.train_bpe([], 259).vocab_size == 259


@given(unicode_text)
@few
def test_saving_changes_nothing(chatty, tmp_path_factory, text):
  directory = tmp_path_factory.getbasetemp() / "saved"
  if not directory.exists():
    chatty.save(directory)
    chatty.reloaded = data.load_tokenizer(directory)
  again = chatty.reloaded
  assert again.encode(text) == chatty.encode(text)
  for name in ("pad_id", "bos_id", "eos_id", "vocab_size"):
    assert getattr(again, name) == getattr(chatty, name)
  messages = [{"role": "user", "content": "the cat"}]
  assert again.render_chat(messages, True) == chatty.render_chat(messages, True)


def test_a_character_tokenizer_is_loaded_from_its_directory_or_file(tmp_path):
  data.CharacterTokenizer("01é\n\"").save(tmp_path / "a" / "b")
  for path in (tmp_path / "a" / "b", str(tmp_path / "a" / "b" / "character_tokenizer.json")):
    assert data.load_tokenizer(path).alphabet == "01é\n\""


def test_chat_templates_write_special_ids(chatty):
  messages = [{"role": "user", "content": "the cat"}]
  ids = chatty.render_chat(messages, add_generation_prompt=True)
  b, e = [chatty.bos_id], [chatty.eos_id]
  assert ids == b + chatty.encode("user:the cat") + e + b + chatty.encode("assistant:")
  assert chatty.render_chat(messages, False) == b + chatty.encode("user:the cat") + e
  assert chatty.encode("<|eos|>") != e  # a rendering leaves the encoding of plain text alone


def test_refusals_of_chat(chatty, bpe):
  with pytest.raises(ValueError, match=r"refuses messages of roles \['tool'\]: no tools here"):
    chatty.render_chat([{"role": "tool", "content": "x"}], True)
  for tokenizer in (bpe, data.CharacterTokenizer()):
    with pytest.raises(ValueError, match="no chat template"):
      tokenizer.render_chat([{"role": "user", "content": "x"}], True)


def test_a_foreign_tokenizer_may_lack_pad_and_bos_but_not_eos(bpe):
  backend = bpe.fast.backend_tokenizer
  tokenizer = data.PretrainedTokenizer(
      transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>"))
  assert tokenizer.pad_id == tokenizer.eos_id == 2 and tokenizer.bos_id is None
  with pytest.raises(ValueError, match="names no EOS token"):
    data.PretrainedTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
  with pytest.raises(ValueError, match="not a fast tokenizer"):
    data.PretrainedTokenizer(object())


@given(unicode_text.filter(lambda text: "<|" not in text))
@few
def test_encoding_is_that_of_transformers(bpe, text):
  assert bpe.encode(text) == bpe.fast.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("files,said", [
    ({}, "holds neither character_tokenizer.json nor tokenizer.json"),
    ({"character_tokenizer.json": "{"}, "is damaged"),
    ({"character_tokenizer.json": "[]"}, "is damaged"),
    ({"character_tokenizer.json": '{"alphabet": "aa"}'}, "is damaged"),
    ({"tokenizer.json": '{"model": 3}', "tokenizer_config.json": "{}"}, "cannot load"),
])
def test_damaged_tokenizers_are_refused(tmp_path, files, said):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=said):
    data.load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_refused():
  with pytest.raises(ValueError, match="no tokenizer at nowhere/at/all"):
    data.load_tokenizer("nowhere/at/all")


def test_importing_data_imports_no_heavy_library():
  script = ("import sys, jaxrl.data, jaxrl.tasks\n"
            "print([m for m in ('transformers', 'tokenizers', 'tensorflow', 'tensorflow_datasets', "
            "'pyarrow', 'torch') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                        cwd=ROOT)
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("begins", [False, True])
def test_prompts_begin_as_those_of_the_tokenizer_itself(bpe, begins, tmp_path):
  """Pythia's names a BOS and puts none in front."""
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe.fast.backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>",
      add_bos_token=begins).save_pretrained(tmp_path)
  tokenizer = data.load_tokenizer(tmp_path)
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert start + tokenizer.encode("the cat") == theirs("the cat").input_ids
  assert start == [1] * begins


def test_special_tokens_that_a_model_has_not_are_left_out(tmp_path):
  """The tokenizer of Gemma 3 1B has a token for images, behind all of the model."""
  tokenizer = data.train_bpe(TEXTS, 320)
  size = tokenizer.vocab_size
  tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
  tokenizer.fast.chat_template = CHAT
  tokenizer.save(tmp_path)
  tokenizer = data.load_tokenizer(tmp_path)
  assert tokenizer.vocab_size == size + 1
  assert not tokenizer.leave_out(size - 1) and tokenizer.vocab_size == size + 1  # a word
  assert tokenizer.leave_out(size) and tokenizer.vocab_size == size
  assert max(tokenizer.encode("the <image>")) < size
  assert tokenizer.render_chat([dict(role="user", content="the cat")], True)
  with pytest.raises(ValueError, match=f"holds '<image>', which is token {size}, but the model has {size}"):
    tokenizer.render_chat([dict(role="user", content="the <image>")], True)
  assert not data.CharacterTokenizer("ab").leave_out(4)
  tokenizer.fast.pad_token = "<image>"
  padded = data.PretrainedTokenizer(tokenizer.fast)
  assert padded.pad_id == size and padded.leave_out(size) and padded.pad_id == padded.eos_id
