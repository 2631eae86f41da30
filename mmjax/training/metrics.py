"""What a run writes while it goes: metrics.jsonl, TensorBoard events, the progress line; and what
they are computed from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mmjax import files, printing
from mmjax.config import UserError
from mmjax.parallel import multihost

# Peak dense bfloat16 FLOPs a second of one device, as jax.Device.device_kind spells it (vendors'
# data sheets).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


class MetricsFile:
  """metrics.jsonl: one JSON object a line, floats in full precision (equal text means equal bits).

  Opening it at `step` cuts every line past that step, and a last line that a crash left unfinished.
  """

  def __init__(self, folder: Path, step: int):
    self.path = folder / "metrics.jsonl"
    self.last: dict[str, Any] = {}
    kept = []
    for line in _lines(self.path):
      try:
        row = files.parse_json(line)
      except ValueError:
        continue
      if isinstance(row, dict) and type(row.get("step")) is int and row["step"] <= step:
        kept.append(line)
        self.last = row
    files.write_whole(self.path, "".join(line + "\n" for line in kept))
    self._file = open(self.path, "a")

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends `row`; non-finite floats become null (JSON has none)."""
    clean = {
      k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    self._file.write(json.dumps(clean) + "\n")
    self._file.flush()

  def sync(self) -> None:
    """Waits until the disk has every line: called before a checkpoint that stands for them."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self.sync()
    self._file.close()


def _lines(path: Path) -> list[str]:
  """Those of a file; none where there is none. Raises UserError: what is there is no file."""
  try:
    return files.read_file(path).decode(errors="replace").splitlines()
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read ({error.strerror}). Move it away, or choose another --workdir"
    ) from error


class TensorBoard:
  """The numbers of metrics.jsonl as TensorBoard events; events past the restored step are purged.

  Written by the caller's own thread: the SummaryWriter of tensorboardX has one that dies when the
  disk is full, and then waits for it.
  """

  def __init__(self, folder: Path, step: int):
    with _without("torch", "boto3", "google.cloud.storage"):
      from tensorboardX.event_file_writer import EventsWriter
      from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / "tensorboard" / "events"))
    if step:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._writer.write_event(self._event(step=step + 1, wall_time=time.time(), session_log=start))
    self._flushed = -math.inf

  def write(self, row: Mapping[str, Any]) -> None:
    numbers = {
      k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in ("step", "time")
    }
    values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
    self._writer.write_event(
      self._event(step=row["step"], wall_time=row["time"], summary=self._summary(value=values))
    )
    if time.monotonic() - self._flushed > 10:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
  """Within it these modules cannot be imported: tensorboardX imports PyTorch and cloud clients
  where they are installed, which takes seconds, for nothing here."""
  kept = {name: sys.modules.get(name) for name in modules}
  imported: dict[str, Any] = sys.modules
  imported.update(dict.fromkeys(modules))
  try:
    yield
  finally:
    for name, module in kept.items():
      del sys.modules[name]
      if module is not None:
        sys.modules[name] = module


class WeightsAndBiases:
  """The same as a Weights & Biases run, which a resumed run goes on with; named after `workdir`.
  Raises UserError: no wandb.
  """

  def __init__(self, project: str, workdir: Path, folder: Path, config: Mapping[str, Any]):
    name = workdir if files.is_url(workdir) else workdir.resolve()
    self._run = import_wandb().init(
      project=project,
      name=name.name,
      id=f"{name.name}-{zlib.crc32(str(name).encode()):08x}",
      resume="allow",
      dir=str(folder),
      config=dict(config),
    )

  def write(self, row: Mapping[str, Any]) -> None:
    self._run.log(
      {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in ("step", "time")},
      step=row["step"],
    )

  def close(self) -> None:
    self._run.finish()


def import_wandb() -> Any:
  """The module wandb. Raises UserError: not installed."""
  try:
    import wandb
  except ImportError as error:
    raise UserError(
      "log.wandb names a project, but the package wandb is not installed. `pip install wandb`, or "
      "leave log.wandb empty"
    ) from error
  return wandb


class Progress:
  """A progress bar with ETA on a terminal; a plain line at every logged step elsewhere, from the
  second on with the time left."""

  def __init__(self, start: int, total: int, out=None, evaluate_every: int = 0):
    """evaluate_every: steps from an evaluation to the next; 0 = there is one after the last."""
    self._out = out or sys.stderr
    self.total, self._bar = total, None
    self._from: tuple[int, float] | None = None  # the first step that was logged, and when
    self._evaluate_every = evaluate_every or total
    self._evaluation = self._evaluating = 0.0  # seconds of one, and of all since `_from`
    if self._out.isatty():
      from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
      )
      from rich.progress import Progress as Bar

      self._bar = Bar(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
      )
      self._task = self._bar.add_task("train", total=total, completed=start, text="")
      self._bar.start()

  def step(self, step: int) -> None:
    if self._bar:
      self._bar.update(self._task, completed=step)

  def log(self, row: Mapping[str, Any]) -> None:
    step, shown = row["step"], [f"loss {row['loss']:.4f}"]
    shown += [f"{k.split('/')[-1]} {row[k]:.3f}" for k in row if k.endswith("/accuracy")][:2]
    shown.append(f"lr {row['lr']:.2e}")
    if row.get("examples_per_second"):
      shown.append(f"{row['examples_per_second']:.0f} examples/s")
    text = "  ".join(shown)
    if self._bar:
      self._bar.update(self._task, completed=step, text=text)
      return
    self.log_line(f"step {step}/{self.total}  {text}{self._left(step)}")

  def evaluated(self, seconds: float, compiling: float) -> None:
    """After an evaluation, of which `compiling` seconds do not come again."""
    self._evaluation = max(0.0, seconds - compiling)
    if self._from:
      self._evaluating += seconds

  def _left(self, step: int) -> str:
    """The time left by the pace since the first logged step, whose own time warms up, and by the
    last evaluation; "" before.
    """
    now = time.monotonic()
    if self._from is None:
      self._from = (step, now)
      return ""
    first, begin = self._from
    left = (now - begin - self._evaluating) / max(1, step - first) * (self.total - step)
    every = self._evaluate_every  # that of this step is still to come
    left += (-(-self.total // every) - (step - 1) // every) * self._evaluation
    return f"  left {int(left) // 60}:{int(left) % 60:02d}"

  def log_line(self, text: str) -> None:
    if self._bar:
      self._bar.console.print(printing.printable(text), markup=False, highlight=False)
    else:
      printing.log(text, self._out)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def memory_in_use() -> float:
  """Peak bytes of the fullest local device; of this process where devices do not tell (CPU)."""
  peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
  if max(peaks, default=0):
    return float(max(peaks))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return float(peak if sys.platform == "darwin" else peak * 1024)


def utilisation(flops_per_step: float, seconds_per_step: float) -> float | None:
  """Model FLOPs utilisation in [0, 1] (PaLM, arXiv:2204.02311, appendix B); None where the device's
  peak is not known.
  """
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  if not peak or not seconds_per_step:
    return None
  return flops_per_step / seconds_per_step / (peak * jax.device_count())


def log(text: str) -> None:
  """Prints lines, from the main process only."""
  if multihost.is_main():
    printing.log(text)
