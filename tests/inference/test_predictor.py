"""The Predictor against the model itself, over kinds of input, batch sizes and meshes; it needs
nothing but the checkpoint.
"""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.image import ImageTransform, Unreadable
from mmjax.inference.predictor import Predictor
from mmjax.models import make_model
from mmjax.parallel.mesh import make_mesh, single_device_mesh
from tests.inference import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
  return mmjax.load(checkpoint)


def test_equals_the_model_applied_by_hand(predictor):
  pictures = tiny.pixels(3)
  model, config = make_model(predictor.config), predictor.config
  transform = ImageTransform(config.data.image, train=False)
  params = jax.tree.map(np.asarray, predictor.params)
  by_hand = model.apply(
    {"params": params},
    "image",
    {"image": {"pixels": np.stack([transform(p) for p in pictures])}},
    method="embedding",
  )
  np.testing.assert_allclose(predictor.encode_image(pictures), by_hand, atol=1e-5)
  tokens = predictor.tokens(list(tiny.WORDS))
  by_hand = model.apply({"params": params}, "text", {"text": tokens}, method="embedding")
  np.testing.assert_allclose(predictor.encode_text(tiny.WORDS), by_hand, atol=1e-5)
  scale, bias = model.apply({"params": params}, method="temperature")
  assert (predictor.scale, predictor.bias) == (float(scale), float(bias))


def test_paths_bytes_pil_and_arrays_give_the_same(predictor, tmp_path):
  array = tiny.pixels(1)[0]
  (tmp_path / "a.png").write_bytes(tiny.png(array))
  rows = predictor.encode_image(
    [tmp_path / "a.png", str(tmp_path / "a.png"), tiny.png(array), Image.fromarray(array), array]
  )
  assert rows.shape == (5, 16) and rows.dtype == np.float32
  np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
  np.testing.assert_allclose(predictor.encode_image(array), rows[:1], atol=1e-6)
  palette = Image.fromarray(array).convert("RGBA")
  palette.putalpha(0)
  white = np.full((20, 20, 3), 255, np.uint8)
  np.testing.assert_allclose(
    predictor.encode_image(palette), predictor.encode_image(white), atol=1e-6
  )


@pytest.mark.parametrize("count", [0, 1, 3, 9, 17])
def test_any_number_of_inputs(predictor, count):
  pictures, texts = tiny.pixels(17, 1), [f"{w} {i}" for i, w in enumerate(tiny.WORDS * 3)]
  images, words = (
    predictor.encode_image(pictures[:count]),
    predictor.encode_text(iter(texts[:count])),
  )
  assert images.shape == words.shape == (count, 16)
  np.testing.assert_allclose(images, predictor.encode_image(pictures)[:count], atol=1e-5)
  np.testing.assert_allclose(words, predictor.encode_text(texts)[:count], atol=1e-5)


def test_sizes_share_a_few_programs(checkpoint):
  predictor = mmjax.load(checkpoint, mesh=single_device_mesh(), batch_size=16)
  for count in (1, 2, 3, 5, 8, 9, 12, 16, 20, 33):
    assert len(predictor.encode_text(["x"] * count)) == count
  assert predictor._embed._cache_size() <= 3


@pytest.mark.parametrize("devices", [1, 2])
def test_any_mesh_gives_the_same(checkpoint, predictor, devices):
  other = mmjax.load(checkpoint, mesh=make_mesh(configs.base(), jax.devices()[:devices]))
  np.testing.assert_allclose(
    other.encode_text(tiny.WORDS), predictor.encode_text(tiny.WORDS), atol=1e-5
  )
  assert other.fingerprint == predictor.fingerprint


