"""Reading compiled text: small programs written by hand, with sums done by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mmjax.plan import cost, estimate, hlo, kernels, memory, schedule
from mmjax.plan.topology import CHIPS, GIB

V5E = CHIPS["v5e"]
CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}","iteration_bounds":["1"]}}}}'


def cycles(count):
  return CYCLES.format(count)


NESTED = f"""
HloModule jit_update, is_scheduled=true, entry_computation_layout={{(f32[8,128]{{1,0:T(8,128)}})->f32[8,128]{{1,0:T(8,128)}}}}

FileNames
1 "step.py"

%fused_computation.1 (param_0.1: f32[8,128]) -> f32[8,128] {{
  %param_0.1 = f32[8,128]{{1,0:T(8,128)S(1)}} parameter(0)
  ROOT %tanh.1 = f32[8,128]{{1,0:T(8,128)}} tanh(%param_0.1), {cycles(999)}
}}

%inner_body (arg.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %arg.1 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %get-tuple-element.1 = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  %get-tuple-element.2 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%arg.1), index=1
  %fusion.1 = f32[8,128]{{1,0:T(8,128)}} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused_computation.1, metadata={{op_name="jit(update)/layers/mlp/tanh"}}, {cycles(100)}
  ROOT %tuple.1 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%get-tuple-element.1, /*index=1*/%fusion.1)
}}

%inner_condition (arg.2: (s32[], f32[8,128])) -> pred[] {{
  %arg.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %get-tuple-element.3 = s32[]{{:T(128)}} get-tuple-element(%arg.2), index=0
  %constant.3 = s32[]{{:T(128)}} constant(12)
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%get-tuple-element.3, %constant.3), direction=LT
}}

%outer_body (arg.3: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %arg.3 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %get-tuple-element.4 = s32[]{{:T(128)}} get-tuple-element(%arg.3), index=0
  %get-tuple-element.5 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%arg.3), index=1
  %constant.4 = s32[]{{:T(128)}} constant(2)
  %tuple.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%constant.4, %get-tuple-element.5)
  %while.1 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) while(%tuple.2), condition=%inner_condition, body=%inner_body
  %get-tuple-element.6 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%while.1), index=1
  %all-reduce.1 = f32[8,128]{{1,0:T(8,128)}} all-reduce(%get-tuple-element.6), channel_id=1, replica_groups={{{{0,1}}}}, to_apply=%add, {cycles(7)}
  ROOT %tuple.3 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%get-tuple-element.4, %all-reduce.1)
}}

%outer_condition (arg.4: (s32[], f32[8,128])) -> pred[] {{
  %arg.4 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %get-tuple-element.7 = s32[]{{:T(128)}} get-tuple-element(%arg.4), index=0
  %constant.5 = s32[]{{:T(128)}} constant(99)
  ROOT %lt.2 = pred[]{{:T(512)}} compare(%get-tuple-element.7, %constant.5), direction=LT
}}

%cheap (arg.5: f32[8,128]) -> f32[8,128] {{
  ROOT %arg.5 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
}}

%dear (arg.6: f32[8,128]) -> f32[8,128] {{
  %arg.6 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %copy.1 = f32[8,128]{{1,0:T(8,128)}} copy(%arg.6), {cycles(5000)}
}}

