"""The program of a run: shapes, shardings, the first state, compiling, FLOPs. The step itself is
step.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mmjax.config import in_steps
from mmjax.data import pipeline
from mmjax.inference.engine import generate_text
from mmjax.models import make_model, with_plain_kernels
from mmjax.objectives import Losses
from mmjax.objectives.preference import JUDGED, answers_of
from mmjax.parallel import compiler, rules
from mmjax.parallel.rules import shardings_of, with_shardings
from mmjax.state import adapters
from mmjax.state.optimizer import Optimizers, make_optimizers, state_axes
from mmjax.state.train_state import TrainState, clamped
from mmjax.training.flops import count_training_flops
from mmjax.training.forward import Forward, stream
from mmjax.training.step import TrainStep, make_objectives
from mmjax.training.teacher import Teacher

Array = jax.Array
LONGEST_TABLE = 2**22  # steps whose learning rates are kept: 16 MiB


class Program:
  """The train step of `config` on `mesh`, with what belongs to it: shapes, shardings, the first
  state, executables, and the model for evaluation.

  steps, examples: length of the run and of an epoch, which schedules need. batch_spec: tree of
  ShapeDtypeStruct of a global batch; None = what the data pipeline of the config makes. Nothing is
  computed or allocated until a method asks for it, so the step can be lowered for devices that are
  not there.
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
    self.objectives = make_objectives(config, self.model)
    self._steps, self._examples = steps, examples

    # Shapes first, then logical axes, then shardings.
    spec = pipeline.batch_spec(config) if batch_spec is None else batch_spec
    self.batch_spec = self._sharded_batch(spec)
    # The kinds of step: one, or one a source where each step has its own.
    self.sources: tuple[str, ...] = ("",)
    self._batch_specs = {"": self.batch_spec}
    if config.data.mix == "steps":
      self.sources = tuple(name for name, entry in config.data.sources.items() if entry.weight)
      self._batch_specs = {
        name: self._sharded_batch(pipeline.batch_spec(config, source=name)) for name in self.sources
      }
    # Traced once, though asked for three times.
    self._variables = jax.jit(self._init_variables, inline=True)
    variables = dict(self.in_mesh(jax.eval_shape)(self._variables, jax.random.key(0)))
    boxed = variables.pop("params")
    self.axes = rules.param_axes(boxed)
    params_shardings = rules.param_shardings(boxed, mesh, self.rules)
    self.params_spec = with_shardings(nn.unbox(boxed), params_shardings)
    state_shapes, whole = nn.unbox(variables), rules.replicated(mesh)
    self.model_state_spec = with_shardings(
      state_shapes, jax.tree.map(lambda _: whole, state_shapes)
    )
    self._executables: dict[Any, jax.stages.Compiled] = {}
    self._appliers: dict[Any, Callable[..., Any]] = {}

  def like(self, config: FrozenConfigDict) -> Program:
    """The program of another config on the same mesh, batches and length."""
    return Program(
      config, self.mesh, steps=self._steps, examples=self._examples, batch_spec=self.batch_spec
    )

  @functools.cached_property
  def step(self) -> TrainStep:
    """The step, to be traced. Raises UserError: as `optimizer` and `teachers`."""
    return TrainStep(
      self.config,
      self.model,
      self.objectives,
      self.optimizer,
      self.sources,
      self.params_spec,
      self.model_state_spec,
      self.axes,
      self.teachers,
    )

  @functools.cached_property
  def optimizer(self) -> Optimizers:
    """The optimizers of the config. Raises UserError: a regex of it matches no parameter, or the
    length is in epochs and `examples` is not known."""
    return make_optimizers(
      self.config,
      self.axes,
      self.params_spec,
      steps=self.steps,
      examples=self._examples,
      sources=self.sources,
    )

  @functools.cached_property
  def steps(self) -> int:
    """The length of the run. Raises UserError: it is in epochs and `examples` is not known."""
    return self._steps or in_steps(
      self.config.train.steps,
      steps=None,
      batch_size=self.config.train.batch_size,
      examples=self._examples,
    )

  @property
  def rates_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """{group: its learning rate at every step, float32}: an input of a step, so that another rate,
    schedule or length, up to the next power of two, compiles nothing. Empty for a run that is too
    long for a table: its schedule is part of the program.
    """
    places = max(1024, 1 << (self.steps - 1).bit_length())
    if places > LONGEST_TABLE:
      return {}
    spec = jax.ShapeDtypeStruct((places,), jnp.float32, sharding=rules.replicated(self.mesh))
    return dict.fromkeys(self.optimizer.groups, spec)

  @functools.cached_property
  def rates(self) -> dict[str, Array]:
    """The learning rates of the run, as `rates_spec` describes them."""

    def table() -> dict[str, Array]:
      return {
        group: self.optimizer.groups[group].schedule(jnp.arange(spec.shape[0]))
        for group, spec in self.rates_spec.items()
      }

    return self.in_mesh(jax.jit(table, out_shardings=rules.replicated(self.mesh)))()

  @functools.cached_property
  def teachers(self) -> dict[str, Teacher]:
    """Models of other checkpoints that objectives learn from. Raises UserError: none there, or of
    other inputs.
    """
    return {
      objective.teacher: Teacher(objective.teacher, self.config, self.mesh, self.batch_spec)
      for objective in self.objectives
      if objective.teacher
    }

  @property
  def teachers_spec(self) -> dict[str, Any]:
    """The teachers' variables as trees of ShapeDtypeStruct with shardings: a constant input of a
    step.
    """
    return {path: teacher.spec for path, teacher in self.teachers.items()}

  @functools.cached_property
  def teachers_variables(self) -> dict[str, Any]:
    """The teachers' variables, loaded when first asked for; no part of the state or of a
    checkpoint.
    """
    return {path: teacher.load(self.config) for path, teacher in self.teachers.items()}

  # -- State ---------------------------------------------------------------------------------------

  @functools.cached_property
  def state_spec(self) -> TrainState:
    """The state as a tree of ShapeDtypeStruct with shardings: for restoring, lowering and
    planning.
    """
    shapes = self.in_mesh(jax.eval_shape)(self._init_state, jax.random.key(0))
    optimizer_axes = state_axes(self.optimizer, self.params_spec, self.axes)
    params = shardings_of(self.params_spec)
    shardings = shapes.replace(
      step=rules.replicated(self.mesh),
      params=params,
      model_state=shardings_of(self.model_state_spec),
      opt_states=rules.axes_shardings(optimizer_axes, shapes.opt_states, self.mesh, self.rules),
      ema=params if self.config.train.ema else None,
    )
    return with_shardings(shapes, shardings)

  def init(self, seed: int) -> TrainState:
    """The state before the first step, made where it lives; the same numbers on any mesh."""

    def init() -> TrainState:
      return self._init_state(jax.random.key(seed))

    return self.in_mesh(jax.jit(init, out_shardings=shardings_of(self.state_spec)))()

  def with_params(self, state: TrainState, params: Any, model_state: Any = None) -> TrainState:
    """The state of a run that starts from other parameters, and another model state where it is
    given.
    """

    def copy(tree: Any) -> Any:
      return clamped(jax.tree.map(jnp.copy, tree), self.config)

    def put(tree: Any, spec: Any) -> Any:
      tree = jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), tree, spec)
      return jax.jit(copy, out_shardings=shardings_of(spec))(tree)

    return state.replace(
      params=put(params, self.params_spec),
      ema=put(params, self.params_spec) if self.config.train.ema else None,
      model_state=put(model_state, self.model_state_spec) if model_state else state.model_state,
    )

  def _init_variables(self, rng: Array) -> Mapping[str, Any]:
    """Boxed parameters and model state. What the model does with the (empty) batch is dropped by
    the compiler.
    """
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch_spec)
    rngs = {"params": stream(rng, "params"), "dropout": stream(rng, "dropout")}
    return adapters.init_variables(self.model, self.config, rngs, batch)

  def _init_state(self, rng: Array) -> TrainState:
    variables = dict(nn.unbox(self._variables(rng)))
    params = variables.pop("params")
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_states=self.optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params) if self.config.train.ema else None,
    )

  def _sharded_batch(self, spec: Any) -> Any:
    sharding = rules.batch_sharding(self.mesh)
    return with_shardings(spec, jax.tree.map(lambda _: sharding, spec))

  # -- Compiling and running -----------------------------------------------------------------------

  def train(
    self, state: TrainState, batch: dict, source: str = ""
  ) -> tuple[TrainState, dict[str, Array]]:
    """One step. `batch`: global arrays (`multihost.to_device`); `state` is used up. Metrics are
    float32 scalars.

    source: where data.mix is "steps", the entry of data.sources that the batch comes from.
    """
    executable = self._executable(jax.tree.map(_spec_of, batch), source)
    return executable(state, batch, self.teachers_variables, self.rates)

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
    # Made before the mesh is in use: its devices may not be there to make a key on.
    state, batch, *rest = self.inputs_spec(source)
    step = jax.jit(
      functools.partial(self.step.update, source=source or self.sources[0]),
      donate_argnums=0,
      out_shardings=(shardings_of(state), rules.replicated(self.mesh)),
    )
    return self.in_mesh(step.lower)(state, batch if batch_spec is None else batch_spec, *rest)

  def inputs_spec(self, source: str = "") -> tuple[TrainState, Any, dict, dict]:
    """What `TrainStep.update` takes: the state, a batch of this kind of step ("" = the first, or
    only, one), the teachers' variables, the learning rates; trees of ShapeDtypeStruct with
    shardings.
    """
    return self.state_spec, self.batch_spec_of(source), self.teachers_spec, self.rates_spec

  def compiled(self, lowered: jax.stages.Lowered, *, dump: str = "") -> jax.stages.Compiled:
    """The executable of `lower`, with the compiler options of the config. dump: folder where the
    compiler leaves its program as text.
    """
    options = compiler.options(self.config, self.mesh) or {}
    if dump:
      options |= dict(xla_dump_to=dump, xla_dump_hlo_as_text=True)
    return lowered.compile(compiler_options=options or None)

  def in_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced and run with the mesh and the rules in use."""

    def call(*args: Any) -> Any:
      with rules.use(self.mesh, self.rules):
        return function(*args)

    return call

  def _executable(self, batch_spec: Any, source: str) -> jax.stages.Compiled:
    leaves, tree = jax.tree.flatten(batch_spec)
    shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
    names = tuple(objective.name for objective in self.step.objectives_of(source))
    signature = (tree, shapes, names)
    if signature not in self._executables:
      self._executables[signature] = self.compiled(self.lower(batch_spec, source))
    return self._executables[signature]

  # -- FLOPs ---------------------------------------------------------------------------------------

  def flops_per_step(self) -> float:
    """FLOPs of the matrix products of one step over all devices: the forward pass, and the
    derivatives that the step takes (none of what is frozen, and of teachers). Recomputation is not
    counted. The mean over the kinds of step."""
    plain = self.with_plain_attention

    def flops_of(source: str) -> float:
      objectives = plain.step.objectives_of(source)

      def loss(params: Any, model_state: Any, batch: dict, teachers: Any) -> Array:
        rng = jax.random.key(0)
        return plain.step.loss(params, model_state, batch, rng, objectives, teachers)[0]

      return plain.training_flops(loss, self._batch_specs[source])

    return self.mean_over_kinds(flops_of)

  def training_flops(self, loss: Callable[[Any, Any, dict, Any], Array], batch_spec: Any) -> float:
    """FLOPs of loss(params, model state, batch, the teachers' variables), a scalar, and of its
    derivatives by what is trained.
    """

    def trained_loss(trained: Any, frozen: Any, *rest: Any) -> Array:
      return loss(self.step.trainable(self.step.join(trained, frozen)), *rest)

    return self.in_mesh(count_training_flops)(
      trained_loss,
      *self.step.split(self.params_spec),
      self.model_state_spec,
      batch_spec,
      self.teachers_spec,
    )

  @functools.cached_property
  def with_plain_attention(self) -> Program:
    """The program on which FLOPs are counted: other attention kernels pad, and padding is no work
    of the model.
    """
    if self._runs_on("cpu"):  # there it is the plain formula anyway
      return self
    return self.like(with_plain_kernels(self.config))

  def mean_over_kinds(self, figure: Callable[[str], float]) -> float:
    """The mean of a figure of each kind of step, by how often there is one."""
    sources = self.config.data.sources
    weights = [sources[source].weight if source else 1.0 for source in self.sources]
    figures = [figure(source) for source in self.sources]
    return sum(w * x for w, x in zip(weights, figures, strict=True)) / sum(weights)

  def _runs_on(self, platform: str) -> bool:
    return self.mesh.devices.flat[0].platform == platform

  # -- The model, for evaluation -------------------------------------------------------------------

  def evaluation_variables(self, state: TrainState) -> dict[str, Any]:
    """What `apply` takes: the parameters that evaluation uses (the moving average where there is
    one), and what else the model keeps.
    """
    return {"params": state.eval_params, **state.model_state}

  def apply(self, variables: dict[str, Any], method: str, args: tuple, batch: dict) -> Array:
    """A method of the model on a batch, for evaluation (nothing dropped): leading axis B, split
    like the batch.

    variables: of `evaluation_variables`, or {"params": ...}. args: hashable, before the batch. The
    method "generate_text" is `inference.engine.generate_text`: texts int32 [B, T]; JUDGED gives the
    log-probabilities and tokens of `objectives.preference.answers_of` in the first args[0] places,
    float32 [B, places, 3, 2].
    """
    if (method, args) not in self._appliers:

      def run(variables: dict, batch: dict) -> Array:
        params = rules.gather_parameters(variables["params"], self.params_spec, self.axes)
        variables = {**variables, "params": params}
        if method == "generate_text":
          return generate_text(self.model, variables, *(*args, batch))
        if method == JUDGED:
          given: Any = self.model.apply(variables, batch, method="next_tokens")
          return jnp.stack(answers_of(given, batch)[:2], axis=-1)[:, : args[0]]
        output: Any = self.model.apply(variables, *args, batch, method=method)
        return output

      self._appliers[method, args] = jax.jit(
        run,
        out_shardings=rules.batch_sharding(self.mesh),
        compiler_options=compiler.options(self.config, self.mesh) if self._runs_on("gpu") else None,
      )
    return self.in_mesh(self._appliers[method, args])(variables, batch)

  def losses(
    self, variables: dict[str, Any], batch: dict, names: tuple[str, ...]
  ) -> dict[str, Losses]:
    """What the objectives of these names find on a batch, as in evaluation: {name: its Losses}.
    variables: as of `apply`.
    """
    if names not in self._appliers:
      objectives = [objective for objective in self.objectives if objective.name in names]
      teachers = {name: self.teachers[name] for name in self.teachers}

      def run(variables: dict, batch: dict, given: dict) -> dict[str, Losses]:
        params = rules.gather_parameters(variables["params"], self.params_spec, self.axes)
        state = {name: value for name, value in variables.items() if name != "params"}
        models = {
          path: (teachers[path].model, teachers[path].gathered(given[path])) for path in given
        }
        rng = jax.random.key(self.config.seed)
        forward = Forward(self.model, params, state, batch, rng, teachers=models, train=False)
        return {objective.name: objective(forward, batch, rng) for objective in objectives}

      self._appliers[names] = jax.jit(run, out_shardings=rules.replicated(self.mesh))
    return self.in_mesh(self._appliers[names])(variables, batch, self.teachers_variables)


def _spec_of(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
