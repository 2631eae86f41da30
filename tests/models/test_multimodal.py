"""The multimodal model from configs: its heads, several texts a row, shared trunks, hidden patches,
and what it refuses.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config
from mmjax.config import ConfigError, UserError
from mmjax.describe import explain
from mmjax.models import make_model
from mmjax.models.encoders.image import normalise, patchify

RNG = np.random.default_rng(0)
BATCH = dict(
  image=dict(pixels=RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)),
  text=dict(
    tokens=RNG.integers(5, 60, (3, 6)).astype(np.int32),
    mask=np.arange(6) < np.array([[2], [6], [4]]),
  ),
)
BLOCK = dict(depth=1, heads=2)
ALL = dict(
  name="multitask",
  fusion=dict(kind="merged_attention", **BLOCK),
  decoder=BLOCK,
  match=True,
  masked_text=True,
  masked_patches=("image",),
)


def config(classes=5, image=None, **model):
  c = mmjax.config.base()
  c.model = dict(
    dict(width=16),
    **model,
    encoders=dict(
      image=dict(dict(kind="vit", patch=8, **BLOCK), **(image or {})),
      text=dict(kind="transformer", **BLOCK),
    ),
  )
  (
    c.data.image.size,
    c.data.text.length,
    c.data.text.vocab_size,
    c.precision.compute,
    c.data.classes,
  ) = 16, 6, 64, "float32", classes
  c.data.text.tokenizer = "none"
  return mmjax.config.resolve(c)


def build(**settings):
  """(model, the parameters that `init` makes, with random numbers: nothing is compiled for
  them).
  """
  model = make_model(config(**settings))
  rng = np.random.default_rng(1)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), BATCH))
  return model, jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


whole = functools.cache(lambda: build(**ALL))


def apply(method, *args, built=None, **kwargs):
  model, params = built or whole()
  *args, batch = args
  return jax.jit(lambda p, b: model.apply(p, *args, b, method=method, **kwargs))(params, batch)


def names(params):
  return {"/".join(k) for k in flax.traverse_util.flatten_dict(params["params"])}


def test_every_parameter_is_made_at_the_start_and_used_by_a_method():
  model, params = whole()

  def loss(params):
    def run(method, *args, batch=BATCH, **kwargs):
      return model.apply(params, *args, batch, method=method, **kwargs)

    hidden = {
      **BATCH,
      "image": {**BATCH["image"], "patch_mask": np.array([[1, 0, 0, 1]] * 3, bool)},
    }
    states, table, bias = run("masked_token_head", "text", context=("image",))
    decoded, words = run("decode", ("image",))
    out = [
      run("embedding", "image"),
      run("embedding", "text"),
      run("classify", ("image", "text")),
      run("match", ("image", "text")),
      jnp.einsum("bld,vd->blv", states, table) + bias,
      jnp.einsum("bld,vd->blv", decoded, words),
      run("reconstruct", "image", batch=hidden, context=("text",)),
      model.apply(params, method="temperature")[0],
    ]
    return sum(jnp.sin(3 * x + 1).sum() for x in out)

  gradient = jax.jit(jax.grad(loss))(params)
  idle = [
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient)
    if not np.any(g)
  ]
  assert not idle and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_methods_return_the_shapes_of_the_contract():
  assert apply("fuse", ("image", "text"), BATCH).tokens.shape == (3, 10, 16)
  assert apply("classify", ("image",), BATCH).shape == (3, 5) and apply(
    "match", ("image", "text"), BATCH
  ).shape == (3,)
  hidden, table, bias = apply("masked_token_head", "text", BATCH, context=("image",))
  assert hidden.shape == (3, 6, 16) and bias.shape == (64,)
  np.testing.assert_array_equal(table, whole()[1]["params"]["text"]["embedding"])
  np.testing.assert_array_equal(
    jax.jit(lambda p: whole()[0].apply(p, method="table"))(whole()[1]), table
  )
  assert apply("reconstruct", "image", BATCH).shape == (3, 4, 192)
  assert set(whole()[0].shared_methods) == {"table", "temperature", "discriminate"}


def test_a_readout_takes_its_own_tokens_out_of_the_fusion():
  """Text tokens see the picture only through the context, and come from behind the picture's
  tokens.
  """
  other = {**BATCH, "image": dict(pixels=255 - BATCH["image"]["pixels"])}
  alone, seen = (
    (lambda b: apply("masked_token_head", "text", b)[0]),
    (lambda b: apply("masked_token_head", "text", b, context=("image",))[0]),
  )
  np.testing.assert_array_equal(alone(BATCH), alone(other))
  assert np.abs(seen(BATCH) - seen(other)).max() > 1e-3
  tokens = np.where(np.arange(6) == 1, 7, BATCH["text"]["tokens"]).astype(np.int32)
  swapped = {**BATCH, "text": dict(BATCH["text"], tokens=tokens)}
  assert np.abs(seen(BATCH) - seen(swapped))[:, 1].min(-1).max() > 0


def test_hidden_patches_do_not_reach_the_model_and_targets_are_the_pixels():
  mask = np.array([[1, 0, 0, 1]] * 3, bool)

  def view(pixels):
    return {**BATCH, "image": dict(pixels=pixels, patch_mask=mask)}

  pixels = BATCH["image"]["pixels"]
  changed = pixels.copy()
  changed[:, :8, :8] = 0  # the first patch
  np.testing.assert_array_equal(
    apply("reconstruct", "image", view(pixels)), apply("reconstruct", "image", view(changed))
  )
  changed[:, :8, 8:] = 0  # the second, which is seen
  assert np.any(
    apply("reconstruct", "image", view(pixels)) != apply("reconstruct", "image", view(changed))
  )
  values, real = apply("patches", "image", BATCH)
  np.testing.assert_allclose(
    values, patchify(normalise(pixels, (0.5,) * 3, (0.5,) * 3, jnp.float32), 8), atol=1e-6
  )
  assert real.all()
  built = build(**ALL, image=dict(pooling="class"))
  # Without the class token.
  assert apply("reconstruct", "image", view(pixels), built=built).shape == (3, 4, 192)


def test_several_texts_a_row_are_rows_beside_repeated_pictures():
  many = RNG.integers(5, 60, (3, 2, 6)).astype(np.int32)
  mask = np.arange(6) < RNG.integers(1, 7, (3, 2, 1))
  several = {**BATCH, "text": dict(tokens=many, mask=mask, present=np.array([True, True, False]))}
  got = apply("classify", ("image", "text"), several)
  assert got.shape == (6, 5)
  for k in range(2):
    one = {
      **BATCH,
      "text": dict(tokens=many[:, k], mask=mask[:, k], present=several["text"]["present"]),
    }
    np.testing.assert_allclose(got[k::2], apply("classify", ("image", "text"), one), atol=1e-5)
    np.testing.assert_allclose(
      apply("decode", ("image",), several)[0][k::2], apply("decode", ("image",), one)[0], atol=1e-5
    )
    np.testing.assert_allclose(
      apply("masked_token_head", "text", several, context=("image",))[0][k::2],
      apply("masked_token_head", "text", one, context=("image",))[0],
      atol=1e-5,
    )


def test_a_decoder_predicts_from_what_came_before():
  states = apply("decode", ("image",), BATCH)[0]
  later = {
    **BATCH,
    "text": dict(
      BATCH["text"], tokens=np.where(np.arange(6) >= 3, 9, BATCH["text"]["tokens"]).astype(np.int32)
    ),
  }
  np.testing.assert_allclose(apply("decode", ("image",), later)[0][:, :4], states[:, :4], atol=1e-6)
  assert np.abs(apply("decode", ("image",), later)[0][1, 4:] - states[1, 4:]).max() > 1e-3
  assert np.abs(apply("decode", (), BATCH)[0] - states).max() > 1e-3
  missing = {**BATCH, "image": dict(BATCH["image"], present=np.array([False, True, True]))}
  np.testing.assert_allclose(
    apply("decode", ("image",), missing)[0][0], apply("decode", (), BATCH)[0][0], atol=1e-5
  )


def test_a_shared_trunk_holds_the_only_blocks():
  built = build(name="multitask", shared=True)
  blocks = {name for name in names(built[1]) if "/layers/" in name}
  assert blocks and all(name.startswith("trunk/layers/") for name in blocks)
  gradient = jax.jit(
    jax.grad(lambda p, m: built[0].apply(p, m, BATCH, method="embedding")[:, 0].sum()),
    static_argnums=1,
  )
  assert all(
    np.any(gradient(built[1], m)["params"]["trunk"]["layers"]["mlp"]["up"]["kernel"])
    for m in ("image", "text")
  )
  own = build(name="multitask")  # the same numbers where each has its own copy of the trunk
  params = dict(
    own[1]["params"],
    image=dict(built[1]["params"]["image"], layers=built[1]["params"]["trunk"]["layers"]),
    text=dict(built[1]["params"]["text"], layers=built[1]["params"]["trunk"]["layers"]),
    **{k: v for k, v in built[1]["params"].items() if k.endswith("_projection")},
  )
  for m in ("image", "text"):
    np.testing.assert_allclose(
      apply("embedding", m, BATCH, built=built),
      apply("embedding", m, BATCH, built=(own[0], {"params": params})),
      atol=1e-6,
    )
  with pytest.raises(UserError, match=r"model\.shared: the encoders image and text differ"):
    build(name="multitask", shared=True, image=dict(depth=2))


def test_parts_that_a_config_leaves_out_have_no_parameters():
  _, params = build(name="captioner", decoder=BLOCK, classes=0)
  assert {name.split("/")[0] for name in names(params)} == {
    "image",
    "text",
    "decoder",
    "image_memory",
  }
  _, params = build(name="fusion_encoder", fusion=dict(kind="decision"))
  assert {name.split("/")[0] for name in names(params)} == {
    "image",
    "text",
    "fusion",
    "image_projection",
    "text_projection",
    "log_scale",
  }
  built = build(name="multitask", joint=False)
  assert {"image_classifier/kernel", "text_classifier/kernel"} < names(
    built[1]
  ) and "log_scale" not in names(built[1])
  assert apply("classify", ("text",), BATCH, built=built).shape == (3, 5)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(name="fusion_encoder"), r"model\.fusion is missing"),
    (dict(name="captioner"), r"model\.decoder is missing"),
    (dict(name="multitask", match=True), r"model\.match needs a fusion"),
    (
      dict(name="multitask", masked_patches=("audio",)),
      r'model\.masked_patches names "audio", but model\.encoders has image, text',
    ),
  ],
)
def test_models_that_cannot_be_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    make_model(config(**settings))


def test_methods_that_a_model_lacks_say_what_to_set():
  built = build(name="multitask", classes=0, joint=False)
  for method, args, message in (
    ("classify", (("image",),), "set data.classes"),
    ("match", (("image", "text"),), "model.match"),
    ("fuse", (("image",),), "give model.fusion"),
    ("masked_token_head", ("text",), "model.masked_text"),
    ("reconstruct", ("image",), "model.masked_patches"),
    ("decode", (("image",),), "give model.decoder"),
    ("embedding", ("image",), "model.joint"),
  ):
    assert method not in built[0].methods
    with pytest.raises(UserError, match=message):
      jax.eval_shape(lambda p, m=method, a=args: built[0].apply(p, *a, BATCH, method=m), built[1])
  crossing = build(
    name="fusion_encoder", fusion=dict(kind="cross_attention", **BLOCK), masked_patches=("image",)
  )
  with pytest.raises(UserError, match="image tokens do not see text"):
    apply("reconstruct", "image", BATCH, built=crossing, context=("text",))
  assert apply("reconstruct", "image", BATCH, built=crossing).shape == (3, 4, 192)


def test_nested_entries_are_resolved_like_others():
  resolved = config(**ALL)
  assert resolved.model.fusion.dropout == 0.0 and resolved.model.decoder.depth == 1
  assert mmjax.config.from_json(mmjax.config.to_json(resolved)) == resolved
  assert (
    explain("model.fusion.depth", resolved)
    == "blocks. (int, at least 1 and at most 1_000; default 2)"
  )
  with pytest.raises(ConfigError, match=r"unknown key model\.fusion\.wdth\. Did you mean 'width'"):
    config(name="multitask", fusion=dict(kind="concat", wdth=3))
  with pytest.raises(
    ConfigError, match=r"model\.fusion\.kind is 'conct', which is no fusion\. Did you mean 'concat'"
  ):
    config(name="multitask", fusion=dict(kind="conct"))
  with pytest.raises(ConfigError, match=r"unknown key model\.fusion"):
    config(name="dual_encoder", fusion=dict(kind="concat"))
