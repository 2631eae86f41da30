"""Checkpoints, read without a run: found, checked, and loaded in whole or in part; imports saved.

A checkpoint is a folder with the items `params`, `rest` (step, optimizer, model state, moving
average), `data`, `config`, `assets` (tokenizer and the like, base64 in JSON) and a manifest
(manifest.py). A run keeps them in WORKDIR/checkpoints/STEP (checkpointer.py); an import folder has
the items params, config and assets, and model_state where the model keeps any (batch statistics).
Leaves are stored under their names, "image/layers/mlp/up/kernel", so that a checkpoint restores
onto any mesh and into any program that knows the names. No file is trusted that was not checked.

A save is written to STEP.orbax-checkpoint-tmp and renamed when everything, the manifest last, is in
it: killed at any moment, a process leaves the earlier checkpoints as they were. At a URL of an
object store, which has no rename, a folder STEP counts from when it has its manifest.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from mmjax import files
from mmjax.config import UntrustedCode, UserError, from_json
from mmjax.files import disk_errors
from mmjax.ownership import new_folder
from mmjax.state import adapters, manifest, storage
from mmjax.state.manifest import Corrupt
from mmjax.state.paths import by_name
from mmjax.state.storage import from_main
from mmjax.state.train_state import clamped
from mmjax.state.transfer import transfer, transfer_state

log = logging.getLogger("mmjax")

BEST = "best"  # RUN/best and RUN/checkpoints/best stand for the best step of a run
# Metrics of which the smallest is the best.
_SMALLER = r"(loss|error|error_rate|mae|rmse|mse|perplexity)(@[^/]*)?$"


def best_mode(options: Mapping) -> str:
  """ "max" or "min": what `best_mode` of config.checkpoint means for its `best`."""
  if options["best_mode"] != "auto":
    return options["best_mode"]
  return "min" if re.search(_SMALLER, options["best"]) else "max"


def find_checkpoint(path: str | os.PathLike) -> epath.Path:
  """The checkpoint at `path`: a run folder (its newest usable step), RUN/best (by its
  checkpoint.best), a step folder, or an import folder; files checked.

  Raises UserError: there is none, or none that is intact. Corrupt ones that are passed over are
  named in a warning.
  """
  root = files.as_path(path)
  with files.store_errors(path, f"{path} cannot be read"):
    if root.name == BEST and not root.exists():
      return _find_best(path, root.parent)
    return _find_checkpoint(path, root)


def _find_best(path: str | os.PathLike, run: epath.Path) -> epath.Path:
  """The step with the best metric among those that a run kept. Raises UserError."""
  newest = _find_checkpoint(run, run)
  options = storage.read_json(newest / "config")["checkpoint"]
  known = {
    folder: metrics_of(folder)[options["best"]]
    for folder in sorted(newest.parent.iterdir(), key=lambda p: p.name.zfill(20))
    if is_step(folder) and options["best"] in metrics_of(folder)
  }
  if not known:
    what = (
      f"no checkpoint has {options['best']!r}" if options["best"] else "checkpoint.best is empty"
    )
    raise UserError(
      f"{path}: {what}, so that none is the best. Name a metric of an evaluator in "
      f"checkpoint.best before training, or give {run} for the newest"
    )
  return _verified_or_error(
    (max if best_mode(options) == "max" else min)(known, key=known.__getitem__)
  )


def is_step(path: epath.Path) -> bool:
  """Whether a path is a step's, as a run names it: no copy "0020", and no file or pipe."""
  name = path.name
  number = name.isascii() and name.isdecimal() and len(name) < 19 and str(int(name)) == name
  return number and (files.is_url(path) or os.path.isdir(path))


def _verified_or_error(folder: epath.Path) -> epath.Path:
  try:
    return _verified(folder)
  except Corrupt as error:
    raise UserError(f"checkpoint {folder} is corrupt: {error}. Restore it from a copy") from error


def _find_checkpoint(path: str | os.PathLike, root: epath.Path) -> epath.Path:
  steps_root = next(
    (r for r in (root / "checkpoints", root) if r.is_dir() and any(map(is_step, r.iterdir()))), None
  )
  if steps_root is None:
    if not (root / manifest.NAME).exists() and not (root / "params").exists():
      raise UserError(
        f"{path}: no checkpoint here. Give a run folder (with checkpoints/ in it), a step folder "
        "or an import folder"
      )
    candidates = [root]
  else:
    candidates = sorted(filter(is_step, steps_root.iterdir()), key=lambda p: -int(p.name))
  for folder in candidates:
    try:
      return _verified(folder)
    except Corrupt as error:
      problem = f"checkpoint {folder} is corrupt: {error}"
      if folder != candidates[-1]:
        log.warning("%s; trying the one before", problem)
  raise UserError(
    f"{problem}. "
    + ("No other one is usable. " if len(candidates) > 1 else "")
    + "Restore it from a copy"
  )


