"""Texts under way side by side in one cache: each begins when a row is free and ends when it ends,
whatever the others do. A chat uses one row, a server several.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import UserError
from mmjax.data.placeholders import Places, positions_of
from mmjax.inference.engine import Decoding, penalise, restrict
from mmjax.inference.language import LanguageGenerator, Read, cut_at
from mmjax.models.stack import with_layers_apart

Array = jax.Array
AT_ONCE = 8  # tokens that are decoded before the texts are looked at
FEWEST = 32  # tokens that are read at once: shorter prompts need no programs of their own
TOP = 5  # alternatives that are kept of each token
# What stands in a place of a prompt: a token, or (modality, digest of its slots of media, which of
# their tokens, how many places after the first of its run).
Content = int | tuple[str, bytes, bytes, int]


class Rows(NamedTuple):
  """The texts of N rows: arrays [N], `known` [N, V]. Of one text alone: numbers, `known` [V]."""

  token: Any  # int32, the last one
  place: Any  # int32, where it will stand in the cache
  made: Any  # int32, tokens so far
  most: Any  # int32, tokens at most
  done: Any  # bool
  key: Any  # of the draws
  temperature: Any  # float32, 0 = the likeliest token
  top_k: Any  # int32
  top_p: Any  # float32
  min_p: Any  # float32
  penalty: Any  # float32
  known: Any  # bool, tokens that the prompt or the text has


class Made(NamedTuple):
  """A token of each row: its log-probability, the likeliest ones and theirs, and whether the row
  was under way.
  """

  token: Array  # int32 [N]
  score: Array  # float32 [N]
  best: Array  # int32 [N, TOP]
  scores: Array  # float32 [N, TOP]
  live: Array  # bool [N]


class Text:
  """What one row writes. tokens: so far, without what ends it; scores: the log-probability of
  each; best: the likeliest tokens in the place of each, [(token, log-probability)]. ended: "" while
  under way, then "stop", "length" or "cancelled". read, reused: tokens of its prompt, and those of
  them that the cache held already.
  """

  def __init__(
    self, row: int, most: int, stop: Sequence[str], decode: Callable, read: int, reused: int
  ):
    self.row, self.most, self.stop, self.read, self.reused = row, most, tuple(stop), read, reused
    self.tokens: list[int] = []
    self.scores: list[float] = []
    self.best: list[list[tuple[int, float]]] = []
    self.ended, self._decode, self._given = "", decode, ""

  @property
  def text(self) -> str:
    """The text so far, before the first of the `stop` strings."""
    return cut_at(self._decode(self.tokens), self.stop)

  @property
  def stopped(self) -> bool:
    """Whether one of the `stop` strings is in it."""
    whole = self._decode(self.tokens)
    return cut_at(whole, self.stop) != whole

  def piece(self) -> str:
    """What has come since the last call and will not change."""
    text = self.text
    safe = text if self.ended else text[: len(text) - _undecided(text, self.stop)]
    piece = safe[len(self._given) :]
    self._given = safe if len(safe) > len(self._given) else self._given
    return piece


class Slots:
  """`rows` texts at most at the same time, prompt and answer of each within `window` tokens."""

  def __init__(
    self,
    language: LanguageGenerator,
    rows: int,
    window: int,
    ends: Iterable[int] = (),
    reuse: bool = False,
  ):
    """ends: tokens that end texts besides the model's. reuse: a prompt that begins as an earlier
    one with its answer goes on from the cache of that. The caller has the mesh and rules in use.
    """
    model = language.model
    self.language, self.window = language, window
    self.reuse = reuse and model.both_ways != "prompt"  # there a later token changes earlier ones
    if model.learned_positions and window > model.length:
      raise UserError(f"a window of {window} tokens, but the model has {model.length} positions")
    self._ends = {model.eos_id, *model.end_ids, *ends}
    self._batch = language.rows[0]  # rows of a prefill: one, and copies for every other device
    n = self.count = -(-rows // self._batch) * self._batch
    own = Program(model, tuple(sorted(self._ends)), n, self._batch)
    empty = functools.partial(own.empty, window)
    self._state = language.program(("empty", window, *own[1:]), empty)(language.variables)
    self._begin = language.program(("begin", *own[1:]), own.begin, donate_argnums=(1, 2))
    self._steps = language.program(("steps", *own[1:]), own.steps, donate_argnums=(1, 2))
    blank = jnp.zeros(n, jnp.int32)
    self._rows = Rows(
      token=blank,
      place=blank + 0,  # buffers of their own, which a program may take over
      made=blank + 0,
      most=blank + 0,
      done=jnp.ones(n, bool),
      key=jax.random.split(jax.random.key(0), n),
      temperature=jnp.zeros(n),
      top_k=blank + 0,
      top_p=jnp.ones(n),
      min_p=jnp.zeros(n),
      penalty=jnp.ones(n),
      known=jnp.zeros((n, model.vocab_size), bool),
    )
    self.texts: list[Text | None] = [None] * n  # under way
    self._held: list[list[Content]] = [[] for _ in range(n)]  # what the cache has in each place

  @property
  def free(self) -> int:
    """Rows without a text."""
    return sum(text is None for text in self.texts)

  @property
  def lost(self) -> bool:
    """Whether a program that failed has taken the cache with it."""
    return any(x.is_deleted() for x in jax.tree.leaves((self._state, self._rows)))

  def begin(
    self,
    read: Read,
    max_length: int,
    decoding: Decoding = Decoding(),
    seed: int = 0,
    stop: Sequence[str] = (),
  ) -> Text:
    """Starts a text after a prompt, in a free row, with its first token. Raises UserError: the
    prompt and the answer are longer than the window, or decoding by beams.
    """
    if decoding.method == "beam":
      raise UserError("texts side by side are greedy or drawn, not of a beam search")
    size = self.language.size(read)
    if size + max_length > self.window:
      raise UserError(
        f"a prompt of {size} tokens and {max_length} after it are more than the window of "
        f"{self.window}. Shorten it, or ask for fewer"
      )
    held = _places(read)
    row, start = self._row(held)
    rest, width = _after(read, start), size - start
    width = min(max(FEWEST, self.language.width(width)), self.window - start)
    batch = self.language.arrays([rest], width, self._batch)
    known = np.zeros(self.language.model.vocab_size, bool)
    known[[token for token in held if isinstance(token, int)]] = True
    d, drawn = decoding, decoding.method == "sample"
    fresh = Rows(
      token=0,
      place=size - 1,
      made=0,
      most=max_length,
      done=False,
      key=jax.random.fold_in(jax.random.key(seed), 0),  # as the first row of `generate`
      temperature=d.temperature if drawn else 0.0,
      top_k=d.top_k,
      top_p=d.top_p,
      min_p=d.min_p,
      penalty=d.repetition_penalty,
      known=known,
    )
    self._state, self._rows, made = self._begin(
      self.language.variables, self._state, self._rows, row, start, batch, fresh
    )
    text = Text(row, max_length, stop, self.language.text, size, start)
    self.texts[row], self._held[row] = text, held
    self._take(jax.tree.map(lambda x: np.asarray(x)[None], made))
    return text

  def step(self) -> list[Text]:
    """Some more tokens of every text under way; the texts that have got any."""
    under_way = [text for text in self.texts if text is not None]
    if under_way:
      self._state, self._rows, made = self._steps(self.language.variables, self._state, self._rows)
      self._take(jax.tree.map(np.asarray, made))
    return under_way

  def end(self, text: Text, why: str = "cancelled") -> None:
    """Ends a text that is under way."""
    if not text.ended:
      text.ended, self.texts[text.row] = why, None
      self._rows = self._rows._replace(done=self._rows.done.at[text.row].set(True))

  def _take(self, made: Made) -> None:
    """Hands tokens [K, N] to the texts of the rows."""
    for number, text in enumerate(self.texts):
      if text is None:
        continue
      for k in np.flatnonzero(made.live[:, number]).tolist():
        token = int(made.token[k, number])
        if len(text.tokens):  # the one before it now stands in the cache
          self._held[number].append(text.tokens[-1])
        if token in self._ends:
          self.end(text, "stop")
          break
        text.tokens.append(token)
        text.scores.append(float(made.score[k, number]))
        best = zip(made.best[k, number].tolist(), made.scores[k, number].tolist(), strict=True)
        text.best.append(list(best))
      if not text.ended and text.stop and text.stopped:
        self.end(text, "stop")
      if not text.ended and len(text.tokens) >= text.most:
        self.end(text, "length")

  def _row(self, held: list[Content]) -> tuple[int, int]:
    """(a free row, how many places of a prompt its cache holds)."""
    free = [row for row, text in enumerate(self.texts) if text is None]
    if not free:
      raise UserError(f"all {self.count} rows are in use")
    if not self.reuse:
      return free[0], 0
    shared = {row: _shared(self._held[row], held) for row in free}
    row = max(free, key=lambda row: (shared[row], -len(self._held[row])))
    return row, shared[row]


# -- Programs, compiled once for each model, ends of texts and number of rows ----------------------


class Program(NamedTuple):
  """What the programs of some `Slots` have in common. batch: rows of a prefill."""

  model: nn.Module
  ends: tuple[int, ...]
  rows: int
  batch: int

  def empty(self, window: int, variables: Any) -> Any:
    """A cache for texts of up to `window` tokens."""
    variables = with_layers_apart(variables)
    return self.model.apply(variables, self.rows, window, method="init_cache")

  def begin(
    self,
    variables: Any,
    state: Any,
    rows: Rows,
    row: Array,
    start: Array,
    batch: dict[str, Any],
    fresh: Rows,
  ) -> tuple[Any, Rows, Made]:
    """Reads a prompt from place `start` on into the cache of one row, whose text is `fresh` (each
    of its arrays that of the row alone), and makes its first token.
    """

    def take(x: Array) -> Array:
      return jnp.repeat(jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1), self.batch, axis=1)

    def put(x: Array, y: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(x, y[:, :1], row, axis=1)

    logits, own = self.model.apply(
      with_layers_apart(variables),
      batch,
      jnp.full(self.batch, start),
      jax.tree.map(take, state),
      method="extend",
    )
    state = jax.tree.map(put, state, own)
    one = jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype)[None], fresh, rows)
    one, made = _choose(one, logits[:1], self.ends)
    rows = jax.tree.map(lambda x, y: x.at[row].set(y[0]), rows, one)
    blank = jax.tree.map(lambda x: jnp.zeros((self.rows, *x.shape[1:]), x.dtype), made)
    return state, rows, jax.tree.map(lambda x, y: x.at[row].set(y[0]), blank, made)

  def steps(self, variables: Any, state: Any, rows: Rows) -> tuple[Any, Rows, Made]:
    """AT_ONCE tokens of every text under way, or as many as they need: Made of [AT_ONCE, N]."""
    variables = with_layers_apart(variables)

    def body(carry: tuple) -> tuple:
      i, state, rows, out = carry
      logits, state = self.model.apply(
        variables, rows.token, rows.place, state, method="decode_step"
      )
      rows, made = _choose(rows, logits, self.ends)
      return i + 1, state, rows, jax.tree.map(lambda x, y: x.at[i].set(y), out, made)

    def going(carry: tuple) -> Array:
      return (carry[0] < AT_ONCE) & ~carry[2].done.all()

    shape = (AT_ONCE, self.rows)
    out = Made(
      jnp.zeros(shape, jnp.int32),
      jnp.zeros(shape),
      jnp.zeros((*shape, TOP), jnp.int32),
      jnp.zeros((*shape, TOP)),
      jnp.zeros(shape, bool),
    )
    return jax.lax.while_loop(going, body, (0, state, rows, out))[1:]


def _choose(rows: Rows, logits: Array, ends: Iterable[int]) -> tuple[Rows, Made]:
  """The next token of each row, by its own settings."""
  logits = logits.astype(jnp.float32)
  logits = penalise(logits, rows.known, rows.penalty[:, None])
  drawn = rows.temperature > 0

  def draw(logits: Array) -> Array:
    how = (x[:, None] for x in (rows.top_k, rows.top_p, rows.min_p))
    kept = restrict(logits / jnp.where(drawn, rows.temperature, 1)[:, None], *how)
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.made)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

  likeliest = logits.argmax(-1).astype(jnp.int32)
  sampled = jax.lax.cond((drawn & ~rows.done).any(), draw, lambda _: likeliest, logits)
  token = jnp.where(drawn, sampled, likeliest)
  gains = jax.nn.log_softmax(logits)
  scores, best = jax.lax.top_k(gains, TOP)
  score = jnp.take_along_axis(gains, token[:, None], axis=-1)[:, 0]
  made = Made(token, score, best.astype(jnp.int32), scores, ~rows.done)
  live = ~rows.done
  count = rows.made + live
  ended = jnp.isin(token, jnp.asarray(sorted(ends), jnp.int32)) | (count >= rows.most)
  return rows._replace(
    token=jnp.where(live, token, rows.token),
    place=rows.place + live,
    made=count,
    done=rows.done | ended,
    known=rows.known.at[jnp.arange(len(token)), token].max(live),
  ), made


def _places(read: Read) -> list[Content]:
  digests = [(modality, _digest(arrays)) for modality, arrays in read.media]
  places: list[Content] = []
  for part in read.parts:
    if isinstance(part, Places):
      of_modality = [digest for modality, digest in digests if modality == part.modality]
      where = (part.modality, b"".join(of_modality[part.slot : part.slot + part.slots]))
      mix = part.offsets if part.weights is None else np.hstack([part.offsets, part.weights])
      places += [(*where, which.tobytes(), i) for i, which in enumerate(mix)]
    else:
      places += part
  return places


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    x = np.ascontiguousarray(arrays[name])
    digest.update(f"{name} {x.dtype} {x.shape} ".encode())
    digest.update(x.tobytes())
  return digest.digest()


def _shared(held: list[Content], wanted: list[Content]) -> int:
  """How many places a prompt begins with that the cache holds: fewer than all, whole runs of media
  only.
  """
  count = 0
  for have, want in zip(held, wanted[:-1], strict=False):
    if have != want:
      break
    count += 1
  next_one = wanted[count]
  return count if isinstance(next_one, int) else count - min(count, next_one[3])


def _after(read: Read, start: int) -> Read:
  """The parts of a prompt from place `start` on, which is no place within a run of media."""
  parts: list[list[int] | Places] = []
  at, first = 0, read.first
  for part in read.parts:
    size = len(part.offsets) if isinstance(part, Places) else len(part)
    if at < start:  # what comes before
      before = part if isinstance(part, Places) else part[: start - at]
      _, first = positions_of([before], 3, first)
    if isinstance(part, Places) and at >= start:
      parts.append(part)
    elif not isinstance(part, Places) and at + size > start:
      parts.append(part[max(0, start - at) :])
    at += size
  used = {
    (part.modality, part.slot + i)
    for part in parts
    if isinstance(part, Places)
    for i in range(part.slots)
  }
  media: list[tuple[str, dict[str, np.ndarray]]] = []
  numbers: dict[tuple[str, int], int] = {}
  slots = dict.fromkeys((modality for modality, _ in read.media), 0)
  for modality, arrays in read.media:
    if (slot := (modality, slots[modality])) in used:
      numbers[slot] = sum(name == modality for name, _ in media)
      media.append((modality, arrays))
    slots[modality] += 1
  return Read(
    [
      part._replace(slot=numbers[part.modality, part.slot]) if isinstance(part, Places) else part
      for part in parts
    ],
    media,
    first,
  )


def _undecided(text: str, stop: Sequence[str]) -> int:
  """Characters at the end of a text that may change with what follows: the beginning of a `stop`
  string, or of a character that is not whole yet.
  """
  count = 0
  for string in filter(None, stop):
    for size in range(1, len(string)):
      if text.endswith(string[:size]):
        count = max(count, size)
  return max(count, len(text) - len(text.rstrip("\ufffd")))
