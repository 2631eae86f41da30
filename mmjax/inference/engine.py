"""Text from a model that scores the next token: greedy, sampled, or by beam search; and the score
of a given text. One compiled loop of static shapes, in which rows do not meet.

A model reads its prompts at once (`prefill`), of unequal lengths, and gives the logits of the first
token and a cache. `generate` goes on from there: each row has a place of its own in the cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.config import UserError
from mmjax.models.stack import with_layers_apart

Array = jax.Array
# step(token int32 [N], place int32 [N], state, constants) -> (logits float32 [N, V] of the token
# that follows `token`, which stands at `place`; state)
DecodeStep = Callable[[Array, Array, Any, Any], tuple[Array, Any]]
# rules(logits float32 [N, V], tokens int32 [N, T] generated so far, their number) -> logits
Rules = Callable[[Array, Array, Array], Array]
Method = Literal["greedy", "sample", "beam"]
LOW = -1e30
LARGEST = 2**31  # of a setting: more than any vocabulary, and no float32 that ends in inf


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How the next token is chosen; hashable, so that a program can be compiled for it.

  method: greedy: the likeliest token each time. sample: drawn from softmax(logits / temperature)
  among the `top_k` likeliest (0 = all), those of at least `min_p` times the likeliest one's
  probability (Nguyen et al. 2024, arXiv:2407.01082), and the smallest set of at least probability
  `top_p` (Holtzman et al. 2020, arXiv:1904.09751). beam: the best of `beams` texts by sum of
  log-probabilities / length ** length_penalty (Wu et al. 2016, arXiv:1609.08144, section 7, with a
  plain power); a row ends when no open text can come to beat a finished one.
  repetition_penalty: logits of tokens that the prompt or the text has already are divided by it
  where positive, else multiplied (Keskar et al. 2019, arXiv:1909.05858); 1 = none.
  Raises UserError: an unknown method, or settings out of range.
  """

  method: Method = "greedy"
  beams: int = 1
  length_penalty: float = 1.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self) -> None:
    if self.method not in ("greedy", "sample", "beam"):
      raise UserError(
        f"generation method {self.method!r} is unknown; there are: greedy, sample, beam"
      )
    ranges = dict(
      beams=(self.beams >= 1, "at least 1"),
      temperature=(self.temperature > 0, "above 0"),
      top_k=(self.top_k >= 0, "at least 0"),
      top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
      min_p=(0 <= self.min_p < 1, "from 0 to below 1"),
      repetition_penalty=(self.repetition_penalty > 0, "above 0"),
    )
    for name, (fine, wanted) in ranges.items():
      if not fine:
        raise UserError(f"generation: {name} is {getattr(self, name)}, but must be {wanted}")


def settings_of_file(content: bytes) -> dict[str, float]:
  """How a generation_config.json wants texts decoded: settings of `Decoding`, temperature 0 where
  they are not drawn. Raises UserError: it is no object of JSON, or a setting is no number that
  float32 holds.
  """
  try:
    stated = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(f"generation_config.json is no readable JSON ({error})") from error
  if not isinstance(stated, dict):
    raise UserError("generation_config.json is no object of JSON")
  usual = dict(repetition_penalty=1.0)
  if stated.get("do_sample"):
    usual |= dict(temperature=1.0, top_k=50, top_p=1.0, min_p=0.0)
  found: dict[str, float] = dict(temperature=0.0)
  for name, default in usual.items():
    value = stated.get(name)
    found[name] = default if value is None else value
    number = isinstance(found[name], (int, float)) and not isinstance(value, bool)
    if not number or not abs(found[name]) < LARGEST:
      raise UserError(f"generation_config.json: {name} is {value!r:.60}, but must be a number")
    if name == "top_k" and found[name] != int(found[name]):
      raise UserError(f"generation_config.json: top_k is {value!r:.60}, but must be whole")
  return found


def decoding_of(
  usual: Mapping[str, float], beams: int = 1, length_penalty: float = 1.0, **given: Any
) -> Decoding:
  """Decoding by `beams`, or with temperature 0 greedy, else drawn; settings that are None in
  `given` are as in `usual`.
  """
  settings = {**usual, **{name: value for name, value in given.items() if value is not None}}
  temperature = settings.pop("temperature", 0.0)
  method: Method = "beam" if beams > 1 else "sample" if temperature else "greedy"
  return Decoding(method, beams, length_penalty, temperature or 1.0, **settings)


