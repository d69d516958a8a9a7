"""Preference and reward losses against TRL's own functions: values and gradients on random ragged inputs.

  python scripts/parity/trl_parity.py          # makes .bench/trl if need be; results/bench/trl_parity.json

Both get the same log-probabilities (or scores) of answers of 1 to 12 tokens behind prompts of 1 to 6; TRL
stacks and pads them by its own collators, jaxrl packs them. Compared are the loss of a batch and its
gradient by every token, relative to the largest entry. `trl_oracle.py` runs in TRL's environment.

Where conventions differ, settings are chosen to mean the same:

  alpha divergence     TRL's coefficient is 1 - `alpha` here
  ipo, sigmoid_norm    `normalise=True` here, which divides before the divergence, TRL after it
  sft, and CPO's NLL   TRL averages over all chosen tokens of the batch, `imitate_preferred` over the
                       tokens of each sequence, then over sequences: compared on batches of one pair
  orpo                 TRL's NLL is over prompt and answer; compared without it
  kto                  the answers for its KL are given; TRL and jaxrl pair them alike, with the next prompt
  bco                  TRL 1.16 has only the pairs of `dpo(loss="bco_pair")`
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

import environments  # noqa: E402
from jaxrl import compose  # noqa: E402
from jaxrl.batch import ModelOutputs, Trajectory, pack  # noqa: E402
from jaxrl.objectives import aot, bradley_terry, cpo, dpo, imitate_preferred, kto, orpo, simpo  # noqa: E402
from jaxrl.objectives.aggregate import loss_weights, mean_weights, sum_of_terms  # noqa: E402

LIMIT = 1e-5
SIDES = ("chosen", "rejected")
B = 0.3


def on_dpo(loss="sigmoid", /, **settings):
  """A question for TRL's DPO trainer."""
  return "dpo", dict(loss_types=[loss], beta=B, **settings)


CASES = {
    "sigmoid": (on_dpo(), dpo, {}),
    "hinge": (on_dpo("hinge"), dpo, dict(loss="hinge")),
    "ipo": (on_dpo("ipo"), dpo, dict(loss="ipo", normalise=True)),
    "exo_pair": (on_dpo("exo_pair", label_smoothing=1e-3), dpo, dict(loss="exo", label_smoothing=1e-3)),
    "nca_pair": (on_dpo("nca_pair"), dpo, dict(loss="nca")),
    "robust": (on_dpo("robust", label_smoothing=0.2), dpo, dict(loss="robust", label_smoothing=0.2)),
    "bco_pair": (on_dpo("bco_pair"), dpo, dict(loss="bco_pair")),
    "sppo_hard": (on_dpo("sppo_hard"), dpo, dict(loss="sppo_hard")),
    "apo_zero": (on_dpo("apo_zero"), dpo, dict(loss="apo_zero")),
    "apo_down": (on_dpo("apo_down"), dpo, dict(loss="apo_down")),
    "discopop": (on_dpo("discopop", discopop_tau=0.3), dpo, dict(loss="discopop", tau=0.3)),
    "sigmoid_norm": (on_dpo("sigmoid_norm"), dpo, dict(normalise=True)),
    "aot": (on_dpo("aot", label_smoothing=0.1), aot, dict(label_smoothing=0.1)),
    "aot_unpaired": (on_dpo("aot_unpaired"), aot, dict(unpaired=True)),
    "forward_kl": (on_dpo(f_divergence_type="forward_kl"), dpo, dict(divergence="forward_kl")),
    "js": (on_dpo(f_divergence_type="js_divergence"), dpo, dict(divergence="js")),
    "alpha": (on_dpo(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3, dtype="float32"), dpo,
              dict(divergence="alpha", alpha=0.7)),
    "js, hinge": (on_dpo("hinge", f_divergence_type="js_divergence"), dpo,
                  dict(divergence="js", loss="hinge")),
    "forward_kl, robust": (on_dpo("robust", f_divergence_type="forward_kl", label_smoothing=0.1), dpo,
                           dict(divergence="forward_kl", loss="robust", label_smoothing=0.1)),
    "wpo": (on_dpo(use_weighting=True), dpo, dict(weigh_by_policy=True)),
    "wpo, apo_zero": (on_dpo("apo_zero", use_weighting=True), dpo,
                      dict(loss="apo_zero", weigh_by_policy=True)),
    "ld_dpo": (on_dpo(ld_alpha=0.4), dpo, dict(tail_weight=0.4)),
    "ld_dpo, sppo_hard": (on_dpo("sppo_hard", ld_alpha=0.0), dpo, dict(loss="sppo_hard", tail_weight=0.0)),
    "sft": (on_dpo("sft"), imitate_preferred, {}),
    "kto": (("kto", dict(beta=B, desirable_weight=0.7, undesirable_weight=1.3)), kto,
            dict(desirable=0.7, undesirable=1.3)),
    "apo_zero_unpaired": (("kto", dict(loss_type="apo_zero_unpaired", beta=B, desirable_weight=1.0,
                                       undesirable_weight=1.0)), kto, dict(estimate_kl=False)),
    "cpo": (("cpo", dict(beta=B)), cpo, {}),
    "cpo, smoothed": (("cpo", dict(beta=B, label_smoothing=0.1)), cpo, dict(label_smoothing=0.1)),
    "simpo": (("cpo", dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7)), simpo, dict(beta=2.0, gamma=0.7)),
    "simpo, smoothed": (("cpo", dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1)),
                        simpo, dict(beta=2.0, gamma=0.7, label_smoothing=0.1)),
    "orpo": (("orpo", dict(beta=B)), orpo, {}),
    "reward": (("reward", {}), bradley_terry, {}),
    "reward, margin": (("reward", dict(margin=True)), bradley_terry, dict(margin="gap")),
    "reward, centred": (("reward", dict(center_rewards_coefficient=0.01)), bradley_terry, dict(centre=0.01)),
    "reward, both": (("reward", dict(margin=True, center_rewards_coefficient=0.1)), bradley_terry,
                     dict(margin="gap", centre=0.1))}
