"""Encoders and the dual encoder, made from configs as users make them."""

from __future__ import annotations

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config
from mmjax.config import UserError
from mmjax.models import make_model
from mmjax.models.encoders.image import drop_tokens, neighbours, normalise, patchify

RNG = np.random.default_rng(0)
BATCH = dict(
  image=dict(pixels=RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)),
  text=dict(
    tokens=RNG.integers(5, 60, (3, 6)).astype(np.int32),
    mask=np.arange(6) < np.array([[2], [6], [4]]),
  ),
)


def build(image=None, text=None, compute="float32", **model):
  c = mmjax.config.base()
  c.model = dict(
    name="dual_encoder",
    **dict(dict(width=16), **model),
    encoders=dict(
      image=dict(dict(kind="vit", patch=8, depth=2, heads=2), **(image or {})),
      text=dict(dict(kind="transformer", depth=1, heads=2), **(text or {})),
    ),
  )
  c.data.image.size, c.data.text.length, c.data.text.vocab_size, c.precision.compute = (
    16,
    6,
    64,
    compute,
  )
  return make_model(mmjax.config.resolve(c))


def start(model, batch=BATCH):
  return nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))


def encode(model, variables, modality, batch, method="encode", **kwargs):
  return jax.jit(lambda v, b: model.apply(v, modality, b, method=method, **kwargs))(
    variables, batch
  )


def test_parameter_names_and_axes_are_the_contract():
  model = build(image=dict(pooling="class"), bias=True)
  spec = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), BATCH))["params"]
  flat = {"/".join(k): tuple(v) for k, v in flax.traverse_util.flatten_dict(spec).items()}
  block = {
    "attention/qkv/kernel": ("embed", "qkv", "heads", "kv"),
    "attention/qkv/bias": ("qkv", "heads", "kv"),
    "attention/out/kernel": ("heads", "kv", "embed"),
    "attention/out/bias": ("embed",),
    "attention_norm/scale": ("embed",),
    "attention_norm/bias": ("embed",),
    "mlp_norm/scale": ("embed",),
    "mlp_norm/bias": ("embed",),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/up/bias": ("mlp",),
    "mlp/down/kernel": ("mlp", "embed"),
    "mlp/down/bias": ("embed",),
  }
  want = {
    f"{m}/layers/{name}": ("layers", *axes)
    for m in ("image", "text")
    for name, axes in block.items()
  }
  want |= {
    "image/class": ("embed",),
    "image/patch/kernel": ("patch", "embed"),
    "image/patch/bias": ("embed",),
    "image/position": ("position", "embed"),
    "text/position": ("position", "embed"),
    "text/embedding": ("vocab", "embed"),
    "image_projection/kernel": ("embed", "joint"),
    "text_projection/kernel": ("embed", "joint"),
    "log_scale": (),
    "bias": (),
  }
  want |= {f"{m}/norm/{x}": ("embed",) for m in ("image", "text") for x in ("scale", "bias")}
  assert flat == want


def test_embeddings_are_unit_float32_and_the_temperature_is_clipped():
  model = build(compute="bfloat16", scale_init=10.0, scale_max=10.0, bias=True, bias_init=-3.0)
  variables = start(model)
  variables["params"]["log_scale"] += 1  # as an update may leave it
  for z in jax.jit(model.apply)(variables, BATCH).values():
    assert z.dtype == jnp.float32 and z.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-5)
  scale, bias = model.apply(variables, method="temperature")
  np.testing.assert_allclose((scale, bias), (10, -3), rtol=1e-5)
  gradient = jax.grad(lambda v: model.apply(v, method="temperature")[0])(variables)
  # A scale at its limit can come down again.
  np.testing.assert_allclose(gradient["params"]["log_scale"], 10, rtol=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    dict(pooling="class"),
    dict(pooling="attention"),
    dict(pooling="last", positions="sincos"),
    dict(stem="convolution"),
    dict(norm="post", final_norm=False, input_norm=True, bias=False),
  ],
  ids=str,
)
def test_image_settings_train_every_parameter(settings):
  model = build(image=settings)
  variables = start(model)

  def loss(v):
    return (model.apply(v, "image", BATCH, method="embedding") * jnp.arange(16.0)).sum()

  gradient = jax.jit(jax.grad(loss))(variables)["params"]["image"]
  assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "pooling", ["last", "final", "eos", "highest", "class", "mean", "attention"]
)
def test_text_pooling(pooling):
  model = build(text=dict(pooling=pooling, eos_id=7))
  tokens = np.array([[9, 7, 8, 7, 0, 0], [9, 50, 9, 9, 9, 9], [3, 7, 0, 0, 0, 0]], np.int32)
  mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6, [0] * 6], bool)
  variables = start(model)
  out = encode(model, variables, "text", dict(text=dict(tokens=tokens, mask=mask)))
  rows = {"last": (3, 5), "final": (5, 5), "eos": (1, 5), "highest": (0, 1), "class": (0, 0)}
  if pooling in rows:
    for row, at in enumerate(rows[pooling]):
      np.testing.assert_array_equal(out.pooled[row], out.tokens[row, at])
  if pooling == "mean":
    np.testing.assert_allclose(out.pooled[0], out.tokens[0, :4].mean(0), atol=1e-6)
  assert not np.any(out.pooled[2])  # a row without a real token
  hidden = dict(tokens=np.where(mask, tokens, 11), mask=mask)
  if pooling != "final":
    np.testing.assert_allclose(
      encode(model, variables, "text", dict(text=hidden)).pooled, out.pooled, atol=1e-6
    )


