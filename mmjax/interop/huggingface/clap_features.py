"""How CLAP prepares sound (a ClapFeatureExtractor in preprocessor_config.json), both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.config import UserError

BESIDE = ("preprocessor_config.json",)  # read with config.json; it has to be there
NAMES = dict(  # ours -> theirs
  n_fft="fft_window_size", hop="hop_length", low="frequency_min", high="frequency_max"
)
PADDINGS = ("repeatpad", "repeat")  # any other pads with silence

# What transformers assumes where the file is silent.
PREPROCESSOR = {
  **dict(feature_size=64, sampling_rate=48_000, hop_length=480, max_length_s=10),
  **dict(fft_window_size=1024, frequency_min=0, frequency_max=14_000),
  **dict(truncation="fusion", padding="repeatpad"),
}


def settings(facts: Mapping[str, Any], mels: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """(settings of an htsat that takes `mels` channels, settings of data.audio). Raises UserError: it
  prepares several windows, or other channels.
  """
  facts = {**PREPROCESSOR, **facts}
  if facts["truncation"] != "rand_trunc":
    raise UserError(
      f"the feature extractor's truncation is {facts['truncation']!r}, but only 'rand_trunc' is "
      "supported, as CLAP without fusion of several windows has it"
    )
  if facts["feature_size"] != mels:
    raise UserError(
      f"num_mel_bins is {mels}, but {BESIDE[0]} has feature_size {facts['feature_size']}"
    )
  entry = dict(
    padding=facts["padding"] if facts["padding"] in PADDINGS else "pad",
    **{ours: facts[theirs] for ours, theirs in NAMES.items()},
  )
  return entry, dict(rate=facts["sampling_rate"], seconds=float(facts["max_length_s"]))


def notes(audio: Mapping[str, Any]) -> list[str]:
  """Lines about what the feature extractor does and the import does not."""
  seconds = f"{audio['seconds']:g} s"
  return [
    f"its feature extractor takes a random {seconds} of a longer sound; here it is the first "
    f"{seconds} (data.audio.seconds)"
  ]


def files(config: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
  """{name: content} of the file beside config.json."""
  audio, data = config["model"]["encoders"]["audio"], config["data"]["audio"]
  audio = dict(audio, high=audio["high"] or data["rate"] / 2)
  facts = dict(
    feature_extractor_type="ClapFeatureExtractor",
    feature_size=audio["mels"],
    sampling_rate=data["rate"],
    max_length_s=round(data["seconds"]),
    truncation="rand_trunc",
    padding=audio["padding"],
    padding_value=0.0,
    return_attention_mask=False,
    **{theirs: audio[ours] for ours, theirs in NAMES.items()},
  )
  return {BESIDE[0]: facts}
