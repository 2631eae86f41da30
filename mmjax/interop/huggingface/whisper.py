"""Whisper (model_type "whisper", Radford et al. 2022, arXiv:2212.04356): a
WhisperForConditionalGeneration, both ways.

Here are the whole model and its encoder; the decoder has a file of its own. `take_positions` deals
with the fixed table of the encoder's positions, which a file carries and the model here computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import UserError
from mmjax.interop.huggingface import mapping, whisper_decoder
from mmjax.interop.huggingface.clip import ACTIVATIONS
from mmjax.interop.huggingface.mapping import Rule
from mmjax.models.positions import sinusoids

TOKENIZER_CLASS, PROCESSOR_CLASS, PREFIX = "WhisperTokenizer", "WhisperProcessor", ""
ARCHITECTURE, PAD = "WhisperForConditionalGeneration", "<|endoftext|>"
MASK_PADDING = True
# Read with config.json; the first has to be there.
BESIDE = ("preprocessor_config.json", "generation_config.json")

# What transformers assumes where config.json and preprocessor_config.json are silent.
ENCODER = dict(
  num_mel_bins=80,
  encoder_layers=4,
  encoder_attention_heads=6,
  encoder_ffn_dim=1536,
  d_model=384,
  activation_function="gelu",
  max_source_positions=1500,
)
PREPROCESSOR = dict(
  feature_size=80, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=30
)


def settings(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"model": ..., "audio": settings of data.audio, "text": of data.text} of a config.json and the
  files beside it.
  """
  preprocessor = facts.get("preprocessor_config.json", {})
  take_positions(tensors)  # or it says what is wrong with them
  found = whisper_decoder.settings(facts, facts.get("generation_config.json"))
  model = dict(
    name="captioner",
    width=found["decoder"]["width"],
    encoders=dict(audio=encoder_settings(facts, preprocessor)),
    decoder=dict(found["decoder"], project_memory=False),
  )
  return dict(
    model=model,
    audio=audio_settings(facts, preprocessor),
    text=dict(found["text"], bos=False, eos=True),
    notes=found["notes"],
  )


def rules(config: Mapping[str, Any]) -> list[Rule]:
  """The weights of a WhisperForConditionalGeneration, but for the encoder's positions."""
  audio, decoder = config["model"]["encoders"]["audio"], config["model"]["decoder"]
  return [*encoder_rules(audio["heads"], audio["depth"]), *whisper_decoder.rules(decoder)]


def constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a file that are no parameters here."""
  return put_positions(config["model"]["encoders"]["audio"]["width"], positions_of(config))


def refusals(config: Mapping[str, Any]) -> list[tuple[str, Any, tuple]]:
  """(key, value, values that would do) of what a Whisper of transformers must have."""
  model, data = config["model"], config["data"]
  audio, decoder = model["encoders"]["audio"], model["decoder"]
  wanted = dict(
    strides=(1, 2),
    normalisation="whisper",
    mask_padding=False,
    pool=1,
    pooling="mean",
    activation="gelu",
    eps=1e-5,
  )
  seconds = data["audio"]["seconds"]
  return [
    *((f"model.encoders.audio.{key}", audio[key], (value,)) for key, value in wanted.items()),
    ("model.encoders.audio.width", audio["width"], (decoder["width"],)),
    ("model.joint", model["joint"], (False,)),
    ("data.classes", data["classes"], (0,)),
    ("data.audio.seconds", seconds, (float(round(seconds)),)),
    *whisper_decoder.refusals(decoder),
  ]


def facts(config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
  """The config.json. special: the tokenizer's ids, of which the decoder has its own."""
  audio, decoder = config["model"]["encoders"]["audio"], config["model"]["decoder"]
  return dict(
    model_type="whisper",
    architectures=[ARCHITECTURE],
    torch_dtype="float32",
    is_encoder_decoder=True,
    num_mel_bins=audio["mels"],
    encoder_layers=audio["depth"],
    encoder_attention_heads=audio["heads"],
    encoder_ffn_dim=audio["mlp"],
    max_source_positions=positions_of(config),
    dropout=audio["dropout"],
    **whisper_decoder.facts(decoder, config["data"]["text"]),
    **whisper_decoder.token_facts(decoder),
  )


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the files beside config.json: how sound is prepared, and how texts start and
  end.
  """
  generation = json.loads(assets.get("generation_config.json", b"{}"))
  return {
    "preprocessor_config.json": extractor_facts(config, PROCESSOR_CLASS),
    "generation_config.json": whisper_decoder.generation_facts(
      config["model"]["decoder"], config["data"]["text"], generation
    ),
  }


def extractor_facts(
  config: Mapping[str, Any], processor: str, return_attention_mask: bool = False
) -> dict[str, Any]:
  """The preparation of sounds as transformers states it."""
  audio, data = config["model"]["encoders"]["audio"], config["data"]["audio"]
  seconds = round(data["seconds"])
  return dict(
    feature_extractor_type="WhisperFeatureExtractor",
    processor_class=processor,
    feature_size=audio["mels"],
    sampling_rate=data["rate"],
    hop_length=audio["hop"],
    n_fft=audio["n_fft"],
    chunk_length=seconds,
    n_samples=seconds * data["rate"],
    nb_max_frames=seconds * data["rate"] // audio["hop"],
    padding_side="right",
    padding_value=0.0,
    return_attention_mask=return_attention_mask,
  )


def positions_of(config: Mapping[str, Any]) -> int:
  """Positions of the encoder, two frames each."""
  data = config["data"]["audio"]
  return round(data["seconds"] * data["rate"]) // config["model"]["encoders"]["audio"]["hop"] // 2


def encoder_settings(facts: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
  """The entry of model.encoders.audio of a config.json and a preprocessor_config.json. Raises
  UserError: no such encoder here.
  """
  f, p = {**ENCODER, **facts}, {**PREPROCESSOR, **preprocessor}
  if p.get("dither"):
    raise UserError(
      f"preprocessor_config.json has dither {p['dither']}, which adds noise to sounds: that is "
      "not supported"
    )
  if f["activation_function"] != "gelu":
    raise UserError(
      f"activation_function is {f['activation_function']!r}, but its convolutions have 'gelu': "
      "only that is supported"
    )
  if f["num_mel_bins"] != p["feature_size"]:
    raise UserError(
      f"num_mel_bins is {f['num_mel_bins']}, but preprocessor_config.json has feature_size "
      f"{p['feature_size']}"
    )
  return dict(
    kind="whisper",
    mels=f["num_mel_bins"],
    n_fft=p["n_fft"],
    hop=p["hop_length"],
    strides=(1, 2),
    normalisation="whisper",
    mask_padding=False,
    width=f["d_model"],
    depth=f["encoder_layers"],
    heads=f["encoder_attention_heads"],
    mlp=f["encoder_ffn_dim"],
    activation=ACTIVATIONS["gelu"],
    eps=1e-5,
  )


def audio_settings(facts: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
  """data.audio of a config.json and a preprocessor_config.json. Raises UserError: they speak of
  different lengths.
  """
  f, p = {**ENCODER, **facts}, {**PREPROCESSOR, **preprocessor}
  tokens = p["chunk_length"] * p["sampling_rate"] // p["hop_length"] // 2
  if tokens != f["max_source_positions"]:
    raise UserError(
      f"max_source_positions is {f['max_source_positions']}, but preprocessor_config.json makes "
      f"{tokens} of its {p['chunk_length']} seconds"
    )
  return dict(rate=p["sampling_rate"], seconds=float(p["chunk_length"]))


def encoder_rules(
  heads: int, depth: int, *, ours: str = "audio", theirs: str = "model.encoder"
) -> list[Rule]:
  """The weights of a WhisperEncoder, but for its positions (`take_positions`)."""
  at = f"{theirs}.layers.{{i}}"
  return [
    *(
      rule
      for i in range(2)
      for rule in _convolution(f"{ours}/convolution_{i}", f"{theirs}.conv{i + 1}")
    ),
    *attention(f"{ours}/layers/attention", f"{at}.self_attn", heads, depth),
    *mapping.norm(f"{ours}/layers/attention_norm", f"{at}.self_attn_layer_norm", depth),
    *mapping.norm(f"{ours}/layers/mlp_norm", f"{at}.final_layer_norm", depth),
    *mapping.linear(f"{ours}/layers/mlp/up", f"{at}.fc1", depth),
    *mapping.linear(f"{ours}/layers/mlp/down", f"{at}.fc2", depth),
    *mapping.norm(f"{ours}/norm", f"{theirs}.layer_norm"),
  ]


def attention(ours: str, theirs: str, heads: int, layers: int) -> list[Rule]:
  """Whisper's attention: keys have no bias there, zeros here (a bias of the keys changes no
  attention weight).
  """
  zeros = np.zeros_like
  return [
    Rule(
      f"{ours}/qkv/kernel",
      tuple(f"{theirs}.{x}_proj.weight" for x in "qkv"),
      lambda t: np.stack([w.T.reshape(w.shape[1], heads, -1) for w in t], axis=1),
      lambda p: [p[:, i].reshape(p.shape[0], -1).T for i in range(3)],
      layers,
    ),
    Rule(
      f"{ours}/qkv/bias",
      tuple(f"{theirs}.{x}_proj.bias" for x in "qv"),
      lambda t: np.stack([t[0], zeros(t[0]), t[1]]).reshape(3, heads, -1),
      lambda p: [p[0].reshape(-1), p[2].reshape(-1)],
      layers,
    ),
    *mapping.attention_output(f"{ours}/out", f"{theirs}.out_proj", heads, layers),
  ]


def take_positions(
  tensors: Mapping[str, np.ndarray], name: str = "model.encoder.embed_positions.weight"
) -> dict[str, np.ndarray]:
  """The tensors less the encoder's positions. Raises UserError: they are missing, or not the sines
  that the model here computes.
  """
  rest = dict(tensors)
  table = np.asarray(rest.pop(name, np.zeros((0, 2))), np.float32)
  # Float16 files are 5e-4 off, bfloat16 ones 4e-3.
  if not len(table) or np.abs(table - sinusoids(*table.shape)).max() > 5e-3:
    raise UserError(
      f"{name} is {'not the table of sines that Whisper has' if len(table) else 'missing'}: such "
      "an encoder is not supported"
    )
  return rest


def put_positions(
  width: int, positions: int, name: str = "model.encoder.embed_positions.weight"
) -> dict[str, np.ndarray]:
  """The tensor that `take_positions` took."""
  return {name: sinusoids(positions, width)}


def encoder_params(
  tensors: Mapping[str, np.ndarray],
  facts: Mapping[str, Any],
  where: str,
  *,
  theirs: str = "model.encoder",
) -> dict[str, Any]:
  """Nested parameters of our encoder alone from a file's tensors, of which those of other parts are
  left out.

  Raises UserError: tensors are missing, have another shape than config.json says, or the positions
  are not Whisper's.
  """
  f = {**ENCODER, **facts}
  own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{theirs}.")}
  own = take_positions(own, f"{theirs}.embed_positions.weight")
  return mapping.to_params(
    own, encoder_rules(f["encoder_attention_heads"], f["encoder_layers"], theirs=theirs), where
  )["audio"]


def _convolution(ours: str, theirs: str) -> list[Rule]:
  """kernel [3 * in, out] here, a convolution over time [out, in, 3] there."""
  return [
    Rule(
      f"{ours}/kernel",
      (f"{theirs}.weight",),
      lambda t: t[0].transpose(2, 1, 0).reshape(-1, t[0].shape[0]),
      lambda p: [p.reshape(3, -1, p.shape[-1]).transpose(2, 1, 0)],
    ),
    mapping.same(f"{ours}/bias", f"{theirs}.bias"),
  ]
