"""Encoded picture -> uint8 [size, size, 3]: decoding, cropping, resizing, augmentation. NumPy and
OpenCV, no JAX.

`ImageTransform(config.data.image, train)` is what the pipeline calls. A file is what its first
bytes say, whatever its ending: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, or HEIC (with the package
pillow-heif). It becomes 8-bit RGB:

  orientation     as EXIF, TIFF and HEIF say, so that the picture stands upright
  transparency    composited on white: alpha channels, transparent colours of palettes, grey and
                  RGB; the alpha of a BMP counts where one pixel has any
  16 and 12 bits  scaled to 8 (v * 255 / 65535, rounded for grey, cut for RGB, as Pillow does); 32
                  bits, floats and values with signs have no agreed white and are refused; so are
                  uncompressed TIFFs of 16 bits in separate planes, which Pillow mixes up
  grey, CMYK      as Pillow converts them, colour profiles ignored
  several frames  the first frame of an animation, the first page of a TIFF
  bytes after it  ignored (a phone's video behind a JPEG)

Whatever cannot be decoded whole is `Unreadable`, and so is a picture whose header announces more
than 100 megapixels: nothing of it is decoded.

Training resizes with `resize_fast`, and a large JPEG is decoded at 1/2, 1/4 or 1/8 where the crop
stays at least 1.5 times as large as the output. Evaluation decodes everything and resizes exactly
as Pillow. Order of the augmentation: see augment.py.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, TiffImagePlugin

from mmjax.config import UserError
from mmjax.data.augment import Augment
from mmjax.data.resample import Box, resize_exact, resize_fast

MAX_PIXELS = 100_000_000
# pictures that are resized to at most so many times the output are resized whole, then cropped
_WHOLE = 32
_KEEP = (
  1.5  # a JPEG is decoded smaller only while the crop stays this many times as large as the output
)
_MAGIC = (
  (b"\xff\xd8\xff", "JPEG"),
  (b"\x89PNG\r\n\x1a\n", "PNG"),
  (b"GIF87a", "GIF"),
  (b"GIF89a", "GIF"),
  (b"BM", "BMP"),
  (b"II*\0", "TIFF"),
  (b"MM\0*", "TIFF"),
  (b"II+\0", "TIFF"),
  (b"MM\0+", "TIFF"),
)
_NO_WHITE = (
  "a picture of 32 bits a channel or with signs ({}): which value is white? Save it with 8 or 16 "
  "bits"
)
_AVIF = (b"avif", b"avis")  # brands of an ISO file
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Pillow warns from 89 megapixels on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pictures run in parallel, one a thread or process: threads of OpenCV would get in the way.
cv2.setNumThreads(0)


class Unreadable(UserError):
  """A picture that cannot be decoded. The message is one line; it does not name the record, which
  the caller knows.
  """


class ImageTransform:
  """The picture transform of a config: `transform(data, rng) -> uint8 [size, size, 3]`.

  `data`: encoded bytes, or decoded pixels uint8 [H, W, 3]. With train=False nothing is random and
  `rng` may be None.
  Raises Unreadable.
  """

  def __init__(self, config, train: bool):
    self.size, self.resize, self.interpolation = (
      int(config.size),
      config.resize,
      config.interpolation,
    )
    self.crop = config.crop
    self.augment = Augment(**dict(config.augment.items())) if train else None

  def __call__(
    self, data: bytes | np.ndarray, rng: np.random.Generator | None = None
  ) -> np.ndarray:
    return decode_and_transform(
      data,
      size=self.size,
      resize=self.resize,
      crop=self.crop,
      interpolation=self.interpolation,
      augment=self.augment,
      rng=rng,
    )


def decode_and_transform(
  data: bytes | np.ndarray,
  *,
  size: int,
  resize: Literal["shortest", "squash", "longest"] = "shortest",
  crop: float = 1.0,
  interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic",
  augment: Augment | None = None,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """One picture as the model sees it: bytes (or uint8 [H, W, 3]) -> uint8 [size, size, 3].

  Without `augment` or `rng`: `resize`, exactly as Pillow; "shortest" keeps the share `crop` of the
  shortest side. With both: the operations of augment.py, drawn from `rng` alone.
  Raises Unreadable.
  """
  if augment is None or rng is None:
    return _fit(
      data if isinstance(data, np.ndarray) else decode(data), size, resize, interpolation, crop=crop
    )
  draws = augment.draw(rng)
  if augment.crops:
    pixels = _crop(data, size, interpolation, augment, draws)
  elif resize == "longest":
    pixels = _fit(
      data if isinstance(data, np.ndarray) else decode(data),
      size,
      resize,
      interpolation,
      augment.fill,
    )
  else:
    pixels = data if isinstance(data, np.ndarray) else decode(data)
    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(edge) for edge in _centre(height, width, resize, crop))
    pixels = resize_fast(pixels[top:bottom, left:right], (size, size), interpolation)
  return np.ascontiguousarray(augment.apply(pixels, draws, rng))


def decode(data: bytes, reduction: int = 1) -> np.ndarray:
  """RGB pixels uint8 [H, W, 3], upright. Raises Unreadable.

  `reduction` 2, 4 or 8 gives ceil(H / reduction) x ceil(W / reduction).
  """
  kind, height, width = _header(data)
  if kind == "JPEG":
    orientation = _orientation(data)
    pixels = _decode_jpeg(data, height, width, reduction)
  else:
    pixels, orientation = _decode_pillow(data, kind)
    if reduction > 1:
      pixels = cv2.resize(
        pixels, (-(-width // reduction), -(-height // reduction)), interpolation=cv2.INTER_AREA
      )
  return _upright(pixels, orientation)


def picture_size(data: bytes) -> tuple[int, int]:
  """(height, width) as stored in the header, before the EXIF orientation; decodes nothing. Raises
  Unreadable.
  """
  return _header(data)[1:]


# -- geometry --------------------------------------------------------------------------------------


def _centre(height: int, width: int, resize: str, crop: float) -> Box:
  """The part of a picture that fills a square: all of it (squash), or the share `crop` of the
  central square (shortest).
  """
  if resize == "squash":
    return 0, 0, width, height
  side = min(height, width) * crop
  return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def _fit(
  pixels: np.ndarray, size: int, resize: str, interpolation: str, fill: int = 255, crop: float = 1.0
) -> np.ndarray:
  """Evaluation: resized exactly as Pillow, uint8 [H, W, 3] -> [size, size, 3].

  "shortest" resizes the shortest side to `size` / `crop` and cuts the centre; of an odd margin the
  smaller half lies above or to the left, as the image processors of transformers have it
  (torchvision and open_clip round to the nearest even number).
  """
  height, width = pixels.shape[:2]
  if resize == "longest":
    h, w = (max(1, round(n * size / max(height, width))) for n in (height, width))
    square = np.full((size, size, 3), fill, np.uint8)
    top, left = (size - h) // 2, (size - w) // 2
    square[top : top + h, left : left + w] = resize_exact(pixels, (h, w), interpolation)
    return square
  if resize == "squash":
    return np.ascontiguousarray(resize_exact(pixels, (size, size), interpolation))
  short, target = min(height, width), round(size / crop)
  h, w = (target if n == short else int(target * n / short) for n in (height, width))
  top, left = (h - size) // 2, (w - size) // 2
  if h * w <= _WHOLE * size * size:
    return np.ascontiguousarray(
      resize_exact(pixels, (h, w), interpolation)[top : top + size, left : left + size]
    )
  y, x = height / h, width / w  # a strip: only what is kept, which rounds otherwise
  return np.ascontiguousarray(
    resize_exact(
      pixels, (size, size), interpolation, (left * x, top * y, (left + size) * x, (top + size) * y)
    )
  )


def _crop(
  data: bytes | np.ndarray, size: int, interpolation: str, augment: Augment, draws: np.ndarray
) -> np.ndarray:
  """The random resized crop, of a JPEG decoded no larger than the crop needs."""
  if isinstance(data, np.ndarray) or data[:3] != b"\xff\xd8\xff":
    pixels = data if isinstance(data, np.ndarray) else decode(data)
    height, width = pixels.shape[:2]
    left, top, right, bottom = augment.box(height, width, draws)
  else:
    _, height, width = _header(data)
    if _orientation(data) > 4:
      height, width = width, height
    (left, top, right, bottom), k = jpeg_crop(augment.box(height, width, draws), size)
    pixels = decode(data, k)
    left, top, right, bottom = (edge // k for edge in (left, top, right, bottom))
  return resize_fast(pixels[top:bottom, left:right], (size, size), interpolation)


def jpeg_crop(box: tuple[int, int, int, int], size: int) -> tuple[tuple[int, int, int, int], int]:
  """(box, k): decode at 1/k, k in 1, 2, 4, 8, so that the box stays 1.5 times `size`. Its edges go
  to multiples of k.
  """
  side = min(box[2] - box[0], box[3] - box[1])
  k = max(k for k in (1, 2, 4, 8) if k == 1 or side >= _KEEP * k * size)
  left, top, right, bottom = (round(edge / k) * k for edge in box)
  return (left, top, right, bottom), k


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Undoes an EXIF orientation (1 to 8)."""
  if orientation in (5, 6, 7, 8):
    pixels = pixels.transpose(1, 0, 2)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


