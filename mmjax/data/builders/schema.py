"""What a record is and how it is stored: a dict of Python values <-> a tf.train.Example, without
TensorFlow.

A *record* always has `id` str, `image` encoded bytes or None, `captions` {language: [caption,
...]}, `label` str ("" = none) and `image_key` int in [0, 2^64) (equal = the same picture; the same
frames where there is a video and no picture). A data set says in its `fields` which of these its
records have besides, `None` or empty in a record that lacks it:

  audio      encoded sound (FLAC, WAV, OGG: what soundfile opens)
  video      encoded frames (a container that PyAV opens)
  series     float32 [T, C], sensor values over time
  questions  [(question, answer), ...]
  facts      a dict of JSON values: what is true of the example (a scene graph, a motion, a voice)
  conversations  [[{"role", "content": text or parts}, ...], ...] about its media (templates.py)
  preferences [{"prompt": turns, "chosen": text, "rejected": text}, ...], or one of the two answers
  media      [(modality, encoded bytes), ...]: a conversation's media after the first of a modality
  value      float32 [K], numbers to predict, NaN = none; `values` of metadata.json names the K
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from mmjax.config import UserError

Record = dict[str, Any]

FIELDS = (
  "image",
  "audio",
  "video",
  "series",
  "questions",
  "facts",
  "value",
  "conversations",
  "media",
  "preferences",
)


def features(fields: Sequence[str] = ("image",)):
  """The TFDS schema of a record with `fields`. `captions` is two parallel sequences; `image_key`
  the bits of a uint64 as int64.

  `audio` and `video` are stored as the bytes they are (TFDS has no plain bytes; Text keeps them),
  `facts` as JSON text.
  """
  import tensorflow_datasets as tfds

  text = tfds.features.Text
  optional = {
    "image": lambda: tfds.features.Image(shape=(None, None, None)),
    "audio": text,
    "video": text,
    "series": lambda: tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="bytes"),
    "questions": lambda: tfds.features.Sequence({"question": text(), "answer": text()}),
    "facts": text,
    "conversations": text,
    "preferences": text,
    "media": lambda: tfds.features.Sequence({"modality": text(), "content": text()}),
    "value": lambda: tfds.features.Tensor(shape=(None,), dtype=np.float32),
  }
  return tfds.features.FeaturesDict(
    {
      "id": text(),
      "captions": tfds.features.Sequence({"language": text(), "text": text()}),
      "label": text(),
      "image_key": tfds.features.Scalar(np.int64),
      **{name: optional[name]() for name in check_fields(fields)},
    }
  )


def check_fields(fields: Collection[str]) -> tuple[str, ...]:
  """`fields` as a tuple in the order of FIELDS. Raises UserError: a name that is none of them."""
  for name in fields:
    if name not in FIELDS:
      raise UserError(f"records have no field {name!r}; the optional ones are: {', '.join(FIELDS)}")
  return tuple(name for name in FIELDS if name in fields)


def to_example(record: Record, fields: Sequence[str] = ("image",)) -> dict[str, Any]:
  """A record as the example that `features(fields)` encodes (pictures, sound and video stay the
  encoded bytes they are).
  """
  pairs = [(language, text) for language, texts in record["captions"].items() for text in texts]
  key = record["image_key"]
  example = {
    "id": record["id"],
    "captions": {
      "language": [language for language, _ in pairs],
      "text": [text for _, text in pairs],
    },
    "label": record.get("label", ""),
    "image_key": key - (1 << 64) if key >= 1 << 63 else key,
  }
  for name in fields:
    value = record.get(name)
    if name == "image":
      example[name] = io.BytesIO(value or b"")
    elif name in ("audio", "video"):
      example[name] = value or b""
    elif name == "series":
      example[name] = (
        np.zeros((0, 0), np.float32) if value is None else np.ascontiguousarray(value, np.float32)
      )
    elif name == "value":
      example[name] = np.zeros(0, np.float32) if value is None else np.asarray(value, np.float32)
    elif name == "media":
      pairs = value or []
      example[name] = {
        "modality": [modality for modality, _ in pairs],
        "content": [content for _, content in pairs],
      }
    elif name == "questions":
      value = value or []
      example[name] = {
        "question": [question for question, _ in value],
        "answer": [answer for _, answer in value],
      }
    else:
      example[name] = json.dumps(value, sort_keys=True) if value else ""
  return example


def parse_record(data: bytes, languages: Sequence[str] = ()) -> Record:
  """The record in a serialised tf.train.Example, with the captions in `languages` only (() = all).
  Raises UserError.

  It has the optional fields that its data set has, and `image` always.
  """
  try:
    feature = example_class().FromString(data).features.feature
    captions: dict[str, list[str]] = {}
    wanted = {language.encode() for language in languages}
    texts = feature["captions/text"].bytes_list.value if "captions/text" in feature else ()
    for language, text in zip(
      feature["captions/language"].bytes_list.value if texts else (), texts, strict=True
    ):
      if not wanted or language in wanted:
        captions.setdefault(language.decode(), []).append(text.decode())
    return {
      "id": feature["id"].bytes_list.value[0].decode(),
      "image": (feature["image"].bytes_list.value[0] or None) if "image" in feature else None,
      "captions": captions,
      "label": feature["label"].bytes_list.value[0].decode(),
      "image_key": feature["image_key"].int64_list.value[0] % (1 << 64),
      **_optional(feature),
    }
  except (IndexError, UnicodeDecodeError, ValueError, DecodeError) as error:
    raise UserError(
      f"a record has not the fields of an mmjax data set ({error}); make one with `mmjax data "
      "convert`"
    ) from error


def _optional(feature) -> Record:
  """The fields besides the picture that are stored in a map of features. Raises ValueError,
  IndexError: damaged.
  """
  record: Record = {
    name: feature[name].bytes_list.value[0] or None
    for name in ("audio", "video")
    if name in feature
  }
  if "series/value" in feature:
    shape = tuple(feature["series/shape"].int64_list.value)
    values = np.frombuffer(feature["series/value"].bytes_list.value[0], np.float32).reshape(shape)
    record["series"] = values if values.size else None
  if "questions/question" in feature:
    both = (feature[f"questions/{name}"].bytes_list.value for name in ("question", "answer"))
    record["questions"] = [
      (question.decode(), answer.decode()) for question, answer in zip(*both, strict=True)
    ]
  if "value" in feature:
    record["value"] = np.array(feature["value"].float_list.value, np.float32)
    if not record["value"].size:
      record["value"] = None
  if "media/content" in feature:
    both = (feature[f"media/{name}"].bytes_list.value for name in ("modality", "content"))
    record["media"] = [
      (modality.decode(), content) for modality, content in zip(*both, strict=True)
    ]
  if "conversations" in feature:
    record["conversations"] = json.loads(feature["conversations"].bytes_list.value[0] or b"[]")
  if "preferences" in feature:
    record["preferences"] = json.loads(feature["preferences"].bytes_list.value[0] or b"[]")
  if "facts" in feature:
    record["facts"] = json.loads(feature["facts"].bytes_list.value[0] or b"{}")
  return record


@functools.cache
def example_class():
  """tf.train.Example. Call it once before threads read: the lazy imports of TFDS deadlock when two
  threads start them.
  """
  from tensorflow_datasets.proto import tf_example_generated_pb2

  return tf_example_generated_pb2.Example


def canonical(split: str, record: Record, fields: Sequence[str] = ("image",)) -> bytes:
  """What counts as the content of a record, as bytes. Picture and video count by their key:
  encoders of the same pixels may differ.
  """
  rows = [split, record["id"], record["captions"], record.get("label", ""), record["image_key"]]
  more: dict[str, Any] = {}
  if "audio" in fields and record.get("audio"):
    more["audio"] = _digest(record["audio"])
  if "series" in fields and record.get("series") is not None:
    series = np.ascontiguousarray(record["series"], "<f4")
    more["series"] = [*series.shape, _digest(series.tobytes())]
  if "value" in fields and record.get("value") is not None:
    more["value"] = np.asarray(record["value"], np.float32).tolist()
  more.update(
    {
      name: record[name]
      for name in ("questions", "facts", "conversations", "preferences")
      if name in fields and record.get(name)
    }
  )
  if "media" in fields and record.get("media"):
    more["media"] = [[modality, _digest(content)] for modality, content in record["media"]]
  return json.dumps([*rows, more] if more else rows, sort_keys=True).encode()


def _digest(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()
