"""Pipes, sockets, devices and endless patterns among the data: left out and named, and nothing
waits for them.
"""

from __future__ import annotations

import errno
import io
import os
import socket

import numpy as np
import pytest
from PIL import Image

from mmjax import files
from mmjax.config import UserError
from mmjax.data.builders.convert import convert
from mmjax.data.tars import TarSource, expand
from tests.data.test_tars import pairs, write_tar

pytestmark = pytest.mark.usefixtures("in_time")


def specials(folder):
  """{name: what} of files that are none, made in `folder` with endings of pictures."""
  os.mkfifo(folder / "pipe.png")
  (folder / "null.png").symlink_to("/dev/zero")
  (folder / "loop.png").symlink_to("loop.png")
  with socket.socket(socket.AF_UNIX) as server:
    before = os.getcwd()
    os.chdir(folder)  # the path of a socket is short
    try:
      server.bind("socket.png")
    finally:
      os.chdir(before)
  return ("pipe.png", "null.png", "loop.png", "socket.png")


def picture(path):
  out = io.BytesIO()
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "PNG")
  path.write_bytes(out.getvalue())


def test_only_regular_files_are_read(tmp_path):
  (tmp_path / "file").write_bytes(b"content")
  (tmp_path / "link").symlink_to("file")
  assert files.read_file(tmp_path / "link") == b"content"
  for name in (*specials(tmp_path), "gone", "."):
    with pytest.raises(OSError):
      files.read_file(tmp_path / name)
  with open(tmp_path / "sparse", "wb") as file:
    file.truncate(1 << 40)
  with pytest.raises(OSError, match="more than 2047 MiB") as error:
    files.read_file(tmp_path / "sparse")
  assert error.value.errno == errno.EFBIG


def test_a_folder_with_pipes_and_devices(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  names = specials(root)
  for name in (*names, "good.png"):
    (root / name).with_suffix(".txt").write_text("a caption\n")
  picture(root / "good.png")
  os.mkfifo(root / "words.txt")
  picture(root / "words.png")
  summary = convert("folder", root, "mine", tmp_path / "data", log=lambda line: None)
  assert summary.examples == 1 and sum(summary.skipped.values()) == len(names) + 1
  assert {"pipe.png", "socket.png"} <= {
    name for names in summary.first_skipped.values() for name in names
  }


def test_a_table_or_a_tar_that_is_a_pipe(tmp_path):
  os.mkfifo(tmp_path / "rows.jsonl")
  os.mkfifo(tmp_path / "a.tar")
  os.mkfifo(tmp_path / "a.parquet")
  for format, name in (("jsonl", "rows.jsonl"), ("webdataset", "a.tar"), ("parquet", "a.parquet")):
    with pytest.raises(UserError, match="not a regular file"):
      convert(format, tmp_path / name, "mine", tmp_path / "data", log=lambda line: None)
  write_tar(tmp_path / "b.tar", pairs(0, 2))
  assert len(TarSource(tmp_path / "{a,b}.tar", data_dir=tmp_path / "data")) == 2


@pytest.mark.parametrize(
  "pattern",
  [
    "{0..1000000000}.tar",
    "{0..999999}{0..999999}.tar",
    "{{0..9999},{0..9999}}{0..9999}.tar",
    "{a,b}" * 30 + ".tar",
    "{a,b}" * 3000 + ".tar",
  ],
)
def test_a_pattern_of_too_many_names(pattern):
  with pytest.raises(UserError, match="names more than 1,000,000 files"):
    expand(pattern)


def test_numbers_of_a_pattern_stay_short():
  with pytest.raises(UserError, match="cannot read"):
    expand(f"{{{'0' * 5000}..1}}.tar")
