import dataclasses
import os
import pathlib
import re
import threading

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl import data
from jaxrl import tasks
from jaxrl.batch import Task
from jaxrl.data import Fields
from jaxrl.data import TaskBuilder

REAL = pathlib.Path(os.environ.get(
    "JAXRL_DATA", pathlib.Path(__file__).parents[2] / ".." / "shared" / "data"))
CHARACTERS = data.CharacterTokenizer()
ROW = {"question": "1+2=", "answer": "so\n#### 3", "solution": "<<1+2=3>>3", "n": 7,
       "level": "hard"}
CHAT = ("{% for m in messages %}<|bos|>{{ m.role }}:{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}<|bos|>assistant:{% endif %}")


@pytest.fixture(scope="module")
def chatty():
  tokenizer = data.train_bpe(["user assistant system what is one and two"] * 5, 300)
  tokenizer.fast.chat_template = CHAT
  return tokenizer


class NoBos(data.CharacterTokenizer):
  bos_id = None


def builder(**kwargs):
  kwargs.setdefault("tokenizer", CHARACTERS)
  kwargs.setdefault("fields", Fields(solution="solution"))
  return TaskBuilder(**kwargs)


class Rows(list):
  def where(self, index):
    return f"data.jsonl:{index + 1}"


# ------------------------------------------------------------------------------------- good rows


def test_a_row_becomes_a_task():
  made = builder(prompt_template="Q: {question}\nA:", solution_template="{solution}!",
                 answer_pattern=r"####\s*(.+)$", remove_pattern=r"<<.*?>>")
  task = made.to_task(ROW, "data.jsonl:5")
  prompt = [CHARACTERS.bos_id, *CHARACTERS.encode("Q: 1+2=\nA:")]
  assert task == Task(id="data.jsonl:5", prompt=prompt, question="1+2=", answer="3", solution="3!",
                      row=ROW)
  assert made.counts.as_dict() == {"ok": 1}


def test_a_tokenizer_without_bos_gets_none():
  assert builder(tokenizer=NoBos()).to_task(ROW, "a:1").prompt == CHARACTERS.encode("1+2=")


@pytest.mark.parametrize("value,text", [(18, "18"), (-2.5, "-2.5"), (0, "0"), (" 7 ", "7"),
                                        (10 ** 400, "1" + "0" * 400)])
def test_answers_and_ids_may_be_numbers(value, text):
  task = builder(fields=Fields(id="answer")).to_task({"question": "q", "answer": value}, "a:1")
  assert task.answer == text and task.id.strip() == text


def test_without_a_solution_field_the_answer_field_is_imitated_whole():
  task = builder(fields=Fields(), answer_pattern=r"####\s*(.+)$").to_task(ROW, "a:1", solved=True)
  assert task.answer == "3" and task.solution == "so\n#### 3"


def test_the_last_match_is_the_answer():
  row = {"question": "q", "answer": "#### 1, no: #### 2"}
  assert builder(fields=Fields(), answer_pattern=r"#### (\d)").to_task(row, "a:1").answer == "2"


def test_templates_use_more_fields_and_take_values_as_they_are():
  made = builder(fields=Fields(more=("n", "level")), prompt_template="{{{n}}} {level}: {question}")
  task = made.to_task({**ROW, "question": "{answer} {x} {{"}, "a:1")
  assert CHARACTERS.decode(task.prompt) == "{7} hard: {answer} {x} {{"


def test_a_missing_solution_only_matters_where_it_is_used():
  row = {"question": "q", "answer": "a"}
  assert builder().to_task(row, "a:1").solution == ""
  assert builder(solution_template="{answer}").to_task(row, "a:1", solved=True).solution == "a"
  for kwargs, solved in (({}, True), (dict(prompt_template="{question}{solution}"), False)):
    with pytest.raises(data.BadRow, match="'solution', which data.solution names, is missing"):
      builder(**kwargs).to_task(row, "a:1", solved=solved)


@given(st.text(st.sampled_from(CHARACTERS.alphabet)).filter(str.strip),
       st.text(st.sampled_from(CHARACTERS.alphabet)).filter(str.strip))
@settings(max_examples=25, deadline=None)
def test_supervised_examples_train_on_the_solution_and_its_eos(question, solution):
  row = {"question": question, "answer": "a", "solution": solution}
  task = builder().to_task(row, "a:1", solved=True)
  example = data.supervised(task, CHARACTERS)
  ids = [CHARACTERS.bos_id, *CHARACTERS.encode(question), *CHARACTERS.encode(solution),
         CHARACTERS.eos_id]
  assert example.tokens.tolist() == ids and example.prompt_length == 1 + len(question)
  assert example.loss_mask.tolist() == [False] * (1 + len(question)) + [True] * (len(solution) + 1)
  assert (example.text, example.finish, example.task_id) == (solution, "stop", "a:1")


