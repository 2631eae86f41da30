"""Names, captions and keys of strangers: no control character reaches a terminal or a page, and no
name leaves its folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import cli
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data import faults
from mmjax.data.builders import write_dataset
from mmjax.data.builders.convert import convert
from mmjax.data.faults import CutMedia
from mmjax.data.sources import open_source
from mmjax.data.tars import TarSource
from mmjax.data.tokenizer_training import train_tokenizer_from_source
from mmjax.evaluation import Result
from mmjax.evaluation.report import write_report
from mmjax.printing import in_html, printable
from tests.data.test_convert import picture
from tests.data.test_tars import pairs, write_tar
from tests.inference import tiny

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202eexe.gnp\u2066\uffff\r"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\uffff]")


def clean(text: str) -> bool:
  return not CONTROLS.search(text)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(codec=None)))
def test_printable_texts_are_one_harmless_line(text):
  shown = printable(text)
  assert clean(shown) and "\n" not in shown and "\t" not in shown
  shown.encode("utf-8")
  assert printable(shown) == shown
  assert json.loads('"' + printable(text.replace("\\", "").replace('"', "")) + '"') == text.replace(
    "\\", ""
  ).replace('"', "")


def test_what_people_write_stays_as_it_is():
  for text in ("a red heart ❤️", "שלום עולם", "日本語のテキスト", "naïve – “café” 👩‍🚀", "\\u001b"):
    assert printable(text) == text
  assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc" and printable("\x1b[0m") == "\\u001b[0m"
  assert in_html("<\x1b>") == "&lt;\\u001b&gt;"


@pytest.fixture
def evil_folder(tmp_path):
  """Pictures of which one is broken, with escape sequences in its name, its caption and its
  folder.
  """
  root = tmp_path / f"in{EVIL}"
  root.mkdir()
  (root / "good.png").write_bytes(picture(0))
  (root / "good.txt").write_text(f"caption {EVIL}\n", newline="")
  (root / f"broken{EVIL}.png").write_bytes(b"\x89PNG no")
  (root / f"broken{EVIL}.txt").write_text("broken\n")
  return root


def test_converting_and_showing(evil_folder, tmp_path, capfd):
  words = [
    "data",
    "convert",
    "folder",
    str(evil_folder),
    "--name",
    "mine",
    "--workers",
    "1",
    "--data-dir",
    str(tmp_path / "data"),
  ]
  assert cli.main(words) == 0
  assert cli.main([*words, "--json"]) == 0
  assert (
    cli.main(
      [
        "data",
        "show",
        "mine",
        "--data-dir",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "s.html"),
      ]
    )
    == 0
  )
  assert cli.main(["data", "convert", "folder", str(evil_folder) + EVIL, "--name", "other"]) == 1
  told = "".join(capfd.readouterr())
  assert clean(told) and "broken\\u001b" in told and "no such folder" in told
  page = (tmp_path / "s.html").read_text()
  assert clean(page) and "caption \\u001b" in page


def test_tars_and_unreadable_records(tmp_path, caplog, capfd):
  path = write_tar(tmp_path / "a.tar", [*pairs(0, 1), (f"{EVIL}.jpg", b"x")])
  (tmp_path / f"b{EVIL}.tar").write_bytes(b"no tar")
  with caplog.at_level(logging.WARNING):
    TarSource([path, tmp_path / f"b{EVIL}.tar"], data_dir=tmp_path / "data")
  assert "left out" in caplog.text and clean(caplog.text.replace("\n", ""))
  faults.report_unreadable([(EVIL, f"why {EVIL}")], {}, 10)
  told = capfd.readouterr().err
  assert clean(told) and told.count("\n") == 1 and "\\u001b" in told


def test_search_and_generate(tmp_path, capfd, monkeypatch):
  checkpoint, photos = tiny.checkpoint(tmp_path / "tiny"), tmp_path / "photos"
  photos.mkdir()
  for number, array in enumerate(tiny.pixels(2)):
    (photos / f"{number}{EVIL}.png").write_bytes(tiny.png(array))
  (photos / f"broken{EVIL}.png").write_bytes(b"no")
  assert (
    cli.main(["search", "--checkpoint", str(checkpoint), "--images", str(photos), "a red heart"])
    == 0
  )
  monkeypatch.setattr(
    "mmjax.inference.generate.generate", lambda *_, **__: [(f"a{EVIL}.png", f"text {EVIL}\nmore")]
  )
  assert cli.main(["generate", "--checkpoint", "x", "a.png"]) == 0
  assert cli.main(["generate", "--checkpoint", "x", "a.png", "--json"]) == 0
  told, errors = capfd.readouterr()
  assert clean(told + errors) and "text \\u001b" in told and "1\\u001b" in told
  assert json.loads(told[told.index("[\n") :])[0]["text"] == f"text {EVIL}\nmore"


def test_a_terminal_of_another_alphabet(tmp_path):
  """Texts that it cannot show are shown as escapes; broken bytes that it sends cost their turn."""
  code = (
    "import sys\n"
    "from mmjax import cli\n"
    "def command(options):\n"
    "  print(repr(sys.stdin.readline()), '\\u7ea2\\u5fc3')\n"
    "cli.COMMANDS['chat'] = command\n"
    "raise SystemExit(cli.main(['chat', '--checkpoint', 'x']))\n"
  )
  environment = dict(os.environ, PYTHONIOENCODING="ascii:strict", JAX_PLATFORMS="cpu")
  done = subprocess.run(
    [sys.executable, "-c", code], input=b"a\xff\n", capture_output=True, env=environment
  )
  assert done.stderr == b"" and done.stdout == b"'a\\udcff\\n' \\u7ea2\\u5fc3\n"


def test_the_report(tmp_path):
  c = configs.base()
  c.model.encoders.image = dict(kind="vit")
  c.log.wandb = EVIL
  rows = [dict(text=f"text {EVIL}", expected=[EVIL], correct=False)]
  write_report(
    tmp_path,
    configs.resolve(c),
    {EVIL: Result({EVIL: 1.0}, {"texts": dict(kind="texts", rows=rows)})},
  )
  page = (tmp_path / "report.html").read_text()
  assert clean(page) and "text \\u001b" in page


NAMES = (
  "",
  "../../x",
  "/tmp/x",
  "a/b",
  "..",
  ".hidden",
  "A",
  "1",
  "a b",
  "a\n",
  "a\x00b",
  "é",
  EVIL,
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_its_folder(name, evil_folder, tmp_path, capfd):
  data = tmp_path / "deep" / "data"
  for words in (
    ["data", "convert", "folder", str(evil_folder), "--name", name],
    ["data", "convert", "folder", str(evil_folder), "--name", "fine", "--split", name],
    ["data", "tokenizer", "--source", "openmoji", "--name", name],
  ):
    try:
      code = cli.main([*words, "--data-dir", str(data)])
    except SystemExit as error:
      code = error.code
    told = capfd.readouterr().err
    assert (
      code in (1, 2)
      and told.count("\n") == 1
      and clean(told)
      and ("can be called" in told or "cannot be called" in told or "empty" in told)
    ), told
  with pytest.raises(UserError, match="cannot be called"):
    convert("folder", evil_folder, name, data)
  with pytest.raises(UserError, match="cannot be called"):
    train_tokenizer_from_source("openmoji", name=name, data_dir=str(data))
  with pytest.raises(UserError, match="cannot be called"):
    write_dataset(name, data, {"train": []})
  if name not in ("A", "1", "é"):
    with pytest.raises(UserError, match="is no name of a data set"):
      open_source(dict(name=name, split="train"), str(data))
  assert sorted(os.listdir(tmp_path)) == [evil_folder.name]


@pytest.mark.parametrize(
  "words",
  [
    ("train", "--config", "c.py", "--workdir", ""),
    ("train", "--config", "", "--workdir", "run"),
    ("export", "--checkpoint", "x", "--to", "hf", "--out", ""),
    ("export", "--checkpoint", "", "--to", "hf", "--out", "o"),
    ("import", "--from", "hf", "", "--out", "o"),
    ("import", "--from", "hf", "x", "--out", " "),
    ("embed", "--checkpoint", "x", "--images", "", "--out", "o"),
    ("embed", "--checkpoint", "x", "--images", "p", "--out", ""),
    ("search", "--checkpoint", "x", "--images", "", "words"),
    ("eval", "--checkpoint", "x", "--out", ""),
    ("generate", "--checkpoint", "x", ""),
    ("data", "show", ""),
    ("data", "show", "a", "--out", ""),
    ("data", "build", ""),
    ("data", "convert", "folder", "", "--name", "a"),
    ("plan", "--config", "c.py", "--topology", "v5e-4", "--out", ""),
  ],
)
def test_an_empty_path_is_bad_usage(words, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  assert cli.main(list(words)) == 2
  assert "is empty" in capfd.readouterr().err and not os.listdir(tmp_path)


def test_names_of_what_is_cut_are_shown_clean(capfd):
  cut = CutMedia()
  cut.add([("audio", f"voices {EVIL}", "0.1 of 0.2 s")])
  told = capfd.readouterr().err
  assert told.count("\n") == 1 and "only the beginning is used" in told and clean(told)
