"""Pictures as patch sequences against SigLIP 2's own preparation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.naflex import cut, fitting_grid, patch_sequence
from tests.inference.tiny import png


@settings(max_examples=40, deadline=None)
@given(
  st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 14, 16]), st.integers(4, 1024)
)
def test_the_grid_is_that_of_siglip_2(height, width, patch, budget):
  from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
  )

  theirs = get_image_size_for_max_num_patches(height, width, patch, budget)
  if theirs[0] * theirs[1] > budget * patch * patch:
    return  # a strip that no scale makes fit
  assert fitting_grid(height, width, patch, budget) == (theirs[0] // patch, theirs[1] // patch)


@pytest.mark.parametrize("size", [(40, 61), (200, 30), (7, 7)])
def test_patches_are_those_of_siglip_2(size):
  from PIL import Image
  from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

  pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
  processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24, do_normalize=False)
  want = processor(images=[Image.fromarray(pixels)], return_tensors="np")
  got = patch_sequence(pixels, 8, 24)
  np.testing.assert_array_equal(got.grid, want["spatial_shapes"][0])
  np.testing.assert_array_equal(got.mask, want["pixel_attention_mask"][0] > 0)
  np.testing.assert_allclose(got.patches / 255, want["pixel_values"][0], atol=1.01 / 255)
  rows, columns = got.grid
  np.testing.assert_array_equal(
    got.positions[got.mask], [(r, c) for r in range(rows) for c in range(columns)]
  )
  assert not got.patches[~got.mask].any() and got.patches.dtype == np.uint8


def test_what_is_no_picture_is_refused():
  with pytest.raises(UserError, match="must be uint8"):
    patch_sequence(np.zeros((4, 4)), 2, 4)
  with pytest.raises(UserError, match="at least 1"):
    fitting_grid(4, 4, 2, 0)


def test_batches_are_sequences_of_every_aspect_ratio(config, tmp_path):
  from mmjax.data.builders import write_dataset
  from mmjax.data.evaluation_data import EvaluationData
  from mmjax.data.pipeline import Pipeline, batch_spec
  from tests.data.conftest import record

  shapes = [(20, 20), (12, 40), (33, 9), (1, 64), (1, 1), (64, 8)]
  rng = np.random.default_rng(0)
  pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
  write_dataset(
    "wide",
    tmp_path,
    {"train": [record(i, image=png(p)) for i, p in enumerate(pictures)]},
    card="# wide\n",
  )
  c = config(
    **{
      "data.image.resize": "naflex",
      "data.image.patch": 4,
      "data.image.tokens": 12,
      "data.image.interpolation": "bilinear",
      "data.dir": str(tmp_path),
      "data.sources.tiny.name": "wide",
      "model.encoders.image.kind": "naflex",
      "model.encoders.image.patch": 4,
      "data.modalities": ("image",),
      "data.image.augment.crop": (0.5, 1.0),
    }
  )
  data = EvaluationData(c, c.data.sources.tiny, batch_size=8)
  (batch,) = data.images()
  assert batch["valid"].tolist() == [True] * 6 + [False] * 2
  for i in range(6):
    want = patch_sequence(pictures[i], 4, 12)
    for name, value in want._asdict().items():
      np.testing.assert_array_equal(batch["image"][name][i], value, err_msg=name)
    shown = data.picture(i)
    assert shown.shape == (*(4 * want.grid), 3)
    np.testing.assert_array_equal(cut(shown, 4, 12).patches, want.patches)
  pipeline, spec = Pipeline(c), batch_spec(c)
  batch = pipeline.batch(3)
  assert {name: (x.shape, x.dtype) for name, x in batch["image"].items()} == {
    name: (x.shape, x.dtype) for name, x in spec["image"].items()
  }
  np.testing.assert_array_equal(batch["image"]["mask"].sum(1), batch["image"]["grid"].prod(1))
  again = Pipeline(c, rows=[5, 2]).batch(3)
  for name, value in again["image"].items():
    np.testing.assert_array_equal(value, batch["image"][name][[5, 2]])
  assert (batch["image"]["patches"] != pipeline.batch(4)["image"]["patches"]).any()


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"model.encoders.image.kind": "vit"}, "does not take"),
    ({"data.image.patch": 8}, "data.image.patch is 8, but model.encoders.image.patch is 4"),
    ({"train.mixup": 0.2}, "train.mixup"),
    ({"data.image.tokens": 0}, "data.image.tokens is 0"),
  ],
)
def test_contradictions_are_refused(config, changes, says):
  naflex = {
    "data.image.resize": "naflex",
    "data.image.patch": 4,
    "model.encoders.image.kind": "naflex",
    "model.encoders.image.patch": 4,
  }
  with pytest.raises(UserError, match=says) as error:
    config(**{**naflex, **changes})
  assert "\n" not in str(error.value)
