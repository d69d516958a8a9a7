"""Asking a model as the command line does."""

import json

import pytest

from jaxrl import cli

FEW = "--max_tokens=12"
CHATML = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def ask(capsys, *arguments):
  capsys.readouterr()
  cli.main(["sample", *map(str, arguments)])
  return capsys.readouterr().out


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments):
  capsys.readouterr()
  with pytest.raises(SystemExit) as end:
    cli.main(["sample", *map(str, arguments)])
  said = capsys.readouterr()
  assert end.value.code == 1 and said.err.startswith("jaxrl: ") and "Traceback" not in said.err
  return " ".join(said.err.split())
