"""Generated hostile input for the commands: annotation forms, media, overrides, checkpoints.
fuzz.py says what is checked.

The suite draws 200 of them, `launch/test.sh --all` 2,000. Inputs are a function of the case's
number: a failure names it.
"""

from __future__ import annotations

import csv
import io
import json
import pathlib
import random
import shutil
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mmjax.keys import KEYS
from mmjax.kinds import KINDS
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_video import clip
from tests.data.test_video import encode as film
from tests.e2e import fuzz
from tests.e2e.commands import QUICKSTART
from tests.inference import tiny


def cases(quick: int):
  """The first `quick` cases for the suite, ten times as many for `--all`."""
  slow = pytest.param(range(quick, 10 * quick), id="more", marks=pytest.mark.slow)
  return pytest.mark.parametrize("numbers", [pytest.param(range(quick), id="quick"), slow])


PAYLOAD = "__import__('os').system('touch it_ran')"
STRINGS = (
  "a red heart",
  "",
  " ",
  "\x1b[31mred\x1b[0m",
  "a\x00b",
  "\u202eevil",
  "\ud83d",
  "é" * 300,
  "x" * 70_000,
  '"',
  "'",
  "<b>&amp;",
  "a\tb",
  "a\nb",
  "\r\n",
  "../outside/secret.png",
  "/etc/passwd",
  "/dev/zero",
  "~",
  "a.png",
  "b.jpg",
  "c.wav",
  "d.mp4",
  "gone.png",
  "folder",
  "[1, 2]",
  '{"a": 1}',
  "nan",
  "-1",
  "1e999",
  "true",
  "null",
  PAYLOAD,
  "os:system",
  "日本語",
  "👩‍🌾",
  "%s%n",
  "a;b|c",
)
COLUMNS = (
  "image",
  "file_name",
  "audio",
  "video",
  "caption",
  "text",
  "captions",
  "question",
  "answer",
  "answers",
  "label",
  "id",
  "image_id",
  "question_id",
  "language",
  "caption_0",
  "conversations",
  "messages",
  "annotations",
  "images",
  "x.y",
  "",
)


def picture(draw: random.Random, form: str = "PNG") -> bytes:
  out = io.BytesIO()
  pixels = np.frombuffer(draw.randbytes(12 * 12 * 3), np.uint8).reshape(12, 12, 3)
  Image.fromarray(pixels).save(out, form)
  return out.getvalue()


def media(draw: random.Random) -> dict[str, bytes]:
  """One small valid file of each form."""
  frames = clip(3, 16, 16)
  return {
    **{
      ending: picture(draw, form)
      for ending, form in dict(
        png="PNG", jpg="JPEG", gif="GIF", webp="WEBP", bmp="BMP", tif="TIFF", avif="AVIF"
      ).items()
    },
    "wav": sound(tone(0.05)),
    "flac": sound(tone(0.05), kind="FLAC"),
    "ogg": sound(tone(0.05), kind="OGG"),
    "mp3": sound(tone(0.05), kind="MP3"),
    "mkv": film(frames),
    "mp4": film(frames, "mp4", "mpeg4", "yuv420p"),
  }


MEDIA = media(random.Random(0))


def damaged(draw: random.Random, data: bytes) -> bytes:
  """The bytes with some of them changed, mostly in the header, where sizes stand."""
  data = bytearray(data)
  for _ in range(draw.choice((1, 1, 2, 4))):
    at = draw.randrange(min(len(data), draw.choice((32, 200, 1 << 20)))) if data else 0
    how = draw.randrange(7)
    if how == 0:
      del data[at:]
    elif how == 1:
      data[at : at + 4] = b"\xff\xff\xff\xff"
    elif how == 2:
      data[at : at + 4] = b"\x7f\xff\xff\xff"
    elif how == 3:
      data[at:at] = draw.randbytes(draw.choice((1, 7, 1000)))
    elif how == 4:
      data += draw.randbytes(draw.choice((1, 100)))
    elif how == 5:
      data[at : at + 8] = bytes(8)
    elif at < len(data):
      data[at] ^= 1 << draw.randrange(8)
  return bytes(data)


