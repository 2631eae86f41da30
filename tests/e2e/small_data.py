"""Small versions of the embedded data sets, by their own builders, for recipes that train within a test."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from unittest import mock

from mmjax.data.builders import emoji_scenes, find_version, moving_emoji, spoken_emoji
from mmjax.data.builders.spoken_emoji import HEARD, plan

SCENES = {"train": 3000, "validation": 60, "test": 120, "test_many": 10}
CLIPS = {"train": (30, 4), "validation": (10, 1), "test": (20, 1), "test_objects": (5, 1)}
PHRASES = 40  # of spoken_emoji: by every training voice, and by every test voice


def few_utterances(emoji) -> dict[str, list]:
  """Of what spoken_emoji says: 40 names that were heard, by all voices, and a few of the rest."""
  whole = plan(emoji)
  names = list(dict.fromkeys(one.text for one in whole["test_voices"]))[:PHRASES]
  first = {one.text: one for one in whole["train"] if one.emoji}
  train = [one for one in whole["train"] if one.text in set(names)]
  for text in names:
    for i, voice in enumerate(spoken_emoji.TRAIN_VOICES[::3]):
      one = spoken_emoji._utterance(first[text].emoji, text, spoken_emoji._varied(voice, spoken_emoji._rng("small", text, str(i))))
      train.append(one)
  train = list({one.id: one for one in train}.values())
  assert len(whole["test_voices"]) == HEARD * len(spoken_emoji.TEST_VOICES)
  return {"train": train, "validation": whole["validation"][:20], "test_voices": [o for o in whole["test_voices"] if o.text in set(names)],
          "test_phrases": whole["test_phrases"][:40]}


@contextlib.contextmanager
def smaller() -> Iterator[None]:
  with mock.patch.object(emoji_scenes, "SPLITS", SCENES), mock.patch.object(moving_emoji, "GROUPS", CLIPS), \
       mock.patch.object(spoken_emoji, "plan", few_utterances):
    yield


def build(folder: pathlib.Path, names: tuple[str, ...]) -> None:
  """Builds these data sets and their tokenizers under `folder`, once for all test processes of a run."""
  from mmjax import cli

  with open(folder.parent / "data.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with smaller(), mock.patch.dict(os.environ, MMJAX_DATA=str(folder)):
      for name in names:
        if not find_version(folder, name):
          assert cli.main(["data", "build", name]) == 0
          pieces = {"spoken_emoji": "512", "easy_vqa": "512", "emoji_scenes": "640", "moving_emoji": "1024", "openmoji": "1024"}[name]
          named = ["--name", "quickstart", "--languages", "en"] if name == "openmoji" else ["--name", name]
          assert cli.main(["data", "tokenizer", "--source", name, *named, "--vocab-size", pieces]) == 0
          if name == "spoken_emoji":
            assert cli.main(["data", "tokenizer", "--source", name, "--name", "spoken_letters", "--vocab-size", "384"]) == 0
