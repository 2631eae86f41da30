"""The basket_prices builder: a value is what the goods of a picture and the row of its table make,
which neither says alone.
"""

import io

import numpy as np
from PIL import Image

from mmjax.data.builders.basket_prices import COUNTS, DISCOUNT, PRICES, QUANTITY, SIZE, make_record


def test_a_value_is_what_the_goods_cost_by_number_and_discount():
  for number in range(100):
    record = make_record("train", number)
    goods = [one["name"] for one in record["facts"]["objects"]]
    assert COUNTS[0] <= len(goods) <= COUNTS[1]
    ((quantity, discount),) = record["series"]
    assert QUANTITY[0] <= quantity <= QUANTITY[1] and DISCOUNT[0] <= discount <= DISCOUNT[1]
    cost = quantity * (1 - discount) * sum(PRICES[name] for name in goods)
    np.testing.assert_allclose(record["value"], [cost], rtol=1e-5)
    assert Image.open(io.BytesIO(record["image"])).size == (SIZE, SIZE)


def test_neither_the_goods_nor_the_table_say_the_value_alone():
  records = [make_record("train", number) for number in range(400)]
  values = np.array([record["value"][0] for record in records])
  baskets = np.array([[record["facts"]["basket"]] for record in records])
  tables = np.array([record["series"][0] for record in records])

  def explained(columns: np.ndarray) -> float:
    columns = np.column_stack([columns, np.ones(len(columns))])
    left = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    return 1 - left.var() / values.var()

  assert 0.2 < explained(baskets) < 0.7 and 0.2 < explained(tables) < 0.7
  assert explained(baskets * tables[:, :1] * (1 - tables[:, 1:])) > 0.9999


def test_no_picture_is_in_two_splits():
  keys = [
    {make_record(split, number)["image_key"] for number in range(200)}
    for split in ("train", "validation", "test")
  ]
  assert len(set.union(*keys)) == 600


def test_a_record_is_a_function_of_its_split_and_number():
  first, again = (make_record("test", 3) for _ in range(2))
  assert first["image"] == again["image"] and first["value"] == again["value"]
