"""A conversation on a terminal."""

from collections.abc import Callable
import sys

from jaxrl.inference.screen import Screen
from jaxrl.inference.served import Model
from jaxrl.inference.served import seed_of
from jaxrl.sampling import SamplingParams

RESET, QUIT = "/reset", "/quit"
WELCOME = f"{RESET} forgets the conversation, {QUIT} or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(model: Model, how: SamplingParams, *, seed: int, system: str = "", raw: bool = False,
         read: Callable[[str], str] = input, screen: Screen | None = None,
         note: Callable[[str], None] = lambda text: None) -> list[dict[str, str]]:
  """Reads what the user says, line by line, and answers, until the input ends.

  A model that is not asked in chats continues each line by itself. Answer t of a conversation has the
  seed `seed_of(seed, t)`, so the same lines get the same answers.

  Args:
    model: that answers.
    how: to sample.
    seed: of all answers.
    system: what the system says first.
    raw: without the model's template.
    read: gives a line, after a prompt; EOFError ends.
    screen: where answers appear; standard output.
    note: is told what is no part of the conversation.

  Returns:
    The messages since the last reset.
  """
  screen = screen or Screen(sys.stdout)
  sampler = model.sampler(1, watched=True)
  keeps = model.chats and not raw
  note(WELCOME if keeps else f"this model continues texts, each line by itself; {QUIT} or Ctrl-D ends")
  history: list[dict[str, str]] = []
  turn = 0
  while True:
    try:
      line = read("> ")
    except EOFError:
      return history
    except KeyboardInterrupt:
      note(f"\n{QUIT} or Ctrl-D ends")
      continue
    if line.strip() == QUIT:
      return history
    if line.strip() == RESET:
      history, turn = [], 0
      note("forgotten")
    elif line.strip():
      said = {"role": "user", "content": line}
      answer = _answer(model, sampler, [*history, said] if keeps else line, how, seed_of(seed, turn), system,
                       raw, screen, note)
      if answer is not None:
        turn += 1
        if keeps and answer.strip():
          history += [said, {"role": "assistant", "content": answer}]


def _answer(model, sampler, asked, how, seed, system, raw, screen, note):
  """The text of an answer, as far as it came; None if there can be none."""
  try:
    prompt = model.prompt(asked, system, raw) if isinstance(asked, str) else model.messages(asked, system)
    model.check_length(prompt, how.max_tokens)
  except ValueError as error:
    note(f"{error}" + ("" if isinstance(asked, str) else f"; or begin anew with {RESET}"))
    return None
  try:
    [[answer]] = model.answers(sampler, [prompt], [seed], how, on_text=lambda _, __, text: screen.show(text))
  except KeyboardInterrupt:
    text = screen.written
    screen.end(text)
    note("(stopped)")
    return text
  screen.end(answer.text)
  if answer.finish == "length":
    note(f"(cut at --max_tokens={how.max_tokens})")
  return answer.text
