"""Tokenizer and preparation of pictures and sound of a Hugging Face folder, as settings of `data`,
and back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mmjax.config import UserError
from mmjax.data import wordpiece
from mmjax.data.tokenizers import LARGEST, Tokenizer
from mmjax.interop.huggingface import own_tokenizer
from mmjax.interop.huggingface.clip import square
from mmjax.interop.safetensors import read_bytes, read_json

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)
SENTENCEPIECE = "spiece.model"
_HALF = dict(
  do_resize=True,
  do_rescale=True,
  rescale_factor=1 / 255,
  do_normalize=True,
  image_mean=(0.5,) * 3,
  image_std=(0.5,) * 3,
)
_CROPS = dict(
  _HALF,
  size={"shortest_edge": 224},
  resample=3,
  do_center_crop=True,
  crop_size=224,
  image_mean=(0.48145466, 0.4578275, 0.40821073),
  image_std=(0.26862954, 0.26130258, 0.27577711),
)
_CUT = dict(
  _HALF,
  size={"longest_edge": 4 * 364},
  max_image_size={"longest_edge": 364},
  resample=1,
  do_center_crop=False,
  do_image_splitting=True,
)
PROCESSORS = {  # name of an image processor -> what it does where its file is silent
  "CLIP": _CROPS,
  "Bit": _CROPS,
  "Siglip": dict(_HALF, size={"height": 224, "width": 224}, resample=3, do_center_crop=False),
  "Siglip2": dict(_HALF, resample=2, do_center_crop=False, patch_size=16, max_num_patches=256),
  "ViT": dict(_HALF, size={"height": 224, "width": 224}, resample=2, do_center_crop=False),
  "DeiT": dict(
    _HALF, size={"height": 256, "width": 256}, resample=3, do_center_crop=True, crop_size=224
  ),
  "Gemma3": dict(_HALF, size={"height": 224, "width": 224}, resample=2, do_center_crop=False),
  "GotOcr2": dict(
    _HALF,
    size={"height": 384, "width": 384},
    resample=3,
    do_center_crop=False,
    min_patches=1,
    max_patches=12,
    image_mean=_CROPS["image_mean"],
    image_std=_CROPS["image_std"],
  ),
  "LlavaOnevision": dict(
    _HALF,
    size={"height": 384, "width": 384},
    resample=3,
    do_center_crop=False,
    image_mean=_CROPS["image_mean"],
    image_std=_CROPS["image_std"],
    image_grid_pinpoints=tuple([384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)),
  ),
  "Qwen2VL": dict(
    _HALF,
    size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    resample=3,
    image_mean=_CROPS["image_mean"],
    image_std=_CROPS["image_std"],
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
  ),
  "Idefics3": _CUT,
  "SmolVLM": _CUT,
  "ConvNext": dict(_HALF, size={"shortest_edge": 384}, resample=3, do_center_crop=False),
}
SHORTEST = ("CLIP", "Bit", "ConvNext")  # those for which a size of one number is the shortest side
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def image_settings(folder: Path, family: ModuleType, found: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of data.image from preprocessor_config.json (or processor_config.json). Raises
  UserError: it does what we cannot, or other than config.json says.

  found: of config.json, `image_size` (None = it does not say) and maybe `tiles`.
  """
  image_size = found["image_size"]
  path, stated = _image_processor(folder)
  kind = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
  name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
  if name and name not in PROCESSORS:
    raise UserError(
      f"{path}: image_processor_type is {kind!r}, but only those of {', '.join(PROCESSORS)} are "
      "supported"
    )
  facts = {
    **(PROCESSORS[name] if name else family.PREPROCESSOR),
    **{key: value for key, value in stated.items() if value is not None},
  }
  if hasattr(family, "tiles"):
    stated, tiles = found.get("tiles", {}), family.tiles(facts)
    if any(tiles.get(key, value) != value for key, value in stated.items()):
      raise UserError(f"{path}: cuts pictures as {tiles}, but config.json has {stated}")
    cut = dict(tiles={**tiles, **stated})
    facts["do_pad"] = False  # all tiles are of one size
  else:
    cut = {}
  for key in ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_pan_and_scan"):
    if facts.get(key):
      raise UserError(f"{path}: {key} is {facts[key]!r}, which is not supported")
  if facts.get("do_center_crop") and facts.get("crop_size") is None:
    raise UserError(f"{path}: do_center_crop is true, but it states no crop_size")
  resample = facts["resample"]
  if resample not in FILTERS or not facts["do_resize"]:
    raise UserError(
      f"{path}: do_resize {facts['do_resize']} with resample {resample}, but only resizing by 1 "
      "(Lanczos), 2 (bilinear) or 3 (bicubic) is supported"
    )
  if not facts["do_rescale"] or abs(facts["rescale_factor"] * 255 - 1) > 1e-4:
    raise UserError(
      f"{path}: rescale_factor {facts['rescale_factor']} (do_rescale {facts['do_rescale']}), but "
      "pixels are divided by 255 here"
    )
  if name == "ConvNext":
    _convnext(facts)
  mean, std = (
    (facts["image_mean"], facts["image_std"]) if facts["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
  )
  common: dict[str, Any] = dict(
    **cut, interpolation=FILTERS[resample], mean=tuple(map(float, mean)), std=tuple(map(float, std))
  )
  if "max_num_patches" in family.PREPROCESSOR:
    return dict(
      resize="naflex",
      patch=square(facts["patch_size"], f"{path}: patch_size"),
      tokens=facts["max_num_patches"],
      **common,
    )
  size = facts["size"]
  if "merge_size" in family.PREPROCESSOR:
    return dict(resize="naflex", **_merged(facts, path, found["patches"]), **common)
  if isinstance(size, Mapping) and not (
    set(size) == {"shortest_edge"} or set(size) == {"height", "width"}
  ):
    raise UserError(
      f"{path}: size is {size}, but only a shortest_edge, or height and width, are supported"
    )
  # A size that is one number is of the shortest side, or of both.
  to_shortest = name in SHORTEST if name else facts["do_center_crop"]
  shortest = (
    size.get("shortest_edge") if isinstance(size, Mapping) else size if to_shortest else None
  )
  if shortest is None:
    resize, final, share = "squash", square(size, f"{path}: size"), 1.0
    if facts["do_center_crop"] and square(facts["crop_size"], f"{path}: crop_size") != final:
      raise UserError(
        f"{path}: resizes pictures to {size} and crops {facts['crop_size']} of them; a crop of "
        "squeezed pictures is not supported"
      )
  else:
    crop = square(facts["crop_size"], f"{path}: crop_size") if facts["do_center_crop"] else None
    if crop is None or crop > shortest:
      raise UserError(
        f"{path}: resizes the shortest side to {shortest} but crops {crop}; only a crop within "
        "that is supported"
      )
    resize, final, share = "shortest", crop, crop / shortest
  if image_size not in (None, final):
    raise UserError(
      f"{path}: prepares pictures of {final} pixels, but config.json has vision_config.image_size "
      f"{image_size}"
    )
  return dict(size=final, resize=resize, crop=share, **common)


def _merged(facts: Mapping[str, Any], path: Path, stated: tuple[int, int]) -> dict[str, int]:
  """Settings of data.image for patches that are merged; sizes are numbers of pixels. stated:
  (patch, merge) by config.json. Raises UserError: they are others, or sizes are no whole patches.
  """
  patch = square(facts["patch_size"], f"{path}: patch_size")
  size = facts["size"]
  least = facts.get("min_pixels") or size["shortest_edge"]
  most = facts.get("max_pixels") or size["longest_edge"]
  if least % patch**2 or most % patch**2:
    raise UserError(
      f"{path}: pictures of {least} to {most} pixels, which are no whole patches of {patch} x "
      f"{patch}. Round them"
    )
  least, most = least // patch**2, most // patch**2
  if (patch, facts["merge_size"]) != stated:
    raise UserError(
      f"{path}: patch_size {patch} and merge_size {facts['merge_size']}, but vision_config has "
      f"{stated[0]} and {stated[1]}"
    )
  return dict(patch=patch, merge=stated[1], least=least, tokens=most)


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
  """(file, what it says of the image processor): of processor_config.json before
  preprocessor_config.json, as transformers reads them. Raises UserError: there is neither.
  """
  nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
  if nested.exists() and isinstance(found := read_json(nested).get("image_processor"), dict):
    return nested, found
  if not own.exists():
    raise UserError(
      f"{folder}: no preprocessor_config.json, so how pictures were prepared is unknown. Copy it "
      "too"
    )
  return own, read_json(own)


def _convnext(facts: dict[str, Any]) -> None:
  """Puts what a ConvNextImageProcessor does in terms of resizing and cropping: a crop of
  `crop_pct`, from 384 pixels on none.
  """
  size = facts["size"]
  edge = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
  if edge < 384:
    facts.update(
      size={"shortest_edge": int(edge / facts.get("crop_pct", 224 / 256))},
      do_center_crop=True,
      crop_size=edge,
    )
  else:
    facts.update(size={"height": edge, "width": edge}, do_center_crop=False)


def image_facts(config: Mapping[str, Any], family: ModuleType) -> dict[str, Any]:
  """The preprocessor_config.json of a config. Raises UserError: transformers cannot prepare
  pictures this way.
  """
  image = config["data"]["image"]
  if image["resize"] == "longest":
    raise UserError(
      "data.image.resize 'longest' cannot be expressed in transformers' preprocessor_config.json"
    )
  size = image["size"]
  sides = {"height": size, "width": size}
  pixels = image["patch"] ** 2
  how = (
    dict(
      patch_size=image["patch"],
      merge_size=image["merge"],
      size=dict(shortest_edge=image["least"] * pixels, longest_edge=image["tokens"] * pixels),
    )
    if image["merge"] > 1
    else dict(patch_size=image["patch"], max_num_patches=image["tokens"])
    if image["resize"] == "naflex"
    else dict(
      size={"shortest_edge": round(size / image["crop"])}, do_center_crop=True, crop_size=sides
    )
    if image["resize"] == "shortest"
    else dict(size=sides, do_center_crop=False)
  )
  resample = {name: number for number, name in FILTERS.items()}[image["interpolation"]]
  whole = dict(processor_class=family.PROCESSOR_CLASS) if family.PROCESSOR_CLASS else {}
  more = family.image_processor(config) if hasattr(family, "image_processor") else {}
  return dict(
    image_processor_type=family.IMAGE_PROCESSOR_CLASS,
    **whole,
    do_resize=True,
    resample=resample,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(image["mean"]),
    image_std=list(image["std"]),
    do_convert_rgb=True,
    **{**how, **more},
  )


def beside(folder: Path, names: Sequence[str]) -> dict[str, Any]:
  """{name: content} of JSON files that stand beside config.json, those that there are. What a
  processor_config.json holds of a feature extractor counts as preprocessor_config.json. Raises
  UserError: a file is damaged."""
  found = {name: read_json(folder / name) for name in names if (folder / name).exists()}
  if (
    "preprocessor_config.json" not in found
    and "preprocessor_config.json" in names
    and (folder / "processor_config.json").exists()
  ):
    found["preprocessor_config.json"] = (
      read_json(folder / "processor_config.json").get("feature_extractor") or {}
    )
  return found


def has_tokenizer(folder: Path) -> bool:
  return any((folder / name).exists() for name in ("tokenizer.json", SENTENCEPIECE))


def text_settings(folder: Path, family: ModuleType) -> tuple[dict[str, Any], dict[str, bytes]]:
  """(settings of data.text, the tokenizer's files as assets). Raises UserError: there is no
  tokenizer.
  """
  assets = {
    name: read_bytes(folder / name, LARGEST) for name in TOKENIZER_FILES if (folder / name).exists()
  }
  config = folder / "tokenizer_config.json"
  facts = read_json(config) if config.exists() else {}
  if not has_tokenizer(folder) and (vocabulary := folder / wordpiece.VOCABULARY).exists():
    assets["tokenizer.json"] = wordpiece.tokenizer_json(
      {**assets, wordpiece.VOCABULARY: read_bytes(vocabulary, LARGEST)}
    )
  stated = facts.get("pad_token") or family.PAD
  pad = str(stated.get("content") if isinstance(stated, dict) else stated)
  if "tokenizer.json" in assets:
    import tokenizers

    _check_tokenizer(folder / "tokenizer.json", assets)
    whole = tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode())
    whole.no_padding()
    whole.no_truncation()
    bare, framed = (whole.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = framed.index(bare[0]) if bare else 0
    settings = dict(
      bos=start > 0,
      eos=len(framed) > start + len(bare),
      pad_id=_number(whole.token_to_id(pad)),
      lowercase=getattr(family, "LOWERCASES", False),
    )
    if facts.get("padding_side", getattr(family, "PADDING_SIDE", "right")) != "right" and hasattr(
      family, "PADDING_SIDE"
    ):
      raise UserError(
        f"{folder / 'tokenizer_config.json'}: pads texts on the left (padding_side), but the last "
        "position is what this model compares, and texts are padded on the right here. Set it to "
        "'right' if the model was trained so"
      )
  elif (folder / SENTENCEPIECE).exists():
    import sentencepiece

    assets = {"tokenizer.model": read_bytes(folder / SENTENCEPIECE, LARGEST), **assets}
    _check_tokenizer(folder / SENTENCEPIECE, assets)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=assets["tokenizer.model"])
    known = pieces.id_to_piece(pieces.piece_to_id(pad)) == pad
    # The rest is what SiglipTokenizer does in Python.
    settings = dict(
      bos=False,
      eos=True,
      pad_id=pieces.piece_to_id(pad) if known else -1,
      punctuation=False,
      lowercase=bool(facts.get("do_lower_case", True)),
    )
  else:
    raise UserError(
      f"{folder}: no tokenizer.json, no {wordpiece.VOCABULARY} of BERT and no {SENTENCEPIECE}. "
      "Copy the tokenizer's files too"
    )
  inputs = facts.get("model_input_names")
  settings.update(
    mask_padding=family.MASK_PADDING if inputs is None else "attention_mask" in inputs
  )
  return settings, assets


