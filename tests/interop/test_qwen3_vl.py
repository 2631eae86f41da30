"""Qwen3-VL against transformers: a tiny random model, its processor, pictures of odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

from mmjax.config import UserError
from mmjax.data.naflex import grid_of
from mmjax.interop.huggingface import import_hf, qwen3_vl
from tests.interop.media_families import IMAGE, SPACES, TEXT, assert_equal_both_ways, save
from tests.interop.test_language_models import words

PICTURES = [  # one that is made smaller, one larger
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(61, 150, 3), (33, 9, 3)])
]
PIECES = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
VISION = dict(
  depth=2,
  hidden_size=16,
  intermediate_size=24,
  num_heads=2,
  patch_size=4,
  out_hidden_size=32,
  num_position_embeddings=25,
)
ROPE = dict(rope_type="default", rope_theta=5000.0, mrope_section=[2, 1, 1], mrope_interleaved=True)


def save_model(folder, text, vision):
  torch.manual_seed(0)
  config = transformers.Qwen3VLConfig(
    text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE, **text},
    vision_config={**VISION, "deepstack_visual_indexes": [0], **vision},
    image_token_id=IMAGE,
    video_token_id=IMAGE + 3,
    vision_start_token_id=IMAGE + 1,
    vision_end_token_id=IMAGE + 2,
    tie_word_embeddings=text.get("tie_word_embeddings", False),
  )
  save(folder, transformers.Qwen3VLForConditionalGeneration(config))
  words(folder, more=PIECES, spaces=SPACES)
  transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # names its class
  pil.Qwen2VLImageProcessorPil(
    size=dict(shortest_edge=16 * 16, longest_edge=16 * 100),
    patch_size=4,
    merge_size=config.vision_config.spatial_merge_size,
    temporal_patch_size=config.vision_config.temporal_patch_size,
  ).save_pretrained(folder)


class Processor:
  """The parts of Qwen3VLProcessor that need no clips, for which it needs torchvision."""

  def __init__(self, images, tokenizer):
    self.images, self.tokenizer, self.decode = images, tokenizer, tokenizer.decode
    self.image_processor, self.image_token = images, "<|image_pad|>"

  @classmethod
  def from_pretrained(cls, folder):
    images = pil.Qwen2VLImageProcessorPil.from_pretrained(folder)
    return cls(images, transformers.AutoTokenizer.from_pretrained(folder))

  def __call__(self, pictures, text):
    found = self.images(pictures, return_tensors="pt") if pictures else {}
    first, *rest = text.split("<|image_pad|>")
    for i, piece in enumerate(rest):
      first += transformers.Qwen3VLProcessor.replace_image_token(self, found, i) + piece
    inputs = {**found, **self.tokenizer(first, return_tensors="pt")}
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


def assert_equal_patches(predictor, batch, inputs):
  """Every pixel of the pictures' patches equals the processor's, in its order."""
  image, patches = predictor.config.data.image, batch["media"]["image"]
  real = patches["patches"][0][patches["mask"][0]]
  pixels = real.reshape(-1, image.patch, image.patch, 3) / 255
  ours = (pixels - np.array(image.mean)) / np.array(image.std)
  theirs = inputs["pixel_values"].numpy().reshape(len(real), 3, -1, image.patch, image.patch)
  for frame in range(theirs.shape[2]):
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs[:, :, frame], atol=1e-5)


@pytest.mark.parametrize(
  "pictures, text, vision",
  [
    (PICTURES, dict(), dict()),
    pytest.param(
      PICTURES[:1],
      dict(tie_word_embeddings=True, attention_bias=True, num_hidden_layers=3),
      dict(spatial_merge_size=3, temporal_patch_size=1, depth=4, deepstack_visual_indexes=[1, 3]),
      marks=pytest.mark.slow,
    ),
    pytest.param([], dict(), dict(), marks=pytest.mark.slow),
  ],
)
def test_qwen3_vl_equals_transformers_both_ways(pictures, text, vision, tmp_path):
  save_model(tmp_path / "theirs", text, vision)
  prompt = "a b" + "".join(f" c<image>{x}" for x, _ in zip("da", pictures, strict=False))
  gradient = ("model.visual.pos_embed.weight", "image/position", lambda x: x)
  if not pictures:
    gradient = ("model.language_model.norm.weight", "norm/scale", lambda x: x)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.Qwen3VLForConditionalGeneration,
    lambda processor, text: processor(pictures, text),
    prompt,
    dict(image=pictures),
    gradient,
    prompt.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    Processor,
  )
  if pictures:
    assert_equal_patches(*found)


def test_pictures_of_any_shape_get_the_processors_patches():
  for height, width in np.random.default_rng(0).integers(9, 900, (300, 2)).tolist():
    least, most = 16 * 16, 16 * 1000
    rows, columns = pil.smart_resize(height, width, 8, least, most)
    assert grid_of(height, width, 4, 1000, 2, 16) == (rows // 4, columns // 4), (height, width)


def test_variants_that_are_not_covered_are_refused_by_name(tmp_path):
  for stated, error in (
    (dict(text_config=dict(model_type="qwen3_vl_moe_text")), "only qwen3_vl_text"),
    (dict(vision_config=dict(model_type="qwen2_5_vl")), "only qwen3_vl_vision"),
    (
      dict(text_config=dict(hidden_size=3584), vision_config=dict(num_position_embeddings=24)),
      "num_position_embeddings is 24",
    ),
    (dict(vision_config=dict(out_hidden_size=7)), "out_hidden_size is 7"),
    (
      dict(text_config=dict(hidden_size=3584), vision_config=dict(deepstack_visual_indexes=[3, 1])),
      r"deepstack_visual_indexes is \(3, 1\), but only \(1, 3\)",
    ),
  ):
    with pytest.raises(UserError, match=error):
      qwen3_vl.settings(stated, {})
  (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="qwen3_vl_moe"):
    import_hf(tmp_path, tmp_path / "in")
