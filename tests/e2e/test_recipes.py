"""Every recipe learns: briefly on small data against a lower bar; with --all in full, against the scores of the README.

A recipe is `config:argument`, settings that shorten it, and the scores that must be reached: {evaluator: {metric: bar}}.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from mmjax import config as configs
from mmjax.training.loop import train
from tests.e2e import small_data
from tests.e2e.commands import ROOT, metrics, parameters, read_until, run, start

# Shortened: (config, settings, data sets, bars)
SHORT = [
  ("motion_series", ("train.steps=100",), ("moving_emoji",), {"motion/test": {"accuracy": 0.9}, "motion/new_objects": {"accuracy": 0.9}}),
  ("easy_vqa:cross_attention", ("train.steps=90", "evaluation.evaluators.answers/test.split=validation"), ("easy_vqa",),
   {"answers/test": {"accuracy": 0.7}}),
  ("speech_text", ("train.steps=60", "train.batch_size=40", "model.width=64", "model.encoders.audio.depth=1", "model.encoders.text.depth=1"),
   ("spoken_emoji",), {"retrieval/test_voices": {"audio_to_text/R@1": 0.5}}),  # of 40 phrases
]
# In full: what was measured (README), less a margin for other machines. Where that is below what was hoped for, the hope stands beside it.
FULL = [
  ("quickstart", {"retrieval/combinations": {"image_to_text/R@1": 0.48, "text_to_image/R@1": 0.48}, "zero_shot/groups": {"accuracy": 0.28}}),
  ("motion_series", {"motion/test": {"accuracy": 0.95}, "motion/new_objects": {"accuracy": 0.95}}),
  ("easy_vqa:cross_attention", {"answers/test": {"accuracy": 0.95}}),
  ("speech_text", {"retrieval/test_voices": {"audio_to_text/R@1": 0.83}}),
  ("scene_captions", {"captions/test": {"right": 0.8}}),
  ("speech_recognition", {"transcripts/test_voices": {"word_error_rate": 0.09}, "transcripts/test_phrases": {"word_error_rate": 0.18}}),
  ("video_text:transformer", {"direction/test": {"accuracy": 0.95}, "direction/new_objects": {"accuracy": 0.95}}),
  ("video_captions", {"captions/test": {"right/motion": 0.95, "right": 0.8}}),
  ("scene_words", {"words/test": {"accuracy": 0.7}}),  # 0.772 measured, 0.490 for the same model without pictures (`:blind`)
  ("multitask", {"captions/test": {"right": 0.8}, "answers/test": {"accuracy": 0.83}, "retrieval/combinations": {"image_to_text/R@1": 0.53}}),
  ("image_audio", {"retrieval/image_audio": {"image_to_audio/R@1": 0.04}}),
  ("emoji_gan", {"generated/combinations": {"mean_class_accuracy": 0.2}}),
]
AT_MOST = ("word_error_rate",)  # bars of these are from above
# Every recipe that trains on its own: (config, data sets).
KILLED = [
  *((name, data) for name, _, data, _ in SHORT),
  ("speech_recognition", ("spoken_emoji",)), ("video_text:transformer", ("moving_emoji",)), ("video_captions", ("moving_emoji",)),
  ("scene_captions", ("emoji_scenes",)), ("scene_words", ("emoji_scenes",)), ("image_audio", ("openmoji", "spoken_emoji")),
  ("multitask", ("openmoji", "emoji_scenes", "easy_vqa")), ("emoji_gan", ("openmoji",)), ("emoji_groups:scratch", ("openmoji",)),
]


def config_of(recipe: str) -> str:
  name, _, arg = recipe.partition(":")
  return f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else "")


def check(folder, bars: dict) -> None:
  scores = json.loads((folder / "eval.json").read_text())
  for evaluator, wanted in bars.items():
    for metric, bar in wanted.items():
      reached = scores[evaluator][metric] <= bar if metric in AT_MOST else scores[evaluator][metric] >= bar
      assert reached, f"{evaluator} {metric}: {scores[evaluator][metric]:.4f}, bar {bar}"
  assert (folder / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="session")
def small(embedded_data):
  """The data folder of the run; `small(names)` builds small versions of these data sets in it."""
  folder = embedded_data.parent / "small"
  folder.mkdir(exist_ok=True)
  return lambda names: small_data.build(folder, names) or folder


@pytest.mark.parametrize(("recipe", "changes", "data", "bars"), SHORT, ids=[row[0] for row in SHORT])
def test_a_short_run_learns(recipe, changes, data, bars, small, tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(small(data)))
  run("train", "--config", config_of(recipe), "--workdir", str(tmp_path / "run"), *(f"--config.{c}" for c in changes),
      "--config.log.tensorboard=False")
  check(tmp_path / "run", bars)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bars"), FULL, ids=[row[0] for row in FULL])
def test_the_full_run_reaches_its_score(recipe, bars, embedded_data, tmp_path):
  config = configs.load(config_of(recipe))
  for name in sorted({entry.name for entry in config.data.sources.values()} - {"openmoji"}):  # which is there
    run("data", "build", name)
  tokenizer = config.data.text.tokenizer
  if tokenizer and not (embedded_data / "tokenizers" / f"{tokenizer}.model").exists():
    run("data", "tokenizer", "--source", next(iter(config.data.sources.values())).name, "--name", tokenizer, "--vocab-size", str(config.data.text.vocab_size))
  assert train(config, tmp_path / "run") == 0
  check(tmp_path / "run", bars)


@pytest.mark.slow
def test_fine_tuning_from_the_contrastive_checkpoint_beats_training_from_scratch(embedded_data, tmp_path):
  assert train(configs.load(config_of("quickstart"), ["evaluation.every=0"]), tmp_path / "quickstart") == 0
  scores = {}
  for arg in ("full", "linear", "scratch"):
    start = [] if arg == "scratch" else [f"init.from={tmp_path / 'quickstart'}"]
    assert train(configs.load(config_of(f"emoji_groups:{arg}"), start), tmp_path / arg) == 0
    scores[arg] = json.loads((tmp_path / arg / "eval.json").read_text())["groups/test"]["accuracy"]
  assert scores["full"] >= scores["scratch"] + 0.05 and scores["linear"] >= scores["scratch"] + 0.03, scores  # measured: 0.747, 0.716, 0.647


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "data"), KILLED, ids=[row[0] for row in KILLED])
def test_a_killed_run_goes_on_bit_for_bit(recipe, data, small, tmp_path, monkeypatch):
  monkeypatch.setenv("MMJAX_DATA", str(small(data)))
  words = ("train", "--config", config_of(recipe), "--config.train.steps=6", "--config.checkpoint.every=2", "--config.log.every=1",
           "--config.evaluation.every=0", "--config.train.batch_size=14", "--config.schedule.warmup=1", "--config.log.tensorboard=False")
  run(*words, "--workdir", str(tmp_path / "whole"))
  process = start(*words, "--workdir", str(tmp_path / "killed"))
  read_until(process, "step 4/6")
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  run(*words, "--workdir", str(tmp_path / "killed"))
  assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
  assert parameters(tmp_path / "killed") == parameters(tmp_path / "whole")
