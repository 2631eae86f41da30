"""Each form of annotation as its users mean it: nothing lost, nothing made up."""

from __future__ import annotations

import base64
import csv
import json
import os

import pytest

from mmjax import cli
from mmjax.config import UserError
from mmjax.data.sources import open_source
from tests.data.test_convert import picture, run
from tests.data.test_tars import jpeg, write_tar


@pytest.fixture
def photos(tmp_path):
  """A folder with 0.png to 5.png."""
  root = tmp_path / "in"
  root.mkdir()
  for n in range(6):
    (root / f"{n}.png").write_bytes(picture(n))
  return root


def records(tmp_path, name="mine"):
  opened = open_source(dict(name=name), str(tmp_path / "data"))
  return {record["id"]: record for record in (opened[n] for n in range(len(opened)))}


def captions(tmp_path):
  return {name: record["captions"].get("en") for name, record in records(tmp_path).items()}


# -- rows about one medium -------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"image_id": 1}, {"image_id": 1, "id": 1}])
def test_five_rows_about_a_picture_are_one_record_with_five_captions(tmp_path, photos, extra):
  rows = [
    dict(
      image=f"{n}.png",
      caption=f"{n} told in way {way}",
      **{name: n if name == "image_id" else 10 * n + way for name in extra},
    )
    for way in range(5)
    for n in range(4)
  ]
  (photos / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, "jsonl", photos / "all.jsonl")
  assert (summary.examples, summary.rows, summary.skipped) == (4, 20, {})
  assert captions(tmp_path) == {
    f"{n}.png": [f"{n} told in way {way}" for way in range(5)] for n in range(4)
  }


def test_a_row_that_is_no_use_costs_its_medium_only_itself(tmp_path, photos):
  rows = [
    dict(image_id=0, image="0.png", caption=text) for text in ("one", "", "half \ud83d", "two")
  ] + [dict(image_id=9, image="gone.png", caption=text) for text in "abc"]
  (photos / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, "jsonl", photos / "all.jsonl")
  assert captions(tmp_path) == {"0.png": ["one", "two"]}
  assert summary.rows == 2 and summary.skipped == {
    "missing file": 3,
    "no caption": 1,
    "broken text": 1,
  }
  assert summary.first_skipped["broken text"] == ["all.jsonl:3"] and "from 2 rows" in str(summary)


def test_one_image_id_for_several_pictures_drops_none(tmp_path, photos):
  (photos / "all.jsonl").write_text(
    "\n".join(json.dumps(dict(image_id=7, image=f"{n}.png", caption=f"c{n}")) for n in range(3))
  )
  assert run(tmp_path, "jsonl", photos / "all.jsonl").skipped == {}
  assert captions(tmp_path) == {f"{n}.png": [f"c{n}"] for n in range(3)}


def test_labels_of_several_rows_and_labels_that_mean_none(tmp_path, photos):
  rows = [
    dict(image="0.png", label="cat"),
    dict(image="0.png", label="dog"),
    dict(image="0.png", label="cat"),
    dict(image="1.png", label=["a", "b"]),
    dict(image="2.png", label=3.0),
    *(dict(image="3.png", label=none) for none in (None, "", float("nan"), -1, "-1")),
    dict(image="4.png", label={"x": 1}),
  ]
  (photos / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, "jsonl", photos / "all.jsonl")
  assert {name: record["label"] for name, record in records(tmp_path).items()} == {
    "0.png": "cat|dog",
    "1.png": "a|b",
    "2.png": "3",
  }
  assert summary.skipped == {"no caption": 5, "broken row": 1} and summary.rows == 5


# -- questions -------------------------------------------------------------------------------------

TEN = ["red"] * 6 + ["dark red"] * 4


@pytest.mark.parametrize(
  "answers",
  [
    TEN,
    [{"answer": text, "answer_confidence": "yes"} for text in TEN],
    {"answer": TEN, "answer_id": list(range(10))},
  ],
)
def test_the_commonest_of_ten_answers_counts_and_all_are_kept(tmp_path, photos, answers):
  rows = [
    dict(image="0.png", question_id=1, image_id=0, question="colour?", answers=answers),
    dict(image="0.png", question_id=2, image_id=0, question="size?", answer=2),
  ]
  (photos / "all.json").write_text(json.dumps(rows))
  run(tmp_path, "json", photos / "all.json")
  record = records(tmp_path)["0.png"]
  assert record["questions"] == [("colour?", "red"), ("size?", "2")] and record["facts"][
    "answers"
  ] == [TEN, ["2"]]


