"""VERL: a bounded bonus for the effective rank of hidden states and its growth (arXiv:2509.23808).

Adds one piece to GRPO's advantage, `advantages.favour_hidden_rank`, with the numbers of the release
script; its stride of 40 tokens and answers of 1536 become 1 and 8 here, the toy's answers being 4
or 5 tokens. The bonus reaches all tokens of an answer and the moving averages begin with the first
batch's means; the released code writes it at the last token (`where="last"`) and begins at 0
(`from_zero=True`). Hidden states are those of the last layer; `layer` takes others. Reported:
pass@1, mean of 15 maths sets 57.7 -> 59.8 (Qwen2.5-7B), 41.4 -> 43.4 (Llama-3.2-3B-Instruct), both
with GRPO. Small-scale check: tests/methods/test_verl_rank.py.

Left out are the script's terms for KL and entropy, 0.001 each. The row lacks the card's controls: a random
bonus, and one without a bound.
"""

from configs import grpo


def get_config():
  config = grpo.get_config()
  config.advantage.append(dict(name="favour_hidden_rank", stride=1, kappa=2.0, gain=2.0, update=0.3,
                               max_tokens=8))  # rollout.max_tokens
  return config


def get_evidence():
  return dict(
      reported="pass@1 of 15 maths sets 57.7 -> 59.8 with GRPO (Qwen2.5-7B)",
      claims=[
          dict(text="single samples are better", metric="test/sampled_accuracy", expect="higher",
               baseline="grpo"),
          dict(text="more problems are solved within 8 samples", metric="test/pass_at_8",
               expect="higher", baseline="grpo")])
