"""Settings of kinds that stand for the special tokens of a config's tokenizer, such as <eos>."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from mmjax.errors import ConfigError, UserError
from mmjax.kinds import ENTRIES, entry_at, kind_function, kind_settings, load_function

log = logging.getLogger("mmjax")

# Tokenizers that the project trains have these, in this order from 0.
SPECIAL_TOKENS = ("pad", "bos", "eos", "unk", "mask")


class Special(NamedTuple):
  """Marks a setting of a kind as special tokens: -1, or () for several, stands for the tokenizer's
  own.

  roles: which, of SPECIAL_TOKENS. needed: those without which the kind cannot work. when: the
  setting of the same entry that must be on for that, or (the setting, its value); "" = always.
  warns: another token than the tokenizer's is a mistake.
  """

  roles: tuple[str, ...]
  needed: tuple[str, ...]
  when: str | tuple[str, Any] = ""
  warns: bool = True

  def __str__(self) -> str:
    return f"the tokenizer's {' '.join(f'<{role}>' for role in self.roles)} unless stated"


# (data) -> {role: id, -1 = none}: the special tokens of a config's tokenizer.
TOKENIZER = "mmjax.data.tokenizers:special_tokens"


def fill_special_tokens(tree: dict, known: Mapping[str, int] | None) -> None:
  """Writes the ids of the tokenizer's special tokens (those that are `known`) into the settings
  that are left to it.

  Raises ConfigError: the tokenizer is damaged or too large, or lacks a token that an entry needs.
  Warns of a setting that names another token than the tokenizer.
  """
  found, text = list(special_settings(tree)), tree["data"]["text"]
  if not found and not _reads_text(tree):
    return
  try:
    ids = dict(known or load_function(TOKENIZER)(FrozenConfigDict(tree["data"])))
  except ConfigError:
    raise
  except UserError as error:
    raise ConfigError(str(error)) from error
  if text["pad_id"] >= 0:
    ids["pad"] = text["pad_id"]
  elif ids["pad"] < 0 and tree["data"]["sources"] and _reads_text(tree):
    raise _no_token("data.text.pad_id", "pad", text["tokenizer"])
  for path, entry, name, special in found:
    where, given, theirs = (
      ".".join((*path, name)),
      entry[name],
      token_ids(special, ids, entry[name]),
    )
    if given in (-1, ()):
      entry[name] = theirs
    if not _is_on(special.when, entry):
      continue
    if given in (-1, ()):
      for role in special.needed:
        if ids[role] < 0:
          raise _no_token("data.text.pad_id" if role == "pad" else where, role, text["tokenizer"])
    elif special.warns and any(
      b not in (-1, a) for a, b in zip(_several(given), _several(theirs), strict=False)
    ):
      log.warning(
        "%s is %r, but tokenizer %r has %r. Leave the key out to use the tokenizer's",
        where,
        given,
        text["tokenizer"],
        theirs,
      )


def _no_token(where: str, role: str, tokenizer: str) -> ConfigError:
  return ConfigError(
    f"tokenizer {tokenizer!r} has no <{role}>, which {where} stands for. Set {where} to the id of "
    "a token that can take its place, or use a tokenizer that has one, as those of `mmjax data "
    "tokenizer`"
  )


def _reads_text(tree: dict) -> bool:
  return bool(tree["data"]["sequence"]["length"]) or "text" in (
    tree["data"]["modalities"] or tree["model"].get("encoders", {})
  )


def special_settings(tree: dict) -> Iterator[tuple[list[str], dict, str, Special]]:
  """(keys of the entry, the entry, setting, what it is) of each setting of a resolved config that
  is special tokens.
  """
  for pattern, (group, _) in ENTRIES.items():
    above, _, last = pattern.rpartition(".")
    parent = entry_at(tree, above.split(".")) if above else tree
    names = (parent or {}) if last == "*" else [last]
    for name in names:
      entry = (parent or {}).get(name)
      if not entry:
        continue
      for setting, parameter in kind_settings(kind_function(entry, group)).items():
        for special in getattr(parameter.annotation, "__metadata__", ()):
          if isinstance(special, Special):
            yield [*filter(None, above.split(".")), name], entry, setting, special


def token_ids(special: Special, ids: Mapping[str, int], like: Any) -> Any:
  """The ids of the roles of a setting: one, or a tuple where its value is one; -1 = there is no
  such token.
  """
  found = tuple(ids[role] for role in special.roles)
  return found if isinstance(like, tuple) else found[0]


def _several(value: int | tuple) -> tuple:
  return value if isinstance(value, tuple) else (value,)


def _is_on(when: str | tuple[str, Any], entry: Mapping) -> bool:
  if isinstance(when, tuple):
    return entry[when[0]] == when[1]
  return not when or bool(entry[when])
