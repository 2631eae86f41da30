"""`mmjax export`: a checkpoint as files for other programs: Hugging Face, plain safetensors, StableHLO.

StableHLO: encode_image.stablehlo and encode_text.stablehlo are functions of (parameters, batch) with a free batch
size, for CPU, CUDA and TPU, with normalisation and projection inside. They, params.npz, the tokenizer and meta.json
need jax, flatbuffers and NumPy, but not mmjax:

  import json, jax, numpy as np
  from jax import export
  params = dict(np.load("exported/params.npz"))
  meta = json.load(open("exported/meta.json"))
  load = lambda name: jax.jit(export.deserialize(open(f"exported/{name}.stablehlo", "rb").read()).call)
  encode_image, encode_text = load("encode_image"), load("encode_text")
  pixels = np.zeros((3, *meta["image"]["shape"]), np.uint8)         # resized as meta["image"] says
  tokens = np.zeros((3, meta["text"]["length"]), np.int32)          # by the tokenizer beside it
  pictures, texts = encode_image(params, pixels), encode_text(params, tokens, tokens > 0)
  logits = meta["scale"] * pictures @ texts.T + meta["bias"]
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import __version__
from mmjax.config import UserError
from mmjax.inference.predictor import Predictor
from mmjax.models import make_model
from mmjax.parallel.mesh import single_device_mesh

FORMATS = ("hf", "safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")


def export(checkpoint: str | os.PathLike, to: str, out: str | os.PathLike) -> Path:
  """Writes the checkpoint (run, step or import folder) as `to` ("hf", "safetensors" or "stablehlo") into the new
  folder `out`.

  The parameters are the moving average where the run kept one. Raises UserError: unknown format, no checkpoint, `out`
  is not empty or cannot be written; nothing is left half-written.
  """
  if to not in FORMATS:
    raise UserError(f"cannot export to {to!r}; there are: {', '.join(FORMATS)}")
  check_free(Path(out))
  if to == "hf":
    from mmjax.interop import huggingface

    return Path(huggingface.export_hf(checkpoint, out) or out)
  predictor = Predictor.load(checkpoint, mesh=single_device_mesh())
  with new_folder(Path(out)) as folder:
    (write_safetensors if to == "safetensors" else write_stablehlo)(predictor, folder)
  return Path(out)


def write_safetensors(predictor: Predictor, folder: Path) -> None:
  """model.safetensors (parameters under their names, "image/layers/..."), config.json, preprocessing.json and the
  tokenizer's files.
  """
  from safetensors.numpy import save_file

  save_file(
    {name: np.ascontiguousarray(x) for name, x in flat_params({**predictor.params, **predictor.model_state}).items()},
    folder / "model.safetensors",
    metadata={"format": "mmjax", "version": __version__},
  )
  (folder / "config.json").write_text(json.dumps(predictor.config.to_dict(), indent=2))
  (folder / "preprocessing.json").write_text(json.dumps(preprocessing(predictor), indent=2))
  _write_assets(predictor, folder)


def write_stablehlo(predictor: Predictor, folder: Path) -> None:
  """encode_image.stablehlo, encode_text.stablehlo (those that the model has), params.npz, meta.json and the
  tokenizer's files.
  """
  params = flat_params(predictor.params)
  params.update(flat_params(predictor.model_state))  # batch statistics, under "batch_stats/..."
  for name, exported in exported_encoders(predictor.config, params, collections=tuple(predictor.model_state)).items():
    (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
  np.savez(folder / "params.npz", **params)
  (folder / "meta.json").write_text(json.dumps(preprocessing(predictor), indent=2))
  _write_assets(predictor, folder)


def exported_encoders(
  config, params: dict[str, Any], platforms: tuple[str, ...] = PLATFORMS, collections: tuple[str, ...] = ()
) -> dict[str, jax.export.Exported]:
  """{"encode_image": (params, pixels uint8 [b, H, W, 3]) -> float32 [b, D],
  "encode_text": (params, tokens int32 [b, L], mask bool [b, L]) -> float32 [b, D]} with a symbolic b.

  params: {name: array}; only shapes and dtypes are used. collections: top-level names in it that are model state.
  """
  from jax import export as jax_export

  model = make_model(_portable(config))
  weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
  size, length = config.data.image.size, config.data.text.length
  arguments = dict(image=(((size, size, 3), jnp.uint8),), text=(((length,), jnp.int32), ((length,), jnp.bool_)))
  inputs = dict(image=("pixels",), text=("tokens", "mask"))

  def encoder(modality: str):
    def encode(weights, *arrays):
      tree = flax.traverse_util.unflatten_dict(weights, sep="/")
      batch = {modality: dict(zip(inputs[modality], arrays, strict=True))}
      state = {name: tree.pop(name) for name in collections}
      return model.apply({"params": tree, **state}, modality, batch, method="embedding").astype(jnp.float32)

    encode.__name__ = f"encode_{modality}"
    (batch,) = jax_export.symbolic_shape("b")
    specs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in arguments[modality]]
    return jax_export.export(jax.jit(encode), platforms=platforms)(weights, *specs)

  return {
    f"encode_{modality}": encoder(modality) for modality in ("image", "text") if modality in config.model.encoders
  }


def preprocessing(predictor: Predictor) -> dict[str, Any]:
  """What a caller must do to pictures and texts, and how to read the embeddings; JSON-able."""
  c = predictor.config
  facts: dict[str, Any] = dict(
    mmjax=__version__,
    jax=jax.__version__,
    platforms=list(PLATFORMS),
    width=predictor.width,
    scale=predictor.scale,
    bias=predictor.bias,
  )
  if "image" in c.model.encoders:
    image = c.data.image
    facts["image"] = dict(
      shape=[image.size, image.size, 3],
      dtype="uint8",
      resize=image.resize,
      crop=image.crop,
      interpolation=image.interpolation,
      antialias=True,
      mean=list(image.mean),
      std=list(image.std),
      normalised_inside=True,
    )
  if "text" in c.model.encoders:
    text, transform = c.data.text, predictor.text_transform
    facts["text"] = dict(
      length=text.length,
      start=list(transform.start),
      end=list(transform.end),
      pad_id=transform.pad_id,
      lowercase=text.lowercase, punctuation=text.punctuation,
      mask_padding=text.mask_padding,
      tokenizer=sorted(transform.tokenizer.to_assets()),
    )
  return facts


def flat_params(params: Any) -> dict[str, np.ndarray]:
  """{"image/layers/attention/qkv/kernel": array} on the host."""
  return {name: np.asarray(x) for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


def check_free(out: Path) -> None:
  """Raises UserError unless `out` can become a new folder: absent or empty, in a folder that can be written."""
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out}: exists and is not empty. Choose another folder, or delete it")
  parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise UserError(f"{out}: {parent} cannot be written. Choose another folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A folder to write into that becomes `out` when the block ends well, and vanishes when it does not."""
  check_free(out)
  out = out.absolute()
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    temporary.mkdir(parents=True)
    yield temporary
    if out.exists():
      out.rmdir()
    temporary.rename(out)
  except OSError as error:
    raise UserError(
      f"{out}: cannot be written ({error.strerror or error}). Free space or choose another folder"
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _portable(config):
  """The config with kernels that every platform can run, whatever machine exports."""
  tree = config.to_dict()
  for entry in tree["model"]["encoders"].values():
    if "kernel" in entry:
      entry["kernel"] = "xla"
  return type(config)(tree)


def _write_assets(predictor: Predictor, folder: Path) -> None:
  for name, content in predictor.assets.items():
    (folder / Path(name).name).write_bytes(content)
