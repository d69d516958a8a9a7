"""Config files, overrides of any kind, and the settings of a phase."""

import json
import pathlib
import sys
import textwrap

import ml_collections
import pytest

from jaxrl import config as configs

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/quickstart.py")


@pytest.fixture
def config():
  """Every kind of field, and two phases."""
  c = ml_collections.ConfigDict()
  c.seed, c.phases = 0, ("sft", "rl")
  c.data = dict(train="a.jsonl", task=dict(digits=3), chat=False, more=())
  c.model = dict(layers=4, layer_types=("full",))
  c.optimizer = dict(name="adamw", learning_rate=1e-3, warmup_steps=0, b1=0.9)
  c.batch = dict(examples=8)
  c.rollout = dict(episode=dict(name="group", samples=8), templates=dict(), temperature=1.0,
                   stop_strings=(), max_rows=64)
  c.reward = dict(criteria=[dict(name="exact_match")], aggregate=dict(name="weighted_sum"))
  c.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2)]
  c.evaluate = dict(correct="", problems=8)
  c.sft = dict(kind="sft", steps=10, batch=dict(examples=4), objective=[dict(name="cross_entropy")],
               until=dict(metric="greedy_accuracy", at_least=0.4, every=5))
  c.rl = dict(kind="rl", steps=20, optimizer=dict(learning_rate=1e-4))
  return c


def at(config, path):
  for part in path.replace("[", ".").replace("]", "").split("."):
    config = config[int(part) if part.isdecimal() else part]
  return config


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("path, text, value", [
    ("seed", "7", 7), ("seed", "-3", -3), ("seed", "1_000", 1000), ("seed", "1e3", 1000),
    ("optimizer.warmup_steps", "5", 5),
    ("sft.optimizer.learning_rate", "3e-4", 3e-4), ("rollout.temperature", "2", 2.0),
    ("rollout.temperature", "-.5", -0.5),
    ("data.chat", "True", True), ("data.chat", "true", True), ("data.chat", "False", False),
    ("data.train", "a=b, 'c' [1:]", "a=b, 'c' [1:]"), ("data.train", "", ""),
    ("data.train", "7", "7"), ("data.train", "None", "None"), ("data.train", "été", "été"),
    ("phases", "('rl',)", ("rl",)), ("phases", "['rl']", ("rl",)), ("data.more", "['a']", ("a",)),
    ("rollout.stop_strings", r"['\n', 'a,b']", ("\n", "a,b")),
    ("model.layer_types", "('full', 'sliding')", ("full", "sliding")),
    ("objective", "[{'name': 'reinforce'}]", [dict(name="reinforce")]),
    ("objective[0].low", "0.1", 0.1), ("objective[0].low", "1", 1.0),
    ("objective[0].name", "reinforce", "reinforce"),
    ("reward.criteria[0].ignore_case", "True", True),  # an argument that the config leaves out
    ("rollout.episode", "{'name': 'm:f', 'width': 3}", {"name": "m:f", "width": 3}),
    ("rl.objective[0]", "{'name': 'reinforce'}", {"name": "reinforce"}),
    ("rollout.episode.samples", "4", 4), ("rollout.episode.name", "m:f", "m:f"),
    ("rollout.templates.refine", "Better: {draft}", "Better: {draft}"),
    ("reward.aggregate.weights", "{'exact_match': 2}", {"exact_match": 2}),
    ("data.task.answer_format", "reversed", "reversed"), ("data.task.digits", "5", 5),
    ("sft.steps", "3", 3), ("sft.until.at_least", "1", 1.0), ("sft.batch.examples", "2", 2),
    ("sft.objective[0].name", "other", "other"),
    ("rl.batch.examples", "2", 2), ("rl.objective[0].high", "0.3", 0.3),  # inherited so far
    ("rl.rollout.episode.samples", "2", 2), ("rl.optimizer.b1", "0.5", 0.5),
])
def test_a_field_takes_a_value_of_its_type(config, path, text, value):
  configs.override(config, {path: text})
  found = at(config, path)
  found = found.to_dict() if isinstance(found, ml_collections.ConfigDict) else found
  assert found == value and type(found) is type(value)


def test_one_argument_of_a_list_of_pieces_leaves_the_others(config):
  configs.override(config, {"rl.objective[0].high": "0.3"})
  assert config.rl.objective == [dict(name="clipped_surrogate", low=0.2, high=0.3)]
  assert config.objective == [dict(name="clipped_surrogate", low=0.2, high=0.2)]


def test_an_override_of_one_phase_leaves_the_others(config):
  configs.override(config, {"rl.rollout.episode.samples": "2", "sft.optimizer.b1": "0.5"})
  sft, rl = (configs.phase_config(config, p) for p in ("sft", "rl"))
  assert sft.rollout.episode.samples == 8 and rl.rollout.episode.to_dict() == dict(
      name="group", samples=2)
  assert (sft.optimizer.b1, rl.optimizer.b1) == (0.5, 0.9)