def load_params(path: str, spec: Any = None, *, average: bool = True) -> Any:
  """Parameters of a checkpoint: nested dict of NumPy arrays, or arrays sharded as `spec` (tree of
  ShapeDtypeStruct) says.

  `average`: the moving average where the run kept one, as evaluation does. Raises UserError: no
  checkpoint, or one of another model than `spec` (names, shapes and dtypes must agree).
  """
  folder = find_checkpoint(path)
  facts = manifest.read(folder)
  base = adapters.Base.of(facts)
  own = adapters.without(spec, base)
  if average and facts["average"]:
    params = storage.read_arrays(
      folder / "rest", None if own is None else {"ema": own}, only="ema/"
    )["ema"]
  else:
    params = storage.read_arrays(folder / "params", own)
  if base:
    params = adapters.composed(params, read_base(folder, base, spec), spec)
  # Older runs clipped where the scale is used.
  return clamped(params, storage.read_json(folder / "config"))


def load_model_state(path: str, spec: Any = None) -> Any:
  """What the model of a checkpoint keeps besides parameters (batch statistics), {collection: nested
  dict}; {} if nothing.

  NumPy arrays, or arrays sharded as `spec` (tree of ShapeDtypeStruct) says. Raises UserError as
  `load_params`.
  """
  folder = find_checkpoint(path)
  if (folder / "model_state").exists():
    return storage.read_arrays(folder / "model_state", spec)
  if not (folder / "rest").exists() or not any(
    name.startswith("model_state/") for name in storage.stored_leaves(folder / "rest")
  ):
    return {}
  manifest.verify(folder, ("rest",))
  return storage.read_arrays(
    folder / "rest", None if spec is None else {"model_state": spec}, only="model_state/"
  )["model_state"]


def load_assets(path: str) -> dict[str, bytes]:
  """{name: content} of what travels with the weights: tokenizer, preprocessing."""
  folder = find_checkpoint(path) / "assets"
  texts = storage.read_json(folder)
  with storage.damage(folder):
    return {name: base64.b64decode(text) for name, text in texts.items()}


def load_config(path: str, allow_code: Sequence[str] = ()) -> FrozenConfigDict:
  """The resolved config of the run that wrote the checkpoint, or of the import. It may come from a
  stranger: its kinds are those of this package, or of the modules in `allow_code`. Raises
  UserError: it names others, or is no config of this version."""
  folder = find_checkpoint(path)
  return read_config(folder, json.dumps(storage.read_json(folder / "config")), allow_code)


def read_config(
  folder: str | os.PathLike, text: str, allow_code: Sequence[str] = ()
) -> FrozenConfigDict:
  """The resolved config that was stored as `text` in the checkpoint `folder`; as `load_config`."""
  try:
    return from_json(text, allow_code)
  except UntrustedCode as error:
    raise UntrustedCode(f"checkpoint {folder}: {error}") from error
  except (UserError, ValueError) as error:
    raise UserError(f"checkpoint {folder}: its config is none of this version ({error})") from error


def save_import(
  folder: str,
  params: Any,
  config: FrozenConfigDict | Mapping | str,
  assets: Mapping[str, bytes],
  model_state: Mapping[str, Any] | None = None,
) -> None:
  """Writes an import folder: the weights of another program, with the config and assets that make
  them a model here.

  model_state: what the model keeps besides parameters, {collection: nested dict}; an item of its
  own where there is any.
  Raises UserError: the folder exists and is not empty, or cannot be written.
  """
  path = files.as_path(folder)
  with disk_errors(path, f"cannot write {folder}"), contextlib.ExitStack() as ends:
    if files.is_url(path):
      if path.exists() and any(path.iterdir()):
        raise UserError(f"{folder}: exists and is not empty. Choose another folder, or delete it")
    else:  # so that no two imports write the same files
      path = epath.Path(ends.enter_context(new_folder(path)))
      path.rmdir()  # Orbax makes it, of one that it writes beside it
    writer = storage.Writer(path, copies=False)
    params = jax.tree.map(np.asarray, params)  # scalars too
    items = dict(params=params, config=storage.config_dict(config), assets=storage.encode(assets))
    if model_state:
      items["model_state"] = model_state
    try:
      writer.start(path, items, dict(step=None, metrics={}, average=False))
    finally:
      writer.close()


