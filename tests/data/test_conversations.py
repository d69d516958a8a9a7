"""What the assistant says in a conversation, to the token, for the templates that people use."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from jaxrl import data
from jaxrl.data import conversations, Fields, TaskBuilder

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|eot|>", "<|head|>", "<|/head|>",
           "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
          "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}")
GEMMA = ("<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
         "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
MISTRAL = ("<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
           "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}")
THINKING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
            "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
BLOCKS = CHATML.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}"))
ALWAYS = THINKING.replace(" and not loop.last", "")  # takes the thinking out of the last answer too
WITH_NEWLINE = BLOCKS.replace("<|im_end|>{% endgen", "<|im_end|>{{ '\\n' }}{% endgen").replace(
    "{% endif %}{{ '\\n' }}", "{{ '\\n' }}{% endif %}")
CONTENT_ONLY = BLOCKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# What comes before an answer is written otherwise when that is to be given, as by templates with `<think>`.
ALWAYS_IN_BLOCKS = BLOCKS.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
COLON = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}")
LATE_SYSTEM = ("<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
               "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last or loop.index == "
               "messages | length - 1 %}{{ system }}{% endif %}{{ m.content }}[/INST]"
               "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}")
ANSWERS = ["three :) naïve 🙂", "user: (no)", "yes\n\nand <b>more</b>"]
TALK = [dict(role="user", content="one and two?"), dict(role="assistant", content=ANSWERS[0]),
        dict(role="user", content="assistant"), dict(role="assistant", content=ANSWERS[1]),
        dict(role="user", content="sure? 🙂"), dict(role="assistant", content=ANSWERS[2])]
SYSTEM = [dict(role="system", content="be brief"), *TALK]


def tokenizer_of(template, eos="</s>", kind="bytes"):
  """A tiny tokenizer with a template: byte-level BPE, or one that puts a space in front of every text."""
  texts = ["one and two? three: (no) :) user assistant model system be brief yes sure"] * 5
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  if kind == "bytes":
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  else:
    model.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    model.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse()])
    alphabet = sorted({"▁", *"".join(texts + [message["content"] for message in SYSTEM])})
  model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=model, bos_token="<s>", eos_token=eos, clean_up_tokenization_spaces=False)
  fast.add_tokens(["</think>"])  # which is text
  fast.chat_template = template
  return data.PretrainedTokenizer(fast)


def runs(found):
  """The stretches of tokens that are marked."""
  edges = np.flatnonzero(np.diff([0, *map(int, found.said), 0]))
  return [found.tokens[a:b] for a, b in zip(edges[::2], edges[1::2])]


CASES = {
    "chatml": (CHATML, SYSTEM, "{}<|im_end|>"),
    "llama3": (LLAMA3, SYSTEM, "{}<|eot|>"),
    "gemma": (GEMMA, TALK, "{}<end_of_turn>"),
    "mistral": (MISTRAL, TALK, " {}</s>"),  # which writes a space that no generation prompt has
    "blocks": (BLOCKS, SYSTEM, "{}<|im_end|>"),
    "blocks_with_newline": (WITH_NEWLINE, SYSTEM, "{}<|im_end|>"),
    "blocks_without_end": (CONTENT_ONLY, SYSTEM, "{}<|im_end|>"),
    "colon": (COLON, SYSTEM, "{}</s>"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_what_is_marked_is_what_the_assistant_says_and_what_ends_its_turn(name, kind):
  template, talk, ending = CASES[name]
  tokenizer = tokenizer_of(template, kind=kind)
  found = conversations.conversation(tokenizer, talk)
  texts = [tokenizer.written(tokens) for tokens in runs(found)]
  expected = [ending.format(answer) for answer in ANSWERS]
  if kind == "spaces":  # whose tokens hold the space that the tokenizer puts in front of text
    texts, expected = [t.strip() for t in texts], [e.strip() for e in expected]
  assert texts == expected
  assert runs(found)[-1] == found.tokens[found.start:] and not found.rewritten
  whole = tokenizer.render_chat(talk, False)
  if name != "colon":
    assert whole[:len(found.tokens)] == found.tokens  # nothing but what follows the last turn is left out
  assert tokenizer.render_chat(talk[:-1], True) == found.tokens[:found.start]  # as it is asked for


def test_the_mask_is_that_of_transformers_where_the_template_has_blocks():
  tokenizer = tokenizer_of(BLOCKS)
  theirs = tokenizer.fast.apply_chat_template(SYSTEM, return_dict=True, return_assistant_tokens_mask=True)
  for template in (BLOCKS, CHATML):  # the same format with and without blocks
    found = conversations.conversation(tokenizer_of(template), SYSTEM)
    length = len(found.tokens)
    assert theirs["input_ids"][:length] == found.tokens
    assert [bool(x) for x in theirs["assistant_masks"]] == found.said + [False] * (
        len(theirs["input_ids"]) - length)


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_an_answer_right_behind_another_begins_where_it_is_asked_for(kind):
  tokenizer = tokenizer_of(MISTRAL, kind=kind)
  talk = [TALK[0], dict(role="assistant", content=ANSWERS[0]), dict(role="assistant", content=ANSWERS[2])]
  found = conversations.conversation(tokenizer, talk)
  assert found.tokens[:found.start] == tokenizer.render_chat(talk[:2], True)
  assert tokenizer.written(found.tokens[found.start:]).strip() == ANSWERS[2] + "</s>"
  assert len(runs(found)) == 1 and all(found.said[found.start:])


def test_of_several_templates_the_default_says_what_is_marked():
  """Its blocks hold the content alone, which a rendering would not tell."""
  tokenizer = tokenizer_of({"default": ALWAYS_IN_BLOCKS, "tool_use": CHATML})
  talk = [TALK[0], dict(role="assistant", content=ANSWERS[0])]
  found = conversations.conversation(tokenizer, talk)
  expected = conversations.conversation(tokenizer_of(ALWAYS_IN_BLOCKS), talk)
  assert found == expected and tokenizer.written(runs(found)[0]) == ANSWERS[0] + "<|im_end|>"


def test_a_token_over_the_edge_of_an_answer_is_cut_as_when_it_is_asked_for():
  tokenizer = tokenizer_of(COLON)
  talk = [TALK[0], dict(role="assistant", content=" (no)")]
  assert len(tokenizer.encode_chat("assistant: (no)")) < len(  # so there is such a token
      tokenizer.encode_chat("assistant:") + tokenizer.encode_chat(" (no)"))
  found = conversations.conversation(tokenizer, talk)
  assert found.tokens[:found.start] == tokenizer.render_chat(talk[:1], True)
  assert tokenizer.written(found.tokens[found.start:]) == " (no)</s>"


def test_an_earlier_answer_that_lost_its_thinking_is_history():
  tokenizer = tokenizer_of(THINKING)
  talk = [TALK[0], dict(role="assistant", content="<think>hm</think>three"), TALK[2],
          dict(role="assistant", content="<think>so</think>yes")]
  found = conversations.conversation(tokenizer, talk)
  assert [tokenizer.written(t) for t in runs(found)] == ["<think>so</think>yes<|im_end|>"]
  assert found.rewritten == (1,) and "assistant\nthree<|im_end|>" in tokenizer.written(found.tokens)
  alone = conversations.conversation(tokenizer, talk[:2])
  assert [tokenizer.written(t) for t in runs(alone)] == ["<think>hm</think>three<|im_end|>"]


BLOCKY = dict(whole=BLOCKS, newline=WITH_NEWLINE, content=CONTENT_ONLY)


@pytest.mark.parametrize("template", [CHATML, *BLOCKY.values()], ids=["none", *BLOCKY])
@pytest.mark.parametrize("answer", ["hm</think>", "three\n", "<|eot|>", ""])
def test_a_turn_ends_in_its_own_token_whatever_the_answer_ends_in(template, answer):
  tokenizer = tokenizer_of(template)
  talk = [TALK[0], dict(role="assistant", content=answer), *TALK[2:4]]
  found = conversations.conversation(tokenizer, talk)
  assert [tokenizer.written(t) for t in runs(found)] == [answer + "<|im_end|>", ANSWERS[1] + "<|im_end|>"]
  alone = conversations.conversation(tokenizer, talk[:2])
  assert tokenizer.written(alone.tokens[alone.start:]) == answer + "<|im_end|>"
  assert conversations.end_of_turn(tokenizer) == tokenizer.fast.convert_tokens_to_ids("<|im_end|>")


def test_a_turn_that_ends_otherwise_than_most_is_kept_so():
  end = "{{ '<|eot|>' if 'call' in m.content else '<|im_end|>' }}"
  template = BLOCKS.replace("<|im_end|>{% endgen", end + "{% endgen")
  tokenizer = tokenizer_of(template)
  talk = [TALK[0], dict(role="assistant", content="call"), *TALK[2:4]]
  found = conversations.conversation(tokenizer, talk)
  assert [tokenizer.written(t) for t in runs(found)] == ["call<|eot|>", ANSWERS[1] + "<|im_end|>"]


def test_no_turn_ends_in_text():
  tokenizer = tokenizer_of(WITH_NEWLINE.replace("<|im_end|>", ""))
  assert conversations.end_of_turn(tokenizer) is None


@pytest.mark.parametrize("template,talk,said", [
    (ALWAYS, [TALK[0], dict(role="assistant", content="<think>so</think> yes")],
     r"does not write all of message 1 \(assistant\).*'<think>so</think>yes' is missing"),
    (CONTENT_ONLY.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
     [TALK[0], dict(role="assistant", content="<think>so</think> yes")], r"all of message 1 \(assistant\)"),
    (PLAIN, TALK, r"behind message 1 \(assistant\), which begins with no special token.*write eos_token"),
    (LATE_SYSTEM, SYSTEM, r"does not write what comes before message 2 \(assistant\).*make a row of each "
     "answer"),
    (CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else 'secret' }}"), TALK,
     r"does not write message 1 \(assistant\) where its content stands.*generation"),
    (BLOCKS.replace("{{ m.content }}<|im_end|>{% end", "{% end"), TALK, "blocks of .* are empty"),
    (GEMMA, SYSTEM, "no system role"),
    (CHATML, TALK[:1], "ends in a message of the assistant"),
], ids=["thinking", "thinking_in_blocks", "no_end", "late_system", "content", "empty_blocks", "role",
        "question"])
def test_what_cannot_be_marked_is_refused_with_advice(template, talk, said):
  with pytest.raises(ValueError, match=said):
    conversations.conversation(tokenizer_of(template), talk)


# -------------------------------------------------------------- what the assistant says beside its content


WORDS = ("<|im_start|>{{ m.role }}\n"
         "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
         "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\\n' }}<call>{{ c.function | tojson }}{% endfor %}"
         "<|im_end|>\n")
TOOLS = CHATML.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", WORDS)
TOOLS_IN_BLOCKS = CHATML.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", (
    "{% if m.role == 'assistant' %}" + WORDS.replace("{{ m.role }}\n", "assistant\n{% generation %}").replace(
        "<|im_end|>", "<|im_end|>{% endgeneration %}") + "{% else %}" + WORDS + "{% endif %}"))
CALL = dict(type="function", function=dict(name="add", arguments=dict(a=1, b=[2, 0.5])))
CALLED = '\n<call>{"name": "add", "arguments": {"a": 1, "b": [2, 0.5]}}<|im_end|>'
AGENT = [TALK[0], dict(role="assistant", content=None, tool_calls=[CALL], reasoning_content=None),
         dict(role="tool", content="3.5", tool_call_id="7"),
         dict(role="assistant", content="three", reasoning_content="so", tool_calls=None)]


@pytest.mark.parametrize("template", [TOOLS, TOOLS_IN_BLOCKS], ids=["none", "blocks"])
def test_calls_of_tools_and_thoughts_are_learned_as_the_template_writes_them(template):
  made = builder(template)
  task = made.to_task({"messages": AGENT}, "a:1", solved=True)
  trajectory = data.supervised(task, made.tokenizer)
  written = made.tokenizer.written
  assert written(trajectory.tokens[trajectory.loss_mask]) == CALLED + "<think>so</think>three<|im_end|>"
  assert written(task.reply) == "<think>so</think>three<|im_end|>" and task.solution == "three"
  theirs = made.tokenizer.fast.apply_chat_template(AGENT, tokenize=False)
  assert written(trajectory.tokens) == theirs.rstrip("\n")
  assert task.prompt == made.to_task({"messages": AGENT}, "a:1").prompt
  alone = made.to_task({"messages": AGENT[:2]}, "a:1", solved=True)
  assert written(alone.reply) == CALLED and made.counts.as_dict() == {"ok": 3}


@pytest.mark.parametrize("template,field", [
    (CHATML, "tool_calls"), (BLOCKS, "tool_calls"),
    (TOOLS.replace("m.reasoning_content", "m.none"), "reasoning_content"),
    (TOOLS_IN_BLOCKS.replace("{% for c", "{% endgeneration %}{% for c", 1).replace(
        "<|im_end|>{% endgeneration %}", "<|im_end|>"), "tool_calls")],
    ids=["calls", "calls_with_blocks", "thoughts", "calls_behind_blocks"])
def test_what_the_template_does_not_write_is_named(template, field):
  talk = [TALK[0], dict(AGENT[1], content="ok") if field == "tool_calls" else AGENT[3]]
  with pytest.raises(data.BadRow, match=f"a:1: .* does not write '{field}' of message 1"):
    builder(template).to_task({"messages": talk}, "a:1", solved=True)
  harmless = [TALK[0], dict(role="assistant", content="ok", name=None, language="en")]
  assert builder(template).to_task({"messages": harmless}, "a:1", solved=True).solution == "ok"


def test_calls_that_a_template_cannot_write_are_refused():
  template = TOOLS.replace("{{ c.function | tojson }}",
                           "{% for key, value in c.function.arguments | items %}{% endfor %}")
  talk = [TALK[0], dict(AGENT[1], tool_calls=[dict(function=dict(name="add", arguments='{"a": 1}'))])]
  with pytest.raises(data.BadRow, match="a:1: the chat template refuses messages of roles"):
    builder(template).to_task({"messages": talk}, "a:1", solved=True)


# ------------------------------------------------------------------------------- from rows to examples


def builder(template, **settings):
  return TaskBuilder(tokenizer_of(template), Fields(messages="messages", answer=""), **settings)


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_supervised_tuning_is_on_the_assistants_tokens(name):
  template, talk, ending = CASES[name]
  made = builder(template)
  task = made.to_task({"messages": talk}, "a:1", solved=True)
  trajectory = data.supervised(task, made.tokenizer)
  marked = trajectory.tokens[trajectory.loss_mask]
  assert made.tokenizer.written(marked) == "".join(ending.format(answer) for answer in ANSWERS)
  assert trajectory.tokens.tolist() == task.prompt + task.reply and trajectory.finish == "stop"
  assert task.prompt == made.to_task({"messages": talk}, "a:1").prompt  # that of a rollout
  assert trajectory.tokens[-1] in made.stop_ids and made.tokenizer.eos_id in made.stop_ids


def test_a_question_in_a_user_message_is_answered_in_the_assistants():
  made = TaskBuilder(tokenizer_of(GEMMA), Fields(solution="solution"), chat=True,
                     prompt_template="Q {question}")
  task = made.to_task(dict(question="two?", answer="3", solution="three"), "a:1", solved=True)
  trajectory = data.supervised(task, made.tokenizer)
  assert made.tokenizer.written(trajectory.tokens) == (
      "<bos><start_of_turn>user\nQ two?<end_of_turn>\n<start_of_turn>model\nthree<end_of_turn>")
  assert made.tokenizer.written(trajectory.tokens[trajectory.loss_mask]) == "three<end_of_turn>"


def test_limits_hold_for_conversations():
  whole = builder(CHATML).to_task({"messages": TALK}, "a:1", solved=True)
  sizes = len(whole.prompt), len(whole.reply)
  fits = builder(CHATML, max_prompt_tokens=sizes[0], max_completion_tokens=sizes[1])
  assert fits.to_task({"messages": TALK}, "a:1", solved=True) == whole
  for limit in (dict(max_prompt_tokens=sizes[0] - 1), dict(max_completion_tokens=sizes[1] - 1)):
    with pytest.raises(data.BadRow, match="a:1: .* has .* tokens, more than"):
      builder(CHATML, **limit).to_task({"messages": TALK}, "a:1", solved=True)
  short = builder(CHATML, max_prompt_tokens=12, max_completion_tokens=5, on_bad_row="truncate")
  task = short.to_task({"messages": TALK}, "a:1", solved=True)
  cut = data.supervised(task, short.tokenizer, max_completion_tokens=5)
  full = data.supervised(whole, short.tokenizer)
  kept = slice(sizes[0] - 12, sizes[0] + 5)
  assert cut.tokens.tolist() == full.tokens[kept].tolist() and cut.finish == "length"
  assert cut.loss_mask.tolist() == [False, *full.loss_mask[kept][1:]]


def test_a_row_that_cannot_be_marked_is_named():
  made = builder(PLAIN)
  with pytest.raises(data.BadRow, match="talks.jsonl:3: the chat template of .* no special token"):
    made.to_task(json.loads(json.dumps({"messages": TALK})), "talks.jsonl:3", solved=True)
  assert made.to_task({"messages": TALK}, "talks.jsonl:3").reply == []  # which a rollout can do without
  assert made.stop_ids == (made.tokenizer.eos_id,)
  begins = [dict(role="assistant", content="hello"), *TALK]
  with pytest.raises(data.BadRow, match="a:1: the conversation begins with the assistant"):
    builder(CHATML).to_task({"messages": begins}, "a:1", solved=True)
  thinking = builder(THINKING)
  talk = [TALK[0], dict(role="assistant", content="<think>hm</think>three"), *TALK[2:4]]
  thinking.to_task({"messages": talk}, "a:1", solved=True)
  assert thinking.counts.as_dict() == {"ok": 1, "answer_rewritten": 1}
