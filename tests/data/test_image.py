"""Decoding, resizing and augmentation of pictures, against Pillow and by properties."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pillow_heif
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from skimage import data as photographs

from mmjax import config
from mmjax.data import augment, image
from mmjax.data.augment import Augment
from mmjax.data.resample import resize_exact, resize_fast

pillow_heif.register_heif_opener()
PHOTOS = ("astronaut", "chelsea", "coffee")


def photo(name="astronaut", width=500, height=375) -> Image.Image:
  return Image.fromarray(getattr(photographs, name)()).resize(
    (width, height), Image.Resampling.BICUBIC
  )


def encode(picture: Image.Image, kind: str, **options) -> bytes:
  out = io.BytesIO()
  picture.save(out, kind, **options)
  return out.getvalue()


def difference(a, b) -> float:
  return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean()


def reference(data: bytes) -> np.ndarray:
  """Pillow's own way: upright, transparency on white, RGB."""
  picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  if "transparency" in picture.info or picture.mode in ("RGBA", "LA"):
    picture = Image.alpha_composite(
      Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")
    )
  return np.asarray(picture.convert("RGB"))


def with_alpha(picture: Image.Image) -> Image.Image:
  picture = picture.convert("RGBA")
  picture.putalpha(Image.linear_gradient("L").resize(picture.size))
  return picture


SMALL = photo(width=61, height=47)
FORMATS = {
  "jpeg": encode(SMALL, "JPEG", quality=90),
  "jpeg-444": encode(SMALL, "JPEG", quality=95, subsampling=0),
  "jpeg-grey": encode(SMALL.convert("L"), "JPEG"),
  "jpeg-cmyk": encode(SMALL.convert("CMYK"), "JPEG"),
  "jpeg-progressive": encode(SMALL, "JPEG", progressive=True),
  "png": encode(SMALL, "PNG"),
  "png-alpha": encode(with_alpha(SMALL), "PNG"),
  "png-grey": encode(SMALL.convert("L"), "PNG"),
  "png-grey-alpha": encode(with_alpha(SMALL).convert("LA"), "PNG"),
  "png-palette": encode(SMALL.convert("P"), "PNG"),
  "png-palette-transparent": encode(SMALL.convert("P"), "PNG", transparency=3),
  "png-1-bit": encode(SMALL.convert("1"), "PNG"),
  "png-rgb-transparent": encode(SMALL, "PNG", transparency=SMALL.getpixel((0, 0))),
  "webp": encode(SMALL, "WEBP"),
  "webp-lossless-alpha": encode(with_alpha(SMALL), "WEBP", lossless=True),
  "gif": encode(SMALL, "GIF"),
  "bmp": encode(SMALL, "BMP"),
  "tiff": encode(SMALL, "TIFF"),
  "tiff-lzw-cmyk": encode(SMALL.convert("CMYK"), "TIFF", compression="tiff_lzw"),
  "tiff-alpha": encode(with_alpha(SMALL), "TIFF"),
  "tiff-big": encode(SMALL, "TIFF", big_tiff=True),
  "avif": encode(SMALL, "AVIF", quality=90),
  "avif-alpha": encode(with_alpha(SMALL), "AVIF", quality=90),
  "heic": encode(SMALL, "HEIF", quality=90),
  "heic-alpha": encode(with_alpha(SMALL), "HEIF", quality=90),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_as_pillow_does(name):
  pixels = image.decode(FORMATS[name])
  assert pixels.dtype == np.uint8 and pixels.shape == (47, 61, 3) and pixels.flags.c_contiguous
  assert difference(pixels, reference(FORMATS[name])) < 0.5
  assert image.picture_size(FORMATS[name]) == (47, 61)


def test_sixteen_bit_grey_is_scaled_not_clipped():
  grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
  pixels = image.decode(encode(Image.fromarray(grey), "PNG"))
  assert np.abs(pixels[..., 0] - grey / 257.0).max() <= 0.5 + 1e-6
  assert (pixels[..., 0] == pixels[..., 2]).all()


DEEP = np.kron(
  np.random.default_rng(0).integers(0, 65536, (6, 8, 3)).astype(np.uint16),
  np.ones((4, 4, 1), np.uint16),
)


def tiff(pixels, **options) -> bytes:
  out = io.BytesIO()
  tifffile.imwrite(out, pixels, **options)
  return out.getvalue()


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_sixteen_bit_tiffs_are_scaled_whichever_end_is_white(photometric):
  grey = DEEP[..., 0] if photometric == "minisblack" else 65535 - DEEP[..., 0]
  pixels = image.decode(tiff(DEEP[..., 0], photometric=photometric))
  assert np.abs(pixels[..., 0] - grey / 257.0).max() <= 0.5 + 1e-6


def test_sixteen_bit_colours_are_scaled_and_their_alpha_is_on_white():
  deep, alpha = np.dstack([DEEP, DEEP[..., :1]]), DEEP[..., :1] / 65535
  pngs = [
    cv2.imencode(".png", pixels)[1].tobytes()
    for pixels in (DEEP[..., ::-1], deep[..., [2, 1, 0, 3]])
  ]
  for plain in (pngs[0], tiff(DEEP, photometric="rgb")):
    assert np.abs(image.decode(plain) - DEEP / 257.0).max() < 1
  for clear in (pngs[1], tiff(deep, photometric="rgb", extrasamples=["unassalpha"])):
    assert np.abs(image.decode(clear) - (DEEP / 257.0 * alpha + 255 * (1 - alpha))).max() < 2


def test_the_transparent_value_of_a_grey_png_of_sixteen_bits_is_white():
  grey = DEEP[..., 0]
  clear = int(grey[0, 0])
  data = encode(Image.fromarray(grey), "PNG", transparency=clear)
  expected = np.where(grey == clear, 65535, grey) / 257.0
  assert (grey != clear).any() and expected[0, 0] == 255
  assert np.abs(image.decode(data)[..., 0] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bits", [8, 16])
def test_separate_planes_of_a_tiff_are_read_right_or_refused(bits, compression):
  pixels = DEEP if bits == 16 else (DEEP >> 8).astype(np.uint8)
  planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
  data = tiff(planes, photometric="rgb", planarconfig="separate", compression=compression)
  if bits == 16 and compression is None:  # Pillow takes the two bytes of a value for two values
    with pytest.raises(image.Unreadable, match="separate planes"):
      image.decode(data)
  else:
    assert np.abs(image.decode(data) - pixels / (257.0 if bits == 16 else 1)).max() < 1


@pytest.mark.parametrize("alpha", [0, 128])
def test_a_bmp_whose_alpha_is_zero_everywhere_does_not_use_it(alpha):
  picture = SMALL.convert("RGBA")
  picture.putalpha(alpha)
  data = cv2.imencode(".bmp", np.asarray(picture)[..., [2, 1, 0, 3]])[1].tobytes()
  assert Image.open(io.BytesIO(data)).mode == "RGBA"
  expected = np.asarray(SMALL) if not alpha else reference(data)
  assert difference(image.decode(data), expected) < 0.5


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int16, np.int8])
def test_a_picture_without_an_agreed_white_is_refused(kind):
  with pytest.raises(image.Unreadable, match="which value is white"):
    image.decode(tiff(DEEP[..., 0].astype(kind)))


