"""A reward model for dialogues, from scratch: which of two last answers did people prefer?

Trained on transcripts of anthropics/hh-rlhf, `{"chosen": "\\n\\nHuman: ...", "rejected": ...}`. Dialogues
that open with the same words are all in one split, chosen by a hash of that opening.

  jaxrl run --config=configs/reward_hh.py --workdir=runs/reward_hh \\
      --config.data.train=hh-rlhf/harmless-base-test.jsonl.gz
  jaxrl evaluate --model=runs/reward_hh
  jaxrl evaluate --model=runs/reward_hh --data=rm-bench/chat_filtered.json \\
      --prompt=$'\\n\\nHuman: {prompt}\\n\\nAssistant:' --answer=' {answer}'
"""

from configs import base

ASSISTANT = "\n\nAssistant:"


def get_config():
  config = base.get_config()
  config.data.update(
      train="hh-rlhf/harmless-base-test.jsonl.gz", question="prompt", answer="", solution="",
      turn=ASSISTANT, max_prompt_tokens=448, max_completion_tokens=256, on_bad_row="skip")
  for split in ("validation", "test"):  # the same file, whatever it is
    config.data[split] = config.data.get_oneway_ref("train")
  config.data.transforms = [
      dict(name="hold_out", by="chosen", up_to=ASSISTANT, validation=0.1, test=0.2)]
  config.tokenizer.update(kind="bpe", vocab_size=2048)

  config.model.update(layers=2, d_model=64, heads=4, kv_heads=4, d_ff=192,
                      heads_on_top=(("score", 1),))
  config.batch.update(examples=32, row_length=512)
  config.optimizer.update(learning_rate=5e-4, schedule="cosine", warmup_steps=10, b2=0.99,
                          weight_decay=0.1)
  config.evaluate.update(problems=0, pairs=1000, every=26)
  config.phases = ("reward_model",)
  config.reward_model = dict(
      kind="reward", steps=52, objective=[dict(name="bradley_terry", centre=0.01)],
      aggregation=dict(kind="sequence_mean"))
  return config
