"""Every row meets every column once, and sums come home, for any grouping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax.config as configs
from mmjax.parallel import collectives
from mmjax.parallel.mesh import make_mesh


@pytest.mark.parametrize("chunk, effective", [(1, 1), (3, 2), (4, 4), (100, 8)])
def test_all_pairs_meet_once(devices, chunk, effective):
  c = configs.base()
  c.mesh.update(data=4, fsdp=2)
  x, y = (np.random.default_rng(s).integers(0, 9, (16, 3)).astype(np.float32) for s in (0, 1))

  def tile(rows, columns, row_sums, column_sums):
    product = rows @ columns.T
    return row_sums + product.sum(1), column_sums + (product**2).sum(0)

  with jax.set_mesh(make_mesh(c)):
    ring = collectives.make_ring(chunk)
    assert ring == (8, effective)

    def function(x, y):
      zeros = jnp.zeros(len(x))
      by_row, by_column, home = ring.visit(tile, x, y, zeros, zeros)
      return by_row, ring.scatter_sum(by_column), home

    by_row, by_column, home = jax.jit(
      collectives.per_device(ring, function, (False, False), (False,) * 3)
    )(x, y)
  np.testing.assert_array_equal(by_row, (x @ y.T).sum(1))
  np.testing.assert_array_equal(by_column, ((x @ y.T) ** 2).sum(0))
  np.testing.assert_array_equal(home, y)


def test_without_a_mesh_there_is_one_device():
  assert collectives.make_ring(8) == (1, 1)


def test_rows_are_padded_to_equal_tiles(monkeypatch):
  monkeypatch.setattr(collectives, "BLOCK", 16)
  monkeypatch.setattr(collectives, "SIDE", 4)
  assert collectives.pad_rows(jnp.ones((10, 2))).shape == (12, 2)  # three tiles of 4
  assert collectives.pad_rows(jnp.ones((4, 2))).shape == (4, 2)
