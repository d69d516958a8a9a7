"""compar:IA: an arena's votes, as a ranking of models and as a reward model (arXiv:2602.06669).

The arena is `jaxrl.evaluation.arena` (`jaxrl arena --votes=FILE --out=DIR`): Bradley-Terry by maximum
likelihood with ties and covariates, Elo, bootstrap intervals of score and rank, frugality. Votes, flags
and reactions are `jaxrl.data.votes`, with what turns them into pairs, unpaired answers and attributes.
This config trains on votes: Bradley-Terry, ties as soft labels of 0.5. Reported: 250,000 votes,
no figure of a model trained on them. Small-scale check: tests/methods/test_compar_ia.py.

The toy's users compare words (`tasks/votes.py`) and call small differences a tie; held-out pairs are
labelled by the gold reward. The paper leaves open which ranking its leaderboard shows: here the maximum
of the likelihood. Files of votes become such pairs by `config.data.transforms=[dict(name="votes")]`.
"""

from configs import rlhf_toy


def get_config():
  config = rlhf_toy.get_config("bradley_terry")
  config.data.train = config.data.validation = config.data.test = "task:votes"
  config.data.task, config.data.task_size = dict(ties="soft"), 2000
  config.data.held_out_task = dict(ties="drop", sharpness=1000.0)
  config.data.preference = "preference"
  config.model.heads_on_top = (("score", 1),)
  return config


def get_evidence():
  return dict(
      reported="250,000 votes; no figure of a model trained on them",
      warm=None,
      overrides={"evaluate.pairs": 1000, "evaluate.problems": 0, "evaluate.samples": 0},
      arms=dict(dropped=dict(overrides={"data.task.ties": "drop", "data.task_size": 1585}),
                coin=dict(overrides={"data.task.ties": "coin"})),
      claims=[
          dict(text="with ties as soft labels as many pairs are right as without the ties",
               metric="test/pairs/preference_accuracy", expect="not lower", margin=0.01,
               baseline="dropped"),
          dict(text="and more than if a coin decides ties", metric="test/pairs/preference_accuracy",
               expect="higher", baseline="coin")])
