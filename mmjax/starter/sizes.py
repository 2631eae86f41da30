"""How large a model, a batch and a run are that fit the data and the machine.

On CPUs they are those of the small recipes in configs/, which learn in minutes; on accelerators
those of usual models, smaller where there are few examples.
"""

from __future__ import annotations

from typing import NamedTuple

from mmjax.starter.machine import Machine, free_memory
from mmjax.starter.survey import Survey

# Examples a second and core of a training step, about as the times of the recipes in
# configs/README.md give them: what a run on CPUs may take is estimated by it.
RATES = {"image": 200, "audio": 120, "video": 100, "series": 900, "text": 600}
TOKENS = 4000  # a second and core, of rows of a language model of width 128, pictures included
MINUTES = 4  # of training on CPUs


class Model(NamedTuple):
  """width, heads: of every transformer; depth: of encoders of media; text: of those of texts."""

  width: int
  heads: int
  depth: int
  text: int


def model(rows: int, machine: Machine) -> Model:
  """Sizes for so many examples."""
  if not machine.accelerated:
    return Model(128, 4, 2, 2)
  for most, found in (
    (3_000, Model(192, 3, 6, 3)),
    (30_000, Model(256, 4, 8, 4)),
    (300_000, Model(384, 6, 12, 6)),
  ):
    if rows < most:
      return found
  return Model(768, 12, 12, 12)


def batch_size(rows: int, wanted: int, bytes_a_row: float, machine: Machine) -> int:
  """A power of two: about `wanted`, at most a quarter of the rows, of which a third of the memory
  holds the activations; divisible by the devices."""
  size = wanted
  while size > 8 and size > rows // 4:
    size //= 2
  while size > 8 and size * bytes_a_row > machine.memory / 3:
    size //= 2
  if size % machine.devices:  # of 6 devices, say
    size = max(1, size // machine.devices) * machine.devices
  return size


def steps(
  rows: int, batch: int, modalities: tuple[str, ...], factor: float, machine: Machine
) -> int:
  """Steps: 40 epochs, at least as many as a model from scratch needs, and on CPUs no more than
  MINUTES allow. factor: how many times the usual work an example of these modalities is."""
  wanted: float = max(40 * rows, 300 * batch)
  if rows > 300_000:
    wanted = max(10 * rows, 12_000_000)
  if not machine.accelerated:
    rate = machine.cores / sum(factor / RATES[modality] for modality in modalities)
    wanted = min(wanted, max(MINUTES * 60 * rate, 200 * batch))
  found = max(1, round(wanted / batch))
  digits = max(0, len(str(found)) - 2)
  return round(found, -digits) or found


def work_of_tokens(count: int) -> float:
  """How many times the usual work of a text a row of so many tokens of a language model is."""
  return RATES["text"] * count / TOKENS


def activation_bytes(tokens: int, sizes: Model, depth: int) -> float:
  """Bytes of the activations of an example in float32 that a backward pass needs: some 34 numbers
  a channel, token and block (Korthikanti et al. 2022, arXiv:2205.05198, equation 1), and the
  attention weights."""
  return 4.0 * depth * tokens * (34 * sizes.width / 2 + 2.5 * sizes.heads * tokens)


def may_cache(survey: Survey, machine: Machine) -> bool:
  """Whether the decoded records take less than a quarter of the memory."""
  size = 2_000.0
  for kind in survey.media:
    if kind in ("image", "video"):
      height, width = (survey.media_values(kind, side) for side in ("height", "width"))
      frames = survey.media_values(kind, "frames") if kind == "video" else 1
      size += float((3 * height * width * frames).mean()) if len(height) else 0
    elif kind == "audio":
      size += 4 * 16_000 * float(survey.media_values(kind, "seconds").mean())
    else:
      length, channels = (survey.media_values(kind, what) for what in ("length", "channels"))
      size += 4 * float((length * channels).mean())
  return survey.measured.rows * size < (_host_memory(machine) / 4)


def _host_memory(machine: Machine) -> float:
  return machine.memory if not machine.accelerated else free_memory()
