"""`mmjax embed` and `mmjax search`: a folder, a text file, a data set; what cannot be read is
named.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

import mmjax
from mmjax.config import UserError
from mmjax.data.text import text_key
from mmjax.evaluation.retrieval import merge, ranks
from mmjax.inference import search as searching
from mmjax.inference.search import embed, load_index, search
from tests.inference import tiny
from tests.test_files import close


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
  return mmjax.load(tiny.checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "photos"
  (root / "deep" / "er").mkdir(parents=True)
  for name, array in zip(("b.png", "deep/a.PNG", "deep/er/c.png"), tiny.pixels(3, 5), strict=True):
    (root / name).write_bytes(tiny.png(array))
  (root / "copy.png").write_bytes((root / "b.png").read_bytes())
  (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
  (root / "notes.txt").write_text("not a picture")
  return root


def test_a_folder_is_embedded_whole_and_broken_pictures_are_named(predictor, folder, tmp_path):
  lines = []
  out = embed(predictor, tmp_path / "index.npz", images=str(folder), log=lines.append)
  index = np.load(out, allow_pickle=False)
  assert index["image_ids"].tolist() == ["b.png", "copy.png", "deep/a.PNG", "deep/er/c.png"]
  assert index["skipped"].tolist() == ["broken.jpg"] and any(
    "skipped broken.jpg" in line for line in lines
  )
  keys = index["image_keys"]
  assert keys.dtype == np.uint64 and keys[0] == keys[1] and len(set(keys.tolist())) == 3
  np.testing.assert_allclose(
    index["image_embeddings"],
    predictor.encode_image([folder / n for n in index["image_ids"]]),
    atol=1e-6,
  )
  assert (float(index["scale"]), str(index["model"])) == (
    np.float32(predictor.scale),
    predictor.fingerprint,
  )


def test_a_pipe_among_the_pictures_is_named(predictor, folder, tmp_path):
  os.mkfifo(folder / "pipe.png")
  lines = []
  index = np.load(
    embed(predictor, tmp_path / "index.npz", images=str(folder), log=lines.append),
    allow_pickle=False,
  )
  assert index["skipped"].tolist() == ["broken.jpg", "pipe.png"]
  assert any("skipped pipe.png" in line and "not a regular file" in line for line in lines)
  with pytest.raises(UserError, match="not a regular file"):
    predictor.encode_image([folder / "pipe.png"])


def test_search_by_picture_and_by_words(predictor, folder, tmp_path):
  index = embed(predictor, tmp_path / "i.npz", images=str(folder), log=lambda line: None)
  results = search(predictor, str(folder / "b.png"), index=index, k=3)
  assert [name for name, _ in results[:2]] == ["b.png", "copy.png"] and results[0][
    1
  ] == pytest.approx(1, abs=1e-5)
  words = search(predictor, "a red heart", images=folder, k=10, log=lambda line: None)
  scores = (
    predictor.encode_image([folder / n for n, _ in words]) @ predictor.encode_text("a red heart")[0]
  )
  np.testing.assert_allclose([s for _, s in words], scores, atol=1e-5)
  assert len(words) == 4 and list(scores) == sorted(scores, reverse=True)


def test_texts_from_a_file(predictor, tmp_path):
  (tmp_path / "t.txt").write_text("a red heart\n\n  A  red heart \nمرحبا\n", encoding="utf-8")
  index = np.load(
    embed(predictor, tmp_path / "t.npz", texts=str(tmp_path / "t.txt"), log=lambda line: None),
    allow_pickle=False,
  )
  assert (
    index["texts"].tolist() == ["a red heart", "A  red heart", "مرحبا"]
    and index["text_owners"].tolist() == [-1] * 3
  )
  assert index["text_keys"][0] == index["text_keys"][1] != index["text_keys"][2]
  assert index["text_embeddings"].shape == (3, 16)


class Source:
  """Five records: two identical pictures, a broken one, one that cannot be read; captions in two
  languages.
  """

  def __init__(self):
    arrays = tiny.pixels(3, 7)
    data = [
      tiny.png(arrays[0]),
      tiny.png(arrays[1]),
      b"broken",
      tiny.png(arrays[0]),
      tiny.png(arrays[2]),
    ]
    words = [
      ["a red heart", "heart"],
      ["a black cat"],
      ["lost"],
      ["a red heart"],
      ["two blue birds"],
    ]
    self.records = [
      dict(
        id=f"r{i}", image=d, captions={"en": w}, label="", image_key=[11, 12, 13, 11, 2**63 + 5][i]
      )
      for i, (d, w) in enumerate(zip(data, words, strict=True))
    ]

  def __len__(self):
    return 6

  def __getitem__(self, i):
    if i == 5:
      raise UserError("record 5 cannot be read")
    return self.records[i]


def test_recall_of_a_data_set_in_a_few_lines_of_numpy(predictor, tmp_path, monkeypatch):
  monkeypatch.setattr(searching, "open_source", lambda entry, config: Source())
  out = embed(
    predictor,
    tmp_path / "s.npz",
    source="fake",
    split="test",
    languages=("en",),
    log=lambda line: None,
  )
  f = np.load(out, allow_pickle=False)
  assert f["image_ids"].tolist() == ["r0", "r1", "r3", "r4"] and len(f["skipped"]) == 2
  assert f["text_owners"].tolist() == [0, 0, 1, 2, 3] and f["texts"][4] == "two blue birds"
  assert f["text_keys"][2] == text_key("a black cat")[0] << 32 | text_key("a black cat")[1]

  images, i = np.unique(f["image_keys"], return_index=True, return_inverse=True)[1:]
  texts, t = np.unique(f["text_keys"], return_index=True, return_inverse=True)[1:]
  similarity = f["image_embeddings"][images] @ f["text_embeddings"][texts].T
  correct = np.zeros(similarity.shape, bool)
  correct[i[f["text_owners"]], t] = True
  recall = np.mean(
    np.where(correct, similarity, -2).max(1) > np.where(correct, -2, similarity).max(1)
  )

  items = merge(f["image_keys"], np.ones(4, bool), f["text_owners"], f["text_keys"])
  rank = ranks(
    f["image_embeddings"][items.images],
    f["text_embeddings"][items.texts],
    items.pairs,
    predictor.mesh,
  )
  assert recall == np.mean(rank == 1) and len(items.images) == 3 and len(items.texts) == 4


def test_mistakes_are_one_clear_line(predictor, folder, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
  (tmp_path / "bad.npz").write_bytes(b"PK no zip")
  np.savez(
    tmp_path / "other.npz",
    image_embeddings=np.zeros((2, 16), np.float32),
    image_ids=np.array(["a", "b"]),
    model=np.array("x"),
  )
  np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
  out = tmp_path / "o.npz"
  cases = (
    (lambda: embed(predictor, out), "--images"),
    (lambda: embed(predictor, out, images=str(folder), source="x"), "alone"),
    (lambda: embed(predictor, out, images=str(tmp_path / "none")), "is no folder"),
    (lambda: embed(predictor, out, images=str(tmp_path / "empty")), "no pictures"),
    (lambda: embed(predictor, tmp_path / "no" / "o.npz", images=str(folder)), "is no folder"),
    (lambda: embed(predictor, tmp_path, images=str(folder)), "is a folder"),
    (lambda: embed(predictor, out, texts=str(tmp_path / "latin.txt")), "not UTF-8"),
    (lambda: search(predictor, "x"), "--images"),
    (lambda: search(predictor, "x", index=tmp_path / "none.npz"), "no such index"),
    (lambda: search(predictor, "x", index=tmp_path / "bad.npz"), "damaged"),
    (lambda: search(predictor, "x", index=tmp_path / "pickled.npy"), "not an index"),
    (lambda: search(predictor, "x", index=tmp_path / "other.npz"), "another model"),
    (lambda: search(predictor, "x", images=folder, k=0), "at least 1"),
  )
  for run, words in cases:
    with pytest.raises(UserError, match=words) as error:
      run()
    assert "\n" not in str(error.value)
  assert not out.exists()
  assert load_index(tmp_path / "other.npz")["image_ids"].tolist() == ["a", "b"]


def test_folders_that_cannot_be_listed_are_skipped_and_named(
  predictor, folder, tmp_path, monkeypatch
):
  closed = close(monkeypatch, folder / "deep" / "er")
  lines: list[str] = []
  out = embed(predictor, tmp_path / "index.npz", images=str(folder), log=lines.append)
  index = load_index(out, predictor)
  assert list(index["image_ids"]) == ["b.png", "copy.png", "deep/a.PNG"]
  assert "deep/er" in index["skipped"] and f"skipped {closed}: Permission denied" in lines
  from mmjax.inference.predict import zero_shot

  (folder / "gone.png").symlink_to("nowhere.png")
  rows = zero_shot(predictor, [folder], ["red", "blue"], log=lines.append)
  assert [row["file"] for row in rows if "error" in row] == [
    str(folder / "broken.jpg"),
    str(folder / "gone.png"),
    str(closed),
  ]
  assert f"{closed} cannot be read (Permission denied)" in rows[-1]["error"]
