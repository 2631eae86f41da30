"""DINOv2 against transformers: tiny random models with registers, gates and positions of another
grid, both ways.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from mmjax.interop.huggingface import export_hf, import_hf
from tests.interop.test_single_encoders import PIXELS, loaded, outputs, randomise, reference

# 4x4 patches seen, 10x10 learned.
SMALL = dict(
  hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=7, image_size=70
)
CASES = {
  "Dinov2Model": dict(SMALL, mlp_ratio=3, layerscale_value=0.5, image_size=21),
  "Dinov2ForImageClassification": dict(SMALL, use_swiglu_ffn=True, num_labels=3),
  "Dinov2WithRegistersModel": dict(SMALL, num_register_tokens=3),
  "Dinov2WithRegistersForImageClassification": dict(
    SMALL, num_register_tokens=3, use_swiglu_ffn=True, num_labels=3, image_size=28
  ),
}
QUICK = ("Dinov2ForImageClassification", "Dinov2WithRegistersModel")


@pytest.mark.parametrize(
  "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_equal_outputs_after_import_and_after_export(case, tmp_path):
  kind = getattr(transformers, case)
  model = randomise(kind(kind.config_class(**CASES[case])))
  model.save_pretrained(tmp_path / "hf")
  facts = dict(
    size={"shortest_edge": 36},
    crop_size={"height": 32, "width": 32},
    image_mean=[0.4, 0.5, 0.6],
    image_std=[0.2, 0.3, 0.4],
  )
  transformers.CLIPImageProcessor(**facts).save_pretrained(tmp_path / "hf")
  pixels = (PIXELS / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
  inputs, batch = (
    dict(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)),
    dict(image=dict(pixels=PIXELS)),
  )
  want = reference(model, inputs)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  net, variables = loaded(tmp_path / "mmjax")
  got = outputs(net, variables, batch)
  if "logits" in want:
    mean = want["tokens"][:, 1 + CASES[case].get("num_register_tokens", 0) :].mean(1)
    want["pooled"] = np.concatenate([want["tokens"][:, 0], mean], 1)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, atol=1e-4, err_msg=name)

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]) or "mask_token" in name, name
