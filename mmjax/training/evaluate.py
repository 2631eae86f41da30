"""`mmjax eval`: a checkpoint, its evaluators (or those of another config), eval.json and
report.html.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from mmjax import config as configs
from mmjax import evaluation, files, printing, remote
from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.evaluation import judge, report
from mmjax.parallel import multihost
from mmjax.parallel.mesh import make_mesh
from mmjax.state import checkpoint
from mmjax.training.program import Program


def evaluate(
  path: str | os.PathLike,
  *,
  config_file: str | None = None,
  overrides: Sequence[str] = (),
  suite: str | None = None,
  out: str | os.PathLike | None = None,
  allow_code: Sequence[str] = (),
  judge_prompts: str | os.PathLike = "",
  judge_model: str = "",
  judge_scores: str | os.PathLike = "",
) -> dict[str, dict[str, float]]:
  """Evaluates the checkpoint at `path` (run, step or import folder) and writes eval.json and
  report.html.

  allow_code: modules that the checkpoint's config may take code from, besides those that
  `config_file` names. judge_prompts, judge_model: where prompts for an outside judge of dialogues
  go, and its name; judge_scores: a file of what it answered (judge.py).
  Returns: {evaluator name: {metric: value}}. Raises UserError: no checkpoint there, no such
  evaluator.
  """
  scores = judge.read_scores(judge_scores) if judge_scores else None
  found = checkpoint.find_checkpoint(path)
  theirs = configs.load(config_file, overrides) if config_file else None
  config = checkpoint.load_config(found, (*allow_code, *(theirs.allow_code if theirs else ())))
  assets = checkpoint.load_assets(found)
  if config_file or overrides:
    tree = config.to_dict()
    if theirs:
      tree["evaluation"] = theirs.to_dict()["evaluation"]
    own = any(name.startswith("tokenizer.") for name in assets)
    config = configs.resolve(
      tree,
      () if theirs else overrides,
      Tokenizer.from_assets(assets).special_tokens if own else None,
    )
  if not config.evaluation.evaluators:
    raise UserError(
      f"{path}: the config of this checkpoint has no evaluation.evaluators. Name a config that "
      "has some with --config"
    )
  multihost.initialize(config)

  def open_mesh() -> Mesh:
    mesh = make_mesh(config)
    configs.check(config, jax.device_count())
    if multihost.is_main():
      files.check_output(out or run_folder(path), folder=True)
      if judge_prompts:
        files.check_output(judge_prompts)
    return mesh

  if judge_prompts or judge_scores:
    kinds = {config.evaluation.evaluators[name].kind for name in evaluation.pick(config, suite)}
    if "dialogue" not in kinds:
      raise UserError(
        f"{path}: a judge reads dialogues, but no evaluator of kind 'dialogue' is run"
      )
  mesh = multihost.together(open_mesh)
  step = Program(config, mesh)
  with jax.set_mesh(mesh):
    params = checkpoint.load_params(found, step.params_spec)
    evaluators = evaluation.Evaluation(config, step.apply, mesh, assets=assets, losses=step.losses)
    results = evaluators.run({"params": params, **checkpoint.load_model_state(found)}, names=suite)
  if scores is not None:
    results = judge.with_scores(results, scores, judge_scores)
  if multihost.is_main():
    home = run_folder(path)
    with remote.Mirror(out or home) as mirror:
      mirror.fetch("metrics.jsonl", "eval.json", "summary.json")
      mirror.folder.mkdir(parents=True, exist_ok=True)
      place = found.name if found.name.isascii() and found.name.isdecimal() else ""
      named = f"checkpoints/{place}" if place and not out else os.fspath(found)
      marks = evaluators.check_sources(suite)
      about = evaluation.provenance(config, marks, named, int(place) if place else None)
      written = evaluation.write_eval_json(mirror.folder, results, about)
      page = report.write_report(mirror.folder, config, results, mirror.folder / "metrics.jsonl")
      for name, result in results.items():
        printing.log(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))
    printing.log(f"wrote {mirror.name(written)} and {mirror.name(page)}")
    if judge_prompts:
      count = judge.write_prompts(results, judge_prompts, judge_model)
      printing.log(f"wrote {count} prompts for a judge to {judge_prompts}")
  return {name: result.metrics for name, result in results.items()}


def run_folder(path: str | os.PathLike) -> Path:
  """The run folder of a step folder (RUN/checkpoints/STEP) or of RUN/best, else the path itself."""
  folder = files.as_path(path)
  if folder.parent.name == "checkpoints":
    return folder.parent.parent
  return folder.parent if folder.name == checkpoint.BEST and not folder.exists() else folder
