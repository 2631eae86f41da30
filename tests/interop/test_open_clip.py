"""Folders of open_clip: a CLIPModel of transformers under open_clip's names gives the same
outputs.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from tests.interop.test_huggingface import clip_tokenizer, imported, randomise, reference

VISION = dict(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=32,
  patch_size=8,
)
TEXT = dict(
  hidden_size=24,
  intermediate_size=72,
  num_hidden_layers=2,
  num_attention_heads=3,
  vocab_size=64,
  max_position_embeddings=24,
  eos_token_id=2,
)


def their_names(model, text=""):
  """The weights of a CLIPModel as open_clip has them; `text` stands before those of texts."""
  found = {}
  for name, x in model.state_dict().items():
    ours = (
      name.replace("vision_model.", "visual.")
      .replace("text_model.", text)
      .replace("encoder.layers.", "transformer.resblocks.")
    )
    for old, new in (
      ("embeddings.class_embedding", "class_embedding"),
      ("embeddings.patch_embedding", "conv1"),
      ("embeddings.position_embedding.weight", "positional_embedding"),
      ("embeddings.token_embedding", "token_embedding"),
      ("pre_layrnorm", "ln_pre"),
      ("post_layernorm", "ln_post"),
      ("final_layer_norm", "ln_final"),
      ("layer_norm1", "ln_1"),
      ("layer_norm2", "ln_2"),
      ("mlp.fc1", "mlp.c_fc"),
      ("mlp.fc2", "mlp.c_proj"),
      ("self_attn", "attn"),
    ):
      ours = ours.replace(old, new)
    found[ours] = x
  for name in [name for name in found if "attn.q_proj" in name]:
    parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
    found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
  found["visual.proj"] = found.pop("visual_projection.weight").T
  found[f"{text}text_projection"] = found.pop("text_projection.weight").T
  return {name: x.contiguous().clone() for name, x in found.items()}


def folder_of(folder, activation="gelu", text="", **change):
  """(the model of transformers, its tokenizer), saved in `folder` as open_clip would."""
  tokenizer = clip_tokenizer()
  tokenizer.save_pretrained(folder)
  model = randomise(
    transformers.CLIPModel(
      transformers.CLIPConfig(
        vision_config=dict(VISION, hidden_act=activation),
        text_config=dict(TEXT, hidden_act=activation),
        projection_dim=16,
      )
    )
  )
  save_file(their_names(model, text), folder / "open_clip_model.safetensors")
  vision = dict(
    image_size=32, layers=2, width=32, patch_size=8, head_width=8, mlp_ratio=2.0, **change
  )
  config = dict(
    model_cfg=dict(
      embed_dim=16,
      quick_gelu=activation == "quick_gelu",
      custom_text=bool(text),
      vision_cfg=vision,
      text_cfg=dict(context_length=24, vocab_size=64, width=24, heads=3, layers=2, mlp_ratio=3.0),
    ),
    preprocess_cfg=dict(
      mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], interpolation="bicubic", resize_mode="shortest"
    ),
  )
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  return model, tokenizer


@pytest.mark.parametrize(
  ("activation", "text"),
  [pytest.param("gelu", "", marks=pytest.mark.slow), ("quick_gelu", "text.")],
)
def test_equal_outputs_after_import_and_after_export(activation, text, tmp_path):
  model, tokenizer = folder_of(tmp_path / "hf", activation, text)
  pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

  def processor(images, return_tensors):
    values = (np.stack([np.asarray(image) for image in images]) / 255 - [0.4, 0.5, 0.6]) / [
      0.2,
      0.3,
      0.4,
    ]
    return dict(pixel_values=torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32))

  want = reference(model, tokenizer, processor, pixels)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  _, outputs = imported(tmp_path / "mmjax")
  for name, a, b in zip(("image", "text", "logits"), outputs(pixels), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again = transformers.CLIPModel.from_pretrained(tmp_path / "back")
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
  assert processor(images=[Image.fromarray(pixels[0])], return_tensors="pt")["pixel_values"].shape[
    2:
  ] == (32, 32)


@pytest.mark.parametrize(
  ("change", "says"),
  (
    (
      dict(timm_model_name="vit_base_patch16_siglip_224"),
      r"vision_cfg\.timm_model_name is 'vit_base_patch16_siglip_224'",
    ),
    (dict(attentional_pool=True), r"vision_cfg\.attentional_pool is True"),
    (dict(novelty=3), r"vision_cfg\.novelty is 3"),
  ),
)
def test_other_models_are_refused_by_name(change, says, tmp_path):
  folder_of(tmp_path / "hf", **change)
  with pytest.raises(UserError, match=says):
    import_hf(tmp_path / "hf", tmp_path / "out")
