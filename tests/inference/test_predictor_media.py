"""The Predictor with sound, clips and series, with classifiers, and writing texts: files and
arrays, batched and one by one.
"""

from __future__ import annotations

import numpy as np
import pytest

import mmjax
from mmjax.config import UserError
from mmjax.data.audio import decode_audio
from mmjax.data.video import decode_video
from mmjax.inference.generate import generate
from mmjax.inference.search import embed, search
from mmjax.parallel.mesh import single_device_mesh
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_video import clip
from tests.data.test_video import encode as film
from tests.inference import tiny


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
  config = tiny.media_config("dual_encoder", ("audio", "video", "series", "text"))
  return mmjax.load(tiny.save(config, tmp_path_factory.mktemp("dual")), mesh=single_device_mesh())


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
  """Writes and classifies, but has neither a shared space nor a text encoder."""
  changes = {"model.decoder": dict(depth=1, heads=2), "data.label": "label", "data.classes": 3}
  return mmjax.load(
    tiny.save(
      tiny.media_config("captioner", ("image", "audio"), **changes),
      tmp_path_factory.mktemp("captioner"),
    ),
    mesh=single_device_mesh(),
  )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  root = tmp_path_factory.mktemp("files")
  for n in range(5):
    (root / f"s{n}.flac").write_bytes(
      sound(tone(0.1 + 0.05 * n, 22_050, 200.0 * (n + 1)), 22_050, kind="FLAC")
    )
    (root / f"v{n}.mkv").write_bytes(film(np.roll(clip(4 + n), n, axis=1)))
    (root / f"p{n}.png").write_bytes(tiny.png(tiny.pixels(5)[n]))
  return root


def test_files_and_arrays_of_every_modality_give_the_same(dual, files):
  path = files / "s1.flac"
  wave = decode_audio(path.read_bytes(), 8000)
  rows = dual.encode_audio(
    [path, str(path), path.read_bytes(), wave, np.stack([wave, wave], axis=1)]
  )
  np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(
    dual.encode_audio((wave * 32768).round().astype(np.int16)), rows[:1], atol=1e-3
  )
  path = files / "v2.mkv"
  frames = decode_video(path.read_bytes())
  np.testing.assert_allclose(
    dual.encode_video([path, frames])[1:], dual.encode_video(frames), atol=1e-6
  )
  series = np.random.default_rng(0).normal(size=(6, 2))
  np.save(files / "track.npy", series)
  np.savetxt(files / "track.csv", series, fmt="%.9g", delimiter=",", header="x,y", comments="")
  np.testing.assert_allclose(
    dual.encode_series([series, files / "track.npy", files / "track.csv"])[1:],
    dual.encode_series([series] * 2),
    atol=1e-6,
  )
  several = dual.encode_audio(sorted(files.glob("*.flac")))
  assert several.shape == (5, 16) and np.abs(several[1:] - several[:-1]).max() > 1e-3
  assert dual.classify([files / "s0.flac"], ["a", "b"], modality="audio").shape == (1, 2)


def test_embed_and_search_other_media(dual, files, tmp_path):
  out = embed(dual, tmp_path / "i.npz", audio=str(files), video=str(files), log=lambda line: None)
  index = np.load(out, allow_pickle=False)
  assert index["audio_ids"].tolist() == [f"s{n}.flac" for n in range(5)] and index[
    "video_embeddings"
  ].shape == (5, 16)
  results = search(dual, str(files / "s3.flac"), index=out, k=2)
  assert results[0][0] == "s3.flac" and results[0][1] == pytest.approx(1, abs=1e-5)
  assert search(dual, str(files / "v1.mkv"), index=out, modality="video")[0][0] == "v1.mkv"
  by_words = search(dual, "a red heart", audio=files, k=5, log=lambda line: None)
  assert sorted(name for name, _ in by_words) == index["audio_ids"].tolist()
  for call, words in (
    (lambda: search(dual, "x", index=out, modality="image"), "no pictures"),
    (lambda: search(dual, "x", images=files, audio=files), "one of them"),
    (lambda: embed(dual, tmp_path / "o.npz", images=str(files)), "no encoder for image"),
  ):
    with pytest.raises(UserError, match=words):
      call()


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_written_together_equal_those_written_alone(captioner, files, beams):
  paths = sorted(files.glob("*.flac"))
  together = captioner.generate(audio=paths, beams=beams)
  assert together == [captioner.generate(audio=path, beams=beams)[0] for path in paths]
  assert captioner.generate(audio=[*paths, *paths] * 4, beams=beams) == together * 8, (
    "more than fit one batch"
  )
  assert len(set(together)) > 1 and captioner.generate(image=[]) == []


