"""The command line: every mistake is one message with its remedy, before anything is computed."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxrl import cli
from jaxrl.training import run

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/quickstart.py")
TINY = dict(model="layers=1 d_model=16 heads=2 kv_heads=2 d_ff=16", evaluate="problems=4")


def tiny():
  return [f"--config.{section}.{field}" for section, fields in TINY.items()
          for field in fields.split()]


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
  """Runs the command line, which must end with exit code 1 before it computes; its message."""
  def no_compute(*_):
    raise AssertionError("the mistake was not found before the run began")

  monkeypatch.setattr(run, "_run", no_compute)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))

  def fails(*arguments, config=QUICKSTART, workdir="out"):
    with pytest.raises(SystemExit) as end:
      cli.main(["run", f"--config={config}", f"--workdir={workdir}", "--quiet", *tiny(),
                *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("jaxrl: ") and "Traceback" not in error, error
    return " ".join(error.removeprefix("jaxrl: ").split())
  return fails


EARLY = [  # found without tracing a model
    (["--config.optimiser.name=sgd"], "--config.optimiser.name: config has no field 'optimiser'; "
     "did you mean 'optimizer'?"),
    (["--config.seed=x"], "--config.seed=x: config.seed is 0, so it takes a whole number"),
    (["--config.seed=-1"], "seed=-1"),
    (["--config.phases=()"], "config.phases is empty; name at least one"),
    (["--config.phases=('rl','rl')"], "config.phases names 'rl' 2 times"),
    (["--config.phases=('sft','rll')"], "no section config.rll; did you mean 'rl'?"),
    (["--config.mesh.data=3"], "config.mesh (data=3, fsdp=1, tensor=1) does not divide 8 devices"),
    (["--config.batch.micro_batch_rows=12"], "config.batch.micro_batch_rows=12 does not divide "
     "over data x fsdp = 8 devices: use 8 or 16"),
    (["--config.model.heads=3"], "config.model: kv_heads=2 does not divide heads=3"),
    (["--config.data.train="], "config.data.train is empty; name a file"),
    (["--config.data.train=nothing.jsonl"], "config.data.train='nothing.jsonl': no file "
     "'nothing.jsonl': relative paths start at"),
    (["--config.data.test=task:additon"], "config.data.test='task:additon': there is no toy task "
     "'additon'; did you mean 'addition'?"),
    (["--config.data.task.digit=3"], "task addition has no knob 'digit'; did you mean 'digits'?"),
    (["--config.data.on_bad_row=skp"], "config.data: on_bad_row='skp'; did you mean 'skip'?"),
    (["--config.data.prompt_template={qestion}"], "config.data: prompt_template"),
    (["--config.data.more=['hint']", "--config.data.prompt_template={question}{hint}"],
     "field 'hint', which data.more names, is missing"),
    (["--config.data.max_prompt_tokens=3"], "addition/"),
    (["--config.tokenizer.alphabet=012"], "addition/validation:0"),
    (["--config.tokenizer.alphabet=00"], "config.tokenizer: alphabet '00'"),
    (["--config.tokenizer.kind=charcter"], "config.tokenizer.kind='charcter'; did you mean "
     "'character'?"),
    (["--config.tokenizer.kind=pretrained"], "config.tokenizer: kind='pretrained' needs a path"),
    (["--config.tokenizer.kind=pretrained", "--config.tokenizer.path=nowhere"],
     "config.tokenizer: no tokenizer at nowhere"),
    (["--config.tokenizer.kind=bpe", "--config.tokenizer.vocab_size=100",
      "--config.data.task_size=50"], "config.tokenizer: vocab_size=100: a byte-level"),
    (["--config.rl.kind=grpo"], "config.rl.kind='grpo'; valid are evaluate, preference, reward, rl, sft"),
    (["--config.rl.steps=0"], "config.rl.steps=0; a phase of kind rl needs at least 1"),
    (["--config.optimizer.name=adam"], "config.optimizer.name='adam'; did you mean 'adamw'?"),
    (["--config.optimizer.schedule=cosin"], "schedule='cosin'; did you mean 'cosine'?"),
    (["--config.rl.steps=10", "--config.optimizer.warmup_steps=10"],
     "config.optimizer.warmup_steps=10 must be 0 or more and less than the phase's steps=10"),
    (["--config.rl.objective[0].name=clipped_surogate"], "has no 'clipped_surogate'; did you mean "
     "'clipped_surrogate'?"),
    (["--config.rl.objective[0].hihg=0.3"], "config.objective[0]: clipped_surrogate has no "
     "argument 'hihg'; did you mean 'high'?"),
    (["--config.advantage=[{'name': 'center_by_grop'}]"], "config.advantage[0]: "),
    (["--config.rollout.episode.name=grup"], "config.rollout.episode: jaxrl.rollouts has no "
     "'grup'; did you mean 'group'?"),
    (["--config.rollout.episode={'name': 'group'}"], "config.rollout.episode: group needs samples"),
    (["--config.rollout.episode.name=json:dumps"], "config.rollout.episode: json:dumps has no "
     "argument 'samples'"),
    (["--config.rollout.episode={'name': 'json:dumps'}"], "config.rollout.episode: 'json:dumps' is "
     "no episode; an episode is an `async def my_episode(ctx, task, *, ...)`"),
    (["--config.rollout.temperature=0"], "config.rollout.temperature=0.0: greedy samples have no"),
    (["--config.rollout.top_p=0"], "config.rollout.top_p=0.0: use a share in (0, 1]"),
    (["--config.rollout.max_tokens=0"], "config.rollout.max_tokens=0: a sample needs at least 1"),
    (["--config.rollout.prompts=0"], "config.rollout.prompts=0 in phase sft; it must be at least"),
    (["--config.rollout.max_resample=-1"], "config.rollout.max_resample=-1"),
    (["--config.checkpoint.keep=0"], "config.checkpoint.keep=0"),
    (["--config.evaluate.k=9"], "config.evaluate.k=9 must be between 1 and "
     "config.evaluate.samples=8"),
    (["--config.data.validation="], "config.sft.until evaluates on the way, so it needs problems "
     "that are not trained on: set config.data.validation"),
    (["--config.sft.until.metric=greedy_acuracy"], "config.sft.until.metric='greedy_acuracy' is "
     "not measured on the way; did you mean 'greedy_accuracy'?"),
    (["--config.sft.until.every=0"], "config.sft.until.every=0 must be a number of updates"),
]


@pytest.mark.parametrize("arguments, message", EARLY, ids=lambda x: x[0] if type(x) is list else "")
def test_a_mistake_in_a_setting_names_value_place_and_remedy(fails, arguments, message):
  assert message in fails(*arguments)


LATE = [
    (["--config.aggregation.kind=token_men"], "'token_men'; did you mean 'token_mean'?"),
    (["--config.aggregation.kind=constant"], "aggregation 'constant' divides by constant=0.0"),
    (["--config.objective=[]"], "objective lists no term"),
    (["--config.evaluate.correct=exact"], "config.evaluate.correct='exact' is none of the criteria "
     "in config.reward; did you mean 'exact_match'?"),
    (["--config.reward.criteria[0].name=no_such_module:reward"], "config.reward.criteria[0]: "
     "cannot import 'no_such_module'"),
    (["--config.reward.criteria[0].name=exact_mach"], "config.reward.criteria[0]: jaxrl.rewards "
     "has no 'exact_mach'; did you mean 'exact_match'?"),
    (["--config.reward.timeout=0"], "config.reward: "),
]


@pytest.mark.parametrize("arguments, message", LATE, ids=lambda x: x[0] if type(x) is list else "")
def test_pieces_that_do_not_fit_together_are_found_by_tracing(fails, arguments, message):
  assert message in fails("--config.phases=('rl',)", *arguments)


def test_a_bad_row_of_the_training_data_is_named_with_its_line(fails, tmp_path):
  rows = [dict(question=f"{i}+{i}=", answer=str(i + i), solution=str(i + i)) for i in range(9)]
  rows[6]["answer"] = None
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  message = fails("--config.data.train=rows.jsonl")
  assert message.startswith("rows.jsonl:7: field 'answer', which data.answer names, is null")
  assert "'skip' drops such rows" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_skipping_every_row_is_refused_with_the_reason(fails, tmp_path, split):
  rows = [dict(problem="1+1=", answer="2", solution="2")] * 100
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  message = fails(f"--config.data.{split}=rows.jsonl", "--config.data.on_bad_row=skip")
  assert message.startswith("not one of 100 rows is usable. The first, rows.jsonl:1: field "
                            "'question', which data.question names, is missing")


def test_a_config_file_that_is_not_there(fails):
  assert "--config=nothing.py: no such Python file in" in fails(config="nothing.py")


def test_a_misspelt_variant(fails):
  assert "has no variants; drop ':smal'" in fails(config=QUICKSTART + ":smal")


def test_a_workdir_that_cannot_be_made(fails, tmp_path):
  (tmp_path / "file").write_text("")
  assert "file" in fails(workdir="file/out")


def test_a_workdir_of_another_config_says_what_differs(fails, tmp_path, capsys):
  (tmp_path / "out").mkdir()
  from jaxrl import config as configs
  config = configs.load(QUICKSTART)
  config.rollout.top_k = 3
  (tmp_path / "out/config.json").write_text(json.dumps(configs.to_dict(config)))
  message = fails()
  assert message.startswith("out holds a run with another config")
  assert "config.rollout.top_k: 3 -> 0" in message and "config.model.layers: 4 -> 1" in message
  assert "pass another --workdir" in message


def test_an_attempt_that_failed_leaves_nothing_that_a_better_one_meets(fails, tmp_path):
  fails("--config.tokenizer.alphabet=0123456789+=ab", "--config.evaluate.k=9")
  fails("--config.tokenizer.kind=bpe", "--config.tokenizer.vocab_size=300", "--config.evaluate.k=9",
        "--config.data.task_size=50")
  fails("--config.evaluate.k=9")
  from jaxrl.data import load_tokenizer
  assert load_tokenizer(tmp_path / "out/tokenizer").alphabet == "0123456789+="
  assert not (tmp_path / "out/config.json").exists()


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch, tmp_path):
  def broken(*_, **__):
    raise ZeroDivisionError
  monkeypatch.setattr(run, "run", broken)
  with pytest.raises(ZeroDivisionError):
    cli.main(["run", f"--config={QUICKSTART}", f"--workdir={tmp_path}"])


def test_an_interrupted_run_says_how_to_continue(monkeypatch, tmp_path, capsys):
  def interrupted(*_, **__):
    raise KeyboardInterrupt
  monkeypatch.setattr(run, "run", interrupted)
  with pytest.raises(SystemExit) as end:
    cli.main(["run", f"--config={QUICKSTART}", f"--workdir={tmp_path}"])
  assert end.value.code == 130
  assert f"the same command continues {tmp_path}" in capsys.readouterr().err


@pytest.fixture
def taken(monkeypatch):
  """What a command line hands to the run."""
  found = []
  monkeypatch.setattr(run, "run", lambda config, workdir, quiet, **_: found.append(
      (config, workdir, quiet)))
  return found


def test_overrides_come_in_both_forms_and_the_last_one_counts(taken):
  cli.main(["run", "--config", QUICKSTART, "--config.seed", "-0", "--config.seed=1", "--workdir",
            "w", "--config.seed", "2", "--config.rl.objective[0].low=0.1", "--quiet",
            "--config.data.train=a=b c"])
  (config, workdir, quiet), = taken
  assert (config.seed, config.rl.objective[0]["low"], config.data.train) == (2, 0.1, "a=b c")
  assert (workdir, quiet) == ("w", True)


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: command"),
    (["rnu"], "invalid choice: 'rnu'"),
    (["run", "--workdir=w"], "the following arguments are required: --config"),
    (["run", "--config=c.py"], "the following arguments are required: --workdir"),
    (["run", "--config=c.py", "--workdir=w", "--config.seed"], "--config.seed needs a value"),
    (["run", "--config=c.py", "--config.seed", "--workdir=w"], "--config.seed needs a value"),
    (["run", "--config=c.py", "--workdir=w", "--seed=1"], "unrecognized arguments: --seed=1"),
    (["run", "--config=c.py", "--workdir=w", "--config.a-b=1"], "--config.a-b=1"),
])
def test_bad_arguments_exit_with_the_usage(capsys, arguments, message):
  with pytest.raises(SystemExit) as end:
    cli.main(arguments)
  assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_loads_no_library():
  program = ("import sys; from jaxrl import cli\ntry: cli.main(['run', '--help'])\n"
             "except SystemExit as end: print(end.code, [m for m in "
             "('jax', 'numpy', 'ml_collections', 'transformers') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                        timeout=120, check=True)
  assert done.stdout.endswith("0 []\n") and "--config.optimizer.learning_rate" in done.stdout


def test_the_module_is_the_same_command(tmp_path):
  command = pathlib.Path(sys.executable).parent / "jaxrl"
  entries = [[sys.executable, "-m", "jaxrl"], *[[str(command)]] * command.exists()]
  outcomes = set()
  for entry in entries:
    done = subprocess.run([*entry, "run", "--config=missing.py", "--workdir=w"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120)
    outcomes.add((done.returncode, done.stdout, done.stderr))
  (code, out, error), = outcomes
  assert (code, out) == (1, "") and error.startswith("jaxrl: --config=missing.py: no such Python")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_the_process_ends_is_silent(number):
  program = f"""
import atexit, os, signal, sys, time
from jaxrl import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test in the background has not
signal.signal(signal.SIGTERM, lambda number, _: sys.exit("not by default"))
cli.main = lambda: None
atexit.register(lambda: (os.kill(os.getpid(), {number:d}), time.sleep(60)))
cli.command()
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
  assert (done.returncode, done.stderr) == (-number, "")


def test_what_was_interrupted_ends_at_once():
  program = """
import atexit, sys, threading, time
from jaxrl import cli
threading.Thread(target=time.sleep, args=[60]).start()  # as one that compiles
atexit.register(lambda: time.sleep(60))
cli.main = lambda: (print("said"), cli._fail("interrupted", code=130))
cli.command()
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
  assert (done.returncode, done.stdout, done.stderr) == (130, "said\n", "jaxrl: interrupted\n")
