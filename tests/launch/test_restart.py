"""The restart rule: again after 75, after 1 and after a kill, within a limit; a stopped launcher
stops.
"""

import signal
import time

import pytest

TRAIN = ("mmjax", "train", "--config", "some.py", "--config.train.on_restart=2", "--workdir", "w")


def outcomes(fakes, *codes: str) -> None:
  """A fake mmjax whose runs of `train` end one after the other with these; `mmjax config show`
  knows the limit.
  """
  fakes.add(
    "mmjax",
    f"""
    if [ "$1" = config ]; then printf 'train.steps = 9\\ntrain.on_restart = 2\\n'; exit; fi
    codes=({" ".join(codes)})
    eval "${{codes[$(($(grep -c '^mmjax train' "$CALLS") - 1))]}}"
  """,
  )


def runs(fakes) -> int:
  return len(fakes.calls("mmjax train"))


@pytest.mark.parametrize(
  ("codes", "options", "code", "count"),
  [
    (("'exit 0'",), (), 0, 1),
    (("'exit 75'", "'exit 75'", "'exit 75'", "'exit 75'", "'exit 0'"), (), 0, 5),
    (("'exit 75'", "'exit 0'"), ("--keep-75",), 75, 1),
    (("'exit 1'", "'kill -9 $$'", "'exit 75'", "'exit 0'"), (), 0, 4),
    (("'exit 1'", "'exit 75'", "'exit 1'", "'exit 1'", "'exit 0'"), (), 1, 4),
    (("'kill -9 $$'",), ("--max-restarts", "0"), 137, 1),
    (("'exit 2'", "'exit 0'"), (), 2, 1),
    (("'exit 126'", "'exit 0'"), (), 126, 1),
  ],
)
def test_what_is_run_again(fakes, codes, options, code, count):
  outcomes(fakes, *codes)
  fakes.run("restart.sh", *options, "--backoff", "0", "--", *TRAIN, code=code)
  assert runs(fakes) == count


def test_the_limit_is_the_one_of_the_config_with_its_overrides_and_is_asked_once(fakes):
  outcomes(fakes, *["'exit 1'"] * 9)
  assert "2 restarts were allowed" in fakes.run("restart.sh", "--backoff", "0", *TRAIN, code=1)
  assert fakes.calls("mmjax config") == ["mmjax config show some.py --config.train.on_restart=2"]


def test_a_start_that_follows_another_waits_for_it_to_leave_the_run_folder(fakes):
  outcomes(
    fakes,
    *["'echo waits ${MMJAX_OWNER_SECONDS:-not}; exit 75'"] * 2,
    "'echo waits $MMJAX_OWNER_SECONDS'",
  )
  printed = fakes.run("restart.sh", "--backoff", "0", "--", *TRAIN)
  assert [line for line in printed.splitlines() if "waits" in line] == [
    "waits not",
    "waits 300",
    "waits 300",
  ]


def test_waiting_between_failures_doubles(fakes):
  outcomes(fakes, "'exit 1'", "'exit 1'", "'exit 0'")
  begin = time.monotonic()
  printed = fakes.run("restart.sh", "--backoff", "1", *TRAIN)
  assert (
    "restart 1 of 2 in 1 s" in printed
    and "restart 2 of 2 in 2 s" in printed
    and time.monotonic() - begin >= 3
  )


def wait_for(condition) -> None:
  for _ in range(300):
    if condition():
      return
    time.sleep(0.1)
  raise AssertionError("did not happen")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_command_and_ends_the_rule(fakes, number):
  outcomes(
    fakes,
    """'trap "echo asked to stop; exit 75" TERM; touch "$CALLS.up"; while :; do sleep 0.1; done'""",
  )
  process = fakes.start("restart.sh", *TRAIN)
  wait_for(fakes.log.with_suffix(".up").exists)
  process.send_signal(number)
  printed = process.communicate(timeout=30)[0]
  assert process.returncode == 75 and "asked to stop" in printed and runs(fakes) == 1


def test_a_signal_while_waiting_ends_the_rule(fakes):
  outcomes(fakes, "'exit 1'", "'exit 0'")
  process = fakes.start("restart.sh", "--backoff", "60", *TRAIN)
  while "restart 1 of 2" not in process.stdout.readline():
    pass
  time.sleep(0.3)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 1 and runs(fakes) == 1


def test_another_way_to_stop_the_command(fakes):
  outcomes(
    fakes, """'touch "$CALLS.up"; while [ ! -e "$CALLS.stop" ]; do sleep 0.1; done; exit 75'"""
  )
  process = fakes.start("restart.sh", "--stop", 'touch "$CALLS.stop"', *TRAIN)
  wait_for(fakes.log.with_suffix(".up").exists)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75 and runs(fakes) == 1
