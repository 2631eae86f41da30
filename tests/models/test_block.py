"""Every setting of the block against transformers' own models with the same weights, positions
against its rotary embeddings, and the cache against the whole text.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config
from mmjax.config import ConfigError, UserError
from mmjax.models import make_model
from mmjax.models.block import BlockConfig
from mmjax.models.positions import Rotary, rotate
from mmjax.models.stack import Stack

# The compiler takes longer than all runs.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
LENGTH = 12
SMALL = dict(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=11,
  max_position_embeddings=64,
  attn_implementation="eager",
  pad_token_id=0,
)
LLAMA = BlockConfig(
  width=16,
  depth=3,
  heads=4,
  mlp=24,
  key_value_heads=2,
  norm_kind="rms",
  activation="swiglu",
  causal=True,
  bias=False,
  rotary=Rotary(),
)
STRETCHED = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)
# model: (settings of its config, ours)
FAMILIES = {
  "Llama": (
    dict(rope_parameters=STRETCHED, rms_norm_eps=1e-6),
    dataclasses.replace(LLAMA, rotary=Rotary(scaling="llama3", factor=4.0, original=8)),
  ),
  "Mistral": (
    dict(sliding_window=3, head_dim=4, rms_norm_eps=1e-6),
    dataclasses.replace(LLAMA, windows=(3,)),
  ),
  "Qwen2": (dict(rms_norm_eps=1e-6), dataclasses.replace(LLAMA, qkv_bias=True)),
  "Qwen3": (
    dict(head_dim=6, rms_norm_eps=1e-6),
    dataclasses.replace(LLAMA, head_size=6, qk_norm=True),
  ),
  "Gemma2": (
    dict(
      head_dim=6,
      sliding_window=3,
      query_pre_attn_scalar=9,
      attn_logit_softcapping=2.0,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      rms_norm_eps=1e-6,
    ),
    dataclasses.replace(
      LLAMA,
      head_size=6,
      norm="both",
      activation="geglu_tanh",
      scale=9**-0.5,
      soft_cap=2.0,
      windows=(3, 0),
    ),
  ),
}


def layer_weights(layer, config, gemma):
  """Our parameters of one of their layers."""

  def tensor(x):
    return x.detach().numpy()

  def heads(x, n):
    return tensor(x.weight).T.reshape(config.width, n, config.channels)

  def norm(x):
    return dict(scale=tensor(x.weight) + (1 if gemma else 0))

  at, mlp = layer.self_attn, layer.mlp
  attention = dict(
    query=dict(kernel=heads(at.q_proj, config.heads)),
    key_value=dict(
      kernel=np.stack([heads(x, config.groups) for x in (at.k_proj, at.v_proj)], axis=1)
    ),
    out=dict(kernel=tensor(at.o_proj.weight).T.reshape(config.heads, config.channels, -1)),
  )
  if config.has_bias("qkv"):
    shape = (config.groups, config.channels)
    attention["query"]["bias"] = tensor(at.q_proj.bias).reshape(config.heads, -1)
    attention["key_value"]["bias"] = np.stack(
      [tensor(x.bias).reshape(shape) for x in (at.k_proj, at.v_proj)]
    )
  if config.qk_norm:
    attention |= dict(query_norm=norm(at.q_norm), key_norm=norm(at.k_norm))
  found = dict(
    attention=attention,
    attention_norm=norm(layer.input_layernorm),
    mlp=dict(
      up=dict(kernel=np.concatenate([tensor(x.weight).T for x in (mlp.gate_proj, mlp.up_proj)], 1)),
      down=dict(kernel=tensor(mlp.down_proj.weight).T),
    ),
  )
  if config.norm == "both":
    return found | dict(
      attention_post_norm=norm(layer.post_attention_layernorm),
      mlp_norm=norm(layer.pre_feedforward_layernorm),
      mlp_post_norm=norm(layer.post_feedforward_layernorm),
    )
  return found | dict(mlp_norm=norm(layer.post_attention_layernorm))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_equals_the_layers_of_transformers(family):
  import torch
  import transformers

  settings, config = FAMILIES[family]
  torch.manual_seed(0)
  theirs = getattr(transformers, f"{family}Config")(**SMALL, **settings)
  model = getattr(transformers, f"{family}Model")(theirs).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # so that biases and scales matter
      parameter.add_(0.3 * torch.randn_like(parameter))
  x = np.random.default_rng(0).standard_normal((2, LENGTH, 16)).astype(np.float32)
  seen = {}
  model.norm.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
  with torch.no_grad():
    model(inputs_embeds=torch.from_numpy(x), use_cache=False)
  want = seen["out"].numpy()
  layers = [layer_weights(layer, config, family == "Gemma2") for layer in model.layers]
  layers = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
  params = {"params": {"layers": layers}}
  stack = Stack(config)
  made = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
  got = jax.jit(stack.apply, compiler_options=QUICK)(params, x)
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


ROPES = {
  "none": (dict(rope_type="default"), Rotary()),
  "linear": (dict(rope_type="linear", factor=3.0), Rotary(scaling="linear", factor=3.0)),
  "dynamic": (
    dict(rope_type="dynamic", factor=2.0),
    Rotary(scaling="dynamic", factor=2.0, original=64),
  ),
  "llama3": (STRETCHED, Rotary(scaling="llama3", factor=4.0, original=8)),
  "yarn": (
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    Rotary(scaling="yarn", factor=4.0, original=32),
  ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_angles_equal_those_of_transformers(name):
  import torch
  from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

  theirs, ours = ROPES[name]
  config = LlamaConfig(**SMALL, head_dim=16, rope_parameters=dict(theirs, rope_theta=10_000.0))
  positions = np.arange(100)[None]
  want = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
  for got, other in zip(ours.angles(jnp.asarray(positions), 16), want, strict=True):
    np.testing.assert_allclose(got, other[..., :8], atol=3e-5)


def test_rotary_on_several_axes_and_on_a_share_of_the_channels():
  positions = np.random.default_rng(0).integers(0, 50, (2, 5, 3))
  for interleaved, axes in ((False, [0, 1, 1, 1, 2, 2]), (True, [0, 1, 2, 0, 1, 2])):
    sections = tuple(np.bincount(axes))
    rotary = Rotary(share=0.75, sections=sections, interleaved=interleaved)
    cos, sin = rotary.angles(jnp.asarray(positions), 16)
    angles = positions[..., axes] * 10_000.0 ** (-np.arange(6) / 6)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    x = np.random.default_rng(1).standard_normal((2, 5, 1, 16)).astype(np.float32)
    got = rotate(jnp.asarray(x), (cos, sin))
    pairs = (x[..., 0, :6] + 1j * x[..., 0, 6:12]) * np.exp(1j * angles)
    np.testing.assert_allclose(got[..., 0, :6], pairs.real, atol=1e-4)
    np.testing.assert_allclose(got[..., 0, 6:12], pairs.imag, atol=1e-4)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])


def test_rows_begin_at_places_of_their_own_in_a_cache():
  """One prompt read at once, another behind two hidden places: the same hidden states, token by
  token.
  """
  config = dataclasses.replace(LLAMA, windows=(4, 0), depth=2)
  stack = Stack(config)
  x = np.random.default_rng(0).standard_normal((1, 6, 16)).astype(np.float32)
  params = nn.unbox(stack.init(jax.random.key(0), x))
  want = stack.apply(params, x)
  start, x = jnp.array([0, 2]), jnp.tile(x, (2, 1, 1))
  keys = jnp.arange(9) >= start[:, None]

  @jax.jit
  def extend(x, at, cache):
    positions = jnp.broadcast_to(at + jnp.arange(x.shape[1]), x.shape[:2])
    return stack.apply(
      params, x, start + at, cache, keys=keys, positions=positions, method="extend"
    )

  cache = stack.apply(params, 2, 9, method="init_cache")
  first, cache = extend(x[:, :4], 0, cache)
  np.testing.assert_allclose(first, np.tile(want[:, :4], (2, 1, 1)), atol=1e-5)
  for i in (4, 5):
    hidden, cache = extend(x[:, i : i + 1], i, cache)
    np.testing.assert_allclose(hidden, np.tile(want[:, i : i + 1], (2, 1, 1)), atol=1e-5)


def test_a_kind_takes_any_setting_of_its_blocks():
  c = mmjax.config.base()
  c.data.text.tokenizer = "none"
  text = dict(kind="transformer", depth=2, heads=4)
  text["block"] = dict(key_value_heads=2, windows=[3, 0], rotary=dict(theta=500.0), mlp_bias=False)
  c.model = dict(name="encoder", width=16, encoders=dict(text=text))
  config = make_model(mmjax.config.resolve(c)).encoders["text"].config
  assert (config.groups, config.windows, config.rotary.theta) == (2, (3, 0), 500.0)
  assert config.has_bias("qkv") and not config.has_bias("mlp")
  for block, error in (
    (dict(key_value_head=2), "block.key_value_head. Did you mean 'key_value_heads'"),
    (dict(heads=2), "block.heads. It is model.encoders.text.heads"),
    (dict(rotary=dict(thet=1.0)), "block.rotary.thet. Did you mean 'theta'"),
    (dict(rotary=dict(theta=-1.0)), "block.rotary.theta is -1.0, but must be above 0"),
    (3, "block must be a dict of settings, not 3"),
  ):
    c.model.encoders.text = dict(text, block=block)
    with pytest.raises(ConfigError, match=error):
      mmjax.config.resolve(c)


def test_settings_that_contradict_each_other_are_refused():
  with pytest.raises(UserError, match="4 heads are no multiple of 3 key-value heads"):
    dataclasses.replace(LLAMA, key_value_heads=3)
  with pytest.raises(UserError, match="'yarn' needs `original`"):
    Rotary(scaling="yarn")
  with pytest.raises(UserError, match="sections .* do not add up to 4 pairs"):
    Rotary(sections=(1, 1)).angles(jnp.zeros((1, 2), jnp.int32), 8)
