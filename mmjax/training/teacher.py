"""Teachers: models of other checkpoints whose outputs an objective learns from. They are inputs of
a step and never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.data.pipeline import batch_spec
from mmjax.data.tokenizers import load_tokenizer
from mmjax.models import make_model
from mmjax.parallel import rules
from mmjax.state import adapters, checkpoint

# Keys of config.data that a teacher must share with its pupil, for each modality that both know.
SAME = {
  "image": ("image.size",),
  "text": ("text.bos", "text.eos", "text.lowercase", "text.punctuation", "text.mask_padding"),
  "audio": ("audio.rate",),
  "video": ("video.size",),
  "series": ("series.channels",),
}
# Settings of `data` by modality that may be at most the teacher's.
LONGEST = {
  "text": "text.length",
  "audio": "audio.seconds",
  "video": "video.frames",
  "series": "series.length",
}


class Teacher:
  """The model of the checkpoint at `path` (a run, step or import folder), with its own settings,
  for batches of a pupil.

  model: the linen module. spec: its variables as a tree of ShapeDtypeStruct with shardings; nothing
  is read from the weights until `load`. Raises UserError: no checkpoint there, or one that reads
  pictures, texts, ... of another kind.
  """

  def __init__(self, path: str, config: FrozenConfigDict, mesh: Mesh, batch: Mapping[str, Any]):
    # Looked up once: a run that goes on may save a newer one meanwhile.
    self.path = checkpoint.find_checkpoint(path)
    self.config = checkpoint.load_config(self.path, config.allow_code)
    self.model = make_model(self.config)
    self._check(config, [modality for modality in self.config.model.encoders if modality in batch])
    table = rules.logical_rules(config)
    with rules.use(mesh, table):
      variables = dict(jax.eval_shape(self._variables, jax.random.key(0)))
    boxed = variables.pop("params")
    self._axes = rules.param_axes(boxed)
    others = nn.unbox(variables)
    whole = jax.tree.map(lambda _: rules.replicated(mesh), others)
    self.spec = {
      "params": rules.with_shardings(nn.unbox(boxed), rules.param_shardings(boxed, mesh, table)),
      **rules.with_shardings(others, whole),
    }

  def load(self, config: FrozenConfigDict) -> dict[str, Any]:
    """The variables, placed. Raises UserError: not those of its config, or another tokenizer than
    that of `config`.
    """
    theirs = checkpoint.load_assets(self.path)
    if theirs and all(
      "text" in c.model.encoders or c.data.sequence.length for c in (self.config, config)
    ):
      if any(
        theirs.get(name) != content
        for name, content in load_tokenizer(config.data).to_assets().items()
      ):
        raise UserError(
          f"teacher {self.path} was trained with another tokenizer than data.text.tokenizer "
          f"{config.data.text.tokenizer!r}. Use its tokenizer"
        )
    state = {name: tree for name, tree in self.spec.items() if name != "params"}
    loaded = checkpoint.load_model_state(self.path, state) if state else {}
    return {"params": checkpoint.load_params(self.path, self.spec["params"]), **loaded}

  def gathered(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Within a step: the variables as the model gets them, gathered where that is better done
    once.
    """
    return {
      **variables,
      "params": rules.gather_parameters(variables["params"], self.spec["params"], self._axes),
    }

  def _variables(self, rng: jax.Array) -> Any:
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch_spec(self.config, 1))
    rngs = {"params": rng, "dropout": rng}
    return adapters.init_variables(self.model, self.config, rngs, batch)

  def _check(self, config: FrozenConfigDict, modalities: list[str]) -> None:
    def value(c: FrozenConfigDict, key: str) -> Any:
      part, _, name = key.partition(".")
      return c.data[part][name]

    def patches(c: FrozenConfigDict) -> bool:
      return c.data.image.resize == "naflex"

    if "image" in modalities and patches(config) and not patches(self.config):
      raise UserError(
        f"teacher {self.path} takes pictures of one size, but data.image.resize is 'naflex' here. "
        "Choose another teacher or resize"
      )
    for modality in modalities:
      for key in SAME.get(modality, ()):
        if value(self.config, key) != value(config, key):
          raise UserError(
            f"teacher {self.path} was trained with data.{key} {value(self.config, key)!r}, but it "
            f"is {value(config, key)!r} here. Set it to the teacher's"
          )
      longest = LONGEST.get(modality)
      if longest and value(config, longest) > value(self.config, longest):
        raise UserError(
          f"teacher {self.path} takes data.{longest} up to {value(self.config, longest)!r}, but it "
          f"is {value(config, longest)!r} here. Lower it"
        )
