"""Checkpoints: round trips onto other meshes, policies, strictness, damage, kills, full disks,
several processes.
"""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.state import checkpoint as checkpoint_lib
from mmjax.state import manifest
from mmjax.state.checkpoint import (
  find_checkpoint,
  load_assets,
  load_config,
  load_params,
  names_and_shapes,
  save_import,
)
from mmjax.state.checkpointer import Checkpointer, kept

ASSETS = {"tokenizer.model": bytes(range(256)), "preprocessing.json": b"{}"}


@pytest.fixture
def open_run(tmp_path, make_config):
  """open_run(every=..., ...) -> Checkpointer of the run in tmp_path; closed at the end."""
  opened = []

  def make(folder=tmp_path, **options):
    checkpointer = Checkpointer(str(folder), make_config(checkpoint=dict(options)), steps=100)
    opened.append(checkpointer)
    return checkpointer

  yield make
  for checkpointer in opened:
    checkpointer.close()


def steps_in(folder):
  return sorted(int(name) for name in os.listdir(folder / "checkpoints") if name.isdigit())


def test_round_trip_onto_smaller_meshes(tmp_path, open_run, make_state, spec_on, same):
  state = make_state(7, devices=8, ema=True)
  run = open_run(every=1)
  for devices in (4, 1, 8):
    step = run.latest_step() or 0
    assert run.save(
      step + 1, state, data={"seed": 3, "sources": ["a"]}, config={"x": 1}, assets=ASSETS
    )
    restored, data, found = run.restore(spec_on(devices, ema=True))
    assert (data, found) == ({"seed": 3, "sources": ["a"]}, step + 1)
    same(restored, state)
    for leaf in jax.tree.leaves(restored):
      assert len(leaf.sharding.device_set) == devices
    state = restored
  assert load_assets(str(tmp_path)) == ASSETS


def test_nothing_to_restore(open_run, spec_on):
  assert open_run().restore(spec_on(1)) is None


def test_a_state_may_be_donated_as_soon_as_save_returns(open_run, make_state, spec_on, same):
  run = open_run(every=1)
  state, expected = make_state(3), make_state(3)
  spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  spoil(make_state(4))
  run.save(1, state)
  spoil(state)
  same(run.restore(spec_on(8))[0], expected)


def test_policies(tmp_path, open_run, make_state, monkeypatch):
  run = open_run(every=2, keep=2, keep_every=6, best="val/R@1")
  state = make_state(1)
  scores = {4: 0.9, 6: float("nan"), 8: 0.5, 9: 0.95}
  saved = []
  for step in range(1, 13):
    saved += [step] if run.save(step, state) else []
    if step in scores:
      saved += [step] if run.save(step, state, metrics={"val/R@1": scores[step]}) else []
  run.close()
  assert saved == [2, 4, 6, 8, 9, 10, 12]  # 9 is between two saves, but the best so far
  assert steps_in(tmp_path) == [6, 9, 10, 12]
  assert not run.save(12, state, force=True)  # is saved already
  assert run.save(13, state, force=True)
  run.close()
  clocked = open_run(every=0, minutes=1.0)
  now = time.monotonic()
  assert not clocked.save(20, state)
  monkeypatch.setattr(time, "monotonic", lambda: now + 61)
  assert clocked.save(21, state) and not clocked.save(22, state)


@settings(deadline=None, max_examples=50)
@given(
  st.sets(st.integers(0, 60), max_size=20),
  st.dictionaries(st.integers(0, 60), st.floats(0, 1), max_size=9),
  st.integers(0, 4),
  st.integers(0, 7),
)
def test_what_is_kept(steps, metrics, keep, keep_every):
  chosen = kept(list(steps), metrics, keep=keep, keep_every=keep_every, mode="max")
  assert chosen <= steps and set(sorted(steps)[-max(1, keep) :]) <= chosen
  assert all(step in chosen for step in steps if keep_every and step % keep_every == 0)
  known = {step: metrics[step] for step in steps if step in metrics}
  assert not known or max(known.values()) in [metrics[s] for s in chosen if s in metrics]


