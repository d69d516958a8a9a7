"""The list of methods, what each changes, and a reproduction from the command to the table."""

import json
import pathlib
import shutil

import pytest

from jaxrl import cli
from jaxrl import config as configs
from jaxrl.evidence import listing, methods, reproduce, runs, table, verdict
from jaxrl.training import phases as phase_lib

RESULTS = pathlib.Path(__file__).parents[2] / "results"

TINY = {"model.layers": 1, "model.d_model": 16, "model.d_ff": 16, "model.heads": 2,
        "model.kv_heads": 2, "evaluate.problems": 8, "evaluate.samples": 8,
        "sft.steps": 25, "sft.until.at_least": 0.0, "sft.until.every": 1, "sft.batch.examples": 8,
        "compilation_cache": "off"}


@pytest.mark.parametrize("slug", methods.slugs())
def test_every_method_says_what_it_changes_and_is_tested(slug):
  module = methods.module_of(slug)
  name = methods.path_of(slug).stem
  assert "arXiv:" in module.__doc__ and "Reported" in module.__doc__
  assert f"tests/methods/test_{name}.py" in module.__doc__
  assert methods.differences(slug), "a method differs from its parent"
  assert slug in listing.all_of_them(methods.FOLDER)
  assert methods.parent_of(slug) in listing.one(slug, methods.FOLDER)
  evidence = methods.evidence_of(slug)
  assert evidence is None or evidence.reported


@pytest.mark.parametrize("slug", [s for s in methods.slugs() if methods.evidence_of(s)])
def test_the_arms_of_every_method_have_configs_that_can_be_made(slug):
  evidence = methods.evidence_of(slug)
  start = None if evidence.warm is None else pathlib.Path("warm")
  teachers = {name: pathlib.Path("other", name) for name in evidence.teachers}
  made = {arm: runs.arm_config(evidence, arm, 3, start, teachers) for arm in evidence.arms}
  plain = {arm: configs.to_dict(config) for arm, config in made.items()}
  assert plain["method"]["start"] == str(start or "")
  assert all(config["seed"] == 3 and config["start"] in (str(start or ""), "") for config in plain.values())
  assert all(config["phases"] for config in plain.values())
  for config in made.values():
    for name in config.phases:
      own = configs.phase_config(config, name)
      assert own.optimizer.warmup_steps < own.get("steps", 1 << 30), f"{name} ends while it warms up"
  for arm in set(plain) - {"method"}:
    assert configs.differences(plain[arm], plain["method"]), f"{arm} is the method itself"
  for name, place in teachers.items():
    assert runs.warm_config({**evidence.warm, **evidence.teachers[name]}).phases == ("sft",)
    assert all(str(place) in json.dumps(config) for config in plain.values()), f"no arm reads {name}"
  if start is not None:
    warm = runs.warm_config(evidence.warm)
    assert warm.phases == ("sft",)
    for config in plain.values():  # a warm start has no heads, and gives what it has
      same = configs.to_dict(warm.model) | {"heads_on_top": config["model"]["heads_on_top"]}
      assert config["model"] == same and config["tokenizer"] == configs.to_dict(warm.tokenizer)


@pytest.mark.parametrize("slug", ["../grpo", "grpo_ma", "__init__"])
def test_a_file_that_is_no_method_by_that_name_is_none(slug):
  with pytest.raises(ValueError, match="there is no method"):
    methods.path_of(slug)


def test_an_unknown_method_is_refused_with_the_nearest(capsys):
  with pytest.raises(SystemExit):
    cli.main(["methods", "igrpos"])
  assert "did you mean 'igrpo'?" in capsys.readouterr().err
  with pytest.raises(ValueError, match="different seeds"):
    reproduce.reproduce("igrpo", [0, 0], workdir=None, results=None)