@pytest.mark.parametrize("path, text, message", [
    ("sed", "1", r"config has no field 'sed'; did you mean 'seed'\?"),
    ("optimizer.learing_rate", "1", r"config.optimizer has no .*did you mean 'learning_rate'\?"),
    ("optimiser.name", "x", r"--config.optimiser.name: config has no .* mean 'optimizer'\?"),
    ("sft.batch.exampels", "1", r"config.sft.batch has no .*did you mean 'examples'\?"),
    ("sft.optimzer.b1", "1", r"config.sft has no .*did you mean 'optimizer'\?"),
    ("sft.untill.every", "1", r"config.sft has no .*did you mean 'until'\?"),
    ("seed.x", "1", r"config.seed is 0 and has no fields"),
    ("objective[1].low", "1", r"config.objective is a list of 1; \[1\] is not in it"),
    ("objective.low", "1", r"config.objective is a list of 1; \[low\] is not in it"),
    ("phases[0]", "rl", r"config.phases is \('sft', 'rl'\) and has no fields"),
    ("seed", "x", r"--config.seed=x: config.seed is 0, so it takes a whole number"),
    ("seed", "1.5", "a whole number"), ("seed", "True", "a whole number"),
    ("seed", "None", "a whole number"), ("seed", "", "a whole number"),
    ("seed", "1e999", "a whole number"),
    ("optimizer.b1", "high", r"config.optimizer.b1 is 0.9, so it takes a number"),
    ("optimizer.b1", "True", "a number"),
    ("data.chat", "1", r"config.data.chat is False, so it takes True or False"),
    ("data.chat", "yes", "True or False"),
    ("phases", "rl", r"--config.phases=rl: .* takes a list such as \"\['a', 'b'\]\""),
    ("objective", "[dict(name='x'", "takes a list"),
    ("objective", "[dict('x')]", "takes a list"),
    ("objective", "[list(name='x')]", "takes a list"),
    ("optimizer", "{'name': 'sgd'}", "this is a section"),
    ("optimizer", "adam", r"this is a section; set its fields, such as --config.optimizer.\w+="),
    ("objective[0]", "x", r"this is a section; .*--config.objective\[0\].name="),
])
def test_mistakes_are_named_with_the_nearest_field_or_the_type(config, path, text, message):
  with pytest.raises(ValueError, match=message):
    configs.override(config, {path: text})


def test_an_override_that_every_phase_hides_is_refused(config):
  config.sft.optimizer = dict(learning_rate=2e-3)
  with pytest.raises(ValueError, match=r"--config.optimizer.learning_rate would change nothing.*"
                     r"--config.sft.optimizer.learning_rate=... or --config.rl.optimizer"):
    configs.override(config, {"optimizer.learning_rate": "1"})
  configs.override(config, {"optimizer.b1": "0.5"})
  config.rl.objective = [dict(name="reinforce")]
  with pytest.raises(ValueError, match="would change nothing"):
    configs.override(config, {"objective[0].low": "1"})


@pytest.mark.parametrize("order", [1, -1])
def test_whether_it_is_hidden_is_judged_by_the_final_phases(config, order):
  both = [("optimizer.learning_rate", "0.5"), ("phases", "('rl',)")]
  with pytest.raises(ValueError, match="every phase sets it"):
    configs.override(config, dict(both[::order]))


# ---------------------------------------------------------------------------------------- phases


def test_a_phase_lies_over_the_top_level_and_leaves_it(config):
  before = config.to_dict()
  sft, rl = (configs.phase_config(config, p) for p in ("sft", "rl"))
  assert (sft.batch.examples, rl.batch.examples) == (4, 8)
  assert (sft.optimizer.learning_rate, rl.optimizer.learning_rate) == (1e-3, 1e-4)
  assert sft.objective[0]["name"] == "cross_entropy" and sft.steps == 10 and sft.kind == "sft"
  assert sft.until.every == 5 and "until" not in rl
  rl.batch.examples, rl.objective[0]["low"] = 100, 9.0
  assert config.to_dict() == before


def test_an_optimizer_by_another_name_keeps_the_other_fields(config):
  config.rl.optimizer = dict(name="lion", learning_rate=1e-5)
  assert configs.phase_config(config, "rl").optimizer.to_dict() == dict(
      name="lion", learning_rate=1e-5, warmup_steps=0, b1=0.9)


