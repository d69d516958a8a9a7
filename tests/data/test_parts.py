"""Answers in parts: labelled steps, critiques behind answers, and what templates write around them."""

import numpy as np
import pytest

from jaxrl import data
from jaxrl.batch import CRITIQUE, pack, unpack
from jaxrl.data import compared, Fields, PairBuilder, TaskBuilder
from tests.data.test_conversations import BLOCKS, CHATML, LLAMA3, tokenizer_of

CHARACTERS = data.CharacterTokenizer()


def builder(*, more=(), prompt="{question}", solution="{solution}", limit=0, on_bad_row="fail", **kwargs):
  fields = Fields(question="prompt", answer="", solution="", more=more)
  tasks = TaskBuilder(CHARACTERS, fields, prompt_template=prompt, solution_template=solution,
                      max_completion_tokens=limit, on_bad_row=on_bad_row)
  return PairBuilder(tasks, **kwargs)


def steps(**kwargs):
  return builder(**{**dict(chosen="completions", rejected="", step_labels="labels"), **kwargs})


STEPS = dict(prompt="1+2+3=", completions=["1+2 is 3", "3+3 is 7", "7"], labels=[True, False, None])


def text_of(tokens):
  return CHARACTERS.decode(tokens)


def test_steps_are_trained_on_where_they_end():
  row = dict(STEPS, labels=[True, 0.25, None])
  one, = compared(steps().to_comparison(row, "here"), CHARACTERS, group=3)
  assert text_of(one.tokens) == "1+2+3=1+2 is 3\n3+3 is 7\n7\n" and one.tokens[-1] == CHARACTERS.eos_id
  ends = np.flatnonzero(one.loss_mask)
  assert [text_of(one.tokens[:i + 1]) for i in ends] == ["1+2+3=1+2 is 3\n", "1+2+3=1+2 is 3\n3+3 is 7\n"]
  np.testing.assert_array_equal(one.signals["step_labels"][ends], [1.0, 0.25])
  assert one.signals["step_labels"].sum() == 1.25 and one.group == 3
  start = one.prompt_length
  assert text_of(one.tokens[:start]) == "1+2+3="
  assert one.tag_ids.tolist() == [0] * start + [1] * 9 + [2] * 9 + [3] * 2 + [0]
  back, = unpack(pack([one], together=True))
  np.testing.assert_array_equal(back.loss_mask, one.loss_mask)


def test_a_cut_answer_keeps_the_labels_of_whole_steps():
  built = steps(limit=14, on_bad_row="truncate")
  one, = compared(built.to_comparison(STEPS, "here"), CHARACTERS, group=0, max_completion_tokens=14)
  assert text_of(one.tokens) == "1+2+3=1+2 is 3\n3+3 i" and one.finish == "length"
  assert one.loss_mask.sum() == 1 and one.signals["step_labels"].sum() == 1.0


def test_answers_of_a_list_have_steps_each():
  row = dict(prompt="p", tries=[dict(completions=["a", "b"], labels=[1, 0]), dict(completions=["c"], labels=[0])])
  first, second = compared(steps(answers="tries").to_comparison(row, "here"), CHARACTERS, group=0)
  assert (first.loss_mask.sum(), second.loss_mask.sum()) == (2, 1)
  assert [t.columns["preference"] for t in (first, second)] == [0.5, 0.5]


def test_texts_are_cut_into_steps_as_they_were_written():
  assert data.split_steps("a\nb\n", "\n") == data.split_steps("a\n\nb", "\n") == ["a\n", "b\n"]
  assert data.split_steps("a\nb", "") == ["a\nb"] and data.split_steps(" ", "\n") == []


@pytest.mark.parametrize("row, message", [
    (dict(STEPS, labels=[1, 0]), "the same length"), (dict(STEPS, completions="1+2", labels=[1]), "two lists"),
    (dict(STEPS, completions=[], labels=[]), "the same length"), (dict(STEPS, labels=[1, 2, 0]), "holds 2"),
    (dict(STEPS, completions=["a", " ", "b"]), "a step is text"), (dict(STEPS, labels=None), "step_labels")])
def test_bad_steps_are_refused(row, message):
  with pytest.raises(data.BadRow, match=message):
    steps().to_comparison(row, "here")


@pytest.mark.parametrize("change", [dict(rejected="rejected"), dict(critique="why"), dict(solution="{solution}?")])
def test_steps_go_with_plain_answers_only(change):
  with pytest.raises(ValueError, match="step_labels='labels'"):
    steps(**change)


