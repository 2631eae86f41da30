"""Weights by table: which of our parameters is made of which tensors of a Hugging Face file, and
how, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError

Array = np.ndarray
IGNORED = (  # constants and copies that files carry beside the weights
  "position_ids",
  "embeddings.token_type_ids",
  "num_batches_tracked",
  "relative_position_index",
  "cls.predictions.decoder.weight",
  "cls.predictions.decoder.bias",
  "model.encoder.embed_positions.weight",
  "audio_tower.embed_positions.weight",
  "proj_out.weight",
  "lm_head.decoder.weight",
  "lm_head.decoder.bias",
  "vocab_projector.weight",
  "embeddings.mask_token",
  "masked_spec_embed",
  ".attn.bias",
  ".attn.masked_bias",
  "rotary_emb.inv_freq",
)


STATISTICS = "batch_stats"  # the collection that holds what batch norms keep
COPIES = {  # tensors that are left out -> those that they are copies of in a tied model
  "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
  "cls.predictions.decoder.bias": "cls.predictions.bias",
  "proj_out.weight": "model.decoder.embed_tokens.weight",
}


class Rule(NamedTuple):
  """`ours` ("text/layers/mlp/up/kernel") is made of the tensors `theirs`; names with {i} are
  stacked over `layers`.
  """

  ours: str
  theirs: tuple[str, ...]
  into: Callable[[Sequence[Array]], Array]
  back: Callable[[Array], Sequence[Array]]
  layers: int = 0


def same(ours: str, theirs: str, layers: int = 0, shape: tuple[int, ...] | None = None) -> Rule:
  """The tensor as it is, or with `shape` there for a vector here."""
  return Rule(
    ours,
    (theirs,),
    lambda t: t[0] if shape is None else t[0].reshape(-1),
    lambda p: [p if shape is None else p.reshape(shape)],
    layers,
  )


def row(ours: str, theirs: str) -> Rule:
  """The tensor with an axis of one before the others there."""
  return Rule(ours, (theirs,), lambda t: t[0][0], lambda p: [p[None]])


def scalar(ours: str, theirs: str, shape: tuple[int, ...]) -> Rule:
  return Rule(ours, (theirs,), lambda t: t[0].reshape(()), lambda p: [p.reshape(shape)])


def under(prefix: str, rules: Sequence[Rule]) -> list[Rule]:
  """The rules for a file whose names begin with `prefix`."""
  return [rule._replace(theirs=tuple(prefix + name for name in rule.theirs)) for rule in rules]


def batch_norm(ours: str, theirs: str) -> list[Rule]:
  """A batch normalisation, with its running statistics."""
  return [
    *norm(ours, theirs),
    same(f"{STATISTICS}/{ours}/mean", f"{theirs}.running_mean"),
    same(f"{STATISTICS}/{ours}/variance", f"{theirs}.running_var"),
  ]


def two_layers(ours: str, theirs: str) -> list[Rule]:
  """A projection of two linear layers, as CLAP has."""
  return [
    *linear(f"{ours}/hidden", f"{theirs}.linear1"),
    *linear(f"{ours}/out", f"{theirs}.linear2"),
  ]


def linear(ours: str, theirs: str, layers: int = 0, bias: bool = True) -> list[Rule]:
  """A dense layer: kernel [in, out] here, weight [out, in] there."""
  rules = [Rule(f"{ours}/kernel", (f"{theirs}.weight",), lambda t: t[0].T, lambda p: [p.T], layers)]
  return rules + ([same(f"{ours}/bias", f"{theirs}.bias", layers)] if bias else [])


def norm(ours: str, theirs: str, layers: int = 0) -> list[Rule]:
  return [
    same(f"{ours}/scale", f"{theirs}.weight", layers),
    same(f"{ours}/bias", f"{theirs}.bias", layers),
  ]


def patches(ours: str, theirs: str, patch: int) -> Rule:
  """A patch embedding: kernel [p * p * 3, D] here, a convolution [D, 3, p, p] there."""
  return Rule(
    ours,
    (theirs,),
    lambda t: t[0].transpose(2, 3, 1, 0).reshape(-1, t[0].shape[0]),
    lambda p: [p.reshape(patch, patch, -1, p.shape[-1]).transpose(3, 2, 0, 1)],
  )


def patches_of_frames(ours: str, theirs: str, frames: int, patch: int) -> Rule:
  """A patch embedding of several pictures: kernel [frames * p * p * 3, D] here, a convolution
  [D, 3, frames, p, p] there.
  """
  return Rule(
    ours,
    (theirs,),
    lambda t: t[0].transpose(2, 3, 4, 1, 0).reshape(-1, t[0].shape[0]),
    lambda p: [p.reshape(frames, patch, patch, 3, -1).transpose(4, 3, 0, 1, 2)],
  )


def attention_output(ours: str, theirs: str, heads: int, layers: int = 0) -> list[Rule]:
  """kernel [heads, kv, D] here, weight [D, heads * kv] there."""
  return [
    Rule(
      f"{ours}/kernel",
      (f"{theirs}.weight",),
      lambda t: t[0].T.reshape(heads, -1, t[0].shape[0]),
      lambda p: [p.reshape(-1, p.shape[-1]).T],
      layers,
    ),
    same(f"{ours}/bias", f"{theirs}.bias", layers),
  ]


def convolution(ours: str, theirs: str) -> Rule:
  """A convolution: kernel [H, W, in, out] here, weight [out, in, H, W] there."""
  return Rule(
    ours, (theirs,), lambda t: t[0].transpose(2, 3, 1, 0), lambda p: [p.transpose(3, 2, 0, 1)]
  )


def time_convolution(ours: str, theirs: str) -> Rule:
  """A convolution over time: kernel [size, in, out] here, weight [out, in, size] there."""
  return Rule(ours, (theirs,), lambda t: t[0].transpose(2, 1, 0), lambda p: [p.transpose(2, 1, 0)])


def self_attention(
  ours: str, projections: Sequence[str], out: str, heads: int, layers: int = 0
) -> list[Rule]:
  """An attention whose query, key and value are dense layers of their own there, named by
  `projections`.
  """
  return [
    Rule(
      f"{ours}/qkv/kernel",
      tuple(f"{p}.weight" for p in projections),
      lambda t: np.stack([w.T.reshape(w.shape[1], heads, -1) for w in t], axis=1),
      lambda p: [p[:, i].reshape(p.shape[0], -1).T for i in range(3)],
      layers,
    ),
    Rule(
      f"{ours}/qkv/bias",
      tuple(f"{p}.bias" for p in projections),
      lambda t: np.stack([b.reshape(heads, -1) for b in t]),
      lambda p: [p[i].reshape(-1) for i in range(3)],
      layers,
    ),
    *attention_output(f"{ours}/out", out, heads, layers),
  ]


def blocks(ours: str, theirs: str, heads: int, layers: int) -> list[Rule]:
  """The blocks of a CLIP or SigLIP tower: `theirs` is up to "encoder.layers"."""
  at = f"{theirs}.{{i}}"
  return [
    *self_attention(
      f"{ours}/attention",
      [f"{at}.self_attn.{x}_proj" for x in "qkv"],
      f"{at}.self_attn.out_proj",
      heads,
      layers,
    ),
    *norm(f"{ours}/attention_norm", f"{at}.layer_norm1", layers),
    *norm(f"{ours}/mlp_norm", f"{at}.layer_norm2", layers),
    *linear(f"{ours}/mlp/up", f"{at}.mlp.fc1", layers),
    *linear(f"{ours}/mlp/down", f"{at}.mlp.fc2", layers),
  ]


def joint_attention(
  ours: str,
  theirs: str,
  heads: int,
  layers: int = 0,
  names: Sequence[str] = ("in_proj_weight", "in_proj_bias", "out_proj"),
) -> list[Rule]:
  """A torch.nn.MultiheadAttention, whose query, key and value are one tensor; names: of its
  parts."""
  weight, bias, out = names
  return [
    Rule(
      f"{ours}/qkv/kernel",
      (f"{theirs}.{weight}",),
      lambda t: t[0].reshape(3, heads, -1, t[0].shape[1]).transpose(3, 0, 1, 2),
      lambda p: [p.transpose(1, 2, 3, 0).reshape(-1, p.shape[0])],
      layers,
    ),
    Rule(
      f"{ours}/qkv/bias",
      (f"{theirs}.{bias}",),
      lambda t: t[0].reshape(3, heads, -1),
      lambda p: [p.reshape(-1)],
      layers,
    ),
    *attention_output(f"{ours}/out", f"{theirs}.{out}", heads, layers),
  ]


def attention_pool(ours: str, theirs: str, heads: int) -> list[Rule]:
  """SigLIP's pooling head, whose attention is a torch.nn.MultiheadAttention."""
  return [
    same(f"{ours}/query", f"{theirs}.probe", shape=(1, 1, -1)),
    *joint_attention(f"{ours}/attention", f"{theirs}.attention", heads),
    *norm(f"{ours}/norm", f"{theirs}.layernorm"),
    *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
    *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
  ]


