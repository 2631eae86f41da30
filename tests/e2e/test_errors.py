"""Bad inputs end in one clear line, with the right exit code, and nothing half-written."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mmjax import cli
from tests.e2e.commands import QUICKSTART, SMALL, command, environment, run


@pytest.fixture
def mmjax(capsys, embedded_data):
  """Runs a command in this process: (exit code, stderr)."""

  def call(*words):
    try:
      code = cli.main([str(w) for w in words])
    except SystemExit as stop:
      code = stop.code
    return code, capsys.readouterr().err

  return call


def refused(result, code, *words):
  got, err = result
  lines = [line for line in err.splitlines() if line.startswith("mmjax:")]
  assert got == code and len(lines) == 1 and "Traceback" not in err, f"exit code {got}\n{err}"
  assert all(word in lines[0] for word in words), lines[0]


def jpeg(size=(32, 32), quality=90) -> bytes:
  out = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
  Image.fromarray(pixels).save(out, "JPEG", quality=quality)
  return out.getvalue()


def huge_png() -> bytes:
  """A valid PNG header of 20,000 x 20,000 pixels with next to no data."""

  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    + chunk(b"IEND", b"")
  )


def tar(path, members):
  with tarfile.open(path, "w") as file:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return path


# -- The command line and the config: exit code 2 --------------------------------------------------


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ((), ["COMMAND"]),
    (("trian",), ["trian"]),
    (("train", "--config", QUICKSTART), ["--workdir"]),
    (
      ("train", "--config", QUICKSTART, "--workdir", "w", "--stepz=3"),
      ["--stepz=3", "--config.KEY=VALUE"],
    ),
    (("train", "--config", "configs/quickstrat.py", "--workdir", "w"), ["no such config file"]),
    (
      ("train", "--config", QUICKSTART, "--workdir", "w", "--config.optimizer.lrr=1"),
      ["optimizer.lrr", "'lr'"],
    ),
    (
      ("train", "--config", QUICKSTART, "--workdir", "w", "--config.optimizer.lr=fast"),
      ["optimizer.lr", "float"],
    ),
    (
      (
        "train",
        "--config",
        QUICKSTART,
        "--workdir",
        "w",
        "--config.objectives.align.between=('image','audio')",
      ),
      ["audio", "image, text"],
    ),
    (
      (
        "train",
        "--config",
        QUICKSTART,
        "--workdir",
        "w",
        "--config.mesh.data=3",
        "--config.train.batch_size=24",
      ),
      ["mesh", "8 devices"],
    ),
    (
      ("train", "--config", QUICKSTART, "--workdir", "w", "--config.train.microbatches=7"),
      ["microbatches", "189"],
    ),
    (
      ("train", "--config", QUICKSTART, "--workdir", "w", "--config.data.image.size=50"),
      ["50", "patch"],
    ),
    (("config", "show", QUICKSTART, "--config.seed=x"), ["seed", "int"]),
    (("data", "convert", "zip", "x", "--name", "y"), ["zip", "folder"]),
    (("export", "--checkpoint", "x", "--to", "onnx", "--out", "y"), ["onnx", "safetensors"]),
  ],
)
def test_usage(mmjax, tmp_path, monkeypatch, words, expected):
  monkeypatch.chdir(tmp_path)
  refused(mmjax(*words), 2, *expected)
  assert list(tmp_path.iterdir()) == []


def test_a_config_that_fails_is_named_with_its_error(mmjax, tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("def get_config(arg=''):\n  return 1 / 0\n")
  refused(mmjax("config", "show", path), 2, "broken.py", "ZeroDivisionError")
  path.write_text("def get_config(arg=''\n")
  refused(mmjax("config", "show", path), 2, "broken.py", "SyntaxError")
  path.write_text("x = 1\n")
  refused(mmjax("config", "show", path), 2, "broken.py", "get_config")


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    (["data.text.vocab_size=512"], ["512", "1024"]),
    (["optimizer.rates=((r'imgae/.*', 0.0),)"], ["imgae", "image/"]),
  ],
)
def test_a_config_that_does_not_fit_its_tokenizer_or_its_model(mmjax, tmp_path, settings, expected):
  words = [*SMALL, *(f"--config.{s}" for s in settings)]
  refused(mmjax("train", "--config", QUICKSTART, "--workdir", tmp_path / "w", *words), 2, *expected)
  assert list(tmp_path.iterdir()) == []


# -- Data: exit code 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    (["data.sources.emoji.name=openmojis"], ["openmojis", "openmoji"]),
    (["data.sources.emoji.split=trian"], ["trian", "train"]),
    (["data.sources.emoji.languages=('xx',)"], ["xx", "en"]),
    (["data.text.tokenizer=quickstrat"], ["quickstrat", "quickstart"]),
    (
      ["data.sources.emoji.name=tars", "data.sources.emoji.path=/nowhere/*.tar"],
      ["/nowhere/*.tar"],
    ),
    (["init.from=/nowhere"], ["/nowhere"]),
  ],
)
def test_training_on_what_is_not_there(mmjax, tmp_path, settings, expected):
  words = [*SMALL, *(f"--config.{s}" for s in settings)]
  refused(mmjax("train", "--config", QUICKSTART, "--workdir", tmp_path / "w", *words), 1, *expected)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_where_a_folder_should_be(mmjax, tmp_path, below):
  file, out = tmp_path / "file", tmp_path / "out"
  file.write_text("x")
  place, train = file / below, ("train", "--config", QUICKSTART, *SMALL)
  data = ("--config.data.dir=" + str(place), "--workdir", out)
  for words, said in (
    ((*train, *data), "data sets lie in a folder"),
    (("data", "build", "openmoji", "--data-dir", place), "data sets lie in a folder"),
    (("data", "show", "openmoji", "--data-dir", place), "data sets lie in a folder"),
    ((*train, "--workdir", place), "cannot be written"),
    ((*train, "--workdir", out, f"--config.init.from={place}"), "init.from"),
    (("import", "--from", "hf", place, "--out", out), "no such folder"),
    (("eval", "--checkpoint", place), "no checkpoint here"),
  ):
    refused(mmjax(*words), 1, said, str(file))
  assert list(tmp_path.iterdir()) == [file] and file.read_text() == "x"


def test_unknown_data_set(mmjax, tmp_path):
  refused(mmjax("data", "build", "openmojj", "--data-dir", tmp_path), 1, "openmojj", "openmoji")
  refused(mmjax("data", "show", "openmojj", "--data-dir", tmp_path), 1, "openmojj")
  refused(
    mmjax("data", "tokenizer", "--source", "nothing", "--name", "t", "--data-dir", tmp_path),
    1,
    "nothing",
  )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "jsonl", "webdataset", "parquet"])
def test_converting_what_is_missing(mmjax, tmp_path, kind):
  refused(
    mmjax(
      "data",
      "convert",
      kind,
      tmp_path / "nothing",
      "--name",
      "mine",
      "--data-dir",
      tmp_path / "data",
    ),
    1,
    "nothing",
  )


def bad_tars(folder):
  good = jpeg()
  yield tar(folder / "empty.tar", []), "no "
  yield tar(folder / "escape.tar", [("../escape.jpg", good), ("../escape.txt", b"out")]), ""
  whole = tar(folder / "whole.tar", [("a.jpg", good), ("a.txt", b"caption")]).read_bytes()
  (folder / "truncated.tar").write_bytes(whole[:700])
  yield folder / "truncated.tar", ""
  (folder / "garbage.tar").write_bytes(b"not a tar " * 200)
  yield folder / "garbage.tar", ""
  yield tar(folder / "picture.tar", [("a.jpg", good[:200]), ("a.txt", b"caption")]), ""
  yield tar(folder / "huge.tar", [("a.png", huge_png()), ("a.txt", b"caption")]), ""
  yield (
    tar(
      folder / "pickle.tar",
      [("a.pkl", b"cos\nsystem\n(S'touch owned'\ntR."), ("a.txt", b"caption")],
    ),
    "",
  )


def test_tars_without_one_good_example(mmjax, tmp_path):
  for path, word in bad_tars(tmp_path):
    refused(
      mmjax(
        "data",
        "convert",
        "webdataset",
        path,
        "--name",
        path.stem,
        "--data-dir",
        tmp_path / "data",
        "--workers",
        1,
      ),
      1,
      path.name,
      word,
    )
  assert not (tmp_path.parent / "escape.jpg").exists() and not (tmp_path / "owned").exists()
  assert (
    not [p for p in (tmp_path / "data").rglob("*.array_record*")]
    if (tmp_path / "data").exists()
    else True
  )


def test_bad_records_are_skipped_counted_and_named(mmjax, tmp_path, capsys):
  folder = tmp_path / "pictures"
  folder.mkdir()
  lines = []
  for name in ("nan.jpg", "silent.jpg"):
    (folder / name).write_bytes(jpeg())
  for i in range(4):
    (folder / f"{i}.jpg").write_bytes(jpeg())
    lines.append(dict(image=f"{i}.jpg", caption="long " * 2000 if i == 0 else f"picture {i}"))
  (folder / "cut.jpg").write_bytes(jpeg()[:300])
  (folder / "huge.png").write_bytes(huge_png())
  lines += [
    dict(image="cut.jpg", caption="cut"),
    dict(image="huge.png", caption="huge"),
    dict(image="gone.jpg", caption="gone"),
    dict(image="../../etc/passwd", caption="out"),
    dict(image="nan.jpg", caption=float("nan")),
    dict(image="silent.jpg", caption=""),
  ]
  text = "\n".join(json.dumps(line) for line in lines) + "\n{broken\n"
  (folder / "captions.jsonl").write_text(text)
  code = cli.main(
    [
      "data",
      "convert",
      "jsonl",
      str(folder / "captions.jsonl"),
      "--name",
      "mine",
      "--data-dir",
      str(tmp_path / "data"),
      "--workers",
      "1",
      "--json",
    ]
  )
  printed = capsys.readouterr().out
  assert code == 0, printed
  summary = json.loads(printed)
  assert summary["examples"] == 4 and sum(summary["skipped"].values()) == 7


def test_unreadable_folders(mmjax, tmp_path):
  (tmp_path / "empty").mkdir()
  refused(
    mmjax(
      "data", "convert", "folder", tmp_path / "empty", "--name", "e", "--data-dir", tmp_path / "d"
    ),
    1,
    "empty",
  )
  (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
  refused(
    mmjax(
      "data",
      "convert",
      "parquet",
      tmp_path / "x.parquet",
      "--name",
      "e",
      "--data-dir",
      tmp_path / "d",
    ),
    1,
    "x.parquet",
  )


# -- Run folders and checkpoints: exit code 1 ------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, embedded_data):
  folder = tmp_path_factory.mktemp("trained")
  run(
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    str(folder),
    *SMALL,
    "--config.train.steps=4",
    "--config.evaluation.every=0",
  )
  return folder


def test_run_folders_that_cannot_be_used(mmjax, tmp_path):
  (tmp_path / "file").write_text("")
  refused(mmjax("train", "--config", QUICKSTART, "--workdir", tmp_path / "file", *SMALL), 1, "file")
  refused(
    mmjax("train", "--config", QUICKSTART, "--workdir", "/proc/nothing", *SMALL), 1, "/proc/nothing"
  )


def test_a_resume_with_other_settings_names_them(mmjax, trained):
  words = [
    *SMALL,
    "--config.train.steps=8",
    "--config.evaluation.every=0",
    "--config.optimizer.lr=0.5",
  ]
  refused(
    mmjax("train", "--config", QUICKSTART, "--workdir", trained, *words),
    1,
    "optimizer.lr",
    "--allow-change",
  )


def test_a_longer_cosine_is_refused(mmjax, trained):
  words = [*SMALL, "--config.train.steps=8", "--config.evaluation.every=0"]
  refused(
    mmjax("train", "--config", QUICKSTART, "--workdir", trained, *words),
    1,
    "train.steps 4 -> 8",
    "cosine",
  )


def test_a_checkpoint_of_another_model(mmjax, trained, tmp_path):
  words = [*SMALL, "--config.model.encoders.text.depth=2", f"--config.init.from={trained}"]
  refused(
    mmjax("train", "--config", QUICKSTART, "--workdir", tmp_path / "w", *words), 1, "text/layers"
  )


def test_no_checkpoint(mmjax, tmp_path):
  for words in (
    ("eval", "--checkpoint", tmp_path),
    ("export", "--checkpoint", tmp_path, "--to", "safetensors", "--out", tmp_path / "o"),
    ("embed", "--checkpoint", tmp_path / "gone", "--images", tmp_path, "--out", tmp_path / "e.npz"),
  ):
    refused(mmjax(*words), 1, str(tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_inference_on_what_is_not_there(mmjax, trained, tmp_path):
  (tmp_path / "none").mkdir()
  refused(
    mmjax(
      "embed", "--checkpoint", trained, "--images", tmp_path / "gone", "--out", tmp_path / "e.npz"
    ),
    1,
    "gone",
  )
  refused(
    mmjax("search", "--checkpoint", trained, "--images", tmp_path / "none", "a heart"), 1, "none"
  )
  refused(
    mmjax("eval", "--checkpoint", trained, "--suite", "retreival"), 1, "retreival", "retrieval/"
  )
  (tmp_path / "cut.jpg").write_bytes(jpeg()[:200])
  (tmp_path / "x").mkdir()
  refused(
    mmjax(
      "search", "--checkpoint", trained, "--images", trained / "checkpoints", tmp_path / "cut.jpg"
    ),
    1,
  )


def test_export_does_not_overwrite(mmjax, trained, tmp_path):
  (tmp_path / "kept").mkdir()
  (tmp_path / "kept" / "precious").write_text("")
  refused(
    mmjax("export", "--checkpoint", trained, "--to", "safetensors", "--out", tmp_path / "kept"),
    1,
    "kept",
  )
  assert [p.name for p in (tmp_path / "kept").iterdir()] == ["precious"]


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({}, ["config.json"]),
    ({"config.json": "{"}, ["config.json"]),
    ({"config.json": '{"model_type": "blip"}'}, ["blip", "clip"]),
  ],
)
def test_importing_what_is_no_model(mmjax, tmp_path, files, expected):
  (tmp_path / "hf").mkdir()
  for name, text in files.items():
    (tmp_path / "hf" / name).write_text(text)
  refused(mmjax("import", "--from", "hf", tmp_path / "hf", "--out", tmp_path / "out"), 1, *expected)
  assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing_that_was_saved(trained, tmp_path):
  """A limit on file size stands for the full disk: writes fail half-way with an OSError."""
  import resource
  import shutil
  import subprocess

  from tests.e2e.commands import command, environment, metrics

  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  words = [
    "train",
    "--config",
    QUICKSTART,
    "--workdir",
    str(folder),
    *SMALL,
    "--config.train.steps=8",
    "--config.evaluation.every=0",
    "--allow-change",
  ]
  before = metrics(folder)
  limited = subprocess.run(
    command(*words),
    env=environment(),
    capture_output=True,
    text=True,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
  )
  lines = [line for line in limited.stderr.splitlines() if line.startswith("mmjax:")]
  assert limited.returncode == 1 and len(lines) == 1, limited.stderr
  assert metrics(folder)[: len(before)] == before
  run(*words)
  assert metrics(folder)[-1]["step"] == 8


@pytest.mark.parametrize(
  "words",
  [
    ("data", "convert", "folder", "photos", "--name", "a", "--workers"),
    ("data", "show", "openmoji", "--count"),
    ("data", "show", "openmoji", "--seed"),
    ("data", "tokenizer", "--source", "openmoji", "--name", "a", "--vocab-size"),
    ("search", "--checkpoint", "run", "--images", "photos", "cat", "-k"),
    ("generate", "--checkpoint", "run", "a.png", "--beams"),
    ("generate", "--checkpoint", "run", "a.png", "--max-length"),
    ("generate", "--checkpoint", "run", "a.png", "--length-penalty"),
  ],
)
def test_a_number_out_of_its_range_is_bad_usage(words, mmjax):
  for number in ("-1" if words[-1] != "--length-penalty" else "-1000", "1" + "0" * 30, "many", ""):
    refused(mmjax(*words[:-1], f"{words[-1]}={number}"), 2, words[-1], "but must be a", "number")


@pytest.mark.parametrize("name", ("9999xv5e-256", "v5e-" + "1" * 5000, "0xv5e-4", "v5p:4x4x999"))
def test_a_slice_that_nobody_has_is_bad_usage(name, mmjax):
  refused(mmjax("plan", "--config", "configs/quickstart.py", "--topology", name), 2, "--topology")


def test_a_current_folder_that_was_deleted_is_named(mmjax, tmp_path, monkeypatch):
  (tmp_path / "gone").mkdir()
  monkeypatch.chdir(tmp_path / "gone")
  (tmp_path / "gone").rmdir()
  refused(mmjax("data", "show", "openmoji"), 2, "the current folder is gone")


@pytest.mark.parametrize(
  "words",
  [
    ("predict", "--checkpoint", "CHECKPOINT", "x.png"),
    ("classify", "--checkpoint", "CHECKPOINT", "x.png", "--labels", "a,b"),
    ("plan", "--config", "gone.py", "--topology", "v5e-4"),
    ("plan", "--config", "gone.py", "--topology", "v5e-4", "--sweep", "--out", "x", "--apply"),
    ("data", "show", "gone"),
    ("init", "classification", "--source", "gone"),
  ],
)
def test_where_results_cannot_go_is_said_before_the_work(mmjax, trained, tmp_path, words):
  """The inputs are missing, too: of the two the output is looked at first."""
  (tmp_path / "file").write_text("")
  out = tmp_path / "file" / "out.py"
  words = [trained if word == "CHECKPOINT" else word for word in words]
  flag = () if words[-1] == "--apply" else ("--out",)
  refused(mmjax(*words, *flag, out), 1, f"{out} cannot be written", "is no folder")


def test_an_evaluation_that_could_not_be_written_is_not_made(mmjax, trained, tmp_path, monkeypatch):
  from mmjax.evaluation import Evaluation

  monkeypatch.setattr(Evaluation, "run", lambda *_, **__: pytest.fail("it was evaluated"))
  (tmp_path / "file").write_text("")
  out = tmp_path / "file" / "out"
  refused(mmjax("eval", "--checkpoint", trained, "--out", out), 1, f"{out} cannot be written")


def test_what_may_not_be_read_is_named_with_a_remedy(mmjax, tmp_path, monkeypatch):
  def denied(*_, **__):
    raise PermissionError(13, "Permission denied", str(tmp_path / "theirs"))

  monkeypatch.setattr("mmjax.data.builders.build", denied)
  refused(mmjax("data", "build", "openmoji"), 1, "theirs", "Permission denied. Change")


def test_an_interpreter_that_cannot_be_started_again_goes_on_as_it_is(monkeypatch):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

  def denied(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("os.execv", denied)
  cli._use_huge_pages()


@pytest.mark.parametrize(
  ("variable", "value", "expected"),
  [
    ("JAX_PLATFORMS", "zzz", ["Unable to initialize backend 'zzz'"]),
    ("MMJAX_CPU_DEVICES", "100000", ["MMJAX_CPU_DEVICES", "at most 1_024"]),
    ("MMJAX_CPU_DEVICES", "many", ["MMJAX_CPU_DEVICES", "whole number"]),
  ],
)
def test_a_variable_that_cannot_be_is_one_line(embedded_data, tmp_path, variable, value, expected):
  words = command("train", "--config", QUICKSTART, "--workdir", tmp_path / "w", *SMALL)
  env = environment() | {variable: value}
  done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
  refused((done.returncode, done.stderr), 1, *expected)
  assert "--debug" not in done.stderr
