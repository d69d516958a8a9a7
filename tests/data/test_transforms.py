"""What is done to rows: by their index and the seed alone, as the config says."""

import collections
import itertools
import json

import numpy as np
import pytest

from jaxrl import tasks
from jaxrl.data import BadRow, transforms
from jaxrl.training import inputs


class Rows(list):
  """A list as a source; rows stand at `list:index`."""

  def where(self, index):
    return f"list:{index}"


def pairs(count=60, kinds=3):
  return Rows(dict(question=f"q{i}", chosen=f"good{i}", rejected=f"bad{i}", criterion=f"k{i % kinds}")
              for i in range(count))


SHOW = dict(template="{question}:{first}{sign}{second};", start="#")


def shown(row):
  """Index, and whether the better answer comes first, of every demonstration in a row."""
  text = row["demonstrations"].removeprefix("#").removesuffix(";")
  found = []
  for one in text.split(";") if text else ():
    question, answers = one.split(":")
    index = int(question[1:])
    forward = answers == f"good{index}>bad{index}"
    assert forward or answers == f"bad{index}<good{index}"
    found.append((index, forward))
  return found


def test_demonstrations_are_other_rows_of_the_same_kind():
  source = transforms.demonstrations(pairs(), seed=3, k=5, **SHOW)
  counts, flips = collections.Counter(), []
  for index in range(60):
    row = source[index]
    found = shown(row)
    assert row["question"] == f"q{index}" and row["evidence"] == 1 + len(found)
    assert all(i % 3 == index % 3 and i != index for i, _ in found)
    assert len({i for i, _ in found}) == len(found)
    counts[len(found)] += 1
    flips += [forward for _, forward in found]
  assert set(counts) == set(range(6)) and 0.3 < np.mean(flips) < 0.7
  assert source.where(7) == "list:7" and len(source) == 60


def test_every_number_and_every_other_row_is_equally_likely():
  source = pairs(4, kinds=1)
  drawn = collections.Counter()
  for seed in range(600):
    drawn[tuple(i for i, _ in shown(transforms.demonstrations(source, seed=seed, k=2, **SHOW)[0]))] += 1
  expected = {(): 200} | {(i,): 200 / 3 for i in (1, 2, 3)} | {
      pair: 200 / 6 for pair in itertools.permutations((1, 2, 3), 2)}
  assert set(drawn) == set(expected)
  assert sum((drawn[k] - v) ** 2 / v for k, v in expected.items()) < 27.9  # chi-square, 9 degrees, p = 0.001


def test_a_row_depends_on_index_and_seed_alone():
  make = lambda seed: transforms.demonstrations(pairs(), seed=seed, k=4, **SHOW)
  first, again, other = make(0), make(0), make(1)
  order = np.random.default_rng(0).permutation(60)
  assert [again[int(i)] for i in order] == [first[int(i)] for i in order]
  assert [first[i]["demonstrations"] for i in range(60)] != [other[i]["demonstrations"] for i in range(60)]
  assert json.loads(json.dumps(first[0])) == first[0]


def test_rows_that_show_nothing_demonstrate_nothing():
  rows = pairs(6, kinds=1)
  rows[1] = dict(rows[1], rejected=" ")
  rows[2].pop("question")
  rows[3] = dict(rows[3], criterion="alone")
  source = transforms.demonstrations(rows, seed=0, k=9, fewest=2, **SHOW)
  assert {i for i, _ in shown(source[0])} == {4, 5} and {i for i, _ in shown(source[1])} <= {0, 4, 5}
  assert shown(source[3]) == [] and source[3]["evidence"] == 1


@pytest.mark.parametrize("change, message", [
    (dict(k=-1), "0 <= fewest <= k"), (dict(fewest=3), "0 <= fewest <= k"), (dict(start="\n"), "blank"),
    (dict(signs=("<", "<")), "two different"), (dict(by="mood"), "no row has text in 'mood'"),
    (dict(template="{quest}"), "did you mean 'question'")])
def test_impossible_demonstrations_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    transforms.demonstrations(pairs(), seed=0, **{**SHOW, "k": 2, **change})


