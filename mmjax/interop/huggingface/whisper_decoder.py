"""The decoder of Whisper (model_type "whisper", Radford et al. 2022, arXiv:2212.04356): its
settings, its weights, and the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping
from mmjax.interop.huggingface.clip import ACTIVATIONS
from mmjax.interop.huggingface.mapping import Rule

# What transformers assumes where config.json is silent.
DEFAULTS = dict(
  vocab_size=51865,
  d_model=384,
  decoder_layers=4,
  decoder_attention_heads=6,
  decoder_ffn_dim=1536,
  max_target_positions=448,
  activation_function="gelu",
  scale_embedding=False,
  tie_word_embeddings=True,
  decoder_start_token_id=50257,
  eos_token_id=50256,
  pad_token_id=50256,
)
EPS = 1e-5  # torch's LayerNorm; config.json does not say
LIMITS, NEVER = ("max_length", "max_new_tokens"), ("suppress_tokens", "begin_suppress_tokens")
# How texts are written here: with other values transformers writes others.
GREEDY = dict(
  do_sample=False,
  num_beams=1,
  min_length=0,
  min_new_tokens=0,
  repetition_penalty=1.0,
  no_repeat_ngram_size=0,
  encoder_no_repeat_ngram_size=0,
  encoder_repetition_penalty=1.0,
  bad_words_ids=None,
  sequence_bias=None,
  forced_bos_token_id=None,
  forced_eos_token_id=None,
  exponential_decay_length_penalty=None,
  num_beam_groups=1,
  penalty_alpha=None,
  guidance_scale=None,
  no_speech_threshold=None,
  return_timestamps=False,
)
# Whisper's languages and their codes, other names of some after them.
CODES = dict(
  pair.split("=")
  for pair in """
