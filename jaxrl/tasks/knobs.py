"""Refusals of knob values, in one wording."""


def integer(name: str, value: int, low: int, high: int) -> int:
  """The value, when it is an integer from `low` to `high`.

  Raises:
    ValueError: anything else, naming the knob and its range.
  """
  if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
    raise ValueError(f"{name}={value!r}: use an integer from {low} to {high}")
  return value


def lengths(shortest: int, longest: int, high: int) -> tuple[int, int]:
  """The two ends of a range of lengths, when 1 <= shortest <= longest <= high.

  Raises:
    ValueError: anything else, naming the knob and its range.
  """
  integer("longest", longest, 1, high)
  return integer("shortest", shortest, 1, longest), longest


def share(name: str, value: float) -> float:
  """The value, when it is a number from 0 to 1.

  Raises:
    ValueError: anything else, naming the knob and its range.
  """
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
    raise ValueError(f"{name}={value!r}: use a share from 0 to 1")
  return value
