"""Checkpoints at a URL: an object store has no rename, so the manifest alone says what is
complete.
"""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest
import requests
from s3fs import S3File

from mmjax import config as configs
from mmjax import files
from mmjax.config import UserError
from mmjax.state import checkpoint, manifest
from mmjax.state.checkpointer import Checkpointer


@pytest.fixture
def saver(object_store, request):
  """saver(**changes) -> a Checkpointer of a run of this test's own in the store."""

  def make(**changes):
    c = configs.base()
    c.checkpoint.every, c.checkpoint.keep = 0, 2
    config = configs.resolve(c, [f"{path}={value!r}" for path, value in changes.items()])
    return Checkpointer(f"s3://bucket/{request.node.name}", config, steps=100)

  make.url = f"s3://bucket/{request.node.name}"
  return make


def equal(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
  )


def test_what_was_saved_comes_back_on_another_mesh_and_the_oldest_goes(saver, make_state, spec_on):
  writer = saver()
  for step in (1, 2, 3):
    assert writer.save(
      step,
      make_state(step),
      data=dict(step=step),
      config=dict(a=1),
      assets=dict(tokenizer=b"\0\1"),
      force=True,
    )
  writer.close()
  assert sorted(p.name for p in files.as_path(f"{saver.url}/checkpoints").iterdir()) == ["2", "3"]
  state, data, step = saver().restore(spec_on(2))
  assert step == 3 and data == {"step": 3} and equal(state, make_state(3, 2))
  assert state.params["image"]["layers"]["kernel"].sharding.num_devices == 2
  assert equal(checkpoint.load_params(saver.url), jax.device_get(make_state(3).params))
  assert checkpoint.load_assets(f"{saver.url}/checkpoints/2") == {"tokenizer": b"\0\1"}


def test_a_folder_without_its_manifest_is_half_written(saver, make_state, spec_on, caplog):
  writer = saver()
  for step in (1, 2):
    writer.save(step, make_state(step), force=True)
  writer.close()
  folder = files.as_path(f"{saver.url}/checkpoints/2")
  (folder / manifest.NAME).unlink()
  again = saver()
  assert again.latest_step() == 1
  with caplog.at_level(logging.WARNING, "mmjax"):
    assert again.restore(spec_on(8))[2] == 1
  assert "checkpoints/2 is half-written" in caplog.text
  again.save(2, make_state(5), force=True)  # the same step again, over what was left
  again.save(3, make_state(6), force=True, metrics={"a": 1.0})
  again.save(3, make_state(6), metrics={"a": 2.0})
  again.close()
  assert equal(saver().restore(spec_on(8), only=2)[0], make_state(5))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
  saver, make_state, spec_on, caplog
):
  writer = saver()
  for step in (1, 2):
    writer.save(step, make_state(step), force=True)
  writer.close()
  folder = files.as_path(f"{saver.url}/checkpoints/2")
  (folder / "rest/_METADATA").write_text("{}")
  with caplog.at_level(logging.WARNING, "mmjax"):
    assert saver().restore(spec_on(8))[2] == 1
  assert "rest/_METADATA has 2 bytes" in caplog.text


def test_a_store_that_does_not_answer_makes_no_checkpoint_corrupt(
  saver, make_state, spec_on, monkeypatch
):
  writer = saver()
  for step in (1, 2):
    writer.save(step, make_state(step), force=True)
  writer.close()
  real = S3File._fetch_range

  def told(name, ask):
    def refuse(self, start, end):
      if self.path.endswith(f"/2/{name}"):
        raise PermissionError("Forbidden")
      return real(self, start, end)

    with (
      monkeypatch.context() as patch,
      pytest.raises(UserError, match=f"{saver.url}/checkpoints/2/{name} cannot be read: Forbidden"),
    ):
      patch.setattr(S3File, "_fetch_range", refuse)
      ask()

  for name in (manifest.NAME, "params/_METADATA"):
    told(name, lambda: saver().restore(spec_on(8)))
    told(name, lambda: checkpoint.find_checkpoint(saver.url))
  told(manifest.NAME, lambda: saver().save(2, make_state(3), force=True))
  assert saver().restore(spec_on(8))[2] == 2


def test_an_import_goes_to_a_store(saver, make_state):
  checkpoint.save_import(saver.url, make_state(1).params, dict(a=1), dict(tokenizer=b"x"))
  assert equal(checkpoint.load_params(saver.url), jax.device_get(make_state(1).params))


def test_a_bucket_that_is_missing_is_one_line(object_store):
  with pytest.raises(
    UserError,
    match="s3://nobody/run/checkpoints: The specified bucket does not exist. Check the bucket's",
  ):
    Checkpointer("s3://nobody/run", configs.resolve(configs.base()), steps=10)
  with pytest.raises(UserError, match="no checkpoint here"):
    checkpoint.find_checkpoint("s3://nobody/run")
  with pytest.raises(UserError, match="ftp://nobody/run: no such kind of store"):
    checkpoint.find_checkpoint("ftp://nobody/run")


def test_a_store_that_refuses_in_the_middle_leaves_what_was_saved(
  object_store, saver, make_state, spec_on
):
  writer = saver()
  writer.save(1, make_state(1), force=True)
  writer.wait()
  writer.save(2, make_state(2), force=True)
  # From now on credentials count, and nobody knows these.
  requests.post(f"{object_store}/moto-api/reset-auth", data="0", timeout=10)
  try:
    with pytest.raises(
      UserError,
      match=f"cannot save checkpoint {saver.url}/checkpoints/2: .* intact. Free space or mend the "
      "folder",
    ):
      writer.close()
    with pytest.raises(
      UserError, match=f"cannot write checkpoints to {saver.url}/checkpoints: The AWS Access Key Id"
    ):
      saver().save(3, make_state(3), force=True)
  finally:
    requests.post(f"{object_store}/moto-api/reset-auth", data="inf", timeout=10)
  assert saver().restore(spec_on(8))[2] == 1
