"""LoRA folders of PEFT against peft and transformers themselves: tiny random models, both ways."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from ml_collections import FrozenConfigDict

from mmjax.config import UserError
from mmjax.inference.predictor import Predictor
from mmjax.interop.export import export
from mmjax.interop.huggingface import import_hf
from mmjax.parallel.mesh import single_device_mesh
from mmjax.state import checkpoint as checkpoints
from tests.interop.test_language_models import TOKENS, logits_of, opened, save

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# family of the base: settings of the adapter
CASES = {
  "llama": dict(r=3, lora_alpha=5, target_modules=ALL, use_rslora=True),
  "qwen2": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
  | dict(lora_dropout=0.1, modules_to_save=["norm"]),
}


def adapt(folder, out, **settings):
  """A folder of PEFT with a random adapter of the model in `folder`, and its logits."""
  torch.manual_seed(1)
  config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
  model = peft.get_peft_model(opened(folder), config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "modules_to_save" in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(out)
  return logits_of(model)


def our_logits(folder, **settings):
  predictor = Predictor.load(folder, mesh=single_device_mesh(), **settings)
  model, params = predictor._model, predictor.params

  @jax.jit
  def logits(params):
    batch = {"sequence": {"tokens": jnp.asarray(TOKENS)}}
    hidden, _, _ = model.apply({"params": params}, batch, method="next_tokens")
    return model.apply({"params": params}, hidden, method="logits")

  return logits(params)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
  """Folders "base", "adapter" and "in", the import of both, and the logits of peft."""
  folder = tmp_path_factory.mktemp(request.param)
  save(folder / "base", request.param)
  logits = adapt(folder / "base", folder / "adapter", **CASES[request.param])
  import_hf(folder / "base", folder / "in", adapter=folder / "adapter")
  return folder, logits


def test_an_adapter_of_peft_is_read(pair):
  folder, logits = pair
  assert np.abs(logits - logits_of(opened(folder / "base"))).max() > 0.1
  np.testing.assert_allclose(our_logits(folder / "in"), logits, atol=1e-4)
  merged = our_logits(folder / "in", merged=True)
  np.testing.assert_allclose(merged, our_logits(folder / "in"), atol=1e-5)
  lora = checkpoints.load_config(folder / "in").lora
  stated = json.loads((folder / "adapter" / "adapter_config.json").read_text())
  assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == tuple(
    stated[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")
  )


def test_an_adapter_is_written_for_peft_and_merged_for_transformers(pair, tmp_path):
  folder, logits = pair
  out = export(folder / "in", "peft", tmp_path / "adapter")
  assert sorted(path.name for path in out.iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]
  model = peft.PeftModel.from_pretrained(opened(folder / "base"), out).eval()
  np.testing.assert_allclose(logits_of(model), logits, atol=1e-4)
  merged = opened(export(folder / "in", "hf", tmp_path / "merged"))
  np.testing.assert_allclose(logits_of(merged), logits, atol=1e-4)
  import_hf(folder / "base", tmp_path / "again", adapter=out)
  a, b = (checkpoints.load_params(x) for x in (folder / "in", tmp_path / "again"))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_factors_of_a_table_are_merged_for_transformers_and_refused_for_peft(small, tmp_path):
  import_hf(small / "base", tmp_path / "in", adapter=small / "adapter")
  config, params = (
    load(tmp_path / "in") for load in (checkpoints.load_config, checkpoints.load_params)
  )
  draw, (rows, width) = np.random.default_rng(0), params["embedding"].shape
  factors = dict(lora_a=draw.normal(size=(rows, 1, 2)), lora_b=draw.normal(size=(1, 2, width)))
  params["embedding_factors"] = jax.tree.map(np.float32, dict(factors, lora_scale=0.1))
  lora = dict(config.lora.to_dict(), params=f"{config.lora.params}|embedding")
  config = FrozenConfigDict({**config.to_dict(), "lora": lora})
  checkpoints.save_import(
    str(tmp_path / "more"), params, config, checkpoints.load_assets(tmp_path / "in")
  )
  logits = our_logits(tmp_path / "more")
  assert np.abs(logits - our_logits(tmp_path / "in")).max() > 0.1
  np.testing.assert_allclose(our_logits(tmp_path / "more", merged=True), logits, atol=1e-5)
  merged = opened(export(tmp_path / "more", "hf", tmp_path / "merged"))
  np.testing.assert_allclose(logits_of(merged), logits, atol=1e-4)
  with pytest.raises(UserError, match="factors of embedding, .* kernels alone: export"):
    export(tmp_path / "more", "peft", tmp_path / "adapter")
  assert not (tmp_path / "adapter").exists()


REFUSED = {
  "DoRA": (dict(use_dora=True), "use_dora is True: DoRA is not supported"),
  "another kind": (dict(peft_type="IA3"), "peft_type is 'IA3', but only 'LORA'"),
  "ranks": (dict(rank_pattern={"q_proj": 2}), "rank_pattern is .* not supported"),
  "alphas": (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern is .* not supported"),
  "biases": (dict(bias="all"), "bias is 'all'"),
  "PiSSA": (dict(init_lora_weights="pissa"), "'pissa', which changes the base"),
  "unknown": (dict(use_new_trick=True), "use_new_trick is True, which is not supported"),
  "rank": (dict(r=5), r"factors of .*_proj have the shapes .* adapter of another model"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  folder = tmp_path_factory.mktemp("small")
  save(folder / "base", "mistral")
  adapt(folder / "base", folder / "adapter", r=2, target_modules=["v_proj"])
  return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_by_name(case, small, tmp_path):
  changes, message = REFUSED[case]
  shutil.copytree(small / "adapter", tmp_path / "adapter")
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(UserError, match=message):
    import_hf(small / "base", tmp_path / "out", adapter=tmp_path / "adapter")
  assert not (tmp_path / "out").exists()


def test_pickled_weights_and_adapters_of_other_models_are_refused(small, tmp_path):
  shutil.copytree(small / "adapter", tmp_path / "pickled")
  (tmp_path / "pickled" / "adapter_model.safetensors").rename(
    tmp_path / "pickled" / "adapter_model.bin"
  )
  with pytest.raises(UserError, match="only adapter_model.bin, which holds pickled code"):
    import_hf(small / "base", tmp_path / "out", adapter=tmp_path / "pickled")
  save(tmp_path / "wide", "qwen3")
  with pytest.raises(UserError, match="v_proj have the shapes .* an adapter of another model"):
    import_hf(tmp_path / "wide", tmp_path / "out", adapter=small / "adapter")
  save(tmp_path / "gpt2", "gpt2")
  with pytest.raises(UserError, match="v_proj.lora_A.weight belongs to no layer of this model"):
    import_hf(tmp_path / "gpt2", tmp_path / "out", adapter=small / "adapter")
