"""What a config cuts of a source: counted = kept + cut + left out, and what batches then hold."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmjax import cli
from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.builders import write_dataset
from mmjax.data.builders.convert import convert
from mmjax.data.cuts import cut_lines, fits, measure_for
from mmjax.data.examples import Examples, Row
from mmjax.data.sources import open_source
from mmjax.data.tokenizer_training import train_tokenizer
from tests.data.conftest import record
from tests.data.test_audio import encode, tone


def by_hand(config, entry):
  """{what: (kept, cut)} by making every row: what is left out of texts is what no row can draw."""
  source = open_source(entry, config)
  examples = Examples(config, train=False)
  tokenizer, text = examples.text.tokenizer, config.data.text
  room = text.length - text.bos - text.eos
  captions = [
    caption
    for i in range(len(source))
    for captions in source[i]["captions"].values()
    for caption in captions[: entry["captions"] or None]
  ]
  lengths = [len(tokenizer.encode(caption)) for caption in captions]
  found = {"captions": (sum(n <= room for n in lengths), sum(n > room for n in lengths))}
  batch = examples([Row(source, i) for i in range(len(source))], [None] * len(source))
  for modality, what in (("audio", "sounds"), ("series", "series")):
    cut = sum(name == modality for name, *_ in batch["cut"])
    found[what] = (int(batch[modality]["present"].sum()) - cut, cut)
  return found


@given(
  rows=st.lists(
    st.tuples(
      st.integers(1, 9),
      st.integers(0, 9),
      st.sampled_from((None, 0.2, 0.5, 0.75)),
      st.sampled_from((None, 3, 8, 12)),
    ),
    min_size=1,
    max_size=6,
  ),
  languages=st.sampled_from((("en",), ("en", "de"), ())),
  first=st.integers(0, 2),
  length=st.integers(3, 20),
  bos=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_text_sound_and_series_is_kept_cut_or_left_out(
  tiny, tmp_path_factory, rows, languages, first, length, bos
):
  root = tmp_path_factory.mktemp("cuts")
  records = []
  for number, (english, german, seconds, steps) in enumerate(rows):
    captions = {"en": ["red thing " * english, "blue"]}
    if german:
      captions["de"] = ["ein Ding " * german]
    media = dict(
      image=None,
      audio=encode(tone(seconds, 8000), 8000) if seconds else None,
      series=np.zeros((steps, 1), np.float32) if steps else None,
    )
    records.append(record(number, captions=captions, **media))
  write_dataset("mine", root, {"train": records}, fields=("audio", "series"))
  if "de" not in {name for r in records for name in r["captions"]}:
    languages = ("en",)
  c = configs.base()
  c.data.dir, c.data.text.vocab_size, c.data.text.length = str(root), 512, length
  c.data.text.tokenizer, c.data.text.bos = str(tiny / "tokenizers" / "tiny.model"), bos
  c.data.audio.seconds, c.data.series = 0.5, dict(length=8, channels=1)
  c.data.missing, c.data.modalities = "mask", ("text", "audio", "series")
  c.data.sources.mine = dict(name="mine", languages=languages, captions=first)
  c.model = dict(name="multitask", encoders=dict(text=dict(kind="transformer")))
  config = configs.resolve(c)
  entry = config.data.sources.mine
  found = {fit.what: fit for fit in fits(config, entry, measure_for(config, entry))}
  for what, (kept, cut) in by_hand(config, entry).items():
    fit = found.get(what)
    assert (kept, cut) == ((fit.kept, fit.cut) if fit else (0, 0)), what
  texts = found["captions"]
  assert texts.kept + texts.cut + texts.left_out == sum(
    len(some) for r in records for some in r["captions"].values()
  )
  if texts.cut:  # with the setting that it names, nothing is cut
    wider = configs.resolve(c, [f"{texts.key}={texts.setting:g}"])
    (fit,) = (
      fit for fit in fits(wider, entry, measure_for(wider, entry)) if fit.what == "captions"
    )
    assert fit.cut == 0 and fit.kept == texts.kept + texts.cut


WORDS = ("red", "thing", "Blüte", "twenty-one")
SOUNDS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
LIMIT = 0.5  # seconds


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
  """{kind: (file, its own way from a text to pieces)}: two that mmjax trains, and one of others."""
  folder, texts = tmp_path_factory.mktemp("tokenizers"), [" ".join(WORDS), *WORDS] * 8
  found = {}
  for model in ("unigram", "bpe"):
    path = train_tokenizer(texts, folder / f"{model}.model", 360, model)
    found[model] = path, sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
  other = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
  other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  special = ["<pad>", "<bos>", "<eos>", "<unk>"]
  other.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=special))
  other.save(str(folder / "tokenizer.json"))
  names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  found["words"] = folder / "tokenizer.json", lambda text: other.encode(text).ids
  return found


@given(
  files=st.lists(
    st.tuples(
      st.sampled_from((*SOUNDS, ".xyz", "")),
      st.sampled_from((0.25, 0.5, 0.75)),
      st.lists(st.sampled_from(WORDS), max_size=9),
    ),
    min_size=6,
    max_size=12,
  ),
  split=st.sampled_from((None, "all", "train:1,test:1")),
  tokenizer=st.sampled_from(("unigram", "bpe", "words")),
  ends=st.sampled_from(((False, True), (True, True))),
  lowercase=st.booleans(),
  length=st.integers(3, 16),
  part=st.integers(1, 99),
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@example(
  files=[(".wav", 0.25, [])] * 5 + [(".wav", 0.25, ["red"])],  # of one split nothing is left
  split="train:1,test:1",
  tokenizer="unigram",
  ends=(False, True),
  lowercase=False,
  length=3,
  part=1,
)
def test_all_of_a_folder_is_kept_cut_or_left_out(
  tokenizers_of, tmp_path_factory, files, split, tokenizer, ends, lowercase, length, part
):
  """From files of any ending to what a run reads of them, in every split and in parts of it."""
  root = tmp_path_factory.mktemp("folder")
  (root / "in").mkdir()
  texts, alone = {}, 0
  for number, (ending, seconds, words) in enumerate(files):
    (root / "in" / f"{number}{ending}").write_bytes(
      encode(tone(seconds, 8000, 300 + 50 * number), 8000, SOUNDS.get(ending, "WAV"))
    )
    if words:
      (root / "in" / f"{number}.txt").write_text(" ".join(words))
    if words and ending in SOUNDS:
      texts[f"{number}{ending}"] = " ".join(words), seconds
    else:  # a file without a text, or with one that is left out as well
      alone += 1 + (bool(words) and ending not in SOUNDS)
  try:
    first = convert("folder", root / "in", "mine", root, split=split, log=lambda line: None)
  except UserError as error:  # nothing is left, in all or in a split
    shares = split == "train:1,test:1"
    assert not texts or (shares and re.search("falls into split|of split .* left out", str(error)))
    return
  every = (first, *first.others)
  left_out = [count for one in every for count in one.skipped.values()]
  by_ending = [n for one in every for found in one.endings.values() for n in found.values()]
  assert sum(one.examples for one in every) == len(texts)
  assert sum(left_out) == sum(by_ending) == alone
  path, pieces = tokenizers_of[tokenizer]
  c = configs.base()
  c.data.dir, c.data.text.vocab_size, c.data.text.length = str(root), 512, length
  c.data.text.tokenizer, c.data.text.lowercase = str(path), lowercase
  c.data.text.bos, c.data.text.eos = ends
  c.data.audio.seconds, c.data.audio.rate = LIMIT, 8000
  c.data.modalities = ("text", "audio")
  c.data.sources.mine = dict(name="mine")
  c.model = dict(name="multitask", encoders=dict(text=dict(kind="transformer")))
  c.model.encoders.audio = dict(kind="whisper")
  config, seen = configs.resolve(c), []
  for one in every:
    at = round(one.examples * part / 100)
    parts = (f"[:{at}]", f"[{at}:]") if 0 < at < one.examples else ("",)
    for some in parts:
      entry = dict(config.data.sources.mine, split=f"{one.split}{some}")
      source = open_source(entry, config)
      names = [source[i]["id"] for i in range(len(source))]
      said = [texts[name][0].lower() if lowercase else texts[name][0] for name in names]
      over = sum(len(pieces(text)) + sum(ends) > length for text in said)
      long = sum(texts[name][1] > LIMIT for name in names)
      counted = {
        fit.what: (fit.kept, fit.cut, fit.left_out)
        for fit in fits(config, entry, measure_for(config, entry))
      }
      assert counted["captions"] == (len(names) - over, over, 0)
      assert counted["sounds"] == (len(names) - long, long, 0)
      seen += names
  assert sorted(seen) == sorted(texts)


def test_a_large_source_is_sampled_and_says_so(config):
  lines = cut_lines(config(**{"data.text.length": 4}), most=10)
  assert lines[0].endswith("(of 10 of 37 rows)") and "set data.text.length=" in lines[0]
  assert cut_lines(config(**{"data.text.length": 64})) == []


CONFIG = """
import mmjax
def get_config(arg=""):
  c = mmjax.config.base()
  c.data.sources.tiny = dict(name="tiny", languages=("en",))
  c.data.text.tokenizer, c.data.text.vocab_size, c.data.text.length = "tiny", 512, 4
  c.model = dict(name="dual_encoder", encoders=dict(text=dict(kind="transformer")))
  return c
