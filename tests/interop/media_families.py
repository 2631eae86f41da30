"""What tests of language models with media share: a random model of transformers and its processor
against its import, both ways.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image

import mmjax
from mmjax.inference.language import LanguageGenerator
from mmjax.interop.huggingface import export_hf, import_hf
from mmjax.models import make_model
from mmjax.state import checkpoint as checkpoints

TEXT = dict(
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  vocab_size=60,
  max_position_embeddings=128,
)
SIGLIP = dict(
  model_type="siglip_vision_model",
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=28,
  patch_size=7,
)
IMAGE = 14  # the token that stands for a medium, in the tokenizers of these tests
SPACES = ["\u2581", *(f"\u2581{letter}" for letter in "abcdefgh")]
PICTURES = [
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
  for seed, shape in enumerate([(90, 31, 3), (29, 75, 3)])
]


def save(folder, model, keep=None, **how):
  """The folder of a random model, whose biases and scales matter. keep: a parameter that stays."""
  with torch.no_grad():
    for parameter in (x for x in model.parameters() if x is not keep):
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(folder, **how)


def opened(folder, kind, processor=transformers.AutoProcessor):
  model, info = kind.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
  )
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  return model.eval(), processor.from_pretrained(folder)


def batch_of(predictor, prompt, **media):
  """The batch that `Predictor.generate` makes of one prompt."""
  language: LanguageGenerator = predictor.language
  (read,) = language.read([prompt], {name: [items] for name, items in media.items()})
  batch, _ = language._batch([read], [0], 1)
  return batch


def assert_equal_both_ways(
  tmp_path,
  kind,
  call,
  prompt,
  media,
  gradient,
  theirs_prompt=None,
  processor_class=transformers.AutoProcessor,
):
  """The folder tmp_path / "theirs" gives an import of equal tokens, logits, loss, gradient and 32
  greedy tokens, and an export that transformers opens with equal logits; its import has equal bits.

  call(processor, text): transformers' inputs. gradient: (name of a parameter there, path here,
  function of the one to the other). Returns (the predictor, its batch, transformers' inputs).
  """
  theirs, processor = opened(tmp_path / "theirs", kind, processor_class)
  theirs_prompt = prompt if theirs_prompt is None else theirs_prompt
  inputs = call(processor, theirs_prompt)
  inputs.pop("labels", None)
  import_hf(tmp_path / "theirs", tmp_path / "in")
  predictor = mmjax.load(tmp_path / "in")
  model, params = make_model(predictor.config), predictor.params

  # as many tokens as the processor gives, each the same
  ids = inputs["input_ids"].numpy().astype(np.int32)
  batch = batch_of(predictor, prompt, **media)
  length = int(batch["sequence"]["length"][0])
  np.testing.assert_array_equal(batch["sequence"]["tokens"][0, :length], ids[0])
  batch["sequence"] = {
    name: x[:1, :length] for name, x in batch["sequence"].items() if name != "length"
  }
  if "media" in batch:
    batch["media"] = {m: {name: x[:1] for name, x in d.items()} for m, d in batch["media"].items()}

  def loss(params):
    hidden, _, _ = model.apply({"params": params}, batch, method="next_tokens")
    logits = model.apply({"params": params}, hidden, method="logits")
    gains = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(gains, ids[:, 1:, None], axis=2).mean(), logits

  (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  want = theirs(**inputs, labels=inputs["input_ids"])
  want.loss.backward()
  np.testing.assert_allclose(logits, want.logits.detach(), atol=1e-4)
  np.testing.assert_allclose(value, want.loss.item(), atol=1e-5)
  name, path, change = gradient
  ours = gradients
  for part in path.split("/"):
    ours = ours[part]
  np.testing.assert_allclose(ours, change(theirs.get_parameter(name).grad), atol=1e-4)

  # 32 tokens from the prompt itself
  (written,) = predictor.generate([prompt], max_length=32, **{m: [x] for m, x in media.items()})
  greedy = theirs.generate(**inputs, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
  assert written == processor.decode(greedy, skip_special_tokens=True) != ""

  export_hf(tmp_path / "in", tmp_path / "out")
  exported, again = opened(tmp_path / "out", kind, processor_class)
  assert type(again) is type(processor)
  exported_inputs = call(again, theirs_prompt)
  exported_inputs.pop("labels", None)
  for key, value in inputs.items():
    np.testing.assert_allclose(exported_inputs[key], value, atol=1e-5, err_msg=key)
  with torch.no_grad():
    np.testing.assert_allclose(exported(**exported_inputs).logits, want.logits.detach(), atol=1e-5)
  import_hf(tmp_path / "out", tmp_path / "again")
  kept = checkpoints.load_params(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, dict(kept), jax.device_get(dict(params)))
  old, new = (checkpoints.load_config(str(tmp_path / x)) for x in ("in", "again"))
  assert old.data.sequence == new.data.sequence
  return predictor, batch, inputs


def assert_equal_pixels(predictor, batch, inputs, key="pixel_values"):
  """Every pixel of the slots of pictures equals the processor's."""
  image = predictor.config.data.image
  theirs = inputs[key].numpy().reshape(-1, *inputs[key].shape[-3:])
  pixels = batch["media"]["image"]["pixels"][0]
  assert not pixels[len(theirs) :].any()  # slots that no picture fills
  ours = (pixels[: len(theirs)] / 255 - np.array(image.mean)) / np.array(image.std)
  np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs, atol=1e-5)