def test_the_first_page_of_a_tiff_is_taken():
  pages = np.stack([DEEP >> 8, 255 - (DEEP >> 8)]).astype(np.uint8)
  np.testing.assert_array_equal(image.decode(tiff(pages, photometric="rgb")), pages[0])


def test_a_tiff_of_huge_tiles_is_refused_before_it_is_decoded():
  data = bytearray(tiff((DEEP >> 8).astype(np.uint8), photometric="rgb", tile=(16, 16)))
  for tag in (322, 323):  # width and length of a tile
    at = data.index(tag.to_bytes(2, "little")) + 2
    data[at : at + 10] = (
      (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + (1 << 15).to_bytes(4, "little")
    )
  with pytest.raises(image.Unreadable, match="tiles"):
    image.decode(bytes(data))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_after_the_end_of_a_picture_are_ignored(name):
  want = image.decode(FORMATS[name])
  for junk in (b"\0", b"a film" * 2000):
    np.testing.assert_array_equal(image.decode(FORMATS[name] + junk), want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_tiff_avif_and_heic_is_honoured(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  want = image.decode(encode(SMALL, "PNG", exif=exif.tobytes()))
  assert difference(image.decode(encode(SMALL, "TIFF", tiffinfo={0x0112: orientation})), want) < 0.5
  for kind in ("AVIF", "HEIF"):
    assert difference(image.decode(encode(SMALL, kind, quality=95, exif=exif.tobytes())), want) < 4


def test_heic_without_its_package_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
  with pytest.raises(image.Unreadable, match=r"mmjax\[heic\]"):
    image.decode(FORMATS["heic"])


def test_the_first_frame_of_an_animation_is_taken():
  frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
  for kind in ("GIF", "WEBP", "AVIF"):
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert difference(image.decode(data), np.full((10, 20, 3), (255, 0, 0))) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(SMALL, kind, exif=exif.tobytes())
  assert difference(image.decode(data), reference(data)) < 0.5


def test_a_turned_jpeg_gives_the_crop_of_the_upright_one():
  big, exif = photo(width=1600, height=1200), Image.Exif()
  exif[0x0112] = 6
  turned = encode(big.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif.tobytes())
  a, b = (
    image.decode_and_transform(
      data, size=64, augment=Augment(crop=(0.3, 0.8)), rng=np.random.default_rng(3)
    )
    for data in (turned, encode(big, "JPEG", quality=95))
  )
  assert difference(a, b) < 2


@pytest.mark.parametrize(
  "name",
  [
    "jpeg",
    "jpeg-cmyk",
    "png",
    "png-alpha",
    "webp",
    "webp-lossless-alpha",
    "gif",
    "bmp",
    "tiff",
    "avif",
    "heic",
  ],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.98])
def test_a_cut_file_is_refused(name, share):
  data = FORMATS[name]
  with pytest.raises(image.Unreadable) as error:
    image.decode(data[: int(len(data) * share)])
  assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
  name=st.sampled_from(sorted(FORMATS)),
  place=st.floats(0, 1),
  junk=st.binary(min_size=1, max_size=8),
)
def test_damaged_bytes_decode_or_are_unreadable_but_nothing_else(name, place, junk):
  data = bytearray(FORMATS[name])
  at = int(place * len(data))
  data[at : at + len(junk)] = junk
  try:
    assert image.decode(bytes(data)).dtype == np.uint8
  except image.Unreadable as error:
    assert "\n" not in str(error)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"hello",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"BM",
    b"RIFF\0\0\0\0WEBP",
    b"II*\0",
    b"\0\0\0\x18ftypavif",
    b"\0\0\0\x18ftypheic",
    b"\0\0\0\x18ftypisom",
    b"\0" * 100,
  ],
)
def test_what_is_no_picture_is_unreadable(data):
  with pytest.raises(image.Unreadable):
    image.decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_than_100_megapixels_are_refused_from_the_header(monkeypatch):
  def never(*_, **__):
    raise AssertionError("decoded")

  monkeypatch.setattr(image.simplejpeg, "decode_jpeg", never)
  monkeypatch.setattr(image, "_decode_pillow", never)
  png, jpeg = bytearray(FORMATS["png"]), bytearray(FORMATS["jpeg"])
  png[16:24] = (20000).to_bytes(4, "big") * 2
  frame = jpeg.index(b"\xff\xc0") + 5
  jpeg[frame : frame + 4] = (20000).to_bytes(2, "big") * 2
  webp, gif, bmp = bytearray(FORMATS["webp"]), bytearray(FORMATS["gif"]), bytearray(FORMATS["bmp"])
  webp[26:30] = gif[6:10] = (12000).to_bytes(2, "little") * 2
  bmp[18:26] = (12000).to_bytes(4, "little") * 2
  tif, avif = bytearray(FORMATS["tiff"]), bytearray(FORMATS["avif"])
  # Other sizes are cut out of a multiple of 64.
  heic = bytearray(encode(SMALL.resize((64, 64)), "HEIF"))
  for tag in (256, 257):  # width and height
    at = tif.index(tag.to_bytes(2, "little") + (4).to_bytes(2, "little")) + 8
    tif[at : at + 4] = (12000).to_bytes(4, "little")
  for data in (heic, avif):
    for at in [n for n in range(len(data)) if data[n : n + 4] == b"ispe"]:
      data[at + 8 : at + 16] = (12000).to_bytes(4, "big") * 2
  for data in (png, jpeg, webp, gif, bmp, tif, heic, avif):
    with pytest.raises(image.Unreadable, match="megapixels"):
      image.decode(bytes(data))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (48, 48), (97, 300), (500, 700)])
