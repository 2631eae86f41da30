"""Every function of every modality as StableHLO, where mmjax cannot be imported, against
`mmjax.load`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mmjax
from mmjax.config import UserError
from mmjax.evaluation.captions import decode
from mmjax.interop.export import export, flat_params
from mmjax.interop.functions import functions, lower
from mmjax.kinds import KINDS
from mmjax.models import make_model
from mmjax.parallel.mesh import single_device_mesh
from mmjax.state.checkpoint import save_import
from tests.inference import tiny
from tests.interop.test_export import EVERY_FUNCTION, apart
from tests.models.test_properties import ENCODERS

RESNET = dict(kind="resnet", layers=18, blocks=(1,), multiplier=0.25, stem="small")
NAFLEX = {"data.image.resize": "naflex", "data.image.patch": 4, "data.image.tokens": 9}
FUSED = dict(kind="merged_attention", depth=1, heads=2)


def media(seed=0):
  """Three items of every modality, of different lengths and sizes."""
  rng = np.random.default_rng(seed)
  return dict(
    image=[
      rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((20, 20), (30, 12), (9, 40))
    ],
    text=list(tiny.WORDS[:3]),
    audio=[(0.3 * rng.normal(size=n)).astype(np.float32) for n in (500, 3000, 1700)],
    video=[rng.integers(0, 256, (n, 20, 24, 3), dtype=np.uint8) for n in (2, 7, 3)],
    series=[rng.normal(size=(n, 2)).astype(np.float32) for n in (3, 8, 20)],
  )


def saved(config, folder):
  """A checkpoint of random parameters and (positive) statistics, and its predictor."""
  spec = jax.eval_shape(
    lambda: make_model(config).init(
      jax.random.key(0), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_of(config))
    )
  )
  rng = np.random.default_rng(1)
  state = {
    name: jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(x.dtype), tree)
    for name, tree in dict(spec).items()
    if name != "params"
  }
  save_import(
    str(folder / "checkpoint"), tiny.random_params(config), config, tiny.assets(folder), state
  )
  return folder / "checkpoint", mmjax.load(folder / "checkpoint", mesh=single_device_mesh())


def batch_of(config):
  from mmjax.data.pipeline import batch_spec

  return batch_spec(config, 1)


def arrays_of(predictor, items):
  """{"audio.waveform": [3, ...]} of media as the model takes them."""
  out = {}
  for modality in predictor.modalities:
    rows = predictor.tokens(items["text"]) if modality == "text" else None
    if rows is None:
      examples = [predictor.media[modality](item) for item in items[modality]]
      rows = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
    out.update({f"{modality}.{name}": value for name, value in rows.items() if name != "key"})
  return out


def expected(predictor, name, items):
  """What the predictor gives for a function, for all three items."""
  what, _, modalities = name.partition("_")
  if what == "encode":
    return predictor.encode(modalities, items[modalities])
  chosen = (
    {"classes": ("text", "image"), "generate": ("image",)}[what]
    if not modalities
    else tuple(modalities.split("_"))
  )
  return getattr(predictor, what)(**{m: items[m] for m in chosen})


def compare(predictor, name, got, items):
  want = expected(predictor, name, items)[: len(got)]
  if name.startswith("generate"):
    assert [
      decode(predictor.tokenizer, row, predictor.config.model.decoder.eos_id) for row in got
    ] == want and got.dtype == np.int32
  else:
    np.testing.assert_allclose(got, want, atol=2e-6, err_msg=name)
    assert got.dtype == np.float32


@pytest.mark.parametrize(
  "modalities",
  [
    ("image", "audio", "text"),
    pytest.param(("image", "audio", "video", "series", "text"), marks=pytest.mark.slow),
  ],
)
def test_every_function_of_a_model_of_everything_without_mmjax(modalities, tmp_path):
  """A shared space, batch statistics, a fusion that classifies, and a decoder."""
  changes = {
    "model.encoders.image": RESNET,
    "model.fusion": FUSED,
    "model.decoder": dict(depth=1, heads=2),
    "data.label": "answer",
    "data.classes": 3,
    "objectives.q": dict(kind="classification", modalities=("text", "image")),
    "objectives.c": dict(kind="captioning", source=("image",)),
  }
  config = tiny.media_config("multitask", modalities, **changes)
  checkpoint, predictor = saved(config, tmp_path)
  out, items = export(checkpoint, "stablehlo", tmp_path / "exported"), media()
  np.savez(tmp_path / "in.npz", **arrays_of(predictor, items))
  _, found = apart(EVERY_FUNCTION, out, tmp_path)
  names = [*(f"encode_{modality}" for modality in modalities), "classes", "generate"]
  assert sorted(found) == sorted(f"{name}/{n}" for name in names for n in (1, 3))
  for name in names:
    for n in (1, 3):
      compare(predictor, name, found[f"{name}/{n}"], items)
  assert predictor.model_state and any(
    key.startswith("batch_stats/") for key in np.load(out / "params.npz")
  )


def called(predictor, items):
  """Every function of a predictor's config with batches of 1 and 3, in this process, compared."""
  params, arrays = (
    flat_params({**predictor.params, **predictor.model_state}),
    arrays_of(predictor, items),
  )
  for name, function in functions(predictor.config).items():
    lowered = lower(function, name, params, ("cpu", "cuda", "tpu"), tuple(predictor.model_state))
    for n in (1, 3):
      compare(
        predictor,
        name,
        np.asarray(jax.jit(lowered.call)(params, *(arrays[key][:n] for key in function.inputs))),
        items,
      )
  return set(functions(predictor.config))


