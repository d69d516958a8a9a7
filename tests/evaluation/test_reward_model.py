"""`jaxrl evaluate`: from a run and a file to figures, with mistakes named and nothing scored twice."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxrl import cli
from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.batch import Task
from jaxrl.evaluation import reward_model
from jaxrl.evaluation.reward_model import evaluate
from jaxrl.evaluation.reward_model_questions import Reading
from jaxrl.training import inputs
from jaxrl.training import reward_models
from jaxrl.training import state as states
from jaxrl.training.checkpoints import Checkpoints

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """What a run leaves behind, with the parameters that it would begin with."""
  place = tmp_path_factory.mktemp("reward")
  config = configs.load("configs/base.py")
  path = write(place / "rows.jsonl", sums(40))
  config.data.update(train=path, test=path, question="prompt", answer="", solution="",
                     max_prompt_tokens=8, max_completion_tokens=8)
  config.model.update(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=16,
                      heads_on_top=(("score", 1),))
  config.compilation_cache, config.phases = "off", ("comparisons",)
  config.comparisons = dict(kind="reward", steps=30, objective=[dict(name="bradley_terry")])
  tokenizer = data.CharacterTokenizer("0123456789+=")
  tokenizer.save(place / "tokenizer")
  (place / "config.json").write_text(json.dumps(configs.to_dict(config)))
  decoder = inputs.decoder_config(config.model, tokenizer)
  params = states.initial_parameters(decoder, jax.random.key_data(jax.random.key(0)), sharding.make_mesh())
  checkpoints = Checkpoints(place / "checkpoints")
  checkpoints.save(30, {"params": params}, {})
  checkpoints.close()
  return place


def changed(trained, place, **data_fields):
  """The same run with other data in its config."""
  shutil.copytree(trained, place)
  plain = json.loads((place / "config.json").read_text())
  plain["data"] |= data_fields
  (place / "config.json").write_text(json.dumps(plain))
  return place


def write(path, rows):
  text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(
      json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  return str(path)


def sums(count, seed=0):
  """Sums whose better answer has digits below 5, and the other one digits from 4 up and more of them."""
  rng = np.random.default_rng(seed)

  def digits(low, high, length):
    return "".join(map(str, rng.integers(low, high, length)))
  return [{"prompt": f"{digits(0, 10, 1)}+{digits(0, 10, 1)}=", "chosen": digits(0, 5, 2),
           "rejected": digits(4, 10, 2 + i % 2), "subset": ("even", "odd")[i % 2]} for i in range(count)]


def margins_of(run, rows):
  model = reward_models.RewardModel.load(run)
  tasks = [(Task("x", [1], row=row), row[field], True) for row in rows for field in ("chosen", "rejected")]
  scores = np.concatenate(model.scores(tasks))
  return scores[::2] - scores[1::2]


def test_the_own_split_of_a_run_is_read_as_its_config_says(trained, tmp_path):
  found = evaluate(trained, tmp_path, quiet=True)
  margins = margins_of(trained, sums(40))
  assert found["pairs"] == 40 and found["accuracy"] == pytest.approx(np.mean(margins > 0))
  written = json.loads((tmp_path / "report.json").read_text())
  assert set(written) == set(found) and written["calibration"]["ece"] == pytest.approx(
      found["calibration"]["ece"])
  assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
  assert not (tmp_path / "styles.png").exists()
  assert found["swap"]["consistency"] == 1 and found["swap"]["first_preferred"] == 0.5
  assert found["swap"]["largest_difference"] < 1e-5


def test_reward_bench_rows_by_subset(trained, tmp_path, capsys):
  rows = sums(20, seed=1)
  found = evaluate(trained, tmp_path, path=write(tmp_path / "bench.jsonl", rows), quiet=True)
  margins = margins_of(trained, rows)
  for name, part in (("even", margins[::2]), ("odd", margins[1::2])):
    assert found["subsets"][name]["accuracy"] == pytest.approx(np.mean(part > 0))
    assert found["subsets"][name]["pairs"] == 10
  assert found["calibration"]["nll"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-4)
  shown = capsys.readouterr().out
  assert "even" in shown and "odd" in shown and f"{np.mean(margins > 0):.1%}" in shown


def test_rm_bench_rows_have_a_matrix(trained, tmp_path):
  rows = [{**row, "chosen": [row["chosen"] + "0" * i for i in range(3)],
           "rejected": [row["rejected"] + "1" * i for i in range(3)]} for row in sums(6)]
  found = evaluate(trained, tmp_path, path=write(tmp_path / "bench.json", rows), quiet=True)
  assert found["pairs"] == 54 and np.shape(found["styles"]["matrix"]) == (3, 3)
  assert np.mean(found["styles"]["matrix"]) == pytest.approx(found["accuracy"])
  assert set(found["styles"]["subsets"]) == {"even", "odd"}
  assert (tmp_path / "styles.png").exists()


def test_prompts_and_answers_can_be_put_into_words(trained, tmp_path):
  rows = [{"prompt": row["prompt"][:-1], "chosen": row["chosen"], "rejected": row["rejected"]}
          for row in sums(8)]
  plain = evaluate(trained, tmp_path / "a", path=write(tmp_path / "a.jsonl", sums(8)), quiet=True)
  found = evaluate(trained, tmp_path / "b", path=write(tmp_path / "b.jsonl", rows), quiet=True,
                   reading=Reading(prompt="{prompt}="))
  assert found["calibration"] == plain["calibration"]
  other = evaluate(trained, tmp_path / "c", path=write(tmp_path / "c.jsonl", rows), quiet=True,
                   reading=Reading(prompt="{prompt}=", answer="1{answer}"))
  assert other["calibration"]["nll"] != plain["calibration"]["nll"]


def test_lists_are_not_paired_and_give_best_of_n(trained, tmp_path):
  rows = [{"question": row["prompt"], "a": dict(solution=row["chosen"], is_correct=True),
           "b": dict(solution=row["rejected"], is_correct=i == 3),
           "c": dict(solution="7", is_correct=False)} for i, row in enumerate(sums(10))]
  rows += [{"question": "1+1=", "a": dict(solution="5", is_correct=False),
            "b": dict(solution="6", is_correct=False)}]
  place = changed(trained, tmp_path / "run", question="question",
                  transforms=[dict(name="labelled_solutions"), dict(name="pair_answers")])
  found = evaluate(place, tmp_path / "out", path=write(tmp_path / "solutions.jsonl", rows), quiet=True)
  assert found["questions"] == 11 and found["answers"] == 32 and found["pairs"] == 20
  table = {row["n"]: row for row in found["best_of_n"]}
  assert table[1]["questions"] == table[2]["questions"] == 11 and table[3]["questions"] == 10
  np.testing.assert_allclose(table[1]["model"], np.mean([1 / 3] * 9 + [2 / 3, 0]))
  assert table[3]["oracle"] == 1 and table[1]["model"] <= table[2]["oracle"] < 1


def test_an_interrupted_evaluation_scores_the_rest_only(trained, tmp_path, monkeypatch):
  path = write(tmp_path / "bench.jsonl", sums(12))
  whole = evaluate(trained, tmp_path / "whole", path=path, quiet=True)
  monkeypatch.setattr(reward_model, "ANSWERS", 8)
  scores, asked = reward_models.RewardModel.scores, []

  def interrupted(self, some):
    asked.append(len(some))
    if len(asked) == 3:
      raise KeyboardInterrupt
    return scores(self, some)
  monkeypatch.setattr(reward_models.RewardModel, "scores", interrupted)
  with pytest.raises(KeyboardInterrupt):
    evaluate(trained, tmp_path / "out", path=path, quiet=True)
  lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
  assert len(lines) == 9  # a head, and two parts of four questions
  (tmp_path / "out" / "scores.jsonl").write_text("\n".join(lines) + '\n{"question": 3, "sco')
  monkeypatch.setattr(reward_models.RewardModel, "scores",
                      lambda self, some: asked.append(len(some)) or scores(self, some))
  again = evaluate(trained, tmp_path / "out", path=path, quiet=True)
  assert asked == [8, 8, 8, 8, 24]  # what was left, and the swapped pairs
  assert again["accuracy"] == whole["accuracy"]
  assert again["calibration"]["nll"] == pytest.approx(whole["calibration"]["nll"], rel=1e-5)
  with pytest.raises(ValueError, match="another evaluation.*pass another --out"):
    evaluate(trained, tmp_path / "out", path=write(tmp_path / "b.jsonl", sums(12, seed=1)), quiet=True)


def test_what_the_model_cannot_read_is_left_out_and_said(trained, tmp_path):
  rows = sums(3) + [{"prompt": "1+1=", "chosen": "\u4e09", "rejected": "2"}]
  found = evaluate(trained, tmp_path, path=write(tmp_path / "bench.jsonl", rows), quiet=True)
  assert found["questions"] == 3 and found["left_out"] == 1
  assert "bench.jsonl:4" in found["left_out_first"][0] and "alphabet" in found["left_out_first"][0]
  with pytest.raises(ValueError, match="can read none of 1 questions; .*only.jsonl:1"):
    evaluate(trained, tmp_path / "only", path=write(tmp_path / "only.jsonl", rows[3:]), quiet=True)


OK = sums(1)[0]


@pytest.mark.parametrize("row, message", [
    (OK | {"chosen": ""}, "bench.jsonl:2: field 'chosen' has to hold text, or a list of texts"),
    ({"prompt": "1+1=", "chosen": "2"}, "bench.jsonl:2: field 'rejected'"),
    (OK | {"prompt": 3}, "bench.jsonl:2: field 'prompt' has to hold text, not a int"),
    (OK | {"chosen": ["2", "3"]}, "bench.jsonl:2: fields 'chosen' and 'rejected' hold 2 and 1 texts")])
def test_bad_rows_name_file_line_and_field(trained, tmp_path, row, message):
  with pytest.raises(data.BadRow) as error:
    evaluate(trained, tmp_path, path=write(tmp_path / "bench.jsonl", [OK, row]), quiet=True)
  assert message in str(error.value)


def test_the_command_line(trained, tmp_path, capsys):
  path = write(tmp_path / "bench.jsonl", sums(4))
  cli.main(["evaluate", f"--model={trained}", f"--data={path}", f"--out={tmp_path / 'out'}", "--quiet"])
  assert "accuracy" in capsys.readouterr().out and (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("options, message", [
    (["--model=nowhere"], "run='nowhere' has no config.json"), (["--head=4"], "head=4"),
    (["--data=nothing.jsonl"], "no file 'nothing.jsonl'"), (["--shape=bench"], "shape='bench'"),
    (["--prompt=hello"], "has to hold {prompt} once"), (["--limit=-1"], "limit=-1"),
    (["--split=tset"], "split='tset'; did you mean 'test'?"),
    (["--config.seed=1"], "--config.seed is for jaxrl run")])
def test_mistakes_are_one_message(trained, tmp_path, capsys, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as end:
    cli.main(["evaluate", f"--model={trained}", *options])
  assert end.value.code and message in capsys.readouterr().err


@pytest.mark.parametrize("term, best", [(dict(name="plackett_luce", rank="place"), 1), (dict(
    name="ordinal", levels=3, label="place"), 3)])
def test_lists_are_graded_by_the_column_that_the_loss_reads(trained, tmp_path, term, best):
  rows = [{"prompt": row["prompt"], "tries": [
      dict(text=row["chosen"], place=best), dict(text=row["rejected"], place=4 - best), dict(text="7", place=2)]}
          for row in sums(6)]
  place = changed(trained, tmp_path / "run", answers="tries", chosen="text", rejected="", columns=["place"])
  plain = json.loads((place / "config.json").read_text())
  plain["comparisons"]["objective"] = [term]
  (place / "config.json").write_text(json.dumps(plain))
  found = evaluate(place, tmp_path / "out", path=write(tmp_path / "lists.jsonl", rows), quiet=True)
  assert found["questions"] == 6 and found["pairs"] == 18
  model = reward_models.RewardModel.load(place)
  scores = [np.concatenate(model.scores([(Task("x", [1], row=row), x["text"], True) for x in row["tries"]]))
            for row in rows]
  right = [a > b for s in scores for a, b in ((s[0], s[1]), (s[0], s[2]), (s[2], s[1]))]
  assert found["accuracy"] == pytest.approx(np.mean(right))


def test_a_task_may_be_what_is_evaluated_on(trained, tmp_path):
  place = changed(trained, tmp_path / "run", question="question", prompt_template="{question}", task={"digits": 1},
                  task_size=12)
  found = evaluate(place, tmp_path / "out", path="task:preferred_addition", quiet=True)
  assert found["pairs"] == found["questions"] > 0 and found["data"] == "task:preferred_addition"
