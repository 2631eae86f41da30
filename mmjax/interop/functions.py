"""What a model does for its users, as functions of arrays: what `mmjax export --to stablehlo`
compiles, one file each.

  encode_MODALITY   embeddings in the shared space                        Predictor.encode
  classes           probabilities of the model's own classifier           Predictor.classes
  generate          the likeliest text about other media, token by token  Predictor.generate
  draw              pictures from texts and noise                         (text_to_image_gan)

Where a model classifies or writes from several sets of modalities, the names say which:
classes_text_image, write_audio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.data.modality_readers import READERS
from mmjax.inference.engine import can_generate, generate_text
from mmjax.inference.predictor import probabilities
from mmjax.models import make_model, with_plain_kernels

Array = jax.Array
Spec = dict[str, tuple[tuple[int, ...], Any]]


class Function(NamedTuple):
  """`run(variables, batch)` of arrays named as in a batch. inputs: {"image.pixels": (shape of one
  example, dtype)}. gives: what comes out."""

  inputs: Spec
  run: Callable[[Any, Mapping[str, Any]], Array]
  gives: str


def functions(config) -> dict[str, Function]:
  """{name: function} of a resolved config's model, whose kernels run on every platform. Raises
  UserError: it does nothing of these.
  """
  config = with_plain_kernels(config)
  model, found = make_model(config), {}
  if getattr(model, "joint", True):
    for modality in model.encoders:
      found[f"encode_{modality}"] = Function(
        inputs(config, (modality,)), _embeds(model, modality), "embeddings of length one"
      )

  def kinds(key, *names):
    return tuple(
      dict.fromkeys(
        tuple(e[key]) for e in config.objectives.values() if e.get("kind") in names and e[key]
      )
    )

  if getattr(model, "classes", 0):
    together = getattr(model, "fusion", None) is not None
    sets = kinds("modalities", "classification") or (
      (tuple(model.encoders),) if together else tuple((m,) for m in model.encoders)
    )
    for name, chosen in _named("classes", sets):
      found[name] = Function(
        inputs(config, chosen),
        _classifies(model, chosen, probabilities(config)),
        "probabilities of the classes",
      )
  if can_generate(model):
    sets = kinds("source", "captioning", "autoregressive") or tuple(
      (m,) for m in model.encoders if m != "text"
    )
    for name, chosen in _named("generate", sets):
      found[name] = Function(
        inputs(config, chosen),
        _writes(model, chosen, config.data.text.length),
        "tokens, up to and with eos_id, then pad_id",
      )
  if hasattr(model, "draw"):
    noise = {"noise": ((model.noise,), np.float32)}
    found["draw"] = Function(
      {**inputs(config, ("text",)), **noise}, _draws(model), "pictures, from standard normal noise"
    )
  if not found:
    raise UserError(
      "this model has no shared space, classifier or decoder, so there is nothing to export as a "
      "function. Export to safetensors"
    )
  return found


def lower(
  function: Function,
  name: str,
  params: Mapping[str, Any],
  platforms: tuple[str, ...],
  collections: tuple[str, ...] = (),
) -> jax.export.Exported:
  """`function` as (params, *arrays in the order of its inputs) -> array, with a symbolic batch size
  b.

  params: {name: array}; only shapes and dtypes are used. collections: top-level names in it that
  are model state.
  """
  from jax import export as jax_export

  def call(weights: dict, *arrays: Array) -> Array:
    tree = flax.traverse_util.unflatten_dict(weights, sep="/")
    state = {collection: tree.pop(collection) for collection in collections}
    batch = flax.traverse_util.unflatten_dict(
      dict(zip(function.inputs, arrays, strict=True)), sep="."
    )
    return function.run({"params": tree, **state}, batch)

  call.__name__ = name
  (b,) = jax_export.symbolic_shape("b")
  arrays = [jax.ShapeDtypeStruct((b, *shape), dtype) for shape, dtype in function.inputs.values()]
  weights = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in params.items()}
  return jax_export.export(jax.jit(call), platforms=platforms)(weights, *arrays)


def inputs(config, modalities: Iterable[str]) -> Spec:
  """{"audio.waveform": (shape of one example, dtype), ...} of the arrays that encoders read, in the
  order of the modalities.
  """
  spec: Spec = {}
  for modality in modalities:
    if modality == "text":
      length = (config.data.text.length,)
      arrays: Spec = {"tokens": (length, np.int32), "mask": (length, np.bool_)}
    else:
      arrays = READERS[modality](config.data, False).shapes
    spec.update({f"{modality}.{name}": array for name, array in arrays.items() if name != "key"})
  return spec


def _embeds(model: nn.Module, modality: str):
  def run(variables: Any, batch: Mapping[str, Any]) -> Array:
    vectors: Any = model.apply(variables, modality, batch, method="embedding")
    return vectors.astype(jnp.float32)

  return run


def _classifies(model: nn.Module, modalities: tuple[str, ...], kind: str):
  def run(variables: Any, batch: Mapping[str, Any]) -> Array:
    outputs: Any = model.apply(variables, modalities, batch, method="classify")
    logits = outputs.astype(jnp.float32)
    if kind == "softmax":
      return jax.nn.softmax(logits)
    return jax.nn.sigmoid(logits) if kind == "sigmoid" else logits

  return run


def _writes(model: nn.Module, source: tuple[str, ...], length: int):
  return lambda variables, batch: generate_text(model, variables, source, length, 1, 1.0, batch)


def _draws(model: nn.Module):
  def run(variables: Any, batch: Mapping[str, Any]) -> Array:
    text = model.apply(variables, batch, method="condition")
    pictures: Any = model.apply(variables, text, batch["noise"], method="draw")
    return jnp.round((pictures + 1) * 127.5).astype(jnp.uint8)

  return run


def _named(name: str, sets: tuple[tuple[str, ...], ...]) -> list[tuple[str, tuple[str, ...]]]:
  return [(name if len(sets) == 1 else "_".join((name, *chosen)), chosen) for chosen in sets]