ALONE = ("sft",)  # on batches of one pair
WITH_BETA = (dpo, aot, kto, cpo, orpo)


def term_of(name):
  """jaxrl's term of a case."""
  _, function, settings = CASES[name]
  if function in WITH_BETA:
    settings = dict(beta=B, **settings)
  return functools.partial(function, **settings)


# ------------------------------------------------------------------------------------------ questions


def draw(seed: int, pairs: int) -> dict:
  """A batch of pairs, and one of single answers each with a mismatched one."""
  rng = np.random.default_rng(seed)

  def answer():
    n = int(rng.integers(1, 13))
    logprobs = rng.uniform(-2, -0.01, n)
    return dict(logprobs=logprobs.tolist(), reference=(logprobs + rng.normal(0, 0.5, n)).tolist(),
                log_collision=rng.uniform(-3, -0.1, n).tolist(), score=float(rng.normal(0, 2)))

  def single(label):
    own, off = answer(), answer()
    off["reference"] = [x - (-1) ** seed * 0.3 for x in off["reference"]]  # a KL on either side of 0
    return dict(head=int(rng.integers(1, 7)), label=label, **own,
                off_logprobs=off["logprobs"], off_reference=off["reference"])
  labels = rng.random(2 * pairs) < 0.6
  labels[:2] = True, False
  return dict(pairs=[dict(head=int(rng.integers(1, 7)), chosen=answer(), rejected=answer(),
                          margin=float(rng.uniform(-1, 2))) for _ in range(pairs)],
              answers=[single(float(x)) for x in labels])


def ask_trl(questions: dict, python: str) -> dict:
  """What TRL says."""
  with tempfile.TemporaryDirectory() as directory:
    asked, said = (pathlib.Path(directory) / name for name in ("questions.json", "answers.json"))
    asked.write_text(json.dumps(questions))
    oracle = pathlib.Path(__file__).with_name("trl_oracle.py")
    done = subprocess.run([python, str(oracle), str(asked), str(said)], capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f"TRL failed:\n{done.stderr[-3000:]}")
    return json.loads(said.read_text())


# -------------------------------------------------------------------------------------------- answers


def sequence(head: int, values: dict, group: int, label: float, gap: float, *, scored: bool = True):
  """A trajectory with all that any term reads in its signals."""
  n = len(values["logprobs"])
  mask = np.arange(head + n) >= head

  def placed(x):
    return np.concatenate([np.zeros(head), x])
  return Trajectory(
      np.full(head + n, 3), mask, group=group, scored=scored, columns=dict(preference=label, gap=gap),
      signals=dict(logprobs=placed(values["logprobs"]), old_logprobs=placed(values["logprobs"]),
                   reference_logprobs=placed(values["reference"]), mismatched=mask * (not scored),
                   collision=placed(np.exp(values.get("log_collision", np.zeros(n)))),
                   scores=np.where(np.arange(head + n) == head + n - 1, values.get("score", 0.0), 0.0)))


