"""Media that are empty, cut, tiny or of another rate, through the commands: skipped, counted and
named, or one clear line.
"""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from mmjax import cli
from mmjax import config as configs
from mmjax.data.builders import write_dataset
from mmjax.data.pipeline import batch_spec
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.models import make_model
from mmjax.objectives.captioning import captioning
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_video import clip, sound_alone
from tests.data.test_video import encode as film
from tests.inference import tiny

CONFIG = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.train.steps, c.train.batch_size, c.evaluation.every = 3, 16, 0
  c.log.every, c.log.tensorboard = 1, False
  c.data.sources.mine = dict(name="mine")
  c.data.modalities = ("image", "audio", "video", "text")
  c.data.image.size, c.data.video.size, c.data.video.frames = 16, 16, 2
  c.data.audio.seconds, c.data.max_unreadable = 0.25, 6
  c.data.text.tokenizer, c.data.text.vocab_size, c.data.text.length = "t", 400, 8
  block = dict(depth=1, heads=2)
  c.model = dict(name="captioner", width=16, decoder=block, encoders=dict(
    image=dict(kind="vit", patch=8, **block), audio=dict(kind="whisper", mels=8, **block),
    video=dict(kind="frames", temporal="mean", patch=8, frame_depth=1, heads=2)))
  c.objectives.write = dict(kind="captioning", source=("image", "audio", "video"))
  return c
"""


def png(size: int) -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)).save(
    out, "PNG"
  )
  return out.getvalue()


STEREO = np.stack([tone(0.1, 44_100), 0.5 * tone(0.1, 44_100)], axis=1)
ODD = {  # unusual, but fine
  "pixel.png": png(1),
  "rate.wav": sound(tone(0.1, 11_025), 11_025),
  "stereo.flac": sound(STEREO, 44_100, kind="FLAC"),
  "long.wav": sound(tone(1.0)),
  "frame.mkv": film(clip(1)),
}
BAD = {  # and what is said about it
  "zero.wav": (sound(tone()[:0]), "audio of zero length"),
  "empty.flac": (b"", "empty file"),
  "short.flac": (sound(tone(), kind="FLAC")[:30], "not a sound file"),
  "noframes.mp4": (sound_alone(), "no video stream"),
  "half.mp4": (film(clip(), "mp4", "mpeg4", "yuv420p")[:200], "cut within its data"),
  "cut.png": (png(64)[:90], ""),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with data sets and a config; ODD and BAD media as files in media/."""
  root = tmp_path_factory.mktemp("bad")
  (root / "media").mkdir()
  for name, data in {**ODD, **{name: data for name, (data, _) in BAD.items()}}.items():
    (root / "media" / name).write_bytes(data)
    (root / "media" / name).with_suffix(".txt").write_text("words")
  good = dict(image=png(20), audio=sound(tone(0.1)), video=film(clip(2)), label="", image_key=1)
  changes = [
    {},
    dict(image=ODD["pixel.png"]),
    dict(audio=ODD["rate.wav"]),
    dict(audio=ODD["stereo.flac"]),
    dict(video=ODD["frame.mkv"]),
    dict(captions={"en": ["  "]}),
  ]
  changes += [
    {
      dict(wav="audio", flac="audio", mp4="video", png="image")[name.rpartition(".")[2]]: data
      or None
    }
    for name, (data, _) in BAD.items()
  ]
  records = [
    {**good, "captions": {"en": [f"a thing number {n}"]}, "id": f"r{n}", **change}
    for n, change in enumerate(changes)
  ]
  write_dataset("mine", root / "data", {"train": records}, fields=("image", "audio", "video"))
  train_tokenizer(["a thing number and words"] * 30, root / "data" / "tokenizers" / "t.model", 360)
  (root / "config.py").write_text(CONFIG)
  return root


@pytest.fixture(scope="module")
def trained(place):
  """(run folder, what training said on stderr)."""
  import contextlib

  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    code = cli.main(
      [
        "train",
        "--config",
        str(place / "config.py"),
        "--workdir",
        str(place / "run"),
        f"--config.data.dir={place / 'data'}",
      ]
    )
  assert code == 0, said.getvalue()
  return place / "run", said.getvalue()


def command(capsys, *words):
  code = cli.main([str(word) for word in words])
  printed = capsys.readouterr()
  assert "Traceback" not in printed.err
  return code, printed.out, printed.err


