"""Retrieval between two modalities: does a picture find its captions, and a caption its pictures?

Identical pictures, sounds, clips or series (equal keys of their content) are one item whose
captions are all of theirs, and equal captions (equal text key) are one item, so nothing right can
count as wrong. The rank of a query is that of its best positive; any positive counts (as in the
Karpathy protocol for COCO and Flickr30k). Ties are pessimistic: a negative whose similarity is
equal to the best positive's within `TIE`, or is not a number, stands before it. So the result
depends neither on the order of items nor on rounding between batch sizes, blocks and devices, and a
model that has collapsed to one point scores chance at best.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmjax.config import UserError
from mmjax.evaluation import Context, Result, sample_evenly
from mmjax.parallel import multihost, rules
from mmjax.parallel.mesh import batch_shards
from mmjax.ranges import Count

TIE = 1e-6  # cosine; float32 rounding of a dot product of unit vectors stays below it
BLOCK = (1024, 4096)  # queries x gallery items of similarity held at once, over all devices


def retrieval(
  context: Context,
  *,
  source: str,
  split: str = "test",
  languages: tuple[str, ...] = (),
  between: tuple[str, ...] = ("image", "text"),
  by: str = "",
  examples: Count = 8,
) -> Result:
  """R@1, R@5, R@10 and the median rank, from one modality to another and back, over a whole split
  as the gallery.

  source: a data set. split: which of its splits. languages: captions of these count (() = those
  that data.sources reads of it, else all).
  between: two modalities;
  equal pictures, sounds, clips and series are one item, texts are the captions. by: a name in the
  records' facts ("voice"): R@1 of queries of the first modality is also given for each of its
  values. examples: queries that the report shows, each way. Metrics: "image_to_text/R@1", ...,
  "text_to_image/median_rank", the sizes "images" and "texts" (or whatever the modalities are) of
  the two galleries, and "unreadable": examples that could not be read and were left out with
  captions that are only theirs.
  """
  where = f"evaluation.evaluators.{context.name}"
  if len(set(between)) != 2:
    raise UserError(f"{where}.between is {tuple(between)!r}: name two different modalities")
  data = context.data(source, split, languages)
  media = {modality: context.media(data, modality) for modality in between if modality != "text"}
  valid = np.logical_and.reduce([m.valid for m in media.values()])
  keys = {modality: np.asarray(data.media_keys[modality]) for modality in media}
  if "text" in between:
    captions = data.captions
    texts = [c[0] for c in captions]
    owners = np.array([c[3] for c in captions], np.int64)
    key_of_text = text_keys([c[2] for c in captions])
  else:  # the second modality stands where the captions do
    texts, owners, key_of_text = None, np.arange(len(data)), keys[between[1]]
  first = between[1] if between[0] == "text" else between[0]
  items = merge(keys[first], valid, owners, key_of_text)
  if not len(items.pairs):
    of = "picture" if first == "image" else first
    what = (
      f"readable {of} with a caption in {', '.join(languages) or 'any language'}"
      if texts
      else f"readable {of} with {between[1]}"
    )
    raise UserError(f"{where}: {source} split {split} has no {what}")
  other = between[1] if first == between[0] else between[0]
  vectors = {first: media[first].vectors[items.images]}
  if texts:
    vectors[other] = context.texts(data, [texts[i] for i in items.texts])
  else:
    vectors[other] = media[other].vectors[items.texts]
  metrics, figures = {}, {}
  show = {
    first: _shower(data, first, items.images),
    other: _shower(data, other, items.texts, texts),
  }
  for query, target in (between, between[::-1]):
    pairs = items.pairs if query == first else items.pairs[:, ::-1]
    rank = ranks(vectors[query], vectors[target], pairs, context.mesh)
    metrics.update({f"{query}_to_{target}/{name}": value for name, value in recall(rank).items()})
    if by and query == first:
      values = np.array([str(data.facts[i].get(by, "")) for i in items.images])
      metrics.update(
        {
          f"{query}_to_{target}/{v}/R@1": float(np.mean(rank[values == v] <= 1))
          for v in np.unique(values)
        }
      )
    figures[f"{query}_to_{target}"] = _examples(query, target, vectors, pairs, rank, examples, show)
  sizes = {first: items.images, other: items.texts}
  metrics.update(
    {f"{m}s" if m in ("image", "text") else m: float(len(sizes[m])) for m in (first, other)}
  )
  metrics["unreadable"] = float((~valid).sum())
  return Result(metrics, figures)


class Items(NamedTuple):
  """Merged galleries: images int [I], texts int [T] (the first example or caption of each item),
  pairs int [P, 2] (image, text).
  """

  images: np.ndarray
  texts: np.ndarray
  pairs: np.ndarray


def merge(media_keys: np.ndarray, valid: np.ndarray, owners: np.ndarray, keys: np.ndarray) -> Items:
  """Merges equal pictures (or other media) and equal captions. media_keys uint64 [N], valid bool
  [N], owners int [C] (example of each caption), keys uint64 [C]. Invalid pictures, pictures without
  a caption and captions without a picture are left out.
  """
  real = np.flatnonzero(valid[owners])
  text_first, text_item = np.unique(keys[real], return_index=True, return_inverse=True)[1:]
  image_first, image_item = np.unique(
    media_keys[owners[real]], return_index=True, return_inverse=True
  )[1:]
  pairs = (
    np.unique(np.stack([image_item, text_item], axis=1), axis=0)
    if len(real)
    else np.zeros((0, 2), np.int64)
  )
  return Items(owners[real][image_first], real[text_first], pairs)


def text_keys(keys: Any) -> np.ndarray:
  """uint64 [C] of caption keys given as uint64 or as uint32 pairs."""
  array = np.asarray(keys)
  if array.ndim == 2:
    return array[:, 0].astype(np.uint64) << np.uint64(32) | array[:, 1].astype(np.uint64)
  return array.astype(np.uint64)


def recall(rank: np.ndarray) -> dict[str, float]:
  """{"R@1", "R@5", "R@10", "median_rank"} of ranks int [N], 1 = first."""
  return {
    **{f"R@{k}": float(np.mean(rank <= k)) for k in (1, 5, 10)},
    "median_rank": float(np.median(rank)),
  }


def ranks(
  queries: np.ndarray,
  gallery: np.ndarray,
  pairs: np.ndarray,
  mesh: Mesh,
  block: tuple[int, int] = BLOCK,
) -> np.ndarray:
  """Rank int32 [Q] of each query's best positive: one plus the negatives that are at least as
  similar.

  queries float32 [Q, D], gallery float32 [G, D], pairs int [P, 2] of (query, gallery item) that
  belong together; every query needs one. Similarities are dot products in full float32, computed in
  blocks whose queries are split over the mesh.
  """
  pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
  threshold = _best(queries, gallery, pairs) - TIE
  row_sharding, everywhere = rules.batch_sharding(mesh), rules.replicated(mesh)
  shards = batch_shards(mesh)
  rows = -(-min(block[0], len(queries)) // shards) * shards
  columns = min(block[1], len(gallery))
  count = _count(row_sharding)
  total = np.zeros(len(queries), np.int64)
  for q in range(0, len(queries), rows):
    some = _place(_padded(queries[q : q + rows], rows), row_sharding)
    limit = _place(_padded(threshold[q : q + rows], rows), row_sharding)
    mine = pairs[np.searchsorted(pairs[:, 0], q) : np.searchsorted(pairs[:, 0], q + rows)]
    counts = 0
    for g in range(0, len(gallery), columns):
      near = mine[(mine[:, 1] >= g) & (mine[:, 1] < g + columns)]
      left_out = np.zeros((rows, columns), bool)
      left_out[near[:, 0] - q, near[:, 1] - g] = True
      left_out[:, len(gallery) - g :] = True
      counts = counts + count(
        some,
        _place(_padded(gallery[g : g + columns], columns), everywhere),
        limit,
        _place(left_out, row_sharding),
      )
    total[q : q + rows] = np.asarray(multihost.gather_rows(counts))[: len(queries) - q]
  return (total + 1).astype(np.int32)


@functools.lru_cache(maxsize=8)
def _count(row_sharding: NamedSharding):
  def count(queries, gallery, limit, left_out):
    similarity = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(~(similarity < limit[:, None]) & ~left_out, axis=1, dtype=jnp.int32)

  return jax.jit(count, out_shardings=row_sharding)


def _best(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Similarity float32 [Q] of the best positive of each query; pairs are sorted by query."""
  if len(np.unique(pairs[:, 0])) != len(queries):
    raise ValueError("every query needs a positive")
  similarity = np.empty(len(pairs), np.float32)
  for start in range(0, len(pairs), 65536):
    q, g = pairs[start : start + 65536].T
    similarity[start : start + 65536] = np.einsum(
      "nd,nd->n", queries[q].astype(np.float64), gallery[g]
    )
  return np.maximum.reduceat(similarity, np.searchsorted(pairs[:, 0], np.arange(len(queries))))


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """A host array that every process holds whole, laid out over the devices."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
  return (
    np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)]) if len(x) < rows else x
  )


def _shower(data, modality: str, index: np.ndarray, texts: list[str] | None = None):
  """What the report shows of item i: a picture, a text, or the name of an example."""
  if modality == "image":
    return lambda i: dict(picture=data.picture(int(index[i])))
  if texts:
    return lambda i: dict(text=texts[index[i]])
  named: dict[int, str] = {}
  for caption in data.captions:
    named.setdefault(caption[3], caption[0])
  return lambda i: dict(text=f"{modality} {named.get(int(index[i]), int(index[i]))}")


def _examples(query, target, vectors, pairs, rank, count, show) -> dict[str, Any]:
  """A figure: `count` queries spread over the split, each with its five most similar items, scores
  and which are right.
  """
  rows = []
  for i in sample_evenly(len(vectors[query]), count):
    similarity = vectors[target] @ vectors[query][i]
    correct = set(pairs[pairs[:, 0] == i, 1].tolist())
    top = np.argsort(-similarity, kind="stable")[:5]
    rows.append(
      dict(
        **show[query](i),
        rank=int(rank[i]),
        of=len(vectors[target]),
        expected=[show[target](j) for j in sorted(correct)[:3]],
        top=[
          dict(**show[target](j), score=float(similarity[j]), correct=int(j) in correct)
          for j in top
        ],
      )
    )
  return dict(kind="retrieval", query=query, target=target, rows=rows)
