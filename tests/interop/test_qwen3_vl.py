"""Qwen3-VL against transformers: a tiny random model, its processor, pictures of odd shapes."""

from __future__ import annotations

import importlib
import json
import types

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil
from transformers.video_utils import VideoMetadata

from mmjax import config as configs
from mmjax.config import UserError
from mmjax.data.clips import ClipTransform
from mmjax.data.naflex import grid_of
from mmjax.interop.huggingface import import_hf, qwen3_vl
from mmjax.interop.huggingface.preprocessing import PROCESSORS
from tests.data.test_video import encode, timed
from tests.interop.media_families import IMAGE, SPACES, TEXT, assert_equal_both_ways, save
from tests.interop.test_language_models import words

# of which only what does without torchvision is used
clips_there = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
PICTURES = [  # one that is made smaller, one larger
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(61, 150, 3), (33, 9, 3)])
]
PIECES = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
TIMES = [f"<{tenth / 10} seconds>" for tenth in range(12)]
CLIP = dict(  # how clips are prepared
  video_processor_type="Qwen3VLVideoProcessor",
  patch_size=4,
  merge_size=2,
  size=dict(shortest_edge=16 * 16, longest_edge=16 * 100),
  fps=5,
  image_mean=PROCESSORS["Qwen2VL"]["image_mean"],
  image_std=PROCESSORS["Qwen2VL"]["image_std"],
)
VISION = dict(
  depth=2,
  hidden_size=16,
  intermediate_size=24,
  num_heads=2,
  patch_size=4,
  out_hidden_size=32,
  num_position_embeddings=25,
)
ROPE = dict(rope_type="default", rope_theta=5000.0, mrope_section=[2, 1, 1], mrope_interleaved=True)


def save_model(folder, text, vision):
  torch.manual_seed(0)
  config = transformers.Qwen3VLConfig(
    text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE, **text},
    vision_config={**VISION, "deepstack_visual_indexes": [0], **vision},
    image_token_id=IMAGE,
    video_token_id=IMAGE + 3,
    vision_start_token_id=IMAGE + 1,
    vision_end_token_id=IMAGE + 2,
    tie_word_embeddings=text.get("tie_word_embeddings", False),
  )
  save(folder, transformers.Qwen3VLForConditionalGeneration(config))
  words(folder, more=[*PIECES, *TIMES], spaces=SPACES)
  transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # names its class
  pil.Qwen2VLImageProcessorPil(
    size=dict(shortest_edge=16 * 16, longest_edge=16 * 100),
    patch_size=4,
    merge_size=config.vision_config.spatial_merge_size,
    temporal_patch_size=config.vision_config.temporal_patch_size,
  ).save_pretrained(folder)


class Processor:
  """The parts of Qwen3VLProcessor that need no clips, for which it needs torchvision."""

  def __init__(self, images, tokenizer):
    self.images, self.tokenizer, self.decode = images, tokenizer, tokenizer.decode
    self.image_processor, self.image_token = images, "<|image_pad|>"

  @classmethod
  def from_pretrained(cls, folder):
    images = pil.Qwen2VLImageProcessorPil.from_pretrained(folder)
    return cls(images, transformers.AutoTokenizer.from_pretrained(folder))

  def __call__(self, pictures, text):
    found = self.images(pictures, return_tensors="pt") if pictures else {}
    first, *rest = text.split("<|image_pad|>")
    for i, piece in enumerate(rest):
      first += transformers.Qwen3VLProcessor.replace_image_token(self, found, i) + piece
    inputs = {**found, **self.tokenizer(first, return_tensors="pt")}
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


def frames_of(count, height, width):
  """Frames that change smoothly, over which no filter overshoots: all resizers agree on them."""
  at, row, column = np.ogrid[:count, :height, :width]
  planes = (20 * at + row + column, 200 - 15 * at - row, 10 * at + 2 * column + 0 * row)
  return np.stack([np.broadcast_to(x, (count, height, width)) for x in planes], -1).astype(np.uint8)


