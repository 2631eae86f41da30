"""The transformer stack that every modality uses: one block, stacked parameters, scanned or
unrolled, rematerialised by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax.config import UserError
from mmjax.models.attention import Attention, fuses
from mmjax.models.fused_attention import TILE
from mmjax.models.layers import LayerNorm, Mlp, constrain, with_axes
from mmjax.models.platform import platform

Array = jax.Array
Remat = Literal[
  "none", "full", "dots", "dense", "dots_no_batch", "attention", "offload", "offload_dense"
]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Kernel = Literal["auto", "xla", "sdpa", "fused", "flash", "splash", "cudnn"]

_POLICIES = jax.checkpoint_policies
_DENSE = _POLICIES.save_only_these_names(
  "dense"
)  # by name: policies of products do not see into functions with their own derivatives
_offload = lambda name: _POLICIES.save_and_offload_only_these_names(
  names_which_can_be_saved=[],
  names_which_can_be_offloaded=[name],
  offload_src="device",
  offload_dst="pinned_host",
)
# What the forward pass keeps for the backward pass; everything else of a block is computed again.
REMAT: dict[str, Callable[..., Any] | None] = {
  "none": None,  # no rematerialisation
  "full": _POLICIES.nothing_saveable,  # only the inputs of the blocks
  "dots": _POLICIES.save_from_both_policies(
    _POLICIES.dots_saveable, _DENSE
  ),  # results of every matrix product, attention logits among them
  "dense": _DENSE,  # results of the dense layers, biases added: norms, activations, attention anew
  "dots_no_batch": _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable, _DENSE
  ),  # results of the dense layers, not of attention
  "attention": _POLICIES.save_only_these_names("attention"),  # the outputs of attention
  # As "full", and the inputs wait in the memory of the host: nothing on the chip grows with depth,
  # for deep stacks of long sequences. A block moves 2 bytes a channel (bfloat16) and computes some
  # 24 D FLOPs on it, which hides the way from D = 1024 on.
  "offload": _offload("block"),
  # As "dense" in the memory of "full": no dense product is computed twice, but nine times as much
  # goes to the host and back.
  "offload_dense": _offload("dense"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Hyper-parameters of a stack; encoders fill it from their settings."""

  width: int
  depth: int
  heads: int
  mlp: int
  norm: Literal["pre", "post"] = "pre"
  activation: Activation = "gelu"
  causal: bool = False
  bias: bool = True
  eps: float = 1e-6
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  kernel: Kernel = "auto"
  remat: Remat = "none"
  gated: bool = (
    False  # the MLP multiplies its activated half by another (Shazeer 2020, arXiv:2002.05202)
  )
  # a learned factor a channel of what each part adds, at the start; 0 = none (arXiv:2103.17239)
  layer_scale: float = 0.0
  # blocks a trip of the loop; 0 = all of a short stack on CPUs, 1 elsewhere. Changes speed only
  scan_unroll: int = 0

  def __post_init__(self):
    if self.width % self.heads:
      raise UserError(
        f"width {self.width} is not divisible by {self.heads} heads. Change `heads` or `width` of "
        "the encoder"
      )
    if self.remat not in REMAT:
      raise UserError(f"remat {self.remat!r} is unknown; there are: {', '.join(REMAT)}")


