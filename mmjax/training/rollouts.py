"""Answers that a model draws to the prompts of a step, their rewards, and the rows to learn from.

What is drawn depends on the parameters, the seed and the step alone, so that a run that goes on
draws what an unbroken one draws. The answers to a prompt are one group; prompts are read once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.data.pipeline import Pipeline, prompt_spec
from mmjax.data.rollouts import Asked, rollout_spec, sampling
from mmjax.data.text import normalise_caption
from mmjax.data.tokenizers import decode, load_tokenizer
from mmjax.inference.engine import Decoding, read_prompts, run_of_prompts
from mmjax.kinds import load_function
from mmjax.models.stack import with_layers_apart
from mmjax.objectives.grpo import answer_log_probs
from mmjax.parallel import multihost, rules
from mmjax.state.train_state import TrainState
from mmjax.training.forward import stream
from mmjax.training.program import Program

Array = jax.Array


class Rollouts:
  """The steps of a run whose objective rewards the model's own answers.

  Raises UserError: there are several processes, or the check cannot be imported.
  """

  def __init__(self, config: FrozenConfigDict, program: Program, pipeline: Pipeline):
    entry = sampling(config)
    assert entry is not None
    if jax.process_count() > 1:
      raise UserError(
        f"objective 'grpo' runs in one process, but there are {jax.process_count()}. Start the run "
        "on one host"
      )
    self.config, self.program, self.pipeline, self.entry = config, program, pipeline, entry
    self.rewards = Rewards(config, entry)
    self._programs: dict[str, Any] = {}

  @classmethod
  def of(cls, config: FrozenConfigDict, program: Program, pipeline: Pipeline) -> Rollouts | None:
    """None where the batches of a run are data, not answers."""
    return cls(config, program, pipeline) if sampling(config) else None

  def compile(self) -> None:
    """The programs that draw answers and make rows of them; made once, ahead of the first step."""
    program = self.program
    state, batch = program.state_spec, rules.batch_sharding(program.mesh)

    def placed(spec: Any) -> Any:
      return rules.with_shardings(spec, jax.tree.map(lambda _: batch, spec))

    variables = {"params": state.params, **state.model_state}
    prompts = placed(prompt_spec(self.config))
    rows, entry = program.batch_spec["valid"].shape[0], self.entry
    answers = placed(jax.ShapeDtypeStruct((rows, entry["max_length"]), np.int32))
    rollout = {
      name: jax.ShapeDtypeStruct((rows, *shape), kind, sharding=batch)
      for name, (shape, kind) in rollout_spec(entry, 0)["rollout"].items()
      if name != "old"
    }
    for name, function, given in (
      ("draw", self._draw, (variables, prompts, state.step)),
      ("rows", self._rows, (variables, prompts, answers, rollout)),
    ):
      lowered = program.in_mesh(jax.jit(function, out_shardings=batch).lower)(*given)
      self._programs[name] = program.compiled(lowered)

  def answered(self, state: TrainState, prompts: dict, at: int) -> dict:
    """The batch of step `at` (counted from 1): the model's answers to `prompts` with their rewards.
    prompts: the pipeline's batch, on the devices.
    """
    variables = {"params": state.params, **state.model_state}
    answers = self._programs["draw"](variables, prompts, state.step)
    found = self.rewards(self.pipeline.asked(at - 1), np.asarray(answers))
    rollout = multihost.to_device({"rollout": found}, self.program.mesh)["rollout"]
    return self._programs["rows"](variables, prompts, answers, rollout)

  def train(self, state: TrainState, batch: dict, source: str) -> tuple[TrainState, dict]:
    """The updates of a step on its answers, and the metrics of the last. `state` is used up."""
    skipped: Array | None = None
    for left in reversed(range(self.entry["updates"])):
      step = jnp.copy(state.step) if left else None
      state, metrics = self.program.train(state, batch, source)
      if skipped is not None:
        metrics["skipped"] = jnp.maximum(metrics["skipped"], skipped)
      if left:
        state, skipped = state.replace(step=step), metrics["skipped"]
    return state, metrics

  def _draw(self, variables: Any, prompts: dict, step: Array) -> Array:
    """int32 [P * answers, max_length]: the answers, those to one prompt side by side."""
    program, entry = self.program, self.entry
    variables = with_layers_apart(self._gathered(variables))

    def each(x: Array, axis: int = 0) -> Array:
      return rules.constrain_batch(jnp.repeat(x, entry["answers"], axis=axis), axis=axis)

    logits, cache = read_prompts(program.model, variables, prompts, entry["max_length"])
    sequence = {name: each(prompts["sequence"][name]) for name in ("tokens", "length")}
    how = Decoding("sample", temperature=entry["temperature"])
    run = run_of_prompts(program.model, variables, sequence, entry["max_length"], how)
    rng = stream(jax.random.fold_in(jax.random.key(self.config.seed), step), "rollouts")
    cache = jax.tree.map(lambda x: each(x, 1), cache)
    return run.whole(each(logits), cache, rng, None)[0]

  def _rows(self, variables: Any, prompts: dict, answers: Array, rollout: dict) -> dict:
    """The batch of the train step."""
    model, length = self.program.model, self.config.data.sequence.length
    batch = rows_of_answers(prompts, answers, length, (model.eos_id, *model.end_ids))
    batch["rollout"] = rollout
    if self.entry["updates"] > 1:
      given: Any = model.apply(self._gathered(variables), batch, method="next_tokens")
      old = answer_log_probs(given, batch, self.entry["temperature"])
      batch["rollout"] = {**rollout, "old": old}
    return batch

  def _gathered(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    program = self.program
    params = rules.gather_parameters(variables["params"], program.params_spec, program.axes)
    return {**variables, "params": params}


def rows_of_answers(prompts: dict, answers: Array, length: int, ends: Sequence[int]) -> dict:
  """Rows of `length` tokens: prompts [P, ...], each with answers int32 [P * G, T] of its group as
  targets, up to and with the first of the tokens `ends`.
  """
  group = len(answers) // len(prompts["valid"])
  given = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), prompts)
  sequence = dict(given.pop("sequence"))
  begin = sequence.pop("length")[:, None]
  place = jnp.arange(length) - begin  # in the answer

  is_end = jnp.isin(answers, jnp.asarray(ends, jnp.int32))
  size = jnp.where(is_end.any(1), jnp.argmax(is_end, axis=1) + 1, answers.shape[1])[:, None]
  here = (place >= 0) & (place < size)

  def extended(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

  sequence = {name: extended(x) for name, x in sequence.items()}
  token = jnp.take_along_axis(answers, jnp.clip(place, 0, answers.shape[1] - 1), axis=1)
  sequence["tokens"] = jnp.where(here, token, sequence["tokens"])
  sequence["loss_mask"] = here
  sequence["segment_ids"] = jnp.where(here, 1, sequence["segment_ids"])
  if "media_index" in sequence:
    sequence["media_index"] = jnp.where(place >= 0, -1, sequence["media_index"])
  # Positions go on from the furthest that the last token of the prompt has on any axis.
  positions = sequence["positions"]
  furthest = positions.reshape(*positions.shape[:2], -1).max(-1)
  next_one = jnp.take_along_axis(furthest, begin - 1, axis=1) + 1 + place
  axes = (..., *[None] * (positions.ndim - 2))
  sequence["positions"] = jnp.where(here[axes], next_one[axes], positions)
  return rules.constrain_batch({**given, "sequence": sequence})


class Rewards:
  """What answers are worth, on the host. Raises UserError: the check cannot be imported."""

  def __init__(self, config: FrozenConfigDict, entry: Mapping[str, Any]):
    where = next(name for name, one in config.objectives.items() if one.kind == "grpo")
    self.where, self.entry = f"objectives.{where}.check", entry
    self.check = load_function(entry["check"], self.where) if entry["check"] else None
    self.tokenizer = load_tokenizer(config.data)
    self.ends = (config.model.eos_id, *config.model.end_ids)

  def __call__(self, asked: Sequence[Asked | None], answers: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays [P * G] of batch["rollout"] but `old`, of the answers int32 [P * G, T] to P
    prompts; those to a prompt that cannot be read are worth nothing. Raises UserError: the check
    fails.
    """
    group = len(answers) // len(asked)
    names = [name for name in ("exact", "formed", "right") if name != "right" or self.check]
    found = {name: np.zeros(len(answers), bool) for name in names}
    for row, tokens in enumerate(answers):
      if (one := asked[row // group]) is not None:
        for name, value in self.verdicts(one, tokens).items():
          found[name][row] = value
    entry = self.entry
    weights = dict(exact=entry["exact"], formed=entry["form"], right=entry["right"])
    reward = sum((weights[name] * found[name] for name in names), np.zeros(len(answers)))
    advantage, tied = advantages(reward.reshape(-1, group), entry["normalise"])
    return dict(
      advantage=advantage.reshape(-1).astype(np.float32),
      reward=reward.astype(np.float32),
      tied=np.repeat(tied, group),
      **found,
    )

  def verdicts(self, asked: Asked, tokens: np.ndarray) -> dict[str, bool]:
    """{"exact", "formed", and with a check "right"} of an answer int32 [T]."""
    text, pattern = decode(self.tokenizer, tokens.tolist(), self.ends), self.entry["pattern"]
    ended = bool(np.isin(tokens, self.ends).any())
    found = dict(
      exact=normalise_caption(text) == normalise_caption(asked.answer),
      formed=ended and (not pattern or re.fullmatch(pattern, text, re.S) is not None),
    )
    if self.check:
      try:
        found["right"] = all(self.check(asked.facts, asked.question, asked.answer, text).values())
      except Exception as error:  # of the user's function
        raise UserError(
          f"{self.where} {self.entry['check']!r} failed for the text {text!r:.80}: "
          f"{type(error).__name__}: {error!s:.200}"
        ) from error
    return found


def advantages(rewards: np.ndarray, normalise: bool) -> tuple[np.ndarray, np.ndarray]:
  """(advantages float64 [P, G] of rewards [P, G] within their group, bool [P]: whether a group has
  equal rewards, and so no advantage). normalise: divided by the standard deviation of the group.
  """
  # Sums of the same parts in another order differ by rounding.
  tied = np.ptp(rewards, axis=1) <= 1e-6 * np.abs(rewards).max(1)
  found = np.where(tied[:, None], 0.0, rewards - rewards.mean(1, keepdims=True))
  if normalise:
    found = found / np.where(tied, 1.0, rewards.std(1))[:, None]
  return found, tied
