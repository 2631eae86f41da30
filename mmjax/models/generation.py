"""Text from a model that scores the next token: greedy, sampling, beam search. One compiled loop of
static shapes, rows apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError

Array = jax.Array
# step(token int32 [N], index int32, state, constants) -> (logits float32 [N, V] of the token after
# it, state)
Step = Callable[[Array, Array, Any, Any], tuple[Array, Any]]
Method = Literal["greedy", "sample", "beam"]
LOW = -1e30


def generate(
  step: Step,
  state: Any,
  constants: Any = None,
  *,
  rows: int,
  max_length: int,
  prompt: Array,
  eos_id: int,
  pad_id: int,
  method: Method = "greedy",
  beams: int = 4,
  length_penalty: float = 1.0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  rng: Array | None = None,
  ids: Array | None = None,
) -> tuple[Array, Array]:
  """(tokens int32 [rows, max_length], scores float32 [rows]): what follows the prompt, up to and
  with <eos>, then padding.

  step: see `Step`; index counts the tokens fed so far. state: a tree of arrays with rows on axis 1
  (a Decoder's cache, long enough for prompt and max_length). constants: the same for what no step
  changes (a Decoder's Memory).
  prompt: int32 [P] for all rows or [rows, P]. The state holds P + max_length - 1 tokens at the end.
  A row's text depends on that row alone. It may run inside jax.jit.

  greedy: the likeliest token each time. sample: drawn from softmax(logits / temperature) among the
  `top_k` likeliest (0 = all) and the smallest set of at least probability `top_p` (Holtzman et al.
  2020, arXiv:1904.09751); row i draws with `rng` and ids[i] (default i), whatever the batch. Scores
  of both: sums of log softmax(logits) over the text.
  beam: the best of `beams` texts by sum of log-probabilities / length ** length_penalty, which is
  the score (Wu et al. 2016, arXiv:1609.08144, section 7, with a plain power); a row ends when no
  open text can come to beat a finished one.
  Raises UserError: an unknown method, settings out of range, or sampling without `rng`.
  """
  if method not in ("greedy", "sample", "beam"):
    raise UserError(f"generation method {method!r} is unknown; there are: greedy, sample, beam")
  if max_length < 1 or beams < 1 or temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
    raise UserError(
      "generation needs max_length and beams >= 1, temperature > 0, top_p in (0, 1] and top_k >= "
      f"0, not {max_length}, {beams}, {temperature}, {top_p}, {top_k}"
    )
  if method == "sample" and rng is None:
    raise UserError("sampling needs a key: pass `rng`")
  prompt = jnp.asarray(prompt, jnp.int32)
  prompt = jnp.broadcast_to(prompt, (rows, prompt.shape[-1]))
  read = prompt.shape[1] - 1
  if read:

    def feed(state, at):
      return (step(at[1], at[0], state, constants)[1], None)

    state, _ = jax.lax.scan(feed, state, (jnp.arange(read), prompt[:, :-1].T))

  def advance(token, i, state, constants):
    return step(token, read + i, state, constants)

  if method == "beam":
    return _beam(
      advance, state, constants, prompt[:, -1], max_length, eos_id, pad_id, beams, length_penalty
    )

  def pick(logits, i):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  if method == "sample":
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      rng, jnp.arange(rows) if ids is None else jnp.asarray(ids)
    )

    def pick(logits: Array, i: Array) -> Array:
      draws = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      return jax.vmap(jax.random.categorical)(
        draws, restrict(logits / temperature, top_k, top_p)
      ).astype(jnp.int32)

  return _one_by_one(advance, state, constants, prompt[:, -1], max_length, eos_id, pad_id, pick)


def can_generate(model: nn.Module) -> bool:
  """Whether `generate_text` has something to write with: a decoder, or a CTC head."""
  return getattr(model, "decoder", None) is not None or bool(getattr(model, "spelling", 0))


def generate_text(
  model: nn.Module,
  variables: Any,
  source: tuple[str, ...],
  max_length: int,
  beams: int,
  length_penalty: float,
  batch: dict,
) -> Array:
  """int32 [B, max_length]: what a model with a decoder writes about the source modalities of a
  batch; greedy, or by beam search.

  A model with a CTC head spells it: the likeliest token of each frame, equal neighbours once,
  without blanks, then blanks. Other texts follow the decoder's prompt, in the language that it
  detects where it has several, and end with its <eos> and padding. May run inside jax.jit.
  """
  decoder = getattr(model, "decoder", None)
  if decoder is None:
    spelled = without_repeats(
      model.apply(variables, tuple(source), batch, method="spell"), model.blank
    )[:, :max_length]
    return jnp.pad(
      spelled, ((0, 0), (0, max_length - spelled.shape[1])), constant_values=model.blank
    )
  cache, memory = model.apply(
    variables, tuple(source), batch, length=max_length, method="start_decoding"
  )

  def step(token, i, cache, memory):
    return model.apply(variables, token, i, cache, memory, method="next_logits")

  prompt, rows = jnp.asarray(decoder.prompt, jnp.int32), cache.key.shape[1]
  if decoder.languages:
    prompt = (
      jnp.broadcast_to(prompt, (rows, len(prompt)))
      .at[:, 1]
      .set(model.apply(variables, cache, memory, method="detect_language"))
    )
  method = "beam" if beams > 1 else "greedy"
  return generate(
    step,
    cache,
    memory,
    rows=rows,
    max_length=max_length,
    method=method,
    beams=beams,
    length_penalty=length_penalty,
    prompt=prompt,
    eos_id=decoder.eos_id,
    pad_id=decoder.pad_id,
  )[0]


def without_repeats(path: Array, blank: int) -> Array:
  """The labels of a CTC path (Graves et al. 2006, section 3.1): int32 [B, T] -> [B, T], filled up
  with blanks.
  """
  before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
  kept = (path != blank) & (path != before)
  labels = jnp.take_along_axis(path, jnp.argsort(~kept, axis=1, stable=True), axis=1)
  return jnp.where(jnp.arange(path.shape[1]) < kept.sum(1, keepdims=True), labels, blank)


def generate_timed_text(
  model: nn.Module,
  variables: Any,
  source: tuple[str, ...],
  max_length: int,
  beams: int,
  length_penalty: float,
  batch: dict,
) -> Array:
  """int32 [B, max_length]: as `generate_text`, with tokens for times among those of the text, as
  Whisper has them (Radford et al. 2022, section 2.3). batch["prompt"]: {"tokens" int32 [B, P]},
  what each row's text follows.

  A text begins with a time, and times come in pairs, the end of one segment and the start of the
  next, never falling; where all times together are likelier than any other token, a time is
  written.
  """
  decoder, prompt = model.decoder, batch["prompt"]["tokens"]
  cache, memory = model.apply(
    variables, tuple(source), batch, length=max_length, method="start_decoding"
  )
  rows, start = cache.key.shape[1], prompt.shape[1]
  written = Timed(
    cache, jnp.zeros((1, rows), bool), jnp.ones((1, rows), bool), jnp.full((1, rows), -1, jnp.int32)
  )

  def step(token: Array, i: Array, state: Timed, memory: Any) -> tuple[Array, Timed]:
    logits, cache = model.apply(variables, token, i, state.cache, memory, method="next_logits")
    is_time = (token >= decoder.time_tokens) & (i >= start)  # what is before that is the prompt's
    state = Timed(
      cache,
      is_time[None],
      jnp.where(i > start, state.last, True),
      jnp.where(is_time[None], token, state.latest),
    )
    return jnp.where(
      i < start - 1, logits, allow_times(logits, state, i == start - 1, decoder)
    ), state

  method = "beam" if beams > 1 else "greedy"
  return generate(
    step,
    written,
    memory,
    rows=rows,
    max_length=max_length,
    method=method,
    beams=beams,
    length_penalty=length_penalty,
    prompt=prompt,
    eos_id=decoder.eos_id,
    pad_id=decoder.pad_id,
  )[0]


class Timed(NamedTuple):
  """The state of a text with times, rows on axis 1: whether the last token is a time, and the one
  before it (True where there is none), bool [1, N]; the latest time int32 [1, N], -1 = none yet."""

  cache: Any
  last: Array
  before: Array
  latest: Array


def allow_times(logits: Array, state: Timed, first: Array, decoder: nn.Module) -> Array:
  """logits [N, V] with -1e30 for the tokens that may not follow, by the rules of
  `generate_timed_text`. first: nothing is written yet.
  """
  begin, tokens = decoder.time_tokens, jnp.arange(logits.shape[-1])
  last, before, latest = state.last[0, :, None], state.before[0, :, None], state.latest[0, :, None]
  is_time = tokens >= begin
  least = jnp.where(last & ~before, latest, latest + 1)
  never = (
    (tokens == begin - 1) | (last & before & is_time) | (last & ~before & (tokens < decoder.eos_id))
  )
  never |= is_time & (latest >= 0) & (tokens < least)
  too_late = (
    tokens > begin + decoder.first_time if decoder.first_time >= 0 else jnp.zeros_like(is_time)
  )
  logits = jnp.where(never | (first & (~is_time | too_late)), LOW, logits)
  times = jax.nn.logsumexp(jnp.where(is_time, logits, LOW), axis=-1, keepdims=True)
  text = jnp.max(jnp.where(is_time, LOW, logits), axis=-1, keepdims=True)
  return jnp.where((times > text) & ~is_time, LOW, logits)


def restrict(logits: Array, top_k: int, top_p: float) -> Array:
  """logits float32 [N, V] with -1e30 for tokens outside the `top_k` likeliest (0 = all) and the
  nucleus of `top_p`.
  """
  size = logits.shape[-1]
  if not 0 < top_k < size and top_p >= 1:
    return logits
  order = jnp.argsort(-logits, axis=-1)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  keep = jnp.arange(size) < (top_k or size)
  chances = jax.nn.softmax(jnp.where(keep, ranked, LOW), axis=-1)
  keep &= jnp.cumsum(chances, axis=-1) - chances < top_p
  keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
  return jnp.where(keep, logits, LOW)


class _Open(NamedTuple):
  i: Array
  token: Array
  done: Array
  tokens: Array
  scores: Array
  state: Any


def _one_by_one(
  step: Step,
  state: Any,
  constants: Any,
  first: Array,
  length: int,
  eos: int,
  pad: int,
  pick: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
  rows = first.shape[0]

  def body(at: _Open) -> _Open:
    logits, state = step(at.token, at.i, at.state, constants)
    logits = logits.astype(jnp.float32)
    chosen = pick(logits, at.i)
    gain = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
    token = jnp.where(at.done, pad, chosen)
    return _Open(
      at.i + 1,
      token,
      at.done | (token == eos),
      at.tokens.at[:, at.i].set(token),
      at.scores + jnp.where(at.done, 0, gain),
      state,
    )

  start = _Open(
    jnp.int32(0),
    first,
    jnp.zeros(rows, bool),
    jnp.full((rows, length), pad, jnp.int32),
    jnp.zeros(rows, jnp.float32),
    state,
  )
  end = jax.lax.while_loop(lambda at: (at.i < length) & ~at.done.all(), body, start)
  return end.tokens, end.scores


class _Beams(NamedTuple):
  """Of B rows and K beams: open texts with their sums of log-probabilities, finished ones with
  their scores, best first.
  """

  i: Array
  open_tokens: Array  # [B, K, T]
  open_sums: Array  # [B, K]
  tokens: Array  # [B, K, T]
  scores: Array  # [B, K]
  state: Any


def _beam(
  step: Step,
  state: Any,
  constants: Any,
  first: Array,
  length: int,
  eos: int,
  pad: int,
  beams: int,
  penalty: float,
) -> tuple[Array, Array]:
  rows = first.shape[0]
  state, constants = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), (state, constants))

  def normalised(sums, n):
    return sums / jnp.asarray(n, jnp.float32) ** penalty

  def going(at: _Beams) -> Array:
    # Sums only fall, so that the best an open text can come to is its sum now over the kindest
    # length that is left.
    hope = normalised(at.open_sums[:, 0], length if penalty > 0 else at.i + 1)
    return (at.i < length) & (hope > at.scores[:, -1]).any()

  def body(at: _Beams) -> _Beams:
    last = jnp.where(at.i == 0, first[:, None], at.open_tokens[:, :, at.i - 1])
    logits, state = step(last.reshape(-1), at.i, at.state, constants)
    gains = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, beams, -1)
    size = gains.shape[-1]
    sums, found = jax.lax.top_k(
      (at.open_sums[:, :, None] + gains).reshape(rows, -1), min(2 * beams, beams * size)
    )
    parent, token = found // size, (found % size).astype(jnp.int32)
    texts = (
      jnp.take_along_axis(at.open_tokens, parent[:, :, None], axis=1).at[:, :, at.i].set(token)
    )
    ended = token == eos
    # Only an end among the best K counts; the K after them are there to go on in place of those
    # that ended.
    finished = jnp.where(
      ended & (sums > LOW / 2) & (jnp.arange(sums.shape[1]) < beams),
      normalised(sums, at.i + 1),
      LOW,
    )
    tokens, scores, _ = _best(
      beams, jnp.concatenate([at.tokens, texts], 1), jnp.concatenate([at.scores, finished], 1)
    )
    open_tokens, open_sums, chosen = _best(beams, texts, jnp.where(ended, LOW, sums))
    parent = jnp.take_along_axis(parent, chosen, axis=1) + beams * jnp.arange(rows)[:, None]
    return _Beams(
      at.i + 1,
      open_tokens,
      open_sums,
      tokens,
      scores,
      jax.tree.map(lambda x: x[:, parent.reshape(-1)], state),
    )

  nothing = jnp.full((rows, beams, length), pad, jnp.int32)
  none = jnp.full((rows, beams), LOW, jnp.float32)
  end = jax.lax.while_loop(
    going, body, _Beams(jnp.int32(0), nothing, none.at[:, 0].set(0), nothing, none, state)
  )
  # Texts that the length cuts off compete too.
  cut = jnp.where(
    (end.i == length) & (end.open_sums > LOW / 2), normalised(end.open_sums, length), LOW
  )
  tokens, scores, _ = _best(
    1, jnp.concatenate([end.tokens, end.open_tokens], 1), jnp.concatenate([end.scores, cut], 1)
  )
  return tokens[:, 0], scores[:, 0]


def _best(count: int, texts: Array, scores: Array) -> tuple[Array, Array, Array]:
  """The `count` texts [B, N, T] of the highest scores [B, N], best first, and where they stood."""
  scores, index = jax.lax.top_k(scores, count)
  return jnp.take_along_axis(texts, index[:, :, None], axis=1), scores, index