class ClipProcessor(Processor):
  """With clips of 10 frames a second, whose resizing is what torchvision calls."""

  video_token, vision_start_token, vision_end_token = PIECES[3], *PIECES[1:3]
  _calculate_timestamps = transformers.Qwen3VLProcessor._calculate_timestamps

  @classmethod
  def from_pretrained(cls, folder):
    found = super().from_pretrained(folder)
    found.facts = json.loads((folder / "video_preprocessor_config.json").read_text())
    found.video_processor = types.SimpleNamespace(
      temporal_patch_size=2, merge_size=found.facts["merge_size"], min_frames=4, max_frames=768
    )
    return found

  def clip(self, frames):
    """(patches, grid, which frames) of a clip."""
    theirs, facts = clips_there.Qwen3VLVideoProcessor, self.facts
    metadata = VideoMetadata(total_num_frames=len(frames), fps=10.0)
    chosen = theirs.sample_frames(self.video_processor, metadata, fps=facts["fps"])
    metadata.frames_indices = chosen
    x = torch.from_numpy(frames[chosen]).permute(0, 3, 1, 2)
    size = clips_there.smart_resize(
      len(x),
      *x.shape[2:],
      factor=8,
      min_pixels=facts["size"]["shortest_edge"],
      max_pixels=facts["size"]["longest_edge"],
    )
    x = torch.nn.functional.interpolate(x, size=size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(facts[f"image_{x}"])[:, None, None] for x in ("mean", "std"))
    x = ((x / 255 - mean) / std)[None]
    patches, *grid = theirs.patchify(self, x, 4, 2, 2)
    return patches[0], torch.tensor([grid]), metadata

  def __call__(self, media, text):
    pictures, clip = media
    pixels, grid, metadata = self.clip(clip)
    found = dict(pixel_values_videos=pixels, video_grid_thw=grid)
    written = transformers.Qwen3VLProcessor.replace_video_token(
      self, dict(found, video_metadata=[metadata]), 0
    )
    inputs = super().__call__(pictures, text.replace(self.video_token, written))
    kinds = inputs["mm_token_type_ids"] + 2 * (inputs["input_ids"] == IMAGE + 3).int()
    return {**inputs, **found, "mm_token_type_ids": kinds}


def assert_equal_patches(predictor, batch, inputs):
  """Every pixel of the pictures' patches equals the processor's, in its order."""
  image, patches = predictor.config.data.image, batch["media"]["image"]
  real = patches["patches"][0][patches["mask"][0]]
  pixels = real.reshape(-1, image.patch, image.patch, 3) / 255
  ours = (pixels - np.array(image.mean)) / np.array(image.std)
  theirs = inputs["pixel_values"].numpy().reshape(len(real), 3, -1, image.patch, image.patch)
  for frame in range(theirs.shape[2]):
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs[:, :, frame], atol=1e-5)


@pytest.mark.parametrize(
  "pictures, text, vision",
  [
    pytest.param(PICTURES, dict(), dict(), marks=pytest.mark.slow),
    pytest.param(
      PICTURES[:1],
      dict(tie_word_embeddings=True, attention_bias=True, num_hidden_layers=3),
      dict(spatial_merge_size=3, temporal_patch_size=1, depth=4, deepstack_visual_indexes=[1, 3]),
      marks=pytest.mark.slow,
    ),
    pytest.param([], dict(), dict(), marks=pytest.mark.slow),
  ],
)
def test_qwen3_vl_equals_transformers_both_ways(pictures, text, vision, tmp_path):
  save_model(tmp_path / "theirs", text, vision)
  prompt = "a b" + "".join(f" c<image>{x}" for x, _ in zip("da", pictures, strict=False))
  gradient = ("model.visual.pos_embed.weight", "image/position", lambda x: x)
  if not pictures:
    gradient = ("model.language_model.norm.weight", "norm/scale", lambda x: x)
  found = assert_equal_both_ways(
    tmp_path,
    transformers.Qwen3VLForConditionalGeneration,
    lambda processor, text: processor(pictures, text),
    prompt,
    dict(image=pictures),
    gradient,
    prompt.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    Processor,
  )
  if pictures:
    assert_equal_patches(*found)


