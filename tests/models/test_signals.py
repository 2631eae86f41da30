"""Encoders of sound, video and series: shapes, masks, spectrograms, augmentation, and what must
hold for all of them.
"""

from __future__ import annotations

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmjax.config
from mmjax.config import UserError
from mmjax.kinds import KINDS, kind_function
from mmjax.models.encoders import spectrogram
from mmjax.models.encoders.audio import around, overlapping
from mmjax.models.encoders.sequence import stack_config
from mmjax.models.encoders.spectrogram import SpecAugment, kaldi_mel, log_mel, mel_filters
from mmjax.models.encoders.video import FrameEncoder, mean_of_changes, mean_places
from mmjax.models.layers import Encoded
from mmjax.models.stack import Stack
from mmjax.parallel import rules as parallel
from mmjax.parallel.mesh import make_mesh

RATE, SAMPLES, ROWS = 2000, 1000, 3
DATA = dict(
  audio=dict(rate=RATE, seconds=SAMPLES / RATE),
  video=dict(size=8, frames=4),
  series=dict(length=12, channels=2),
)
SMALL = dict(width=8, depth=1, heads=2, mlp=8)
MELS = dict(mels=12, n_fft=100, hop=40)
WAVES = dict(channels=(4, 6), sizes=(20, 5), strides=(20, 4), positions=4, position_groups=2)
CASES = {
  "whisper": ("audio", dict(kind="whisper", **MELS, **SMALL), 13),
  "whisper utterance": (
    "audio",
    dict(
      kind="whisper",
      **MELS,
      **SMALL,
      normalisation="utterance",
      strides=(2, 2),
      pooling="attention",
    ),
    7,
  ),
  "ast": ("audio", dict(kind="ast", mels=12, patch=6, stride=4, **SMALL), 2 + 2 * 11),
  "ast mean": (
    "audio",
    dict(kind="ast", mels=12, patch=6, stride=4, frames=60, pooling="mean", **SMALL),
    2 + 2 * 14,
  ),
  "wav2vec2": ("audio", dict(kind="wav2vec2", **WAVES, **SMALL), 12),
  "wav2vec2 layer": (
    "audio",
    dict(kind="wav2vec2", **WAVES, **SMALL, feature_norm="layer", norm="pre", pooling="attention"),
    12,
  ),
  "frames mean": (
    "video",
    dict(kind="frames", patch=4, temporal="mean", frame_depth=1, **SMALL),
    4,
  ),
  "frames transformer": (
    "video",
    dict(kind="frames", stem="convolution", channels=(4, 8), **SMALL),
    4,
  ),
  "frames points": (
    "video",
    dict(
      kind="frames", stem="convolution", where="points", channels=(4, 8), strides=(2, 1), **SMALL
    ),
    4,
  ),
  "frames changes": (
    "video",
    dict(kind="frames", stem="convolution", changes=True, channels=(4, 8), **SMALL),
    4,
  ),
  "tubelets": (
    "video",
    dict(kind="tubelets", patch=4, time=2, pooling="attention", **SMALL),
    2 * 4,
  ),
  "series": ("series", dict(kind="series", patch=4, **SMALL), 3),
  "series norm": ("series", dict(kind="series", patch=3, instance_norm=True, **SMALL), 4),
}


def make(case, compute="float32"):
  modality, entry, _ = CASES[case]
  chosen = {k: v for k, v in entry.items() if k != "kind"}
  return kind_function(entry, "encoder")(DATA, dict(compute=compute), **chosen)


