"""`mmjax init`: what it writes fits the data and the machine, is a model, and is laid out like the
configs of the repository.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess

import numpy as np
import pytest

from mmjax import cli, starter
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data import fitting
from mmjax.data.builders import write_dataset
from mmjax.data.examples import Examples
from mmjax.data.sources import open_source
from mmjax.data.tokenizers import Tokenizer
from mmjax.inference.parameters import param_spec
from mmjax.starter import sizes
from mmjax.starter.machine import Machine
from mmjax.starter.survey import fit
from mmjax.starter.text import Draft
from mmjax.state.checkpoint import names_and_shapes
from mmjax.state.paths import by_name
from tests.data.conftest import picture
from tests.data.test_audio import encode as sound
from tests.data.test_audio import tone
from tests.data.test_video import clip
from tests.data.test_video import encode as film
from tests.inference import tiny
from tests.inference.test_language import config as language_config

CPU = Machine("cpu", 1, 8 << 30, 2)
TPU = Machine("tpu", 8, 128 << 30, 96)
COLOURS = ("red", "green", "blue")


def record(number: int) -> dict:
  """A record with everything; sounds of 0.5 s but for one of 0.7 s, series of 40 steps."""
  colour = COLOURS[number % 3]
  rng = np.random.default_rng(number)
  return dict(
    id=str(number),
    image=picture(number, 40),
    image_key=number,
    audio=sound(tone(0.7 if number == 3 else 0.5), kind="FLAC"),
    video=film(clip(8, 32, 32)),
    series=np.float32([1000, 0]) + np.float32([50, 0.1]) * rng.normal(size=(40, 2)),
    captions={"de": [f"ein Ding in {colour}"], "fr": [f"une chose {colour}", "autre chose"]},
    questions=[("what colour is it?", colour), ("is it a thing?", "yes")],
    label=colour,
    value=np.float32([number, number % 3]),
  )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with the data sets "all", "one_split" and "many" (several labels a record)."""
  root = tmp_path_factory.mktemp("starter")
  fields = ("image", "audio", "video", "series", "questions", "value")
  splits = dict(train=[record(i) for i in range(30)], test=[record(i) for i in range(30, 36)])
  splits["validation"] = [record(i) for i in range(36, 42)]
  write_dataset("all", root, splits, fields=fields, metadata=dict(values=["price", "grade"]))
  write_dataset("one_split", root, {"train": splits["train"]}, fields=("series",))
  several = [dict(r, label="a|b" if i % 2 else "a") for i, r in enumerate(splits["train"])]
  write_dataset("many", root, {"train": several, "test": several[:4]}, fields=("image",))
  talks = {name: [talk(number) for number in range(12)] for name in ("train", "test")}
  write_dataset("talks", root, talks, fields=("image", "conversations"))
  turns = [dict(role="user", content="hello"), dict(role="assistant", content="good morning")]
  spoken = dict(id="0", image_key=0, captions={}, conversations=[turns])
  write_dataset("written", root, dict(train=[spoken], test=[spoken]), fields=("conversations",))
  return root


