"""Rows of a batch to devices and back, and real processes that agree with one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.config import UserError
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]


def mesh_of(**sizes):
  c = configs.base()
  c.mesh.update(sizes)
  return make_mesh(c)


def test_rows_go_to_the_device_and_back(devices):
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  batch = dict(
    image=dict(pixels=np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)),
    valid=np.arange(8) % 2 == 0,
    id=list("abcdefgh"),
    label=np.arange(8, dtype=np.int32),
  )
  placed = multihost.to_device(batch, mesh)
  assert set(placed) == {"image", "valid", "label"} and placed["image"]["pixels"].dtype == np.uint8
  assert {s.data.shape[0] for s in placed["label"].addressable_shards} == {2}
  back = multihost.gather_rows(placed)
  np.testing.assert_array_equal(back["image"]["pixels"], batch["image"]["pixels"])
  np.testing.assert_array_equal(back["label"], batch["label"])


def test_one_process_loads_every_row(devices):
  np.testing.assert_array_equal(multihost.local_rows(mesh_of(data=4, tensor=2), 12), np.arange(12))
  with pytest.raises(UserError, match="does not divide over the 8 devices"):
    multihost.local_rows(mesh_of(data=8), 12)


def test_flags_of_one_process():
  assert multihost.is_main() and multihost.any_process(True) and not multihost.any_process(False)


@pytest.mark.parametrize(
  "variables, message",
  [
    (dict(MMJAX_COORDINATOR="localhost:1"), "MMJAX_PROCESSES, MMJAX_PROCESS_ID not set"),
    (
      dict(MMJAX_COORDINATOR="localhost:1", MMJAX_PROCESSES="two", MMJAX_PROCESS_ID="0"),
      "MMJAX_PROCESSES is 'two'",
    ),
    (
      dict(MMJAX_COORDINATOR="localhost:1", MMJAX_PROCESSES="2", MMJAX_PROCESS_ID="2"),
      "ids run from 0 to 1",
    ),
  ],
)
def test_wrong_variables_are_named(monkeypatch, variables, message):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=message):
    multihost.initialize()


def test_auto_leaves_the_rest_to_jax_and_sets_the_bound_on_silence(monkeypatch):
  calls, before = [], jax.config.jax_cpu_collectives_implementation
  monkeypatch.setenv("MMJAX_COORDINATOR", "auto")
  monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
  try:
    multihost.initialize()
    monkeypatch.setenv("MMJAX_HEARTBEAT_SECONDS", "soon")
    with pytest.raises(UserError, match="MMJAX_HEARTBEAT_SECONDS is 'soon'"):
      multihost.initialize()
  finally:
    jax.config.update("jax_cpu_collectives_implementation", before)
  assert calls == [dict(heartbeat_timeout_seconds=60)]


def test_several_processes_keep_compiled_programs_where_all_see_them(monkeypatch):
  before, joined = jax.config.jax_compilation_cache_dir, []
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(joined))
  monkeypatch.setattr(multihost, "_join", lambda **settings: joined.append(settings))
  try:
    multihost.initialize(shared="/runs/a")
    assert jax.config.jax_compilation_cache_dir == before  # as JAX_COMPILATION_CACHE_DIR says
    jax.config.update("jax_compilation_cache_dir", None)
    multihost.initialize(shared="/runs/a")
    assert jax.config.jax_compilation_cache_dir == os.path.expanduser("~/.cache/mmjax/compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("MMJAX_COORDINATOR", "auto")
    multihost.initialize(shared="gs://bucket/runs/a")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/runs/a/compiled"
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


WORKER = """
import json, sys
sys.path.insert(0, {tests!r})
from mmjax.parallel import multihost
multihost.initialize()
import jax, numpy as np
from test_multihost import mesh_of, one_step
assert jax.process_count() == 2 and jax.device_count() == 4, jax.devices()
mesh = mesh_of(data=2, fsdp=2)
rows = multihost.local_rows(mesh, 16)
values = one_step(mesh, rows)
values["rows"] = rows.tolist()
values["shared_rows"] = multihost.local_rows(mesh_of(tensor=4), 8).tolist()
values["any"] = [multihost.any_process(jax.process_index() == 1), multihost.any_process(False)]
multihost.barrier("end")
print("RESULT" + json.dumps(values))
"""


def one_step(mesh, rows):
  """Loss, gradient and gathered rows of a contrastive objective whose embeddings come from pixels
  of these rows.
  """
  from mmjax.objectives.contrastive import contrastive
  from mmjax.parallel.rules import replicated

  rng = np.random.default_rng(0)
  pixels, tokens = (
    rng.integers(0, 256, (16, 12)).astype(np.uint8),
    rng.normal(size=(16, 8)).astype(np.float32),
  )
  batch = dict(
    image=dict(pixels=pixels),
    text=dict(values=tokens, key=(rng.integers(0, 6, (16, 1)) * [1, 0]).astype(np.uint32)),
  )
  weights = jax.device_put(rng.normal(size=(12, 8)).astype(np.float32), replicated(mesh))
  placed = multihost.to_device(jax.tree.map(lambda x: x[rows], batch), mesh)

  def loss(weights, batch):
    def unit(x):
      return x / jax.numpy.linalg.norm(x, axis=1, keepdims=True)

    outputs = dict(
      image=lambda: unit(batch["image"]["pixels"] / 255.0 @ weights),
      text=lambda: unit(batch["text"]["values"]),
    )

    def forward(method, *args):
      return outputs[args[0]]() if args else (5.0, 0.0)

    total, weight = contrastive(forward, batch, None, chunk=2)["loss"]
    return total / weight

  with jax.set_mesh(mesh):
    value, slope = jax.jit(jax.value_and_grad(loss), out_shardings=replicated(mesh))(
      weights, placed
    )
  back = multihost.gather_rows(placed["image"]["pixels"])
  return dict(
    loss=float(value), slope=np.asarray(slope).tolist(), same=bool((back == pixels).all())
  )


def test_two_processes_equal_one(devices, tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  script = tmp_path / "worker.py"
  script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
  environment = dict(
    os.environ,
    PYTHONPATH=str(ROOT),
    JAX_PLATFORMS="cpu",
    MMJAX_COORDINATOR=f"localhost:{port}",
    MMJAX_PROCESSES="2",
    MMJAX_CPU_DEVICES="2",
  )
  workers = [
    subprocess.Popen(
      [sys.executable, str(script)],
      env=dict(environment, MMJAX_PROCESS_ID=str(i)),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [w.communicate(timeout=240) for w in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert all(w.returncode == 0 for w in workers), [e[-2000:] for _, e in outputs]
  results = [
    json.loads(next(line for line in out.splitlines() if line.startswith("RESULT"))[6:])
    for out, _ in outputs
  ]
  want = one_step(mesh_of(data=2, fsdp=2, tensor=2), np.arange(16))
  assert want["same"]
  for number, got in enumerate(results):
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)
    np.testing.assert_allclose(got["slope"], want["slope"], rtol=1e-4, atol=1e-7)
    assert got["same"] and got["any"] == [True, False]
    assert got["rows"] == list(range(8 * number, 8 * number + 8)) and got["shared_rows"] == list(
      range(8)
    )


def test_a_cache_of_programs_that_cannot_be_written_is_said_once(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  enabled = jax.config.jax_enable_compilation_cache
  try:
    multihost._check_cache(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir() and not caplog.text
    for _ in range(2):
      multihost._check_cache(str(tmp_path / "file" / "cache"))
    assert caplog.text.count("compiled programs are not kept") == 1
    assert "JAX_COMPILATION_CACHE_DIR" in caplog.text
    assert not jax.config.jax_enable_compilation_cache
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