def test_toy_tasks_pass_through():
  source = tasks.open_task("countdown", split="train", size=20, seed=0)
  made = builder(fields=Fields(solution="solution", id="id"))
  for index in range(20):
    task = made.read_solved(source, index)
    example = data.supervised(task, CHARACTERS)
    assert task.id == f"countdown-train-0-{index}" and tasks.oracle(task, example)


# ------------------------------------------------------------------------------------------ chat


def test_a_question_is_wrapped_in_a_user_message(chatty):
  made = builder(tokenizer=chatty, chat=True, prompt_template="what is {question}")
  task = made.to_task(ROW, "a:1")
  assert task.prompt == chatty.render_chat([{"role": "user", "content": "what is 1+2="}], True)
  assert task.prompt[0] == chatty.bos_id != task.prompt[1]


def test_a_final_assistant_message_is_the_solution(chatty):
  said = [dict(role="system", content="be"), dict(role="user", content="one"),
          dict(role="assistant", content="two"), dict(role="user", content="and"),
          dict(role="assistant", content="is")]
  made = builder(tokenizer=chatty, fields=Fields(messages="chat", answer=""))
  task = made.to_task({"chat": said}, "a:1", solved=True)
  assert task.prompt == chatty.render_chat(said[:-1], True)
  assert (task.question, task.solution, task.answer) == ("and", "is", "")
  task = made.to_task({"chat": said[:-1]}, "a:1")
  assert task.prompt == chatty.render_chat(said[:-1], True) and task.solution == ""


@pytest.mark.parametrize("said,reason,text", [
    (None, "missing_field", "'chat', which data.messages names, is null"),
    ("hello", "wrong_type", "holds a value of type str"),
    (["hello"], "wrong_type", "list of objects with role and content"),
    ([], "empty", "no message to answer"),
    ([dict(role="assistant", content="x")], "empty", "no message to answer"),
    ([dict(role="user", content="")], "empty", r"chat\[0\]: field 'content' is empty"),
    ([dict(role="user", content="x"), dict(role="user")], "missing_field",
     r"chat\[1\]: field 'content', which data.messages names, is missing"),
    ([dict(role="user", content=["x"])], "wrong_type", r"chat\[0\]: field 'content'"),
    ([dict(role=3, content="x")], "wrong_type", r"chat\[0\]: field 'role'"),
])
def test_bad_messages_are_named(chatty, said, reason, text):
  made = builder(tokenizer=chatty, fields=Fields(messages="chat", answer=""))
  with pytest.raises(data.BadRow, match=text) as caught:
    made.to_task({"chat": said}, "data.jsonl:9")
  assert caught.value.reason == reason and str(caught.value).startswith("data.jsonl:9: ")


# -------------------------------------------------------------------------------------- bad rows


BAD_ROWS = [
    ({"questoin": "q", "answer": "a"}, "missing_field", "is missing; did you mean 'questoin'"),
    ({}, "missing_field", "is missing; valid are none"),
    ({"question": None, "answer": "a"}, "missing_field", "names, is null"),
    ({"question": 3, "answer": "a"}, "wrong_type", "'question' holds a value of type int"),
    ({"question": ["q"], "answer": "a"}, "wrong_type", "type list, but data.question needs text"),
    ({"question": {"q": 1}, "answer": "a"}, "wrong_type", "type dict"),
    ({"question": b"q", "answer": "a"}, "wrong_type", "type bytes"),
    ({"question": "q", "answer": True}, "wrong_type", "holds the bool True"),
    ({"question": "q", "answer": float("nan")}, "wrong_type", "holds the float nan"),
    ({"question": "q", "answer": float("inf")}, "wrong_type", "needs text or a finite number"),
    ({"question": "q", "answer": 10 ** 5000}, "wrong_type", "4300 digits"),
    ({"question": "q", "answer": [1]}, "wrong_type", "type list"),
    ({"question": "", "answer": "a"}, "empty", "'question' is empty"),
    ({"question": " \n", "answer": "a"}, "empty", "'question' is empty"),
    ({"question": "q", "answer": ""}, "empty", "'answer' is empty"),
    ({"question": "q\x00", "answer": "a", "solution": "s"}, "not_encodable",
     r"prompt: character '\\x00' \(U\+0000\)"),
    ({"question": "q☕", "answer": "a", "solution": "s"}, "not_encodable", "'☕'"),
    (["question"], "wrong_type", "a row is a mapping, but this is a list"),
    ("question", "wrong_type", "this is a str"),
    ({"question": "q", "answer": "☕", "solution": "☕"}, "not_encodable", "solution': character"),
    ({"question": "q", "answer": "a", "solution": " "}, "empty", "'solution' is empty"),
    ({"question": "q", "answer": "a", "solution": 3}, "wrong_type", "data.solution needs text"),
    ({"question": "q" * 50, "answer": "a", "solution": "s"}, "prompt_too_long",
     "the prompt from field 'question' has 51 tokens, more than max_prompt_tokens=20"),
    ({"question": "q", "answer": "a", "solution": "s" * 9}, "completion_too_long",
     "field 'solution', with EOS, has 10 tokens, more than max_completion_tokens=9"),
]
LIMITS = dict(max_prompt_tokens=20, max_completion_tokens=9)


