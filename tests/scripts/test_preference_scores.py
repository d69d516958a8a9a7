"""Scores by models of runs: who scores which row, and IFD against the model's own full distributions."""

import importlib.util
import json
import pathlib

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configs
from jaxrl import data
from jaxrl.data.transforms import cleaning
from jaxrl.models import Decoder, token_logits
from jaxrl.training import inputs
from jaxrl.training import state as states

PATH = pathlib.Path(__file__).parents[2] / "scripts/preference_scores.py"
ROWS = 12


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("preference_scores_script", PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run_of(place, *transforms, seed=0):
  """A directory as a run leaves it, without its checkpoint."""
  config = configs.load("configs/methods/prefcleanbench.py")
  config.seed, config.data.task_size = seed, ROWS
  config.model.update(layers=1, d_model=16, d_ff=16, heads=2, kv_heads=2)
  config.data.transforms = [dict(name="flip_labels", rate=0.2), *transforms]
  place.mkdir()
  (place / "config.json").write_text(json.dumps(configs.to_dict(config)))
  data.CharacterTokenizer(config.tokenizer.alphabet).save(place / "tokenizer")
  return config


def part(number):
  return dict(name="leave_part_out", part=number)


def test_every_row_is_scored_by_the_run_that_has_not_seen_it(script, tmp_path, monkeypatch):
  for number in (0, 1):
    run_of(tmp_path / f"run{number}", part(number))
  monkeypatch.setattr(script, "reward_gaps", lambda run, config, source, rows, kind: [
      float(run.name[-1]) for _ in rows])
  out = tmp_path / "scores.jsonl"
  script.main(["--kind=reward_gap", f"--runs={tmp_path / 'run0'},{tmp_path / 'run1'}", f"--out={out}"])
  source, _ = script.before(run_of(tmp_path / "again"))
  found = cleaning.clean(source, seed=0, score=dict(name="stored", paths=str(out)), rate=0.5).verdict.score
  for number in (0, 1):
    seen = cleaning.leave_part_out(source, seed=0, part=number)
    places = {seen.where(i) for i in range(len(seen))}
    assert all((source.where(i) in places) != (found[i] == number) for i in range(ROWS))


def test_rows_that_nobody_scores_and_other_data_are_refused(script, tmp_path, monkeypatch):
  run_of(tmp_path / "run0", part(0))
  run_of(tmp_path / "run1", part(1), seed=1)
  monkeypatch.setattr(script, "reward_gaps", lambda run, config, source, rows, kind: [0.0] * len(rows))
  with pytest.raises(ValueError, match="6 rows, letters/train:.* are scored by none"):
    script.scores([tmp_path / "run0"], "reward_gap")
  with pytest.raises(ValueError, match="other data or another seed"):
    script.scores([tmp_path / "run0", tmp_path / "run1"], "reward_gap")


def test_ifd_is_what_the_whole_distributions_of_the_model_say(script, tmp_path, monkeypatch):
  config = run_of(tmp_path / "run")
  monkeypatch.setattr(script, "read_parameters", lambda place, initial: initial)
  source, gap = script.scores([tmp_path / "run"], "ifd_gap")
  tokenizer = data.load_tokenizer(tmp_path / "run/tokenizer")
  decoder = inputs.decoder_config(config.model, tokenizer)
  params = meta.unbox(states.initial_parameters(decoder, jax.random.key_data(jax.random.key(0)),
                                                script.sharding.make_mesh()))
  model = Decoder(decoder)

  @jax.jit
  def logits_of(ids):
    hidden, _ = model.apply(params, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    return token_logits(hidden, model.apply(params, method="vocabulary"))

  def perplexity(head, answer):
    logits = np.asarray(logits_of(jnp.array([head + answer])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.exp(-np.mean([logprobs[len(head) - 1 + i, token] for i, token in enumerate(answer)]))
  for i in range(3):
    row, bos = source[i], [tokenizer.bos_id]
    prompt = bos + tokenizer.encode(row["question"])
    ifd = {}
    for side in ("chosen", "rejected"):
      answer = tokenizer.encode(row[side]) + [tokenizer.eos_id]
      ifd[side] = perplexity(prompt, answer) / perplexity(bos, answer)
    assert gap[i] == pytest.approx(ifd["rejected"] - ifd["chosen"], rel=1e-3, abs=1e-6)