def inputs(modality, lengths, seed=0, garbage=1.0):
  """ROWS examples, of which the last places are not real and hold `garbage` times noise."""
  rng = np.random.default_rng(seed)
  lengths, junk = np.asarray(lengths), np.random.default_rng(seed + 99)
  if modality == "audio":
    real = np.arange(SAMPLES) < lengths[:, None]
    x = rng.normal(0, 3000, (ROWS, SAMPLES))
    x = np.where(real, x, garbage * junk.normal(0, 9000, x.shape))
    return dict(waveform=x.clip(-32768, 32767).astype(np.int16), length=lengths.astype(np.int32))
  if modality == "video":
    real = np.arange(4) < lengths[:, None]
    x = np.where(
      real[..., None, None, None],
      rng.integers(0, 256, (ROWS, 4, 8, 8, 3)),
      junk.integers(0, 256, (ROWS, 4, 8, 8, 3)) * garbage,
    )
    return dict(frames=x.astype(np.uint8), mask=real)
  real = np.arange(12) < lengths[:, None]
  x = np.where(
    real[..., None], rng.normal(0, 1, (ROWS, 12, 2)), garbage * junk.normal(0, 9, (ROWS, 12, 2))
  )
  return dict(values=x.astype(np.float32), mask=real)


FULL = dict(audio=SAMPLES, video=4, series=12)
ENCODERS: dict = {}


def encoder(case):
  """(module, variables, jitted apply) of a case, made once."""
  if case not in ENCODERS:
    modality = CASES[case][0]
    module = make(case)
    batch = dict(inputs(modality, [FULL[modality]] * ROWS), present=np.ones(ROWS, bool))
    shapes, rng = (
      nn.unbox(jax.eval_shape(module.init, jax.random.key(0), batch)),
      np.random.default_rng(1),
    )
    # No compilation, no zeros.
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    ENCODERS[case] = module, variables, jax.jit(module.apply)
  return ENCODERS[case]


def apply(case, batch):
  _, variables, run = encoder(case)
  return run(variables, {"present": np.ones(ROWS, bool), **batch})


def equal(a: Encoded, b: Encoded, atol=2e-5):
  """Equal masks and pooled vectors, and equal tokens where they are real."""
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_allclose(a.pooled, b.pooled, atol=atol)
  real = np.asarray(a.mask)[..., None]
  np.testing.assert_allclose(np.where(real, a.tokens, 0), np.where(real, b.tokens, 0), atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_shapes_dtypes_and_axes(case):
  modality, entry, tokens = CASES[case]
  batch = inputs(modality, [FULL[modality]] * ROWS)
  module = make(case, compute="bfloat16")
  out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), batch)
  assert out.tokens.shape == (ROWS, tokens, 8) and out.tokens.dtype == jnp.bfloat16
  assert (
    out.mask.shape == (ROWS, tokens) and out.mask.dtype == bool and out.pooled.shape == (ROWS, 8)
  )
  axes = flax.traverse_util.flatten_dict(parallel.param_axes(variables["params"]), sep="/")
  assert all(None not in names for names in axes.values()), axes
  assert (
    axes["layers/mlp/up/kernel"] == ("layers", "embed", "mlp")
    if case != "frames mean"
    else "layers/mlp/up/kernel" not in axes
  )
  assert entry["kind"] in KINDS["encoder"]


