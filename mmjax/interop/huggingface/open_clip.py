"""Folders of open_clip (open_clip_config.json, open_clip_model.safetensors): its own ViT beside its
own text transformer.

They are read alone; what is written is a CLIPModel of transformers (clip.py). Towers of timm or
transformers, ResNets, CoCa and whatever else a model_cfg asks for are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop import safetensors
from mmjax.interop.huggingface import clip, mapping
from mmjax.interop.huggingface.mapping import Rule

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Names in files of models with `custom_text`.
TOKENIZER_CLASS, PROCESSOR_CLASS, IMAGE_PROCESSOR_CLASS, PREFIX = "CLIPTokenizer", "", "", "text."
ARCHITECTURE, PAD, MASK_PADDING = "CLIP of open_clip", clip.PAD, clip.MASK_PADDING
EPS = 1e-5

# What open_clip assumes where its config is silent, and in FIXED the values that alone are
# supported.
VISION = dict(layers=12, width=768, head_width=64, mlp_ratio=4.0, patch_size=16, image_size=224)
TEXT = dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12, mlp_ratio=4.0)
FIXED: dict[str, dict[str, Any]] = {
  "vision_cfg": dict(
    timm_model_name=None,
    ls_init_value=None,
    attentional_pool=False,
    no_ln_pre=False,
    pos_embed_type="learnable",
    final_ln_after_pool=False,
    pool_type="tok",
    act_kwargs=None,
    norm_kwargs=None,
    block_type=None,
    qk_norm=False,
    scaled_cosine_attn=False,
    scale_heads=False,
    scale_attn_inner=False,
    scale_attn=False,
    scale_fc=False,
    input_patchnorm=False,
    global_average_pool=False,
  ),
  "text_cfg": dict(
    hf_model_name=None,
    ls_init_value=None,
    embed_cls=False,
    no_causal_mask=False,
    final_ln_after_pool=False,
    pool_type="argmax",
    proj_bias=False,
    proj_type="linear",
    act_kwargs=None,
    norm_kwargs=None,
    block_type=None,
    qk_norm=False,
    scaled_cosine_attn=False,
    scale_heads=False,
    scale_attn_inner=False,
    scale_attn=False,
    scale_fc=False,
  ),
  "model_cfg": dict(multimodal_cfg=None, init_logit_bias=None, nonscalar_logit_scale=False),
}
FREE = {  # keys that change nothing of what an encoder gives
  "vision_cfg": (
    "patch_dropout",
    "output_tokens",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
  ),
  "text_cfg": (
    "pad_id",
    "eos_id",
    "output_tokens",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "hf_model_pretrained",
    "correct_cls_mask",
  ),
  "model_cfg": (
    "embed_dim",
    "quick_gelu",
    "custom_text",
    "vision_cfg",
    "text_cfg",
    "init_logit_scale",
    "cast_dtype",
  ),
}
PREPROCESSING = dict(
  mean=clip.PREPROCESSOR["image_mean"],
  std=clip.PREPROCESSOR["image_std"],
  interpolation="bicubic",
  resize_mode="shortest",
)
RESIZE, INTERPOLATION = ("shortest", "squash"), ("bicubic", "bilinear")


def is_here(folder: Path) -> bool:
  """Whether a folder is open_clip's alone: where it also holds what transformers reads, that is
  read.
  """
  return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(the config, the weights) of a folder. Raises UserError: one is not there, or damaged."""
  if not (folder / WEIGHTS).exists():
    raise UserError(
      f"{folder}: no {WEIGHTS}. Save the weights as safetensors: pickled ones are not opened"
    )
  return safetensors.read_json(folder / CONFIG), safetensors.read(folder / WEIGHTS)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "image": settings of data.image, "text": of data.text} of an
  open_clip_config.json.
  """
  model = facts.get("model_cfg") or {}
  _check(model, "model_cfg")
  vision, text = (
    {**defaults, **_check(model.get(name) or {}, name, defaults)}
    for name, defaults in (("vision_cfg", VISION), ("text_cfg", TEXT))
  )
  if not isinstance(vision["layers"], int):
    raise UserError(
      f"vision_cfg.layers is {vision['layers']}: a ResNet, which is not supported here"
    )
  size, patch = (
    clip.square(vision["image_size"], "vision_cfg.image_size"),
    clip.square(vision["patch_size"], "vision_cfg.patch_size"),
  )
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
  shared = dict(norm="pre", final_norm=True, bias=True, activation=activation, eps=EPS)
  image = dict(
    kind="vit",
    patch=patch,
    crop_edge=bool(size % patch),
    width=vision["width"],
    depth=vision["layers"],
    heads=vision["width"] // vision["head_width"],
    mlp=int(vision["width"] * vision["mlp_ratio"]),
    pooling="class",
    input_norm=True,
    patch_bias=False,
    positions="learned",
    stem="patch",
    **shared,
  )
  words = dict(
    kind="transformer",
    causal=True,
    width=text["width"],
    depth=text["layers"],
    heads=text["heads"],
    mlp=int(text["width"] * text["mlp_ratio"]),
    pooling="highest",
    **shared,
  )
  whole = dict(
    name="dual_encoder",
    width=model["embed_dim"],
    projection_bias=False,
    bias=False,
    scale_max=clip.scale_limit(tensors, 100.0),
    encoders=dict(image=image, text=words),
  )
  return dict(
    model=whole,
    image=_preprocessing(facts.get("preprocess_cfg") or {}, size),
    text=dict(vocab_size=text["vocab_size"], length=text["context_length"]),
  )


def _check(
  given: Mapping[str, Any], where: str, known: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
  """`given` itself. Raises UserError: it has a key that is unknown here, or a value that is not
  supported.
  """
  for key, value in given.items():
    if key in FIXED[where]:
      # None, False and "" mean the same.
      if value != FIXED[where][key] and (value or FIXED[where][key]):
        raise UserError(f"{where}.{key} is {value!r}, but only {FIXED[where][key]!r} is supported")
    elif key not in (known or {}) and key not in FREE[where]:
      raise UserError(f"{where}.{key} is {value!r}: such a model is not known here")
  return given


def _preprocessing(given: Mapping[str, Any], size: int) -> dict[str, Any]:
  """data.image of a preprocess_cfg. Raises UserError: pictures are resized in another way."""
  facts = {**PREPROCESSING, **given}
  for key, allowed in (("resize_mode", RESIZE), ("interpolation", INTERPOLATION)):
    if facts[key] not in allowed:
      raise UserError(
        f"preprocess_cfg.{key} is {facts[key]!r}, but only {' and '.join(allowed)} are supported"
      )
  stated = facts.get("size", size)
  if clip.square(stated, "preprocess_cfg.size") != size:
    raise UserError(f"preprocess_cfg.size is {stated}, but vision_cfg.image_size {size}")
  return dict(
    size=size,
    resize=facts["resize_mode"],
    interpolation=facts["interpolation"],
    mean=tuple(map(float, facts["mean"])),
    std=tuple(map(float, facts["std"])),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of open_clip's CLIP, without the prefix that texts have in some."""
  image, text = config["model"]["encoders"]["image"], config["model"]["encoders"]["text"]
  return [
    mapping.same("image/class", "visual.class_embedding"),
    mapping.same("image/position", "visual.positional_embedding"),
    mapping.patches("image/patch/kernel", "visual.conv1.weight", image["patch"]),
    *mapping.norm("image/input_norm", "visual.ln_pre"),
    *_blocks("image/layers", "visual.transformer.resblocks.{i}", image["heads"], image["depth"]),
    *mapping.norm("image/norm", "visual.ln_post"),
    mapping.same("image_projection/kernel", "visual.proj"),
    mapping.same("text/embedding", "token_embedding.weight"),
    mapping.same("text/position", "positional_embedding"),
    *_blocks("text/layers", "transformer.resblocks.{i}", text["heads"], text["depth"]),
    *mapping.norm("text/norm", "ln_final"),
    mapping.same("text_projection/kernel", "text_projection"),
    mapping.scalar("log_scale", "logit_scale", ()),
  ]


def _blocks(ours: str, theirs: str, heads: int, layers: int) -> list[Rule]:
  return [
    *mapping.joint_attention(f"{ours}/attention", f"{theirs}.attn", heads, layers),
    *mapping.norm(f"{ours}/attention_norm", f"{theirs}.ln_1", layers),
    *mapping.norm(f"{ours}/mlp_norm", f"{theirs}.ln_2", layers),
    *mapping.linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", layers),
    *mapping.linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", layers),
  ]
