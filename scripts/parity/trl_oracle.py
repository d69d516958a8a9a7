"""TRL's own losses on given log-probabilities, with their gradients by PyTorch; see trl_parity.py.

  python trl_oracle.py QUESTIONS.json ANSWERS.json     # with a Python that has TRL

TRL's methods are called as they are, on trainers that were never built: what they would get from a model
comes from the file. Everything is float64, except where TRL itself insists on float32.
"""

import collections
import contextlib
import importlib.metadata
import json
import sys
import types

import torch
from trl import DPOTrainer
from trl import KTOTrainer
from trl import RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_trainer import DataCollatorForPreference as CollatorOfRewards

OFF = 1000  # ids of mismatched answers begin here


class Model:
  """Says what it was given of each row, instead of computing it."""

  is_gradient_checkpointing = False
  training = True

  def __init__(self, answers, off_answers=(), **more):
    """Args: log-probabilities of the answer tokens of each row, of rows with mismatched answers, and
    other outputs by name, likewise."""
    self.answers, self.off_answers, self.more = answers, off_answers, more

  def __call__(self, input_ids, labels=None, **_):
    off = bool((input_ids >= OFF).any())
    mask = labels[:, 1:] != -100

    def placed(values):
      # A row at a time, so that gradients reach the tokens.
      rows = []
      for row, own in zip(mask, values, strict=True):
        rows.append(torch.zeros(row.shape, dtype=own.dtype).masked_scatter(row, own))
      return torch.stack(rows)
    blank = torch.zeros(mask.shape)
    return types.SimpleNamespace(
        log_probs=placed(self.off_answers if off else self.answers), entropy=blank, mean_logits=blank,
        is_top1=blank.bool(), **{name: placed(values) for name, values in self.more.items()})


def trainer(**attributes):
  """What the methods of trainers read of `self`."""
  same = lambda x: x  # noqa: E731
  return types.SimpleNamespace(
      accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same,
                                        unwrap_model=same),
      aux_loss_enabled=False, precompute_ref_logps=False, _tp_size=1, _total_train_tokens=0,
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), **attributes)


def ids(count, start=3):
  return [start + i % 7 for i in range(count)]


def tensors(rows, dtype, learn=False):
  return [torch.tensor(row, dtype=dtype, requires_grad=learn) for row in rows]


def of_pairs(batch, name):
  """Chosen answers first, then rejected ones, as TRL stacks them."""
  return [pair[side][name] for side in ("chosen", "rejected") for pair in batch["pairs"]]


def collated(batch):
  examples = [{"prompt_ids": ids(pair["head"]), **{
      f"{side}_ids": ids(len(pair[side]["logprobs"])) for side in ("chosen", "rejected")}}
      for pair in batch["pairs"]]
  return DataCollatorForPreference(pad_token_id=0).torch_call(examples)


def dpo(batch, *, dtype="float64", discopop_tau=0.05, f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5, label_smoothing=0.0, ld_alpha=None, use_weighting=False, **settings):
  dtype = getattr(torch, dtype)
  own = tensors(of_pairs(batch, "logprobs"), dtype, learn=True)
  collision = tensors(of_pairs(batch, "log_collision"), dtype)
  model = Model(own, log_sum_sq_probs=collision)
  self = trainer(
      model=model, ref_model=Model(tensors(of_pairs(batch, "reference"), dtype)), ld_alpha=ld_alpha,
      args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
      f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef,
      label_smoothing=label_smoothing, use_weighting=use_weighting, loss_weights=[1.0], **settings)
  return DPOTrainer._compute_loss(self, model, collated(batch), False), own


def kto(batch, *, loss_type="kto", **settings):
  answers = batch["answers"]
  own, reference, off, off_reference = (
      tensors([a[name] for a in answers], torch.float64, learn=name == "logprobs")
      for name in ("logprobs", "reference", "off_logprobs", "off_reference"))
  with_kl = loss_type == "kto"
  examples = [{"prompt_ids": ids(a["head"]), "completion_ids": ids(len(a["logprobs"])),
               "label": bool(a["label"]),
               **({"KL_completion_ids": ids(len(a["off_logprobs"]), OFF)} if with_kl else {})}
              for a in answers]
  model = Model(own, off)
  self = trainer(model=model, ref_model=Model(reference, off_reference), calculate_KL=with_kl,
                 loss_type=loss_type, args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
                 **settings)
  self._compute_kl_logps = lambda m, inputs: KTOTrainer._compute_kl_logps(self, m, inputs)
  inputs = DataCollatorForUnpairedPreference(pad_token_id=0).torch_call(examples)
  return KTOTrainer._compute_loss(self, model, inputs, False), own


def sums(batch, of, average):
  """TRL's log-probabilities of sequences, from logits over two tokens that give those of the file."""
  own = tensors(of_pairs(batch, "logprobs"), torch.float64, learn=True)
  inputs = collated(batch)
  labels = torch.where(inputs["completion_mask"] == 1, 0, -100)
  logprobs = Model(own)(inputs["input_ids"], labels=labels).log_probs
  safe = torch.where(labels[:, 1:] == 0, logprobs, -1.0)
  logits = torch.stack([safe, torch.log(-torch.expm1(safe))], dim=-1)
  logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
  return of.get_batch_logps(logits, labels, average_log_prob=average).chunk(2), own


def cpo(batch, *, loss_type="sigmoid", label_smoothing=0.0, beta, simpo_gamma=0.0):
  (chosen, rejected), own = sums(batch, CPOTrainer, average=loss_type == "simpo")
  self = trainer(alpha=0.0, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing,
                 simpo_gamma=simpo_gamma)
  return CPOTrainer.cpo_loss(self, chosen, rejected)[0].mean(), own


def orpo(batch, *, beta):
  (chosen, rejected), own = sums(batch, ORPOTrainer, average=True)
  return -ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0].mean(), own


def reward(batch, *, margin=False, center_rewards_coefficient=None):
  scores = tensors([[x] for x in of_pairs(batch, "score")], torch.float64, learn=True)
  examples = [{f"{side}_ids": ids(pair["head"] + len(pair[side]["logprobs"]))
               for side in ("chosen", "rejected")} | ({"margin": pair["margin"]} if margin else {})
              for pair in batch["pairs"]]
  self = trainer(model=types.SimpleNamespace(training=True),
                 args=types.SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient))
  said = types.SimpleNamespace(logits=torch.stack(scores))
  inputs = CollatorOfRewards(pad_token_id=0).torch_call(examples)
  return RewardTrainer.compute_loss(self, lambda **_: said, inputs), scores


KINDS = dict(dpo=dpo, kto=kto, cpo=cpo, orpo=orpo, reward=reward)


def main():
  with open(sys.argv[1], encoding="utf-8") as file:
    questions = json.load(file)
  packages = ("trl", "torch", "transformers")
  answers = {"versions": {name: importlib.metadata.version(name) for name in packages}}
  for name, (kind, settings) in questions["cases"].items():
    found = answers[name] = []
    batches = questions["single" if name in questions["alone"] else "batches"]
    for batch in batches:
      with contextlib.redirect_stdout(sys.stderr):
        value, own = KINDS[kind](batch, **settings)
      gradients = torch.autograd.grad(value, own, allow_unused=True)
      found.append({"value": value.item(), "gradients": [
          [0.0] * len(x) if g is None else g.tolist() for x, g in zip(own, gradients)]})
  with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(answers, file)


if __name__ == "__main__":
  main()
