"""Conversations: a cache that is kept, a history that outgrows its window, and the terminal."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.inference.chat import Conversations
from mmjax.inference.slots import Slots
from mmjax.inference.terminal import Terminal
from mmjax.parallel.mesh import single_device_mesh
from tests.inference import tiny
from tests.inference.test_language import PICTURES, config

TURNS = ["a red heart", "two blue birds", "rain", "the sea", "and pizza", "a cat", "Chad", "of"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  c = config().to_dict()
  c["data"]["sequence"]["length"] = 512
  folder = tiny.save(configs.resolve(c), tmp_path_factory.mktemp("chat"))
  return mmjax.load(folder, mesh=single_device_mesh())


def chat(model, **settings):
  return model.chat(**dict(dict(template="chatml", max_length=6), **settings))


def test_eight_turns_over_a_kept_cache_equal_fresh_prompts(model):
  """Token for token, with pictures in some of the turns; only what is new is read."""
  one = chat(model, system="you see pictures", min_p=0.0)
  prompts = Conversations(model, "chatml")
  fresh = Slots(model.language, 1, 512, prompts.ends)
  before = 0
  for number, text in enumerate(TURNS):
    media = {"image": PICTURES[number % 3]} if number % 3 == 0 else {}
    read = prompts.read([*one.messages, prompts.user(text, media)])
    want = fresh.begin(read, 6)
    while not want.ended:
      fresh.step()
    answer = one.send(text, **media)
    assert one.last.tokens == want.tokens and answer == want.text
    assert one.last.read == want.read == model.language.size(read)
    assert one.last.reused >= before  # all of the last prompt
    before = one.last.read - 1
  assert len(one.messages) == 1 + 2 * len(TURNS)


def test_a_history_that_outgrows_the_window_loses_whole_exchanges(model):
  notes = []
  one = chat(model, system="you see", window=120, note=notes.append)
  one.send("first", image=PICTURES[0])
  while not notes:
    one.send("rain")
  assert notes == ["the model no longer sees the oldest 1 of 4 exchanges: the window is 120 tokens"]
  shown = one._fitting([*one.messages, one.prompts.user("and", {})])
  assert not shown.media  # the picture was in the first
  start = model.language.text(sum((p for p in shown.parts if isinstance(p, list)), []))
  assert "you see" in start and "first" not in start
  one.keep_media = True
  assert one._fitting([*one.messages, one.prompts.user("and", {})]).media
  with pytest.raises(UserError, match="this turn takes .* of a window of 120"):
    one.send("word " * 100)


def test_undo_reset_and_save(model, tmp_path):
  one, picture = chat(model, system="you see"), tmp_path / "a.png"
  picture.write_bytes(tiny.png(PICTURES[0]))
  first = one.send("what is it?", image=str(picture))
  one.send("and to its left?")
  assert one.undo() == "and to its left?" and len(one.messages) == 3
  one.save(tmp_path / "talk.jsonl")
  (saved,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
  assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
  assert saved["messages"][1]["content"][0]["image_url"]["url"] == str(picture)
  assert one.undo() and one.undo() == ""
  assert one.send("what is it?", image=str(picture)) == first
  one.reset()
  assert one.messages == [{"role": "system", "content": "you see"}]
  one.send("what?", image=np.asarray(PICTURES[0]))
  with pytest.raises(UserError, match="given as an array"):
    one.save(tmp_path / "talk.jsonl")


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(model, tmp_path):
  one = chat(model)
  one.send("rain")
  before = list(one.messages)
  (tmp_path / "bad.png").write_bytes(b"junk")
  for media, words in (
    (dict(image=tmp_path / "bad.png"), "not a JPEG"),
    (dict(audio="a.wav"), "no encoder for audio; it has image"),
  ):
    with pytest.raises(UserError, match=words):
      one.send("what is it?", **media)
  assert one.messages == before
  stream = one.stream("the sea")
  first = next(stream)
  stream.close()  # nobody reads on
  assert one.messages[-1]["content"].startswith(first.strip() and first)
  with pytest.raises(UserError, match="no chat template"):
    model.chat()


def test_a_terminal(model, tmp_path):
  (tmp_path / "a b.png").write_bytes(tiny.png(PICTURES[0]))
  lines = iter(
    [
      f"/image '{tmp_path}/a b.png'",
      "what is it?",
      "/audio x.wav",
      "/image nowhere.png",
      "/undo",
      "/undo",
      f"/save {tmp_path}/talk.jsonl",
      "/dance",
      "/help",
    ]
  )
  written = []

  def read():
    try:
      return next(lines)
    except StopIteration:
      raise EOFError from None

  one = chat(model)
  want = chat(model).send("what is it?", image=tmp_path / "a b.png")
  Terminal(one, read, written.append).run()
  shown = "".join(written)
  for words in (
    f"[image of the next message: {tmp_path}/a b.png]\n",
    f"{want}\n",
    "mmjax: this model takes no /audio; it takes /image",
    "mmjax: nowhere.png: cannot be opened",
    "[taken back: what is it?]\n[there is no turn to take back]",
    "no command /dance",
    "/undo           take the last turn back",
  ):
    assert words in shown