def test_the_pair_of_files_of_vqa(tmp_path, photos):
  for n in range(3):
    os.rename(photos / f"{n}.png", photos / f"COCO_train2014_{n:012d}.png")
  questions = [
    dict(question_id=10 * n + k, image_id=n, question=f"what is {k} of {n}?")
    for n in range(3)
    for k in range(3)
  ]
  annotations = [
    dict(
      question_id=q["question_id"],
      image_id=q["image_id"],
      multiple_choice_answer="blue",
      answers=[dict(answer=a, answer_id=i) for i, a in enumerate(["red", "red", "blue"])],
    )
    for q in questions[:-1]
  ]
  annotations += [dict(question_id=999, image_id=0, answers=[])]
  notes = tmp_path / "notes"
  notes.mkdir()
  (notes / "v2_questions.json").write_text(
    json.dumps(
      dict(
        info={},
        data_type="mscoco",
        questions=[*questions, dict(question_id=77, image_id=50, question="who?")],
      )
    )
  )
  (notes / "v2_annotations.json").write_text(json.dumps(dict(info={}, annotations=annotations)))
  summary = run(tmp_path, "vqa", notes, media=photos)
  assert (
    summary.examples == 3
    and summary.rows == 8
    and summary.skipped == {"no answer": 2, "no question": 1}
  )
  first = records(tmp_path)["COCO_train2014_000000000000.png"]
  assert (
    first["questions"] == [(f"what is {k} of 0?", "blue") for k in range(3)]
    and first["facts"]["answers"] == [["red", "red", "blue"]] * 3
  )
  alone = run(tmp_path, "vqa", notes / "v2_questions.json", "test", media=photos)
  assert alone.rows == 9 and alone.skipped == {"missing file": 1}, "a test split has no answers"


def test_parquet_of_vqa_joins_what_lies_apart_and_tells_pictures_apart(tmp_path):
  import pyarrow
  import pyarrow.parquet

  order = [(n, k) for k in range(3) for n in range(4)]
  table = pyarrow.table(
    dict(
      image=[dict(bytes=picture(n), path=None) for n, _ in order]
      + [dict(bytes=picture(9), path=None)],
      image_id=[*(n for n, _ in order), 3],
      question_id=range(13),
      question=[f"{k} of {n}?" for n, k in order[:-1]] + [None, "other picture"],
      answer=["red"] * 13,
    )
  )
  pyarrow.parquet.write_table(table, tmp_path / "v.parquet", row_group_size=5)
  summary = run(tmp_path, "parquet", tmp_path / "v.parquet", shard_rows=3)
  assert (summary.examples, summary.rows) == (4, 11) and summary.skipped == {
    "no caption": 1,
    "duplicate id": 1,
  }
  got = records(tmp_path)
  assert [got[str(n)]["questions"] for n in range(4)] == [
    [(f"{k} of {n}?", "red") for k in range(3) if (n, k) != (3, 2)] for n in range(4)
  ]
  assert [got[str(n)]["image"] for n in range(4)] == [picture(n) for n in range(4)]


# -- tables ----------------------------------------------------------------------------------------


def table(photos, name, text, encoding="utf-8"):
  (photos / name).write_bytes(text.encode(encoding))
  return photos


@pytest.mark.parametrize("ending,gap", [("tsv", "\t"), ("csv", ",")])
def test_a_stray_quotation_mark_costs_no_other_line(tmp_path, photos, ending, gap):
  said = ['"to be', 'a 6" pipe', '"whole"', 'or not"', '"x" and "y"', "plain"]
  table(
    photos,
    f"captions.{ending}",
    f"file_name{gap}caption\n" + "".join(f"{n}.png{gap}{text}\n" for n, text in enumerate(said)),
  )
  summary = run(tmp_path, "folder", photos)
  assert summary.skipped == {}
  assert captions(tmp_path) == {
    f"{n}.png": [text if (ending, n) != ("csv", 2) else "whole"] for n, text in enumerate(said)
  }