def places(case):
  return st.lists(st.integers(1, FULL[CASES[case][0]]), min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("case", CASES)
def test_blind_to_padding_equivariant_to_order_and_zero_where_missing(case):
  @settings(max_examples=6, deadline=None)
  @given(
    lengths=places(case),
    seed=st.integers(0, 9),
    order=st.permutations(range(ROWS)),
    present=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
  )
  def check(lengths, seed, order, present):
    modality = CASES[case][0]
    batch = inputs(modality, lengths, seed)
    out = apply(case, batch)
    equal(apply(case, inputs(modality, lengths, seed, garbage=0.0)), out)
    equal(
      apply(case, {k: v[list(order)] for k, v in batch.items()}),
      Encoded(*(np.asarray(x)[list(order)] for x in out[:3])),
    )
    some = apply(case, dict(batch, present=np.array(present)))
    assert not np.asarray(some.mask)[~np.array(present)].any()
    np.testing.assert_allclose(
      some.pooled, np.where(np.array(present)[:, None], out.pooled, 0), atol=2e-5
    )
    assert (
      np.asarray(out.mask).any(1).all()
      and np.isfinite(out.pooled).all()
      and np.isfinite(np.asarray(out.tokens)).all()
    )

  check()


@pytest.mark.parametrize("case", CASES)
def test_missing_and_empty_rows_have_no_gradient_and_the_others_reach_every_parameter(case):
  modality = CASES[case][0]
  module, variables, _ = encoder(case)
  gradient = jax.jit(jax.grad(lambda v, b: jnp.square(module.apply(v, b).pooled + 0.1).sum()))
  batch = inputs(modality, [FULL[modality]] * ROWS)
  for change in (
    dict(present=np.zeros(ROWS, bool)),
    dict(inputs(modality, [0] * ROWS), present=np.ones(ROWS, bool)),
  ):
    assert all(
      not np.asarray(g).any() for g in jax.tree.leaves(gradient(variables, {**batch, **change}))
    )
  flat = flax.traverse_util.flatten_dict(
    gradient(variables, dict(batch, present=np.ones(ROWS, bool))), sep="/"
  )
  assert [name for name, g in flat.items() if not np.asarray(g).any()] == []
  assert all(np.isfinite(g).all() for g in flat.values())


def test_a_longer_buffer_of_garbage_changes_nothing():
  short = inputs("audio", [500, 700, 300])
  noise = np.random.default_rng(5).integers(-9000, 9000, (ROWS, SAMPLES), dtype=np.int16)
  long = dict(short, waveform=np.concatenate([short["waveform"], noise], 1))
  for case in ("whisper", "whisper utterance"):
    module, variables, _ = encoder(case)
    a, b = (jax.jit(module.apply)(variables, x) for x in (short, long))
    count = a.mask.shape[1]
    assert not b.mask[:, count:].any()
    equal(Encoded(b.tokens[:, :count], b.mask[:, :count], b.pooled), a)


# -- spectrograms ----------------------------------------------------------------------------------


def test_the_transform_by_matrix_equals_the_fast_one(monkeypatch):
  x = inputs("audio", [SAMPLES, 700, 400])
  fast = [
    log_mel(x["waveform"], x["length"], rate=RATE, **MELS)[0],
    kaldi_mel(x["waveform"], x["length"], rate=RATE, mels=12)[0],
  ]
  monkeypatch.setattr(spectrogram, "on_lone_cpu", lambda: False)
  slow = [
    log_mel(x["waveform"], x["length"], rate=RATE, **MELS)[0],
    kaldi_mel(x["waveform"], x["length"], rate=RATE, mels=12)[0],
  ]
  for a, b in zip(fast, slow, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
  "bins, mels, rate, low, scale",
  (
    (201, 40, 16_000, 0.0, "slaney"),
    (257, 128, 16_000, 20.0, "kaldi"),
    (513, 80, 22_050, 0.0, "slaney"),
  ),
)
def test_mel_filters_equal_transformers(bins, mels, rate, low, scale):
  from transformers.audio_utils import mel_filter_bank

  want = mel_filter_bank(
    bins,
    mels,
    low,
    rate / 2,
    rate,
    norm="slaney" if scale == "slaney" else None,
    mel_scale=scale,
    triangularize_in_mel_space=scale == "kaldi",
  )
  np.testing.assert_allclose(
    mel_filters(bins, mels, rate, low, scale), want, atol=1e-6 if scale == "slaney" else 1e-4
  )


def test_utterance_normalisation_is_over_the_real_frames():
  x = inputs("audio", [SAMPLES, 600, 300])
  got, mask = (
    np.asarray(a)
    for a in log_mel(x["waveform"], x["length"], rate=RATE, **MELS, normalisation="utterance")
  )
  for row, real in zip(got, mask, strict=True):
    np.testing.assert_allclose(row[real].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(row[real].std(0), 1, atol=1e-2)
    assert not row[~real].any()


def test_floats_and_integers_are_the_same_sound():
  x = inputs("audio", [SAMPLES] * ROWS)
  floats = log_mel(x["waveform"] / np.float32(32768), rate=RATE, **MELS)[0]
  np.testing.assert_allclose(
    log_mel(x["waveform"], x["length"], rate=RATE, **MELS)[0], floats, atol=1e-6
  )


def test_too_short_a_buffer_is_refused():
  with pytest.raises(
    UserError, match="shorter than half a window of 400. Raise data.audio.seconds"
  ):
    log_mel(np.zeros((1, 200), np.int16))
  with pytest.raises(UserError, match="Raise data.audio.seconds"):
    kaldi_mel(np.zeros((1, 300), np.int16))


def test_gathers_equal_torch_convolutions():
  import torch

  rng = np.random.default_rng(0)
  x, kernel = (
    rng.standard_normal((2, 9, 3)).astype(np.float32),
    rng.standard_normal((5, 3, 3)).astype(np.float32),
  )
  for stride in (1, 2):
    want = torch.nn.functional.conv1d(
      torch.from_numpy(x).mT, torch.from_numpy(kernel), stride=stride, padding=1
    ).mT
    np.testing.assert_allclose(
      around(x, stride) @ kernel.transpose(2, 1, 0).reshape(9, 5), want, atol=1e-5
    )
  x, kernel = (
    rng.standard_normal((2, 23, 17)).astype(np.float32),
    rng.standard_normal((5, 1, 4, 4)).astype(np.float32),
  )
  want = (
    torch.nn.functional.conv2d(torch.from_numpy(x).mT[:, None], torch.from_numpy(kernel), stride=3)
    .flatten(2)
    .mT
  )
  np.testing.assert_allclose(
    overlapping(jnp.asarray(x), 4, 3) @ kernel.reshape(5, 16).T, want, atol=1e-4
  )


# -- SpecAugment -----------------------------------------------------------------------------------

FEATURES = np.random.default_rng(3).standard_normal((64, 40, 12)).astype(np.float32)
REAL = np.arange(40) < np.random.default_rng(4).integers(1, 41, 64)[:, None]


def test_masks_are_spans_of_the_mean_within_the_sound():
  run = SpecAugment(time_masks=2, time_width=5, frequency_masks=1, frequency_width=4)
  out = np.asarray(jax.jit(run)(FEATURES, REAL, jax.random.key(0)))
  changed = out != FEATURES
  frames, channels = changed.mean(2) > 0.9, changed.mean(1) > 0.9
  assert (
    not frames[~REAL].any()
    and frames.sum(1).max() <= 10
    and frames.any()
    and channels.sum(1).max() <= 4
    and channels.any()
  )
  assert (frames.sum(1) < REAL.sum(1)).all()
  means = np.where(REAL[..., None], FEATURES, 0).sum((1, 2)) / (REAL.sum(1) * 12)
  np.testing.assert_allclose(
    out[changed], np.broadcast_to(means[:, None, None], out.shape)[changed], atol=1e-5
  )
  assert len({tuple(row) for row in frames}) > 10 and len({tuple(row) for row in channels}) > 5
  assert not np.array_equal(out, jax.jit(run)(FEATURES, REAL, jax.random.key(1)))


def test_warps_keep_ends_and_order_and_do_not_reach_the_padding():
  ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, :, None], FEATURES.shape)
  ramp = np.where(REAL[..., None], ramp, 1e6)
  out = np.asarray(SpecAugment(time_warp=0.2)(ramp, REAL, jax.random.key(0)))[..., 0]
  for row, real in zip(out, REAL, strict=True):
    np.testing.assert_allclose(row[real][[0, -1]], [0, real.sum() - 1], atol=1e-4)
    assert (np.diff(row[real]) > 0).all() and np.abs(
      row[real] - np.arange(real.sum())
    ).max() <= 0.2 * real.sum()
  assert np.abs(out - ramp[..., 0])[REAL].max() > 2
  ramp = np.broadcast_to(np.arange(12, dtype=np.float32), FEATURES.shape)
  out = np.asarray(SpecAugment(frequency_warp=0.1)(ramp, REAL, jax.random.key(0)))[:, 0]
  ratio = out[:, 1:9] / np.arange(1, 9)
  np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), atol=1e-4)
  assert 0.9 <= ratio.min() < 0.95 and 1.05 < ratio.max() <= 1.1
  with pytest.raises(UserError, match="time_warp 0.5 must be below 0.5"):
    SpecAugment(time_warp=0.5)


def test_augmentation_needs_train_and_its_key():
  modality, entry, _ = CASES["whisper"]
  chosen = {k: v for k, v in entry.items() if k != "kind"}
  module = kind_function(entry, "encoder")(
    DATA, dict(compute="float32"), **chosen, time_masks=1, time_width=6, frequency_warp=0.1
  )
  _, variables, _ = encoder("whisper")
  batch = inputs(modality, [SAMPLES, 600, 300])
  equal(jax.jit(module.apply)(variables, batch), apply("whisper", batch))
  run = jax.jit(
    lambda key: module.apply(variables, batch, train=True, rngs={"dropout": key}).pooled
  )
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)), atol=1e-5)


# -- video and series ------------------------------------------------------------------------------


def test_the_mean_ignores_order_and_the_transformer_does_not():
  batch = inputs("video", [4] * ROWS)
  backwards = dict(batch, frames=batch["frames"][:, ::-1])
  np.testing.assert_allclose(
    apply("frames mean", batch).pooled, apply("frames mean", backwards).pooled, atol=1e-5
  )
  for case in ("frames transformer", "tubelets"):
    assert np.abs(apply(case, batch).pooled - apply(case, backwards).pooled).max() > 1e-3


def test_instance_norm_hides_level_and_scale():
  batch = inputs("series", [12, 8, 5])
  moved = dict(batch, values=batch["values"] * np.float32(3) + np.float32(2))
  equal(apply("series norm", batch), apply("series norm", moved), atol=1e-3)
  assert np.abs(apply("series", batch).pooled - apply("series", moved).pooled).max() > 1e-2


# -- hidden patches and a shared transformer -------------------------------------------------------


@pytest.mark.parametrize("case", ("whisper", "ast", "tubelets", "series"))
def test_hidden_patches_are_not_seen_and_can_be_asked_for(case):
  modality, _, tokens = CASES[case]
  module = make(case) if case != "ast" else make(case).clone(patch=6, stride=6)  # without overlap
  batch = dict(inputs(modality, [FULL[modality]] * ROWS), present=np.array([True, False, True]))
  values, real = module.patches(batch)
  hidden = np.zeros(real.shape, bool)
  hidden[:, 3 if case == "whisper" else 1] = True
  assert (
    values.dtype == jnp.float32
    and real.shape == values.shape[:2]
    and not real[1].any()
    and real[0].all()
  )
  masked = dict(batch, patch_mask=hidden)
  shapes, rng = (
    nn.unbox(jax.eval_shape(module.init, jax.random.key(0), masked)),
    np.random.default_rng(1),
  )
  variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  key = dict(audio="waveform", video="frames", series="values")[modality]
  changed, where = batch[key].copy(), np.asarray(module.patches(batch)[0])
  part = dict(
    whisper=np.s_[:, 280:281], ast=np.s_[:, :0], tubelets=np.s_[:, :2, :4, 4:], series=np.s_[:, 4:8]
  )[case]
  changed[part] = changed[part] // 2 + 3
  other = dict(masked, **{key: changed})
  run = jax.jit(lambda b: module.apply(variables, b))
  out = run(masked)
  assert out.tokens[:, -hidden.shape[1] :].shape[:2] == values.shape[:2]
  if case != "ast":  # whose windows of sound overlap
    differs = np.abs(np.asarray(module.patches(other)[0]) - where).max(-1) > 1e-6
    assert differs[0].any() and (case == "whisper" or not (differs & ~hidden).any())
    if case != "whisper":
      equal(run(other), out)
  assert np.abs(run(dict(masked, patch_mask=~hidden)).pooled - out.pooled).max() > 1e-4
  all_hidden = [
    dict(
      inputs(modality, [FULL[modality]] * ROWS, seed),
      present=batch["present"],
      patch_mask=np.ones_like(hidden),
    )
    for seed in (0, 1)
  ]
  equal(*map(run, all_hidden))


