"""The data of the recipes, by the commands that they name; and small versions of it, by the same
builders, for what trains within a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from unittest import mock

from mmjax.data.builders import (
  basket_prices,
  clip_questions,
  easy_vqa,
  emoji_scenes,
  find_version,
  moving_emoji,
  python_topics,
  rare_animals,
  scene_dialogues,
  scene_preferences,
  spoken_commands,
  spoken_dialogues,
  spoken_emoji,
  spoken_questions,
)
from mmjax.data.builders.spoken_emoji import HEARD, plan
from tests.e2e.commands import ROOT

SCENES = {"train": 3000, "validation": 60, "test": 120, "test_many": 10}
COUNTS = {1: 1.0}  # objects of a scene
CLIPS = {"train": (30, 4), "validation": (10, 1), "test": (20, 1), "test_objects": (5, 1)}
QUESTIONS = {"train": 1200, "validation": 20, "test": 80}  # pictures, with some ten questions each
TWO_MOVES = {"train": 120, "validation": 10, "test": 20}  # clips of clip_questions
TALKS = {"train": 120, "validation": 12, "test": 12}  # of scene_dialogues, scene_preferences
SPOKEN = {"train": 120, "validation": 12, "test": 12}  # of spoken_questions, spoken_dialogues
ANIMALS = {"train": 2000, "validation": 100, "test": 200}  # of rare_animals: 40%, two objects
BASKETS = {"train": 1500, "validation": 50, "test": 200}
COMMANDS = {"train": 1, "validation": 1, "test": 1}  # times that a voice says a word
MODULES = 30  # of the standard library, whose docstrings python_topics has
PHRASES = 40  # of spoken_emoji: by every training voice, and by every test voice


def few_utterances(emoji) -> dict[str, list]:
  """Of what spoken_emoji says: 40 names that were heard, by all voices, and a few of the rest."""
  whole = plan(emoji)
  names = list(dict.fromkeys(one.text for one in whole["test_voices"]))[:PHRASES]
  first = {one.text: one for one in whole["train"] if one.emoji}
  train = [one for one in whole["train"] if one.text in set(names)]
  for text in names:
    for i, voice in enumerate(spoken_emoji.TRAIN_VOICES[::3]):
      one = spoken_emoji._utterance(
        first[text].emoji,
        text,
        spoken_emoji._varied(voice, spoken_emoji._rng("small", text, str(i))),
      )
      train.append(one)
  train = list({one.id: one for one in train}.values())
  assert len(whole["test_voices"]) == HEARD * len(spoken_emoji.TEST_VOICES)
  return {
    "train": train,
    "validation": whole["validation"][:20],
    "test_voices": [o for o in whole["test_voices"] if o.text in set(names)],
    "test_phrases": whole["test_phrases"][:40],
  }


@contextlib.contextmanager
def smaller() -> Iterator[None]:
  pictures = easy_vqa.find_splits()
  fewer = {split: pictures[split][:count] for split, count in QUESTIONS.items()}
  docstrings = python_topics.docstrings
  with (
    mock.patch.object(basket_prices, "SPLITS", BASKETS),
    mock.patch.multiple(easy_vqa, SIZES=QUESTIONS, find_splits=lambda: fewer),
    mock.patch.multiple(emoji_scenes, SPLITS=SCENES, COUNTS=COUNTS),
    mock.patch.multiple(rare_animals, SPLITS=ANIMALS, SHARE=0.4, COUNTS=(2, 2)),
    mock.patch.object(scene_dialogues, "SPLITS", TALKS),
    mock.patch.object(scene_preferences, "SPLITS", TALKS),
    mock.patch.object(moving_emoji, "GROUPS", CLIPS),
    mock.patch.object(spoken_emoji, "plan", few_utterances),
    mock.patch.object(spoken_commands, "TIMES", COMMANDS),
    mock.patch.object(spoken_questions, "SPLITS", SPOKEN),
    mock.patch.object(spoken_dialogues, "SPLITS", SPOKEN),
    mock.patch.object(clip_questions, "SPLITS", TWO_MOVES),
    mock.patch.object(
      python_topics, "docstrings", lambda library: itertools.islice(docstrings(library), MODULES)
    ),
  ):
    yield


def commands(recipe: str) -> Iterator[list[str]]:
  """The words of the `mmjax data` commands at the top of the recipe's config, and of
  launch/quickstart.sh where that is named there.

  recipe: the name of a config, with its argument or without: "easy_vqa:concat".
  """
  text = (ROOT / "configs" / f"{recipe.partition(':')[0]}.py").read_text().split('"""')[1]
  if "launch/quickstart.sh" in text:
    text += (ROOT / "launch" / "quickstart.sh").read_text()
  for line in text.replace("\\\n", " ").splitlines():
    if line.strip().startswith("mmjax data "):
      for command in line.split(" && "):
        yield shlex.split(command, comments=True)[1:]


def build(folder: pathlib.Path, recipes: Sequence[str], small: bool = True) -> None:
  """Makes what these recipes need in `folder`, by the commands that they name, once for all test
  processes of a run.
  """
  from mmjax import cli

  def made(words: list[str]) -> bool:
    if words[1] == "build":
      return find_version(folder, words[2]) is not None
    return (folder / "tokenizers" / f"{words[words.index('--name') + 1]}.model").exists()

  with open(folder.parent / "data.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with (
      smaller() if small else contextlib.nullcontext(),
      mock.patch.dict(os.environ, MMJAX_DATA=str(folder)),
    ):
      for recipe in recipes:
        for words in commands(recipe):
          assert made(words) or cli.main(words) == 0