def test_pictures_of_any_aspect_ratio(tmp_path):
  entry = dict(ENCODERS["naflex"][1], patch=4)
  _, predictor = saved(
    tiny.media_config("encoder", ("image",), **{"model.encoders.image": entry, **NAFLEX}), tmp_path
  )
  assert called(predictor, media()) == {"encode_image"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS["encoder"]))
def test_every_encoder(kind, tmp_path):
  same = [name for name in ENCODERS if KINDS["encoder"][name] is KINDS["encoder"][kind]]
  modality, entry = ENCODERS[kind if kind in same else same[0]]
  entry = dict(
    entry | dict(kind=kind),
    **({"patch": 4} if kind == "naflex" else {}),
    **({"n_fft": 200, "hop": 80} if "hop" in entry else {}),
  )
  changes = {
    f"model.encoders.{modality}": entry,
    "data.classes": 3,
    **(NAFLEX if kind == "naflex" else {}),
  }
  if "frames" in kind or kind == "tubelets":
    changes["data.video.frames"] = 4
  _, predictor = saved(tiny.media_config("multitask", (modality,), **changes), tmp_path)
  items = media()
  items.update(text=items["text"])
  params, arrays = (
    flat_params({**predictor.params, **predictor.model_state}),
    arrays_of(predictor, items),
  )
  for name, function in functions(predictor.config).items():
    lowered = lower(function, name, params, ("cpu", "cuda", "tpu"), tuple(predictor.model_state))
    want = (
      predictor.encode(modality, items[modality])
      if name.startswith("encode")
      else predictor.classes(**{modality: items[modality]})
    )
    for n in (1, 3):
      got = jax.jit(lowered.call)(params, *(arrays[key][:n] for key in function.inputs))
      np.testing.assert_allclose(got, want[:n], atol=2e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS["fusion"]))
def test_every_fusion(kind, tmp_path):
  changes = {
    "model.fusion": dict(kind=kind),
    "data.label": "labels",
    "data.classes": 3,
    "model.joint": False,
    "objectives.q": dict(kind="classification", modalities=("text", "image")),
  }
  _, predictor = saved(tiny.media_config("fusion_encoder", ("image", "text"), **changes), tmp_path)
  assert called(predictor, media()) == {"classes"}


@pytest.mark.slow
def test_a_drawing_model_takes_texts_and_noise(tmp_path):
  config = tiny.media_config(
    "text_to_image_gan",
    ("text",),
    **{
      "model.channels": (8, 4),
      "model.discriminator": (4, 8),
      "data.modalities": ("image", "text"),
    },
  )
  _, predictor = saved(config, tmp_path)
  (function,) = functions(config).values()
  rows, noise = (
    predictor.tokens(tiny.WORDS[:3]),
    np.random.default_rng(0).normal(size=(3, config.model.noise)).astype(np.float32),
  )
  lowered = lower(function, "draw", flat_params(predictor.params), ("cpu", "cuda", "tpu"))
  assert list(function.inputs) == ["text.tokens", "text.mask", "noise"]
  model = make_model(config)

  def draw(params, rows, noise):
    return model.apply(
      {"params": params},
      model.apply({"params": params}, {"text": rows}, method="condition"),
      noise,
      method="draw",
    )

  want = (
    np.asarray(
      jax.jit(draw)(predictor.params, {"tokens": rows["tokens"], "mask": rows["mask"]}, noise)
    )
    + 1
  ) * 127.5
  got = np.asarray(
    jax.jit(lowered.call)(flat_params(predictor.params), rows["tokens"], rows["mask"], noise)
  )
  assert got.dtype == np.uint8 and got.shape == (3, 16, 16, 3) and np.abs(got - want).max() <= 0.51


def test_a_model_without_functions_is_refused():
  config = tiny.media_config(
    "fusion_encoder",
    ("image", "text"),
    **{"model.fusion": FUSED, "model.joint": False, "model.masked_text": True},
  )
  with pytest.raises(UserError, match="nothing to export as a function"):
    functions(config)