def value(draw: random.Random, depth: int = 0):
  """A JSON value as a table of strangers may hold it."""
  how = draw.randrange(10 if depth < 3 else 7)
  if how < 5:
    return draw.choice(STRINGS)
  if how == 5:
    return draw.choice((0, 1, -1, 2**63, 2**200, 0.5, float("nan"), float("inf")))
  if how == 6:
    return draw.choice((None, True, False))
  if how < 9:
    return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
  return {
    draw.choice((*COLUMNS, "from", "value", "role", "content", "bytes", "path")): value(
      draw, depth + 1
    )
    for _ in range(draw.randrange(4))
  }


def rows(draw: random.Random) -> list[dict]:
  names = draw.sample(COLUMNS, draw.randrange(1, 6))
  if draw.random() < 0.7:
    names = list(dict.fromkeys(("image", "caption", *names)))
  made = [
    {name: value(draw) for name in names if draw.random() < 0.9}
    for _ in range(draw.randrange(1, 8))
  ]
  for row in made:
    if "image" in row and draw.random() < 0.6:
      row["image"] = draw.choice(("a.png", "b.jpg", "deep/e.png"))
  return made


def as_table(draw: random.Random, table: list[dict], delimiter: str) -> str:
  out = io.StringIO()
  names = list(dict.fromkeys(name for row in table for name in row)) or ["image"]
  quoting = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_NONE, csv.QUOTE_ALL))
  if len(names) == 1:
    quoting = csv.QUOTE_ALL  # the module cannot write one empty cell without quotation marks
  writer = csv.DictWriter(out, names, delimiter=delimiter, quoting=quoting, escapechar="\\")
  writer.writeheader()
  for row in table:
    writer.writerow(
      {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
    )
  return out.getvalue()


def annotations(draw: random.Random, work: pathlib.Path) -> list[str]:
  """A source of annotations in `work`; the words of the command that converts it."""
  for name, ending in (("a", "png"), ("b", "jpg"), ("deep/e", "png"), ("c", "wav"), ("d", "mp4")):
    path = work / "src" / f"{name}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MEDIA[ending])
  table, form = (
    rows(draw),
    draw.choice(("jsonl", "json", "csv", "tsv", "txt", "tar", "parquet", "classes")),
  )
  encoding = draw.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "latin-1"))

  def write(name: str, text: str) -> pathlib.Path:
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    (work / "src" / name).write_bytes(damaged(draw, data) if draw.random() < 0.3 else data)
    return work / "src" / name

  if form == "jsonl":
    return ["jsonl", str(write("t.jsonl", "\n".join(map(json.dumps, table))))]
  if form == "json":
    whole = draw.choice(
      (table, dict(annotations=table, images=rows(draw)), dict(questions=table), table[0])
    )
    return [
      draw.choice(("json", "coco", "vqa", "conversations")),
      str(write("t.json", json.dumps(whole, indent=draw.choice((None, 1))))),
    ]
  if form in ("csv", "tsv"):
    write(f"captions.{form}", as_table(draw, table, "," if form == "csv" else "\t"))
  elif form == "txt":
    for name in ("a", "c", "d", "none"):
      write(f"{name}.{draw.choice(('txt', 'json', 'caption', 'en.txt'))}", str(value(draw)))
  elif form == "classes":
    for n in range(draw.randrange(1, 4)):
      folder = work / "src" / f"class{n}"
      folder.mkdir()
      (folder / draw.choice(("x.png", "y.psd", "\x1b[31m.png", "z.jpg"))).write_bytes(MEDIA["png"])
    return ["folder", str(work / "src")]
  elif form == "tar":
    return ["webdataset", str(as_tar(draw, table, work / "src" / "t.tar"))]
  elif form == "parquet":
    return ["parquet", str(as_parquet(draw, table, work / "src" / "t.parquet"))]
  return ["folder", str(work / "src")]


def as_tar(draw: random.Random, table: list[dict], path: pathlib.Path) -> pathlib.Path:
  with tarfile.open(path, "w") as tar:
    for n, row in enumerate(table):
      key = draw.choice(
        (f"{n:03d}", "same", "../up", "/abs", "a.b", "\x1b[31mx", "d/" * 40 + "deep")
      )
      for ending, data in (
        ("png", MEDIA["png"]),
        ("json", json.dumps(row).encode()),
        ("txt", b"words"),
        ("cls", b"3"),
      ):
        if draw.random() < 0.7:
          info = tarfile.TarInfo(f"{key}.{ending}")
          info.size = len(data)
          if draw.random() < 0.1:
            info.type, info.linkname, info.size = (
              draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
              "/etc/passwd",
              0,
            )
          tar.addfile(info, io.BytesIO(data if info.size else b""))
  if draw.random() < 0.4:
    path.write_bytes(damaged(draw, path.read_bytes()))
  return path


