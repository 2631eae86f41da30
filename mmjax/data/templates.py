"""Chat templates: conversations as spans of tokens and media; the assistant's are targets.

A template (Jinja, in a bounded sandbox) writes the conversation as text. The contents of the turns
are marked before it runs, so that afterwards each piece of the text is known to be of a turn, of
the template, or a medium. From that come the targets: of each assistant's turn all that a model
writes itself, from where the prompt ends up to the token that ends the turn. Only what the
template writes may become special tokens; what people wrote is plain text, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmjax import files
from mmjax.config import UserError
from mmjax.data.parts import MEDIA, Medium, Span
from mmjax.data.readers.cells import printable
from mmjax.data.sandbox import Sandbox
from mmjax.data.template_families import FAMILIES
from mmjax.data.tokenizers import Tokenizer, check_texts

ROLES = ("system", "user", "assistant", "tool")
ASSET = "conversation.jinja"  # the template of a run, in its checkpoints

# What templates write for a medium where they read the parts of a content themselves.
_PLACEHOLDERS = {
  "image": "<image> <|image_pad|> <|image|> <image_soft_token> <start_of_image> [IMG] <|image_1|>",
  "audio": "<audio> <|audio_pad|> <|AUDIO|> <|audio|> <audio_soft_token>",
  "video": "<video> <|video_pad|> <|video|>",
  "series": "<series>",
}
_MEDIUM_OF = {mark: name for name, marks in _PLACEHOLDERS.items() for mark in marks.split()}
_PLACEHOLDER = re.compile("|".join(map(re.escape, _MEDIUM_OF)))
# Markers of roles and of the ends of turns; a tokenizer of this project has spare pieces for them.
_MARKER = re.compile(r"<\|[\w-]+\|>|<(?:start|end)_of_turn>|<\uff5c[^<>\n]{1,30}\uff5c>")
_THOUGHT = re.compile(r"(\s*<think>\s*|)(.*?)(\s*</think>\s*)(\S.*)", re.DOTALL)

Message = Mapping[str, Any]


class _Bit(NamedTuple):
  """A piece of a rendered conversation: of turn `turn` (-1: the template's), or a medium."""

  text: str
  turn: int = -1
  medium: Medium | None = None


class _Known(NamedTuple):
  """What a template knows of a tokenizer: ids of special tokens, what matches them, the pieces that
  templates ask for, and the one that ends an assistant's turn.
  """

  tokenizer: Tokenizer
  markers: dict[str, int]
  pattern: re.Pattern | None
  pieces: dict[str, str]
  end: tuple[str, int] | None = None


class ChatTemplate:
  """A chat template. `name` is said in errors."""

  def __init__(self, source: str, name: str = "the chat template"):
    self.source, self.name = source, name
    self._sandbox = Sandbox()
    try:
      if not source.strip():
        raise UserError("it is empty")
      self._program = self._sandbox.program(source)
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
    self._forms: dict[type, bool] = {}
    self._tails: dict[tuple[str, bool, str], str] = {}
    self._known: _Known | None = None

  @classmethod
  def read(cls, given: str, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The template of this name (`FAMILIES`), of "tokenizer" (its own), in this .jinja file, or
    with this text. Raises UserError: there is none, or it is no template.
    """
    if given in FAMILIES:
      return cls(FAMILIES[given], f"chat template {given}")
    if given == "tokenizer":
      own = getattr(tokenizer, "chat_template", "")
      if not own:
        raise UserError(
          "the tokenizer has no chat template of its own (tokenizer_config.json, "
          f"chat_template.jinja). Name one of {', '.join(FAMILIES)}, or a .jinja file"
        )
      return cls(own, "the tokenizer's chat template")
    if "{" in given:
      return cls(given)
    if given.endswith((".jinja", ".jinja2", ".j2")):
      try:
        text = files.read_file(files.local_path(given)).decode()
        return cls(re.sub(r"\r\n?", "\n", text), f"chat template {given}")
      except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {given} cannot be read ({error})") from error
    raise UserError(
      f"no chat template {given!r}. Name one of {', '.join(FAMILIES)}, tokenizer (its own), or a "
      ".jinja file"
      if given
      else "no chat template: data.text.template is empty. Name one of "
      f"{', '.join(FAMILIES)}, tokenizer (its own), or a .jinja file"
    )

  # -- What callers ask for ------------------------------------------------------------------------

  def render(
    self,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    add_generation_prompt: bool = False,
    *,
    loss: str = "every",
    lowercase: bool = False,
  ) -> list[Span | Medium]:
    """The parts of a conversation.

    messages: [{"role": "system", "user", "assistant" or "tool", "content": text or a list of
    {"type": "text", "text": ...}, {"type": "image"}, "audio", "video", "series"}]. Target spans are
    what the assistant writes, with the token that ends the turn: loss "every", of every turn, else
    of the last ("last"; "each": the conversation up to each of its answers is an example).
    add_generation_prompt: the prompt of the assistant's next turn comes after them. Medium.number
    counts the media of a modality. Raises UserError: turns out of order, an empty one, a template
    that fails, leaves out a turn or does not end one.
    """
    check_turns(messages)
    if add_generation_prompt and messages[-1]["role"] == "assistant":
      raise UserError("the last turn is the assistant's: there is nothing to answer")
    bits = self._bits(messages, tokenizer, add_generation_prompt)
    spoken = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    targets = [False] * len(bits)
    for turn in spoken:
      bits, targets = self._with_target(messages, bits, targets, turn, tokenizer)
    if loss != "every" and spoken:
      last = _of_turn(bits, spoken[-1])[0]
      while last and targets[last - 1]:
        last -= 1
      targets[:last] = [False] * last
    known = self._of(tokenizer)
    return _parts(bits, targets, known, tokenizer, lowercase)

  def text(
    self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
  ) -> str:
    """The conversation as text, media as <image> and the like: what people read."""
    bits = self._bits(messages, tokenizer, add_generation_prompt)
    return "".join(f"<{b.medium.modality}>" if b.medium else b.text for b in bits)

  def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an assistant's turn. Raises UserError: the template does not end
    turns.
    """
    return (self._end(tokenizer)[1],)

  def markers(self, tokenizer: Tokenizer) -> dict[str, int]:
    """{piece: id} of the special tokens that the template may write. Those that a tokenizer of this
    project lacks are its spare pieces, in the order in which the template names them.
    """
    return self._of(tokenizer).markers

  def _of(self, tokenizer: Tokenizer) -> _Known:
    """What is known of a tokenizer."""
    if self._known is None or self._known.tokenizer is not tokenizer:
      markers = self._markers(tokenizer)
      names = {number: piece for piece, number in tokenizer.special_pieces.items()}
      special = tokenizer.special_tokens
      pieces = {
        f"{role}_token": names.get(special[role], "") for role in ("bos", "eos", "pad", "unk")
      }
      self._tails = {}
      self._known = _Known(tokenizer, markers, _pattern(markers), pieces)
    return self._known

  def _markers(self, tokenizer: Tokenizer) -> dict[str, int]:
    special = dict(tokenizer.special_pieces)
    spare = [number for piece, number in special.items() if re.fullmatch(r"<spare_\d+>", piece)]
    absent = [m for m in dict.fromkeys(_MARKER.findall(self.source)) if m not in special]
    return special | dict(zip(absent, spare, strict=False))

  # -- Rendering with marks ------------------------------------------------------------------------

  def _bits(
    self, messages: Sequence[Message], tokenizer: Tokenizer | None, prompt: bool
  ) -> list[_Bit]:
    mark = _unused(self.source, messages)
    given = [
      self._marked(turn, message, mark, media)
      for media in [dict.fromkeys(MEDIA, 0)]
      for turn, message in enumerate(messages)
    ]
    rendered = self._run(given, tokenizer, prompt)
    bits = list(_cut(rendered, mark))
    if any(isinstance(one["content"], list) for one in given):
      bits = list(_with_media(bits))
    self._check_all_there(messages, bits)
    return bits

  def _run(self, given: list[dict[str, Any]], tokenizer: Tokenizer | None, prompt: bool) -> str:
    pieces = self._of(tokenizer).pieces if tokenizer else {"bos_token": "", "eos_token": ""}
    values = dict(pieces, messages=given, add_generation_prompt=prompt, tools=None, documents=None)
    try:
      return self._sandbox.render(self._program, self.source, values)
    except UserError as error:
      raise UserError(f"{self.name}: {error}") from error

  def _marked(self, turn: int, message: Message, mark: str, media: dict[str, int]) -> dict:
    """A turn for the template: its texts between marks, and media as marks."""
    content = message["content"]
    parts = [dict(type="text", text=content)] if isinstance(content, str) else content
    role, found = message["role"], []
    plain = all(part["type"] == "text" for part in parts)
    as_list = not (plain and self._takes(str)) and self._takes(list)
    for part in parts:
      if part["type"] == "text":
        text = _wrap(part["text"], turn, mark, thoughts=role == "assistant")
        found.append({"type": "text", "text": text} if as_list else text)
      elif as_list:
        found.append({"type": part["type"]})
      else:
        found.append(f"{mark}{part['type']}{media[part['type']]}{mark}")
        media[part["type"]] += 1
    return {"role": role, "content": found if as_list else "".join(map(str, found))}

  def _takes(self, form: type) -> bool:
    """Whether the template takes contents that are a text (str), or a list of parts."""
    if form not in self._forms:
      probe = "\ue000"
      content = probe if form is str else [{"type": "text", "text": probe}]
      try:
        written = self._run([{"role": "user", "content": content}], None, False)
        self._forms[form] = probe in written and f"'text': '{probe}" not in written
      except UserError:
        self._forms[form] = form is str
    return self._forms[form]

  def _check_all_there(self, messages: Sequence[Message], bits: list[_Bit]) -> None:
    rendered = {bit.turn for bit in bits} | {b.medium for b in bits if b.medium}
    asked = dict.fromkeys(MEDIA, 0)
    for turn, message in enumerate(messages):
      content = message["content"]
      said = isinstance(content, str) or any(p.get("text", "").strip() for p in content)
      parts = [] if isinstance(content, str) else [p for p in content if p["type"] != "text"]
      for part in parts:
        if Medium(part["type"], asked[part["type"]]) not in rendered:
          raise UserError(f"{self.name} leaves out the {part['type']} of {_named(turn, message)}")
        asked[part["type"]] += 1
      if turn not in rendered and said:
        raise UserError(f"{self.name} leaves out {_named(turn, message)}")
    pictures = [bit.medium for bit in bits if bit.medium]
    if len(pictures) != sum(asked.values()):
      raise UserError(f"{self.name} writes more media than the conversation has")

  # -- Targets -------------------------------------------------------------------------------------

  def _with_target(
    self,
    messages: Sequence[Message],
    bits: list[_Bit],
    targets: list[bool],
    turn: int,
    tokenizer: Tokenizer,
  ) -> tuple[list[_Bit], list[bool]]:
    """The bits with those of an assistant's turn as targets; the template's own text around them is
    cut where the prompt ends and where the turn does.
    """
    first, last = _of_turn(bits, turn)
    end = self._end(tokenizer)[0]
    after = bits[last + 1].text if last + 1 < len(bits) and bits[last + 1].turn < 0 else ""
    stop = after.find(end) + len(end)
    if end not in after:
      raise UserError(f"{self.name} does not end {_named(turn, messages[turn])} with {end}")
    inner = [(bit, True) for bit in bits[first : last + 1]]
    inner += [(_Bit(after[:stop]), True), (_Bit(after[stop:]), False)]
    stop_bit = last + 2
    if first and bits[first - 1].turn < 0 and bits[first - 1].medium is None:
      before = bits[first - 1].text
      start = self._prompt_size(messages[:turn], before, tokenizer)
      inner = [(_Bit(before[:start]), False), (_Bit(before[start:]), True), *inner]
      first -= 1
    inner = [(bit, target) for bit, target in inner if bit.text or bit.medium]
    new = [bit for bit, _ in inner], [target for _, target in inner]
    return (
      [*bits[:first], *new[0], *bits[stop_bit:]],
      [*targets[:first], *new[1], *targets[stop_bit:]],
    )

  def _prompt_size(self, messages: Sequence[Message], before: str, tokenizer: Tokenizer) -> int:
    """How much of the text before an answer is prompt: what the template writes itself when it asks
    for the answer.
    """
    key = messages[-1]["role"], len(messages) == 1, _ending(messages[-1]["content"])
    if key not in self._tails:
      last = self._bits(messages, tokenizer, True)[-1]
      self._tails[key] = "" if last.turn >= 0 or last.medium else last.text
    tail = self._tails[key]
    return len(tail) if tail and before.startswith(tail) else len(before)

  def _end(self, tokenizer: Tokenizer) -> tuple[str, int]:
    """(piece, id) of the special token that ends an assistant's turn."""
    known = self._of(tokenizer)
    if known.end is None:
      turns = [
        {"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate("abcd")
      ]
      bits = self._bits(turns, tokenizer, False)
      pattern = known.pattern
      found = []
      for turn in (1, 3):
        last = _of_turn(bits, turn)[1]
        after = bits[last + 1].text if last + 1 < len(bits) else ""
        piece = pattern.match(after.lstrip()) if pattern else None
        found.append(piece[0] if piece else "")
      if not found[0] or found[0] != found[1]:
        written = _MARKER.search(bits[-1].text) if bits[-1].turn < 0 else None
        raise UserError(
          f"{self.name} ends turns with {written[0]}, which the tokenizer lacks. Name another "
          "template, such as plain, or a tokenizer that has it"
          if written
          else f"{self.name} does not end the assistant's turns with a special token"
        )
      self._known = known = known._replace(end=(found[0], known.markers[found[0]]))
    assert known.end is not None
    return known.end


def check_turns(messages: Sequence[Message]) -> None:
  """Raises UserError: no turns, roles out of order, an empty turn, or a content of no known form.

  A system turn comes first, then the user's and the assistant's by turns; tools answer the
  assistant.
  """
  if not messages:
    raise UserError("the conversation has no turns")
  before = ""
  may_follow: dict[str, tuple[str, ...]] = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
  }
  for turn, message in enumerate(messages):
    role = message.get("role")
    if role not in ROLES:
      raise UserError(
        f"turn {turn + 1} is by {printable(str(role))[:40]!r}; roles are {', '.join(ROLES)}"
      )
    if before not in may_follow[role]:
      raise UserError(
        f"roles out of order: turn {turn + 1} is the {role}'s"
        + (f" and follows the {before}'s" if before else ", and none was before it")
      )
    _check_content(turn, message)
    before = role
  if before == "system":
    raise UserError("the conversation has a system turn only")


def _check_content(turn: int, message: Message) -> None:
  content = message.get("content")
  parts = [dict(type="text", text=content)] if isinstance(content, str) else content
  if not isinstance(parts, (list, tuple)):
    raise UserError(f"{_named(turn, message)} has neither text nor a list of parts")
  for part in parts:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
      check_texts([part["text"]])
    elif kind not in MEDIA:
      raise UserError(
        f"{_named(turn, message)} has a part of type {printable(str(kind))[:40]!r}; parts are "
        f"text, {', '.join(MEDIA)}"
      )
  if not any(part["type"] != "text" or part["text"].strip() for part in parts):
    raise UserError(f"{_named(turn, message)} is empty")
  if message["role"] == "assistant" and not any(p["type"] == "text" for p in parts):
    raise UserError(f"{_named(turn, message)} has no text to learn")


def _ending(content: str | Sequence[Mapping[str, Any]]) -> str:
  """The white space and media that end a content."""
  parts = [dict(text=content)] if isinstance(content, str) else content
  text = "".join(part.get("text", "\0") for part in parts)
  return re.findall(r"[\s\0]*\Z", text)[0]


def _named(turn: int, message: Message) -> str:
  return f"turn {turn + 1} ({message['role']})"


# -- Marks -----------------------------------------------------------------------------------------


def _unused(source: str, messages: Sequence[Message]) -> str:
  """A character that neither the template nor the conversation has."""
  used = set(source)
  for message in messages:
    content = message["content"]
    parts = [dict(text=content)] if isinstance(content, str) else content
    used.update(*(part.get("text", "") for part in parts))
  return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)


def _wrap(text: str, turn: int, mark: str, thoughts: bool) -> str:
  """A text between marks of its turn. White space around it stays outside, where templates trim it,
  and so do the tags of an assistant's thoughts, at which templates split.
  """
  found = _THOUGHT.fullmatch(text) if thoughts else None
  out = []
  for number, piece in enumerate(found.groups() if found else ("", text)):
    core = piece.strip()
    if number % 2 == 0 or not core:
      out.append(piece)
      continue
    start = piece.index(core)
    out += [piece[:start], f"{mark}t{turn}{mark}", core, f"{mark}e{turn}{mark}"]
    out.append(piece[start + len(core) :])
  return "".join(out)


def _cut(rendered: str, mark: str) -> Iterator[_Bit]:
  """The pieces of a text with marks."""
  turn, found = -1, re.split(f"{mark}([a-z]+)([0-9]+){mark}", rendered)
  for at in range(0, len(found), 3):
    if found[at]:
      yield _Bit(found[at], turn)
    if at + 2 < len(found):
      kind, number = found[at + 1], int(found[at + 2])
      if kind in MEDIA:
        yield _Bit("", -1, Medium(kind, number))
      else:
        turn = number if kind == "t" else -1


def _with_media(bits: list[_Bit]) -> Iterator[_Bit]:
  """The pieces, with the placeholders that the template wrote as media."""
  used = dict.fromkeys(MEDIA, 0)
  for bit in bits:
    if bit.turn >= 0 or bit.medium:
      yield bit
      continue
    at = 0
    for found in _PLACEHOLDER.finditer(bit.text):
      if found.start() > at:
        yield _Bit(bit.text[at : found.start()])
      modality = _MEDIUM_OF[found[0]]
      yield _Bit("", -1, Medium(modality, used[modality]))
      used[modality] += 1
      at = found.end()
    if at < len(bit.text):
      yield _Bit(bit.text[at:])


def _of_turn(bits: list[_Bit], turn: int) -> tuple[int, int]:
  """(first, last) piece of a turn."""
  places = [place for place, bit in enumerate(bits) if bit.turn == turn]
  return places[0], places[-1]


# -- Tokens ----------------------------------------------------------------------------------------


def _pattern(markers: Mapping[str, int]) -> re.Pattern | None:
  """Matches the special tokens, the longest first."""
  pieces = sorted(filter(None, markers), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, pieces))) if pieces else None


