"""Sound files to waveforms: formats, rates, channels, damage, and what augmentation does."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from mmjax.data import audio
from mmjax.data.audio import AudioTransform, decode_audio
from mmjax.data.image import Unreadable

RATE = 16_000
RNG = np.random.default_rng(0)
OFF = dict(speed=(1.0, 1.0), noise=0.0, shift=0.0, gain=(1.0, 1.0))


def tone(seconds=0.5, rate=RATE, hertz=440.0):
  return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
    np.float32
  )


def encode(x, rate=RATE, kind="WAV", subtype=None):
  out = io.BytesIO()
  soundfile.write(out, x, rate, format=kind, subtype=subtype)
  return out.getvalue()


def transform(train=False, seconds=1.0, **augment):
  return AudioTransform(
    ConfigDict(dict(rate=RATE, seconds=seconds, augment={**OFF, **augment})), train=train
  )


def loudest(x, rate=RATE):
  """The frequency with the most power, in Hz."""
  return np.abs(np.fft.rfft(x)).argmax() * rate / len(x)


@pytest.mark.parametrize(
  "kind, subtype, error",
  (
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "PCM_24", 1e-5),
    ("WAV", "FLOAT", 1e-6),
    ("WAV", "ULAW", 2e-2),
    ("FLAC", "PCM_16", 1e-4),
    ("OGG", "VORBIS", 0.1),
    ("AIFF", "PCM_16", 1e-4),
  ),
)
def test_formats(kind, subtype, error):
  got = decode_audio(encode(tone(), kind=kind, subtype=subtype), RATE)
  assert got.dtype == np.float32 and got.shape == (8000,)
  np.testing.assert_allclose(got, tone(), atol=error)


@pytest.mark.parametrize("rate", (8_000, 11_025, 22_050, 44_100, 48_000))
def test_other_rates_keep_length_and_pitch(rate):
  got = decode_audio(encode(tone(rate=rate), rate, kind="FLAC"), RATE)
  assert abs(len(got) - 8000) <= 1
  assert abs(loudest(got[:8000]) - 440) <= 2
  np.testing.assert_allclose(got[500:-500], tone()[500 : len(got) - 500], atol=5e-3)


def test_channels_are_averaged():
  both = np.stack([tone(), 0.5 * tone(hertz=900)], 1)
  np.testing.assert_allclose(
    decode_audio(encode(both, subtype="FLOAT"), RATE), both.mean(1), atol=1e-6
  )


def test_the_waveform_is_exact_cut_and_padded():
  x = tone(0.5)
  samples = np.rint(x * 32767).astype(np.int16)
  waveform, length = transform()(encode(samples))
  assert waveform.dtype == np.int16 and waveform.shape == (RATE,) and length == 8000
  np.testing.assert_array_equal(waveform[:8000], samples)
  assert not waveform[8000:].any()
  waveform, length = transform(seconds=0.25)(encode(samples))
  assert length == 4000
  np.testing.assert_array_equal(waveform, samples[:4000])
  np.testing.assert_array_equal(
    transform()(np.array([2.0, -2.0], np.float32))[0][:2], [32767, -32768]
  )


# FFmpeg would listen there
PLAYLIST = (
  b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
)


def by_ffmpeg(x, container, codec, film=False, **options):
  """float32 [n] at RATE, encoded by FFmpeg; film: with a video track before the sound."""
  out = io.BytesIO()
  with av.open(out, "w", format=container, options=options) as file:
    pictures = file.add_stream("mpeg4", rate=10) if film else None
    stream = file.add_stream(codec, rate=RATE, layout="mono")
    if film:
      pictures.width = pictures.height = 16
      frames = [
        av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for _ in range(5)
      ]
      file.mux([packet for frame in (*frames, None) for packet in pictures.encode(frame)])
    frame = av.AudioFrame.from_ndarray(x[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=RATE)
    for part in (*resampler.resample(frame), None):
      file.mux(stream.encode(part))
  return out.getvalue()


def silent_film():
  from tests.data.test_video import clip
  from tests.data.test_video import encode as film

  return film(clip(2))


def chirp(seconds=1.0):
  at = np.arange(round(seconds * RATE)) / RATE
  return (0.5 * np.sin(2 * np.pi * (300 + 600 * at) * at)).astype(np.float32)


@pytest.mark.parametrize(
  "container, codec, film",
  (
    ("mp4", "aac", False),
    ("adts", "aac", False),
    ("mp4", "alac", False),
    ("matroska", "flac", False),
    ("mp4", "aac", True),
    ("matroska", "aac", True),
    ("avi", "mp3", True),
    ("mpegts", "aac", True),
  ),
)
def test_what_ffmpeg_opens_is_read_and_of_a_video_the_sound_track(container, codec, film):
  x = chirp()
  got = decode_audio(by_ffmpeg(x, container, codec, film=film), RATE)
  assert got.dtype == np.float32 and abs(len(got) - len(x)) <= 4096
  lag = (
    np.correlate(np.pad(got, (0, 4096))[: len(x) + 4096], x[2000:-2000], "valid").argmax() - 2000
  )
  assert 0 <= lag <= 2200  # what encoders put before the sound, where a container cannot say so
  got = np.pad(got, (0, 8192))[lag : lag + len(x)]
  assert np.corrcoef(got[500:-500], x[500:-500])[0, 1] > 0.99


@pytest.mark.parametrize(
  "codec, kind", (("flac", "FLAC"), ("libmp3lame", "MP3"), ("pcm_s16le", "WAV"))
)
def test_libsndfile_and_ffmpeg_decode_the_same(codec, kind):
  data = encode(chirp(), kind=kind)
  (ours, rate), (theirs, other) = audio._by_libsndfile(data), audio._by_ffmpeg(data)
  assert rate == other == RATE and abs(len(ours) - len(theirs)) <= 1152
  shared = min(len(ours), len(theirs)) - 1200
  np.testing.assert_allclose(ours[:shared], theirs[:shared], atol=2e-3)


@pytest.mark.parametrize(
  "riff, size",
  (
    (0, 0),
    (36, 0),
    (0xFFFFFFFF, 0),
    (0xFFFFFFFF, 0xFFFFFFFF),
    (0x7FFFFFFF, 0x7FFFFFDB),
    (0x80000024, 0x80000000),
  ),
)
def test_a_wav_whose_header_was_never_filled_in_is_read(riff, size):
  data = bytearray(encode(tone(), subtype="PCM_16"))
  at = data.index(b"data") + 4
  data[4:8], data[at : at + 4] = riff.to_bytes(4, "little"), size.to_bytes(4, "little")
  np.testing.assert_allclose(decode_audio(bytes(data), RATE), tone(), atol=1e-4)


@pytest.mark.parametrize("zeros", (1, 100, 70_000))
def test_an_mp3_behind_zeros_is_the_mp3(zeros):
  data = encode(tone(2.0), kind="MP3")
  np.testing.assert_array_equal(decode_audio(b"\0" * zeros + data, RATE), decode_audio(data, RATE))


def tagged(data):
  """Behind an ID3 tag of 20,000 bytes, as one with a picture of its album."""
  return b"ID3\4\0\0\0\1\x1c\x20" + b"\1" * 20_000 + data


@pytest.mark.parametrize("between", (b"", b"TAG" + b"\0" * 125, tagged(b"")))
def test_mp3s_that_were_joined_are_read_to_the_last(between):
  x = chirp(2.0)
  data = encode(x, kind="MP3")
  got = decode_audio(data + between + data + between + data, RATE)
  assert (
    0 <= len(got) - 3 * len(x) <= 3 * 2304
  )  # what encoders add, a frame in front and at the end
  np.testing.assert_allclose(got[: len(x) - 999], decode_audio(data, RATE)[:-999], atol=2e-3)
  last = np.correlate(got[-len(x) - 2304 :], x[2000:-2000], "valid").argmax()
  end = got[-len(x) - 2304 :][last:][: len(x) - 4000]
  assert np.corrcoef(end, x[2000:-2000])[0, 1] > 0.99


@pytest.mark.parametrize("bitrate", ("CONSTANT", "VARIABLE"))
def test_an_mp3_that_does_not_say_how_long_it_is_is_read_to_its_end(bitrate):
  x = np.concatenate([np.zeros(2 * RATE, np.float32), 0.4 * RNG.standard_normal(4 * RATE)])
  out = io.BytesIO()
  soundfile.write(out, x.astype(np.float32), RATE, format="MP3", bitrate_mode=bitrate)
  whole = out.getvalue()
  data = whole.replace(b"Xing", b"\0" * 4).replace(b"Info", b"\0" * 4)
  assert data != whole
  got = decode_audio(data, RATE)
  assert 0 <= len(got) - len(x) <= 3 * 1152 and abs(len(decode_audio(whole, RATE)) - len(x)) < 2
  assert np.square(got[-RATE:]).mean() > 0.5 * np.square(x[-RATE:]).mean()
  assert audio.audio_length(data) == (len(got), RATE)


def test_the_length_of_an_mp3_is_found_behind_its_album():
  data = encode(np.concatenate([chirp()] * 9), kind="MP3")
  np.testing.assert_array_equal(decode_audio(tagged(data), RATE), decode_audio(data, RATE))
  with pytest.raises(Unreadable, match="cut within its data"):
    decode_audio(tagged(data[: len(data) * 3 // 4]), RATE)


def test_a_sound_cut_within_its_data_is_refused_where_its_header_tells():
  x = np.concatenate([chirp()] * 20)
  whole = {
    "wav": encode(x),
    "flac": encode(x, kind="FLAC"),
    "aiff": encode(x, kind="AIFF"),
    "mp3": encode(x, kind="MP3"),
    "m4a": by_ffmpeg(x, "mp4", "aac", movflags="empty_moov"),
    "mka": by_ffmpeg(x, "matroska", "flac"),
    "mp4": by_ffmpeg(x, "mp4", "aac", film=True),
  }
  for name, data in whole.items():
    assert len(decode_audio(data, RATE)) >= len(x), name
    for share in (0.3, 0.7, 0.95):
      with pytest.raises(Unreadable, match="cut within its data|damaged"):
        decode_audio(data[: int(len(data) * share)], RATE)
  for data in (encode(x, kind="OGG"), by_ffmpeg(x, "adts", "aac")):  # do not say how long they are
    assert 0.5 * len(x) < len(decode_audio(data[: int(len(data) * 0.7)], RATE)) < 0.9 * len(x)


def damaged():
  good, flac = encode(tone()), encode(tone(2.0), kind="FLAC")
  noise = np.random.default_rng(0).integers(0, 256, len(flac) // 2, dtype=np.uint8).tobytes()
  return {
    "empty": (b"", "empty file"),
    "not sound": (b"<html>not a sound</html>" * 9, "not a sound file"),
    "header alone": (good[:44], "cut within its data"),
    "cut header": (good[:20], "cut within its data"),
    "a picture": (b"\x89PNG\r\n\x1a\n" * 9, "not a sound file"),
    "a playlist": (PLAYLIST, "not a sound file"),
    "a video without sound": (silent_film(), "no sound track"),
    "no samples": (encode(np.zeros(0, np.float32)), "zero length"),
    "no samples, flac": (encode(np.zeros(0, np.float32), kind="FLAC"), "."),
    "garbage after the header": (flac[: len(flac) // 2] + noise, "damaged|not a sound"),
    "not numbers": (encode(np.full(99, np.nan, np.float32), subtype="FLOAT"), "not numbers"),
  }


@pytest.mark.parametrize("case", damaged())
def test_what_cannot_be_read_is_one_clear_line(case):
  data, message = damaged()[case]
  with pytest.raises(Unreadable, match=message) as error:
    transform()(data)
  assert (
    "\n" not in str(error.value)
    and len(str(error.value)) < 200
    and "BytesIO" not in str(error.value)
  )


def test_too_long_is_refused_before_it_fills_the_memory(monkeypatch):
  monkeypatch.setattr(audio, "MAX_SECONDS", 1)
  with pytest.raises(Unreadable, match="more than 1 seconds"):
    decode_audio(encode(tone(20.0)), RATE)
  with pytest.raises(Unreadable, match="zero length"):
    transform()(np.zeros(0, np.float32))


def test_speed_changes_length_and_pitch():
  waveform, length = transform(train=True, speed=(1.25, 1.25))(tone(), np.random.default_rng(0))
  assert abs(length - 6400) <= 1 and abs(loudest(waveform[:6400]) - 550) <= 3
  waveform, length = transform(train=True, seconds=0.5, speed=(2.0, 2.0))(
    tone(3.0), np.random.default_rng(0)
  )
  assert length == 8000 and abs(loudest(waveform) - 880) <= 3


def test_shift_gain_and_noise_do_what_they_say():
  x = tone()
  for seed in range(4):

    def rng(seed=seed):
      return np.random.default_rng(seed)

    waveform, length = transform(train=True, shift=0.1)(x, rng())
    moved = length - 8000
    assert 0 < moved <= 1600 and not waveform[:moved].any()
    np.testing.assert_allclose(waveform[moved:length] / 32768, x, atol=1e-4)
    waveform, _ = transform(train=True, gain=(0.5, 0.8))(x, rng())
    assert 0.5 * 16000 < waveform.max() * 2 and 0.49 <= waveform.max() / 16384 <= 0.81
    waveform, _ = transform(train=True, noise=0.2)(x, rng())
    added = waveform[:8000] / 32768 - x
    assert 0 < added.std() <= 0.21 * np.sqrt(np.square(x).mean())
  # At most `seconds`.
  assert transform(train=True, shift=9.0)(tone(0.01), np.random.default_rng(1))[1] == RATE


def test_augmentation_is_a_function_of_the_stream_and_evaluation_needs_none():
  run = transform(train=True, speed=(0.9, 1.1), shift=0.05, gain=(0.5, 1.0), noise=0.1)
  a, b, c = (run(tone(), np.random.default_rng(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(a[0], b[0])
  assert a[1] == b[1] and not np.array_equal(a[0], c[0])
  plain = transform(train=False, speed=(0.5, 0.6), noise=1.0)(tone(), None)
  np.testing.assert_array_equal(plain[0], transform()(tone(), None)[0])