def generate(
  step: DecodeStep,
  logits: Array,
  state: Any,
  constants: Any = None,
  *,
  places: Array,
  max_length: int,
  eos_id: int | tuple[int, ...],
  pad_id: int,
  decoding: Decoding = Decoding(),
  rules: Rules | None = None,
  prompt: Array | None = None,
  rng: Array | None = None,
  ids: Array | None = None,
) -> tuple[Array, Array]:
  """(tokens int32 [N, max_length], scores float32 [N]): what follows the prompts, up to and with
  <eos>, then padding.

  logits float32 [N, V]: of the first token, by a model that has read the prompts. state: a tree of
  arrays with rows on axis 1 (a cache with room for max_length - 1 tokens more). constants: the same
  for what no step changes. places int32 [N]: where each row's first token will stand, which is the
  length of its prompt. eos_id: what ends a text, or several such tokens.
  rules: changes the logits by what was generated. prompt: int32 [N, P], -1 = no token; read by
  repetition_penalty alone. rng: for sampling; row i draws with `rng` and ids[i] (default i),
  whatever the batch.
  The score of a text is the sum of its log softmax(logits), which beams divide by a power of its
  length. May run inside jax.jit. Raises UserError: sampling without `rng`, or no room for a token.
  """
  ends = eos_id if isinstance(eos_id, tuple) else (eos_id,)
  run = Run(step, constants, max_length, ends, pad_id, decoding, rules, places, prompt)
  return run.whole(logits, state, rng, ids)


class Open(NamedTuple):
  """Texts under way: `made` tokens of each, tokens int32 [N, T], scores float32 [N], done
  bool [N], the state of the model, keys of the rows' draws or None.
  """

  made: Array
  tokens: Array
  scores: Array
  done: Array
  state: Any
  keys: Array | None


class _Beams(NamedTuple):
  """Of B rows and K beams: open texts with their sums of log-probabilities, finished ones with
  their scores, best first.
  """

  made: Array
  open_tokens: Array  # [B, K, T]
  open_sums: Array  # [B, K]
  tokens: Array  # [B, K, T]
  scores: Array  # [B, K]
  state: Any