ENTRY %main.1 (x.1: f32[8,128], p.1: pred[]) -> f32[8,128] {{
  %x.1 = f32[8,128]{{1,0:T(8,128)}} parameter(0), metadata={{op_name="x (a tensor)"}}
  %p.1 = pred[]{{:T(512)}} parameter(1)
  %constant.6 = s32[]{{:T(128)}} constant(0)
  %tuple.4 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) tuple(%constant.6, %x.1)
  %while.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) while(%tuple.4), condition=%outer_condition, body=%outer_body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %get-tuple-element.8 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%while.2), index=1
  %conditional.1 = f32[8,128]{{1,0:T(8,128)}} conditional(%p.1, %get-tuple-element.8, %get-tuple-element.8), branch_computations={{%cheap, %dear}}
  %custom-call.1 = bf16[8,128]{{1,0:T(8,128)(2,1)}} custom-call(%conditional.1), custom_call_target="tpu_custom_call", metadata={{op_name="jit(update)/scale"}}, backend_config={{"custom_call_config":{{"body":"QUJD"}}}}
  %custom-call.2 = f32[64]{{0:T(128)}} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %convert.1 = f32[8,128]{{1,0:T(8,128)}} convert(%custom-call.1), {cycles(11)}
}}
"""


def test_what_a_kernel_says_of_itself_in_lines_of_its_own_ends_no_computation():
  """As splash attention does: the lines after the first begin without spaces, one by brackets."""
  attribute = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block\\": 512}"\n}}'
  line = "branch_computations={%cheap, %dear}"
  text = NESTED.replace(line, f"{line}, {attribute}, metadata={{}}")
  assert "\n}}, metadata" in text
  spent, want = (cost.cost(hlo.parse(one), V5E) for one in (text, NESTED))
  assert spent == want and len(spent["custom_calls"]) == 1


def test_loops_are_multiplied_out_and_fusions_counted_once():
  spent = cost.cost(hlo.parse(NESTED), V5E)
  # 3 trips of (10 trips, from 2 to 12, of 100, and 7), the dearer branch, the last conversion.
  assert spent["compiler_cycles"] == 3 * (10 * 100 + 7) + 5000 + 11
  assert spent["unknown_loops"] == 0
  assert spent["largest"][0]["cycles"] == 5000 and spent["largest"][1] == dict(
    operation="fusion.1",
    source="jit(update)/layers/mlp/tanh",
    type="f32[8,128]",
    count=30,
    cycles=3000,
  )


def test_a_kernel_without_an_estimate_costs_what_it_moves():
  (call,) = cost.cost(hlo.parse(NESTED), V5E)["custom_calls"]
  moved = 8 * 128 * (4 + 2)
  assert call["bytes"] == moved and call["count"] == 1 and "unknown" in call["work"]
  assert call["cycles_added"] == pytest.approx(moved / 819e9 * 1.5e9)
  assert call["basis"] == "estimate"


def test_a_kernel_with_a_schedule_costs_its_bundles_or_its_copies():
  calls = NESTED.replace(
    "  %custom-call.2 =",
    "  %custom-call.3 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%conditional.1), "
    'custom_call_target="tpu_custom_call", metadata={op_name="jit(update)/another"}, '
    'backend_config={"custom_call_config":{"body":"QUJD"}}\n'
    "  %custom-call.4 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%conditional.1), "
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"WFla"}}\n'
    "  %custom-call.2 =",
  )
  left = {
    "custom-call.1": schedule.Schedule(cycles=1234, bytes=0, assumed=0),
    "custom-call.4": schedule.Schedule(cycles=10, bytes=8190, assumed=1),
  }
  rows = cost.cost(hlo.parse(calls), V5E, schedules=left)["custom_calls"]
  # The third is the first again, compiled once; the fourth waits for 8,190 bytes at 819 GB/s.
  assert [(row["count"], row["basis"], row["assumed_branches"]) for row in rows] == [
    (2, "schedule", 0),
    (1, "schedule", 1),
  ]
  assert [row["cycles_each"] for row in rows] == pytest.approx([1234, 15])


def test_a_kernel_of_the_traced_step_costs_its_flops():
  known = kernels.Kernel(
    "scale", (("f32", (8, 128)),), (("bf16", (8, 128)),), flops=1e9, bytes=10.0
  )
  spent = cost.cost(hlo.parse(NESTED), V5E, [known])
  (call,) = spent["custom_calls"]
  assert (
    call["name"] == "scale"
    and call["flops"] == 1e9
    and call["cycles_added"] == pytest.approx(1e9 / 197e12 * 1.5e9)
  )
  assert spent["cycles"] == spent["compiler_cycles"] + spent["custom_call_cycles"]


def test_an_estimate_given_with_a_kernel_is_taken():
  text = NESTED.replace(
    '"body":"QUJD"',
    '"body":"QUJD","cost_estimate":{"flops":2000000000,"transcendentals":0,"bytes_accessed":5}',
  )
  (call,) = cost.cost(hlo.parse(text), V5E)["custom_calls"]
  assert call["flops"] == 2e9 and call["bytes"] == 8 * 128 * 6


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
  text = NESTED.replace("constant(12)", "add(%get-tuple-element.3, %get-tuple-element.3)")
  spent = cost.cost(hlo.parse(text), V5E)
  assert spent["compiler_cycles"] == 3 * (100 + 7) + 5000 + 11 and spent["unknown_loops"] == 1


COLLECTIVES = """
HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused_scatter (p.1: f32[64,32]) -> f32[16,32] {
  %p.1 = f32[64,32]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[16,32]{1,0} reduce-scatter(%p.1), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

%fused_scatter.clone (p.2: f32[64,32]) -> f32[16,32] {
  %p.2 = f32[64,32]{1,0} parameter(0)
  ROOT %reduce-scatter.2 = f32[16,32]{1,0} reduce-scatter(%p.2), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[16,32], y: f32[64,32]) -> f32[16,32] {
  %x = f32[16,32]{1,0} parameter(0)
  %y = f32[64,32]{1,0} parameter(1)
  %all-gather-start.1 = (f32[16,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %all-gather-done.1 = f32[64,32]{1,0} all-gather-done(%all-gather-start.1)
  %all-to-all.1 = f32[64,32]{1,0} all-to-all(%y), channel_id=2, replica_groups={{0,1,2,3}}
  %collective-permute-start.1 = (f32[16,32]{1,0}, f32[16,32]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1}}
  %collective-permute-done.1 = f32[16,32]{1,0} collective-permute-done(%collective-permute-start.1)
  %fusion.1 = f32[16,32]{1,0} fusion(%all-gather-done.1), kind=kCustom, calls=%fused_scatter
  %fusion.2 = f32[16,32]{1,0} fusion(%all-gather-done.1), kind=kCustom, calls=%fused_scatter.clone
  ROOT %all-reduce.1 = f32[16,32]{1,0} all-reduce(%fusion.1), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_by_kind_with_counts_and_bytes():
  rows, all_rows = 16 * 32 * 4, 64 * 32 * 4
  assert cost.collectives(hlo.parse(COLLECTIVES)) == {
    "all-gather": dict(count=1, bytes=all_rows),
    "all-reduce": dict(count=1, bytes=rows),
    "all-to-all": dict(count=1, bytes=all_rows),
    "collective-permute": dict(count=1, bytes=rows),
    "reduce-scatter": dict(count=1, bytes=all_rows),
  }
  assert cost.collectives(hlo.parse(NESTED)) == {"all-reduce": dict(count=3, bytes=3 * 8 * 128 * 4)}


def test_collectives_are_waited_for_where_nothing_hides_them():
  def microseconds(text):
    chip = V5E._replace(links=1e9, clock=1e9)  # a byte and a cycle take a nanosecond
    return 1e6 * cost.cost(hlo.parse(text), chip)["waiting_seconds"]

  rows, all_rows = 2.048, 8.192
  exposed = all_rows + all_rows + rows + all_rows + 2 * rows  # the reduction crosses links twice
  assert microseconds(COLLECTIVES) == pytest.approx(exposed)
  # 5,000 cycles between start and end of the gather hide as much of it; 100 inside a fusion that
  # carries the scatter on hide that, and what is computed after the last of them nothing.
  work = f"  %copy.1 = f32[64,32]{{1,0}} copy(%y), {cycles(5000)}\n"
  text = COLLECTIVES.replace("  %all-gather-done.1", work + "  %all-gather-done.1")
  assert microseconds(text) == pytest.approx(exposed - 5)
  text = text.replace("calls=%fused_scatter\n", f"calls=%fused_scatter, {cycles(100)}\n")
  assert microseconds(text) == pytest.approx(exposed - 5.1)
  text = text.replace(
    "  ROOT %all-reduce.1", work.replace("copy.1", "copy.2") + "  ROOT %all-reduce.1"
  )
  assert microseconds(text) == pytest.approx(exposed - 5.1)
  # Links that are busy with one collective make the next wait.
  gather = "  %all-gather-start.2 = (f32[16,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%x), channel_id=9\n"
  text = COLLECTIVES.replace("  %all-gather-done.1", gather + "  %all-gather-done.1")
  text = text.replace(
    "  %all-to-all.1",
    "  %all-gather-done.2 = f32[64,32]{1,0} all-gather-done(%all-gather-start.2)\n  %all-to-all.1",
  )
  assert microseconds(text) == pytest.approx(exposed + all_rows)
  # In a loop of three trips; the reduction computes for 7 cycles meanwhile.
  assert microseconds(NESTED) == pytest.approx(3 * (2 * 4.096 - 0.007))


def test_all_to_alls_and_a_global_similarity_matrix_are_warned_of():
  module = hlo.parse(COLLECTIVES)
  (line,) = cost.warnings(module, cost.collectives(module), batch=512, shards=4)
  assert "1 all-to-all" in line
  text = COLLECTIVES.replace("64,32", "64,64").replace("16,32", "16,64")
  module = hlo.parse(text)
  lines = cost.warnings(module, cost.collectives(module), batch=64, shards=4)
  assert len(lines) == 2 and "f32[64,64]" in lines[1] and "similarity matrix" in lines[1]
  assert cost.warnings(hlo.parse(NESTED), {}, batch=64, shards=4) == []


def test_sizes_of_types():
  assert (
    hlo.size("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, pred[3], s32[], u32[]{:S(2)})") == 64 + 3 + 4 + 4
  )
  assert hlo.size("token[]") == 0 and hlo.size("s4[16]") == 8


def test_kernels_count_their_blocks():
  """A matrix product in blocks: rows move once a row of the grid, columns at every step."""

  def body(x, w, out):
    out[...] = jnp.dot(x[...], w[...])

  def product(x, w):
    return pl.pallas_call(
      body,
      grid=(4, 2),
      in_specs=[
        pl.BlockSpec((64, 256), lambda i, j: (i, 0)),
        pl.BlockSpec((256, 128), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((64, 128), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
      name="product",
    )(x, w)

  spec = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  (kernel,) = kernels.kernels_of(
    jax.make_jaxpr(jax.jit(lambda x, w: jnp.tanh(product(x, w))))(spec, spec).jaxpr
  )
  assert kernel.name == "product" and kernel.flops == 2 * 256**3
  assert kernel.bytes == 4 * (4 * 64 * 256 + 8 * 256 * 128 + 8 * 64 * 128)
  assert kernels.match([kernel], kernel.operands, kernel.results) is kernel
  assert kernels.match([kernel], (), (("f32", (1, 1)),)) is None


def test_a_refusal_for_memory_is_read():
  message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.52G of 15.75G hbm. Exceeded hbm capacity by 5.77G.

Total hbm usage >= 21.77G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 3.00G
     Operator: op_name="jit(update)/layers/dot_general" source_file="x.py" source_line=3
     Shape: bf16[128,196,12,196]{3,1,2,0:T(8,128)(2,1)}
     Unpadded size: 2.90G
     ==========================

  2. Size: 512.00M
     Shape: f32[12,768,3072]{2,1,0:T(8,128)}
"""
  found = memory.out_of_memory(message)
  assert (
    found["over"] == pytest.approx(5.77 * GIB)
    and found["used"] == pytest.approx(21.52 * GIB)
    and found["limit"] == 15.75 * GIB
  )
  assert found["largest"] == [
    dict(bytes=3 * GIB, shape="bf16[128,196,12,196]", source="jit(update)/layers/dot_general"),
    dict(bytes=GIB / 2, shape="f32[12,768,3072]", source=""),
  ]
  temporaries = memory.out_of_memory(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(15.79G) exceeds available HBM (15.75G)."
  )
  assert temporaries == dict(
    used=15.79 * GIB, limit=15.75 * GIB, over=pytest.approx(0.04 * GIB), largest=[]
  )
  assert memory.out_of_memory("INTERNAL: something else") is None


def test_a_run_on_chips_of_a_known_kind_gets_the_seconds_of_its_step():
  text = NESTED.replace("tpu_custom_call", "another")

  def on(kind):
    return SimpleNamespace(
      mesh=SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)]))
    )

  def compiled(text):
    return SimpleNamespace(as_text=lambda: text)

  assert (
    estimate(on("TPU v5 lite"), compiled(text)) == cost.cost(hlo.parse(text), V5E)["seconds"] > 0
  )
  assert (
    estimate(on("cpu"), compiled(text)) is None
    and estimate(on("TPU v5 lite"), compiled("")) is None
  )