def test_all_names_are_looked_at_before_the_first_method_runs(monkeypatch, capsys):
  ran = []
  claims = [dict(text="it is better", verdict="no difference", difference=d, difference_interval=i)
            for d, i in ((0.25, 0.0), (0.5, None))]
  monkeypatch.setattr(reproduce, "reproduce", lambda slug, *_, **__: ran.append(slug) or dict(
      claims=claims))
  with pytest.raises(SystemExit):
    cli.main(["reproduce", "--method=igrpo,igrpos"])
  assert not ran and "did you mean 'igrpo'?" in capsys.readouterr().err
  cli.main(["reproduce", "--method=igrpo"])
  found = capsys.readouterr().out
  assert ran == ["igrpo"] and "(difference 0.25 ± 0)" in found and "(difference 0.5)" in found


def test_all_arguments_are_looked_at_before_the_first_method_runs(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(reproduce, "reproduce", lambda *_, **__: pytest.fail("a method ran"))
  results = tmp_path / "results"
  results.mkdir()
  (results / "rs-grpo.json").write_text(json.dumps({"seeds": [0, 1, 2, 3]}))
  (results / "siri.json").write_text('{"slug": "si')
  (tmp_path / "file").write_text("")
  for method, folder, message in (
      ("igrpo,rs-grpo", "results", "rs-grpo.json holds 4 seeds"),
      ("igrpo,siri", "results", "siri.json is no JSON"),
      ("igrpo", "file", "file is a file; name a directory")):
    with pytest.raises(SystemExit):
      cli.main(["reproduce", f"--method={method}", f"--results={tmp_path / folder}"])
    assert message in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(["methods", "siri", f"--results={results}"])
  assert "siri.json is no JSON" in capsys.readouterr().err


def test_a_reproduction_runs_both_arms_judges_and_draws(tmp_path, monkeypatch):
  real = methods.evidence_of("verl-rank")

  def tiny(slug):
    return methods.Evidence(
        real.reported, {"rl.steps": 2, "rl.optimizer.warmup_steps": 0, "rl.evaluate.every": 1,
                        "rl.rollout.prompts": 2}, TINY, real.arms, real.claims)
  monkeypatch.setattr(methods, "evidence_of", tiny)
  traced, rehearsal = [], phase_lib.rehearsal
  monkeypatch.setattr(phase_lib, "REMEMBERED", 1)  # as if there were more arms than are remembered
  monkeypatch.setattr(phase_lib, "rehearsal", lambda phase, *rest: traced.append(phase.name) or rehearsal(
      phase, *rest))
  results = tmp_path / "results"
  made = reproduce.reproduce("verl-rank", [0, 1], workdir=tmp_path / "runs", results=results)
  assert traced == ["sft", "rl", "rl"], "the seeds of an arm share its programs"
  written = json.loads((results / "verl-rank.json").read_text())
  assert written["claims"] == made["claims"] and len(made["claims"]) == 2
  assert all(len(c[arm]["runs"]) == 2 for c in made["claims"] for arm in ("baseline", "method"))
  assert written["budget"]["method"]["sequences"] == 2 * 2 * 8
  assert written["config"]["method"]["advantage"][-1]["name"] == "favour_hidden_rank"
  assert (results / "verl-rank.png").stat().st_size > 10_000
  table = (tmp_path / "RESULTS.md").read_text()
  assert "[verl-rank](results/verl-rank.png)" in table and "*confirmed* if" in table
  again = reproduce.reproduce("verl-rank", [0, 1], workdir=tmp_path / "runs", results=results)
  assert again["claims"] == made["claims"], "ended runs are read, not made again"
  for seeds, steps, message in (([0, -1], 0, "--seeds=0,-1: give different seeds"),
                                ([0, 1], -5, "--steps=-5: give a number of updates above 0")):
    with pytest.raises(ValueError, match=message):
      reproduce.reproduce("verl-rank", seeds, workdir=tmp_path / "runs", results=results, steps=steps)
  with pytest.raises(ValueError, match="verl-rank.json holds 2 seeds, and --seeds=0 would replace them by fewer"):
    reproduce.reproduce("verl-rank", [0], workdir=tmp_path / "runs", results=results)


def test_a_teacher_is_a_run_of_its_own_that_arms_find_by_name(tmp_path, monkeypatch):
  own = {"reference.source": "{teacher}", "rl.steps": 1, "rl.optimizer.warmup_steps": 0,
         "rl.rollout.prompts": 2, "rl.evaluate.every": 1}
  evidence = methods.Evidence(
      "", own, TINY, {"method": ("configs/methods/cmdp_distillation.py", {})},
      verdict.claims_of([dict(text="nearer", metric="late/divergence", expect="lower", baseline="method")],
                        ["method"], "here"),
      teachers={"teacher": {"model.layers": 2, "model.d_model": 24}})
  monkeypatch.setattr(methods, "evidence_of", lambda slug: evidence)
  said = []
  made = reproduce.reproduce("cmdp-distillation", [0], workdir=tmp_path, results=tmp_path / "results",
                             report=said.append)
  places = sorted(line.removeprefix("warm start: ") for line in said if line.startswith("warm start: "))
  assert len(set(places)) == 2
  shapes = {place: json.loads(pathlib.Path(place, "config.json").read_text())["model"] for place in places}
  assert sorted((m["layers"], m["d_model"]) for m in shapes.values()) == [(1, 16), (2, 24)]
  assert made["claims"][0]["method"]["mean"] > 0, "a student that were its own teacher has a divergence of 0"
  assert made["config"]["method"]["reference"]["source"] == "teacher"


def test_the_table_is_that_of_the_results_and_only_italics_are_judged_with_the_first(tmp_path):
  results = shutil.copytree(RESULTS, tmp_path / "results", ignore=lambda _, names: [
      name for name in names if not name.endswith(".json")])
  written = table.write(results).read_text()
  assert written == (RESULTS.parent / "RESULTS.md").read_text()
  for row in written.splitlines():
    assert "| and " not in row, "a claim of its own reads as if it were judged with the first"
  claims = [c for path in results.glob("*.json") for c in json.loads(path.read_text())["claims"]]
  joint = [c for c in claims if c["joint"]]
  assert written.count("| *and* ") == len(joint) > 5 and "in one breath, marked *and*" in written


def test_results_of_one_s_own_replace_no_other_table(tmp_path):
  own = tmp_path / "mine"
  own.mkdir()
  (own / "igrpo.json").write_text((RESULTS / "igrpo.json").read_text())
  (tmp_path / "RESULTS.md").write_text("that of all methods")
  written = table.write(own)
  assert written == own / "RESULTS.md" and "[igrpo](igrpo.png)" in written.read_text()
  assert (tmp_path / "RESULTS.md").read_text() == "that of all methods"


@pytest.mark.parametrize("slug", [path.stem for path in sorted(RESULTS.glob("*.json"))])
def test_a_result_follows_by_the_rule_from_its_runs_and_is_about_the_claims_of_its_config(slug):
  found, evidence = methods.result_of(slug, RESULTS), methods.evidence_of(slug)
  assert len(set(found["seeds"])) >= 3 and (RESULTS / f"{slug}.png").exists()
  judged = [verdict.judge(claim, entry["method"]["runs"], entry["baseline"]["runs"])
            for claim, entry in zip(evidence.claims, found["claims"], strict=True)]
  for own, written in zip(judged, found["claims"]):
    assert len(written["method"]["runs"]) == len(written["baseline"]["runs"]) == len(found["seeds"])
    for name in ("text", "metric", "expect", "margin", "joint", "baseline_name", "verdict"):
      assert own[name] == written[name], name
    for arm in ("method", "baseline"):
      assert [own[arm][k] for k in ("mean", "interval")] == pytest.approx(
          [written[arm][k] for k in ("mean", "interval")])
  assert found["verdict"] == verdict.of_method(judged)
  assert found["reported"] == evidence.reported and found["title"] == methods.title(slug)
