"""CMDP distillation: reward within a budget of divergence from the teacher (arXiv:2509.22921).

Changes two things in GRPO: `advantages.constrain_divergence` gives an answer that is over its
budget a penalty instead of its reward, and `objectives.divergence_cost` is the part of that
penalty's gradient that does not go through sampling; without it the rest still learns. Only the
abstract and a public discussion were read, so the form is a choice: KL(student || teacher) over the
vocabulary, its mean over the tokens of an answer, 0.1 nats, and -(1 + excess) beyond. The teacher
is the reference: as it stands the start itself, so that the budget need not be annealed; a larger
one of another run is `config.reference.source`, and a student that begins outside its budget gets
`budget=dict(schedule="linear", ...)`, as in the row. Reported: better constraint
satisfaction and reasoning than soft Lagrangian baselines (Qwen2.5-Math-1.5B, Llama-3.2-3B), no
figure that was read. Small-scale check: tests/methods/test_cmdp_distillation.py.

The row is the card's: a teacher of 4 layers that gets 9 of 10 sums right, a student of 2 layers that
begins a nat per token from it, with a budget that is annealed over the first fifth of the updates, to
0.5: distillation alone came to 0.55 to 0.58 (means of the last 20 updates). Beside GRPO and that
distillation (full KL, on samples of the student) stand soft penalties of several weights, with the same
KL and its gradient in the loss. It asks whether one of them dominates, with answers as good and as often
within the budget. Arms without a budget report the share of answers within it by a piece whose penalty
of 1e-9 changes nothing. GRPO is a weak baseline here: at this learning rate it falls below its start
(0.206), to 0.146, while 200 updates at 3e-4 took it to 0.30; so that answers are better than without a
teacher says little.
"""

from configs import grpo

PENALTY = 1.0
BUDGET = 0.5  # of the row, nats per token
LAMBDAS = (0.1, 0.3, 1.0)
SCALED = [dict(name="center_by_group"), dict(name="scale_by_group_std")]


def get_config():
  config = grpo.get_config()
  config.advantage.insert(0, dict(name="constrain_divergence", budget=0.1, penalty=PENALTY))
  config.objective.append(dict(name="divergence_cost", penalty=PENALTY,
                               aggregation="sequence_mean"))
  return config


def get_evidence():
  annealed = dict(schedule="linear", start=1.0, end=BUDGET, steps=80)
  counted = dict(name="constrain_divergence", budget=BUDGET, penalty=1e-9, mode="keep")
  surrogate = dict(name="clipped_surrogate", low=0.2, high=0.2)

  def without_budget(*objective):
    return dict(config="configs/grpo.py", overrides={"advantage": [counted, *SCALED],
                                                     "objective": list(objective)})

  def full(weight):
    return dict(name="kl", beta=weight, estimator="full")

  grid = {f"soft_{weight:g}".replace(".", "_"): weight for weight in LAMBDAS}
  claims = [(dict(text=f"answers are as good as with a soft penalty of {weight:g}",
                  metric="test/sampled_accuracy", expect="not lower", margin=0.02, baseline=name),
             dict(text=f"also more often within the budget than with one of {weight:g}",
                  metric="late/within_budget", expect="higher", baseline=name))
            for name, weight in grid.items()]
  return dict(
      reported="satisfies constraints and reasons better than soft baselines; no figure read",
      overrides={"rl.steps": 400, "rl.optimizer.learning_rate": 1e-3, "rl.evaluate.every": 100,
                 "reference.source": "{teacher}"},
      teachers=dict(teacher={"model.layers": 4, "sft.until.at_least": 0.9, "sft.steps": 6000}),
      arms=dict(
          method=dict(overrides={"advantage": [
              dict(name="constrain_divergence", budget=annealed, penalty=PENALTY), *SCALED]}),
          **{name: without_budget(surrogate, full(weight)) for name, weight in grid.items()},
          grpo=without_budget(surrogate),
          distillation=without_budget(full(1.0))),
      claims=[
          *[claim for pair in claims for claim in pair],
          dict(text="answers are better than without a teacher", metric="test/sampled_accuracy",
               expect="higher", baseline="grpo"),
          dict(text="also better than by distillation alone", metric="test/sampled_accuracy",
               expect="higher", baseline="distillation"),
          dict(text="nearer to the teacher than without one", metric="late/divergence",
               expect="lower", baseline="grpo")])
