"""Exports: StableHLO in a process that has only jax, flatbuffers and NumPy; safetensors; folders
that cannot be written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import mmjax
from mmjax.config import UserError
from mmjax.interop import export as exports
from mmjax.interop.export import export
from mmjax.interop.functions import functions, lower
from mmjax.parallel.mesh import single_device_mesh
from tests.inference import tiny

# Runs apart: only jax, what jax itself needs, and flatbuffers may be imported.
APART = """
import sys
from importlib.machinery import PathFinder

class Only(PathFinder):
  ALLOWED = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "scipy", "opt_einsum"}
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    top = name.partition(".")[0]
    allowed = top in cls.ALLOWED or top in sys.stdlib_module_names or top.startswith("_")
    return PathFinder.find_spec(name, path, target) if allowed else None

# Editable installs and their like add finders of their own: only Python's built-in, frozen and path
# finders stay.
def is_pythons(finder):
  return getattr(finder, "__module__", "").startswith("_frozen_importlib")

own = filter(is_pythons, sys.meta_path)
sys.meta_path = [Only if finder is PathFinder else finder for finder in own]
for name in ("mmjax", "flax", "ml_collections", "safetensors"):
  try:
    __import__(name)
  except ModuleNotFoundError:
    continue
  raise SystemExit(name + " can be imported")

"""
CONSUMER = """
LOADER

inputs, out = np.load(sys.argv[1]), {}
for n in (1, 3, 17):
  out[f"image{n}"] = encode_image(params, inputs["pixels"][:n])
  out[f"text{n}"] = encode_text(params, inputs["tokens"][:n], inputs["mask"][:n])
np.savez(sys.argv[2], **out)
print(json.dumps(meta))
"""
EVERY_FUNCTION = """
import json, jax, numpy as np
from jax import export
inputs, out = np.load(sys.argv[1]), {}
params = dict(np.load("exported/params.npz"))
for name, facts in json.load(open("exported/meta.json"))["functions"].items():
  call = jax.jit(export.deserialize(open(f"exported/{name}.stablehlo", "rb").read()).call)
  for n in (1, 3):
    arrays = [inputs[x["name"]][:n] for x in facts["inputs"]]
    given = [[*a.shape[1:], a.dtype.name] for a in arrays]
    assert given == [[*x["shape"][1:], x["dtype"]] for x in facts["inputs"]], name
    out[f"{name}/{n}"] = result = call(params, *arrays)
    stated = [*facts["output"]["shape"][1:], facts["output"]["dtype"]]
    assert [*result.shape[1:], result.dtype.name] == stated, name
