"""GPT-2 (model_type "gpt2", Radford et al. 2019): learned positions, layer norms, biases
everywhere. Its dense layers are stored as ours, input first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.interop.huggingface import decoders, mapping, single
from mmjax.interop.huggingface.clip import ACTIVATIONS as COMMON
from mmjax.interop.huggingface.decoders import files as files
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models import make_model

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "GPT2Tokenizer", "", "transformer."
ARCHITECTURE, PAD, MASK_PADDING = "GPT2LMHeadModel", "<|endoftext|>", True
ARCHITECTURES = ((ARCHITECTURE, "GPT2Model"),)
BESIDE = ("config.json", decoders.GENERATION)
ACTIVATIONS = {**COMMON, "silu": "silu", "swish": "silu"}

# What transformers assumes where config.json is silent.
FACTS = dict(
  vocab_size=50_257,
  n_positions=1024,
  n_embd=768,
  n_layer=12,
  n_head=12,
  n_inner=None,
  activation_function="gelu_new",
  layer_norm_epsilon=1e-5,
  scale_attn_weights=True,
  scale_attn_by_inverse_layer_idx=False,
  add_cross_attention=False,
  tie_word_embeddings=True,
  bos_token_id=50_256,
  eos_token_id=50_256,
  pad_token_id=None,
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The settings of a config.json; see decoders.py."""
  f = {**FACTS, **facts}
  single.only(f, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
  return decoders.settings(
    dict(f, max_position_embeddings=f["n_positions"]),
    tensors,
    table="wte.weight",
    width=f["n_embd"],
    depth=f["n_layer"],
    heads=f["n_head"],
    mlp=f["n_inner"] or 4 * f["n_embd"],
    positions="learned",
    norm_kind="layer",
    bias=True,
    activation=single.activation(f, ACTIVATIONS, "activation_function"),
    eps=f["layer_norm_epsilon"],
    block={} if f["scale_attn_weights"] else dict(scale=1.0),
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a GPT2LMHeadModel."""
  model = make_model(config)
  b = model.config

  def dense(ours: str, theirs: str) -> list[Rule]:
    names = dict(kernel="weight", bias="bias")
    return [
      mapping.same(f"layers/{ours}/{a}", f"h.{{i}}.{theirs}.{b_}", b.depth)
      for a, b_ in names.items()
    ]

  def shaped(ours: str, theirs: str, shape: tuple[int, ...], flat: tuple[int, ...]) -> Rule:
    return Rule(
      f"layers/attention/{ours}",
      (f"h.{{i}}.attn.{theirs}",),
      lambda t: t[0].reshape(shape),
      lambda p: [p.reshape(flat)],
      b.depth,
    )

  parts = (3, b.heads, b.channels)
  return [
    mapping.same("embedding", "wte.weight"),
    mapping.same("position", "wpe.weight"),
    *([] if model.tied else [mapping.same("output", decoders.HEAD)]),
    shaped("qkv/kernel", "c_attn.weight", (b.width, *parts), (b.width, -1)),
    shaped("qkv/bias", "c_attn.bias", parts, (-1,)),
    shaped("out/kernel", "c_proj.weight", (b.heads, b.channels, b.width), (-1, b.width)),
    shaped("out/bias", "c_proj.bias", (b.width,), (-1,)),
    *dense("mlp/up", "mlp.c_fc"),
    *dense("mlp/down", "mlp.c_proj"),
    *mapping.norm("layers/attention_norm", "h.{i}.ln_1", b.depth),
    *mapping.norm("layers/mlp_norm", "h.{i}.ln_2", b.depth),
    *mapping.norm("norm", "ln_f"),
  ]


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  return decoders.refusals(config, settings, facts)


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json of a GPT2LMHeadModel."""
  model = make_model(config)
  b = model.config
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return dict(
    model_type="gpt2",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    vocab_size=model.vocab_size,
    n_positions=model.length,
    n_embd=b.width,
    n_layer=b.depth,
    n_head=b.heads,
    n_inner=b.mlp,
    activation_function=names.get(b.activation, "gelu_new"),
    layer_norm_epsilon=b.eps,
    scale_attn_weights=b.scale != 1.0,
    tie_word_embeddings=model.tied,
    resid_pdrop=b.dropout,
    embd_pdrop=b.dropout,
    attn_pdrop=0.0,
    **decoders.token_facts(config, special),
  )
