"""PaliGemma 2 and Gemma 3 with pictures against transformers: tiny random models, their
processors, pictures of odd shapes.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from mmjax.config import UserError
from mmjax.interop.huggingface import gemma3, paligemma
from tests.interop.media_families import (
  IMAGE,
  PICTURES,
  SIGLIP,
  SPACES,
  TEXT,
  assert_equal_both_ways,
  assert_equal_pixels,
  save,
)
from tests.interop.test_language_models import words

FULL, SLIDING = "full_attention", "sliding_attention"


def save_gemma3(folder, **text):
  torch.manual_seed(0)
  config = transformers.Gemma3Config(
    text_config=dict(TEXT, sliding_window=5, layer_types=[SLIDING, FULL], **text),
    vision_config=SIGLIP,
    mm_tokens_per_image=4,
    image_token_index=IMAGE,
    boi_token_index=15,
    eoi_token_index=16,
  )
  save(folder, transformers.Gemma3ForConditionalGeneration(config))
  words(folder, more=["<soft>", "<boi>", "<eoi>"], spaces=SPACES)
  special = dict(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
  transformers.Gemma3Processor(
    transformers.Gemma3ImageProcessor(size=dict(height=28, width=28)),
    transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=special),
    image_seq_length=4,
  ).save_pretrained(folder)


@pytest.mark.parametrize(
  "text",
  [
    {},
    pytest.param(
      dict(final_logit_softcapping=2.0, tie_word_embeddings=False), marks=pytest.mark.slow
    ),
  ],
)
def test_gemma3_equals_transformers_both_ways(text, tmp_path):
  """A picture of 4 tokens is as long as the window is: the window holds within it."""
  save_gemma3(tmp_path / "theirs", **text)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.Gemma3ForConditionalGeneration,
    lambda processor, text: processor(images=PICTURES, text=text, return_tensors="pt"),
    "a <image>b c<image> d",
    dict(image=PICTURES),
    (
      "model.multi_modal_projector.mm_input_projection_weight",
      "image_connector/layer1/kernel",
      lambda x: x,
    ),
    "a <boi>b c<boi> d",
  )
  assert_equal_pixels(*found)


def save_paligemma(folder, **text):
  torch.manual_seed(0)
  own = dict(TEXT, model_type="gemma2", vocab_size=1200, query_pre_attn_scalar=9)
  config = transformers.PaliGemmaConfig(
    text_config=dict(own, sliding_window=3, attn_logit_softcapping=2.0, **text),
    vision_config=dict(SIGLIP, vision_use_head=False),
    image_token_index=IMAGE,
    projection_dim=32,
  )
  save(folder, transformers.PaliGemmaForConditionalGeneration(config), max_shard_size="100KB")
  words(folder, more=["<image>"], spaces=SPACES)
  special = dict(image_token="<image>")
  transformers.PaliGemmaProcessor(
    transformers.SiglipImageProcessor(size=dict(height=28, width=28), image_seq_length=16),
    transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=special),
  ).save_pretrained(folder)


@pytest.mark.parametrize(
  "text", [{}, pytest.param(dict(final_logit_softcapping=3.0), marks=pytest.mark.slow)]
)
def test_paligemma_equals_transformers_both_ways(text, tmp_path):
  """A prompt is longer than the window, which does not hold within it."""
  save_paligemma(tmp_path / "theirs", **text)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.PaliGemmaForConditionalGeneration,
    lambda processor, text: processor(images=[PICTURES], text=text, return_tensors="pt"),
    "<image><image>a b c",
    dict(image=PICTURES),
    ("model.multi_modal_projector.linear.weight", "image_connector/layer1/kernel", lambda x: x.T),
  )
  assert_equal_pixels(*found)


def test_variants_that_are_not_covered_are_refused_by_name():
  gemma2 = dict(model_type="gemma2")
  for family, stated, error in (
    (paligemma, {}, "text_config.model_type is 'gemma'"),
    (paligemma, dict(text_config=gemma2, vision_config=dict(model_type="clip")), "only siglip_v"),
    (gemma3, dict(mm_tokens_per_image=9), "mm_tokens_per_image is 9"),
    (gemma3, dict(text_config=dict(use_bidirectional_attention=True)), "use_bidirectional_att"),
  ):
    with pytest.raises(UserError, match=error):
      family.settings(stated, {})
