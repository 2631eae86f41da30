"""What an import and a load of a model need of memory, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

MEGABYTE = 2**20
WIDTH, HIDDEN, DEPTH, VOCABULARY = 256, 1024, 24, 16_000
MEASURE = """
import sys, threading, time
import jax
import mmjax
from mmjax.interop.huggingface import import_hf

jax.config.update("jax_num_cpu_devices", 4)
jax.devices()

def anonymous():
  line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
  return int(line.split()[1]) * 1024

peak, done = anonymous(), False

def watch():
  global peak
  while not done:
    peak = max(peak, anonymous())
    time.sleep(0.002)

{before}
base = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
{work}
done = True
print(peak - base)
"""

SPEC = """
from ml_collections import ConfigDict
from mmjax.config import resolve
from mmjax.inference.predictor import param_shardings, param_spec
from mmjax.parallel.mesh import make_mesh
from mmjax.state import checkpoint

c = ConfigDict(checkpoint.load_config({folder!r}).to_dict())
c.mesh.data, c.mesh.fsdp, c.sharding = 1, 4, "fsdp"
config = resolve(c)
spec = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  param_spec(config),
  param_shardings(config, make_mesh(config)),
)
assert {{len(x.sharding.device_set) for x in jax.tree.leaves(spec)}} == {{4}}
"""


def measured(work, before=""):
  """Bytes of memory that no file stands behind, at most at one time, beyond those before."""
  command = [sys.executable, "-c", MEASURE.format(work=work, before=before)]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  return int(run.stdout.split()[-1])


@pytest.mark.slow
def test_an_import_needs_no_more_memory_than_its_largest_tensor(tmp_path):
  random, tensors = np.random.default_rng(0), {}

  def add(name, *shape):
    tensors[name] = random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

  add("model.embed_tokens.weight", VOCABULARY, WIDTH)
  add("lm_head.weight", VOCABULARY, WIDTH)
  add("model.norm.weight", WIDTH)
  for i in range(DEPTH):
    at = f"model.layers.{i}"
    for x in "qkvo":
      add(f"{at}.self_attn.{x}_proj.weight", WIDTH, WIDTH)
    for x in ("gate", "up"):
      add(f"{at}.mlp.{x}_proj.weight", HIDDEN, WIDTH)
    add(f"{at}.mlp.down_proj.weight", WIDTH, HIDDEN)
    for x in ("input_layernorm", "post_attention_layernorm"):
      add(f"{at}.{x}.weight", WIDTH)
  folder, out = tmp_path / "theirs", tmp_path / "in"
  folder.mkdir()
  save_file(tensors, folder / "model.safetensors")
  config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=WIDTH)
  config |= dict(intermediate_size=HIDDEN, num_hidden_layers=DEPTH, num_attention_heads=4)
  config |= dict(vocab_size=VOCABULARY, max_position_embeddings=128)
  (folder / "config.json").write_text(json.dumps(config))
  size = {name: x.size * 4 for name, x in tensors.items()}
  whole, largest = sum(size.values()), max(size.values())
  assert whole > 7 * largest
  over = measured(f"import_hf({str(folder)!r}, {str(out)!r})")
  assert over < largest + 24 * MEGABYTE, over / MEGABYTE
  # the mesh is this memory too; the largest tensor here is that of all layers
  load = f"kept = jax.block_until_ready(checkpoint.load_params({str(out)!r}, spec))"
  over = measured(load, SPEC.format(folder=str(out))) - whole
  assert over < DEPTH * WIDTH * 2 * HIDDEN * 4 + 24 * MEGABYTE, over / MEGABYTE
