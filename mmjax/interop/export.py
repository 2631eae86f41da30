"""`mmjax export`: a checkpoint as files for other programs: Hugging Face, plain safetensors,
StableHLO.

StableHLO: encode_image.stablehlo, encode_text.stablehlo, classes.stablehlo, write.stablehlo, ...
(functions.py) are functions of (parameters, arrays) with a free batch size, for CPU, CUDA and TPU,
with normalisation, log-mel and projection inside. meta.json has, for each of its `functions`,
inputs and output, and how media and texts are prepared. They, params.npz, the tokenizer and
meta.json need jax, flatbuffers and NumPy, but not mmjax:

  import json, jax, numpy as np
  from jax import export
  params = dict(np.load("exported/params.npz"))
  meta = json.load(open("exported/meta.json"))
  program = lambda name: export.deserialize(open(f"exported/{name}.stablehlo", "rb").read())
  load = lambda name: jax.jit(program(name).call)
  encode_image, encode_text = load("encode_image"), load("encode_text")
  pixels = np.zeros((3, *meta["image"]["shape"]), np.uint8)         # resized as meta["image"] says
  tokens = np.zeros((3, meta["text"]["length"]), np.int32)          # by the tokenizer beside it
  pictures, texts = encode_image(params, pixels), encode_text(params, tokens, tokens > 0)
  logits = meta["scale"] * pictures @ texts.T + meta["bias"]
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from mmjax import __version__
from mmjax.config import UserError
from mmjax.inference.predictor import Predictor
from mmjax.interop import exported
from mmjax.interop.functions import functions, lower
from mmjax.ownership import check_free, new_folder
from mmjax.parallel.mesh import single_device_mesh

FORMATS = ("hf", "safetensors", "stablehlo", "peft")
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
  checkpoint: str | os.PathLike, to: str, out: str | os.PathLike, allow_code: Sequence[str] = ()
) -> Path:
  """Writes the checkpoint (run, step or import folder) as `to` ("hf", "safetensors", "stablehlo",
  or "peft": its adapter alone) into the new folder `out`.

  The parameters are the moving average where the run kept one, and an adapter is merged into them.
  allow_code: as of `mmjax.load`.
  Raises UserError: unknown format, no checkpoint, `out` is not empty or cannot be written; nothing
  is left half-written.
  """
  if to not in FORMATS:
    raise UserError(f"cannot export to {to!r}; there are: {', '.join(FORMATS)}")
  check_free(out)
  if to == "hf":
    from mmjax.interop import huggingface

    return Path(huggingface.export_hf(checkpoint, out, allow_code) or out)
  if to == "peft":
    from mmjax.interop import huggingface

    return huggingface.export_adapter(checkpoint, out, allow_code)
  mesh = single_device_mesh()
  predictor = Predictor.load(checkpoint, mesh=mesh, allow_code=allow_code, merged=True)
  with new_folder(Path(out)) as folder:
    (write_safetensors if to == "safetensors" else write_stablehlo)(predictor, folder)
  return Path(out)


def write_safetensors(predictor: Predictor, folder: Path) -> None:
  """model.safetensors (parameters under their names, "image/layers/..."), config.json,
  preprocessing.json and the tokenizer's files: what `mmjax.load` reads, and others can.
  """
  from safetensors.numpy import save_file

  save_file(
    {
      name: np.array(x, order="C")  # which keeps scalars scalars
      for name, x in flat_params({**predictor.params, **predictor.model_state}).items()
    },
    folder / "model.safetensors",
    metadata={"format": "mmjax"},  # of several, safetensors writes the order at random
  )
  (folder / "config.json").write_text(json.dumps(predictor.config.to_dict(), indent=2))
  facts = dict(preprocessing(predictor), files=sorted(Path(name).name for name in predictor.assets))
  (folder / exported.FACTS).write_text(json.dumps(facts, indent=2))
  _write_assets(predictor, folder)


def write_stablehlo(predictor: Predictor, folder: Path) -> None:
  """NAME.stablehlo of everything that the model does (functions.py), params.npz, meta.json and the
  tokenizer's files.
  """
  params = flat_params(predictor.params)
  params.update(flat_params(predictor.model_state))  # batch statistics, under "batch_stats/..."
  facts = preprocessing(predictor)
  facts["functions"] = {}
  for name, function in functions(predictor.config).items():
    lowered = lower(function, name, params, PLATFORMS, tuple(predictor.model_state))
    (folder / f"{name}.stablehlo").write_bytes(lowered.serialize())

    def array(shape, dtype):
      return dict(shape=["b", *shape], dtype=np.dtype(dtype).name)

    (out,) = lowered.out_avals
    facts["functions"][name] = dict(
      inputs=[dict(name=key, **array(*spec)) for key, spec in function.inputs.items()],
      output=dict(array(out.shape[1:], out.dtype), gives=function.gives),
    )
  arrays: dict[str, Any] = params
  np.savez(folder / "params.npz", **arrays)
  (folder / "meta.json").write_text(json.dumps(facts, indent=2))
  _write_assets(predictor, folder)


def preprocessing(predictor: Predictor) -> dict[str, Any]:
  """What a caller must do to media and texts, and how to read what comes out; JSON-able."""
  c = predictor.config
  facts: dict[str, Any] = dict(
    mmjax=__version__,
    jax=jax.__version__,
    platforms=list(PLATFORMS),
    width=predictor.width,
    scale=predictor.scale,
    bias=predictor.bias,
  )
  facts.update({modality: _MEDIA[modality](c.data[modality]) for modality in predictor.media})
  if (transform := predictor.text_transform) is not None:
    text = c.data.text
    facts["text"] = dict(
      length=text.length,
      start=list(transform.start),
      end=list(transform.end),
      pad_id=transform.pad_id,
      lowercase=text.lowercase,
      punctuation=text.punctuation,
      mask_padding=text.mask_padding,
      tokenizer=sorted(transform.tokenizer.to_assets()),
    )
  if predictor.writes:
    language = predictor.language is not None
    decoder = c.model if language else c.model.get("decoder")
    ends = (
      dict(eos_id=decoder.eos_id, pad_id=decoder.pad_id)
      if decoder
      else dict(eos_id=-1, pad_id=c.model.blank)
    )
    facts["written"] = dict(
      length=c.data.sequence.length if language else c.data.text.length,
      **ends,
      tokenizer=sorted(
        name for name in predictor.assets if name.startswith(("tokenizer.", "vocab."))
      ),
    )
  if predictor.class_names:
    facts["class_names"] = list(predictor.class_names)
  return facts


def _image_facts(image) -> dict[str, Any]:
  common = dict(
    dtype="uint8",
    resize=image.resize,
    interpolation=image.interpolation,
    antialias=True,
    mean=list(image.mean),
    std=list(image.std),
    normalised_inside=True,
  )
  if image.resize == "naflex":
    return dict(
      common,
      patch=image.patch,
      tokens=image.tokens,
      order="patches row by row; in each rows, columns, channels",
      positions="(row, column) of each patch",
      grid="(rows, columns) of patches",
      padding="zeros, mask false",
    )
  return dict(shape=[image.size, image.size, 3], crop=image.crop, **common)


_MEDIA = {
  "image": _image_facts,
  "audio": lambda audio: dict(
    rate=audio.rate,
    samples=round(audio.rate * audio.seconds),
    dtype="int16",
    channels="mean",
    scale=32768,
    padding="zeros from `length` on",
    features_inside=True,
  ),
  "video": lambda video: dict(
    size=video.size,
    frames=video.frames,
    dtype="uint8",
    resize="shortest",
    interpolation="bicubic",
    antialias=True,
    sampling="the middle frame of each equal part; all of a shorter clip",
    padding="zeros, mask false",
    normalised_inside=True,
  ),
  "series": lambda series: dict(
    length=series.length,
    channels=series.channels,
    mean=list(series.mean),
    std=list(series.std),
    dtype="float32",
    padding="zeros, mask false",
  ),
}


def flat_params(params: Any) -> dict[str, np.ndarray]:
  """{"image/layers/attention/qkv/kernel": array} on the host."""
  return {
    name: np.asarray(x) for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()
  }


def _write_assets(predictor: Predictor, folder: Path) -> None:
  for name, content in predictor.assets.items():
    (folder / Path(name).name).write_bytes(content)
