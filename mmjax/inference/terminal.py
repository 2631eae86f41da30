"""`mmjax chat`: a conversation on a terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from mmjax.config import UserError
from mmjax.inference.chat import Chat
from mmjax.printing import printable

HELP = """\
/image FILE, /audio FILE, /video FILE, /series FILE   show the next message's media; repeatable
/undo           take the last turn back
/reset          begin anew
/save FILE      write the conversation as JSON
/help, /exit    or Ctrl-D; Ctrl-C stops an answer"""


class Terminal:
  """Reads lines, sends them to a chat and writes the answers as they come.

  read: gives the next line, raises EOFError at the end. write: takes pieces of text, which are made
  harmless here.
  """

  def __init__(self, chat: Chat, read: Callable[[], str], write: Callable[[str], None]):
    self.chat, self._read, self._write = chat, read, write
    self._media: dict[str, list[str]] = {}
    self._seed = 0
    chat.note = self._note

  def run(self) -> None:
    """Until the end of the input, or /exit."""
    while True:
      try:
        line = self._read().rstrip()
      except EOFError:
        self._write("\n")
        return
      except KeyboardInterrupt:
        self._print("")
        continue
      if line in ("/exit", "/quit"):
        return
      try:
        if line.startswith("/"):
          self._command(line)
        elif line or self._media:
          self._turn(line.strip())
      except UserError as error:
        self._print(f"mmjax: {error}")

  def _turn(self, line: str) -> None:
    media: dict[str, Any] = dict(self._media)
    self._media = {}
    answer = self.chat.stream(line, seed=self._seed, **media)
    self._seed += 1
    try:
      for piece in answer:
        self._write(printable(piece, keep="\n\t"))
    except KeyboardInterrupt:
      self._write(" [stopped]")
    finally:
      answer.close()
    self._write("\n")

  def _command(self, line: str) -> None:
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in ("image", "audio", "video", "series"):
      if name not in self.chat.prompts.media:
        known = ", ".join(f"/{m}" for m in self.chat.prompts.media) or "text alone"
        raise UserError(f"this model takes no /{name}; it takes {known}")
      file = _unquoted(rest)
      if not file:
        raise UserError(f"name a file: /{name} FILE")
      self.chat.prompts.media[name](file)  # so that one that cannot be read is said now
      self._media.setdefault(name, []).append(file)
      self._note(f"{name} of the next message: {file}")
    elif name == "undo":
      taken = self.chat.undo()
      self._print(f"[taken back: {taken}]" if taken else "[there is no turn to take back]")
    elif name == "reset":
      self.chat.reset()
      self._media = {}
      self._note("a new conversation")
    elif name == "save":
      if not rest:
        raise UserError("name a file: /save FILE")
      self.chat.save(_unquoted(rest))
      self._note(f"saved {_unquoted(rest)}")
    elif name == "help":
      self._print(HELP)
    else:
      raise UserError(f"no command /{name}; /help lists them. To send it, put a space before it")

  def _note(self, text: str) -> None:
    self._print(f"[{text}]")

  def _print(self, text: str) -> None:
    self._write(printable(text, keep="\n\t") + "\n")


def on_terminal(chat: Chat) -> None:
  """Converses on this process's standard input and output; prompts where a person types."""
  prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
  if prompt:
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
      import readline  # noqa: F401
    print("/help lists the commands; Ctrl-D ends")

  def read() -> str:
    return input(prompt) if prompt else _line()

  def write(text: str) -> None:
    print(text, end="", flush=True)

  Terminal(chat, read, write).run()


def _line() -> str:
  line = sys.stdin.readline()
  if not line:
    raise EOFError
  return line


def _unquoted(text: str) -> str:
  """A file name, as it is or in quotes."""
  with contextlib.suppress(ValueError):
    words = shlex.split(text)
    if len(words) == 1:
      return words[0]
  return text