def restore_into(
  params: Any,
  path: str,
  rules: tuple = ((".*", r"\g<0>"),),
  model_state: Any = None,
  source: Any = None,
) -> tuple[Any, Any, list[str]]:
  """Starts `params` from the checkpoint at `path` (config.init.from) by the rules of
  config.init.map; see transfer.py.

  params: initialised arrays, which keep their shardings. model_state: what the model keeps besides
  them (batch statistics), which follows the parameters of its module. source: what `load_params`
  has read of it. Returns both and the report, a line for each that was loaded, resized, new or
  left.
  Raises UserError: a rule or a name that matches nothing, shapes that do not agree, or statistics
  that are not there.
  """
  folder = find_checkpoint(path)  # once: a run that goes on may save a newer one meanwhile
  source = load_params(folder) if source is None else source
  source, rules = adapters.fitted(source, params, rules)
  loaded, lines = transfer(params, source, rules, path)
  if model_state:
    model_state, more = transfer_state(
      model_state, load_model_state(folder), params, source, rules, path
    )
    lines += more
  return loaded, model_state or {}, lines


def names_and_shapes(path: str) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of the parameters of a checkpoint, without reading them."""
  folder = find_checkpoint(path)
  held = storage.stored_leaves(folder / "params")
  base = adapters.Base.of(manifest.read(folder))
  if base:
    of_base = names_and_shapes(_base_folder(folder, base))
    held |= {name: of_base[origin] for name, origin in base.names.items() if origin in of_base}
  return held


def read_base(folder: epath.Path, base: adapters.Base, spec: Any) -> dict[str, Any]:
  """{name: NumPy array} of what the checkpoint `folder` leaves out. Raises UserError: its base is
  missing or another, or it was of another model than `spec`.
  """
  known = base.names if spec is None else map(adapters.plain_name, by_name(spec))
  unknown = set(base.names) - set(known)
  if unknown:
    raise UserError(
      f"checkpoint {folder} is an adapter of another model, which has {min(unknown)}. Use the "
      "config that wrote it"
    )
  return base.parameters(load_params(_base_folder(folder, base)), f"checkpoint {folder}")


def _base_folder(folder: epath.Path, base: adapters.Base) -> str:
  """The checkpoint that has the base of the one in `folder`. Raises UserError: there is none, or an
  adapter that is its own base.
  """
  try:
    found = at = find_checkpoint(base.place())
    visited = {str(folder)}
    while above := adapters.Base.of(manifest.read(at)):  # an adapter may be a base itself
      if str(at) in visited:
        raise UserError(f"{at} is its own base")
      visited.add(str(at))
      at = find_checkpoint(above.place())
    return str(found)
  except UserError as error:
    raise UserError(
      f"checkpoint {folder} is an adapter and needs its base {base.folder}: {error}, or say with "
      "MMJAX_BASE=DIR where that model is"
    ) from error


def checked(folder: epath.Path, read: Callable[[], Any]) -> Any:
  """`read()` of a checkpoint whose files are as they were written, in every process. Raises
  Corrupt.
  """
  if jax.process_count() > 1:
    problem = None
    if jax.process_index() == 0:
      try:
        manifest.verify(folder)
      except Corrupt as error:
        problem = error
    if from_main([int(problem is not None)])[0]:
      raise problem or Corrupt("process 0 says why")
    return read()
  large = manifest.check_structure(folder)
  with ThreadPoolExecutor(1) as pool:  # large files are checked while they are being read
    check = pool.submit(manifest.check_content, folder, large)
    try:
      value = read()
    except Exception:
      check.result()
      raise
    check.result()
    return value


_intact: set[tuple[str, str]] = set()  # checkpoints that this process has checked


def _verified(folder: epath.Path) -> epath.Path:
  """Checks what inference reads, once a process. Raises Corrupt."""
  content = manifest.read(folder)
  key = (str(folder), json.dumps(content["files"], sort_keys=True))
  if key not in _intact:
    manifest.verify(
      folder,
      ("params", "config", "assets", "model_state", *(("rest",) if content["average"] else ())),
    )
    _intact.add(key)
  return folder


def metrics_of(folder: epath.Path) -> dict[str, float]:
  try:
    return manifest.read(folder)["metrics"]
  except Corrupt:
    return {}