class Block(nn.Module):
  """Attention and MLP with residuals, normalised before ("pre") or after ("post"). Call: x [B, L,
  D] -> [B, L, D].

  length: L where x is given as rows [B * L, D], and returned so. bias: float32 [H, L, L], added to
  the attention's logits.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None,
    *,
    train: bool = False,
    length: int = 0,
    bias: Array | None = None,
  ) -> Array:
    c = self.config
    norm = lambda name: LayerNorm(c.eps, c.dtype, name=name)
    drop = nn.Dropout(c.dropout, deterministic=not train)
    attention = Attention(c.heads, c.dtype, c.causal, c.kernel, c.bias, name="attention")
    mlp = Mlp(c.mlp, c.activation, c.dtype, c.bias, c.gated, name="mlp")
    scaled = lambda name, x: LayerScale(c.layer_scale, name=name)(x) if c.layer_scale else x
    x = checkpoint_name(constrain(x), "block")
    attended = lambda x: drop(
      scaled(
        "attention_scale",
        checkpoint_name(attention(x, mask=mask, length=length, bias=bias), "attention"),
      )
    )
    widened = lambda x: drop(scaled("mlp_scale", mlp(x)))
    if c.norm == "pre":
      x = x + attended(norm("attention_norm")(x))
      x = x + widened(norm("mlp_norm")(x))
    else:
      x = norm("attention_norm")(x + attended(x))
      x = norm("mlp_norm")(x + widened(x))
    return constrain(x)


class LayerScale(nn.Module):
  """A learned factor for each channel, which starts at `value` (Touvron et al. 2021,
  arXiv:2103.17239). Call: [..., D] -> [..., D].
  """

  value: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      "scale",
      with_axes(nn.initializers.constant(self.value), ("embed",)),
      (x.shape[-1],),
      jnp.float32,
    )
    return x * scale.astype(x.dtype)


class Transformer(nn.Module):
  """`depth` blocks. Call: x [B, L, D], mask bool [B, S] | [B, L, S] | None, bias float32 [H, L, L]
  | None -> [B, L, D].

  The blocks' parameters are stored stacked under "layers" with a leading logical axis "layers",
  however they are run. For the final norm (pre-norm stacks) see the encoders. Randomness: stream
  "dropout", drawn for each block from one key.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Array, mask: Array | None = None, *, train: bool = False, bias: Array | None = None
  ) -> Array:
    c = self.config
    shape, x = x.shape, x.astype(c.dtype)
    x, mask, length = self._rows(x, mask) if bias is None else (x, mask, 0)
    block = Block(c, parent=None)
    plain = Block(
      dataclasses.replace(c, kernel="xla"), parent=None
    )  # the same parameters; kernels refuse a single token

    def init(key: Array) -> Any:
      stacked = jax.vmap(
        lambda k: plain.init(k, jnp.zeros((1, 1, c.width), c.dtype), None)["params"]
      )(jax.random.split(key, c.depth))
      return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})

    layers = self.param("layers", init)
    unroll = c.scan_unroll or (c.depth if platform() == "cpu" and c.depth <= 12 else 1)
    unroll = min(unroll, c.depth)
    keys = jax.random.split(self.make_rng("dropout"), c.depth) if train and c.dropout else None

    def run(x: Array, layer: tuple[Any, Array | None]) -> Array:
      params, key = layer
      return block.apply(
        {"params": params},
        x,
        mask,
        train=train,
        length=length,
        bias=bias,
        rngs=None if key is None else {"dropout": key},
      )

    if c.remat != "none":
      run = jax.checkpoint(run, policy=REMAT[c.remat], prevent_cse=unroll > 1)
    x = jax.lax.scan(lambda x, layer: (run(x, layer), None), x, (layers, keys), unroll=unroll)[0]
    return x.reshape(shape[0], length, c.width)[:, : shape[1]] if length else x

  def _rows(self, x: Array, mask: Array | None) -> tuple[Array, Array | None, int]:
    """(x, mask, 0), or, where attention is fused, (x as rows [B * L, D], mask, L), with L filled up
    to whole tiles of a TPU by
    tokens that nothing may see: activations then have one layout only, and nothing is copied before
    or after a kernel."""
    c, (b, real, _) = self.config, x.shape
    head = jax.ShapeDtypeStruct((b, real + -real % TILE, c.heads, c.width // c.heads), c.dtype)
    if not fuses(c.kernel, head, mask):
      return x, mask, 0
    length = head.shape[1]
    if length != real:
      mask = jnp.ones((b, real), bool) if mask is None else mask
      x, mask = (
        jnp.pad(x, ((0, 0), (0, length - real), (0, 0))),
        jnp.pad(mask, ((0, 0), (0, length - real))),
      )
    return x.reshape(b * length, c.width), mask, length


def run_stack(
  encoder: nn.Module, x: Array, mask: Array | None, *, train: bool, bias: Array | None = None
) -> Array:
  """x [B, L, D] through the transformer of an encoder: its `trunk`, where it shares one, or a stack
  of its own `config`, whose parameters are the encoder's (text/layers, not
  text/Transformer_0/layers). Call it in the encoder's compact method."""
  if encoder.trunk is not None:
    return encoder.trunk(x, mask, train=train, bias=bias)
  stack = Transformer(encoder.config)
  nn.share_scope(encoder, stack)
  return stack(x, mask, train=train, bias=bias)