@pytest.mark.parametrize(
  "ending,quoting",
  [
    ("csv", csv.QUOTE_MINIMAL),
    ("csv", csv.QUOTE_ALL),
    ("tsv", csv.QUOTE_MINIMAL),
    ("tsv", csv.QUOTE_ALL),
  ],
)
def test_quoted_cells_are_what_a_writer_put_into_them(tmp_path, photos, ending, quoting):
  said = ["a, b", 'he said "no"', "two\nlines, of text", "a\ttab", "plain", 'all "of",\tit\nhere']
  with open(photos / f"captions.{ending}", "w", newline="") as file:
    writer = csv.writer(file, delimiter="\t" if ending == "tsv" else ",", quoting=quoting)
    writer.writerows(
      [["file_name", "caption", "label"], *([f"{n}.png", text, "x"] for n, text in enumerate(said))]
    )
  summary = run(tmp_path, "folder", photos)
  assert summary.skipped == {} and captions(tmp_path) == {
    f"{n}.png": [text] for n, text in enumerate(said)
  }


def test_lines_that_do_not_fit_the_header_are_left_out_by_number(tmp_path, photos):
  table(
    photos,
    "captions.csv",
    "file_name,caption\n0.png,a dog, running\n1.png\n2.png,fine\n3.png,trailing,\n",
  )
  summary = run(tmp_path, "csv", photos / "captions.csv")
  assert captions(tmp_path) == {
    "2.png": ["fine"],
    "3.png": ["trailing"],
  } and summary.first_skipped == {"broken row": ["captions.csv:2", "captions.csv:3"]}


def test_tables_in_other_encodings(tmp_path, photos):
  text = "file_name;caption\n0.png;ein grüner Käfer\n1.png;ein Hund\n"
  table(photos, "captions.csv", text, "utf-16")
  run(tmp_path, "folder", photos, "utf16")
  assert records(tmp_path, "utf16")["0.png"]["captions"] == {"en": ["ein grüner Käfer"]}
  table(photos, "captions.csv", text, "cp1252")
  summary = run(tmp_path, "folder", photos, "unknown")
  assert summary.examples == 1 and summary.first_skipped["broken text"] == ["captions.csv:2"], (
    "never a caption with wrong letters"
  )
  run(tmp_path, "folder", photos, "western", encoding="cp1252")
  assert records(tmp_path, "western")["0.png"]["captions"] == {"en": ["ein grüner Käfer"]}
  for encoding in ("nonsense", "base64", "undefined"):  # unknown, of bytes, never usable
    with pytest.raises(UserError, match=f"no encoding '{encoding}'"):
      run(tmp_path, "folder", photos, encoding=encoding)


def test_huge_cells_are_read_and_endless_lines_are_left_out(tmp_path, photos, monkeypatch):
  from mmjax.data.readers import table as module

  monkeypatch.setattr(module, "LONGEST", 1 << 19)
  table(
    photos,
    "captions.csv",
    f'file_name,caption\n0.png,"{"a " * 200_000}end"\n1.png,{"b" * (1 << 20)}\n2.png,fine\n',
  )
  summary = run(tmp_path, "folder", photos)
  assert (
    captions(tmp_path)["0.png"][0].endswith("end")
    and summary.first_skipped["broken row"] == ["captions.csv:3"]
    and summary.examples == 2
  )


def test_lists_that_were_written_into_cells(tmp_path, photos):
  """As Flickr30k's table has its captions, and as pandas writes lists."""
  cells = {
    '["one", "it\'s [1]"]': ["one", "it's [1]"],
    str(["two", "it's"]): ["two", "it's"],
    "['three','drei']": ["three", "drei"],
    "['a' 'b']": ["['a' 'b']"],  # NumPy's, which Python would read as one text
    "[laughs]": ["[laughs]"],
    "[" * 3000 + "]": ["[" * 3000 + "]"],
  }
  with open(photos / "a.csv", "w", newline="") as file:
    csv.writer(file).writerows(
      [("image", "captions"), *((f"{n}.png", cell) for n, cell in enumerate(cells))]
    )
  assert run(tmp_path, "csv", photos / "a.csv").rows == 6
  assert list(captions(tmp_path).values()) == list(cells.values())
  with open(photos / "b.csv", "w", newline="") as file:
    rows = [("0.png", "which?", ["x", "y", "x"], ["a", "b"]), ("1.png", "who?", "z", [])]
    csv.writer(file).writerows([("image", "question", "answer", "tags"), *rows])
  run(tmp_path, "csv", photos / "b.csv", "asked", columns=dict(labels="tags"))
  assert [(r["questions"], r["label"]) for r in records(tmp_path, "asked").values()] == [
    ([("which?", "x")], "a|b"),
    ([("who?", "z")], ""),
  ]


