"""`mmjax plan` from end to end: on simulated devices everywhere, with the TPU compiler where libtpu
is installed.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import mmjax.config as configs
from mmjax import plan as planning
from mmjax.config import UserError
from mmjax.contradictions import mesh_shape
from mmjax.parallel.mesh import make_mesh
from mmjax.plan import report, topology
from mmjax.plan.sweep import sweep
from mmjax.plan.topology import GIB
from mmjax.training.program import Program

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
TINY = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.data.image.size, c.data.text.length = 32, 32
  c.data.text.vocab_size, c.data.text.tokenizer = 512, "none"
  tower = dict(depth=3, heads=2)
  c.model = dict(name="dual_encoder", width=128, bias=True, encoders=dict(
    image=dict(kind="vit", patch=8, remat="dots_no_batch", **tower),
    text=dict(kind="transformer", **tower)))
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="sigmoid")
  c.train.batch_size, c.train.steps = 128, 1000
  return c
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(TINY)
  return str(path)


@pytest.fixture
def without_libtpu(monkeypatch):
  monkeypatch.setattr(topology, "has_libtpu", lambda: False)


def test_without_libtpu_memory_is_planned_on_simulated_devices(
  tiny, without_libtpu, tmp_path, monkeypatch
):
  config = configs.load(tiny, ["mesh.data=1", "mesh.fsdp=-1", "sharding=fsdp"])
  result = planning.plan(config, "v5e-4", cache=str(tmp_path))
  step = Program(config, make_mesh(config, jax.devices()[:4]), steps=1)
  assert result["model"]["parameters"] == sum(x.size for x in jax.tree.leaves(step.params_spec))
  whole = 4 * result["model"]["parameters"]
  # A quarter, and what is too small to split.
  assert whole / 4 <= result["memory"]["parameters"] < whole / 2
  assert result["memory"]["optimizer"] == pytest.approx(
    2 * result["memory"]["parameters"], rel=0.01
  )
  assert (
    result["fits"]
    and result["memory"]["peak"] > result["memory"]["parameters"] + result["memory"]["optimizer"]
  )
  assert (
    "all-gather" in result["collectives"]
    and "step" not in result
    and "without libtpu" in result["left_out"][-1]
  )
  assert result["config"]["mesh"] == {"fsdp": 4} and result["model"]["tokens_per_example"] == {
    "image": 16,
    "text": 32,
  }
  assert sum(result["model"]["flops"].values()) == pytest.approx(result["model"]["flops_per_step"])
  again = planning.plan(config, "v5e-4", cache=str(tmp_path), log=lambda line: pytest.fail(line))
  assert (
    again.pop("cached") and not result.pop("cached") and again == json.loads(json.dumps(result))
  )
  assert "fits" in report.describe({**again, "changes": []})
  (tmp_path / "file").write_text("")  # a cache that cannot be written costs the next time alone
  monkeypatch.setattr(planning, "_compile", lambda *_: dict(again))
  closed = str(tmp_path / "file" / "cache")
  assert not planning.plan(config, "v5e-4", cache=closed)["cached"]


WORDS = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.data.text.vocab_size, c.data.text.tokenizer, c.data.sequence.length = 512, "none", 64
  c.model = dict(name="language_model", width=128, depth=3, heads=2, mlp=256, encoders={},
                 tied=False, eos_id=1, pad_id=0, remat="full")
  c.objectives.words = dict(kind="language_modelling")
  c.train.batch_size, c.train.steps = 32, 1000
  return c
"""


