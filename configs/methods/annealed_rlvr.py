"""Annealed-RLVR: a short imitation of hard questions at the worst moment (arXiv:2509.23629).

Adds to GRPO an edit (`rollouts.annealing.heat_once`), which finds the moment and swaps the batch for
right answers to hard questions, and a term (`objectives.imitate_marked`), which learns from them.
Reported: higher best@k than RLVR on 512 training problems, Minerva and AIME (R1-Distill-Qwen-1.5B); no
figure that was read. Small-scale check: tests/methods/test_annealed_rlvr.py.

Only the abstract and two digests were read. Choices made: the trigger's averages, knee and patience;
answers of the policy itself as targets; one optimiser throughout, whose moments stay; the learning
rate is not raised, as the moment is found on the way and steps of Adam do not grow with a loss. Of 8
samples a tenth is none, so questions are hard below a fifth. 512 problems, as in the paper, so that they
come again. The claims are tested on ways through one random graph, each node of which has as many edges:
the warm start has seen walks at random that came to their goal, of which reinforcement makes ways.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.data.task_size = 512
  config.rollout.edits = [dict(name="jaxrl.rollouts.annealing:heat_once", updates=30, examples=64,
                               at=-1, patience=10, hard_below=0.2)]
  config.objective = [*config.objective, dict(name="imitate_marked", coefficient=1.0)]
  return config


def get_evidence():
  late = dict(get_config().rollout.edits[0], at=150)
  graph = {f"data.{split}": "task:walks" for split in ("train", "validation", "test")}
  return dict(
      reported="higher best@k than RLVR (R1-Distill-Qwen-1.5B; no figures read)",
      warm={**graph, "data.task": dict(nodes=40, degree=4, longest=12), "rollout.max_tokens": 13,
            "tokenizer.alphabet": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN>:",
            "reward.criteria": [dict(name="jaxrl.tasks:oracle")], "sft.until.at_least": 0.15},
      arms=dict(
          grpo=dict(config="configs/grpo.py", overrides={"data.task_size": 512}),
          late=dict(overrides={"rollout.edits": [late]})),
      claims=[
          dict(text="more problems are solved within 8 samples", metric="test/pass_at_8",
               expect="higher", baseline="grpo"),
          dict(text="the moment matters: late heating does worse", metric="test/pass_at_8",
               expect="higher", baseline="late")])
