"""Idefics 3 against transformers: a tiny random model, its processor, pictures in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import mmjax
from mmjax.config import UserError
from mmjax.interop.huggingface import idefics3, import_hf
from mmjax.models import make_model
from tests.interop.media_families import (
  IMAGE,
  SIGLIP,
  SPACES,
  TEXT,
  assert_equal_both_ways,
  assert_equal_pixels,
  batch_of,
  save,
)
from tests.interop.test_language_models import words

PICTURES = [  # in 2 x 2 tiles, and in 1 x 2
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(90, 71, 3), (29, 95, 3)])
]
PIECES = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
PIECES += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]


def save_model(folder, **settings):
  torch.manual_seed(0)
  vision = {**SIGLIP, "image_size": 32, "patch_size": 8, "model_type": "idefics3_vision"}
  config = transformers.Idefics3Config(
    text_config=dict(TEXT, model_type="llama", max_position_embeddings=192),
    vision_config=vision,
    image_token_id=IMAGE,
    **settings,
  )
  save(folder, transformers.Idefics3ForConditionalGeneration(config))
  words(folder, more=PIECES, spaces=SPACES)
  transformers.Idefics3Processor(
    transformers.Idefics3ImageProcessor(
      size=dict(longest_edge=60), max_image_size=dict(longest_edge=32)
    ),
    transformers.AutoTokenizer.from_pretrained(folder),
    image_seq_len=4,
  ).save_pretrained(folder)


@pytest.mark.parametrize(
  "settings", [{}, pytest.param(dict(tie_word_embeddings=True), marks=pytest.mark.slow)]
)
def test_idefics3_equals_transformers_both_ways(settings, tmp_path):
  save_model(tmp_path / "theirs", **settings)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.Idefics3ForConditionalGeneration,
    lambda processor, text: processor(images=[PICTURES], text=text, return_tensors="pt"),
    "a <image>b c<image> d",
    dict(image=PICTURES),
    (
      "model.connector.modality_projection.proj.weight",
      "image_connector/layer1/kernel",
      lambda x: x.T,
    ),
  )
  assert_equal_pixels(*found)


def test_a_smolvlm_is_an_idefics3_by_another_name(tmp_path):
  """Its processor needs torchvision for clips, but prepares and writes pictures alike."""
  save_model(tmp_path / "theirs")
  for name in ("config.json", "processor_config.json"):
    content = (tmp_path / "theirs" / name).read_text()
    content = content.replace("Idefics3", "SmolVLM").replace("idefics3", "smolvlm")
    (tmp_path / "theirs" / name).write_text(content)
  model, info = transformers.SmolVLMForConditionalGeneration.from_pretrained(
    tmp_path / "theirs", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  import_hf(tmp_path / "theirs", tmp_path / "in")
  predictor = mmjax.load(tmp_path / "in")
  batch = batch_of(predictor, "a <image>b", image=PICTURES[:1])
  length, s = int(batch["sequence"]["length"][0]), batch["sequence"]
  image, slots = predictor.config.data.image, batch["media"]["image"]["pixels"][0, :5]
  pixels = (slots / 255 - np.array(image.mean)) / np.array(image.std)
  hidden, _, _ = make_model(predictor.config).apply(
    {"params": predictor.params},
    {**batch, "sequence": {k: x[:, :length] for k, x in s.items() if k != "length"}},
    method="next_tokens",
  )
  logits = np.asarray(hidden[0] @ predictor.params["output"].T)
  with torch.no_grad():
    want = model.eval()(
      input_ids=torch.from_numpy(s["tokens"][:1, :length]).long(),
      pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)[None]).float(),
    ).logits[0]
  np.testing.assert_allclose(logits, want, atol=1e-4)


def test_variants_that_are_not_covered_are_refused_by_name():
  for stated, error in (
    (dict(scale_factor=5), "scale_factor is 5"),
    (dict(text_config=dict(model_type="phi3")), "text_config.model_type is 'phi3'"),
    (dict(vision_config=dict(model_type="siglip_vision_model")), "only idefics3_vision"),
  ):
    with pytest.raises(UserError, match=error):
      idefics3.settings(stated, {})
  with pytest.raises(UserError, match="do_image_splitting is false"):
    idefics3.tiles({**idefics3.PREPROCESSOR, "do_image_splitting": False})
