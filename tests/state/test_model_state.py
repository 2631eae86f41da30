"""What a model keeps besides parameters, in import folders and in the checkpoints of runs."""

import jax
import numpy as np
import pytest

from mmjax.config import UserError
from mmjax.state.checkpoint import Checkpointer, load_model_state, load_params, save_import

STATE = {"batch_stats": {"image": {"norm": {"mean": np.arange(4, dtype=np.float32)}}}}


def test_model_state_of_import_folders_and_runs(make_state, make_config, same, tmp_path):
  state, config = make_state(1, devices=1), make_config()
  save_import(str(tmp_path / "with"), state.params, config, {}, STATE)
  save_import(str(tmp_path / "without"), state.params, config, {})
  same(load_model_state(str(tmp_path / "with")), STATE)
  same(load_params(str(tmp_path / "with")), jax.device_get(state.params))
  assert load_model_state(str(tmp_path / "without")) == {} and not (tmp_path / "without" / "model_state").exists()

  for name, kept in (("with_run", STATE), ("without_run", {})):
    run = Checkpointer(str(tmp_path / name), config, steps=10)
    run.save(1, state.replace(model_state=kept), config=config, force=True)
    run.close()
    same(load_model_state(str(tmp_path / name)), kept)
  spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5,), x.dtype), STATE)
  with pytest.raises(UserError, match="another model"):
    load_model_state(str(tmp_path / "with"), spec)
