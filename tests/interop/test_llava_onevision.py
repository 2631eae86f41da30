"""LLaVA-OneVision against transformers: a tiny random model, its processor, pictures in tiles whose
tokens make one grid, of odd shapes, one and several.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pil

from mmjax.config import UserError
from mmjax.data.tiles import Tiling, fullest_grid, joined_tokens, most_joined_tokens
from mmjax.interop.huggingface import llava_onevision
from tests.interop.media_families import (
  IMAGE,
  SIGLIP,
  SPACES,
  TEXT,
  assert_equal_both_ways,
  assert_equal_pixels,
  save,
)
from tests.interop.test_language_models import words

WIDE, TALL, SQUARE = (
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(31, 95, 3), (90, 41, 3), (64, 64, 3)])
)
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84], [84, 84]]


def save_model(folder, text, budget=9, **settings):
  torch.manual_seed(0)
  config = transformers.LlavaOnevisionConfig(
    text_config=dict(TEXT, max_position_embeddings=256, **text),
    vision_config=SIGLIP,
    image_token_index=IMAGE,
    video_token_index=59,
    image_grid_pinpoints=PINPOINTS,
    vision_aspect_ratio=f"anyres_max_{budget}",
    **settings,
  )
  save(folder, transformers.LlavaOnevisionForConditionalGeneration(config))
  words(folder, more=["<image>"], spaces=SPACES)
  transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # names its class
  transformers.LlavaOnevisionImageProcessor(
    size=dict(height=28, width=28), image_grid_pinpoints=PINPOINTS
  ).save_pretrained(folder)


class Processor:
  """The parts of LlavaOnevisionProcessor that need no clips, for which it needs torchvision."""

  def __init__(self, images, tokenizer, budget):
    self.images, self.tokenizer, self.decode = images, tokenizer, tokenizer.decode
    self.vision_aspect_ratio, self.num_image_tokens = f"anyres_max_{budget}", 16
    self.image_processor, self.image_token = images, "<image>"
    self.vision_feature_select_strategy = "full"

  replace_image_token = transformers.LlavaOnevisionProcessor.replace_image_token
  _get_number_of_features = transformers.LlavaOnevisionProcessor._get_number_of_features
  _get_unpadded_features = transformers.LlavaOnevisionProcessor._get_unpadded_features

  def __call__(self, pictures, text):
    if not pictures:
      return dict(self.tokenizer(text, return_tensors="pt"))
    found = self.images([pictures], return_tensors="pt")
    first, *rest = text.split("<image>")
    for i, piece in enumerate(rest):
      first += self.replace_image_token(found, i) + piece
    return {**found, **self.tokenizer(first, return_tensors="pt")}


def processor(budget):
  def from_pretrained(folder):
    images = pil.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    return Processor(images, transformers.AutoTokenizer.from_pretrained(folder), budget)

  return types.SimpleNamespace(from_pretrained=from_pretrained)


@pytest.mark.parametrize(
  "pictures, budget, text, settings",
  [
    ([TALL], 3, dict(model_type="qwen2", tie_word_embeddings=True), {}),  # resized
    pytest.param([WIDE], 9, dict(model_type="qwen2"), {}, marks=pytest.mark.slow),
    pytest.param(
      [WIDE, TALL, SQUARE],
      9,
      dict(model_type="llama"),
      dict(vision_feature_layer=1, multimodal_projector_bias=False),
      marks=pytest.mark.slow,
    ),
    pytest.param([], 9, dict(model_type="qwen3"), {}, marks=pytest.mark.slow),
  ],
)
def test_llava_onevision_equals_transformers_both_ways(pictures, budget, text, settings, tmp_path):
  save_model(tmp_path / "theirs", text, budget, **settings)
  prompt = "a b" + "".join(f" c<image>{x}" for x, _ in zip("dab", pictures, strict=False))
  gradient = ("model.image_newline", "image_connector/end", lambda x: x)
  if not pictures:
    gradient = ("model.language_model.norm.weight", "norm/scale", lambda x: x)
  predictor, batch, inputs = assert_equal_both_ways(
    tmp_path,
    transformers.LlavaOnevisionForConditionalGeneration,
    lambda processor, text: processor(pictures, text),
    prompt,
    dict(image=pictures),
    gradient,
    processor_class=processor(budget),
  )
  if pictures:
    assert_equal_pixels(predictor, batch, inputs)


def test_grids_of_any_shape_are_the_processors():
  """How pictures are cut, and how many tokens each has, at most as many as rows have room for."""
  silent = types.SimpleNamespace(decode=None)
  of = Processor(types.SimpleNamespace(image_grid_pinpoints=PINPOINTS), silent, 3)
  grids = llava_onevision.tiles(dict(size=28, image_grid_pinpoints=PINPOINTS))["grids"]
  most = most_joined_tokens(grids, 17, 3)
  for height, width in np.random.default_rng(0).integers(5, 400, (300, 2)).tolist():
    grid = fullest_grid(height, width, 28, grids)
    frame = pil.select_best_resolution((height, width), PINPOINTS)
    assert tuple(28 * side for side in grid) == tuple(frame), (height, width)
    offsets, weights = joined_tokens(Tiling(*grid, height, width), 17, 3)
    count = of._get_number_of_features(height, width, 28, 28)
    assert len(offsets) == len(weights) == count <= most, (height, width)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_variants_that_are_not_covered_are_refused_by_name():
  for stated, error in (
    (dict(vision_feature_select_strategy="default"), "vision_feature_select_strategy is 'default'"),
    (dict(vision_feature_layer=[-2, -5]), r"vision_feature_layer is \[-2, -5\]"),
    (dict(vision_aspect_ratio="pad"), "vision_aspect_ratio is 'pad'"),
    (dict(text_config=dict(model_type="qwen2_moe")), "text_config.model_type is 'qwen2_moe'"),
    (dict(vision_config=dict(model_type="clip_vision_model")), "only siglip_vision_model"),
    (dict(image_grid_pinpoints=[[384, 500]]), "frames that tiles of 384 pixels do not fill"),
    ({"processor_config.json": dict(num_image_tokens=4)}, "num_image_tokens is 4, but only 729"),
    ({"processor_config.json": dict(vision_aspect_ratio="anyres_max_4")}, "processor has 4"),
  ):
    with pytest.raises(UserError, match=error):
      llava_onevision.settings(stated, {})
