import inspect
import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxrl import tasks
from jaxrl.batch import Task
from jaxrl.batch import Trajectory
from jaxrl.tasks.dataset import TASKS

SPLITS = ("train", "validation", "test")
SMALL = dict(running_sum=dict(), addition=dict(digits=2), brackets=dict(longest=7), copying=dict(longest=2),
             countdown=dict(largest=9, numbers=3), modular_arithmetic=dict(modulus=13),
             corrected_addition=dict(digits=2), scratchpad_addition=dict(longest=2),
             preferred_addition=dict(digits=2), sorting=dict(longest=3, largest=12), transitions=dict(digits=2),
             repeated_addition=dict(digits=2), series=dict(digits=3))
names = st.sampled_from(sorted(TASKS))
# In others a solution is what somebody would write, be it good or not.
RIGHT = sorted(set(TASKS) - {"cues", "endings", "leanings", "letters", "votes"})


def opened(name, split="train", size=50, seed=0, **knobs):
  return tasks.open_task(name, split=split, size=size, seed=seed, **knobs)


@given(names, st.sampled_from(SPLITS), st.integers(0, 2 ** 31), st.data())
@settings(max_examples=25, deadline=None)
def test_a_row_depends_on_its_index_alone(name, split, seed, data):
  first, again = opened(name, split, seed=seed), opened(name, split, size=10, seed=seed)
  order = data.draw(st.permutations(range(10)))
  assert [again[i] for i in order] == [first[i] for i in order]
  row = first[order[0]]
  assert row["task"] == name and row["id"].endswith(f"-{order[0]}")
  assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("name", sorted(TASKS))
def test_splits_share_no_problem_whatever_the_seed(name):
  keys = {split: set() for split in SPLITS}
  for seed, split in enumerate(SPLITS):
    data = opened(name, split, size=200, seed=seed, **SMALL.get(name, {}))
    keys[split] |= {TASKS[name].key(data[i]) for i in range(len(data))}
  assert all(len(k) > 5 for k in keys.values())
  assert not keys["train"] & keys["test"]
  assert not keys["train"] & keys["validation"]
  assert not keys["validation"] & keys["test"]


def test_one_problem_in_ten_is_held_out_for_each_purpose():
  keys = {s: set() for s in SPLITS}
  for split in SPLITS:
    data = opened("addition", split, size=1500, digits=1)
    keys[split] = {tuple(sorted((data[i]["a"], data[i]["b"]))) for i in range(len(data))}
  assert set.union(*keys.values()) == {(a, b) for a in range(10) for b in range(a, 10)}
  assert sum(map(len, keys.values())) == 55
  assert 1 <= len(keys["test"]) <= 14 and 1 <= len(keys["validation"]) <= 14


@pytest.mark.parametrize("name", sorted(TASKS))
def test_seeds_give_other_rows(name):
  first, second = (opened(name, seed=seed) for seed in (0, 1))
  assert [first[i]["solution"] for i in range(50)] != [second[i]["solution"] for i in range(50)]


@pytest.mark.parametrize("name", RIGHT)
def test_the_oracle_takes_the_solution_and_refuses_that_of_another_problem(name):
  data = opened(name)
  right = wrong = 0
  for i in range(50):
    row = data[i]
    task = Task(id=row["id"], prompt=[1], answer=row["answer"], row=row)
    say = lambda text: tasks.oracle(task, Trajectory(tokens=[1], loss_mask=[False], text=text))
    assert say(row["solution"])
    other = data[(i + 1) % 50]
    wrong += not say(other["solution"])
    right += other["answer"] == row["answer"]
    for nonsense in ("", " ", row["solution"] + "1", row["question"], "\x00", "x" * 10 ** 5,
                     "9" * 10 ** 5, "²", "٣", "\ud800", "1e9", "None"):
      assert not say(nonsense), nonsense
  assert wrong >= 50 - right - 3 and wrong > 25


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_knob_has_a_default_and_a_type(name):
  parameters = list(inspect.signature(TASKS[name].sample).parameters.values())[1:]
  assert parameters and all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty
                            and p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize("name,knobs,said", [
    ("additon", {}, "did you mean 'addition'"),
    ("addition", dict(digts=2), "did you mean 'digits'"),
    ("addition", dict(digits=0), "digits=0: use an integer from 1 to 18"),
    ("addition", dict(digits=2.5), "digits=2.5"),
    ("addition", dict(digits=True), "digits=True"),
    ("addition", dict(answer_format="backwards"), "use 'plain' or 'reversed'"),
    ("brackets", dict(kinds=5), "kinds=5"),
    ("brackets", dict(shortest=9, longest=3), "shortest=9: use an integer from 1 to 3"),
    ("copying", dict(alphabet="a b"), "alphabet='a b'"),
    ("copying", dict(alphabet=""), "alphabet=''"),
    ("countdown", dict(numbers=1), "numbers=1"),
    ("countdown", dict(numbers=2, largest=9999, target=1), "raise target"),
    ("modular_arithmetic", dict(operators="+/"), "operators='+/'"),
    ("modular_arithmetic", dict(modulus=1), "modulus=1"),
    ("noisy_addition", dict(slips=2.0), "slips=2.0: use a share"),
    ("sorting", dict(longest=0), "longest=0"),
    ("walks", dict(nodes=9), "nodes=9: use an even number"),
    ("copying", dict(longest=1, alphabet="a"), "no problem of the test split"),
])
def test_bad_names_and_knobs_are_refused_when_opened(name, knobs, said):
  with pytest.raises(ValueError, match=said.replace("(", "\\(").replace("+", "\\+")):
    opened(name, "test", **knobs)


def test_bad_splits_and_sizes_are_refused():
  with pytest.raises(ValueError, match="did you mean 'train'"):
    opened("addition", "trian")
  for kwargs in (dict(size=0), dict(seed=-1)):
    with pytest.raises(ValueError, match="size >= 1 and seed >= 0"):
      opened("addition", **kwargs)


def test_rows_end_where_the_size_says():
  data = opened("addition", size=7)
  assert len(data) == len(list(data)) == 7 and data.where(3) == "addition/train:3"
  for index in (7, -1):
    with pytest.raises(IndexError):
      data[index]


def test_the_oracle_names_tasks_that_it_does_not_know():
  with pytest.raises(ValueError, match="'gsm8k-3' is not a toy task"):
    tasks.oracle(Task(id="gsm8k-3", prompt=[1]), Trajectory(tokens=[1], loss_mask=[False]))
