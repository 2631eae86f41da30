"""What a GPU does with mmjax: kernels against the plain formula, train steps, PyTorch beside them.

  python tests/bench/gpu.py OUT [--tiny]

Writes OUT/gpu.json and OUT/gpu.md (a Markdown table). --tiny: sizes that a CPU can run, to try the
script out. `launch/check_gpu.sh` runs it, with the checks that need whole commands.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
TINY = dict(width=32, depth=1, heads=2, mlp=64)


def kernels(tiny: bool) -> list[dict[str, Any]]:
  """`errors_of` each kernel at each length and mask."""
  names = ["xla", "sdpa"] + ["cudnn"] * (jax.default_backend() == "gpu")
  lengths = (16,) if tiny else (64, 200, 1024)
  masks = list(itertools.product((False, True), (False, True)))
  return [errors_of(*case, *mask) for case in itertools.product(names, lengths) for mask in masks]


def errors_of(kernel: str, length: int, causal: bool, masked: bool) -> dict[str, Any]:
  """The largest errors of a kernel and of its gradients, relative to the largest value of the
  formula in float64.
  """
  from mmjax.models.attention import attend

  draw = np.random.default_rng(length)
  arrays = [jnp.asarray(draw.normal(size=(2, length, 4, 64)), jnp.bfloat16) for _ in range(4)]
  mask = np.arange(length) < np.array([length, length // 2])[:, None] if masked else None

  def run(*operands: jax.Array) -> jax.Array:
    return attend(*operands, mask=mask, causal=causal, kernel=kernel)

  def loss(*operands: jax.Array) -> jax.Array:
    return jnp.vdot(run(*operands), arrays[3])

  expected = dense(*(np.asarray(x, np.float64) for x in arrays), mask, causal)
  found = (jax.jit(run)(*arrays[:3]), *jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays[:3]))
  errors = [
    float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())
    for got, want in zip(found, expected, strict=True)
  ]
  return dict(
    kernel=kernel, length=length, causal=causal, key_mask=masked, output=errors[0],
    gradient=max(errors[1:]), correct=max(errors) < 0.03,
  )  # fmt: skip


def dense(q, k, v, cotangent, mask, causal) -> tuple[np.ndarray, ...]:
  """Attention and its gradients by q, k, v, in float64, as the formula stands in the paper."""
  scale, length = q.shape[-1] ** -0.5, q.shape[1]
  seen = np.ones((len(q), 1, length, length), bool)
  if mask is not None:
    seen = seen & mask[:, None, None, :]
  if causal:
    seen = seen & np.tri(length, dtype=bool)
  logits = np.where(seen, np.einsum("blhk,bshk->bhls", q, k) * scale, -np.inf)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum("blhk,bshk->bhls", cotangent, v)
  dlogits = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
  return (
    np.einsum("bhls,bshk->blhk", p, v),
    np.einsum("bhls,bshk->blhk", dlogits, k),
    np.einsum("bhls,blhk->bshk", dlogits, q),
    np.einsum("bhls,blhk->bshk", p, cotangent),
  )


def train_step(name: str, tiny: bool, seconds: float) -> dict[str, Any]:
  """Pairs a second and utilisation of the train step of configs/NAME.py, at the batch that fits."""
  from mmjax import config as configs
  from mmjax.parallel.mesh import make_mesh
  from mmjax.training.metrics import PEAK_FLOPS
  from mmjax.training.program import Program

  device = jax.devices()[0]
  sizes = (4,) if tiny else (1024, 512, 256, 128, 64)
  towers = [f"model.encoders.{m}.{k}={v}" for m in ("image", "text") for k, v in TINY.items()]
  for size in sizes:
    overrides = [f"train.batch_size={size}", "data.text.tokenizer=none", "train.steps=1000000"]
    overrides += [*towers, "model.width=32", "data.image.size=32"] if tiny else []
    config = configs.load(str(ROOT / "configs" / f"{name}.py"), [f"config.{o}" for o in overrides])
    step = Program(config, make_mesh(config, [device]), steps=10**6)
    try:
      state, batch = step.init(0), random_batch(step)
      state, _ = jax.block_until_ready(step.train(state, batch))
      count, begin = 0, time.perf_counter()
      while count < 3 or time.perf_counter() - begin < seconds:
        state, _ = jax.block_until_ready(step.train(state, batch))
        count += 1
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      continue
    spent = (time.perf_counter() - begin) / count
    peak = PEAK_FLOPS.get(device.device_kind)
    share = step.flops_per_step() / spent / peak if peak else None
    return dict(
      what=f"{name}, train step", batch=size, per_second=size / spent, utilisation=share
    ) | dict(seconds=spent)
  return dict(what=f"{name}, train step", refused=f"a batch of {sizes[-1]} does not fit")


def random_batch(step: Any) -> dict:
  """A batch on the device, of the shapes that the config's data has."""
  draw = np.random.default_rng(0)

  def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
    if x.dtype == bool:
      return jax.device_put(np.ones(x.shape, bool), x.sharding)
    high = 255 if x.dtype == np.uint8 else 30_000
    if np.issubdtype(x.dtype, np.integer):
      return jax.device_put(draw.integers(0, high, x.shape).astype(x.dtype), x.sharding)
    return jax.device_put(draw.normal(size=x.shape).astype(x.dtype), x.sharding)

  return jax.tree.map(fill, step.batch_spec_of(""))


