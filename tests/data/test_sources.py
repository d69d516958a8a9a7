import gzip
import json
import os
import pathlib
import sys

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl import data
from jaxrl.data import sources

ROWS = [{"question": f"q{i} é☕", "answer": i, "deep": {"x": [{"y": None}, {"y": 1.5}]}}
        for i in range(7)]
REAL = pathlib.Path(os.environ.get(
    "JAXRL_DATA", pathlib.Path(__file__).parents[2] / ".." / "shared" / "data"))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.text() | st.floats(
        allow_nan=False), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.text(), inner, max_size=3), max_leaves=6)


def write(path, text, zipped=False):
  raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
  path.write_bytes(gzip.compress(raw) if zipped else raw)
  return str(path)


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=6),
       st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n \n"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_json_lines_come_back(tmp_path_factory, rows, zipped, ascii_only, end, last_end):
  path = tmp_path_factory.getbasetemp() / ("any.jsonl.gz" if zipped else "any.jsonl")
  text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
  try:
    text.encode()
  except UnicodeEncodeError:
    text = end.join(json.dumps(row) for row in rows)
  source = data.open_source(write(path, text + end * last_end, zipped))
  assert [source[i] for i in reversed(range(len(source)))] == rows[::-1]
  step = end.count("\n")
  assert source.where(len(rows) - 1) == f"{path}:{1 + step * (len(rows) - 1)}"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
  source = data.open_source(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode()))
  assert source[0] == ROWS[0]


BAD_LINES = ["{", "[1, 2]", "3", "null", '"text"', '{"a": 1} {"b": 2}', "{'a': 1}", "\x00", "no",
             '{"a": ' + "9" * 5000 + "}", '{"a":' * 100_000, b'{"a": "\xff"}']


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, bad, zipped):
  bad = bad if isinstance(bad, bytes) else bad.encode()
  path = write(tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl"),
               lines(ROWS[:2]).encode() + b"\n" + bad + b"\n" + lines(ROWS[2:]).encode(), zipped)
  source = data.open_source(path)
  with pytest.raises(data.BadRow) as caught:
    source[2]
  assert str(caught.value).startswith(f"{path}:4: ") and caught.value.reason == "unreadable"
  assert len(source) == 8 and [source[i] for i in (0, 1, 3, 7)] == [ROWS[i] for i in (0, 1, 2, 6)]


def test_parquet_rows_come_back(tmp_path):
  path = str(tmp_path / "a.parquet")
  rows = [dict(row, raw=b"bytes", messages=[{"role": "user", "content": "x"}]) for row in ROWS]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
  source = data.open_source(path)
  assert [source[i] for i in (6, 0, 3)] == [dict(rows[i], raw="bytes") for i in (6, 0, 3)]
  assert len(source) == 7 and source.where(3) == f"{path}:3"


def test_several_files_are_read_in_order(tmp_path):
  for name, part in (("b1", ROWS[2:4]), ("b2", []), ("b3", ROWS[4:6])):
    write(tmp_path / f"{name}.jsonl", lines(part))
  first = write(tmp_path / "z.jsonl.gz", lines(ROWS[:2]), zipped=True)
  last = str(tmp_path / "last.parquet")
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[6:]), last)
  source = data.open_source(f"{first}, {tmp_path}/b*.jsonl ,{last}")
  assert list(source) == ROWS and len(source) == 7
  assert [source.where(i) for i in (1, 2, 4, 6)] == [
      f"{first}:2", f"{tmp_path}/b1.jsonl:1", f"{tmp_path}/b3.jsonl:1", f"{last}:0"]


def test_names_with_commas_and_brackets_are_files_first(tmp_path):
  path = write(tmp_path / "a,b[1]*.jsonl", lines(ROWS))
  assert list(data.open_source(path)) == ROWS


def test_a_json_list_names_the_line_of_each_object(tmp_path):
  path = write(tmp_path / "a.json", json.dumps(ROWS, indent=2, ensure_ascii=False))
  source = data.open_source(path)
  assert list(source) == ROWS
  text = (tmp_path / "a.json").read_text().splitlines()
  for i, row in enumerate(ROWS):
    line = int(source.where(i).removeprefix(f"{path}:"))
    assert text[line - 1].strip() == "{" and f"q{i} " in text[line]
  mixed = data.open_source(write(tmp_path / "b.json", " [\n{\"a\": []},\n\n 7]\n"))
  assert mixed[0] == {"a": []} and mixed.where(1).endswith(":4")
  with pytest.raises(data.BadRow, match="b.json:4: a row is a JSON object.*int"):
    mixed[1]


def test_indices_out_of_range_are_refused(tmp_path):
  path = write(tmp_path / "a.jsonl", lines(ROWS))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(tmp_path / "a.parquet"))
  for source in (data.open_source(path), data.open_source(str(tmp_path / "a.parquet")),
                 data.open_source(f"{path},{path}"), sources.Tfds(ROWS, "tfds:x:train")):
    for index in (-1, len(source)):
      with pytest.raises(IndexError):
        source[index]


