"""Chat templates that write the date write one day, whatever the clock says."""

import datetime

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl import data
from jaxrl.data import conversations, dates
from tests.data.test_conversations import BLOCKS, LLAMA3, tokenizer_of

# As Llama 3.2 has it.
ASKS = ("{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
        "{%- endif %}{%- endif %}")
DATED = ASKS + LLAMA3.replace(
    "<|begin|>", "<|begin|><|head|>system<|/head|>\n\nToday Date: {{ date_string }}<|eot|>")
TALK = [dict(role="user", content="one?"), dict(role="assistant", content="two")]


@pytest.fixture
def clock(monkeypatch):
  """Sets the day that the clock says, for jaxrl and for transformers."""
  def at(day):
    class Clock(datetime.datetime):
      @classmethod
      def now(cls, tz=None):
        return cls.fromisoformat(day + "T13:14:15")
    monkeypatch.setattr(dates, "today", lambda: day)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
  return at


def test_the_day_is_that_on_which_the_tokenizer_was_made(clock):
  clock("2025-01-05")
  tokenizer = tokenizer_of(DATED)
  theirs = tokenizer.fast.apply_chat_template(TALK, tokenize=False)
  assert "Today Date: 05 Jan 2025" in theirs and tokenizer.chat_text(TALK, False) == theirs
  ids = tokenizer.render_chat(TALK[:1], True)
  clock("2025-01-06")
  assert "06 Jan 2025" in tokenizer.fast.apply_chat_template(TALK, tokenize=False)
  assert tokenizer.chat_text(TALK, False) == theirs and tokenizer.render_chat(TALK[:1], True) == ids
  found = conversations.conversation(tokenizer, TALK)
  assert tokenizer.written(found.tokens[found.start:]) == "two<|eot|>" and found.tokens[:found.start] == ids
  assert conversations.end_of_turn(tokenizer) == tokenizer.fast.convert_tokens_to_ids("<|eot|>")


def test_blocks_mark_the_same_tokens_behind_a_date(clock):
  clock("2024-02-29")
  tokenizer = tokenizer_of(BLOCKS.replace("{% for m in", "{{ strftime_now('%B %d, %Y') }}\n{% for m in", 1))
  theirs = tokenizer.fast.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
  assert "February 29, 2024" in tokenizer.written(theirs["input_ids"])
  clock("2024-03-01")
  assert tokenizer.generation_mask(TALK) == (theirs["input_ids"], theirs["assistant_masks"])


@given(st.dates(datetime.date(1900, 1, 1)), st.lists(st.sampled_from(
    [*"%aAdBbmYyjUWuVHMSpIceFD -/", "%d", "%-d", "%%", "%b", "%Y", "%A", "x"]), max_size=8).map("".join))
def test_dates_are_written_as_strftime_writes_them(day, form):
  # A percent sign is followed by a code: Python leaves what else follows to the system.
  pieces, rest = [], form
  while rest:
    size = 3 if rest[:2] == "%-" else 2 if rest[0] == "%" else 1
    pieces, rest = [*pieces, rest[:size]], rest[size:]
  known = {*dates.table("2025-01-01"), "%%"}
  form = "".join(piece for piece in pieces if piece[0] != "%" or piece in known)
  text = form
  for code, value in dates.table(day.isoformat()).items():
    text = text.replace(code, value)
  assert text == datetime.datetime.combine(day, datetime.time()).strftime(form)


def test_a_run_keeps_its_day_and_an_exported_tokenizer_has_none(clock, tmp_path):
  clock("2025-01-05")
  tokenizer = tokenizer_of(DATED)
  tokenizer.save(tmp_path / "run")
  tokenizer.export(tmp_path / "out")
  tokenizer_of(LLAMA3).save(tmp_path / "plain")
  clock("2025-01-06")
  assert data.load_tokenizer(tmp_path / "run").date == "2025-01-05"
  assert data.load_tokenizer(tmp_path / "out").date == "2025-01-06"
  kept = data.load_tokenizer(tmp_path / "run")
  assert kept.fast.chat_template == DATED  # which is not touched
  assert kept.render_chat(TALK, False) == tokenizer.render_chat(TALK, False)
  assert not list(tmp_path.glob("plain/*date*")) and not data.load_tokenizer(tmp_path / "plain").writes_date
  (tmp_path / "run" / "chat_date.txt").write_text("yesterday")
  with pytest.raises(ValueError, match="chat_date.txt=yesterday is no day: write it as YYYY-MM-DD"):
    data.load_tokenizer(tmp_path / "run")


def test_a_date_that_nothing_writes_is_refused():
  tokenizer = tokenizer_of(DATED)
  data.set_date(tokenizer, "2025-01-31", "--date")
  assert "31 Jan 2025" in tokenizer.chat_text(TALK, False)
  for wrong in ("2025-02-30", "20250131", "31.1.2025"):
    with pytest.raises(ValueError, match=f"--date={wrong} is no day"):
      data.set_date(tokenizer, wrong, "--date")
  for other in (tokenizer_of(LLAMA3), data.CharacterTokenizer()):
    with pytest.raises(ValueError, match="--date=2025-01-31, but .* has no chat template that writes"):
      data.set_date(other, "2025-01-31", "--date")
    data.set_date(other, "", "--date")
