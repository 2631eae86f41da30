"""Captions and transcripts: texts that a decoder or a CTC head generates about media, sounds of any
length among them.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer, decode
from mmjax.inference.engine import generate_text, generate_timed_text
from mmjax.inference.inputs import Item, MediaInputs
from mmjax.inference.programs import Programs, chunks, in_threads
from mmjax.inference.transcribe import Segment, Windows, detect_language, start_tokens

log = logging.getLogger("mmjax")

ROWS = 32  # the most that texts are generated for at once, times beams
Sound = np.ndarray | dict[str, np.ndarray]
Batches = Callable[[Mapping[str, Any], int], Iterator[dict[str, dict[str, np.ndarray]]]]


class CaptionGenerator:
  """Generates texts about media with a model that has a decoder or a CTC head.

  batches: (items by modality, rows) -> batches of at most so many examples. audio: reads sounds;
  None where the model does not hear.
  """

  def __init__(
    self,
    config,
    model: nn.Module,
    programs: Programs,
    tokenizer: Tokenizer,
    batches: Batches,
    audio: MediaInputs | None,
  ):
    self.config, self.model, self.programs, self.tokenizer = config, model, programs, tokenizer
    self._batches, self._audio = batches, audio
    self._decoder: Any = getattr(model, "decoder", None)
    self._generate = programs.jit(functools.partial(generate_text, model), 1, 2, 3, 4)

  def generate(
    self,
    media: Mapping[str, Item | Iterable[Item]],
    *,
    max_length: int,
    beams: int,
    length_penalty: float,
    timestamps: bool,
  ) -> list[str] | list[list[Segment]]:
    """See `Predictor.generate`."""
    self._check(media, max_length, beams, timestamps)
    settings = max_length, beams, length_penalty
    if tuple(media) != ("audio",) or not self._audio:
      return self._texts(media, *settings)
    sounds = list(in_threads(self._audio.sound, self._audio.items(media["audio"])))
    if timestamps:
      return self._transcribe(sounds, *settings) if sounds else []
    long = [i for i, sound in enumerate(sounds) if self._is_long(sound)]
    if long and knows_times(self.config, self._decoder):
      return self._texts_of_sounds(sounds, long, *settings)
    for i in long:
      log.warning(
        "sound %d of %d is %.1f s long; the model reads the first %g (data.audio.seconds)",
        i + 1,
        len(sounds),
        len(sounds[i]) / self.config.data.audio.rate,
        self.config.data.audio.seconds,
      )
    return self._texts({"audio": sounds}, *settings)

  def _check(self, media: Mapping[str, Any], max_length: int, beams: int, timestamps: bool) -> None:
    """Raises UserError: settings that the model cannot follow."""
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
    if timestamps and not (knows_times(self.config, self._decoder) and tuple(media) == ("audio",)):
      raise UserError(
        "timestamps need audio= alone, and a decoder with tokens for times "
        "(model.decoder.time_tokens), as Whisper has"
      )

  def _texts(
    self, media: Mapping[str, Any], max_length: int, beams: int, length_penalty: float
  ) -> list[str]:
    """A text about each item, or about the i-th items of several modalities."""
    rows = max(1, ROWS // beams)
    longest = max_length or self.config.data.text.length
    arguments = (tuple(media), longest, beams, length_penalty)
    tokens = self.programs.run(self._generate, arguments, self._batches(media, rows), rows)
    return [self._decode(row) for row in tokens]

  def _texts_of_sounds(
    self,
    sounds: Sequence[Sound],
    long: Sequence[int],
    max_length: int,
    beams: int,
    length_penalty: float,
  ) -> list[str]:
    """The texts of sounds, of which those with the numbers `long` are read in windows."""
    settings = max_length, beams, length_penalty
    written = self._transcribe([sounds[i] for i in long], *settings)
    short = [i for i in range(len(sounds)) if i not in set(long)]
    texts = self._texts({"audio": [sounds[i] for i in short]}, *settings) if short else []
    of_sounds = dict(zip(short, texts, strict=True))
    first_time = self._decoder.time_tokens
    for i, segments in zip(long, written, strict=True):
      of_sounds[i] = self._decode([t for s in segments for t in s.tokens if t < first_time])
    return [of_sounds[i] for i in range(len(sounds))]

  def _transcribe(
    self, sounds: Sequence[Sound], max_length: int, beams: int, length_penalty: float
  ) -> list[list[Segment]]:
    """The segments of sounds of any length, window by window, those of several sounds at once."""
    waveforms = [sound for sound in sounds if isinstance(sound, np.ndarray)]
    if len(waveforms) < len(sounds):
      raise UserError("timestamps need whole sounds: give paths, bytes or waveforms")
    whole, most = self._decoder, self.config.data.text.length
    start = start_tokens(whole.prompt, whole.time_tokens)
    # As many as there are places for: one more without the token that is left out.
    if most >= whole.length - len(whole.prompt):
      most = whole.length - len(start)
    windows = Windows(self.config.model.encoders.audio, self.config.data.audio, whole.time_tokens)
    (timed, detect), rows, source = self._timed_programs, max(1, ROWS // beams), ("audio",)
    features, ends = zip(*map(windows.features, waveforms), strict=True)
    seeks = [0] * len(sounds)
    found: list[list[Segment]] = [[] for _ in sounds]

    def cut(part: Sequence[int]) -> dict[str, np.ndarray]:
      return {"features": np.stack([windows.cut(features[i], ends[i], seeks[i]) for i in part])}

    prompts = np.tile(np.asarray(start, np.int32), (len(sounds), 1))
    if whole.languages:
      first = ({"audio": cut(part)} for part in chunks(range(len(sounds)), rows))
      prompts[:, 1] = self.programs.run(detect, (source,), first, rows)
    while going := [i for i in range(len(sounds)) if seeks[i] < ends[i]]:
      batches = (
        {"audio": cut(part), "prompt": {"tokens": prompts[part]}} for part in chunks(going, rows)
      )
      arguments = (source, max_length or most, beams, length_penalty)
      written = self.programs.run(timed, arguments, batches, rows)
      for i, row in zip(going, written.tolist(), strict=True):
        tokens = list(itertools.takewhile(lambda token: token != whole.eos_id, row))
        frames = min(ends[i] - seeks[i], windows.frames)
        segments, step = windows.segments(tokens, seeks[i], frames, self._decode)
        found[i] += segments
        seeks[i] += max(step, windows.stride)
    return found

  @functools.cached_property
  def _timed_programs(self) -> tuple[Callable, Callable]:
    """(`generate_timed_text`, `detect_language`) of the model whose prompt has room for times."""
    prompt = start_tokens(self._decoder.prompt, self._decoder.time_tokens)
    model: Any = self.model.clone(decoder=self._decoder.clone(prompt=prompt))
    return (
      self.programs.jit(functools.partial(generate_timed_text, model), 1, 2, 3, 4),
      self.programs.jit(functools.partial(detect_language, model), 1),
    )

  def _decode(self, tokens: Sequence[int]) -> str:
    return decode(self.tokenizer, tokens, self._decoder.eos_id if self._decoder else -1)

  def _is_long(self, sound: Sound) -> bool:
    audio = self.config.data.audio
    return not isinstance(sound, dict) and len(sound) > round(audio.rate * audio.seconds)


def knows_times(config, decoder: Any) -> bool:
  """Whether a decoder writes the times of what is said in sounds of any length (Whisper)."""
  encoder = config.model.encoders.get("audio", {})
  of_whisper = encoder.get("normalisation") == "whisper"
  return of_whisper and getattr(decoder, "time_tokens", -1) >= 0