@pytest.mark.parametrize("name,content,said", [
    ("a.jsonl", b"", "no rows in it"),
    ("a.jsonl", b"\n \n\t\n", "no rows in it"),
    ("a.jsonl.gz", b"not gzip", "cannot read"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-9], "cannot read"),
    ("a.jsonl.gz", b"", "no rows in it"),
    ("a.parquet", b"", "cannot read"),
    ("a.parquet", b"PAR1nonsensePAR1", "cannot read"),
    ("a.json", b"", "one list of objects"),
    ("a.json", b"[]", "no rows in it"),
    ("a.json", b"[{\"a\": 1} {\"a\": 2}]", "cannot read.*Expecting"),
    ("a.json", b"[{\"a\": 1}", "cannot read"),
    ("a.json", b"[{\"a\": 1}] 2", "Extra data"),
    ("a.csv", b"a,b", "unknown format: name files that end in .jsonl, .jsonl.gz, .parquet"),
])
def test_unusable_files_are_refused(tmp_path, name, content, said):
  path = write(tmp_path / name, content)
  with pytest.raises(ValueError, match=said) as caught:
    data.open_source(path)
  assert path in str(caught.value)


def test_missing_files_are_named_with_the_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "a.jsonl", lines(ROWS))
  for spec in ("b.jsonl", "", "a.jsonl,b.jsonl", "*.parquet"):
    with pytest.raises(ValueError, match="no file") as caught:
      data.open_source(spec)
    assert str(tmp_path) in str(caught.value)
  (tmp_path / "d.jsonl").mkdir()
  with pytest.raises(ValueError, match="is a directory"):
    data.open_source("d.jsonl")


# --------------------------------------------------------------------------- TensorFlow Datasets


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
  """A data set in array_record format, written without TensorFlow."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class TinyWords(tfds.core.GeneratorBasedBuilder):
    __module__ = "tiny_words"  # TFDS would look for checksums in the package of a dotted name
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
          "question": tfds.features.Text(), "answer": np.int64,
          "words": tfds.features.Sequence(tfds.features.Text())}))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(8):
        yield i, {"question": f"q{i} é", "answer": i, "words": ["a"] * i}

  directory = tmp_path_factory.mktemp("tfds")
  TinyWords(data_dir=str(directory), file_format="array_record").download_and_prepare()
  return directory


def test_tfds_rows_are_plain_python(tiny_tfds):
  source = data.open_source(f"tfds:tiny_words:train?data_dir={tiny_tfds}")
  rows = sorted(source, key=lambda row: row["answer"])
  assert rows == [{"question": f"q{i} é", "answer": i, "words": ["a"] * i} for i in range(8)]
  assert type(rows[0]["answer"]) is int and type(rows[3]["words"][0]) is str
  assert source.where(3) == "tfds:tiny_words:train:3"
  assert "tensorflow" not in sys.modules


def test_tfds_splits_and_versions(tiny_tfds):
  source = data.open_source(f"tfds:tiny_words:1.0.0:train[:25%]?data_dir={tiny_tfds}")
  assert len(source) == 2


@pytest.mark.parametrize("spec,said", [
    ("tfds:tiny_words", "is not of the form"),
    ("tfds:", "is not of the form"),
    ("tfds:tiny_words:test", "Unknown split"),
    ("tfds:gsm8kk:train", "knows no 'gsm8kk'"),
    ("tfds:tiny_words:train[:0]", "cannot open it"),
])
def test_bad_tfds_names_are_refused(tiny_tfds, spec, said):
  with pytest.raises(ValueError, match=said):
    data.open_source(f"{spec}?data_dir={tiny_tfds}" if spec != "tfds:" else spec)


def test_bytes_that_are_no_text_stay_bytes():
  rows = [{"image": b"\xff\xd8", "nested": {"text": b"x", "array": np.array([b"y", b"\xff"])},
           "scalar": np.float32(0.5), "flag": np.bool_(True)}]
  assert sources.Tfds(rows, "tfds:x:train")[0] == {
      "image": b"\xff\xd8", "nested": {"text": "x", "array": ["y", b"\xff"]}, "scalar": 0.5,
      "flag": True}


# ------------------------------------------------------------------------------------ real files


@pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="GSM8K is not here")
def test_gsm8k_is_read_whole():
  source = data.open_source(f"{REAL}/gsm8k/train.jsonl,{REAL}/gsm8k/test.jsonl")
  assert len(source) == 7473 + 1319
  with open(REAL / "gsm8k" / "test.jsonl", encoding="utf-8") as file:
    assert source[7473 + 1318] == json.loads(file.readlines()[1318])
  assert source.where(7473 + 1318).endswith("test.jsonl:1319")


@pytest.mark.skipif(not (REAL / "hh-rlhf").exists(), reason="HH-RLHF is not here")
def test_hh_rlhf_is_read_from_gzip():
  source = data.open_source(f"{REAL}/hh-rlhf/*.jsonl.gz")
  assert len(source) == 2312 and set(source[2311]) == {"chosen", "rejected"}