def test_both_media_of_a_row_are_heard_and_seen(captioner, files):
  sounds, pictures = sorted(files.glob("*.flac"))[:2], sorted(files.glob("*.png"))[:2]
  assert len(captioner.generate(image=pictures, audio=sounds, max_length=4)) == 2
  with pytest.raises(UserError, match="2 of image, 1 of audio"):
    captioner.generate(image=pictures, audio=sounds[:1])


def test_generate_writes_about_files_and_folders(captioner, files):
  lines = []
  (files / "zero.wav").write_bytes(sound(tone()[:0]))
  got = generate(
    captioner, [files / "p1.png", files / "zero.wav", files / "s0.flac"], beams=3, log=lines.append
  )
  assert [name for name, _ in got] == [str(files / "p1.png"), str(files / "s0.flac")]
  assert (
    got[0][1] == captioner.generate(image=files / "p1.png", beams=3)[0]
    and got[1][1] == captioner.generate(audio=files / "s0.flac", beams=3)[0]
  )
  assert (
    len(lines) == 2 and "zero.wav: audio of zero length" in lines[0] and "1 skipped" in lines[1]
  )
  assert len(generate(captioner, [files], log=lines.append)) == 10


def test_classes_are_the_probabilities_of_the_models_own_classifier(captioner, files):
  pictures = sorted(files.glob("*.png"))
  rows = captioner.classes(image=pictures)
  assert rows.shape == (5, 3)
  np.testing.assert_allclose(rows.sum(1), 1, atol=1e-5)
  np.testing.assert_allclose(rows[2:3], captioner.classes(image=pictures[2]), atol=1e-5)
  pixels = np.stack([captioner.pixels(path) for path in pictures])
  logits = captioner._model.apply(
    {"params": captioner.params}, ("image",), {"image": {"pixels": pixels}}, method="classify"
  )
  np.testing.assert_allclose(rows, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-5)


def test_what_a_model_cannot_do_is_one_clear_line(captioner, dual, files, tmp_path):
  path = files / "s0.flac"
  for call, words in (
    (lambda: captioner.encode_image(files / "p0.png"), "no shared space"),
    (lambda: captioner.encode_text("x"), "no encoder for text"),
    (lambda: captioner.generate(), "at least one modality"),
    (lambda: captioner.generate(video=path), "no encoder for video"),
    (lambda: captioner.generate(text="x"), "image=, audio="),
    (lambda: captioner.generate(audio=path, beams=0), "at least 1"),
    (lambda: captioner.generate(audio=path, max_length=99), "0 to 8"),
    (lambda: dual.generate(audio=path), "neither a decoder nor a CTC head"),
    (lambda: dual.classes(audio=path), "no classifier"),
    (lambda: generate(dual, [path]), "neither a decoder nor a CTC head"),
    (lambda: generate(captioner, [files / "v0.mkv"]), "audio, image"),
    (lambda: generate(captioner, [tmp_path]), "no files of"),
    (lambda: dual.encode_audio([np.zeros((2, 2, 2), np.float32)]), "float or int16"),
    (lambda: dual.encode_video(np.zeros((2, 4, 4), np.uint8)), r"\[T, H, W, 3\]"),
    (lambda: dual.encode_audio(np.full(9, np.nan)), "not numbers"),
    (lambda: dual.encode_series(np.zeros((4, 5))), "5 channels"),
  ):
    with pytest.raises(UserError, match=words) as error:
      call()
    assert "\n" not in str(error.value)
  assert (
    captioner.scale is None and captioner.bias is None and dual.scale > 0 and dual.writes is False
  )
