"""Configs: what resolves, and the one clear line for what does not."""

import json
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmjax
from mmjax import config as configs
from mmjax.describe import describe
from mmjax.keys import KEYS
from mmjax.models import make_model


def small():
  c = mmjax.config.base()
  c.data.sources.emoji = dict(name="openmoji")
  c.data.image.size = 48
  c.data.text.tokenizer = "openmoji"
  c.model = dict(
    name="dual_encoder",
    encoders=dict(image=dict(kind="vit", patch=8), text=dict(kind="transformer")),
  )
  c.objectives.align = dict(kind="contrastive", between=("image", "text"))
  return c


def test_entries_get_the_defaults_of_their_kind():
  resolved = configs.resolve(
    small(), ["--config.objectives.align.loss=sigmoid", "config.optimizer.lr=3e-4"]
  )
  assert resolved.objectives.align.loss == "sigmoid" and resolved.objectives.align.weight == 1.0
  assert (
    resolved.optimizer.lr == 3e-4
    and resolved.optimizer.name == "adamw"
    and "b2" in resolved.optimizer
  )
  assert resolved.data.sources.emoji.split == "train"


def test_an_override_makes_a_missing_named_entry():
  resolved = configs.resolve(
    small(),
    [
      "evaluation.evaluators.retrieval/val.kind=retrieval",
      "evaluation.evaluators.retrieval/val.source=openmoji",
    ],
  )
  assert resolved.evaluation.evaluators["retrieval/val"].source == "openmoji"


def test_a_resolved_config_survives_json():
  resolved = configs.resolve(small())
  again = configs.from_json(configs.to_json(resolved))
  assert again.to_dict() == resolved.to_dict() and configs.changed_on_resume(resolved, again) == []
  assert json.loads(configs.to_json(resolved))["train"]["batch_size"] == 256


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("optimizer.lrr=1", ["optimizer.lrr", "'lr'"]),
    ("lr=1", ["unknown key lr", "optimizer.lr"]),
    ("optimizer.lr=fast", ["optimizer.lr", "float"]),
    ("train.batch_size=2.5", ["train.batch_size", "int"]),
    ("train.batch_size=0", ["train.batch_size", "at least 1"]),
    ("train.microbatches=3", ["256", "microbatches 3", "255"]),
    ("mesh.data=3", ["3 devices", "255"]),
    ("mesh.fsdp=-1", ["mesh.data", "mesh.fsdp", "-1"]),
    ("train.steps=10 epoks", ["train.steps", "epochs"]),
    ("objectives.align.between=('image','audio')", ['"audio"', "image, text"]),
    ("objectives.align.loss=sigmoyd", ["'sigmoyd'", "'sigmoid'"]),
    ("objectives.align.kind=contrastiv", ["contrastiv", "'contrastive'"]),
    ("objectives.align=3", ["objectives.align", "dict"]),
    ("model.encoders.image.kind=vitt", ["vitt", "'vit'"]),
    ("model.encoders.image.patch=7", ["48", "patch 7", "49"]),
    ("data.sources.emoji.languagse=('en',)", ["languagse", "'languages'"]),
    ("data.image.augment.crop=(1,)", ["crop", "2 numbers"]),
    ("data.image.augment.flip=true", ["flip", "float"]),
    ("data.text.tokenizer=''", ["tokenizer", "mmjax data tokenizer"]),
    ("optimizer.decay='('", ["optimizer.decay", "regular expression"]),
    ("optimizer.rates=(1,)", ["optimizer.rates"]),
    ("lora.params='('", ["lora.params", "regular expression"]),
    ("lora.full=('(',)", ["lora.full", "regular expression"]),
    ("optimizer.moments=source", ["optimizer.moments", "data.mix", "'steps'"]),
    ("sharding=fsdpp", ["'fsdpp'", "'fsdp'"]),
  ],
)
def test_mistakes_are_refused_with_one_line_that_names_key_and_remedy(override, words):
  with pytest.raises(configs.ConfigError) as error:
    configs.resolve(small(), [override])
  message = str(error.value)
  assert "\n" not in message and all(word in message for word in words), message


def test_a_config_file_of_any_ending_is_read_as_python(tmp_path):
  path = tmp_path / "recipe"
  path.write_text("import mmjax\ndef get_config(arg=''):\n  return mmjax.config.base()\n")
  assert configs.load(str(path)).train.steps == mmjax.config.base().train.steps
  (tmp_path / "notes.md").write_text("# Notes\nNot Python.\n")
  with pytest.raises(configs.ConfigError, match="notes.md: SyntaxError"):
    configs.load(str(tmp_path / "notes.md"))