class Run(NamedTuple):
  """What stays the same while texts are generated."""

  step: DecodeStep
  constants: Any
  length: int
  ends: tuple[int, ...]
  pad: int
  decoding: Decoding
  rules: Rules | None
  places: Array
  prompt: Array | None

  def whole(
    self, logits: Array, state: Any, rng: Array | None, ids: Array | None
  ) -> tuple[Array, Array]:
    """(tokens, scores) of whole texts, as `generate` gives them."""
    if self.decoding.method == "beam":
      return self.beams(logits, state)
    end = self.go_on(self.start(logits, state, rng, ids), self.length)
    return end.tokens, end.scores

  def start(self, logits: Array, state: Any, rng: Array | None, ids: Array | None) -> Open:
    """The first token of each row."""
    if self.length < 1:
      raise UserError(f"generation needs max_length of at least 1, not {self.length}")
    rows, keys = logits.shape[0], None
    if self.decoding.method == "sample":
      if rng is None:
        raise UserError("sampling needs a key: pass `rng`")
      ids = jnp.arange(rows) if ids is None else jnp.asarray(ids)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, ids)
    empty = jnp.full((rows, self.length), self.pad, jnp.int32)
    at = Open(jnp.int32(0), empty, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, bool), state, keys)
    return self._add(at, logits)

  def go_on(self, at: Open, until: int | Array) -> Open:
    """Tokens until there are so many, or every text has ended."""

    def body(at: Open) -> Open:
      last = jax.lax.dynamic_index_in_dim(at.tokens, at.made - 1, axis=1, keepdims=False)
      logits, state = self.step(last, self.places + at.made - 1, at.state, self.constants)
      return self._add(at._replace(state=state), logits)

    return jax.lax.while_loop(lambda at: (at.made < until) & ~at.done.all(), body, at)

  def _add(self, at: Open, logits: Array) -> Open:
    logits = self._allowed(logits, at.tokens, at.made, self.prompt)
    if at.keys is None:
      chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
      draws = jax.vmap(jax.random.fold_in, (0, None))(at.keys, at.made)
      d = self.decoding
      kept = restrict(logits / d.temperature, d.top_k, d.top_p, d.min_p)
      chosen = jax.vmap(jax.random.categorical)(draws, kept).astype(jnp.int32)
    gain = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
    token = jnp.where(at.done, self.pad, chosen)
    return at._replace(
      made=at.made + 1,
      tokens=at.tokens.at[:, at.made].set(token),
      scores=at.scores + jnp.where(at.done, 0, gain),
      done=at.done | self._ends(token),
    )

  def _allowed(self, logits: Array, tokens: Array, count: Array, prompt: Array | None) -> Array:
    logits = logits.astype(jnp.float32)
    if self.decoding.repetition_penalty != 1:
      generated = jnp.where(jnp.arange(tokens.shape[1]) < count, tokens, -1)
      known = generated if prompt is None else jnp.concatenate([prompt, generated], axis=1)
      known = tokens_in(known, logits.shape[-1])
      logits = penalise(logits, known, self.decoding.repetition_penalty)
    return logits if self.rules is None else self.rules(logits, tokens, count)

  def _ends(self, token: Array) -> Array:
    return jnp.isin(token, jnp.asarray(self.ends, jnp.int32))

  def beams(self, logits: Array, state: Any) -> tuple[Array, Array]:
    rows, beams, length = logits.shape[0], self.decoding.beams, self.length
    penalty = self.decoding.length_penalty

    def repeat(x: Array | None, axis: int) -> Array | None:
      return None if x is None else jnp.repeat(x, beams, axis=axis)

    state, constants = jax.tree.map(lambda x: repeat(x, 1), (state, self.constants))
    places, prompt = jnp.repeat(self.places, beams), repeat(self.prompt, 0)

    def normalised(sums, n):
      return sums / jnp.asarray(n, jnp.float32) ** penalty

    def going(at: _Beams) -> Array:
      # Sums only fall, so that the best an open text can come to is its sum now over the kindest
      # length that is left.
      hope = normalised(at.open_sums[:, 0], length if penalty > 0 else at.made + 1)
      return (at.made < length) & (hope > at.scores[:, -1]).any()

    def add(at: _Beams, logits: Array) -> _Beams:
      logits = self._allowed(logits, at.open_tokens.reshape(-1, length), at.made, prompt)
      gains = jax.nn.log_softmax(logits).reshape(rows, beams, -1)
      size = gains.shape[-1]
      sums, found = jax.lax.top_k(
        (at.open_sums[:, :, None] + gains).reshape(rows, -1), min(2 * beams, beams * size)
      )
      parent, token = found // size, (found % size).astype(jnp.int32)
      texts = jnp.take_along_axis(at.open_tokens, parent[:, :, None], axis=1)
      texts = texts.at[:, :, at.made].set(token)
      ended = self._ends(token)
      # Only an end among the best K counts; the K after them are there to go on in place of those
      # that ended.
      finished = jnp.where(
        ended & (sums > LOW / 2) & (jnp.arange(sums.shape[1]) < beams),
        normalised(sums, at.made + 1),
        LOW,
      )
      tokens, scores, _ = _best(
        beams, jnp.concatenate([at.tokens, texts], 1), jnp.concatenate([at.scores, finished], 1)
      )
      open_tokens, open_sums, chosen = _best(beams, texts, jnp.where(ended, LOW, sums))
      parent = jnp.take_along_axis(parent, chosen, axis=1) + beams * jnp.arange(rows)[:, None]
      state = jax.tree.map(lambda x: x[:, parent.reshape(-1)], at.state)
      return _Beams(at.made + 1, open_tokens, open_sums, tokens, scores, state)

    def body(at: _Beams) -> _Beams:
      last = jax.lax.dynamic_index_in_dim(at.open_tokens, at.made - 1, axis=2, keepdims=False)
      logits, state = self.step(last.reshape(-1), places + at.made - 1, at.state, constants)
      return add(at._replace(state=state), logits)

    nothing = jnp.full((rows, beams, length), self.pad, jnp.int32)
    none = jnp.full((rows, beams), LOW, jnp.float32)
    first = _Beams(jnp.int32(0), nothing, none.at[:, 0].set(0), nothing, none, state)
    end = jax.lax.while_loop(going, body, add(first, jnp.repeat(logits, beams, axis=0)))
    # Texts that the length cuts off compete too.
    cut = jnp.where(
      (end.made == length) & (end.open_sums > LOW / 2), normalised(end.open_sums, length), LOW
    )
    tokens, scores, _ = _best(
      1, jnp.concatenate([end.tokens, end.open_tokens], 1), jnp.concatenate([end.scores, cut], 1)
    )
    return tokens[:, 0], scores[:, 0]


def _best(count: int, texts: Array, scores: Array) -> tuple[Array, Array, Array]:
  """The `count` texts [B, N, T] of the highest scores [B, N], best first, and where they stood."""
  scores, index = jax.lax.top_k(scores, count)
  return jnp.take_along_axis(texts, index[:, :, None], axis=1), scores, index


