"""check_gpu.sh at sizes that a CPU can run."""

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.commands import ROOT


@pytest.mark.slow
def test_the_script_runs_at_tiny_sizes(embedded_data, tmp_path):
  env = dict(os.environ, MMJAX_DATA=str(embedded_data), MMJAX_PYTHON=sys.executable)
  words = ["bash", "launch/check_gpu.sh", "--tiny", str(tmp_path)]
  done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  assert "killed and resumed: the same bits" in done.stdout
  result = json.loads((tmp_path / "gpu.json").read_text())
  assert all(row["correct"] for row in result["kernels"]) and len(result["steps"]) >= 1
  assert "siglip_b16, train step" in (tmp_path / "gpu.md").read_text()
