"""Names of slices: what they mean, and the one line for what they do not."""

import os

import pytest

from mmjax.config import UserError
from mmjax.plan import topology


@pytest.mark.parametrize(
  ("name", "kind", "shape", "slices", "chips", "devices"),
  [
    ("v5e-1", "v5e", (1, 1), 1, 1, 1),
    ("v5e-16", "v5e", (4, 4), 1, 16, 16),
    ("v5litepod-8", "v5e", (2, 4), 1, 8, 8),
    ("v5e-256", "v5e", (16, 16), 1, 256, 256),
    ("v6e-128", "v6e", (8, 16), 1, 128, 128),
    ("v4-8", "v4", (2, 2, 1), 1, 4, 4),
    ("v4-32", "v4", (2, 2, 4), 1, 16, 16),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, 64),
    ("V5P-64", "v5p", (2, 4, 4), 1, 32, 32),
    ("7x-16", "7x", (2, 2, 2), 1, 8, 16),
    ("tpu7x-128", "7x", (4, 4, 4), 1, 64, 128),
    ("2xv5e-256", "v5e", (16, 16), 2, 512, 512),
    ("2x7x-16", "7x", (2, 2, 2), 2, 16, 32),
    ("v5p:4x4x12", "v5p", (4, 4, 12), 1, 192, 192),
    ("4xv6e:4x8", "v6e", (4, 8), 4, 128, 128),
    ("h100-80gb-8", "h100-80gb", (8,), 1, 8, 8),
    ("2xH200-8", "h200-141gb", (8,), 2, 16, 16),
    ("a100-40gb-1", "a100-40gb", (1,), 1, 1, 1),
    ("b200-4", "b200-180gb", (4,), 1, 4, 4),
  ],
)
def test_product_names(name, kind, shape, slices, chips, devices):
  found = topology.parse(name)
  assert (found.chip.name, found.shape, found.slices) == (kind, shape, slices)
  assert (found.chips, found.device_count) == (chips, devices)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e-17", ["v5e-16", "chips"]),
    ("v5e-512", ["v5e-256"]),
    ("2xv5e-300", ["2xv5e-256"]),
    ("v4-4", ["v4-8", "cores"]),
    ("v5p-2", ["v5p-8"]),
    ("v5f-16", ["no such TPU", "v5e-16"]),
    ("v5e", ["no such TPU", "v5e-"]),
    ("t4-8", ["no such TPU or GPU", "v5e-16"]),
    ("a100-8", ["which memory", "a100-40gb-8, a100-80gb-8"]),
    ("h100-141gb-8", ["which memory", "h100-80gb-8"]),
    ("h100-80gb-16", ["1 to 8 GPUs", "2xh100-80gb-8"]),
    ("", ["no such TPU"]),
    ("v5e:4x4x4", ["2 dimensions", "v5e:4x4"]),
    ("v5e:64x64", ["at most 256"]),
    ("0xv5e-16", ["1 to 256 slices"]),
  ],
)
def test_other_names_are_refused_in_one_line_with_the_nearest(name, words):
  with pytest.raises(UserError) as error:
    topology.parse(name)
  message = str(error.value)
  assert "\n" not in message and all(word in message for word in words), message


def test_the_matrix_units_at_the_clock_give_the_peak():
  units = {
    "v4": 8 * 128**2,
    "v5e": 4 * 128**2,
    "v5p": 8 * 128**2,
    "v6e": 4 * 256**2,
    "7x": 8 * 256**2,
  }
  for name, chip in topology.CHIPS.items():
    assert 2 * units[name] * chip.clock == pytest.approx(chip.peak, rel=0.01), name


def test_native_noise_stays_off_the_terminal(capfd):
  with topology.quiet():
    os.write(2, b"noise of a library\n")
  os.write(2, b"heard\n")
  assert capfd.readouterr().err == "heard\n"
