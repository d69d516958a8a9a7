"""iGRPO: the law of the best draft, and what of two stages reaches the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, pack
from jaxrl.evidence import methods
from jaxrl.objectives.aggregate import loss_weights, sum_of_terms
from jaxrl.tasks import addition

TEMPLATES = dict(refine=" draft {draft}, again {question} ")


def episode(drafts, samples, **options):
  return functools.partial(rollouts.draft_then_refine, drafts=drafts, samples=samples, **options)


def letters(**probabilities):
  """One letter and the end."""
  return lambda text: {"$": 1.0} if text[-1] in probabilities else probabilities


def right(text):
  return text in ("a", "b")


def drafts_of(played):
  """The draft in the prompt of every trajectory."""
  prompts = ["".join(map(chr, t.tokens[:t.prompt_length])) for t in played.trajectories]
  return [p.split("draft ")[1].split(",")[0] for p in prompts]


@pytest.mark.parametrize("success,drafts,expected", [(0.2, 8, 0.832), (0.5, 2, 0.75), (0.3, 1, 0.3)])
def test_the_best_of_n_drafts_is_right_as_often_as_the_paper_says(play, success, drafts, expected):
  played = play(episode(drafts, 1), letters(a=success, w=1 - success), right, tasks=1500,
                templates=TEMPLATES)
  rewards = [t.evidence["draft_reward"].score for t in played.trajectories]
  assert abs(np.mean(rewards) - expected) < 4 * np.sqrt(expected * (1 - expected) / 1500)


@pytest.mark.parametrize("pick,expected", [("best", 1 - 0.7 ** 4), ("random", 0.3),
                                           ("worst", 0.3 ** 4)])
def test_controls_pick_a_random_draft_or_the_worst(play, pick, expected):
  played = play(episode(4, 1, pick=pick), letters(a=0.3, w=0.7), right, tasks=1500,
                templates=TEMPLATES)
  rewards = [t.evidence["draft_reward"].score for t in played.trajectories]
  assert abs(np.mean(rewards) - expected) < 4 * np.sqrt(expected * (1 - expected) / 1500) + 1e-9


def test_among_equally_good_drafts_each_is_as_likely_as_it_was_drawn(play):
  played = play(episode(4, 1), letters(a=0.6, b=0.2, w=0.2), right, tasks=1500,
                templates=TEMPLATES)
  found = drafts_of(played)
  a, b = found.count("a"), found.count("b")
  assert abs(a / (a + b) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / (a + b))


def test_a_draft_without_a_reward_is_chosen_only_if_none_has_one(play):
  reward = lambda text: None if text == "a" else 0.0
  for pick in ("best", "random", "worst"):
    played = play(episode(3, 1, pick=pick), letters(a=0.5, w=0.5), reward, tasks=200,
                  templates=TEMPLATES)
    assert 0.05 < drafts_of(played).count("a") / 200 < 0.22  # 1/8: all three are "a"


def answers(text):
  """Wrong first; behind a draft right half of the time, with a probability that shows the prompt."""
  if text[-1] in "aw":
    return {"$": 1.0}
  return {"a": 0.5, "w": 0.5} if "draft" in text else {"a": 0.1, "w": 0.9}


def test_only_refinements_are_trained_on_and_given_the_prompt_with_the_draft(play):
  played = play(episode(4, 4), answers, right, tasks=50, templates=TEMPLATES)
  assert [r.n for r in played.policy.asked] == [4] * 100  # 8 completions per prompt in all
  assert len(played.trajectories) == 200
  for i, t in enumerate(played.trajectories):
    question = f"{i // 4}?"
    prompt = "".join(map(chr, t.tokens[:t.prompt_length]))
    assert prompt.startswith(question + " draft ") and prompt.endswith(f", again {question} ")
    np.testing.assert_array_equal(t.loss_mask, np.arange(len(t.tokens)) >= t.prompt_length)
    np.testing.assert_allclose(t.behaviour_logprobs[t.loss_mask], [np.log(0.5), 0], atol=1e-6)


def test_the_loss_is_that_of_the_second_group_alone(play):
  played = play(episode(4, 4), answers, right, tasks=12, templates=TEMPLATES)
  config = configs.load("configs/methods/igrpo.py")
  batch = pack(played.trajectories)
  credit = chain([compose.build(configs.to_dict(a), advantages)
                  for a in config.advantage])
  batch = batch.with_signals(advantages=credit(batch, batch.rewards))
  shift = np.random.default_rng(0).normal(size=batch.tokens.shape).astype(np.float32) * 0.3
  terms = [compose.build(configs.to_dict(t), objectives) for t in config.objective]
  weights = loss_weights(batch, config.aggregation.kind)

  def loss(moved):
    outputs = ModelOutputs(logprobs=batch.behaviour_logprobs + moved)
    return sum_of_terms(terms)(outputs, batch, weights, weights)[0]
  result, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(shift))

  expected, slope = 0.0, np.zeros(batch.tokens.shape)
  for g in range(12):
    rewards = np.array([t.reward for t in played.trajectories[4 * g:4 * g + 4]], np.float64)
    spread = rewards.std(ddof=1)
    for j in range(4):
      advantage = (rewards[j] - rewards.mean()) / (spread + 1e-4) if spread else 0.0
      at = np.nonzero((batch.sequence_ids == 4 * g + j) & batch.loss_mask)
      for r, c in zip(*at):
        ratio = np.exp(np.float64(shift[r, c]))
        clipped = np.clip(ratio, 0.8, 1.2)
        share = 1 / (12 * 4 * len(at[0]))
        expected -= share * min(ratio * advantage, clipped * advantage)
        if ratio * advantage <= clipped * advantage:
          slope[r, c] = -share * ratio * advantage
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def test_copies_of_the_draft_are_counted(play):
  played = play(episode(4, 4), answers, right, tasks=60, templates=TEMPLATES)
  copied = [t.evidence["copied"].score for t in played.trajectories]
  assert copied == [float(t.text[0] == d[0]) for t, d in zip(played.trajectories, drafts_of(played))]
  assert 0.3 < np.mean(copied) < 0.7


def test_drafts_may_be_trained_on_as_a_group_of_their_own(play):
  played = play(episode(3, 2, train_drafts=True), answers, right, tasks=10, templates=TEMPLATES)
  for first in range(0, 50, 5):
    refined, drafts = played.trajectories[first:first + 2], played.trajectories[first + 2:first + 5]
    assert len({t.group for t in refined}) == len({t.group for t in drafts}) == 1
    assert refined[0].group != drafts[0].group
    assert all(t.prompt_length == 2 and t.loss_mask[2:].all() for t in drafts)
  assert len(played.scorer.judged) == 50


@pytest.mark.parametrize("options,message", [(dict(pick="median"), "valid are 'best'"),
                                             (dict(drafts=0), "use at least 1")])
def test_arguments_that_make_no_sense_are_refused(play, options, message):
  broken = functools.partial(episode(2, 2), **options)
  with pytest.raises(RuntimeError, match=message):
    play(broken, answers, right, templates=TEMPLATES)


def test_the_config_builds_and_keeps_the_budget_of_its_parent():
  config = configs.load("configs/methods/igrpo.py")
  built = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  parent = configs.load("configs/grpo.py")
  assert built.func is rollouts.draft_then_refine
  assert sum(built.keywords[k] for k in ("drafts", "samples")) == parent.rollout.episode.samples
  text = config.rollout.templates.refine.format(draft="975", question="123+456=")
  assert set(text) <= set(config.tokenizer.alphabet)


def test_the_warm_start_has_seen_prompts_as_the_episode_writes_them():
  """A refinement's prompt is the plain one and the template, and so is the task's."""
  template = configs.load("configs/methods/igrpo.py").rollout.templates.refine
  warm = methods.evidence_of("igrpo").warm["data.task"]
  rng = np.random.default_rng(0)
  rows = [addition.sample(rng, **dict(warm, drafts=1.0)) for _ in range(20)]
  for row in rows:
    plain, draft = f"{row['a']}+{row['b']}=", row["question"].split("=")[1]
    assert row["question"] == plain + template.format(draft=draft, question=plain)
    assert len(draft) == len(row["answer"]) and addition.check(row, row["answer"])
