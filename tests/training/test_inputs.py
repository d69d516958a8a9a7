"""Splits, tokenizers and tasks as a config names them."""

import json

import pytest

from jaxrl import data
from jaxrl.data import dates
from jaxrl.training import inputs


@pytest.fixture
def config(tmp_path, monkeypatch):
  from configs import base
  monkeypatch.chdir(tmp_path)
  config = base.get_config()
  config.data.train, config.data.solution = "rows.jsonl", ""
  config.evaluate.problems = 7
  write(tmp_path / "rows.jsonl", 10)
  return config


def write(path, count, **changes):
  rows = [dict(question=f"what is {i}", answer=f"it is {i}", hint=f"h{i}") | changes
          for i in range(count)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(source):
  return [source[i]["answer"].removeprefix("it is ") for i in range(len(source))]


@pytest.mark.parametrize("part, expected", [
    ("", range(10)), ("[:3]", range(3)), ("[7:]", range(7, 10)), ("[2:5]", range(2, 5)),
    ("[-2:]", range(8, 10)), ("[:-8]", range(2)), ("[8:99]", range(8, 10))])
def test_a_part_of_a_source_keeps_its_line_numbers(config, part, expected):
  config.data.train += part
  source = inputs.open_split(config, "train")
  assert answers(source) == [str(i) for i in expected]
  assert [source.where(i) for i in range(len(source))] == [f"rows.jsonl:{i + 1}" for i in expected]


def test_parts_make_disjoint_splits_of_one_file(config):
  config.data.update(train="rows.jsonl[:8]", validation="rows.jsonl[8:9]", test="rows.jsonl[9:]")
  found = [answers(inputs.open_split(config, split)) for split in inputs.SPLITS]
  assert sum(found, []) == [str(i) for i in range(10)]


def test_an_unnamed_split_is_none(config):
  assert inputs.open_split(config, "test") is None


def test_toy_tasks_take_knobs_sizes_and_the_seed(config):
  config.data.update(train="task:addition", validation="task:addition", test="task:addition",
                     task_size=30)
  config.data.task, config.evaluate.pairs = dict(digits=1), 5
  opened = {split: inputs.open_split(config, split) for split in inputs.SPLITS}
  assert [len(s) for s in opened.values()] == [30, 7, 7]
  questions = {k: {s[i]["question"] for i in range(len(s))} for k, s in opened.items()}
  assert not questions["train"] & (questions["validation"] | questions["test"])
  config.seed = 5  # other problems to train on, the same ones to be measured by
  assert [inputs.open_split(config, "train")[i]["question"] for i in range(30)] != [
      opened["train"][i]["question"] for i in range(30)]
  assert inputs.open_split(config, "test")[3] == opened["test"][3]


@pytest.mark.parametrize("spec, message", [
    ("rows.jsonl[10:]", r"config.data.train='rows.jsonl\[10:\]': \[10:\] leaves none of the rows"),
    ("rows.jsonl[5:2]", "leaves none of the rows"),
    ("row.jsonl", "config.data.train='row.jsonl': no file"),
    ("task:adition", "config.data.train='task:adition': .*did you mean 'addition'"),
])
def test_data_that_is_not_there_is_named_with_its_setting(config, spec, message):
  config.data.train = spec
  with pytest.raises(ValueError, match=message):
    inputs.open_split(config, "train")


# ------------------------------------------------------------------------------------ tokenizers


def make(config, directory):
  return inputs.make_tokenizer(config, inputs.open_split(config, "train"), directory)


def test_characters_by_default_printable_or_as_given(config, tmp_path):
  assert make(config, tmp_path / "a/tokenizer").alphabet == data.CharacterTokenizer().alphabet
  config.tokenizer.alphabet = "abc"
  assert make(config, tmp_path / "b/tokenizer").alphabet == "abc"


def test_a_run_that_began_keeps_its_tokenizer_and_an_attempt_does_not(config, tmp_path):
  directory = tmp_path / "run/tokenizer"
  config.tokenizer.alphabet = "abc"
  make(config, directory)
  config.tokenizer.alphabet = "abcd"
  assert make(config, directory).alphabet == "abcd"
  (directory.parent / "config.json").write_text("{}")
  config.tokenizer.alphabet = "abcde"
  assert make(config, directory).alphabet == "abcd"


def test_a_run_that_is_continued_has_the_day_on_which_it_began(config, tmp_path, monkeypatch):
  def on(day, place):
    monkeypatch.setattr(dates, "today", lambda: day)
    config.tokenizer.update(date="", kind="pretrained", path=str(tmp_path / "theirs"))
    return make(config, tmp_path / place / "tokenizer").date
  theirs = data.train_bpe(["a"], 259)
  theirs.fast.chat_template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
  theirs.export(tmp_path / "theirs")
  assert on("2025-01-05", "run") == "2025-01-05"
  assert on("2025-01-06", "run") == "2025-01-06"  # for it has not begun
  (tmp_path / "run/config.json").write_text("{}")
  assert on("2025-01-07", "run") == "2025-01-06" and on("2025-01-07", "other") == "2025-01-07"
  (tmp_path / "run/checkpoints").mkdir()
  config.start = str(tmp_path / "run")
  assert on("2025-01-08", "next") == "2025-01-06"  # the same prompts as before it
  config.tokenizer.date = "2024-12-31"
  assert make(config, tmp_path / "last/tokenizer").date == "2024-12-31"
  config.start, config.tokenizer.kind = "", "character"
  with pytest.raises(ValueError, match="config.tokenizer.date=2024-12-31, but .* has no chat template"):
    make(config, tmp_path / "none/tokenizer")


def test_bpe_learns_from_what_is_trained_on(config, tmp_path):
  write(tmp_path / "rows.jsonl", 50, question="zqxzqx zqxzqx", answer="vvkw<<zz>>", hint="jjjj")
  config.tokenizer.update(kind="bpe", vocab_size=300)
  config.data.remove_pattern = r"<<.*?>>"
  tokenizer = make(config, tmp_path / "run/tokenizer")
  assert len(tokenizer.encode("zqxzqx")) == 1 and len(tokenizer.encode("vvkw")) == 1
  assert len(tokenizer.encode("<<")) == 2 and len(tokenizer.encode("jjjj")) == 4
  config.data.more = ("hint",)
  assert len(make(config, tmp_path / "more/tokenizer").encode("jjjj")) == 1
  loaded = data.load_tokenizer(tmp_path / "run/tokenizer")
  assert loaded.encode("zqxzqx vvkw") == tokenizer.encode("zqxzqx vvkw")


def test_bpe_learns_from_conversations_and_passes_over_rows_that_are_skipped(config, tmp_path):
  rows = [json.dumps(dict(messages=[dict(role="user", content="zqxzqx")], answer="1")),
          "{broken", json.dumps(dict(messages="none", answer=None))] * 20
  (tmp_path / "rows.jsonl").write_text("\n".join(rows))
  config.data.update(messages="messages", question="", on_bad_row="skip")
  config.tokenizer.update(kind="bpe", vocab_size=300)
  assert len(make(config, tmp_path / "run/tokenizer").encode("zqxzqx")) == 1
  config.data.on_bad_row = "fail"
  with pytest.raises(data.BadRow, match="rows.jsonl:2"):
    make(config, tmp_path / "other/tokenizer")


def test_a_pretrained_tokenizer_is_copied_into_the_run(config, tmp_path):
  data.CharacterTokenizer("xyz").save(tmp_path / "theirs")
  config.tokenizer.update(kind="pretrained", path="theirs")
  assert make(config, tmp_path / "run/tokenizer").alphabet == "xyz"
  assert data.load_tokenizer(tmp_path / "run/tokenizer").alphabet == "xyz"


@pytest.mark.parametrize("settings, message", [
    (dict(kind="char"), r"config.tokenizer.kind='char'; did you mean 'character'\?"),
    (dict(alphabet="aa"), "config.tokenizer: alphabet 'aa'"),
    (dict(kind="bpe", vocab_size=9), "config.tokenizer: vocab_size=9"),
    (dict(kind="pretrained"), "config.tokenizer: kind='pretrained' needs a path"),
])
def test_a_tokenizer_that_cannot_be_made(config, tmp_path, settings, message):
  config.tokenizer.update(settings)
  with pytest.raises(ValueError, match=message):
    make(config, tmp_path / "run/tokenizer")
  assert not (tmp_path / "run/tokenizer").exists()


# ----------------------------------------------------------------------------------------- tasks


def builder(config):
  return inputs.builder(config, data.CharacterTokenizer())


def test_every_field_of_the_data_section_reaches_the_builder(config):
  config.data.update(question="q", answer="a", solution="s", id="i", more=("hint",),
                     prompt_template="Q: {question} {hint}\n", solution_template="S: {solution}!",
                     answer_pattern=r"#(\d+)", remove_pattern=r"<.*?>")
  row = dict(q="one?", a="x #1", s="a<b>c", i=7, hint="h")
  task = builder(config).to_task(row, "here")
  tokenizer = data.CharacterTokenizer()
  assert tokenizer.decode(task.prompt) == "Q: one? h\n"
  assert (task.id, task.question, task.answer, task.solution) == ("7", "one?", "1", "S: ac!")
  config.data.update(max_prompt_tokens=6, on_bad_row="truncate")
  assert len(builder(config).to_task(row, "here").prompt) == 6
  config.data.update(max_prompt_tokens=0, max_completion_tokens=3, on_bad_row="skip")
  assert builder(config).to_task(row, "here", solved=True) is None


def test_settings_that_no_row_can_satisfy_are_named(config):
  config.data.prompt_template = "{questoin}"
  with pytest.raises(ValueError, match="config.data: prompt_template"):
    builder(config)


def test_the_first_usable_tasks_are_read(config, tmp_path):
  write(tmp_path / "rows.jsonl", 10)
  lines = (tmp_path / "rows.jsonl").read_text().splitlines()
  lines[1] = "{}"
  (tmp_path / "rows.jsonl").write_text("\n".join(lines))
  source = inputs.open_split(config, "train")
  with pytest.raises(data.BadRow, match="rows.jsonl:2"):
    inputs.read_tasks(builder(config), source, 3)
  config.data.on_bad_row = "skip"
  found = inputs.read_tasks(builder(config), source, 3)
  assert [t.id for t in found] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
  assert len(inputs.read_tasks(builder(config), source, 99)) == 9
  assert inputs.read_tasks(builder(config), source, 0) == []
  assert inputs.read_tasks(builder(config), None, 3) == []


@pytest.mark.parametrize("solved", [False, True])
def test_training_rows_are_tried_first_and_leave_no_counts(config, tmp_path, solved):
  made = builder(config)
  inputs.first_tasks(made, inputs.open_split(config, "train"), solved=solved)
  assert made.counts.as_dict() == {}
  config.data.update(max_completion_tokens=4)  # too short for any solution
  made = builder(config)
  source = inputs.open_split(config, "train")
  if solved:
    with pytest.raises(data.BadRow, match="rows.jsonl:1: the solution"):
      inputs.first_tasks(made, source, solved=True)
    config.data.on_bad_row = "skip"
    with pytest.raises(ValueError, match="not one of 10 rows is usable. The first, rows.jsonl:1"):
      inputs.first_tasks(builder(config), source, solved=True)
  else:
    inputs.first_tasks(made, source, solved=False)


def test_one_good_row_after_many_bad_ones_is_enough(config, tmp_path):
  (tmp_path / "rows.jsonl").write_text("{}\n" * 100 + '{"question": "q", "answer": "a"}\n')
  config.data.on_bad_row = "skip"
  inputs.first_tasks(builder(config), inputs.open_split(config, "train"), solved=False)
