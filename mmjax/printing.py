"""What is shown to people holds names, captions and keys from anywhere: here control characters
lose their power.

A terminal obeys escape sequences (C0, C1), and bidirectional overrides and line separators make a
text look like another.
They are shown as \\u001b instead, which is also how JSON writes them.
"""

from __future__ import annotations

import html
import logging
import re
import sys
from typing import Any, TextIO

_UNSAFE = re.compile(
  "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufdd0-\ufdef"
  "\ufff9-\ufffb\ufffe\uffff]"
)


def printable(text: Any, keep: str = "") -> str:
  """The text with control characters, line ends, bidirectional overrides and lone surrogates as
  \\uXXXX, but for those in `keep`.
  """
  return _UNSAFE.sub(
    lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", str(text)
  )


def shorten(text: Any, most: int = 200) -> str:
  """The text with its middle left out where it is longer than `most`."""
  text = str(text)
  return text if len(text) <= most else f"{text[: most * 3 // 4]}...{text[-most // 4 :]}"


def log(text: Any, file: TextIO | None = None) -> None:
  """Prints lines: escapes what would move the cursor, change colours or reverse the text."""
  print(printable(text, "\n\t"), file=file or sys.stdout, flush=True)


class Harmless(logging.Filter):
  """Makes what a logger says `printable`: names of files, hosts and parameters of anybody."""

  def filter(self, record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage(), "\n\t"), ()
    return True


logging.getLogger("mmjax").addFilter(Harmless())


def in_html(text: Any) -> str:
  """The text for the content or an attribute of a page."""
  return html.escape(printable(text, "\n\t"))