# -- decoding --------------------------------------------------------------------------------------


def _header(data: bytes) -> tuple[str, int, int]:
  """(format, height, width) without decoding. Raises Unreadable: unknown, cut within the header,
  too large.
  """
  kind = _kind(data)
  if kind is None:
    raise Unreadable(
      "empty file" if not data else "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC picture"
    )
  try:
    if kind == "JPEG":
      height, width = simplejpeg.decode_jpeg_header(data, strict=False)[:2]
    elif kind == "PNG":
      width, height = struct.unpack(">II", data[16:24])
    elif kind == "WEBP":
      width, height = _webp_size(data)
    else:
      width, height = _open(data, kind).size
  except Unreadable:
    raise
  except Exception as error:  # a decoder may raise anything on bytes from anywhere
    unknown = " or kind of TIFF that Pillow does not read" if kind == "TIFF" else ""
    raise Unreadable(f"broken or cut {kind} header{unknown}{_detail(error)}") from error
  if height * width > MAX_PIXELS:
    raise Unreadable(
      f"{kind} of {width} x {height} = {height * width / 1e6:.0f} megapixels; "
      f"the limit is {MAX_PIXELS // 10**6}"
    )
  if height < 1 or width < 1:
    raise Unreadable(f"{kind} without pixels ({width} x {height})")
  return kind, height, width