def _parts(
  bits: Sequence[_Bit],
  targets: Sequence[bool],
  known: _Known,
  tokenizer: Tokenizer,
  lowercase: bool,
) -> list[Span | Medium]:
  """Pieces as tokens: text between special tokens and media is encoded whole, for how a tokenizer
  cuts a word depends on what stands beside it; never across the border of a target.
  """
  parts: list[Span | Medium] = []
  pattern = known.pattern
  text, text_target = "", False

  def add(tokens: list[int], target: bool) -> None:
    if not tokens:
      return
    last = parts[-1] if parts else None
    if isinstance(last, Span) and last.target == target:
      last.tokens.extend(tokens)
    else:
      parts.append(Span(list(tokens), target))

  def flush() -> None:
    nonlocal text
    add(tokenizer.encode_plain(text.lower() if lowercase else text), text_target)
    text = ""

  for bit, target in zip(bits, targets, strict=True):
    if target != text_target:
      flush()
      text_target = target
    if bit.medium:
      flush()
      parts.append(bit.medium)
    elif bit.turn >= 0 or pattern is None:
      text += bit.text
    else:
      at = 0
      for found in pattern.finditer(bit.text):
        text += bit.text[at : found.start()]
        flush()
        add([known.markers[found[0]]], target)
        at = found.end()
      text += bit.text[at:]
  flush()
  return parts