@pytest.mark.parametrize(
  ("objective", "sound"),
  [
    (dict(kind="contrastive"), True),
    (dict(kind="contrastive", between=("audio", "text")), True),
    (dict(kind="classification"), True),
    (dict(kind="classification", modalities=("image", "text")), False),
    (dict(kind="masked_patches"), True),
    (dict(kind="masked_patches", context=("text",)), False),
    (dict(kind="masked_tokens"), True),
    (dict(kind="masked_tokens", context=("image",)), False),
    (dict(kind="captioning"), False),
    (dict(kind="captioning", source=("audio",)), True),
    (dict(kind="matching"), False),
    (dict(kind="gan"), False),
    (dict(kind="embedding_distillation", teacher="runs/x"), True),
  ],
)
def test_mixup_is_refused_where_targets_do_not_follow_the_pictures(objective, sound):
  c = small()
  c.model.encoders.audio = dict(kind="whisper")
  c.data.label, c.data.classes = "label", 3
  c.optimizers.discriminator = dict(name="adamw", params="discriminator/.*")
  c.train.mixup, c.objectives = 0.2, dict(mine=objective)
  if sound:
    configs.resolve(c)
  else:
    with pytest.raises(
      configs.ConfigError,
      match=rf"train.mixup blends pictures, but objectives.mine \({objective['kind']}\)",
    ):
      configs.resolve(c)


def test_a_decoder_is_not_taught_to_repeat_bos():
  c = small()
  c.model = dict(
    name="captioner", decoder=dict(depth=1), encoders=dict(image=dict(kind="vit", patch=8))
  )
  c.objectives = dict(caption=dict(kind="captioning"))
  configs.resolve(c)
  with pytest.raises(configs.ConfigError, match="Set data.text.bos to False"):
    configs.resolve(c, ["data.text.bos=true"])


def test_settings_of_any_length_take_one_number_or_more():
  file = pathlib.Path(__file__).parent.parent / "configs/video_text.py"
  assert configs.load(
    str(file), ["model.encoders.video.channels=(8, 16)"]
  ).model.encoders.video.channels == (8, 16)
  for value in ("()", "('a',)"):
    with pytest.raises(configs.ConfigError, match="channels is .* but must be numbers, such as"):
      configs.load(str(file), [f"model.encoders.video.channels={value}"])


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
  with pytest.raises(configs.ConfigError, match="8 devices"):
    configs.check(configs.resolve(small(), ["mesh.data=1", "mesh.tensor=3"]), device_count=8)


def test_keys_that_alter_numbers_are_named_on_resume_and_others_are_free():
  old = configs.resolve(small())
  assert (
    configs.changed_on_resume(
      old,
      configs.resolve(small(), ["mesh.data=2", "data.workers=2", "log.every=1", "train.steps=9"]),
    )
    == []
  )
  lines = configs.changed_on_resume(old, configs.resolve(small(), ["optimizer.lr=0.5"]))
  assert lines == ["optimizer.lr: 0.001 -> 0.5"]


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 10**6))
def test_durations_agree_with_their_definition(steps, batch_size, examples):
  units = dict(steps=steps, batch_size=batch_size, examples=examples)
  assert configs.in_steps("100%", **units) == steps
  assert configs.in_steps("2 epochs", **units) == max(1, round(2 * examples / batch_size))
  assert configs.in_steps(f"{examples} examples", **units) == max(1, round(examples / batch_size))
  assert configs.in_steps(steps, **units) == steps and configs.in_steps(0, **units) == 0


