"""A checkpoint as an object that encodes pictures and texts: `mmjax.load(DIR)`.

It carries the tokenizer and the preprocessing of the checkpoint, so that no data folder is needed, and runs on any
mesh.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageOps

from mmjax.config import UserError
from mmjax.data.image import ImageTransform, Unreadable
from mmjax.data.text import TextTransform, Tokenizer
from mmjax.models import make_model
from mmjax.parallel import rules
from mmjax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh

Picture = str | os.PathLike | bytes | np.ndarray | Image.Image
BUCKETS = (1, 8, 32, 128, 512)  # batches are filled up to one of these, so that a handful of programs serve every size


class Predictor:
  """Encodes pictures and texts with the parameters of a checkpoint.

  `scale`, `bias`: floats of the trained temperature, logits = scale * cosine + bias. `width`: channels of an embedding.
  `config`, `assets`, `params`, `mesh`: what it was made of.
  """

  def __init__(self, config, params: Any, assets: Mapping[str, bytes], mesh: Mesh | None = None, batch_size: int = 128,
               model_state: Mapping[str, Any] | None = None):
    """params: nested dict of arrays, anywhere. assets: {file name: content} with the tokenizer's files.
    batch_size: the most examples that go through the model at once. model_state: what the model keeps besides parameters
    (batch statistics), {collection: nested dict}."""
    self.config, self.assets = config, dict(assets)
    self.mesh = _local_mesh(config) if mesh is None else mesh
    self._model = make_model(config)
    self.params = jax.device_put(params, param_shardings(config, self.mesh))
    self.model_state = jax.device_put(dict(model_state or {}), rules.replicated(self.mesh))
    shards = batch_shards(self.mesh)
    sizes = [b for b in BUCKETS if b < batch_size] + [batch_size]
    self._buckets = sorted({-(-size // shards) * shards for size in sizes})
    encoders = config.model.encoders
    self._image = ImageTransform(config.data.image, train=False) if "image" in encoders else None
    self.text_transform = (
      TextTransform(config.data.text, Tokenizer.from_assets(self.assets)) if "text" in encoders else None
    )
    with self._rules():
      self.scale, self.bias = (float(x) for x in self._model.apply({"params": self.params}, method="temperature"))
      self._embed = jax.jit(
        functools.partial(_embed, self._model), static_argnums=1, out_shardings=rules.batch_sharding(self.mesh)
      )
    self.width = int(config.model.width)

  @classmethod
  def load(cls, checkpoint: str | os.PathLike, *, mesh: Mesh | None = None, batch_size: int = 128) -> Predictor:
    """Opens a run folder, a step folder or an import folder. The parameters are the moving average where the run kept
    one.

    mesh: devices to run on; default all of this process, each with whole parameters. Raises UserError: no checkpoint
    there, or not a whole one.
    """
    from mmjax.state import checkpoint as checkpoints

    folder = checkpoints.find_checkpoint(checkpoint)
    config = checkpoints.load_config(folder)
    mesh = _local_mesh(config) if mesh is None else mesh
    shapes, shardings = param_spec(config), param_shardings(config, mesh)
    spec = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    params, state = checkpoints.load_params(folder, spec), checkpoints.load_model_state(folder)
    return cls(config, params, checkpoints.load_assets(folder), mesh, batch_size, state)

  def encode_image(self, images: Picture | Iterable[Picture]) -> np.ndarray:
    """float32 [N, D], rows of length one, of pictures: paths, encoded bytes, PIL images, or arrays uint8 [H, W, 3],
    mixed as you like.

    Raises UserError naming the picture that cannot be read.
    """
    self._needs("image")
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)) or (
      isinstance(images, np.ndarray) and images.ndim == 3
    ):
      images = [images]
    return self.encode_pixels(in_threads(self.pixels, images))

  def encode_pixels(self, pixels: Iterable[np.ndarray]) -> np.ndarray:
    """float32 [N, D] of pictures that `pixels` has prepared, uint8 [size, size, 3] each."""
    self._needs("image")
    return self._encode("image", ({"pixels": np.stack(chunk)} for chunk in _chunks(pixels, self._buckets[-1])))

  def encode_text(self, texts: str | Iterable[str]) -> np.ndarray:
    """float32 [N, D], rows of length one, of texts; what is longer than the model's tokens is cut."""
    self._needs("text")
    texts = [texts] if isinstance(texts, str) else texts
    return self._encode("text", (self.tokens(chunk) for chunk in _chunks(texts, self._buckets[-1])))

  def classify(
    self, images: Picture | Iterable[Picture], labels: Sequence[str], templates: Sequence[str] = ("{}",)
  ) -> np.ndarray:
    """Probabilities float32 [N, C] that each picture belongs to each label: softmax over the labels of the trained
    logits.

    A label is the normalised mean of its embeddings in `templates`, each with {} for the label.
    """
    from mmjax.evaluation.zero_shot import class_embeddings

    if not labels or not templates or any("{}" not in template for template in templates):
      raise UserError(
        f"classify needs labels, and templates with {{}} for the label, not {list(labels)!r} and {list(templates)!r}"
      )
    classes = class_embeddings(self.encode_text, [[t.replace("{}", label) for t in templates] for label in labels])
    logits = self.scale * (self.encode_image(images).astype(np.float64) @ classes.T)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

  def pixels(self, image: Picture, name: str = "") -> np.ndarray:
    """One picture as the model takes it: uint8 [size, size, 3]. Raises UserError (Unreadable) naming it."""
    self._needs("image")
    try:
      return self._image(_content(image))
    except Unreadable as error:
      raise Unreadable(f"{name or _name(image)}: {error}") from error

  def tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{"tokens" int32 [N, L], "mask" bool [N, L], "key" uint32 [N, 2]} as the model takes them."""
    for text in texts:
      if not isinstance(text, str):
        raise UserError(f"{text!r} ({type(text).__name__}) is no text: give strings")
    return self.text_transform(list(texts))

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of config and parameters: equal for models that give equal embeddings."""
    mark = hashlib.blake2b(
      repr([self.config.model.to_dict(), self.config.data.image.to_dict()]).encode(), digest_size=8
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path((self.params, self.model_state) if self.model_state else self.params):
      mark.update(jax.tree_util.keystr(path).encode())
      mark.update(np.ascontiguousarray(leaf).tobytes())
    return mark.hexdigest()

  def _encode(self, modality: str, batches: Iterable[dict[str, np.ndarray]]) -> np.ndarray:
    """Runs batches of any size, filled up to a bucket; the next one is prepared while the devices work on the last."""
    waiting, rows = None, []
    with self._rules():
      for batch in batches:
        batch.pop("key", None)
        count = len(next(iter(batch.values())))
        size = next(bucket for bucket in self._buckets if bucket >= count)
        filled = {k: np.concatenate([v, np.zeros((size - count, *v.shape[1:]), v.dtype)]) for k, v in batch.items()}
        result = self._embed({"params": self.params, **self.model_state}, modality, jax.device_put(filled, rules.batch_sharding(self.mesh))), count
        if waiting:
          rows.append(np.asarray(waiting[0])[: waiting[1]])
        waiting = result
      if waiting:
        rows.append(np.asarray(waiting[0])[: waiting[1]])
    return np.concatenate(rows) if rows else np.zeros((0, self.width), np.float32)

  def _rules(self):
    return rules.use(self.mesh, rules.logical_rules(self.config))

  def _needs(self, modality: str) -> None:
    if modality not in self.config.model.encoders:
      raise UserError(
        f"this checkpoint has no encoder for {modality}; it has {', '.join(sorted(self.config.model.encoders))}"
      )


def in_threads(function: Callable, items: Iterable, ahead: int = 64) -> Iterator:
  """`function` of each item, in order, worked out by threads at most `ahead` items before it is asked for."""
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for chunk in _chunks(items, ahead):
      yield from pool.map(function, chunk)


def param_spec(config) -> Any:
  """Shapes and dtypes of a config's parameters: nested dict of ShapeDtypeStruct. Runs nothing."""
  import flax.linen as nn

  return nn.unbox(_abstract(config))


def param_shardings(config, mesh: Mesh) -> Any:
  """Where each parameter lies on `mesh` by the config's `sharding`."""
  return rules.param_shardings(_abstract(config), mesh, rules.logical_rules(config))


def _abstract(config) -> Any:
  from mmjax.data.pipeline import batch_spec

  model = make_model(config)
  return jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch_spec(config, 1))["params"]


