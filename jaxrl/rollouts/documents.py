"""Texts as tasks: what stands in them is what is to be predicted."""

import dataclasses
import re

from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rewards import ok
from jaxrl.rewards.continuations import SENTENCE
from jaxrl.rollouts.context import EpisodeContext

CONTINUE, FILL = "continue", "fill"  # templates of the two tasks


async def predict_segments(ctx: EpisodeContext, task: Task, *, samples: int,
                           segments: str = SENTENCE, field: str = "", middle: float = 0.5,
                           middle_weight: float = 0.5, first: int = 2, shortest: int = 1
                           ) -> list[Trajectory]:
  """A group of predictions of one segment of a document (RLPT, arXiv:2509.19249).

  For a document s_1 .. s_n and i uniform over first .. n - 1, the policy reasons and writes s_i

    from s_1 .. s_(i-1)                 (continue: ASR), or
    from s_1 .. s_(i-1) and s_(i+1)     (fill: MSR, with probability `middle`).

  The reward is that of the run with s_i .. s_n as the answer; `rewards.continues_text` takes any
  prediction of the first few of them. Weights make the objective E_ASR[r] + lambda E_MSR[r], where
  half of the documents are filled: a factor on rewards would cancel in a group's deviation.

  Args:
    ctx: serves samples and scores; `config.rollout.templates` has a "continue" of `{context}` and a
      "fill" of `{context}` and `{following}`.
    task: a document; its own prompt and answer are for evaluations.
    samples: predictions of a segment.
    segments: regular expression whose matches, one after the other, are the document.
    field: field of the row that holds the document; "" is question and solution together.
    middle: probability of MSR.
    middle_weight: lambda, weight of the loss of MSR.
    first: smallest i, counted from 1; at least 2, as there is no context before s_1.
    shortest: characters of a segment that is worth predicting, white space around it not counted.

  Returns:
    The group, with the evidence `middle`, whether it was MSR; nothing for a document that has no
    such segment.

  Raises:
    ValueError: `first` or `middle` out of range, a row without the field, or segments that are not
      the whole document.
  """
  if first < 2 or not 0 <= middle <= 1:
    raise ValueError(f"predict_segments: first={first}, middle={middle}; use at least 2, and a "
                     "probability")
  parts = _split(document_of(task, field), segments)
  # i counts from 0 here: parts[i + 1] has to be there.
  places = [i for i in range(first - 1, len(parts) - 1) if len(parts[i].strip()) >= shortest]
  if not places:
    return []
  rng = ctx.rng()
  fill, i = rng.random() < middle, int(rng.choice(places))
  context, following = "".join(parts[:i]), parts[i + 1]
  prompt = opening(ctx, task) + (ctx.render(FILL, context=context, following=following) if fill
                                 else ctx.render(CONTINUE, context=context))
  group = await ctx.sample(prompt, n=samples, train=True)
  await ctx.score(dataclasses.replace(task, answer="".join(parts[i:])), group)
  for t in group:
    t.evidence["middle"] = ok(fill)
    t.weight = float(middle_weight) if fill else 1.0
  return group


def document_of(task: Task, field: str = "") -> str:
  """The text of a task: a field of its row, or question and solution together.

  Raises:
    ValueError: the row has no text in that field.
  """
  text = task.row.get(field) if field else task.question + task.solution
  if not isinstance(text, str) or not text.strip():
    raise ValueError(f"task {task.id!r} has no text in its field {field!r}; its row has "
                     f"{sorted(task.row)}")
  return text


def opening(ctx: EpisodeContext, task: Task) -> list[int]:
  """The tokens of a prompt in front of its question, such as BOS.

  Raises:
    ValueError: the prompt does not end with the question, as a template or chat goes around it.
  """
  question = ctx.encode(task.question)
  start = len(task.prompt) - len(question)
  if start < 0 or task.prompt[start:] != question:
    raise ValueError(f"the prompt of task {task.id!r} does not end with its question, but "
                     "documents have prompts of their own: leave config.data.chat off, and "
                     "prompt_template as it is")
  return task.prompt[:start]


def _split(text, segments):
  parts = re.findall(segments, text)
  if not all(isinstance(p, str) for p in parts) or "".join(parts) != text:
    raise ValueError(f"predict_segments: the matches of segments={segments!r} are not all of the "
                     f"document {text[:60]!r}: write an expression without groups that passes over "
                     "nothing")
  return parts