"""


def test_show_counts_the_whole_split_and_says_what_a_config_cuts(tiny, tmp_path, capsys):
  path, sheet = tmp_path / "c.py", tmp_path / "s.html"
  path.write_text(CONFIG)
  command = ["data", "show", "tiny", "--data-dir", str(tiny), "--out", str(sheet), "--count", "2"]
  assert cli.main([*command, "--config", str(path)]) == 0
  out = capsys.readouterr().out
  assert "7 labels" in out and "captions, characters: 111, median" in out
  assert "74 of 74 captions exceed 4 tokens" in out and "set data.text.length=" in out
  page = sheet.read_text()
  assert "74 of 74 captions exceed 4 tokens" in page and "captions, characters: 111" in page
  assert cli.main([*command, "--config", str(path), "--config.data.text.length=64"]) == 0
  assert "the config cuts nothing" in capsys.readouterr().out
  assert cli.main([*command, "--config.data.text.length=64"]) == 2


@pytest.mark.parametrize("text", ("", '{"cut": 3}', '{"cut": ["253 of 764 <b>captions</b>"]}'))
def test_the_report_keeps_what_a_run_said(tmp_path, config, text):
  from mmjax.evaluation.report import write_report

  (tmp_path / "cut.json").write_text(text)
  page = write_report(tmp_path, config(), {}).read_text()
  assert ("253 of 764 &lt;b&gt;" in page) == ("253" in text)


def test_a_run_says_it_at_its_start_and_keeps_it(tmp_path, config, capsys):
  from mmjax.training.what_is_cut import WhatIsCut

  with WhatIsCut(config(**{"data.text.length": 4}), tmp_path) as cut:
    cut.report()
  (line,) = json.loads((tmp_path / "cut.json").read_text())["cut"]
  assert "exceed 4 tokens" in line and line in capsys.readouterr().out
