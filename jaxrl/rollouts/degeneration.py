"""Degenerate answers: loops, answers that do not end, broken characters.

`config.rollout.edits` names the edit `jaxrl.rollouts.degeneration:punish_degenerate`.
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import unicodedata

from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rollouts.edits import Step


def punish_degenerate(step: Step, *, penalty: float = -1.0, ngram: int = 20, times: int = 3,
                      overlong: bool = True, scripts: int = 0) -> list[Trajectory]:
  """Replaces the reward of degenerate answers (T1, arXiv:2501.11651).

  An answer is degenerate if one of its n-grams of tokens occurs `times` times, if it did not end by
  itself, or if it is garbled: U+FFFD, control characters, or letters of too many scripts.

  Args:
    step: the batch; sequences that are not scored stay so.
    penalty: their reward, whatever the verifier says.
    ngram: tokens of an n-gram.
    times: occurrences, at least 2; overlapping ones count.
    overlong: whether an answer that was cut at the limit of tokens is degenerate.
    scripts: writing systems whose letters an answer may mix; 0 is any number.

  Returns:
    The trajectories, with `degenerate` in their evidence. Metrics: `degenerate`, the share of scored
    answers, and `repetitive`, `overlong`, `garbled`.

  Raises:
    ValueError: numbers out of range.
  """
  if ngram < 1 or times < 2 or scripts < 0:
    raise ValueError(f"punish_degenerate: ngram={ngram}, times={times}, scripts={scripts}; use "
                     "ngram >= 1, times >= 2 and scripts >= 0")
  counts, scored, found = Counter(), 0, []
  for t in step.trajectories:
    if not t.scored:
      found.append(t)
      continue
    kinds = dict(repetitive=is_repetitive(t.tokens[t.prompt_length:].tolist(), ngram, times),
                 overlong=overlong and t.finish == "length", garbled=is_garbled(t.text, scripts))
    bad = any(kinds.values())
    counts.update(name for name, value in kinds.items() if value)
    counts["degenerate"] += bad
    scored += 1
    found.append(dataclasses.replace(
        t, reward=penalty if bad else t.reward,
        evidence={**t.evidence, "degenerate": ok(float(bad))}))
  step.metrics |= {name: counts[name] / max(scored, 1)
                   for name in ("degenerate", "repetitive", "overlong", "garbled")}
  return found


def is_repetitive(tokens: Sequence[int], ngram: int, times: int) -> bool:
  """Whether some n-gram occurs that many times."""
  grams = Counter(tuple(tokens[i:i + ngram]) for i in range(len(tokens) - ngram + 1))
  return max(grams.values(), default=0) >= times


def is_garbled(text: str, scripts: int = 0) -> bool:
  """Whether a text holds what no writer means, or letters of more scripts than allowed.

  The script of a letter is the first word of its Unicode name (LATIN, CYRILLIC, CJK, ...).
  """
  if any(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\n\r\t")
         for c in text):
    return True
  names = {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}
  return 0 < scripts < len(names)
