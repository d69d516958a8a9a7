"""A config becomes the parts of a run, and nothing in it goes unread."""

import pathlib
import sys
import types

import ml_collections
import pytest

from jaxrl import compose
from jaxrl import config as configs
from jaxrl import data
from jaxrl.batch import Task, Trajectory
from jaxrl.evaluation import policy
from jaxrl.objectives.aggregate import Aggregation
from jaxrl.training import builders, refusals, run
from jaxrl.training import phases as phase_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config():
  """The quickstart at a size that is traced in no time."""
  config = configs.load(str(ROOT / "configs/quickstart.py"))
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16)
  config.evaluate.problems = 5
  return config


@pytest.fixture
def build(tmp_path):
  made = []

  def build(config):
    made.append(builders.build_parts(config, tmp_path, print))
    return made[-1]

  yield build
  for parts in made:
    parts.scorer.close()


@pytest.fixture
def untraced(monkeypatch):
  """Leaves out the slow part where it has nothing to say."""
  monkeypatch.setattr(phase_lib, "rehearse", lambda *_: types.SimpleNamespace(learner=None))


def names(pieces):
  return [compose.name_of(p) for p in pieces]


def test_the_quickstart_becomes_two_phases(config, build):
  parts = build(config)
  sft, rl = parts.phases
  assert (sft.index, sft.name, sft.kind, rl.index, rl.kind) == (0, "sft", "sft", 1, "rl")
  assert names(sft.learning.terms) == ["cross_entropy"] and not sft.learning.advantage
  assert names(rl.learning.terms) == ["clipped_surrogate"]
  assert names(rl.learning.advantage) == ["center_by_group", "scale_by_group_std"]
  assert (sft.learning.with_behaviour, rl.learning.with_behaviour) == (False, True)
  assert float(rl.learning.learning_rate(10 ** 6)) == pytest.approx(
      config.rl.optimizer.learning_rate)
  assert len(parts.test) == len(parts.validation) == 5
  assert {t.question for t in parts.test}.isdisjoint(t.question for t in parts.validation)
  assert parts.decoder.vocab_size == parts.tokenizer.vocab_size and parts.decoder.d_model == 16


def test_a_vocabulary_is_the_tokenizers_or_larger_so_that_a_mesh_can_split_it(config, build,
                                                                              untraced):
  tokens = build(config).tokenizer.vocab_size
  assert tokens == 15  # which two devices cannot share; sharding.check_divisible says what to do
  configs.override(config, {"model.vocab_size": "16"})
  assert build(config).decoder.vocab_size == 16
  config.model.vocab_size = 14
  with pytest.raises(ValueError, match="model.vocab_size=14, but the tokenizer has 15 tokens"):
    build(config)


def test_what_the_loop_gets_is_what_the_config_says(config, build, untraced):
  config.rl.rollout = dict(updates=3, max_logprob_gap=0.5)
  configs.override(config, {"rl.until": "None"})
  config.rl.evaluate = dict(every=7)
  config.rl.checkpoint = dict(every=9)
  config.log.update(samples_every=11, curves_every=13)
  config.optimizer.max_bad_steps = 4
  parts = build(config)
  sft, rl = (builders.phase_run(parts, phase) for phase in parts.phases)
  until = config.sft.until
  assert sft.until == (until.metric, until.at_least) and sft.validate_every == until.every
  assert (rl.until, rl.validate_every, sft.updates_per_batch, rl.updates_per_batch) == (
      None, 7, 1, 3)
  assert (rl.max_logprob_gap, rl.checkpoint_every, rl.samples_every, rl.curves_every,
          rl.max_bad_steps) == (0.5, 9, 11, 13, 4)
  assert (sft.checkpoint_every, rl.steps) == (config.checkpoint.every, config.rl.steps)
  assert sft.shape.layout.row_length == 64
  assert (sft.supply.sampled, rl.supply.sampled) == (False, True)


def test_without_validation_problems_nothing_is_measured_on_the_way(config, build, untraced):
  config.phases, config.data.validation, config.rl.until = ("rl",), "", None
  parts = build(config)
  assert parts.validation == [] and builders.phase_run(parts, parts.phases[0]).validate is None


def test_a_reference_is_kept_only_where_a_term_needs_it(config, build, untraced):
  config.rl.objective = [dict(name="clipped_surrogate"), dict(name="kl", beta=0.1)]
  parts = build(config)
  kept = [builders.abstract_state(parts, phase).reference is not None for phase in parts.phases]
  assert kept == [False, True]


