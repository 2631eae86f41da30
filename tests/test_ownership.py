"""A folder has one owner: the living are left alone, the dead give way, and who was taken over
finds out."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from mmjax import files, ownership
from mmjax.config import UserError
from mmjax.ownership import Owner

HOLD = (
  "import sys\nfrom mmjax.ownership import Owner\n"
  "with Owner(sys.argv[1], 'RUN'):\n  print('owns', flush=True)\n  sys.stdin.read()\n"
)


@pytest.fixture
def quick(monkeypatch):
  """Signs of life and the patience with them, a hundred times faster."""
  monkeypatch.setattr(ownership, "_BEAT", 0.05)
  monkeypatch.setattr(ownership, "_LEASE", 0.6)
  monkeypatch.setattr(ownership, "_SETTLE", 0.2)


@pytest.fixture
def holder(tmp_path):
  """Another process that owns tmp_path."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "owns\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def elsewhere(folder, number=1, **claim):
  """A claim made on a machine whose processes cannot be seen from here."""
  place = files.as_path(folder) / ownership.FOLDER
  files.make_folder(place)
  facts = (
    dict(
      machine="of another",
      host="far",
      pid=7,
      process_start="1",
      started="yesterday",
      token="theirs",
    )
    | claim
  )
  (place / f"{number}.json").write_text(json.dumps(facts))
  return place / f"{number}.beat"


def test_one_that_lives_is_left_alone_also_stopped_and_one_that_was_killed_gives_way(
  tmp_path, holder
):
  refused = (
    f"RUN is in use by process {holder.pid} on host .*, started 20.*Wait for that process or end it"
  )
  with pytest.raises(UserError, match=refused):
    Owner(tmp_path, "RUN")
  holder.send_signal(signal.SIGSTOP)
  with pytest.raises(UserError, match=refused):
    Owner(tmp_path, "RUN")
  holder.kill()
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but its end is not yet collected
  with Owner(tmp_path, "RUN") as owner:
    owner.check()


def test_one_that_ends_is_waited_for(tmp_path, holder):
  threading.Timer(0.5, holder.stdin.close).start()
  with Owner(tmp_path, "RUN", wait=60), pytest.raises(UserError, match="still after 1 s"):
    Owner(tmp_path, "RUN", wait=1)
  with pytest.raises(UserError, match="in use"), Owner(tmp_path, "RUN"):
    Owner(tmp_path, "RUN", wait=60, stopped=lambda: True)


def test_a_folder_that_was_made_for_nothing_vanishes(tmp_path):
  made, kept, own = (tmp_path / name for name in ("made", "kept", "own"))
  own.mkdir()
  with pytest.raises(UserError, match="a mistake"), Owner(made, "RUN"):
    raise UserError("a mistake")
  with Owner(kept, "RUN"):
    (kept / "config.json").write_text("{}")
  with Owner(own, "RUN"):
    pass
  assert not made.exists() and (kept / "owner" / "1.beat").read_text() == "ended"
  assert own.exists()  # somebody made it before
  with Owner(made, "RUN"):  # and the name can be used again
    (made / "config.json").write_text("{}")
  assert (made / "config.json").exists()


def test_who_waits_for_an_owner_that_leaves_nothing_gets_the_folder(tmp_path):
  folder, got = tmp_path / "run", []

  def second():
    with Owner(folder, "RUN", wait=60):
      got.append(sorted(path.name for path in (folder / "owner").iterdir()))
      (folder / "config.json").write_text("{}")

  with Owner(folder, "RUN"):
    waiter = threading.Thread(target=second)
    waiter.start()
    waiter.join(0.3)
    assert not got
  waiter.join(30)
  assert len(got) == 1 and {"json", "beat"} == {name.partition(".")[2] for name in got[0]}
  assert (folder / "config.json").exists()


