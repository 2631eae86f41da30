"""Random changes of a picture, each a pure function of the picture, settings and numbers drawn from
one generator.

`Augment` holds the settings (data.image.augment.*). `Augment.draw(rng)` draws 64 uniform numbers;
every operation reads its own of them, so that switching one on or off leaves the draws of the
others as they were. Order of the operations:

  1. random resized crop   `crop_box`     image.py cuts and resizes, decoding only what it needs
  2. rotate, scale, shift  `warp`         one bilinear affine map about the centre; uncovered pixels
                                          get `fill`
  3. flip                                 horizontal, with probability `flip`
  4. colour jitter         `jitter`       brightness, contrast, saturation, hue in random order, as
                                          torchvision's ColorJitter
  5. RandAugment           `randaugment`  Cubuk et al. 2020 (arXiv:1909.13719), its 14 operations
  6. random erasing        `erase`        Zhong et al. 2020 (arXiv:1708.04896): noise in a box
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mmjax.data.resample import antialias

# Which of a row's 64 random numbers each step takes.
_CROP, _WARP, _FLIP, _JITTER, _ERASE = (
  slice(0, 40),
  slice(40, 44),
  44,
  slice(45, 53),
  slice(53, 60),
)


@dataclasses.dataclass(frozen=True)
class Augment:
  """Settings of data.image.augment (see config.py for their meaning). The defaults change
  nothing.
  """

  crop: tuple[float, float] = (1.0, 1.0)
  aspect: tuple[float, float] = (0.75, 4 / 3)
  flip: float = 0.0
  rotate: float = 0.0
  scale: tuple[float, float] = (1.0, 1.0)
  shift: float = 0.0
  jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
  randaugment: int = 0
  randaugment_magnitude: int = 9
  erase: float = 0.0
  fill: int = 255

  @property
  def crops(self) -> bool:
    return tuple(self.crop) != (1.0, 1.0)

  def draw(self, rng: np.random.Generator) -> np.ndarray:
    """The 64 numbers in [0, 1) that `crop_box` and `apply` read."""
    return rng.random(64)

  def box(self, height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the random resized crop of a picture."""
    return crop_box(height, width, self.crop, self.aspect, draws[_CROP])

  def apply(self, pixels: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Operations 2 to 6 on uint8 [H, W, 3] -> the same shape."""
    if self.rotate or self.shift or tuple(self.scale) != (1.0, 1.0):
      angle, zoom, x, y = draws[_WARP]
      pixels = warp(
        pixels,
        (2 * angle - 1) * self.rotate,
        self.scale[0] + zoom * (self.scale[1] - self.scale[0]),
        ((2 * x - 1) * self.shift, (2 * y - 1) * self.shift),
        self.fill,
      )
    if draws[_FLIP] < self.flip:
      pixels = cv2.flip(pixels, 1)
    if any(self.jitter):
      pixels = jitter(pixels, self.jitter, draws[_JITTER])
    if self.randaugment:
      pixels = randaugment(
        pixels, self.randaugment_magnitude, self.fill, rng.random((self.randaugment, 2))
      )
    if self.erase:
      pixels = erase(pixels, self.erase, draws[_ERASE], rng)
    return pixels


def crop_box(
  height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], draws: np.ndarray
) -> tuple[int, int, int, int]:
  """A box of a random share of the area and a log-uniform aspect ratio width / height, inside the
  picture.

  `draws` [40]: ten tries of (area, aspect, left, top); if none fits, the largest centred box within
  the aspect range, as torchvision does.
  """
  low, high = math.log(aspect[0]), math.log(aspect[1])
  for share, ratio, left, top in draws.reshape(10, 4).tolist():
    target = height * width * (area[0] + share * (area[1] - area[0]))
    ratio = math.exp(low + ratio * (high - low))
    w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
      return x, y, x + w, y + h
  ratio = min(max(width / height, aspect[0]), aspect[1])
  w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
  x, y = (width - w) // 2, (height - h) // 2
  return x, y, x + w, y + h


def warp(
  pixels: np.ndarray, degrees: float, zoom: float, shift: tuple[float, float], fill: int
) -> np.ndarray:
  """Turns counter-clockwise, zooms about the centre, then moves by `shift` (shares of width and
  height).
  """
  height, width = pixels.shape[:2]
  if zoom < 0.9:
    pixels = antialias(pixels, 1 / zoom, 1 / zoom)
  matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, zoom)
  matrix[:, 2] += shift[0] * width, shift[1] * height
  return cv2.warpAffine(
    pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(fill, fill, fill)
  )


def jitter(
  pixels: np.ndarray, strengths: tuple[float, float, float, float], draws: np.ndarray
) -> np.ndarray:
  """torchvision's ColorJitter: factors in [max(0, 1 - s), 1 + s] (hue: +-s turns), in random order.
  `draws` [8].
  """
  for operation in np.argsort(draws[4:]).tolist():
    strength, draw = strengths[operation], draws[operation]
    if not strength:
      continue
    if operation == 3:
      pixels = adjust_hue(pixels, (2 * draw - 1) * strength)
    else:
      low = max(0.0, 1 - strength)
      adjust = (adjust_brightness, adjust_contrast, adjust_saturation)[operation]
      pixels = adjust(pixels, low + draw * (1 + strength - low))
  return pixels


def adjust_brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """pixels * factor."""
  return cv2.addWeighted(pixels, factor, pixels, 0, 0)


def adjust_contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Blends with the mean grey of the picture."""
  mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
  return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean)


