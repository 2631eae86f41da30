"""The guides (README.md of the repository and of its parts) as the tests read them.

A ```bash block holds commands that the tests run or parse, a ```python block code that they run.
What stands between `<!-- begin: mmjax ... -->` and `<!-- end -->` is what that command prints.

  python -m tests.guides                    writes that output anew
  python -m tests.guides runs/quickstart    and draws configs/report.svg from the curves of this run
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import shlex
import sys

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = (".", "configs", "launch", "mmjax", "mmjax/data", "tests/bench")
GUIDES = sorted(
  path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.md")
)
PRINTED = re.compile(r"(<!-- begin: mmjax (.+?) -->\n)(.*?)(<!-- end -->)", re.S)
FENCED = re.compile(r"^```.*?^```$", re.S | re.M)
PICTURE = ROOT / "configs" / "report.svg"


def read(guide: str, heading: str = "") -> str:
  """The text of a guide, or of its section `heading` ("## Several hosts") with what is below it."""
  text = (ROOT / guide).read_text(encoding="utf-8")
  if not heading:
    return text
  level = len(heading.split()[0])
  section = rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)"
  found = re.search(section, _without_code(text), re.S | re.M)
  assert found, f"{guide} has no section {heading!r}"
  return text[slice(*found.span(1))]


def blocks(text: str, kind: str) -> list[str]:
  """The fenced blocks of a kind ("bash", "python", ...)."""
  return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.S | re.M)


def commands(text: str) -> list[str]:
  """The commands of its bash blocks, without comments."""
  lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
  return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


def printed(command: str) -> str:
  """What `mmjax COMMAND` prints."""
  from mmjax import cli

  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert cli.main(shlex.split(command)) == 0
  return out.getvalue()


def anchors(text: str) -> list[str]:
  """The names that headings of a guide are linked by, as GitHub makes them."""
  heads = re.findall(r"^#+ (.+)$", _without_code(text), re.M)
  return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


def links(text: str) -> list[str]:
  """Where the links and pictures of a guide lead."""
  return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", _without_code(text)))


def cells(text: str) -> list[list[str]]:
  """The rows of the tables of a guide, without those of dashes: their cells."""
  lines = re.findall(r"^\|(.*)\|$", _without_code(text), re.M)
  rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
  return [row for row in rows if set("".join(row)) != {"-"}]


def _without_code(text: str) -> str:
  """The text with fenced blocks blanked out, every character in its place."""
  return FENCED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def renew() -> None:
  """Writes the output of the commands that guides name into them."""
  for guide in GUIDES:
    text = read(guide)
    new = PRINTED.sub(lambda m: f"{m[1]}{printed(m[2])}{m[4]}", text)
    if new != text:
      (ROOT / guide).write_text(new, encoding="utf-8")
      print(f"{guide} is renewed")


STYLE = """
text { font: 11px system-ui, sans-serif; fill: #5d6b7c }
.name { font-size: 13px; font-weight: 600; fill: #1b2430 }
.key { font-size: 9.5px }
.grid { stroke: #e2e7ec } .line { fill: none; stroke-width: 1.8 } .area { opacity: .09 }
"""  # noqa: E501
COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#866118")


def draw(run: str) -> None:
  """Draws PICTURE: the charts of a run's report.html, two beside two, as one SVG of text alone."""
  from mmjax.evaluation import report, report_charts

  rows = report.read_metrics(pathlib.Path(run) / "metrics.jsonl")
  names = ("retrieval/combinations", "retrieval/concepts")
  charts = report_charts.training_charts(rows)[0][:2]
  charts += report_charts.evaluation_charts(rows, names)
  wide, high = report_charts.WIDTH + 24, report_charts.HEIGHT + 54
  parts = [f"<style>{STYLE}"]
  for i, colour in enumerate(COLOURS):
    parts.append(f".line.s{i} {{ stroke: {colour} }} .area.s{i}, .dot.s{i} {{ fill: {colour} }}")
  parts.append('</style><rect width="100%" height="100%" rx="10" fill="#fff"/>')
  for number, chart in enumerate(charts):
    inner = re.sub(r"<svg[^>]*>|<g class=\"hover\"></g></svg>", "", chart["svg"])
    keys = [
      f'<tspan dx="8" fill="{COLOURS[key["index"]]}">{key["name"]} {key["last"]}</tspan>'
      for key in chart["legend"]
    ]
    parts.append(
      f'<g transform="translate({number % 2 * wide + 12} {number // 2 * high + 8})">'
      f'<text class="name" x="8" y="14">{chart["title"]}</text>'
      f'<text class="key" y="31">{"".join(keys)}</text>'
      f'<g transform="translate(0 36)">{inner}</g></g>'
    )
  body = "\n".join(parts)
  box = f"0 0 {2 * wide} {(len(charts) + 1) // 2 * high + 8}"
  PICTURE.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}\n</svg>\n')


if __name__ == "__main__":
  renew()
  if len(sys.argv) > 1:
    draw(sys.argv[1])
