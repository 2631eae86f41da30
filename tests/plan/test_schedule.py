"""Cycles of kernels by their schedule: a text written by hand, and kernels of known loops compiled
by libtpu.
"""

import json
import os
import subprocess
import sys

import pytest

from mmjax.plan import schedule
from mmjax.plan.schedule import Schedule
from mmjax.plan.topology import CHIPS

V5E = CHIPS["v5e"]  # four bundles after a branch are issued before it takes effect

# Three trips of a loop of 16 bundles. In all but the last a branch jumps over 2 of them; every trip
# but the first starts a copy of 5 granules, as a word in memory says.
LOOP = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s9_s0 = inlined_call_operand.hbm [shape: f32[8,128], index: 0]  ;;  %s1_s1 = smov 0 }
   0x1   :  { %10 = sst [smem:[#allocation3_spill]] %s1_s1 }
   0x2 LB: > { %s2_s2 = sadd.s32 1, %s3_s1  ;;  %s3_s1 = sphi %s1_s1, %s4_s1 /* phi copy */ } /* Start region 7 */
   0x3   : > { %p5_p0 = scmp.lt.s32.totalorder %s2_s2, 3  ;;  %s6_s3 = sld [smem:[#allocation3_spill]] }
   0x4   : > { %p7_p1 = scmp.ne.s32.totalorder %s6_s3, 0  ;;  %11 = sbr.rel (%p5_p0) target = $region8 }
   0x5   : > { %12 = dma.hbm_to_vmem [thread:$0]  (%p7_p1), /*hbm=*/%s9_s0, /*size_in_granules=*/5, /*vmem=*/%s8_s4 /*
base_bounds: (16, 4)
iteration_bounds: (4, 2) */ }
   0x6   : > { %v1_v0 = vld [vmem:[%s8_s4 + $0x10] sm:$0xff] (%p7_p1) }
   0x7   :  {}
   0x8   :  {} /* End region 9 */
   0x9   : > { %v2_v0 = vadd.f32 %v1_v0, %v1_v0 }
   0xa   : > { %v3_v0 = vadd.f32 %v2_v0, %v2_v0 }
   0xb PF: > { %s12_s5 = scalar_select /*predicate=*/%p7_p1, /*on_true=*/%s6_s3, /*on_false=*/7 } /* Start/End empty region 8 */
   0xc   : > { %13 = sst [smem:[#allocation3_spill]] %s12_s5  ;;  %p13_p2 = scmp.ge.s32.totalorder %s2_s2, 3 /* loop exit test */ }
   0xd   :  { %14 = sbr.rel (!%p13_p2) target = $region7  ;;  %s4_s1 = smov %s2_s2 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   :  {} /* exit bundle: %scale.1 = custom-call(%x.1) */
"""


def test_loops_run_as_often_as_their_counters_say():
  # Before the loop 2 bundles, after it 1; 16 a trip, 14 where the branch jumps over 2 of them.
  assert schedule.run(LOOP, V5E) == Schedule(2 + 2 * 14 + 16 + 1, 2 * 5 * 32, 0)


def test_a_branch_on_data_is_counted_as_run_and_a_loop_on_data_not_at_all():
  loaded = "%s2_s2 = sld [smem:[%s8_s4]]  ;;  %s14_s6 = sadd.s32 1, %s3_s1  ;;  %s3_s1 ="
  branch = LOOP.replace("%s2_s2 = sadd.s32 1, %s3_s1  ;;  %s3_s1 =", loaded)
  assert schedule.run(branch, V5E) is None
  counted = branch.replace("%s2_s2, 3 /* loop", "%s14_s6, 3 /* loop")
  counted = counted.replace("smov %s2_s2", "smov %s14_s6")
  assert schedule.run(counted, V5E) == Schedule(2 + 3 * 16 + 1, 2 * 5 * 32, 3)


def test_what_is_no_schedule_or_not_whole_gives_none(tmp_path):
  assert schedule.run("", V5E) is None
  assert schedule.run(LOOP.replace("$region7", "$region6"), V5E) is None
  assert schedule.run(LOOP.replace("   0x9   :", "  0x19   :"), V5E) is None
  (tmp_path / "1-scale.1-01-final_bundles.txt").write_text(LOOP)
  (tmp_path / "2-fusion-01-final_bundles.txt").write_text(LOOP.replace("custom-call(", "fusion("))
  (tmp_path / "3-last.2-01-final_bundles.txt").write_text(LOOP[:400])
  assert list(schedule.read(tmp_path, V5E)) == ["scale.1"]


# -- With the TPU compiler -------------------------------------------------------------------------

KERNELS = """
import json, re
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from mmjax.plan import cost, hlo, schedule, topology
topology.prepare()
target = topology.parse("v5e-4")
place = jax.sharding.SingleDeviceSharding(topology.devices(target)[0])

def spin(trips):  # a loop of `trips` over one matrix product
  def body(x, out):
    def step(_, y):
      return jnp.tanh(jnp.dot(y, y, preferred_element_type=jnp.float32)).astype(y.dtype)
    out[...] = jax.lax.fori_loop(0, trips, step, x[...])
  return body

def call(x, trips, grid):
  block = pl.BlockSpec((x.shape[0] // grid, x.shape[1]), lambda i: (i, 0))
  return pl.pallas_call(
    spin(trips), grid=(grid,), in_specs=[block], out_specs=block,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="spin",
  )(x)

def step(x, many):
  x = jax.lax.scan(lambda x, _: (call(x, 40, 1), None), x, None, length=3)[0]
  return call(jnp.sin(x), 10, 1), call(many, 20, 6)

spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
with topology.quiet(), topology.schedules() as left:
  lowered = jax.jit(step).lower(spec(128, 128), spec(6 * 256, 256))
  module = hlo.parse(lowered.compile().as_text())
  schedules = schedule.read(left, target.chip)
  loops = {}
  for path in left.glob("*-spin*final_bundles.txt"):
    if "analysis" not in path.name:
      text = path.read_text()
      starts = [int(n, 16) for n in re.findall(r"(?m)^ *(\\w+) LB:", text)]
      ends = [int(n, 16) for n in re.findall(r"(?m)^ *(\\w+) .*sbr.rel \\(!.*target", text)]
      name = re.search(r"exit bundle: %(\\S+)", text)[1]
      loops[name] = (max(starts), min(n for n in ends if n > max(starts)))
rows = cost.cost(module, target.chip, schedules=schedules)["custom_calls"]
operations = {op.name: op.type for ops in module.computations.values() for op in ops}
print(json.dumps([rows, loops, {n: operations[n] for n in loops}, len(list(left.iterdir()))]))
"""


def test_kernels_of_known_loops_take_their_bundles_times_their_trips(tmp_path):
  """One kernel's name at three lengths, two of them of one shape: trips of its loop, the grid and
  the step's own loop, times the bundles of the loop's body that the compiler's text gives.
  """
  pytest.importorskip("libtpu")
  done = subprocess.run(
    [sys.executable, "-c", KERNELS],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)},
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  rows, loops, types, left = json.loads(done.stdout)
  assert len(rows) == len(loops) == 3 and {row["basis"] for row in rows} == {"schedule"}
  body = {name: end + 1 + V5E.delay_slots - start for name, (start, end) in loops.items()}
  (large,) = [n for name, n in body.items() if "1536,256" in types[name]]
  small = {n for name, n in body.items() if "1536,256" not in types[name]}
  assert len(small) == 1  # the same product in both
  want = sorted([(3, 40 * small.copy().pop()), (1, 10 * small.pop()), (1, 6 * 20 * large)])
  found = sorted((row["count"], row["cycles_each"]) for row in rows)
  assert [count for count, _ in found] == [count for count, _ in want]
  assert [n for _, n in found] == pytest.approx([n for _, n in want], rel=0.1)
  assert not left and not list(tmp_path.iterdir())  # nothing stays behind
