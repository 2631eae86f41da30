"""launch/slurm.sbatch as a batch job runs it, with fakes that treat signals as SLURM's commands
do.
"""

import signal
import time

import pytest

from tests.launch.fakes import ROOT

TRAIN = ("--config", "configs/quickstart.py", "--workdir", "runs/a b")


@pytest.fixture
def cluster(fakes, tmp_path):
  """Job 77: a real srun kills its tasks on SIGTERM, and scancel --signal hands the signal to them;
  `mmjax` runs the file `run`.
  """
  fakes.environment.update(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(ROOT), PLACE=str(tmp_path))
  fakes.add(
    "srun",
    """
    while [[ $1 = --* ]]; do shift; done
    "$@" & task=$!
    echo $task > "$PLACE/task"
    trap 'kill -9 $task; echo forcing job termination; exit 137' TERM
    wait $task
  """,
  )
  fakes.add("scancel", 'kill -TERM "$(cat "$PLACE/task")"')
  fakes.add("squeue", 'cat "$PLACE/state"')
  fakes.add("scontrol")
  fakes.add("mmjax", '[ "$1" = train ] || exit 0; . "$PLACE/run"')
  (tmp_path / "state").write_text("RUNNING")
  return fakes


def test_it_asks_for_what_a_restart_needs():
  lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
  settings = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
  assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(settings)
  first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  assert all(not line.startswith("#SBATCH") for line in lines[first_command:]), (
    "SLURM reads no settings after a command"
  )


def test_a_run_that_is_done_ends_the_job(cluster, tmp_path):
  (tmp_path / "run").write_text("echo trained")
  assert "trained" in cluster.run("slurm.sbatch", *TRAIN)
  assert cluster.calls("srun") == [
    "srun --kill-on-bad-exit=1 --label mmjax train --config configs/quickstart.py --workdir "
    "runs/a b"
  ]
  assert not cluster.calls("scontrol")


def test_75_and_1_run_again_in_the_job_and_bad_usage_ends_it(cluster, tmp_path):
  (tmp_path / "run").write_text(
    'case $(grep -c "^srun" "$CALLS") in 1) exit 75 ;; 2) exit 1 ;; 3) exit 2 ;; esac'
  )
  cluster.run("slurm.sbatch", *TRAIN, code=2)
  assert len(cluster.calls("srun")) == 3 and not cluster.calls("scontrol")


@pytest.mark.parametrize(
  ("state", "queued"), [("RUNNING", ["scontrol requeue 77"]), ("COMPLETING", [])]
)
def test_sigterm_saves_and_queues_the_job_again_unless_its_owner_cancelled_it(
  cluster, tmp_path, state, queued
):
  (tmp_path / "run").write_text(
    """trap 'echo saved; exit 75' TERM; touch "$PLACE/up"; while :; do sleep 0.1; done"""
  )
  process = cluster.start("slurm.sbatch", *TRAIN)
  while not (tmp_path / "up").exists():
    time.sleep(0.1)
  (tmp_path / "state").write_text(state)
  process.send_signal(signal.SIGTERM)
  printed = process.communicate(timeout=60)[0]
  assert process.returncode == 75 and "saved" in printed and "forcing" not in printed
  assert (
    cluster.calls("scancel") == ["scancel --signal=TERM 77"] and cluster.calls("scontrol") == queued
  )


@pytest.mark.parametrize(("tasks", "devices"), [("1", "0,1,2,3"), ("4", "none")])
def test_a_process_that_has_a_node_for_itself_takes_all_its_gpus(cluster, tmp_path, tasks, devices):
  cluster.environment.update(SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4")
  (tmp_path / "run").write_text('echo "devices ${JAX_LOCAL_DEVICE_IDS:-none}."')
  assert f"devices {devices}." in cluster.run("slurm.sbatch", *TRAIN)


def test_submitted_from_elsewhere_it_says_so(cluster, tmp_path):
  cluster.environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
  assert "from the repository's root" in cluster.run("slurm.sbatch", *TRAIN, code=2)


PRINTS = 'env | grep -E "^(XLA|CUDA_DEVICE|NCCL)" | sort | tr "\\n" " "'


@pytest.mark.parametrize(
  "capability, set_before, want",
  [
    ("9.0", {}, "CUDA_DEVICE_MAX_CONNECTIONS=1 NCCL_DEBUG=WARN XLA_CLIENT_MEM_FRACTION=0.9"),
    ("10.0", {}, "NCCL_DEBUG=WARN XLA_CLIENT_MEM_FRACTION=0.9"),
    (None, {}, "NCCL_DEBUG=WARN XLA_CLIENT_MEM_FRACTION=0.9"),
    (
      "8.0",
      dict(
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", NCCL_DEBUG="INFO", CUDA_DEVICE_MAX_CONNECTIONS="8"
      ),
      "CUDA_DEVICE_MAX_CONNECTIONS=8 NCCL_DEBUG=INFO XLA_PYTHON_CLIENT_MEM_FRACTION=0.5",
    ),
  ],
)
def test_a_run_gets_the_settings_of_its_gpus(cluster, tmp_path, capability, set_before, want):
  """JAX refuses both names of its share of memory at once."""
  names = ("XLA_", "NCCL_", "CUDA_")
  kept = {k: v for k, v in cluster.environment.items() if not k.startswith(names)}
  cluster.environment = kept | set_before
  cluster.add("nvidia-smi", f"echo {capability}; echo {capability}" if capability else "exit 1")
  (tmp_path / "run").write_text(PRINTS)
  assert want in cluster.run("slurm.sbatch", *TRAIN)
