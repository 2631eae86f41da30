"""A checkpoint as an object that encodes, classifies and describes media: `mmjax.load(DIR)`.

It carries the tokenizer and the preprocessing of the checkpoint, so that no data folder is needed,
and runs on any mesh.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax.config import UserError, base
from mmjax.data.naflex import PatchSequence, picture_of
from mmjax.data.text import TextTransform
from mmjax.data.tokenizers import Tokenizer, load_tokenizer
from mmjax.inference.captions import ROWS, CaptionGenerator, knows_times
from mmjax.inference.engine import can_generate, decoding_of, is_language_model, settings_of_file
from mmjax.inference.inputs import Item, MediaInputs
from mmjax.inference.language import LanguageGenerator
from mmjax.inference.parameters import local_mesh, param_shardings, param_spec
from mmjax.inference.programs import Programs, chunks, in_threads, stack
from mmjax.inference.transcribe import Segment
from mmjax.models import make_model
from mmjax.models.lora import merge
from mmjax.parallel import rules

if TYPE_CHECKING:
  from mmjax.inference.chat import Chat
  from mmjax.inference.slots import Slots, Text

CACHES = ("float", "int8")


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
    self.mesh = local_mesh(config) if mesh is None else mesh
    self._model = make_model(config)
    if cache not in CACHES:
      raise UserError(f"cache {cache!r} is unknown; there are: {', '.join(CACHES)}")
    if cache == "int8" and not is_language_model(self._model):
      raise UserError("cache 'int8' is for language models; this checkpoint is none")
    self.params = jax.device_put(params, param_shardings(config, self.mesh))
    self.model_state = jax.device_put(dict(model_state or {}), rules.replicated(self.mesh))
    variables = {"params": self.params, **self.model_state}
    self._programs = programs = Programs(config, variables, self.mesh, batch_size)
    self.modalities = tuple(config.model.encoders)
    read = dict.fromkeys((*self.modalities, *(("video",) if config.data.video.group else ())))
    self.media = {name: MediaInputs(config, name) for name in read if name != "text"}
    self.joint = bool(getattr(self._model, "joint", True))
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
      self._embed = programs.jit(functools.partial(_embed, self._model), 1)
      self._regress = programs.jit(functools.partial(_regress, self._model), 1)
      self._classify = programs.jit(functools.partial(_classify, self._model), 1)
    self.width = int(config.model.width)
    self.language = None
    self.usual_decoding: dict[str, float] = {}
    if is_language_model(self._model):
      rows = [size for size in programs.sizes if size <= ROWS] or programs.sizes[:1]
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
    mesh = local_mesh(config) if mesh is None else mesh
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
      "text", (self.tokens(chunk) for chunk in chunks(_texts(texts), self._programs.most))
    )

  def encode(self, modality: str, items: Item | Iterable[Item]) -> np.ndarray:
    """float32 [N, D], rows of length one, of items of any modality of the model."""
    if modality == "text":
      return self.encode_text(_texts(items))
    self._needs(modality, joint=True)
    examples = in_threads(self.media[modality], self.media[modality].items(items))
    return self._embedded(modality, map(stack, chunks(examples, self._programs.most)))

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
    return self._captions.generate(
      media,
      max_length=max_length,
      beams=beams,
      length_penalty=length_penalty,
      timestamps=timestamps,
    )

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
    return self.writes and knows_times(self.config, getattr(self._model, "decoder", None))

  @functools.cached_property
  def _captions(self) -> CaptionGenerator:
    audio = self.media.get("audio")
    programs, tokenizer = self._programs, self.tokenizer
    return CaptionGenerator(self.config, self._model, programs, tokenizer, self._batches, audio)

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
    return _sigmoid(logits) if kind == "sigmoid" else _softmax(logits)

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
    batches = self._batches(inputs, self._programs.most)
    return self._programs.run(program, (order,), batches)

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
    return _sigmoid(logits + self.bias) if self._pairwise(modality) else _softmax(logits)

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
    of_modality = ({modality: batch} for batch in batches)
    rows = self._programs.run(self._embed, (modality,), of_modality)
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
      map(self.tokens, chunks(items, rows))
      if m == "text"
      else map(stack, chunks(in_threads(self.media[m], items), rows))
      for m, items in given.items()
    ]
    for batch in zip(*parts, strict=True):
      yield dict(zip(given, batch, strict=True))

  def in_use(self) -> contextlib.AbstractContextManager:
    """A context in which programs of the model run on its mesh."""
    return self._programs.in_use()

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


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  """float32, each on its own."""
  return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
  """float32 [N, C] from logits [N, C]."""
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


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


def _texts(given: Any) -> Iterable[str]:
  """Several texts, of one or of several; `Predictor.tokens` refuses what is no text."""
  return [given] if isinstance(given, str) else given


def _text(given: Any) -> str:
  """What is given as a text. Raises UserError: it is none."""
  if not isinstance(given, str):
    raise UserError(f"{given!r:.200} ({type(given).__name__}) is no text: give strings")
  return given