def test_clips_equal_transformers_with_their_times(tmp_path):
  """Five of eleven frames, the last of them twice, beside a picture."""
  save_model(tmp_path / "theirs", {}, {})
  (tmp_path / "theirs" / "video_preprocessor_config.json").write_text(json.dumps(CLIP))
  frames = frames_of(11, 31, 45)
  prompt = "a<video> b<image> c"
  predictor, batch, inputs = assert_equal_both_ways(
    tmp_path,
    transformers.Qwen3VLForConditionalGeneration,
    lambda processor, text: processor((PICTURES[:1], frames), text),
    prompt,
    dict(image=PICTURES[:1], video=[encode(frames)]),
    ("model.visual.pos_embed.weight", "image/position", lambda x: x),
    prompt.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>").replace(
      "<video>", "<|video_pad|>"
    ),
    ClipProcessor,
  )
  real = batch["media"]["video"]["mask"][0]
  pixels = batch["media"]["video"]["patches"][0][real].reshape(-1, 2, 4, 4, 3) / 255
  ours = (pixels - np.array(CLIP["image_mean"])) / np.array(CLIP["image_std"])
  theirs = inputs["pixel_values_videos"].reshape(len(ours), 3, 2, 4, 4)
  np.testing.assert_allclose(ours.transpose(0, 4, 1, 2, 3), theirs, atol=1e-5)
  # true times, where frames do not come at a constant rate: the first stays 0.8 s
  (read,) = predictor.language.read(["<video>"], dict(video=[timed([0, 800, 900, 1000], 300)]))
  written = predictor.tokenizer.piece
  times = [written(t) for part in read.parts if isinstance(part, list) for t in part]
  assert [time for time in times if "seconds" in time] == [TIMES[i] for i in (1, 6, 11)]
  shown = [arrays["patches"][0].reshape(2, -1)[:, 0].tolist() for _, arrays in read.media]
  assert shown == [[0, 0], [0, 0], [3, 3]]
  with pytest.raises(UserError, match="a clip of 1 frame"):
    predictor.generate("<video>", video=[frames[:1]])
  with pytest.raises(UserError, match="needs model.encoders.image.frames=3"):
    configs.resolve(predictor.config, ["data.video.group=3"])


def test_clips_of_any_shape_get_the_processors_frames_and_sizes():
  rng = np.random.default_rng(0)
  video = dict(group=2, fps=2.0, least=4, frames=30, patches=(128, 3000, 0))
  image = dict(patch=4, merge=2, interpolation="bicubic")
  transform = ClipTransform(*(ConfigDict(x) for x in (image, video)))
  theirs = types.SimpleNamespace(fps=2, min_frames=4, max_frames=30)
  for _ in range(300):
    frames, height, width = (int(n) for n in rng.integers(2, (40, 300, 300)))
    size = clips_there.smart_resize(frames, height, width, 2, 8, 128 * 16, 3000 * 16)
    assert transform.size_of(frames, height, width) == size, (frames, height, width)
    rate = float(rng.choice([10, 24, 25, 30_000 / 1001]))
    metadata = VideoMetadata(total_num_frames=frames, fps=rate)
    chosen = clips_there.Qwen3VLVideoProcessor.sample_frames(theirs, metadata)
    np.testing.assert_array_equal(transform.pick(frames, rate), chosen)


def test_pictures_of_any_shape_get_the_processors_patches():
  for height, width in np.random.default_rng(0).integers(9, 900, (300, 2)).tolist():
    least, most = 16 * 16, 16 * 1000
    rows, columns = pil.smart_resize(height, width, 8, least, most)
    assert grid_of(height, width, 4, 1000, 2, 16) == (rows // 4, columns // 4), (height, width)


def test_variants_that_are_not_covered_are_refused_by_name(tmp_path):
  for stated, error in (
    (dict(text_config=dict(model_type="qwen3_vl_moe_text")), "only qwen3_vl_text"),
    (dict(vision_config=dict(model_type="qwen2_5_vl")), "only qwen3_vl_vision"),
    (
      dict(text_config=dict(hidden_size=3584), vision_config=dict(num_position_embeddings=24)),
      "num_position_embeddings is 24",
    ),
    (dict(vision_config=dict(out_hidden_size=7)), "out_hidden_size is 7"),
    (
      dict(text_config=dict(hidden_size=3584), vision_config=dict(deepstack_visual_indexes=[3, 1])),
      r"deepstack_visual_indexes is \(3, 1\), but only \(1, 3\)",
    ),
  ):
    with pytest.raises(UserError, match=error):
      qwen3_vl.settings(stated, {})
  (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="qwen3_vl_moe"):
    import_hf(tmp_path, tmp_path / "in")
