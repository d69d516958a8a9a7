"""Text with `{placeholders}`, and patterns, checked before any row is read."""

from collections.abc import Mapping, Sequence
import re
import string

from jaxrl import compose


def compiled(name: str, pattern: str, groups: int | None = None) -> re.Pattern | None:
  """The compiled pattern; None for an empty one.

  Args:
    name: name of the setting, for error messages.
    pattern: regular expression.
    groups: how many groups it must have; None for any number.

  Raises:
    ValueError: not a regular expression, or another number of groups.
  """
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}") from error
  if pattern and groups is not None and expression.groups != groups:
    raise ValueError(f"{name}={pattern!r} has {expression.groups} groups: use exactly {groups}, "
                     "and write the others as (?:...)")
  return expression if pattern else None


def parse(name: str, template: str, valid: Sequence[str]) -> list[tuple[str, str | None]]:
  """A template as pairs of literal text and the placeholder after it, or None.

  Only plain `{field}` is allowed, so that a template reaches the values and nothing behind them.

  Args:
    name: name of the setting, for error messages.
    template: text with placeholders.
    valid: what may stand in braces.

  Raises:
    ValueError: another placeholder, with the nearest valid one, or unbalanced braces.
  """
  try:
    pieces = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f"{name}={template!r}: {error}; a brace that is meant literally is written "
                     "twice") from error
  for _, field, form, conversion in pieces:
    if field is not None and (field not in valid or form or conversion):
      raise ValueError(f"{name}={template!r} has the unknown placeholder {{{field}}}"
                       f"{compose.nearest(field, valid)}; other fields of a row are listed in "
                       "fields.more, and a brace that is meant literally is written twice")
  return [(literal, field) for literal, field, _, _ in pieces]


def fill(pieces: Sequence[tuple[str, str | None]], values: Mapping[str, str]) -> str:
  """The text of a parsed template; values are inserted as they are, braces and all."""
  return "".join(literal + ("" if field is None else values[field]) for literal, field in pieces)
