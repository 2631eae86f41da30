"""A stack of blocks: parameters stored stacked, run by a loop over the layers (patterns of layers
too), rematerialised by name, all at once or with a cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.attention import AttentionMask, fuses
from mmjax.models.attention.fused import TILE
from mmjax.models.block import Attention, Block, BlockConfig, KeyValue, Turns, empty_cache
from mmjax.models.platform import platform

Array = jax.Array
Policy = Callable[..., Any]

_POLICIES = jax.checkpoint_policies
# by name: policies of products do not see into functions with their own derivatives
_DENSE = _POLICIES.save_only_these_names("dense", "hidden")


def _offload(*names: str) -> Policy:
  return _POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=names,
    offload_src="device",
    offload_dst="pinned_host",
  )


# What the forward pass keeps for the backward pass; everything else of a block is computed again.
REMAT: dict[str, Policy | None] = {
  "none": None,  # no rematerialisation
  "full": _POLICIES.nothing_saveable,  # only the inputs of the blocks
  # results of every matrix product, attention logits among them
  "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_saveable, _DENSE),
  "dense": _DENSE,  # results of the dense layers, biases added: norms, activations, attention anew
  # results of the dense layers, not of attention
  "dots_no_batch": _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable, _DENSE
  ),
  # as "dense", and what attention gives to its output projection: norms and activations anew
  "dense_attention": _POLICIES.save_only_these_names("dense", "hidden", "attended"),
  # as "dense_attention" without the hidden units of the MLPs, which are the most of it: the norms
  # and the first layers of the MLPs anew, a ninth of the products of a step
  "projections": _POLICIES.save_only_these_names("dense", "attended"),
  "attention": _POLICIES.save_only_these_names("attention"),  # the outputs of attention
  # As "full", and the inputs wait in the memory of the host: nothing on the chip grows with depth,
  # for deep stacks of long sequences. A block moves 2 bytes a channel (bfloat16) and computes some
  # 24 D FLOPs on it, which hides the way from D = 1024 on.
  "offload": _offload("block"),
  # As "dense" in the memory of "full": no dense product is computed twice, but nine times as much
  # goes to the host and back.
  "offload_dense": _offload("dense", "hidden"),
}


APART = "apart"  # a collection of variables: the layers of a stack one by one
FEW = 12  # a CPU runs stacks of so many layers without a loop over them


def with_layers_apart(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Variables of a model, its stacks' layers one by one beside them where that pays: in a loop over
  tokens a CPU would copy every layer out of its stack for every token.
  """
  if platform() != "cpu":
    return dict(variables)

  def of(tree: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, part in tree.items():
      if name == "layers":
        depth = len(jax.tree.leaves(part)[0])
        if depth <= FEW:
          layers = [jax.tree.map(lambda x, i=i: x[i], part) for i in range(depth)]
          found[name] = jax.lax.optimization_barrier(layers)
      elif isinstance(part, Mapping) and (below := of(part)):
        found[name] = below
    return found

  return {**variables, APART: of(variables["params"])}


Cache = KeyValue | list[KeyValue]  # of all layers, or of layers that lie apart


class Memory(NamedTuple):
  """What the blocks attend to besides themselves, its keys and values computed once: key, value
  [layers, B, S, G, K]; mask bool [1, B, S]. Rows stand on axis 1.
  """

  key: Array
  value: Array
  mask: Array


class Stack(nn.Module):
  """`depth` blocks. Their parameters are stored stacked under "layers" with a leading logical axis
  "layers", however they are run. For the final norm (pre-norm stacks) see who uses it.

  cross: the blocks attend to a context too. context_norm, dropout: as in `Block`. Randomness:
  stream "dropout", drawn for each block from one key.
  """

  config: BlockConfig
  cross: bool = False
  context_norm: str = "cross_attention_norm"
  dropout: str = "Dropout_0"

  def setup(self) -> None:
    if self.has_variable("params", "layers") and not self.is_initializing():
      # as they are: an adapter's leaves stand beside those that `init` makes (lora.py)
      self.layers: Any = self.get_variable("params", "layers")
    else:
      self.layers = self.param("layers", self._init_layers)

  def __call__(
    self,
    x: Array,
    mask: Array | AttentionMask | None = None,
    *,
    context: Array | None = None,
    context_mask: Array | None = None,
    positions: Array | None = None,
    train: bool = False,
    bias: Array | None = None,
    added: Array | None = None,
    taps: Sequence[int] = (),
  ) -> Any:
    """x [B, L, D] -> [B, L, D], or (that, [x after each block of number `taps`]). mask: a mask, or
    which tokens are real, bool [B, L]. context [B, S, D], context_mask bool [B, S]: what the blocks
    attend to besides. positions: of rotary positions, int32 [B, L] or [B, L, axes]; None = 0, 1,
    ... bias float32 [H, L, L]: of the attention's logits. added [N, B, L, D]: what is added to the
    outputs of the first N blocks (DeepStack, Meng et al. 2024, arXiv:2406.04334).
    """
    c, shape = self.config, x.shape
    mask = mask if isinstance(mask, AttentionMask) else AttentionMask(keys=mask)
    mask = dataclasses.replace(mask, causal=c.causal)
    x, context = x.astype(c.dtype), None if context is None else context.astype(c.dtype)
    length = 0
    if c.packs and context is None and bias is None:
      x, mask, length = self._rows(x, mask)
    drops = c.dropout or _drops_factors(self.layers)
    keys = jax.random.split(self.make_rng("dropout"), c.depth) if train and drops else None
    settings: dict[str, Any] = dict(
      context=context, context_mask=context_mask, bias=bias, length=length, train=train
    )

    def run(block: Block, x: Array, layer: tuple, turns: Turns | None) -> tuple[Any, None]:
      (params, key), more = layer
      rngs = None if key is None else {"dropout": key}
      out = block.apply({"params": params}, x, mask, turns=turns, rngs=rngs, **settings)
      return out if more is None else out + more, None

    def whole(x: Array) -> Array:
      return x.reshape(shape[0], length, c.width)[:, : shape[1]] if length else x

    if added is not None and length:
      pad = ((0, 0), (0, 0), (0, length - shape[1]), (0, 0))
      added = jnp.pad(added, pad).reshape(len(added), *x.shape)
    positions = self._positions(positions, shape, 0)
    x, tapped, _ = self._parts(run, x, (self.layers, keys), positions, added, taps)
    return (whole(x), [whole(tap) for tap in tapped]) if taps else whole(x)

  def init_cache(self, rows: int, length: int, int8: bool = False) -> Cache:
    """An empty cache of keys and values for `rows` texts of up to `length` tokens; of each layer
    alone, where the layers lie apart. int8: see `block.Int8`.
    """
    c, lie_apart = self.config, self.has_variable(APART, "layers")
    depth = 1 if lie_apart else c.depth
    empty = empty_cache((depth, rows, c.groups, length, c.channels), c.dtype, int8)
    return [empty for _ in range(c.depth)] if lie_apart else empty

  def init_memory(self, context: Array, context_mask: Array) -> Memory:
    """Of tokens [B, S, D] and which are real, bool [B, S]: once a generation."""
    attention = Attention(self.config, parent=None)

    def one(_: None, params: Any) -> tuple[None, Any]:
      params = {"params": params["cross_attention"]}
      return None, attention.apply(params, context, method="keys_and_values")

    key, value = jax.lax.scan(one, None, self.layers)[1]
    return Memory(key, value, context_mask[None])

  def extend(
    self,
    x: Array,
    start: Array | int,
    cache: Cache,
    memory: Memory | None = None,
    *,
    keys: Array | None = None,
    positions: Array | None = None,
    prefix: Array | None = None,
    blocks: Array | None = None,
    wide_blocks: bool = False,
    added: Array | None = None,
  ) -> tuple[Array, Cache]:
    """x [B, L, D], the tokens from place `start` (int32 scalar or [B]) of the cache on -> ([B, L,
    D], the cache with them): a whole prompt or one token.

    A token sees the cache up to its own place, and the first `prefix` places, int32 [B]; keys: bool
    [B, T], the places of it that are real. positions: as in a call; None = the places. blocks int32
    [B, L], of the tokens of x, and wide_blocks: see `AttentionMask`. added: as in a call.
    """
    key_blocks = None
    if blocks is not None:
      places = jnp.asarray(start).reshape(-1, 1) + jnp.arange(blocks.shape[1])
      rows, _, length, _ = (cache[0] if isinstance(cache, list) else cache).key.shape[1:]
      key_blocks = jnp.zeros((rows, length), jnp.int32)
      key_blocks = key_blocks.at[jnp.arange(len(blocks))[:, None], places].set(blocks)
    mask = AttentionMask(
      causal=True,
      wide_blocks=wide_blocks,
      prefix=prefix,
      blocks=blocks,
      key_blocks=key_blocks,
      keys=keys,
      offset=start,
    )
    stored = None if memory is None else KeyValue(memory.key, memory.value)
    context_mask = None if memory is None else memory.mask[0]

    def run(block: Block, x: Array, layer: tuple, turns: Turns | None) -> tuple[Any, Any]:
      (params, cache, stored), more = layer
      x, cache = block.apply(
        {"params": params},
        x,
        mask,
        context=stored,
        context_mask=context_mask,
        turns=turns,
        cache=cache,
      )
      return x if more is None else x + more, cache

    x, positions = x.astype(self.config.dtype), self._positions(positions, x.shape, start)
    if not isinstance(cache, list):
      x, _, cache = self._parts(run, x, (self.layers, cache, stored), positions, added, train=False)
      return x, cache
    runs = self._runs(run, positions, False, 1)
    made = []
    apart: Any = self.get_variable(APART, "layers")
    for i, params in enumerate(apart):
      own = jax.tree.map(lambda a: a[0], cache[i])
      more = None if added is None or i >= len(added) else added[i]
      layer = params, own, jax.tree.map(lambda a, i=i: a[i], stored)
      x, out = runs[i % len(runs)](x, (layer, more))
      made.append(jax.tree.map(lambda a: a[None], out))
    return x, made

  def _parts(
    self,
    run: Callable,
    x: Array,
    layers: Any,
    positions: Array | None,
    added: Array | None = None,
    taps: Sequence[int] = (),
    train: bool = True,
  ) -> tuple[Array, list[Array], Any]:
    """`_each` of all layers, whose `run` gets (layer, what is added after it or None): (x, x after
    each of `taps`, outs stacked). Where they differ in what is added or tapped, part after part.
    """
    depth = self.config.depth
    count = 0 if added is None else len(added)
    cuts = sorted({0, depth, count, *(tap + 1 for tap in taps)})
    if cuts[-1] > depth:
      raise UserError(f"{cuts[-1]} blocks are asked of a stack of {depth}")
    tapped, outs = {}, []
    for start, stop in itertools.pairwise(cuts):
      part = layers
      if (start, stop) != (0, depth):
        part = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], layers)
      more = added[start:stop] if added is not None and stop <= count else None
      x, out = self._each(run, x, (part, more), positions, train, start, stop - start)
      tapped[stop - 1] = x
      outs.append(out)
    if len(outs) > 1:
      outs = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)]
    return x, [tapped[tap] for tap in taps], outs[0]

  def _each(
    self,
    run: Callable,
    x: Array,
    layers: Any,
    positions: Array | None,
    train: bool,
    start: int,
    depth: int,
  ) -> tuple[Array, Any]:
    """`run(block, x, layer, turns) -> (x, out)` for layer after layer of `layers`, arrays with a
    leading axis of them, `depth` from number `start` on: (x, outs stacked). A pattern of layers is
    one trip of the loop.
    """
    c = self.config
    unroll = c.scan_unroll or (depth if platform() == "cpu" and depth <= FEW else 1)
    unroll = min(unroll, depth) if train else 1
    runs = self._runs(run, positions, train, unroll)
    period = len(runs)
    runs = [runs[(start + i) % period] for i in range(period)]
    if period == 1:
      return jax.lax.scan(runs[0], x, layers, unroll=unroll)

    def trip(x: Array, group: Any) -> tuple[Array, Any]:
      outs = []
      for i, one in enumerate(runs):
        x, out = one(x, jax.tree.map(lambda a, i=i: a[i], group))
        outs.append(out)
      return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    whole = depth // period * period
    groups = jax.tree.map(lambda a: a[:whole].reshape(-1, period, *a.shape[1:]), layers)
    x, outs = jax.lax.scan(trip, x, groups, unroll=max(1, unroll // period))
    outs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs)
    for i in range(whole, depth):
      x, out = runs[i - whole](x, jax.tree.map(lambda a, i=i: a[i], layers))
      outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), outs, out)
    return x, outs

  def _runs(
    self, run: Callable, positions: Array | None, train: bool, unroll: int
  ) -> list[Callable]:
    """one(x, layer) -> (x, out) of each layer of a pattern."""
    c = self.config
    windows, turns = c.windows or (0,), {}
    if c.rotary is not None and positions is not None:
      turns = {
        local: (c.local_rotary if local and c.local_rotary else c.rotary).angles(
          positions, c.channels
        )
        for local in {window > 0 for window in windows}
      }

    def of_window(window: int) -> Callable:
      block = Block(c, window, self.context_norm, self.dropout, parent=None)

      def one(x, layer):
        return run(block, x, layer, turns.get(window > 0))

      if c.remat == "none" or not train:
        return one
      return jax.checkpoint(one, policy=REMAT[c.remat], prevent_cse=unroll > 1)

    return [of_window(window) for window in windows]

  def _positions(
    self, positions: Array | None, shape: tuple[int, ...], start: Array | int
  ) -> Array | None:
    """Positions of tokens x [B, L, D] that begin at `start`, where the blocks need any."""
    if self.config.rotary is None or positions is not None:
      return positions
    positions = jnp.asarray(start).reshape(-1, 1) + jnp.arange(shape[1])
    return jnp.broadcast_to(positions, shape[:2])

  def _rows(self, x: Array, mask: AttentionMask) -> tuple[Array, AttentionMask, int]:
    """(x, mask, 0), or, where attention is fused, (x as rows [B * L, D], mask, L), with L filled up
    to whole tiles of a TPU by tokens that nothing may see: activations then have one layout only,
    and nothing is copied before or after a kernel.
    """
    c, (b, real, _) = self.config, x.shape
    length = real + -real % TILE
    head = jax.ShapeDtypeStruct((b, length, c.heads, c.channels), c.dtype)
    if not fuses(c.kernel, head, mask):
      return x, mask, 0
    if length != real:
      x = jnp.pad(x, ((0, 0), (0, length - real), (0, 0)))
      mask = mask.padded(b, real, length)
    return x.reshape(b * length, c.width), mask, length

  def _init_layers(self, key: Array) -> Any:
    # the same parameters; kernels refuse a single token
    block = Block(dataclasses.replace(self.config, kernel="xla"), 0, self.context_norm, parent=None)
    x = jnp.zeros((1, 1, self.config.width), self.config.dtype)
    context = x if self.cross else None
    stacked = jax.vmap(lambda k: block.init(k, x, context=context)["params"])(
      jax.random.split(key, self.config.depth)
    )
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})


def _drops_factors(layers: Any) -> bool:
  """Whether the input of low-rank factors in the layers is dropped in training."""
  paths = jax.tree_util.tree_leaves_with_path(layers)
  return any(path[-1] == jax.tree_util.DictKey("lora_dropout") for path, _ in paths)


def run_stack(
  encoder: nn.Module, x: Array, mask: Array | None, *, train: bool, bias: Array | None = None
) -> Array:
  """x [B, L, D] through the stack of an encoder: its `trunk`, where it shares one, or one of its
  own `config`, whose parameters are the encoder's (text/layers, not text/Stack_0/layers). Call it
  in the encoder's compact method."""
  if encoder.trunk is not None:
    return encoder.trunk(x, mask, train=train, bias=bias)
  stack = Stack(encoder.config)
  nn.share_scope(encoder, stack)
  return stack(x, mask, train=train, bias=bias)