def test_gpus_are_planned_with_an_estimate_of_time(tmp_path, monkeypatch):
  """Also where libtpu is installed. Products: 2 FLOPs a parameter and token forward, again where
  blocks are computed again, and 4 backward.
  """
  monkeypatch.setattr(topology, "has_libtpu", lambda: True)
  (tmp_path / "words.py").write_text(WORDS)
  config = configs.load(
    str(tmp_path / "words.py"), ["mesh.data=1", "mesh.fsdp=-1", "sharding=fsdp"]
  )
  result = planning.plan(config, "h100-80gb-4", cache=None, remedies=False)
  step, where = result["step"], result["topology"]
  assert (where["chip"], where["chips"], where["peak_flops"]) == ("h100-80gb", 4, 989e12)
  assert step["basis"] == "estimate" and result["compiler"] == "simulated CPU devices"
  blocks = 3 * (4 * 128 * 128 + 3 * 128 * 256)
  table, tokens = 512 * 128, 32 * 64
  attention = 3 * 4 * 64 * 128 * tokens  # two products of 64 keys a token and layer
  flops = tokens * (8 * blocks + 6 * table) + 4 * attention
  assert step["product_seconds"] == pytest.approx(flops / 4 / 989e12, rel=0.05)
  state = result["memory"]["parameters"] + result["memory"]["optimizer"]
  assert step["memory_seconds"] > 2 * state / 3350e9
  assert step["seconds"] == max(step["product_seconds"], step["memory_seconds"])
  assert step["tokens_per_second"] == pytest.approx(tokens / step["seconds"])
  assert step["collective_seconds"] == pytest.approx(
    sum(x["bytes"] * (1 + (kind == "all-reduce")) for kind, x in result["collectives"].items())
    / 450e9
  )
  assert planning.remat_of(config) == {"": "full"}
  text = report.describe({**result, "changes": []})
  assert "basis: estimate" in text and "remat: blocks full" in text


