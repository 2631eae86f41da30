"""HTML of sound, video and sensor series for `mmjax data show`: everything is embedded, nothing is
loaded from anywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import av
import cv2
import numpy as np
import soundfile
from PIL import Image

from mmjax.data.audio import read_audio
from mmjax.data.image import Unreadable
from mmjax.data.video import decode_video
from mmjax.printing import in_html

STRIP = 6  # frames of a video that are shown
MAX_SECONDS = 30.0  # of a sound; the beginning of a longer one is played
_HEIGHT = 120  # pixels of a frame in the strip
_PLAYED = {  # what every browser of today plays: container -> encodings (None = all of it)
  "WAV": ("PCM_U8", "PCM_16", "PCM_24", "FLOAT"),
  "FLAC": None,
  "OGG": ("VORBIS", "OPUS"),
  "MP3": None,
}
_MIME = {"WAV": "audio/wav", "FLAC": "audio/flac", "OGG": "audio/ogg", "MP3": "audio/mpeg"}
_COLOURS = ("#3758d6", "#d9822b", "#2b9d6b", "#c2417c", "#7a5bd0", "#56707f")


def sound(data: bytes) -> tuple[str, float]:
  """(HTML of a sound: its wave and a player, seconds). Raises Unreadable.

  The player has the bytes as they are where browsers play them, else (or of a sound longer than
  MAX_SECONDS) the same as FLAC.
  """
  wave, rate = read_audio(data)
  seconds = len(wave) / rate
  with soundfile.SoundFile(io.BytesIO(data)) as file:
    encodings = _PLAYED.get(file.format, ())
    played, mime, channels = (
      encodings is None or file.subtype in encodings,
      _MIME.get(file.format),
      file.channels,
    )
  if not played or seconds > MAX_SECONDS:
    out = io.BytesIO()
    rate_kept = max(8000, min(rate, 48_000))
    kept = wave[: round(MAX_SECONDS * rate)]
    if rate_kept != rate:
      from mmjax.data.audio import resample

      kept = resample(kept, rate, rate_kept)
    soundfile.write(out, kept, rate_kept, format="FLAC", subtype="PCM_16")
    data, mime = out.getvalue(), _MIME["FLAC"]
  words = f"{seconds:.1f} s, {rate / 1000:g} kHz" + (
    "" if channels == 1 else f", {channels} channels"
  )
  words += f" (the first {MAX_SECONDS:.0f} s)" if seconds > MAX_SECONDS else ""
  player = (
    '<audio controls preload="metadata" '
    f'src="data:{mime};base64,{base64.b64encode(data).decode()}"></audio>'
  )
  return f'<div class="sound">{_wave(wave)}{player}<span class="size">{words}</span></div>', seconds


def strip(data: bytes) -> tuple[str, float]:
  """(HTML of a video: STRIP frames side by side, from the first to the last, seconds). Raises
  Unreadable.
  """
  counts: list[int] = []

  def pick(count: int) -> np.ndarray:
    counts.append(count)
    return np.unique(np.linspace(0, count - 1, STRIP).round().astype(int))

  frames = decode_video(data, pick)
  count, (height, width) = counts[0], frames.shape[1:3]
  seconds = count / _rate(data)
  scale = _HEIGHT / height if height > _HEIGHT else 1
  size = (max(1, min(round(width * scale), 4 * _HEIGHT)), max(1, round(height * scale)))
  small = [
    frame if scale == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    for frame in frames
  ]
  out = io.BytesIO()
  exact = scale == 1 and width <= 128  # drawn clips stay exact, films become JPEG
  gap = np.full((small[0].shape[0], 2, 3), 255, np.uint8)
  joined = np.concatenate([part for frame in small for part in (frame, gap)][:-1], axis=1)
  Image.fromarray(joined).save(
    out, "PNG" if exact else "JPEG", **({} if exact else dict(quality=88))
  )
  picture = (
    f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"
  )
  words = f"{count} frame{'s' * (count != 1)}, {seconds:.1f} s, {width} × {height}"
  return (
    f'<div class="strip"><img class="film" alt="" src="{picture}"><span '
    f'class="size">{words}</span></div>',
    seconds,
  )


def chart(values: np.ndarray) -> str:
  """HTML of a series [T, C] as lines over time, a colour a channel; gaps where a value is no
  number. Raises Unreadable.
  """
  values = np.asarray(values, np.float64)
  values = values[:, None] if values.ndim == 1 else values
  if values.ndim != 2 or not values.size or not np.isfinite(values).any():
    raise Unreadable("a series without one number")
  low, high = (
    np.nanmin(np.where(np.isfinite(values), values, np.nan)),
    np.nanmax(np.where(np.isfinite(values), values, np.nan)),
  )
  at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 400)).astype(int))
  x = at / max(1, len(values) - 1) * 296 + 2
  lines = []
  for channel in range(min(values.shape[1], 12)):
    y = 98 - (values[at, channel] - low) / ((high - low) or 1) * 96
    path, pen = [], "M"
    for px, py in zip(x, y, strict=True):
      if np.isfinite(py):
        path.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
      else:
        pen = "M"
    lines.append(f'<path d="{"".join(path)}" stroke="{_COLOURS[channel % len(_COLOURS)]}"></path>')
  words = (
    f"{len(values)} steps, {values.shape[1]} channel{'s' * (values.shape[1] != 1)}, {low:.4g} to "
    f"{high:.4g}"
  )
  return (
    '<div class="series"><svg viewBox="0 0 300 100" '
    f'preserveAspectRatio="none">{"".join(lines)}</svg><span class="size">{words}</span></div>'
  )


def answers(pairs: Sequence[tuple[str, str]], most: int = 8) -> str:
  """HTML of questions with their answers."""
  rows = "".join(
    f"<dt>{in_html(question)}</dt><dd>{in_html(answer)}</dd>" for question, answer in pairs[:most]
  )
  more = f"<dt>and {len(pairs) - most} more</dt><dd></dd>" if len(pairs) > most else ""
  return f'<dl class="questions">{rows}{more}</dl>' if pairs else ""


def _wave(wave: np.ndarray) -> str:
  """The loudness of a sound over time as an SVG."""
  parts = np.array_split(np.abs(wave), min(len(wave), 150))
  peaks = np.array([part.max() for part in parts])
  tall = np.maximum(1, 46 * peaks / max(float(peaks.max()), 1e-4))
  path = "".join(f"M{2 * i + 1} {50 - h:.1f}V{50 + h:.1f}" for i, h in enumerate(tall))
  return (
    f'<svg viewBox="0 0 {2 * len(tall)} 100" preserveAspectRatio="none"><path '
    f'd="{path}"></path></svg>'
  )


def _rate(data: bytes) -> float:
  """Frames a second; 25 where a file does not say."""
  with av.open(io.BytesIO(data)) as container:
    stream = container.streams.video[0]
    return float(stream.average_rate or stream.guessed_rate or 25)
