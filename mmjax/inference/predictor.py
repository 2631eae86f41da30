"""A checkpoint as an object that encodes, classifies and describes media: `mmjax.load(DIR)`.

It carries the tokenizer and the preprocessing of the checkpoint, so that no data folder is needed,
and runs on any mesh.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax.config import UserError, base
from mmjax.data.naflex import PatchSequence, picture_of
from mmjax.data.text import TextTransform
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from mmjax.inference.engine import (
  can_generate,
  decoding_of,
  generate_text,
  generate_timed_text,
  is_language_model,
  settings_of_file,
)
from mmjax.inference.inputs import Item, MediaInputs
from mmjax.inference.language import LanguageGenerator
from mmjax.inference.transcribe import Segment, Windows, detect_language, start_tokens
from mmjax.models import make_model
from mmjax.models.lora import merge
from mmjax.parallel import rules
from mmjax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh
from mmjax.state import adapters

if TYPE_CHECKING:
  from mmjax.inference.chat import Chat
  from mmjax.inference.slots import Slots, Text

log = logging.getLogger("mmjax")

BUCKETS = (
  1,
  8,
  32,
  128,
  512,
)  # batches are filled up to one of these, so that a handful of programs serve every size
CACHES = ("float", "int8")
WRITING = 32  # the most rows that texts are written for at once, times beams


class Predictor:
  """Encodes, classifies and describes media and texts with the parameters of a checkpoint of any
  kind of model.

  `scale`, `bias`: floats of the trained temperature, logits = scale * cosine + bias; None for a
  model without a joint space.
  `width`: channels of an embedding. `joint`, `writes`: whether it has embeddings, and a decoder or
  a CTC head. `class_names`, `value_names`: of the outputs, () where the checkpoint does not say.
  `usual_decoding`: settings of a language model's generation_config.json, with which it writes
  unless told otherwise. `config`, `assets`, `params`, `mesh`: what it was made of.
  """

  def __init__(
    self,
    config,
    params: Any,
    assets: Mapping[str, bytes],
    mesh: Mesh | None = None,
    batch_size: int = 128,
    model_state: Mapping[str, Any] | None = None,
    cache: str = "float",
  ):
    """params: nested dict of arrays, anywhere. assets: {file name: content} with the tokenizer's
    files.
    batch_size: the most examples that go through the model at once. model_state: what the model
    keeps besides parameters (batch statistics), {collection: nested dict}. cache: see `load`."""
    self.config, self.assets = config, dict(assets)
    self.mesh = _local_mesh(config) if mesh is None else mesh
    self._model = make_model(config)
    if cache not in CACHES:
      raise UserError(f"cache {cache!r} is unknown; there are: {', '.join(CACHES)}")
    if cache == "int8" and not is_language_model(self._model):
      raise UserError("cache 'int8' is for language models; this checkpoint is none")
    self.params = jax.device_put(params, param_shardings(config, self.mesh))
    self.model_state = jax.device_put(dict(model_state or {}), rules.replicated(self.mesh))
    shards = batch_shards(self.mesh)
    sizes = [b for b in BUCKETS if b < batch_size] + [batch_size]
    self._buckets = sorted({-(-size // shards) * shards for size in sizes})
    self.modalities = tuple(config.model.encoders)
    read = dict.fromkeys((*self.modalities, *(("video",) if config.data.video.group else ())))
    self.media = {name: MediaInputs(config, name) for name in read if name != "text"}
    self.joint = bool(getattr(self._model, "joint", True))
    self._decoder = getattr(self._model, "decoder", None)
    self.writes = can_generate(self._model)
    self.classes_count = int(getattr(self._model, "classes", 0))
    self.values_count = int(getattr(self._model, "values", 0))
    self.value_names = _names(self.assets, "values.json") or self._numbered_values()
    self.class_names = _names(self.assets, "classes.json")
    self.text_transform = (
      TextTransform(config.data.text, self.tokenizer) if "text" in self.modalities else None
    )
    self.scale = self.bias = None
    with self.in_use():
      if self.joint:
        temperature: Any = self._model.apply({"params": self.params}, method="temperature")
        self.scale, self.bias = (float(x) for x in temperature)
      jit = functools.partial(jax.jit, out_shardings=rules.batch_sharding(self.mesh))
      self._embed = jit(functools.partial(_embed, self._model), static_argnums=1)
      self._regress = jit(functools.partial(_regress, self._model), static_argnums=1)
      self._classify = jit(functools.partial(_classify, self._model), static_argnums=1)
      self._generate = jit(
        functools.partial(generate_text, self._model), static_argnums=(1, 2, 3, 4)
      )
    self.width = int(config.model.width)
    self.language = None
    self.usual_decoding: dict[str, float] = {}
    if is_language_model(self._model):
      variables = {"params": self.params, **self.model_state}
      rows = [size for size in self._buckets if size <= WRITING] or self._buckets[:1]
      writer = self._model.clone(int8_cache=cache == "int8")
      self.language = LanguageGenerator(config, writer, variables, self.tokenizer, self.media, rows)
      self.usual_decoding = settings_of_file(self.assets.get("generation_config.json", b"{}"))

  @classmethod
  def load(
    cls,
    checkpoint: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 128,
    allow_code: Sequence[str] = (),
    merged: bool = False,
    cache: str = "float",
  ) -> Predictor:
    """Opens a run folder, a step folder, an import folder, or what `mmjax export --to safetensors`
    wrote. The parameters are the moving average where the run kept one.

    mesh: devices to run on; default all of this process, each with whole parameters. allow_code:
    modules outside this package that the checkpoint may run code of, such as ("my_encoder",).
    merged: the low-rank factors of an adapter are added into the kernels, which takes less time a
    token and gives the same numbers up to rounding. cache: "float", or "int8": a language model
    writes with keys and values in int8, each vector scaled by its largest value, in a quarter (of
    bfloat16: half) of the memory.
    Raises UserError: no checkpoint there, or not a whole one.
    """
    from mmjax.interop import exported
    from mmjax.state import checkpoint as checkpoints

    if exported.is_exported(checkpoint):
      config, tensors, assets = exported.read(checkpoint, allow_code)
      params, state = exported.divide(checkpoint, tensors, param_spec(config))
      return cls(config, params, assets, mesh, batch_size, state, cache)
    folder = checkpoints.find_checkpoint(checkpoint)
    config = checkpoints.load_config(folder, allow_code)
    if merged:
      tree = config.to_dict()
      config = type(config)({**tree, "lora": {**tree["lora"], "base": "float32"}})
    mesh = _local_mesh(config) if mesh is None else mesh
    shapes, shardings = param_spec(config), param_shardings(config, mesh)
    spec = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    params, state = checkpoints.load_params(folder, spec), checkpoints.load_model_state(folder)
    if merged and config.lora.params:
      params = jax.jit(merge)(params)
      config = type(config)({**config.to_dict(), "lora": base().lora})
    assets = checkpoints.load_assets(folder)
    return cls(config, params, assets, mesh, batch_size, state, cache)

  def encode_image(self, images: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of pictures: paths, encoded bytes, PIL images, or arrays
    uint8 [H, W, 3], mixed as you like.

    Raises UserError naming the picture that cannot be read.
    """
    return self.encode("image", images)

  def encode_audio(self, sounds: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of sounds: paths, encoded bytes, or arrays float [n] or
    [n, channels] (or int16) at the model's rate, config.data.audio.rate. Files may have any rate.
    Raises UserError as `encode_image`."""
    return self.encode("audio", sounds)

  def encode_video(self, videos: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of videos: paths, encoded bytes, or arrays uint8 [T, H,
    W, 3]. Raises UserError as `encode_image`."""
    return self.encode("video", videos)

  def encode_series(self, series: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of sensor series: arrays [T, C], or paths of .npy files
    or of texts, a step a line.
    Raises UserError as `encode_image`."""
    return self.encode("series", series)

  def encode_text(self, texts: str | Iterable[str]) -> np.ndarray:
    """float32 [N, D], rows of length one, of texts; what is longer than the model's tokens is
    cut.
    """
    self._needs("text", joint=True)
    return self._embedded(
      "text", (self.tokens(chunk) for chunk in _chunks(_texts(texts), self._buckets[-1]))
    )

  def encode(self, modality: str, items: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of items of any modality of the model."""
    if modality == "text":
      return self.encode_text(_texts(items))
    self._needs(modality, joint=True)
    examples = in_threads(self.media[modality], self.media[modality].items(items))
    return self._embedded(modality, map(_stack, _chunks(examples, self._buckets[-1])))

  def generate(
    self,
    prompts: str | Sequence[str] | None = None,
    *,
    max_length: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    timestamps: bool = False,
    stop: Sequence[str] = (),
    seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    **media: Item | Iterable[Item],
  ) -> list[str] | list[list[Segment]]:
    """The texts that a model with a decoder or a CTC head writes: captions of pictures and clips,
    transcripts of speech.

    media: `image=`, `audio=`, `video=` or `series=` (one item or several); of several modalities
    the i-th items belong together.
    max_length: tokens at most, 0 = those that the model was trained with. beams: 1 = the likeliest
    token each time, else the width of the beam search; length_penalty: of it. A row's text depends
    on that row alone.
    Of a language model: prompts, a text or several, which it goes on from; a medium stands where a
    prompt has <image>, <audio>, <video> or <series>, or before it. max_length 0 = 64. stop: texts
    end before the first of these. temperature: 0 = the likeliest token, else texts are drawn (see
    engine.py Decoding for top_k, top_p, min_p and repetition_penalty); row i draws by (seed, i).
    None = as the generation_config.json of an imported model says, else the likeliest token.
    timestamps: of a sound the list of its `Segment`s (start, end, text, tokens) in place of one
    text, by a model whose decoder knows times (Whisper). Such a model reads a sound longer than
    data.audio.seconds in windows (transcribe.py; max_length is of each); any other reads that much
    of its beginning, and a warning names it.
    Raises UserError: the model writes no text or has no such encoder, an item that cannot be read,
    or timestamps of what has none.
    """
    from mmjax.data.tokenizers import decode

    if self.language is not None:
      decoding = decoding_of(
        self.usual_decoding,
        beams,
        length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
      )
      with self.in_use():
        return self.language.generate(
          [""] * _count(media) if prompts is None else prompts,
          media,
          max_length=max_length or 64,
          decoding=decoding,
          stop=stop,
          seed=seed,
        )
    if prompts is not None or stop or temperature or repetition_penalty not in (None, 1):
      raise UserError(
        "prompts, stop and sampling are for language models; this checkpoint writes the likeliest "
        "text about other media"
      )
    if not self.writes:
      raise UserError(
        "this checkpoint has neither a decoder nor a CTC head and writes no text: generate with a "
        "captioner (model.decoder) or a recogniser (model.spelling), or use `classify`"
      )
    if beams > 1 and not self._decoder:
      raise UserError(
        f"beams is {beams}, but a CTC head takes the likeliest token of each frame: beams=1"
      )
    limit = self.config.data.text.length
    if not 0 <= max_length <= limit or beams < 1:
      raise UserError(
        f"max_length is {max_length} and beams {beams}; give 0 to {limit} (what the model was "
        "trained with) and at least 1"
      )
    if "text" in media:
      raise UserError(
        "text is written about other media: give image=, audio=, video= or series=, not text="
      )
    rows = max(1, WRITING // beams)
    if timestamps and not (self.knows_times and tuple(media) == ("audio",)):
      raise UserError(
        "timestamps need audio= alone, and a decoder with tokens for times "
        "(model.decoder.time_tokens), as Whisper has"
      )
    if tuple(media) == ("audio",):
      sounds = list(
        in_threads(self.media["audio"].sound, self.media["audio"].items(media["audio"]))
      )
      long = [i for i, sound in enumerate(sounds) if timestamps or self._is_long(sound)]
      if long and self.knows_times:
        written = self._transcribe([sounds[i] for i in long], max_length, beams, length_penalty)
        if timestamps:
          return written
        short = [sound for i, sound in enumerate(sounds) if i not in set(long)]
        texts: Iterator[Any] = iter(())
        if short:
          texts = iter(
            self.generate(
              max_length=max_length, beams=beams, length_penalty=length_penalty, audio=short
            )
          )
        joined = {
          i: [t for s in segments for t in s.tokens if t < self._model.decoder.time_tokens]
          for i, segments in zip(long, written, strict=True)
        }
        return [
          decode(self.tokenizer, joined[i], self._model.decoder.eos_id)
          if i in joined
          else next(texts)
          for i in range(len(sounds))
        ]
      for i in long:
        log.warning(
          "sound %d of %d is %.1f s long; the model reads the first %g (data.audio.seconds)",
          i + 1,
          len(sounds),
          len(sounds[i]) / self.config.data.audio.rate,
          self.config.data.audio.seconds,
        )
      media = dict(audio=sounds)
    tokens = self._run(
      self._generate,
      (tuple(media), max_length or limit, beams, length_penalty),
      self._batches(media, rows),
      rows,
    )
    return [
      decode(self.tokenizer, row, self._decoder.eos_id if self._decoder else -1) for row in tokens
    ]

  def stream(self, prompt: str, *, max_length: int = 64, **settings: Any) -> Iterator[str]:
    """The text that a language model writes after a prompt, piece by piece. settings: as of
    `generate`, `image=` and other media among them.
    """
    if self.language is None:
      raise UserError("only a language model goes on from a prompt")
    from mmjax.inference.slots import Slots

    media = {name: [settings.pop(name)] for name in list(settings) if name in self.media}
    how = {name: settings.pop(name) for name in ("stop", "seed") if name in settings}
    decoding = decoding_of(self.usual_decoding, **settings)
    with self.in_use():
      (read,) = self.language.read([prompt], media)
      window = self.language.width(self.language.size(read) + max_length)
      if self.language.model.learned_positions:
        window = min(window, self.language.model.length)
      slots = Slots(self.language, 1, window)
      text = slots.begin(read, max_length, decoding, **how)
    yield from self.pieces(slots, text)

  def pieces(self, slots: Slots, text: Text) -> Generator[str, None, None]:
    """A text of a language model, piece by piece, to its end; ended where nobody reads on."""
    try:
      while True:
        if piece := text.piece():
          yield piece
        if text.ended:
          return
        with self.in_use():
          slots.step()
    finally:
      with self.in_use():
        slots.end(text)

  def score(self, prompts: str | Sequence[str], options: Sequence[str], **media: Any) -> np.ndarray:
    """float32 [prompts, options]: the log-likelihood in nats of each option, its end included,
    after each prompt, by a language model. media: as of `generate`.
    """
    if self.language is None:
      raise UserError("only a language model scores texts")
    with self.in_use():
      return self.language.score(prompts, options, media)

  def chat(self, **settings: Any) -> Chat:
    """A conversation with a language model; settings: see `Chat`. Raises UserError: it is none, or
    has no chat template.
    """
    from mmjax.inference.chat import Chat

    return Chat(self, **settings)

  @property
  def knows_times(self) -> bool:
    """Whether it writes the times of what is said in sounds of any length (Whisper)."""
    encoder = self.config.model.encoders.get("audio", {})
    return (
      self.writes
      and getattr(self._decoder, "time_tokens", -1) >= 0
      and encoder.get("normalisation") == "whisper"
    )

  def _is_long(self, sound: np.ndarray | dict[str, np.ndarray]) -> bool:
    audio = self.config.data.audio
    return not isinstance(sound, dict) and len(sound) > round(audio.rate * audio.seconds)

  def _transcribe(
    self,
    sounds: Sequence[np.ndarray | dict[str, np.ndarray]],
    max_length: int,
    beams: int,
    length_penalty: float,
  ) -> list[list[Segment]]:
    """The segments of sounds of any length, window by window, those of several sounds at once."""
    from mmjax.data.tokenizers import decode

    waveforms = [sound for sound in sounds if isinstance(sound, np.ndarray)]
    if len(waveforms) < len(sounds):
      raise UserError("timestamps need whole sounds: give paths, bytes or waveforms")
    whole, most = self._model.decoder, self.config.data.text.length
    start = start_tokens(whole.prompt, whole.time_tokens)
    if most >= whole.length - len(
      whole.prompt
    ):  # as many as there are places for: one more without the token that is left out
      most = whole.length - len(start)
    windows = Windows(self.config.model.encoders.audio, self.config.data.audio, whole.time_tokens)
    (timed, detect), rows, source = self._timed_programs, max(1, WRITING // beams), ("audio",)
    features, ends = zip(*map(windows.features, waveforms), strict=True)
    seeks = [0] * len(sounds)
    found: list[list[Segment]] = [[] for _ in sounds]

    def cut(i: int) -> np.ndarray:
      return windows.cut(features[i], ends[i], seeks[i])

    def text(tokens: Sequence[int]) -> str:
      return decode(self.tokenizer, tokens, whole.eos_id)

    prompts = np.tile(np.asarray(start, np.int32), (len(sounds), 1))
    if whole.languages:
      first = (
        {"audio": {"features": np.stack([cut(i) for i in part])}}
        for part in _chunks(range(len(sounds)), rows)
      )
      prompts[:, 1] = self._run(detect, (source,), first, rows)
    while going := [i for i in range(len(sounds)) if seeks[i] < ends[i]]:
      batches = (
        {
          "audio": {"features": np.stack([cut(i) for i in part])},
          "prompt": {"tokens": prompts[part]},
        }
        for part in _chunks(going, rows)
      )
      written = self._run(timed, (source, max_length or most, beams, length_penalty), batches, rows)
      for i, row in zip(going, written.tolist(), strict=True):
        tokens = list(itertools.takewhile(lambda token: token != whole.eos_id, row))
        segments, step = windows.segments(
          tokens, seeks[i], min(ends[i] - seeks[i], windows.frames), text
        )
        found[i] += segments
        seeks[i] += max(step, windows.stride)
    return found

  @functools.cached_property
  def _timed_programs(self) -> tuple[Callable, Callable]:
    """(`generate_timed_text`, `detect_language`) of the model whose prompt has room for times."""
    decoder = self._model.decoder
    model = self._model.clone(
      decoder=decoder.clone(prompt=start_tokens(decoder.prompt, decoder.time_tokens))
    )
    jit = functools.partial(jax.jit, out_shardings=rules.batch_sharding(self.mesh))
    return (
      jit(functools.partial(generate_timed_text, model), static_argnums=(1, 2, 3, 4)),
      jit(functools.partial(detect_language, model), static_argnums=1),
    )

  def classes(self, **inputs: Item | Iterable[Item]) -> np.ndarray:
    """Probabilities float32 [N, classes] of the model's own classifier (`classify` takes labels of
    yours instead).

    inputs: `image=`, `text=`, `audio=`, `video=`, `series=`; of several modalities the i-th items
    belong together (a question about a picture). Columns are named by `class_names`. Each row sums
    to 1, unless a record may have several labels (data.label), or the classifier has a single
    output or gives scores (model.probabilities).
    Raises UserError: the model has no classifier or no such encoder, or an item that cannot be
    read.
    """
    if not getattr(self._model, "classes", 0):
      raise UserError(
        "this checkpoint has no classifier (data.classes): use `classify` with labels of your own"
      )
    logits = self._head(self._classify, inputs, "classification", "ordinal")
    kind = probabilities(self.config)
    if kind == "none":
      return logits
    if kind == "sigmoid":
      return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)

  def values(self, **inputs: Item | Iterable[Item]) -> np.ndarray:
    """Values float64 [N, K] that the model predicts, in the units of its training data; columns are
    named by `value_names`. inputs: as of `classes`. Raises UserError as `classes`.
    """
    from mmjax.evaluation.regression import scale

    if not self.values_count:
      raise UserError("this checkpoint predicts no values (data.values)")
    mean, std = scale(self.config)
    return self._head(self._regress, inputs, "regression").astype(np.float64) * std + mean

  def predict(
    self, *, timestamps: bool = False, beams: int = 1, **inputs: Item | Iterable[Item]
  ) -> list[dict[str, Any]]:
    """Everything that the model says about each item, as dicts: "label", "probability", values by
    name, "text", "segments"; see inference/predict.py. inputs: as of `classes`; paths, bytes and
    arrays, of sounds any length. An item that cannot be read has "error" alone.
    """
    from mmjax.inference import predict

    for modality in inputs:
      self._needs(modality)
    given = {
      m: list(_texts(x) if m == "text" else self.media[m].items(x)) for m, x in inputs.items()
    }
    if len({len(items) for items in given.values()}) != 1:
      raise UserError("give items of at least one modality, and equally many of each")
    rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
    names = [
      next((str(x) for x in row.values() if isinstance(x, os.PathLike)), str(number))
      for number, row in enumerate(rows, 1)
    ]
    return predict.predict(self, rows, names, timestamps=timestamps, beams=beams)

  def modalities_of(self, *kinds: str) -> tuple[str, ...]:
    """Those that objectives of these kinds read, in their order; all where there is none."""
    entries = self.config.objectives.values()
    found = (tuple(entry.modalities) for entry in entries if entry.get("kind") in kinds)
    return next(found, self.modalities)

  def windows(self, sound: Item, *, quiet: bool = False) -> list[tuple[float, float, Any]]:
    """(start, end in seconds, waveform float32 [n]) of a sound of any length, in windows of at most
    data.audio.seconds. quiet: they end where the last fifth of a window is most quiet, so that few
    words are cut; else the last window is a full one.
    """
    waveform = self.media["audio"].sound(sound)
    audio = self.config.data.audio
    most = round(audio.rate * audio.seconds)
    if isinstance(waveform, dict) or len(waveform) <= most:
      length = 0.0 if isinstance(waveform, dict) else len(waveform) / audio.rate
      return [(0.0, length, waveform)]
    edges = [0]
    while len(waveform) - edges[-1] > most:
      stop = edges[-1] + most
      if quiet:
        frame = max(1, audio.rate // 50)
        tail = waveform[stop - most // 5 : stop]
        energy = np.square(tail[: len(tail) // frame * frame]).reshape(-1, frame).sum(1)
        if len(energy):
          stop -= len(tail) - int(energy.argmin()) * frame - frame // 2
      edges.append(stop)
    bounds = list(zip(edges, [*edges[1:], len(waveform)], strict=True))
    if not quiet:
      bounds[-1] = (len(waveform) - most, len(waveform))
    return [(a / audio.rate, b / audio.rate, waveform[a:b]) for a, b in bounds]

  def _head(
    self, program: Callable, inputs: Mapping[str, Item | Iterable[Item]], *kinds: str
  ) -> np.ndarray:
    """Rows of a head that objectives of these kinds train, on their modalities in their order."""
    order = next(
      (
        tuple(entry.modalities)
        for entry in self.config.objectives.values()
        if entry.get("kind") in kinds and set(entry.modalities) == set(inputs)
      ),
      tuple(inputs),
    )
    most = self._buckets[-1]
    return self._run(program, (order,), self._batches(inputs, most), most)

  def _numbered_values(self) -> tuple[str, ...]:
    count = self.values_count
    return ("value",) if count == 1 else tuple(f"value/{k}" for k in range(count))

  def classify(
    self,
    items: Item | Iterable[Item],
    labels: Sequence[str],
    templates: Sequence[str] = ("{}",),
    modality: str = "image",
  ) -> np.ndarray:
    """Probabilities float32 [N, C] that each picture (or item of another modality) belongs to each
    label, without training on them.

    A label is the normalised mean of its embeddings in `templates`, each with {} for the label. A
    model that was trained with a sigmoid loss (SigLIP) gives each label a probability of its own,
    sigmoid(scale * cosine + bias): rows need not sum to 1, for an item may fit several labels, or
    none. Any other gives softmax(scale * cosine) over the labels.
    """
    from mmjax.evaluation.zero_shot import class_embeddings

    if not labels or not templates or any("{}" not in template for template in templates):
      raise UserError(
        f"classify needs labels, and templates with {{}} for the label, not {list(labels)!r} and "
        f"{list(templates)!r}"
      )
    texts = [[t.replace("{}", _text(label)) for t in templates] for label in labels]
    classes = class_embeddings(self.encode_text, texts)
    logits = self.scale * (self.encode(modality, items).astype(np.float64) @ classes.T)
    if self._pairwise(modality):
      return (1 / (1 + np.exp(-logits - self.bias))).astype(np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

  def _pairwise(self, modality: str) -> bool:
    """Whether a pair of this modality and a text has a probability of its own: by the loss between
    them, or, where none is known (an import), by whether the logits have a learned bias, which a
    softmax cannot see."""
    losses = {
      entry.loss
      for entry in self.config.objectives.values()
      if entry.get("kind") == "contrastive" and set(entry.between) == {modality, "text"}
    }
    return "sigmoid" in losses if losses else bool(self.config.model.get("bias"))

  def pixels(self, image: Item, name: str = "") -> np.ndarray:
    """One picture as the model takes it: uint8 [size, size, 3], or as it was cut into patches.
    Raises UserError (Unreadable) naming it.
    """
    self._needs("image")
    arrays = self.media["image"](image, name)
    return arrays["pixels"] if "pixels" in arrays else picture_of(PatchSequence(**arrays))

  def tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{"tokens" int32 [N, L], "mask" bool [N, L], "key" uint32 [N, 2]} as the model takes them."""
    for text in texts:
      _text(text)
    if self.text_transform is None:
      raise self._no_encoder("text")
    return self.text_transform(list(texts))

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """Of the checkpoint, else the one that its config names. Raises UserError: there is neither."""
    return (
      Tokenizer.from_assets(self.assets)
      if Tokenizer.is_among(self.assets)
      else load_tokenizer(self.config.data)
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of config and parameters: equal for models that give equal embeddings."""
    mark = hashlib.blake2b(
      repr([self.config.model.to_dict(), self.config.data.image.to_dict()]).encode(), digest_size=8
    )
    for modality in self.modalities:
      if modality not in ("image", "text"):
        mark.update(repr(self.config.data[modality].to_dict()).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      (self.params, self.model_state) if self.model_state else self.params
    ):
      mark.update(jax.tree_util.keystr(path).encode())
      mark.update(np.ascontiguousarray(leaf).tobytes())
    return mark.hexdigest()

  def _embedded(self, modality: str, batches: Iterable[dict[str, np.ndarray]]) -> np.ndarray:
    rows = self._run(
      self._embed, (modality,), ({modality: batch} for batch in batches), self._buckets[-1]
    )
    return rows if len(rows) else np.zeros((0, self.width), np.float32)

  def _batches(
    self, inputs: Mapping[str, Item | Iterable[Item]], rows: int
  ) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Batches of at most `rows` examples of several modalities at once. Raises UserError: not
    equally many.
    """
    if not inputs:
      raise UserError(f"give items of at least one modality: {'=, '.join(self.modalities)}=")
    for modality in inputs:
      self._needs(modality)
    given = {
      m: list(_texts(x) if m == "text" else self.media[m].items(x)) for m, x in inputs.items()
    }
    if len({len(items) for items in given.values()}) > 1:
      raise UserError(
        f"of several modalities the i-th items belong together, but there are "
        f"{', '.join(f'{len(items)} of {m}' for m, items in given.items())}"
      )
    parts = [
      map(self.tokens, _chunks(items, rows))
      if m == "text"
      else map(_stack, _chunks(in_threads(self.media[m], items), rows))
      for m, items in given.items()
    ]
    for batch in zip(*parts, strict=True):
      yield dict(zip(given, batch, strict=True))

  def _run(
    self, program: Callable, arguments: tuple, batches: Iterable[dict], limit: int
  ) -> np.ndarray:
    """Rows of `program(variables, *arguments, batch)` for batches of at most `limit` examples, each
    filled up to a bucket; the next one is prepared while the devices work on the last."""
    waiting, rows = None, []
    variables = {"params": self.params, **self.model_state}
    shards = batch_shards(self.mesh)
    buckets = sorted({*(b for b in self._buckets if b < limit), -(-limit // shards) * shards})
    with self.in_use():
      for batch in batches:
        for part in batch.values():
          part.pop("key", None)
        count = len(jax.tree.leaves(batch)[0])
        size = next(bucket for bucket in buckets if bucket >= count)
        filled = jax.tree.map(
          lambda x, extra=size - count: np.concatenate([x, np.repeat(x[:1], extra, axis=0)]), batch
        )
        result = (
          program(variables, *arguments, jax.device_put(filled, rules.batch_sharding(self.mesh))),
          count,
        )
        if waiting:
          rows.append(np.asarray(waiting[0])[: waiting[1]])
        waiting = result
      if waiting:
        rows.append(np.asarray(waiting[0])[: waiting[1]])
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

  def in_use(self):
    """A context in which programs of the model run on its mesh."""
    return rules.use(self.mesh, rules.logical_rules(self.config))

  def _no_encoder(self, modality: str) -> UserError:
    return UserError(
      f"this checkpoint has no encoder for {modality}; it has {', '.join(sorted(self.modalities))}"
    )

  def _needs(self, modality: str, joint: bool = False) -> None:
    if modality not in self.modalities:
      raise self._no_encoder(modality)
    if joint and not self.joint:
      raise UserError(
        "this checkpoint has no shared space (model.joint is False), so that it gives no embeddings"
      )


def _count(media: Mapping[str, Any]) -> int:
  """How many prompts media alone stand for."""
  return max((len(x) if isinstance(x, (list, tuple)) else 1 for x in media.values()), default=0)


def probabilities(config) -> str:
  """What makes probabilities of the classifier's logits: "softmax", "sigmoid", or "none" where they
  are scores.
  """
  return (
    "sigmoid" if config.data.label == "labels" else config.model.get("probabilities", "softmax")
  )


def in_threads(function: Callable, items: Iterable, ahead: int = 64) -> Iterator:
  """`function` of each item, in order, worked out by threads at most `ahead` items before it is
  asked for.
  """
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for chunk in _chunks(items, ahead):
      yield from pool.map(function, chunk)


def param_spec(config) -> Any:
  """Shapes and dtypes of a config's parameters: nested dict of ShapeDtypeStruct. Runs nothing."""
  import flax.linen as nn

  return nn.unbox(_abstract(config))


def param_shardings(config, mesh: Mesh) -> Any:
  """Where each parameter lies on `mesh` by the config's `sharding`."""
  return rules.param_shardings(_abstract(config), mesh, rules.logical_rules(config))


def _abstract(config) -> Any:
  from mmjax.data.pipeline import batch_spec

  def init(batch: dict) -> Any:
    return adapters.init_variables(make_model(config), config, jax.random.key(0), batch)["params"]

  return jax.eval_shape(init, batch_spec(config, 1))


def _names(assets: Mapping[str, bytes], file: str) -> tuple[str, ...]:
  """The names that a file of a checkpoint lists; () without it. Raises UserError: it is no list of
  texts.
  """
  try:
    names = json.loads(assets.get(file, b"[]"))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{file} of the checkpoint is no readable JSON ({error})") from error
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f"{file} of the checkpoint is no list of names")
  return tuple(names)


def _embed(model, variables: Any, modality: str, batch: dict) -> jax.Array:
  return model.apply(variables, modality, batch, method="embedding").astype(jnp.float32)


def _classify(model, variables: Any, modalities: tuple[str, ...], batch: dict) -> jax.Array:
  return model.apply(variables, modalities, batch, method="classify").astype(jnp.float32)


def _regress(model, variables: Any, modalities: tuple[str, ...], batch: dict) -> jax.Array:
  return model.apply(variables, modalities, batch, method="regress").astype(jnp.float32)


def _local_mesh(config) -> Mesh:
  """Every device of this process side by side, whatever mesh the checkpoint was trained on."""
  tree = config.to_dict()
  tree["mesh"] = {axis: -1 if axis == BATCH_AXES[-2] else 1 for axis in tree["mesh"]}
  return make_mesh(type(config)(tree), jax.local_devices())


def _texts(given: Any) -> Iterable[str]:
  """Several texts, of one or of several; `Predictor.tokens` refuses what is no text."""
  return [given] if isinstance(given, str) else given


def _text(given: Any) -> str:
  """What is given as a text. Raises UserError: it is none."""
  if not isinstance(given, str):
    raise UserError(f"{given!r:.200} ({type(given).__name__}) is no text: give strings")
  return given


def _stack(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _chunks(items: Iterable, size: int) -> Iterator[list]:
  chunk = []
  for item in items:
    chunk.append(item)
    if len(chunk) == size:
      yield chunk
      chunk = []
  if chunk:
    yield chunk
