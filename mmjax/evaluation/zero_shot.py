"""Zero-shot classification: a picture, sound, clip or series gets the class whose prompts are
nearest (Radford et al. 2021, arXiv:2103.00020, 3.1.4).

The embedding of a class is the normalised mean of the embeddings of its prompts: every name of the
class in every template.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.config import UserError
from mmjax.evaluation import Context, Result, prompts
from mmjax.evaluation.retrieval import ranks


def zero_shot(
  context: Context,
  *,
  source: str,
  split: str = "test",
  modality: str = "image",
  languages: tuple[str, ...] = (),
  classes: tuple = (),
  templates: tuple[str, ...] = (),
) -> Result:
  """Accuracy of classification by prompts, without any training on the classes.

  source: a data set with labels. split: which of its splits. modality: what is classified, "image",
  "audio", "video" or "series". languages: of the prompts, () = those that
  data.sources reads of it, else English; several are one ensemble, and each is
  also reported alone. classes: ((label, (name, ...)), ...) instead of the names in
  mmjax; labels it leaves out keep theirs. templates: prompts with {} for the name, instead of
  mmjax's own of the modality and language.
  Metrics: "accuracy", "accuracy@5" from 6 classes on, "mean_class_accuracy" (the mean over classes
  of each one's accuracy), "examples", "unreadable" (left out). Ties are pessimistic.
  """
  where = f"evaluation.evaluators.{context.name}"
  if modality == "text":
    raise UserError(
      f"{where}.modality is 'text', which the classes are: name what is classified by them"
    )
  data = context.data(source, split, ())
  labels, label_names = np.asarray(data.labels), list(data.label_names)
  own = _own_names(where, classes, label_names)
  for template in templates:
    if "{}" not in template:
      raise UserError(f"{where}.templates: {template!r} has no {{}} for the name of the class")
  media = context.media(data, modality)
  rows = np.flatnonzero(media.valid & (labels >= 0))
  if not len(rows) or len(label_names) < 2:
    raise UserError(
      f"{where}: {source} split {split} has no readable {modality} with a label of at least two "
      "classes"
    )
  by_language = {}
  for language in languages or context.languages(source) or ("en",):
    prompt_sets = [
      [
        t.replace("{}", name)
        for name in own.get(label) or prompts.names(label, language)
        for t in templates or prompts.templates(language, modality)
      ]
      for label in label_names
    ]
    by_language[language] = class_embeddings(lambda texts: context.texts(data, texts), prompt_sets)
  both = normalise(np.sum(list(by_language.values()), axis=0))
  metrics, predicted = classify(media.vectors[rows], both, labels[rows], context.mesh)
  if len(by_language) > 1:
    for language, vectors in by_language.items():
      metrics[f"{language}/accuracy"] = classify(
        media.vectors[rows], vectors, labels[rows], context.mesh
      )[0]["accuracy"]
  metrics.update(examples=float(len(rows)), unreadable=float((~media.valid).sum()))
  return Result(metrics, {"confusion": confusion(labels[rows], predicted, label_names)})


def class_embeddings(embed, prompt_sets: Sequence[Sequence[str]]) -> np.ndarray:
  """Embeddings float32 [C, D] of classes, each given by its prompts; `embed(list of N texts) -> [N,
  D]`.
  """
  vectors = embed([prompt for prompt_set in prompt_sets for prompt in prompt_set])
  starts = np.cumsum([0] + [len(prompt_set) for prompt_set in prompt_sets[:-1]])
  return normalise(np.add.reduceat(vectors.astype(np.float64), starts, axis=0))


def normalise(vectors: np.ndarray) -> np.ndarray:
  """Rows of length one, float32 [N, D]; a row of zeros stays."""
  return (vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)).astype(
    np.float32
  )


def classify(
  media: np.ndarray, classes: np.ndarray, labels: np.ndarray, mesh
) -> tuple[dict[str, float], np.ndarray]:
  """Metrics, and predicted classes int [N], of media float32 [N, D] against classes float32 [C, D];
  labels int [N].
  """
  rank = ranks(media, classes, np.stack([np.arange(len(labels)), labels], axis=1), mesh)
  metrics = {
    "accuracy": float(np.mean(rank <= 1)),
    **({"accuracy@5": float(np.mean(rank <= 5))} if len(classes) >= 6 else {}),
    "mean_class_accuracy": mean_class_accuracy(labels, rank <= 1),
  }
  predicted = np.concatenate(
    [np.argmax(media[i : i + 4096] @ classes.T, axis=1) for i in range(0, len(media), 4096)]
  )
  return metrics, predicted


def mean_class_accuracy(labels: np.ndarray, correct: np.ndarray) -> float:
  """The mean, over the classes that occur in `labels`, of the share that is right."""
  return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def confusion(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict:
  """A figure: matrix[i][j] = examples of class i that were taken for class j."""
  matrix = np.zeros((len(names), len(names)), np.int64)
  np.add.at(matrix, (labels, predicted), 1)
  return dict(kind="confusion", names=list(names), matrix=matrix)


def _own_names(where: str, classes: tuple, label_names: list[str]) -> dict[str, tuple[str, ...]]:
  known = {prompts.words(label): label for label in label_names}
  own = {}
  for pair in classes:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
      raise UserError(f"{where}.classes must be ((label, (name, ...)), ...), not {pair!r}")
    label = known.get(prompts.words(str(pair[0])))
    if label is None:
      raise UserError(
        f"{where}.classes names {pair[0]!r}, which is no class of the data; there are: "
        f"{', '.join(label_names)}"
      )
    own[label] = (pair[1],) if isinstance(pair[1], str) else tuple(pair[1])
  return own
