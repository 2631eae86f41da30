"""Speech from text with espeak-ng (package `espeakng-loader`), called through ctypes; sound as
FLAC.

The library keeps state from one utterance to the next (flutter, noise). It is loaded anew for each,
so that the sound is a function of the text and the voice alone; that takes 5 ms.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
from pathlib import Path

import numpy as np

from mmjax.config import UserError

RATE = 16000  # of the sound that is returned
# AUDIO_OUTPUT_SYNCHRONOUS, espeakCHARS_UTF8, espeakRATE, espeakPITCH.
_SYNCHRONOUS, _UTF8, _SPEED, _PITCH = (2, 1, 1, 3)
_LANGUAGES = {"en-gb": "en"}  # ours -> espeak's, where they differ

_Callback = ctypes.CFUNCTYPE(
  ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclasses.dataclass(frozen=True)
class Voice:
  """A language of espeak-ng and a variant of it ("" = none), named "en-us+f2"; words per minute;
  pitch 0 to 99.
  """

  name: str
  speed: int = 175
  pitch: int = 50

  @property
  def language(self) -> str:
    return self.name.partition("+")[0]

  @property
  def variant(self) -> str:
    return self.name.partition("+")[2]


def speak(text: str, voice: Voice) -> np.ndarray:
  """`text` in `voice`: int16 [samples], mono, at RATE. Raises UserError: the package is missing, or
  it lacks the voice.
  """
  import soxr

  espeak = _load()
  parts: list[np.ndarray] = []

  def collect(samples, count, events) -> int:
    if samples and count > 0:
      parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  callback = _Callback(collect)
  library = ctypes.CDLL(espeak.get_library_path())
  try:
    data = espeak.get_data_path()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), 0)
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_ng_SetRandSeed(1)
    library.espeak_SetSynthCallback(callback)
    name = "+".join(filter(None, (_LANGUAGES.get(voice.language, voice.language), voice.variant)))
    # espeak takes any variant, whether it has it or not.
    known = not voice.variant or (Path(data) / "voices" / "!v" / voice.variant).is_file()
    if rate <= 0 or not known or library.espeak_SetVoiceByName(name.encode()):
      raise UserError(f"espeak-ng has no voice {voice.name!r}. Install espeakng-loader==0.2.4")
    library.espeak_SetParameter(_SPEED, voice.speed, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Terminate()
  finally:
    _unload(library)
  if not parts:
    raise UserError(f"espeak-ng made no sound of {text!r} in voice {voice.name!r}")
  return soxr.resample(np.concatenate(parts), rate, RATE, "HQ")


def to_flac(samples: np.ndarray, rate: int = RATE) -> bytes:
  """int16 [samples] as the bytes of a FLAC file."""
  import soundfile

  out = io.BytesIO()
  soundfile.write(out, samples, rate, format="FLAC", subtype="PCM_16")
  return out.getvalue()


def _load():
  try:
    import espeakng_loader
  except ImportError as error:
    raise UserError(
      f"speech: {error}. Install the packages it is made of: pip install 'mmjax[demo]'"
    ) from error
  return espeakng_loader


def _unload(library: ctypes.CDLL) -> None:
  close = ctypes.CDLL(None).dlclose
  close.argtypes = [ctypes.c_void_p]
  close(library._handle)