np.savez(sys.argv[2], **out)
"""


def apart(code, exported, folder):
  """(what it prints, out.npz) of a program without mmjax that reads `exported` and
  folder/in.npz.
  """
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_"))} | {
    "JAX_PLATFORMS": "cpu"
  }
  if code is EVERY_FUNCTION:  # which compiles many
    environment["XLA_FLAGS"] = (
      "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
      " --xla_cpu_use_fusion_emitters=false"
    )
  run = subprocess.run(
    [
      sys.executable,
      "-c",
      (APART + code).replace("exported/", f"{exported}/"),
      str(folder / "in.npz"),
      str(folder / "out.npz"),
    ],
    capture_output=True,
    text=True,
    cwd=folder,
    env=environment,
    timeout=300,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return run.stdout, np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
  return export(checkpoint, "stablehlo", tmp_path_factory.mktemp("out") / "exported")


def test_stablehlo_without_mmjax_gives_the_predictors_output(checkpoint, exported, tmp_path):
  predictor = mmjax.load(checkpoint, mesh=single_device_mesh())
  pictures, texts = tiny.pixels(17), [f"{w} {i}" for i, w in enumerate(tiny.WORDS * 3)][:17]
  tokens = predictor.tokens(texts)
  np.savez(
    tmp_path / "in.npz",
    pixels=np.stack([predictor.pixels(p) for p in pictures]),
    tokens=tokens["tokens"],
    mask=tokens["mask"],
  )
  # The ten lines that users copy.
  loader = textwrap.dedent(exports.__doc__.partition("not mmjax:\n\n")[2])
  printed, out = apart(CONSUMER.replace("LOADER", loader), exported, tmp_path)
  meta = json.loads(printed)
  for n in (1, 3, 17):
    np.testing.assert_allclose(out[f"image{n}"], predictor.encode_image(pictures[:n]), atol=2e-6)
    np.testing.assert_allclose(out[f"text{n}"], predictor.encode_text(texts[:n]), atol=2e-6)
  assert meta["scale"] == predictor.scale and meta["bias"] == predictor.bias and meta["width"] == 16
  assert (
    meta["image"]["shape"] == [16, 16, 3]
    and meta["image"]["resize"] == "shortest"
    and meta["text"]["end"] == [2]
  )


def test_functions_are_for_every_platform_and_any_batch(exported):
  from jax import export as jax_export

  for name, count in (("encode_image", 1), ("encode_text", 2)):
    loaded = jax_export.deserialize((exported / f"{name}.stablehlo").read_bytes())
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    batches = [
      aval for aval in loaded.in_avals if not isinstance(aval.shape[0] if aval.shape else 0, int)
    ]
    assert len(batches) == count and all(str(aval.shape[0]) == "b" for aval in batches)
    assert loaded.nr_devices == 1
  assert sorted(os.listdir(exported)) == [
    "encode_image.stablehlo",
    "encode_text.stablehlo",
    "meta.json",
    "params.npz",
    "tokenizer.model",
  ]


@pytest.mark.parametrize(
  "image",
  [
    dict(pooling="class"),
    dict(pooling="attention", remat="full"),
    dict(pooling="last", scan_unroll=1),
  ],
)
def test_other_models_lower_for_every_platform(image):
  config = tiny.config(**image)
  params, found = exports.flat_params(tiny.random_params(config)), functions(config)
  assert set(found) == {"encode_image", "encode_text"}
  for name, function in found.items():
    assert lower(function, name, params, exports.PLATFORMS).platforms == ("cpu", "cuda", "tpu")


def test_safetensors_hold_every_parameter_and_what_goes_with_them(checkpoint, tmp_path):
  from safetensors.numpy import load_file

  out = export(checkpoint, "safetensors", tmp_path / "weights")
  predictor = mmjax.load(checkpoint)
  flat = exports.flat_params(predictor.params)
  stored = load_file(out / "model.safetensors")
  assert stored.keys() == flat.keys() and "image/layers/attention/qkv/kernel" in stored
  for name, value in flat.items():
    np.testing.assert_array_equal(stored[name], value)
  assert (out / "tokenizer.model").read_bytes() == predictor.assets["tokenizer.model"]
  assert mmjax.config.from_json((out / "config.json").read_text()) == predictor.config
  assert json.loads((out / "preprocessing.json").read_text())["image"]["shape"] == [16, 16, 3]


def classifier_of_two(modalities, **encoders):
  """A config of three classes and two values."""
  return tiny.media_config(
    "encoder",
    modalities,
    **{
      "data.label": "label",
      "data.classes": 3,
      "data.values": 2,
      "model.classes": 3,
      "objectives.state": dict(kind="classification", modalities=modalities),
      "objectives.wear": dict(kind="regression", modalities=modalities, mean=(9, -5), std=(10, 2)),
      **encoders,
    },
  )


def test_what_safetensors_hold_is_read_again_to_the_bit(checkpoint, tmp_path):
  folder = export(checkpoint, "safetensors", tmp_path / "weights")
  before, again = mmjax.load(checkpoint), mmjax.load(folder)
  pictures, texts = tiny.pixels(3, size=16), ["a red heart", "Unsinn"]
  np.testing.assert_array_equal(again.encode_image(pictures), before.encode_image(pictures))
  np.testing.assert_array_equal(again.encode_text(texts), before.encode_text(texts))
  assert (again.scale, again.bias, again.assets) == (before.scale, before.bias, before.assets)


def test_labels_values_and_batch_statistics_are_read_again(tmp_path):
  resnet = dict(kind="resnet", layers=18, blocks=(1, 1), multiplier=0.125, stem="imagenet")
  config = classifier_of_two(("image",), **{"model.encoders": dict(image=resnet)})
  names = {"classes.json": b'["idle", "ok", "broken"]', "values.json": b'["heat", "wear"]'}
  (tmp_path / "saved").mkdir()
  saved = tiny.save(config, tmp_path / "saved", names, tiny.random_statistics(config))
  folder = export(saved, "safetensors", tmp_path / "weights")
  pictures = tiny.pixels(3)
  said = mmjax.load(folder).predict(image=pictures)
  assert said == mmjax.load(saved).predict(image=pictures)
  assert said[0]["label"] in ("idle", "ok", "broken") and "wear" in said[0]


@pytest.mark.parametrize(
  "name, change, says",
  [
    ("preprocessing.json", lambda text: text.replace("tokenizer.model", "../x"), "does not name"),
    ("preprocessing.json", lambda text: "{}", "does not name"),
    ("config.json", lambda text: text.replace('"width": 16', '"width": 32'), "of another model"),
    ("config.json", lambda text: text.replace('"vit"', '"os:system"'), "os"),
    ("config.json", lambda text: "[" * 9999, "its config is none of this version"),
  ],
)
def test_an_export_of_a_stranger_is_refused_in_one_line(name, change, says, checkpoint, tmp_path):
  folder = export(checkpoint, "safetensors", tmp_path / "weights")
  text = (folder / name).read_text()
  assert change(text) != text
  (folder / name).write_text(change(text))
  with pytest.raises(UserError, match=says) as error:
    mmjax.load(folder)
  assert "\n" not in str(error.value)


def test_unwritable_places_are_one_clear_line_and_leave_nothing(checkpoint, tmp_path, monkeypatch):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").write_text("x")
  (tmp_path / "file").write_text("x")
  for out, words in (
    (tmp_path / "full", "not empty"),
    (tmp_path / "file", "not empty"),
    (tmp_path / "file" / "below", "cannot be written"),
  ):
    with pytest.raises(UserError, match=words) as error:
      export(checkpoint, "safetensors", out)
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="stablehlo"):
    export(checkpoint, "onnx", tmp_path / "new")

  def fail(predictor, folder):
    (folder / "half").write_text("x")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(exports, "write_safetensors", fail)
  with pytest.raises(UserError, match="No space left"):
    export(checkpoint, "safetensors", tmp_path / "new")
  assert sorted(os.listdir(tmp_path)) == ["file", "full"] and os.listdir(tmp_path / "full") == [
    "mine"
  ]


def test_an_empty_folder_is_used(checkpoint, tmp_path):
  (tmp_path / "empty").mkdir()
  assert (export(checkpoint, "safetensors", tmp_path / "empty") / "model.safetensors").exists()