def test_a_term_may_have_an_aggregation_of_its_own(config, build, untraced):
  config.aggregation.update(kind="constant", constant=8.0)
  config.rl.objective = [
      dict(name="clipped_surrogate"), dict(name="entropy", coefficient=0.1, aggregation="token_mean"),
      dict(name="kl", beta=0.1, aggregation=dict(kind="constant", constant=3.0)),
      dict(name="cross_entropy", aggregation="constant")]
  learning = build(config).phases[1].learning
  assert learning.aggregations == [
      Aggregation("constant", 8.0), Aggregation("token_mean", 8.0), Aggregation("constant", 3.0),
      Aggregation("constant", 8.0)]
  assert names(learning.terms) == ["clipped_surrogate", "entropy", "kl", "cross_entropy"]
  assert [term.keywords for term in learning.terms[1:]] == [{"coefficient": 0.1}, {"beta": 0.1}, {}]


def test_a_mixture_weighs_its_terms_and_may_list_one_more_than_once(config, build, untraced):
  config.rl.objective = [
      dict(name="kl", beta=0.1, loss_weight=0.8), dict(name="kl", beta=0.2),
      dict(name="entropy", coefficient=1.0, loss_weight=dict(schedule="linear", start=1.0, end=0.0, steps=4))]
  learning = build(config).phases[1].learning
  assert names(learning.terms) == ["kl", "kl", "entropy"]
  assert [float(a.weight_at(1)) for a in learning.aggregations] == [0.8, 1.0, 0.75]


@pytest.mark.parametrize("weight", ["0.5", float("nan"), True, None])
def test_a_weight_of_a_term_that_is_no_number_is_refused(config, build, weight):
  config.rl.objective = [dict(name="kl", beta=0.1, loss_weight=weight)]
  with pytest.raises(ValueError, match=r"config.objective\[0\].loss_weight=.* must be a number"):
    build(config)


def test_what_remembers_under_its_name_is_listed_once(config, build):
  config.phases, config.data.train = ("comparisons",), "task:preferred_addition"
  config.comparisons = dict(kind="reward", steps=2, aggregation=dict(kind="sequence_mean"),
                            objective=2 * [dict(name="bco")])
  with pytest.raises(ValueError, match=r"config.objective\[1\] lists 'bco' once more"):
    build(config)


@pytest.mark.parametrize("aggregation, message", [
    (dict(constant=3.0), r"config.objective\[0\].aggregation=.*must be a kind"),
    (dict(kind="constant", tokens=3.0), r"config.objective\[0\].aggregation=.*must be a kind"),
    ("token_meen", r"config.objective\[0\].aggregation: unknown aggregation 'token_meen'; did"),
    ("constant", r"config.objective\[0\].aggregation: .* divides by constant=0.0: set it to a")])
def test_an_aggregation_that_is_none_is_refused(config, build, aggregation, message):
  config.phases = ("rl",)
  config.rl.objective = [dict(name="clipped_surrogate", aggregation=aggregation)]
  with pytest.raises(ValueError, match=message):
    build(config)


def test_an_aggregation_of_all_terms_that_is_none_is_refused_with_its_place(config, build):
  config.aggregation.kind = "token_meen"
  with pytest.raises(ValueError, match="config.aggregation: unknown aggregation 'token_meen'"):
    build(config)


def test_an_evaluation_needs_no_steps_and_no_warm_up(config, build):
  config.phases, config.last = ("last",), dict(kind="evaluate")
  assert config.optimizer.warmup_steps > 0
  phase, = build(config).phases
  assert (phase.kind, phase.steps) == ("evaluate", 0)


@pytest.mark.parametrize("label", ["", "length"])
def test_the_first_criterion_counts_as_correct_unless_one_is_named(
    config, build, untraced, monkeypatch, label):
  seen = []
  monkeypatch.setattr(policy, "evaluate", lambda *_, **options: seen.append(options))
  config.reward.criteria = [dict(name="exact_match"), dict(name="finished", label="length")]
  config.evaluate.correct = label
  parts = build(config)
  builders.evaluate(parts, parts.phases[1], None, parts.test, (1, 20), step=20)
  assert seen[0]["correct"] == (label or "exact_match")
  assert seen[0]["key"] == (builders.TESTING, 1, 20) and seen[0]["samples"] == 8


