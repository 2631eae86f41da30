"""A small data set on disk, a tiny model as an import folder, and an evaluation of it that several
processes can share.

Run as a program: `world.py CHECKPOINT DEVICES_A_PROCESS` prints the metrics (every process joins by
the MMJAX_ variables).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np


def build(folder: Path) -> Path:
  """Writes the data set and the checkpoint; returns the checkpoint."""
  from mmjax import config as configs
  from mmjax.data.builders import write_dataset
  from mmjax.state.checkpoint import save_import
  from tests.inference import tiny

  arrays = tiny.pixels(23, 3)
  data = [tiny.png(x) for x in arrays]
  data[5], data[9] = data[2], b"\x89PNG\r\n\x1a\n broken"
  keys = [1 + (2 if i == 5 else i) for i in range(23)]
  records = [
    dict(
      id=f"{i:02d}",
      image=data[i],
      label=("Flags", "Objects", "Symbols")[i % 3],
      image_key=keys[i],
      captions={"en": [f"{tiny.WORDS[i % 6]} {i // 2}", f"number {i}"], "de": [f"Bild {i}"]},
    )
    for i in range(23)
  ]
  write_dataset("small", folder / "data", {"test": records, "train": records[::-1]}, metadata={})
  tree = tiny.config().to_dict()
  tree["data"]["dir"] = str(folder / "data")
  tree["evaluation"]["evaluators"] = {
    "retrieval/en": dict(kind="retrieval", source="small", split="test", languages=("en",)),
    "retrieval/both": dict(
      kind="retrieval", source="small", split="test", languages=("en", "de"), examples=2
    ),
    "zero": dict(kind="zero_shot", source="small", split="test", languages=("en", "de")),
    "probe": dict(kind="linear_probe", source="small", split="test", train_split="train"),
  }
  config = configs.resolve(tree)
  save_import(str(folder / "checkpoint"), tiny.params(config), config, tiny.assets(folder))
  return folder / "checkpoint"


def evaluate(checkpoint: Path, devices: list, batch_size: int) -> dict[str, float]:
  """All metrics of the checkpoint's evaluators on these devices."""
  from mmjax import config as configs
  from mmjax import evaluation
  from mmjax.parallel.mesh import make_mesh
  from mmjax.state.checkpoint import load_assets, load_config, load_params
  from mmjax.training.program import Program

  tree = load_config(checkpoint).to_dict()
  tree["evaluation"]["batch_size"] = batch_size
  config = configs.resolve(tree)
  mesh = make_mesh(config, devices)
  step = Program(config, mesh)
  with jax.set_mesh(mesh):
    params = load_params(checkpoint, step.params_spec)
    run = evaluation.Evaluation(config, step.apply, mesh, assets=load_assets(checkpoint))
    run.check_sources()
    return evaluation.flat_metrics(run.run({"params": params}))


if __name__ == "__main__":
  from mmjax.parallel import multihost

  multihost.initialize()
  metrics = evaluate(Path(sys.argv[1]), jax.devices(), 8)
  assert all(np.isfinite(list(metrics.values())))
  print(json.dumps(metrics))
