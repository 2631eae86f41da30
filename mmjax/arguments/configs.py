"""What explains configs: config show, keys, kinds, methods."""

from __future__ import annotations

from typing import Any

from mmjax.arguments.parser import Parser, command


def add_commands(commands: Any) -> None:
  group = commands.add_parser(
    "config", help="Show a resolved config, and all keys and kinds that there are."
  ).add_subparsers(dest="config_command", metavar="COMMAND", required=True, parser_class=Parser)
  _show(group)
  _keys(group)
  _kinds(group)
  _methods(group)


def _show(commands: Any) -> None:
  sub = command(
    commands,
    "show",
    "Print the resolved config of a file.",
    "mmjax config show configs/quickstart.py --docs",
    overrides=True,
  )
  sub.add_argument("file", metavar="FILE")
  sub.add_argument("--docs", action="store_true", help="with the meaning of each key")
  sub.add_argument("--json", action="store_true", help="as JSON")


def _keys(commands: Any) -> None:
  sub = command(
    commands,
    "keys",
    "Print what every key of a config means and takes (Markdown).",
    "mmjax config keys 'data.image.*'",
  )
  sub.add_argument("pattern", nargs="?", default="*", help="only keys that fit; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")


def _kinds(commands: Any) -> None:
  sub = command(
    commands,
    "kinds",
    "Print the kinds of encoders, objectives, optimizers, ... and their settings (Markdown).",
    "mmjax config kinds contrastive",
  )
  sub.add_argument("name", nargs="?", default="", help="a kind or a group; default: all")
  sub.add_argument("--json", action="store_true", help="as JSON")


def _methods(commands: Any) -> None:
  sub = command(
    commands,
    "methods",
    "Print the methods of the models that objectives call (Markdown).",
    "mmjax config methods",
  )
  sub.add_argument("--json", action="store_true", help="as JSON")
