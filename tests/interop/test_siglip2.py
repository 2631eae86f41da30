"""SigLIP 2 on pictures of any aspect ratio: a random Siglip2Model of transformers, imported and
exported again.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import mmjax
from mmjax.config import UserError
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.parallel.mesh import single_device_mesh
from tests.interop.test_huggingface import randomise

TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXTS = ["a red heart", "The CAT sat", "x"]
PICTURES = [
  np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
  for i, shape in enumerate(((30, 40), (12, 60), (41, 17)))
]


def make(folder, **tokenizer):
  """A folder as transformers writes it; its tokenizer knows letters alone."""
  pieces = {
    p: i
    for i, p in enumerate(
      ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    )
  }
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[], unk_token="<unk>"))
  backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A <eos>", special_tokens=[("<eos>", 1)]
  )
  facts = dict(
    dict(
      eos_token="<eos>",
      pad_token="<pad>",
      unk_token="<unk>",
      bos_token="<bos>",
      padding_side="right",
    ),
    **tokenizer,
  )
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **facts).save_pretrained(folder)
  path = folder / "tokenizer_config.json"
  path.write_text(
    json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Siglip2Tokenizer"})
  )
  config = transformers.Siglip2Config(
    text_config=dict(TOWER, vocab_size=48, max_position_embeddings=14, projection_size=16),
    vision_config=dict(TOWER, num_patches=16, patch_size=4),
  )
  model = randomise(transformers.Siglip2Model(config))
  with torch.no_grad():
    model.logit_scale.fill_(1.3)
    model.logit_bias.fill_(-2.5)
  model.save_pretrained(folder)
  Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20).save_pretrained(folder)
  return model


def prepared(folder):
  return Siglip2ImageProcessorPil.from_pretrained(folder)(
    images=[Image.fromarray(p) for p in PICTURES], return_tensors="pt"
  )


def reference(model, folder):
  """(image embeddings, text embeddings, logits per image) of transformers, with what the folder
  prepares inputs with.
  """
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  texts = tokenizer(
    TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
  )
  pictures = prepared(folder)
  with torch.no_grad():
    out = model(
      input_ids=texts["input_ids"], attention_mask=texts.get("attention_mask"), **pictures
    )
  return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


@pytest.mark.parametrize(
  "inputs", [["input_ids"], ["input_ids", "attention_mask"]], ids=["padding seen", "padding masked"]
)
def test_equal_outputs_after_import_and_after_export(inputs, tmp_path):
  model = make(tmp_path / "hf", model_input_names=inputs)
  want = reference(model, tmp_path / "hf")
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  predictor = mmjax.load(tmp_path / "mmjax", mesh=single_device_mesh())
  assert (
    predictor.config.data.image.resize,
    predictor.config.data.image.tokens,
    predictor.config.data.image.patch,
  ) == ("naflex", 20, 4)
  image, text = predictor.encode_image(PICTURES), predictor.encode_text(TEXTS)
  np.testing.assert_allclose(text, want[1], atol=1e-4)
  # Bytes here, and there floats between resizing and the model.
  np.testing.assert_allclose(image, want[0], atol=1e-2)
  pictures, ours = prepared(tmp_path / "hf"), [predictor.media["image"](p) for p in PICTURES]
  np.testing.assert_array_equal(pictures["spatial_shapes"], [x["grid"] for x in ours])
  pictures["pixel_values"] = torch.tensor(
    np.stack([x["patches"] / 127.5 - 1 for x in ours]), dtype=torch.float32
  )
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(predictor.tokens(TEXTS)["tokens"]).long(),
      attention_mask=torch.tensor(predictor.tokens(TEXTS)["mask"]).long()
      if len(inputs) > 1
      else None,
      **pictures,
    )
  np.testing.assert_allclose(image, out.image_embeds, atol=1e-4)
  np.testing.assert_allclose(
    predictor.scale * image @ text.T + predictor.bias, out.logits_per_image, atol=1e-4
  )

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = transformers.Siglip2Model.from_pretrained(
    tmp_path / "back", output_loading_info=True
  )
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  for got, value in zip(reference(again.eval(), tmp_path / "back"), want, strict=True):
    np.testing.assert_allclose(got, value, atol=1e-5)


def test_texts_padded_on_the_left_are_refused(tmp_path):
  make(tmp_path / "hf", padding_side="left")
  with pytest.raises(UserError, match="pads texts on the left"):
    import_hf(tmp_path / "hf", tmp_path / "mmjax")
