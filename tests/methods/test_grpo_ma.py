"""GRPO-MA: the tree, its two groups, its loss, and the variance that it is for."""

import functools

import numpy as np
import pytest

from jaxrl import advantages, compose, objectives, rollouts
from jaxrl import config as configs
from jaxrl.advantages.chain import chain
from jaxrl.batch import ModelOutputs, Trajectory, pack
from jaxrl.objectives.aggregate import loss_weights, sum_of_terms
from jaxrl.rollouts import prefixes

CONFIG = "configs/methods/grpo_ma.py"


def episode(samples, thoughts, thought_tokens=8, boundary="|"):
  return functools.partial(rollouts.answers_to_thoughts, samples=samples, thoughts=thoughts,
                           thought_tokens=thought_tokens, boundary=boundary)


def thinks(text):
  """Thoughts of random length, a few of which never reach the boundary; ragged answers."""
  if "|" in text:
    answered = text.split("|")[1]
    return {"y": 0.5, "n": 0.3, "$": 0.2} if len(answered) < 4 else {"$": 1.0}
  return {"u": 0.4, "v": 0.2, "|": 0.3, "$": 0.1}


def reward(text):
  """Depends on thought and answer; some answers cannot be judged."""
  thought, bar, answer = text.partition("|")
  if answer.startswith("n"):
    return None
  return answer.count("y") + 0.1 * thought.count("u") if bar else -0.5


def text_of(t):
  """What follows the prompt."""
  return "".join(map(chr, t.tokens)).split("?")[1]


def prompt_of(t):
  return len(t.tokens) - len(text_of(t))


def trained(t):
  return "".join(map(chr, t.tokens[t.loss_mask]))


def tree_of(played, per_task):
  """By task: thoughts in order, each with the answers behind it."""
  tasks = {}
  for t in played.trajectories:
    tasks.setdefault(t.task_id, []).append(t)
  for members in tasks.values():
    thoughts = [t for t in members if t.group % (1 << 20) == 0]
    answers = iter([t for t in members if t.group % (1 << 20) == 1])
    yield [(t, [next(answers) for _ in range(per_task)] if trained(t).endswith("|") else [])
           for t in thoughts]
    assert next(answers, None) is None


def test_a_tree_branches_at_the_boundary_and_trains_every_token_once(play):
  played = play(episode(12, 4), thinks, reward, tasks=60)
  closed = 0
  for tree in tree_of(played, 3):
    assert len(tree) == 4
    for thought, answers in tree:
      assert trained(thought) == text_of(thought)
      closed += not answers
      for a in answers:
        assert text_of(a) == text_of(thought) + trained(a)
        assert "|" not in trained(a) and a.text == text_of(a).removesuffix("$")
        start = len(thought.tokens)
        prompt = prompt_of(a)
        np.testing.assert_array_equal(a.tag_ids, [0] * prompt + [1] * (start - prompt) + [2] * (
            len(a.tokens) - start))
        np.testing.assert_array_equal(a.loss_mask, a.tag_ids == 2)
        assert a.prompt_length == prompt and not a.behaviour_logprobs[:start].any()
  assert 10 < closed < 200
  answers = [t for t in played.trajectories if t.group % (1 << 20) == 1]
  assert len({trained(t) for t in answers}) > 10  # branches are draws of their own


def test_the_sampler_gets_the_exact_prefix_and_the_behaviour_of_the_table_comes_back(play):
  played = play(episode(6, 2), thinks, reward, tasks=20)
  for t in played.trajectories:
    text = "".join(map(chr, t.tokens))
    for i in np.nonzero(t.loss_mask)[0]:
      table = thinks(text[:i])
      assert t.behaviour_logprobs[i] == pytest.approx(np.log(table[text[i]]), abs=1e-5)