def as_parquet(draw: random.Random, table: list[dict], path: pathlib.Path) -> pathlib.Path:
  import pyarrow as pa
  import pyarrow.parquet as pq

  columns = {}
  for name in dict.fromkeys(name for row in table for name in row):
    cells = [row.get(name) for row in table]
    if name == "image" and draw.random() < 0.7:
      cells = [
        dict(bytes=damaged(draw, MEDIA["png"]) if draw.random() < 0.3 else MEDIA["png"], path=None)
        for _ in cells
      ]
    else:
      cells = [
        json.dumps(cell) if not isinstance(cell, str) else cell.encode("utf-8", "replace").decode()
        for cell in cells
      ]
    columns[name] = pa.array(cells)
  pq.write_table(pa.table(columns), path)
  if draw.random() < 0.4:
    path.write_bytes(damaged(draw, path.read_bytes()))
  return path


def accounted(outcome: fuzz.Outcome) -> None:
  """A conversion that succeeded says how many rows it read, what it made of them, and what it left
  out, by reason.
  """
  summary = json.loads(outcome.out)
  assert summary["rows"] >= summary["examples"] > 0
  assert all(count >= 1 for count in summary["skipped"].values())
  assert set(summary["first_skipped"]) == set(summary["skipped"])


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside" / "secret.png").write_bytes(MEDIA["png"])
  yield tmp_path


def each(numbers: range, folder: pathlib.Path, one: Callable[[pathlib.Path, int], None]) -> None:
  """Runs all cases, then fails with those that failed."""
  failed = []
  for number in numbers:
    try:
      one(fresh(folder, number), number)
    except AssertionError as error:
      failed.append(f"case {number}: {error}"[:2000])
  assert not failed, f"{len(failed)} of {len(numbers)} cases:\n" + "\n\n".join(failed[:20])


def fresh(folder: pathlib.Path, number: int) -> pathlib.Path:
  """A case's own folder, with those of the case before removed."""
  for path in folder.glob("case*"):
    shutil.rmtree(path)
  case = folder / f"case{number}"
  (case / "work").mkdir(parents=True)
  shutil.copytree(folder / "outside", case / "outside")
  return case


@cases(60)
def test_annotations_of_any_form(folder, numbers):
  def one(case, number):
    draw = random.Random(f"annotations {number}")
    words = annotations(draw, case / "work")
    outcome = fuzz.run(case, "data", "convert", *words, "--name", "x", "--workers", "1", "--json")
    if outcome.code == 0:
      accounted(outcome)

  each(numbers, folder, one)


@cases(60)
def test_media_with_damaged_headers(folder, numbers):
  def one(case, number):
    draw = random.Random(f"media {number}")
    source = case / "work" / "src"
    source.mkdir()
    for n, ending in enumerate(draw.sample(sorted(MEDIA), 3)):
      wrong = draw.choice(sorted(MEDIA)) if draw.random() < 0.1 else ending
      (source / f"{n}.{wrong}").write_bytes(damaged(draw, MEDIA[ending]))
      (source / f"{n}.txt").write_text("words")
    outcome = fuzz.run(
      case, "data", "convert", "folder", str(source), "--name", "x", "--workers", "1", "--json"
    )
    if outcome.code == 0:
      summary = json.loads(outcome.out)
      assert summary["examples"] + sum(summary["skipped"].values()) == 3, (number, summary)

  each(numbers, folder, one)


VALUES = (
  "-1",
  "0",
  "1",
  "2",
  "1e999",
  "-1e999",
  "nan",
  "1e-400",
  "99999999999999999999",
  "true",
  "None",
  "''",
  "'x'",
  "()",
  "(1,)",
  "(2,3)",
  "(1,2,3,4,5)",
  "[[1]]",
  "{}",
  "{'a': 1}",
  "0.5",
  "1.5",
  "5%",
  "500%",
  "-5%",
  "2 epochs",
  "1e400 epochs",
  "1e6 examples",
  "(" * 400,
  "[" * 100_000,
  PAYLOAD,
  "os:system",
  "mmjax.config:os",
  "\x1b[31m",
  "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
  "../x",
  "/etc/passwd",
  "vit",
  "b'x'",
  "1j",
  "...",
  "0x10",
  "1_000",
  "lambda: 1",
  "*",
  "(?P<",
  "image",
  "('image',)",
  "('audio',)",
)
PATHS = [key.path for key in KEYS] + [
  "model.encoders.image.depth",
  "model.encoders.text.pooling",
  "optimizer.b2",
  "x",
  "",
  ".",
  "model..x",
  "a.b.c",
]


