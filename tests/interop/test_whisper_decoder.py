"""Whisper's decoder against transformers, with random weights: hidden states, logits, gradients,
generation, the way back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationMixin, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from mmjax.config import UserError
from mmjax.inference.engine import Decoding, generate
from mmjax.interop.huggingface import mapping, whisper_decoder
from mmjax.models.decoder import decoder
from mmjax.objectives.cross_entropy import token_cross_entropy

FACTS = dict(
  vocab_size=60,
  d_model=32,
  encoder_layers=1,
  encoder_attention_heads=2,
  decoder_layers=2,
  decoder_attention_heads=4,
  encoder_ffn_dim=64,
  decoder_ffn_dim=48,
  max_source_positions=10,
  max_target_positions=16,
  num_mel_bins=8,
  decoder_start_token_id=1,
  bos_token_id=1,
  eos_token_id=4,
  pad_token_id=0,
  suppress_tokens=None,
  begin_suppress_tokens=None,
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 60, (3, 7)).astype(np.int32)
MEMORY = RNG.normal(size=(3, 10, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs():
  torch.manual_seed(0)
  model = WhisperForConditionalGeneration(WhisperConfig(**FACTS)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.15 * torch.randn_like(parameter))
  return model


@pytest.fixture(scope="module")
def ours(theirs):
  """(module, parameters) made from the tensors that a file of the model holds."""
  found = whisper_decoder.settings(theirs.config.to_dict())
  tensors = {
    name: value.numpy()
    for name, value in theirs.state_dict().items()
    if name.startswith("model.decoder")
  }
  params = mapping.to_params(tensors, whisper_decoder.rules(found["decoder"]), "here")["decoder"]
  settings = {key: value for key, value in found["decoder"].items() if key != "kind"}
  return decoder(dict(text=found["text"]), dict(compute="float32"), **settings), params


def test_hidden_states_and_logits_are_equal(theirs, ours):
  model, params = ours
  hidden = jax.jit(model.apply)({"params": params}, TOKENS, None, MEMORY)
  with torch.no_grad():
    want = theirs.model.decoder(
      input_ids=torch.tensor(TOKENS).long(), encoder_hidden_states=torch.tensor(MEMORY)
    ).last_hidden_state
    logits = theirs.proj_out(want)
  np.testing.assert_allclose(hidden, want, atol=1e-4)
  np.testing.assert_allclose(
    model.apply({"params": params}, hidden, method="logits"), logits, atol=1e-4
  )


def test_loss_and_gradients_are_equal(theirs, ours):
  model, params = ours
  inputs, targets = (
    TOKENS[:, :-1],
    np.where(np.arange(6) < np.array([6, 3, 5])[:, None], TOKENS[:, 1:], -1),
  )

  def loss(params, memory):
    hidden = model.apply({"params": params}, inputs, None, memory)
    total, weight, _ = token_cross_entropy(
      hidden.reshape(-1, 32), params["embedding"], jnp.asarray(targets.reshape(-1)), chunk=6
    )
    return total / weight

  value, (gradients, into_memory) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, MEMORY)
  memory = torch.tensor(MEMORY, requires_grad=True)
  labels = torch.tensor(np.where(targets < 0, -100, targets)).long()
  out = theirs(
    encoder_outputs=BaseModelOutput(memory),
    decoder_input_ids=torch.tensor(inputs).long(),
    labels=labels,
  )
  theirs.zero_grad()
  out.loss.backward()
  assert float(value) == pytest.approx(out.loss.item(), abs=1e-5)
  np.testing.assert_allclose(into_memory, memory.grad, atol=1e-4)
  back = mapping.to_tensors(
    {"decoder": jax.device_get(gradients)}, whisper_decoder.rules(dict(heads=4, depth=2))
  )
  for name, parameter in theirs.named_parameters():
    if name.startswith("model.decoder"):
      np.testing.assert_allclose(back[name], parameter.grad, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (3, 1.0), (3, 0.0)])
def test_generation_is_equal(theirs, ours, beams, penalty):
  model, params = ours

  def apply(method, *args, **settings):
    return model.apply({"params": params}, *args, method=method, **settings)

  @jax.jit
  def run(memory):
    memory = apply("init_memory", memory)
    logits, cache = apply("prefill", jnp.ones((3, 1), jnp.int32), memory, length=12)
    return generate(
      lambda *args: apply("decode_step", *args),
      logits,
      cache,
      memory,
      places=jnp.ones(3, jnp.int32),
      max_length=12,
      eos_id=4,
      pad_id=0,
      decoding=Decoding("beam" if beams > 1 else "greedy", beams, penalty),
    )

  tokens, scores = run(MEMORY)
  plain = GenerationMixin.generate  # without Whisper's own rules for long audio
  out = plain(
    theirs,
    encoder_outputs=BaseModelOutput(torch.tensor(MEMORY)),
    decoder_input_ids=torch.ones((3, 1), dtype=torch.long),
    max_new_tokens=12,
    do_sample=False,
    num_beams=beams,
    early_stopping="never" if beams > 1 else False,
    length_penalty=penalty,
    return_dict_in_generate=True,
    output_scores=True,
  )

  def until_end(row):
    # They fill up with another token.
    return row.tolist()[: row.tolist().index(4) + 1] if 4 in row else row.tolist()

  found = [until_end(row) for row in out.sequences[:, 1:].numpy()]
  assert [until_end(row) for row in np.asarray(tokens)] == found
  if beams == 1 or not penalty:  # where sums are divided by lengths, long texts win
    assert len(set(map(len, found))) > 1
  if beams > 1:
    np.testing.assert_allclose(scores, out.sequences_scores, atol=1e-4)


def test_the_way_back_and_what_cannot_be_expressed(theirs, ours):
  config = theirs.config.to_dict()
  found = whisper_decoder.settings(config)
  facts = whisper_decoder.facts(found["decoder"], found["text"])
  assert all(config[key] == value for key, value in facts.items())
  back = mapping.to_tensors({"decoder": ours[1]}, whisper_decoder.rules(found["decoder"]))
  for name, tensor in back.items():
    np.testing.assert_array_equal(tensor, theirs.state_dict()[name].numpy())
  with pytest.raises(UserError, match="scale_embedding"):
    whisper_decoder.settings(dict(config, scale_embedding=True))
  with pytest.raises(UserError, match="activation_function"):
    whisper_decoder.settings(dict(config, activation_function="swish"))
  wrong = whisper_decoder.refusals(
    dict(found["decoder"], positions="sinusoidal", memory_positions=False, project_memory=False)
  )
  assert [key for key, value, allowed in wrong if value not in allowed] == [
    "model.decoder.positions"
  ]
