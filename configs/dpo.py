"""DPO (arXiv:2305.18290) on addition: a warm start, then pairs of right and wrong answers.

No answer is sampled in training and none is judged: the policy learns from pairs alone, against the
reference that it was when the phase began. Other losses of the family are other names in `objective`,
see `jaxrl.objectives.preference`.
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.data.train = config.data.validation = config.data.test = "task:preferred_addition"
  config.phases = ("sft", "preference")
  config.preference = dict(
      kind="preference", steps=300, batch=dict(examples=64),
      objective=[dict(name="dpo", beta=0.1), dict(name="imitate_preferred", coefficient=0.2)],
      aggregation=dict(kind="sequence_mean"), optimizer=dict(learning_rate=2e-4))
  return config