def _embed(model, variables: Any, modality: str, inputs: dict[str, jax.Array]) -> jax.Array:
  return model.apply(variables, modality, {modality: inputs}, method="embedding").astype(jnp.float32)


def _local_mesh(config) -> Mesh:
  """Every device of this process side by side, whatever mesh the checkpoint was trained on."""
  tree = config.to_dict()
  tree["mesh"] = {axis: -1 if axis == BATCH_AXES[-2] else 1 for axis in tree["mesh"]}
  return make_mesh(type(config)(tree), jax.local_devices())


def _content(image: Picture) -> bytes | np.ndarray:
  """What the picture transform takes: encoded bytes, or uint8 [H, W, 3]."""
  if isinstance(image, bytes):
    return image
  if isinstance(image, (str, os.PathLike)):
    try:
      return Path(image).read_bytes()
    except OSError as error:
      raise Unreadable(f"cannot be opened ({error.strerror or error})") from error
  if isinstance(image, Image.Image):
    data = io.BytesIO()
    upright = ImageOps.exif_transpose(image)
    (upright if upright.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA") else upright.convert("RGB")).save(
      data, "PNG", compress_level=0
    )
    return data.getvalue()
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
    raise Unreadable(f"must be uint8 of shape [H, W, 3], but is {array.dtype} of shape {list(array.shape)}")
  return array


def _name(image: Picture) -> str:
  return str(image) if isinstance(image, (str, os.PathLike)) else f"a picture given as {type(image).__name__}"


def _chunks(items: Iterable, size: int) -> Iterator[list]:
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  if chunk:
    yield chunk
