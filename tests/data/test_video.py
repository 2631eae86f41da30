"""Video files to frames: what is decoded, which frames are chosen, crops that hold for all frames,
damage.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mmjax.data import video
from mmjax.data.image import Unreadable
from mmjax.data.video import VideoTransform, clip_size, decode_clip, decode_video, shown_frames

OFF = dict(crop=(1.0, 1.0), flip=0.0, temporal=(1.0, 1.0))
RNG = np.random.default_rng(0)


def encode(frames, container="matroska", codec="ffv1", pixels="bgr0"):
  out = io.BytesIO()
  with av.open(out, "w", format=container) as file:
    stream = file.add_stream(codec, rate=10)
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
    for frame in frames:
      file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    file.mux(stream.encode())
  return out.getvalue()


def timed(times, last, container="matroska", codec="ffv1", pixels="bgr0"):
  """A clip whose i-th frame begins at times[i] ms, all of its pixels i; the last stays `last` ms
  (where the container says so).
  """
  out = io.BytesIO()
  with av.open(out, "w", format=container) as file:
    stream = file.add_stream(codec, rate=1000)
    stream.height, stream.width, stream.pix_fmt = 16, 16, pixels
    stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
    stays, packets = dict(zip(times, np.diff([*times, times[-1] + last]).tolist(), strict=True)), []
    for number, time in enumerate(times):
      frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), number, np.uint8), format="rgb24")
      frame.pts, frame.time_base = time, Fraction(1, 1000)
      packets += stream.encode(frame)
    for packet in (*packets, *stream.encode()):
      packet.duration = stays[round(packet.pts * packet.time_base * 1000)]
      file.mux(packet)
  return out.getvalue()


def sound_alone():
  out = io.BytesIO()
  soundfile.write(out, np.zeros(4000), 16_000, format="WAV")
  return out.getvalue()


def clip(count=12, height=16, width=16):
  """Noise, the number of the frame in its first pixel."""
  frames = RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
  frames[:, 0, 0] = np.arange(count)[:, None]
  return frames


def transform(train=False, size=16, frames=4, sampling="uniform", **augment):
  return VideoTransform(
    ConfigDict(dict(size=size, frames=frames, sampling=sampling, augment={**OFF, **augment})),
    train=train,
  )


def numbers(frames):
  return frames[:, 0, 0, 0].tolist()


def test_lossless_files_come_back_exactly():
  frames = clip()
  np.testing.assert_array_equal(decode_video(encode(frames)), frames)
  np.testing.assert_array_equal(
    decode_video(encode(frames), lambda count: np.array([1, 5, count - 1])), frames[[1, 5, 11]]
  )


@pytest.mark.parametrize(
  "container, codec, pixels",
  (("mp4", "libx264", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("gif", "gif", "rgb8")),
)
def test_usual_containers(container, codec, pixels):
  y, x = np.mgrid[:48, :64]
  frames = np.stack(
    [np.stack([x * 3, y * 4, np.full_like(x, 20 * i)], -1) for i in range(8)]
  ).astype(np.uint8)
  got = decode_video(encode(frames, "mp4" if container == "mp4" else container, codec, pixels))
  assert got.shape == frames.shape
  assert np.abs(got.astype(int) - frames).mean() < 25


def test_uniform_takes_the_middle_of_equal_parts_and_short_clips_are_masked():
  frames = clip()
  for data in (frames, encode(frames)):
    got, mask = transform()(data)
    assert got.dtype == np.uint8 and got.shape == (4, 16, 16, 3) and mask.all()
    np.testing.assert_array_equal(got, frames[[1, 4, 7, 10]])
  got, mask = transform(frames=5)(frames[:3])
  assert mask.tolist() == [True] * 3 + [False] * 2 and not got[3:].any()
  np.testing.assert_array_equal(got[:3], frames[:3])


# Ten frames in a second, then ten in nine.
SLOWER = [*range(0, 1000, 100), *range(1000, 10_000, 900)]


def seen_at(times, milliseconds):
  """The last frame that has begun."""
  return [max(i for i, time in enumerate(times) if time <= at) for at in milliseconds]


@pytest.mark.parametrize(
  "container, codec, pixels", (("matroska", "ffv1", "bgr0"), ("mp4", "libx264rgb", "rgb24"))
)
def test_a_clip_of_variable_rate_is_sampled_by_time(container, codec, pixels):
  data = timed(SLOWER, 900, container, codec, pixels)
  assert clip_size(data)[0] == pytest.approx(10.0, abs=0.01)
  want = seen_at(SLOWER, (1250, 3750, 6250, 8750))  # the middles of four equal parts
  assert want == [10, 13, 15, 18]
  for content in (data, decode_clip(data)):
    frames, mask = transform()(content)
    np.testing.assert_allclose(numbers(frames), want, atol=1)
    assert mask.all()
  np.testing.assert_allclose(numbers(decode_video(data)), np.arange(20), atol=1)  # each once
  drawn = [
    numbers(transform(train=True, sampling="random")(data, np.random.default_rng(seed))[0])
    for seed in range(20)
  ]
  assert all(first <= 11 for first, *_ in drawn) and len({tuple(d) for d in drawn}) > 5
  assert np.mean([sum(n < 10 for n in d) for d in drawn]) < 1  # by number it would be two of four


@pytest.mark.parametrize(
  "container, codec, pixels",
  (("matroska", "ffv1", "bgr0"), ("mp4", "libx264rgb", "rgb24"), ("webm", "libvpx", "yuv420p")),
)
def test_a_clip_whose_clock_does_not_begin_at_zero_is_sampled_as_one_that_does(
  container, codec, pixels
):
  late = timed([time + 5000 for time in SLOWER], 900, container, codec, pixels)
  assert clip_size(late)[0] == pytest.approx(10.0, abs=0.01)
  seen = numbers(transform()(late)[0])
  assert seen == numbers(transform()(timed(SLOWER, 900, container, codec, pixels))[0])


def test_a_frame_that_stays_is_repeated_and_a_jittering_clock_is_not_a_variable_rate():
  slides = timed([0, 1000, 2000, 3000, 27_000], 3000)
  assert numbers(transform(frames=6)(slides)[0]) == [2, 3, 3, 3, 3, 4]
  np.testing.assert_array_equal(shown_frames(np.array([0, 33, 67, 100, 133, 167]))[0], np.arange(6))
  jitter = 100 * np.arange(40) + np.random.default_rng(0).integers(-30, 31, 40)
  np.testing.assert_array_equal(shown_frames(jitter, 100)[0], np.arange(40))
  for times in ([5], [5, 5], [0, 0, 7]):
    shown, length = shown_frames(np.array(times))
    assert len(shown) >= 1 and 0 <= shown.min() <= shown.max() < len(times) and length >= 0


@settings(max_examples=60, deadline=None)
@given(
  gaps=st.lists(st.integers(1, 400), min_size=5, max_size=60),
  last=st.integers(1, 400),
  frames=st.integers(1, 5),
)
def test_the_frame_of_every_slice_is_the_one_on_the_screen(gaps, last, frames):
  times = np.cumsum([0, *gaps])
  shown, length = shown_frames(times, last)
  if len(shown) == len(times) and (shown == np.arange(len(times))).all():
    return  # a constant rate
  middles = (np.arange(len(shown)) + 0.5) * length / len(shown)
  assert shown.tolist() == seen_at(times.tolist(), middles)
  assert length / len(shown) <= 1.5 * min(gaps)


@pytest.mark.parametrize(
  "container, codec, pixels",
  (("matroska", "ffv1", "bgr0"), ("mp4", "mpeg4", "yuv420p"), ("avi", "mpeg4", "yuv420p")),
)
def test_a_clip_cut_within_its_data_is_refused(container, codec, pixels):
  data = encode(clip(30), container, codec, pixels)
  for share in (0.4, 0.7, 0.9):
    with pytest.raises(Unreadable, match="cut within its data|not a video"):
      transform()(data[: int(len(data) * share)])
  transform()(data + b"bytes after its end" * 50)


def test_random_draws_one_frame_of_each_part_in_training_only():
  frames, seen = clip(), set()
  for seed in range(20):
    chosen = numbers(
      transform(train=True, sampling="random")(frames, np.random.default_rng(seed))[0]
    )
    assert [n // 3 for n in chosen] == [0, 1, 2, 3]
    seen.add(tuple(chosen))
  assert len(seen) > 10
  assert numbers(transform(train=False, sampling="random")(frames)[0]) == [1, 4, 7, 10]


@settings(max_examples=40, deadline=None)
@given(
  count=st.integers(1, 40),
  frames=st.integers(1, 9),
  low=st.floats(0.05, 1),
  high=st.floats(0.05, 1),
  seed=st.integers(0, 99),
  sampling=st.sampled_from(("uniform", "random")),
)
def test_chosen_frames_are_in_order_within_the_clip(count, frames, low, high, seed, sampling):
  run = transform(
    train=True, frames=frames, sampling=sampling, temporal=(min(low, high), max(low, high))
  )
  chosen = run.pick(count, np.random.default_rng(seed).random(44 + frames))
  assert 1 <= len(chosen) <= frames and chosen[0] >= 0 and chosen[-1] < count
  assert (np.diff(chosen) > 0).all()


def test_one_box_and_one_flip_hold_for_all_frames():
  still = np.repeat(clip(1, 40, 60), 6, axis=0)
  flips = set()
  for seed in range(12):
    got, _ = transform(train=True, frames=6, crop=(0.2, 0.6), flip=0.5)(
      still, np.random.default_rng(seed)
    )
    assert got.shape == (6, 16, 16, 3) and (got == got[:1]).all()
    got, _ = transform(train=True, size=40, frames=6, flip=0.5)(still, np.random.default_rng(seed))
    centre = still[:, :, 10:50]
    flips.add(bool((got == centre[:, :, ::-1]).all()))
    assert (got == centre).all() or (got == centre[:, :, ::-1]).all()
  assert flips == {True, False}
  np.testing.assert_array_equal(transform(size=40, frames=6)(still)[0], still[:, :, 10:50])


def test_pixels_are_turned_upright():
  frames = clip(2, 16, 24)
  data = bytearray(encode(frames, "mp4", "libx264rgb", "rgb24"))
  unit, turned = (
    bytes.fromhex("00010000" + "00" * 12 + "00010000"),
    bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000"),
  )
  at = data.index(b"tkhd")
  place = data.index(unit, at)
  data[place : place + 20] = turned  # a matrix that shows the picture turned by a quarter
  got = decode_video(bytes(data))
  assert got.shape == (2, 24, 16, 3)
  assert min(np.abs(got.astype(int) - np.rot90(frames, k, (1, 2))).mean() for k in (1, 3)) < 30


def damaged():
  good = encode(clip())
  noise = RNG.integers(0, 256, len(good), dtype=np.uint8).tobytes()
  return {
    "empty": (b"", "empty file"),
    "not a video": (b"<html></html>" * 20, "not a video"),
    "cut header": (good[:60], "."),
    "noise": (noise, "not a video"),
    "sound alone": (sound_alone(), "no video stream"),
    "no frames": (good[: good.index(b"\x1f\x43\xb6\x75")], "cut within its data"),
    "a playlist": (b"#EXTM3U\n" * 9, "not a video"),
  }


@pytest.mark.parametrize("case", damaged())
def test_what_cannot_be_read_is_one_clear_line(case):
  data, message = damaged()[case]
  with pytest.raises(Unreadable, match=message) as error:
    transform()(data)
  assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_damaged_frames_are_noticed_or_harmless():
  good = encode(clip())
  for seed in range(6):
    data = bytearray(good)
    rng = np.random.default_rng(seed)
    for at in rng.integers(len(good) // 4, len(good), 40):
      data[at] = rng.integers(256)
    try:
      frames, mask = transform()(bytes(data))
      assert frames.shape == (4, 16, 16, 3) and mask.any()
    except Unreadable as error:
      assert "\n" not in str(error)


def test_too_much_is_refused(monkeypatch):
  data = encode(clip())
  for name, value, message in (
    ("MAX_PIXELS", 200, "16 x 16 pixels"),
    ("MAX_FRAMES", 5, "more than 5 frames"),
    ("MAX_KEPT", 1000, "4 frames of 16 x 16"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(video, name, value)
      with pytest.raises(Unreadable, match=message):
        transform()(data)
  with pytest.raises(Unreadable, match="without frames"):
    transform()(np.zeros((0, 16, 16, 3), np.uint8))