def test_a_critique_follows_the_answer_and_may_be_missing():
  row = dict(prompt="1+2=", chosen="3", rejected="4", chosen_critique="fine", rejected_critique=None)
  chosen, rejected = compared(builder(critique="critique").to_comparison(row, "here"), CHARACTERS, group=0)
  plain = compared(builder().to_comparison(row, "here"), CHARACTERS, group=0)
  np.testing.assert_array_equal(rejected.tokens, plain[1].tokens)
  length = len(plain[0].tokens)
  np.testing.assert_array_equal(chosen.tokens[:length], plain[0].tokens)
  np.testing.assert_array_equal(chosen.loss_mask[:length], plain[0].loss_mask)
  assert text_of(chosen.tokens[length:]) == "fine" and chosen.tokens[-1] == CHARACTERS.eos_id
  assert chosen.loss_mask[length:].all() and (chosen.tag_ids[length:] == CRITIQUE).all()
  assert not chosen.tag_ids[:length].any() and not rejected.tag_ids.any()
  pack([chosen, rejected], together=True)


def test_critiques_of_lists_stand_beside_their_answers():
  row = dict(prompt="p", tries=[dict(chosen="a", why="good"), dict(chosen="b"), dict(chosen="c", why="")])
  built = builder(rejected="", answers="tries", critique="why").to_comparison(row, "here")
  assert built.critiques == ("good", "", "")
  assert [(t.tag_ids == CRITIQUE).sum() for t in compared(built, CHARACTERS, group=0)] == [5, 0, 0]


def test_a_critique_has_the_limit_of_an_answer():
  row = dict(prompt="p", chosen="a", rejected="b", chosen_critique="far too long", rejected_critique="ok")
  with pytest.raises(data.BadRow, match="critique in field 'chosen_critique'.*has 13 tokens"):
    builder(critique="critique", limit=6).to_comparison(row, "here")
  built = builder(critique="critique", limit=6, on_bad_row="truncate")
  one, _ = compared(built.to_comparison(row, "here"), CHARACTERS, group=0, max_completion_tokens=6)
  assert text_of(one.tokens) == "pafar to"
  with pytest.raises(data.BadRow, match="to hold text, not a int"):
    builder(critique="critique").to_comparison(dict(row, chosen_critique=3), "here")


def test_templates_write_a_principle_behind_every_answer():
  row = dict(prompt="q", chosen="3", rejected="4", principle="short")
  built = builder(more=("principle",), solution="{solution} {principle}?").to_comparison(row, "here")
  assert built.answers == ("3 short?", "4 short?") and text_of(built.task.prompt) == "q"
  chosen, _ = compared(built, CHARACTERS, group=0)
  assert text_of(chosen.tokens) == "q3 short?"


def test_templates_write_a_reference_into_the_prompt():
  row = dict(prompt="q", chosen="3", rejected="4", reference="9")
  built = builder(more=("reference",), prompt="{question}{reference}|{question}").to_comparison(row, "here")
  assert text_of(built.task.prompt) == "q9|q" and built.answers == ("3", "4")


@pytest.mark.parametrize("template,end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (BLOCKS, "<|im_end|>")],
                         ids=["chatml", "llama3", "blocks"])
@pytest.mark.parametrize("chat", [True, False])
def test_in_chats_all_that_is_said_ends_as_a_turn_does(template, end, chat):
  tokenizer = tokenizer_of(template)
  tasks = TaskBuilder(tokenizer, Fields(question="prompt", answer="", solution="chosen"), chat=chat)
  end, written = end if chat else "</s>", tokenizer.written
  asked = (tokenizer.render_chat([dict(role="user", content="one?")], True) if chat else
           tokenizer.encode("one?"))
  row = dict(prompt="one?", chosen="three", rejected="yes", chosen_critique="brief", rejected_critique="",
             steps=["one", "two"], labels=[1, 0])

  imitated = data.supervised(tasks.to_task(row, "here", solved=True), tokenizer)
  built = PairBuilder(tasks, critique="critique").to_comparison(row, "here")
  chosen, rejected = compared(built, tokenizer, group=0)
  in_steps, = compared(PairBuilder(tasks, chosen="steps", rejected="", step_labels="labels").to_comparison(
      row, "here"), tokenizer, group=0)
  for trajectory, said in ((imitated, f"three{end}"), (chosen, f"three{end}brief{end}"),
                           (rejected, f"yes{end}"), (in_steps, f"one\ntwo\n{end}")):
    assert written(trajectory.tokens) == written(asked) + said
    assert trajectory.tokens[-1] in tasks.stop_ids  # where a sample would end
  assert (in_steps.tokens[in_steps.loss_mask] != in_steps.tokens[-1]).all()
  assert data.mismatched([built, built], tokenizer, group=0)[0].tokens[-1] == chosen.tokens[-1]
