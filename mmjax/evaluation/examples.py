"""An example as the report shows it: its picture, frames, sound, curve or text, as the model got
it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.config import UserError


def shown(data: Any, item: tuple[int, int], modalities: Sequence[str]) -> dict[str, Any]:
  """What `report.html` shows of an example of an `EvaluationData`: `picture` uint8 [H, W, 3],
  `sound` (a data URI that a browser plays), `curve` float [T, C] and `text`, those that there are.

  item: of its `items`, (example, part of the example's questions).
  """
  example, part = item
  found: dict[str, Any] = {}
  if "image" in modalities:
    found["picture"] = data.picture(example)
  elif "video" in modalities:
    found["picture"] = data.film(example)
  try:
    record = data.source[example]
  except UserError:
    return found
  if "audio" in modalities and (heard := data.media_of(record, "audio")):
    found["sound"] = sound_uri(heard["waveform"][: heard["length"]], data.config.data.audio.rate)
  if "series" in modalities and (series := data.media_of(record, "series")):
    found["curve"] = series["values"][series["mask"]]
  if "text" in modalities:
    each = data.config.data.text.per_example
    pairs = (record.get("questions") or ())[max(part, 0) * each :][:each]
    captions = [text for texts in record["captions"].values() for text in texts]
    found["text"] = " / ".join(question for question, _ in pairs) or next(iter(captions), "")
  return found


def sound_uri(waveform: np.ndarray, rate: int) -> str:
  """A FLAC data URI of a waveform int16 [n]; at most 30 seconds of it."""
  import soundfile

  data = io.BytesIO()
  soundfile.write(data, waveform[: 30 * rate], rate, format="FLAC", subtype="PCM_16")
  return f"data:audio/flac;base64,{base64.b64encode(data.getvalue()).decode()}"