def test_a_checkpoint_of_another_model_is_refused(open_run, make_state, spec_on):
  run = open_run(every=1)
  run.save(1, make_state(1))
  spec = spec_on(1)
  other = {
    "image/other is missing": {
      **spec.params,
      "image": {**spec.params["image"], "other": spec.params["scale"]},
    },
    "scale is not in this model": {"image": spec.params["image"]},
    r"scale is float32\[\], here float32\[2\]": {
      **spec.params,
      "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
    },
    r"scale is float32\[\], here bfloat16\[\]": {
      **spec.params,
      "scale": jax.ShapeDtypeStruct((), jnp.bfloat16),
    },
  }
  for message, params in other.items():
    with pytest.raises(UserError, match=f"checkpoint of another model: {message}") as error:
      run.restore(spec.replace(params=params))
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="opt_states/main/1/count is not in this model"):
    run.restore(spec.replace(opt_states={"main": (spec.opt_states["main"][0], {})}))


def damage(path, how):
  content = path.read_bytes()
  if how == "delete":
    path.unlink()
  elif how == "truncate":
    path.write_bytes(content[: len(content) // 2])
  else:
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["truncate", "garble", "delete"])
def test_damage_to_any_file_is_named_and_the_one_before_used(
  tmp_path, open_run, make_state, spec_on, same, caplog, how
):
  run = open_run(every=1)
  states = {step: make_state(step) for step in (1, 2)}
  for step, state in states.items():
    run.save(step, state, assets=ASSETS)
  run.close()
  folder, copy = tmp_path / "checkpoints" / "2", tmp_path / "copy"
  shutil.copytree(folder, copy)
  names = [
    path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.parent != copy
  ]
  assert len(names) > 15
  spec = spec_on(1)
  for name in [*names, "manifest.json"]:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    damage(folder / name, how)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mmjax"):
      restored, _, step = open_run(every=1).restore(spec)
    assert step == 1, name
    same(restored, states[1])
    assert [
      str(folder) in r.getMessage() and "\n" not in r.getMessage() for r in caplog.records
    ] == [True], name


def test_a_flipped_bit_in_a_large_file_is_noticed(
  tmp_path, open_run, make_state, spec_on, monkeypatch, caplog
):
  monkeypatch.setattr(manifest, "SMALL", 1000)
  run = open_run(every=1)
  run.save(1, make_state(1))
  run.save(2, make_state(2))
  run.close()
  largest = max((tmp_path / "checkpoints/2/params").rglob("d/*"), key=os.path.getsize)
  assert os.path.getsize(largest) > 1000
  damage(largest, "garble")
  assert open_run().restore(spec_on(1))[2] == 1
  assert "its checksum differs" in caplog.text


def test_the_run_goes_on_over_a_corrupt_checkpoint(tmp_path, open_run, make_state, spec_on, same):
  run = open_run(every=1)
  run.save(1, make_state(1))
  run.save(2, make_state(2))
  run.close()
  damage(tmp_path / "checkpoints/2/params/_METADATA", "delete")
  again = open_run(every=1)
  assert again.restore(spec_on(8))[2] == 1
  assert again.save(2, make_state(22))
  restored, _, step = again.restore(spec_on(8))
  assert step == 2
  same(restored, make_state(22))


@pytest.mark.parametrize("name", ["²", "٣", "0009", "9" * 30, "9 ", "file", "pipe", "loop"])
def test_what_is_not_called_as_steps_are_or_is_no_folder_is_no_step(
  name, tmp_path, open_run, make_state, spec_on, in_time
):
  run = open_run(tmp_path / "run", every=1)
  run.save(1, make_state(1))
  run.close()
  place = tmp_path / "run" / "checkpoints" / ("9" if name in ("file", "pipe", "loop") else name)
  make = dict(file=place.touch, pipe=lambda: os.mkfifo(place), loop=lambda: place.symlink_to("9"))
  make.get(name, place.mkdir)()
  again = open_run(tmp_path / "run", every=1)
  assert again.restore(spec_on(8))[2] == 1
  assert checkpoint_lib.find_checkpoint(tmp_path / "run").name == "1"
  assert again.save(2, make_state(2))
  again.close()
  assert os.path.lexists(place)


def test_half_written_ones_are_named_and_removed(tmp_path, open_run, make_state, spec_on, caplog):
  run = open_run(every=1)
  run.save(1, make_state(1))
  run.close()
  shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints/2.orbax-checkpoint-tmp")
  again = open_run(every=1)
  assert again.restore(spec_on(8))[2] == 1
  assert [
    r.getMessage()
    for r in caplog.records
    if "2.orbax-checkpoint-tmp is half-written" in r.getMessage()
  ]
  again.save(3, make_state(3))
  again.wait()
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]


