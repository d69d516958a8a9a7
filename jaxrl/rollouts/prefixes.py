"""First parts of answers, which further samples go on from."""

from collections.abc import Sequence
import dataclasses

from jaxrl.batch import Trajectory
from jaxrl.rollouts.context import EpisodeContext

FIRST, SECOND = 1, 2  # `Trajectory.tag_ids` up to the end of a boundary, and behind it


async def sample_prefixes(ctx: EpisodeContext, prompt: Sequence[int], n: int, *, max_tokens: int,
                          boundary: str = "", train: bool = False
                          ) -> tuple[list[Trajectory], list[bool]]:
  """Samples `n` beginnings of an answer.

  Args:
    ctx: serves samples.
    prompt: token ids.
    n: how many.
    max_tokens: tokens of a beginning, at most.
    boundary: text that a beginning ends with; what was sampled behind it is thrown away. Empty cuts
      after `max_tokens`.
    train: whether the tokens enter the loss.

  Returns:
    Beginnings, tagged `FIRST`, and whether each can be continued: one that ended by itself, or that
    did not come to its boundary, cannot.
  """
  found = await ctx.sample(prompt, n=n, train=train, max_tokens=max_tokens)
  marker = ctx.encode(boundary)
  prefixes = []
  for t in found:
    end = boundary_end(t, marker) if marker else None
    prefixes.append((_cut(t, end, boundary), True) if end
                    else (t, not marker and t.finish == "length"))
  for t, _ in prefixes:
    t.tag_ids[t.prompt_length:] = FIRST
  return [t for t, _ in prefixes], [is_open for _, is_open in prefixes]


def continued(head: Trajectory, found: list[Trajectory]) -> list[Trajectory]:
  """What was sampled behind a beginning, as completions of the beginning's own prompt: text and
  length are those of both, `tag_ids` tell them apart, and what is trained on stays as it was."""
  for t in found:
    t.tag_ids[head.prompt_length:t.prompt_length] = head.tag_ids[head.prompt_length:]
    t.tag_ids[t.prompt_length:] = SECOND
    t.prompt_length, t.text = head.prompt_length, head.text + t.text
  return found


def boundary_end(trajectory: Trajectory, marker: Sequence[int]) -> int | None:
  """Index behind the first occurrence of some token ids in a completion; None if there is none."""
  tokens, marker = trajectory.tokens.tolist(), list(marker)
  for start in range(trajectory.prompt_length, len(tokens) - len(marker) + 1):
    if tokens[start:start + len(marker)] == marker:
      return start + len(marker)
  return None


def _cut(t, end, boundary):
  return dataclasses.replace(
      t, tokens=t.tokens[:end], loss_mask=t.loss_mask[:end], tag_ids=t.tag_ids[:end],
      turn_ids=t.turn_ids[:end], behaviour_logprobs=t.behaviour_logprobs[:end],
      text=t.text.partition(boundary)[0] + boundary, finish="stop")
