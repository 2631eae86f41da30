"""The arguments of every command of `mmjax`, with their help: a file for what belongs together."""

from __future__ import annotations

import argparse

from mmjax.arguments import configs, data, models, runs
from mmjax.arguments.parser import Parser


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands; cli.py runs them."""
  from mmjax import __version__

  parser = Parser(
    prog="mmjax",
    description="Train multimodal models in JAX, from a laptop to a TPU pod.",
    epilog="Start with: bash launch/quickstart.sh   Each command has --help with an example.",
  )
  parser.add_argument("--version", action="version", version=f"mmjax {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  for part in (runs, data, configs, models):
    part.add_commands(commands)
  return parser