def test_a_reward_that_does_not_fit_leaves_no_worker_behind(config, build, untraced, monkeypatch):
  closed = []
  monkeypatch.setattr(builders.Scorer, "close", lambda self: closed.append(self))
  config.rl.evaluate = dict(correct="exact")
  with pytest.raises(ValueError, match="config.evaluate.correct='exact' is none of the criteria"):
    build(config)
  assert len(closed) == 1


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A user's module with an episode and two functions that are none."""
  (tmp_path / "my_pieces.py").write_text(
      "async def wide(ctx, task, *, width: int):\n"
      "  return await ctx.sample(task.prompt, n=width, train=True)\n"
      "def narrow(ctx, task):\n  return []\n"
      "def always(task, completion):\n  return 1.0\n")
  monkeypatch.syspath_prepend(tmp_path)
  yield "my_pieces"
  sys.modules.pop("my_pieces", None)


def test_episodes_and_rewards_of_ones_own_are_found_by_module(config, build, untraced, module):
  config.rollout.episode = dict(name=f"{module}:wide", width=3)
  config.reward.criteria = [dict(name=f"{module}:always")]
  parts = build(config)
  episode = builders.phase_run(parts, parts.phases[1]).supply._rollouts.episode
  assert episode.func.__name__ == "wide" and episode.keywords == dict(width=3)
  assert parts.scorer.labels == ["always"]


def test_programs_are_shared_by_seeds_but_not_by_functions_of_one_name(config, build, monkeypatch):
  async def plain(ctx, task):
    return await ctx.sample(task.prompt, n=2, train=True)

  @compose.needs("reference")
  @compose.supplies(columns=("mark",))
  async def asking(ctx, task):
    return await ctx.sample(task.prompt, n=2, train=True)

  configs.override(config, {"phases": "('rl',)"})
  found = []
  for seed, episode in enumerate((plain, plain, asking)):
    monkeypatch.setitem(sys.modules, "my_pieces", types.SimpleNamespace(mine=episode))
    config.seed, config.rollout.episode = seed, dict(name="my_pieces:mine")
    found.append(build(config).rehearsals["rl"])
  assert found[0] is found[1], "seeds differ in no program"
  assert found[1] is not found[2], "the state of the last has a reference too"


def test_a_function_that_is_no_coroutine_is_no_episode(config, build, module):
  config.rollout.episode = dict(name=f"{module}:narrow")
  with pytest.raises(ValueError, match="'my_pieces:narrow' is no episode; .*`async def my_ep"):
    build(config)


@pytest.mark.parametrize("until, message", [
    (5, "config.sft.until needs metric, at_least, every"),
    (dict(metric="greedy_accuracy", every=5), r"needs metric, at_least, every.*it is \{'every': 5"),
    (dict(metric="loss", at_least=1.0, every=5), "metric='loss' is not measured on the way"),
    (dict(metric="unscored", at_least=1.0, every=0), "every=0 must be a number of updates"),
])
def test_a_bad_condition_to_end_a_phase_is_refused(config, build, until, message):
  config.sft = dict(kind="sft", steps=50, until=until, objective=[dict(name="cross_entropy")])
  with pytest.raises(ValueError, match=message):
    build(config)


@pytest.mark.parametrize("path", sorted(refusals.AT_LEAST))
def test_every_setting_has_a_smallest_value(config, build, untraced, path):
  *sections, field = path.split(".")
  section = config
  for name in sections:
    section = section[name]
  config.phases = ("rl",)
  del config.rl.optimizer
  section[field] = type(section[field])(refusals.AT_LEAST[path] - 1)
  with pytest.raises(ValueError, match=f"{field}=-?[0-9]"):
    build(config)


