"""A reward model for dialogues, from scratch: which of two last answers did people prefer?

Trained on transcripts of anthropics/hh-rlhf, `{"chosen": "\\n\\nHuman: ...", "rejected": ...}`. Dialogues
that open with the same words are all in one split, chosen by a hash of that opening.

  jaxrl run --config=configs/reward_hh.py --workdir=runs/reward_hh \\
      --config.data.train=hh-rlhf/harmless-base-test.jsonl.gz
  jaxrl evaluate --model=runs/reward_hh
  jaxrl evaluate --model=runs/reward_hh --data=rm-bench/chat_filtered.json \\
      --prompt=$'\\n\\nHuman: {prompt}\\n\\nAssistant:' --answer=' {answer}'

Measured (seed 0, 430 held-out pairs of harmless-base's test file; a minute and a half on 2 cores): 58.8% of
pairs right (95% interval 54.4 to 63.0%; chance 50%, length alone 55.7% in its better direction), calibration
error 0.069, Brier 0.245. Scores fall with length here (correlation -0.51), and it is right about 74.6% of pairs
whose better answer is shorter, 39.0% of the others. It is no judge of other dialogues: on RM-Bench's chat
questions 47.7% (44.4 to 51.1%; easy 75.5, normal 50.1, hard 17.6, as it there prefers long answers, of which
62.5% are beyond what it was trained on and cut), on its `safety-response` questions 39.1% (36.5 to 41.8%).
"""

from configs import reward_gsm8k

ASSISTANT = "\n\nAssistant:"


def get_config():
  config = reward_gsm8k.get_config()
  config.data.update(
      train="hh-rlhf/harmless-base-test.jsonl.gz", question="prompt", prompt_template="{question}",
      turn=ASSISTANT, max_prompt_tokens=448)
  config.data.transforms = [
      dict(name="hold_out", by="chosen", up_to=ASSISTANT, validation=0.1, test=0.2)]
  config.tokenizer.vocab_size = 2048
  return config