def test_no_usable_checkpoint_is_an_error_and_not_a_new_start(
  tmp_path, open_run, make_state, spec_on
):
  run = open_run(every=1)
  run.save(1, make_state(1))
  run.close()
  damage(tmp_path / "checkpoints/1/manifest.json", "delete")
  with pytest.raises(UserError, match="no usable checkpoint"):
    open_run().restore(spec_on(1))
  with pytest.raises(UserError, match="never finished"):
    load_params(str(tmp_path))


def test_reading_without_the_run(
  tmp_path, open_run, make_state, spec_on, same, caplog, make_config
):
  run = open_run(every=1, keep=5)
  states = {step: make_state(step, ema=step == 3) for step in (1, 2, 3)}
  for step, state in states.items():
    run.save(step, state, config=make_config(), assets=ASSETS)
  run.close()

  def host(tree):
    return jax.tree.map(np.asarray, tree)

  same(load_params(str(tmp_path)), host(states[3].ema))
  same(load_params(str(tmp_path), average=False), host(states[3].params))
  same(load_params(str(tmp_path), spec_on(4).params), states[3].ema)
  same(load_params(str(tmp_path / "checkpoints" / "2")), host(states[2].params))
  assert load_assets(str(tmp_path / "checkpoints")) == ASSETS
  assert names_and_shapes(str(tmp_path))["image/position"].shape == (17, 8)
  assert find_checkpoint(str(tmp_path)).name == "3"
  checkpoint_lib._intact.clear()
  damage(next((tmp_path / "checkpoints/3/rest").rglob("d/*")), "garble")
  assert find_checkpoint(str(tmp_path)).name == "2"
  assert "trying the one before" in caplog.text
  with pytest.raises(UserError, match="corrupt"):
    load_params(str(tmp_path / "checkpoints" / "3"))
  with pytest.raises(UserError, match="no checkpoint here"):
    find_checkpoint(str(tmp_path / "nothing"))


def test_import_folders(tmp_path, same):
  params = {
    "text": {
      "embedding": np.arange(12, dtype=np.float32).reshape(3, 4),
      "half": jnp.ones((2,), jnp.bfloat16),
    }
  }
  folder = tmp_path / "clip"
  save_import(str(folder), params, {"seed": 5}, ASSETS)
  same(load_params(str(folder)), jax.tree.map(np.asarray, params))
  assert load_assets(str(folder)) == ASSETS
  assert json.loads((folder / "config/metadata").read_text()) == {"seed": 5}
  assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["assets", "config", "params"]
  with pytest.raises(UserError, match="not empty"):
    save_import(str(folder), params, {}, {})
  same(load_params(str(folder)), jax.tree.map(np.asarray, params))


LEAVES = st.builds(
  lambda shape, dtype, seed: np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype),
  st.lists(st.integers(1, 4), max_size=3).map(tuple),
  st.sampled_from([np.float32, np.int32, jnp.bfloat16, np.uint8]),
  st.integers(0, 99),
)


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(
  st.dictionaries(
    st.text("ab_0", min_size=1, max_size=3),
    st.one_of(
      LEAVES, st.dictionaries(st.text("xy", min_size=1, max_size=2), LEAVES, min_size=1, max_size=2)
    ),
    min_size=1,
    max_size=4,
  )
)
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory, same, tree):
  folder = tmp_path_factory.mktemp("any") / "import"
  save_import(str(folder), tree, {}, {})
  same(load_params(str(folder)), tree)


def test_the_config_comes_back(tmp_path):
  from mmjax import config as config_lib

  c = config_lib.base()
  c.model = dict(name="dual_encoder", encoders={})
  config = config_lib.resolve(c)
  save_import(str(tmp_path / "a"), {"w": np.zeros(2)}, config, {})
  assert load_config(str(tmp_path / "a")) == config


def test_a_full_disk_loses_nothing(tmp_path, open_run, make_state, spec_on, same):
  run = open_run(every=1)
  run.save(1, make_state(1))
  run.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # every longer file fails to be written
  try:
    with pytest.raises(
      UserError, match="cannot save checkpoint .*/2: .*; checkpoint 1 is intact"
    ) as error:
      run.save(2, make_state(2))
      run.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "\n" not in str(error.value)
  assert os.listdir(tmp_path / "checkpoints") == ["1"]
  same(run.restore(spec_on(8))[0], make_state(1))
  run.save(2, make_state(2))
  same(run.restore(spec_on(8))[0], make_state(2))