def restrict(
  logits: Array, top_k: int | Array, top_p: float | Array, min_p: float | Array = 0.0
) -> Array:
  """logits float32 [N, V] with -1e30 for tokens outside the `top_k` likeliest (0 = all), the
  nucleus of `top_p`, and those of at least `min_p` times the highest probability. Settings are
  numbers, or all arrays [N, 1] of each row's own.
  """
  size, numbers = logits.shape[-1], isinstance(top_k, int)
  if not numbers or min_p:
    logits = jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(min_p), LOW, logits)
  if numbers and not 0 < top_k < size and top_p >= 1:
    return logits
  order = jnp.argsort(-logits, axis=-1)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  keep = jnp.arange(size) < jnp.where(top_k, top_k, size)
  chances = jax.nn.softmax(jnp.where(keep, ranked, LOW), axis=-1)
  keep &= (jnp.cumsum(chances, axis=-1) - chances < top_p) | jnp.greater_equal(top_p, 1)
  keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
  return jnp.where(keep, logits, LOW)


def penalise(logits: Array, known: Array, penalty: float | Array) -> Array:
  """logits [N, V], lowered where `known` bool [N, V]: positive ones are divided by `penalty`, a
  number or [N, 1], others multiplied.
  """
  return jnp.where(known, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def tokens_in(texts: Array, size: int) -> Array:
  """bool [N, size]: which tokens are in the texts int32 [N, T], -1 = none."""
  known = jnp.zeros((len(texts), size + 1), bool)
  known = known.at[jnp.arange(len(texts))[:, None], jnp.where(texts < 0, size, texts)].set(True)
  return known[:, :size]


def score(hidden: Array, table: Array, targets: Array, cap: float = 0.0) -> Array:
  """float32 [N]: the sum of log softmax(hidden table^T) of the targets int32 [N, L], -1 =
  none. cap:
  logits become cap * tanh(logits / cap); 0 = none.

  hidden [N, L, D]: what a model makes of the tokens before each target. The log-likelihood of a
  continuation has its tokens as targets, and -1 under the prompt.
  """

  def of_row(inputs: tuple[Array, Array]) -> Array:
    row, target = inputs
    logits = jnp.einsum("ld,vd->lv", row, table.astype(row.dtype), precision="highest")
    logits = logits.astype(jnp.float32)
    gains = jax.nn.log_softmax(cap * jnp.tanh(logits / cap) if cap else logits)
    chosen = jnp.take_along_axis(gains, jnp.maximum(target, 0)[:, None], axis=1)[:, 0]
    return jnp.where(target >= 0, chosen, 0).sum()

  return jax.lax.map(of_row, (hidden, targets))


# -- Models with a decoder that attends to a source, or with a CTC head ----------------------------


def can_generate(model: nn.Module) -> bool:
  """Whether `generate_text` has something to write with: a decoder, or a CTC head."""
  return (
    is_language_model(model)
    or getattr(model, "decoder", None) is not None
    or bool(getattr(model, "spelling", 0))
  )


def is_language_model(model: nn.Module) -> bool:
  """Whether the model goes on from a sequence (`prefill` of batch["sequence"])."""
  return hasattr(model, "next_tokens")


def run_of_prompts(
  model: nn.Module, variables: Any, sequence: dict, max_length: int, decoding: Decoding
) -> Run:
  """How a language model goes on from the prompts of batch["sequence"], of `sequence.length` tokens
  each.
  """
  tokens, lengths = sequence["tokens"], sequence["length"]

  def step(token: Array, places: Array, state: Any, _: None) -> tuple[Array, Any]:
    out: Any = model.apply(variables, token, places, state, method="decode_step")
    return out

  known = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)
  ends = (model.eos_id, *model.end_ids)
  return Run(step, None, max_length, ends, model.pad_id, decoding, None, lengths, known)


def read_prompts(
  model: nn.Module, variables: Any, batch: dict, max_length: int
) -> tuple[Array, Any]:
  """(logits of the first tokens after the prompts, a cache with room for `max_length` of them)."""
  length = batch["sequence"]["tokens"].shape[1] + max_length - 1
  out: Any = model.apply(variables, batch, length=length, method="prefill")
  return out


