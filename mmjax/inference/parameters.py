"""Shapes of the parameters of a config's model, and where they lie on a mesh; nothing is run."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mmjax.data.pipeline import batch_spec
from mmjax.models import make_model
from mmjax.parallel import rules
from mmjax.parallel.mesh import BATCH_AXES, make_mesh
from mmjax.state import adapters


def param_spec(config) -> Any:
  """Shapes and dtypes of a config's parameters: nested dict of ShapeDtypeStruct. Runs nothing."""
  return nn.unbox(_abstract(config))


def param_shardings(config, mesh: Mesh) -> Any:
  """Where each parameter lies on `mesh` by the config's `sharding`."""
  return rules.param_shardings(_abstract(config), mesh, rules.logical_rules(config))


def local_mesh(config) -> Mesh:
  """Every device of this process side by side, whatever mesh the checkpoint was trained on."""
  tree = config.to_dict()
  tree["mesh"] = {axis: -1 if axis == BATCH_AXES[-2] else 1 for axis in tree["mesh"]}
  return make_mesh(type(config)(tree), jax.local_devices())


def _abstract(config) -> Any:
  def init(batch: dict) -> Any:
    return adapters.init_variables(make_model(config), config, jax.random.key(0), batch)["params"]

  return jax.eval_shape(init, batch_spec(config, 1))
