"""Records with sound, video, series, questions and facts: what is stored is what is read, also by
TFDS; what counts as content.
"""

import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mmjax.config import UserError
from mmjax.data.builders import find_version, parse_record, write_dataset
from mmjax.data.builders.schema import FIELDS, canonical, features, to_example
from mmjax.data.sources import open_source

TEXT = st.text(max_size=12)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
  max_leaves=6,
)
OPTIONAL = {
  "audio": st.none() | st.binary(min_size=1, max_size=40),
  "video": st.none() | st.binary(min_size=1, max_size=40),
  "series": st.none()
  | arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 3)), elements=st.floats(-9, 9, width=32)
  ),
  "questions": st.lists(st.tuples(TEXT, TEXT), max_size=3),
  "facts": st.dictionaries(TEXT, JSON, max_size=3),
}


def serialize(record: dict, fields) -> bytes:
  from tensorflow_datasets.core import example_serializer

  schema = features(fields)
  return example_serializer.ExampleSerializer(schema.get_serialized_info()).serialize_example(
    schema.encode_example(to_example(record, fields))
  )


def picture() -> bytes:
  out = io.BytesIO()
  Image.new("RGB", (3, 2), "red").save(out, "PNG")
  return out.getvalue()


def plain(**more) -> dict:
  return {
    "id": "a",
    "image": picture(),
    "captions": {"en": ["one", "two"], "de": ["eins"]},
    "label": "x",
    "image_key": 2**64 - 3,
    **more,
  }


@given(st.fixed_dictionaries({}, optional=OPTIONAL), st.booleans(), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_record_comes_back_as_it_was(more, pictured, key):
  fields = (*(["image"] if pictured else []), *more)
  record = {**plain(image=picture() if pictured else None, image_key=key), **more}
  read = parse_record(serialize(record, fields))
  assert read.keys() == record.keys()
  for name, value in record.items():
    if name == "series" and value is not None:
      assert (
        read[name].dtype == np.float32
        and read[name].shape == value.shape
        and (read[name] == value).all()
      )
    else:
      assert read[name] == value, name


def test_a_data_set_says_its_fields_and_answers(tmp_path):
  full = plain(
    audio=b"sound\0",
    video=b"\0frames",
    series=np.eye(3, 2, dtype=np.float32),
    questions=[("how many?", "2"), ("red?", "yes")],
    facts={"objects": [{"name": "cat"}]},
    conversations=[[{"role": "user", "content": [{"type": "image"}]}]],
    media=[("image", b"second"), ("audio", b"\0")],
    preferences=[
      {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "red?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
      }
    ],
    value=np.array([1.5, np.nan], np.float32),
  )
  bare = plain(id="b", image=None)
  write_dataset(
    "full",
    tmp_path,
    {"train": [full], "test": [bare, plain(id="c", questions=[("red?", "no")])]},
    fields=FIELDS,
  )
  source = open_source(dict(name="full", split="test", languages=(), cache=True), tmp_path)
  assert source.answers == ("2", "no", "yes")  # of all splits
  assert source[0] == {
    **bare,
    "audio": None,
    "video": None,
    "series": None,
    "questions": [],
    "facts": {},
    "conversations": [],
    "media": [],
    "preferences": [],
    "value": None,
  }
  assert source.values == ("value[0]", "value[1]")
  read = open_source(dict(name="full", split="train", languages=("de",)), tmp_path)[0]
  for name in ("series", "value"):
    np.testing.assert_array_equal(read.pop(name), full.pop(name))
  assert read == {**full, "captions": {"de": ["eins"]}}
  assert json.loads((find_version(tmp_path, "full") / "metadata.json").read_text())[
    "fields"
  ] == list(FIELDS)


def test_tfds_reads_the_fields(tmp_path):
  import tensorflow_datasets as tfds

  series = np.arange(6, dtype=np.float32).reshape(3, 2)
  write_dataset(
    "full",
    tmp_path,
    {"train": [plain(audio=b"a\0b", series=series, questions=[("q", "a")], facts={"k": 1})]},
    fields=FIELDS,
  )
  example = tfds.builder_from_directory(str(find_version(tmp_path, "full"))).as_data_source(
    "train"
  )[0]
  np.testing.assert_array_equal(example["series"], series)
  assert (
    example["audio"] == b"a\0b"
    and json.loads(example["facts"]) == {"k": 1}
    and list(example["questions"]["answer"]) == [b"a"]
  )
  assert example["image"].shape == (2, 3, 3) and "tensorflow" not in sys.modules


def test_only_the_named_fields_are_stored(tmp_path):
  folder = write_dataset(
    "heard",
    tmp_path,
    {"train": [plain(audio=b"a", video=b"v", facts={"k": 1})]},
    fields=("facts", "audio"),
  )
  read = open_source(dict(name="heard", split="train", languages=()), tmp_path)[0]
  assert read == plain(image=None, audio=b"a", facts={"k": 1})
  assert json.loads((folder / "metadata.json").read_text())["fields"] == ["audio", "facts"]
  with pytest.raises(UserError, match="no field 'sound'.*audio"):
    write_dataset("wrong", tmp_path, {"train": [plain()]}, fields=("sound",))
  assert find_version(tmp_path, "wrong") is None


def test_the_content_counts_what_is_stored_and_nothing_else():
  # As before there were other fields.
  assert (
    canonical("train", plain(audio=b"x", facts={"k": 1}))
    == json.dumps(
      ["train", "a", {"de": ["eins"], "en": ["one", "two"]}, "x", 2**64 - 3], sort_keys=True
    ).encode()
  )
  records = [
    plain(),
    plain(audio=b"x"),
    plain(audio=b"y"),
    plain(series=np.zeros((2, 3))),
    plain(series=np.zeros((3, 2))),
    plain(questions=[("a", "b")]),
    plain(questions=[("b", "a")]),
    plain(facts={"k": 1}),
    plain(facts={"k": 2}),
    plain(value=[1.0]),
    plain(value=[2.0]),
  ]
  assert len({canonical("train", record, FIELDS) for record in records}) == len(records)
  assert canonical("train", plain(audio=None, questions=[], facts={}), FIELDS) == canonical(
    "train", plain()
  )


def test_damaged_records_are_refused():
  data = serialize(plain(series=np.zeros((2, 3)), facts={"k": 1}), ("series", "facts"))
  with pytest.raises(UserError, match="not the fields"):
    parse_record(data.replace(b'{"k": 1}', b'{"k": 1]'))
  with pytest.raises(UserError, match="not the fields"):
    parse_record(data[:-9])