def _check_tokenizer(path: Path, assets: Mapping[str, bytes]) -> None:
  try:
    Tokenizer.from_assets(assets)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def longest_text(assets: Mapping[str, bytes]) -> int:
  """The most tokens that transformers cuts texts to, by tokenizer_config.json; 0 = it does not
  say.
  """
  limit = json.loads(assets.get("tokenizer_config.json", b"{}")).get("model_max_length")
  # Larger numbers stand for "no limit".
  return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else 0


def cuts_the_start(assets: Mapping[str, bytes]) -> bool:
  """Whether transformers cuts a long text at its start, and keeps its end."""
  stated = json.loads(assets.get("tokenizer_config.json", b"{}")).get("truncation_side")
  usual = json.loads(assets.get("tokenizer.json", b"{}")).get("truncation") or {}
  return str(stated or usual.get("direction")).lower() == "left"


def _number(piece: int | None) -> int:
  return -1 if piece is None else piece


def tokenizer_files(
  config: Mapping[str, Any],
  assets: Mapping[str, bytes],
  family: ModuleType,
  lowercases: bool = False,
) -> dict[str, bytes]:
  """The tokenizer's files for transformers. lowercases: another file says whether texts are
  lower-cased before it.
  Raises UserError: there is no tokenizer that it reads."""
  files = {name: assets[name] for name in TOKENIZER_FILES if name in assets}
  facts: dict[str, Any] = {}
  text = config["data"]["text"]
  if "tokenizer.json" not in files and own_tokenizer.is_own(assets.get("tokenizer.model", b"")):
    end = own_tokenizer.moved_end(config, assets)
    files = own_tokenizer.files(assets["tokenizer.model"], text, end)
    facts = dict(processor_class=family.PROCESSOR_CLASS) if family.PROCESSOR_CLASS else {}
    _check_lowercases(family, text)
  elif "tokenizer.json" not in files:
    if (
      "tokenizer.model" not in assets
      or family.TOKENIZER_CLASS != "SiglipTokenizer"
      or text["punctuation"]
      or text["bos"]
    ):
      raise UserError(
        f"transformers has no tokenizer for this model: {family.TOKENIZER_CLASS} reads a "
        "tokenizer.json, or (SigLIP alone) a sentencepiece model with "
        "data.text.punctuation=false and bos=false; of tokenizers of `mmjax data tokenizer` it "
        "gets one. Export to safetensors or stablehlo"
      )
    facts = dict(do_lower_case=text["lowercase"])
    files[SENTENCEPIECE] = assets["tokenizer.model"]
  elif getattr(family, "LOWERCASES", False):
    _check_lowercases(family, text)
    facts = dict(padding_side="right")
  elif (text["lowercase"] and not lowercases) or not text["punctuation"]:
    raise UserError(
      "transformers cannot lower-case or strip punctuation before a tokenizer.json; put it into "
      "the file's normalizer"
    )
  inputs = ["input_ids"] + (["attention_mask"] if text["mask_padding"] else [])
  facts = {
    "tokenizer_class": family.TOKENIZER_CLASS,
    **json.loads(files.get("tokenizer_config.json", b"{}")),
    **facts,
    "model_max_length": config["data"]["sequence"]["length"] or text["length"],
    "model_input_names": inputs,
  }
  return {**files, "tokenizer_config.json": json.dumps(facts, indent=2).encode()}


def _check_lowercases(family: ModuleType, text: Mapping[str, Any]) -> None:
  """Raises UserError: the family lower-cases texts and keeps punctuation, data.text does not."""
  if getattr(family, "LOWERCASES", False) and not (text["lowercase"] and text["punctuation"]):
    raise UserError(
      f"{family.TOKENIZER_CLASS} lower-cases texts and keeps punctuation: set "
      "data.text.lowercase and punctuation to True"
    )
