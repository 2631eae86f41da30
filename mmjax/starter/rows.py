"""The rows of a language model, as long as the conversations of a data set need them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmjax import config as configs
from mmjax.data.tokenizers import Tokenizer
from mmjax.starter.machine import Machine
from mmjax.starter.origin import Origin
from mmjax.starter.parts import Part
from mmjax.starter.survey import Survey, fit
from mmjax.starter.tasks import FOLD, Task
from mmjax.starter.text import Draft

MOST = {False: 512, True: 4096}  # places of a row, on CPUs and on accelerators
USUAL = 256  # places of a row that several shorter conversations share
ANY = 1 << 16  # places and media of rows that hold whatever there is


def write(
  draft: Draft,
  found: Survey,
  made: Task,
  parts: Mapping[str, Part],
  machine: Machine,
  begin: Origin | None,
  tokenizer: Tokenizer,
) -> tuple[float, int]:
  """Writes the chat template and the settings of data.sequence; returns how many conversations
  share a row, and its places.
  """
  draft.set("data.text.template", _template(begin, tokenizer), "how turns are written")
  if begin:
    begin.sequence_settings(draft)
  elif "image" in parts:
    places = parts["image"].tokens // FOLD**2
    draft.set("data.sequence.image", places, "tokens of a picture")
  c = draft.config()
  c.data.sequence.length = c.data.sequence.slots = ANY
  c.model, c.objectives = made.model, made.objectives
  lengths, media = found.talks(configs.resolve(c))
  whole = fit(lengths, 16, MOST[machine.accelerated])
  typical = float(np.median(lengths))
  length = max(int(whole.value), 16 * round(min(USUAL, 4 * typical) / 16))
  draft.set("data.sequence.length", length, whole.says("conversations"))
  several = max(1.0, length / typical)
  if media.size:
    each = media.sum(1)
    slots = max(1, round(several * each.mean()), int(each.max()))
    draft.set("data.sequence.slots", slots, "pictures of a row, which conversations share")
    several = max(1.0, min(several, slots / max(each.mean(), 1e-9)))
  return several, length


def _template(begin: Origin | None, tokenizer: Tokenizer) -> str:
  """That of the checkpoint or of its tokenizer, else the plainest."""
  if begin and begin.text["template"]:
    return str(begin.text["template"])
  return "tokenizer" if begin and tokenizer.chat_template else "plain"