@pytest.mark.parametrize("name", PHOTOS)
def test_fast_resizing_is_within_2_of_255_of_pillow(name, size, interpolation):
  pixels = np.asarray(photo(name))
  exact = resize_exact(pixels, size, interpolation)
  fast = resize_fast(pixels, size, interpolation)
  assert fast.shape == exact.shape == (*size, 3)
  assert difference(exact, fast) < 1


@pytest.mark.parametrize("width,height", [(500, 375), (700, 900), (1500, 1000), (2300, 1700)])
@pytest.mark.parametrize("name", PHOTOS)
def test_random_crops_of_jpegs_are_within_2_of_255_of_pillow(name, width, height):
  data = encode(photo(name, width, height), "JPEG", quality=90, subsampling="4:2:0")
  for seed in range(3):
    settings_ = Augment(crop=(0.5, 1.0))
    box, _ = image.jpeg_crop(
      settings_.box(height, width, settings_.draw(np.random.default_rng(seed))), 224
    )
    pillow = (
      Image.open(io.BytesIO(data))
      .convert("RGB")
      .crop(box)
      .resize((224, 224), Image.Resampling.BICUBIC)
    )
    ours = image.decode_and_transform(
      data, size=224, augment=settings_, rng=np.random.default_rng(seed)
    )
    assert difference(ours, pillow) < 2