def test_another_episode_has_arguments_of_its_own(config):
  config.rl.rollout = dict(episode=dict(name="tree", width=3))
  assert configs.phase_config(config, "rl").rollout.episode.to_dict() == dict(name="tree", width=3)
  config.rl.rollout = dict(episode=dict(samples=3), templates=dict(refine="Better:"))
  rollout = configs.phase_config(config, "rl").rollout
  assert rollout.episode.to_dict() == dict(name="group", samples=3)
  assert rollout.templates.refine == "Better:" and rollout.temperature == 1.0


def test_an_evaluation_needs_no_steps(config):
  config.last = dict(kind="evaluate")
  assert configs.phase_config(config, "last").kind == "evaluate"


@pytest.mark.parametrize("own, message", [
    (dict(steps=3), "config.bad is a phase, so it needs 'kind'"),
    (dict(kind="sft"), "config.bad is a phase of kind 'sft', so it needs 'steps'"),
    (3, "config.bad is a phase, so it needs 'kind'"),
    (dict(kind="sft", steps=1, optimiser=dict()), "config.bad has .* 'optimiser'.*'optimizer'"),
    (dict(kind="sft", steps=1, batch=dict(exmples=1)), r"config.bad.batch has .*'examples'\?"),
    (dict(kind="sft", stpes=1, steps=1), r"unknown field 'stpes'; did you mean 'steps'\?"),
    (dict(kind="sft", steps=1, batch=4), r"config.bad.batch=4, but this is a section"),
    (dict(kind="sft", steps=1, objective=dict(name="x")), r"objective=.*but this is no section"),
    (dict(kind="sft", steps=1, batch=dict(examples="many")),
     r"config.bad.batch.examples='many' has another type than 8"),
    (dict(kind="sft", steps=1, model=dict(layers=2)),
     "config.bad.model would change nothing, because all phases share it: set config.model"),
    (dict(kind="sft", steps=1, seed=2), "config.bad.seed would change nothing"),
    (dict(kind="sft", steps=1, evaluate=dict(problems=2)), "config.bad.evaluate.problems would"),
])
def test_a_bad_phase_says_where(config, own, message):
  config.bad = own
  with pytest.raises(ValueError, match=message):
    configs.phase_config(config, "bad")


def test_a_phase_without_a_section_names_the_nearest(config):
  with pytest.raises(ValueError, match=r"no section config.stf; did you mean 'sft'\?"):
    configs.phase_config(config, "stf")


@pytest.mark.parametrize("phases, message", [
    ((), "config.phases is empty; name at least one"),
    (("sft", "rl", "sft"), "config.phases names 'sft' 2 times"),
    (("start",), "'start', which cannot be the name of a phase"),
    ((1,), "names 1, which cannot"),
])
def test_bad_lists_of_phases_are_refused(config, phases, message):
  config.phases = phases
  with pytest.raises(ValueError, match=message):
    configs.phase_names(config)


