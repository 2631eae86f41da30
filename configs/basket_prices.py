"""Regression from a picture and a row of a table: what baskets cost, whose goods the picture shows,
and whose number and discount the row has.

mmjax data build basket_prices
mmjax train --config configs/basket_prices.py --workdir runs/basket_prices
mmjax train --config configs/basket_prices.py:series --workdir runs/basket_prices_table
"""

import mmjax


def get_config(arg: str = "both"):
  """arg: "both", or "image" or "series" for a model that sees nothing else."""
  modalities = ("image", "series") if arg == "both" else (arg,)
  c = mmjax.config.base()
  c.train.steps = 1000
  c.train.batch_size = 64
  c.data.sources.baskets = dict(name="basket_prices", cache=True)
  c.data.modalities = modalities
  c.data.image.size = 48
  c.data.image.augment.flip = 0.5
  c.data.image.augment.shift = 0.1
  c.data.series.length, c.data.series.channels = 1, 2  # a row of a table: quantity, discount
  c.data.series.mean, c.data.series.std = (2.0, 0.25), (0.82, 0.14)
  c.data.values = 1

  encoders = dict(
    image=dict(kind="vit", stem="convolution", patch=8, depth=2, heads=4),
    series=dict(kind="series", patch=1, depth=1, heads=4),
  )
  c.model = dict(name="multitask", width=128, joint=False)
  c.model.encoders = {name: encoders[name] for name in modalities}
  if arg == "both":
    c.model.fusion = dict(kind="concat")
  c.precision.compute = "float32"
  c.objectives.predict = dict(kind="regression", modalities=modalities)
  c.optimizer = dict(
    name="muon", lr=9e-3, adam_rate=0.22, b2=0.98, weight_decay=0.1, decay=r".*/kernel", clip=0.0
  )
  c.schedule = dict(name="cosine", warmup="10%", final=0.01)

  price = dict(kind="regression", source="basket_prices", modalities=modalities)
  c.evaluation.evaluators["price/validation"] = dict(**price, split="validation")
  c.evaluation.evaluators["price/test"] = dict(**price, split="test")
  return c