@pytest.mark.parametrize("row,reason,said", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_named_with_their_remedy(row, reason, said):
  made = builder(**LIMITS)
  with pytest.raises(data.BadRow, match=said) as caught:
    made.to_task(row, "data.jsonl:12", solved=True)
  assert str(caught.value).startswith("data.jsonl:12: ") and "'skip'" in str(caught.value)
  assert caught.value.reason == reason and made.counts.as_dict() == {reason: 1}


@pytest.mark.parametrize("row,reason,said", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_skipped_and_counted(row, reason, said):
  made = builder(on_bad_row="skip", **LIMITS)
  good = {"question": "q", "answer": "a", "solution": "s"}
  read = [made.read_solved(Rows([good, row, good]), i) for i in range(3)]
  assert read[1] is None and read[0].id == "data.jsonl:1" and read[2].id == "data.jsonl:3"
  assert made.counts.as_dict() == {"ok": 2, reason: 1}


@pytest.mark.parametrize("row,reason,said", BAD_ROWS[:-2], ids=range(len(BAD_ROWS) - 2))
def test_truncation_does_not_mend_what_is_not_too_long(row, reason, said):
  with pytest.raises(data.BadRow, match="'truncate' cannot mend this, 'skip' drops such rows"):
    builder(on_bad_row="truncate", **LIMITS).to_task(row, "a:1", solved=True)


def test_an_answer_that_the_pattern_does_not_find_is_named():
  for text in ("the answer is 3", "####  ", "##"):
    with pytest.raises(data.BadRow, match="finds no answer in field 'answer'") as caught:
      builder(answer_pattern=r"####\s*(.*)$").to_task({"question": "q", "answer": text}, "a:7")
    assert caught.value.reason == "no_answer"


def test_an_unreadable_row_follows_the_policy_too(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n{\n')
  source = data.open_source(str(tmp_path / "a.jsonl"))
  skipping = builder(on_bad_row="skip")
  assert skipping.read(source, 0).answer == "a" and skipping.read(source, 1) is None
  assert skipping.counts.as_dict() == {"ok": 1, "unreadable": 1}
  with pytest.raises(data.BadRow, match=r"a\.jsonl:2: not valid JSON"):
    builder().read(source, 1)


@given(st.integers(1, 12), st.integers(1, 30), st.booleans())
@settings(max_examples=25, deadline=None)
def test_cut_prompts_keep_bos_and_their_end(limit, length, bos):
  text = "".join(CHARACTERS.alphabet[1 + i] for i in range(length))
  made = builder(tokenizer=CHARACTERS if bos else NoBos(), max_prompt_tokens=limit,
                 on_bad_row="truncate")
  prompt = made.to_task({"question": text, "answer": "a"}, "a:1").prompt
  whole = [1] * bos + CHARACTERS.encode(text)
  assert len(prompt) == min(limit, len(whole)) and prompt[:bos] == [1] * bos
  assert prompt[bos:] == whole[len(whole) - len(prompt) + bos:]
  cut = len(whole) > limit
  assert made.counts.as_dict() == {"ok": 1} | ({"prompt_truncated": 1} if cut else {})


@given(st.integers(1, 12), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_cut_solutions_keep_their_start_and_lose_eos(limit, length):
  text = "".join(CHARACTERS.alphabet[1 + i] for i in range(length))
  made = builder(max_completion_tokens=limit, on_bad_row="truncate")
  task = made.to_task({"question": "q", "answer": "a", "solution": text}, "a:1", solved=True)
  example = data.supervised(task, CHARACTERS, max_completion_tokens=limit)
  cut = length + 1 > limit
  expected = [1, *CHARACTERS.encode("q"), *(CHARACTERS.encode(text) + [2])[:limit]]
  assert example.tokens.tolist() == expected and example.loss_mask.sum() == len(expected) - 2
  assert (example.finish, example.text) == (("length", text[:limit]) if cut else ("stop", text))
  assert made.counts.as_dict() == {"ok": 1} | ({"completion_truncated": 1} if cut else {})


def test_an_empty_prompt_needs_a_bos():
  fields = Fields(question="", answer="text")
  row = {"text": "once"}
  made = builder(fields=fields, prompt_template="")
  assert made.to_task(row, "a:1").prompt == [1]
  with pytest.raises(data.BadRow, match="no BOS to start with"):
    builder(tokenizer=NoBos(), fields=fields, prompt_template="").to_task(row, "a:1")


# ---------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize("settings_,said", [
    (dict(prompt_template="{qestion}"), "placeholder {qestion}; did you mean 'question'"),
    (dict(prompt_template="{question.__class__}"), "placeholder {question.__class__}"),
    (dict(prompt_template="{question[0]}"), "placeholder"),
    (dict(prompt_template="{question!r}"), "placeholder"),
    (dict(prompt_template="{question:>9}"), "placeholder"),
    (dict(prompt_template="{}"), "placeholder"),
    (dict(prompt_template="{question"), "a brace that is meant literally is written twice"),
    (dict(prompt_template="}"), "written twice"),
    (dict(prompt_template="{level}"), "fields.more"),
    (dict(solution_template="{answr}"), "did you mean 'answer'"),
    (dict(fields=Fields(answer=""), solution_template="{answer}"), "placeholder {answer}"),
    (dict(fields=Fields(answer=""), answer_pattern="(x)"), "has no field to look in"),
    (dict(fields=Fields(question="")), "there is nothing to ask"),
    (dict(fields=Fields(more=("answer",))), "fields.more names ['answer']"),
    (dict(fields=Fields(messages="m"), prompt_template="Q {question}"), "does nothing"),
    (dict(answer_pattern="("), "is not a regular expression"),
    (dict(answer_pattern="x"), "has 0 groups: use exactly 1"),
    (dict(answer_pattern="(x)(y)"), "has 2 groups"),
    (dict(remove_pattern="["), "remove_pattern='[' is not a regular expression"),
    (dict(on_bad_row="skp"), "on_bad_row='skp'; did you mean 'skip'"),
    (dict(max_prompt_tokens=-1), "max_prompt_tokens=-1"),
    (dict(chat=True), "no chat template"),
    (dict(fields=Fields(messages="m")), "no chat template"),
])
def test_impossible_settings_are_refused_before_any_row(settings_, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    builder(**settings_)


def test_a_template_with_a_special_token_is_refused(chatty):
  with pytest.raises(ValueError, match=r"spells out the special token '<\|bos\|>'"):
    builder(tokenizer=chatty, prompt_template="<|bos|>{question}")


def test_counts_survive_threads():
  counts = data.RowCounts()
  threads = [threading.Thread(target=lambda: [counts.add("ok") for _ in range(2000)])
             for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert counts.as_dict() == {"ok": 16000}


# ------------------------------------------------------------------------------------ real files


@pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="GSM8K is not here")
def test_gsm8k_questions_and_answers():
  source = data.open_source(str(REAL / "gsm8k" / "test.jsonl"))
  tokenizer = data.train_bpe((source[i]["question"] for i in range(200)), 600)
  made = TaskBuilder(tokenizer, prompt_template="{question}\n", answer_pattern=r"####\s*(.+)$",
                     remove_pattern=r"<<.*?>>")
  for index in range(len(source)):
    task = made.read_solved(source, index)
    float(task.answer.replace(",", ""))
    example = data.supervised(task, tokenizer)
    completion = tokenizer.decode(example.tokens[example.loss_mask])
    assert completion == task.solution and completion.endswith(f"#### {task.answer}")
    assert "<<" not in completion and ">>" not in completion
    assert tokenizer.decode(task.prompt) == source[index]["question"] + "\n"
  assert made.counts.as_dict() == {"ok": 1319}


@pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="GSM8K is not here")
def test_gsm8k_long_questions_are_named_by_line():
  source = data.open_source(str(REAL / "gsm8k" / "test.jsonl"))
  made = dataclasses.replace(builder(fields=Fields()), tokenizer=data.train_bpe([], 259),
                             max_prompt_tokens=400, on_bad_row="skip", counts=data.RowCounts())
  kept = [i for i in range(len(source)) if made.read(source, i)]
  short = [i for i in range(len(source)) if len(source[i]["question"].encode()) + 1 <= 400]
  assert kept == short
  assert made.counts.as_dict() == {"ok": len(short), "prompt_too_long": len(source) - len(short)}


def test_masks_are_numpy():
  example = data.supervised(Task(id="a", prompt=[1, 5], solution="x"), CHARACTERS)
  assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool
