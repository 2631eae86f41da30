"""What holds for every encoder and every objective: batch order, padding, rows that do not count,
and one device or eight.
"""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import mmjax.config
from mmjax.data.naflex import patch_sequence
from mmjax.kinds import KINDS, kind_function
from mmjax.models import make_model
from mmjax.parallel import rules as parallel
from mmjax.parallel.mesh import make_mesh

ROWS = 8
# The compiler takes longer than all runs.
QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
BLOCK = dict(depth=1, heads=2)
ENCODERS = {
  "vit": ("image", dict(kind="vit", patch=8, **BLOCK)),
  "naflex": ("image", dict(kind="naflex", patch=8, grid=2, **BLOCK)),
  "resnet": ("image", dict(kind="resnet", layers=18, blocks=(1,), multiplier=0.25, stem="small")),
  "swin": ("image", dict(kind="swin", patch=4, width=16, depths=(2,), heads=(2,), window=2)),
  "transformer": ("text", dict(kind="transformer", **BLOCK)),
  "bert": ("text", dict(kind="bert", **BLOCK)),
  "whisper": ("audio", dict(kind="whisper", mels=8, n_fft=64, hop=32, **BLOCK)),
  "ast": ("audio", dict(kind="ast", mels=8, patch=4, stride=3, **BLOCK)),
  "htsat": (
    "audio",
    dict(
      **dict(kind="htsat", mels=8, n_fft=64, hop=32, size=16),
      **dict(width=16, depths=(2,), heads=(2,), window=2),
    ),
  ),
  "wav2vec2": (
    "audio",
    dict(
      kind="wav2vec2",
      channels=(4, 6),
      sizes=(20, 4),
      strides=(20, 2),
      positions=4,
      position_groups=2,
      **BLOCK,
    ),
  ),
  "frames": ("video", dict(kind="frames", patch=8, temporal="mean", frame_depth=1, **BLOCK)),
  "tubelets": ("video", dict(kind="tubelets", patch=8, time=2, **BLOCK)),
  "series": ("series", dict(kind="series", patch=2, **BLOCK)),
}


def config(encoders, **model):
  c = mmjax.config.base()
  c.data.image.size = c.data.video.size = 16
  (
    c.data.video.frames,
    c.data.series.length,
    c.data.series.channels,
    c.data.audio.rate,
    c.data.audio.seconds,
  ) = 4, 8, 2, 1600, 0.25
  c.data.text.length, c.data.text.vocab_size, c.data.text.tokenizer, c.data.classes = (
    6,
    40,
    "none",
    3 if "fusion" in model else 0,
  )
  c.model = dict(dict(name="encoder", width=16), encoders=encoders, **model)
  c.precision.compute = "float32"
  return mmjax.config.resolve(c)


def inputs(kind, rng, junk):
  """ROWS examples of random lengths; `junk` fills what is not real."""
  modality = ENCODERS[kind][0]

  def real(length):
    return np.arange(length) < rng.integers(1, length + 1, (ROWS, 1))

  def bytes_of(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)

  if kind == "naflex":
    rows = [
      patch_sequence(bytes_of(rng, *rng.integers(8, 40, 2), 3), 8, 6)._asdict() for _ in range(ROWS)
    ]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return dict(
      batch,
      patches=np.where(
        batch["mask"][..., None], batch["patches"], bytes_of(junk, *batch["patches"].shape)
      ),
    )
  if modality == "image":
    return dict(pixels=bytes_of(rng, ROWS, 16, 16, 3))
  if modality == "text":
    mask = real(6)
    return dict(
      tokens=np.where(
        mask, rng.integers(5, 40, mask.shape), junk.integers(5, 40, mask.shape)
      ).astype(np.int32),
      mask=mask,
    )
  if modality == "audio":
    length = rng.integers(150, 401, ROWS).astype(np.int32)
    x = np.where(
      np.arange(400) < length[:, None],
      rng.normal(0, 3000, (ROWS, 400)),
      junk.normal(0, 3000, (ROWS, 400)),
    )
    return dict(waveform=x.clip(-32768, 32767).astype(np.int16), length=length)
  mask = real(4 if modality == "video" else 8)
  if modality == "video":
    shape = (ROWS, 4, 16, 16, 3)
    return dict(
      frames=np.where(mask[..., None, None, None], bytes_of(rng, *shape), bytes_of(junk, *shape)),
      mask=mask,
    )
  return dict(
    values=np.where(
      mask[..., None], rng.normal(size=(ROWS, 8, 2)), junk.normal(size=(ROWS, 8, 2))
    ).astype(np.float32),
    mask=mask,
  )


def random_variables(model, batch):
  """Of the shapes that `init` gives; statistics are positive. Nothing is compiled."""
  rng = np.random.default_rng(1)
  shapes = dict(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)))
  params = jax.tree.map(
    lambda x: (0.25 * rng.normal(size=x.shape)).astype(x.dtype), shapes.pop("params")
  )
  return {
    "params": params,
    **jax.tree.map(lambda x: (0.5 + rng.random(x.shape)).astype(x.dtype), shapes),
  }


def on_eight(function):
  """`function(variables, batch)` with the batch split over eight devices."""
  mesh = make_mesh(mmjax.config.base())
  places = (parallel.replicated(mesh), parallel.batch_sharding(mesh))

  def run(*arguments):
    with parallel.use(mesh, parallel.RULES["replicated"]):
      return jax.device_get(
        jax.jit(function, in_shardings=places, compiler_options=QUICK)(
          *jax.device_put(arguments, places)
        )
      )

  return run


@functools.cache
def encoder(kind):
  """(variables, apply) of a kind: tokens (zeros where not real), mask and pooled."""
  modality, entry = ENCODERS[kind]
  model = make_model(config({modality: entry}))

  def apply(variables, batch):
    out = model.apply(variables, modality, {modality: batch}, method="encode")
    return dict(
      tokens=jnp.where(out.mask[..., None], out.tokens, 0), mask=out.mask, pooled=out.pooled
    )

  rng = np.random.default_rng(0)
  batch = dict(inputs(kind, rng, rng), present=np.ones(ROWS, bool))
  return random_variables(model, {modality: batch}), apply, jax.jit(apply, compiler_options=QUICK)


def close(got, want, atol=3e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), got, want)


def test_every_encoder_is_here():
  functions = KINDS["encoder"]  # "hubert" is "wav2vec2" under another name
  assert {functions[kind] for kind in ENCODERS} == set(functions.values())


@pytest.mark.parametrize("kind", ENCODERS)
def test_all_parameters_of_an_encoder_are_under_its_modality(kind):
  """So that a rule for "video/.*" freezes all of it, and loads all of it."""
  modality, entry = ENCODERS[kind]
  model, rng = make_model(config({modality: entry})), np.random.default_rng(0)
  batch = dict(inputs(kind, rng, rng), present=np.ones(ROWS, bool))

  def names(module, batch):
    params = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
    return set(flatten_dict(params, sep="/"))

  alone = names(model.encoders[modality], batch)
  inside = names(model, {modality: batch})
  assert inside >= {f"{modality}/{name}" for name in alone}
  assert not [name for name in inside if name.startswith("encoders")]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_keep_rows_apart_and_see_no_padding(kind):
  @settings(max_examples=4, deadline=None)
  @given(
    seed=st.integers(0, 99),
    order=st.permutations(range(ROWS)),
    present=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
  )
  def check(seed, order, present):
    variables, _, run = encoder(kind)

    def make(noise):
      return inputs(kind, np.random.default_rng(seed), np.random.default_rng(noise))

    batch, order, present = (
      dict(make(0), present=np.ones(ROWS, bool)),
      np.array(order),
      np.array(present),
    )
    out = run(variables, batch)
    close(run(variables, dict(make(1), present=batch["present"])), out)
    close(
      run(variables, jax.tree.map(lambda x: x[order], batch)), jax.tree.map(lambda x: x[order], out)
    )
    some = run(variables, dict(batch, present=present))
    close(
      some, jax.tree.map(lambda x: np.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0), out)
    )
    assert np.isfinite(out["pooled"]).all() and np.std(out["pooled"], axis=0).max() > 1e-3

  check()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_give_the_same_on_eight_devices(kind):
  variables, apply, run = encoder(kind)
  rng = np.random.default_rng(5)
  batch = dict(inputs(kind, rng, rng), present=rng.random(ROWS) < 0.8)
  close(on_eight(apply)(variables, batch), run(variables, batch))


# -- Objectives: all of them on one model ----------------------------------------------------------