def go_on_from_prompts(
  model: nn.Module,
  variables: Any,
  batch: dict,
  max_length: int,
  decoding: Decoding = Decoding(),
  rng: Array | None = None,
  ids: Array | None = None,
) -> tuple[Array, Array]:
  """(tokens int32 [B, max_length], scores float32 [B]) that a language model adds to prompts."""
  variables = with_layers_apart(variables)
  run = run_of_prompts(model, variables, batch["sequence"], max_length, decoding)
  return run.whole(*read_prompts(model, variables, batch, max_length), rng, ids)


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
  if is_language_model(model):
    how = Decoding("beam" if beams > 1 else "greedy", beams, length_penalty)
    return go_on_from_prompts(model, variables, batch, max_length, how)[0]
  decoder = getattr(model, "decoder", None)
  if decoder is None:
    path: Any = model.apply(variables, tuple(source), batch, method="spell")
    spelled = without_repeats(path, model.blank)[:, :max_length]
    return jnp.pad(
      spelled, ((0, 0), (0, max_length - spelled.shape[1])), constant_values=model.blank
    )
  memory: Any = model.apply(variables, tuple(source), batch, method="init_memory")
  rows = memory.key.shape[1]
  prompt = jnp.broadcast_to(jnp.asarray(decoder.prompt, jnp.int32), (rows, len(decoder.prompt)))
  if decoder.languages:
    prompt = prompt.at[:, 1].set(model.apply(variables, memory, method="detect_language"))
  return _go_on(model, variables, memory, prompt, max_length, beams, length_penalty)


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
  memory: Any = model.apply(variables, tuple(source), batch, method="init_memory")
  prompt = batch["prompt"]["tokens"]

  def rules(logits: Array, tokens: Array, count: Array) -> Array:
    return allow_times(logits, tokens, count, model.decoder)

  return _go_on(model, variables, memory, prompt, max_length, beams, length_penalty, rules)


def _go_on(
  model: nn.Module,
  variables: Any,
  memory: Any,
  prompt: Array,
  max_length: int,
  beams: int,
  length_penalty: float,
  rules: Rules | None = None,
) -> Array:
  """The texts that follow the prompts int32 [B, P]."""
  decoder, (rows, read) = model.decoder, prompt.shape
  variables = with_layers_apart(variables)
  logits, cache = model.apply(
    variables, prompt, memory, length=read + max_length - 1, method="prefill"
  )

  def step(token: Array, places: Array, cache: Any, memory: Any) -> tuple[Array, Any]:
    return model.apply(variables, token, places, cache, memory, method="decode_step")

  return generate(
    step,
    logits,
    cache,
    memory,
    places=jnp.full(rows, read),
    max_length=max_length,
    eos_id=decoder.eos_id,
    pad_id=decoder.pad_id,
    decoding=Decoding("beam" if beams > 1 else "greedy", beams, length_penalty),
    rules=rules,
  )[0]


def allow_times(logits: Array, tokens: Array, count: Array, decoder: nn.Module) -> Array:
  """logits [N, V] with -1e30 for the tokens that may not follow tokens[:, :count], by the rules of
  `generate_timed_text`.
  """
  begin, vocabulary = decoder.time_tokens, jnp.arange(logits.shape[-1])
  is_time = vocabulary >= begin
  times = jnp.where((jnp.arange(tokens.shape[1]) < count) & (tokens >= begin), tokens, -1)
  latest = times.max(axis=1, keepdims=True)  # times never fall; -1 = none yet

  def back(n: int, before: bool) -> Array:
    """Whether the n-th token from the end is a time, bool [N, 1]; `before` where there is none."""
    found = jax.lax.dynamic_slice_in_dim(times, jnp.maximum(count - n, 0), 1, axis=1) >= 0
    return jnp.where(count >= n, found, before)

  last, second = back(1, False), back(2, True)
  least = jnp.where(last & ~second, latest, latest + 1)
  never = (
    (vocabulary == begin - 1)
    | (last & second & is_time)
    | (last & ~second & (vocabulary < decoder.eos_id))
  )
  never |= is_time & (latest >= 0) & (vocabulary < least)
  too_late = (
    vocabulary > begin + decoder.first_time if decoder.first_time >= 0 else jnp.zeros_like(is_time)
  )
  logits = jnp.where(never | ((count == 0) & (~is_time | too_late)), LOW, logits)
  of_times = jax.nn.logsumexp(jnp.where(is_time, logits, LOW), axis=-1, keepdims=True)
  text = jnp.max(jnp.where(is_time, LOW, logits), axis=-1, keepdims=True)
  return jnp.where((of_times > text) & ~is_time, LOW, logits)


def without_repeats(path: Array, blank: int) -> Array:
  """The labels of a CTC path (Graves et al. 2006, section 3.1): int32 [B, T] -> [B, T], filled up
  with blanks.
  """
  before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
  kept = (path != blank) & (path != before)
  labels = jnp.take_along_axis(path, jnp.argsort(~kept, axis=1, stable=True), axis=1)
  return jnp.where(jnp.arange(path.shape[1]) < kept.sum(1, keepdims=True), labels, blank)
