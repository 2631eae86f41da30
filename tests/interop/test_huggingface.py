"""CLIP and SigLIP folders against transformers: tiny random models, every output compared, both
ways.
"""

from __future__ import annotations

import json
import os
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from mmjax.config import UserError
from mmjax.inference.predictor import Predictor
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.interop.safetensors import read_folder
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints

WORDS = "a cat dog red house with blue hat and the on car".split()
TEXTS = [
  "A cat, with a -- hat!",
  "red house and blue car on the house with the dog and a cat",
  "dog",
]
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def clip_tokenizer(eos: str = "<|endoftext|>"):
  alphabet = sorted({c for word in WORDS for c in word})
  pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", eos]
  return transformers.CLIPTokenizer(
    vocab={p: i for i, p in enumerate(pieces)},
    merges=[],
    eos_token=eos,
    unk_token=eos,
    pad_token=eos,
    model_max_length=24,
  )


def siglip_tokenizer(folder):
  """A word-level tokenizer.json that ends captions, as SigLIP's does, and pads with its end
  token.
  """
  import tokenizers

  pieces = {p: i for i, p in enumerate(["<unk>", "</s>", *WORDS])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    eos_token="</s>",
    pad_token="</s>",
    unk_token="<unk>",
    model_input_names=["input_ids"],
    model_max_length=12,
  )
  tokenizer.save_pretrained(folder)
  return tokenizer


def siglip_sentencepiece(folder):
  """SigLIP's own kind: a sentencepiece model, lower-casing and stripping of punctuation in
  Python.
  """
  import sentencepiece

  folder.mkdir()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*TEXTS, " ".join(WORDS)] * 4),
    model_prefix=str(folder / "spiece"),
    vocab_size=40,
    pad_id=-1,
    bos_id=-1,
    eos_id=1,
    unk_id=0,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = transformers.SiglipTokenizer(
    str(folder / "spiece.model"), model_input_names=["input_ids"]
  )
  tokenizer.save_pretrained(folder)
  return tokenizer


def randomise(model):
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name not in ("logit_scale", "logit_bias"):
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
  return model.eval()


def clip_folder(folder, *, activation="quick_gelu", legacy=False, size=32, patch=8):
  tokenizer = clip_tokenizer()
  tokenizer.save_pretrained(folder)
  vision = dict(TOWER, image_size=size, patch_size=patch, hidden_act=activation)
  text = dict(
    TOWER,
    hidden_size=24,
    num_attention_heads=3,
    vocab_size=64,
    max_position_embeddings=24,
    hidden_act=activation,
    eos_token_id=2 if legacy else tokenizer.eos_token_id,
  )
  model = randomise(
    transformers.CLIPModel(
      transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
  )
  model.save_pretrained(folder)
  transformers.CLIPImageProcessor(
    size={"shortest_edge": size}, crop_size={"height": size, "width": size}
  ).save_pretrained(folder)
  return model, tokenizer


def siglip_folder(folder, *, size=32, patch=8, make_tokenizer=siglip_tokenizer):
  tokenizer = make_tokenizer(folder)
  vision = dict(TOWER, image_size=size, patch_size=patch)
  text = dict(TOWER, vocab_size=48, max_position_embeddings=12)
  model = transformers.SiglipModel(
    transformers.SiglipConfig(text_config=text, vision_config=vision)
  )
  with torch.no_grad():
    model.logit_scale.fill_(1.3)
    model.logit_bias.fill_(-2.5)
  randomise(model).save_pretrained(folder)
  transformers.SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
  return model, tokenizer


def reference(model, tokenizer, processor, pixels):
  """(image embeddings, text embeddings, logits per image) of transformers."""
  length = model.config.text_config.max_position_embeddings
  inputs = dict(
    tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
  )
  pictures = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")[
    "pixel_values"
  ]
  with torch.no_grad():
    out = model(
      input_ids=inputs["input_ids"],
      attention_mask=inputs.get("attention_mask"),
      pixel_values=pictures,
    )
  return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def imported(path):
  predictor = Predictor.load(str(path))
  return predictor, lambda pixels: (
    image := predictor.encode_image(list(pixels)),
    text := predictor.encode_text(TEXTS),
    predictor.scale * image @ text.T + predictor.bias,
  )


