"""The train step of a small image-text model in mmjax against open_clip's shapes in PyTorch, side
by side on this machine.

  python tests/bench/train_step.py [--heads 2] [--pairs 12] [--hugepages jax]

Both sides: 48x48 pictures, patch 8, width 128, depth 4 in both towers, 16 text tokens, batch 256,
float32, exact GELU, softmax contrastive loss, AdamW; forward, backward and update. The PyTorch side
is written after open_clip's modules (nn.MultiheadAttention blocks, class token, norm before the
blocks, causal text pooled at the highest token). Each side lives in a process of its own and steps
in turn, so that neither's threads disturb the other; minima and medians are printed, of seconds and
of processor seconds. On a busy machine compare the latter with --threads 1: waiting threads that
spin count too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SIZE, PATCH, VOCABULARY, LENGTH = 48, 8, 4096, 16


def batch(size: int) -> tuple:
  """uint8 pixels [B, 48, 48, 3], tokens int32 [B, 16] (end token highest, then zeros), mask."""
  import numpy as np

  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8)
  tokens = rng.integers(5, VOCABULARY - 1, (size, LENGTH)).astype(np.int32)
  ends = rng.integers(4, LENGTH, size)
  tokens = np.where(np.arange(LENGTH) < ends[:, None], tokens, 0)
  tokens[np.arange(size), ends] = VOCABULARY - 1
  return pixels, tokens, np.arange(LENGTH) <= ends[:, None]


def jax_step(args: argparse.Namespace) -> Callable[[], float]:
  sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import optax

  import mmjax.config
  from mmjax.models import make_model

  c = mmjax.config.base()
  tower = dict(depth=args.depth, heads=args.heads, activation="gelu")
  c.model = dict(
    name="dual_encoder",
    width=args.width,
    encoders=dict(
      image=dict(
        kind="vit", patch=PATCH, pooling="class", input_norm=True, patch_bias=False, **tower
      ),
      text=dict(kind="transformer", causal=True, pooling="highest", **tower),
    ),
  )
  c.data.image.size, c.data.text.length, c.data.text.vocab_size = SIZE, LENGTH, VOCABULARY
  c.precision.compute = "float32"
  model = make_model(mmjax.config.resolve(c))
  pixels, tokens, mask = batch(args.batch)
  data = jax.device_put(dict(image=dict(pixels=pixels), text=dict(tokens=tokens, mask=mask)))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), data))["params"]
  tx = optax.adamw(1e-3)

  def loss(params: dict) -> jax.Array:
    out, (scale, _) = (
      model.apply({"params": params}, data),
      model.apply({"params": params}, method="temperature"),
    )
    logits = scale * out["image"] @ out["text"].T
    labels = jnp.arange(len(logits))
    losses = [
      optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)
    ]
    return sum(losses) / 2

  def step(params: dict, state: tuple) -> tuple:
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  step = jax.jit(step, donate_argnums=(0, 1))
  state = jax.jit(tx.init)(params)

  def run() -> float:
    nonlocal params, state
    params, state, value = step(params, state)
    return float(value)

  return run


def torch_step(args: argparse.Namespace) -> Callable[[], float]:
  import torch
  from torch import nn
  from torch.nn import functional as F

  class Block(nn.Module):
    def __init__(self, width: int, heads: int):
      super().__init__()
      self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
      self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
      y = self.norm_1(x)
      x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask)[0]
      return x + self.mlp(self.norm_2(x))

  class Clip(nn.Module):
    def __init__(self, width: int, depth: int, heads: int):
      super().__init__()
      self.patch = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
      self.token = nn.Parameter(width**-0.5 * torch.randn(width))
      self.image_position = nn.Parameter(width**-0.5 * torch.randn((SIZE // PATCH) ** 2 + 1, width))
      self.norm_in, self.norm_image, self.norm_text = (nn.LayerNorm(width) for _ in range(3))
      self.image_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
      self.text_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
      self.embedding = nn.Embedding(VOCABULARY, width)
      self.text_position = nn.Parameter(0.01 * torch.randn(LENGTH, width))
      self.image_projection, self.text_projection = (
        nn.Parameter(width**-0.5 * torch.randn(width, width)) for _ in range(2)
      )
      self.log_scale = nn.Parameter(torch.tensor(2.6593))
      self.register_buffer("mask", torch.full((LENGTH, LENGTH), float("-inf")).triu_(1))
      nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, pixels, tokens):
      x = self.patch(pixels).flatten(2).transpose(1, 2)
      x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.image_position
      x = self.norm_in(x)
      for block in self.image_blocks:
        x = block(x)
      image = self.norm_image(x)[:, 0] @ self.image_projection
      y = self.embedding(tokens) + self.text_position
      for block in self.text_blocks:
        y = block(y, self.mask)
      text = self.norm_text(y)[torch.arange(len(y)), tokens.argmax(-1)] @ self.text_projection
      return self.log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

  torch.manual_seed(0)
  torch.set_num_threads(args.threads)
  model = Clip(args.width, args.depth, args.heads)
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
  pixels, tokens, _ = batch(args.batch)
  pixels = torch.from_numpy(pixels)
  tokens = torch.from_numpy(tokens).long()
  labels = torch.arange(args.batch)

  def run() -> float:
    images = ((pixels.permute(0, 3, 1, 2).float() / 255) - 0.5) / 0.5
    logits = model(images, tokens)
    value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()

  return run


def worker(args: argparse.Namespace) -> None:
  """Takes one step for each line read; prints "seconds processor-seconds loss"."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
  run = {"jax": jax_step, "torch": torch_step}[args.worker](args)
  for _ in range(3):
    run()
  print("ready", flush=True)
  for _ in sys.stdin:
    start, busy = time.perf_counter(), time.process_time()
    value = run()
    print(time.perf_counter() - start, time.process_time() - busy, value, flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, default in dict(
    batch=256, width=128, depth=4, heads=2, pairs=12, threads=os.cpu_count()
  ).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument(
    "--hugepages",
    choices=("none", "jax", "both"),
    default="none",
    help="who runs with GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
  )
  parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    return worker(args)
  sides = {}
  for side in ("torch", "jax"):
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    if args.hugepages == "both" or args.hugepages == side:
      env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sides[side] = subprocess.Popen(
      [sys.executable, __file__, *sys.argv[1:], "--worker", side],
      env=env,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    if sides[side].stdout.readline().strip() != "ready":
      raise SystemExit(f"the {side} side failed to start")
  times: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
  for _ in range(args.pairs):
    for side, process in sides.items():
      process.stdin.write("step\n")
      process.stdin.flush()
      times[side].append(tuple(map(float, process.stdout.readline().split()[:2])))
  for process in sides.values():
    process.stdin.close()
    process.wait()
  for i, what in enumerate(("seconds", "processor seconds")):
    values = {side: [step[i] for step in steps] for side, steps in times.items()}
    for side in sides:
      print(
        f"{side:5s}  min {min(values[side]):.3f}   median {statistics.median(values[side]):.3f}   "
        f"{what} of {args.pairs} steps"
      )
    pairs = [j / t for j, t in zip(values["jax"], values["torch"], strict=True)]
    print(
      f"jax / torch: {min(values['jax']) / min(values['torch']):.3f} of minima, "
      f"{statistics.median(pairs):.3f} median of pairs\n"
    )


if __name__ == "__main__":
  main()
