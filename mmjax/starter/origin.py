"""What a run, an import or a Hugging Face folder gives a config that starts from it: encoders,
preprocessing, the tokenizer, and which parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from mmjax import config as configs
from mmjax import files
from mmjax.config import UserError
from mmjax.data.tokenizers import Tokenizer
from mmjax.kinds import kind_function, kind_settings
from mmjax.starter.sizes import Model
from mmjax.starter.tasks import Task
from mmjax.starter.text import Draft

KEPT = {  # settings of data.* that prepare a modality as the checkpoint's was
  "image": ("size", "resize", "patch", "tokens", "crop", "interpolation", "mean", "std"),
  "audio": ("rate", "seconds"),
  "video": ("size", "frames"),
  "series": ("length", "channels", "mean", "std"),
  "text": ("bos", "eos", "lowercase", "punctuation", "mask_padding", "pad_id"),
}


class Origin:
  """A checkpoint to start from. `folder`: what init.from names."""

  def __init__(self, folder: str):
    from mmjax.state import checkpoint

    self.folder = folder
    self.config = checkpoint.load_config(folder).to_dict()
    self.assets = checkpoint.load_assets(folder)
    self.shapes = checkpoint.names_and_shapes(folder)
    self.text: dict[str, Any] = self.config["data"]["text"]
    self.loads: tuple[str, ...] = ()

  @property
  def sizes(self) -> Model:
    """Of its encoders: the widest one's."""
    model = self.config["model"]
    entries = [entry for entry in model["encoders"].values() if entry.get("depth")]
    width = model.get("width", 512)
    width = max([entry.get("width") or width for entry in entries], default=width)
    depth = max([entry["depth"] for entry in entries], default=2)
    heads = max([entry.get("heads") or 0 for entry in entries], default=0)
    return Model(width, heads or max(1, width // 64), depth, 2)

  @property
  def has_tokenizer(self) -> bool:
    return Tokenizer.is_among(self.assets)

  @property
  def longest_text(self) -> int:
    """Tokens of a text at most, which its table of positions allows."""
    text = self.config["model"]["encoders"].get("text") or {}
    return max(self.text["length"], text.get("max_positions", 0))

  def encoder(self, modality: str) -> dict[str, Any] | None:
    """The settings of its encoder that are not the usual ones; None = it has no such encoder."""
    entry = self.config["model"]["encoders"].get(modality)
    if entry is None:
      return None
    changed = _changed(entry, "encoder", "kind")
    if not changed.get("width"):
      changed["width"] = self.config["model"].get("width", 512)
    return changed

  def reads_text(self, made: Task) -> bool:
    """Whether the new model has a part that it learned with its tokenizer."""
    model = self.config["model"]
    if "language_model" in (made.model["name"], model["name"]):
      return made.model["name"] == model["name"]
    return ("text" in made.model["encoders"] and "text" in model["encoders"]) or bool(
      made.model.get("decoder") and model.get("decoder")
    )

  def adopt(self, made: Task) -> Task:
    """The task with this checkpoint's model where it is of the same kind, and with its encoder of
    texts and its decoder."""
    theirs = self.config["model"]
    model, encoders = dict(made.model), dict(made.model["encoders"])
    if "text" in encoders and "text" in theirs["encoders"]:
      encoders["text"] = self.encoder("text")
    if model.get("decoder") and theirs.get("decoder"):
      model["decoder"] = _changed(theirs["decoder"], "decoder", "kind")
      for token in ("prompt", "eos_id", "pad_id"):  # the tokenizer's, unless it says others
        if theirs["decoder"].get(token) in (-1, ()):
          model["decoder"].pop(token, None)
    model["width"] = theirs.get("width", 512)
    if theirs["name"] == model["name"]:
      rest = _changed(theirs, "model", "name", without=("encoders", "fusion", "decoder", "classes"))
      model = {**model, **rest}
    return dataclasses.replace(made, model={**model, "encoders": encoders})

  def data(self, draft: Draft, modality: str) -> bool:
    """Writes how it prepares a modality; False = it has none."""
    if modality not in self.config["model"]["encoders"]:
      return False
    usual = configs.base().data[modality]
    theirs = self.config["data"][modality]
    changed = {key: theirs[key] for key in KEPT[modality] if theirs[key] != _plain(usual.get(key))}
    for number, (key, value) in enumerate(changed.items()):
      comment = "as the checkpoint was trained" if number == 0 else ""
      draft.set(f"data.{modality}.{key}", value, comment)
    return True

  def text_settings(self, draft: Draft) -> None:
    usual = configs.base().data.text
    for key in KEPT["text"]:
      if self.text[key] != usual[key]:
        draft.set(f"data.text.{key}", self.text[key])

  def sequence_settings(self, draft: Draft) -> None:
    """How texts and media stand in the rows of its language model; how long they are is the
    data's."""
    usual = configs.base().to_dict()["data"]["sequence"]
    for key, value in self.config["data"]["sequence"].items():
      if key not in ("length", "slots", "pack") and value != _plain(usual[key]):
        draft.set(f"data.sequence.{key}", value)

  def tokenizer(self, folder: Path) -> tuple[str, Tokenizer]:
    """(its name under folder/tokenizers, where its files are put; the tokenizer)."""
    made = Tokenizer.from_assets(self.assets)
    stem = re.sub(r"[^\w.-]+", "_", Path(self.folder).name) or "checkpoint"
    name = f"{stem}-{made.fingerprint[:6]}"
    for file, content in made.to_assets().items():
      files.write_whole(folder / "tokenizers" / name / file, content)
    return name, made

  def optimizer(self, made: Task) -> dict[str, Any]:
    """A rate for fine-tuning: low, for what is loaded a tenth of it."""
    return dict(name="adamw", lr=1e-3, weight_decay=0.05)

  def start(self, draft: Draft) -> None:
    draft.set("init.from", self.folder)

  def add_map(self, draft: Draft, config: FrozenConfigDict) -> bool:
    """Writes init.map and optimizer.rates: the parts of the model that the checkpoint has are
    loaded and learn slowly, others are new. False = it has them all. Raises UserError: it has none.
    """
    from mmjax.inference.parameters import param_spec
    from mmjax.state.paths import by_name

    fits: dict[str, bool] = {}
    for name, leaf in by_name(param_spec(config)).items():
      part = name.partition("/")[0]
      given = self.shapes.get(name)
      same = given is not None and (
        given.shape == leaf.shape
        or name.endswith("/position")
        and given.shape[1:] == leaf.shape[1:]
      )
      fits[part] = fits.get(part, True) and same
    loaded = [part for part, same in fits.items() if same]
    known = (*self.config["model"]["encoders"], "decoder", "layers")  # layers: of a language model
    if not any(part in known for part in loaded):
      raise UserError(
        f"--from {self.folder}: it has no encoder that this model could take; it has "
        f"{', '.join(self.config['model']['encoders'])}"
      )
    at = next(i for i, line in enumerate(draft.lines) if line.startswith('  c.init["from"]')) + 1
    rest = Draft()
    new = [part for part, same in fits.items() if not same]
    if new:
      rules = (*((rf"{part}(/.*)?", r"\g<0>") for part in loaded), (".*", None))
      rest.set("init.map", rules, f"new: {', '.join(new)}")
      rest.set(
        "optimizer.rates",
        tuple(
          (rf"{part}/.*", 0.1)
          for part in loaded
          if part in fits and part in self.config["model"]["encoders"]
        ),
        "what is loaded learns more slowly than what is new",
      )
    else:
      rest.set("optimizer.lr", 1e-4, "everything is loaded")
    draft.lines[at:at] = rest.lines
    return True


def open_origin(folder: str, out: Path, log: Callable[[str], None]) -> Origin:
  """The checkpoint at `folder`; a Hugging Face folder is imported beside `out` first. Raises
  UserError: it is neither.
  """
  from mmjax.interop import huggingface
  from mmjax.state import checkpoint

  try:
    checkpoint.find_checkpoint(folder)
    return Origin(folder)
  except UserError:
    if not (Path(folder) / "config.json").exists() and not list(Path(folder).glob("open_clip*")):
      raise
  imported = out.with_suffix("").with_name(f"{out.stem}-import")
  if not imported.exists():
    huggingface.import_hf(folder, imported, log)
    log(f"imported {folder} as {imported}")
  return Origin(str(imported))


def _changed(
  entry: Mapping[str, Any], group: str, selector: str, without: tuple[str, ...] = ()
) -> dict[str, Any]:
  """An entry of a resolved config, less the settings that have their defaults."""
  function = kind_function(entry, group) if entry.get(selector) else None
  known = kind_settings(function) if function else {}
  out = {selector: entry[selector]} if entry.get(selector) else {}
  for name, value in entry.items():
    if name == selector or name in without or name not in known:
      continue
    if _plain(known[name].default) != value:
      out[name] = value
  return out


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, (list, tuple)) else value