def adjust_saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Blends with the grey picture."""
  grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  return cv2.addWeighted(pixels, factor, grey, 1 - factor, 0)


def adjust_hue(pixels: np.ndarray, turns: float) -> np.ndarray:
  """Turns the hue by `turns` of the circle (in 8-bit HSV, as Pillow)."""
  hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(round(turns * 255) % 256)  # wraps
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
  """Pillow's affine map about the centre: `matrix` (a, b, c, d, e, f) takes an output point to its
  source.
  """
  a, b, c, d, e, f = matrix
  x, y = (image.width - 1) / 2, (image.height - 1) / 2
  data = (a, b, x - a * x - b * y + c, d, e, y - d * x - e * y + f)
  return image.transform(
    image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(fill,) * 3
  )


def _rotate(image: Image.Image, degrees: float, fill: int) -> Image.Image:
  return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(fill, fill, fill))


# name -> function(image, signed strength in [-1, 1], fill). Ranges of Cubuk et al. 2020 as in
# torchvision.
RANDAUGMENT = {
  "identity": lambda image, m, fill: image,
  "shear_x": lambda image, m, fill: _affine(image, (1, 0.3 * m, 0, 0, 1, 0), fill),
  "shear_y": lambda image, m, fill: _affine(image, (1, 0, 0, 0.3 * m, 1, 0), fill),
  "translate_x": lambda image, m, fill: _affine(
    image, (1, 0, 150 / 331 * m * image.width, 0, 1, 0), fill
  ),
  "translate_y": lambda image, m, fill: _affine(
    image, (1, 0, 0, 0, 1, 150 / 331 * m * image.height), fill
  ),
  "rotate": lambda image, m, fill: _rotate(image, 30 * m, fill),
  "brightness": lambda image, m, fill: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
  "saturation": lambda image, m, fill: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
  "contrast": lambda image, m, fill: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
  "sharpness": lambda image, m, fill: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
  "posterize": lambda image, m, fill: ImageOps.posterize(image, 8 - round(4 * abs(m))),
  "solarize": lambda image, m, fill: ImageOps.solarize(image, round(255 * (1 - abs(m)))),
  "autocontrast": lambda image, m, fill: ImageOps.autocontrast(image),
  "equalize": lambda image, m, fill: ImageOps.equalize(image),
}


def randaugment(pixels: np.ndarray, magnitude: int, fill: int, draws: np.ndarray) -> np.ndarray:
  """`draws` [N, 2]: N operations of `RANDAUGMENT` at `magnitude` of 10, each with a random sign."""
  image = Image.fromarray(pixels)
  operations = list(RANDAUGMENT.values())
  for which, sign in draws.tolist():
    image = operations[int(which * len(operations))](
      image, magnitude / 10 * (1 if sign < 0.5 else -1), fill
    )
  return np.array(image)


def erase(
  pixels: np.ndarray, probability: float, draws: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Noise in a box of 2% to 33% of the area, aspect 0.3 to 3.3. `draws` [7]: whether, then area,
  aspect, top, left.
  """
  if draws[0] >= probability:
    return pixels
  height, width = pixels.shape[:2]
  area, ratio = (
    height * width * (0.02 + 0.31 * draws[1]),
    math.exp(math.log(0.3) + draws[2] * math.log(3.3 / 0.3)),
  )
  h, w = (
    min(height, max(1, round(math.sqrt(area * ratio)))),
    min(width, max(1, round(math.sqrt(area / ratio)))),
  )
  y, x = int(draws[3] * (height - h + 1)), int(draws[4] * (width - w + 1))
  pixels = pixels.copy()
  pixels[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
  return pixels
