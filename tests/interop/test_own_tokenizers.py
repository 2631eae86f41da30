"""Models with a tokenizer that mmjax trained, exported for transformers: AutoTokenizer,
AutoProcessor and AutoModel give equal ids and equal outputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

import mmjax
from mmjax import config as configs
from mmjax.data.text import TextTransform
from mmjax.data.tokenizer_training import train_tokenizer
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import check_export, export_hf, own_tokenizer
from mmjax.parallel.mesh import single_device_mesh
from mmjax.state.checkpoint import load_assets
from mmjax.training import start
from tests.inference import tiny

TEXTS = (
  "a red heart",
  "A  black\tCat!  ",
  "zwölf Ünsinn, naïve",
  "心 红色の鳥 두 마리",
  "“the ﬂag” of Ｃhad ½",
  "👩‍🌾🎉",
  "ΟΔΥΣΣΕΥΣ",
  "",
)
NAMES = ("glad", "sad", "très calme")
BLOCKS = dict(width=16, depth=1, heads=2)


def image_text(kind: str):
  c = configs.base()
  c.data.image.size, c.precision.compute = 16, "float32"
  c.data.text.update(tokenizer="tiny", vocab_size=512, length=24, lowercase=True)
  image = dict(kind="vit", patch=8, **BLOCKS)
  if kind == "clip":
    c.model = dict(
      name="dual_encoder",
      width=16,
      encoders=dict(
        image=dict(image, pooling="class", input_norm=True, patch_bias=False),
        text=dict(kind="transformer", causal=True, pooling="eos", **BLOCKS),
      ),
    )
  else:
    c.data.text.update(mask_padding=False, punctuation=False)
    c.model = dict(
      name="dual_encoder",
      width=16,
      unprojected=("image",),
      projection_bias=True,
      bias=True,
      encoders=dict(
        image=dict(image, pooling="attention"),
        text=dict(kind="transformer", pooling="final", **BLOCKS),
      ),
    )
  return configs.resolve(c)


def exported(config, folder, *more):
  """(model here, folder for transformers) with random parameters. more: of `tiny.save`."""
  (folder / "saved").mkdir()
  saved = tiny.save(config, folder / "saved", *more)
  assert start.check_export(config, load_assets(str(saved))) is None
  return mmjax.load(saved, mesh=single_device_mesh()), export_hf(saved, folder / "hf")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_and_texts_by_auto_processor_are_as_similar_there(kind, tmp_path):
  ours, folder = exported(image_text(kind), tmp_path)
  processor = transformers.AutoProcessor.from_pretrained(folder)
  assert type(processor).__name__.lower() == f"{kind}processor"
  inputs = processor(text=list(TEXTS), padding="max_length", truncation=True, return_tensors="pt")
  tokens = ours.tokens(TEXTS)["tokens"]
  if kind == "clip":  # whose end token must not have the id 2
    assert processor.tokenizer.eos_token_id == 68
    tokens = np.where(tokens == 2, 68, tokens)
  assert inputs["input_ids"].tolist() == tokens.tolist()
  model = transformers.AutoModel.from_pretrained(folder).eval()
  pictures = torch.tensor(np.stack(tiny.pixels(3, size=16)).transpose(0, 3, 1, 2) / 127.5 - 1)
  with torch.no_grad():
    there = model(**inputs, pixel_values=pictures.float())
  np.testing.assert_allclose(there.text_embeds, ours.encode_text(TEXTS), atol=2e-5)
  here = ours.encode_image(tiny.pixels(3, size=16))
  np.testing.assert_allclose(there.image_embeds, here, atol=2e-5)


def classifier(kind: str):
  """A classifier as `mmjax init classification --hf` makes it, or a ResNet."""
  c = configs.base()
  c.precision.compute, c.data.label, c.data.classes = "float32", "label", len(NAMES)
  c.data.image.size = 32
  modality, encoder, width = "image", dict(kind="vit", patch=8, pooling="class", **BLOCKS), 16
  if kind == "bert":
    c.data.text.update(tokenizer="tiny", vocab_size=512, length=24)
    modality, encoder = "text", dict(kind="bert", pooling="pooler", **BLOCKS)
  elif kind == "resnet":
    encoder = dict(kind="resnet", layers=18, blocks=(1, 1), multiplier=0.125, stem="imagenet")
  elif kind == "vit squashed":
    c.data.image.resize = "squash"
  c.model = dict(name="encoder", width=width, classes=len(NAMES), encoders={modality: encoder})
  return configs.resolve(c)


@pytest.mark.parametrize("kind", ["vit", "vit squashed", "resnet", "bert"])
def test_a_classifier_says_the_same_labels_as_surely_there(kind, tmp_path):
  config, assets = classifier(kind), {"classes.json": json.dumps(NAMES).encode()}
  if kind == "bert":
    assets.update(tiny.assets(tmp_path))
  state = tiny.random_statistics(config) if kind == "resnet" else None
  ours, folder = exported(config, tmp_path, assets, state)
  processor = transformers.AutoProcessor.from_pretrained(folder)
  if kind == "bert":
    auto, given = transformers.AutoModelForSequenceClassification, dict(text=list(TEXTS[:6]))
    inputs = processor(**given, padding=True, truncation=True, return_tensors="pt")
  else:
    auto = transformers.AutoModelForImageClassification
    given = dict(image=[Image.fromarray(x).resize((50, 40)) for x in tiny.pixels(3)])
    inputs = processor(given["image"], return_tensors="pt")
  model = auto.from_pretrained(folder).eval()
  with torch.no_grad():
    there = torch.softmax(model(**inputs).logits, -1).numpy()
  np.testing.assert_allclose(there, ours.classes(**given), atol=2e-3 if "image" in given else 1e-5)
  assert model.config.id2label == dict(enumerate(NAMES)) and ours.class_names == NAMES
  assert model.config.label2id == {name: number for number, name in enumerate(NAMES)}


def test_transcripts_of_a_whisper_are_those_there(tmp_path):
  c = configs.base()
  c.data.modalities, c.precision.compute = ("audio", "text"), "float32"
  c.data.audio.seconds, c.data.text.length = 1.0, 8
  c.data.text.update(tokenizer="tiny", vocab_size=512)
  blocks = dict(activation="gelu", eps=1e-5, **BLOCKS)
  audio = dict(
    kind="whisper", mels=16, normalisation="whisper", mask_padding=False, strides=(1, 2), **blocks
  )
  c.model = dict(
    name="captioner",
    width=16,
    encoders=dict(audio=audio),
    decoder=dict(project_memory=False, **blocks),
  )
  ours, folder = exported(configs.resolve(c), tmp_path)
  processor = transformers.AutoProcessor.from_pretrained(folder)
  model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
  sounds = [np.sin(np.arange(16_000) * f).astype(np.float32) for f in (0.1, 0.3)]
  inputs = processor(sounds, sampling_rate=16_000, return_tensors="pt")
  with torch.no_grad():
    tokens = model.generate(inputs["input_features"], max_new_tokens=7, do_sample=False)
  there = processor.batch_decode(tokens, skip_special_tokens=True)
  assert [text.strip() for text in there] == [text.strip() for text in ours.generate(audio=sounds)]


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("punctuation", [False, True])
@pytest.mark.parametrize("bos, model", [(False, "unigram"), (True, "unigram"), (True, "bpe")])
def test_ids_of_the_tokenizer_json_are_those_of_the_sentencepiece_model(
  lowercase, punctuation, bos, model, tmp_path
):
  file = train_tokenizer([*TEXTS, *tiny.WORDS] * 8, tmp_path / "mine.model", 460, model)
  content = file.read_bytes()
  settings = ConfigDict(
    dict(
      tokenizer="mine",
      vocab_size=512,
      length=256,
      lowercase=lowercase,
      punctuation=punctuation,
      mask_padding=True,
      pad_id=-1,
      bos=bos,
      eos=True,
    )
  )
  transform = TextTransform(settings, Tokenizer.from_assets({"tokenizer.model": content}))
  for name, written in own_tokenizer.files(content, settings).items():
    (tmp_path / name).write_bytes(written)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  letters = list("abcdefgé心红 .,-'ß")
  texts = [*TEXTS, *("".join(rng.choice(letters, 12)) for _ in range(50))]
  assert [theirs(text)["input_ids"] for text in texts] == [transform.encode(text) for text in texts]
  decoded = [theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) for text in texts]
  assert decoded == [transform.tokenizer.decode(transform.encode(text)) for text in texts]


def test_the_nearest_to_a_classifier_of_several_heads_is_named():
  c = configs.base()
  c.data.label, c.data.classes, c.data.image.size = "label", 3, 32
  encoder = dict(kind="vit", patch=8, stem="convolution", **BLOCKS)
  c.model = dict(name="multitask", width=16, joint=False, encoders=dict(image=encoder))
  c.objectives.kind = dict(kind="classification", modalities=("image",))
  nearest = "nearest is ViTModel, but for model.name = 'multitask' .needs 'encoder'.*stem = 'conv"
  with pytest.raises(configs.UserError, match=nearest):
    check_export(configs.resolve(c), {})


@pytest.mark.parametrize(
  "changes, why",
  [
    ({"data.values": 2}, r"ViTModel, but for data\.values = 2 .needs 0"),
    ({"model.ordinal": True}, r"ViTModel, but for model\.ordinal = True"),
  ],
)
def test_heads_that_transformers_lacks_are_told_before_training(changes, why):
  config = configs.resolve(classifier("vit"), [f"{key}={value}" for key, value in changes.items()])
  with pytest.raises(configs.UserError, match=why):
    check_export(config, {})


def test_the_nearest_to_a_language_model_reads_what_it_reads():
  """Not a model of sounds for one of pictures, though that says no more than that."""
  with pytest.raises(configs.UserError, match="nearest is Idefics3.*image.stem = 'convolution'"):
    check_export(configs.load(str(Path(__file__).parents[2] / "configs/chat_scenes.py")), {})


def test_a_model_that_transformers_cannot_express_is_told_or_refused(tmp_path, capsys):
  c = image_text("clip").to_dict()
  c["model"]["encoders"]["image"]["stem"] = "convolution"
  config = configs.resolve(c)
  start.check_export(config, tiny.assets(tmp_path))
  assert "nearest is CLIPModel, but for model.encoders.image.stem" in capsys.readouterr().out
  with pytest.raises(configs.ConfigError, match=r"export\.hf is True, but.*image\.stem"):
    start.check_export(configs.resolve(c, ["export.hf=True"]), tiny.assets(tmp_path))
