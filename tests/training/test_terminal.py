"""What a run says: readable logs, and model output that cannot reach the terminal."""

import io
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from jaxrl.training.terminal import Terminal, key_metrics, shorten, visible


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


class Tty(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


@pytest.fixture
def live(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    monkeypatch.delenv(name, raising=False)
  return Tty()


NASTY = "15[/red] [bold]x\x1b[31m\r\n\u202eabc\ud800\x07"


def test_a_log_has_a_line_per_tenth_of_a_fast_phase():
  stream, clock = io.StringIO(), Clock()
  terminal = Terminal(stream=stream, clock=clock)
  terminal.start_phase("sft", "sft", 1000)
  for step in range(1, 1001):
    clock.now += 0.001
    terminal.advance(step, {"loss": 1 / step, "unknown": 3})
  lines = stream.getvalue().splitlines()
  assert 11 <= len(lines) <= 14
  assert lines[1].startswith("[0:00:00] sft 1/1000 0%  loss 1  eta")
  assert lines[-1] == "[0:00:01] sft 1000/1000 100%  loss 0.001  eta 0:00:00"


def test_a_log_has_a_line_each_ten_seconds_of_a_slow_phase():
  stream, clock = io.StringIO(), Clock()
  terminal = Terminal(stream=stream, clock=clock)
  terminal.start_phase("rl", "rl", 100_000)
  for step in range(1, 1001):
    clock.now += 1.0
    terminal.advance(step, {"reward": 0.5})
  assert 100 <= len(stream.getvalue().splitlines()) <= 103


def test_time_left_counts_only_the_steps_made_since_the_restart():
  stream, clock = io.StringIO(), Clock()
  terminal = Terminal(stream=stream, clock=clock)
  terminal.start_phase("sft", "sft", 100, done=60)
  for step in range(61, 81):
    clock.now += 3.0
    terminal.advance(step, {})
  assert "continuing after 60" in stream.getvalue()
  line = stream.getvalue().splitlines()[-1]
  assert line == "[0:00:51] sft 77/100 77%    eta 0:01:09"  # 23 steps of 3 s


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_that_a_model_writes_reaches_a_log_as_a_control_character(quiet):
  stream = io.StringIO()
  terminal = Terminal(quiet=quiet, stream=stream)
  terminal.start_phase(NASTY, "rl", 10)
  terminal.show_samples(NASTY, [{"prompt": NASTY, "completion": NASTY, "reward": None}])
  terminal.note(NASTY)
  terminal.show_result([{"name": NASTY, "seconds": 1}], {"curves": NASTY})
  text = stream.getvalue()
  assert all(char == "\n" or char.isprintable() for char in text)
  assert "15[/red] [bold]x\\x1b[31m" in text.replace("\n", "")
  assert ("completion" in text) == (not quiet)


def test_markup_in_a_completion_is_printed_as_it_is_on_a_terminal(live):
  terminal = Terminal(stream=live)
  terminal.start_phase("[bold]rl", "rl", 10)
  terminal.show_samples("samples", [{"prompt": "1+1=", "completion": NASTY, "reward": 1.0}])
  terminal.advance(3, {"reward": 0.25})
  terminal.close()
  text = live.getvalue()
  assert r"15[/red] [bold]x\x1b[31m\r\n\u202eabc\ud800\x07" in text
  assert "\x1b[31m\r" not in text and "\u202e" not in text
  assert "3/10" in text and "reward 0.25" in text


@pytest.mark.parametrize("columns, shown", [(80, "loss 0.123"), (120, "tokens/s 98765")])
def test_a_bar_shows_its_count_its_eta_and_the_metrics_that_fit(live, monkeypatch, columns, shown):
  monkeypatch.setenv("COLUMNS", str(columns))
  terminal = Terminal(stream=live)
  terminal.start_phase("rl", "rl", 2000)
  terminal.advance(1234, dict(loss=0.123, reward=0.456, kl=1.23e-13, entropy=0.25,
                              tokens_per_second=98765))
  terminal.close()
  last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live.getvalue()).replace("\r", "\n").strip()
  last = last.splitlines()[-1]
  assert re.search(r"^rl .* 1234/2000 0:00:0\d eta \S+ loss 0.123", last) and shown in last
  assert "…" not in last and len(last) <= columns


def test_a_terminal_is_left_with_its_cursor_whatever_happened(live):
  terminal = Terminal(stream=live)
  terminal.start_phase("a", "sft", 10)
  terminal.start_phase("b", "rl", 10)  # the first was never ended
  terminal.close()
  terminal.close()
  hidden, shown = live.getvalue().rfind("\x1b[?25l"), live.getvalue().rfind("\x1b[?25h")
  assert 0 <= hidden < shown


def test_quiet_is_plain_on_a_terminal_too(live):
  terminal = Terminal(quiet=True, stream=live)
  terminal.start_phase("a", "sft", 2)
  terminal.advance(1, {"loss": 2.0})
  terminal.end_phase()
  assert "\x1b" not in live.getvalue() and "a 1/2" in live.getvalue()


def test_the_result_has_every_accuracy_before_and_after():
  stream = io.StringIO()
  Terminal(stream=stream).show_result(
      [{"name": "sft", "seconds": 65.4, "before": {"greedy_accuracy": 0.0, "greedy_tokens": 7.0},
        "after": {"greedy_accuracy": 0.4124}},
       {"name": "rl", "seconds": 3600, "before": None, "after": {"pass_at_8": 0.99}}],
      {"curves": "a/very/long/path/" + "x" * 200})
  text = stream.getvalue()
  assert "0.0% -> 41.2%" in text and "- -> 99.0%" in text and "pass@8" in text
  assert "0:01:05" in text and "1:00:00" in text and "tokens" not in text
  assert "\ncurves:    a/very/long/path/" + "x" * 200 + "\n" in text  # one line, to be copied


@settings(max_examples=25, deadline=None)
@given(st.text(), st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252"]))
def test_visible_text_is_printable_and_encodable(text, encoding):
  shown = visible(text, encoding)
  shown.encode(encoding)
  assert all(char.isprintable() or char.isspace() and char >= " " for char in shown)


def test_visible_leaves_ordinary_text_of_any_script_alone():
  text = "½ + Ünïcode, 漢字, עברית, 🙂 [x] \\n"
  assert visible(text) == text
  assert visible("漢", "ascii") == r"\u6f22"


def test_shorten_keeps_both_ends():
  assert shorten("abc", 3) == "abc"
  assert shorten("a" * 50 + "z" * 50, 21) == "aaaaaaaa ... zzzzzzzz"


def test_key_metrics_are_in_their_order_and_read_nan():
  assert key_metrics({"kl": "NaN", "loss": 1234.5, "x": 1}) == "loss 1234  kl nan"