english=en, chinese=zh, german=de, spanish=es, russian=ru, korean=ko, french=fr, japanese=ja,
portuguese=pt, turkish=tr, polish=pl, catalan=ca, dutch=nl, arabic=ar, swedish=sv, italian=it,
indonesian=id, hindi=hi, finnish=fi, vietnamese=vi, hebrew=he, ukrainian=uk, greek=el, malay=ms,
czech=cs, romanian=ro, danish=da, hungarian=hu, tamil=ta, norwegian=no, thai=th, urdu=ur,
croatian=hr, bulgarian=bg, lithuanian=lt, latin=la, maori=mi, malayalam=ml, welsh=cy, slovak=sk,
telugu=te, persian=fa, latvian=lv, bengali=bn, serbian=sr, azerbaijani=az, slovenian=sl,
kannada=kn, estonian=et, macedonian=mk, breton=br, basque=eu, icelandic=is, armenian=hy,
nepali=ne, mongolian=mn, bosnian=bs, kazakh=kk, albanian=sq, swahili=sw, galician=gl, marathi=mr,
punjabi=pa, sinhala=si, khmer=km, shona=sn, yoruba=yo, somali=so, afrikaans=af, occitan=oc,
georgian=ka, belarusian=be, tajik=tg, sindhi=sd, gujarati=gu, amharic=am, yiddish=yi, lao=lo,
uzbek=uz, faroese=fo, haitian creole=ht, pashto=ps, turkmen=tk, nynorsk=nn, maltese=mt,
sanskrit=sa, luxembourgish=lb, myanmar=my, tibetan=bo, tagalog=tl, malagasy=mg, assamese=as,
tatar=tt, hawaiian=haw, lingala=ln, hausa=ha, bashkir=ba, javanese=jw, sundanese=su,
cantonese=yue, burmese=my, valencian=ca, flemish=nl, haitian=ht, letzeburgesch=lb, pushto=ps,
panjabi=pa, moldavian=ro, moldovan=ro, sinhalese=si, castilian=es, mandarin=zh
""".replace("\n", " ")
  .strip()
  .split(", ")
)


def settings(
  facts: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """{"decoder": settings of model.decoder, "text": of data.text} of a config.json and a
  generation_config.json (None = no such file).

  data.text.length is the number of tokens that transformers writes at most; the table of positions
  may be longer.
  Raises UserError: the config has something that our decoder cannot express.
  """
  known = {**DEFAULTS, **facts}
  if known["activation_function"] not in ACTIVATIONS:
    raise UserError(
      f"activation_function {known['activation_function']!r} is not supported; there are: "
      f"{', '.join(ACTIVATIONS)}"
    )
  for key, value in (("scale_embedding", False), ("tie_word_embeddings", True)):
    if known[key] is not value:
      raise UserError(f"{key} is {known[key]!r}, but only {value} is supported")
  decoder = dict(
    kind="decoder",
    width=known["d_model"],
    depth=known["decoder_layers"],
    heads=known["decoder_attention_heads"],
    mlp=known["decoder_ffn_dim"],
    activation=ACTIVATIONS[known["activation_function"]],
    eps=EPS,
    bias=True,
    cross=True,
    positions="learned",
    max_positions=known["max_target_positions"],
  )
  known = decoding(known, generation)
  for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
    if not isinstance(known[key], int):
      raise UserError(f"{key} is {known[key]!r}, but one token is needed")
  never = {
    key: tuple(token for token in known.get(key) or () if 0 <= token < known["vocab_size"])
    for key in NEVER
  }
  decoder.update(
    prompt=prompt(known),
    languages=languages(known),
    eos_id=known["eos_token_id"],
    pad_id=known["pad_token_id"],
    suppress=never["suppress_tokens"],
    suppress_first=never["begin_suppress_tokens"],
  )
  silent = known.get("no_timestamps_token_id")
  if silent is not None and silent + 1 < known["vocab_size"]:
    first = known.get("max_initial_timestamp_index")
    decoder.update(time_tokens=silent + 1, first_time=-1 if first is None else first)
  length = longest(known, len(decoder["prompt"]), known["max_target_positions"])
  other = [
    f"{key} {known[key]!r}"
    for key, value in GREEDY.items()
    if known.get(key, value) not in (value, None)
  ]
  notes = (
    [
      f"generation_config.json has {', '.join(other)}, which is not kept: texts are written by "
      "the likeliest token each time, with as many beams and with time stamps where "
      "`mmjax generate` is asked for them (--beams, --timestamps)"
    ]
    if other
    else []
  )
  return dict(
    decoder=decoder, text=dict(vocab_size=known["vocab_size"], length=length), notes=notes
  )


def decoding(known: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
  """What decides how texts are written: of a generation_config.json where there is one, else of
  config.json.

  Beside a generation_config.json, config.json decides about forced_decoder_ids and the ids of
  start, end and padding alone.
  """
  if generation is None:
    return {"begin_suppress_tokens": (220, 50256), **known}
  rest = {key: value for key, value in known.items() if key not in (*NEVER, *LIMITS, *GREEDY)}
  return {**rest, **{key: value for key, value in generation.items() if value is not None}}


def longest(known: Mapping[str, Any], start: int, positions: int) -> int:
  """Tokens that transformers writes at most after a prompt of `start`: max_new_tokens, else what
  max_length leaves. It adds the prompt to max_length, and the last token takes a place too. Without
  either, as many as there are places for."""
  room = positions - start
  if known.get("max_new_tokens") is not None:
    if known["max_new_tokens"] > room:
      raise UserError(
        f"max_new_tokens is {known['max_new_tokens']}, but max_target_positions {positions} "
        f"leaves {room} after the prompt"
      )
    return known["max_new_tokens"]
  if known.get("max_length") is None:
    return room
  return min(known["max_length"] + min(positions // 2 - 1, start), positions) - start


def prompt(known: Mapping[str, Any]) -> tuple[int, ...]:
  """The tokens that transformers starts a transcription without time stamps from.

  The start token, then those of language and task where they are stated, else the forced ones.
  Where no language is stated it is detected in each sound (`languages`); the first one stands in
  its place. A task is there only where it, or a language, is stated.
  Raises UserError: a language or task that the generation_config.json does not list.
  """
  out: list[int | None] = [known["decoder_start_token_id"], *_forced(known)]
  detected, tasks = languages(known), known.get("task_to_id") or {}
  language, task = known.get("language"), known.get("task")
  if detected:
    out[1:2] = [detected[0]]
  elif language is not None:
    out[1:2] = [language_token(language, known)]
  if task is not None or (language is not None and tasks):
    if (task or "transcribe") not in tasks:
      raise UserError(
        f"task {task or 'transcribe'!r} is not in task_to_id, which has: "
        f"{', '.join(tasks) or 'none'}"
      )
    out.append(tasks[task or "transcribe"])
  silent = known.get("no_timestamps_token_id")
  if silent is not None and out[-1] != silent:
    out.append(silent)
  return tuple(token for token in out if token is not None)


def languages(known: Mapping[str, Any]) -> tuple[int, ...]:
  """The tokens among which a model that states no language detects it; () where it states one, or
  knows one alone.
  """
  forced = _forced(known)
  detects = known.get("language") is None and (not forced or forced[0] is None)
  return tuple(sorted((known.get("lang_to_id") or {}).values())) if detects else ()


def language_token(language: str, known: Mapping[str, Any]) -> int:
  """The token of a language given as "german", "de" or "<|de|>". Raises UserError: the model does
  not list it.
  """
  tokens, name = known.get("lang_to_id") or {}, str(language).lower()
  code = CODES.get(name, name)
  for spelling in (name, f"<|{code}|>"):
    if spelling in tokens:
      return tokens[spelling]
  raise UserError(
    f"language {language!r} is not in lang_to_id, which has: {', '.join(sorted(tokens)) or 'none'}"
  )


def _forced(known: Mapping[str, Any]) -> list[int | None]:
  """forced_decoder_ids from place 1 on; language and task override them."""
  if known.get("language") is not None or known.get("task") is not None:
    return []
  pairs = [tuple(pair) for pair in known.get("forced_decoder_ids") or ()]
  positions = [position for position, _ in pairs]
  if positions and positions[0] != 1:
    return []  # transformers leaves them out
  if positions != list(range(1, len(positions) + 1)):
    raise UserError(f"forced_decoder_ids has the places {positions}, but they must count up from 1")
  return [token for _, token in pairs]


def refusals(decoder: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a decoder of Whisper must have."""
  wanted = dict(
    positions="learned",
    cross=True,
    bias=True,
    eps=EPS,
    activation="gelu",
    memory_positions=False,
    project_memory=False,
  )
  return [(f"model.decoder.{key}", decoder[key], (value,)) for key, value in wanted.items()]


