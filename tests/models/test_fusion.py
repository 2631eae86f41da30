"""Fusions: what rows, padding and missing modalities may change, and the formulas written out."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.config import UserError
from mmjax.kinds import kind_function
from mmjax.models.attention import AttentionMask
from mmjax.models.block import Block, BlockConfig
from mmjax.models.layers import Encoded

ROWS, LENGTHS, WIDTHS = 8, dict(text=3, image=2, audio=4), dict(text=8, image=6, audio=4)
DEEP = dict(width=8, depth=1, heads=2)
KINDS = dict(
  concat=dict(width=8),
  weighted_sum=dict(width=8),
  gated=dict(width=8),
  average=dict(width=8),
  cross_attention=DEEP,
  merged_attention=DEEP,
  perceiver=dict(latents=3, **DEEP),
  decision={},
  vote=dict(combine="vote"),
)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, **data):
  function = kind_function({"kind": "decision" if kind == "vote" else kind}, "fusion")
  return function(
    tuple(LENGTHS), dict(dict(classes=5), **data), dict(compute="float32"), **KINDS[kind]
  )


def encoded(seed=0, lacking=()):
  """Random encodings with padding anywhere; row 0 has nothing, and nobody has the modalities of
  `lacking`.
  """
  rng = np.random.default_rng(seed)
  out = {}
  for m, length in LENGTHS.items():
    mask = rng.random((ROWS, length)) < rng.choice([0.2, 0.8])
    mask[0] = False
    mask &= m not in lacking

    def normal(*shape):
      return rng.normal(size=shape).astype(np.float32)

    pooled = np.where(mask.any(-1, keepdims=True), normal(ROWS, WIDTHS[m]), 0).astype(np.float32)
    out[m] = Encoded(normal(ROWS, length, WIDTHS[m]), mask, pooled)
  return out


@functools.cache
def fused(kind):
  """(the jitted fusion, parameters moved off their starting values)."""
  module = make(kind)
  params = nn.unbox(jax.jit(module.init)(jax.random.key(0), encoded()))
  leaves, tree = jax.tree.flatten(params)
  noise = np.random.default_rng(1)
  params = tree.unflatten([x + 0.3 * noise.normal(size=x.shape).astype(np.float32) for x in leaves])
  return jax.jit(module.apply), params


def close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@kinds
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_are_independent_and_padding_is_not_seen(kind, seed):
  function, params = fused(kind)
  parts = encoded(seed)
  out = function(params, parts)
  order = np.random.default_rng(seed).permutation(ROWS)
  close(
    function(params, jax.tree.map(lambda x: x[order], parts)), jax.tree.map(lambda x: x[order], out)
  )
  other = {
    m: p._replace(
      tokens=np.where(p.mask[..., None], p.tokens, 9).astype(np.float32),
      pooled=np.where(p.mask.any(-1, keepdims=True), p.pooled, 9).astype(np.float32),
    )
    for m, p in parts.items()
  }

  def seen(out):
    return (np.where(np.asarray(out.mask)[..., None], out.tokens, 0), out.mask, out.pooled)

  close(seen(function(params, other)), seen(out))
  nothing = ~np.stack([p.mask.any(-1) for p in parts.values()]).any(0)
  assert (
    nothing[0]
    and not np.any(out.tokens[nothing])
    and not np.any(out.mask[nothing])
    and not np.any(out.pooled[nothing])
  )


@kinds
@pytest.mark.parametrize("lacking", ["text", "image"])
def test_a_modality_that_no_row_has_is_as_one_that_is_not_given(kind, lacking):
  function, params = fused(kind)
  parts = encoded(3, lacking=(lacking,))
  without = {m: p for m, p in parts.items() if m != lacking}
  close(function(params, parts).pooled, function(params, without).pooled)


@kinds
def test_rows_without_anything_have_no_gradient_and_the_others_a_finite_one(kind):
  _, params = fused(kind)
  module, parts = make(kind), encoded(4)

  def loss(params, floats, row):
    given = {m: p._replace(tokens=floats[m][0], pooled=floats[m][1]) for m, p in parts.items()}
    out = module.apply(params, given, train=True)
    return (out.tokens.sum() if row is None else out.tokens[row].sum()) * 0.3 + (
      jnp.sin(3 * (out.pooled if row is None else out.pooled[row]))
    ).sum()

  floats = {m: (p.tokens, p.pooled) for m, p in parts.items()}
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
  everything = gradient(params, floats, None)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(everything))
  assert not any(np.any(g[0]) for g in jax.tree.leaves(everything[1]))
  assert not any(np.any(g) for g in jax.tree.leaves(gradient(params, floats, 0)))
  idle = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(everything[0])
    if not np.any(g)
  ]
  assert not idle


@kinds
def test_eight_devices_give_the_same(kind, devices):
  function, params = fused(kind)
  parts = encoded(5)
  mesh = jax.make_mesh((8,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
  split = jax.device_put(parts, NamedSharding(mesh, PartitionSpec("data")))
  whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  close(jax.jit(make(kind).apply)(whole, split), function(params, parts))


def dense(params, name, x):
  return x @ params[name]["kernel"] + params[name]["bias"]


def test_feature_fusions_are_their_formulas():
  parts = encoded(6)
  has = np.stack([p.mask.any(-1) for p in parts.values()], 1)

  def pooled(params):
    return np.stack(
      [
        np.where(p.mask.any(-1)[:, None], dense(params, f"{m}_in", p.pooled), 0)
        for m, p in parts.items()
      ],
      1,
    )

  for kind in ("average", "weighted_sum"):
    function, params = fused(kind)
    params = params["params"]
    share = has * np.exp(params.get("weights", np.zeros(3)))
    want = np.einsum(
      "bm,bmd->bd", share / np.maximum(share.sum(1, keepdims=True), 1e-9), pooled(params)
    )
    np.testing.assert_allclose(function({"params": params}, parts).pooled, want, atol=1e-5)
  function, params = fused("gated")
  params = params["params"]
  x, want = pooled(params), 0
  for i, m in enumerate(parts):
    gate = 1 / (1 + np.exp(-dense(params, f"{m}_gate", x.reshape(ROWS, -1))))
    want = want + has[:, i, None] * gate * np.tanh(dense(params, f"{m}_value", x[:, i]))
  np.testing.assert_allclose(function({"params": params}, parts).pooled, want, atol=1e-5)


@pytest.mark.parametrize("label", ["label", "labels"])
def test_decisions_are_averaged_or_counted(label):
  parts = encoded(7)
  has = np.stack([p.mask.any(-1) for p in parts.values()], 1)
  for kind in ("decision", "vote"):
    _, params = fused(kind)
    params = dict(params["params"])
    logits = np.stack([dense(params, f"{m}_classifier", p.pooled) for m, p in parts.items()], 1)
    scores = logits if label == "labels" else logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = make(kind, label=label).apply({"params": params}, parts).pooled
    for row in np.flatnonzero(has.any(1)):
      mine = scores[row][has[row]]
      if kind == "decision":
        weights = np.exp(params["weights"][has[row]])
        np.testing.assert_allclose(got[row], weights @ mine / weights.sum(), atol=1e-5)
      elif label == "labels":
        votes = np.sign(mine).sum(0)
        np.testing.assert_array_equal(
          np.sign(got[row]), np.where(votes, np.sign(votes), np.sign(mine.mean(0)))
        )
      else:
        votes = np.bincount(mine.argmax(1), minlength=5)
        winners = np.flatnonzero(votes == votes.max())
        assert np.argmax(got[row]) == winners[np.argmax(mine.mean(0)[winners])]
        np.testing.assert_allclose(np.exp(got[row]).sum(), 1, rtol=1e-5)


def test_the_cross_block_is_the_one_of_pytorch():
  width, heads = 8, 2
  config = BlockConfig(width=width, depth=1, heads=heads, mlp=16, activation="gelu", eps=1e-5)
  rng = np.random.default_rng(0)
  x, context = (rng.normal(size=(3, n, width)).astype(np.float32) for n in (4, 5))
  mask, context_mask = (np.arange(n) < np.array([[n], [2], [3]]) for n in (4, 5))
  seen = AttentionMask(keys=mask)
  params = nn.unbox(
    jax.jit(Block(config).init)(
      jax.random.key(0), x, seen, context=context, context_mask=context_mask
    )
  )["params"]
  params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
  layer = torch.nn.TransformerDecoderLayer(
    width, heads, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
  ).eval()

  def put(target, value):
    return target.data.copy_(torch.from_numpy(np.array(value)))

  for ours, theirs in (("attention", layer.self_attn), ("cross_attention", layer.multihead_attn)):
    kernel = (
      np.asarray(params[ours]["qkv"]["kernel"]).transpose(1, 2, 3, 0).reshape(3 * width, width)
    )
    (
      put(theirs.in_proj_weight, kernel),
      put(theirs.in_proj_bias, np.asarray(params[ours]["qkv"]["bias"]).reshape(-1)),
    )
    (
      put(
        theirs.out_proj.weight, np.asarray(params[ours]["out"]["kernel"]).reshape(width, width).T
      ),
      put(theirs.out_proj.bias, params[ours]["out"]["bias"]),
    )
  for ours, theirs in (
    ("attention_norm", layer.norm1),
    ("cross_attention_norm", layer.norm2),
    ("mlp_norm", layer.norm3),
  ):
    put(theirs.weight, params[ours]["scale"]), put(theirs.bias, params[ours]["bias"])
  for ours, theirs in (("up", layer.linear1), ("down", layer.linear2)):
    (
      put(theirs.weight, np.asarray(params["mlp"][ours]["kernel"]).T),
      put(theirs.bias, params["mlp"][ours]["bias"]),
    )
  with torch.no_grad():
    want = layer(
      torch.from_numpy(x),
      torch.from_numpy(context),
      tgt_key_padding_mask=torch.from_numpy(~mask),
      memory_key_padding_mask=torch.from_numpy(~context_mask),
    ).numpy()
  np.testing.assert_allclose(
    Block(config).apply({"params": params}, x, seen, context=context, context_mask=context_mask),
    want,
    atol=2e-5,
  )


def test_what_a_fusion_cannot_do_is_said():
  function, params = fused("average")
  with pytest.raises(UserError, match="no modality 'video'; it has text, image, audio"):
    function(params, dict(video=encoded()["text"]))
  with pytest.raises(UserError, match=r"data\.classes is 0"):
    make("decision", classes=0)
  with pytest.raises(UserError, match="query 'text' is no encoder of the model; there are: image"):
    kind_function({"kind": "cross_attention"}, "fusion")(
      ("image",), {}, dict(compute="float32"), width=8
    )
