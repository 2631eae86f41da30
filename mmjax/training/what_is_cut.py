"""Says at the start of a run what its config cuts of the texts, sounds and series of its sources.

RUN/cut.json keeps the lines, and report.html shows them.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmjax.config import UserError
from mmjax.data.cuts import cut_lines
from mmjax.files import replace_file
from mmjax.training.metrics import log

NAME = "cut.json"


class WhatIsCut:
  """Measures the sources of a config on a thread, from when it is entered: while the steps are
  compiled. Lengths that were measured before are read from beside the data.
  """

  def __init__(self, config, folder: Path):
    self._config, self._folder = config, folder

  def __enter__(self) -> WhatIsCut:
    self._thread = ThreadPoolExecutor(1)
    self._lines = self._thread.submit(cut_lines, self._config)
    return self

  def report(self) -> None:
    """Logs a line for each source and modality that loses something, and keeps them. A source that
    cannot be measured is said, and no reason to stop.
    """
    try:
      lines = self._lines.result()
    except UserError as error:
      lines = [f"what is cut is not known: {error}"]
    for line in lines:
      log(line)
    replace_file(self._folder / NAME, json.dumps({"cut": lines}, ensure_ascii=False))

  def __exit__(self, *unused) -> None:
    self._thread.shutdown(cancel_futures=True)