def test_sound_video_and_series_may_share_one_transformer():
  shared = Stack(stack_config(dict(compute="float32"), activation="gelu", eps=1e-5, **SMALL))

  class Both(nn.Module):
    def setup(self):
      self.trunk = shared.clone(parent=None)
      for case, modality in (("whisper", "audio"), ("tubelets", "video"), ("series", "series")):
        setattr(self, modality, make(case).clone(parent=None, trunk=self.trunk))

    def __call__(self, batch):
      return [getattr(self, modality)(batch[modality]).pooled for modality in FULL]

  batch = {modality: inputs(modality, [FULL[modality]] * ROWS) for modality in FULL}
  params = jax.eval_shape(Both().init, jax.random.key(0), batch)["params"]
  assert set(params) == {"trunk", "audio", "video", "series"}
  assert all("layers" not in params[modality] for modality in FULL) and "layers" in params["trunk"]


@pytest.mark.parametrize(
  "entry, message",
  (
    (
      dict(kind="tubelets", patch=3),
      "data.video.size 8 and frames 4 do not divide into tubelets of 2 frames of 3x3",
    ),
    (dict(kind="tubelets", patch=4, time=3), "tubelets of 3 frames"),
    (
      dict(kind="frames", patch=3),
      "data.video.size 8 is not divisible by model.encoders.video.patch 3",
    ),
    (
      dict(kind="frames", stem="convolution", channels=(4, 8), strides=(2,)),
      "model.encoders.video has 2 channels, but 1 strides",
    ),
    (dict(kind="frames", patch=4, changes=True), "changes needs stem='convolution'"),
    (
      dict(kind="series", patch=5),
      "data.series.length 12 is not divisible by model.encoders.series.patch 5",
    ),
    (dict(kind="whisper", time_warp=0.7), "time_warp 0.7 must be below 0.5"),
  ),
)
def test_settings_that_do_not_fit_are_refused(entry, message):
  chosen = {k: v for k, v in entry.items() if k != "kind"}
  with pytest.raises(UserError, match=message):
    kind_function(entry, "encoder")(DATA, dict(compute="float32"), **SMALL, **chosen)


def test_inputs_that_do_not_fit_are_refused():
  for case, batch, message in (
    (
      "tubelets",
      dict(frames=np.zeros((1, 3, 8, 8, 3), np.uint8)),
      "3 frames of 8x8 does not divide",
    ),
    (
      "frames transformer",
      dict(frames=np.zeros((1, 9, 8, 8, 3), np.uint8)),
      "video of 9 frames for a model of data.video.frames 4",
    ),
    ("series", dict(values=np.zeros((1, 16, 2), np.float32)), "a series of 16 steps"),
    ("ast", dict(waveform=np.zeros((1, 120), np.int16)), "smaller than a patch of 6"),
  ):
    with pytest.raises(UserError, match=message):
      jax.eval_shape(make(case).init, jax.random.key(0), batch)


