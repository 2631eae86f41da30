"""What is said of a scene of `emoji_scenes`: captions and their check, questions with answers,
dialogues.

All are functions of the scene graph, `facts`: `background` (a colour), `objects` (dicts with
`name`, `category`, `size` "big", "small" or "" for a sign, `row` and `column` 0 to 2, `text` of a
sign, else "") and `relations` ([index, relation, index], all that hold). Names are unique in a
scene. An object is left of another when its column is smaller, and above when its row is.

The grammar of captions, which `check_caption` parses:

  caption := clause { " and " clause } [ " on " colour ]
  clause  := object [ " " relation " " object ]
  object  := ("a" | "an" | "the") [" big" | " small"] " " name
           | ("a" | "the") " sign" [" that says " text]

Every clause has a relation, unless the scene is one object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Facts = Mapping[str, Any]

COLOURS = {
  "white": (255, 255, 255),
  "yellow": (255, 238, 140),
  "blue": (160, 200, 255),
  "green": (170, 232, 170),
  "pink": (255, 180, 212),
  "grey": (190, 190, 190),
}
RELATIONS = {
  "left": "to the left of",
  "right": "to the right of",
  "above": "above",
  "below": "below",
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLURALS = {"animal": "animals", "food": "things to eat", "vehicle": "vehicles", "plant": "plants"}
PLACES = tuple(
  f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")
)

_CLAUSE = re.compile(rf"(.+?) ({'|'.join(RELATIONS.values())}) (.+)")
_OBJECT = re.compile(r"(?:an?|the) (?:(big|small) )?([a-z]+)(?: that says (\S+))?")
_BACKGROUND = re.compile(rf"(.+) on ({'|'.join(COLOURS)})")


def check_caption(facts: Facts, caption: str) -> bool:
  """Whether a caption, in any order that the grammar has, is true of the scene and names all of its
  objects, and a sign's text.
  """
  words = " ".join(caption.lower().split()).rstrip(" .")
  if found := _BACKGROUND.fullmatch(words):
    words = found[1]
    if found[2] != facts["background"]:
      return False
  objects, relations = facts["objects"], {tuple(relation) for relation in facts["relations"]}
  phrases = {phrase: relation for relation, phrase in RELATIONS.items()}
  named: set[int] = set()
  for clause in words.split(" and "):
    found = _CLAUSE.fullmatch(clause)
    if bool(found) != (len(objects) > 1):
      return False
    ones = []
    for phrase in (found[1], found[3]) if found else (clause,):
      if (one := _find(objects, phrase)) is None:
        return False
      ones.append(one)
    if found and (ones[0][0], phrases[found[2]], ones[1][0]) not in relations:
      return False
    named.update(index for index, told in ones if told)
  return len(named) == len(objects)


# How a question begins -> its kind in `questions`, the two of relations apart.
_KINDS = {
  "is there": "existence",
  "how many": "count",
  "where is": "position",
  "what colour": "colour",
  "which is bigger": "comparison",
  "what does the sign": "reading",
  "what is": "relation/what",
}


def check_answer(facts: Facts, question: str, answer: str, text: str) -> dict[str, bool]:
  """{kind of the question: whether a text is its answer}."""
  del facts
  other = "size" if question.endswith("big or small?") else "relation/whether"
  kind = next((kind for start, kind in _KINDS.items() if question.startswith(start)), other)
  return {kind: text.strip().lower() == answer}


def _find(objects: Sequence[Facts], phrase: str) -> tuple[int, bool] | None:
  """(index of the object that a phrase names, whether it tells all: a sign its text), or None:
  there is no such.
  """
  found = _OBJECT.fullmatch(phrase)
  for index, one in enumerate(objects):
    if found and found[2] == one["name"]:
      matches = found[1] in (None, one["size"]) and found[3] in (None, one["text"] or None)
      return (index, bool(found[3]) or not one["text"]) if matches else None
  return None


def relations(objects: Sequence[Facts]) -> list[list]:
  """All [index, relation, index] that hold."""
  found = []
  for i, a in enumerate(objects):
    for j, b in enumerate(objects):
      for axis, (before, after) in (("column", ("left", "right")), ("row", ("above", "below"))):
        if a[axis] != b[axis]:
          found.append([i, before if a[axis] < b[axis] else after, j])
  return found


def captions(facts: Facts, rng: np.random.Generator) -> list[str]:
  """Two: one in reading order that depends on the scene alone, one in a random order with random
  relations.
  """
  objects = facts["objects"]
  if len(objects) == 1:
    return [
      f"{_refer(objects[0], set(), sized=True)} on {facts['background']}",
      f"{_refer(objects[0], set())} on {facts['background']}",
    ]
  order = sorted(range(len(objects)), key=lambda i: (objects[i]["row"], objects[i]["column"]))
  chain = [
    (a, "left" if objects[a]["row"] == objects[b]["row"] else "above", b)
    for a, b in zip(order, order[1:], strict=False)
  ]
  shuffled, links = rng.permutation(len(objects)), []
  for k in range(1, len(shuffled)):
    pair = shuffled[k], shuffled[rng.integers(k)]
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    links.append((a, _pick([r for i, r, j in facts["relations"] if (i, j) == (a, b)], rng), b))
  return [_join(objects, chain), _join(objects, links)]


def questions(
  facts: Facts, names: Mapping[str, str], rng: np.random.Generator
) -> list[tuple[str, str, str]]:
  """[(kind, question, answer)], 6 to 10 of them; `names` = {name: category} of all that could be
  there.
  """
  objects = facts["objects"]
  one = objects[rng.integers(len(objects))]
  absent = _pick(sorted(set(names) - {o["name"] for o in objects}), rng)
  present = [o["category"] for o in objects if o["category"] in PLURALS]
  category = _pick(present, rng) if present and rng.random() < 0.7 else _pick(sorted(PLURALS), rng)
  asked = [
    ("existence", f"is there {with_article(one['name'])}?", "yes"),
    ("existence", f"is there {with_article(absent)}?", "no"),
    ("count", "how many objects are there?", str(len(objects))),
    ("count", f"how many {PLURALS[category]} are there?", str(present.count(category))),
    ("position", f"where is the {one['name']}?", place(one)),
    ("colour", "what colour is the background?", facts["background"]),
  ]
  if one["size"]:
    asked.append(("size", f"is the {one['name']} big or small?", one["size"]))
  if len(objects) > 1:
    a, b = rng.permutation(len(objects))[:2]
    true = [r for i, r, j in facts["relations"] if (i, j) == (a, b)]
    relation, yes = _pick(true, rng), rng.random() < 0.5
    asked.append(
      (
        "relation",
        f"is the {objects[a]['name']} {RELATIONS[relation if yes else OPPOSITE[relation]]} the "
        f"{objects[b]['name']}?",
        "yes" if yes else "no",
      )
    )
    alone = [(r, found[0]) for r in RELATIONS if len(found := beside(facts, b, r)) == 1]
    if alone:
      relation, other = alone[rng.integers(len(alone))]
      asked.append(
        (
          "relation",
          f"what is {RELATIONS[relation]} the {objects[b]['name']}?",
          objects[other]["name"],
        )
      )
    if {objects[a]["size"], objects[b]["size"]} == {"big", "small"}:
      bigger = next(objects[i]["name"] for i in (a, b) if objects[i]["size"] == "big")
      asked.append(
        (
          "comparison",
          f"which is bigger, the {objects[a]['name']} or the {objects[b]['name']}?",
          bigger,
        )
      )
  asked += [("reading", "what does the sign say?", o["text"]) for o in objects if o["text"]]
  return asked


def dialogue(facts: Facts, rng: np.random.Generator) -> list[list[str]]:
  """[[question, answer], ...] of two or three turns; the later ones refer back ("and to its
  left?").
  """
  objects = facts["objects"]
  index = int(rng.integers(len(objects)))
  one = objects[index]
  turns = [[f"what is in the {place(one)}?", with_article(one["name"])]]
  turns.append(
    ["what does it say?", one["text"]] if one["text"] else ["is it big or small?", one["size"]]
  )
  sure = [(r, found) for r in RELATIONS if len(found := beside(facts, index, r)) < 2]
  if sure:
    relation, found = sure[rng.integers(len(sure))]
    phrase = RELATIONS[relation]
    where = phrase.replace(" of", " of it") if " of" in phrase else f"{relation} it"
    turns.append([f"and {where}?", with_article(objects[found[0]]["name"]) if found else "nothing"])
  return turns


def beside(facts: Facts, index: int, relation: str) -> list[int]:
  """The objects that stand in `relation` to object `index`."""
  return [i for i, r, j in facts["relations"] if r == relation and j == index]


def place(one: Facts) -> str:
  """Where an object is, one of PLACES."""
  return PLACES[3 * one["row"] + one["column"]]


def _join(objects: Sequence[Facts], links: Sequence[tuple[int, str, int]]) -> str:
  mentioned: set[str] = set()
  return " and ".join(
    f"{_refer(objects[a], mentioned)} {RELATIONS[relation]} {_refer(objects[b], mentioned)}"
    for a, relation, b in links
  )


def _refer(one: Facts, mentioned: set[str], sized: bool = False) -> str:
  """ "a cat" the first time, "the cat" from then on."""
  if one["name"] in mentioned:
    return f"the {one['name']}"
  mentioned.add(one["name"])
  if one["text"]:
    return f"a sign that says {one['text']}"
  return with_article(f"{one['size']} {one['name']}" if sized else one["name"])


def with_article(name: str) -> str:
  return ("an " if name[0] in "aeiou" else "a ") + name


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
  return options[int(rng.integers(len(options)))]
