"""The towers of CLIP and SigLIP alone against transformers: tiny random models, every output
compared, both ways.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from mmjax.interop.huggingface import export_hf, import_hf
from tests.interop.test_huggingface import TEXTS, clip_tokenizer, randomise, siglip_tokenizer
from tests.interop.test_single_encoders import PIXELS, TOWER, loaded, outputs

VISION = dict(TOWER, image_size=32, patch_size=8)
CASES = {
  "CLIPVisionModel": dict(
    VISION, patch_size=9, hidden_act="gelu"
  ),  # pixels beyond the last whole patch
  "CLIPVisionModelWithProjection": dict(VISION, projection_dim=11),
  "CLIPTextModel": dict(
    TOWER, vocab_size=64, max_position_embeddings=24, eos_token_id=2
  ),  # pooled by the highest id
  "CLIPTextModelWithProjection": dict(
    TOWER, vocab_size=64, max_position_embeddings=24, projection_dim=11
  ),
  "SiglipVisionModel": VISION,
  "SiglipVisionModel without a head": dict(VISION, vision_use_head=False),
  "SiglipTextModel": dict(TOWER, vocab_size=48, max_position_embeddings=12, projection_size=11),
}


def folder_of(case, folder):
  """(model, its inputs, our batch), saved in `folder` with what prepares its inputs."""
  name, facts = case.split()[0], dict(CASES[case])
  kind = getattr(transformers, name)
  if "Text" not in name:
    processor = transformers.ViTImageProcessor(
      size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    pixels = (PIXELS / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    inputs, batch = (
      dict(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)),
      dict(image=dict(pixels=PIXELS)),
    )
  else:
    tokenizer = clip_tokenizer() if "CLIP" in name else siglip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    facts.setdefault("eos_token_id", tokenizer.eos_token_id)
    inputs = dict(
      tokenizer(
        TEXTS,
        padding="max_length",
        max_length=facts["max_position_embeddings"],
        truncation=True,
        return_tensors="pt",
      )
    )
    inputs.pop("token_type_ids", None)
    tokens = inputs["input_ids"].numpy().astype(np.int32)
    batch = dict(
      text=dict(
        tokens=tokens,
        mask=inputs["attention_mask"].numpy() > 0
        if "attention_mask" in inputs
        else np.ones_like(tokens, bool),
      )
    )
  model = randomise(kind(kind.config_class(**facts)))
  model.save_pretrained(folder)
  return model, inputs, batch


def reference(model, inputs):
  """{"tokens" after the last norm, "pooled", "embedding"} of transformers, those that there are."""
  with torch.no_grad():
    out = model(**inputs)
    tokens = out.last_hidden_state
    if type(model).__name__.startswith("CLIPVision"):
      tokens = getattr(model, "vision_model", model).post_layernorm(tokens)
    pooled = getattr(out, "pooler_output", None)
    embedding = next(
      (
        x for name in ("image_embeds", "text_embeds") if (x := getattr(out, name, None)) is not None
      ),
      pooled,
    )
    if pooled is None and embedding is None:
      embedding = tokens.mean(1)
    found = dict(tokens=tokens, embedding=embedding / embedding.norm(dim=-1, keepdim=True))
    if pooled is not None and "SiglipText" not in type(model).__name__:
      found["pooled"] = pooled
  return {name: x.numpy() for name, x in found.items()}


QUICK = ("CLIPVisionModelWithProjection", "CLIPTextModel", "SiglipTextModel")


@pytest.mark.parametrize(
  "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_equal_outputs_after_import_and_after_export(case, tmp_path):
  model, inputs, batch = folder_of(case, tmp_path / "hf")
  want = reference(model, inputs)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  net, variables = loaded(tmp_path / "mmjax")
  got = outputs(net, variables, batch)
  real = batch["text"]["mask"] if "text" in batch else np.ones(got["tokens"].shape[:2], bool)
  for name, value in want.items():
    a, b = (x[real] if name == "tokens" else x for x in (got[name], value))
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert again.config.architectures == model.config.architectures
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  if "text" in batch:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer(
      TEXTS, padding="max_length", max_length=batch["text"]["tokens"].shape[1], truncation=True
    )["input_ids"]
    np.testing.assert_array_equal(ids, batch["text"]["tokens"])


def test_files_with_the_names_of_old_towers_are_read(tmp_path):
  from safetensors.torch import load_file, save_file

  folder_of("SiglipTextModel", tmp_path / "hf")
  import_hf(tmp_path / "hf", tmp_path / "new")
  path = tmp_path / "hf" / "model.safetensors"
  save_file({f"text_model.{name}": x for name, x in load_file(path).items()}, path)
  import_hf(tmp_path / "hf", tmp_path / "old")
  (net, new), (_, old) = (loaded(tmp_path / name) for name in ("new", "old"))
  assert net.projection_bias
  for name, tree in new["params"].items():
    np.testing.assert_equal(old["params"][name], tree)
