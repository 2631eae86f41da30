"""Applying the model for objectives, and the parts of a batch when it is split to save memory.

`Forward` is what an objective calls. `Recorder` and `Replay` are the same to an objective, for the
two-pass embedding cache of objectives that couple examples (Gao et al. 2021, arXiv:2101.06983): the
first pass computes what such an objective asks for part by part without gradients, the objective
then runs once on the whole batch, and the second pass takes its derivatives back through the model
part by part, with the same randomness.

Encoders with batch statistics are not cut: `encode_whole` gives their outputs for the whole batch,
and parts get their rows of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.layers import Encoded
from mmjax.parallel.rules import constrain_batch

Array = jax.Array


def stream(rng: Array, name: str) -> Array:
  """The key of a named stream of randomness."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


class Forward:
  """`forward(method, *args)` applies a method of the model to the batch, once for each distinct
  call.

  Methods in `model.shared_methods` get no batch. `batch=` replaces the batch by another view of it,
  with randomness of its own. `model_state` is what the model keeps besides parameters, moved once:
  by the first call that moves it.
  `fixed=GROUP` takes the parameters of that group of config.optimizers as constants: a player's
  loss moves no opponent.
  `forward.teacher(DIR, method, *args)` applies the model of another checkpoint, as in evaluation
  and without derivatives.

  groups: {group: tree of bool like the parameters}. teachers: {DIR: (model, variables)}. frozen:
  paths of modules that run as in evaluation (`frozen_modules`).
  """

  def __init__(
    self,
    model: nn.Module,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    groups: Mapping[str, Any] = {},
    teachers: Mapping[str, tuple] = {},
    frozen: frozenset[tuple[str, ...]] = frozenset(),
  ):
    self.model, self.params, self.model_state, self.batch, self.rng = (
      model,
      params,
      model_state,
      batch,
      rng,
    )
    self.groups, self.teachers, self.frozen = groups, teachers, frozen
    self.views: list[dict] = []  # batches given by objectives, in the order of their first use
    self.encoded: Sequence[
      Mapping[str, Encoded]
    ] = ()  # outputs of encoders that are known already, of the batch and of its views
    self.used: set[str] = set()  # the encoders whose outputs in `encoded` were asked for
    self._given_state = model_state
    self._outputs: dict[Any, tuple] = {}

  def __call__(self, method: str, *args: Any, batch: dict | None = None, **kwargs: Any) -> Any:
    leaves, tree = jax.tree.flatten((args, kwargs))
    key = (
      method,
      tree,
      tuple(leaf if isinstance(leaf, str | int | float) else id(leaf) for leaf in leaves),
      self.view(batch),
    )
    if key not in self._outputs:
      output = (
        self.shared(method, *args, **kwargs)
        if is_shared(self.model, method)
        else self.apply(method, args, kwargs, key[-1])
      )
      self._outputs[key] = (output, leaves)  # holding the leaves keeps their ids theirs
    return self._outputs[key][0]

  def teacher(self, path: str, method: str, *args: Any, batch: dict | None = None) -> Any:
    key = ("teacher", path, method, args, self.view(batch))
    if key not in self._outputs:
      self._outputs[key] = (jax.lax.stop_gradient(self.taught(path, method, args, key[-1])), None)
    return self._outputs[key][0]

  def taught(self, path: str, method: str, args: tuple, view: int) -> Any:
    model, variables = self.teachers[path]
    given = () if is_shared(model, method) else (self.views[view - 1] if view else self.batch,)
    try:
      return model.apply(variables, *args, *given, method=method)
    except UserError as error:
      raise UserError(f"teacher {path}: {error}") from error

  def view(self, batch: dict | None) -> int:
    """0 for the batch itself, else the number of the view."""
    if batch is None:
      return 0
    for number, known in enumerate(self.views, 1):
      if known is batch:
        return number
    self.views.append(batch)
    return len(self.views)

  def variables(self, fixed: str = "") -> dict[str, Any]:
    """What the model is applied with; the parameters of the group `fixed` as constants."""
    if fixed and fixed not in self.groups:
      raise UserError(
        f"an objective fixes the parameters of the group {fixed!r}, which config.optimizers has not"
      )
    hold = lambda held, x: jax.lax.stop_gradient(x) if held else x
    params = jax.tree.map(hold, self.groups[fixed], self.params) if fixed else self.params
    return {"params": params, **self._given_state}

  def shared(self, method: str, *args: Any, fixed: str = "", **kwargs: Any) -> Any:
    return self.model.apply(self.variables(fixed), *args, method=method, **kwargs)

  def apply(self, method: str, args: tuple, kwargs: dict, view: int) -> Any:
    batch = self.views[view - 1] if view else self.batch
    batch = only_valid(batch) if self.model_state else batch
    rng = stream(self.rng, "dropout")
    rngs = {"dropout": jax.random.fold_in(rng, view) if view else rng}
    kwargs = dict(kwargs)
    with nn.intercept_methods(self._interceptor(view)):
      output, changed = self.model.apply(
        self.variables(kwargs.pop("fixed", "")),
        *args,
        batch,
        train=True,
        method=method,
        rngs=rngs,
        mutable=list(self.model_state),
        **kwargs,
      )
    first = lambda given, now, new: new if now is given else now
    self.model_state = jax.tree.map(
      first, self._given_state, self.model_state, {**self.model_state, **changed}
    )
    return output

  def _interceptor(self, view: int) -> Callable:
    """Gives what is known of the encoders' outputs instead of computing it, and puts frozen modules
    into evaluation mode.
    """
    encoded = self._encoded_of(view)

    def intercept(
      function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
      path = context.module.path
      if context.method_name == "__call__" and len(path) == 1 and path[0] in encoded:
        self.used.add(path[0])
        return encoded[path[0]]
      if path in self.frozen and kwargs.get("train"):
        kwargs = {**kwargs, "train": False}
      return function(*args, **kwargs)

    return intercept

  def _encoded_of(self, view: int) -> Mapping[str, Encoded]:
    if view < len(self.encoded) or not self.encoded:
      return self.encoded[view] if self.encoded else {}
    for modality in self.encoded[
      0
    ]:  # a view of a part, made by an objective that couples no examples
      if self.views[view - 1].get(modality) is not self.batch[modality]:
        raise UserError(
          f"an objective changes the {modality} of a part of the batch, but its encoder has batch "
          "statistics, which are of the whole batch: set train.microbatches to 1"
        )
    return self.encoded[0]


def only_valid(batch: dict) -> dict:
  """The batch with `<modality>.present` False in rows that are not valid: they must not count in
  batch statistics either.
  """
  if "valid" not in batch:
    return batch
  mark = lambda part: {
    **part,
    "present": part["present"] & batch["valid"].reshape(-1, *(1,) * (part["present"].ndim - 1))
    if "present" in part
    else batch["valid"],
  }
  return {name: mark(part) if isinstance(part, dict) else part for name, part in batch.items()}


def is_shared(model: nn.Module, method: str) -> bool:
  """Whether a method's result does not depend on examples."""
  return method in getattr(model, "shared_methods", ())


def frozen_modules(trained: Any) -> frozenset[tuple[str, ...]]:
  """Paths of the modules that have parameters and whose parameters are all frozen. trained: a tree
  of bool like the parameters.
  """

  def find(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, Mapping) and tree:
      if not any(jax.tree.leaves(tree)):
        yield path
      for name, part in tree.items():
        yield from find(part, (*path, name))

  return frozenset(find(trained, ()))


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


def encode_whole(
  forward: Forward, modalities: Sequence[str], views: Sequence[dict]
) -> list[dict[str, Encoded]]:
  """{modality: what its encoder makes of it} of the whole batch and of each of its views. forward:
  of the whole batch.
  """
  forward.views = list(views)
  changed = lambda view, modality: None if view[modality] is forward.batch[modality] else view
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
  cut = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
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

  def of(self, forward: Forward) -> Any:
    """Its answer."""
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
    self.lessons: list[
      Any
    ] = []  # what teachers answered: constants, so of no interest to the second pass

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

  def taught(self, path: str, method: str, args: tuple, view: int) -> Any:
    if is_shared(self.teachers[path][0], method):
      return super().taught(path, method, args, view)
    self.lessons.append(self.compute(Request(method, args, (), view, path), self.views))
    return self.lessons[-1]


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
    self._waiting, self._lessons = iter(outputs), iter(recorder.lessons)

  def apply(self, method: str, args: tuple, kwargs: dict, view: int) -> Any:
    return next(self._waiting)

  def taught(self, path: str, method: str, args: tuple, view: int) -> Any:
    return (
      super().taught(path, method, args, view)
      if is_shared(self.teachers[path][0], method)
      else next(self._lessons)
    )


def separate(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
  """The floating-point leaves of a tree, and the function that puts such leaves back."""
  leaves, structure = jax.tree.flatten(tree)
  floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

  def join(chosen: list[Array]) -> Any:
    rest = iter(chosen)
    return structure.unflatten(
      [next(rest) if is_float else leaf for leaf, is_float in zip(leaves, floating, strict=True)]
    )

  return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], join