CASES = {
  "clip": lambda folder: clip_folder(folder),
  "clip legacy pooling": lambda folder: clip_folder(folder, legacy=True),
  "clip gelu": lambda folder: clip_folder(folder, activation="gelu"),
  "siglip": lambda folder: siglip_folder(folder),
  "siglip with sentencepiece": lambda folder: siglip_folder(
    folder, make_tokenizer=siglip_sentencepiece
  ),
  "siglip with pixels beyond the last patch": lambda folder: siglip_folder(folder, size=30),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_after_import_and_after_export(case, tmp_path):
  model, tokenizer = CASES[case](tmp_path / "hf")
  size = model.config.vision_config.image_size
  pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
  want = reference(model, tokenizer, processor, pixels)
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  predictor, outputs = imported(tmp_path / "mmjax")
  for name, a, b in zip(("image", "text", "logits"), outputs(pixels), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
  assert predictor.config.model.encoders.text.causal == (model.config.model_type == "clip")
  chances = (
    torch.softmax(torch.tensor(want[2]), 1)
    if model.config.model_type == "clip"
    else torch.sigmoid(torch.tensor(want[2]))
  )
  np.testing.assert_allclose(predictor.classify(list(pixels), TEXTS), chances, atol=1e-4)

  export_hf(tmp_path / "mmjax", tmp_path / "back")
  again = type(model).from_pretrained(tmp_path / "back").eval()
  before, after = model.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(tensor, after[name]), name
  got = reference(
    again,
    transformers.AutoTokenizer.from_pretrained(tmp_path / "back"),
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "back"),
    pixels,
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_gradients_equal(case, tmp_path):
  model, tokenizer = CASES[case](tmp_path / "hf")
  pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
  tokens = tokenizer(
    TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
  )["input_ids"]
  pictures = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")[
    "pixel_values"
  ]
  out = model(input_ids=tokens, pixel_values=pictures)
  (out.logits_per_image * torch.arange(9.0).reshape(3, 3)).sum().backward()
  import_hf(tmp_path / "hf", tmp_path / "mmjax")
  config = checkpoints.load_config(str(tmp_path / "mmjax"))
  params, net = checkpoints.load_params(str(tmp_path / "mmjax")), make_model(config)
  batch = dict(
    image=dict(pixels=pixels),
    text=dict(tokens=tokens.numpy().astype(np.int32), mask=np.ones(tokens.shape, bool)),
  )

  def loss(params):
    z, (scale, bias) = (
      net.apply({"params": params}, batch),
      net.apply({"params": params}, method="temperature"),
    )
    return ((scale * z["image"] @ z["text"].T + bias) * jnp.arange(9.0).reshape(3, 3)).sum()

  gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params))
  for tower, name in (("image", "vision_model"), ("text", "text_model")):
    layer = getattr(model, name).encoder.layers[1]
    np.testing.assert_allclose(
      gradient[tower]["layers"]["mlp"]["up"]["kernel"][1].T,
      layer.mlp.fc1.weight.grad,
      atol=2e-4,
      rtol=1e-3,
    )
    heads = layer.self_attn.num_heads
    value = np.asarray(gradient[tower]["layers"]["attention"]["qkv"]["kernel"][1][:, 2]).reshape(
      -1, heads * layer.self_attn.head_dim
    )
    np.testing.assert_allclose(value.T, layer.self_attn.v_proj.weight.grad, atol=2e-4, rtol=1e-3)
  np.testing.assert_allclose(gradient["log_scale"], model.logit_scale.grad.reshape(()), rtol=1e-3)


