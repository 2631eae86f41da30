"""What is said of a medium, read from the cells of a table, a JSON object or a tar, in the forms
that people have.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.media import bytes_key, media_key
from mmjax.data.readers.conversations import conversation_of, questions_in, with_media
from mmjax.data.readers.preferences import NoPreference, Preference, preference_of

# UTF-32 first: its mark begins as that of UTF-16 does.
_BOMS = (
  (codecs.BOM_UTF8, "utf-8-sig"),
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_LABEL = ("", "-1", "nan", "NaN")


@dataclasses.dataclass(frozen=True)
class Skip:
  """Why a row is left out: a short reason that is counted, and what exactly was wrong."""

  reason: str
  detail: str = ""


class Question(NamedTuple):
  """`answers`: all that were given to it, where there are several; `answer` is then the
  commonest.
  """

  question: str
  answer: str
  answers: tuple[str, ...] = ()


class Annotation(NamedTuple):
  """What is said of a medium: captions by language, labels, questions, conversations (lists of
  turns), values (NaN = none), preferences (preferences.py); and the split that it is meant for.
  """

  captions: dict[str, list[str]]
  labels: tuple[str, ...] = ()
  questions: tuple[Question, ...] = ()
  conversations: tuple[list[dict[str, Any]], ...] = ()
  values: tuple[float, ...] = ()
  groups: tuple[str, ...] = ()  # that must not be divided among splits
  preferences: tuple[Preference, ...] = ()
  split: str = ""

  def joined(self, other: Annotation) -> Annotation:
    """Both, about one medium, of which there is one value and one split (`other_values`)."""
    captions = {language: list(texts) for language, texts in self.captions.items()}
    for language, texts in other.captions.items():
      captions.setdefault(language, []).extend(texts)
    return Annotation(
      captions,
      tuple(dict.fromkeys(self.labels + other.labels)),
      self.questions + other.questions,
      self.conversations + other.conversations,
      self.values or other.values,
      tuple(dict.fromkeys(self.groups + other.groups)),
      self.preferences + other.preferences,
      self.split or other.split,
    )

  def other_values(self, other: Annotation) -> Skip | None:
    """Why both cannot be said of one medium: it has one value of a kind, and one split."""
    if self.split and other.split and self.split != other.split:
      return Skip("another split", f"{other.split!r} after {self.split!r} of the same medium")
    if not (self.values and other.values) or repr(self.values) == repr(other.values):
      return None
    return Skip("another value", f"{other.values} after {self.values} of the same medium")

  def record(self, name: str, media: Mapping[str, Any]) -> dict[str, Any]:
    """The record (see builders/schema.py) of media; several labels become "one|other".
    media: {modality: content}; further ones of a modality are "image:1", "image:2".
    """
    record: dict[str, Any] = dict(
      id=name,
      image=media.get("image"),
      captions=self.captions,
      label="|".join(self.labels),
      image_key=media_key(media),
    )
    record |= {
      modality: data
      for modality, data in media.items()
      if modality != "image" and ":" not in modality
    }
    if self.questions:
      record["questions"] = [(one.question, one.answer) for one in self.questions]
    if self.values:
      record["value"] = np.array(self.values, np.float32)
    if self.groups:
      record["groups"] = self.groups
    if more := [(key.partition(":")[0], data) for key, data in media.items() if ":" in key]:
      record["media"] = more
    if self.conversations:
      record["conversations"] = list(self.conversations)
    if self.preferences:
      record["preferences"] = list(self.preferences)
    if (talks := self.conversations + self.preferences) and not media:
      record["image_key"] = bytes_key(json.dumps(talks).encode())
    elif self.captions and not media:
      record["image_key"] = bytes_key(json.dumps(self.captions).encode())
    facts: dict[str, list] = {}
    if any(one.answers for one in self.questions):
      facts["answers"] = [list(one.answers or (one.answer,)) for one in self.questions]
    return record | {"facts": facts} if facts else record


def about_media(said: Annotation, names: Iterable[str]) -> Annotation | Skip:
  """What is said of these media ("image", "image:1", ...), with each of them where conversations
  mean it.
  """
  counts = Counter(name.partition(":")[0] for name in names)
  try:
    talks = tuple(with_media(turns, counts) for turns in said.conversations)
    judged = tuple({**one, "prompt": with_media(one["prompt"], counts)} for one in said.preferences)
  except ValueError as error:
    return Skip("placeholders", str(error))
  return said._replace(conversations=talks, preferences=judged)


def annotate(
  cells: Mapping[str, Any],
  language: str = "en",
  label_names: Sequence[str] = (),
  separator: str = ",",
) -> Annotation | Skip:
  """The annotation in `cells`: caption, question, answer, chosen_answer, label, labels, value,
  group, split, language, conversation, preference (`preferences.Given`).

  `language`: of captions that do not say. `label_names`: of labels that are numbers. `separator`:
  of a text of several `labels`, of which there may be none. A row that has captions by its form (a
  key "caption") needs one, though it may have a label; not where it has `labels` or values.
  """
  cells = dict(cells)
  if _is_conversation(cells.get("caption")):
    cells["conversation"] = cells.pop("caption")
  try:
    captions = captions_of(cells.get("caption"), text_of(cells.get("language")) or language)
    questions = questions_of(cells.get("question"), cells.get("answer"), cells.get("chosen_answer"))
    labels = labels_of(cells.get("label"), label_names)
    if "labels" in cells:
      labels = several_labels(cells["labels"], separator, label_names)
    values = values_of(cells["value"]) if "value" in cells else ()
    conversations: tuple[list[dict[str, Any]], ...] = ()
    if cells.get("conversation"):
      turns = conversation_of(cells["conversation"])
      conversations = (turns,)
      questions += [Question(*pair) for pair in questions_in(turns)]
    given = cells.get("preference")
    preferences = (preference_of(given),) if given is not None else ()
  except NoPreference as error:
    return Skip(error.reason, str(error))
  except ValueError as error:
    return Skip("broken row", str(error))
  group = text_of(cells.get("group"))
  groups = (group,) if group else ()
  split = text_of(cells.get("split"))
  annotation = Annotation(
    captions, labels, tuple(questions), conversations, values, groups, preferences, split
  )
  if bad := broken_text(annotation):
    return Skip("broken text", bad)
  if (
    captions
    or questions
    or conversations
    or preferences
    or (labels and "caption" not in cells)
    or "labels" in cells
    or values
  ):
    return annotation
  return Skip("no value") if "value" in cells else Skip("no caption")


def captions_of(value: Any, language: str = "en") -> dict[str, list[str]]:
  """{language: captions} of a text, a list of texts or of objects that hold one ("raw", "caption"),
  or a mapping from languages to any of these; without blank ones."""
  groups = [(language, value)]
  if isinstance(value, dict) and not _texts_in(value):
    groups = [(str(name), texts) for name, texts in value.items()]
  out: dict[str, list[str]] = {}
  for name, texts in groups:
    if texts := [text.strip() for text in _texts_in(texts) if text.strip()]:
      out.setdefault(name, []).extend(dict.fromkeys(texts))
  return out


def questions_of(questions: Any, answers: Any = None, chosen: Any = None) -> list[Question]:
  """The questions of a text and its answer or answers, of two lists, or of a list of pairs or of
  {"question", "answer"}.

  Of several answers to one question the commonest (the first of equals) counts, unless `chosen` is
  one; all are kept beside it. Blank questions are left out. Raises ValueError: lists of unequal
  length.
  """
  if isinstance(questions, dict):
    questions, answers = (
      questions.get("question"),
      questions.get("answer", questions.get("answers")),
    )
  pairs: list[Any]
  if isinstance(questions, str):
    pairs = [(questions, answers)]
  elif not isinstance(questions, (list, tuple)):
    return []
  elif isinstance(answers, (list, tuple)):
    if len(questions) != len(answers):
      raise ValueError(f"{len(questions)} questions and {len(answers)} answers")
    pairs = list(zip(questions, answers, strict=True))
  else:
    pairs = [
      (q.get("question"), q.get("answer", q.get("answers"))) if isinstance(q, dict) else q
      for q in questions
    ]
  out = []
  for pair in pairs:
    if (
      isinstance(pair, (list, tuple))
      and len(pair) == 2
      and isinstance(pair[0], str)
      and pair[0].strip()
    ):
      given = [text for answer in _listed(pair[1]) if (text := text_of(answer))]
      commonest = Counter(given).most_common(1)[0][0] if given else ""
      out.append(
        Question(
          pair[0].strip(), text_of(chosen) or commonest, tuple(given) if len(given) > 1 else ()
        )
      )
  return out


def labels_of(value: Any, names: Sequence[str] = ()) -> tuple[str, ...]:
  """The labels of a cell, of which a list has several; null, "", NaN and -1 are none. Raises
  ValueError: an object.
  """
  labels = []
  for one in value if isinstance(value, (list, tuple)) else (value,):
    if isinstance(one, (dict, list, tuple)):
      raise ValueError("its label is a list of lists or an object")
    named = isinstance(one, int) and 0 <= one < len(names)
    label = names[one] if named else text_of(one)
    if label not in _NO_LABEL:
      labels.append(label)
  return tuple(dict.fromkeys(labels))


def several_labels(value: Any, separator: str, names: Sequence[str] = ()) -> tuple[str, ...]:
  """The labels of a cell: a list, or a text that `separator` cuts. Raises ValueError: an object, or
  a label with "|" in it, which stands between labels in a record.
  """
  cells = value.split(separator) if isinstance(value, str) else value
  labels = labels_of(cells, names)
  if bad := [label for label in labels if "|" in label]:
    raise ValueError(f"its label {bad[0]!r:.100} holds '|'")
  return labels


def values_of(value: Any) -> tuple[float, ...]:
  """The numbers of a cell or of several, NaN for null, "" and NaN; () where all are. Raises
  ValueError: one is no finite number.
  """
  numbers = []
  for one in value if isinstance(value, (list, tuple)) else (value,):
    text = text_of(one)
    try:
      number = math.nan if text in ("", "nan", "NaN") else float(text)
    except ValueError:
      number = math.inf
    if math.isinf(number) or isinstance(one, (bool, dict, list, tuple)):
      raise ValueError(f"its value {text!r:.40} is no number")
    numbers.append(number)
  return () if all(map(math.isnan, numbers)) else tuple(numbers)


def text_of(value: Any) -> str:
  """A cell as text: "" of null and NaN, "3" of 3.0 (a whole number beside missing ones becomes a
  float).
  """
  if value is None or isinstance(value, float) and math.isnan(value):
    return ""
  return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def broken_text(value: Any) -> str:
  """What of the texts in a value cannot be written as UTF-8 (half an emoji, bytes of another
  encoding), or "".
  """
  if isinstance(value, str):
    try:
      if not value.isascii():
        value.encode()
    except UnicodeEncodeError:
      return f"{printable(value)!r:.100} holds half a character, or bytes that are not UTF-8"
  elif isinstance(value, dict):
    return broken_text(list(value)) or broken_text(list(value.values()))
  elif isinstance(value, (list, tuple)):
    return next(filter(None, map(broken_text, value)), "")
  return ""


def printable(text: str) -> str:
  """A text with what UTF-8 cannot hold written as \\udc80."""
  return text.encode("utf-8", "backslashreplace").decode()


def encoding_of(start: bytes, given: str = "") -> str:
  """The encoding of a text that begins with these bytes: by its byte order mark, else `given`, else
  UTF-8.
  """
  return next((name for mark, name in _BOMS if start.startswith(mark)), given or "utf-8")


def _is_conversation(value: Any) -> bool:
  """Whether a column of texts holds turns, as that of the Cauldron does."""
  return (
    isinstance(value, (list, tuple))
    and bool(value)
    and isinstance(value[0], dict)
    and "assistant" in value[0]
  )


def _listed(answers: Any) -> list[Any]:
  """The answers in a cell: of one, of a list, of objects {"answer"}, of an object of lists (Hugging
  Face).
  """
  if isinstance(answers, dict):
    return _listed(
      next((answers[key] for key in ("answer", "text", "answers") if key in answers), None)
    )
  if isinstance(answers, (list, tuple)):
    return [one for answer in answers for one in _listed(answer)]
  return [answers]


def _texts_in(value: Any) -> list[str]:
  if isinstance(value, dict):
    value = next((value[key] for key in ("raw", "caption", "text") if key in value), None)
  if isinstance(value, (list, tuple)):
    return [text for one in value for text in _texts_in(one)]
  return [value] if isinstance(value, str) else []