POOL = dict(question="q", answers=[dict(policy=p, text=t) for p, t in
                                   (("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "4"), ("c", "5"))])


@pytest.mark.parametrize("independent", [False, True])
def test_pairs_of_a_pool_are_drawn_as_the_paper_draws_them(independent):
  """Against an enumeration of all draws; those whose candidates are equal are drawn again."""
  own = dict(a=["1", "2", "3"], b=["1", "4"], c=["5"])
  expected = collections.Counter()
  for a, b in itertools.product("ab", "abc"):
    for reference, chosen in itertools.permutations(range(len(own[a])), 2):
      others = [i for i in range(len(own[b])) if a != b or i not in (reference, chosen)]
      for other in others if independent or a != b else ():
        triple = own[a][reference], own[a][chosen], own[b][other]
        if triple[1] != triple[2]:
          expected[triple] += 1 / (len(own[a]) * (len(own[a]) - 1) * len(others))
  total, n = sum(expected.values()), 3000
  source = transforms.policy_pairs(Rows([POOL] * n), seed=0, independent=independent)
  drawn = collections.Counter()
  for index in range(n):
    row = source[index]
    drawn[row["reference"], row["chosen"], row["rejected"]] += 1
  assert set(drawn) == set(expected)
  chi = sum((drawn[k] - n * v / total) ** 2 / (n * v / total) for k, v in expected.items())
  assert chi < len(expected) + 4 * (2 * len(expected)) ** 0.5


def test_ranked_triples_are_in_the_order_of_their_ranks():
  answers = [dict(text=str(10 * rank + i), rank=rank) for rank in (4, 1, 3, 2) for i in range(2)]
  source = transforms.ranked_triples(Rows([dict(question="q", answers=answers)] * 300), seed=0)
  triples = [[int(source[i][name]) // 10 for name in ("reference", "chosen", "rejected")]
             for i in range(300)]
  assert all(a < b < c for a, b, c in triples)
  assert {tuple(t) for t in triples} == set(itertools.combinations((1, 2, 3, 4), 3))


@pytest.mark.parametrize("answers, message", [
    ([dict(policy="a", text="1"), dict(policy="b", text="2")], "two answers of one policy"),
    ([dict(policy="a", text="1"), dict(policy="a", text="2")], "two answers of one policy"),
    ([dict(policy="a")], "text in 'text'"), ("1", "a list of mappings")])
def test_rows_without_a_pair_are_bad(answers, message):
  source = transforms.policy_pairs(Rows([dict(question="q", answers=answers)]), seed=0)
  with pytest.raises(BadRow, match=message):
    source[0]
  with pytest.raises(BadRow, match="three ranks|a list of mappings|text in"):
    transforms.ranked_triples(Rows([dict(question="q", answers=answers)]), seed=0)[0]


@pytest.fixture
def config():
  from configs import base
  config = base.get_config()
  config.data.update(train="task:tastes", test="task:tastes", task_size=50)
  config.evaluate.pairs = 20
  config.data.transforms = [
      dict(name="demonstrations", k=3, fewest=3, splits=("test",), template="{first}{sign}{second}"),
      dict(name="demonstrations", k=1, fewest=1, splits=("train",), template="{first}{sign}{second}")]
  return config


def test_a_config_says_which_splits_are_transformed(config):
  opened = {split: inputs.open_split(config, split) for split in inputs.SPLITS}
  assert opened["validation"] is None
  assert {opened["train"][i]["evidence"] for i in range(50)} == {2}
  assert {opened["test"][i]["evidence"] for i in range(20)} == {4}
  plain = tasks.open_task("tastes", split="train", size=50, seed=0)
  assert all(opened["train"][i].items() >= plain[i].items() for i in range(50))
  config.seed = 1
  assert inputs.open_split(config, "test")[0] == opened["test"][0]  # other training data, the same test


@pytest.mark.parametrize("spec, message", [
    (dict(name="demonstration", k=1), r"transforms\[0\].*did you mean 'demonstrations'"),
    (dict(name="demonstrations", kk=1), "no argument 'kk'; did you mean 'k'"),
    (dict(name="demonstrations", k=1, splits=("trial",)), "splits"),
    (dict(name="demonstrations", k=1, splits="test"), "splits"),
    (dict(name="demonstrations", k=1, by="mood"), "config.data.train='task:tastes': demonstrations: no row")])
def test_impossible_transforms_are_refused(config, spec, message):
  config.data.transforms = [spec]
  with pytest.raises(ValueError, match=message):
    inputs.open_split(config, "train")