def test_checkpoints_deleted_under_the_run_are_named_and_the_next_save_is_whole(
  tmp_path, open_run, make_state, spec_on, same, caplog
):
  run = open_run(every=1)
  for step in (1, 2):
    run.save(step, make_state(step))
  run.wait()
  shutil.rmtree(tmp_path / "checkpoints")
  run.save(3, make_state(3))
  run.wait()
  assert "checkpoints 1, 2 are no longer there" in caplog.text
  state, _, step = run.restore(spec_on(8))
  assert step == 3 and run.restore(spec_on(8), only=2) is None
  same(state, make_state(3))


def test_a_protected_checkpoint_stays(tmp_path, open_run, make_state):
  run = open_run(every=1, keep=1)
  for step in (1, 2, 3):
    run.protected = min(step, 2)
    run.save(step, make_state(step))
  run.close()
  assert steps_in(tmp_path) == [2, 3]


def test_an_unwritable_folder(tmp_path, open_run):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write checkpoints to .*file/run"):
    open_run(tmp_path / "file" / "run")


PREAMBLE = """
  import sys, jax, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from mmjax import config as config_lib
  from mmjax.state.checkpointer import Checkpointer
  from mmjax.state.train_state import TrainState
  def state_of(value, mesh):
    def put(x, *axes):
      return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*axes)), lambda i: x[i])
    params = {}
    for i in range(4):
      weights = np.random.default_rng([value, i]).normal(size=(16, 4096))
      params[f"w{i}"] = put(weights.astype(np.float32), "data")
    step = put(np.asarray(value, np.int32))
    return TrainState(step=step, params=params, model_state={}, opt_states={})
  raw = config_lib.base().to_dict()
  raw["checkpoint"].update(every=1)
  config = config_lib.FrozenConfigDict(raw)
"""
LOOP = (
  PREAMBLE
  + """
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  run = Checkpointer(sys.argv[1], config, steps=100000)
  start = run.latest_step() or 0
  for step in range(start + 1, 100000):
    run.save(step, state_of(step, mesh))
    print(step, flush=True)
"""
)
PROCESSES = (
  PREAMBLE
  + """
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  run = Checkpointer(sys.argv[1], config, steps=100)
  for step in (1, 2, 3):
    run.save(step, state_of(step, mesh), metrics={"a": step})
  run.wait()
  if jax.process_index() == 0:
    path = next((run._root / "3" / "params").glob("ocdbt.process_1/d/*"))
    path.write_bytes(path.read_bytes()[:-1])
  def spec_of(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  spec = jax.tree.map(spec_of, state_of(0, mesh))
  state, data, step = run.restore(spec)
  expected = state_of(2, mesh)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
      np.testing.assert_array_equal(x.data, y.data)
  run.close()
  print("found", step, flush=True)
"""
)


def python(code, *arguments, **options):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
    **options,
  )


def test_kill_9_while_saving(tmp_path, open_run):
  """Three times: a run that saves without pause is killed; the newest checkpoint is whole and has
  its step's values.
  """
  rng, last = np.random.default_rng(0), 0
  for _ in range(3):
    process = python(LOOP, tmp_path, start_new_session=True)
    begun = [int(process.stdout.readline()) for _ in range(3)]
    time.sleep(rng.uniform(0.05, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    begun += [int(line) for line in process.stdout.read().split()]
    process.wait()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    names = {}
    exec(textwrap.dedent(PREAMBLE), names)

    def expected(step, names=names, mesh=mesh):
      return names["state_of"](step, mesh)

    spec = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected(0)
    )
    state, _, step = open_run().restore(spec)
    assert begun[0] == last + 1 and max(begun) - 1 <= step <= max(begun) + 1
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected(step)), strict=True):
      np.testing.assert_array_equal(a, b)
    last = step


def test_two_processes_save_and_agree_on_what_is_usable(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  processes = [python(PROCESSES, tmp_path, address, index) for index in range(2)]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert all("found 2" in output for output in outputs)
  assert steps_in(tmp_path) == [2, 3]
