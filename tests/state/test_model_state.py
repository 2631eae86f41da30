"""What a model keeps besides parameters, in import folders and in the checkpoints of runs."""

import jax
import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.state.checkpoint import load_model_state, load_params, save_import
from mmjax.state.checkpointer import Checkpointer

STATE = {"batch_stats": {"image": {"norm": {"mean": np.arange(4, dtype=np.float32)}}}}


def test_model_state_of_import_folders_and_runs(make_state, make_config, same, tmp_path):
  state, config = make_state(1, devices=1), make_config()
  save_import(str(tmp_path / "with"), state.params, config, {}, STATE)
  save_import(str(tmp_path / "without"), state.params, config, {})
  same(load_model_state(str(tmp_path / "with")), STATE)
  same(load_params(str(tmp_path / "with")), jax.device_get(state.params))
  assert (
    load_model_state(str(tmp_path / "without")) == {}
    and not (tmp_path / "without" / "model_state").exists()
  )

  for name, kept in (("with_run", STATE), ("without_run", {})):
    run = Checkpointer(str(tmp_path / name), config, steps=10)
    run.save(1, state.replace(model_state=kept), config=config, force=True)
    run.close()
    same(load_model_state(str(tmp_path / name)), kept)
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5,), x.dtype), STATE)
  with pytest.raises(UserError, match="another model"):
    load_model_state(str(tmp_path / "with"), spec)


def test_a_scale_above_its_limit_is_read_as_the_limit(tmp_path):
  """Older runs stored what they clipped where it is used; what is exported is what is used."""
  params = {"log_scale": np.float32(6.49), "image": {"bias": np.ones(2, np.float32)}}
  save_import(str(tmp_path / "old"), params, {"model": {"scale_max": 100.0}}, {})
  save_import(str(tmp_path / "free"), params, {"model": {"scale_max": 1e4}}, {})
  assert np.exp(load_params(str(tmp_path / "old"))["log_scale"]) == pytest.approx(100, rel=1e-6)
  assert load_params(str(tmp_path / "free"))["log_scale"] == np.float32(6.49)