def test_classify_is_the_softmax_of_scaled_cosines(predictor):
  pictures, labels = tiny.pixels(2), ["heart", "cat", "bird"]
  out = predictor.classify(pictures, labels)
  logits = predictor.scale * predictor.encode_image(pictures) @ predictor.encode_text(labels).T
  expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-6)
  both = predictor.classify(pictures, labels, ["{}", "a picture of a {}"])
  np.testing.assert_allclose(both.sum(1), 1, atol=1e-5)
  assert np.abs(both - out).max() > 1e-6
  with pytest.raises(UserError, match="labels"):
    predictor.classify(pictures, [])
  with pytest.raises(UserError, match="templates"):
    predictor.classify(pictures, labels, ["a picture"])


def test_a_model_with_a_sigmoid_loss_gives_each_label_a_probability_of_its_own(predictor):
  config = configs.resolve(predictor.config.to_dict(), ["objectives.align.loss=sigmoid"])
  other = Predictor(config, predictor.params, predictor.assets)
  pictures, labels = tiny.pixels(2), ["heart", "cat", "bird"]
  logits = other.scale * other.encode_image(pictures) @ other.encode_text(labels).T + other.bias
  out = other.classify(pictures, labels)
  np.testing.assert_allclose(out, 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-6)
  # Whatever else is asked.
  np.testing.assert_allclose(other.classify(pictures, labels[:1]), out[:, :1], rtol=1e-3)


def test_bad_inputs_are_named(predictor, tmp_path):
  cut = tiny.png(tiny.pixels(1, size=64)[0])[:60]
  (tmp_path / "cut.png").write_bytes(cut)
  for bad, words in (
    (tmp_path / "none.png", "none.png"),
    (tmp_path / "cut.png", "cut.png"),
    (b"", "bytes"),
    (cut, "bytes"),
    (np.zeros((4, 4, 3)), "uint8"),
    (np.zeros((4, 4), np.uint8), r"\[H, W, 3\]"),
  ):
    with pytest.raises(UserError, match=words) as error:
      predictor.encode_image([bad])
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="no text"):
    predictor.encode_text([3])


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud83d.png", "x" * 300])
def test_what_no_file_can_be_called_is_unreadable(predictor, name):
  with pytest.raises(Unreadable, match="cannot be opened"):
    predictor.encode_image([name])


@pytest.mark.parametrize("label", [None, 7, b"red"])
def test_a_label_that_is_no_text_is_named(predictor, label):
  with pytest.raises(UserError, match="is no text: give strings"):
    predictor.classify([np.zeros((8, 8, 3), np.uint8)], labels=["red", label])


@pytest.mark.parametrize("given", [{}, {"a": 1}, {"pixels": None}])
def test_a_dict_without_the_arrays_of_a_picture_is_unreadable(predictor, given):
  with pytest.raises(UserError, match="must have one of pixels") as error:
    predictor.encode_image([given])
  assert "\n" not in str(error.value)


def test_exif_orientation_of_a_pil_picture_is_honoured(predictor):
  image = Image.fromarray(tiny.pixels(1)[0])
  exif = Image.Exif()
  exif[0x0112] = 6
  data = io.BytesIO()
  image.save(data, "JPEG", exif=exif, quality=95)
  opened = Image.open(io.BytesIO(data.getvalue()))
  np.testing.assert_allclose(
    predictor.encode_image(opened), predictor.encode_image(data.getvalue()), atol=0.02
  )
  assert np.abs(predictor.encode_image(opened) - predictor.encode_image(image)).max() > 0.02


@pytest.mark.parametrize("content", [b'"cat"', b"5", b"[1]", b"{", b'{"a": 1}'])
def test_names_of_classes_that_are_no_list_of_texts_are_refused(tmp_path, content):
  for file in ("classes.json", "values.json"):
    folder = tmp_path / file
    folder.mkdir()
    kept = tiny.assets(folder) | {file: content}
    with pytest.raises(UserError, match=f"{file} of the checkpoint is no"):
      mmjax.load(tiny.save(tiny.config(), folder, kept))


def test_no_checkpoint_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="no checkpoint"):
    mmjax.load(tmp_path)
