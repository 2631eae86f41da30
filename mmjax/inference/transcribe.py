"""Long sounds in windows: those that follow the times which the model writes (Radford et al. 2022,
arXiv:2212.04356, section 4.5), and those of one length for other models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.encoders.spectrogram import log10_mel


class Segment(NamedTuple):
  """A stretch of a sound, from `start` to `end` in seconds, and what is said in it. tokens: as the
  model wrote them, those for times among them."""

  start: float
  end: float
  text: str
  tokens: tuple[int, ...]


class Windows:
  """Cuts sounds for a model that reads `frames` frames of its spectrogram at once, and what it
  writes into segments.

  encoder, audio: the config of the model's audio encoder, and data.audio. begin: the first of the
  tokens for times.
  seconds: of one step of these times.
  """

  def __init__(self, encoder, audio, begin: int):
    self.rate, self.samples, self.begin = audio.rate, round(audio.rate * audio.seconds), begin
    self._mel = dict(rate=audio.rate, n_fft=encoder.n_fft, hop=encoder.hop, mels=encoder.mels)
    self.hop, self.stride = encoder.hop, math.prod(encoder.strides)
    self.frames = self.samples // self.hop
    self.seconds = self.hop * self.stride / self.rate

  def features(self, sound: np.ndarray) -> tuple[np.ndarray, int]:
    """(the spectrogram of the whole of a sound float32 [n], float32 [F, mels] with F >= `frames`;
    how many frames are sound).

    As `log_mel` makes it of the whole sound at once, but a few windows at a time: its waves take
    five times their memory.
    """
    padded = np.pad(sound, (0, max(0, self.samples - len(sound))))
    count, half = len(padded) // self.hop, self._mel["n_fft"] // 2
    padded = np.pad(padded, half, mode="reflect")
    parts = []
    for start in range(0, count, 2 * self.frames):
      size = min(2 * self.frames, count - start)
      wave = padded[start * self.hop : (start + size) * self.hop + 2 * half]
      parts.append(np.asarray(log10_mel(jnp.asarray(wave)[None], size, **self._mel)[0]))
    x = np.concatenate(parts)
    x = (np.maximum(x, x.max() - 8) + 4) / 4
    return x, min(count, -(-len(sound) // self.hop))

  def cut(self, features: np.ndarray, end: int, seek: int) -> np.ndarray:
    """The window from frame `seek` of features [F, mels] on, float32 [frames, mels]: zeros from
    frame `end` on, unless all of it fits one window, where silence is heard."""
    stop = seek + self.frames if len(features) == self.frames else min(end, seek + self.frames)
    window = features[seek:stop]
    return np.pad(window, ((0, self.frames - len(window)), (0, 0)))

  def segments(
    self, tokens: Sequence[int], seek: int, frames: int, decode
  ) -> tuple[list[Segment], int]:
    """(the segments of what was written about a window, frames to go on). seek: its first frame;
    frames: that are sound in it.

    Two times in a row end a segment and start the next. Where the last segment is not ended, the
    next window starts at its start; where one time alone comes last, nothing more is said in this
    window. decode: tokens of a text -> str.
    """
    is_time = [token >= self.begin for token in tokens]
    offset = seek * self.seconds / self.stride

    def segment(first: int, last: int, part: Sequence[int]) -> Segment:
      return Segment(
        offset + first * self.seconds,
        offset + last * self.seconds,
        decode([t for t in part if t < self.begin]),
        tuple(part),
      )

    pairs = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    if not pairs:
      times = [token - self.begin for token in tokens if token >= self.begin]
      return [segment(0, (times and times[-1]) or frames // self.stride, tokens)], frames
    alone = is_time[-2:] == [False, True]
    # A text that ends in a pair of times ends with the second of them.
    stops = [*pairs, len(tokens)] if alone else [*pairs[:-1], pairs[-1] + 1]
    found, start = [], 0
    for stop in stops:
      part = tokens[start:stop]
      whole = stop == stops[-1] and not alone
      found.append(segment(part[0] - self.begin, part[-2 if whole else -1] - self.begin, part))
      start = stop
    return found, frames if alone else (tokens[start - 2] - self.begin) * self.stride


def start_tokens(prompt: Sequence[int], begin: int) -> tuple[int, ...]:
  """The prompt of a text with times: without the token, last in it, that says that there are
  none.
  """
  return tuple(prompt[:-1] if prompt[-1] == begin - 1 else prompt)


def detect_language(model, variables, source: tuple[str, ...], batch: dict) -> jax.Array:
  """int32 [B]: the decoder's language of each row."""
  memory = model.apply(variables, source, batch, method="init_memory")
  return model.apply(variables, memory, method="detect_language")


def windows_of(
  waveform: np.ndarray | dict[str, np.ndarray], audio, *, quiet: bool = False
) -> list[tuple[float, float, Any]]:
  """(start, end in seconds, waveform float32 [n]) of a sound of any length, in windows of at most
  `seconds`. audio: data.audio of the config. quiet: they end where the last fifth of a window is
  most quiet, so that few words are cut; else the last window is a full one.
  """
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
