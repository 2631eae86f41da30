"""`mmjax plan` on the terminal: the figures of a plan as text, and the command itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from mmjax import config as configs
from mmjax import files, printing
from mmjax.config import UserError
from mmjax.plan import CACHE, plan, topology
from mmjax.plan.sweep import sweep
from mmjax.training.memory import gib


def command(
  file: str,
  overrides: Sequence[str],
  name: str,
  *,
  sweep_all: bool = False,
  apply: str = "",
  as_json: bool = False,
  dump_hlo: str = "",
  out: str = "plan.json",
  no_cache: bool = False,
  allow_code: Sequence[str] = (),
) -> int:
  """Plans a config file, prints the figures and writes `out`. sweep_all: tries other settings too.
  apply: file for the overrides of the best of them, one a line. Raises UserError: none fits.
  """
  for place in filter(None, (out, apply, dump_hlo)):
    files.check_output(place)
  topology.prepare()
  config = configs.load(file, overrides, allow_code)
  target = topology.parse(name)

  def log(line):
    return printing.log(line, sys.stderr)

  if not topology.has_libtpu() and not target.is_gpu:
    log(
      "libtpu is not installed: planning on simulated CPU devices, memory only (mend: pip install "
      "'mmjax[tpu]')"
    )
  cache = None if no_cache else CACHE
  result = plan(
    config, target.name, dump_hlo=dump_hlo, cache=cache, log=log, remedies=not sweep_all
  )
  if sweep_all:
    result["sweep"] = sweep(config, target.name, cache=cache, log=log)
  if out:
    with files.disk_errors(out, f"--out {out} cannot be written"):
      files.write_output(out, json.dumps(result, indent=2) + "\n")
  printing.log(json.dumps(result, indent=2) if as_json else describe(result))
  if apply:
    best = result["sweep"][0]
    if not best["fits"]:
      raise UserError(f"--apply {apply}: none of the settings tried fits {target.name}")
    with files.disk_errors(apply, f"--apply {apply} cannot be written"):
      lines = [f"--config.{change}\n" for change in best["overrides"]]
      files.write_output(apply, "".join(lines))
  return 0


def describe(result: dict[str, Any]) -> str:
  """A plan as lines for people."""
  where, chosen = result["topology"], result["config"]
  mesh = " x ".join(f"{axis} {size}" for axis, size in chosen["mesh"].items()) or "one device"
  remat = ", ".join(f"{name or 'blocks'} {policy}" for name, policy in chosen["remat"].items())
  lines = [
    f"{chosen['model']} on {where['name']}: {where['chips']} {where['chip']} chips"
    + (f" in {where['slices']} slices" if where["slices"] > 1 else "")
    + f" ({result['compiler']}"
    + (", remembered)" if result.get("cached") else ")"),
    f"  mesh {mesh}; sharding {chosen['sharding']}; batch {chosen['batch_size']}, "
    f"microbatches {chosen['microbatches']}; "
    f"remat: {remat or 'none'}; optimizer {chosen['optimizer']}",
  ]
  if result.get("changes"):
    lines.append(
      f"  with {' '.join(f'--config.{change}' for change in result['changes'])}, as several "
      "slices need: train with it"
    )
  lines += ["", *_memory(result), *_time(result)]
  for title, key in (("warnings", "warnings"), ("not in these figures", "left_out")):
    if result.get(key):
      lines += ["", title, *(f"  - {line}" for line in result[key])]
  if result.get("tried"):
    lines += [
      "",
      "tried",
      *(
        f"  {_verdict(row)}  {' '.join(f'--config.{c}' for c in row['change'])}"
        for row in result["tried"]
      ),
    ]
  if result.get("sweep"):
    lines += ["", *_sweep(result["sweep"])]
  return "\n".join(lines)


def _memory(result: dict[str, Any]) -> list[str]:
  used, capacity = result["memory"], result["topology"]["memory"]
  lines = ["memory of a chip"]
  names = dict(
    parameters="parameters",
    optimizer="optimizer state",
    average="moving average",
    model_state="model state",
    batch="batch",
    temporaries="activations, gradients, temporaries",
  )
  lines += [f"  {text:36}{gib(used[name]):>12}" for name, text in names.items() if used.get(name)]
  if result["fits"]:
    lines.append(
      f"  {'peak':36}{gib(used['peak']):>12} of {gib(capacity)} "
      f"({100 * used['peak'] / capacity:.0f}%): fits"
    )
  else:
    limit = used.get("limit") or capacity
    lines.append(
      f"  {'peak':36}{gib(used.get('peak')):>12} of {gib(limit)}: does not fit, by "
      f"{gib(used.get('over'))}"
    )
    lines += [
      f"    {gib(row['bytes']):>10}  {row['shape']}  {row['source'][-90:]}"
      for row in used.get("largest", ())
    ]
  return lines


def _time(result: dict[str, Any]) -> list[str]:
  lines = []
  if model := result.get("model"):
    parts = (
      ", ".join(
        f"{name} {100 * value / model['flops_per_step']:.1f}%"
        for name, value in model["flops"].items()
      )
      if model["flops_per_step"]
      else ""
    )
    lines += [
      "",
      "step",
      f"  {'parameters of the model':36}{model['parameters'] / 1e6:>9.2f} M",
      f"  {'model FLOPs (forward and backward)':36}{model['flops_per_step']:>12.4g}  ({parts})",
    ]
  if step := result.get("step"):
    basis = (
      f"basis: estimate; products {step['product_seconds'] * 1e3:.3f} ms at peak, memory "
      f"{step['memory_seconds'] * 1e3:.3f} ms at full bandwidth"
      if step.get("basis") == "estimate"
      else f"{step['cycles'] / 1e6:.2f} million cycles, {step['custom_call_cycles'] / 1e6:.2f} of "
      "them for custom calls"
    )
    lines.append(f"  {'estimated time':36}{step['seconds'] * 1e3:>9.3f} ms  ({basis})")
    if step.get("waiting_seconds") is None and step.get("collective_seconds"):
      lines.append(
        f"  {'collectives, part of it on top':36}{step['collective_seconds'] * 1e3:>9.3f} ms  (at "
        "the full speed of the links)"
      )
    elif step.get("collective_seconds"):
      lines.append(
        f"  {'waiting for collectives, on top':36}{step['waiting_seconds'] * 1e3:>9.3f} ms  (of "
        f"{step['collective_seconds'] * 1e3:.3f} at the full speed of the links)"
      )
    lines.append(f"  {'estimated utilisation (MFU)':36}{100 * step['mfu']:>10.1f} %")
    lines.append(
      f"  {'examples, tokens a second':36}{step['examples_per_second']:>12,.0f}  "
      f"{step['tokens_per_second']:,.0f}"
    )
  for source, kind in result.get("kinds", {}).items():
    time = f"{kind['seconds'] * 1e3:>9.3f} ms" if kind["seconds"] else f"{'':>12}"
    lines.append(
      f"  {'  steps of ' + source:36}{time}  ({100 * kind['share']:.0f}% of the steps, peak "
      f"{kind['peak'] / 2**30:.2f} GiB)"
    )
  if run := result.get("run"):
    lines.append(
      f"  {'whole run':36}{run['chip_hours']:>12,.2f} chip-hours  ({run['steps']:,} steps, "
      f"{run['hours']:,.2f} hours)"
    )
  if calls := result.get("custom_calls"):
    lines += ["", f"custom calls{'':26}{'count':>8}{'GFLOP':>10}{'MiB':>10}{'Mcycles':>10}  by"]
    lines += [
      "  "
      f"{row['name'][:34]:36}{row['count']:>8}{row['flops'] / 1e9:>10.3f}"
      f"{row['bytes'] / 2**20:>10.2f}{row['cycles_added'] / 1e6:>10.3f}  {row['basis']}"
      for row in calls
    ]
  if found := result.get("collectives"):
    lines += ["", f"collectives{'':27}{'count':>8}{'MiB a chip':>12}"]
    lines += [
      f"  {kind:36}{entry['count']:>8}{entry['bytes'] / 2**20:>12.2f}"
      for kind, entry in found.items()
    ]
  if largest := result.get("largest"):
    lines += ["", f"where the cycles go{'':19}{'count':>8}{'Mcycles':>10}"]
    lines += [
      f"  {row['operation'][:34]:36}{row['count']:>8}{row['cycles'] / 1e6:>10.3f}  "
      f"{row['source'][-70:]}"
      for row in largest[:8]
    ]
  return lines


def _sweep(rows: list[dict[str, Any]]) -> list[str]:
  lines = [
    f"{'mesh':32}{'sharding':14}{'remat':15}{'micro':>6}{'unroll':>7}{'ms':>11}{'waiting':>9}"
    f"{'MFU %':>8}{'peak':>13}"
  ]
  for row in rows:
    if "error" in row:
      lines.append(f"  impossible: {' '.join(row['overrides'])}: {row['error'][:120]}")
      continue
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device"
    remat = "/".join(dict.fromkeys(row["remat"].values())) or "-"
    unroll = "/".join(dict.fromkeys(str(n) for n in row["scan_unroll"].values() if n)) or "-"
    timed = (
      f"{row['seconds'] * 1e3:>11.3f}{(row['waiting_seconds'] or 0) * 1e3:>9.3f}"
      f"{100 * row['mfu']:>8.1f}"
      if row.get("seconds")
      else f"{'':>28}"
    )
    lines.append(
      f"{mesh:32}{row['sharding']:14}{remat:15}{row['microbatches']:>6}{unroll:>7}{timed}"
      f"{gib(row['peak']):>13}"
      + ("" if row["fits"] else "  does not fit")
      + (f"  {row['warnings']} warning(s)" if row["warnings"] else "")
    )
  best = rows[0] if rows and rows[0]["fits"] else None
  if best:
    changes = " ".join(f"--config.{change}" for change in best["overrides"])
    lines.append(f"best: {changes or 'the config as it is'}")
  return lines


def _verdict(row: dict[str, Any]) -> str:
  return f"fits ({gib(row['peak'])})" if row["fits"] else f"over by {gib(row['over'])}"