OBJECTIVES = {
  "contrastive": {},
  "contrastive sigmoid": dict(loss="sigmoid"),
  "matching": dict(negatives="hardest"),
  "classification": dict(modalities=("image", "text")),
  "captioning": {},
  "captioning ctc": dict(ctc=0.5, eos_id=2, blank=0),
  "autoregressive": {},
  "masked_tokens": dict(context=("image",), rate=0.5, special=(0, 1, 2, 3, 4)),
  "masked_patches": dict(context=("text",), ratio=1.0),
  "modality_adversary": {},
  "embedding_distillation": dict(teacher="t", modalities=("image", "text")),
  "similarity_distillation": dict(teacher="t"),
  "logit_distillation": dict(teacher="t", modalities=("image", "text")),
}
BY_PLACE = {"masked_tokens"}  # what is hidden is drawn by the place in the batch


@functools.cache
def whole():
  """(variables, {name: Losses} of a batch)."""
  model = make_model(
    config(
      {m: ENCODERS[kind][1] for m, kind in dict(image="vit", text="transformer").items()},
      name="multitask",
      fusion=dict(kind="merged_attention", **BLOCK),
      decoder=BLOCK,
      match=True,
      masked_text=True,
      masked_patches=("image",),
      discriminator=8,
    )
  )

  def all_losses(variables, batch):
    done, whole_batch = {}, batch

    def forward(method, *args, batch=batch, which=variables, **kwargs):
      kwargs.pop("fixed", None)
      arguments = args if method in ("table", "temperature", "discriminate") else (*args, batch)
      key = (method, str(args), str(kwargs), which is variables)
      if batch is not whole_batch or method == "discriminate":
        return model.apply(which, *arguments, method=method, **kwargs)
      if key not in done:
        done[key] = model.apply(which, *arguments, method=method, **kwargs)
      return done[key]

    other = jax.tree.map(lambda x: 0.8 * x + 0.05, variables)
    forward.teacher = lambda path, method, *args, batch=batch: forward(
      method, *args, batch=batch, which=other
    )
    return {
      name: kind_function({"kind": name.split()[0]}, "objective")(
        forward, batch, jax.random.key(0), **chosen
      )
      for name, chosen in OBJECTIVES.items()
    }

  return (
    random_variables(model, examples(0)),
    all_losses,
    jax.jit(all_losses, compiler_options=QUICK),
  )


def examples(seed, noise=0):
  """ROWS pairs with labels; `noise` fills padding, and the rows that do not count or lack a
  modality.
  """
  rng, junk = np.random.default_rng(seed), np.random.default_rng(100 + noise)
  image, text = inputs("vit", rng, junk), inputs("transformer", rng, junk)
  valid, present = rng.random(ROWS) < 0.8, rng.random(ROWS) < 0.8
  valid[:3] = present[:3] = True
  keys = rng.integers(0, 5, (2, ROWS, 2)).astype(np.uint32)
  other = inputs("vit", junk, junk)["pixels"]
  image["pixels"] = np.where((valid & present)[:, None, None, None], image["pixels"], other)
  text["tokens"] = np.where(
    valid[:, None], text["tokens"], junk.integers(5, 40, text["tokens"].shape)
  ).astype(np.int32)
  label = np.where(valid, rng.integers(-1, 3, ROWS), junk.integers(0, 3, ROWS)).astype(np.int32)
  return dict(
    image=dict(image, key=keys[0], present=present),
    text=dict(text, key=keys[1], present=np.ones(ROWS, bool)),
    label=label,
    valid=valid,
  )


def test_every_objective_is_here():
  # their models have no batch of pairs: test_gan, test_grpo, test_language_model, test_preference,
  # test_values
  tested_alone = {"gan", "grpo", "language_modelling", "ordinal", "preference", "regression"}
  assert {re.split(" ", name)[0] for name in OBJECTIVES} | tested_alone == set(KINDS["objective"])


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), order=st.permutations(range(ROWS)))
def test_objectives_do_not_depend_on_order_padding_or_rows_that_do_not_count(seed, order):
  variables, _, run = whole()
  batch, order = examples(seed), np.array(order)
  losses = run(variables, batch)
  assert all(
    float(part["loss"][1]) > 0 and np.isfinite(part["loss"][0]) for part in losses.values()
  )
  assert float(losses["captioning ctc"]["ctc"][1]) > 0
  close(run(variables, examples(seed, noise=1)), losses)
  moved = run(variables, jax.tree.map(lambda x: x[order], batch))

  def keep(losses):
    return {name: part for name, part in losses.items() if name not in BY_PLACE}

  close(keep(moved), keep(losses), atol=2e-4)


def test_objectives_give_the_same_on_eight_devices():
  variables, function, run = whole()
  batch = examples(7)
  close(on_eight(function)(variables, batch), run(variables, batch), atol=2e-4)
