"""BERT, ViT, ResNet and Swin folders against transformers: tiny random models, every output
compared, both ways; a gradient.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import mmjax
from mmjax.config import UserError
from mmjax.interop.export import flat_params
from mmjax.interop.functions import functions, lower
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints

WORDS = "a cat dog red house with blue hat and the on car".split()
TEXTS = ["a cat with a hat", "red house and blue car on the house with the dog and a cat", "dog"]
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def randomise(model):
  """Every parameter and running statistic away from where it starts."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    for name, buffer in model.named_buffers():
      if "running" in name:
        buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.5)
  return model.eval()


def tokenizer(folder):
  pieces = {p: i for i, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
  made = transformers.BertTokenizer(vocab=pieces, model_max_length=14)
  made.save_pretrained(folder)
  return made


def bert(kind, **facts):
  return kind(transformers.BertConfig(**TOWER, vocab_size=20, max_position_embeddings=14, **facts))


def vit(kind, **facts):
  return kind(transformers.ViTConfig(**TOWER, image_size=32, patch_size=8, **facts))


def resnet(kind, **facts):
  return kind(transformers.ResNetConfig(embedding_size=8, **facts))


def swin(kind, **facts):
  """Maps of 8 and 4 patches, filled up to whole windows of 3, which are shifted."""
  return kind(
    transformers.SwinConfig(
      image_size=32,
      patch_size=4,
      embed_dim=8,
      depths=[2, 2],
      num_heads=[2, 4],
      window_size=3,
      **facts,
    )
  )


CASES = {
  "bert": lambda: bert(transformers.BertModel, hidden_act="gelu_new"),
  "bert with masked tokens": lambda: bert(transformers.BertForMaskedLM),
  "bert classifier": lambda: bert(transformers.BertForSequenceClassification, num_labels=3),
  "vit": lambda: vit(transformers.ViTModel),
  "vit classifier": lambda: vit(transformers.ViTForImageClassification, num_labels=5),
  "resnet": lambda: resnet(
    transformers.ResNetModel, layer_type="basic", hidden_sizes=[8, 16], depths=[1, 2]
  ),
  "resnet classifier": lambda: resnet(
    transformers.ResNetForImageClassification, hidden_sizes=[32, 64], depths=[2, 1], num_labels=3
  ),
  "swin": lambda: swin(transformers.SwinModel),
  "swin classifier": lambda: swin(transformers.SwinForImageClassification, num_labels=3),
}


def folder_of(case, folder):
  """(model, its inputs, our batch), saved in `folder` with what prepares its inputs."""
  model = randomise(CASES[case]())
  model.save_pretrained(folder)
  if "bert" in case:
    inputs = tokenizer(folder)(
      TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
    )
    batch = dict(
      text=dict(
        tokens=inputs["input_ids"].numpy().astype(np.int32),
        mask=inputs["attention_mask"].numpy() > 0,
        types=np.tile(np.arange(14) // 9, (3, 1)),
      )
    )
    inputs["token_type_ids"] = torch.tensor(batch["text"]["types"])
    return model, dict(inputs), batch
  if "resnet" in case:
    facts = dict(
      image_processor_type="ConvNextImageProcessor",
      size={"shortest_edge": 32},
      crop_pct=0.875,
      resample=3,
      do_resize=True,
      do_rescale=True,
      rescale_factor=1 / 255,
      do_normalize=True,
      image_mean=[0.4, 0.5, 0.6],
      image_std=[0.2, 0.3, 0.4],
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
  else:
    transformers.ViTImageProcessor(
      size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
  pixels = (PIXELS / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
  return (
    model,
    dict(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)),
    dict(image=dict(pixels=PIXELS)),
  )


def base(model):
  return getattr(model, model.base_model_prefix, model)


def reference(model, inputs):
  """{"tokens", "pooled", "logits"} of transformers, those that there are."""
  with torch.no_grad():
    inner = base(model)(**inputs)
    out = dict(tokens=inner.last_hidden_state.numpy())
    if out["tokens"].ndim == 4:
      out["tokens"] = (
        out["tokens"].transpose(0, 2, 3, 1).reshape(len(PIXELS), -1, out["tokens"].shape[1])
      )
    if getattr(inner, "pooler_output", None) is not None:
      out["pooled"] = inner.pooler_output.numpy().reshape(len(out["tokens"]), -1)
    if model is not base(model):
      out["logits"] = model(**inputs).logits.numpy()
  return out


def loaded(path):
  """(model, variables) of an import folder."""
  state = checkpoints.load_model_state(str(path))
  return make_model(checkpoints.load_config(str(path))), {
    "params": checkpoints.load_params(str(path)),
    **state,
  }


def outputs(net, variables, batch):
  (modality,) = batch

  @jax.jit
  def run(variables, batch):
    encoded = net.apply(variables, modality, batch, method="encode")
    out = dict(
      tokens=encoded.tokens,
      pooled=encoded.pooled,
      embedding=net.apply(variables, modality, batch, method="embedding"),
    )
    if net.classes:
      out["logits"] = net.apply(variables, (modality,), batch, method="classify")
    if net.masked_tokens:
      hidden, table, bias = net.apply(variables, modality, batch, method="masked_token_head")
      out["logits"] = hidden @ table.T + bias
    return out

  return jax.device_get(run(variables, batch))


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_after_import_and_after_export(case, tmp_path):
  model, inputs, batch = folder_of(case, tmp_path / "hf")
  want = reference(model, inputs)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  net, variables = loaded(tmp_path / "mmjax")
  assert ("batch_stats" in variables) == ("resnet" in case)
  got = outputs(net, variables, batch)
  real = batch["text"]["mask"] if "text" in batch else slice(None)
  for name, value in want.items():
    a, b = (
      x[real] if name == "tokens" or (name == "logits" and x.ndim == 3) else x
      for x in (got[name], value)
    )
    print(f"{case} {name}: {np.abs(a - b).max():.2g}")
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
  np.testing.assert_allclose(
    got["embedding"],
    got["pooled"] / np.linalg.norm(got["pooled"], axis=1, keepdims=True),
    atol=1e-5,
  )

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again, report = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
  assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, tensor in model.state_dict().items():
    if "num_batches_tracked" not in name:
      assert torch.equal(tensor, again.state_dict()[name]), name
  for name, value in reference(again.eval(), inputs).items():
    np.testing.assert_allclose(value, want[name], atol=1e-5)


@pytest.mark.parametrize("case", ["bert with masked tokens", "vit", "resnet", "swin"])
def test_a_gradient_is_equal(case, tmp_path):
  model, inputs, batch = folder_of(case, tmp_path / "hf")
  (modality,) = batch
  out = model(**inputs)
  value = out.logits if "logits" in out else out.pooler_output.flatten(1)
  factor = np.random.default_rng(2).normal(size=tuple(value.shape)).astype(np.float32)
  if modality == "text":
    factor *= batch["text"]["mask"][..., None]
  (value * torch.tensor(factor)).sum().backward()
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  net, variables = loaded(tmp_path / "mmjax")
  state = {name: tree for name, tree in variables.items() if name != "params"}

  def loss(params):
    if net.masked_tokens:
      hidden, table, bias = net.apply(
        {"params": params}, modality, batch, method="masked_token_head"
      )
      return ((hidden @ table.T + bias) * factor).sum()
    return (
      net.apply({"params": params, **state}, modality, batch, method="encode").pooled * factor
    ).sum()

  gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, variables["params"]))
  checkpoints.save_import(
    str(tmp_path / "gradient"),
    gradient,
    checkpoints.load_config(str(tmp_path / "mmjax")),
    checkpoints.load_assets(str(tmp_path / "mmjax")),
    state,
  )
  export_hf(tmp_path / "gradient", tmp_path / "theirs")  # the gradient under their names
  theirs = type(model).from_pretrained(tmp_path / "theirs")
  for (name, ours), p in zip(theirs.named_parameters(), model.parameters(), strict=True):
    scale = p.grad.abs().max()
    np.testing.assert_allclose(
      ours.detach(), p.grad, atol=1e-4 * max(1.0, float(scale)), err_msg=name
    )


def test_an_imported_resnet_embeds_prepared_pictures(tmp_path):
  model, _, _ = folder_of("resnet", tmp_path / "hf")
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  picture = np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)
  export_hf(tmp_path / "mmjax", tmp_path / "back")
  outs = []
  for folder in ("hf", "back"):  # a ConvNextImageProcessor, and what we write for it
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / folder)
    pixels = processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
    assert pixels.shape[2:] == (32, 32)
    with torch.no_grad():
      pooled = model(pixels).pooler_output.numpy().reshape(1, -1)
    outs.append(pooled / np.linalg.norm(pooled))
  predictor = mmjax.load(str(tmp_path / "mmjax"))
  assert predictor.config.data.image.crop == 32 / 36 and (predictor.scale, predictor.bias) == (1, 0)
  got = predictor.encode_image([picture])
  assert predictor.width == got.shape[1] == 16
  params = flat_params({**predictor.params, **predictor.model_state})
  exported = lower(
    functions(predictor.config)["encode_image"],
    "encode_image",
    params,
    ("cpu",),
    tuple(predictor.model_state),
  )
  np.testing.assert_allclose(exported.call(params, predictor.pixels(picture)[None]), got, atol=1e-5)
  for want in outs:
    # Pictures are rounded between resizing and cropping there.
    np.testing.assert_allclose(got, want, atol=0.02)


def test_what_cannot_be_read_is_named(tmp_path):
  folder_of("resnet", tmp_path / "hf")
  for change, says in (
    (dict(hidden_sizes=[8, 24]), r"hidden_sizes is \[8, 24\], but only \[8, 16\]"),
    (dict(downsample_in_first_stage=True), "downsample_in_first_stage is True, but only False"),
  ):
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=says):
      import_hf(tmp_path / "hf", tmp_path / "out")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))


def test_old_names_of_bert_are_understood(tmp_path):
  from safetensors.torch import load_file, save_file

  folder_of("bert with masked tokens", tmp_path / "hf")
  path = tmp_path / "hf" / "model.safetensors"
  old = {
    n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
    for n, x in load_file(path).items()
  }
  import_hf(tmp_path / "hf", tmp_path / "new")
  save_file(
    {
      **old,
      "cls.seq_relationship.weight": torch.zeros(2, 16),
      "cls.seq_relationship.bias": torch.zeros(2),
    },
    path,
  )
  import_hf(tmp_path / "hf", tmp_path / "old")
  jax.tree.map(
    np.testing.assert_array_equal,
    *(checkpoints.load_params(str(tmp_path / name)) for name in ("new", "old")),
  )
