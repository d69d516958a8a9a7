"""A module of user-written criteria, on the import path as a working directory would be."""

import textwrap

import pytest

USER_MODULE = '''
  import ctypes
  import os
  import re
  import sys
  import time

  from jaxrl.rewards import Criterion, declare, unscorable

  CALLS = []


  def echo(task, completion, *, scale: float = 1.0):
    return scale * float(completion.text)


  def obeys(task, completion):
    """Does what the completion says."""
    text = completion.text
    if text == "raise":
      raise ValueError("raised on purpose")
    if text == "exit":
      sys.exit(1)
    if text == "die":
      os._exit(3)
    if text == "segfault":
      ctypes.string_at(0)
    if text == "memory":
      raise MemoryError
    if text == "sleep":
      time.sleep(600)
    if text == "regex":
      re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "bignum":
      return 9 ** 9 ** 9 ** 9 > 0  # holds the interpreter lock inside one C call
    if text == "child":
      return os.system("sleep 600")
    if text == "unscorable":
      return unscorable("asked to")
    special = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1", "list": [1]}
    return special[text] if text in special else 1.0


  def after(task, completion):
    return 2.0


  def reads_row(task, completion):
    return task.row["value"]


  def sees(task, completion):
    """1 if the fields are all there, JAX is not, and the accelerator would not be taken."""
    whole = (task.id, task.question, completion.prompt_length, completion.finish) == (
        "t7", "why?", 2, "stop") and list(completion.tokens) == [5, 6, 7]
    return whole and "jax" not in sys.modules and os.environ["JAX_PLATFORMS"] == "cpu"


  def process(task, completion):
    return os.getpid()


  @declare(inline=True)
  def inline_process(task, completion):
    return os.getpid()


  def only_task(task):
    return 1.0


  def broken_aggregate(evidence):
    return 1.0 / evidence["echo"].score


  def no_opinion(evidence):
    return None
'''


@pytest.fixture
def user_module(tmp_path, monkeypatch):
  name = f"user_rewards_{tmp_path.name.replace('-', '_')}"
  (tmp_path / f"{name}.py").write_text(textwrap.dedent(USER_MODULE))
  monkeypatch.syspath_prepend(str(tmp_path))
  return name
