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


def settings(facts: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """{"decoder": settings of model.decoder, "text": of data.text} of a config.json and a generation_config.json.

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
  known.update({key: value for key, value in (generation or {}).items() if value is not None})
  for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
    if not isinstance(known[key], int):
      raise UserError(f"{key} is {known[key]!r}, but one token is needed")
  decoder.update(prompt=prompt(known), languages=languages(known), eos_id=known["eos_token_id"], pad_id=known["pad_token_id"],
                 suppress=tuple(known.get("suppress_tokens") or ()), suppress_first=tuple(known.get("begin_suppress_tokens") or ()))
  length = known["max_target_positions"] - len(decoder["prompt"]) + 1
  return dict(decoder=decoder, text=dict(vocab_size=known["vocab_size"], length=length))


def prompt(known: Mapping[str, Any]) -> tuple[int, ...]:
  """The tokens that transformers starts a transcription without time stamps from.

  The start token, then the forced ones, or language and task. Where a multilingual model states no language it is detected in each
  sound (`languages`), and English stands in its place. One language, or another task: change model.decoder.languages and prompt.
  """
  start, languages, tasks = known["decoder_start_token_id"], known.get("lang_to_id") or {}, known.get("task_to_id") or {}
  stated = known.get("language") or known.get("task")
  forced = {} if stated else {place: token for place, token in known.get("forced_decoder_ids") or ()}
  out = [start, *(forced[place] for place in sorted(forced) if forced[place] is not None and forced[place] not in languages.values())]
  if languages:
    named = [token for token in forced.values() if token in languages.values()]
    language = str(known.get("language") or "en")
    known_names = (language, f"<|{language}|>", "<|en|>")
    out.insert(1, named[0] if named else next((languages[name] for name in known_names if name in languages), min(languages.values())))
    if tasks and not set(tasks.values()) & set(out):
      out.insert(2, tasks.get(known.get("task") or "transcribe", min(tasks.values())))
  silent = known.get("no_timestamps_token_id")
  return tuple(out if silent is None or silent in out else [*out, silent])


def languages(known: Mapping[str, Any]) -> tuple[int, ...]:
  """The tokens among which a model that states no language detects it; () where it states one, or knows one alone."""
  tokens = tuple(sorted((known.get("lang_to_id") or {}).values()))
  forced = () if known.get("task") else [token for _, token in known.get("forced_decoder_ids") or ()]
  return () if known.get("language") or set(forced) & set(tokens) else tokens


def refusals(decoder: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a decoder of Whisper must have."""
  wanted = dict(positions="learned", cross=True, bias=True, eps=EPS, activation="gelu", memory_positions=False, project_memory=False)
  return [(f"model.decoder.{key}", decoder[key], (value,)) for key, value in wanted.items()]


def token_facts(decoder: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of config.json and generation_config.json that say which tokens start and end a text."""
  start, *rest = tuple(decoder["prompt"]) or (1,)
  if decoder["languages"]:
    rest[0] = None  # transformers detects it
  return dict(decoder_start_token_id=start, bos_token_id=start, eos_token_id=decoder["eos_id"], pad_token_id=decoder["pad_id"],
              forced_decoder_ids=[[1 + i, token] for i, token in enumerate(rest)] or None,
              suppress_tokens=list(decoder["suppress"]) or None, begin_suppress_tokens=list(decoder["suppress_first"]) or None)


def generation_facts(decoder: Mapping[str, Any], text: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
  """The generation_config.json; `known` is that of an import, whose tables of languages and tasks stay."""
  rest = {key: value for key, value in known.items() if key not in ("language", "task", "no_timestamps_token_id")}
  prompt = tuple(decoder["prompt"])
  if known.get("no_timestamps_token_id") in prompt:  # transformers adds it to every prompt that lacks it
    rest["no_timestamps_token_id"] = known["no_timestamps_token_id"]
  if decoder["languages"]:
    rest.setdefault("lang_to_id", {f"<|{token}|>": token for token in decoder["languages"]})
  return {**rest, **token_facts(decoder), "max_length": text["length"] + len(prompt or (1,)) - 1, "return_timestamps": False}


def facts(decoder: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
  """The decoder's keys of config.json, from model.decoder (width, heads, mlp filled in) and data.text; see `refusals`."""
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return dict(vocab_size=text["vocab_size"], d_model=decoder["width"], decoder_layers=decoder["depth"],
              decoder_attention_heads=decoder["heads"], decoder_ffn_dim=decoder["mlp"], max_target_positions=text["length"] + max(0, len(decoder["prompt"]) - 1),
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
