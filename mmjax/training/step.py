"""One training step: a batch in, the next state and the metrics out. Read `Step.update` from top to
bottom.

Objectives return (sum, weight) pairs; this file alone divides, after the sums are over the whole
global batch. So the loss is a mean over what is real in the batch, whatever the mesh and however
many microbatches it is cut into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mmjax.config import UserError, in_steps, kind_function, settings
from mmjax.models import make_model, with_plain_kernels
from mmjax.models.generation import write
from mmjax.objectives import Losses
from mmjax.parallel import compiler, rules
from mmjax.state.optimizer import Optimizers, keep_unused, make_optimizers, state_axes
from mmjax.state.train_state import TrainState, clamped
from mmjax.training.flops import count_training_flops
from mmjax.training.microbatches import (
  Forward,
  Part,
  Recorder,
  Replay,
  Request,
  encode_whole,
  frozen_modules,
  is_shared,
  join_rows,
  separate,
  split_rows,
  stream,
  with_batch_statistics,
)
from mmjax.training.teacher import Teacher

Array = jax.Array
LOSSES = ("loss", "opponent")  # what is minimised of an objective's Losses; the rest are metrics


class Objective(NamedTuple):
  """One entry of config.objectives, ready to call: `function(forward, batch, rng) -> Losses`."""

  name: str
  function: Any
  weight: float
  couples_examples: bool
  sources: tuple[str, ...]
  teacher: str

  def __call__(self, forward: Forward, batch: dict, rng: Array) -> Losses:
    return self.function(forward, batch, stream(rng, self.name))


class Step:
  """The train step of `config` on `mesh`, with what belongs to it: shapes, placement, initial
  state, embeddings.

  steps, examples: length of the run and of an epoch, which schedules need. batch_spec: tree of
  ShapeDtypeStruct of a global batch; None = what the data pipeline of the config makes. Nothing is
  computed or placed until a method asks for it, so the step can be lowered for devices that are not
  there.
  """

  def __init__(
    self,
    config: FrozenConfigDict,
    mesh: Mesh,
    *,
    steps: int | None = None,
    examples: int | None = None,
    batch_spec: Any = None,
  ):
    self.config, self.mesh, self.rules = config, mesh, rules.logical_rules(config)
    self.model = make_model(config)
    self.objectives = tuple(
      Objective(
        name,
        functools.partial(
          kind_function(entry, "objective"),
          **settings(entry, "objective", without=("weight", "sources")),
        ),
        entry.weight,
        kind_function(entry, "objective").couples_examples,
        tuple(entry.sources),
        entry.get("teacher", ""),
      )
      for name, entry in config.objectives.items()
    )
    self._steps, self._examples = steps, examples

    # Shapes first, then logical axes, then places.
    from mmjax.data.pipeline import batch_spec as spec_of_config

    on_batch = rules.batch_sharding(mesh)
    place = lambda spec: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_batch), spec
    )
    self.batch_spec = place(spec_of_config(config) if batch_spec is None else batch_spec)
    # The kinds of step: one, or one a source where each step has its own.
    self.sources = (
      tuple(n for n, e in config.data.sources.items() if e.weight)
      if config.data.mix == "steps"
      else ("",)
    )
    self._batch_specs = {
      n: place(spec_of_config(config, source=n)) if n else self.batch_spec for n in self.sources
    }
    self._variables = jax.jit(
      self._new_variables, inline=True
    )  # traced once, though asked for three times
    variables = dict(self._inside(jax.eval_shape)(self._variables, jax.random.key(0)))
    boxed = variables.pop("params")
    self.axes = rules.param_axes(boxed)
    self.params_spec = _placed(nn.unbox(boxed), rules.param_shardings(boxed, mesh, self.rules))
    self.model_state_spec = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.replicated(mesh)),
      nn.unbox(variables),
    )
    self._executables: dict[Any, jax.stages.Compiled] = {}
    self._appliers: dict[Any, Any] = {}

  def like(self, config: FrozenConfigDict) -> Step:
    """The step of another config on the same mesh, batches and length."""
    return Step(
      config, self.mesh, steps=self._steps, examples=self._examples, batch_spec=self.batch_spec
    )

  # -- State ---------------------------------------------------------------------------------------

  @functools.cached_property
  def optimizer(self) -> Optimizers:
    """The optimizers of the config. Raises UserError: a regex of it matches no parameter, or the
    length is in epochs and `examples` is not known."""
    steps = self._steps or in_steps(
      self.config.train.steps,
      steps=None,
      batch_size=self.config.train.batch_size,
      examples=self._examples,
    )
    return make_optimizers(
      self.config,
      self.axes,
      self.params_spec,
      steps=steps,
      examples=self._examples,
      sources=self.sources,
    )

  @functools.cached_property
  def teachers(self) -> dict[str, Teacher]:
    """Models of other checkpoints that objectives learn from. Raises UserError: none there, or of
    other inputs.
    """
    return {
      o.teacher: Teacher(o.teacher, self.config, self.mesh, self.batch_spec)
      for o in self.objectives
      if o.teacher
    }

  @property
  def taught_spec(self) -> dict[str, Any]:
    """The teachers' variables as trees of ShapeDtypeStruct with shardings: a step's constant
    input.
    """
    return {path: teacher.spec for path, teacher in self.teachers.items()}

  @functools.cached_property
  def taught(self) -> dict[str, Any]:
    """The teachers' variables, loaded when first asked for; no part of the state or of a
    checkpoint.
    """
    return {path: teacher.load(self.config) for path, teacher in self.teachers.items()}

  @functools.cached_property
  def state_spec(self) -> TrainState:
    """The state as a tree of ShapeDtypeStruct with shardings: for restoring, lowering and
    planning.
    """
    shapes = self._inside(jax.eval_shape)(self._initial_state, jax.random.key(0))
    optimizer_axes = state_axes(self.optimizer, self.params_spec, self.axes)
    whole = rules.replicated(self.mesh)
    params = jax.tree.map(lambda x: x.sharding, self.params_spec)
    shardings = TrainState(
      step=whole,
      params=params,
      model_state=jax.tree.map(lambda _: whole, self.model_state_spec),
      opt_states=rules.axes_shardings(optimizer_axes, shapes.opt_states, self.mesh, self.rules),
      ema=params if self.config.train.ema else None,
    )
    return _placed(shapes, shardings)

  def init(self, seed: int) -> TrainState:
    """The state before the first step, made where it lives; the same numbers on any mesh."""
    return self._inside(
      jax.jit(
        lambda: self._initial_state(jax.random.key(seed)), out_shardings=_shardings(self.state_spec)
      )
    )()

  def with_params(self, state: TrainState, params: Any, model_state: Any = None) -> TrainState:
    """The state of a run that starts from other parameters, and another model state where it is
    given.
    """

    def place(tree: Any, spec: Any) -> Any:
      copy = jax.jit(
        lambda tree: clamped(jax.tree.map(jnp.copy, tree), self.config),
        out_shardings=_shardings(spec),
      )
      return copy(jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), tree, spec))

    return state.replace(
      params=place(params, self.params_spec),
      ema=place(params, self.params_spec) if self.config.train.ema else None,
      model_state=place(model_state, self.model_state_spec) if model_state else state.model_state,
    )

  def evaluation_variables(self, state: TrainState) -> dict[str, Any]:
    """What `apply` takes: the parameters that evaluation uses (the moving average where there is
    one), and what else the model keeps.
    """
    return {"params": state.eval_params, **state.model_state}

  def _new_variables(self, rng: Array) -> Mapping[str, Any]:
    """Boxed parameters and model state. What the model does with the (empty) batch is dropped by
    the compiler.
    """
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch_spec)
    return self.model.init(
      {"params": stream(rng, "params"), "dropout": stream(rng, "dropout")}, batch
    )

  def _initial_state(self, rng: Array) -> TrainState:
    variables = dict(nn.unbox(self._variables(rng)))
    params = variables.pop("params")
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_states=self.optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params) if self.config.train.ema else None,
    )

  # -- Running and compiling -----------------------------------------------------------------------

  def train(
    self, state: TrainState, batch: dict, source: str = ""
  ) -> tuple[TrainState, dict[str, Array]]:
    """One step. `batch`: global arrays (`multihost.to_device`); `state` is used up. Metrics are
    float32 scalars.

    source: where data.mix is "steps", the entry of data.sources that the batch comes from.
    """
    return self._executable(jax.tree.map(_spec_of, batch), source)(state, batch, self.taught)

  def compile(self) -> list[jax.stages.Compiled]:
    """The executables for the batches of the config, one a kind of step; made once, ahead of the
    first step.
    """
    return [self._executable(spec, source) for source, spec in self._batch_specs.items()]

  def batch_spec_of(self, source: str) -> Any:
    """The batches of one kind of step; "" = of the first, or only, one."""
    return self._batch_specs[source or self.sources[0]]

  def lower(self, batch_spec: Any = None, source: str = "") -> jax.stages.Lowered:
    """The step as the compiler gets it; needs neither data nor state."""
    state = (
      self.state_spec
    )  # made before the mesh is in use: its devices may not be there to make a key on
    source = source or self.sources[0]
    step = jax.jit(
      functools.partial(self.update, source=source),
      donate_argnums=0,
      out_shardings=(_shardings(state), rules.replicated(self.mesh)),
    )
    return self._inside(step.lower)(
      state, self._batch_specs[source] if batch_spec is None else batch_spec, self.taught_spec
    )

  def compiled(self, lowered: jax.stages.Lowered, *, dump: str = "") -> jax.stages.Compiled:
    """The executable of `lower`, with the compiler options of the config. dump: folder where the
    compiler leaves its program as text.
    """
    options = compiler.options(self.config, self.mesh) or {}
    if dump:
      options |= dict(xla_dump_to=dump, xla_dump_hlo_as_text=True)
    return lowered.compile(compiler_options=options or None)

  def flops_per_step(self) -> float:
    """FLOPs of the matrix products of one step over all devices: the forward pass, and the
    derivatives that the step takes (none of what is frozen, and of teachers). Recomputation is not
    counted. The mean over the kinds of step."""
    step = self.counted

    def of(source: str) -> float:
      def loss(params: Any, model_state: Any, batch: dict, taught: Any) -> Array:
        return step._whole_batch(
          params, model_state, batch, jax.random.key(0), step._active(source), taught
        )[0]

      return step.training_flops(loss, self._batch_specs[source])

    return self.mean_over_kinds(of)

  def training_flops(self, loss: Callable[[Any, Any, dict, Any], Array], batch_spec: Any) -> float:
    """FLOPs of loss(params, model state, batch, the teachers' variables), a scalar, and of its
    derivatives by what is trained.
    """
    of = lambda params, *rest: loss(self._trained(params), *rest)
    return self._inside(count_training_flops)(
      of, self.params_spec, self.model_state_spec, batch_spec, self.taught_spec
    )

  @property
  def counted(self) -> Step:
    """The step with the plain attention formula, on which FLOPs are counted: other kernels pad, and
    padding is no work of the model.
    """
    on_cpu = self._on("cpu")  # there it is the formula anyway
    return self if on_cpu else self.like(with_plain_kernels(self.config))

  def _on(self, platform: str) -> bool:
    return self.mesh.devices.flat[0].platform == platform

  def mean_over_kinds(self, of: Callable[[str], float]) -> float:
    """The mean of a figure of each kind of step, by how often there is one."""
    weights = [
      self.config.data.sources[source].weight if source else 1.0 for source in self.sources
    ]
    return sum(w * of(source) for w, source in zip(weights, self.sources, strict=True)) / sum(
      weights
    )

  def apply(self, variables: dict[str, Any], method: str, args: tuple, batch: dict) -> Array:
    """A method of the model on a batch, for evaluation (nothing dropped): leading axis B, split
    like the batch.

    variables: of `evaluation_variables`, or {"params": ...}. args: hashable, before the batch. The
    method "write" is
    `models.generation.write`: texts int32 [B, T].
    """
    if (method, args) not in self._appliers:

      def run(variables: dict, batch: dict) -> Array:
        params = rules.gather_parameters(variables["params"], self.params_spec, self.axes)
        variables = {**variables, "params": params}
        if method == "write":
          return write(self.model, variables, *args, batch)
        return self.model.apply(variables, *args, batch, method=method)

      self._appliers[method, args] = jax.jit(
        run,
        out_shardings=rules.batch_sharding(self.mesh),
        compiler_options=compiler.options(self.config, self.mesh) if self._on("gpu") else None,
      )
    return self._inside(self._appliers[method, args])(variables, batch)

  def _executable(self, batch_spec: Any, source: str) -> jax.stages.Compiled:
    leaves, tree = jax.tree.flatten(batch_spec)
    signature = (
      tree,
      tuple((x.shape, str(x.dtype)) for x in leaves),
      tuple(o.name for o in self._active(source)),
    )
    if signature not in self._executables:
      self._executables[signature] = self.compiled(self.lower(batch_spec, source))
    return self._executables[signature]

  def _active(self, source: str) -> tuple[Objective, ...]:
    """The objectives of the steps of a source."""
    return tuple(
      objective
      for objective in self.objectives
      if not source or not objective.sources or source in objective.sources
    )

  def _inside(self, function: Any) -> Any:
    """`function`, traced and run with the mesh and the rules in use."""

    def call(*args: Any) -> Any:
      with rules.use(self.mesh, self.rules):
        return function(*args)

    return call

  # -- The step ------------------------------------------------------------------------------------

  def update(
    self, state: TrainState, batch: dict, taught: Any, source: str = ""
  ) -> tuple[TrainState, dict[str, Array]]:
    """The step itself, traced by `lower`. taught: variables of the teachers, {} without any."""
    train, objectives = self.config.train, self._active(source)
    rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    if train.mixup and "image" in batch:
      batch = mixup(batch, train.mixup, stream(rng, "mixup"))

    # Loss and gradients of the mean over the global batch.
    gradients_of = self._in_microbatches if train.microbatches > 1 else self._at_once
    loss, gradients, sums, model_state = gradients_of(
      state.params, state.model_state, batch, rng, objectives, taught
    )
    gradients = jax.lax.with_sharding_constraint(gradients, _shardings(self.params_spec))
    gradient_norm = optax.tree.norm(gradients)

    # The next parameters, each group by its own optimizer.
    updates, opt_states = self.optimizer.update(
      gradients, state.opt_states, state.params, step=state.step, source=source
    )
    if (
      len(self.sources) > 1
    ):  # what this step's objectives do not use stays as it is, moments and all
      used = self._used_by(batch, objectives)
      updates = jax.tree.map(
        lambda update, is_used: update if is_used else jnp.zeros_like(update), updates, used
      )
      opt_states = keep_unused(opt_states, state.opt_states, used)
    params = clamped(optax.apply_updates(state.params, updates), self.config)
    average = lambda old, new: train.ema * old + (1 - train.ema) * new
    new = TrainState(
      step=state.step,
      params=params,
      model_state=model_state,
      opt_states=opt_states,
      ema=jax.tree.map(average, state.ema, params) if train.ema else None,
    )

    # A step that is not finite leaves everything as it was, and counts.
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    new = jax.tree.map(lambda now, before: jnp.where(finite, now, before), new, state).replace(
      step=state.step + 1
    )

    metrics = {
      "loss": loss,
      **{
        f"{name}/{key}": _mean(*pair)
        for name, losses in sums.items()
        for key, pair in losses.items()
      },
    }
    metrics.update(
      grad_norm=gradient_norm,
      param_norm=optax.tree.norm(new.params),
      update_norm=optax.tree.norm(updates),
      skipped=~finite,
    )
    metrics.update(
      {
        "lr" if group == "main" else f"{group}/lr": optimizer.schedule(state.step)
        for group, optimizer in self.optimizer.groups.items()
      }
    )
    if is_shared(self.model, "temperature"):
      metrics["scale"] = self.model.apply({"params": state.params}, method="temperature")[0]
    return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

  def _at_once(
    self,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    objectives: tuple[Objective, ...],
    taught: Any = (),
  ) -> tuple:
    """(loss, gradients, {objective: Losses}, model state) of a batch that fits in memory."""
    total = lambda params: self._whole_batch(
      self._trained(params), model_state, batch, rng, objectives, taught
    )
    (loss, (sums, model_state)), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return loss, gradients, sums, model_state

  def _whole_batch(
    self,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    objectives: tuple[Objective, ...],
    taught: Any = (),
  ) -> tuple:
    forward = self._forward(params, model_state, batch, rng, taught)
    sums = {objective.name: objective(forward, batch, rng) for objective in objectives}
    return self._loss(sums), (sums, forward.model_state)

  def _used_by(self, batch: dict, objectives: tuple[Objective, ...]) -> Any:
    """A tree of bools like the parameters: which of them the loss depends on."""
    loss = lambda params, model_state, batch, taught: self._whole_batch(
      params, model_state, batch, jax.random.key(0), objectives, taught
    )[0]
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      (self.params_spec, self.model_state_spec, batch, self.taught_spec),
    )
    used = dce_jaxpr(jax.make_jaxpr(loss)(*shapes).jaxpr, [True])[1]
    leaves, tree = jax.tree.flatten(self.params_spec)
    return tree.unflatten(used[: len(leaves)])

  def _in_microbatches(
    self,
    params: Any,
    model_state: Any,
    batch: dict,
    rng: Array,
    objectives: tuple[Objective, ...],
    taught: Any = (),
  ) -> tuple:
    """The same for a batch cut into parts, one after the other: equal up to rounding (but for
    dropout, drawn per part). Encoders with batch statistics are not cut."""
    count = self.config.train.microbatches
    fixed, whole = self._trained(params), self._uncut
    forward_whole = self._forward(fixed, model_state, batch, rng, taught)

    def forward_part(params: Any, part: Part) -> Forward:
      forward = self._forward(
        params, model_state, part.batch, jax.random.fold_in(rng, part.number), taught
      )
      forward.views, forward.encoded = list(part.views), part.encoded if whole else ()
      return forward

    # Objectives that couple examples, first pass: what they ask for, of the whole batch, without
    # gradients.
    def compute(request: Request, views: list[dict]) -> Any:
      parts = Part.all(count, batch, views, encode_whole(forward_whole, whole, views))
      outputs = jax.lax.scan(
        lambda _, part: (None, request.of(forward_part(fixed, part))), None, parts
      )[1]
      return jax.lax.stop_gradient(join_rows(outputs))

    coupled = [objective for objective in objectives if objective.couples_examples]
    recorder = Recorder(forward_whole, compute)
    for objective in coupled:
      objective(recorder, batch, rng)

    # Then the objectives themselves on those outputs: their derivatives by the outputs, and by
    # shared parameters.
    outputs, join = separate(recorder.outputs)

    def coupled_loss(outputs: list[Array], params: Any) -> tuple:
      replay = Replay(recorder, self._trained(params), join(outputs))
      sums = {objective.name: objective(replay, batch, rng) for objective in coupled}
      return self._loss(sums), sums

    (loss, sums), (pulls, gradients) = jax.value_and_grad(
      coupled_loss, argnums=(0, 1), has_aux=True
    )(outputs, params)

    # Encoders with batch statistics see all rows at once; their parameters' derivatives go by way
    # of their outputs.
    def encode(params: Any) -> tuple:
      forward = self._forward(self._trained(params), model_state, batch, rng, taught)
      encoded = encode_whole(forward, whole, recorder.views)
      return separate(encoded)[0], (encoded, forward.model_state)

    _, through_encoders, (encoded, moved) = jax.vjp(encode, params, has_aux=True)
    parts = Part.all(count, batch, recorder.views, encoded)

    # The other objectives need their total weights before their sums can be added up (the compiler
    # drops the rest).
    plain = [objective for objective in objectives if not objective.couples_examples]

    def weights_of_part(_: None, part: Part) -> tuple[None, Any]:
      forward = forward_part(fixed, part)
      sums = {objective.name: objective(forward, part.batch, forward.rng) for objective in plain}
      return None, {
        name: {key: losses[key][1] for key in LOSSES if key in losses}
        for name, losses in sums.items()
      }

    weights = (
      jax.tree.map(lambda w: w.sum(0), jax.lax.scan(weights_of_part, None, parts)[1])
      if plain
      else {}
    )

    # Second pass: through the model again, part by part, with the same randomness.
    used: set[str] = set()

    def gradients_of_part(gradients: Any, inputs: tuple) -> tuple[Any, Any]:
      part, pulls = inputs
      outputs, join_encoded = separate(part.encoded)

      def pulled(params: Any, outputs: list[Array]) -> tuple:
        forward = forward_part(self._trained(params), part._replace(encoded=join_encoded(outputs)))
        again = [request.of(forward) for request in recorder.requests]
        total = sum(
          jnp.vdot(output, pull) for output, pull in zip(separate(again)[0], pulls, strict=True)
        )
        sums = {objective.name: objective(forward, part.batch, forward.rng) for objective in plain}
        used.update(forward.used)
        return total + self._loss(sums, weights), sums

      (more, pulls), sums = jax.grad(pulled, argnums=(0, 1), has_aux=True)(params, outputs)
      return jax.lax.with_sharding_constraint(
        jax.tree.map(jnp.add, gradients, more), _shardings(self.params_spec)
      ), (sums, pulls)

    gradients, (part_sums, pulls) = jax.lax.scan(
      gradients_of_part, gradients, (parts, split_rows(pulls, count))
    )
    gradients = jax.tree.map(jnp.add, gradients, through_encoders(join_rows(pulls))[0])
    model_state = {
      collection: {
        name: moved[collection][name] if name in used else old for name, old in modules.items()
      }
      for collection, modules in model_state.items()
    }
    plain_totals = jax.tree.map(lambda x: x.sum(0), part_sums)
    return loss + self._loss(plain_totals), gradients, sums | plain_totals, model_state

  @functools.cached_property
  def _frozen(self) -> frozenset[tuple[str, ...]]:
    """Modules without a trained parameter, which run as in evaluation; encoders that share a trunk
    are frozen only with it.
    """
    trained, encoders = self.optimizer.trained, self.config.model.get("encoders", {})
    frozen = frozen_modules(trained)
    return (
      frozen - {(modality,) for modality in encoders}
      if any(jax.tree.leaves(trained.get("trunk", {})))
      else frozen
    )

  @functools.cached_property
  def _uncut(self) -> tuple[str, ...]:
    """The encoders that microbatches leave whole: those with batch statistics. Raises UserError:
    another part of the model has some.
    """
    names = with_batch_statistics(self.model_state_spec, self._frozen)
    for name in names:
      if name not in self.config.model.encoders:
        raise UserError(
          f"train.microbatches: {name} of the model has batch statistics and is no encoder of its "
          "own, so they would be of a part of the batch. Set train.microbatches to 1"
        )
    return names

  def _forward(
    self, params: Any, model_state: Any, batch: dict, rng: Array, taught: Any
  ) -> Forward:
    several = self.optimizer.groups if self.config.optimizers else {}
    groups = {name: optimizer.trained for name, optimizer in several.items()}
    teachers = {
      path: (self.teachers[path].model, self.teachers[path].gathered(variables))
      for path, variables in dict(taught).items()
    }
    return Forward(self.model, params, model_state, batch, rng, groups, teachers, self._frozen)

  def _loss(
    self, sums: dict[str, Losses], weights: dict[str, dict[str, Array]] | None = None
  ) -> Array:
    """The weighted sum of the objectives' means, and the means of what opponents minimise. Weights
    are not differentiated.
    weights: of the whole batch, where the sums are of a part of it."""
    factor = {objective.name: objective.weight for objective in self.objectives}
    means = [
      (factor[name] if key == "loss" else 1.0)
      * _mean(losses[key][0], weights[name][key] if weights else losses[key][1])
      for name, losses in sums.items()
      for key in LOSSES
      if key in losses
    ]
    return sum(means, jnp.zeros((), jnp.float32))

  def _trained(self, params: Any) -> Any:
    """The parameters as the model gets them in training: gathered where that is better done once,
    and without derivatives by those that the optimizer never changes, so that their backward pass
    is not computed."""
    params = jax.tree.map(
      lambda trained, x: x if trained else jax.lax.stop_gradient(x), self.optimizer.trained, params
    )
    return rules.gather_parameters(params, self.params_spec, self.axes)


def mixup(batch: dict, alpha: float, rng: Array) -> dict:
  """Mixes the pixels of each row with those of the row before it (Zhang et al. 2018,
  arXiv:1710.09412), w ~ Beta(alpha, alpha).

  Pixels uint8 stay uint8 (rounded). Adds `image.mix_weight` float32 [B], the share of the row
  itself, `image.mix_row` int32 [B], the row of the rest, and `image.mix_label`, that row's label,
  where there are labels: objectives make soft targets of them. A row that counts is never mixed
  with one that does not.
  """
  image = batch["image"]
  pixels, size = image["pixels"], image["pixels"].shape[0]
  real = batch.get("valid", jnp.ones(size, bool))
  if "present" in image:
    real &= image["present"].reshape(size, -1).all(-1)
  before = lambda x: jnp.roll(x, 1, axis=0)
  weight = jnp.where(before(real), jax.random.beta(rng, alpha, alpha, (size,), jnp.float32), 1)
  share = weight.reshape(-1, *(1,) * (pixels.ndim - 1))
  mixed = jnp.round(share * pixels + (1 - share) * before(pixels)).astype(pixels.dtype)
  mixed = rules.constrain_batch(mixed)
  row = before(jnp.arange(size, dtype=jnp.int32))
  mix = {"pixels": mixed, "mix_weight": weight, "mix_row": row}
  if "label" in batch:
    mix["mix_label"] = before(batch["label"])  # a microbatch does not hold the row itself
  return {**batch, "image": {**image, **mix}}


def _mean(total: Array, weight: Array) -> Array:
  """total / weight; 0 where nothing counts."""
  weight = jax.lax.stop_gradient(weight)
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def _shardings(spec: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, spec)


def _spec_of(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