def _kind(data: bytes) -> str | None:
  """The format by the first bytes, by Pillow's name; None = none that is read."""
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "WEBP"
  if data[4:8] == b"ftyp":
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, length, 4))]
    if any(brand in _AVIF for brand in brands):
      return "AVIF"
    return "HEIF" if brands[0] in _HEIF else None
  return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def _open(data: bytes, kind: str) -> Image.Image:
  """The picture, not decoded yet. Raises Unreadable: no decoder is installed, a TIFF of huge tiles;
  what Pillow raises.
  """
  if kind == "HEIF":
    try:
      import pillow_heif
    except ImportError as error:
      raise Unreadable(
        "a HEIC picture; reading these needs pillow-heif: pip install 'mmjax[heic]'"
      ) from error
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener(thumbnails=False)
  if kind == "AVIF":
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
  picture = Image.open(io.BytesIO(data), formats=[kind])
  if isinstance(picture, TiffImagePlugin.TiffImageFile):
    _check_tiff(picture)
  return picture


def _check_tiff(picture: TiffImagePlugin.TiffImageFile) -> None:
  """Raises Unreadable: huge tiles, and what Pillow opens but decodes to wrong values."""
  tags = picture.tag_v2
  if tags.get(322, 0) * tags.get(323, 0) > MAX_PIXELS:  # of a tile
    raise Unreadable(f"TIFF whose tiles have more than {MAX_PIXELS // 10**6} megapixels")
  if {2, 3} & set(tags.get(339, ())):  # the format of samples: integers with signs, floats
    raise Unreadable(_NO_WHITE.format("TIFF"))
  planes, raw = tags.get(284, 1) == 2, tags.get(259, 1) == 1
  if planes and raw and max(tags.get(258, (1,))) > 8:
    raise Unreadable(
      "an uncompressed TIFF of 16 bits in separate planes, which Pillow mixes up. Save it "
      "compressed, or with the channels of a pixel together"
    )


