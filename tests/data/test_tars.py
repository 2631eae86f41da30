"""Tars read in place, against the tarfile module; hostile and broken ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.config import UserError
from mmjax.data import tars
from mmjax.data.media import bytes_key
from mmjax.data.sources import open_source
from mmjax.data.tars import TarSource, expand, index_tar
from mmjax.errors import StoreError


def jpeg(number: int) -> bytes:
  out = io.BytesIO()
  Image.new("RGB", (8, 8), (number * 7 % 256, number % 256, 99)).save(out, "JPEG")
  return out.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
  """members: [(name, bytes or TarInfo)]"""
  with tarfile.open(path, "w", format=format) as tar:
    for name, content in members:
      if isinstance(content, tarfile.TarInfo):
        tar.addfile(content)
      else:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  return str(path)


def pairs(start, count):
  members = []
  for n in range(start, start + count):
    facts = json.dumps(
      dict(caption=f"caption {n}", url="http://x/y.jpg", key=f"{n:09d}", status="success")
    ).encode()
    members += [
      (f"{n:09d}.jpg", jpeg(n)),
      (f"{n:09d}.txt", f"caption {n}".encode()),
      (f"{n:09d}.json", facts),
    ]
  return members


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "cache"))
  return tmp_path / "cache"


def test_examples_of_several_tars(tmp_path):
  for shard in range(3):
    write_tar(tmp_path / f"{shard:05d}.tar", pairs(shard * 10, 5))
  source = open_source(
    dict(name="tars", path=str(tmp_path / "{00000..00002}.tar"), languages=("en",))
  )
  assert len(source) == 15 and source.languages == ("en",) and source.labels == ()
  for index, number in enumerate([*range(5), *range(10, 15), *range(20, 25)]):
    record = source[index]
    assert record["id"] == f"{number // 10:05d}/{number:09d}"
    assert record["image"] == jpeg(number) and record["captions"] == {"en": [f"caption {number}"]}
    assert record["image_key"] == bytes_key(jpeg(number))
  with pytest.raises(IndexError):
    source[15]
  again = pickle.loads(pickle.dumps(source))  # what a data worker gets
  assert again[7] == source[7] and again.fingerprint == source.fingerprint


names = st.text(
  st.characters(codec="utf-8", exclude_characters="/.\0", exclude_categories=("Cs", "Cc")),
  min_size=1,
  max_size=120,
)


@settings(max_examples=40, deadline=None)
@given(
  keys=st.lists(names, min_size=1, max_size=8, unique=True),
  sizes=st.lists(st.integers(0, 3000), min_size=8, max_size=8),
  format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_index_equals_what_tarfile_lists(tmp_path_factory, keys, sizes, format):
  folder = tmp_path_factory.mktemp("tar")
  members = []
  for key, size in zip(keys, sizes, strict=False):
    members += [(f"{key}.png", os.urandom(size)), (f"{key}.txt", b"a caption")]
  path = write_tar(folder / "x.tar", members, format)
  index = index_tar(path, folder)
  with tarfile.open(path) as tar:
    for row, key in enumerate(index.keys):
      for column, kind in ((0, "png"), (1, "txt")):
        member = tar.getmember(f"{key}.{kind}")
        assert index.extents[row, column].tolist() == [member.offset_data, member.size]
      assert index.read(row)["image"] == tar.extractfile(f"{key}.png").read()
  assert sorted(index.keys.tolist()) == sorted(keys) and not index.skipped


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path, monkeypatch, data_dir):
  path = write_tar(tmp_path / "a.tar", pairs(0, 3))
  index_tar(path)
  scans = []
  scan = tars._scan
  monkeypatch.setattr(tars, "_scan", lambda *a: scans.append(1) or scan(*a))
  assert len(index_tar(path)) == 3 and not scans
  write_tar(tmp_path / "a.tar", pairs(0, 4))
  assert len(index_tar(path)) == 4 and len(scans) == 1
  kept = list((data_dir / "tar_index").iterdir())
  assert len(kept) == 1  # nothing half-written stays
  kept[0].write_bytes(kept[0].read_bytes()[:100])
  assert len(index_tar(path)) == 4 and len(scans) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, data_dir):
  data_dir.mkdir()
  (data_dir / "tar_index").write_text("a file where the folder should be")
  assert len(index_tar(write_tar(tmp_path / "a.tar", pairs(0, 2)))) == 2


def test_nothing_dangerous_is_read_and_nothing_is_written(tmp_path):
  link, device = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("device.jpg")
  link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
  hostile = [
    ("../evil.jpg", jpeg(1)),
    ("../evil.txt", b"x"),
    ("/abs.jpg", jpeg(1)),
    ("/abs.txt", b"x"),
    ("a/../../b.jpg", jpeg(1)),
    ("link.jpg", link),
    ("link.txt", b"x"),
    ("device.jpg", device),
    ("p.pickle", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."),
    ("q.pyd", b"x"),
    ("r.pkl", b"x"),
  ]
  path = write_tar(tmp_path / "a.tar", hostile + pairs(0, 1))
  before = sorted(os.listdir(tmp_path))
  source = TarSource(path, ("en",), tmp_path / "elsewhere")
  assert len(source) == 1 and source[0]["id"] == "a/000000000"
  assert source.skipped == {"unsafe name": 5, "link or device": 2, "pickle": 3, "missing file": 1}
  assert sorted(os.listdir(tmp_path)) == sorted([*before, "elsewhere"])


@pytest.mark.parametrize(
  "content", [b"", b"no tar at all" * 100, b"\0" * 10240, b"\x1f\x8b" + b"x" * 600]
)
def test_what_is_no_tar_is_named(tmp_path, content):
  (tmp_path / "a.tar").write_bytes(content)
  with pytest.raises(UserError, match="a.tar") as error:
    TarSource(tmp_path / "a.tar")
  assert "\n" not in str(error.value)


def test_a_tar_without_pairs_is_named(tmp_path):
  write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("2.txt", b"x"), ("3.dat", b"x")])
  with pytest.raises(UserError, match="a.tar: no pair.*1 no caption"):
    TarSource(tmp_path / "a.tar")


def test_one_bad_tar_among_good_ones_is_left_out_and_counted(tmp_path, caplog):
  write_tar(tmp_path / "0.tar", pairs(0, 2))
  (tmp_path / "1.tar").write_bytes(b"")
  source = TarSource(str(tmp_path / "*.tar"))
  assert len(source) == 2 and source.skipped == {"tar without pairs": 1}
  assert "1.tar" in caplog.text


def test_of_a_truncated_tar_the_whole_part_is_read(tmp_path):
  path = write_tar(tmp_path / "a.tar", pairs(0, 5))
  whole = open(path, "rb").read()
  with tarfile.open(path) as tar:
    at = tar.getmember("000000003.jpg").offset_data + 100
  open(path, "wb").write(whole[:at])
  source = TarSource(path)
  assert len(source) == 3 and source.skipped["truncated tar"] >= 1
  assert source[2]["image"] == jpeg(2)


def test_what_follows_a_broken_header_or_another_tar_is_not_dropped_in_silence(tmp_path):
  path = write_tar(tmp_path / "a.tar", pairs(0, 5))
  whole = open(path, "rb").read()
  with tarfile.open(path) as tar:
    header = tar.getmember("000000003.jpg").offset
  for content, count, skipped in (
    (whole, 5, {}),
    (whole[: header + 200], 3, {"truncated tar": 1}),
    (whole[: header + 100] + b"\xff" * 100 + whole[header + 200 :], 3, {"truncated tar": 1}),
    (whole + b"no header " * 300, 5, {"truncated tar": 1}),
    (whole + open(write_tar(tmp_path / "b.tar", pairs(5, 3)), "rb").read(), 8, {}),
    (whole + bytes(3 << 20), 5, {}),
  ):
    open(path, "wb").write(content)
    source = TarSource(path)
    assert (len(source), source.skipped) == (count, skipped)
    assert source[count - 1]["image"] == jpeg(count - 1)


def test_a_tar_that_shrinks_under_us_gives_an_error_not_garbage(tmp_path):
  path = write_tar(tmp_path / "a.tar", pairs(0, 5))
  source = TarSource(path)
  os.truncate(path, 1500)
  with pytest.raises(StoreError, match="a.tar went away .*4 is cut short"):
    source[4]
  os.unlink(path)
  with pytest.raises(StoreError, match="a.tar went away .*No such file"):
    source[0]


def test_captions_by_language(tmp_path):
  both = json.dumps(dict(captions={"en": "a cat", "de": ["eine Katze", " "], "fr": ""})).encode()
  path = write_tar(
    tmp_path / "a.tar",
    [
      ("1.png", jpeg(1)),
      ("1.json", both),
      ("2.png", jpeg(2)),
      ("2.txt", b"ein Hund"),
      ("3.png", jpeg(3)),
      ("3.txt", b"  "),
      ("4.png", jpeg(4)),
      ("4.json", b'{"caption": "four"}'),
      ("5.png", jpeg(5)),
      ("5.json", b"[not json"),
      ("6.png", jpeg(6)),
      ("6.txt", b"\xff\xfe"),
    ],
  )
  everything, german = TarSource(path), TarSource(path, ("de",))
  assert everything[0]["captions"] == {"en": ["a cat"], "de": ["eine Katze"]}
  assert german[0]["captions"] == {"de": ["eine Katze"]} and german[1]["captions"] == {
    "de": ["ein Hund"]
  }
  assert everything[3]["captions"] == {"en": ["four"]}
  for row, what in ((2, "no caption"), (4, "broken"), (5, "broken")):
    with pytest.raises(UserError, match=what):
      everything[row]


def test_patterns(tmp_path):
  for name in ("a-00.tar", "a-01.tar", "b-00.tar", "c.txt"):
    (tmp_path / name).write_bytes(b"")

  def base(files):
    return [os.path.basename(file) for file in files]

  assert base(expand(tmp_path / "{a,b}-{00..00}.tar")) == ["a-00.tar", "b-00.tar"]
  assert base(expand(tmp_path / "a-{00..01}.tar")) == ["a-00.tar", "a-01.tar"]
  assert base(expand(tmp_path)) == ["a-00.tar", "a-01.tar", "b-00.tar"]
  assert base(expand(str(tmp_path / "?-00.tar"))) == ["a-00.tar", "b-00.tar"]
  for missing in ("x.tar", "a-{00..02}.tar", "{x}.tar"):
    with pytest.raises(UserError):
      expand(tmp_path / missing)


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
  (tmp_path / "x").mkdir()
  a, b = (
    write_tar(tmp_path / "a.tar", pairs(0, 3)),
    write_tar(tmp_path / "x" / "a.tar", pairs(0, 3)),
  )
  assert TarSource(a).fingerprint == TarSource(b).fingerprint
  write_tar(tmp_path / "x" / "a.tar", pairs(1, 3))
  assert TarSource(a).fingerprint != TarSource(b).fingerprint
  assert np.array_equal(index_tar(a).extents, index_tar(b).extents)
