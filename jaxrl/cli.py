"""The one entry point: `jaxrl run` (= `python -m jaxrl run`).

  jaxrl run --config=configs/quickstart.py --workdir=runs/quickstart
  jaxrl run --config=configs/gsm8k.py:smoke --workdir=runs/gsm8k --config.seed=1
"""

import argparse
import contextlib
import os
import re
import signal
import sys
from typing import NoReturn

OVERRIDE = re.compile(r"--config\.([A-Za-z_][\w.\[\]]*)(?:=(.*))?", re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
  """Parses the command line and runs the command; exits with 1 and one message on a mistake."""
  arguments = sys.argv[1:] if arguments is None else arguments
  parser = _parser()
  overrides, rest = _overrides(arguments, parser)
  options = parser.parse_args(rest)
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())  # so that a config can name `my_module:my_reward`
  config = _config(options, overrides)
  try:
    with _stopping_on_sigterm():
      from jaxrl.training import run  # only now, for it takes seconds to load
      run.run(config, options.workdir, quiet=options.quiet)
  except KeyboardInterrupt as stop:
    _fail(f"interrupted; the same command continues {options.workdir}",
          code=128 + (stop.args[0] if stop.args else signal.SIGINT))
  except _mistakes() as error:
    _fail(str(error))


@contextlib.contextmanager
def _stopping_on_sigterm():
  """Makes SIGTERM, by which schedulers take a machine back, act as Ctrl-C does."""
  def stop(number, _):
    raise KeyboardInterrupt(number)
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


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
  run.add_argument("--workdir", required=True, metavar="DIR",
                   help="where checkpoints, metrics, samples and curves go")
  run.add_argument("--quiet", action="store_true", help="plain log lines, no progress bar")
  return parser


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
  return (ConfigError, BadRow, RewardFailure, EpisodeFailure, CheckpointError, TrainingFailure,
          FloatingPointError, OSError)


def _fail(message, code=1) -> NoReturn:
  print(f"jaxrl: {message}", file=sys.stderr)
  sys.exit(code)
