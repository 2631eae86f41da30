"""CSV and TSV tables whose first line names the columns.

CSV is read as RFC 4180 says, TSV line by line, since most are written without quoting (CC3M, SBU).
Whatever the quotes, no line is lost: one that does not fit the header is left out by its number,
and the next is read on its own.
"""

from __future__ import annotations

import ast
import collections
import csv
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from mmjax.config import UserError
from mmjax.data.media import modality_of
from mmjax.data.readers.cells import Skip, broken_text, encoding_of
from mmjax.data.readers.columns import Part, cells_of, choose_columns, part_of
from mmjax.data.readers.rows import Left, ListedReader
from mmjax.files import open_file

ENDINGS = (".csv", ".tsv")
LONGEST = 1 << 26  # characters of a line
_LARGEST = 1 << 24  # characters of a quoted cell
_SPAN = 1000  # lines that a quoted cell may span
_LISTED = ("caption", "question", "answer", "label", "labels")  # may be lists that were written out
_LIST = 1 << 16  # characters of such a list


class TableReader(ListedReader):
  """Tables with paths of media (relative to the file), captions or questions or a label, and
  optionally id, language.
  """

  endings = ENDINGS

  def parts(self) -> Iterator[Part | Left]:
    for path in self.paths:
      yield from table_parts(path, self.folder_of(path), self.options)


def table_parts(path: str, folder: str, options) -> Iterator[Part | Left]:
  """The rows of a table, whose media lie in `folder` below the root. Raises UserError."""
  chosen: dict[str, tuple[str, ...]] | None = None
  for at, row in table_rows(path, options.encoding):
    if isinstance(row, Skip):
      yield at, row
      continue
    if chosen is None:
      chosen = choose_columns(list(row), options.columns, path, alone=True)
    cells = cells_of(row, chosen)
    cells |= {role: _list_in(cells[role]) for role in _LISTED if role in cells}
    part = part_of(cells, at, folder, options)
    yield part if isinstance(part, Part) else (row.get(chosen.get("id", ("",))[0]) or at, part)


def _list_in(cell: Any) -> Any:
  """The list that a cell is as JSON or as Python writes it (pandas does); any other as it is."""
  if isinstance(cell, list):
    return [_list_in(one) for one in cell]
  text = (cell or "").strip()
  if text[:1] + text[-1:] != "[]" or len(text) > _LIST:
    return cell
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    pass
  try:
    found = ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return cell
  # "['a' 'b']", as NumPy writes it, would be ['ab'].
  return found if repr(found).replace(" ", "") == text.replace(" ", "") else cell


def table_rows(path: str, encoding: str = "") -> Iterator[tuple[str, dict[str, str] | Skip]]:
  """(where it stands, {column: cell} or why there is none) of each row. Raises UserError."""
  base, header = os.path.basename(path), None
  for number, cells in _lines_of_cells(path, encoding):
    at = f"{base}:{number}"
    if isinstance(cells, Skip):
      yield at, cells
    elif header is None:
      header = _apart([name.strip() for name in cells])
    else:
      yield at, dict(zip(header, cells, strict=False))


def _apart(header: list[str]) -> list[str]:
  """Names of columns, of which no two are the same: the second `caption` is caption_2."""
  count: collections.Counter[str] = collections.Counter()
  found: dict[str, None] = {}
  for name in header:
    count[name] += 1
    new = name
    while new in found:
      new = f"{name}_{count[name]}"
      count[name] += new in found
    found[new] = None
  return list(found)


