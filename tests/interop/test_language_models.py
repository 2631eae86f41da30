"""Families of decoder-only language models against transformers: tiny random models of odd but
legal configs, both ways.
"""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import mmjax
from mmjax.config import UserError
from mmjax.data.pipeline import batch_spec
from mmjax.inference.engine import go_on_from_prompts
from mmjax.interop import safetensors
from mmjax.interop.huggingface import (
  export_hf,
  gemma2,
  gemma3_text,
  gpt2,
  import_hf,
  llama,
  mistral,
  qwen2,
  qwen3,
)
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints

SMALL = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
SLIDING, FULL = "sliding_attention", "full_attention"
# family: (class, settings of its config)
FAMILIES = {
  "gpt2": (
    "GPT2LMHeadModel",
    dict(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=44, n_inner=40)
    | dict(bos_token_id=1, eos_token_id=2),
  ),
  "llama": (
    "LlamaForCausalLM",
    dict(SMALL, head_dim=6, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    | dict(eos_token_id=[5, 2], num_key_value_heads=4),
  ),
  "mistral": ("MistralForCausalLM", dict(SMALL, head_dim=10, sliding_window=3)),
  "qwen2": (
    "Qwen2ForCausalLM",
    dict(SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    | dict(tie_word_embeddings=True, rope_parameters=YARN),
  ),
  "qwen3": ("Qwen3ForCausalLM", dict(SMALL, head_dim=6, hidden_act="gelu_new", rms_norm_eps=1e-5)),
  "gemma2": (
    "Gemma2ForCausalLM",
    dict(SMALL, head_dim=6, query_pre_attn_scalar=9, sliding_window=4)
    | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  ),
  "gemma3_text": (
    "Gemma3ForCausalLM",
    dict(SMALL, head_dim=6, query_pre_attn_scalar=7, sliding_window=4, tie_word_embeddings=False)
    | dict(layer_types=[FULL, SLIDING])
    | dict(
      rope_parameters={
        SLIDING: dict(rope_type="default", rope_theta=50.0),
        FULL: dict(rope_type="linear", rope_theta=900.0, factor=3.0),
      }
    ),
  ),
}
SHARDED = ("llama", "gemma2", "gemma3_text")  # these are saved in several files, in bfloat16
QUICK = ("gpt2", "qwen2", "gemma3_text")
TOKENS = np.random.default_rng(0).integers(6, 97, (2, 10)).astype(np.int32)


def save(folder, family, seed=0, **settings):
  """A folder of a random model, whose biases and scales matter, and of its tokenizer."""
  name, stated = FAMILIES[family]
  torch.manual_seed(seed)
  kind = getattr(transformers, name)
  model = kind(kind.config_class(**stated, **settings))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  if family in SHARDED:
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
  else:
    model.save_pretrained(folder)
  words(folder)


def words(folder, eos="</s>", more=(), spaces=()):
  """A tokenizer.json of words that puts <s> before a text. `more` pieces are special; `spaces`:
  pieces that begin with a space, as the first word of a text alone does without having one.
  """
  import tokenizers

  pieces = ["<pad>", "<s>", "</s>", "<unk>", "<turn>", "<end>", *"abcdefgh", *more, *spaces]
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
  )
  model.add_special_tokens(list(more))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  if spaces:
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  model.save(str(folder / "tokenizer.json"))
  facts = dict(bos_token="<s>", eos_token=eos, unk_token="<unk>", pad_token="<pad>")
  (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def opened(folder, **settings):
  """transformers' own model of a folder, of which no weight is missing."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  return model.eval()


def logits_of(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.parametrize(
  "family",
  [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_family_equals_transformers_both_ways(family, tmp_path):
  save(tmp_path / "theirs", family)
  theirs = opened(tmp_path / "theirs")
  import_hf(tmp_path / "theirs", tmp_path / "in")
  predictor = mmjax.load(tmp_path / "in")
  model, params = make_model(predictor.config), predictor.params

  def loss(params):
    batch = {"sequence": {"tokens": jnp.asarray(TOKENS)}}
    hidden, _, _ = model.apply({"params": params}, batch, method="next_tokens")
    logits = model.apply({"params": params}, hidden, method="logits")
    gains = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(gains, TOKENS[:, 1:, None], axis=2).mean(), logits

  (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  want = theirs(input_ids=(ids := torch.from_numpy(TOKENS).long()), labels=ids)
  want.loss.backward()
  np.testing.assert_allclose(logits, want.logits.detach(), atol=1e-4)
  np.testing.assert_allclose(value, want.loss.item(), atol=1e-5)
  table = theirs.get_input_embeddings().weight.grad
  np.testing.assert_allclose(gradients["embedding"], table, atol=1e-4)

  sequence = {"tokens": jnp.asarray(TOKENS), "length": jnp.full(2, TOKENS.shape[1])}

  @jax.jit
  def generate(params):
    return go_on_from_prompts(model, {"params": params}, {"sequence": sequence}, 32)[0]

  written = np.asarray(generate(params))
  greedy = theirs.generate(ids, max_new_tokens=32, do_sample=False)[:, ids.shape[1] :].numpy()
  np.testing.assert_array_equal(written[:, : greedy.shape[1]], greedy)
  assert (written[:, greedy.shape[1] :] == model.pad_id).all()

  export_hf(tmp_path / "in", tmp_path / "out")
  exported = opened(tmp_path / "out")
  assert exported.config.model_type == family
  np.testing.assert_allclose(logits_of(exported), logits_of(theirs), atol=1e-6)
  ends = [x.generation_config.eos_token_id for x in (exported, theirs)]
  np.testing.assert_array_equal(*(np.unique(x) for x in ends))
  import_hf(tmp_path / "out", tmp_path / "again")
  again = checkpoints.load_params(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, dict(again), jax.device_get(dict(params)))


# -- What a folder says, without its weights -------------------------------------------------------


def rotary_of(module, **stated):
  return module.settings(stated, {})["model"]["block"]["rotary"]


def test_older_files_state_positions_and_windows_their_own_way():
  linear = dict(theta=5e5, scaling="linear", factor=2.0)
  assert rotary_of(llama, rope_theta=5e5, rope_scaling=dict(type="linear", factor=2)) == linear
  stated = dict(rope_theta=1e6, rope_scaling=dict(factor=8.0, rope_type="linear"))
  block = gemma3_text.settings(dict(stated, rope_local_base_freq=5e3), {})["model"]["block"]
  assert block["rotary"] == dict(theta=1e6, scaling="linear", factor=8.0)
  assert block["local_rotary"] == dict(theta=5e3)
  period = [*(4096,) * 5, 0]
  assert [block["windows"][i % len(block["windows"])] for i in range(26)] == (5 * period)[:26]
  block = qwen2.settings(dict(sliding_window=32_768, use_sliding_window=False), {})["model"][
    "block"
  ]
  assert block["windows"] == ()


REFUSED = {
  "longrope": (llama, dict(rope_scaling=dict(type="longrope")), "rope_type 'longrope'"),
  "no factor": (llama, dict(rope_scaling=dict(type="linear")), "'linear' needs factor"),
  "nested": (qwen3, dict(rope_parameters={FULL: dict(rope_theta=5.0)}), "its own for full_att"),
  "part": (llama, dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
  "act": (llama, dict(hidden_act="relu2"), "hidden_act 'relu2' is not supported"),
  "types": (mistral, dict(layer_types=[SLIDING, FULL] * 16), "layer_types has layers of several"),
  "chunks": (
    qwen3,
    dict(num_hidden_layers=1, layer_types=["chunked_attention"]),
    "layer_types has chunked_attention",
  ),
  "both ways": (gemma2, dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
  "cap": (gemma3_text, dict(attn_logit_softcapping=9.0), "attn_logit_softcapping is 9.0"),
  "inverse": (gpt2, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
  "cross": (gpt2, dict(add_cross_attention=True), "add_cross_attention is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_express_is_refused_by_name(name):
  module, stated, error = REFUSED[name]
  with pytest.raises(UserError, match=error):
    module.settings(stated, {})


def own(folder, **model):
  """An import folder of a random model of settings of our own: (config, parameters)."""
  c = mmjax.config.base()
  c.data.text.update(vocab_size=97, tokenizer="none")
  c.data.sequence.length = 16
  c.model = dict(
    dict(name="language_model", encoders={}, width=16, depth=2, heads=2, mlp=24, eps=1e-5)
    | dict(eos_id=2, pad_id=0),
    **model,
  )
  c.precision.compute = "float32"
  config = mmjax.config.resolve(c)
  shapes = jax.eval_shape(make_model(config).init, jax.random.key(0), batch_spec(config, 1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nn.unbox(shapes))
  checkpoints.save_import(str(folder), params["params"], config, {})
  return config, params["params"]


def test_a_model_goes_to_the_family_that_can_express_it_or_is_refused_by_name(tmp_path):
  def exported(number, **model):
    own(tmp_path / f"own{number}", **model)
    out = export_hf(tmp_path / f"own{number}", tmp_path / f"hf{number}")
    return json.loads((out / "config.json").read_text())

  assert exported(0)["model_type"] == "llama"
  assert exported(1, block=dict(windows=[4, 4]))["model_type"] == "mistral"
  stated = exported(2, block=dict(qk_norm=True, windows=[4, 0]))
  assert (stated["model_type"], stated["layer_types"]) == ("qwen3", [SLIDING, FULL])
  with pytest.raises(UserError, match="nearest is LlamaForCausalLM, but for model.block.soft_cap"):
    exported(3, block=dict(soft_cap=5.0))
  with pytest.raises(UserError, match=r"model.learned_positions = True"):
    exported(4, positions="learned")


def test_files_with_copies_buffers_and_without_prefix(tmp_path):
  """A tied table that is stored twice stays tied, unless the two differ; buffers are no weights."""
  _, params = own(
    tmp_path / "own", positions="learned", norm_kind="layer", bias=True, activation="gelu_tanh"
  )
  out = export_hf(tmp_path / "own", tmp_path / "hf")
  tensors = dict(safetensors.read(out / "model.safetensors"))
  assert all(name.startswith("transformer.") for name in tensors)
  bare = {name.removeprefix("transformer."): np.array(x) for name, x in tensors.items()}
  bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 16, 16), np.float32) for i in range(2)}
  safetensors.write(out / "model.safetensors", bare)
  import_hf(out, tmp_path / "bare")
  again = dict(checkpoints.load_params(tmp_path / "bare"))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  for name, table in dict(same=bare["wte.weight"], other=bare["wte.weight"] + 1).items():
    safetensors.write(out / "model.safetensors", {**bare, "lm_head.weight": table})
    import_hf(out, tmp_path / name)
    assert checkpoints.load_config(str(tmp_path / name)).model.tied == (name == "same")


def test_special_tokens_come_from_the_files(tmp_path):
  """Of several tokens that end texts the tokenizer's <eos> is the one that training writes; a
  tokenizer_config.json that puts no <s> before texts overrides the tokenizer.json.
  """
  own(tmp_path / "own")
  out = export_hf(tmp_path / "own", tmp_path / "hf")
  words(out, eos="<turn>")
  config = json.loads((out / "config.json").read_text())
  (out / "config.json").write_text(json.dumps(dict(config, pad_token_id=None, eos_token_id=2)))
  generation = dict(eos_token_id=[2, 4, 5], temperature=0.5)
  (out / "generation_config.json").write_text(json.dumps(generation))
  import_hf(out, tmp_path / "in")
  c = checkpoints.load_config(str(tmp_path / "in"))
  assert (c.model.eos_id, c.model.end_ids, c.model.pad_id) == (4, (2, 5), 0)
  assert (c.data.text.bos, c.data.text.pad_id, c.data.sequence.length) == (True, 0, 16)
  back = export_hf(tmp_path / "in", tmp_path / "back")
  kept = json.loads((back / "generation_config.json").read_text())
  assert kept["temperature"] == 0.5 and sorted(kept["eos_token_id"]) == [2, 4, 5]
  facts = json.loads((out / "tokenizer_config.json").read_text())
  (out / "tokenizer_config.json").write_text(json.dumps(dict(facts, add_bos_token=False)))
  import_hf(out, tmp_path / "bare")
  assert not checkpoints.load_config(str(tmp_path / "bare")).data.text.bos
  for name in ("tokenizer.json", "generation_config.json"):
    (out / name).unlink()
  (out / "config.json").write_text(json.dumps(dict(config, eos_token_id=None)))
  with pytest.raises(UserError, match="eos_token_id is missing"):
    import_hf(out, tmp_path / "none")