def test_shrinking_does_not_alias():
  # The finest pattern there is: any honest filter gives even grey.
  checks = np.indices((512, 512)).sum(0) % 2 * 255
  pixels = np.repeat(checks[..., None], 3, 2).astype(np.uint8)
  for size in (48, 100, 224):
    assert resize_fast(pixels, (size, size), "bicubic")[2:-2, 2:-2].std() < 3


@pytest.mark.parametrize("width,height", [(500, 375), (375, 500), (64, 64), (33, 200)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_resizing_then_cutting_the_centre(width, height, interpolation):
  picture = photo(width=width, height=height)
  ours = image.decode_and_transform(
    encode(picture, "PNG"), size=48, resize="shortest", interpolation=interpolation
  )
  scale = 48 / min(width, height)
  w, h = (48 if n == min(width, height) else int(n * scale) for n in (width, height))
  resized = picture.resize((w, h), getattr(Image.Resampling, interpolation.upper()))
  left, top = round((w - 48) / 2), round((h - 48) / 2)
  assert (
    np.abs(ours.astype(int) - np.asarray(resized.crop((left, top, left + 48, top + 48)))).max() <= 2
  )


def test_squash_and_longest():
  picture = photo(width=100, height=50)
  squashed = image.decode_and_transform(encode(picture, "PNG"), size=48, resize="squash")
  assert np.array_equal(squashed, np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)))
  padded = image.decode_and_transform(encode(picture, "PNG"), size=48, resize="longest")
  assert (padded[:12] == 255).all() and (padded[36:] == 255).all()
  assert np.array_equal(
    padded[12:36], np.asarray(picture.resize((48, 24), Image.Resampling.BICUBIC))
  )


EVERYTHING = dict(
  crop=(0.5, 1.0),
  flip=0.5,
  rotate=15.0,
  scale=(0.8, 1.2),
  shift=0.1,
  jitter=(0.4, 0.4, 0.4, 0.1),
  randaugment=2,
  erase=0.5,
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(FORMATS)))
def test_the_same_seed_gives_the_same_pixels(seed, name):
  a, b = (
    image.decode_and_transform(
      FORMATS[name], size=24, augment=Augment(**EVERYTHING), rng=np.random.default_rng(seed)
    )
    for _ in range(2)
  )
  assert a.shape == (24, 24, 3) and a.dtype == np.uint8 and a.flags.c_contiguous
  assert np.array_equal(a, b)


def test_other_seeds_give_other_pixels():
  pictures = {
    image.decode_and_transform(
      FORMATS["png"], size=24, augment=Augment(**EVERYTHING), rng=np.random.default_rng(seed)
    ).tobytes()
    for seed in range(20)
  }
  assert len(pictures) == 20


@settings(max_examples=200, deadline=None)
@given(
  height=st.integers(1, 3000),
  width=st.integers(1, 3000),
  low=st.floats(0.01, 1),
  high=st.floats(0.01, 1),
  seed=st.integers(0, 2**32),
)
def test_crop_boxes_are_inside(height, width, low, high, seed):
  low, high = min(low, high), max(low, high)
  draws = np.random.default_rng(seed).random(40)
  left, top, right, bottom = augment.crop_box(height, width, (low, high), (0.75, 4 / 3), draws)
  assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_crops_cover_the_range_of_areas_and_aspects():
  boxes = [
    augment.crop_box(400, 500, (0.2, 0.6), (0.75, 4 / 3), np.random.default_rng(seed).random(40))
    for seed in range(500)
  ]
  area = np.array([(right - left) * (bottom - top) / 200_000 for left, top, right, bottom in boxes])
  aspect = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
  assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
  assert 0.73 < aspect.min() < 0.8 and 1.28 < aspect.max() < 1.36


def test_switching_one_operation_on_leaves_the_draws_of_the_others():
  crop = Augment(crop=(0.3, 0.6))
  both = Augment(crop=(0.3, 0.6), flip=1.0)
  a, b = (
    image.decode_and_transform(
      FORMATS["png"], size=24, augment=settings_, rng=np.random.default_rng(5)
    )
    for settings_ in (crop, both)
  )
  assert np.array_equal(a[:, ::-1], b)