def open_text(path: str, encoding: str = "") -> io.TextIOWrapper:
  """Opens a text; bytes that are not of its encoding become lone surrogates, so that they cost
  their line alone. Raises UserError.
  """
  try:
    file = open_file(path)
    encoding = encoding_of(file.read(4), encoding)
    file.seek(0)
    return io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def lines(file: io.TextIOWrapper, path: str) -> Iterator[tuple[int, str | Skip]]:
  """(number, line) of the lines that are not blank; those too long or of another encoding are a
  Skip. Raises UserError.
  """
  number = 0
  try:
    while line := file.readline(LONGEST):
      number += 1
      if len(line) == LONGEST and line[-1] not in "\r\n":
        while (rest := file.readline(LONGEST)) and rest[-1] not in "\r\n":
          pass
        yield (
          number,
          Skip("broken row", f"line {number} is longer than {LONGEST >> 20} Mi characters"),
        )
      elif not line.isascii() and broken_text(line):
        yield (
          number,
          Skip(
            "broken text",
            f"line {number} is not {file.encoding.upper()}; --encoding names another, such as "
            "cp1252",
          ),
        )
      elif line.strip(" \r\n"):
        yield number, line
  except UnicodeError as error:
    reason = error.reason if isinstance(error, UnicodeDecodeError) else error
    raise UserError(
      f"{path}: line {number + 1} is not {file.encoding} ({reason}). Name its encoding with "
      "--encoding"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _lines_of_cells(path: str, encoding: str) -> Iterator[tuple[int, list[str] | Skip]]:
  """(number of its first line, cells) of the header and of each row that fits it."""
  csv.field_size_limit(max(csv.field_size_limit(), _LARGEST))
  with open_text(path, encoding) as file:
    source = lines(file, path)
    ahead: deque[tuple[int, str | Skip]] = deque()
    delimiter, width, quotes = "\t" if path.lower().endswith(".tsv") else ",", 0, True
    while True:
      number, line = ahead.popleft() if ahead else next(source, (0, ""))
      if not number:
        return
      if isinstance(line, Skip):
        yield number, line
        continue
      if not width and delimiter not in line:
        delimiter = next((other for other in (",", "\t", ";", "|") if other in line), delimiter)
      cells = _plain(line, delimiter)
      if not width:
        quotes = delimiter != "\t" or all(cell[:1] == cell[-1:] == '"' for cell in cells)
      if '"' in line:
        more: list[tuple[int, str | Skip]] = []
        quoted = _quoted(line, delimiter, ahead, source, more)
        spanned = [_plain(text, delimiter) for _, text in more if isinstance(text, str)]
        if quoted and _better(quoted, cells, spanned, width, quotes):
          cells = quoted
        else:
          ahead.extendleft(reversed(more))
          cells = [_unquoted(cell) for cell in cells]
      while width and len(cells) > width and not cells[-1].strip():
        cells.pop()
      if width and len(cells) != width:
        yield (
          number,
          Skip("broken row", f"line {number} has {len(cells)} cells, but the header {width}"),
        )
        continue
      width = width or len(cells)
      yield number, cells


def _plain(line: str, delimiter: str) -> list[str]:
  return line.rstrip("\r\n").split(delimiter)


def _quoted(
  line: str, delimiter: str, ahead: deque, source: Iterator, more: list
) -> list[str] | None:
  """The cells of a row that may span lines, which are taken from `ahead` and `source` and put into
  `more`; None: not quoted rightly.
  """

  def feed() -> Iterator[str]:
    yield line
    while len(more) < _SPAN:
      entry = ahead.popleft() if ahead else next(source, None)
      if entry is None:
        return
      more.append(entry)
      if isinstance(entry[1], Skip):
        return
      yield entry[1]

  try:
    return next(csv.reader(feed(), delimiter=delimiter, strict=True))
  except csv.Error:
    return None


def _better(
  quoted: list[str], plain: list[str], spanned: list[list[str]], width: int, quotes: bool
) -> bool:
  """Whether the quotes of a row delimit its cells, as they do in a table that `quotes`; not those
  of a cell that would swallow lines which are rows themselves."""
  if width and len(quoted) != width:
    return False
  if not quotes:
    fits = len(plain) == (width or len(plain))
    return (bool(spanned) or not fits) and all(len(cells) != width for cells in spanned)
  media = _media(plain)
  return not any(media and _media(cells) == media for cells in spanned)


def _media(cells: list[str]) -> list[tuple[int, str]]:
  """Which cells name media."""
  return [(number, found) for number, cell in enumerate(cells) if (found := modality_of(cell))]


def _unquoted(cell: str) -> str:
  """A cell of a TSV that a writer of CSV has quoted for the quotes in it."""
  inner = cell[1:-1]
  quoted = (
    len(cell) > 2
    and cell[0] == cell[-1] == '"'
    and '""' in inner
    and '"' not in inner.replace('""', "")
  )
  return inner.replace('""', '"') if quoted else cell
