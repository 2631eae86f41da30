"""Where arrays live: logical axis names -> mesh axes, one table a strategy.

Models name the axes of every parameter (`embed`, `mlp`, `heads`, ...) and of activations (`batch`,
`length`, `embed`, ...);
a strategy is a row of `RULES` and nothing else. Rules apply in order and a mesh axis is used once
an array, so that `batch` comes first: in an activation it takes `fsdp`, and `embed` then stays
whole. Under every strategy sequences are split over `context`, where it divides their length
(models/layers.py `constrain`), and attention runs as a ring over it (models/attention/ring.py); a
sequence that it does not divide is whole on each of these devices, which repeat the work.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from mmjax.parallel.mesh import BATCH_AXES

Rules = tuple[tuple[str, Any], ...]

_ACTIVATIONS = (("batch", BATCH_AXES), ("length", "context"))
RULES: dict[str, Rules] = {
  # Every device holds every parameter; only the batch is split, and sequences.
  "replicated": _ACTIVATIONS,
  # Parameters and optimizer state split along their model width, gathered layer by layer when they
  # are used.
  "fsdp": _ACTIVATIONS + (("embed", "fsdp"),),
  # The same, and heads, hidden units and vocabulary split over `tensor` (Megatron-LM,
  # arXiv:1909.08053, section 3).
  "fsdp_tensor": _ACTIVATIONS
  + (("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"), ("embed", "fsdp")),
}
# elements (of one layer) below which a parameter is held whole: moving it costs more than keeping
# it
SMALL = 4096


def logical_rules(config: FrozenConfigDict) -> Rules:
  """The table of `config.sharding`."""
  return RULES[config.sharding]


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Within it, logical constraints of a model mean `rules` on `mesh`. Tracing and running both
  belong inside.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over replica, data and fsdp; everything else whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def constrain_batch(tree: Any, *, axis: int = 0) -> Any:
  """Keeps axis `axis` of every array of `tree` split over the batch axes; without a mesh, changes
  nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  spec = P(*(None,) * axis, BATCH_AXES)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def param_axes(boxed: Any) -> Any:
  """The logical axis names of each parameter of a boxed (abstract) tree, as tuples; () where a
  parameter names none.
  """

  def names(x: Any) -> tuple:
    return tuple(x.names) if isinstance(x, nn.LogicallyPartitioned) else (None,) * x.ndim

  return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
  """NamedShardings for the parameters of a boxed (abstract) tree, as `jax.eval_shape(model.init,
  ...)` gives it.

  A dimension that its mesh axes do not divide is held whole, and so is a parameter with fewer than
  SMALL elements a layer.
  """
  return axes_shardings(param_axes(boxed), nn.unbox(boxed), mesh, rules)


def axes_shardings(axes: Any, spec: Any, mesh: Mesh, rules: Rules) -> Any:
  """NamedShardings of a tree of arrays (or ShapeDtypeStructs), from a tree like it whose leaves are
  tuples of axis names.

  Optimizer state that is described by the axes of its parameters so comes to lie where they lie.
  """
  leaves, tree = jax.tree.flatten(spec)
  names = jax.tree.leaves(axes, is_leaf=_is_names)
  shardings = [
    NamedSharding(mesh, spec_for(n, x.shape, mesh, rules))
    for n, x in zip(names, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, shardings)


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """A tree of ShapeDtypeStruct with the shardings of another tree."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def shardings_of(spec: Any) -> Any:
  """The shardings of a tree of arrays or ShapeDtypeStruct."""
  return jax.tree.map(lambda x: x.sharding, spec)


def spec_for(names: tuple, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> P:
  """The PartitionSpec of one parameter with these logical axis names."""
  size = math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")
  if size < SMALL:
    return P()
  spec = nn.logical_to_mesh_axes(names, rules) or ()
  return P(*(_fits(axes, n, mesh) for axes, n in zip(spec, shape, strict=True)))


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> P:
  """Which mesh axes split an array of these logical axes, by the rules in use; None where they
  would not split it evenly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return P(*(None for _ in shape))
  spec = nn.logical_to_mesh_axes(names) or ()
  return P(*(_fits(axes, n, mesh) for axes, n in zip(spec, shape, strict=True)))


def devices_along(axes: Any) -> int:
  """Devices of the mesh in use that an entry of a PartitionSpec names; 1 for None, or without a
  mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _count(axes, mesh)


def gather_parameters(params: Any, spec: Any, axes: Any) -> Any:
  """Parameters outside layer stacks, whole along `fsdp`, as every device needs them; their
  gradients are scattered again.

  Without it XLA may compute a lookup in a table of split columns on whole batches and exchange the
  results (all-to-all).
  Stacks are left to be gathered layer by layer. spec: tree of ShapeDtypeStruct with shardings;
  axes: of logical names.
  """
  leaves, tree = jax.tree.flatten(params)
  names = jax.tree.leaves(axes, is_leaf=_is_names)
  out = []
  for x, at, name in zip(leaves, jax.tree.leaves(spec), names, strict=True):
    whole = P(*(None if entry == "fsdp" else entry for entry in at.sharding.spec))
    out.append(
      x if "layers" in name or whole == at.sharding.spec else _gather(x, whole, at.sharding.spec)
    )
  return jax.tree.unflatten(tree, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: P, split: P) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, whole)


def _scatter(whole: P, split: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  # Summed whole first: split at once, the gradient of a lookup would exchange the batch for
  # columns.
  return (
    jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, whole), split),
  )


_gather.defvjp(lambda x, whole, split: (_gather(x, whole, split), None), _scatter)


def _is_names(x: Any) -> bool:
  return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def _fits(axes: Any, size: int, mesh: Mesh | jax.sharding.AbstractMesh) -> Any:
  return axes if size % _count(axes, mesh) == 0 else None


def _count(axes: Any, mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Devices along an entry of a PartitionSpec: a name, several, or None."""
  return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