def talk(number: int) -> dict:
  """A picture with two questions, the answer to the second of which is long now and then."""
  turns = ("what colour?", COLOURS[number % 3], "sure?", "yes " * (9 if number == 5 else 1))
  turn = [dict(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(turns)]
  turn[0]["content"] = [dict(type="image"), dict(type="text", text=turns[0])]
  record = dict(id=str(number), image=picture(number, 40), image_key=number, captions={})
  return dict(record, conversations=[turn])


def init(data, tmp_path, task, *, source="all", machine=CPU, **options):
  """(the text that was written, the resolved config)."""
  out = tmp_path / "mine.py"
  starter.init(task, source, out, data_dir=str(data), machine=machine, **options)
  return out.read_text(), configs.load(str(out))


CASES = {
  "retrieval": dict(task="retrieval", modalities=("image", "text")),
  "retrieval of everything": dict(task="retrieval"),
  "sounds": dict(task="classification", modalities=("audio",)),
  "pictures and series": dict(task="classification", modalities=("image", "series")),
  "clips": dict(task="classification", modalities=("video",)),
  "texts": dict(task="classification", modalities=("text",)),
  "values": dict(task="regression", modalities=("image", "series")),
  "several labels": dict(task="multi-label", source="many"),
  "captions of clips": dict(task="captioning", modalities=("video",)),
  "speech": dict(task="speech-recognition"),
  "questions": dict(task="question-answering", modalities=("image",)),
  "dialogues about pictures": dict(task="dialogue", source="talks"),
  "dialogues": dict(task="dialogue", source="written"),
  "on a slice": dict(task="retrieval", modalities=("image", "text"), machine=TPU),
  "clip": dict(task="retrieval", modalities=("image", "text"), hf="usual"),
  "vit": dict(task="classification", modalities=("image",), hf="usual"),
  "bert": dict(task="classification", modalities=("text",), hf="usual"),
  "siglip": dict(task="retrieval", modalities=("image", "text"), hf="siglip"),
  "resnet": dict(task="classification", modalities=("image",), hf="resnet"),
  "several labels of a resnet": dict(task="multi-label", source="many", hf="resnet"),
  "siglip on a slice": dict(
    task="retrieval", modalities=("image", "text"), hf="siglip", machine=TPU
  ),
  "resnet on a slice": dict(task="classification", modalities=("image",), hf="resnet", machine=TPU),
  "llama": dict(task="dialogue", source="written", hf="llama"),
  "whisper": dict(task="speech-recognition", hf="usual"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_short_laid_out_as_usual_and_a_model(case, data, tmp_path):
  text, config = init(data, tmp_path, **CASES[case])
  (function,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
  assert function.end_lineno - function.lineno <= (60 if len(config.model.encoders) < 4 else 90)
  ruff = ["ruff", "format", "--check", "--line-length=100", "--config=indent-width=2"]
  assert subprocess.run([*ruff, tmp_path / "mine.py"], capture_output=True).returncode == 0
  assert param_spec(config) and config.data.dir == str(data)
  splits = {entry.split for entry in config.evaluation.evaluators.values()}
  assert splits == ({"validation", "test"} if config.data.sources.get("all") else {"test"})
  if CASES[case].get("hf"):
    from mmjax.training.start import check_export

    check_export(config, tiny.assets(tmp_path))  # export.hf is set: it raises


def test_lengths_languages_and_statistics_are_those_of_the_data(data, tmp_path):
  text, config = init(data, tmp_path, "speech-recognition")
  assert config.data.audio.seconds == 0.8 and "the longest of 30 sounds fits" in text
  tokenizer = Tokenizer.from_assets(
    {"tokenizer.model": (data / "tokenizers" / f"{config.data.text.tokenizer}.model").read_bytes()}
  )
  texts = [text for i in range(3) for several in record(i)["captions"].values() for text in several]
  longest = max(len(tokenizer.encode(text)) for text in texts)
  assert 0 <= config.data.text.length - (longest + 1) < 4
  assert config.data.text.vocab_size == tokenizer.vocab_size
  assert config.data.sources.all.languages == ()  # all: de and fr
  _, config = init(data, tmp_path, "captioning", languages=("fr",), force=True)
  assert config.data.sources.all.languages == ("fr",)
  _, config = init(data, tmp_path, "classification", modalities=("series",), force=True)
  np.testing.assert_allclose(config.data.series.mean, (1000, 0), atol=5)
  np.testing.assert_allclose(config.data.series.std, (50, 0.1), rtol=0.1)
  assert config.data.series.length == 40 and config.data.series.channels == 2
  assert config.data.classes == 3
  assert config.checkpoint.best == "classification/validation/accuracy"


def test_rows_hold_the_conversations_of_the_data(data, tmp_path):
  text, config = init(data, tmp_path, "dialogue", source="talks")
  sequence = config.data.sequence
  assert sequence.image == (config.data.image.size // 16) ** 2 and "of 12 conversations" in text
  source = open_source(dict(name="talks", split="train", languages=()), str(data))
  source.text = "conversation"
  pieces, places, _ = fitting.examples(Examples(config, train=False).sequences, source)
  assert all(piece.stop == 0 for piece in pieces) and sequence.length >= places.max()
  assert sequence.slots >= sequence.length // np.median(places)
  assert "conversations each" in text


def test_a_run_on_conversations_is_no_longer_than_others():
  steps = sizes.steps(10_000, 16, ("text",), sizes.work_of_tokens(320), CPU)
  assert 200 < steps * 16 * 320 / (2 * sizes.TOKENS) <= 60 * sizes.MINUTES * 1.03  # seconds


def test_a_length_that_a_hundredth_exceeds_by_far_cuts_and_says_so():
  lengths = np.array([10.0] * 990 + [10.4] * 9 + [300.0])
  found = fit(lengths, 0.5, 30)
  assert (found.value, found.cut) == (10.5, 1)
  assert found.says("sounds") == "1 of 1,000 sounds are longer and will be cut"


def test_a_data_set_of_one_split_is_warned_of(data, tmp_path, capsys):
  text, config = init(data, tmp_path, "classification", source="one_split")
  assert "There is no other split" in text and config.checkpoint.best == ""
  assert "--split train:80,validation:10,test:10" in capsys.readouterr().out


@pytest.mark.parametrize(
  "task, options, message",
  [
    ("multi-label", dict(source="nowhere"), "no data set 'nowhere'"),
    ("classification", dict(source="many"), "several labels each: `mmjax init multi-label`"),
    ("captioning", dict(source="one_split", modalities=("image",)), "--modality image.*has series"),
    ("speech-recognition", dict(source="many"), "no sounds to transcribe"),
    ("question-answering", dict(source="many"), "no questions with answers"),
    ("dialogue", dict(source="many"), "has no conversations"),
    ("retrieval", dict(languages=("en",)), "--languages en.*has fr, de"),
    (
      "classification",
      dict(hf="usual", modalities=("image", "series")),
      "--hf.*no model for classif",
    ),
    ("classification", dict(hf="bert", modalities=("image",)), "--hf bert: .* are vit, resnet"),
    ("regression", dict(hf="usual", modalities=("image",)), "--hf.*no model for regression"),
    ("retrieval", dict(tokenizer="nothing"), "no tokenizer 'nothing'"),
  ],
)
def test_what_the_data_lacks_is_said(task, options, message, data, tmp_path):
  with pytest.raises(UserError, match=message):
    init(data, tmp_path, task, **options)
  assert not (tmp_path / "mine.py").exists()


def test_the_command_writes_a_file_once(data, tmp_path, capsys):
  out = str(tmp_path / "photos.py")
  words = f"init classification --source all --modality image --out {out} --data-dir {data}"
  assert cli.main(words.split()) == 0
  assert f"mmjax train --config {out} --workdir runs/photos" in capsys.readouterr().out
  assert cli.main(words.split()) == 1 and "--force" in capsys.readouterr().err
  assert cli.main([*words.split(), "--force"]) == 0


def test_the_command_that_stands_in_a_config_writes_the_same(data, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  options = "--modality image,text --languages fr --split train[:90%] --hf"
  words = f"init retrieval --source all {options} --out a.py --data-dir {data}"
  assert cli.main(words.split()) == 0
  text = (tmp_path / "a.py").read_text()
  (line,) = [line for line in text.splitlines() if line.startswith("mmjax init ")]
  assert cli.main([*shlex.split(line)[1:], "--force"]) == 0
  assert (tmp_path / "a.py").read_text() == text and "c.export.hf = True" in text


def test_a_value_from_the_data_cannot_break_out_of_its_place():
  draft = Draft()
  draft.set("data.x", 'a"\n  import os', "a comment\n  import os")
  draft.note("more\nimport os")
  draft.set("data.sources.class", dict(name="class"))  # a data set may be called so
  tree = ast.parse(draft.file("doc"))
  assert not re.search(r"^\s*import os", draft.file("doc"), re.M)
  assert len(tree.body) == 3


# -- From a checkpoint -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A dual encoder of pictures and texts with a tokenizer."""
  folder = tmp_path_factory.mktemp("origin")
  config = tiny.config(pooling="class")
  return tiny.save(config, folder)


def test_from_a_checkpoint_its_tokenizer_and_preprocessing_are_taken(data, tmp_path, checkpoint):
  text, config = init(
    data, tmp_path, "retrieval", start=str(checkpoint), modalities=("image", "text")
  )
  assert config.init["from"] == str(checkpoint) and config.data.image.size == 16
  assert config.model.encoders.image.pooling == "class" and config.model.width == 16
  assert config.model.bias and config.data.text.vocab_size == 512
  folder = data / "tokenizers" / config.data.text.tokenizer
  assert (folder / "tokenizer.model").read_bytes() == (
    checkpoint.parent / "tiny.model"
  ).read_bytes()
  assert config.init.map == ((".*", r"\g<0>"),)  # everything is loaded


def test_a_classifier_takes_the_encoder_and_learns_the_rest(data, tmp_path, checkpoint):
  text, config = init(data, tmp_path, "classification", start=str(checkpoint))
  assert list(config.model.encoders) == ["image"] and config.model.encoders.image.width == 16
  assert config.init.map == ((r"image(/.*)?", r"\g<0>"), (".*", None))
  assert "new: image_classifier" in text
  assert config.optimizer.rates == ((r"image/.*", 0.1),)


def test_a_language_model_goes_on_with_its_tokenizer_and_places(data, tmp_path):
  origin = tiny.save(language_config(), tmp_path)
  text, config = init(data, tmp_path, "dialogue", source="talks", start=str(origin))
  assert config.data.image.size == 16 and config.data.sequence.image == 4
  assert config.data.text.template == "plain" and config.data.text.vocab_size == 512
  tokens = {name: leaf.shape for name, leaf in by_name(param_spec(config)).items()}
  assert tokens == {name: leaf.shape for name, leaf in names_and_shapes(str(origin)).items()}
  assert config.init.map == ((".*", r"\g<0>"),) and "everything is loaded" in text
