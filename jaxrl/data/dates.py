"""The day that chat templates write.

Templates such as those of Llama 3.2 and Granite write the date, with `strftime_now(format)`, which
transformers answers from the clock. A prompt would then depend on the day on which it is made, so a
template is given one day here: its `strftime_now` is a macro that reads a table of that day.
"""

import datetime
import re

ASKS = re.compile(r"\bstrftime_now\b")
TABLE = "jaxrl_day"  # what the macro reads
ESCAPED = "\ue000"  # stands for a percent sign meanwhile
# Line breaks of templates are trimmed behind a block, so the macro ends in an expression.
MACRO = ("{%- macro strftime_now(format) -%}{%- set written = namespace(text=format) -%}"
         f"{{%- for code, value in {TABLE}.items() -%}}"
         "{%- set written.text = written.text.replace(code, value) -%}{%- endfor -%}"
         "{{- written.text -}}{%- endmacro -%}{{- '' }}")
CODES = "aAwdbBmyYHIpMSjUWGuVcxXDeFhRTCgklP"


def today() -> str:
  """The day that this machine's clock says."""
  return datetime.date.today().isoformat()


def check(date: str, name: str) -> str:
  """The date itself.

  Args:
    date: a text.
    name: of the setting or file that says it, for error messages.

  Raises:
    ValueError: it is no day in the form YYYY-MM-DD.
  """
  try:
    if datetime.date.fromisoformat(date).isoformat() == date:
      return date
  except ValueError:
    pass
  raise ValueError(f"{name}={date} is no day: write it as YYYY-MM-DD, such as 2025-01-31")


def asked_for(template: object) -> bool:
  """Whether a template writes the date."""
  return bool(ASKS.search(str(template or "")))


def table(date: str) -> dict[str, str]:
  """What the macro replaces, in this order: `%d`, `%-d` and so on by what they are at the start of a day."""
  moment = datetime.datetime.fromisoformat(date)
  found = {code: moment.strftime(code) for code in [f"%{flag}{c}" for c in CODES for flag in ("", "-")]}
  return {"%%": ESCAPED, **found, ESCAPED: "%"}