def test_every_field_of_the_base_config_is_read(config, tmp_path, monkeypatch, untraced):
  """Runs everything that reads settings; a dead field in each section shows that it would be seen.

  The sections that are handed on as a whole (model, mesh, reward, reference, frozen) are checked where
  they arrive.
  """
  phases = ("sft", "rl", "preference")
  reads, quiet = set(), [False]
  getitem, to_dict, phase_config = (ml_collections.ConfigDict.__getitem__, configs.to_dict,
                                    configs.phase_config)

  def recorded(self, key):
    if not quiet[0]:
      reads.add((section_of(self), key))
    return getitem(self, key)

  def section_of(section):
    keys = frozenset(section.keys())
    return "" if "phases" in keys else keys

  def silently(function):
    def call(value, *rest):
      quiet[0] = True
      try:
        return function(value, *rest)
      finally:
        quiet[0] = False
    return call

  def plain(value):  # whoever asks for a whole section checks the names in it
    if isinstance(value, ml_collections.ConfigDict) and "phases" not in value:
      reads.update((section_of(value), key) for key in value)
    return silently(to_dict)(value)

  def touch(parts, checkpoints, reporter, stop):
    for phase in parts.phases:
      builders.phase_run(parts, phase)
      builders.evaluate(parts, phase, None, parts.test, (), step=0)

  config.data.train = config.data.validation = config.data.test = "task:preferred_addition"
  config.phases = phases
  config.preference = dict(kind="preference", steps=50, objective=[dict(name="dpo")],
                           aggregation=dict(kind="sequence_mean"))
  sections = [name for name in config if isinstance(config[name], ml_collections.ConfigDict)
              and name not in phases]
  dead = [name for name in sections if name not in ("model", "mesh", "reward", "reference", "frozen")]
  for name in dead:
    config[name].dead = 1
  kinds = [dict(kind="character"), dict(kind="bpe", vocab_size=260),
           dict(kind="pretrained", path=str(tmp_path / "theirs"))]
  data.CharacterTokenizer().save(tmp_path / "theirs")
  config.data.task_size = 20
  monkeypatch.setattr(ml_collections.ConfigDict, "__getitem__", recorded)
  monkeypatch.setattr(configs, "to_dict", plain)
  monkeypatch.setattr(configs, "phase_config", silently(phase_config))
  monkeypatch.setattr(policy, "evaluate", lambda *_, **__: None)
  monkeypatch.setattr(run, "_run", touch)
  for number, kind in enumerate(kinds):
    config.tokenizer.update(kind)
    run.run(config, tmp_path / str(number), quiet=True)
  quiet[0] = True

  unread = [field for field in config if field not in phases and ("", field) not in reads]
  unread += [f"{name}.{field}" for name in sections for field in config[name]
             if (section_of(config[name]), field) not in reads]
  assert unread == [f"{name}.dead" for name in dead]


def test_a_filter_is_looked_at_where_samples_are_drawn(config, build, untraced):
  config.rollout.update(filter_by="exact_match", filter_zero_variance=False)
  config.rl.rollout = dict(filter_zero_variance=True)
  assert [phase.kind for phase in build(config).phases] == ["sft", "rl"]


@pytest.mark.parametrize("own, reward", [(12, 0.0), (None, -1.0)])
def test_criteria_are_given_the_limit_of_the_phase_that_samples(config, build, untraced, own, reward):
  config.reward.criteria = [dict(name="overlong", buffer=2)]
  config.rollout.max_tokens = 8
  if own:
    config.rl.rollout = dict(max_tokens=own)
  answer = Trajectory([1] * 10, [False] + [True] * 9)
  (found,) = build(config).scorer.score([(Task("it", [1]), answer)])
  assert found.evidence["overlong"].score == reward


def test_critiques_are_refused_where_lengths_would_count(config, build):
  config.phases, config.data.train, config.data.task = ("comparisons",), "task:worked_sums", {}
  config.data.critique = "critique"
  config.comparisons = dict(kind="preference", steps=2, aggregation=dict(kind="sequence_sum"),
                            objective=[dict(name="imitate_preferred")])
  with pytest.raises(ValueError, match="critiques behind answers .* are no part of what imitate_preferred"):
    build(config)


@pytest.mark.parametrize("changes, message", [
    (dict(filter_by="exact_mtch", filter_zero_variance=True),
     "config.rollout.filter_by='exact_mtch' is none of the criteria.*did you mean 'exact_match'"),
    (dict(filter_by="exact_match", filter_zero_variance=False), "filter_by='exact_match' filters nothing without")])
def test_a_filter_by_nothing_is_refused(config, build, untraced, changes, message):
  config.rollout.update(changes)
  with pytest.raises(ValueError, match=message):
    build(config)


@pytest.mark.parametrize("section, spec, message", [
    ("objective", dict(name="value_loss"), r"config.objective\[1\] \(value_loss\): signal 'values' needs a value head"),
    ("advantage", dict(name="gae"), r"config.advantage\[0\] \(gae\): signal '.*values' needs a value head"),
    ("objective", dict(name="bradley_terry"), r"config.objective\[1\] \(bradley_terry\): signal 'scores' needs a")])
def test_who_reads_a_head_that_the_model_lacks_is_named(config, build, untraced, section, spec, message):
  config[section] = [*config[section], spec] if section == "objective" else [spec]
  config.aggregation.kind = "sequence_mean"
  with pytest.raises(ValueError, match=message):
    build(config)


def test_edits_are_named_plainly_and_listed(config, build, untraced):
  config.rollout.edits = [dict(name="semantic_frequenzy")]
  with pytest.raises(ValueError) as error:
    build(config)
  listed = str(error.value)
  assert all(name in listed for name in ("semantic_frequency", "keep", "choose_rollouts", "heat_once"))
  assert "Step" not in listed and "apply" not in listed and "capped_group" not in listed
