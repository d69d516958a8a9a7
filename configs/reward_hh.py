"""A reward model for dialogues, from scratch: which of two last answers did people prefer?

Trained on transcripts of anthropics/hh-rlhf, `{"chosen": "\\n\\nHuman: ...", "rejected": ...}`. Dialogues
that open with the same words are all in one split, chosen by a hash of that opening.

  jaxrl run --config=configs/reward_hh.py --workdir=runs/reward_hh \\
      --config.data.train=hh-rlhf/harmless-base-test.jsonl.gz
  jaxrl evaluate --model=runs/reward_hh
  jaxrl evaluate --model=runs/reward_hh --data=rm-bench/chat_filtered.json \\
      --prompt=$'\\n\\nHuman: {prompt}\\n\\nAssistant:' --answer=' {answer}'
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