def token_facts(decoder: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of config.json and generation_config.json that say which tokens start and end a
  text.
  """
  start, *rest = tuple(decoder["prompt"]) or (1,)
  if decoder["languages"]:
    rest[0] = None  # transformers detects it
  return dict(
    decoder_start_token_id=start,
    bos_token_id=start,
    eos_token_id=decoder["eos_id"],
    pad_token_id=decoder["pad_id"],
    forced_decoder_ids=[[1 + i, token] for i, token in enumerate(rest)] or None,
    suppress_tokens=list(decoder["suppress"]) or None,
    begin_suppress_tokens=list(decoder["suppress_first"]) or None,
  )


def generation_facts(
  decoder: Mapping[str, Any], text: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
  """The generation_config.json; `known` is that of an import, whose tables of languages and tasks
  stay.
  """
  rest = {
    key: value
    for key, value in known.items()
    if key not in ("language", "task", "no_timestamps_token_id")
  }
  prompt = tuple(decoder["prompt"])
  # transformers adds it to every prompt that lacks it.
  if known.get("no_timestamps_token_id") in prompt:
    rest["no_timestamps_token_id"] = known["no_timestamps_token_id"]
  if decoder["languages"]:
    rest.setdefault("lang_to_id", {f"<|{token}|>": token for token in decoder["languages"]})
  rest = {key: value for key, value in rest.items() if key not in LIMITS and key not in GREEDY}
  start, positions = len(prompt or (1,)), target_positions(decoder, text)
  limit = min(text["length"], positions - start)  # the last token takes a place there, not here
  return {
    **rest,
    **token_facts(decoder),
    "max_length": limit + start - min(positions // 2 - 1, start),
    "return_timestamps": False,
  }


def target_positions(decoder: Mapping[str, Any], text: Mapping[str, Any]) -> int:
  """Rows of the table of positions."""
  return decoder["max_positions"] or text["length"] + max(0, len(decoder["prompt"]) - 1)


def facts(decoder: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
  """The decoder's keys of config.json, from model.decoder (width, heads, mlp filled in) and
  data.text; see `refusals`.
  """
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return dict(
    vocab_size=text["vocab_size"],
    d_model=decoder["width"],
    decoder_layers=decoder["depth"],
    decoder_attention_heads=decoder["heads"],
    decoder_ffn_dim=decoder["mlp"],
    max_target_positions=target_positions(decoder, text),
    activation_function=names[decoder["activation"]],
    scale_embedding=False,
    tie_word_embeddings=True,
  )


def rules(
  decoder: Mapping[str, Any], ours: str = "decoder", theirs: str = "model.decoder"
) -> list[Rule]:
  """The weights of the decoder of a WhisperForConditionalGeneration; `proj_out.weight`, tied to the
  embeddings, is not among them.
  """
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
  """Whisper's keys have no bias: zeros here. Dropped on the way back, since what it adds is the
  same for every key of a query.
  """
  projections = [f"{theirs}.{x}_proj" for x in "qkv"]
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
      (f"{projections[0]}.bias", f"{projections[2]}.bias"),
      lambda t: np.stack([b.reshape(heads, -1) for b in (t[0], np.zeros_like(t[0]), t[1])]),
      lambda p: [p[0].reshape(-1), p[2].reshape(-1)],
      layers,
    ),
    *mapping.attention_output(f"{ours}/out", f"{theirs}.out_proj", heads, layers),
  ]
