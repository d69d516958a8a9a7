"""The one entry point: `jaxrl run` (= `python -m jaxrl run`).

  jaxrl run --config=configs/quickstart.py --workdir=runs/quickstart
  jaxrl run --config=configs/gsm8k.py:smoke --workdir=runs/gsm8k --config.seed=1
  jaxrl run --config=configs/models/qwen3_4b.py:v5e-8 --plan=v5e-8    # does it fit? nothing is run
  jaxrl methods                    # every method with its parts and what its claim came to
  jaxrl methods igrpo              # what its config changes in its parent's
  jaxrl reproduce --method=igrpo --seeds=0,1,2
  jaxrl evaluate --model=runs/reward_hh --data=bench.jsonl    # is the better answer scored higher?
  jaxrl sample --model=runs/mine --prompt="123+456="    # or --input and --output, or a chat
  jaxrl export --workdir=runs/mine --output=mine    # a directory that transformers loads
  jaxrl arena --votes=votes.jsonl --out=arena    # ranks models by votes between their answers
"""

import argparse
import contextlib
import gc
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from typing import NoReturn

OVERRIDE = re.compile(r"--config\.([A-Za-z_][\w.\[\]]*)(?:=(.*))?", re.DOTALL)


def command() -> None:
  """`main`, in a process that does nothing else, and so need not be taken down in order.

  What was interrupted ends at once: the rest of Python's own end would wait for programs that are being
  compiled, and threads of libraries sometimes abort it. An interrupt while Python ends is silent.
  """
  try:
    main()
  except SystemExit as end:
    if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
      sys.stdout.flush()
      os._exit(end.code)
    raise
  finally:
    for number in (signal.SIGINT, signal.SIGTERM):
      if callable(signal.getsignal(number)):
        signal.signal(number, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
  """Parses the command line and runs the command; exits with 1 and one message on a mistake."""
  arguments = sys.argv[1:] if arguments is None else arguments
  parser = _parser()
  overrides, rest = _overrides(arguments, parser)
  options = parser.parse_args(rest)
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # so that a config can name `my_module:my_reward`
  if options.command == "run" and options.plan is None and (not options.workdir or options.devices):
    parser.error("--devices is for --plan" if options.workdir else
                 "the following arguments are required: --workdir, or --plan")
  if overrides and options.command != "run":
    parser.error(f"--config.{next(iter(overrides))} is for jaxrl run")
  if options.command == "methods":
    return _methods(options)
  if options.command == "evaluate":
    return _evaluate(options)
  if options.command == "arena":
    return _arena(options)
  if options.command == "export":
    return _export(options)
  if options.command == "sample":
    return _sample(options)
  config = _config(options, overrides) if options.command == "run" else None
  if options.command == "run" and options.plan is not None:
    return _plan(config, options)
  with _handling_sigterm():
    (_run if options.command == "run" else _reproduce)(config, options)


def _methods(options):
  """Lists the methods, or shows what one changes."""
  from jaxrl.evidence import listing
  try:
    print(listing.one(options.method, pathlib.Path(options.results)) if options.method
          else listing.all_of_them(pathlib.Path(options.results)))
  except ValueError as error:
    _fail(str(error))


def _arena(options):
  """Ranks models by votes, and writes table and picture."""
  from jaxrl.evaluation import arena_report
  try:
    print(arena_report.report(
        options.votes, pathlib.Path(options.out), length=options.length, ridge=options.ridge,
        resamples=options.resamples, seed=options.seed))
  except (ValueError, OSError) as error:
    _fail(str(error))


def _export(options):
  """Writes the model of a run as others read it."""
  try:
    with loading():
      from jaxrl.training import export
    for line in export.export(options.workdir, options.output, dtype=options.dtype,
                              merge_adapters=options.merge_adapters):
      print(line)
  except KeyboardInterrupt:
    _fail("interrupted; nothing was written", code=128 + signal.SIGINT)
  except (ValueError, *_mistakes()) as error:
    _fail(str(error))


def _sample(options):
  """Asks a model."""
  given = vars(options)
  try:
    with loading():
      from jaxrl.inference import sample
    settings = {name: given[name] for name in sample.SETTINGS if given[name] is not None}
    names = ("prompt", "input", "output", "system", "raw", "samples", "seed", "logprobs", "batch", "dtype",
             "tensor", "date", "quiet")
    sample.sample(options.model, talk=options.chat, stop=tuple(options.stop), as_json=options.json,
                  settings=settings, **{name: given[name] for name in names})
  except KeyboardInterrupt:
    _fail("interrupted" + "; the same command continues" * bool(options.output), code=128 + signal.SIGINT)
  except BrokenPipeError:  # whoever read the answers has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except (ValueError, *_mistakes()) as error:
    _fail(str(error))


def _evaluate(options):
  """Measures a reward model on answers whose order is known."""
  try:
    with loading():
      from jaxrl.evaluation import reward_model
      from jaxrl.evaluation.reward_model_questions import Reading
    name = re.sub(r"\..*", "", pathlib.Path(options.data).name) or options.split
    out = pathlib.Path(options.out or pathlib.Path(options.model) / "evaluation" / name)
    reward_model.evaluate(
        options.model, out, path=options.data, split=options.split, levels=options.levels,
        head=int(options.head) if options.head.lstrip("-").isdigit() else options.head,
        ordered=options.ordered, quiet=options.quiet,
        reading=Reading(options.shape, options.subset, options.prompt, options.answer, options.limit))
  except KeyboardInterrupt:
    _fail("interrupted; the same command continues", code=128 + signal.SIGINT)
  except (ValueError, *_mistakes()) as error:
    _fail(str(error))


def _reproduce(_, options):
  """Measures a method, and ends with one message if that is not possible."""
  try:
    with loading():
      from jaxrl.evidence import reproduce
      from jaxrl.evidence import table
    seeds, slugs = _seeds(options.seeds), options.method.split(",")
    for slug in slugs:  # before the first one has run for an hour
      reproduce.check(slug, seeds, results=pathlib.Path(options.results), steps=options.steps)
    for slug in slugs:
      found = reproduce.reproduce(slug, seeds, workdir=pathlib.Path(options.workdir),
                                  results=pathlib.Path(options.results), steps=options.steps)
      for claim in found["claims"]:
        difference = dict(mean=claim["difference"], interval=claim["difference_interval"])
        print(f"{slug}: {claim['text']}: {claim['verdict']} (difference {table.figure(difference)})",
              flush=True)
  except KeyboardInterrupt as stop:
    _fail("interrupted; the same command continues",
          code=128 + (stop.args[0] if stop.args else signal.SIGINT))
  except (ValueError, *_mistakes()) as error:
    _fail(str(error))


def _seeds(text):
  try:
    return [int(seed) for seed in text.split(",")]
  except ValueError:
    _fail(f"--seeds={text}: give whole numbers, as in 0,1,2")


def _plan(config, options):
  """Prints what a run would need of each device; exits with 1 if that does not fit."""
  try:
    with loading():
      from jaxrl import planning
    workdir = pathlib.Path(options.workdir) if options.workdir else None
    plan = planning.plan(config, planning.find(options.plan, options.devices), workdir)
    print(planning.text(plan))
  except KeyboardInterrupt:
    _fail("interrupted; nothing was written", code=128 + signal.SIGINT)
  except (ValueError, *_mistakes()) as error:
    _fail(str(error))
  if plan.fits is False:
    sys.exit(1)


def _run(config, options):
  """Runs, and ends this process with one message and a status if the run does not end well."""
  continues = f"the same command continues {options.workdir}"
  several = False
  try:
    with loading():
      several = _join(options)
      from jaxrl.training import run  # only now, for it takes seconds to load
      from jaxrl.training import stopping
    stop = stopping.Stop()
    signal.signal(signal.SIGTERM, stop.receive)  # from here on there may be something to save
    try:
      run.run(config, options.workdir, quiet=options.quiet, stop=stop, keep_traced=True)
    except stopping.Stopped as stopped:  # all processes together, so that each may end in peace
      _fail(f"{stopped}; {continues}", code=128 + stop.number)
  except KeyboardInterrupt as stop:
    _fail(f"interrupted; {continues}", code=128 + (stop.args[0] if stop.args else signal.SIGINT),
          at_once=several)
  except Exception as error:
    if several:
      _wait_for_a_verdict(error)
    if isinstance(error, _mistakes()):
      _fail(str(error), at_once=several)
    if not several:
      raise
    traceback.print_exc()
    _fail("stopped by the error above", at_once=True)


def _join(options) -> bool:
  """Joins the other processes, if there are any -> whether there are."""
  from jaxrl import config as configs
  from jaxrl import last_words
  from jaxrl import sharding
  with configs.as_config_errors():
    if sharding.expects_processes():
      last_words.watch(options.workdir, os.environ.get("JAX_PROCESS_ID", ""),
                       os.environ.get("JAX_NUM_PROCESSES", ""))
    return sharding.start_distributed()


def _wait_for_a_verdict(error):
  """If what failed was done with other processes, waits until JAX has noticed that one is gone.

  In that case JAX ends this process, and `last_words` says which one is missing.
  """
  import jax
  from jaxrl import sharding
  causes = [error]
  while causes[-1] is not None:
    causes.append(causes[-1].__cause__ or causes[-1].__context__)
  found = next((c for c in causes if isinstance(c, jax.errors.JaxRuntimeError)), None)
  if found is None or "RESOURCE_EXHAUSTED" in str(found):
    return
  seconds = sharding.HEARTBEAT_SECONDS + 10
  print(f"jaxrl: process {jax.process_index()} of {jax.process_count()}: what the processes do "
        f"together failed ({str(found).splitlines()[0][:200]}); in up to {seconds} s it will be "
        "known whether one of them is gone", file=sys.stderr, flush=True)
  time.sleep(seconds)


@contextlib.contextmanager
def _handling_sigterm():
  """Makes SIGTERM, by which schedulers take a machine back, act as Ctrl-C does until it is known
  what to save; and puts back what was there before."""
  def interrupt(number, _):
    raise KeyboardInterrupt(number)
  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def loading():
  """Collects no garbage meanwhile: modules leave none, and to look for it, then and whenever else
  something is collected, takes time at every start."""
  gc.disable()
  try:
    yield
    gc.freeze()
  finally:
    gc.enable()


def _parser():
  parser = argparse.ArgumentParser(
      prog="jaxrl", description="Post-training of language models in JAX.")
  commands = parser.add_subparsers(dest="command", required=True)
  run = commands.add_parser(
      "run", help="train and evaluate as a config says; continues a run that was stopped",
      epilog="Every field of the config can be set: --config.optimizer.learning_rate=3e-4, "
             "--config.objective[0].low=0.1")
  run.add_argument("--config", required=True, metavar="FILE[:VARIANT]",
                   help="a Python file with get_config()")
  run.add_argument("--workdir", metavar="DIR", help="where checkpoints, metrics, samples and curves go")
  run.add_argument("--plan", nargs="?", const="", metavar="MACHINE",
                   help="run nothing, but say what each device would need, here or on a machine such as "
                   "v5e-8, v5p-64, h100-1, h200-8")
  run.add_argument("--devices", type=int, default=0, metavar="N", help="with --plan: of a machine of any kind")
  run.add_argument("--quiet", action="store_true", help="plain log lines, no progress bar")
  methods = commands.add_parser("methods", help="list the methods, or show one's config")
  methods.add_argument("method", nargs="?", help="show what this one changes")
  reproduce = commands.add_parser(
      "reproduce", help="measure whether a method's claims hold, against its baselines")
  reproduce.add_argument("--method", required=True, metavar="NAME[,NAME]", help="see jaxrl methods")
  reproduce.add_argument("--seeds", default="0,1,2", help="of every arm (0,1,2)")
  reproduce.add_argument("--workdir", default="runs/reproduce", metavar="DIR",
                         help="where runs are kept and reused (runs/reproduce)")
  reproduce.add_argument("--steps", type=int, default=0,
                         help="updates of each run, for a trial whose outcome is not kept")
  evaluate = commands.add_parser(
      "evaluate", help="measure a reward model on answers whose order is known",
      epilog="Rows are {prompt, chosen, rejected, subset}, as in RewardBench; the same with three texts, "
             "one per style, in chosen and rejected, as in RM-Bench; or in the shape of the run's own "
             "data. An evaluation that was interrupted continues.")
  evaluate.add_argument("--model", required=True, metavar="DIR", help="--workdir of a run that trained it")
  evaluate.add_argument("--data", default="", metavar="FILE",
                        help="what to score; else the run's own data of --split")
  evaluate.add_argument("--split", default="test", help="of the run's data (test)")
  evaluate.add_argument("--out", default="", metavar="DIR",
                        help="where figures and pictures go (DIR/evaluation/NAME of the model)")
  evaluate.add_argument("--shape", default="auto", help="of rows: auto, benchmark or run (auto)")
  evaluate.add_argument("--subset", default="subset", metavar="FIELD", help="that accuracies are given by")
  evaluate.add_argument("--prompt", default="{prompt}", metavar="TEXT",
                        help="what a prompt of a benchmark becomes for this model ({prompt})")
  evaluate.add_argument("--answer", default="{answer}", metavar="TEXT", help="likewise ({answer})")
  evaluate.add_argument("--head", default="0", help="which number of the heads scores, or its name (0)")
  evaluate.add_argument("--levels", type=int, default=0, help="of a model trained by `ordinal`")
  evaluate.add_argument("--ordered", action="store_true", help="likewise, see `ordinal`")
  evaluate.add_argument("--limit", type=int, default=0, help="questions at most, the first ones")
  evaluate.add_argument("--quiet", action="store_true", help="plain lines, no progress bar")
  arena = commands.add_parser("arena", help="rank models by votes between their answers")
  arena.add_argument("--votes", required=True, metavar="FILE", help="see jaxrl.data.votes")
  arena.add_argument("--out", required=True, metavar="DIR", help="where table and picture go")
  arena.add_argument("--length", action="store_true", help="rank at equal lengths of answers")
  arena.add_argument("--ridge", type=float, default=0.0,
                     help="pull to equal strengths, for models that never lose (0)")
  arena.add_argument("--resamples", type=int, default=100, help="for the intervals (100)")
  arena.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
  _add_sample(commands)
  export = commands.add_parser(
      "export", help="write the model of a run as a directory that transformers loads",
      epilog="The directory holds config.json, safetensors, the tokenizer and a model card; "
             "--config.model.source=DIR trains it further.")
  export.add_argument("--workdir", required=True, metavar="RUN", help="of the run that trained it")
  export.add_argument("--output", required=True, metavar="DIR", help="a new directory")
  export.add_argument("--dtype", default="", metavar="TYPE",
                      help="of the numbers: float32, bfloat16 or float16 (the run's own; of adapters float32)")
  export.add_argument("--merge-adapters", action="store_true",
                      help="write the whole model with its adapters in it, not these alone as PEFT reads them")
  for command in (methods, reproduce):
    command.add_argument("--results", default="results", metavar="DIR",
                         help="where outcomes are (results)")
  return parser


def _add_sample(commands):
  sample = commands.add_parser(
      "sample", help="ask a model: a prompt, a file of prompts, or a chat",
      epilog="Without --prompt and --input a terminal begins a chat, and a pipe holds the prompt. Rows of an "
             "input are {prompt} or {messages}; an output that was interrupted is continued. What is not "
             "given of max_tokens to min_p is as in the run's last phase, or in generation_config.json as "
             "transformers reads it: temperature 0 unless it says do_sample. What that file leaves out is off "
             "(max_tokens is 512, or half of what the model can read), and without it a sample is the "
             "model's own, at temperature 1.")
  sample.add_argument("--model", required=True, metavar="MODEL",
                      help="--workdir of a run, or directory or hub id of a published model or adapter")
  sample.add_argument("--prompt", metavar="TEXT", help="to answer")
  sample.add_argument("--input", default="", metavar="FILE", help="rows to answer")
  sample.add_argument("--output", default="", metavar="FILE", help="where their answers go, JSON lines")
  sample.add_argument("--chat", action="store_true", help="answer line by line, even from a pipe")
  sample.add_argument("--system", default="", metavar="TEXT", help="what the system says first")
  sample.add_argument("--raw", action="store_true", help="continue prompts as they are, without a template")
  sample.add_argument("--samples", type=int, default=1, metavar="N", help="of each prompt (1)")
  sample.add_argument("--seed", type=int, default=0, help="the same one gives the same answers (0)")
  sample.add_argument("--max_tokens", type=int, metavar="N", help="of an answer")
  sample.add_argument("--temperature", type=float, help="0 takes the most likely token")
  sample.add_argument("--top_k", type=int, help="keep this many tokens; 0 is off")
  sample.add_argument("--top_p", type=float, help="keep the likeliest tokens of this share; 1 is off")
  sample.add_argument("--min_p", type=float, help="keep tokens this likely relative to the first; 0 is off")
  sample.add_argument("--stop", action="append", default=[], metavar="TEXT",
                      help="that ends an answer; may be given several times")
  sample.add_argument("--json", action="store_true", help="an object for each answer")
  sample.add_argument("--logprobs", action="store_true", help="with tokens and their log-probabilities")
  sample.add_argument("--batch", type=int, default=64, metavar="N", help="samples at the same time (64)")
  sample.add_argument("--dtype", default="", metavar="TYPE", help="float32 or bfloat16 (the model's own)")
  sample.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share a copy of it (1)")
  sample.add_argument("--date", default="", metavar="YYYY-MM-DD",
                      help="that the chat template writes, if it writes one (that of the run, or today)")
  sample.add_argument("--quiet", action="store_true", help="answers alone, no notes")


def _overrides(arguments, parser):
  found, rest = {}, []
  arguments = list(arguments)
  while arguments:
    argument = arguments.pop(0)
    match = OVERRIDE.fullmatch(argument)
    if not match:
      rest.append(argument)
      continue
    path, value = match.groups()
    if value is None:
      if not arguments or arguments[0].startswith("--"):
        parser.error(f"--config.{path} needs a value: --config.{path}=...")
      value = arguments.pop(0)
    found[path] = value
  return found, rest


def _config(options, overrides):
  from jaxrl import config as configs
  try:
    config = configs.load(options.config)
    configs.override(config, overrides)
  except ValueError as error:
    _fail(str(error))
  return config


def _mistakes():
  """Errors whose message is all that a user needs; anything else keeps its traceback."""
  from jaxrl.config import ConfigError
  from jaxrl.data import BadRow
  from jaxrl.rewards.scorer import RewardFailure
  from jaxrl.rollouts import EpisodeFailure
  from jaxrl.training.checkpoints import CheckpointError
  from jaxrl.training.loop import TrainingFailure
  from jaxrl.training.processes import Diverged
  return (ConfigError, BadRow, RewardFailure, EpisodeFailure, CheckpointError, TrainingFailure,
          Diverged, FloatingPointError, OSError)


def _fail(message, code=1, at_once=False) -> NoReturn:
  """Ends the process; `at_once` without waiting for others, who may wait for this one."""
  print(f"jaxrl: {message}", file=sys.stderr, flush=True)
  if at_once:
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)