def test_training_names_each_bad_record_once_and_goes_on(trained):
  folder, said = trained
  named = [line for line in said.splitlines() if line.startswith("unreadable record")]
  assert len(named) == len(BAD) == len({line.split(": ")[1] for line in named}), said
  for number, (name, (_, words)) in enumerate(BAD.items(), 6):
    line = next(line for line in named if f"mine r{number}:" in line)
    assert words in line or name == "empty.flac" and "has no sound" in line
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 3 and all(np.isfinite(row["loss"]) for row in rows)


def test_more_bad_records_than_allowed_is_one_line(place, capsys):
  code, _, err = command(
    capsys,
    "train",
    "--config",
    place / "config.py",
    "--workdir",
    place / "strict",
    f"--config.data.dir={place / 'data'}",
    "--config.data.max_unreadable=2",
  )
  lines = [line for line in err.splitlines() if line.startswith("mmjax:")]
  assert code == 1 and len(lines) == 1 and "data.max_unreadable is 2" in lines[0]


def test_generate_skips_and_names_what_cannot_be_read(place, trained, capsys):
  code, out, err = command(
    capsys, "generate", "--checkpoint", trained[0], place / "media", "--json"
  )
  written = [row["file"].rpartition("/")[2] for row in json.loads(out)]
  assert code == 0 and sorted(written) == sorted(ODD)
  for name, (_, words) in BAD.items():
    line = next(line for line in err.splitlines() if name in line)
    assert line.startswith("skipped ") and words in line
  assert f"{len(BAD)} skipped" in err
  code, out, err = command(
    capsys,
    "generate",
    "--checkpoint",
    trained[0],
    *(place / "media" / name for name in BAD),
    "--beams",
    2,
  )
  assert code == 1 and out == "" and f"none of the {len(BAD)} files could be read" in err
  code, out, err = command(
    capsys, "generate", "--checkpoint", trained[0], place / "media" / "zero.txt"
  )
  assert code == 1 and "no picture, sound or video by its ending" in err
  code, out, err = command(
    capsys,
    "embed",
    "--checkpoint",
    trained[0],
    "--audio",
    place / "media",
    "--out",
    place / "e.npz",
  )
  assert code == 1 and "no shared space" in err and not (place / "e.npz").exists()


def test_conversion_and_the_sample_sheet(place, capsys):
  code, out, _ = command(
    capsys,
    "data",
    "convert",
    "folder",
    place / "media",
    "--name",
    "converted",
    "--data-dir",
    place / "data",
    "--workers",
    1,
    "--json",
  )
  summary = json.loads(out)
  assert (
    code == 0 and summary["examples"] == len(ODD) and summary["skipped"] == {"unreadable": len(BAD)}
  )
  code, out, _ = command(
    capsys, "data", "show", "mine", "--data-dir", place / "data", "--out", place / "sheet.html"
  )
  assert code == 0 and (place / "sheet.html").read_text().count('class="fault"') == len(BAD) - 1, (
    "the empty file is a record without a sound"
  )


def test_a_caption_that_is_all_masked_counts_nothing():
  space: dict = {}
  exec(CONFIG, space)
  c = space["get_config"]()
  del c.model.encoders["audio"], c.model.encoders["video"]
  c.data.modalities, c.objectives.write.source = ("image", "text"), ("image",)
  c = configs.resolve(c)
  model = make_model(c)
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_spec(c, 3))
  rng = np.random.default_rng(0)
  batch["text"]["tokens"] = rng.integers(5, 60, (3, 8)).astype(np.int32)
  batch["text"]["mask"] = np.array([[True] * 8, [False] * 8, [True] * 4 + [False] * 4])
  batch["image"]["pixels"] = rng.integers(0, 256, batch["image"]["pixels"].shape).astype(np.uint8)
  batch["valid"][:] = True
  params = {"params": tiny.random_params(c)}

  def loss(params, batch):
    def forward(method, *args, **kwargs):
      return model.apply(params, *args, batch, method=method, **kwargs)

    return captioning(forward, batch, jax.random.key(0), source=("image",))["loss"]

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (total, weight), grads = gradient(params, batch)
  other = {
    **batch,
    "text": {
      **batch["text"],
      "tokens": np.where(batch["text"]["mask"], batch["text"]["tokens"], 7),
    },
  }
  assert (
    weight == 12
    and np.isfinite(total)
    and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  )
  np.testing.assert_allclose(gradient(params, other)[0][0], total, rtol=1e-6)