def test_several_columns_of_captions(tmp_path, photos):
  rows = [
    dict(image="0.png", **{f"caption_{n}": f"way {n}" for n in range(5)}),
    dict(image="1.png", caption="one", alt_text="two"),
    dict(image="2.png", caption=["a", "a", {"raw": "b"}]),
    dict(Image="3.png", Text="capital"),
    dict(image=["4.png"], title="t", text="x"),
  ]
  (photos / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
  run(tmp_path, "jsonl", photos / "all.jsonl")
  assert captions(tmp_path) == {
    "0.png": [f"way {n}" for n in range(5)],
    "1.png": ["one", "two"],
    "2.png": ["a", "b"],
    "3.png": ["capital"],
    "4.png": ["x"],
  }
  (photos / "all.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows[-1:] + rows[-2:])
  )
  run(tmp_path, "jsonl", photos / "all.jsonl", "named", columns=dict(caption="text+title"))
  assert records(tmp_path, "named")["4.png"]["captions"] == {"en": ["x", "t", "x", "t"]}


def test_several_pictures_in_a_row_are_left_out_and_counted(tmp_path, photos):
  (photos / "all.jsonl").write_text(
    '{"images": ["0.png", "1.png"], "caption": "the left one is red"}\n{"images": ["2.png"], '
    '"caption": "x"}\n'
  )
  assert run(tmp_path, "jsonl", photos / "all.jsonl").skipped == {
    "several pictures": 1
  } and captions(tmp_path) == {"2.png": ["x"]}


# -- JSON ------------------------------------------------------------------------------------------

ROWS = [dict(image=f"{n}.png", caption=f"thing {n}") for n in range(4)]


@pytest.mark.parametrize(
  "content",
  [
    json.dumps(ROWS, indent=1),
    json.dumps({"info": {}, "annotations": ROWS}),
    "\n".join(map(json.dumps, ROWS)),
    json.dumps({row["image"]: row["caption"] for row in ROWS}),
    json.dumps({row["image"]: [row["caption"]] for row in ROWS}),
    "\n".join(json.dumps(row, indent=1) for row in ROWS),
    json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:], indent=1),
    json.dumps(
      [
        {
          "image": "data:image/png;base64," + base64.b64encode(picture(n)).decode(),
          "id": f"{n}.png",
          "caption": f"thing {n}",
        }
        for n in range(4)
      ]
    ),
  ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_one_file_of_json_in_any_shape(tmp_path, photos, content, chunk, monkeypatch):
  from mmjax.data.readers import json_stream

  monkeypatch.setattr(json_stream, "_CHUNK", chunk)
  (photos / "a.json").write_text(content)
  assert run(tmp_path, "json", photos / "a.json").rows == 4
  assert [record["captions"]["en"] for record in records(tmp_path).values()] == [
    [f"thing {n}"] for n in range(4)
  ]


@pytest.mark.parametrize(
  "content",
  [
    "",
    "[",
    '[{"image": "0.png"',
    "[1, 2",
    "nonsense",
    '{"a": [}',
    "[" * 5000,
    '[{"image": "0.png", "caption": "a"}] x',
  ],
)
def test_json_that_cannot_be_read_is_one_clear_line(tmp_path, photos, content):
  (photos / "a.json").write_text(content)
  with pytest.raises(UserError, match="a.json: no readable JSON") as error:
    run(tmp_path, "json", photos / "a.json")
  assert "\n" not in str(error.value)


def test_what_stands_twice_is_never_dropped_in_silence(tmp_path, photos):
  (photos / "a.jsonl").write_text(
    '{"image": "0.png", "caption": "one", "caption": "uno"}\n{"image": "1.png", "caption": "two"}\n'
  )
  summary = run(tmp_path, "jsonl", photos / "a.jsonl", "lines")
  assert summary.rows == 1 and summary.skipped == {"broken row": 1}
  (photos / "a.json").write_text('{"0.png": "one", "1.png": "two", "0.png": "uno"}')
  with pytest.raises(UserError, match="'0.png' stands twice in one object"):
    run(tmp_path, "json", photos / "a.json")


def test_what_has_no_id_is_not_joined_by_it(tmp_path, photos):
  images = [dict(file_name=f"{n}.png") for n in range(2)] + [dict(id=2, file_name="2.png")]
  said = [dict(caption="whose?"), dict(image_id="2", caption="two")]
  (photos / "coco.json").write_text(json.dumps(dict(images=images, annotations=said)))
  summary = run(tmp_path, "coco", photos / "coco.json", "coco")
  assert summary.rows == 1 and summary.skipped == {"no caption": 2, "missing file": 1}
  questions = [dict(question_id=7, image_id=2, question="r"), dict(image_id=1, question="q")]
  answers = [dict(question_id=7, answers=["a"]), dict(question_id=None, answers=["whose?"])]
  (photos / "q.json").write_text(json.dumps(dict(questions=questions)))
  (photos / "a.json").write_text(json.dumps(dict(annotations=answers)))
  summary = run(tmp_path, "vqa", photos, "vqa", media=photos)
  assert {r["id"]: r["questions"] for r in records(tmp_path, "vqa").values()} == {
    "2.png": [("r", "a")]
  }
  assert summary.skipped["no answer"] == summary.skipped["no question"] == 1


def test_categories_by_numbers_that_are_texts_and_that_are_not_there(tmp_path, photos):
  images = [dict(id=n, file_name=f"{n}.png") for n in range(3)]
  boxes = [dict(image_id=0, category_id="5"), dict(image_id=1, category_id=5.0)]
  boxes.append(dict(image_id=2, category_id=6))
  document = dict(images=images, annotations=boxes, categories=[dict(id=5, name="dog")])
  (photos / "coco.json").write_text(json.dumps(document))
  summary = run(tmp_path, "coco", photos / "coco.json")
  assert {name: r["label"] for name, r in records(tmp_path).items()} == {
    "0.png": "dog",
    "1.png": "dog",
  }
  assert summary.rows == 2 and summary.skipped == {"broken row": 1}


def test_coco_captions_and_instances(tmp_path, photos):
  images = [dict(id=n, file_name=f"{n}.png", height=12) for n in range(4)]
  said = [
    dict(id=10 * n + k, image_id=n, caption=f"{k} of {n}") for k in range(5) for n in range(3)
  ] + [dict(id=99, image_id=50, caption="of none")]
  boxes = [
    dict(id=i, image_id=n, category_id=c, bbox=[0, 0, 1, 1], segmentation=[[0] * 8])
    for i, (n, c) in enumerate([(0, 1), (0, 2), (0, 1), (1, 2)])
  ]
  notes = photos / "annotations"
  notes.mkdir()
  (notes / "captions.json").write_text(json.dumps(dict(images=images, annotations=said)))
  (notes / "instances.json").write_text(
    json.dumps(
      dict(
        annotations=boxes,
        images=images,
        categories=[dict(id=1, name="dog"), dict(id=2, name="cat")],
      )
    )
  )
  summary = run(tmp_path, "coco", notes / "captions.json", media=photos)
  assert (summary.examples, summary.rows) == (3, 15) and summary.skipped == {
    "no caption": 1,
    "missing file": 1,
  }
  assert captions(tmp_path) == {f"{n}.png": [f"{k} of {n}" for k in range(5)] for n in range(3)}
  summary = run(tmp_path, "coco", notes / "instances.json", "boxes", media=photos)
  assert {name: record["label"] for name, record in records(tmp_path, "boxes").items()} == {
    "0.png": "dog|cat",
    "1.png": "cat",
  } and summary.rows == 4


def test_conversations(tmp_path, photos):
  llava = [
    dict(
      id="a",
      image="0.png",
      conversations=[
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
      ],
    ),
    dict(
      id="a",
      image="0.png",
      conversations=[
        {"from": "human", "value": "Describe it.\n<image>"},
        {"from": "gpt", "value": "Grey."},
      ],
    ),
    dict(
      id="text only",
      conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    ),
    dict(id="b", image="1.png", conversations=[{"from": "martian", "value": "x"}]),
    dict(id="c", image="2.png", conversations="none"),
  ]
  (photos / "llava.json").write_text(json.dumps(llava))
  summary = run(tmp_path, "conversations", photos / "llava.json")
  assert summary.rows == 3 and summary.skipped == {"broken row": 2}
  assert records(tmp_path)["text only"]["conversations"] == [
    [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
  ]
  record = records(tmp_path)["0.png"]
  assert record["questions"] == [
    ("What is it?", "A cat."),
    ("Sure?", "Yes."),
    ("Describe it.", "Grey."),
  ]
  first, second = record["conversations"]
  assert [turn["role"] for turn in first] == ["user", "assistant"] * 2 and second[0] == {
    "role": "user",
    "content": [{"type": "text", "text": "Describe it.\n"}, {"type": "image"}],
  }
  assert open_source(dict(name="mine"), str(tmp_path / "data")).answers == (), (
    "what is said in a conversation is no class"
  )
  openai = dict(
    messages=[
      {"role": "system", "content": "Be short."},
      {
        "role": "user",
        "content": [
          {"type": "image_url", "image_url": {"url": "3.png"}},
          {"type": "text", "text": "What?"},
        ],
      },
      {"role": "assistant", "content": "A dog."},
    ]
  )
  (photos / "openai.jsonl").write_text(json.dumps(openai) + "\n")
  run(tmp_path, "conversations", photos / "openai.jsonl", "openai")
  record = records(tmp_path, "openai")["3.png"]
  assert record["questions"] == [("What?", "A dog.")] and record["conversations"][0][1][
    "content"
  ] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_conversations_of_several_media(tmp_path, photos):
  inline = base64.b64encode((photos / "2.png").read_bytes()).decode()
  picture_part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{inline}"}}
  call = {"function": {"name": "look", "arguments": {"where": "left"}}}
  several = [
    dict(
      images=["0.png", "1.png"],
      conversations=[
        {"from": "human", "value": "<image> and <image>?"},
        {"from": "gpt", "value": "An <image>."},
      ],
    ),
    dict(
      messages=[
        {"role": "user", "content": [picture_part, {"type": "text", "text": "<image>?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "a dog"},
        {"role": "assistant", "content": "A dog.", "reasoning_content": "It said so."},
      ]
    ),
    dict(
      image="3.png",
      messages=[dict(role="user", content="What?"), dict(role="assistant", content="A")],
    ),
    dict(
      image="4.png",
      conversations=[{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
    ),
    dict(
      images=["4.png", "5.png"],
      conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
    ),
    dict(conversations=[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]),
  ]
  (photos / "chat.jsonl").write_text("\n".join(map(json.dumps, several)))
  summary = run(tmp_path, "conversations", photos / "chat.jsonl")
  assert summary.rows == 3 and summary.skipped == {"placeholders": 3}
  found = records(tmp_path)
  two = found["0.png"]
  assert two["image"] == picture(0) and two["media"] == [("image", picture(1))]
  image = {"type": "image"}
  assert two["conversations"][0] == [
    turn("user", [image, part(" and "), image, part("?")]),
    turn("assistant", "An <image>."),
  ]
  called = found["chat.jsonl:2"]
  assert called["image"] == picture(2)
  assert called["conversations"][0] == [
    turn("user", [image, part("<image>?")]),
    turn(
      "assistant", '<tool_call>\n{"name": "look", "arguments": {"where": "left"}}\n</tool_call>'
    ),
    turn("tool", "a dog"),
    turn("assistant", "<think>\nIt said so.\n</think>\n\nA dog."),
  ]
  assert found["3.png"]["conversations"][0][0] == turn("user", [image, part("What?")])


@pytest.mark.parametrize("form", ["responses", "json", "csv"])
def test_conversations_as_tables_and_the_newer_api_write_them(tmp_path, photos, form):
  turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": 'A "dog".'}]
  rows = [dict(image=f"{n}.png", conversations=json.dumps(turns)) for n in range(2)]
  if form == "responses":
    given = [dict(type="input_image", image_url="0.png"), dict(type="input_text", text="What?")]
    said = dict(role="assistant", content=[dict(type="output_text", text='A "dog".')])
    rows = [dict(messages=[dict(role="user", content=given), said])]
  path = photos / ("chat.csv" if form == "csv" else "chat.jsonl")
  with open(path, "w", newline="") as file:
    if form == "csv":
      writer = csv.DictWriter(file, ["image", "conversations"])
      writer.writeheader()
      writer.writerows(rows)
    else:
      file.write("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, "csv" if form == "csv" else "conversations", path)
  assert summary.examples == len(rows) and not summary.skipped
  found = records(tmp_path)["0.png"]
  assert found["image"] == picture(0)
  want = [turn("user", [{"type": "image"}, part("What?")]), turn("assistant", 'A "dog".')]
  assert found["conversations"] == [want]


def test_columns_of_one_name_are_all_read(tmp_path, photos):
  (photos / "a.csv").write_text("image,caption,caption\n0.png,one,two\n1.png,three,four\n")
  assert run(tmp_path, "csv", photos / "a.csv").examples == 2
  texts = {name: record["captions"]["en"] for name, record in records(tmp_path).items()}
  assert texts == {"0.png": ["one", "two"], "1.png": ["three", "four"]}


def test_rows_by_their_ids_and_pictures_by_clevrs_name(tmp_path, photos):
  rows = {str(n): dict(image_filename=f"{n}.png", question="how many?", answer=n) for n in range(2)}
  (photos / "q.json").write_text(json.dumps(rows))
  assert run(tmp_path, "json", photos / "q.json").examples == 2
  found = records(tmp_path)
  assert found["1"]["questions"] == [("how many?", "1")] and found["1"]["image"] == picture(1)


def test_rows_whose_first_of_several_pictures_is_the_same_are_all_kept(tmp_path, photos):
  def row(*images):
    marks = "<image>" * len(images)
    talk = [{"from": "human", "value": f"{marks}?"}, {"from": "gpt", "value": "-".join(images)}]
    return dict(images=list(images), conversations=talk)

  rows = [row("0.png", "1.png"), row("0.png", "2.png"), row("0.png"), row("0.png", "2.png")]
  (photos / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
  summary = run(tmp_path, "conversations", photos / "chat.jsonl")
  assert summary.rows == 4 and summary.examples == 3 and not summary.skipped
  found = records(tmp_path)
  assert set(found) == {"0.png", "chat.jsonl:2", "chat.jsonl:3"}
  assert len(found["chat.jsonl:2"]["conversations"]) == 2
  assert found["chat.jsonl:2"]["media"] == [("image", picture(2))]


def test_conversations_in_parquet(tmp_path, photos):
  arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  rows = [
    dict(
      images=[{"bytes": picture(n), "path": None} for n in range(count)],
      messages=[turn("user", "<image>" * count + "What?"), turn("assistant", f"{count} of them")],
    )
    for count in (0, 1, 2)
  ]
  rows.append(dict(rows[1], messages=[turn("user", "<image><image>"), turn("assistant", "x")]))
  parquet.write_table(arrow.Table.from_pylist(rows), photos / "chat.parquet")
  summary = run(tmp_path, "parquet", photos / "chat.parquet")
  assert summary.rows == 3 and summary.skipped == {"placeholders": 1}
  found = [records(tmp_path)[f"chat/{n:06d}"] for n in range(3)]
  assert [one["image"] for one in found] == [None, picture(0), picture(0)]
  assert [one["media"] for one in found] == [[], [], [("image", picture(1))]]
  assert found[2]["conversations"][0][1]["content"] == "2 of them"


def turn(role, content):
  return {"role": role, "content": content}


def part(text):
  return {"type": "text", "text": text}


# -- folders and tars ------------------------------------------------------------------------------


def test_files_that_are_not_read_are_counted_by_their_endings(tmp_path, photos):
  (photos / "0.txt").write_text("zero")
  for name in ("a.psd", "b.PSD", "c.xyz", "lonely.txt", ".hidden"):
    (photos / name).write_text("x")
  summary = run(tmp_path, "folder", photos)
  assert summary.skipped == {"no caption": 5, "ending not read": 3, "text without a file": 1}
  assert "left out 3: ending not read (.psd 2, .xyz 1)" in str(summary)


def test_nested_folders_with_tables_of_their_own(tmp_path, photos):
  for part in ("cats", "dogs", "texts"):
    (photos / part / "deep").mkdir(parents=True)
    for n in range(2):
      (photos / part / f"{n}.png").write_bytes(picture(ord(part[0]) + n))
  (photos / "cats" / "metadata.csv").write_text("file_name,text\n0.png,a cat\n1.png,two cats\n")
  (photos / "dogs" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}\n')
  (photos / "texts" / "1.txt").write_text("beside")
  summary = run(tmp_path, "folder", photos)
  assert captions(tmp_path) == {
    "cats/0.png": ["a cat"],
    "cats/1.png": ["two cats"],
    "dogs/0.png": ["a dog"],
    "texts/1.png": ["beside"],
  }
  assert summary.skipped == {"no caption": 8} and summary.rows == 4


def test_folders_of_classes(tmp_path, photos):
  for name in ("cat", "dog"):
    (photos / name).mkdir()
    (photos / name / "x.png").write_bytes(picture(len(name)))
  summary = run(tmp_path, "folder", photos)
  assert {name: record["label"] for name, record in records(tmp_path).items()} == {
    "cat/x.png": "cat",
    "dog/x.png": "dog",
  }
  assert summary.skipped == {
    "no caption": 6
  } and "the folder of a file is its label (2 classes: cat, dog)" in str(summary)
  again = run(tmp_path, "folder", photos)
  assert again.notes == summary.notes and again.rows == 2


def test_keys_with_dots_are_those_of_webdataset(tmp_path):
  path = write_tar(
    tmp_path / "a.tar",
    [
      ("x/1.jpg", jpeg(1)),
      ("x/1.mask.png", jpeg(2)),
      ("x/1.txt", b"one"),
      ("2.left.jpg", jpeg(3)),
      ("2.right.jpg", jpeg(4)),
      ("2.txt", b"two"),
      ("3.photo.jpg", jpeg(5)),
      ("3.en.txt", b"three"),
      ("4.mask.png", jpeg(6)),
      ("4.jpg", jpeg(7)),
      ("4.txt", b"four"),
      ("5.npy", b"x"),
      (".DS_Store", b"x"),
    ],
  )
  summary = run(tmp_path, "webdataset", path)
  got = records(tmp_path)
  assert {name: record["captions"]["en"] for name, record in got.items()} == {
    "a/x/1": ["one"],
    "a/3": ["three"],
    "a/4": ["four"],
  }
  assert got["a/x/1"]["image"] == jpeg(1) and got["a/4"]["image"] == jpeg(7), (
    "a.jpg is the picture of a, not a.mask.png"
  )
  assert summary.skipped == {"ending not read": 3, "several files of a kind": 1}


# -- bad strings -----------------------------------------------------------------------------------


def test_names_that_are_not_utf8_cost_themselves_in_a_folder_and_in_a_tar(tmp_path, capsys):
  root = tmp_path / "in"
  root.mkdir()
  for name in (b"caf\xe9", b"good"):
    for ending, data in ((b".png", picture(1)), (b".txt", b"words")):
      with open(os.path.join(os.fsencode(root), name + ending), "wb") as file:
        file.write(data)
  assert cli.main(
    [
      "data",
      "convert",
      "folder",
      str(root),
      "--name",
      "mine",
      "--workers",
      "1",
      "--data-dir",
      str(tmp_path / "data"),
    ]
  ) in (0, None)
  assert "broken text (caf\\udce9.png)" in capsys.readouterr().out and list(records(tmp_path)) == [
    "good.png"
  ]
  path = write_tar(
    tmp_path / "t.tar",
    [
      (f"{name}.{kind}", data)
      for name in ("caf\udce9", "good")
      for kind, data in (("jpg", jpeg(1)), ("txt", b"words"))
    ],
  )
  assert run(tmp_path, "webdataset", path, "tar").skipped == {"broken text": 1} and list(
    records(tmp_path, "tar")
  ) == ["t/good"]


def test_half_an_emoji_in_a_tar_costs_its_row_in_training_and_in_a_tokenizer(
  tmp_path, config, monkeypatch
):
  from mmjax.data.pipeline import Pipeline
  from mmjax.data.tokenizer_training import train_tokenizer, train_tokenizer_from_source

  monkeypatch.setenv("MMJAX_DATA", str(tmp_path / "data"))
  path = write_tar(
    tmp_path / "a.tar",
    [
      (f"{n}.{kind}", data)
      for n in range(4)
      for kind, data in (
        ("png", picture(n)),
        ("json", json.dumps({"caption": "thing" + " \ud83d" * (n == 2)}).encode()),
      )
    ],
  )
  pipeline = Pipeline(
    config(**{"data.sources": {"p": {"name": "tars", "path": path}}, "train.batch_size": 4})
  )
  batch = pipeline.batch(0)
  assert sorted(zip(batch["id"], batch["valid"].tolist(), strict=True)) == [
    ("a/0", True),
    ("a/1", True),
    ("a/3", True),
    ("tars[2]", False),
  ]
  assert pipeline.unreadable == 1
  lines = []
  train_tokenizer_from_source("tars", path=path, vocab_size=331, name="t", log=lines.append)
  assert "left out 1 unreadable records, such as tars[2]" in lines[1]
  assert train_tokenizer(["fine words", "half \ud83d"], tmp_path / "u.model", 335).stat().st_size


def test_a_tokenizer_refuses_half_an_emoji_in_one_line(config):
  from mmjax.data.tokenizers import load_tokenizer

  with pytest.raises(UserError, match=r"broken text: 'half \\+ud83d'"):
    load_tokenizer(config().data).encode("half \ud83d")
