"""Pairs of the best answer and the same answer made worse on purpose."""

from collections.abc import Sequence
import dataclasses

from jaxrl import compose
from jaxrl import rollouts
from jaxrl.batch import PREFERENCE
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext


@compose.supplies(columns=(PREFERENCE, "error_kind"))
async def best_and_flawed(ctx: EpisodeContext, task: Task, *, samples: int, kinds: Sequence[str],
                          flaw: str = "", rewrite: str = "", gap: float = 0.0) -> list[Trajectory]:
  """The best of some samples, preferred to itself with an error put in (SeaPO, arXiv:2509.24781).

  The kind of error is drawn uniformly from `kinds`, independently for each prompt. Either a function
  puts it in, or whoever answers rewrites the answer under a template, without a gradient. A pair is
  dropped if the answer is flawed in no way that the reward sees: r(flawed) >= r(best) - gap.

  Args:
    ctx: serves samples and scores.
    task: the problem.
    samples: answers, of which the best is kept.
    kinds: names of errors.
    flaw: `module:function` of `(rng, text, kind) -> text`, or None where it cannot; such as
      `jaxrl.tasks.scratchpad_addition:flawed`.
    rewrite: name of a template in `config.rollout.templates` instead, with `{question}`, `{answer}` and
      `{kind}`.
    gap: how much worse the flawed answer has to be.

  Returns:
    Both answers, with the columns `preference`, 1 and 0, and `error_kind`, an index of `kinds`; not
    trained on if the pair is dropped. The flawed answer was not drawn: its behaviour
    log-probabilities are what the policy says of it.

  Raises:
    ValueError: no kinds, or not one of `flaw` and `rewrite`.
  """
  if not kinds or isinstance(kinds, str) or bool(flaw) == bool(rewrite):
    raise ValueError(f"best_and_flawed: kinds={kinds!r} has to list errors, and one of flaw={flaw!r} and "
                     f"rewrite={rewrite!r} to say how they come in")
  rng = ctx.rng(24781)
  number = int(rng.integers(len(kinds)))
  answers = await ctx.sample(task.prompt, n=samples, train=True)
  scores = await ctx.score(task, answers)
  best = answers[int(scores.argmax())]
  if flaw:
    text = compose.build(flaw, rollouts, where="best_and_flawed: flaw")(rng, best.text, kinds[number])
  else:
    asked = ctx.prompt(rewrite, question=task.question, answer=best.text, kind=kinds[number])
    text = (await ctx.sample(asked))[0].text
  pair = [best]
  if text and text.strip() != best.text.strip():
    worse = ctx.solved(dataclasses.replace(task, solution=text))
    start = worse.prompt_length
    worse.behaviour_logprobs[start:] = await ctx.logprobs(
        worse.tokens[:start], worse.tokens[start:], model="policy")
    await ctx.score(task, [worse])
    pair.append(worse)
  kept = (len(pair) == 2 and all(t.scored for t in pair)
          and pair[1].reward < pair[0].reward - gap)
  for t, preference in zip(pair, (1.0, 0.0)):
    t.columns = {PREFERENCE: preference, "error_kind": float(number)}
    t.scored = t.scored and kept
  return pair