def test_a_place_where_figures_cannot_go_is_named(tiny, without_libtpu, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(report, "plan", lambda *_, **__: {})
  monkeypatch.setattr(topology, "prepare", lambda: None)  # of a process that goes on
  with pytest.raises(UserError, match="file/plan.json cannot be written: .*file is no folder"):
    report.command(str(tiny), [], "v5e-4", out=str(tmp_path / "file" / "plan.json"))


def test_the_cache_knows_configs_and_slices_apart(tiny):
  config, other = configs.load(tiny), configs.load(tiny, ["train.batch_size=256"])
  keys = {
    planning._key(c, topology.parse(name))
    for c in (config, other)
    for name in ("v5e-4", "v5e-8", "2xv5e-4")
  }
  assert len(keys) == 6
  assert planning._key(config, topology.parse("v5e-4")) == planning._key(
    configs.load(tiny, ["log.every=3"]), topology.parse("v5e-4")
  )


def test_a_mesh_that_does_not_fit_the_slice_is_refused(tiny, without_libtpu):
  with pytest.raises(UserError, match="4 devices"):
    planning.plan(configs.load(tiny, ["mesh.tensor=3"]), "v5e-4", cache=None)


@pytest.fixture
def rehearsed(monkeypatch):
  """Plans without a compiler: microbatches and remat save memory and cost time, and so do tensors
  split.
  """
  share = {
    "none": 1.0,
    "dots": 0.9,
    "dots_no_batch": 0.7,
    "dense_attention": 0.68,
    "dense": 0.65,
    "projections": 0.62,
    "attention": 0.6,
    "full": 0.4,
  }

  def compile_step(config, target, dump_hlo, log):
    policy = config.model.encoders.image.remat
    mesh = mesh_shape(config.mesh, target.device_count)
    peak = 39 * GIB * share[policy] / config.train.microbatches
    seconds = (2 - share[policy]) * config.train.microbatches * mesh["tensor"]
    unroll = config.model.encoders.image.scan_unroll
    peak, seconds = peak * (1 + unroll / 100), seconds - unroll / 10
    over = max(0, peak - target.chip.memory)
    step = dict(
      seconds=seconds,
      waiting_seconds=mesh["tensor"] / 100,
      mfu=0.5,
      cycles=1e9,
      custom_call_cycles=0,
      examples_per_second=1,
      tokens_per_second=1,
    )
    return dict(
      topology=dict(name=target.name, chip="v5e", chips=4, slices=1, memory=target.chip.memory),
      compiler="none",
      config={**planning.settings_of(config), "mesh": mesh},
      fits=not over,
      memory=dict(peak=peak, over=over),
      warnings=[],
      step=None if over else step,
    )

  monkeypatch.setattr(planning, "_compile", compile_step)


def test_what_does_not_fit_says_by_how_much_and_what_was_tried(tiny, rehearsed):
  result = planning.plan(configs.load(tiny), "v5e-4", cache=None)
  assert not result["fits"] and result["memory"]["over"] == pytest.approx(11.3 * GIB)  # 27.3 of 16
  tried = [(row["change"][0].split("=")[1], row["fits"]) for row in result["tried"]]
  assert tried == [("dots_no_batch", False), ("full", True)]
  text = report.describe(result)
  assert (
    "does not fit, by 11.30 GiB" in text
    and "over by 11.30 GiB" in text
    and "fits (15.60 GiB)" in text
  )
  larger = configs.load(tiny, ["model.encoders.image.remat=full", "model.encoders.text.remat=full"])
  assert planning.plan(larger, "v5e-4", cache=None)["fits"]


def test_a_sweep_puts_the_fastest_that_fits_first(tiny, rehearsed):
  rows = sweep(configs.load(tiny), "v5e-4", cache=None)
  fitting = [row for row in rows if row["fits"]]
  assert rows[: len(fitting)] == fitting and [r["seconds"] for r in fitting] == sorted(
    r["seconds"] for r in fitting
  )
  assert (
    fitting[0]["remat"] == {"encoders.image": "full", "encoders.text": "full"}
    and fitting[0]["microbatches"] == 1
  )
  assert {row["sharding"] for row in rows} == {"replicated", "fsdp", "fsdp_tensor"}
  # No more microbatches than fitting takes.
  assert not any(
    row["microbatches"] > 1 and row["remat"]["encoders.image"] == "full" for row in rows
  )
  # Three layers take too much memory unrolled, two do not; nothing else is unrolled.
  assert fitting[0]["scan_unroll"] == {"encoders.image": 2, "encoders.text": 2}
  unrolled = [row["fits"] for row in rows if any(row.get("scan_unroll", {}).values())]
  assert unrolled == [True, False]
  text = report.describe({**planning.plan(configs.load(tiny), "v5e-4", cache=None), "sweep": rows})
  assert "best: --config.mesh" in text


def test_the_best_of_a_sweep_is_written_as_overrides(tiny, rehearsed, tmp_path, monkeypatch):
  monkeypatch.setattr(topology, "prepare", lambda: None)
  file, out = tmp_path / "best.txt", str(tmp_path / "plan.json")
  report.command(tiny, [], "v5e-4", sweep_all=True, apply=str(file), out=out, no_cache=True)
  best = json.loads((tmp_path / "plan.json").read_text())["sweep"][0]
  config = configs.load(tiny, file.read_text().split())
  assert planning.settings_of(config)["remat"] == best["remat"]
  assert config.model.encoders.text.scan_unroll == 2
  monkeypatch.setattr(
    report, "sweep", lambda *_, **__: [dict(overrides=[], fits=False, error="no")]
  )
  with pytest.raises(UserError, match="none of the settings tried fits v5e-4"):
    report.command(tiny, [], "v5e-4", sweep_all=True, apply=str(file), out="", no_cache=True)


# -- With the TPU compiler -------------------------------------------------------------------------


def run(*arguments, cwd):
  """A command in a process of its own: libtpu is loaded once a process. Returns stdout."""
  environment = {**os.environ, "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=environment,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_a_tiny_config_is_compiled_by_the_tpu_compiler(tiny, tmp_path):
  pytest.importorskip("libtpu")
  done = run(
    "-m",
    "mmjax.cli",
    "plan",
    "--config",
    tiny,
    "--topology",
    "v5e-4",
    "--json",
    "--dump-hlo",
    "step.hlo",
    "--config.model.encoders.text.kernel=flash",
    cwd=tmp_path,
  )
  result = json.loads(done.stdout)
  assert result == json.loads((tmp_path / "plan.json").read_text())
  assert all(line.startswith("compiling") for line in done.stderr.splitlines()), done.stderr
  assert (
    result["fits"] and result["memory"]["peak"] < 2**30 and result["compiler"].startswith("libtpu")
  )
  assert 0 < result["step"]["mfu"] < 1 and result["run"]["chip_hours"] == pytest.approx(
    result["step"]["seconds"] * 1000 * 4 / 3600
  )
  # Custom calls: the sum, checked from the dumped text. Each stands in a loop over three layers.
  calls = result["custom_calls"]
  assert calls and all(call["flops"] > 0 for call in calls)
  assert sum(call["cycles_added"] for call in calls) == pytest.approx(
    result["step"]["custom_call_cycles"]
  )
  text = (tmp_path / "step.hlo").read_text()
  bodies = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
  assert sum(call["count"] for call in calls) == 3 * bodies
  # Each by its own schedule, which is no less than its products at peak.
  assert {call["basis"] for call in calls} == {"schedule"} and len(calls) >= 5
  assert all(call["cycles_each"] > call["flops"] / 197e12 * 1.5e9 for call in calls)
  assert 0 < result["step"]["waiting_seconds"] <= result["step"]["collective_seconds"]
  assert "all-reduce" in result["collectives"] and not any(
    "all-to-all" in line for line in result["warnings"]
  )
  again = run(
    "-m",
    "mmjax.cli",
    "plan",
    "--config",
    tiny,
    "--topology",
    "v5e-4",
    "--json",
    "--config.model.encoders.text.kernel=flash",
    cwd=tmp_path,
  )
  assert json.loads(again.stdout)["cached"] and not again.stderr


MATMULS = """
import jax, jax.numpy as jnp
from mmjax.plan import cost, hlo, topology
topology.prepare()
target = topology.parse("v5e-4")
place = jax.sharding.SingleDeviceSharding(topology.devices(target)[0])
spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
stack = lambda x, weights: jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, weights)[0]
with topology.quiet():
  weights = spec(4, 4096, 16384), spec(4, 16384, 4096)
  compiled = jax.jit(stack).lower(spec(8192, 4096), weights).compile()
seconds = cost.cost(hlo.parse(compiled.as_text()), target.chip)["seconds"]
print(seconds / (4 * 2 * 2 * 8192 * 4096 * 16384 / target.chip.peak))
"""


def test_a_matmul_stack_takes_its_flops_at_peak(tmp_path):
  """Four trips of a loop over two products each. (A loop over one square product also copies what
  it carries.)
  """
  pytest.importorskip("libtpu")
  assert float(run("-c", MATMULS, cwd=tmp_path).stdout) == pytest.approx(1, abs=0.1)


def test_every_stack_of_a_model_gets_a_remat_policy():
  config = configs.load(str(CONFIGS / "captioner_7b.py"))
  assert planning.remat_of(config) == {"encoders.image": "full", "decoder": "dots_no_batch"}
  assert set(
    planning.remat_of(configs.resolve(config, planning.with_remat(config, "attention"))).values()
  ) == {"attention"}


def test_every_kind_of_step_is_planned():
  config = configs.base()
  config.data.sources = dict(a=dict(weight=1.0), b=dict(weight=3.0))

  def kind(peak, seconds):
    return dict(
      memory=dict(peak=peak),
      fits=True,
      step=dict(seconds=seconds, mfu=0.5),
      run=dict(steps=8, hours=seconds),
    )

  together = planning._together(
    config, dict(zip("ab", (kind(10, 4.0), kind(20, 8.0)), strict=True))
  )
  assert (
    together["memory"]["peak"] == 20
    and together["step"]["seconds"] == 7.0
    and together["run"] == dict(steps=8, hours=7.0)
  )
  assert together["kinds"]["b"] == dict(share=0.75, peak=20, seconds=8.0)
