"""Stand-ins for a data set and a model: pictures and captions are vectors already, so that results
can be worked out by hand.
"""

from __future__ import annotations

import jax
import numpy as np

from mmjax import config as configs
from mmjax.evaluation import Evaluation
from mmjax.parallel.mesh import make_mesh


class Data:
  """An `EvaluationData` whose pictures and texts are given vectors: vectors [N, D], captions
  [(text, lang, key, index)].
  """

  def __init__(
    self,
    vectors,
    captions=(),
    text_vectors=None,
    *,
    batch_size=4,
    valid=None,
    image_keys=None,
    labels=None,
    label_names=(),
  ):
    self.vectors, self.captions = np.asarray(vectors, np.float32), list(captions)
    self.text_vectors = {} if text_vectors is None else text_vectors
    self.batch_size = batch_size
    self.valid = np.ones(len(self.vectors), bool) if valid is None else np.asarray(valid)
    keys = np.arange(len(self.vectors)) if image_keys is None else image_keys
    self.media_keys = {"image": np.asarray(keys, np.uint64)}
    self.labels = (
      np.full(len(self.vectors), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
    )
    self.label_names = tuple(label_names)

  def __len__(self):
    return len(self.vectors)

  def images(self):
    return self.media("image")

  def media(self, modality):
    return self._batches(modality, self.vectors, self.valid)

  def texts(self, texts):
    rows = np.array([self.text_vectors[t] for t in texts], np.float32)
    return self._batches("text", rows, np.ones(len(rows), bool))

  def picture(self, i):
    return np.full((8, 8, 3), 20 * i % 255, np.uint8)

  def _batches(self, name, vectors, valid):
    for start in range(0, len(vectors), self.batch_size):
      rows, real = vectors[start : start + self.batch_size], valid[start : start + self.batch_size]
      extra = self.batch_size - len(rows)
      rows = np.concatenate([rows, np.full((extra, rows.shape[1]), 7.0, np.float32)])
      yield {
        name: {"vectors": rows},
        "valid": np.concatenate([real, np.zeros(extra, bool)]),
        "id": ["x"] * self.batch_size,
      }


def evaluation(evaluators: dict, data, devices: int = 8, **encoders) -> Evaluation:
  """An `Evaluation` over fake data: one `Data`, or {split: Data}. encoders: entries beside those of
  image and text.
  """
  c = configs.base()
  c.model = dict(
    name="dual_encoder",
    encoders=dict(image=dict(kind="vit"), text=dict(kind="transformer"), **encoders),
  )
  c.data.text.tokenizer = "none"
  c.evaluation.evaluators = evaluators
  apply = jax.jit(
    lambda params, method, args, batch: batch[args[0]]["vectors"] * params, static_argnums=(1, 2)
  )
  result = Evaluation(configs.resolve(c), apply, make_mesh(c, jax.devices()[:devices]))
  result.data = lambda source, split, languages, text: (
    data[split] if isinstance(data, dict) else data
  )
  return result