def test_what_a_model_is_comes_from_its_files(tmp_path):
  clip_folder(tmp_path / "a", activation="gelu")
  preprocessor = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
  preprocessor.update(
    resample=2, image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}, do_center_crop=False
  )
  (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  import_hf(tmp_path / "a", tmp_path / "out")
  config = checkpoints.load_config(str(tmp_path / "out"))
  assert config.model.encoders.image.activation == config.model.encoders.text.activation == "gelu"
  assert (
    config.model.encoders.text.pooling == "eos" and config.data.text.bos and config.data.text.eos
  )
  image = config.data.image
  assert (image.resize, image.interpolation, tuple(image.mean)) == (
    "squash",
    "bilinear",
    (0.1, 0.2, 0.3),
  )


def test_sharded_and_half_precision_files(tmp_path):
  model, _ = clip_folder(tmp_path / "hf")
  tensors = load_file(tmp_path / "hf" / "model.safetensors")
  names = sorted(tensors)
  save_file(
    {n: tensors[n].to(torch.bfloat16) for n in names[:20]}, tmp_path / "hf" / "one.safetensors"
  )
  save_file({n: tensors[n].half() for n in names[20:]}, tmp_path / "hf" / "two.safetensors")
  places = {n: "one.safetensors" if i < 20 else "two.safetensors" for i, n in enumerate(names)}
  (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  (tmp_path / "hf" / "model.safetensors").unlink()
  import_hf(tmp_path / "hf", tmp_path / "out")
  kernel = checkpoints.load_params(str(tmp_path / "out"))["text_projection"]["kernel"]
  np.testing.assert_allclose(kernel, tensors["text_projection.weight"].T, atol=1e-2)
  assert kernel.dtype == np.float32


def _break(folder, how):
  config = json.loads((folder / "config.json").read_text())
  if how == "missing":
    config["text_config"]["num_hidden_layers"] = 3
  elif how == "unused":
    config["vision_config"]["num_hidden_layers"] = 1
  elif how == "family":
    config["model_type"] = "clop"
  elif how == "activation":
    config["text_config"]["hidden_act"] = "swish"
  elif how == "shape":
    config["vision_config"]["num_attention_heads"] = 5
  (folder / "config.json").write_text(json.dumps(config))
  if how == "truncated":
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
  if how == "pickle":
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  if how == "tokenizer":
    (folder / "tokenizer.json").unlink()
  if how == "crop":
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"shortest_edge": 24}}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hf")
  clip_folder(folder)
  return folder


@pytest.mark.parametrize(
  "how, says",
  {
    "missing": r"lacks text_model\.encoder\.layers\.2\.layer_norm1\.bias",
    "unused": r"does not explain: vision_model\.encoder\.layers\.1",
    "family": "'clop' is not known",
    "activation": "'swish' is not supported",
    "shape": "does not allow|divisible",
    "truncated": "no whole safetensors",
    "pickle": "pickled",
    "tokenizer": "no tokenizer.json",
    "crop": "crops 32",
  }.items(),
)
def test_a_bad_folder_is_refused_in_one_line(how, says, whole, tmp_path):
  shutil.copytree(whole, tmp_path / "hf")
  _break(tmp_path / "hf", how)
  with pytest.raises(UserError, match=says) as error:
    import_hf(tmp_path / "hf", tmp_path / "out")
  assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "name",
  (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
  ),
)
def test_only_regular_files_of_a_bounded_size_are_read(name, whole, tmp_path, in_time):
  shutil.copytree(whole, tmp_path / "hf")
  path = tmp_path / "hf" / name

  def refused(says):
    with pytest.raises(UserError, match=says) as error:
      import_hf(tmp_path / "hf", tmp_path / "out")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.unlink()

  path.unlink()
  os.mkfifo(path)
  refused("not a regular file")
  path.symlink_to("/dev/zero")
  refused("not a regular file")
  if name == "model.safetensors":
    path.write_bytes(struct.pack("<Q", 2**25) + b" " * 2**25)
    refused("its header has more than 16 MiB")
  else:
    with open(path, "wb") as file:
      file.truncate(1 << 40)
    refused("1048576 MiB, more than (16|64) MiB")
    path.write_text("[" * 100_000)
    refused("no readable JSON|cannot be read")


def test_export_names_what_transformers_cannot_express(whole, tmp_path):
  import_hf(whole, tmp_path / "a")
  config = checkpoints.load_config(str(tmp_path / "a")).to_dict()
  config["model"]["encoders"]["image"]["pooling"] = "mean"
  params = checkpoints.load_params(str(tmp_path / "a"))
  checkpoints.save_import(
    str(tmp_path / "b"), params, config, checkpoints.load_assets(str(tmp_path / "a"))
  )
  with pytest.raises(
    UserError, match=r"model\.encoders\.image\.pooling = 'mean' \(needs 'class'\)"
  ):
    export_hf(tmp_path / "b", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_safetensors_files_are_read_as_torch_wrote_them(tmp_path):
  tensors = {
    "a": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "b": torch.tensor([True, False]),
    "c": torch.zeros(0, 3),
  }
  save_file(tensors, tmp_path / "model.safetensors")
  for name, value in read_folder(tmp_path).items():
    np.testing.assert_array_equal(np.asarray(value, np.float32), tensors[name].float().numpy())
