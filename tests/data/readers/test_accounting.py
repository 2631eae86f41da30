"""Whatever a source holds: what is read and what is left out add up to all of it, and nothing else
than UserError comes out.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers import open_reader
from mmjax.data.readers.cells import Skip, broken_text
from tests.data.test_convert import picture
from tests.data.test_tars import write_tar
from tests.test_files import close

PICTURE = picture(1)
FILES = ("0.png", "1.png", "gone.png", "", "../0.png", "0.png\0", "no ending", "caf\udce9.png")
words = st.text(st.sampled_from("ab \"',;|\té\U0001f600\ud83d{[\\<"), max_size=8)
lines = st.text(st.sampled_from("ab \"',;|\té\n\r"), max_size=8)
labels = st.one_of(
  st.none(),
  st.sampled_from(["", "-1", "cat"]),
  st.integers(-1, 2),
  st.floats(),
  st.lists(st.sampled_from("ab"), max_size=2),
  st.just({}),
)
few = st.integers(0, 3)


def often(**drawn):
  """A test of what is drawn with 25 examples, and with 400 among the slow ones."""

  def decorate(test):
    def run(count):
      quick = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
      quick(given(**drawn)(test))()

    return pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.slow)])(run)

  return decorate


def folder():
  root = tempfile.TemporaryDirectory()
  for name in FILES[:2]:
    (Path(root.name) / name).write_bytes(PICTURE)
  return root


def account(format, path, **options):
  """(ids read, [(name, reason)] left out, rows in all); checks that what is listed is what is
  read.
  """
  reader = open_reader(format, path, **options)
  rows, left = reader.rows()
  read, gone, count = [], [(name, skip.reason) for name, skip in left], len(left)
  told = Counter()
  for name, outcome, joined in reader.read(rows):
    told[name] += joined
    count += joined
    if isinstance(outcome, Skip):
      gone.append((name, outcome.reason))
    else:
      read.append(name)
      assert not broken_text(
        [outcome["id"], outcome["captions"], outcome["label"], outcome.get("questions")]
      )
      said = outcome.get("questions") or outcome.get("conversations") or outcome.get("preferences")
      assert outcome["captions"] or outcome["label"] or said
  assert told == Counter({row.name: row.count for row in rows}), (
    "read gives every row that rows listed"
  )
  assert len(set(read)) == len(read) and set(reader.fields(rows)) <= {
    "image",
    "audio",
    "video",
    "questions",
    "facts",
    "conversations",
    "media",
    "preferences",
  }
  return read, gone, count


@often(
  rows=st.lists(
    st.tuples(
      st.sampled_from(FILES[:5]), lines, st.sampled_from(["", "7", "8"]), st.sampled_from(["", "x"])
    ),
    min_size=1,
    max_size=8,
  ),
  ending=st.sampled_from(["csv", "tsv"]),
  quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
  grouped=st.booleans(),
)
def test_tables_of_a_writer(rows, ending, quoting, grouped):
  with folder() as root:
    with open(f"{root}/t.{ending}", "w", newline="") as file:
      writer = csv.writer(file, delimiter="\t" if ending == "tsv" else ",", quoting=quoting)
      writer.writerows([["image", "caption", "image_id" if grouped else "id", "label"], *rows])
    read, gone, count = account("csv", f"{root}/t.{ending}")
    if ending == "csv" or quoting == csv.QUOTE_ALL:
      assert count == len(rows) and "broken row" not in dict(
        (reason, name) for name, reason in gone
      )
    assert count >= len(rows) or ending == "tsv"


@often(
  rows=st.lists(
    st.tuples(
      st.sampled_from(FILES[:3]), lines.map(lambda text: text.replace("\n", "").replace("\r", ""))
    ),
    min_size=1,
    max_size=8,
  ),
  ending=st.sampled_from(["csv", "tsv"]),
)
def test_tables_without_quoting_lose_no_line(rows, ending):
  gap = "\t" if ending == "tsv" else ","
  with folder() as root:
    Path(f"{root}/t.{ending}").write_text(
      f"image{gap}caption\n" + "".join(f"{name}{gap}{text}\n" for name, text in rows)
    )
    read, gone, count = account("csv", f"{root}/t.{ending}")
    assert count == len(rows)
    broken = sum(reason == "broken row" for _, reason in gone)
    assert broken <= sum(gap in text for _, text in rows), (
      "only lines with another delimiter cannot be read"
    )


@often(
  rows=st.lists(
    st.one_of(
      st.fixed_dictionaries(
        {
          "image": st.one_of(
            st.sampled_from(FILES), st.lists(st.sampled_from(FILES), max_size=2), st.integers()
          )
        },
        optional=dict(
          caption=st.one_of(words, st.lists(words, max_size=3), st.none(), st.floats()),
          label=labels,
          question=st.one_of(words, st.lists(words, max_size=2)),
          answers=st.one_of(
            words,
            st.lists(words, max_size=3),
            st.lists(st.fixed_dictionaries({"answer": words}), max_size=2),
            st.integers(),
          ),
          image_id=st.one_of(few, st.floats(0, 3)),
          id=few,
          conversations=st.lists(
            st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "x"]), "value": words}),
            max_size=3,
          ),
          language=st.sampled_from(["de", "", None]),
          prompt=words,
          chosen=st.one_of(words, st.none()),
          rejected=words,
        ),
      ).filter(
        lambda row: (
          len({"caption", "label", "question", "conversations"} & set(row)) > 0
          or {"chosen", "rejected"} <= set(row)
        )
      ),
      st.integers(),
      st.just([]),
    )
  ).filter(lambda rows: rows and isinstance(rows[0], dict)),
  shape=st.sampled_from(["lines", "array", "indented", "document"]),
)
def test_json(rows, shape):
  with folder() as root:
    text = {
      "lines": "\n".join(map(json.dumps, rows)),
      "array": json.dumps(rows),
      "indented": json.dumps(rows, indent=1),
      "document": json.dumps({"data": rows}),
    }[shape]
    path = Path(f"{root}/t.{'jsonl' if shape == 'lines' else 'json'}")
    path.write_text(text)
    assert account("json", path)[2] == len(rows)


ids = st.integers(0, 4)


@often(
  images=st.lists(
    st.one_of(st.fixed_dictionaries({"id": ids, "file_name": st.sampled_from(FILES)}), st.none()),
    max_size=4,
  ),
  said=st.lists(
    st.one_of(
      st.fixed_dictionaries({"image_id": ids, "caption": words}),
      st.fixed_dictionaries({"image_id": ids, "category_id": ids}),
      st.none(),
      st.just({}),
    ),
    max_size=8,
  ),
)
def test_coco(images, said):
  with folder() as root:
    Path(f"{root}/c.json").write_text(
      json.dumps(dict(images=images, annotations=said, categories=[dict(id=0, name="cat")]))
    )
    about = {entry.get("image_id") for entry in said if entry}
    bare, seen = 0, set()
    for image in images:  # of two images of one id the second has no annotation left
      bare += image is None or image["id"] not in about or image["id"] in seen
      seen.add(image and image["id"])
    assert account("coco", f"{root}/c.json")[2] == len(said) + bare


@often(
  questions=st.lists(
    st.fixed_dictionaries({"question_id": ids, "image_id": st.integers(0, 2), "question": words}),
    min_size=1,
    max_size=6,
  ),
  answers=st.lists(
    st.fixed_dictionaries(
      {
        "question_id": ids,
        "answers": st.lists(st.fixed_dictionaries({"answer": words}), max_size=3),
      }
    ),
    min_size=1,
    max_size=6,
  ),
)
def test_vqa(questions, answers):
  with folder() as root:
    Path(f"{root}/q.json").write_text(json.dumps(dict(questions=questions)))
    Path(f"{root}/a.json").write_text(json.dumps(dict(annotations=answers)))
    asked = {question["question_id"] for question in questions}
    known = {answer["question_id"] for answer in answers}
    assert account("vqa", root)[2] == len(questions) + len(known - asked) + len(answers) - len(
      known
    )


@often(
  rows=st.lists(
    st.tuples(
      few,
      few,
      st.sampled_from([None, PICTURE, b""]),
      st.one_of(st.none(), st.text("ab \0", max_size=4)),
    ),
    min_size=1,
    max_size=12,
  ),
  group=st.integers(1, 5),
  grouped=st.booleans(),
  paths=st.booleans(),
)
def test_parquet(rows, group, grouped, paths):
  import pyarrow
  import pyarrow.parquet

  with folder() as root:
    images = (
      [FILES[number % 5] for number, *_ in rows]
      if paths
      else [dict(bytes=data, path=None) for *_, data, _ in rows]
    )
    columns = {
      "image": images,
      "image_id" if grouped else "id": [number for _, number, *_ in rows],
      "caption": [text for *_, text in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), f"{root}/t.parquet", row_group_size=group)
    assert account("parquet", root)[2] == len(rows)


names = st.sampled_from(["a", "b", "a.de", "c.x", ".h", "caf\udce9"])
endings = st.sampled_from([".png", ".jpg", ".wav", ".txt", ".psd", ".xyz", "", ".json", ".PNG"])


@often(
  files=st.sets(st.tuples(st.sampled_from(["", "x", "x/y", ".git"]), names, endings), max_size=14),
  table=st.sampled_from([None, "", "x"]),
)
def test_folders(files, table):
  with tempfile.TemporaryDirectory() as root:
    for place, name, ending in files:
      os.makedirs(os.path.join(root, place), exist_ok=True)
      Path(root, place, name + ending).write_bytes(
        PICTURE if modality_of(name + ending) else b"words"
      )
    rows = []
    if table is not None:
      os.makedirs(os.path.join(root, table), exist_ok=True)
      rows = [
        name + ending
        for place, name, ending in sorted(files)
        if place == table and ending == ".png" and name not in (".h", "caf\udce9")
      ]
      Path(root, table, "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{name},words\n" for name in rows * 2)
      )
    expected = 2 * len(rows)
    for place in {place for place, *_ in files} - {".git"}:
      here = [
        (name, ending)
        for where, name, ending in files
        if where == place and not name.startswith(".")
      ]
      media = [pair for pair in here if modality_of("".join(pair))]
      stems = {os.path.splitext("".join(pair))[0] for pair in media}
      if table is not None and (place + "/").startswith(table and table + "/"):
        expected += len(here) - (len(rows) if place == table else 0)
        continue
      kinds = Counter(
        (os.path.splitext("".join(pair))[0], modality_of("".join(pair))) for pair in media
      )
      expected += sum(
        max(count for (stem, _), count in kinds.items() if stem == one) for one in stems
      )
      texts = [name for name, ending in here if ending == ".txt"]
      taken = sum(name in stems or name.removesuffix(".de") in stems for name in texts)
      expected += len(here) - len(media) - taken
    try:
      assert account("folder", root)[2] == expected
    except UserError:
      assert not expected


@often(
  members=st.lists(
    st.tuples(
      st.sampled_from(["", "x/", "../", "/"]),
      st.sampled_from(["0", "1", "1.left", "1.right", ".h", "caf\udce9"]),
      st.sampled_from([".png", ".jpg", ".wav", ".txt", ".json", ".cls", ".npy", ".pkl", ""]),
    ),
    max_size=12,
  )
)
def test_tars(members):
  with tempfile.TemporaryDirectory() as root:
    path = write_tar(
      f"{root}/t.tar",
      [("".join(member), b"{}" if member[2] == ".json" else b"x") for member in members],
    )
    try:
      read, gone, count = account("webdataset", path, cache=f"{root}/cache")
    except UserError:
      return
    if gone == [("t", "tar without pairs")]:
      return
    told = {name.partition("/")[2] for name in read} | {name.partition("/")[2] for name, _ in gone}
    for place, name, ending in members:
      key = f"{place}{name}{ending}".rpartition("/")
      key = f"{place}{key[2].partition('.')[0]}"
      assert name == ".h" or name + ending == "" or place + name + ending in told or key in told, (
        members,
        told,
      )


@often(
  at=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
  cut=st.floats(0.1, 1),
  form=st.sampled_from(["csv", "tsv", "jsonl", "json", "coco", "parquet", "tar"]),
)
def test_damaged_files_end_in_rows_or_in_one_line(at, cut, form):
  import pyarrow
  import pyarrow.parquet

  rows = [
    dict(image="0.png", caption="one", label="x"),
    dict(image="1.png", caption='two "quoted", é', label="y"),
  ]
  with folder() as root:
    out = io.BytesIO()
    if form == "parquet":
      pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    elif form == "tar":
      out.write(
        Path(
          write_tar(
            f"{root}/source.tar",
            [
              ("0.png", PICTURE),
              ("0.txt", b"words"),
              ("1.json", b'{"caption": "x"}'),
              ("1.png", PICTURE),
            ],
          )
        ).read_bytes()
      )
    elif form in ("csv", "tsv"):
      text = io.StringIO()
      writer = csv.DictWriter(text, rows[0], delimiter="," if form == "csv" else "\t")
      writer.writeheader()
      writer.writerows(rows)
      out.write(text.getvalue().encode())
    else:
      document = dict(
        images=[dict(id=0, file_name="0.png")], annotations=[dict(image_id=0, caption="x")]
      )
      out.write(
        {
          "jsonl": "\n".join(map(json.dumps, rows)),
          "json": json.dumps(rows),
          "coco": json.dumps(document),
        }[form].encode()
      )
    data = bytearray(out.getvalue())
    for place, value in at:
      data[int(place * len(data))] = value
    path = Path(f"{root}/t.{'json' if form == 'coco' else form}")
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    try:
      account(
        {"tsv": "csv", "tar": "webdataset", "coco": "json"}.get(form, form),
        path,
        cache=f"{root}/cache",
      )
    except UserError as error:
      assert "\n" not in str(error)


def test_a_folder_that_cannot_be_listed_is_left_out_by_name(tmp_path, monkeypatch):
  for name in ("0.png", "closed/1.png", "open/2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(PICTURE)
  close(monkeypatch, tmp_path / "closed")
  rows, left = open_reader("folder", str(tmp_path)).rows()
  assert len(rows) == 2 and left == [("closed/", Skip("folder not read", "Permission denied"))]
  with pytest.raises(UserError, match=f"{tmp_path}/closed cannot be read"):
    open_reader("csv", str(tmp_path))
  close(monkeypatch, tmp_path)
  with pytest.raises(UserError, match=f"{tmp_path}.* cannot be read"):
    open_reader("folder", str(tmp_path)).rows()
