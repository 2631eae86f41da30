"""Gradients of a batch that is cut into parts to save memory: `gradients_in_parts`.

Objectives of single examples need no more than sums over the parts. Those that couple examples
(contrastive losses) use the two-pass embedding cache of Gao et al. 2021 (arXiv:2101.06983):

1. Outputs of the model for the whole batch, computed part by part without gradients (`Recorder`).
2. The objective on the whole batch, and its derivatives by those outputs (`Replay`).
3. Those derivatives back through the model, part by part, with the same randomness.

Encoders with batch statistics are not cut: `encode_whole` gives their outputs for the whole batch,
and parts get their rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.models.layers import Encoded
from mmjax.objectives import MINIMISED, Losses
from mmjax.parallel.rules import constrain_batch
from mmjax.training.forward import Forward, is_shared

if TYPE_CHECKING:
  from mmjax.training.step import Objective, TrainStep

Array = jax.Array


class Gradients(NamedTuple):
  """loss: float32 scalar. gradients: like the parameters. sums: {objective: its Losses}."""

  loss: Array
  gradients: Any
  sums: dict[str, Losses]
  model_state: Any


def gradients_in_parts(
  step: TrainStep,
  params: Any,
  model_state: Any,
  batch: dict,
  rng: Array,
  objectives: tuple[Objective, ...],
  teachers: Any = (),
) -> Gradients:
  """The loss of `objectives` and its gradients, of a batch in train.microbatches parts one after
  the other: equal to `TrainStep.loss` up to rounding (but for dropout, drawn per part).
  """
  count, whole, fixed = (
    step.config.train.microbatches,
    step.uncut_encoders,
    step.trainable(params),
  )
  trained, frozen = step.split(params)
  coupled = [objective for objective in objectives if objective.couples_examples]
  single = [objective for objective in objectives if not objective.couples_examples]
  forward_whole = step.forward(fixed, model_state, batch, rng, teachers)

  def forward_part(params: Any, part: Part) -> Forward:
    part_rng = jax.random.fold_in(rng, part.number)
    forward = step.forward(params, model_state, part.batch, part_rng, teachers)
    forward.views, forward.encoded = list(part.views), part.encoded if whole else ()
    return forward

  # 1. What objectives that couple examples ask for, of the whole batch, without gradients.
  def compute(request: Request, views: list[dict]) -> Any:
    parts = Part.all(count, batch, views, encode_whole(forward_whole, whole, views))

    def answer(_: None, part: Part) -> tuple[None, Any]:
      return None, request.answer(forward_part(fixed, part))

    return jax.lax.stop_gradient(join_rows(jax.lax.scan(answer, None, parts)[1]))

  recorder = Recorder(forward_whole, compute)
  for objective in coupled:
    objective(recorder, batch, rng)

  # 2. Those objectives on the outputs: derivatives by the outputs, and by shared parameters.
  outputs, join = separate(recorder.outputs)

  def joined(trained: Any) -> Any:
    return step.trainable(step.join(trained, frozen))

  def coupled_loss(outputs: list[Array], trained: Any) -> tuple:
    replay = Replay(recorder, joined(trained), join(outputs))
    sums = {objective.name: objective(replay, batch, rng) for objective in coupled}
    return step.total(sums), sums

  (loss, sums), (cotangents, gradients) = jax.value_and_grad(
    coupled_loss, argnums=(0, 1), has_aux=True
  )(outputs, trained)

  # Encoders with batch statistics see all rows at once; the derivatives by their parameters go by
  # way of their outputs.
  def encode(trained: Any) -> tuple:
    forward = step.forward(joined(trained), model_state, batch, rng, teachers)
    encoded = encode_whole(forward, whole, recorder.views)
    return separate(encoded)[0], (encoded, forward.model_state)

  of_encoders: Any = jax.vjp(encode, trained, has_aux=True)
  _, encoders_vjp, (encoded, moved) = of_encoders
  parts = Part.all(count, batch, recorder.views, encoded)

  # The other objectives need their total weights before their sums can be added up (the compiler
  # drops the rest).
  def weights_of_part(_: None, part: Part) -> tuple[None, Any]:
    forward = forward_part(fixed, part)
    sums = {objective.name: objective(forward, part.batch, forward.rng) for objective in single}
    return None, {
      name: {key: losses[key][1] for key in MINIMISED if key in losses}
      for name, losses in sums.items()
    }

  weights = {}
  if single:
    weights = jax.lax.scan(weights_of_part, None, parts)[1]
    weights = jax.tree.map(lambda weight: weight.sum(0), weights)

  # 3. Through the model again, part by part, with the same randomness.
  used: set[str] = set()  # encoders with batch statistics that were asked for

  def gradients_of_part(gradients: Any, inputs: tuple) -> tuple[Any, Any]:
    part, cotangents = inputs
    outputs, join_encoded = separate(part.encoded)

    def part_loss(trained: Any, outputs: list[Array]) -> tuple:
      encoded = join_encoded(outputs)
      forward = forward_part(joined(trained), part._replace(encoded=encoded))
      again = separate([request.answer(forward) for request in recorder.requests])[0]
      total = sum(jnp.vdot(x, cotangent) for x, cotangent in zip(again, cotangents, strict=True))
      sums = {objective.name: objective(forward, part.batch, forward.rng) for objective in single}
      used.update(forward.used)
      return total + step.total(sums, weights), sums

    (more, by_outputs), sums = jax.grad(part_loss, argnums=(0, 1), has_aux=True)(trained, outputs)
    return step.placed(jax.tree.map(jnp.add, gradients, more)), (sums, by_outputs)

  inputs = (parts, split_rows(cotangents, count))
  gradients, (part_sums, by_outputs) = jax.lax.scan(gradients_of_part, gradients, inputs)
  gradients = jax.tree.map(jnp.add, gradients, encoders_vjp(join_rows(by_outputs))[0])
  model_state = {
    collection: {
      name: moved[collection][name] if name in used else old for name, old in modules.items()
    }
    for collection, modules in model_state.items()
  }
  single_sums = jax.tree.map(lambda x: x.sum(0), part_sums)
  return Gradients(loss + step.total(single_sums), gradients, sums | single_sums, model_state)


def with_batch_statistics(model_state: Any, frozen: frozenset[tuple[str, ...]]) -> tuple[str, ...]:
  """The top-level modules that keep statistics of a batch (paths in `model_state`, {collection:
  {module: ...}}) and are not frozen.
  """
  paths = [
    tuple(key.key for key in path)[1:-1]
    for path, _ in jax.tree_util.tree_leaves_with_path(model_state)
  ]
  moving = [path for path in paths if not any(path[:n] in frozen for n in range(1, len(path) + 1))]
  return tuple(dict.fromkeys(path[0] for path in moving))


def encoders_with_batch_statistics(
  config: FrozenConfigDict, model_state: Any, frozen: frozenset[tuple[str, ...]]
) -> tuple[str, ...]:
  """`with_batch_statistics` of a model whose other parts have none. Raises UserError: one has."""
  names = with_batch_statistics(model_state, frozen)
  for name in names:
    if name not in config.model.encoders:
      raise UserError(
        f"train.microbatches: {name} of the model has batch statistics and is no encoder of its "
        "own, so they would be of a part of the batch. Set train.microbatches to 1"
      )
  return names


def encode_whole(
  forward: Forward, modalities: Sequence[str], views: Sequence[dict]
) -> list[dict[str, Encoded]]:
  """{modality: what its encoder makes of it} of the whole batch and of each of its views. forward:
  of the whole batch.
  """
  forward.views = list(views)

  def changed(view: dict, modality: str) -> dict | None:
    return None if view[modality] is forward.batch[modality] else view

  return [
    {
      modality: forward("encode", modality, batch=changed(view, modality))
      for modality in modalities
      if modality in view
    }
    for view in (forward.batch, *views)
  ]


# -- Parts of a batch ------------------------------------------------------------------------------


class Part(NamedTuple):
  """One of the parts of a batch (or all, stacked): its number, its rows of the batch, of the views
  of the batch that objectives made, and of what is encoded already (of the batch, then of the
  views)."""

  number: Array
  batch: dict
  views: list[dict]
  encoded: list[dict[str, Encoded]]

  @classmethod
  def all(
    cls, count: int, batch: dict, views: list[dict], encoded: list[dict[str, Encoded]]
  ) -> Part:
    return cls(jnp.arange(count), *split_rows((batch, list(views), encoded), count))


def split_rows(tree: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]: part m has rows m, m + parts, ..., so that every row stays
  on its device.
  """

  def cut(x: Array) -> Array:
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  return constrain_batch(jax.tree.map(cut, tree), axis=1)


