"""A Bradley-Terry reward model (arXiv:2203.02155, eq. 1) of sums, from pairs of right and wrong answers.

Other reward models are other names in `objective`, see `jaxrl.objectives.reward_model` and `.labels`. As a
judge in reinforcement learning it is the criterion `reward_model` with the --workdir of this run.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data.train = config.data.validation = config.data.test = "task:preferred_addition"
  config.data.max_prompt_tokens = config.data.max_completion_tokens = 64
  config.tokenizer.alphabet = "0123456789+="
  config.model.update(layers=2, d_model=64, heads=4, kv_heads=4, d_ff=192,
                      heads_on_top=(("score", 1),))
  config.batch.row_length = 64
  config.evaluate.update(problems=0, pairs=500)
  config.phases = ("comparisons",)
  config.comparisons = dict(
      kind="reward", steps=300, batch=dict(examples=64), objective=[dict(name="bradley_terry")],
      aggregation=dict(kind="sequence_mean"),
      optimizer=dict(learning_rate=1e-3, b2=0.99, warmup_steps=10))
  return config
