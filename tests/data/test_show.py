"""The sample sheet of a data set."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmjax.config import UserError
from mmjax.data.audio import decode_audio
from mmjax.data.builders.convert import convert
from mmjax.data.show import show, show_data_set
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_convert import folder_of
from tests.data.test_tars import pairs, write_tar
from tests.data.test_video import clip
from tests.data.test_video import encode as film


def record(number: int, size=(40, 30), **changes):
  out = io.BytesIO()
  Image.fromarray(
    np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
  ).save(out, "PNG")
  return (
    dict(
      id=f"id{number}",
      image=out.getvalue(),
      captions={"en": [f"caption {number}"]},
      label="group",
      image_key=number,
    )
    | changes
  )


class Checker(HTMLParser):
  """Collects text and picture sources; every opened element must be closed."""

  def __init__(self, page):
    super().__init__()
    self.open, self.text, self.pictures = [], "", []
    self.feed(page)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    if tag == "img":
      self.pictures.append(dict(attributes)["src"])
    if tag not in ("img", "meta"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_pictures_captions_labels_and_sizes_are_on_it(tmp_path):
  records = [
    record(0),
    record(1, (900, 500)),
    record(2, captions={"en": ["a", "b"], "ar": ["قطة"], "de": ["<i>&fett</i>"]}, label="two"),
  ]
  page = show(records, tmp_path / "x.html").read_text()
  sheet = Checker(page)
  for text in (
    "id0",
    "id2",
    "caption 1",
    "40 × 30",
    "900 × 500",
    "group",
    "قطة",
    "<i>&fett</i>",
    "3 examples",
  ):
    assert text in sheet.text
  assert 'dir="rtl"' in page and "<i>" not in page
  first, second = (
    Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    for source in sheet.pictures[:2]
  )
  assert first.size == (40, 30) and np.array_equal(
    np.asarray(first), np.asarray(Image.open(io.BytesIO(records[0]["image"])))
  )
  assert second.size == (320, 178) and second.format == "JPEG"
  assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained


def test_the_same_seed_draws_the_same_examples(tmp_path):
  records = [record(n) for n in range(40)]
  a, b, c = (
    show(records, tmp_path / f"{n}.html", count=5, seed=seed).read_text()
    for n, seed in enumerate((1, 1, 2))
  )
  assert a == b != c and a.count("<article>") == 5
  assert show(records, tmp_path / "all.html", count=99).read_text().count("<article>") == 40


def test_unreadable_records_get_a_tile_that_says_why(tmp_path):
  class Source(list):
    def __getitem__(self, index):
      if index == 1:
        raise UserError("record 1 cannot be read")
      return super().__getitem__(index)

  page = show(
    Source([record(0, image=b"junk"), record(1), record(2, image=None)]), tmp_path / "x.html"
  ).read_text()
  text = Checker(page).text
  assert (
    "3 unreadable" in text
    and "not a JPEG" in text
    and "record 1 cannot be read" in text
    and "no picture" in text
  )


def test_sound_video_series_and_questions(tmp_path):
  plain = dict(image=None, captions={}, label="")
  aiff, ogg, long = (
    sound(tone(0.5, 44_100), 44_100, kind="AIFF"),
    sound(tone(), kind="OGG"),
    sound(tone(31.0, 8000), 8000),
  )
  records = [
    record(0, **plain, audio=ogg),
    record(1, **plain, audio=aiff),
    record(2, **plain, audio=long),
    record(3, **plain, video=film(clip(12, 16, 20))),
    record(
      4, series=np.array([[0.0, 1], [np.nan, 2], [3, 5]]), questions=[("is it <b>?", "yes")] * 9
    ),
    record(5, audio=b"junk", video=b""),
  ]
  page = show(records, tmp_path / "x.html").read_text()
  sheet = Checker(page)
  players = [
    base64.b64decode(data)
    for data in re.findall(r'<audio [^>]*src="data:audio/[a-z]+;base64,([^"]+)"', page)
  ]
  assert players[0] == ogg, "what browsers play stays as it is"
  np.testing.assert_allclose(decode_audio(players[1], 44_100), tone(0.5, 44_100), atol=1e-3)
  assert (
    players[1][:4] == b"fLaC"
    and len(decode_audio(players[2], 8000)) == 30 * 8000
    and len(players) == 3
  )
  film_shown = Image.open(io.BytesIO(base64.b64decode(sheet.pictures[0].partition(",")[2])))
  assert film_shown.size == (6 * 20 + 5 * 2, 16)
  for text in (
    "0.5 s, 44.1 kHz",
    "31.0 s, 8 kHz (the first 30 s)",
    "12 frames, 1.2 s, 20 × 16",
    "3 steps, 2 channels, 0 to 5",
    "is it <b>?",
    "and 1 more",
    "1 unreadable",
    "not a sound file",
    "videos of 1.2 s",
  ):
    assert text in sheet.text, text
  # Encoded bytes can spell anything.
  words = re.sub(r'"data:[^"]*"', "", page.partition("<main>")[2])
  assert (
    page.count("<svg") == 4 and "nan" not in words and not re.search(r'(src|href)="(?!data:)', page)
  )


def test_a_data_set_and_tars_by_name(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  convert("folder", folder_of(tmp_path / "in", 3), "mine", log=lambda line: None)
  lines = []
  path = show_data_set("mine", tmp_path / "a" / "x.html", log=lines.append)
  assert "p002.png" in path.read_text() and "3 of 3" in lines[-1]
  tar = write_tar(tmp_path / "t.tar", pairs(0, 4))
  assert (
    show_data_set(tar, tmp_path / "t.html", count=2, log=lines.append)
    .read_text()
    .count("<article>")
    == 2
  )


def test_mistakes(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path))
  (tmp_path / "file").write_text("")
  for call in (
    lambda: show([], tmp_path / "x.html"),
    lambda: show([record(0)], tmp_path / "x.html", count=0),
    lambda: show([record(0)], tmp_path / "file" / "x.html"),
    lambda: show_data_set("opnmoji", tmp_path / "x.html"),
  ):
    with pytest.raises(UserError) as error:
      call()
    assert "\n" not in str(error.value)
  assert not (tmp_path / "x.html").exists()