def torch_step(tiny: bool, seconds: float) -> dict[str, Any] | None:
  """Pairs a second of SigLIP B/16 of transformers, compiled by torch, on the same card."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  device = "cuda" if torch.cuda.is_available() else "cpu"
  small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
  vision = dict(small, image_size=32, patch_size=16) if tiny else dict(image_size=224)
  config = transformers.SiglipConfig(
    text_config=small if tiny else dict(max_position_embeddings=64), vision_config=vision
  )
  size, pixels = (4, 32) if tiny else (256, 224)
  model = transformers.SiglipModel(config).to(device)
  run = model if tiny else torch.compile(model)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
  batch = dict(
    input_ids=torch.randint(0, 30_000, (size, 64), device=device),
    pixel_values=torch.rand(size, 3, pixels, pixels, device=device),
  )

  def step() -> None:
    with torch.autocast(device, torch.bfloat16):
      loss = run(**batch, return_loss=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for the device

  for _ in range(3):
    step()
  count, begin = 0, time.perf_counter()
  while count < 3 or time.perf_counter() - begin < seconds:
    step()
    count += 1
  spent = (time.perf_counter() - begin) / count
  return dict(
    what="SigLIP B/16 by transformers and torch.compile", batch=size, seconds=spent
  ) | dict(per_second=size / spent)


def table(result: dict[str, Any]) -> str:
  lines = [
    f"{result['device']}, jax {result['jax']}:",
    "",
    "| what | batch | a second | utilisation |",
    "|---|---|---|---|",
  ]
  for row in result["steps"]:
    if "refused" in row:
      lines.append(f"| {row['what']} | - | {row['refused']} | - |")
      continue
    share = row.get("utilisation")
    lines.append(
      f"| {row['what']} | {row['batch']} | {row['per_second']:,.0f} | "
      f"{f'{share:.1%}' if share else '-'} |"
    )
  wrong = [row for row in result["kernels"] if not row["correct"]]
  lines += ["", f"{len(result['kernels'])} kernels and masks tried, {len(wrong)} wrong."]
  return "\n".join(lines) + "\n"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--tiny", action="store_true")
  options = parser.parse_args()
  seconds = 0.1 if options.tiny else 10.0
  result = dict(
    device=jax.devices()[0].device_kind, jax=jax.__version__, kernels=kernels(options.tiny)
  )
  names = ("siglip_b16",) if options.tiny else ("siglip_b16", "siglip_so400m14")
  result["steps"] = [train_step(name, options.tiny, seconds) for name in names]
  jax.clear_caches()
  if peer := torch_step(options.tiny, seconds):
    result["steps"].append(peer)
  options.out.mkdir(parents=True, exist_ok=True)
  (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
  (options.out / "gpu.md").write_text(table(result))
  print(table(result))
  return 0 if all(row["correct"] for row in result["kernels"]) else 1


if __name__ == "__main__":
  sys.exit(main())
