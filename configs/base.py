"""Every setting there is, with its default: the parent of all other configs.

Sections hold for every phase; a phase (`config.phases` names them in order) is a section of its own
that may lay any of these over again. README explains the system; docstrings explain the pieces.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.phases = ()
  config.start = ""  # workdir of a run whose last parameters and tokenizer this one begins with

  # Where problems come from: "task:NAME" (a built-in toy task, its knobs in data.task), a path
  # (JSONL, .jsonl.gz, Parquet; several by comma or glob; a part of it as "rows.jsonl[500:]") or
  # "tfds:NAME:SPLIT". Validation problems are for evaluations on the way, test for those around
  # phases; an empty name leaves them out.
  config.data = dict(
      train="", validation="", test="",
      task=dict(), task_size=1_000_000,  # knobs, and problems in the train split of a toy task
      held_out_task=dict(),  # knobs that differ in validation and test, such as longer problems
      question="question", answer="answer", solution="solution", id="",  # field names
      messages="",  # field with chat messages, instead of question; or
      chat=False,  # wrap the prompt in a user message of the tokenizer's chat template
      more=(),  # other fields, which templates use under their own names
      prompt_template="{question}", solution_template="{solution}",  # of {question}, {answer}, ...
      answer_pattern="",  # regex with one group that picks the answer out of its field
      remove_pattern="",  # regex of what is cut out of solutions
      chosen="chosen", rejected="rejected",  # fields of pairs of answers: texts or conversations
      preference="",  # field with the probability that `chosen` is better; "" is 1
      columns=(),  # fields with more numbers of a pair, such as margins, which losses read
      answers="",  # of rows that list any number of answers; set rejected="" for those
      critique="",  # ending of fields with texts about answers, see data.PairBuilder; "" is none
      step_labels="", step_end="\n",  # field with labels of the steps that `chosen` lists, what ends each
      turn="", other_turn="\n\nHuman:",  # of transcripts that share their prompt, see data.PairBuilder
      weaker="",  # field with the row of a pair whose preference is not as strong, see pairs_of_pairs
      transforms=[],  # what is done to rows before anything reads them: pieces of jaxrl.data.transforms
      max_prompt_tokens=256, max_completion_tokens=256,  # of the data; 0 is no limit
      on_bad_row="fail",  # fail | skip | truncate (what is too long)
  )
  config.tokenizer = dict(
      kind="character",  # character | bpe (trained on data.train) | pretrained (from path, or that of
      # model.source, which is also what an untouched `character` becomes)
      alphabet="",  # of character; "" is printable ASCII
      vocab_size=2048,  # of bpe
      path="",
      date="")  # YYYY-MM-DD, where the chat template writes one; "" is the day on which the run begins,
  # or that of config.start; tokenizer/chat_date.txt keeps it

  config.model = dict(  # see models.DecoderConfig
      source="",  # directory or hub id of a published model: sets shape and dialect, first parameters
      vocab_size=0,  # 0 is the tokenizer's; more leaves unused ids at its end
      layers=4, d_model=128, heads=4, kv_heads=2, head_dim=0, d_ff=384,
      layer_types=("full",), sliding_window=0,
      rope_theta=10_000.0, rope_scaling=(), rope_local_theta=0.0, rope_fraction=1.0, rope_length=0,
      norm="rms", norm_epsilon=1e-6, norm_offset=False, pre_norms=True, post_norms=False,
      parallel_residual=False, qk_norm=False, qk_norm_across_heads=False,
      qkv_bias=False, output_bias=False, mlp_bias=False, query_scale=0.0, activation="silu", gated_mlp=True,
      mlp_types=("dense",), experts=0, experts_per_token=0, expert_d_ff=0, normalise_experts=False,
      tie_embeddings=True, scale_embeddings=False, attention_soft_cap=0.0, logit_soft_cap=0.0,
      attention="xla", scan_layers=False, remat="none",
      heads_on_top=(), critic=False,  # ("value", 1) is a value head on the policy; critic a model
      score_bias=True,  # of those heads, the value aside
      verdict=(),  # two texts of one token, ("yes", "no"): their log-odds are a score of answers
      adapters=dict(),  # trained instead of all else but heads and critic, by name, as dict(default=
      # dict(rank=8, alpha=16, targets="attention|mlp", layers=(), rank_stabilized=False)), or
      # dict(source=DIR) of PEFT's format, which says all of these; see models.adapters
      dtype="float32", param_dtype="float32")
  config.mesh = dict(
      data=-1, fsdp=1, tensor=1,  # -1: all devices that are left
      sampling=dict(data=0, fsdp=1, tensor=1))  # devices that only sample, see rollout.staleness
  config.compilation_cache = ""  # directory; "" is one of the user's own, "off" is none

  # Numbers of the settings below that change over the updates of a phase, see jaxrl.schedule, such as
  # [dict(of="rollout.temperature", schedule="linear", start=1.2, end=0.8, steps=200)].
  config.schedules = []
  config.optimizer = dict(
      name="adamw",  # adamw | lion | adafactor | sgd (whose momentum is b1)
      learning_rate=1e-3, schedule="constant", warmup_steps=0,  # constant | linear | cosine
      final_fraction=0.1,  # of the learning rate, at the end of a linear or cosine schedule
      b1=0.9, b2=0.95, epsilon=1e-8,
      weight_decay=0.0,  # of matrices, with adamw and lion
      clip_norm=1.0,  # largest global norm of a gradient; 0 is off
      adapters=(),  # those of model.adapters that are trained; () is all
      master_dtype="",  # "float32" adds up the steps of bfloat16 parameters (model.param_dtype) in a copy of
      # them, with moments of float32; without one, steps below 1/512 of a weight are lost
      moments_dtype="",  # "bfloat16" for the first moment of adamw, whose second stays, and the one of lion;
      # adafactor has none of the first and a factored second; optax has no optimiser of 8 bits
      offload=False,  # keep the optimiser's state in host memory between updates; scripts/bench/memory.py
      # measures all of these
      transforms=[],  # of gradients and updates: pieces of jaxrl.transforms
      max_bad_steps=10)  # updates in a row with a non-finite gradient before the run stops
  config.batch = dict(
      examples=64,  # per update: sequences of supervised phases, pairs of others
      # Tokens per packed row; longer sequences raise it, and pairs by up to a quarter if they then fill
      # rows better.
      row_length=128,
      micro_batch_rows=0,  # per forward and backward pass; 0 is as many as suit cache or memory
      share_prompts=True,  # compute the prompt of a group once, where that saves a tenth or more
      # Rollouts are laid out anew where the lengths of a batch show that it saves more than it costs to compile.
      fit_layout=True,
      vocabulary_chunk=0)  # tokens of it whose logits exist at a time; 0: 1024 on a CPU, else 8192

  config.rollout = dict(
      prompts=16, episode=dict(name="group", samples=8),  # tasks per batch, what is done on each
      temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,  # 0, 1 and 0 are off
      max_tokens=64, stop_strings=(),  # where a sample ends, beside EOS; in evaluations too
      stop_ids=(),  # likewise, tokens; with model.source, () is what its generation_config.json says
      templates=dict(),  # texts with {placeholders} for ctx.render
      updates=1,  # optimiser updates on each batch of rollouts
      edits=(),  # what is done to a batch of scored trajectories before it is packed
      staleness=0,  # batches that are sampled ahead, with older parameters; 0 is on-policy
      filter_zero_variance=False,  # replace groups of equal rewards, drawing at most
      max_resample=2,  # times again
      filter_by="",  # criterion whose scores are to differ instead
      max_rows=1024,  # sampled together on the device
      weights_dtype="", cache_dtype="",  # float32 | bfloat16 | int8, for sampling; "" is the model's
      max_failure_rate=0.1,  # of episodes, before the run stops
      max_logprob_gap=0.05)  # between sampler and trainer at the first update of a phase
  config.reward = dict(
      criteria=[dict(name="exact_match")], aggregate=dict(name="weighted_sum"),
      workers=0,  # processes that judge; with 0 nothing stops a criterion that hangs
      timeout=5.0,  # seconds for a criterion on a sample
      max_failure_rate=0.1)  # of samples that cannot be judged, before the run stops
  config.advantage = [dict(name="center_by_group"), dict(name="scale_by_group_std")]
  config.objective = [dict(name="clipped_surrogate", low=0.2, high=0.2)]
  config.aggregation = dict(
      kind="token_mean",  # token_mean | sequence_mean | sequence_sum | constant
      constant=0.0)  # tokens that kind="constant" divides by; a term may have its own aggregation
  config.reference = dict(
      every=0,  # updates after which the reference follows the policy; 0 is never
      decay=0.0,  # share of itself that it keeps then: 0 is a copy, 0.99 a moving average
      follows="policy",  # or a model of config.frozen
      lag=False,  # follow the policy as it was before the update
      adapted=True,  # False begins with the trained adapters switched off: as the base
      source="")  # workdir of another run, whose last policy, of any shape, is meant instead
  config.frozen = dict()  # more such models by name, as dict(average=dict(every=1, decay=0.99)), whose
  # signals (`average_logprobs`) a piece reads; see training.frozen

  config.evaluate = dict(
      problems=256,  # of validation, and of test
      pairs=256,  # likewise, in phases that compare answers
      samples=8, temperature=1.0, k=8,  # per problem, for sampled accuracy and pass@k; 0 is none
      correct="",  # criterion that decides what is correct; "" is the first
      episode=dict(),  # whose last trajectory is the answer; without a name, the plain question
      every=0)  # also evaluate greedily on validation problems every so many updates; 0 is never
  config.checkpoint = dict(every=100, keep=2)  # updates between checkpoints; 0 is only phase ends
  config.log = dict(samples_every=50, curves_every=100)  # updates; 0 is never
  return config
