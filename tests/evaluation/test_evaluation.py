"""The evaluators on real files: the same result for any batch size, number of devices and
processes, and from `mmjax embed`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mmjax import config as configs
from mmjax import evaluation
from mmjax.config import UserError
from mmjax.inference.search import embed
from mmjax.parallel.mesh import single_device_mesh
from tests.evaluation import world


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def metrics(checkpoint):
  return world.evaluate(checkpoint, jax.devices()[:1], 23)


def test_metrics_are_whole(metrics):
  # 23, two identical, one broken.
  assert metrics["retrieval/en/images"] == 21 and metrics["retrieval/en/unreadable"] == 1
  assert metrics["retrieval/en/texts"] == 44 and metrics["retrieval/both/texts"] == 66
  assert (
    metrics["zero/examples"] == 22
    and "zero/de/accuracy" in metrics
    and metrics["probe/unreadable"] == 2
  )
  assert 0 < metrics["retrieval/en/image_to_text/R@10"] <= 1


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 5), (8, 16)])
def test_batch_size_and_devices_change_nothing(checkpoint, metrics, devices, batch_size):
  assert world.evaluate(checkpoint, jax.devices()[:devices], batch_size) == metrics


def test_two_processes_give_the_same(checkpoint, metrics):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "MMJAX_"))}
  env.update(
    JAX_PLATFORMS="cpu",
    PYTHONPATH=str(Path(__file__).parents[2]),
    MMJAX_COORDINATOR=f"localhost:{port}",
    MMJAX_PROCESSES="2",
    MMJAX_CPU_DEVICES="2",
  )
  runs = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.evaluation.world", str(checkpoint)],
      env=env | {"MMJAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=env["PYTHONPATH"],
    )
    for i in range(2)
  ]
  for run in runs:
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-2000:]
    assert json.loads(out.splitlines()[-1]) == metrics


def test_embed_and_numpy_give_the_same_recall(checkpoint, metrics, tmp_path):
  out = embed(
    checkpoint,
    tmp_path / "e.npz",
    source="small",
    split="test",
    languages=("en",),
    log=lambda line: None,
  )
  f = np.load(out, allow_pickle=False)
  images, i = np.unique(f["image_keys"], return_index=True, return_inverse=True)[1:]
  texts, t = np.unique(f["text_keys"], return_index=True, return_inverse=True)[1:]
  similarity = f["image_embeddings"][images] @ f["text_embeddings"][texts].T
  correct = np.zeros(similarity.shape, bool)
  correct[i[f["text_owners"]], t] = True
  recall = np.mean(
    np.where(correct, similarity, -2).max(1) > np.where(correct, -2, similarity).max(1)
  )
  assert recall == metrics["retrieval/en/image_to_text/R@1"]


def test_missing_data_is_named_before_any_work(checkpoint):
  from mmjax.state.checkpoint import load_config

  for change, words in (
    (dict(source="smal"), "retrieval/en.*'smal'"),
    (dict(split="tset"), "retrieval/en.*tset"),
    (dict(languages=("fr",)), "retrieval/en.*'fr'"),
  ):
    tree = load_config(checkpoint).to_dict()
    tree["evaluation"]["evaluators"]["retrieval/en"].update(change)
    run = evaluation.Evaluation(configs.resolve(tree), None, single_device_mesh())
    with pytest.raises(UserError, match=words) as error:
      run.check_sources("retrieval/*")
    assert "\n" not in str(error.value)
    run.check_sources("zero")