def test_a_thought_has_the_mean_reward_of_its_judged_answers(play):
  played = play(episode(12, 4), thinks, reward, tasks=60)
  unscored = 0
  for tree in tree_of(played, 3):
    for thought, answers in tree:
      found = [reward(a.text) for a in answers] if answers else [reward(thought.text)]
      judged = [r for r in found if r is not None]
      assert thought.scored == bool(judged)
      unscored += not judged
      if judged:
        assert thought.reward == pytest.approx(np.mean(judged))
        assert thought.evidence["right"].score == pytest.approx(np.mean(judged))
  assert unscored


def test_a_count_of_tokens_splits_where_there_is_no_boundary(play):
  table = lambda text: {"a": 0.5, "b": 0.4, "$": 0.1}
  played = play(episode(4, 2, thought_tokens=3, boundary=""), table, lambda text: 1.0, tasks=10,
                max_tokens=5)
  for t in played.trajectories:
    if t.group % (1 << 20) == 0:
      assert len(trained(t)) == 3 or trained(t).endswith("$")
    else:
      assert t.tag_ids.tolist()[:5] == [0, 0, 1, 1, 1] and len(trained(t)) <= 5


def test_one_answer_per_thought_gives_both_the_advantage_of_grpo(play):
  open_only = lambda text: {"|": 1.0} if text.endswith("u") else (
      {"y": 0.5, "n": 0.5} if text.endswith("|") else {"$": 1.0} if "|" in text else {"u": 1.0})
  played = play(episode(4, 4), open_only, lambda text: float("y" in text), tasks=8)
  batch = pack(played.trajectories)
  credit = np.asarray(chain([advantages.center_by_group, advantages.scale_by_group_std])(
      batch, batch.rewards))
  for g in range(8):
    members = played.trajectories[8 * g:8 * g + 8]
    thoughts, answers = members[:4], members[4:]
    rewards = np.array([a.reward for a in answers])
    assert [t.reward for t in thoughts] == rewards.tolist()
    spread = rewards.std(ddof=1)
    for i in range(4):
      wanted = (rewards[i] - rewards.mean()) / (spread + 1e-4) if spread else 0.0
      for index in (8 * g + i, 8 * g + 4 + i):
        at = (batch.sequence_ids == index) & batch.loss_mask
        np.testing.assert_allclose(credit[at], wanted, rtol=1e-4)


def normalised(rewards):
  rewards = np.array(rewards, np.float64)
  spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
  return (rewards - rewards.mean()) / (spread + 1e-6) if spread > 1e-9 else 0 * rewards


def test_the_loss_is_the_mean_over_thoughts_plus_the_mean_over_answers(play):
  played = play(episode(12, 4), thinks, reward, tasks=16)
  config = configs.load(CONFIG)
  batch = pack(played.trajectories)
  pieces = [compose.build(configs.to_dict(a), advantages) for a in config.advantage]
  batch = batch.with_signals(advantages=chain(pieces)(batch, batch.rewards))
  shift = np.random.default_rng(1).normal(size=batch.tokens.shape).astype(np.float32) * 0.3
  terms = [compose.build(configs.to_dict(t), objectives) for t in config.objective]
  weights = loss_weights(batch, config.aggregation.kind)
  result, _ = sum_of_terms(terms)(ModelOutputs(logprobs=batch.behaviour_logprobs + shift), batch,
                                  weights, weights)

  index = {id(t): i for i, t in enumerate(played.trajectories)}
  total, scored = 0.0, 0
  for tree in tree_of(played, 3):
    both = [[t for t, _ in tree], [a for _, answers in tree for a in answers]]
    both = [[t for t in kind if t.scored] for kind in both]
    here = 0.0  # the objective of the task, as the docstring has it
    for kind in both:
      for t, advantage in zip(kind, normalised([t.reward for t in kind]) if kind else ()):
        at = np.nonzero((batch.sequence_ids == index[id(t)]) & batch.loss_mask)
        ratio = np.exp(np.float64(shift[at]))
        tokens = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        here -= tokens.mean() / len(kind)
    total += sum(map(len, both)) * here  # tasks weigh as much as they have sequences
    scored += sum(map(len, both))
  np.testing.assert_allclose(result, total / scored, rtol=1e-4)


