"""Pictures as the image processors of transformers prepare them: every pixel equal, for many
sizes.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import CLIPImageProcessor

from mmjax.config import UserError
from mmjax.data.image import decode_and_transform
from mmjax.interop.huggingface import preprocessing, resnet, vit

SIZES = [(427, 640), (640, 427), (225, 224), (224, 231), (97, 640)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_centre_crop_is_equal_to_the_processor_in_every_pixel(interpolation):
  rng = np.random.default_rng(0)
  drawn = [tuple(rng.integers(20, 300, 2).tolist()) for _ in range(40)]
  for height, width in SIZES + drawn:
    size = int(rng.choice([32, 97, 224]))
    shortest = int(rng.choice([size, size + 1, size * 256 // 224]))
    rows, columns = np.mgrid[:height, :width]
    noise = rng.integers(-60, 60, (height, width, 3))
    picture = (128 + 60 * np.sin(rows / 7) * np.cos(columns / 9))[..., None] + noise
    picture = picture.clip(0, 255).astype(np.uint8)
    processor = CLIPImageProcessor(
      size={"shortest_edge": shortest},
      crop_size={"height": size, "width": size},
      do_rescale=False,
      do_normalize=False,
      resample={"bilinear": 2, "bicubic": 3}[interpolation],
    )
    want = processor(images=[Image.fromarray(picture)], return_tensors="np")["pixel_values"][
      0
    ].transpose(1, 2, 0)
    got = decode_and_transform(
      picture, size=size, resize="shortest", crop=size / shortest, interpolation=interpolation
    )
    np.testing.assert_array_equal(got, want, err_msg=f"{width}x{height} at {size} of {shortest}")


@pytest.mark.parametrize("name", preprocessing.PROCESSORS)
def test_what_a_processor_does_where_its_file_is_silent(name):
  theirs = getattr(transformers, f"{name}ImageProcessorPil")
  for key, value in preprocessing.PROCESSORS[name].items():
    want = getattr(theirs, key, None)
    if key == "crop_size":
      want = want["height"]
    if key == "rescale_factor" and want is None:
      want = 1 / 255
    assert (tuple(want) if isinstance(want, list) else want or False) == value, key


def settings(tmp_path, family=resnet, **facts):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
  return preprocessing.image_settings(tmp_path, family, dict(image_size=None))


@pytest.mark.parametrize(
  "says, facts",
  [
    ("'BeitImageProcessor', but only those of", dict(image_processor_type="BeitImageProcessor")),
    ("do_pad is True", dict(image_processor_type="CLIPImageProcessor", do_pad=True)),
    ("a crop of squeezed pictures", dict(image_processor_type="DeiTImageProcessor")),
    (
      "size is {'longest_edge': 200}",
      dict(image_processor_type="ViTImageProcessor", size=dict(longest_edge=200)),
    ),
    ("states no crop_size", dict(image_processor_type="ViTImageProcessor", do_center_crop=True)),
  ],
)
def test_what_a_processor_does_and_we_do_not_is_refused(says, facts, tmp_path):
  with pytest.raises(UserError, match=says):
    settings(tmp_path, **facts)


def test_the_class_of_the_processor_decides_and_the_newer_file_comes_first(tmp_path):
  assert (
    settings(tmp_path, vit, feature_extractor_type="CLIPFeatureExtractor", size=64, crop_size=48)[
      "resize"
    ]
    == "shortest"
  )
  found = settings(tmp_path, vit, image_processor_type="ViTImageProcessorFast", size=64)
  assert (found["resize"], found["size"], found["interpolation"]) == ("squash", 64, "bilinear")
  nested = dict(
    image_processor=dict(
      image_processor_type="ViTImageProcessor", size=dict(height=32, width=32), resample=3
    )
  )
  (tmp_path / "processor_config.json").write_text(json.dumps(nested))
  found = settings(tmp_path, vit, image_processor_type="ViTImageProcessorFast", size=64)
  assert (found["size"], found["interpolation"]) == (32, "bicubic")
