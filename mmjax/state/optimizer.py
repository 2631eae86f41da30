"""Optimizers: kinds `(axes, *, settings) -> optax.GradientTransformation`, and `make_optimizer`,
which completes them.

A kind scales gradients into directions of about unit size (optax's `scale_by_*`); it knows neither
rate nor decay.
`make_optimizer` adds what all share, in this order: frozen leaves are taken out, the global norm is
clipped, the kind's rule, decoupled weight decay, the rate of each parameter (rules, schedule,
peak).

`make_optimizers` makes those of a run: "main", and one for each entry of config.optimizers, which
takes the parameters that its `params` matches away from "main". Each sees the others' parameters as
frozen, so their states and norms have nothing in common.

Layers are stored stacked, and a stack gets the update that its layers would get alone: leaves whose
first logical axis is "layers" are handled a layer at a time wherever a rule looks at more than
single elements (adafactor, muon).

Where each step has a source of its own (data.mix "steps"), `moments` "source" gives every source
moments of its own: a step's direction then comes from its own task's gradients alone, and tasks
whose gradients differ in scale need no weights (AdaTask, Yang et al. 2023, arXiv:2211.15055).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict

from mmjax.config import UserError, flatten, settings
from mmjax.kinds import kind_function
from mmjax.ranges import Decay, Epsilon, NonNegative, Share, Size
from mmjax.state import adapters
from mmjax.state.paths import by_name, map_named, matches, nearest
from mmjax.state.schedule import Schedule, make_schedule

log = logging.getLogger("mmjax")

# a tree like the parameters whose leaves are tuples of logical axis names (or None), one a
# dimension
Axes = Any
StateDtype = Literal["float32", "bfloat16"]


class Optimizer(NamedTuple):
  """tx: `init(params)`, `update(gradients, state, params, *, rate=None, source="") -> (updates,
  state)`; apply with `optax.apply_updates`. rate: the learning rate; None = that of the schedule
  after so many updates as were made. source: whose moments are used.
  schedule: step -> the learning rate (peak times factor) that `update` applies where no rule
  changes it.
  trained: tree of bool like the parameters; False where no slice of the leaf is ever changed.
  shares: {name of a parameter: the share of its slices that are trained}."""

  tx: optax.GradientTransformationExtraArgs
  schedule: Schedule
  trained: Any
  shares: dict[str, float]


class Optimizers(NamedTuple):
  """The optimizers of a run by group of parameters, "main" first; each parameter belongs to one.

  init(params) -> {group: state}; update(gradients, states, params, *, rates, source) -> (updates,
  states), by the learning rates {group: rate}.
  trained, shares: as of an Optimizer, of all groups together."""

  groups: dict[str, Optimizer]
  trained: Any
  shares: dict[str, float]

  def init(self, params: Any) -> dict[str, OptimizerState]:
    return {name: optimizer.tx.init(params) for name, optimizer in self.groups.items()}

  def update(
    self,
    gradients: Any,
    states: Mapping[str, Any],
    params: Any,
    *,
    rates: Mapping[str, Any],
    source: str = "",
  ) -> tuple[Any, dict[str, Any]]:
    results = {
      name: optimizer.tx.update(gradients, states[name], params, rate=rates[name], source=source)
      for name, optimizer in self.groups.items()
    }
    # Each leaf is updated by one group; the parts of the others are zero.
    updates = jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *(part for part, _ in results.values())
    )
    return updates, {name: state for name, (_, state) in results.items()}


class OptimizerState(NamedTuple):
  """count: int32, updates made. rule: state of the kind, over the leaves (and slices of stacks)
  that are trained; {source: state} where each source has moments of its own."""

  count: jax.Array  # type: ignore[assignment]  # tuple.count, as in optax's states
  rule: Any


# -- kinds -----------------------------------------------------------------------------------------


def adamw(
  axes: Axes,
  *,
  b1: Decay = 0.9,
  b2: Decay = 0.999,
  eps: Epsilon = 1e-8,
  state_dtype: StateDtype = "float32",
) -> optax.GradientTransformation:
  """Adam (Kingma and Ba 2015, arXiv:1412.6980); the decoupled decay (Loshchilov and Hutter 2019) is
  `optimizer.weight_decay`.

  b1, b2: decays of the first and second moments. eps: added to the root of the second.
  """
  del axes
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=state_dtype)


def lion(
  axes: Axes, *, b1: Decay = 0.9, b2: Decay = 0.99, state_dtype: StateDtype = "float32"
) -> optax.GradientTransformation:
  """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a momentum. Wants a rate 3 to 10 times
  below AdamW's.

  b1: share of the momentum in the update. b2: its decay.
  """
  del axes
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=state_dtype)


def adafactor(
  axes: Axes,
  *,
  decay_rate: Share = 0.8,
  max_decay: Share = 0.999,
  min_factored: Size = 32,
  update_clip: NonNegative = 1.0,
  momentum: Decay = 0.9,
  parameter_scale: bool = False,
  state_dtype: StateDtype = "float32",
) -> optax.GradientTransformation:
  """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), by default as Zhai et al. 2022
  (arXiv:2106.04560) use it for vision.

  The second moment decays by min(1 - t^-decay_rate, max_decay) and is factored over the two largest
  dimensions if both have
  `min_factored` or more. `decay_rate`: of the second moment: it decays by 1 - step^-decay_rate;
  `max_decay`: at most by this. `min_factored`: size of the two largest dimensions of a parameter
  from which on its second moment is factored.
  `update_clip`: largest RMS of a leaf's update; 0 = off. `momentum`: on the updates, in
  `state_dtype`; 0 = none. `parameter_scale`: multiplies an update by the RMS of its
  parameter. All of it for each layer by itself.
  """

  def decay(step, rate):
    return jnp.minimum(1 - (jnp.asarray(step, jnp.float32) + 1) ** -rate, max_decay)

  parts = [
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_factored, decay_rate_fn=decay
    )
  ]
  if update_clip:
    parts.append(optax.clip_by_block_rms(update_clip))
  if parameter_scale:
    parts.append(optax.scale_by_param_block_rms())
  parts = [per_layer(part, axes) for part in parts]
  if momentum:
    parts.append(optax.ema(momentum, debias=False, accumulator_dtype=state_dtype))
  return optax.chain(*parts)


def per_layer(tx: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
  """`tx` on every leaf by itself, and on every layer of a stacked leaf by itself. Its state stays a
  NamedTuple of trees.

  `tx` must treat leaves independently and have a NamedTuple as its state: trees like the
  parameters, and scalar `count`.
  """
  stacked = {name: bool(leaf) and leaf[0] == "layers" for name, leaf in axes_by_name(axes).items()}

  def gather(parts: list, like: Any) -> Any:
    """One state whose fields are trees, from a state for each leaf."""
    kind: Any = type(parts[0])
    tree = jax.tree.structure(like)
    return kind(
      *(
        getattr(parts[0], field)
        if field == "count"
        else jax.tree.unflatten(tree, [getattr(part, field) for part in parts])
        for field in kind._fields
      )
    )

  def mapped(state: Any) -> Any:
    return type(state)(*(None if field == "count" else 0 for field in state._fields))

  def init(params):
    parts = []
    for name, leaf in by_name(params).items():
      spec = mapped(jax.eval_shape(tx.init, leaf))
      parts.append(jax.vmap(tx.init, out_axes=spec)(leaf) if stacked[name] else tx.init(leaf))
    return gather(parts, params) if parts else tx.init(params)

  def update(updates, state, params):
    names, leaves, tree = (
      list(by_name(updates)),
      jax.tree.leaves(updates),
      jax.tree.structure(updates),
    )
    if not names:
      return updates, state
    states = [
      type(state)(*column)
      for column in zip(
        *(
          [value] * len(names) if field == "count" else tree.flatten_up_to(value)
          for field, value in zip(state._fields, state, strict=True)
        ),
        strict=True,
      )
    ] or [state] * len(names)
    out = []
    for name, leaf, part, param in zip(
      names, leaves, states, tree.flatten_up_to(params), strict=True
    ):
      spec = mapped(part)
      one = (
        jax.vmap(tx.update, in_axes=(0, spec, 0), out_axes=(0, spec))
        if stacked[name]
        else tx.update
      )
      out.append(one(leaf, part, param))
    return jax.tree.unflatten(tree, [o[0] for o in out]), gather([o[1] for o in out], updates)

  return optax.GradientTransformation(init, update)


# -- what all kinds share --------------------------------------------------------------------------


def make_optimizers(
  config: FrozenConfigDict,
  axes: Axes,
  params_spec: Any,
  *,
  steps: int,
  examples: int | None = None,
  sources: tuple[str, ...] = (),
) -> Optimizers:
  """The optimizers of a run: config.optimizer as "main", and config.optimizers; see
  `make_optimizer` for the arguments.

  Raises UserError: as `make_optimizer`; two groups match the same parameter; "main" or another is
  left with nothing."""
  names = by_name(params_spec)
  owners = dict.fromkeys(names, "main")
  for group, entry in config.optimizers.items():
    taken = [name for name in names if matches(entry.params, name).any()]
    if not taken:
      raise UserError(
        f"optimizers.{group}.params: {entry.params!r} matches no parameter; the nearest is "
        f"{nearest(entry.params, names)!r}"
      )
    for name in taken:
      if owners[name] != "main":
        raise UserError(
          f"optimizers.{owners[name]}.params and optimizers.{group}.params both match {name}: "
          "make them disjoint"
        )
      owners[name] = group
  if "main" not in owners.values():
    raise UserError(
      "optimizers: their `params` match every parameter, which leaves nothing to `optimizer`. "
      "Leave one of them out"
    )
  groups = {
    group: make_optimizer(
      config,
      axes,
      params_spec,
      steps=steps,
      examples=examples,
      group=group,
      sources=sources,
      owned={name for name, owner in owners.items() if owner == group},
    )
    for group in ("main", *config.optimizers)
  }
  return Optimizers(
    groups,
    jax.tree.map(
      lambda *trained: any(trained), *(optimizer.trained for optimizer in groups.values())
    ),
    {name: sum(optimizer.shares[name] for optimizer in groups.values()) for name in names},
  )


def make_optimizer(
  config: FrozenConfigDict,
  axes: Axes,
  params_spec: Any,
  *,
  steps: int,
  examples: int | None = None,
  group: str = "main",
  owned: set[str] | None = None,
  sources: tuple[str, ...] = (),
) -> Optimizer:
  """The optimizer of config.optimizer (or config.optimizers[group]) and config.schedule for a run
  of `steps`.

  axes: logical axes of each parameter. params_spec: tree of ShapeDtypeStruct (or arrays), unboxed.
  `examples`: of an epoch.
  owned: names of the parameters it trains (None = all); the others are frozen to it. A rate of 0
  (optimizer.rates) freezes, and so does config.lora: such leaves, or slices of a stack, have no
  optimizer state, are not decayed, get an update of exactly zero, and do not count in the clipped
  norm. sources: those that take turns, a step each; with `moments` "source" each has a state of its
  own.

  Raises UserError: a regex matches no parameter (the nearest is named), or everything is frozen.
  """
  entry, where = (
    (config.optimizer, "optimizer")
    if group == "main"
    else (config.optimizers[group], f"optimizers.{group}")
  )
  spec, named_axes = by_name(params_spec), axes_by_name(axes)
  layers = {
    name: leaf.shape[0] if named_axes[name][:1] == ("layers",) else None
    for name, leaf in spec.items()
  }
  multipliers = _learning_rate_multipliers(f"{where}.rates", entry.rates, layers)
  if config.lora.params:
    adapted = adapters.trained_slices(config, layers)
    multipliers = {name: multiplier * adapted[name] for name, multiplier in multipliers.items()}
  decays = {name: np.zeros(count or (), bool) for name, count in layers.items()}
  if entry.weight_decay:
    decays = {name: matches(entry.decay, name, count) for name, count in layers.items()}
    _check_used(f"{where}.decay", entry.decay, decays)
  multipliers = {
    name: multiplier if owned is None or name in owned else 0 * multiplier
    for name, multiplier in multipliers.items()
  }
  _warn_of_dropout(f"{where}.rates", config.model, multipliers, layers)
  trained = {name: np.flatnonzero(multiplier) for name, multiplier in multipliers.items()}
  if not any(map(len, trained.values())):
    raise UserError(
      f"{where}.rates freezes every parameter: nothing would be trained. Leave one out"
    )

  def view(tree):
    """The trained leaves, and of partly frozen stacks the trained slices."""

    def pick(name, leaf):
      if not len(trained[name]):
        return optax.MaskedNode()
      return leaf if len(trained[name]) == multipliers[name].size else leaf[_index(trained[name])]

    return map_named(pick, tree)

  def scatter(updates, like):
    """Updates of the view as a tree like the parameters: zero where frozen."""
    some = by_name(updates)

    def put(name, leaf):
      if name not in some:
        return jnp.zeros_like(leaf)
      if len(trained[name]) == multipliers[name].size:
        return some[name]
      return jnp.zeros_like(leaf, some[name].dtype).at[_index(trained[name])].set(some[name])

    return map_named(put, like)

  kind = kind_function(entry, "optimizer")
  rule = kind(axes, **settings(entry, "optimizer"))
  rule = optax.chain(optax.clip_by_global_norm(entry.clip), rule) if entry.clip else rule
  factor = make_schedule(config, steps=steps, examples=examples)

  def schedule(step):
    return entry.lr * factor(step)

  own = sources if entry.moments == "source" else ()

  def init(params):
    def new():
      return rule.init(view(params))  # anew for each: buffers that are donated must not be the same

    return OptimizerState(
      jnp.zeros((), jnp.int32), {source: new() for source in own} if own else new()
    )

  def update(gradients, state, params, *, rate=None, source="", **unused):
    del unused
    kept = view(params)
    updates, rule_state = rule.update(
      view(gradients), state.rule[source] if own else state.rule, kept
    )
    rule_state = {**state.rule, source: rule_state} if own else rule_state
    rate = schedule(state.count) if rate is None else rate

    def scale(name, update, param):
      chosen = trained[name]

      def shaped(x):
        return _shaped(np.atleast_1d(x)[chosen], layers[name], update.ndim)

      if np.any(decays[name]):
        update = update + entry.weight_decay * shaped(decays[name]) * param
      return (-rate * shaped(multipliers[name]) * update).astype(param.dtype)

    updates = scatter(map_named(scale, updates, kept), gradients)
    return updates, OptimizerState(optax.safe_increment(state.count), rule_state)

  return Optimizer(
    optax.GradientTransformationExtraArgs(init, update),
    schedule,
    map_named(lambda name, _: bool(len(trained[name])), params_spec),
    {name: len(trained[name]) / multipliers[name].size for name in trained},
  )


def state_axes(optimizer: Optimizer | Optimizers, params_spec: Any, axes: Axes) -> Any:
  """Logical axes of every leaf of the optimizer's state, as a tree like its `init(params)` with
  tuples as leaves.

  A leaf shaped like its parameter has the parameter's axes; a factored moment lacks the one that
  was averaged over; what belongs to no parameter (counts) has (). Use them with the rules that
  shard the parameters.
  """
  named_axes, spec = axes_by_name(axes), by_name(params_spec)
  init = optimizer.init if isinstance(optimizer, Optimizers) else optimizer.tx.init
  state = jax.eval_shape(init, params_spec)

  def of(name, leaf):
    owner, parts = _owner(name, spec), name.split("/")
    if not owner:
      return (None,) * leaf.ndim
    shape = spec[owner].shape
    padded = named_axes[owner] + (None,) * (len(shape) - len(named_axes[owner]))
    return _reduced_axes(shape, padded, leaf.shape, from_right="v_col" in parts)

  return map_named(of, state)


def keep_unused(new: Any, old: Any, used: Any) -> Any:
  """The optimizer's state `new`, but `old` in what belongs to parameters that a step did not use
  (`used`: bools like the parameters).

  Counts go on for all: a bias correction sees every step of the run.
  """
  named_used, before = by_name(used), by_name(old)
  return map_named(
    lambda name, leaf: leaf if named_used.get(_owner(name, named_used), True) else before[name], new
  )


def _owner(name: str, parameters: Mapping[str, Any]) -> str:
  """The parameter that a leaf of the optimizer's state belongs to: "rule/0/mu/image/patch/kernel"
  -> "image/patch/kernel"; "" if to none.
  """
  parts = name.split("/")
  return next((o for i in range(len(parts)) if (o := "/".join(parts[i:])) in parameters), "")


def _reduced_axes(shape: tuple, axes: tuple, reduced: tuple, from_right: bool) -> tuple:
  """Axes of an array that has the dimensions `shape` less some; (None, ...) if it is not that."""
  # Partly frozen stacks have fewer layers in the state.
  stack = axes[:1] == ("layers",) and len(reduced) > 0
  body, names, rest = (shape[1:], axes[1:], reduced[1:]) if stack else (shape, axes, reduced)
  pairs, found = list(zip(body, names, strict=True)), []
  for size in reversed(rest) if from_right else rest:
    while pairs and pairs[-1 if from_right else 0][0] != size:
      pairs.pop(-1 if from_right else 0)
    if not pairs:
      return (("layers",) if stack else ()) + (None,) * len(rest)
    found.append(pairs.pop(-1 if from_right else 0)[1])
  return (("layers",) if stack else ()) + tuple(reversed(found) if from_right else found)


def _learning_rate_multipliers(
  where: str, rules: tuple, layers: dict[str, int | None]
) -> dict[str, np.ndarray]:
  """Factor of the learning rate, a scalar or one a layer: the first rule that matches, else 1."""
  multipliers = {name: np.ones(count or (), np.float32) for name, count in layers.items()}
  free = {name: np.ones(count or (), bool) for name, count in layers.items()}
  for pattern, factor in rules:
    if not isinstance(factor, (int, float)) or factor < 0:
      raise UserError(
        f"{where}: the factor of {pattern!r} is {factor!r}, but must be a number of 0 or more"
      )
    taken = {name: matches(pattern, name, count) for name, count in layers.items()}
    _check_used(where, pattern, taken)
    for name, match in taken.items():
      multipliers[name] = np.where(match & free[name], np.float32(factor), multipliers[name])
      free[name] = free[name] & ~match
  return multipliers


def _warn_of_dropout(
  where: str,
  model: FrozenConfigDict,
  multipliers: dict[str, np.ndarray],
  layers: dict[str, int | None],
) -> None:
  """Warns of stacks that are frozen in part and drop activations: all of their layers go on to, for
  one scanned module runs either as in training or as in evaluation."""
  stacks: dict[str, np.ndarray] = {}
  for name, multiplier in multipliers.items():
    if layers[name]:
      stack = name.partition("layers/")[0] + "layers"
      stacks[stack] = stacks.get(stack, np.zeros(len(multiplier), bool)) | (multiplier > 0)
  for stack, trained in stacks.items():
    part = stack.partition("/")[0]
    entry = model.get("encoders", {}).get(part) or model.get(part)
    settings = flatten(entry) if hasattr(entry, "items") else ()
    dropped = {path: share for path, share in settings if path.split(".")[-1] == "dropout"}
    if trained.any() and not trained.all() and any(dropped.values()):
      log.warning(
        "%s freezes layers of %s whose other layers are trained: dropout (%s) stays on in all of "
        "them, for only what is frozen whole runs as in evaluation. Set it to 0 if the frozen "
        "layers should drop nothing",
        where,
        stack,
        ", ".join(f"{path} {share:g}" for path, share in dropped.items()),
      )


def _check_used(key: str, pattern: str, taken: dict[str, np.ndarray]) -> None:
  if not any(match.any() for match in taken.values()):
    raise UserError(
      f"{key}: {pattern!r} matches no parameter; the nearest is {nearest(pattern, taken)!r}"
    )


def axes_by_name(axes: Axes) -> dict[str, tuple]:
  def is_leaf(x):
    return x is None or isinstance(x, (tuple, PartitionSpec))

  return {name: tuple(leaf or ()) for name, leaf in by_name(axes, is_leaf=is_leaf).items()}


def _index(chosen: np.ndarray) -> slice | np.ndarray:
  """A slice if the indices are neighbours: cheaper than a gather."""
  start, stop = int(chosen[0]), int(chosen[-1]) + 1
  return slice(start, stop) if stop - start == len(chosen) else chosen


def _shaped(values: np.ndarray, layers: int | None, ndim: int) -> np.ndarray:
  """One value a layer, to multiply a leaf with; a scalar for a leaf without layers."""
  values = values.astype(np.float32)
  return values.reshape((-1,) + (1,) * (ndim - 1)) if layers is not None else values[0]
