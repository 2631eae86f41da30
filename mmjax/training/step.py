"""One training step: a batch in, the next state and the metrics out. Read `TrainStep.update` from
top to bottom.

Objectives return (sum, weight) pairs; this file alone divides, after the sums are over the whole
global batch. So the loss is a mean over what is real in the batch, whatever the mesh and however
many microbatches it is cut into.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from mmjax.config import settings
from mmjax.kinds import kind_function
from mmjax.models import methods
from mmjax.objectives import MINIMISED, Losses
from mmjax.parallel import rules
from mmjax.state.optimizer import Optimizers, keep_unused
from mmjax.state.train_state import TrainState, clamped
from mmjax.training.flops import used_inputs
from mmjax.training.forward import Forward, frozen_modules, is_shared, stream
from mmjax.training.microbatches import (
  Gradients,
  encoders_with_batch_statistics,
  gradients_in_parts,
)
from mmjax.training.mixup import mixup
from mmjax.training.teacher import Teacher

Array = jax.Array


class Objective(NamedTuple):
  """One entry of config.objectives, ready to call: `objective(forward, batch, rng) -> Losses`."""

  name: str
  function: Callable[..., Losses]
  weight: float
  couples_examples: bool
  sources: tuple[str, ...]
  teacher: str

  def __call__(self, forward: Forward, batch: dict, rng: Array) -> Losses:
    return self.function(forward, batch, stream(rng, self.name))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
  """What a step is made of, and the step: pure functions of arrays, to be traced.

  sources: names of the kinds of step, more than one where data.mix is "steps". params_spec,
  model_state_spec: trees of ShapeDtypeStruct with shardings. axes: logical axes of the parameters.
  teachers: {folder: Teacher}.
  """

  config: FrozenConfigDict
  model: nn.Module
  objectives: tuple[Objective, ...]
  optimizer: Optimizers
  sources: tuple[str, ...]
  params_spec: Any
  model_state_spec: Any
  axes: Any
  teachers: Mapping[str, Teacher]

  def update(
    self,
    state: TrainState,
    batch: dict,
    teachers: Any,
    rates: Mapping[str, Array],
    source: str = "",
  ) -> tuple[TrainState, dict[str, Array]]:
    """The next state, and metrics as float32 scalars. teachers: {folder: variables of the teacher}.
    rates: {group of parameters: learning rates float32 [steps]}; empty = those of the schedules.
    source: the kind of step.
    """
    train, objectives = self.config.train, self.objectives_of(source)
    rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    if train.mixup and "image" in batch:
      batch = mixup(batch, train.mixup, stream(rng, "mixup"))

    # Loss and gradients of the mean over the global batch.
    loss, gradients, sums, model_state = self.gradients(
      state.params, state.model_state, batch, rng, objectives, teachers
    )
    gradients = self.placed(gradients)
    gradient_norm = optax.tree.norm(gradients)

    def average(old: Array, new: Array) -> Array:
      return train.ema * old + (1 - train.ema) * new

    # The next parameters, each group by its own optimizer.
    now = {
      group: rates[group][state.step] if rates else optimizer.schedule(state.step)
      for group, optimizer in self.optimizer.groups.items()
    }
    updates, opt_states = self.optimizer.update(
      gradients, state.opt_states, state.params, rates=now, source=source
    )
    if len(self.sources) > 1:  # what these objectives do not use stays as it is, moments and all
      used = self.used_params(batch, objectives, teachers)

      def keep(is_used: bool, x: Any) -> Any:
        return x if is_used else jax.tree.map(jnp.zeros_like, x)

      updates = jax.tree.map(keep, used, updates)
      opt_states = keep_unused(opt_states, state.opt_states, used)
    params = clamped(self.where_trained(optax.apply_updates, state.params, updates), self.config)
    new = TrainState(
      step=state.step,
      params=params,
      model_state=model_state,
      opt_states=opt_states,
      ema=self.where_trained(average, state.ema, params) if train.ema else None,
    )

    # A step that is not finite leaves everything as it was, and counts.
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    new = jax.tree.map(lambda now, before: jnp.where(finite, now, before), new, state)
    new = new.replace(step=state.step + 1)

    metrics = {"loss": loss}
    for name, losses in sums.items():
      metrics.update({f"{name}/{key}": mean(*pair) for key, pair in losses.items()})
    metrics.update(
      grad_norm=gradient_norm,
      param_norm=optax.tree.norm([x for x in jax.tree.leaves(new.params) if is_floating(x)]),
      update_norm=optax.tree.norm(updates),
      skipped=~finite,
    )
    for group, rate in now.items():
      metrics["lr" if group == "main" else f"{group}/lr"] = rate
    if is_shared(self.model, "temperature"):
      metrics["scale"] = self.model.apply({"params": state.params}, method="temperature")[0]
    return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

  def gradients(
    self,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    objectives: tuple[Objective, ...],
    teachers: Any = (),
  ) -> Gradients:
    """Of the loss by the `params` that are trained (`split`): at once, or in train.microbatches
    parts with the same result.
    """
    if self.config.train.microbatches > 1:
      return gradients_in_parts(self, params, model_state, batch, rng, objectives, teachers)

    trained, frozen = self.split(params)

    def loss(trained: Any) -> tuple:
      params = self.trainable(self.join(trained, frozen))
      return self.loss(params, model_state, batch, rng, objectives, teachers)

    (value, (sums, model_state)), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    return Gradients(value, gradients, sums, model_state)

  def loss(
    self,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    objectives: tuple[Objective, ...],
    teachers: Any = (),
  ) -> tuple[Array, tuple[dict[str, Losses], Any]]:
    """(loss, ({objective: its Losses}, the next model state)) of a batch."""
    forward = self.forward(params, model_state, batch, rng, teachers)
    sums = {objective.name: objective(forward, batch, rng) for objective in objectives}
    return self.total(sums), (sums, forward.model_state)

  def total(
    self, sums: dict[str, Losses], weights: dict[str, dict[str, Array]] | None = None
  ) -> Array:
    """The weighted sum of the objectives' means, and the means of what opponents minimise.

    weights: of the whole batch, where the sums are of a part of it. They are not differentiated.
    """
    factors = {objective.name: objective.weight for objective in self.objectives}
    means = [
      (factors[name] if key == "loss" else 1.0)
      * mean(losses[key][0], weights[name][key] if weights else losses[key][1])
      for name, losses in sums.items()
      for key in MINIMISED
      if key in losses
    ]
    return sum(means, jnp.zeros((), jnp.float32))

  # -- What the model is applied with --------------------------------------------------------------

  def objectives_of(self, source: str) -> tuple[Objective, ...]:
    """The objectives of the steps of a source."""
    return tuple(
      objective
      for objective in self.objectives
      if not source or not objective.sources or source in objective.sources
    )

  def forward(
    self, params: Any, model_state: Any, batch: dict, rng: Array, teachers: Any
  ) -> Forward:
    """The model on a batch, as objectives call it."""
    several = self.optimizer.groups if self.config.optimizers else {}
    groups = {name: optimizer.trained for name, optimizer in several.items()}
    of_teachers = {
      path: (self.teachers[path].model, self.teachers[path].gathered(variables))
      for path, variables in dict(teachers).items()
    }
    return Forward(self.model, params, model_state, batch, rng, groups, of_teachers, self.frozen)

  def split(self, params: Any) -> tuple[Any, Any]:
    """(those of the parameters that the optimizer changes, those that it never does), each with
    optax.MaskedNode in the place of the others: frozen ones have no gradients, and may be of types
    that have none.
    """

    def pick(chosen: bool) -> Any:
      return jax.tree.map(
        lambda trained, x: x if trained == chosen else optax.MaskedNode(),
        self.optimizer.trained,
        params,
      )

    return pick(True), pick(False)

  def join(self, trained: Any, frozen: Any) -> Any:
    """The parameters of which these are the two parts."""
    return jax.tree.map(
      lambda is_trained, x, y: x if is_trained else y, self.optimizer.trained, trained, frozen
    )

  def where_trained(self, change: Callable[[Any, Any], Any], params: Any, other: Any) -> Any:
    """`change(parameter, leaf of other)` of those that are trained; the others as they are."""
    return jax.tree.map(
      lambda trained, x, y: change(x, y) if trained else x, self.optimizer.trained, params, other
    )

  def placed(self, gradients: Any) -> Any:
    """The gradients of what is trained, laid out as their parameters."""
    shardings = self.split(rules.shardings_of(self.params_spec))[0]
    return jax.lax.with_sharding_constraint(gradients, shardings)

  def trainable(self, params: Any) -> Any:
    """The parameters as the model gets them in training: gathered where that is better done once,
    and without derivatives by those that the optimizer never changes, so that their backward pass
    is not computed.
    """

    def cut(trained: bool, x: Array) -> Array:
      return x if trained else jax.lax.stop_gradient(x)

    params = jax.tree.map(cut, self.optimizer.trained, params)
    return rules.gather_parameters(params, self.params_spec, self.axes)

  def used_params(self, batch: dict, objectives: tuple[Objective, ...], teachers: Any) -> Any:
    """A tree of bool like the parameters: which of them the loss depends on."""

    def loss(params: Any, model_state: Any, batch: dict, teachers: Any) -> Array:
      return self.loss(params, model_state, batch, jax.random.key(0), objectives, teachers)[0]

    return used_inputs(loss, self.params_spec, self.model_state_spec, batch, teachers)

  @functools.cached_property
  def frozen(self) -> frozenset[tuple[str, ...]]:
    """Modules without a trained parameter, which run as in evaluation; encoders that share a trunk
    are frozen only with it.
    """
    trained, encoders = self.optimizer.trained, self.config.model.get("encoders", {})
    frozen = frozen_modules(trained)
    if any(jax.tree.leaves(trained.get("trunk", {}))):
      return frozen - {(modality,) for modality in encoders}
    return frozen

  @functools.cached_property
  def uncut_encoders(self) -> tuple[str, ...]:
    """The encoders that microbatches leave whole. Raises UserError: see the function."""
    return encoders_with_batch_statistics(self.config, self.model_state_spec, self.frozen)


def make_objectives(config: FrozenConfigDict, model: nn.Module) -> tuple[Objective, ...]:
  """The entries of config.objectives. Raises UserError: `model` lacks a method of one."""
  for name, entry in config.objectives.items():
    asked = getattr(kind_function(entry, "objective"), "methods", ())
    methods.check(model, config.model.name, asked, f"objectives.{name} ({entry.kind})")
  return tuple(make_objective(name, entry) for name, entry in config.objectives.items())


def make_objective(name: str, entry: FrozenConfigDict) -> Objective:
  function: Any = kind_function(entry, "objective")
  chosen = settings(entry, "objective", without=("weight", "sources"))
  return Objective(
    name,
    functools.partial(function, **chosen),
    entry.weight,
    function.couples_examples,
    tuple(entry.sources),
    entry.get("teacher", ""),
  )


def is_floating(x: Array) -> bool:
  """Whether an array has floating-point numbers; a kernel in few bits has not."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def mean(total: Array, weight: Array) -> Array:
  """total / weight; 0 where nothing counts."""
  weight = jax.lax.stop_gradient(weight)
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
