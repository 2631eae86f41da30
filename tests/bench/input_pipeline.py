"""Examples per second of the input pipeline on one core, beside the same work in Pillow as
open_clip does it.

  python tests/bench/input_pipeline.py [--seconds 20] [--size 224] [--json FILE]

Work: a JPEG (three scikit-image photographs at 500x375, quality 90, 4:2:0) to a random resized crop
of scale 0.9 to 1, bicubic and antialiased. Pillow: Image.open, convert("RGB"), crop, resize, array,
which is what torchvision's RandomResizedCrop does with a PIL picture. Both sides take the same
boxes, run in turns of a few pictures on the same core, and are compared pixel by pixel.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from pathlib import Path

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from skimage import data as photographs  # noqa: E402

from mmjax.data import image  # noqa: E402
from mmjax.data.augment import Augment  # noqa: E402

TURN = 12  # pictures a side before the other one runs


def jpegs(width: int = 500, height: int = 375) -> list[bytes]:
  out = []
  for picture in (photographs.astronaut(), photographs.chelsea(), photographs.coffee()):
    file = io.BytesIO()
    small = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    small.save(file, "JPEG", quality=90, subsampling="4:2:0")
    out.append(file.getvalue())
  return out


def by_pillow(data: bytes, size: int, augment: Augment, seed: int) -> np.ndarray:
  """open_clip's training transform up to ToTensor, at the box that `by_mmjax` takes (its cost is on
  both sides).
  """
  picture = Image.open(io.BytesIO(data)).convert("RGB")
  box, _ = image.jpeg_crop(
    augment.box(picture.height, picture.width, augment.draw(np.random.default_rng(seed))), size
  )
  return np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def by_mmjax(data: bytes, size: int, augment: Augment, seed: int) -> np.ndarray:
  return image.decode_and_transform(
    data, size=size, augment=augment, rng=np.random.default_rng(seed)
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=20.0)
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--json", metavar="FILE")
  options = parser.parse_args()
  pictures, augment = jpegs(), Augment(crop=(0.9, 1.0))
  sides = {"pillow": by_pillow, "mmjax": by_mmjax}
  differences = []
  for seed in range(10):
    for data in pictures:
      ours, theirs = (
        side(data, options.size, augment, seed).astype(int) for side in (by_mmjax, by_pillow)
      )
      differences.append(np.abs(ours - theirs).mean())
  times: dict[str, list[float]] = {name: [] for name in sides}
  seed, end = 0, time.perf_counter() + options.seconds
  while time.perf_counter() < end:
    for name, transform in sides.items():
      # The processor's time of this process: other programs on the core do not count.
      start = time.process_time()
      for n in range(TURN):
        transform(pictures[n % len(pictures)], options.size, augment, seed + n)
      times[name].append((time.process_time() - start) / TURN)
    seed += TURN
  rate = {name: 1 / statistics.median(values) for name, values in times.items()}
  ratios = [a / b for a, b in zip(times["pillow"], times["mmjax"], strict=True)]
  result = dict(
    pillow=rate["pillow"],
    mmjax=rate["mmjax"],
    ratio=statistics.median(ratios),
    turns=len(ratios),
    mean_difference=float(np.mean(differences)),
    largest_mean_difference=float(np.max(differences)),
  )
  print(
    f"Pillow {rate['pillow']:.0f}, mmjax {rate['mmjax']:.0f} examples/s on one core: "
    f"{result['ratio']:.2f} times (median of {len(ratios)} turns); mean difference "
    f"{result['mean_difference']:.2f} of 255 (largest of a picture "
    f"{result['largest_mean_difference']:.2f})"
  )
  if options.json:
    Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
