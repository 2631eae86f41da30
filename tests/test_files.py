"""Files of a run that are copied to an object store, and data that is copied from one."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmjax import files, remote
from mmjax.config import UserError
from mmjax.files import disk_errors


def test_a_mirror_of_a_folder_is_the_folder(tmp_path):
  with remote.Mirror(tmp_path) as mirror:
    mirror.fetch("a")
    assert mirror.folder == mirror.place == tmp_path
    mirror.upload()
  assert list(tmp_path.iterdir()) == []


def test_a_mirror_copies_what_changed_and_goes_on_with_what_was_there(object_store):
  url = "s3://bucket/mirror/run"
  with remote.Mirror(url) as mirror:
    mirror.fetch("metrics.jsonl")
    (mirror.folder / "metrics.jsonl").write_text("1\n")
    (mirror.folder / "metrics.jsonl.tmp").write_text("half")
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events").write_bytes(b"\0")
    mirror.upload()
    assert files.sizes(url) == {"metrics.jsonl": 2, "tensorboard/events": 1}
    (mirror.folder / "metrics.jsonl").write_text("1\n2\n")
  assert (files.as_path(url) / "metrics.jsonl").read_text() == "1\n2\n"
  assert not mirror.folder.exists()
  with remote.Mirror(url) as mirror:
    mirror.fetch("metrics.jsonl", "eval.json")
    assert (mirror.folder / "metrics.jsonl").read_text() == "1\n2\n" and not (
      mirror.folder / "eval.json"
    ).exists()
    assert mirror.name(mirror.folder / "eval.json") == url + "/eval.json"


def test_mirrors_of_one_place_leave_each_other_alone(object_store):
  url = "s3://bucket/shared/run"
  with remote.Mirror(url) as run:
    run.fetch()
    (run.folder / "metrics.jsonl").write_text("1\n")
    run.upload()
    with remote.Mirror(url) as evaluation:
      evaluation.fetch("metrics.jsonl")
      (evaluation.folder / "eval.json").write_text("{}")
    assert (run.folder / "metrics.jsonl").read_text() == "1\n"
    run.fetch("eval.json")
    assert (run.folder / "eval.json").read_text() == "{}"
  assert files.sizes(url) == {"eval.json": 2, "metrics.jsonl": 2}


def test_what_a_killed_mirror_left_goes_with_the_next(object_store, tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))
  code = (
    "import os, signal\nfrom mmjax import "
    "remote\nremote.Mirror('s3://bucket/killed/run').fetch()\nos.kill(os.getpid(), signal.SIGKILL)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
  (left,) = (tmp_path / "runs").glob("*/*/run")
  with remote.Mirror("s3://bucket/killed/run") as mirror:
    mirror.fetch()
    assert mirror.folder.is_dir() and not left.exists()


def test_a_mirror_uploads_by_itself(object_store, monkeypatch):
  monkeypatch.setattr(remote, "_SECONDS", 0.05)
  with remote.Mirror("s3://bucket/often/run") as mirror:
    mirror.fetch()
    (mirror.folder / "goodput.json").write_text("{}")
    for _ in range(200):
      if files.sizes("s3://bucket/often"):
        break
      mirror._over.wait(0.05)
    assert files.sizes("s3://bucket/often") == {"run/goodput.json": 2}


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_store(object_store):
  with pytest.raises(ZeroDivisionError), remote.Mirror("s3://nobody/run") as mirror:
    mirror.fetch()
    (mirror.folder / "a").write_text("")
    raise ZeroDivisionError
  told = pytest.raises(
    UserError, match="s3://nobody/run cannot be written: The specified bucket does not exist"
  )
  with told, remote.Mirror("s3://nobody/run") as mirror:
    mirror.fetch()
    (mirror.folder / "a").write_text("")


def test_data_is_copied_once_and_again_when_it_changes(object_store, monkeypatch):
  url = files.as_path("s3://bucket/brought/data")
  (url / "set" / "1.0.0" / "a").write_bytes(b"one")
  root = remote.cached(str(url))
  assert remote.origin(root / "set") == url / "set" and remote.origin("/tmp") is None
  first = remote.bring(root / "set")
  assert first.name == "set" and (first / "1.0.0" / "a").read_bytes() == b"one"
  (first / "mark").touch()
  assert remote.bring(root / "set") == first and (first / "mark").exists()
  (url / "set" / "1.0.0" / "a").write_bytes(b"two")
  second = remote.bring(root / "set")
  assert (second / "1.0.0" / "a").read_bytes() == b"two"
  assert (first / "1.0.0" / "a").read_bytes() == b"one"  # somebody may be reading it
  assert not remote.bring(root / "absent").exists()
  with pytest.raises(UserError, match="no such kind of store"):
    remote.cached("hdfs://a/b")


@pytest.mark.parametrize("errors", [files.store_errors, disk_errors])
def test_only_the_store_of_a_url_is_blamed_and_only_for_its_own_errors(errors, tmp_path):
  def told(error, place, what="http://docs cannot be written"):
    with pytest.raises(Exception) as raised, errors(place, what):
      raise error
    return raised.value

  refused = files.StoreError("s3://bucket/run/a cannot be read: Forbidden", "Forbidden")
  assert str(told(refused, "s3://bucket/run")) == "http://docs cannot be written: Forbidden"  # once
  assert str(pickle.loads(pickle.dumps(refused))) == str(refused)  # data workers send it
  assert "http://docs cannot be written: Forbidden. Check the bucket's name" in str(
    told(PermissionError("Forbidden"), "s3://bucket/run")
  )
  for mistake in (TypeError("x"), MemoryError(), KeyError("x")):
    assert told(mistake, "s3://bucket/run") is mistake
  assert "bucket" not in str(told(PermissionError(13, "Permission denied"), tmp_path))


def test_where_a_file_can_go_is_known_before_it_is_written(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("old")
  (tmp_path / "folder").mkdir()
  for place, folder, words in (
    (tmp_path / "folder", False, "is a folder. Give a file name"),
    (tmp_path / "file" / "x.csv", False, "file is no folder"),
    (tmp_path / "file" / "deep" / "x.csv", False, "file is no folder"),
    (tmp_path / "file", True, "file is no folder"),
  ):
    with pytest.raises(UserError, match=words):
      files.check_output(place, folder=folder)
  for place in ("file", "new.csv", "no/folder/yet/x.csv"):
    files.check_output(tmp_path / place)
  for place in ("folder", "new", "no/folder/yet"):
    files.check_output(tmp_path / place, folder=True)
  files.check_output("s3://bucket/run", folder=True)
  monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
  for place, folder in (("x.csv", False), ("new", True), ("no/folder/yet", True)):
    with pytest.raises(UserError, match=f"you may not write in {tmp_path}"):
      files.check_output(tmp_path / place, folder=folder)


def test_what_belongs_to_others_in_a_folder_for_all_is_not_replaced(tmp_path, monkeypatch):
  (tmp_path / "theirs.csv").write_text("")
  tmp_path.chmod(0o1777)
  files.check_output(tmp_path / "theirs.csv")
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(UserError, match="belongs to somebody else"):
    files.check_output(tmp_path / "theirs.csv")
  files.check_output(tmp_path / "mine.csv")


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path, in_time):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  files.check_output(pipe)
  with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as end:
    files.write_output(pipe, "text")
    assert end.read() == b"text"
  assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
  files.write_whole(pipe, "text")  # a file of a run folder is a file
  assert pipe.read_text() == "text" and not pipe.is_fifo()


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
  for name in ("a.png", "closed/b.png", "open/c.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  closed = close(monkeypatch, tmp_path / "closed")
  found, unread = files.files_below(tmp_path)
  assert [path.name for path in found] == ["a.png", "c.png"]
  assert unread == [(closed, "Permission denied")]
  close(monkeypatch, tmp_path)
  with pytest.raises(UserError, match=rf"{tmp_path} cannot be read \(Permission denied\)"):
    files.files_below(tmp_path)


def close(monkeypatch, folder: Path) -> Path:
  """Makes as if this process may not list `folder`; also where root runs the tests."""
  listed = os.scandir

  def scandir(path="."):
    if Path(os.fspath(path)) == folder:
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return listed(path)

  monkeypatch.setattr(os, "scandir", scandir)
  return folder


def test_files_that_do_not_know_their_size_are_read_within_bounds(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_GROWTH", 1000)
  assert files.read_file("/proc/self/cmdline")
  with pytest.raises(OSError, match="more than 0 MiB"):
    files.read_file("/proc/self/pagemap")
  ours, theirs = socket.socketpair()
  monkeypatch.setattr(files, "open_file", lambda path: open(os.dup(ours.fileno()), "rb"))
  with ours, theirs:
    ours.setblocking(False)
    with pytest.raises(OSError, match="nothing to read"):  # as /proc/kmsg of an idle machine
      files.read_file("/proc/kmsg")


@pytest.mark.parametrize("path", ["~", "~/data", "~nobody_here/data"])
def test_a_home_that_nobody_has_is_named(path, monkeypatch):
  monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and no such user
  with pytest.raises(UserError, match="no home folder is known for ~"):
    files.local_path(path)
  with pytest.raises(UserError, match="no home folder is known for ~"):
    files.as_path(path)
