"""LLaVA-1.5 against transformers: a tiny random model, its processor, pictures of odd shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import mmjax
from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf, llava
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints
from tests.interop.media_families import IMAGE, PICTURES, SPACES
from tests.interop.media_families import TEXT as SMALL
from tests.interop.test_language_models import words

VISION = dict(
  model_type="clip_vision_model",
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=2,
  image_size=28,
  patch_size=7,
)
TEXT = dict(SMALL, model_type="llama")
PROMPT = "a <image>b c<image> d"  # "b" begins with no space


def save(folder, **settings):
  """A folder of a random model and of its processor."""
  torch.manual_seed(2)  # one of those after which no end is written at once
  config = transformers.LlavaConfig(
    vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, **settings
  )
  model = transformers.LlavaForConditionalGeneration(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  words(folder, more=["<image>"], spaces=SPACES)
  transformers.LlavaProcessor(
    transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
    transformers.AutoTokenizer.from_pretrained(folder),
    patch_size=7,
    vision_feature_select_strategy=config.vision_feature_select_strategy,
    num_additional_image_tokens=1,
  ).save_pretrained(folder)


def opened(folder):
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    pytest.param(
      dict(vision_feature_select_strategy="full", vision_feature_layer=1), marks=pytest.mark.slow
    ),
  ],
)
def test_llava_equals_transformers_both_ways(settings, tmp_path):
  save(tmp_path / "theirs", **settings)
  theirs, processor = opened(tmp_path / "theirs")
  inputs = processor(images=PICTURES, text=PROMPT, return_tensors="pt")
  import_hf(tmp_path / "theirs", tmp_path / "in")
  predictor = mmjax.load(tmp_path / "in")
  config, model, params = predictor.config, make_model(predictor.config), predictor.params

  # pictures: every pixel; tokens: as many places as the processor gives them
  pixels = np.stack([predictor.pixels(picture) for picture in PICTURES])
  image = config.data.image
  normalised = (pixels / 255 - np.array(image.mean)) / np.array(image.std)
  np.testing.assert_allclose(
    normalised.transpose(0, 3, 1, 2), inputs["pixel_values"].numpy(), atol=1e-5
  )
  ids = inputs["input_ids"].numpy().astype(np.int32)
  places = ids[0] == config.model.media_ids.image
  each = config.data.sequence.image
  assert places.sum() == 2 * each == 2 * (16 + bool(settings))
  numbers = np.cumsum(places) - 1
  batch = {
    "sequence": {
      "tokens": ids,
      "media_index": np.where(places, numbers // each, -1)[None],
      "media_offset": np.where(places, numbers % each, 0)[None],
    },
    "media": {"image": {"pixels": pixels[None], "present": np.ones((1, 2), bool)}},
  }

  def loss(params):
    hidden, _, _ = model.apply({"params": params}, batch, method="next_tokens")
    logits = model.apply({"params": params}, hidden, method="logits")
    gains = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(gains, ids[:, 1:, None], axis=2).mean(), logits

  (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  want = theirs(**inputs, labels=inputs["input_ids"])
  want.loss.backward()
  np.testing.assert_allclose(logits, want.logits.detach(), atol=1e-4)
  np.testing.assert_allclose(value, want.loss.item(), atol=1e-5)
  first = theirs.model.multi_modal_projector.linear_1.weight.grad
  np.testing.assert_allclose(gradients["image_connector"]["layer1"]["kernel"], first.T, atol=1e-4)

  # 32 tokens from the prompt itself
  (written,) = predictor.generate([PROMPT], image=[PICTURES], max_length=32)
  greedy = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
  assert written == processor.decode(greedy, skip_special_tokens=True) != ""

  export_hf(tmp_path / "in", tmp_path / "out")
  exported, again = opened(tmp_path / "out")
  inputs = again(images=PICTURES, text=PROMPT, return_tensors="pt")
  np.testing.assert_array_equal(inputs["input_ids"], ids)
  with torch.no_grad():
    np.testing.assert_allclose(exported(**inputs).logits, want.logits.detach(), atol=1e-5)
  import_hf(tmp_path / "out", tmp_path / "again")
  kept = checkpoints.load_params(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, dict(kept), jax.device_get(dict(params)))


def test_variants_that_are_not_covered_are_refused_by_name():
  for stated, error in (
    (dict(vision_feature_layer=[-2, -5]), r"vision_feature_layer is \[-2, -5\]"),
    (dict(text_config=dict(model_type="phi")), "text_config.model_type is 'phi'"),
    (dict(vision_config=dict(model_type="siglip_vision_model")), "only clip_vision_model"),
    (dict(projector_hidden_act="mish"), "projector_hidden_act 'mish' is not supported"),
  ):
    with pytest.raises(UserError, match=error):
      llava.settings(stated, {})