@pytest.mark.parametrize("case", ("whisper", "ast", "frames transformer"))
def test_eight_devices_give_the_same_and_exchange_no_activations(case, devices):
  modality = CASES[case][0]
  batch = inputs(modality, [FULL[modality], FULL[modality] // 2 + 1, FULL[modality] // 3 + 1])
  batch = {k: np.concatenate([x, x, x])[:8] for k, x in batch.items()} | dict(
    present=np.ones(8, bool)
  )
  module, variables, run = encoder(case)
  c = mmjax.config.base()
  mesh = make_mesh(c)
  with parallel.use(mesh, parallel.RULES["replicated"]):
    compiled = (
      jax.jit(module.apply, in_shardings=(parallel.replicated(mesh), parallel.batch_sharding(mesh)))
      .lower(variables, batch)
      .compile()
    )
    got = compiled(
      jax.device_put(variables, parallel.replicated(mesh)),
      jax.device_put(batch, parallel.batch_sharding(mesh)),
    )
  assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
  equal(Encoded(*(np.asarray(x) for x in got[:3])), run(variables, batch), atol=1e-4)


def test_frames_are_shown_with_their_change_from_the_one_before():
  class Changes(nn.Module):
    """The mean change of each frame, in both channels."""

    def __call__(self, batch, *, train=False):
      return jnp.repeat(batch["changes"].mean(axis=(1, 2, 3))[:, None], 2, axis=1)

  frames = inputs("video", [4, 4, 4])["frames"]
  c = make("frames changes").config
  module = FrameEncoder(c, Changes(), length=4, temporal="mean", changes=True)
  mask = np.ones(frames.shape[:2], bool)
  out = module.apply({}, dict(frames=frames, mask=mask))
  means = frames.mean(axis=(2, 3, 4)) / 255
  expected = np.diff(means, axis=1, prepend=means[:, :1])
  np.testing.assert_allclose(out.tokens[..., 0], expected, atol=1e-6)
  assert np.abs(expected[:, 1:]).min() > 1e-4


def test_places_of_channels_are_means_by_their_values():
  x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
  sharpness = np.array([0.0, 1.0, 3.0, 200.0], np.float32)
  points = mean_places(x, sharpness)
  assert points.shape == (2, 2, 4)
  for n, c in np.ndindex(2, 4):
    weights = np.exp(sharpness[c] * (x[n, :, :, c] - x[n, :, :, c].max()))
    weights /= weights.sum()
    rows, columns = np.linspace(-1, 1, 3), np.linspace(-1, 1, 5)
    expected = weights.sum(1) @ rows, weights.sum(0) @ columns
    np.testing.assert_allclose(points[n, :, c], expected, atol=1e-6)
  np.testing.assert_allclose(points[:, :, 0], 0, atol=1e-6)  # everywhere alike: the middle
  row, column = divmod(int(x[0, :, :, 3].argmax()), 5)
  np.testing.assert_allclose(points[0, :, 3], (row - 1, column / 2 - 1), atol=1e-3)


def test_what_changes_is_told_by_the_places_where_it_does():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
  changes = np.zeros((3, 8, 6, 3), np.float32)
  changes[0, 5, 4, 1] = -0.5  # in the cell 1, 2 alone
  changes[1] = rng.uniform(-1, 1, changes[1].shape)
  moves = mean_of_changes(x, changes)
  np.testing.assert_allclose(moves[0], x[0, 1, 2], rtol=1e-4)
  weights = np.zeros((2, 3))
  for row, column in np.ndindex(8, 6):
    weights[row // 4, column // 2] += np.abs(changes[1, row, column]).sum()
  expected = (weights[..., None] * x[1]).sum(axis=(0, 1)) / weights.sum()
  np.testing.assert_allclose(moves[1], expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(moves[2], 0)


def test_convolutions_tell_what_moves_apart():
  """With all else at zero, a frame is told by what changes in it alone."""
  module = make("frames changes").frame
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
  changes = rng.uniform(-1, 1, pixels.shape).astype(np.float32)
  changes[0] = 0
  batch = dict(pixels=pixels, changes=changes)
  params = nn.unbox(module.init(jax.random.key(0), batch))["params"]
  params |= {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("what", "where")}
  told = module.apply({"params": params}, batch)
  np.testing.assert_array_equal(told[0], params["moves"]["bias"])
  assert np.abs(told[1:]).max() > 0.1
