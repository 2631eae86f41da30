"""InternVL 3 against transformers: a tiny random model, its processor, pictures in tiles."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as theirs

from mmjax.config import UserError
from mmjax.data.tiles import cut_into_tiles, grid_of
from mmjax.interop.huggingface import internvl
from tests.interop.media_families import (
  IMAGE,
  SPACES,
  TEXT,
  assert_equal_both_ways,
  assert_equal_pixels,
  save,
)
from tests.interop.test_language_models import words

PICTURES = [  # in 1 x 3 tiles, in one, in 2 x 1
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(30, 95, 3), (33, 31, 3), (71, 29, 3)])
]
SPECIAL = dict(
  start_image_token="<img>",
  end_image_token="</img>",
  context_image_token="<ctx>",
  video_token="<video>",
)


def save_model(folder, text, **vision):
  torch.manual_seed(0)
  config = transformers.InternVLConfig(
    text_config=dict(TEXT, **text),
    vision_config=dict(
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=[28, 28],
      patch_size=[7, 7],
      **vision,
    ),
    image_token_id=IMAGE,
    image_seq_length=4,
    tie_word_embeddings=False,
  )
  save(folder, transformers.InternVLForConditionalGeneration(config))
  words(folder, more=["<ctx>", "<img>", "</img>", "<video>"], spaces=SPACES)
  transformers.GotOcr2ImageProcessor(size=dict(height=28, width=28), max_patches=4).save_pretrained(
    folder
  )
  transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=SPECIAL).save_pretrained(
    folder
  )


class Processor:
  """The parts of InternVLProcessor that need no videos, for which it needs torchvision."""

  def __init__(self, images, tokenizer):
    self.images, self.tokenizer, self.decode = images, tokenizer, tokenizer.decode

  @classmethod
  def from_pretrained(cls, folder):
    images = theirs.GotOcr2ImageProcessorPil.from_pretrained(folder)
    return cls(images, transformers.AutoTokenizer.from_pretrained(folder))

  def __call__(self, images, text):
    found = self.images(images, crop_to_patches=True, return_tensors="pt")
    counts = found.pop("num_patches").tolist()
    own = types.SimpleNamespace(image_seq_length=4, image_token="<ctx>")
    own.start_image_token, own.end_image_token = "<img>", "</img>"
    expand = transformers.InternVLProcessor.replace_image_token
    pieces = text.split("<ctx>")
    for i in range(len(counts)):
      pieces[i] += expand(own, dict(num_patches=counts), i)
    return {**found, **self.tokenizer("".join(pieces), return_tensors="pt")}


@pytest.mark.parametrize(
  "text, vision",
  [
    (dict(model_type="qwen3"), dict(attention_bias=True)),
    pytest.param(dict(model_type="llama"), dict(use_mean_pooling=False), marks=pytest.mark.slow),
  ],
)
def test_internvl_equals_transformers_both_ways(text, vision, tmp_path):
  save_model(tmp_path / "theirs", text, **vision)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.InternVLForConditionalGeneration,
    lambda processor, text: processor(PICTURES, text),
    "a <image>b c<image> d<image>",
    dict(image=PICTURES),
    ("model.multi_modal_projector.linear_1.weight", "image_connector/layer1/kernel", lambda x: x.T),
    "a <ctx>b c<ctx> d<ctx>",
    Processor,
  )
  assert_equal_pixels(*found)


def test_tiles_of_any_shape_are_the_processors():
  random = np.random.default_rng(0)
  for height, width in random.integers(5, 900, (300, 2)).tolist():
    for least, most in ((1, 12), (2, 5)):
      columns, rows = theirs.get_optimal_tiled_canvas((height, width), (28, 28), least, most)
      assert grid_of(height, width, 28, least, most) == (rows, columns), (height, width)
  picture = random.integers(0, 256, (50, 130, 3)).astype(np.uint8)
  want = theirs.GotOcr2ImageProcessorPil().crop_image_to_patches(
    picture.transpose(2, 0, 1), 1, 6, patch_size=SizeDict(height=28, width=28), resample=3
  )
  tiles = dict(most=6, least=1, longest=0, grids=())
  got, tiling = cut_into_tiles(picture, dict(size=28, tiles=tiles, interpolation="bicubic"))
  assert (tiling.rows, tiling.columns) == (1, 3)
  np.testing.assert_array_equal(got.transpose(0, 3, 1, 2), np.stack(want))


def test_variants_that_are_not_covered_are_refused_by_name():
  for stated, error in (
    (dict(vision_feature_layer=-2), "vision_feature_layer is -2"),
    (dict(vision_config=dict(norm_type="rms_norm")), "norm_type is 'rms_norm'"),
    (dict(vision_config=dict(use_qk_norm=True)), "use_qk_norm is True"),
    (dict(text_config=dict(model_type="qwen3_moe")), "text_config.model_type is 'qwen3_moe'"),
    (dict(downsample_ratio=0.2), "downsample_ratio is 0.2"),
  ):
    with pytest.raises(UserError, match=error):
      internvl.settings(stated, {})
