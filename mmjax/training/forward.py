"""`Forward`: the model as an objective calls it, and what decides how its modules run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mmjax.config import UserError
from mmjax.models.layers import Encoded

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
  paths of modules that run as in evaluation (`frozen_modules`). train: False = all of them do.
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
    train: bool = True,
  ):
    self.model, self.params, self.model_state = model, params, model_state
    self.batch, self.rng, self.train = batch, rng, train
    self.groups, self.teachers, self.frozen = groups, teachers, frozen
    self.views: list[dict] = []  # batches given by objectives, in the order of their first use
    # Outputs of encoders that are known already, of the batch and of its views.
    self.encoded: Sequence[Mapping[str, Encoded]] = ()
    self.used: set[str] = set()  # the encoders whose outputs in `encoded` were asked for
    self._given_state = model_state
    self._outputs: dict[Any, tuple] = {}

  def __call__(self, method: str, *args: Any, batch: dict | None = None, **kwargs: Any) -> Any:
    leaves, tree = jax.tree.flatten((args, kwargs))
    values = tuple(leaf if isinstance(leaf, str | int | float) else id(leaf) for leaf in leaves)
    key = (method, tree, values, self.view(batch))
    if key not in self._outputs:
      if is_shared(self.model, method):
        output = self.shared(method, *args, **kwargs)
      else:
        output = self.apply(method, args, kwargs, key[-1])
      self._outputs[key] = (output, leaves)  # holding the leaves keeps their ids theirs
    return self._outputs[key][0]

  def teacher(self, path: str, method: str, *args: Any, batch: dict | None = None) -> Any:
    key = ("teacher", path, method, args, self.view(batch))
    if key not in self._outputs:
      output = self.apply_teacher(path, method, args, key[-1])
      self._outputs[key] = (jax.lax.stop_gradient(output), None)
    return self._outputs[key][0]

  def apply_teacher(self, path: str, method: str, args: tuple, view: int) -> Any:
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
    if not fixed:
      return {"params": self.params, **self._given_state}

    def hold(held: bool, x: Array) -> Array:
      return jax.lax.stop_gradient(x) if held else x

    return {"params": jax.tree.map(hold, self.groups[fixed], self.params), **self._given_state}

  def shared(self, method: str, *args: Any, fixed: str = "", **kwargs: Any) -> Any:
    return self.model.apply(self.variables(fixed), *args, method=method, **kwargs)

  def apply(self, method: str, args: tuple, kwargs: dict, view: int) -> Any:
    batch = self.views[view - 1] if view else self.batch
    batch = only_valid(batch) if self.model_state else batch
    rng = stream(self.rng, "dropout")
    rngs = {"dropout": jax.random.fold_in(rng, view) if view else rng} if self.train else {}
    kwargs = dict(kwargs)
    with nn.intercept_methods(self._interceptor(view)):
      output, changed = self.model.apply(
        self.variables(kwargs.pop("fixed", "")),
        *args,
        batch,
        train=self.train,
        method=method,
        rngs=rngs,
        mutable=list(self.model_state),
        **kwargs,
      )

    def first(given: Array, now: Array, new: Array) -> Array:
      return new if now is given else now

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
    # A view of a part, made by an objective that couples no examples.
    for modality in self.encoded[0]:
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
  valid = batch["valid"]

  def mark(part: dict) -> dict:
    if "present" not in part:
      return {**part, "present": valid}
    rows = valid.reshape(-1, *(1,) * (part["present"].ndim - 1))
    return {**part, "present": part["present"] & rows}

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
