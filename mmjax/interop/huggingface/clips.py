"""How a folder prepares clips (video_preprocessor_config.json, or "video_processor" of
processor_config.json) that the tower of pictures reads, as Qwen3-VL's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.config import UserError
from mmjax.interop.huggingface.preprocessing import FILTERS
from mmjax.interop.huggingface.with_media import PROCESSOR

VIDEO, KIND = "video_preprocessor_config.json", "Qwen3VLVideoProcessor"
USUAL: dict[str, Any] = dict(  # what transformers assumes where the file is silent
  do_resize=True,
  do_rescale=True,
  do_normalize=True,
  do_sample_frames=True,
  rescale_factor=1 / 255,
  resample=3,
  image_mean=(0.5,) * 3,
  image_std=(0.5,) * 3,
  patch_size=16,
  temporal_patch_size=2,
  merge_size=2,
  size=dict(shortest_edge=128 * 32 * 32, longest_edge=32 * 32 * 768),
  fps=2.0,
  num_frames=None,
  min_frames=4,
  max_frames=768,
  cap_pixels_per_frame=False,
  max_video_tokens=768,
)


def settings(facts: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.video, and `interpolation`, `mean` and `std`, which have to be those of
  pictures; {} where the folder does not say how clips are prepared. vision: its vision_config.
  Raises UserError: they are prepared otherwise than is supported here.
  """
  stated = facts.get(VIDEO) or (facts.get(PROCESSOR) or {}).get("video_processor")
  if not stated:
    return {}
  f = {**USUAL, **{key: value for key, value in stated.items() if value is not None}}
  patch, merge = vision["patch_size"], vision["spatial_merge_size"]
  known = {key: USUAL[key] for key in USUAL if key.startswith("do_")}
  known |= dict(patch_size=patch, merge_size=merge, num_frames=None, video_processor_type=KIND)
  known |= dict(temporal_patch_size=vision["temporal_patch_size"])
  for key, value in known.items():
    if f.get(key, value) != value:
      raise UserError(f"{VIDEO}: {key} is {f[key]!r}, but only {value!r} is supported")
  if abs(f["rescale_factor"] * 255 - 1) > 1e-4:
    raise UserError(
      f"{VIDEO}: rescale_factor is {f['rescale_factor']}, but only 1/255 is supported"
    )
  sizes = [f["size"][edge] for edge in ("shortest_edge", "longest_edge")]
  if any(size % patch**2 for size in sizes):
    raise UserError(
      f"{VIDEO}: clips of {sizes[0]} to {sizes[1]} pixels, which are no whole patches of {patch} x "
      f"{patch}. Round them"
    )
  of_frame = f["max_video_tokens"] * merge**2 if f["cap_pixels_per_frame"] else 0
  return dict(
    group=f["temporal_patch_size"],
    fps=float(f["fps"]),
    least=f["min_frames"],
    frames=f["max_frames"],
    patches=(*(size // patch**2 for size in sizes), of_frame),
    interpolation=FILTERS.get(f["resample"], f["resample"]),
    mean=tuple(map(float, f["image_mean"])),
    std=tuple(map(float, f["image_std"])),
  )


def files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """{name: content} of what `settings` reads; {} where clips are not read."""
  image, video = config["data"]["image"], config["data"]["video"]
  if not video["group"]:
    return {}
  least, most, of_frame = video["patches"]
  filters = {name: number for number, name in FILTERS.items()}
  stated = dict(
    USUAL,
    video_processor_type=KIND,
    resample=filters[image["interpolation"]],
    image_mean=list(image["mean"]),
    image_std=list(image["std"]),
    patch_size=image["patch"],
    merge_size=image["merge"],
    temporal_patch_size=video["group"],
    size=dict(shortest_edge=least * image["patch"] ** 2, longest_edge=most * image["patch"] ** 2),
    fps=video["fps"],
    min_frames=video["least"],
    max_frames=video["frames"],
    cap_pixels_per_frame=of_frame > 0,
    max_video_tokens=of_frame // image["merge"] ** 2 or USUAL["max_video_tokens"],
  )
  return {VIDEO: stated}