def to_params(
  tensors: Mapping[str, Array],
  rules: Sequence[Rule],
  where: str,
  empty: Callable[[tuple[int, ...], Any], Array] = np.empty,
) -> dict[str, Any]:
  """Nested float32 parameters from a file's tensors. empty: makes the array of a shape and a dtype
  that a parameter is written to. Raises UserError listing tensors that are missing or that no rule
  uses.
  """
  wanted = {name for rule in rules for name in _names(rule)}
  have = {name for name in tensors if not name.endswith(IGNORED)}
  for kind, names in (
    ("lacks", wanted - have),
    ("holds tensors that its config.json does not explain:", have - wanted),
  ):
    if names:
      raise UserError(
        f"{where} {kind} {', '.join(sorted(names))}. Its config.json belongs to another model"
      )
  for (
    copy,
    original,
  ) in COPIES.items():  # transformers ties what a file holds once, or twice and equal
    if (
      copy in tensors
      and original in tensors
      and not np.array_equal(tensors[copy], tensors[original])
    ):
      raise UserError(
        f"{where}: {copy} differs from {original}, so that transformers does not tie them, but "
        "tokens are predicted through the embeddings here. Such a model is not supported"
      )
  flat = {rule.ours: _parameter(tensors, rule, where, empty) for rule in rules}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _parameter(
  tensors: Mapping[str, Array], rule: Rule, where: str, empty: Callable[..., Array]
) -> Array:
  """float32: the parameter of a rule. One layer at a time: beside the parameters themselves, memory
  holds the tensors of one layer.
  """
  stack = np.empty(0, np.float32)
  for i in range(rule.layers or 1):
    names = [t.format(i=i) for t in rule.theirs]
    group = [finite(tensors[name], name, where) for name in names]
    try:
      value = rule.into(group)
      if not rule.layers:
        stack = empty(value.shape, np.float32)
        stack[...] = value
        return stack
      if not i:
        stack = empty((rule.layers, *value.shape), np.float32)
      if value.shape != stack.shape[1:]:
        raise ValueError("layers of unequal shapes")
      stack[i] = value
    except (ValueError, IndexError) as error:
      raise UserError(
        f"{where}: {names[0]} has shape {group[0].shape}, which its config.json does not allow"
      ) from error
  return stack