def test_missing_modality_gives_zeros_and_no_gradient():
  model = build(image=dict(pooling="attention"))
  batch = dict(
    image=dict(BATCH["image"], present=np.array([True, False, True])), text=BATCH["text"]
  )
  variables = start(model, batch)
  z = encode(model, variables, "image", batch, "embedding")
  assert not np.any(z[1]) and np.all(np.isfinite(z)) and np.any(z[0])

  def only_missing(v):
    return (model.apply(v, batch)["image"][1] * jnp.arange(16.0)).sum()

  assert not any(np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(only_missing))(variables)))


@pytest.mark.parametrize("function", ("none", "relu"))
def test_a_bias_of_the_projection_gives_a_missing_modality_no_embedding(function):
  model = build(projection_bias=True, projection_function=function)
  batch = dict(image=dict(BATCH["image"], present=np.array([True, False, True])))
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), BATCH))
  variables = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)
  out = encode(model, variables, "image", batch, method="embedding")
  assert np.asarray(out).any(1).tolist() == [True, False, True]


def test_padding_is_seen_only_when_the_config_says_so():
  c = mmjax.config.base()
  c.model = dict(
    width=16, encoders=dict(text=dict(kind="transformer", depth=1, heads=2, pooling="final"))
  )
  c.data.text.update(length=6, vocab_size=64, mask_padding=False)
  model = make_model(mmjax.config.resolve(c))
  variables = start(model, BATCH)
  out = encode(model, variables, "text", BATCH)
  assert out.mask.all()
  changed = dict(
    text=dict(BATCH["text"], tokens=np.where(BATCH["text"]["mask"], BATCH["text"]["tokens"], 1))
  )
  assert not np.allclose(out.pooled[0], encode(model, variables, "text", changed).pooled[0])


def test_other_picture_sizes_interpolate_positions():
  model = build()
  variables = start(model)
  larger = RNG.integers(0, 256, (2, 32, 24, 3), dtype=np.uint8)
  out = encode(model, variables, "image", dict(image=dict(pixels=larger)))
  assert out.tokens.shape == (2, 12, 16)
  with pytest.raises(UserError, match="smaller than one patch"):
    encode(model, variables, "image", dict(image=dict(pixels=larger[:, :4])))


def test_patch_dropout_keeps_a_share_in_order_and_only_in_training():
  x = jnp.arange(40.0).reshape(2, 20, 1)
  kept = drop_tokens(x, 0.5, jax.random.key(0))[..., 0]
  assert (
    kept.shape == (2, 10)
    and np.all(np.diff(kept) > 0)
    and not np.array_equal(kept[0] + 20, kept[1])
  )
  model = build(image=dict(patch_dropout=0.5, pooling="class"))
  variables = start(model)

  def shape(**k):
    return encode(model, variables, "image", BATCH, **k).tokens.shape[1]

  assert shape() == 5 and shape(train=True, rngs={"dropout": jax.random.key(0)}) == 3


def test_patches_are_a_convolution():
  pixels = RNG.random((2, 8, 8, 3)).astype(np.float32)
  kernel = RNG.random((4, 4, 3, 5)).astype(np.float32)

  def convolve(x, k, stride, pad):
    return jax.lax.conv_general_dilated(
      x, k, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  np.testing.assert_allclose(
    patchify(pixels, 4) @ kernel.reshape(-1, 5),
    convolve(pixels, kernel, 4, "VALID").reshape(2, 4, 5),
    rtol=1e-5,
  )
  small = kernel[:3, :3]
  np.testing.assert_allclose(
    neighbours(pixels) @ small.reshape(-1, 5),
    convolve(pixels, small, 2, [(1, 1)] * 2)[:, :4, :4],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    normalise(np.full((1, 3), 255, np.uint8), (0.5, 0.4, 0), (0.5, 0.2, 1), jnp.float32),
    [[1, 3, 1]],
    rtol=1e-6,
  )


def test_equivariant_to_the_order_of_the_batch():
  model = build(image=dict(pooling="attention"), text=dict(causal=True, pooling="mean"))
  variables = start(model)
  order = np.array([2, 0, 1])
  shuffled = jax.tree.map(lambda x: x[order], BATCH)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[order], b, atol=1e-5),
    jax.jit(model.apply)(variables, BATCH),
    jax.jit(model.apply)(variables, shuffled),
  )


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(image=dict(heads=3)), r"model\.encoders\.image: width 16 is not divisible by 3 heads"),
    (dict(unprojected=("audio",)), 'names "audio", but model.encoders has image, text'),
    (dict(image=dict(kernel="cudnn")), "'cudnn' runs on gpu, not on cpu"),
    (
      dict(image=dict(width=32, heads=2), unprojected=("image",)),
      "32 channels and model.width is 16",
    ),
    (dict(image=dict(stem="convolution", patch=12)), "not divisible|power of two"),
  ],
  ids=str,
)
def test_mistakes_are_named(change, says):
  with pytest.raises(UserError, match=says):
    start(build(**change))


def test_text_longer_than_the_model_is_refused():
  model = build()
  with pytest.raises(UserError, match="text of 9 tokens for a model of 6 positions"):
    jax.eval_shape(
      model.init,
      jax.random.key(0),
      dict(BATCH, text=dict(tokens=np.zeros((1, 9), np.int32), mask=np.ones((1, 9), bool))),
    )


def test_initial_activations_are_of_order_one():
  """Neither tower starts saturated or dead: standard deviations of pooled outputs and spread of
  embeddings.
  """
  model = build(image=dict(depth=4))
  out = {m: encode(model, start(model), m, BATCH).pooled for m in ("image", "text")}
  assert all(0.1 < float(x.std()) < 3 for x in out.values())