def join_rows(tree: Any) -> Any:
  """The rows of `split_rows` in their old order: [parts, B / parts, ...] -> [B, ...]."""
  return constrain_batch(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree))


# -- The embedding cache ---------------------------------------------------------------------------


class Request(NamedTuple):
  """A call of an objective: which method, on which view of the batch (0 = the batch), of which
  teacher ("" = the model).
  """

  method: str
  args: tuple
  kwargs: tuple
  view: int
  teacher: str = ""

  def answer(self, forward: Forward) -> Any:
    """What the model or the teacher says."""
    view = forward.views[self.view - 1] if self.view else None
    if self.teacher:
      return forward.teacher(self.teacher, self.method, *self.args, batch=view)
    return forward(self.method, *self.args, batch=view, **dict(self.kwargs))


class Recorder(Forward):
  """First pass: answers with outputs for the whole batch, computed part by part, and remembers what
  was asked for.

  compute(request, the views so far) -> output with leading axis B.
  """

  def __init__(self, forward: Forward, compute: Callable[[Request, list[dict]], Any]):
    super().__init__(
      forward.model,
      forward.params,
      forward.model_state,
      forward.batch,
      forward.rng,
      forward.groups,
      forward.teachers,
      forward.frozen,
    )
    self.compute = compute
    self.requests: list[Request] = []
    self.outputs: list[Any] = []
    self.teacher_outputs: list[Any] = []  # constants, so of no interest to the second pass

  def apply(self, method: str, args: tuple, kwargs: dict, view: int) -> Any:
    request = Request(method, args, tuple(sorted(kwargs.items())), view)
    if any(not isinstance(leaf, str | int | float) for leaf in jax.tree.leaves((args, kwargs))):
      raise UserError(
        f"an objective that couples examples passes arrays to the model's {method!r}, which "
        "train.microbatches > 1 cannot cut: set train.microbatches to 1, or let the objective "
        "pass them as batch="
      )
    self.requests.append(request)
    self.outputs.append(self.compute(request, self.views))
    return self.outputs[-1]

  def apply_teacher(self, path: str, method: str, args: tuple, view: int) -> Any:
    if is_shared(self.teachers[path][0], method):
      return super().apply_teacher(path, method, args, view)
    self.teacher_outputs.append(self.compute(Request(method, args, (), view, path), self.views))
    return self.teacher_outputs[-1]


