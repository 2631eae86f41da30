"""Every place that a command or a key names, given what no file can be called: one line that says
so, before any work, and nothing written.
"""

from __future__ import annotations

import os

import pytest

import mmjax
from mmjax import cli
from mmjax.config import UserError
from mmjax.data.sources import open_source
from tests.e2e import squares
from tests.inference import tiny

NAMES = {
  "long": "x" * 5000,
  "part": "d/" + "x" * 300,
  "deep": "x/" * 2100,
  "nul": "x\0y",
  "lone": "x\ud83dy",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Squares with their tokenizer and config, a checkpoint, a picture."""
  folder = tmp_path_factory.mktemp("world")
  squares.make(folder)
  (folder / "photos").mkdir()
  (folder / "photos" / "a.png").write_bytes(squares.picture("red"))
  (folder / "photos" / "a.txt").write_text("a red square")
  (folder / "model").mkdir()
  os.rename(tiny.save(tiny.config(), folder / "model"), folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MMJAX_DATA", str(folder / "data"))
    yield folder


COMMANDS = """
train --config PATH --workdir w
train --config TINY --workdir PATH
train --config TINY --workdir w --config.data.dir=PATH
train --config TINY --workdir w --config.data.text.tokenizer=PATH
train --config TINY --workdir w --config.init.from=PATH
train --config TINY --workdir w --config.data.sources.squares.name=PATH
train --config TINY --workdir w --config.data.sources.a.name=tars --config.data.sources.a.path=PATH
eval --checkpoint PATH
eval --checkpoint RUN --config PATH
eval --checkpoint RUN --config TINY --out PATH
plan --config PATH --topology h100-1
plan --config TINY --topology h100-1 --out PATH
plan --config TINY --topology h100-1 --apply PATH
plan --config TINY --topology h100-1 --dump-hlo PATH
data build tests.e2e.squares:build --data-dir PATH
data convert folder PATH --name a
data convert csv PATH --name a
data convert json PATH --name a
data convert documents PATH --name a
data convert parquet PATH --name a
data convert webdataset PATH --name a
data convert folder PHOTOS --name PATH
data convert folder PHOTOS --name a --media PATH
data convert folder PHOTOS --name a --root PATH
data convert folder PHOTOS --name a --data-dir PATH
data show PATH
data show squares --out PATH
data show squares --config PATH
data show squares --data-dir PATH
data tokenizer --source PATH --name a
data tokenizer --source squares --name PATH
data tokenizer --source squares --name a --data-dir PATH
config show PATH
import --from hf PATH --out w
import --from hf PHOTOS --out PATH
import --from hf PHOTOS --out w --adapter PATH
export --checkpoint PATH --to safetensors --out w
export --checkpoint RUN --to safetensors --out PATH
embed --checkpoint PATH --images PHOTOS --out w
embed --checkpoint RUN --images PATH --out w
embed --checkpoint RUN --texts PATH --out w
embed --checkpoint RUN --source PATH --out w
embed --checkpoint RUN --images PHOTOS --out PATH
search --checkpoint RUN --images PATH red
search --checkpoint RUN --index PATH red
predict --checkpoint RUN PATH
classify --checkpoint RUN PATH --labels a,b
classify --checkpoint RUN PHOTOS --labels a,b --out PATH
generate --checkpoint RUN PATH
chat --checkpoint PATH
serve --checkpoint PATH --port 0
init retrieval --source PATH --out w.py
init retrieval --source squares --tokenizer squares --out PATH.py
init retrieval --source squares --from PATH --out w.py
init retrieval --source squares --tokenizer PATH --out w.py
"""


@pytest.mark.parametrize("words", COMMANDS.strip().splitlines())
def test_what_no_file_can_be_called_is_said_in_one_line(
  words, world, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  places = dict(TINY=world / "tiny.py", RUN=world / "run", PHOTOS=world / "photos")
  for name in NAMES.values():
    filled = []
    for word in words.split():
      for place, path in places.items():
        word = str(path) if word == place else word
      filled.append(word.replace("PATH", name))
    code = cli.main(filled)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mmjax: ")]
    assert code in (1, 2) and "(--debug" not in line and "Error" not in line, line
    assert "x" in line and len(line) < 1000, line
  assert not [path for path in tmp_path.rglob("*") if path.is_file() and "owner" not in path.parts]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_they_are_mistakes_of_the_user_for_callers_from_python_too(name, world):
  with pytest.raises(UserError, match="cannot be a path"):
    mmjax.load(name)
  with pytest.raises(UserError, match="cannot be a path"):
    open_source(dict(name="squares", split="train"), name)


@pytest.mark.parametrize("to", ["s3://bucket/x", "gs://bucket/x", "http://host/x"])
@pytest.mark.parametrize(
  "words",
  [
    "export --checkpoint RUN --to safetensors --out",
    "embed --checkpoint RUN --images PHOTOS --out",
    "predict --checkpoint RUN PHOTOS --out",
    "plan --config gone.py --topology h100-1 --out",
    "data show squares --out",
  ],
)
def test_what_is_written_on_this_machine_is_not_written_at_a_url(
  words, to, world, tmp_path, monkeypatch, capsys
):
  """Nor in a folder that is called "s3:"."""
  monkeypatch.chdir(tmp_path)
  words = words.replace("RUN", str(world / "run")).replace("PHOTOS", str(world / "photos"))
  assert cli.main([*words.split(), to]) == 1
  assert f"{to}: this is written on this machine" in capsys.readouterr().err
  assert not os.listdir(tmp_path)


def test_a_folder_of_data_sets_whose_name_is_not_utf8_is_refused(world, tmp_path, capsys):
  photos = str(world / "photos")
  folder = f"{tmp_path}/caf\udce9"
  words = ["data", "convert", "folder", photos, "--name", "a", "--data-dir", folder]
  assert cli.main(words) == 1
  assert "is not UTF-8. Rename it" in capsys.readouterr().err
  assert not os.listdir(tmp_path)