def test_a_process_number_that_is_used_again_deceives_nobody(tmp_path):
  elsewhere(tmp_path, **dict(ownership._myself(), process_start="long ago"))
  with Owner(tmp_path, "RUN") as owner:
    owner.check()
  assert [path.name for path in sorted((tmp_path / "owner").iterdir())] == ["2.beat", "2.json"]


@pytest.mark.parametrize("place", ["disk", "store"])
def test_an_owner_elsewhere_is_known_by_its_signs_of_life(tmp_path, quick, request, place):
  folder = tmp_path
  if place == "store":
    request.getfixturevalue("object_store")
    folder = "s3://bucket/owned"
  beat = elsewhere(folder)
  over = threading.Event()

  def live():
    count = 0
    while not over.wait(0.05):
      count += 1
      beat.write_text(str(count))

  thread = threading.Thread(target=live)
  thread.start()
  with pytest.raises(UserError, match="in use by process 7 on host far, started yesterday"):
    Owner(folder, "RUN")
  over.set()
  thread.join()
  with Owner(folder, "RUN") as owner:  # it has been silent for long enough
    owner.check()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
      Owner(folder, "RUN")
    elsewhere(folder, number=3)  # this process was stopped meanwhile, and somebody took over
    with pytest.raises(
      UserError, match="RUN was taken over by process 7 on host far.*writes nothing more"
    ):
      owner.check()
    with pytest.raises(UserError, match="taken over"):
      owner.check_known()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_start_at_once_over_a_dead_claim_one_wins(tmp_path, quick, monkeypatch, links):
  def no_links(*_):
    raise OSError("not supported")

  if not links:
    monkeypatch.setattr(os, "link", no_links)
  elsewhere(tmp_path)
  gate, owners, refused = threading.Barrier(8), [], []

  def begin():
    gate.wait()
    try:
      owners.append(Owner(tmp_path, "RUN"))
    except UserError as error:
      refused.append(str(error))

  threads = [threading.Thread(target=begin) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(owners) == 1 and len(refused) == 7
  owners[0].check()
  owners[0].__exit__()


def test_a_claim_that_somebody_deletes_is_made_again(tmp_path):
  with Owner(tmp_path / "run", "RUN") as owner:
    for path in (tmp_path / "run" / "owner").iterdir():
      path.unlink()
    (tmp_path / "run" / "owner").rmdir()
    owner.check()
    with pytest.raises(UserError, match="in use"):
      Owner(tmp_path / "run", "RUN")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="RUN cannot be written: .* is no folder"):
    Owner(tmp_path / "file", "RUN")


HOSTILE = {
  "empty": "",
  "no JSON": "{",
  "a list": "[]",
  "deep": "[" * 100_000,
  "long": "9" * 1_000_000,
  "no process": json.dumps({**ownership._myself(), "pid": None}),
  "no start": json.dumps(
    {k: v for k, v in ownership._myself().items() if k not in ("process_start", "pid")}
  ),
  "a path": json.dumps({**ownership._myself(), "pid": "../../etc/passwd"}),
  "another time": json.dumps(dict(host="\x1b[31mh\u202e", machine="z", pid=1, started="2999")),
  "binary": "\xff\x00",
}


@pytest.mark.parametrize("name", [*HOSTILE, "pipe", "folder", "loop", "²"])
def test_claims_that_no_owner_has_written_give_way(name, tmp_path, monkeypatch, caplog, in_time):
  monkeypatch.setattr(ownership, "_LEASE", 0.2)
  claim = tmp_path / "owner" / ("²٣.json" if name == "²" else "1.json")
  claim.parent.mkdir()
  if name in HOSTILE:
    claim.write_bytes(HOSTILE[name].encode("utf-8"))
  elif name == "pipe":
    os.mkfifo(claim)
  elif name == "folder":
    claim.mkdir()
  else:
    claim.symlink_to(claim.name)
  if name != "²":
    (claim.parent / "1.beat").mkdir()
  with Owner(tmp_path, "RUN"):
    pass
  assert "\x1b" not in caplog.text and "\u202e" not in caplog.text