def test_warp_moves_turns_and_zooms():
  pixels = np.zeros((9, 9, 3), np.uint8)
  pixels[4, 6] = 255
  # Counter-clockwise: right goes up.
  assert augment.warp(pixels, 90, 1, (0, 0), 7)[2, 4].tolist() == [255] * 3
  assert augment.warp(pixels, 0, 1, (1 / 9, 0), 7)[4, 7].tolist() == [255] * 3
  assert (augment.warp(pixels, 0, 1, (1 / 9, 0), 7)[:, 0] == 7).all()
  assert augment.warp(pixels, 0, 2, (0, 0), 7)[4, 8].tolist() == [255] * 3


def test_colour_adjustments_equal_pillows():
  from PIL import ImageEnhance

  pixels = np.asarray(SMALL)
  for ours, pillow in (
    (augment.adjust_brightness, ImageEnhance.Brightness),
    (augment.adjust_contrast, ImageEnhance.Contrast),
    (augment.adjust_saturation, ImageEnhance.Color),
  ):
    for factor in (0.3, 1.0, 1.7):
      assert (
        np.abs(ours(pixels, factor).astype(int) - np.asarray(pillow(SMALL).enhance(factor))).max()
        <= 2
      )
  hsv = np.array(SMALL.convert("HSV"))
  hsv[..., 0] += np.uint8(51)
  turned = Image.fromarray(hsv, "HSV").convert("RGB")
  assert difference(augment.adjust_hue(pixels, 0.2), turned) < 3


@pytest.mark.parametrize("name", augment.RANDAUGMENT)
def test_each_randaugment_operation_runs_both_ways(name):
  for strength in (-1.0, -0.5, 0.0, 0.9):
    out = augment.RANDAUGMENT[name](SMALL, strength, 128)
    assert out.size == SMALL.size and out.mode == "RGB"
    if strength == 0 and name not in ("autocontrast", "equalize"):
      assert difference(out, SMALL) < 1


def test_erasing_changes_one_box():
  pixels = np.full((50, 60, 3), 9, np.uint8)
  changed = 0
  for seed in range(100):
    rng = np.random.default_rng(seed)
    out = augment.erase(pixels, 0.5, rng.random(7), rng)
    rows, columns = np.nonzero((out != 9).any(-1))
    if len(rows):
      changed += 1
      share = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / 3000
      assert 0.015 < share < 0.36 and len(rows) > 0.99 * share * 3000 - 1
  assert 35 < changed < 65
  assert (pixels == 9).all()


def test_the_transform_of_a_config():
  c = config.base()
  c.data.image.size = 32
  c.data.image.augment.crop = (0.5, 1.0)
  resolved = config.resolve(c).data.image
  train, evaluation = (
    image.ImageTransform(resolved, train=True),
    image.ImageTransform(resolved, train=False),
  )
  a, b = (
    train(FORMATS["jpeg"], np.random.default_rng(0)),
    train(FORMATS["jpeg"], np.random.default_rng(1)),
  )
  assert a.shape == (32, 32, 3) and not np.array_equal(a, b)
  assert np.array_equal(
    evaluation(FORMATS["jpeg"], None), evaluation(image.decode(FORMATS["jpeg"]), None)
  )
  assert set(resolved.augment.to_dict()) == {
    field.name for field in augment.dataclasses.fields(Augment)
  }


@pytest.mark.parametrize("size", [(60, 91), (75, 40), (32, 32)])
def test_a_centre_crop_keeps_its_share(size):
  """Against Pillow in two steps: the shortest side to size / crop, then the centre."""
  smooth = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
  picture = Image.fromarray(smooth).resize((size[1], size[0]), Image.Resampling.BICUBIC)
  h, w = (36 if n == min(size) else int(36 * n / min(size)) for n in size)
  top, left = (h - 32) // 2, (w - 32) // 2
  want = np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC))[
    top : top + 32, left : left + 32
  ].astype(int)
  got = image.decode_and_transform(np.asarray(picture), size=32, crop=32 / 36)
  np.testing.assert_array_equal(got, want)
  whole = image.decode_and_transform(np.asarray(picture), size=32)
  assert np.abs(whole - want).max() > 5


def test_a_picture_of_one_pixel_fits_too():
  data = encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG")
  for augmentation in (None, Augment(), Augment(**EVERYTHING)):
    for resize in ("shortest", "squash", "longest"):
      out = image.decode_and_transform(
        data, size=16, resize=resize, augment=augmentation, rng=np.random.default_rng(0)
      )
      assert out.shape == (16, 16, 3)