def _png_end(data: bytes) -> int:
  """Where the last chunk of a PNG ends; 0 where it has no end."""
  at = 8
  while at + 12 <= len(data):
    length, name = struct.unpack(">I4s", data[at : at + 8])
    at += length + 12
    if name == b"IEND":
      return at
  return 0


def _webp_size(data: bytes) -> tuple[int, int]:
  """(width, height) from the first chunk (RFC 9649). Raises ValueError: the file is shorter than
  its header says.
  """
  if len(data) < 30 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
    raise ValueError("the file is shorter than it says")
  if data[12:16] == b"VP8X":
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
  if data[12:16] == b"VP8L":
    bits = int.from_bytes(data[21:25], "little")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  return struct.unpack("<HH", data[26:30])[0] & 0x3FFF, struct.unpack("<HH", data[26:30])[
    1
  ] & 0x3FFF


def _decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> np.ndarray:
  """libjpeg-turbo; Pillow decides about what it finds odd (CMYK, stray bytes, a cut end)."""
  rows, columns = -(-height // reduction), -(-width // reduction)
  try:
    if simplejpeg.decode_jpeg_header(data, strict=True)[2] in ("YCbCr", "RGB", "Gray"):
      pixels = simplejpeg.decode_jpeg(
        data, "RGB", min_height=rows, min_width=columns, min_factor=reduction
      )
      if pixels.shape[:2] == (rows, columns):
        return pixels
  except ValueError:
    pass
  pixels, _ = _decode_pillow(data, "JPEG")
  return (
    cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA) if reduction > 1 else pixels
  )


def _decode_pillow(data: bytes, kind: str) -> tuple[np.ndarray, int]:
  """(RGB uint8 [H, W, 3], EXIF orientation) of the first frame."""
  if kind == "PNG" and not _png_end(data):
    raise Unreadable("truncated PNG (its end is missing)")
  try:
    image = _open(data, kind)
    image.load()
    orientation = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
    if kind == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getextrema()[1]:
      image = image.convert("RGB")
    return to_rgb(image), orientation
  except Unreadable:
    raise
  except Exception as error:  # as above
    cut = any(word in str(error).lower() for word in ("truncated", "end of file"))
    raise Unreadable(f"truncated {kind}" if cut else f"broken {kind}{_detail(error)}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
  """RGB uint8 [H, W, 3] of a picture of any mode, as the module's docstring says; not turned.
  Raises Unreadable.
  """
  if image.mode.startswith("I;16"):
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of a TIFF: 12 or 16
    white = (1 << bits) - 1
    grey = np.asarray(image).astype(np.uint32)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white
      grey = white - np.minimum(grey, white)
    if "transparency" in image.info:  # of a PNG: one value
      grey = np.where(grey == image.info["transparency"], white, grey)
    return np.repeat(((grey * 255 + white // 2) // white).astype(np.uint8)[..., None], 3, axis=2)
  if image.mode in ("I", "F"):
    raise Unreadable(_NO_WHITE.format(image.mode))
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    image = white
  return np.asarray(image.convert("RGB"))


def _orientation(data: bytes) -> int:
  """EXIF orientation of a JPEG, 1 to 8. Broken metadata does not make a picture unreadable."""
  at = 2  # walks the segments up to the picture itself
  while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (
    b"",
    b"\xc0",
    b"\xc2",
    b"\xda",
  ):
    if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
      try:
        value = Image.open(io.BytesIO(data), formats=["JPEG"]).getexif().get(0x0112, 1)
      except Exception:
        return 1
      return value if value in range(1, 9) else 1
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
  return 1


def _detail(error: Exception) -> str:
  """' (what a decoder said)' in one short line, or '' where it said nothing to people."""
  text = " ".join(str(error).split())
  return "" if " " not in text or "BytesIO" in text else f" ({text[:120]})"
