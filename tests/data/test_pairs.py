"""Pairs of answers, in every shape that they are published in."""

import os
import pathlib

import numpy as np
import pytest

from jaxrl import data
from jaxrl.batch import pack
from jaxrl.data import compared, Fields, PairBuilder, TaskBuilder

REAL = pathlib.Path(os.environ.get(
    "JAXRL_DATA", pathlib.Path(__file__).parents[2] / ".." / "shared" / "data"))
CHARACTERS = data.CharacterTokenizer()
TEXT = Fields(question="prompt", answer="", solution="")
CHAT = Fields(question="", answer="", solution="", messages="prompt")
TEMPLATE = ("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
ASK, RIGHT, WRONG = ({"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"},
                     {"role": "assistant", "content": "4"})
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def builder(fields=TEXT, tokenizer=CHARACTERS, turn="", preference="", **kwargs):
  return PairBuilder(TaskBuilder(tokenizer, fields, **kwargs), turn=turn, preference=preference)


@pytest.fixture(scope="module")
def chatty():
  tokenizer = data.train_bpe(["user: assistant: one and two;\n\nHuman Assistant"] * 5, 300)
  tokenizer.fast.chat_template = TEMPLATE
  return tokenizer


def test_prompt_and_two_texts():
  pair = builder().to_comparison({"prompt": "1+2=", "chosen": "3", "rejected": "44"}, "here")
  assert pair.answers == ("3", "44")
  chosen, rejected = compared(pair, CHARACTERS, group=5)
  assert CHARACTERS.decode(chosen.tokens[chosen.loss_mask][:-1]) == "3"
  assert CHARACTERS.decode(rejected.tokens[rejected.loss_mask][:-1]) == "44"
  assert chosen.tokens[-1] == rejected.tokens[-1] == CHARACTERS.eos_id
  np.testing.assert_array_equal(chosen.tokens[:chosen.prompt_length], pair.task.prompt)
  assert chosen.group == rejected.group == 5
  assert pack([chosen, rejected], together=True).columns["preference"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("row", [
    {"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]},
    {"prompt": [ASK], "chosen": [RIGHT], "rejected": [WRONG]},
    {"prompt": [ASK], "chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]}])
def test_conversations(row, chatty):
  pair = builder(CHAT, chatty).to_comparison(row, "here")
  assert pair.answers == ("3", "4")
  assert chatty.decode(pair.task.prompt) == "user:1+2;assistant:"


@pytest.fixture(scope="module")
def chatml():
  tokenizer = data.train_bpe(["user assistant one and two"] * 5, 300)
  tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
  tokenizer.fast.chat_template = (
      "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
  return data.PretrainedTokenizer(tokenizer.fast)  # which knows its special tokens


@pytest.mark.parametrize("fields,row", [
    (CHAT, {"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]}),
    (TEXT, {"prompt": "1+2", "chosen": "3", "rejected": "4"})], ids=["messages", "texts"])
def test_answers_in_a_chat_end_as_those_that_are_imitated_and_sampled(fields, row, chatml):
  made = builder(fields, chatml, chat=fields is TEXT)
  pair = made.to_comparison(row, "here")
  found = compared(pair, chatml, group=0) + data.mismatched([pair, pair], chatml, group=1)[:2]
  imitates = TaskBuilder(chatml, Fields(answer="", messages="messages"))
  for trajectory, answer in zip(found, [RIGHT, WRONG] * 2):
    asked = chatml.fast.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert chatml.written(trajectory.tokens) == asked + answer["content"] + "<|im_end|>"
    assert chatml.written(trajectory.tokens[trajectory.loss_mask]) == answer["content"] + "<|im_end|>"
    sft = data.supervised(imitates.to_task({"messages": [ASK, answer]}, "here", solved=True), chatml)
    np.testing.assert_array_equal(trajectory.tokens, sft.tokens)
    assert trajectory.tokens[-1] in made.tasks.stop_ids
  scored = made.tasks.parse({**row, "prompt": [ASK] if fields is CHAT else "1+2"}, "here", False, solution="4")
  assert scored.prompt + scored.reply == found[1].tokens.tolist()  # what a reward model reads
  assert made.tasks.counts.as_dict() == {"ok": 1}


def test_limits_and_templates_hold_for_answers_in_a_chat(chatml):
  row = {"prompt": "1+2", "chosen": "three", "rejected": "4"}
  length = len(chatml.encode("so three")) + 1
  fits = builder(tokenizer=chatml, chat=True, max_completion_tokens=length, solution_template="so {solution}")
  chosen, _ = compared(fits.to_comparison(row, "here"), chatml, group=0)
  assert chatml.written(chosen.tokens[chosen.loss_mask]) == "so three<|im_end|>"
  with pytest.raises(data.BadRow, match=f"'chosen', with EOS, has {length} tokens"):
    builder(tokenizer=chatml, chat=True, max_completion_tokens=length - 1,
            solution_template="so {solution}").to_comparison(row, "here")
  cut = builder(tokenizer=chatml, chat=True, max_prompt_tokens=4, on_bad_row="truncate")
  pair = cut.to_comparison(row, "here")
  assert len(pair.task.prompt) == 4 and cut.tasks.counts.as_dict() == {"ok": 1, "prompt_truncated": 1}


def test_calls_of_tools_are_not_compared(chatml):
  last = dict(RIGHT, tool_calls=[dict(function=dict(name="add"))])
  with pytest.raises(data.BadRow, match="'chosen' has 'tool_calls' beside its content"):
    builder(CHAT, chatml).to_comparison({"chosen": [ASK, last], "rejected": [ASK, WRONG]}, "here")


def test_transcripts_share_all_but_the_last_answer():
  start = f"{HUMAN} hi{ASSISTANT} hello{HUMAN} 1+2?{ASSISTANT}"
  pair = builder(turn=ASSISTANT).to_comparison(
      {"chosen": f"{start} It is 3.", "rejected": f"{start} It is 4."}, "here")
  assert pair.task.question == start
  assert pair.answers == (" It is 3.", " It is 4.")


@pytest.mark.parametrize("label, columns", [(0.75, [0.75, 0.25]), (0.5, [0.5, 0.5]), (0, [0, 1])])
def test_soft_labels_and_ties(label, columns):
  pair = builder(preference="p").to_comparison(
      {"prompt": "1+2=", "chosen": "3", "rejected": "4", "p": label}, "here")
  found = [t.columns["preference"] for t in compared(pair, CHARACTERS, group=0)]
  assert found == columns


OK = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


def test_lists_of_answers_and_single_ones_carry_their_own_labels():
  of_lists = PairBuilder(TaskBuilder(CHARACTERS, TEXT), chosen="text", rejected="", answers="answers",
                         columns=("rank",))
  found = of_lists.to_comparison({"prompt": "1+2=", "answers": [
      {"text": "4", "rank": 2}, {"text": "3", "rank": 1}, {"text": "x", "rank": 3}]}, "here")
  assert found.answers == ("4", "3", "x")
  assert [c["rank"] for c in found.columns] == [2, 1, 3]
  assert len({t.group for t in compared(found, CHARACTERS, group=4)}) == 1
  with pytest.raises(data.BadRow, match="list of mappings"):
    of_lists.to_comparison({"prompt": "1+2=", "answers": ["4"]}, "here")
  with pytest.raises(data.BadRow, match="answer 2 in field 'answers' is empty"):
    of_lists.to_comparison({"prompt": "1+2=", "answers": [
        {"text": "4", "rank": 2}, {"text": " ", "rank": 1}]}, "here")

  single = PairBuilder(TaskBuilder(CHARACTERS, TEXT), chosen="answer", rejected="", preference="good")
  found = single.to_comparison({"prompt": "1+2=", "answer": "3", "good": 0}, "here")
  assert found.answers == ("3",) and found.columns == ({"preference": 0.0},)
  with pytest.raises(data.BadRow, match="'answer' has to hold text"):
    single.to_comparison({"prompt": "1+2=", "answer": 3, "good": 0}, "here")


def test_mismatched_answers_are_those_of_the_next_prompt():
  one, two = (builder().to_comparison({"prompt": p, "chosen": c, "rejected": r}, "here")
              for p, c, r in (("1+2=", "3", "44"), ("5+5=", "10", "x")))
  found = data.mismatched([one, two], CHARACTERS, group=2)
  texts = [CHARACTERS.decode(t.tokens[t.tokens > 2]) for t in found]
  assert texts == ["1+2=10", "1+2=x", "5+5=3", "5+5=44"]
  assert [t.group for t in found] == [2, 3, 4, 5] and not any(t.scored for t in found)
  for t in found:
    np.testing.assert_array_equal(t.signals["mismatched"] > 0, t.loss_mask)


@pytest.mark.parametrize("row, options, reason, message", [
    ({"prompt": "1", "chosen": "3"}, {}, "missing_field", "'rejected', which data.rejected names, is missing"),
    (OK | {"chosen": None}, {}, "missing_field", "'chosen', which data.chosen names, is null"),
    (OK | {"chosen": " "}, {}, "empty", "field 'chosen' is empty"),
    (OK | {"rejected": "3"}, {}, "same_answers", "the same answer as"),
    (OK | {"rejected": ["4"]}, {}, "wrong_type", "str and list"),
    (OK | {"rejected": 4}, {}, "wrong_type", "str and int"),
    (OK | {"chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]}, {}, "wrong_type", "fields.messages"),
    (OK, dict(preference="p"), "missing_field", "field 'p'"),
    (OK | {"p": 1.5}, dict(preference="p"), "wrong_type", "1.5"),
    (OK | {"p": float("nan")}, dict(preference="p"), "wrong_type", "nan"),
    (OK | {"chosen": "33333"}, dict(max_completion_tokens=4), "completion_too_long", "has 6 tokens"),
    (OK | {"prompt": "1" * 9}, dict(max_prompt_tokens=4), "prompt_too_long", "more than"),
    (OK | {"chosen": "\u4e09"}, {}, "not_encodable", "field 'chosen'"),
    (OK, dict(turn=ASSISTANT), "no_shared_prompt", "share no beginning"),
    ({"chosen": f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT} d", "rejected": f"{HUMAN} a{ASSISTANT} e"},
     dict(turn=ASSISTANT), "no_shared_prompt", "field 'chosen' goes on"),
    (["3"], {}, "wrong_type", "a row is a mapping")])
def test_bad_rows_are_named(row, options, reason, message):
  with pytest.raises(data.BadRow, match=message) as refusal:
    builder(**options).to_comparison(row, "rows.jsonl:7")
  assert refusal.value.reason == reason and refusal.value.where == "rows.jsonl:7"
  skipping = builder(on_bad_row="skip", **options)
  assert skipping.to_comparison(row, "rows.jsonl:7") is None
  assert skipping.tasks.counts.as_dict() == {reason: 1}


@pytest.mark.parametrize("row, reason", [
    ({"chosen": [ASK, RIGHT], "rejected": [WRONG]}, "no_shared_prompt"),
    ({"prompt": [RIGHT, ASK], "chosen": [ASK, RIGHT], "rejected": [ASK, WRONG]}, "no_shared_prompt"),
    ({"chosen": [ASK], "rejected": [ASK, WRONG]}, "wrong_type"),
    ({"chosen": [], "rejected": [ASK, WRONG]}, "wrong_type"),
    ({"chosen": ["x"], "rejected": [WRONG]}, "wrong_type")])
def test_bad_conversations_are_named(row, reason, chatty):
  with pytest.raises(data.BadRow) as refusal:
    builder(CHAT, chatty).to_comparison(row, "rows.jsonl:7")
  assert refusal.value.reason == reason


def test_long_answers_are_cut_where_that_is_wanted():
  cutting = builder(max_completion_tokens=4, on_bad_row="truncate")
  pair = cutting.to_comparison(OK | {"chosen": "33333"}, "here")
  chosen, _ = compared(pair, CHARACTERS, group=0, max_completion_tokens=4)
  assert chosen.loss_mask.sum() == 4 and chosen.finish == "length"
  assert cutting.tasks.counts.as_dict() == {"completion_truncated": 1, "ok": 1}


@pytest.mark.parametrize("make", [
    lambda: PairBuilder(TaskBuilder(CHARACTERS, TEXT), chosen="x", rejected="x"),
    lambda: PairBuilder(TaskBuilder(CHARACTERS, TEXT), answers="xs"),
    lambda: builder(turn="x").__class__(TaskBuilder(CHARACTERS, TEXT), rejected="", turn="x"),
    lambda: builder(Fields(question="", answer="", solution=""), prompt_template="?", turn="x")])
def test_impossible_settings_are_refused(make):
  with pytest.raises(ValueError):
    make()


def test_real_transcripts():
  path = REAL / "hh-rlhf" / "harmless-base-test.jsonl.gz"
  if not path.exists():
    pytest.skip(f"{path} is not here")
  source = data.open_source(str(path))
  tokenizer = data.train_bpe([f"{source[i]['chosen']}" for i in range(200)], 400)
  pairs = builder(turn=ASSISTANT, tokenizer=tokenizer, on_bad_row="skip")
  found = [pairs.read(source, i) for i in range(len(source))]
  counts = pairs.tasks.counts.as_dict()
  assert counts["ok"] > 0.9 * len(source), counts
  for i, pair in enumerate(found):
    if pair is not None:
      assert pair.task.question + pair.answers[0] == source[i]["chosen"]
      assert pair.task.question + pair.answers[1] == source[i]["rejected"]
      assert pair.task.question.endswith(ASSISTANT)