def trajectories_of(batch: dict, unpaired: bool) -> list[Trajectory]:
  """The sequences of a batch in TRL's order, chosen ones first; then mismatched ones."""
  if not unpaired:
    return [sequence(pair["head"], pair[side], i, float(side == "chosen"), pair["margin"])
            for side in SIDES for i, pair in enumerate(batch["pairs"])]
  answers = batch["answers"]
  own = [sequence(a["head"], a, i, a["label"], 0.0) for i, a in enumerate(answers)]
  off = [sequence(a["head"], dict(logprobs=a["off_logprobs"], reference=a["off_reference"]),
                  len(answers) + i, 0.0, 0.0, scored=False) for i, a in enumerate(answers)]
  return own + off


def ask_jaxrl(name: str, batch: dict) -> dict:
  """Value and gradients of jaxrl's term, as `trl_oracle.py` gives TRL's."""
  term, of_scores = term_of(name), CASES[name][1] is bradley_terry
  trajectories = trajectories_of(batch, unpaired=CASES[name][1] is kto)
  packed = jax.tree.map(jnp.asarray, pack(trajectories, row_length=64, together=True))
  signals, _ = compose.prepared(term, packed, None)
  packed = packed.with_signals(**signals)
  weights, means = loss_weights(packed, "sequence_mean"), mean_weights(packed, by_sequence=True)

  def loss(x):
    collision = {"collision": packed.signals["collision"]}
    outputs = (ModelOutputs(scores=x[..., None]) if of_scores else
               ModelOutputs(logprobs=x, distribution=collision))
    return sum_of_terms([term])(outputs, packed, weights, means)[0]
  start = packed.signals["scores" if of_scores else "logprobs"]
  value, gradient = jax.value_and_grad(loss)(start)
  found = []
  for i, t in enumerate(trajectories):
    if t.scored:
      own = np.asarray(gradient)[np.asarray(packed.sequence_ids) == i]
      found.append(own[-1:] if of_scores else own[t.loss_mask])
  return {"value": float(value), "gradients": [x.tolist() for x in found]}


def difference(ours: dict, theirs: dict) -> tuple[float, float]:
  """Of values and of gradients, each relative to the largest entry of TRL's."""
  value = abs(ours["value"] - theirs["value"]) / max(abs(theirs["value"]), 1e-9)
  a, b = (np.concatenate(x["gradients"]) for x in (ours, theirs))
  return value, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--peers-dir", type=pathlib.Path, default=ROOT / ".bench",
                      help="where TRL's environment is, or is made")
  parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results/bench/trl_parity.json")
  parser.add_argument("--batches", type=int, default=4)
  parser.add_argument("--pairs", type=int, default=6, help="of a batch")
  options = parser.parse_args(arguments)
  batches = [draw(seed, options.pairs) for seed in range(options.batches)]
  single = [draw(100 + seed, 1) for seed in range(options.batches)]
  said = ask_trl(dict(cases={name: case[0] for name, case in CASES.items()}, alone=ALONE, batches=batches,
                      single=single), environments.interpreter("trl", options.peers_dir))
  rows = {}
  for name in CASES:
    pairs = [difference(ask_jaxrl(name, batch), theirs)
             for batch, theirs in zip(single if name in ALONE else batches, said[name], strict=True)]
    value, gradient = (max(column) for column in zip(*pairs))
    function, settings = CASES[name][1:]
    rows[name] = dict(term=function.__name__, settings=settings, value=value, gradient=gradient,
                      equal=max(value, gradient) <= LIMIT)
  print(f"{'case':20} {'term':18} {'value':>9} {'gradient':>9}")
  for name, row in rows.items():
    print(f"{name:20} {row['term']:18} {row['value']:9.1e} {row['gradient']:9.1e}"
          + ("" if row["equal"] else "   differs"))
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(dict(
      versions=said["versions"], date=time.strftime("%Y-%m-%d"), limit=LIMIT, batches=options.batches,
      pairs=options.pairs, cases=rows), indent=1) + "\n")
  return int(not all(row["equal"] for row in rows.values()))


if __name__ == "__main__":
  sys.exit(main())
