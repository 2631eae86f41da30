"""Pictures as patch sequences against SigLIP 2's own preparation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import UserError
from mmjax.data.naflex import fitting_grid, patch_sequence


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 14, 16]), st.integers(4, 1024))
def test_the_grid_is_that_of_siglip_2(height, width, patch, budget):
  from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

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
  np.testing.assert_array_equal(got.positions[got.mask], [(r, c) for r in range(rows) for c in range(columns)])
  assert not got.patches[~got.mask].any() and got.patches.dtype == np.uint8


def test_what_is_no_picture_is_refused():
  with pytest.raises(UserError, match="must be uint8"):
    patch_sequence(np.zeros((4, 4)), 2, 4)
  with pytest.raises(UserError, match="at least 1"):
    fitting_grid(4, 4, 2, 0)