def test_every_key_is_documented_and_there_are_about_150():
  assert len(KEYS) < 165
  assert all(len(key.doc) > 10 and key.doc.endswith(".") for key in KEYS)
  assert len({key.path for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize(
  "path", sorted(pathlib.Path(__file__).parent.parent.glob("configs/*.py")), ids=lambda p: p.stem
)
def test_shipped_configs_resolve_to_their_golden_copies(path):
  """A changed default shows up as a diff in review: `mmjax config show CONFIG >
  tests/golden/NAME.txt` renews the copy.
  """
  golden = pathlib.Path(__file__).parent / "golden" / f"{path.stem}.txt"
  config = configs.load(str(path))
  assert describe(config) + "\n" == golden.read_text()
  # A checkpoint of it names no code but this package's.
  assert configs.from_json(configs.to_json(config)) == config


ARGUMENTS = {
  "chat_scenes": ("dpo", "half", "grpo"),
  "easy_vqa": (
    "cross_attention",
    "merged_attention",
    "perceiver",
    "concat",
    "gated",
    "weighted_sum",
    "average",
    "decision",
    "question",
  ),
  "emoji_groups": ("linear", "scratch"),
  "multitask": ("captions", "questions", "names"),
  "quickstart": ("validation",),
  "scene_answers": ("captions", "lora"),
  "scene_words": ("blind",),
  "video_text": ("mean",),
  "voice_answers": ("hearing",),
}


@pytest.mark.parametrize(
  ("name", "arg"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args]
)
def test_every_argument_of_a_shipped_config_names_a_model(name, arg):
  config = configs.load(str(pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py:{arg}"))
  assert make_model(config)
  assert configs.from_json(configs.to_json(config)) == config


def test_a_config_may_import_the_files_beside_it_and_each_folder_has_its_own(tmp_path):
  for name, steps in (("one", 11), ("two", 22)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "beside.py").write_text(f"STEPS = {steps}")
    (folder / "mine.py").write_text(
      "import mmjax\nimport beside\n\ndef get_config(arg=''):\n"
      "  c = mmjax.config.base()\n  c.train.steps = beside.STEPS\n"
      "  c.model.encoders = dict(image=dict(kind='vit'))\n  return c\n"
    )
    path, modules = list(sys.path), set(sys.modules)
    assert configs.load(str(folder / "mine.py")).train.steps == steps
    assert sys.path == path and "beside" not in set(sys.modules) - modules


def test_classes_that_are_missing_are_said_before_any_work():
  c = configs.base()
  c.model = dict(name="multitask", encoders=dict(image=dict(kind="vit")))
  c.objectives.classify = dict(kind="classification")
  with pytest.raises(
    configs.ConfigError, match=r"objectives\.classify classifies, but data\.label is 'none'"
  ):
    configs.resolve(c)
  c.data.label = "label"
  with pytest.raises(configs.ConfigError, match=r"data\.classes is 0.*mmjax init classification"):
    configs.resolve(c)
  del c.objectives.classify
  c.data.label = "none"
  c.evaluation.evaluators["classes/test"] = dict(kind="classification", source="mine")
  with pytest.raises(configs.ConfigError, match=r"classes/test classifies, but data\.label"):
    configs.resolve(c)


class Odd(str):
  def partition(self, sep):
    raise SystemExit(0)


class Broken:
  def __repr__(self):
    raise ZeroDivisionError


@pytest.mark.parametrize(
  ("assignment", "expected"),
  [
    ("c.seed = np.int64(3)", ("seed", 3)),
    ("c.optimizer.lr = np.float32(0.5)", ("optimizer.lr", 0.5)),
    ("c.data.image.mean = tuple(np.ones(3, np.float32))", ("data.image.mean", (1.0, 1.0, 1.0))),
    ("c.seed = enum.IntEnum('E', 'a b').b", ("seed", 2)),
    ("c.data.dir = Odd('x')", ("data.dir", "x")),
    ("c.data.image.mean = np.ones(3)", "data.image.mean is an array"),
    ("c.optimizer.lr = np.ones(1)", "optimizer.lr is an array"),
    ("c.seed = 10**5000", "seed is a whole number of 16,610 bits"),
    ("c.data.sources.a = dict(name='x', weight=-10**5000)", "data.sources.a.weight is a whole"),
    ("c.seed = Broken()", "ZeroDivisionError"),
    ("c.model.name = Broken()", "ZeroDivisionError"),
  ],
)
def test_values_of_odd_types_are_taken_as_what_they_stand_for_or_refused(
  assignment, expected, tmp_path
):
  (tmp_path / "c.py").write_text(
    "import enum\nimport mmjax\nimport numpy as np\nfrom tests.test_config import Broken, Odd\n"
    "def get_config(arg=''):\n  c = mmjax.config.base()\n"
    f"  c.model.encoders = dict(image=dict(kind='vit'))\n  {assignment}\n  return c\n"
  )
  if isinstance(expected, str):
    with pytest.raises(configs.ConfigError, match=f"c.py: .*{expected}") as error:
      configs.load(str(tmp_path / "c.py"))
    assert "\n" not in str(error.value)
    return
  key, value = expected
  found = dict(configs.flatten(configs.load(str(tmp_path / "c.py"))))[key]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("data.class_names=(1, 2)", "data.class_names is (1, 2), but must be a tuple of words"),
    ("data.modalities=[1]", "data.modalities is (1,), but must be a tuple of words"),
    ("data.sources.a.languages=(1,)", "data.sources.a.languages is (1,), but must be a tuple of"),
    ("objectives.align.between=(1, 2)", "objectives.align.between is (1, 2), but must be a tuple"),
    ("objectives.align.sources=(None,)", "objectives.align.sources is (None,), but must be a"),
    ("allow_code=(b'os',)", "allow_code is (b'os',), but must be a tuple of words"),
    ("optimizer.lr=1e308", "optimizer.lr is 1e+308, which float32 takes for 0 or infinity"),
    ("optimizer.weight_decay=1e39", "optimizer.weight_decay is 1e+39, which float32 takes"),
    ("optimizer.eps=1e-320", "optimizer.eps is 1e-320, which float32 takes for 0 or infinity"),
  ],
)
def test_words_are_words_and_numbers_are_those_of_float32(override, words):
  with pytest.raises(configs.ConfigError) as error:
    configs.resolve(small(), ["data.sources.a.name=x", override])
  assert str(error.value).startswith(words)
