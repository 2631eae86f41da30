"""English text in one spelling, so that word error rates count words and not ways to write them.

The rules of Whisper's normaliser (Radford et al. 2022, arXiv:2212.04356, appendix C), without three
of its parts: currencies and percentages, fractions ("and a half", "point five", "double five") and,
unless a table is passed, British spellings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping

_SHORT = {  # in order: what stands for what
  r"\bwon't\b": "will not",
  r"\bcan't\b": "can not",
  r"\blet's\b": "let us",
  r"\bain't\b": "aint",
  r"\by'all\b": "you all",
  r"\bwanna\b": "want to",
  r"\bgotta\b": "got to",
  r"\bgonna\b": "going to",
  r"\bi'ma\b": "i am going to",
  r"\bimma\b": "i am going to",
  r"\b(would|could|should)a\b": r"\1 have",
  r"\bma'am\b": "madam",
  **{
    rf"\b{short}\b": f"{word} "
    for short, word in dict(
      mr="mister",
      mrs="missus",
      st="saint",
      dr="doctor",
      prof="professor",
      capt="captain",
      gov="governor",
      ald="alderman",
      gen="general",
      sen="senator",
      rep="representative",
      pres="president",
      rev="reverend",
      hon="honorable",
      asst="assistant",
      assoc="associate",
      lt="lieutenant",
      col="colonel",
      jr="junior",
      sr="senior",
      esq="esquire",
    ).items()
  },
  r"'d (been|gone|done)\b": r" had \1",
  r"'s (been|gone|got)\b": r" has \1",
  r"n't\b": " not",
  r"'re\b": " are",
  r"'s\b": " is",
  r"'d\b": " would",
  r"'ll\b": " will",
  r"'t\b": " not",
  r"'ve\b": " have",
  r"'m\b": " am",
}
_LETTERS = str.maketrans(
  {"œ": "oe", "ø": "o", "æ": "ae", "ß": "ss", "đ": "d", "ð": "d", "þ": "th", "ł": "l"}
)

_ONES = {
  word: i
  for i, word in enumerate(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split(),
    1,
  )
}
_TENS = {
  word: 10 * i
  for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_TIMES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ZEROS = ("o", "oh", "zero")
_ODD = {
  "one": "first",
  "two": "second",
  "three": "third",
  "five": "fifth",
  "eight": "eighth",
  "nine": "ninth",
  "twelve": "twelfth",
}


def _forms() -> Iterator[tuple[str, tuple[str, str]]]:
  """(word, (the plain number word, what follows its digits)): "thirds" is not there, "third" is
  ("three", "rd").
  """
  for plain in (*_ONES, *_TENS, *_TIMES):
    yield plain, (plain, "")
    yield (
      ("sixes" if plain == "six" else plain[:-1] + "ies" if plain in _TENS else plain + "s"),
      (plain, "s"),
    )
    ordinal = _ODD.get(plain) or (plain[:-1] + "ieth" if plain in _TENS else plain + "th")
    yield ordinal, (plain, ordinal[-2:])


_FORMS = dict(_forms())


def normalise(text: str, spelling: Mapping[str, str] | None = None) -> str:
  """`text` in lower case, without brackets, fillers, punctuation and diacritics, contractions and
  numbers written out and in
  digits: "Mr. Li's TWENTY-one <noise> cats, um" -> "mister li is 21 cats". spelling: {word: the
  word to write for it}.
  """
  text = text.lower()
  text = re.sub(r"[<\[][^>\]]*[>\]]|\([^)]+?\)", "", text)
  text = re.sub(r"\b(hmm|mm|mhm|mmm|uh|um)\b", "", text)
  text = re.sub(r"\s+'", "'", text)
  for short, long in _SHORT.items():
    text = re.sub(short, long, text)
  text = re.sub(r"(\d),(\d)", r"\1\2", text)
  text = "".join(_plain(c) for c in unicodedata.normalize("NFKD", text.translate(_LETTERS)))
  text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
  text = re.sub(r"([a-z])(\d)", r"\1 \2", text)
  text = re.sub(r"(\d)([a-z])", r"\1 \2", text)
  text = re.sub(r"(\d)\s+(st|nd|rd|th|s)\b", r"\1\2", text)
  words = " ".join(_in_digits(text.split())).split()
  return re.sub(
    r"\b1(s?)\b(?!\.\d)", r"one\1", " ".join((spelling or {}).get(word, word) for word in words)
  )


def _plain(char: str) -> str:
  if char == ".":
    return char
  category = unicodedata.category(char)
  return "" if category == "Mn" else " " if category[0] in "MSP" else char


def _in_digits(words: list[str]) -> Iterator[str]:
  """Runs of number words as one number each: "two hundred and five" -> "205", "nineteen eighty
  four" -> "1984".
  """
  value: int | str | None = (
    None  # an int can still grow by addition, a string of digits only at its end
  )
  before = ""
  for i, word in enumerate(words):
    following = words[i + 1] if i + 1 < len(words) else ""
    if word in _FORMS:
      plain, suffix = _FORMS[word]
      value = _join(value, plain, before)
      if suffix:
        yield f"{value}{suffix}"
        value = None
    elif word in _ZEROS:
      value = f"{'' if value is None else value}0"
    elif not (word == "and" and before in _TIMES and _is_number(following)):
      if value is not None:
        yield str(value)
      value = int(word) if word.isdecimal() else None
      if value is None:
        yield word
    before = word
  if value is not None:
    yield str(value)


def _is_number(word: str) -> bool:
  return word in _FORMS or word in _ZEROS or word[:1].isdecimal()


def _join(value: int | str | None, word: str, before: str) -> int | str:
  """The number `value` (None = none yet) with the number word `word` after it; `before` is the word
  before that.
  """
  if word in _TIMES:
    if value is None:
      return _TIMES[word]
    if isinstance(value, str):
      return int(value) * _TIMES[word]
    return value // 1000 * 1000 + value % 1000 * _TIMES[word]
  number = _ONES.get(word) or _TENS[word]
  if value is None:
    return number
  if word in _ONES and (isinstance(value, str) or before in _ONES):
    return str(value)[:-1] + str(number) if before in _TENS and number < 10 else f"{value}{number}"
  room = 10 if number < 10 else 100
  return value + number if isinstance(value, int) and value % room == 0 else f"{value}{number}"
