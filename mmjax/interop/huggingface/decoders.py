"""What the families of decoder-only language models share: settings of a config.json and back,
weights of a block with rotary positions, the tokens that end texts.

A family has FACTS, `settings`, `rules` and `facts` of its own. `refusals` needs no list: a model is
of a family where the config.json that the family writes of it gives the same model back.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.interop.huggingface import mapping, preprocessing, single
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models import make_model
from mmjax.models.block import GATED, BlockConfig
from mmjax.models.positions import Rotary

GENERATION = "generation_config.json"
HEAD = "lm_head.weight"
# hidden_act -> the activation of our gated MLP
GATES = {
  "silu": "swiglu",
  "swish": "swiglu",
  "gelu": "geglu",
  "gelu_pytorch_tanh": "geglu_tanh",
  "gelu_new": "geglu_tanh",
  "gelu_fast": "geglu_tanh",
}
# What transformers assumes where config.json is silent, in all of these families.
FACTS = dict(
  hidden_act="silu",
  max_position_embeddings=32_768,
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  rope_theta=10_000.0,
  rope_scaling=None,
  rope_parameters=None,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
SCALINGS = {  # rope_type -> {field of Rotary: key}; of yarn all but factor may be missing
  "default": {},
  "linear": dict(factor="factor"),
  "dynamic": dict(factor="factor"),
  "llama3": dict(factor="factor", low="low_freq_factor", high="high_freq_factor"),
  "yarn": dict(
    factor="factor", fast="beta_fast", slow="beta_slow", attention_factor="attention_factor"
  ),
}
# Fields of modules that change how they are trained and run, or that a file states otherwise.
FREE: tuple[str, ...] = (
  "parent",
  "name",
  "dropout",
  "patch_dropout",
  "dtype",
  "kernel",
  "remat",
  "scan_unroll",
  "products",
)
FREE += ("length", "eos_id", "pad_id", "end_ids", "media_ids", "places", "clips", "int8_cache")
KEYS = dict(config="block")  # field -> the key of its settings
ORIGINAL = "original_max_position_embeddings"


def settings(
  f: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  table: str = "embed_tokens.weight",
  block: Mapping[str, Any] | None = None,
  **model: Any,
) -> dict[str, Any]:
  """{"model": ..., "text": ..., "length": places} of a whole config.json, with the settings that
  are the family's own. table: the name of the embeddings.

  Weights are tied where config.json says so and the file does not hold an output table that
  differs, as in transformers. Raises UserError: it has something that our model cannot express.
  """
  tied = bool(f["tie_word_embeddings"])
  if tied and HEAD in tensors and table in tensors:
    tied = np.array_equal(tensors[HEAD], tensors[table])
  ends, pad = end_ids(f), token(f, "pad")
  return dict(
    model=dict(
      name="language_model",
      encoders={},
      connectors={},
      tied=tied,
      eos_id=ends[0] if ends else -1,
      end_ids=ends[1:],
      pad_id=-1 if pad is None else pad,
      block=dict(block or {}),
      **model,
    ),
    text=dict(vocab_size=f["vocab_size"]),
    length=f["max_position_embeddings"],
    left_out=[HEAD] if tied and HEAD in tensors else [],
  )


def rotary_settings(
  f: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  block: Mapping[str, Any] | None = None,
  act: str = "hidden_act",
  **model: Any,
) -> dict[str, Any]:
  """`settings` of a model with RMS norms, rotary positions and a gated MLP."""
  heads = f["num_attention_heads"]
  own = dict(
    key_value_heads=f.get("num_key_value_heads") or heads,
    head_size=f.get("head_dim") or f["hidden_size"] // heads,
    **({} if block and "rotary" in block else dict(rotary=rotary(f))),
  )
  return settings(
    f,
    tensors,
    width=f["hidden_size"],
    depth=f["num_hidden_layers"],
    heads=heads,
    mlp=f["intermediate_size"],
    positions="rotary",
    norm_kind="rms",
    activation=single.activation(f, GATES, act),
    eps=f["rms_norm_eps"],
    block={**own, **(block or {})},
    **model,
  )


# -- Special tokens --------------------------------------------------------------------------------


def token(f: Mapping[str, Any], role: str) -> Any:
  """The id, or ids, of a role by generation_config.json, else by config.json; None = none."""
  key = f"{role}_token_id"
  found = f.get(GENERATION, {}).get(key)
  found = f.get(key) if found is None else found
  return None if isinstance(found, int) and found < 0 else found


def end_ids(f: Mapping[str, Any]) -> tuple[int, ...]:
  """The tokens that end a text; () = the files do not say."""
  found = token(f, "eos")
  return tuple(found) if isinstance(found, Sequence) else () if found is None else (found,)


def prepare(c: Any, folder: Path, family: ModuleType, found: Mapping[str, Any]) -> dict[str, bytes]:
  """Puts what `settings` found of a folder into the config `c`, and returns the tokenizer's files.
  Raises UserError: nothing says how texts end.
  """
  text, tokenizer = dict(found["text"]), None
  assets: dict[str, bytes] = {}
  if preprocessing.has_tokenizer(folder):
    stated, assets = preprocessing.text_settings(folder, family)
    tokenizer = Tokenizer.from_assets(assets)
    of_tokenizer = json.loads(assets.get("tokenizer_config.json", b"{}"))
    for key, value in of_tokenizer.items():
      if key in ("add_bos_token", "add_eos_token") and isinstance(value, bool):
        stated[key.split("_")[1]] = value  # it overrides what tokenizer.json says
    text = {**stated, **text, "tokenizer": str(folder.resolve())}
    if hasattr(family, "written"):
      c.data.sequence.update(family.written(tokenizer, of_tokenizer))
  choose_special_tokens(c.model, tokenizer)
  c.data.text.update(text, pad_id=c.model.pad_id, length=found["length"])
  c.data.sequence.update(length=found["length"], **found.get("places", {}))
  video = dict(found.get("video", {}))
  for key in ("interpolation", "mean", "std") if video else ():
    if (other := video.pop(key)) != (value := c.data.image[key]):
      raise UserError(f"clips are prepared with {key} {other}, but pictures with {value}")
  c.data.video.update(video)
  if (merge := c.data.image.merge) > 1:
    c.data.sequence.image = c.data.image.tokens // merge**2
  return assets


def choose_special_tokens(model: Any, tokenizer: Tokenizer | None) -> None:
  """Among several tokens that end texts, the tokenizer's own <eos> is the one that training ends
  them with. Texts are filled up with <eos> where neither the files nor the tokenizer (None = there
  is none) have a token for it. Raises UserError: nothing says how texts end.
  """
  theirs = dict(eos=-1, pad=-1) if tokenizer is None else tokenizer.special_tokens
  ends = [model["eos_id"], *model["end_ids"]] if model["eos_id"] >= 0 else []
  if theirs["eos"] in ends or (not ends and theirs["eos"] >= 0):
    ends = [theirs["eos"], *(end for end in ends if end != theirs["eos"])]
  if not ends:
    raise UserError("eos_token_id is missing, and no tokenizer has one: state what ends a text")
  pad = next(x for x in (model["pad_id"], theirs["pad"], ends[0]) if x >= 0)
  model.update(eos_id=ends[0], end_ids=tuple(ends[1:]), pad_id=pad)


# -- Positions and windows -------------------------------------------------------------------------


def rotary(f: Mapping[str, Any], kind: str = "", theta: float = 0.0) -> dict[str, Any]:
  """Settings of `Rotary` of config.json: its rope_parameters, those of `kind` where layers differ,
  or rope_theta and rope_scaling, as older files have them. Raises UserError: a scaling that is not
  known here.
  """
  stated = dict(f.get("rope_parameters") or {})
  stated = dict(stated.get(kind) or {}) if kind else stated
  if nested := [key for key, value in stated.items() if isinstance(value, Mapping)]:
    raise UserError(f"rope_parameters has its own for {', '.join(nested)}, which is not supported")
  stated.update(f.get("rope_scaling") or {})
  name = stated.get("rope_type") or stated.get("type") or "default"
  known = SCALINGS.get(name)
  if known is None:
    raise UserError(f"rope_type {name!r} is not supported; there are: {', '.join(SCALINGS)}")
  for key, fine in dict(
    partial_rotary_factor=(None, 1.0),
    truncate=(None, True),
    mscale=(None, 0),
    mscale_all_dim=(None, 0),
  ).items():
    if stated.get(key, f.get(key)) not in fine:
      raise UserError(f"{key} is {stated.get(key, f.get(key))!r}, which is not supported")
  out = dict(theta=float(stated.get("rope_theta") or theta or f["rope_theta"]))
  if name == "default":
    return out
  missing = [key for key in ("factor", *known.values()) if stated.get(key) is None]
  if missing and (name != "yarn" or "factor" in missing):
    raise UserError(f"rope_type {name!r} needs {', '.join(sorted(set(missing)))}")
  out.update({ours: float(stated[key]) for ours, key in known.items() if stated.get(key)})
  longest = f["max_position_embeddings"]
  original = longest if name == "dynamic" else stated.get(ORIGINAL) or longest
  return dict(out, scaling=name, **({} if name == "linear" else dict(original=original)))


def rope_facts(rotary: Rotary) -> dict[str, Any]:
  """The rope_parameters of `rotary`, for one kind of layers."""
  name = "default" if rotary.scaling == "none" else rotary.scaling
  found = {key: getattr(rotary, ours) for ours, key in SCALINGS[name].items()}
  found = {key: value for key, value in found.items() if value}
  if name in ("llama3", "yarn"):
    found[ORIGINAL] = rotary.original
  return dict(rope_type=name, rope_theta=rotary.theta, **found)


def rotary_facts(b: BlockConfig) -> dict[str, Any]:
  """The keys of config.json for one kind of rotary positions, also as older programs read them."""
  rotary = b.rotary or Rotary()
  found = rope_facts(rotary)
  older = {key: value for key, value in found.items() if key != "rope_theta"}
  return dict(
    rope_parameters=found,
    rope_theta=rotary.theta,
    rope_scaling=None if rotary.scaling == "none" else older,
  )


def windows(f: Mapping[str, Any], slides: Callable[[int], bool]) -> tuple[int, ...]:
  """The windows of the layers, as short as their pattern is: of layer_types, else of `slides`,
  which says of a layer's number whether it has one. Raises UserError: layers of other types.
  """
  depth = f["num_hidden_layers"]
  kinds = f.get("layer_types")
  if kinds is None:
    kinds = [
      "sliding_attention" if f["sliding_window"] and slides(i) else "full_attention"
      for i in range(depth)
    ]
  if other := set(kinds) - {"sliding_attention", "full_attention"}:
    raise UserError(f"layer_types has {', '.join(sorted(other))}, which is not supported")
  if len(kinds) != depth:
    raise UserError(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {depth}")
  return pattern([f["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds])


def pattern(values: Sequence[int]) -> tuple[int, ...]:
  """The shortest beginning of `values` of which they are repetitions; () = all are 0."""
  if not any(values):
    return ()
  for size in range(1, len(values) + 1):
    if all(value == values[i % size] for i, value in enumerate(values)):
      return tuple(values[:size])
  return ()


def window_facts(b: BlockConfig) -> dict[str, Any]:
  """layer_types and sliding_window; layers of several windows give one that no import reads."""
  of_layers = [(b.windows or (0,))[i % len(b.windows or (0,))] for i in range(b.depth)]
  return dict(
    sliding_window=max(of_layers) or None,
    layer_types=["sliding_attention" if window else "full_attention" for window in of_layers],
  )


# -- The way back ----------------------------------------------------------------------------------


def block_of(config: Mapping[str, Any]) -> BlockConfig:
  return make_model(config).config


def activation(b: BlockConfig) -> str:
  """The activation of the MLP, by the one name that it has if it is gated."""
  gated = dict(silu="swiglu", gelu="geglu", gelu_tanh="geglu_tanh")
  return gated.get(b.activation, f"gated {b.activation}") if _gates(b) else b.activation


def _gates(b: BlockConfig) -> bool:
  return b.gated and b.activation not in GATED


def token_facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The ids of special tokens in config.json and generation_config.json."""
  model = config["model"]
  ends = (model["eos_id"], *model["end_ids"])
  return dict(
    bos_token_id=special.get("bos_token_id"),
    eos_token_id=list(ends) if len(ends) > 1 else ends[0],
    pad_token_id=model["pad_id"],
  )


