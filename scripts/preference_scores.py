"""Scores of preference data by models that were trained here, as files that `clean` reads.

  python scripts/preference_scores.py --kind=reward_gap --runs=runs/part0,runs/part1 --out=gap.jsonl
  python scripts/preference_scores.py --kind=ifd_gap --runs=runs/policy --out=ifd.jsonl

The rows are those of `config.data.train` of the runs, up to the transforms `leave_part_out` and `clean`. A
run with `leave_part_out` scores the part that it was not trained on, another one scores all rows; together
the runs have to score every row. Then, in a config with the same data, seed and earlier transforms,

  dict(name="clean", score=dict(name="stored", paths="gap.jsonl"), action="flip", rate=0.2)

  reward_gap   r(chosen) - r(rejected), of runs that trained a reward model (its first head)
  ifd          how little the prompt helps both answers, of runs that trained a policy
  ifd_gap      how much less it helps the rejected one
"""

import argparse
import json
import pathlib
import sys

import jax
import ml_collections
import numpy as np

from jaxrl import config as configs
from jaxrl import data
from jaxrl import sharding
from jaxrl.data.transforms import preference_scores
from jaxrl.data.transforms import score_arithmetic
from jaxrl.sampling import Likelihood
from jaxrl.training import inputs
from jaxrl.training import reward_models
from jaxrl.training import state as states
from jaxrl.training.checkpoints import read_parameters

KINDS = ("reward_gap", "ifd", "ifd_gap")
LATER = ("leave_part_out", "clean")  # transforms that the scored rows have not gone through


def main(arguments=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kind", required=True, choices=KINDS)
  parser.add_argument("--runs", required=True, help="workdirs, with commas between them")
  parser.add_argument("--out", required=True, type=pathlib.Path)
  options = parser.parse_args(arguments)
  try:
    source, score = scores([pathlib.Path(run) for run in options.runs.split(",")], options.kind)
  except (ValueError, OSError) as error:
    sys.exit(f"preference_scores: {error}")
  options.out.parent.mkdir(parents=True, exist_ok=True)
  with open(options.out, "w", encoding="utf-8") as file:
    for i, value in enumerate(score):
      file.write(json.dumps(dict(where=source.where(i), digest=preference_scores.digest_of(source, i),
                                 score=None if np.isnan(value) else float(value))) + "\n")
  print(f"{options.out}: {len(score)} rows, {np.sum(score < 0)} below 0, {np.sum(np.isnan(score))} without")


def scores(runs: list[pathlib.Path], kind: str) -> tuple[data.Source, np.ndarray]:
  """The rows that are scored, and the score of each.

  Raises:
    ValueError: runs of different data, or rows that none of them scores.
  """
  source, score = None, None
  for run in runs:
    config = configs.of_run(run)
    own, part = before(config)
    if source is None:
      source, first, score = own, config, np.full(len(own), np.nan)
      left = np.ones(len(own), bool)
    elif configs.to_dict(first.data) != configs.to_dict(config.data) or first.seed != config.seed:
      raise ValueError(f"{run} and {runs[0]} have other data or another seed")
    rows = np.arange(len(own)) if part is None else np.flatnonzero(
        score_arithmetic.parts(len(own), part["of"], part["seed"]) == part["part"])
    score[rows] = (reward_gaps if kind == "reward_gap" else ifds)(run, config, own, rows, kind)
    left[rows] = False
  if left.any():
    raise ValueError(f"{left.sum()} rows, {source.where(int(left.argmax()))} among them, are scored by "
                     "none of the runs")
  return source, score


def before(config: ml_collections.ConfigDict) -> tuple[data.Source, dict | None]:
  """The rows of training before they were divided or cleaned, and the part that was left out.

  Those transforms are taken out of the config.
  """
  names = [spec if isinstance(spec, str) else spec["name"] for spec in config.data.transforms]
  end = next((i for i, name in enumerate(names) if name in LATER), len(names))
  part = None
  if end < len(names) and names[end] == "leave_part_out":
    spec = dict(config.data.transforms[end])
    part = dict(part=spec["part"], of=spec.get("of", 2), seed=spec.get("seed", config.seed))
  config.data.transforms = tuple(config.data.transforms[:end])
  return inputs.open_split(config, "train"), part


def comparisons(config, tokenizer, source, rows):
  """The pairs of some rows, None for those that cannot be read."""
  builder = inputs.pair_builder(config, inputs.builder(config, tokenizer)).fresh("skip")
  return [builder.read(source, int(i)) for i in rows]


def reward_gaps(run, config, source, rows, kind):
  """Score of the chosen minus that of the rejected answer."""
  del kind
  model = reward_models.RewardModel.load(run)
  pairs = comparisons(config, model.tokenizer, source, rows)
  asked = [(pair.task, answer, True) for pair in pairs if pair for answer in pair.bare]
  read = iter(model.scores(asked))
  gap = []
  for pair in pairs:
    both = [next(read), next(read)] if pair else [ValueError()]
    gap.append(np.nan if any(isinstance(x, Exception) for x in both) else float(both[0][0] - both[1][0]))
  return gap


def ifds(run, config, source, rows, kind):
  """IFD of both answers, brought together."""
  tokenizer = data.load_tokenizer(run / "tokenizer")
  decoder, mesh = inputs.decoder_config(config.model, tokenizer), sharding.make_mesh()
  params = read_parameters(run / "checkpoints", states.initial_parameters(
      decoder, jax.random.key_data(jax.random.key(0)), mesh))["params"]
  reader = Likelihood(decoder, mesh=mesh)
  start = [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id]
  pairs = comparisons(config, tokenizer, source, rows)
  texts = [(pair.task.prompt, tokenizer.encode(answer) + [tokenizer.eos_id])
           for pair in pairs if pair for answer in pair.answers]
  means = []
  for head in (None, start):  # behind the prompt, and behind nothing but the token that starts a text
    found = reader.logprobs(params, [(prompt if head is None else head) + answer for prompt, answer in texts])
    means.append([x[-len(answer):].mean() for x, (_, answer) in zip(found, texts)])
  values = iter(score_arithmetic.ifd(*map(np.array, means)))
  combine = score_arithmetic.ifd_gap if kind == "ifd_gap" else score_arithmetic.ifd_score
  return [combine(next(values), next(values)) if pair else np.nan for pair in pairs]


if __name__ == "__main__":
  main()
