"""The decoder of Whisper (model_type "whisper", Radford et al. 2022, arXiv:2212.04356): its settings, its weights, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.clip import ACTIVATIONS
from mmjax.interop.huggingface.mapping import Rule

# What transformers assumes where config.json is silent.
DEFAULTS = dict(vocab_size=51865, d_model=384, decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536,
                max_target_positions=448, activation_function="gelu", scale_embedding=False, tie_word_embeddings=True,
                decoder_start_token_id=50257, eos_token_id=50256, pad_token_id=50256)
EPS = 1e-5  # torch's LayerNorm; config.json does not say


def settings(facts: Mapping[str, Any]) -> dict[str, Any]:
  """{"decoder": settings of model.decoder, "text": of data.text, "generation": bos_id, eos_id, pad_id} of a config.json.

  Raises UserError: the config has something that our decoder cannot express.
  """
  known = {**DEFAULTS, **facts}
  if known["activation_function"] not in ACTIVATIONS:
    raise UserError(f"activation_function {known['activation_function']!r} is not supported; there are: {', '.join(ACTIVATIONS)}")
  for key, value in (("scale_embedding", False), ("tie_word_embeddings", True)):
    if known[key] is not value:
      raise UserError(f"{key} is {known[key]!r}, but only {value} is supported")
  decoder = dict(kind="decoder", width=known["d_model"], depth=known["decoder_layers"], heads=known["decoder_attention_heads"],
                 mlp=known["decoder_ffn_dim"], activation=ACTIVATIONS[known["activation_function"]], eps=EPS, bias=True, cross=True,
                 positions="learned")
  return dict(decoder=decoder, text=dict(vocab_size=known["vocab_size"], length=known["max_target_positions"]),
              generation=dict(bos_id=known["decoder_start_token_id"], eos_id=known["eos_token_id"], pad_id=known["pad_token_id"]))


def facts(decoder: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
  """The decoder's keys of config.json, from model.decoder (width, heads, mlp filled in) and data.text.

  Raises UserError: Whisper's decoder is not like this one.
  """
  wrong = [f"model.decoder.{key} = {decoder[key]!r} (needs {value!r})"
           for key, value in (("positions", "learned"), ("bias", True), ("cross", True), ("eps", EPS)) if decoder[key] != value]
  if wrong:
    raise UserError(f"transformers' Whisper cannot express {', '.join(wrong)}")
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return dict(vocab_size=text["vocab_size"], d_model=decoder["width"], decoder_layers=decoder["depth"],
              decoder_attention_heads=decoder["heads"], decoder_ffn_dim=decoder["mlp"], max_target_positions=text["length"],
              activation_function=names[decoder["activation"]], scale_embedding=False, tie_word_embeddings=True)


def rules(decoder: Mapping[str, Any], ours: str = "decoder", theirs: str = "model.decoder") -> list[Rule]:
  """The weights of the decoder of a WhisperForConditionalGeneration; `proj_out.weight`, tied to the embeddings, is not among them."""
  heads, depth, at = decoder["heads"], decoder["depth"], f"{theirs}.layers.{{i}}"
  return [
    mapping.same(f"{ours}/embedding", f"{theirs}.embed_tokens.weight"),
    mapping.same(f"{ours}/position", f"{theirs}.embed_positions.weight"),
    *_attention(f"{ours}/layers/attention", f"{at}.self_attn", heads, depth),
    *mapping.norm(f"{ours}/layers/attention_norm", f"{at}.self_attn_layer_norm", depth),
    *_attention(f"{ours}/layers/cross_attention", f"{at}.encoder_attn", heads, depth),
    *mapping.norm(f"{ours}/layers/cross_norm", f"{at}.encoder_attn_layer_norm", depth),
    *mapping.linear(f"{ours}/layers/mlp/up", f"{at}.fc1", depth),
    *mapping.linear(f"{ours}/layers/mlp/down", f"{at}.fc2", depth),
    *mapping.norm(f"{ours}/layers/mlp_norm", f"{at}.final_layer_norm", depth),
    *mapping.norm(f"{ours}/norm", f"{theirs}.layer_norm"),
  ]


def _attention(ours: str, theirs: str, heads: int, layers: int) -> list[Rule]:
  """Whisper's keys have no bias: zeros here. Dropped on the way back, since what it adds is the same for every key of a query."""
  projections = [f"{theirs}.{x}_proj" for x in "qkv"]
  return [
    Rule(f"{ours}/qkv/kernel", tuple(f"{p}.weight" for p in projections),
         lambda t: np.stack([w.T.reshape(w.shape[1], heads, -1) for w in t], axis=1),
         lambda p: [p[:, i].reshape(p.shape[0], -1).T for i in range(3)], layers),
    Rule(f"{ours}/qkv/bias", (f"{projections[0]}.bias", f"{projections[2]}.bias"),
         lambda t: np.stack([b.reshape(heads, -1) for b in (t[0], np.zeros_like(t[0]), t[1])]),
         lambda p: [p[0].reshape(-1), p[2].reshape(-1)], layers),
    *mapping.attention_output(f"{ours}/out", f"{theirs}.out_proj", heads, layers),
  ]
