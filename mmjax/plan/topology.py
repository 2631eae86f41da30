"""Names of TPU slices and of GPUs, what a chip of each kind has, and devices to compile for that
need not be there.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mmjax.config import ConfigError, UserError

GIB = 2**30
_MOST_SLICES = 256


class Chip(NamedTuple):
  """One kind of TPU chip (vendor's pages: cloud.google.com/tpu/docs/v5e and its neighbours), or of
  GPU, which has no more than the first fields.

  clock: what turns the compiler's cycles into seconds; with the number and size of the matrix units
  it gives `peak`.
  links: bytes a second that a chip sends to its neighbours, over all links. counts: what the number
  in a name counts.
  """

  name: str
  peak: float  # bfloat16 FLOPs a second
  memory: float  # bytes
  bandwidth: float  # bytes a second between memory and chip
  links: float
  clock: float = 0.0  # Hz
  devices: int = 1  # JAX devices a chip
  counts: str = "chips"  # or "cores" (two a chip)
  dimensions: int = 1
  largest: int = 8  # chips of the largest slice
  kinds: tuple[str, ...] = ()  # jax.Device.device_kind
  options: dict = {}  # what libtpu wants to hear besides the shape
  granule: int = 0  # bytes that copies between memory and chip are counted in
  delay_slots: int = 0  # bundles after a branch that are issued before it takes effect


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      "v4",
      275e12,
      32 * GIB,
      1228e9,
      300e9,
      1.05e9,
      1,
      "cores",
      3,
      4096,
      ("TPU v4",),
      {"chip_config_name": "megacore"},
      512,
      1,
    ),
    Chip(
      "v5e",
      197e12,
      16 * GIB,
      819e9,
      200e9,
      1.5e9,
      1,
      "chips",
      2,
      256,
      ("TPU v5 lite", "TPU v5e"),
      {},
      32,
      4,
    ),
    Chip(
      "v5p",
      459e12,
      95 * GIB,
      2765e9,
      600e9,
      1.75e9,
      1,
      "cores",
      3,
      6144,
      ("TPU v5", "TPU v5p"),
      {},
      32,
      4,
    ),
    Chip(
      "v6e",
      918e12,
      32 * GIB,
      1640e9,
      400e9,
      1.75e9,
      1,
      "chips",
      2,
      256,
      ("TPU v6 lite", "TPU v6e"),
      {},
      32,
      4,
    ),
    Chip(
      "7x", 2307e12, 192 * GIB, 7380e9, 1200e9, 2.2e9, 2, "cores", 3, 9216, ("TPU7x",), {}, 32, 6
    ),
  )
}
# By NVIDIA's data sheets of the SXM boards: dense bfloat16, NVLink in one direction, and the memory
# that the driver reports. Names have the gigabytes that are sold.
GPUS = {
  chip.name: chip
  for chip in (
    Chip("a100-40gb", 312e12, 40 * GIB, 1555e9, 300e9),
    Chip("a100-80gb", 312e12, 80 * GIB, 2039e9, 300e9),
    Chip("h100-80gb", 989e12, 79.6 * GIB, 3350e9, 450e9),
    Chip("h200-141gb", 989e12, 140.4 * GIB, 4800e9, 450e9),
    Chip("b200-180gb", 2250e12, 179 * GIB, 8000e9, 900e9),
  )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "7x", "v7x": "7x"}
# Families as libtpu spells them.
_FAMILIES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}


class Slice(NamedTuple):
  """`slices` equal slices (of GPUs: machines) of `chips` chips each, laid out as `shape`."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def device_count(self) -> int:
    return self.chips * self.chip.devices

  @property
  def is_gpu(self) -> bool:
    return self.chip.name in GPUS

  @property
  def libtpu_name(self) -> str:
    name = _FAMILIES.get(self.chip.name, self.chip.name)
    return f"{name}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Slice:
  """The slice of a product name: v5e-16 and v6e-16 (16 chips), v4-32, v5p-32 and 7x-32 (32 cores,
  16 chips), 2xv5e-256 (two slices of 256 chips), v5p:4x4x12 (a shape in chips). Or of GPUs:
  h100-80gb-8, 2xh200-8 (two machines of 8). Raises ConfigError naming the nearest valid name."""
  if found := _gpus(name):
    return found
  number, kinds = r"\d{1,9}", "|".join((*CHIPS, *_ALIASES))
  match = re.fullmatch(
    rf"(?:({number})x)?({kinds})(?:-({number})|:({number}(?:x{number})*))", name.strip().lower()
  )
  kind = _ALIASES.get(match[2], match[2]) if match else ""
  if not match:
    raise ConfigError(f"--topology {name}: no such TPU or GPU{_did_you_mean(name)}")
  chip, slices = CHIPS[kind], int(match[1] or 1)
  prefix = f"{slices}x" if slices > 1 else ""
  if not 1 <= slices <= _MOST_SLICES:
    raise ConfigError(f"--topology {name}: there may be 1 to {_MOST_SLICES:,} slices")
  if match[4]:
    shape = tuple(map(int, match[4].split("x")))
    if len(shape) != chip.dimensions or min(shape) < 1 or math.prod(shape) > chip.largest:
      example = "x".join(("4",) * chip.dimensions)
      raise ConfigError(
        f"--topology {name}: a {kind} slice has {chip.dimensions} dimensions and at most "
        f"{chip.largest} chips, such as {prefix}{kind}:{example}"
      )
    return Slice(name, chip, shape, slices)
  sizes = product_sizes(chip)
  if int(match[3]) not in sizes:
    nearest = min(sizes, key=lambda n: (abs(math.log(n / max(1, int(match[3])))), n))
    raise ConfigError(
      f"--topology {name}: no {kind} slice has {match[3]} {chip.counts}. Did you mean "
      f"{prefix}{kind}-{nearest}? There are: {', '.join(map(str, sizes))} {chip.counts}"
    )
  return Slice(name, chip, sizes[int(match[3])], slices)


def _gpus(name: str) -> Slice | None:
  """The GPUs of a name; None where it is of none. The memory may be left out where a kind has one
  size alone. Raises ConfigError: no such memory, or more GPUs than a machine has.
  """
  names = "|".join(dict.fromkeys(chip.partition("-")[0] for chip in GPUS))
  match = re.fullmatch(
    rf"(?:(\d{{1,3}})x)?({names})(?:-(\d{{1,3}}gb))?-(\d{{1,3}})", name.strip().lower()
  )
  if not match:
    return None
  known = [chip for chip in GPUS if chip.startswith(f"{match[2]}-")]
  chosen = known if match[3] is None else [chip for chip in known if chip.endswith(f"-{match[3]}")]
  slices, count = int(match[1] or 1), int(match[4])
  prefix = f"{slices}x" if slices > 1 else ""
  if len(chosen) != 1:
    names = ", ".join(f"{prefix}{chip}-{count}" for chip in known)
    raise ConfigError(f"--topology {name}: which memory? There are: {names}")
  chip = GPUS[chosen[0]]
  if not 1 <= count <= chip.largest or not 1 <= slices <= _MOST_SLICES:
    raise ConfigError(
      f"--topology {name}: a machine has 1 to {chip.largest} GPUs, and there may be 1 to "
      f"{_MOST_SLICES:,} machines, such as 2x{chip.name}-8"
    )
  return Slice(name, chip, (count,), slices)


def product_sizes(chip: Chip) -> dict[int, tuple[int, ...]]:
  """{the number in the product name: shape in chips}, doubling from the smallest slice to the
  largest.
  """
  sizes: dict[int, tuple[int, ...]] = {}
  chips = 1 if chip.dimensions == 2 else 4
  while chips <= chip.largest:
    power = int(math.log2(chips))
    shape: tuple[int, ...]
    if chip.dimensions == 2:
      shape = (2 ** (power // 2), 2 ** (power - power // 2))
    elif chips == 4:
      shape = (2, 2, 1)
    else:
      shape = tuple(sorted(2 ** (power // 3 + (i < power % 3)) for i in range(3)))
    if chips != 2:
      sizes[chips * (2 if chip.counts == "cores" else 1)] = shape
    chips *= 2
  return sizes


def chip_of(device: jax.Device) -> Chip | None:
  """The kind of chip that a device is (part of)."""
  return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


# -- Devices ---------------------------------------------------------------------------------------


def has_libtpu() -> bool:
  return importlib.util.find_spec("libtpu") is not None


def prepare() -> None:
  """Keeps JAX off accelerators of this machine, for a process that only plans, and lets it compile
  what it has compiled before: what comes from a cache leaves no schedules.
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)


def devices(target: Slice) -> list[jax.Device]:
  """Devices of the slice that exist for the compiler only. Raises UserError: libtpu does not know
  such a slice.
  """
  from jax.experimental import topologies

  # What libtpu reads when it starts: no look for real TPUs, several compilers side by side.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  options = dict(target.chip.options)
  if target.slices > 1:
    options["num_slices"] = target.slices
  if math.prod(target.shape) < 4:
    options["chips_per_host_bounds"] = (*target.shape, *(1,) * (3 - len(target.shape)))
  try:
    with quiet(), _asking_for_schedules():
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=target.libtpu_name, **options
      ).devices
  except Exception as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(
      f"--topology {target.name}: libtpu cannot make {target.libtpu_name} ({reason}). "
      "Try the shape of a whole slice, such as v5e-16 or v5p-128"
    ) from error
  if len(found) != target.device_count:
    raise UserError(
      f"--topology {target.name}: libtpu makes {len(found)} devices of {target.libtpu_name}, "
      f"not {target.device_count}. Install the libtpu that fits jax {jax.__version__}"
    )
  return list(found)


@functools.cache
def _schedules_folder() -> Path:
  """Where libtpu leaves the schedules of what this process compiles, until the process ends."""
  folder = Path(tempfile.mkdtemp(prefix="mmjax-schedules-"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
  """The folder with the schedules of what is compiled inside; emptied at the end. In a process that
  has used libtpu before `devices` asked for them, nothing comes.
  """
  folder = _schedules_folder()
  try:
    yield folder
  finally:
    for path in folder.iterdir():
      path.unlink()


@contextlib.contextmanager
def _asking_for_schedules() -> Iterator[None]:
  """What libtpu reads when it starts inside: to leave the schedules of what it compiles. Processes
  that this one starts are not asked.
  """
  flags = dict(
    xla_jf_dump_to=_schedules_folder(),
    xla_jf_dump_llo_text="true",
    xla_jf_dump_llo_pass_label_regex="final_bundles",
    xla_jf_dump_category_filter="codegen",
  )
  given = os.environ.get("LIBTPU_INIT_ARGS")
  # A libtpu without one of these flags goes on without it; flags of the user's own win.
  words = [f"--undefok={','.join(flags)}", *(f"--{k}={v}" for k, v in flags.items()), given or ""]
  os.environ["LIBTPU_INIT_ARGS"] = " ".join(words).strip()
  try:
    yield
  finally:
    if given is None:
      del os.environ["LIBTPU_INIT_ARGS"]
    else:
      os.environ["LIBTPU_INIT_ARGS"] = given


def simulated(target: Slice) -> list[jax.Device]:
  """As many simulated CPU devices. Raises UserError where this process has started JAX with
  fewer.
  """
  options: Any = jax.config  # whose attributes are declared at run time
  if options.jax_num_cpu_devices < target.device_count:
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", target.device_count)
  found = jax.devices("cpu")
  if len(found) < target.device_count:
    raise UserError(
      f"--topology {target.name} needs {target.device_count} simulated devices, and this process "
      f"has {len(found)}. Run `mmjax plan` as a command of its own, or install libtpu (pip "
      "install 'mmjax[tpu]')"
    )
  return found[: target.device_count]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps what native code writes to stderr from the terminal."""
  sys.stderr.flush()
  try:
    saved = os.dup(2)
  except OSError:
    yield
    return
  with tempfile.TemporaryFile() as sink:
    os.dup2(sink.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(saved, 2)
      os.close(saved)


def _did_you_mean(name: str) -> str:
  every = [f"{chip.name}-{size}" for chip in CHIPS.values() for size in product_sizes(chip)]
  every += [f"{chip}-{size}" for chip in GPUS for size in (1, 2, 4, 8)]
  near = difflib.get_close_matches(
    re.sub(r"^\d+x(?=v|7)", "", name.lower()), every, n=1, cutoff=0.5
  )
  nearest = f". Did you mean {near[0]!r}?" if near else "."
  return (
    f"{nearest} Names look like v5e-16, v6e-256, v4-32, v5p-128, 7x-64, 2xv5e-256 for two slices, "
    "or h100-80gb-8"
  )
