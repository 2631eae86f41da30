"""The parts of a model that starts from nothing: an encoder a modality, with the settings of `data`
that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.starter.machine import Machine
from mmjax.starter.sizes import Model
from mmjax.starter.survey import Survey, fit
from mmjax.starter.text import Draft

CUT = {"audio": (10.0, 30.0), "series": (1024, 8192)}  # the longest on CPUs and on accelerators


class Part:
  """One modality of a config: `tokens` of an example, `work`: how many times the usual.

  `data(draft)` writes the settings of data.*, `encoder()` gives the entry of model.encoders.
  """

  tokens = 0
  work = 1.0

  def __init__(self, survey: Survey, machine: Machine, sizes: Model):
    self.survey, self.machine, self.sizes = survey, machine, sizes

  def data(self, draft: Draft) -> None:
    raise NotImplementedError

  def encoder(self) -> dict[str, Any]:
    raise NotImplementedError


class Pictures(Part):
  """`family`: of transformers, in whose shape the encoder is; "" = any. `fold`: side of the squares
  of patches that have to come out even."""

  def __init__(
    self, survey: Survey, machine: Machine, sizes: Model, family: str = "", fold: int = 1
  ):
    super().__init__(survey, machine, sizes)
    self.family = family
    self.heights, self.widths = (survey.media_values("image", side) for side in ("height", "width"))
    self.shortest = float(np.median(np.minimum(self.heights, self.widths)))
    most = 224 if machine.accelerated else 64
    size = min(most, self.shortest)
    self.patch = 16 if size >= 160 else 8 if size >= 32 else 4
    unit = fold * self.patch
    self.size = max(4 * self.patch, int(size // unit) * unit)
    self.tokens = (self.size // self.patch) ** 2
    self.work = self.tokens / 64

  def data(self, draft: Draft) -> None:
    draft.set("data.image.size", self.size, f"theirs: {self.shortest:.0f} pixels (median)")
    aspect = np.maximum(self.heights, self.widths) / np.minimum(self.heights, self.widths)
    if np.median(aspect) > 1.1:
      draft.set("data.image.resize", "squash", "a square crop would not show their edges")
    draft.set("data.image.augment.shift", 0.06)
    draft.set("data.image.augment.scale", (0.86, 1.16))
    draft.set("data.image.augment.rotate", 10.0, "degrees; also: augment.flip = 0.5 for mirroring")

  def encoder(self) -> dict[str, Any]:
    if self.family == "resnet":
      return _resnet(self.machine, self.sizes)
    entry: dict[str, Any] = dict(kind="vit", patch=self.patch)
    if not self.family and not self.machine.accelerated:
      entry["stem"] = "convolution"
    return dict(entry, depth=self.sizes.depth + (2 if self.family else 0), heads=self.sizes.heads)


def _resnet(machine: Machine, sizes: Model) -> dict[str, Any]:
  """The settings of a ResNet: on CPUs one of three blocks, else of 18 or 50 layers."""
  if not machine.accelerated:
    return dict(kind="resnet", layers=18, blocks=(1, 1, 1), multiplier=0.5)
  return dict(kind="resnet", layers=18 if sizes.depth <= 8 else 50)


def resnet_width(entry: Mapping[str, Any]) -> int:
  """The channels of the last stage of a ResNet with these settings."""
  layers, blocks = entry.get("layers", 50), entry.get("blocks") or (1, 1, 1, 1)
  channels = round(64 * entry.get("multiplier", 1.0)) * 2 ** (len(blocks) - 1)
  return channels * (1 if layers < 50 else 4)


class Sounds(Part):
  """`speech`: its spectrogram may be stretched; `plain`: whole seconds, as a Whisper of
  transformers takes them."""

  def __init__(
    self, survey: Survey, machine: Machine, sizes: Model, speech: bool = False, plain: bool = False
  ):
    super().__init__(survey, machine, sizes)
    self.speech, self.plain = speech, plain
    seconds, most = survey.media_values("audio", "seconds"), CUT["audio"][machine.accelerated]
    self.length = fit(seconds, 1.0 if plain else 0.2, most)
    self.tokens = math.ceil(25 * self.length.value)
    self.work = self.length.value / 2.6

  def data(self, draft: Draft) -> None:
    seconds = round(self.length.value, 1)
    draft.set("data.audio.seconds", seconds, self.length.says("sounds"))
    draft.set("data.audio.augment.speed", (0.85, 1.18))
    draft.set("data.audio.augment.noise", 0.05)

  def encoder(self) -> dict[str, Any]:
    entry = dict(
      kind="whisper",
      mels=80 if self.machine.accelerated else 40,
      strides=(2, 2),
      normalisation="utterance",
      depth=self.sizes.depth + 1,
      heads=self.sizes.heads,
    )
    if self.plain:
      return entry
    masks = dict(time_masks=1, time_width=12, frequency_masks=1, frequency_width=6)
    warp = dict(time_warp=0.1, frequency_warp=0.1) if self.speech else {}
    return {**entry, **masks, **warp}


class Clips(Part):
  def __init__(self, survey: Survey, machine: Machine, sizes: Model):
    super().__init__(survey, machine, sizes)
    sides = [survey.media_values("video", side) for side in ("height", "width")]
    self.shortest = float(np.median(np.minimum(*sides)))
    self.seconds = float(np.median(survey.media_values("video", "seconds")))
    frames = float(np.median(survey.media_values("video", "frames")))
    small = not machine.accelerated
    self.size = max(32, int(min(48 if small else 224, self.shortest) // 16) * 16)
    self.frames = int(max(2, min(12 if small else 16, frames)))
    self.tokens = self.frames * (1 if small else (self.size // 16) ** 2)
    self.work = self.frames / 12

  def data(self, draft: Draft) -> None:
    draft.set("data.video.size", self.size, f"theirs: {self.shortest:.0f} pixels (median)")
    draft.set("data.video.frames", self.frames, f"evenly over {self.seconds:.1f} s (median)")
    draft.set("data.video.augment.crop", (0.5, 1.0), "one crop for all frames of a clip")

  def encoder(self) -> dict[str, Any]:
    common = dict(temporal="transformer", depth=2, heads=self.sizes.heads)
    if self.machine.accelerated:
      return dict(kind="frames", patch=16, frame_depth=self.sizes.depth, **common)
    return dict(kind="frames", stem="convolution", channels=(24, 36, 96), **common)


class Series(Part):
  def __init__(self, survey: Survey, machine: Machine, sizes: Model):
    super().__init__(survey, machine, sizes)
    lengths = survey.media_values("series", "length")
    self.length = fit(lengths, 1, CUT["series"][machine.accelerated])
    self.channels = int(np.median(survey.media_values("series", "channels")))
    patch = 1
    while patch < 16 and self.length.value / patch > 64:
      patch *= 2
    self.patch = max(patch, min(4, int(self.length.value) // 4) or 1)
    self.steps = -(-int(self.length.value) // self.patch) * self.patch
    self.tokens = self.steps // self.patch
    self.work = self.tokens / 16

  def data(self, draft: Draft) -> None:
    mean, std = self.survey.series_statistics()
    draft.set("data.series.length", self.steps, self.length.says("series"))
    draft.set("data.series.channels", self.channels)
    draft.set("data.series.mean", mean, "of each channel over the training split")
    draft.set("data.series.std", std)

  def encoder(self) -> dict[str, Any]:
    return dict(kind="series", patch=self.patch, depth=self.sizes.depth + 1, heads=self.sizes.heads)


PARTS = {"image": Pictures, "audio": Sounds, "video": Clips, "series": Series}