# ----------------------------------------------------------------------------------------- files


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a file under a fresh directory, which is the current one, and forgets its modules."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  import configs as package
  monkeypatch.setattr(package, "__path__", list(package.__path__))
  known = set(sys.modules)

  def write(name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return name

  yield write
  for name in set(sys.modules) - known:
    if name.split(".")[0] in ("configs", "parent_beside"):
      del sys.modules[name]
      vars(package).pop(name.split(".")[-1], None)


BASE = """\
    from configs import base
    def get_config(%s):
      config = base.get_config()
"""


@pytest.mark.parametrize("name", [p.name for p in (ROOT / "configs").glob("*.py")
                                  if p.name != "__init__.py"])
def test_every_shipped_config_loads_with_phases_that_fit(name):
  config = configs.load(str(ROOT / "configs" / name))
  for phase in config.phases:
    configs.phase_config(config, phase)
  configs.to_dict(config)


def test_a_file_anywhere_builds_on_the_shipped_ones(write):
  name = write("my.py", BASE % "" + "      config.seed = 5\n      return config\n")
  assert configs.load(name).seed == 5


def test_a_directory_named_configs_is_joined_with_the_shipped_one(write):
  write("project/configs/parent.py", BASE % "" + "      config.seed = 5\n      return config\n")
  name = write("project/configs/child.py", """\
      from configs import base, parent
      def get_config():
        config = parent.get_config()
        config.batch.examples = base.get_config().batch.examples + 1
        return config
  """)
  config = configs.load(name)
  assert config.seed == 5 and config.batch.examples == 65


def test_a_parent_may_be_named_relatively(write):
  write("relative/configs/elder.py", BASE % "" + "      config.seed = 6\n      return config\n")
  name = write("relative/configs/younger.py",
               "from .elder import get_config\n")
  assert configs.load(name).seed == 6


def test_a_parent_may_lie_beside_a_file_outside_configs(write):
  write("parent_beside.py", BASE % "" + "      config.seed = 7\n      return config\n")
  assert configs.load(write("c.py", "from parent_beside import get_config\n")).seed == 7


def test_variants_reach_the_config_and_defaults_stay(write):
  name = write("v.py", BASE % "variant='small'" + "      config.data.train = variant\n"
               "      return config\n")
  assert configs.load(name).data.train == "small"
  assert configs.load(name + ":large").data.train == "large"


@pytest.mark.parametrize("body, spec, message", [
    (None, "configs/qickstart.py", r"--config=configs/qickstart.py: no such Python file in /"),
    ("", "c", "--config=c: no such Python file"),
    ("", ".", "no such Python file"),
    ("x = 1\n", "c.py", r"c.py: the file has no get_config\(\)"),
    (BASE % "" + "      return config\n", "c.py:big", "c.py has no variants; drop ':big'"),
    (BASE % "variant" + "      return config\n", "c.py",
     "it needs a variant, --config=c.py:VARIANT"),
    (BASE % "", "c.py", r"get_config\(\) returned a NoneType"),
    ("def get_config():\n  return dict(seed=1)\n", "c.py", r"returned a dict; start from"),
    ("def get_config():\n  raise ValueError('no variant q')\n", "c.py", "no variant q"),
    (BASE % "" + "      config.optimizer.learing_rate = 1.0\n      return config\n", "c.py",
     r"config.optimizer has an unknown field 'learing_rate'; did you mean 'learning_rate'\?"),
    (BASE % "" + "      config.optimiser = dict()\n      return config\n", "c.py",
     r"config has an unknown field 'optimiser'; did you mean 'optimizer'\?"),
    (BASE % "" + "      del config.log\n      return config\n", "c.py",
     r"config lacks 'log'; start from configs.base.get_config\(\)"),
])
def test_a_bad_file_is_refused_with_its_remedy(write, body, spec, message):
  if body is not None:
    write("c.py", body)
  with pytest.raises(ValueError, match=message):
    configs.load(spec)


def test_a_misspelt_path_names_the_nearest_file():
  with pytest.raises(ValueError, match=r"did you mean '.*configs/quickstart.py'\?"):
    configs.load(QUICKSTART.replace("quickstart", "quikstart"))


def test_fields_that_the_user_names_are_open(write):
  config = configs.load(write("c.py", BASE % "" + """\
      config.data.task = dict(anything=1)
      config.rollout.templates = dict(refine="x")
      config.rollout.episode = dict(name="m:f", width=1)
      config.reward.aggregate = dict(name="weighted_sum", weights=dict(exact_match=1.0))
      config.spare = dict(kind="sft", steps=1)
      return config
"""))
  assert config.rollout.episode.to_dict() == dict(name="m:f", width=1)


# ------------------------------------------------------------------------------- plain and compared


def test_a_config_is_written_down_as_plain_data(config):
  plain = configs.to_dict(config)
  assert plain["phases"] == ["sft", "rl"] and plain["objective"][0]["low"] == 0.2
  assert configs.differences(plain, configs.to_dict(config)) == []
  config.rollout.templates = dict(f=print)
  with pytest.raises(configs.ConfigError, match="the config holds <built-in function print>"):
    configs.to_dict(config)


def test_differences_name_every_leaf(config):
  old = configs.to_dict(config)
  configs.override(config, {"seed": "1", "objective[0].low": "0.1", "data.train": "b"})
  assert configs.differences(old, configs.to_dict(config)) == [
      "config.data.train: 'a.jsonl' -> 'b'",
      "config.objective[0].low: 0.2 -> 0.1", "config.seed: 0 -> 1"]
  assert configs.differences({"a": 1}, {"b": 2}) == ["config.a: 1 -> None", "config.b: None -> 2"]
  assert configs.differences([1], [1, 2], "c") == ["c: [1] -> [1, 2]"]


def test_a_config_of_an_earlier_version_has_the_defaults_of_what_came_later():
  now = configs.to_dict(configs.load("configs/grpo.py"))
  before = json.loads(json.dumps(now))
  del before["rollout"]["filter_by"], before["evaluate"]["pairs"], before["optimizer"]["offload"]
  before["rollout"]["episode"] = now["rollout"]["episode"] = dict(name="another")  # a piece
  before["rollout"]["prompts"] = 7
  changed = configs.differences(configs.with_defaults(before), now)
  assert changed == [f"config.rollout.prompts: 7 -> {now['rollout']['prompts']}"]


def test_pieces_are_given_as_configs_write_them(config):
  configs.override(config, {"reward.criteria": "[dict(name='exact_match'), {'name': 'overlong', 'buffer': 2}]"})
  assert configs.to_dict(config.reward.criteria) == [
      dict(name="exact_match"), dict(name="overlong", buffer=2)]
