"""Cycles of one dense layer on a TPU v5e, forward and backward, by the estimates of its compiler:
products in full and in eight bits. No TPU is needed.

python tests/bench/products.py
"""

from __future__ import annotations

import numpy as np

from mmjax.plan import hlo, topology

SHAPES = ((8192, 4096, 14336), (25600, 768, 3072))  # tokens, inputs, outputs


def cycles(products: str, tokens: int, inputs: int, outputs: int) -> int:
  """Of a layer without a bias, whose kernel is float32 and whose rows are bfloat16."""
  import jax
  import jax.numpy as jnp

  from mmjax.models.layers import affine

  device = topology.devices(topology.parse("v5e-4"))[0]
  mesh = jax.sharding.Mesh(np.array([device]), ("all",), axis_types=(jax.sharding.AxisType.Auto,))

  def run(x, kernel, cotangent):
    def layer(x, kernel):
      return affine(x, kernel.astype(x.dtype), None, 1, ("mlp",), products=products)

    y, back = jax.vjp(layer, x, kernel)
    return y, *back(cotangent)

  def spec(shape, dtype):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  x, cotangent = spec((tokens, inputs), jnp.bfloat16), spec((tokens, outputs), jnp.bfloat16)
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(x, spec((inputs, outputs), jnp.float32), cotangent).compile()
  return sum((op.cycles or 0) * times for op, times, _ in hlo.runs(hlo.parse(compiled.as_text())))


def main() -> None:
  topology.prepare()
  print("tokens x inputs x outputs: million cycles in full, int8, fp8")
  for shape in SHAPES:
    found = [f"{cycles(products, *shape) / 1e6:.1f}" for products in ("full", "int8", "fp8")]
    print(f"{' x '.join(f'{size:,}' for size in shape)}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
  main()