def facts(
  config: Mapping[str, Any], special: Mapping[str, int], act: str = "hidden_act"
) -> dict[str, Any]:
  """The keys of config.json that families with rotary positions share, but for these positions."""
  model = make_model(config)
  b = model.config
  names = {ours: theirs for theirs, ours in reversed(GATES.items())}
  name = names.get(activation(b), "silu")  # of others, `refusals` says so
  return dict(
    torch_dtype="float32",
    vocab_size=model.vocab_size,
    hidden_size=b.width,
    num_hidden_layers=b.depth,
    num_attention_heads=b.heads,
    num_key_value_heads=b.groups,
    head_dim=b.channels,
    intermediate_size=b.mlp,
    rms_norm_eps=b.eps,
    max_position_embeddings=model.length,
    tie_word_embeddings=model.tied,
    attention_dropout=0.0,
    **{act: name},
    **token_facts(config, special),
  )


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the file beside config.json that says how texts are generated."""
  known = json.loads(assets.get(GENERATION, b"{}"))
  stated = token_facts(config, {"bos_token_id": known.get("bos_token_id")})
  return {GENERATION: {**known, **{k: v for k, v in stated.items() if v is not None}}}


def refusals(
  config: Mapping[str, Any], settings: Callable, facts: Callable
) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what `facts` of a family cannot say, by what its
  `settings` makes of them.
  """
  found = settings(facts(config, {}), {})
  theirs = make_model({**config, "model": found["model"]})
  return list(_compared(make_model(config), theirs, "model"))


