"""A tiny random model with a real tokenizer, saved as an import folder; and pictures to give it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from mmjax import config as configs
from mmjax.data.pipeline import batch_spec
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.inference.parameters import param_spec
from mmjax.models import make_model
from mmjax.state.checkpoint import save_import

WORDS = (
  "a red heart",
  "a black cat",
  "two blue birds",
  "the flag of Chad",
  "a slice of pizza",
  "rain on the sea",
)


def config(**image):
  c = configs.base()
  c.data.image.size = 16
  c.data.text = dict(tokenizer="tiny", vocab_size=512, length=8)
  c.model = dict(
    name="dual_encoder",
    width=16,
    bias=True,
    encoders=dict(
      image=dict(kind="vit", patch=8, width=16, depth=2, heads=2, **image),
      text=dict(kind="transformer", width=16, depth=2, heads=2),
    ),
  )
  c.precision.compute = "float32"
  c.train.batch_size = 8
  c.objectives.align = dict(kind="contrastive", between=("image", "text"))
  return configs.resolve(c)


def media_config(name: str, encoders: tuple[str, ...], **changes):
  """A resolved config of any kind of model with tiny encoders of these modalities. changes:
  {"data.label": "label", ...}.
  """
  c = configs.base()
  c.data.image.size, c.data.video.size, c.data.video.frames = 16, 16, 3
  c.data.audio.rate, c.data.audio.seconds, c.data.series.length, c.data.series.channels = (
    8000,
    0.25,
    8,
    2,
  )
  c.data.text = dict(tokenizer="tiny", vocab_size=512, length=8)
  block = dict(depth=1, heads=2)
  kinds = dict(
    image=dict(kind="vit", patch=8, **block),
    audio=dict(kind="whisper", mels=8, **block),
    video=dict(kind="frames", temporal="mean", patch=8, frame_depth=1, heads=2),
    series=dict(kind="series", patch=4, **block),
    text=dict(kind="transformer", **block),
  )
  c.model = dict(name=name, width=16, encoders={modality: kinds[modality] for modality in encoders})
  c.data.modalities = tuple(dict.fromkeys((*encoders, "text") if name != "encoder" else encoders))
  c.precision.compute, c.train.batch_size = "float32", 8
  return configs.resolve(c, [f"{key}={value!r}" for key, value in changes.items()])


def save(config, folder: Path, found: Mapping[str, bytes] | None = None, state=None) -> Path:
  """A checkpoint of random parameters of a config. found: its assets, None = a tokenizer; state:
  what the model keeps besides parameters.
  """
  found = assets(folder) if found is None else found
  save_import(str(folder / "checkpoint"), random_params(config), config, found, state)
  return folder / "checkpoint"


def random_params(config, seed: int = 0):
  """Random numbers in the shapes of a config's parameters; nothing is compiled for them."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), param_spec(config)
  )


def random_statistics(config, seed: int = 0):
  """Random running statistics, all positive, in the shapes of a config's."""
  rng = np.random.default_rng(seed)
  spec = nn.unbox(jax.eval_shape(make_model(config).init, jax.random.key(0), batch_spec(config, 2)))
  state = {name: tree for name, tree in spec.items() if name != "params"}
  return jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype), state)


def params(config, seed: int = 0):
  """Random parameters, large enough that different inputs give clearly different embeddings."""
  model = make_model(config)
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_spec(config, 2))
  tree = nn.unbox(jax.jit(model.init)(jax.random.key(seed), batch)["params"])
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32), tree
  )


def assets(folder: Path) -> dict[str, bytes]:
  return {
    "tokenizer.model": train_tokenizer(list(WORDS) * 20, folder / "tiny.model", 420).read_bytes()
  }


def checkpoint(folder: Path, seed: int = 0, **image) -> Path:
  c = config(**image)
  save_import(str(folder / "checkpoint"), params(c, seed), c, assets(folder))
  return folder / "checkpoint"


def pixels(count: int, seed: int = 0, size: int = 20) -> list[np.ndarray]:
  """Smooth random pictures uint8 [size, size, 3]."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
  return [np.asarray(Image.fromarray(x).resize((size, size))) for x in small]


def png(array: np.ndarray) -> bytes:
  data = io.BytesIO()
  Image.fromarray(array).save(data, "PNG")
  return data.getvalue()
