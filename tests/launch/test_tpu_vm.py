"""launch/tpu_vm.sh against a fake gcloud whose hosts are folders here, where the commands for them
are really run.
"""

import os
import signal

import pytest

TRAIN = ("--config", "configs/quickstart.py", "--workdir", "runs/a b", "--config.seed=3")
CREATE = ("--create", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite", "--spot")


@pytest.fixture
def cloud(fakes, tmp_path):
  """Two hosts; the TPU's state is in the file `state`; `mmjax` of host i runs the lines of the file
  `run` with HOST=i.
  """
  (tmp_path / "run").write_text("exit 0")
  for i in range(2):
    (tmp_path / f"host{i}").mkdir()
  fakes.environment.update(HOSTS=str(tmp_path), TPU_POLL_SECONDS="0")
  fakes.add(
    "gcloud",
    r"""
    shift 2
    case "$1 $2" in
      "tpu-vm describe") cat "$HOSTS/state" 2>/dev/null || exit 1 ;;
      "tpu-vm create" | "queued-resources create") echo READY > "$HOSTS/state" ;;
      "tpu-vm delete" | "queued-resources delete") rm "$HOSTS/state" ;;
      "tpu-vm scp") for host in "$HOSTS"/host?; do cp "$3" "$host/${4#*:}"; done ;;
      "tpu-vm ssh")
        for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
        for host in 0 1; do (cd "$HOSTS/host$host" && HOST=$host bash -c "$command") & done
        wait ;;
    esac
  """,
  )
  fakes.add(
    "python3.13",
    """
    [ "$2" = venv ] || exit 0
    mkdir -p "$3/bin"
    echo "export VIRTUAL_ENV=$PWD/$3" > "$3/bin/activate"
  """,
  )
  fakes.add("python", "")
  fakes.add("mmjax", '[ "$1" = train ] || exit 0; . "$HOSTS/run"')
  return fakes


def ssh_calls(cloud):
  return cloud.calls("gcloud compute tpus tpu-vm ssh")


def read_until(process, words, times):
  while times:
    line = process.stdout.readline()
    assert line, "it ended"
    times -= words in line


def test_a_pod_that_is_ready_is_set_up_and_runs_to_the_end(cloud, tmp_path):
  (tmp_path / "state").write_text("READY")
  (tmp_path / "run").write_text(
    'echo "training on host $HOST as $MMJAX_COORDINATOR with $MMJAX_DATA in $PWD"'
  )
  printed = cloud.run(
    "tpu_vm.sh", "pod", "--zone", "z1", "--project", "p1", "--env", "MMJAX_DATA=/mnt/a b", *TRAIN
  )
  for host in (0, 1):
    assert (
      f"training on host {host} as auto with /mnt/a b in {tmp_path}/host{host}/mmjax" in printed
    )
    assert (tmp_path / f"host{host}/mmjax/launch/restart.sh").exists()
  assert (
    cloud.calls("mmjax train")
    == ["mmjax train --config configs/quickstart.py --workdir runs/a b --config.seed=3"] * 2
  )
  assert all("--zone=z1 --project=p1" in call for call in cloud.calls("gcloud"))
  assert all("--worker=all" in call for call in ssh_calls(cloud))
  assert cloud.calls("python -m pip install")[0].endswith("-e .[tpu]")
  assert not cloud.calls("gcloud compute tpus tpu-vm create") and not list(tmp_path.glob("*.tgz"))


@pytest.mark.parametrize(
  ("queue", "made", "gone"),
  [
    (
      (),
      "tpu-vm create pod --zone=z --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite "
      "--spot",
      "tpu-vm delete pod",
    ),
    (
      ("--queue",),
      "queued-resources create pod --node-id=pod --zone=z --accelerator-type=v5litepod-16 "
      "--runtime-version=v2-alpha-tpuv5-lite --spot",
      "queued-resources delete pod",
    ),
  ],
)
def test_one_that_is_preempted_is_made_again_and_the_run_goes_on(
  cloud, tmp_path, queue, made, gone
):
  (tmp_path / "run").write_text("""
    if [ "$(grep -c -- ' create pod' "$CALLS")" = 1 ]; then
      echo PREEMPTED > "$HOSTS/state"
      rm -rf "$HOSTS/host$HOST"/*
      exit 143
    fi
    echo "second life of host $HOST"
  """)
  printed = cloud.run(
    "tpu_vm.sh", "pod", "--zone", "z", *CREATE, *queue, "--max-restarts", "0", *TRAIN
  )
  assert "pod is PREEMPTED" in printed and "second life of host 1" in printed
  events = [
    call.removeprefix("gcloud compute tpus ")
    for call in cloud.calls("gcloud")
    if " create " in call or " delete " in call
  ]
  assert [event[: len(made)] for event in events[::2]] == [made, made] and events[1].startswith(
    gone
  )


def test_the_exit_code_is_that_of_a_host_that_failed(cloud, tmp_path):
  (tmp_path / "state").write_text("READY")
  (tmp_path / "run").write_text('[ "$HOST" = 0 ] || exit 1')
  printed = cloud.run("tpu_vm.sh", "pod", "--zone", "z", "--max-restarts", "0", *TRAIN, code=1)
  assert "giving up" in printed


def test_a_missing_pod_is_named_when_none_may_be_made(cloud):
  assert "--create TYPE makes one" in cloud.run("tpu_vm.sh", "pod", "--zone", "z", *TRAIN, code=1)
  assert not ssh_calls(cloud)


def test_a_lost_connection_is_followed_again_and_stop_ends_every_host(cloud, tmp_path):
  (tmp_path / "state").write_text("READY")
  (tmp_path / "run").write_text("""
    trap 'echo "host $HOST saved"; exit 75' TERM
    echo "host $HOST is up"
    while :; do sleep 0.1; done
  """)
  first = cloud.start("tpu_vm.sh", "pod", "--zone", "z", *TRAIN, start_new_session=True)
  read_until(first, "is up", times=2)
  os.killpg(first.pid, signal.SIGKILL)
  second = cloud.start("tpu_vm.sh", "pod", "--zone", "z", *TRAIN)
  read_until(second, "is up", times=2)
  cloud.run("tpu_vm.sh", "pod", "--zone", "z", "--stop")
  printed = second.communicate(timeout=60)[0]
  assert second.returncode == 75, printed
  assert len(cloud.calls("mmjax train")) == 2, "the run that went on was started a second time"