def without_encoders(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config of the language model without its media."""
  alone = dict(encoders={}, connectors={}, both_ways="none")
  return {**config, "model": {**config["model"], **alone}}


def family(model_type: str, names: Sequence[str]) -> ModuleType:
  """The family of a text_config. Raises UserError: it is none of those `names`."""
  if model_type not in names:
    raise UserError(
      f"text_config.model_type is {model_type!r}, but only {', '.join(names)} are supported"
    )
  return importlib.import_module(f"mmjax.interop.huggingface.{model_type}")


def nearest(config: Mapping[str, Any], names: Sequence[str]) -> ModuleType:
  """The family of the language model without its media, or the one that is nearest to it."""
  alone = without_encoders(config)

  def reasons(family: ModuleType) -> int:
    return sum(value not in fine for _, value, fine in family.refusals(alone))

  return min((family(name, names) for name in names), key=reasons)


def _compared(ours: Any, theirs: Any, at: str) -> Iterator[tuple[str, Any, tuple]]:
  """(key, our value, (their value,)) of everything that decides what two models compute."""
  if type(ours) is type(theirs) and isinstance(ours, Mapping):
    pairs = {name: (ours[name], theirs.get(name)) for name in ours}
  elif type(ours) is type(theirs) and dataclasses.is_dataclass(ours):
    a, b = (_usual(x) if isinstance(x, BlockConfig) else x for x in (ours, theirs))
    names = [field.name for field in dataclasses.fields(a) if field.name not in FREE]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
  else:
    yield at, ours, (theirs,)
    return
  for name, pair in pairs.items():
    yield from _compared(*pair, f"{at}.{KEYS.get(name, name)}")


def _usual(b: BlockConfig) -> BlockConfig:
  """The same block, told in one way."""
  every = b.windows or (0,)
  fields: dict[str, Any] = dict(
    head_size=b.channels,
    key_value_heads=b.groups,
    bias=False,
    qkv_bias=b.has_bias("qkv"),
    out_bias=b.has_bias("out"),
    mlp_bias=b.has_bias("mlp"),
    activation=activation(b),
    gated=False,
    scale=round(b.scale or b.channels**-0.5, 6),
    windows=pattern([every[i % len(every)] for i in range(b.depth)]),
    local_rotary=(b.local_rotary or b.rotary) if any(every) else None,
  )
  return dataclasses.replace(b, **fields)


# -- Weights ---------------------------------------------------------------------------------------


def scale(ours: str, theirs: str, layers: int = 0, plus: float = 0.0) -> Rule:
  """The scale of an RMS norm, which is `plus` + weight there."""
  return Rule(
    f"{ours}/scale",
    (f"{theirs}.weight",),
    lambda t: t[0] + np.float32(plus),
    lambda p: [p - np.float32(plus)],
    layers,
  )


def rules(
  config: Mapping[str, Any], norms: Mapping[str, str], plus: float = 0.0, at: str = ""
) -> list[Rule]:
  """The weights of a model with RMS norms and rotary positions. norms: {ours: theirs} of a block.
  plus: what is added to the weights of norms. at: what names begin with there.
  """
  model = make_model(config)
  b, layer = model.config, f"{at}layers.{{i}}"
  ours, theirs = "layers/attention", f"{layer}.self_attn"
  out = [
    mapping.same("embedding", f"{at}embed_tokens.weight"),
    *([] if model.tied else [mapping.same("output", HEAD)]),
    scale("norm", f"{at}norm", plus=plus),
    *(scale(f"layers/{a}", f"{layer}.{b_}", b.depth, plus) for a, b_ in norms.items()),
    *_projections(ours, theirs, b),
    Rule(
      f"{ours}/out/kernel",
      (f"{theirs}.o_proj.weight",),
      lambda t: t[0].T.reshape(b.heads, b.channels, -1),
      lambda p: [p.reshape(-1, p.shape[-1]).T],
      b.depth,
    ),
    *_pair("layers/mlp/up", [f"{layer}.mlp.{x}_proj" for x in ("gate", "up")], b),
    *mapping.linear("layers/mlp/down", f"{layer}.mlp.down_proj", b.depth, b.has_bias("mlp")),
  ]
  if b.has_bias("out"):
    out.append(mapping.same(f"{ours}/out/bias", f"{theirs}.o_proj.bias", b.depth))
  if b.qk_norm:
    for x, name in dict(q="query", k="key").items():
      out.append(scale(f"{ours}/{name}_norm", f"{theirs}.{x}_norm", b.depth, plus))
  return out


def _projections(ours: str, theirs: str, b: BlockConfig) -> list[Rule]:
  """Queries, keys and values: one parameter here where all have equally many heads, else two."""
  parts = dict(qkv="qkv") if b.shares_qkv else dict(query="q", key_value="kv")
  found = []
  for name, letters in parts.items():
    one, names = letters == "q", [f"{theirs}.{x}_proj" for x in letters]
    heads = b.heads if one or b.shares_qkv else b.groups

    def kernel(t: Sequence[np.ndarray], heads: int = heads, one: bool = one) -> np.ndarray:
      split = [w.T.reshape(w.shape[1], heads, -1) for w in t]
      return split[0] if one else np.stack(split, axis=1)

    def weights(p: np.ndarray, one: bool = one) -> list[np.ndarray]:
      split = [p] if one else [p[:, i] for i in range(p.shape[1])]
      return [x.reshape(x.shape[0], -1).T for x in split]

    def bias(t: Sequence[np.ndarray], heads: int = heads, one: bool = one) -> np.ndarray:
      split = [x.reshape(heads, -1) for x in t]
      return split[0] if one else np.stack(split)

    def biases(p: np.ndarray, one: bool = one) -> list[np.ndarray]:
      return [x.reshape(-1) for x in ([p] if one else p)]

    weight_names, bias_names = (tuple(f"{n}.{x}" for n in names) for x in ("weight", "bias"))
    found.append(Rule(f"{ours}/{name}/kernel", weight_names, kernel, weights, b.depth))
    if b.has_bias("qkv"):
      found.append(Rule(f"{ours}/{name}/bias", bias_names, bias, biases, b.depth))
  return found


def _pair(ours: str, theirs: Sequence[str], b: BlockConfig) -> list[Rule]:
  """The gate and the half that it multiplies, side by side in one layer here."""

  def halves(p: np.ndarray) -> list[np.ndarray]:
    return np.split(p, 2, axis=-1)

  found = [
    Rule(
      f"{ours}/kernel",
      tuple(f"{name}.weight" for name in theirs),
      lambda t: np.concatenate([w.T for w in t], axis=1),
      lambda p: [w.T for w in halves(p)],
      b.depth,
    )
  ]
  if b.has_bias("mlp"):
    names = tuple(f"{name}.bias" for name in theirs)
    found.append(Rule(f"{ours}/bias", names, np.concatenate, halves, b.depth))
  return found
