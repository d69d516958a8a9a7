import itertools
import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxrl import data
from jaxrl import tasks
from jaxrl.batch import Task

few = settings(max_examples=25, deadline=None)
shapes = st.integers(1, 5).flatmap(
    lambda count: st.tuples(st.integers(count, 25), st.integers(0, count - 1), st.just(count)))


class Numbers:
  """Rows 0 .. n - 1."""

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, index):
    return {"n": index}

  def where(self, index):
    return f"numbers:{index}"


def pick(bad=()):
  return lambda source, index: (
      None if index in bad else Task(id=str(source[index]["n"]), prompt=[1]))


def stream(n, bad=(), seed=0, **kwargs):
  return data.tasks_pipeline(Numbers(n), pick(bad), seed=seed, **kwargs)


def take(iterator, count):
  return [int(task.id) for task in itertools.islice(iterator, count)]


@given(st.integers(1, 30), st.integers(0, 2 ** 32 - 1))
@few
def test_every_epoch_is_a_permutation_of_its_own(n, seed):
  epochs = [take(iterator := stream(n, seed=seed), n), take(iterator, n), take(iterator, n)]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  assert take(stream(n, seed=seed), 3 * n) == sum(epochs, [])
  if n >= 10:
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(n))


def test_seeds_give_other_orders_in_every_epoch():
  streams = [take(stream(20, seed=seed), 60) for seed in range(10)]
  assert len({tuple(s[i:i + 20]) for s in streams for i in (0, 20, 40)}) == 30


def test_without_shuffle_the_order_is_that_of_the_source():
  assert take(stream(4, shuffle=False), 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
  assert take(stream(7, shuffle=False, repeat=False, shard_index=1, shard_count=3), 99) == [1, 4]


@given(shapes, st.booleans())
@few
def test_shards_share_out_every_epoch(shape, shuffle):
  n, _, count = shape
  shards = [take(stream(n, shuffle=shuffle, repeat=False, shard_index=i, shard_count=count), 99)
            for i in range(count)]
  assert sorted(sum(shards, [])) == list(range(n))
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(shapes, st.booleans())
@few
def test_shards_in_turn_are_the_stream_of_one_reader(shape, shuffle):
  n, _, count = shape
  shards = [stream(n, shuffle=shuffle, shard_index=i, shard_count=count) for i in range(count)]
  turns = [take(shard, 1)[0] for _ in range(3 * n) for shard in shards]
  assert turns == take(stream(n, shuffle=shuffle), 3 * n * count)


@given(shapes, st.integers(0, 60), st.integers(0, 60), st.booleans(), st.data())
@few
def test_a_restored_stream_continues_identically(shape, consumed, elsewhere, repeat, draw):
  n, shard_index, count = shape
  bad = draw.draw(st.sets(st.integers(0, n - 1), max_size=(n - 1) // 2))
  make = lambda: stream(n, bad, repeat=repeat, shard_index=shard_index, shard_count=count)

  def some(iterator, number):
    try:
      return take(iterator, number)
    except ValueError:  # a shard without a good row
      return "none"

  first = make()
  some(first, consumed)
  state = json.loads(json.dumps(first.get_state()))
  again = make()
  some(again, elsewhere)
  again.set_state(state)
  assert again.get_state() == state
  assert some(again, 40) == some(first, 40)
  assert again.get_state() == first.get_state()


def test_a_state_is_not_changed_by_reading_on():
  iterator = stream(9)
  take(iterator, 4)
  state = iterator.get_state()
  before = json.dumps(state)
  following = take(iterator, 20)
  assert json.dumps(state) == before
  iterator.set_state(state)
  assert take(iterator, 20) == following


def test_skipped_rows_are_passed_over_lazily():
  asked = []

  def prepare(source, index):
    asked.append(index)
    return pick({0, 1, 3})(source, index)

  iterator = data.tasks_pipeline(Numbers(6), prepare, seed=0, shuffle=False)
  assert asked == []
  assert take(iterator, 1) == [2] and asked == [0, 1, 2]
  assert take(iterator, 4) == [4, 5, 2, 4]


@pytest.mark.parametrize("repeat", [True, False])
def test_an_epoch_without_a_good_row_is_an_error(repeat):
  with pytest.raises(ValueError, match="not one of .* rows was usable, numbers:0 among them"):
    next(stream(5, range(5), repeat=repeat))


@given(st.integers(1, 12), st.data())
@few
def test_one_good_row_is_enough(n, draw):
  good = draw.draw(st.integers(0, n - 1))
  assert take(stream(n, set(range(n)) - {good}), 10) == [good] * 10


def test_an_error_in_a_row_stops_the_stream_with_its_own_words(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": 3}\n')
  source = data.open_source(str(tmp_path / "a.jsonl"))
  builder = data.TaskBuilder(data.CharacterTokenizer())
  iterator = data.tasks_pipeline(source, builder.read, seed=0, shuffle=False)
  assert next(iterator).answer == "2"
  with pytest.raises(data.BadRow, match=r"a\.jsonl:2: field 'question' holds"):
    next(iterator)


@pytest.mark.parametrize("change", [dict(seed=1), dict(shuffle=False), dict(n=11),
                                    dict(shard_index=1), dict(shard_count=3)])
def test_a_state_of_another_stream_is_refused(change):
  kwargs = dict(n=10, seed=0, shuffle=True, shard_index=0, shard_count=2)
  state = stream(**kwargs).get_state()
  with pytest.raises(ValueError, match="cannot continue reading from numbers:0"):
    stream(**(kwargs | change)).set_state(state)


@pytest.mark.parametrize("change,said", [
    (dict(seed=-1), "seed=-1"), (dict(seed=2 ** 32), "use 0 to 2"),
    (dict(shard_index=2, shard_count=2), "shard_index=2 of shard_count=2: use 0 to 1"),
    (dict(shard_index=-1), "shard_index=-1"), (dict(shard_count=6), "5 rows cannot be shared out"),
])
def test_impossible_streams_are_refused(change, said):
  with pytest.raises(ValueError, match=said):
    stream(5, **change)


def test_toy_tasks_stream():
  source = tasks.open_task("addition", split="train", size=1_000_000, seed=0)
  builder = data.TaskBuilder(data.CharacterTokenizer("0123456789+="),
                             fields=data.Fields(id="id", solution="solution"))
  iterator = data.tasks_pipeline(source, builder.read_solved, seed=0)
  seen = [next(iterator) for _ in range(50)]
  assert len({task.id for task in seen}) == 50
  assert all(task.row["a"] + task.row["b"] == int(task.solution) for task in seen)