class Replay(Forward):
  """The objective's own run: answers with the outputs of the first pass, in the same order, so that
  it can be differentiated.
  """

  def __init__(self, recorder: Recorder, params: Any, outputs: list[Any]):
    super().__init__(
      recorder.model,
      params,
      recorder.model_state,
      recorder.batch,
      recorder.rng,
      recorder.groups,
      recorder.teachers,
      recorder.frozen,
    )
    self._outputs_left = iter(outputs)
    self._teacher_outputs_left = iter(recorder.teacher_outputs)

  def apply(self, method: str, args: tuple, kwargs: dict, view: int) -> Any:
    return next(self._outputs_left)

  def apply_teacher(self, path: str, method: str, args: tuple, view: int) -> Any:
    if is_shared(self.teachers[path][0], method):
      return super().apply_teacher(path, method, args, view)
    return next(self._teacher_outputs_left)


def separate(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
  """The floating-point leaves of a tree, and the function that puts such leaves back."""
  leaves, structure = jax.tree.flatten(tree)
  floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def join(chosen: list[Array]) -> Any:
    rest = iter(chosen)
    return jax.tree.unflatten(
      structure,
      [next(rest) if is_float else leaf for leaf, is_float in zip(leaves, floating, strict=True)],
    )

  return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], join
