"""Qwen3-VL, dense (model_type "qwen3_vl", Bai et al. 2025, arXiv:2511.21631): a tower on as many
patches as a picture has, squares of them as one token, and Qwen3 with positions on three axes,
whose first blocks add tokens of lower blocks of the tower (DeepStack). Clips: see data/clips.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.data.placeholders import HERE
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import clip, clips, decoders, mapping, single, with_media
from mmjax.interop.huggingface.mapping import Rule
from mmjax.interop.huggingface.preprocessing import PROCESSORS

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "Qwen2Tokenizer", "Qwen3VLProcessor", "model."
IMAGE_PROCESSOR_CLASS, PREPROCESSOR = "Qwen2VLImageProcessor", PROCESSORS["Qwen2VL"]
ARCHITECTURE, PAD, MASK_PADDING = "Qwen3VLForConditionalGeneration", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "Qwen3VLModel"),)
TEXT, BESIDE = ("qwen3",), (*with_media.BESIDE, clips.VIDEO)  # families that may write; files

# What transformers assumes where config.json is silent.
FACTS = dict(image_token_id=151_655, video_token_id=151_656, tie_word_embeddings=False)
LONG = dict(rope_theta=500_000.0, max_position_embeddings=128_000)
VISION: dict[str, Any] = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16)
VISION |= dict(hidden_act="gelu_pytorch_tanh", in_channels=3, patch_size=16, spatial_merge_size=2)
VISION |= dict(temporal_patch_size=2, out_hidden_size=3584, num_position_embeddings=2304)
VISION |= dict(deepstack_visual_indexes=(8, 16, 24), rope_parameters=None)
VISION_KEYS = dict(depth="depth", width="hidden_size", mlp="intermediate_size", heads="num_heads")
VISION_KEYS |= dict(frames="temporal_patch_size")
SECTIONS, THETA, EPS = (24, 20, 20), 10_000.0, 1e-6


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py. Raises UserError: a tower of another kind."""
  f = {**FACTS, **facts}
  text = {**LONG, **(f.get("text_config") or {})}
  with_media.only_tower(text, "qwen3_vl_text", "text_config")
  stated = dict(text, model_type="qwen3", tie_word_embeddings=f["tie_word_embeddings"])
  found = with_media.text_settings({**f, "text_config": stated}, tensors, TEXT, "qwen3")
  rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
  sections = tuple(rope.get("mrope_section", SECTIONS))
  found["model"]["block"]["rotary"].update(sections=sections, interleaved=True)
  vision = {**VISION, **(f.get("vision_config") or {})}
  with_media.only_tower(vision, "qwen3_vl_vision")
  grid, merge = math.isqrt(vision["num_position_embeddings"]), vision["spatial_merge_size"]
  taps = vision["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
  known = dict(in_channels=3, out_hidden_size=text.get("hidden_size", 4096))
  known |= dict(num_position_embeddings=grid**2, deepstack_visual_indexes=tuple(sorted(taps)))
  single.only(vision, **known)
  image = {ours: vision[theirs] for ours, theirs in VISION_KEYS.items()}
  pairs = image["width"] // image["heads"] // 4  # of channels that an axis turns
  theta = (vision["rope_parameters"] or {}).get("rope_theta", THETA)
  image.update(
    patch=clip.square(vision["patch_size"], "vision_config.patch_size"),
    grid=grid,
    activation=single.activation(vision, clip.ACTIVATIONS),
    taps=taps,
    block=dict(rotary=dict(theta=theta, sections=(pairs, pairs), axial=True)),
    **dict(kind="naflex", corners=True, pooling="mean", final_norm=False, eps=EPS),
  )
  connector = dict(kind="mlp", width=0, layers=2, norm="layer", eps=EPS, join=merge**2)
  video = clips.settings(f, vision)
  found["model"].update(
    encoders=dict(image=image),
    connectors=dict(image=dict(connector, hidden=image["width"] * merge**2)),
    media_ids=dict(image=f["image_token_id"], **(video and dict(video=f["video_token_id"]))),
  )
  return dict(found, image_size=None, patches=(image["patch"], merge), video=video)


def written(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.sequence: how prompts write a picture, and each pair of frames of a clip."""
  picture = f"<|vision_start|>{HERE}<|vision_end|>"
  return dict(written=dict(image=picture, video=f"<{{time}} seconds>{picture}"))


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json."""
  return with_media.files(config, assets, processor_class=PROCESSOR_CLASS) | clips.files(config)


def image_processor(config: Mapping[str, Any]) -> dict[str, Any]:
  """What preprocessor_config.json says beside the preparation of pictures."""
  return dict(temporal_patch_size=config["model"]["encoders"]["image"]["frames"])


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a Qwen3VLForConditionalGeneration."""
  image, at = config["model"]["encoders"]["image"], "visual.blocks.{i}"
  depth, heads, frames = (image[key] for key in ("depth", "heads", "frames"))
  kernel, qkv = "visual.patch_embed.proj", ("qkv.weight", "qkv.bias", "proj")
  mergers = {"": "visual.merger"}
  for i in range(len(image["taps"])):
    mergers[f"/tap{i + 1}"] = f"visual.deepstack_merger_list.{i}"
  return [
    mapping.patches_of_frames("image/patch/kernel", f"{kernel}.weight", frames, image["patch"]),
    mapping.same("image/patch/bias", f"{kernel}.bias"),
    mapping.same("image/position", "visual.pos_embed.weight"),
    *mapping.joint_attention("image/layers/attention", f"{at}.attn", heads, depth, qkv),
    *mapping.norm("image/layers/attention_norm", f"{at}.norm1", depth),
    *mapping.norm("image/layers/mlp_norm", f"{at}.norm2", depth),
    *mapping.linear("image/layers/mlp/up", f"{at}.mlp.linear_fc1", depth),
    *mapping.linear("image/layers/mlp/down", f"{at}.mlp.linear_fc2", depth),
    *(
      rule
      for ours, merger in mergers.items()
      for rule in (
        *mapping.norm(f"image_connector{ours}/norm", f"{merger}.norm"),
        *mapping.linear(f"image_connector{ours}/layer1", f"{merger}.linear_fc1"),
        *mapping.linear(f"image_connector{ours}/layer2", f"{merger}.linear_fc2"),
      )
    ),
    *with_media.text_rules(config, TEXT),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Qwen3VLForConditionalGeneration must have."""
  other = with_media.parts_refusals(config, image=("naflex", "mlp"))
  return other or decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a Qwen3VLForConditionalGeneration."""
  image = config["model"]["encoders"]["image"]
  text = with_media.text_facts(config, special, TEXT)
  if rotary := decoders.block_of(config).rotary:
    text["rope_parameters"].update(mrope_section=list(rotary.sections), mrope_interleaved=True)
  names = {ours: theirs for theirs, ours in reversed(clip.ACTIVATIONS.items())}
  theta = (image["block"].get("rotary") or {}).get("theta", THETA)
  vision = {theirs: image[ours] for ours, theirs in VISION_KEYS.items()} | dict(
    model_type="qwen3_vl_vision",
    hidden_act=names.get(image["activation"], "gelu"),
    in_channels=3,
    patch_size=image["patch"],
    spatial_merge_size=config["data"]["image"]["merge"],
    out_hidden_size=text["hidden_size"],
    num_position_embeddings=image["grid"] ** 2,
    deepstack_visual_indexes=list(image["taps"]),
    rope_parameters=dict(rope_type="axial", rope_theta=theta),
  )
  ids = {f"{name}_token_id": number for name, number in config["model"]["media_ids"].items()}
  stated = dict(image_token_id=0, vision_config=vision) | ids
  text["model_type"] = "qwen3_vl_text"
  return with_media.config_json(config, special, "qwen3_vl", ARCHITECTURE, text, **stated)
