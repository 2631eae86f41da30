"""Remat policies that keep in the memory of the host, and sequences split over chips, as the TPU
compiler takes them.
"""

import json

import pytest

from tests.plan.test_plan import run

DEEP = """
import mmjax

def get_config(arg=""):
  c = mmjax.config.base()
  c.data.image.size, c.data.text.length = 64, 64
  c.data.text.vocab_size, c.data.text.tokenizer = 512, "none"
  c.model = dict(name="dual_encoder", width=128, encoders=dict(
    image=dict(kind="vit", patch=8, depth=12, heads=2),
    text=dict(kind="transformer", depth=1, heads=2)))
  c.objectives.align = dict(kind="contrastive", between=("image", "text"), loss="sigmoid")
  c.train.batch_size, c.train.steps = 1024, 1000
  return c
"""


def peak(folder, policy, *overrides):
  """(bytes of a chip of v5e-4 at most, collectives) of the step with this remat policy."""
  (folder / "deep.py").write_text(DEEP)
  remat = [f"--config.model.encoders.{name}.remat={policy}" for name in ("image", "text")]
  done = run(
    "-m",
    "mmjax.cli",
    "plan",
    "--config",
    "deep.py",
    "--topology",
    "v5e-4",
    "--json",
    *remat,
    *overrides,
    cwd=folder,
  )
  result = json.loads(done.stdout)
  return result["memory"]["peak"], result["collectives"]


@pytest.mark.slow
def test_offloaded_blocks_leave_the_chip(tmp_path):
  pytest.importorskip("libtpu")
  kept = {
    policy: peak(tmp_path, policy)[0] for policy in ("dense", "offload_dense", "full", "offload")
  }
  print({policy: f"{count / 2**20:.0f} MiB" for policy, count in kept.items()})
  assert kept["offload"] < kept["full"] < kept["dense"] and kept["offload_dense"] < kept["dense"]


@pytest.mark.slow
def test_rings_are_compiled_for_tpus(tmp_path):
  pytest.importorskip("libtpu")
  _, found = peak(tmp_path, "full", "--config.mesh.data=2", "--config.mesh.context=2")
  assert found["collective-permute"]["count"] >= 8 and "all-to-all" not in found
