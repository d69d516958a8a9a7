"""A reward model for worked answers, from scratch: which solution of a GSM8K question is right?

Trained on pairs of a right and a wrong solution of one question, out of a file in which several models'
solutions are labelled (`example_model_solutions.jsonl` of openai/grade-school-math; its questions are
GSM8K's test split, so nothing trained here may be tested on that). A tenth of the questions, chosen by
their hash, is for validation and a fifth for the test; none of them is trained on.

  jaxrl run --config=configs/reward_gsm8k.py --workdir=runs/reward_gsm8k --config.data.train=FILE
  jaxrl evaluate --model=runs/reward_gsm8k        # the held-out questions: pairs, calibration, best of n

Measured (seed 0, 276 held-out questions, 466 pairs; a minute and a half on 2 cores): 52.8% of pairs right
(95% interval over questions 46.8 to 58.9%; chance 50%, length alone 50.1% in its better direction),
calibration error 0.017, Brier 0.247, and 37.1% right answers by best of 4, against 34.9% of a random one (an
oracle: 63.3%). So from 1,700 pairs it learns next to nothing that holds for other questions, and what it says
is as uncertain as that. This is the second recipe: a model of twice the width at twice the learning rate had
all training pairs of a batch right after 80 updates, and 49.8% of the validation pairs, by which the recipe
was chosen. A linear model on counts of tokens got 54 to 57% of those right, so there is something to be
learned that this one does not find.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.data.update(
      train="gsm8k/example_model_solutions.jsonl", question="question", answer="", solution="",
      prompt_template="{question}\n", max_prompt_tokens=256, max_completion_tokens=256,
      on_bad_row="skip")
  for split in ("validation", "test"):  # the same file, whatever it is
    config.data[split] = config.data.get_oneway_ref("train")
  config.data.transforms = [
      dict(name="hold_out", by="question", validation=0.1, test=0.2),
      dict(name="labelled_solutions", remove=r"<<[^>]*>>"),  # calculator marks
      dict(name="pair_answers")]
  config.tokenizer.update(kind="bpe", vocab_size=1024)

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
