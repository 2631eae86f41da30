"""What users give a model (paths, bytes, arrays, PIL pictures) as the arrays of a batch, one
example at a time.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from mmjax.data.clips import ClipTransform
from mmjax.data.faults import CutMedia
from mmjax.data.image import Unreadable
from mmjax.data.media import WORDS
from mmjax.data.modality_readers import READERS
from mmjax.data.placeholders import mixes_tokens
from mmjax.data.series import read_series
from mmjax.data.tiles import Tiling, cut_into_tiles
from mmjax.files import read_file

Item = str | os.PathLike | bytes | np.ndarray | Image.Image | dict[str, np.ndarray]
_AXES = {"image": 3, "audio": 1, "video": 4, "series": 2}  # of one item that is an array


class MediaInputs:
  """One modality of a config: `inputs(item, name)` -> its arrays for one example, {array: [...]},
  as an evaluation makes them.

  An item is a path, encoded bytes, or an array: uint8 [H, W, 3] of a picture (or a PIL image),
  float [n] or [n, channels] of a sound at the config's rate (-1 to 1, or int16), uint8 [T, H, W, 3]
  of a video, numbers [T, C] of a series (whose files are .npy or text, a step a line), or what this
  returned for one. Raises Unreadable, which names the item.
  Where data.image.tiles cuts pictures, the arrays of one have an axis of tiles first, and those of
  a clip one of pictures where data.video.group is above 0; `slots` takes them apart.
  """

  def __init__(self, config, modality: str):
    reader = READERS[modality](config.data, False)
    self.modality, self.reader, self.cut = modality, reader, CutMedia()
    self.rate = config.data.audio.rate
    self.image = config.data.image
    self.joins = modality == "image" and mixes_tokens(config.data)
    reads_clips = modality == "video" and config.data.video.group
    self.clip = ClipTransform(config.data.image, config.data.video) if reads_clips else None
    self.tiled = self.joins or (modality == "image" and self.image.tiles.most > 1)
    self.arrays = {name: dtype for name, (_, dtype) in reader.shapes.items() if name != "key"}

  def __call__(self, item: Item, name: str = "") -> dict[str, np.ndarray]:
    if isinstance(item, dict):
      return self._checked(item, name)
    try:
      if self.tiled:
        pixels = self.reader.decode(self._content(item))
        tiles, tiling = cut_into_tiles(pixels, self.image)
        several = {"among": cut_into_tiles(pixels, self.image, False)[0]} if self.joins else {}
        return {"pixels": tiles, "tiling": np.array(tiling), **several}
      if self.clip:
        return self.clip(self._content(item))
      arrays, surplus = self.reader.example(self._content(item), None)
    except Unreadable as error:
      raise Unreadable(f"{name or self._name(item)}: {error}") from error
    if surplus:
      self.cut.add([(self.modality, name or self._name(item), surplus)])
    return {
      name: np.asarray(x, dtype)
      for (name, dtype), x in zip(self.arrays.items(), arrays, strict=True)
    }

  def slots(
    self, arrays: dict[str, np.ndarray], alone: bool = True
  ) -> tuple[list[dict[str, np.ndarray]], Tiling]:
    """(what a call returned for one item, as the arrays of each slot that it fills; how its tiles
    lie). alone: no other of its modality is in the prompt.
    """
    if self.clip:
      count = len(arrays["time"])
      return [{name: x[i] for name, x in arrays.items()} for i in range(count)], Tiling()
    if not self.tiled:
      return [arrays], Tiling()
    if self.joins and not alone:
      return [{"pixels": tile} for tile in arrays["among"]], Tiling()
    return [{"pixels": tile} for tile in arrays["pixels"]], Tiling(*arrays["tiling"].tolist())

  def sound(self, item: Item, name: str = "") -> np.ndarray | dict[str, np.ndarray]:
    """The whole of a sound, float32 [n] at the config's rate, however long; what is already arrays
    stays. Raises Unreadable.
    """
    if isinstance(item, dict):
      return self._checked(item, name)
    from mmjax.data.audio import decode_audio

    try:
      content = self._content(item)
      sound = decode_audio(content, self.rate) if isinstance(content, bytes) else content
      if not len(sound):
        raise Unreadable("audio of zero length")
      return sound
    except Unreadable as error:
      raise Unreadable(f"{name or self._name(item)}: {error}") from error

  def _checked(self, arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """What is already arrays, as it is. Raises Unreadable: there are others than those wanted."""
    wanted = dict.fromkeys((*self.arrays, "pixels", "features"))
    if not any(isinstance(arrays.get(one), np.ndarray) for one in wanted):
      given = ", ".join(map(repr, arrays)) or "nothing"
      raise Unreadable(
        f"{name or 'a dict'}: has {given:.200}, but of arrays it must have one of "
        f"{', '.join(wanted)}"
      )
    return arrays

  def items(self, given: Item | Iterable[Item]) -> Iterable[Item]:
    """Several items, of one or of several."""
    if isinstance(given, (str, os.PathLike, bytes, Image.Image, dict)):
      return [given]
    if isinstance(given, np.ndarray) and given.ndim <= _AXES[self.modality]:
      return [given]
    return given

  def _content(self, item: Item) -> bytes | np.ndarray:
    """What the transform takes. Raises Unreadable."""
    if isinstance(item, (str, os.PathLike)):
      try:
        item = read_file(item)
      except OSError as error:
        raise Unreadable(f"cannot be opened ({error.strerror or error})") from error
    if self.modality == "series":
      return read_series(item) if isinstance(item, bytes) else np.asarray(item)
    if isinstance(item, bytes):
      return item
    if self.modality == "image" and isinstance(item, Image.Image):
      return _png(item)
    return getattr(self, f"_{self.modality}")(np.asarray(item))

  def _image(self, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
      raise Unreadable(
        f"must be uint8 of shape [H, W, 3], but is {array.dtype} of shape {list(array.shape)}"
      )
    return array

  def _audio(self, array: np.ndarray) -> np.ndarray:
    if array.ndim not in (1, 2) or not (
      array.dtype == np.int16 or np.issubdtype(array.dtype, np.floating)
    ):
      raise Unreadable(
        f"must be float or int16 of shape [n] or [n, channels], but is {array.dtype} of shape "
        f"{list(array.shape)}"
      )
    sound = array.astype(np.float32) / (32768 if array.dtype == np.int16 else 1)
    if not np.isfinite(sound).all():
      raise Unreadable("audio with samples that are not numbers")
    return sound.mean(1) if sound.ndim == 2 else sound

  def _video(self, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
      raise Unreadable(
        f"must be uint8 of shape [T, H, W, 3], but is {array.dtype} of shape {list(array.shape)}"
      )
    return array

  def _name(self, item: Item) -> str:
    return (
      str(item)
      if isinstance(item, (str, os.PathLike))
      else f"a {WORDS[self.modality]} given as {type(item).__name__}"
    )


def _png(picture: Image.Image) -> bytes:
  data = io.BytesIO()
  upright = ImageOps.exif_transpose(picture)
  (
    upright
    if upright.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
    else upright.convert("RGB")
  ).save(data, "PNG", compress_level=0)
  return data.getvalue()