@cases(60)
def test_overrides_of_any_key_by_anything(folder, numbers):
  kinds = [kind for group in KINDS.values() for kind in group]

  def one(case, number):
    draw = random.Random(f"overrides {number}")
    overrides = []
    for _ in range(draw.choice((1, 1, 2, 3))):
      path = draw.choice(PATHS)
      if draw.random() < 0.2:
        path = draw.choice(
          (
            "model.encoders.image.kind",
            "objectives.align.kind",
            "optimizer.name",
            "schedule.name",
            "model.name",
          )
        )
      path = path.replace(
        "*", draw.choice(("openmoji", "align", "it", "\x1b[31m", "retrieval/combinations"))
      )
      overrides.append(
        f"--config.{path}={draw.choice((*VALUES, draw.choice(kinds)))}".replace("\x00", "")
      )
    fuzz.run(case, "config", "show", QUICKSTART, "--docs", *overrides)

  each(numbers, folder, one)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  root = tmp_path_factory.mktemp("model")
  return tiny.save(tiny.config(), root)


@cases(20)
def test_checkpoints_that_were_damaged_or_forged(folder, numbers, checkpoint):
  def one(case, number):
    draw = random.Random(f"checkpoint {number}")
    theirs = case / "work" / "theirs"
    shutil.copytree(checkpoint, theirs)
    for _ in range(draw.choice((1, 1, 2))):
      spoil(draw, theirs)
    if draw.random() < 0.7:
      sign(theirs)
    fuzz.run(
      case,
      "export",
      "--checkpoint",
      "theirs",
      "--to",
      "safetensors",
      "--out",
      str(case / "out" / "exported"),
    )

  each(numbers, folder, one)


def spoil(draw: random.Random, theirs: pathlib.Path) -> None:
  files = sorted(
    path for path in theirs.rglob("*") if path.is_file() and path.name != "manifest.json"
  )
  path = draw.choice(files)
  config = theirs / "config" / "metadata"
  how = draw.randrange(5)
  if how in (2, 3) and not is_json(config):
    how = 4  # it is spoilt already
  if how == 0:
    path.write_bytes(damaged(draw, path.read_bytes()))
  elif how == 1:
    path.unlink()
  elif how == 2:
    tree = json.loads(config.read_text())
    node = tree
    while isinstance(node, dict) and node:
      name = draw.choice(sorted(node))
      if not isinstance(node[name], dict) or not node[name] or draw.random() < 0.2:
        node[name] = value(draw)
        break
      node = node[name]
    config.write_text(json.dumps(tree))
  elif how == 3:
    tree = json.loads(config.read_text())
    kind = draw.choice(
      (
        "theirs.layers:vit",
        "os:system",
        "mmjax.config:os",
        "posix:abort",
        "../x:y",
        "mmjax.cli:main",
      )
    )
    draw.choice(
      (tree["model"]["encoders"]["image"], tree["objectives"].get("align", {}), tree["optimizer"])
    )["kind"] = kind
    (theirs / "layers.py").write_text(
      "open('it_ran', 'w')\nfrom mmjax.models.encoders.image import vit\n"
    )
    config.write_text(json.dumps(tree))
  else:
    path.write_bytes(
      draw.choice(
        (b"", b"{}", b"[]", b"null", draw.randbytes(100), b"[" * 100_000, b'{"a":' * 50_000)
      )
    )


def is_json(path: pathlib.Path) -> bool:
  try:
    json.loads(path.read_bytes())
  except (OSError, ValueError):
    return False
  return True


def sign(theirs: pathlib.Path) -> None:
  """A manifest that fits the files, as a forger would write it."""
  path = theirs / "manifest.json"
  content = json.loads(path.read_text())["content"]
  files = {name: theirs / name for name in content["files"] if (theirs / name).is_file()}
  content["files"] = {
    name: [len(file.read_bytes()), zlib.crc32(file.read_bytes())] for name, file in files.items()
  }
  crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
  path.write_text(json.dumps({"crc32": crc, "content": content}))