def finite(tensor: Array, name: str, where: str) -> Array:
  """float32. Raises UserError: whole numbers (quantised weights), or numbers that are not
  finite.
  """
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise UserError(
      f"{where}: {name} holds {tensor.dtype}, but weights are floating-point numbers here. Save "
      "it without quantisation"
    )
  with np.errstate(over="ignore"):
    values = np.asarray(tensor, np.float32)
  if not np.isfinite(values).all():
    raise UserError(
      f"{where}: {name} holds NaN or infinity. The file is damaged, or was saved of a run that "
      "had diverged"
    )
  return values


def to_tensors(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Array]:
  """A file's tensors from nested parameters. Raises UserError listing parameters that no rule
  takes, or that are missing.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  ours = {rule.ours for rule in rules}
  if ours != set(flat):
    raise UserError(
      "transformers has no place for these parameters, or lacks them: "
      f"{', '.join(sorted(ours ^ set(flat)))}"
    )
  tensors: dict[str, np.ndarray] = {}
  for rule in rules:
    value = np.asarray(flat[rule.ours], np.float32)
    for i, layer in enumerate(value if rule.layers else [value]):
      tensors.update(zip((t.format(i=i) for t in rule.theirs), rule.back(layer), strict=True))
  return tensors


def _names(rule: Rule) -> list[str]:
  return [t.format(i=i) for t in rule.theirs for i in range(rule.layers or 1)]
