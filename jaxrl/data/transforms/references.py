"""Triples of a reference and two candidates, for reward models that compare with a reference answer.

Rows list answers, `{"question": ..., "answers": [{"text": ..., "policy": ...}, ...]}`, and get the
fields `reference`, `chosen` and `rejected`. A prompt template such as
"{question}{reference}\\n{question}", with `data.more=("reference",)`, then makes the reward model of
POLAR (arXiv:2507.05197): r(x, reference, candidate), read where the candidate ends.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.data.sources import BadRow
from jaxrl.data.sources import Source
from jaxrl.data.transforms import rows

DRAWS = 100  # of a pair, before a row counts as one without


def policy_pairs(source: Source, *, seed: int, answers: str = "answers", policy: str = "policy",
                 text: str = "text", independent: bool = False) -> Source:
  """Which candidate is of the policy that gave the reference? (POLAR's pre-training, step 1)

  Draws a policy A and another one B; reference and chosen are two answers of A, rejected is one of B.
  With r trained by `bradley_terry` and B drawn independently of A, the best r is, up to a function of
  question and reference,

    r(x, a, b) = log q(b | x, a) - log m(b | x),    q(b | x, a) = sum over P of Pr(P | x, a) P(b | x),

  with m the mixture of all policies: a pointwise mutual information.

  Args:
    source: of rows with answers of several policies.
    seed: of all draws.
    answers: field with the list.
    policy, text: fields of its items.
    independent: B may be A, as in the formula. Otherwise it never is, as in the paper.

  Returns:
    Rows with `reference`, `chosen`, `rejected`. Those without two answers of one policy and a different
    one beside them are bad ones.
  """
  def draw(rng, items, where):
    by_policy: dict[str, list[str]] = {}
    for item in items:
      by_policy.setdefault(str(item.get(policy)), []).append(str(item[text]))
    names = sorted(by_policy)
    several = [name for name in names if len(by_policy[name]) > 1]
    for _ in range(DRAWS if several else 0):
      a = several[rng.integers(len(several))]
      b = names[rng.integers(len(names))]
      own = [by_policy[a][i] for i in rng.permutation(len(by_policy[a]))]
      others = own[2:] if a == b else by_policy[b]
      rejected = others[rng.integers(len(others))] if others else own[1]
      # Equal candidates teach nothing. To draw all anew leaves the odds of the others as they were.
      if (independent or a != b) and own[1] != rejected:
        return own[0], own[1], rejected
    raise BadRow("too_few_answers", where, f"field {answers!r} has to hold two answers of one policy, "
                 "and another one of another policy")
  return _triples(source, seed, answers, text, draw)


def ranked_triples(source: Source, *, seed: int, answers: str = "answers", rank: str = "rank",
                   text: str = "text") -> Source:
  """Three answers t1 > t2 > t3: the best is the reference, to which t2 is nearer than t3 (POLAR's
  fine-tuning, step 2).

  Args:
    source: of rows with ranked answers.
    seed: of all draws: which three where there are more, of three different ranks.
    answers: field with the list.
    rank, text: fields of its items; lower ranks are better.

  Returns:
    Rows with `reference`, `chosen`, `rejected`. Those with fewer than three ranks are bad ones.
  """
  def draw(rng, items, where):
    ranks = {item.get(rank) for item in items}
    if len(ranks) < 3 or not all(isinstance(r, int | float) for r in ranks):
      raise BadRow("too_few_answers", where, f"field {answers!r} has to hold answers of at least three "
                   f"ranks, as numbers in {rank!r}")
    found = []
    for wanted in sorted(rng.permutation(sorted(ranks))[:3]):
      texts = [item[text] for item in items if item[rank] == wanted]
      found.append(texts[rng.integers(len(texts))])
    return tuple(found)
  return _triples(source, seed, answers, text, draw)


def _triples(source, seed, answers, text,
             draw: Callable[[np.random.Generator, Sequence[Mapping[str, Any]], str], tuple[str, str, str]]
             ) -> Source:
  def change(index, row):
    items, where = row.get(answers), source.where(index)
    if not isinstance(items, list) or not all(
        isinstance(item, Mapping) and rows.is_text(item.get(text)) for item in items):
      raise BadRow("wrong_type", where, f"field {answers!r} has to hold a list of mappings with text in "
                   f"{text!r}")
    found = draw(np.random.default_rng([seed, index]), items, where)
    return {**row, **dict(zip(("reference", "chosen", "rejected"), found))}
  return rows.Mapped(source, change)