def test_thoughts_and_answers_are_told_apart_at_equal_weight(play):
  played = play(episode(12, 4), thinks, reward, tasks=30)
  for tree in tree_of(played, 3):
    sums = [sum(t.weight for t, _ in tree if t.scored),
            sum(a.weight for _, answers in tree for a in answers if a.scored)]
    assert sums[0] == pytest.approx(sums[1]) or sums[1] == 0


def variance_of_thought_advantages(thoughts, answers, redraws, rng):
  """Mean over thoughts of the variance of their advantage, with success rates fixed."""
  p = np.linspace(0.1, 0.9, thoughts)
  rewards = rng.binomial(answers, p, (redraws, thoughts)) / answers
  batch = pack([Trajectory([1, 2], [False, True], reward=r, group=g)
                for g, row in enumerate(rewards) for r in row],
               row_length=2 * redraws * thoughts)
  pieces = [compose.build(configs.to_dict(a), advantages) for a in configs.load(CONFIG).advantage]
  values = batch.rewards
  for piece in pieces:
    values = piece(batch, values)
  values = np.asarray(values)[:redraws * thoughts].reshape(redraws, thoughts)
  return values.var(axis=0).mean()


# Variances with a standard deviation that divides by n; with n - 1 they are (n - 1) / n of that.
@pytest.mark.parametrize("answers,expected", [(1, 0.55), (4, 0.23), (16, 0.065), (64, 0.016)])
def test_more_answers_take_the_variance_of_a_thoughts_advantage_away(answers, expected):
  found = variance_of_thought_advantages(4, answers, 2000, np.random.default_rng(answers))
  assert found == pytest.approx(expected * 3 / 4, rel=0.12)


def test_more_thoughts_do_not():
  rng = np.random.default_rng(7)
  for thoughts, expected in ((4, 0.55), (8, 0.70), (16, 0.75), (64, 0.78)):
    found = variance_of_thought_advantages(thoughts, 1, 800, rng)
    assert found == pytest.approx(expected * (thoughts - 1) / thoughts, rel=0.08)


def test_sixteen_answers_find_a_rare_reward_at_the_price_of_four_thoughts(play):
  def table(text):
    body = text.split("?")[1]
    return {"t": 1.0} if len(body) < 6 else {"r": 0.02, "w": 0.98} if len(body) == 6 else {"$": 1.0}
  find = lambda text: float("r" in text)
  tree = play(episode(16, 4, thought_tokens=6, boundary=""), table, find, tasks=500)
  flat = play(functools.partial(rollouts.group, samples=16), table, find, tasks=500)
  for played in (tree, flat):
    found = len({t.task_id for t in played.trajectories if t.reward > 0}) / 500
    assert abs(found - (1 - 0.98 ** 16)) < 4 * np.sqrt(0.276 * 0.724 / 500)
  assert flat.policy.drawn == 500 * 16 * 8
  assert tree.policy.drawn == 500 * (4 * 6 + 16 * 2)


def test_a_boundary_is_the_first_place_where_all_its_tokens_stand():
  t = Trajectory([5, 5, 1, 5, 5, 6, 5, 6], [False] * 8, prompt_length=2)
  assert prefixes.boundary_end(t, [5, 6]) == 6
  assert prefixes.boundary_end(t, [5, 5, 1]) is None
  assert prefixes.boundary_end(t, [5, 6, 7]) is None


@pytest.mark.parametrize("samples,thoughts", [(6, 4), (0, 4), (4, 0)])
def test_answers_that_do_not_divide_are_refused(play, samples, thoughts):
  with pytest.raises(RuntimeError, match="make samples a multiple of thoughts"):
    play(episode(samples, thoughts), thinks, reward)


def test_the_config_builds_and_leaves_room_for_an_answer():
  config = configs.load(CONFIG)
  built = compose.build(configs.to_dict(config.rollout.episode), rollouts)
  assert built.func is rollouts.answers_to_thoughts
  assert built.keywords["samples"] == 16 and built.keywords["thoughts"] == 4
  assert built.keywords["thought_tokens"] + config.data.task.digits <= config.rollout.max_tokens
