"""Files of sound and video from anywhere: opened by FFmpeg within bounds, and whether one was cut
off.

A file that its own header says is longer (MP4 and its kin, Matroska, AVI, WAV, AIFF) was cut within
its data and is
`Unreadable`: what is left may not be what its caption tells of. Formats that do not say how long
they are (MPEG-TS, Ogg, MP3 and AAC without a header of their length), and streamed files whose
header was never filled in, give what there is.
"""

from __future__ import annotations

import io
import struct

import av

from mmjax.data.image import Unreadable

# FFmpeg also knows formats that are lists of other files and addresses (HLS, DASH, concat, SDP):
# none of these is opened.
_FORMATS = (
  "aac,ac3,aiff,amr,apng,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,"
  "mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,tta,w64,wav,wv,yuv4mpegpipe"
)
_BOXES = (
  b"ftyp",
  b"styp",
  b"moov",
  b"moof",
  b"mdat",
  b"free",
  b"skip",
  b"wide",
  b"meta",
  b"uuid",
  b"sidx",
  b"mfra",
  b"pnot",
)
STREAMED = (
  0x7FFF0000  # sizes from here on, and 0, are what recorders write that do not know the length yet
)
_SLIP = 64  # bytes that headers are often wrong by


def open_container(data: bytes) -> av.container.InputContainer:
  """The container in `data`, of a format that refers to no other file. Raises Unreadable: it is cut
  off; av.error.FFmpegError.
  """
  check_whole(data)
  return av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _FORMATS})


def decoder(stream: av.stream.Stream) -> av.CodecContext:
  """The decoder of a stream, on one thread: media are read in parallel, one a thread or process.

  Raises Unreadable: FFmpeg has no decoder for what the header names.
  """
  if stream.codec_context is None:
    raise Unreadable(f"no decoder for its {stream.type} stream")
  stream.codec_context.thread_count = 1
  return stream.codec_context


def check_whole(data: bytes) -> None:
  """Raises Unreadable: a file that is shorter than its header says."""
  if (missing := missing_bytes(data)) > _SLIP:
    raise Unreadable(
      f"cut within its data: {missing:,} of the {len(data) + missing:,} bytes that its header "
      "announces are missing"
    )


def is_iso(data: bytes) -> bool:
  """Whether a file begins as MP4, MOV and M4A do."""
  return data[4:8] in _BOXES


def missing_bytes(data: bytes) -> int:
  """How many bytes the header of a file announces beyond its end; 0 also where it does not say."""
  if is_iso(data):
    return _missing_boxes(data)
  if data[:4] == b"\x1a\x45\xdf\xa3":
    return _missing_segment(data)
  if data[:4] in (b"RIFF", b"FORM"):
    size = int.from_bytes(data[4:8], "little" if data[:4] == b"RIFF" else "big")
    return 0 if not 0 < size < STREAMED else max(0, size + 8 - len(data))
  return 0


def _missing_boxes(data: bytes) -> int:
  """Of an ISO file (MP4, MOV, M4A): boxes of a size and a name, one after the other."""
  at = 0
  while at + 8 <= len(data):
    size, name = struct.unpack(">I4s", data[at : at + 8])
    if size == 1 and at + 16 <= len(data):
      size = int.from_bytes(data[at + 8 : at + 16], "big")
    if size < 8 or name not in _BOXES:  # up to the end of the file, or something else behind it
      return 0
    at += size
  return max(0, at - len(data))


def _missing_segment(data: bytes) -> int:
  """Of a Matroska file (MKV, WebM): an EBML header and a segment that holds the rest."""
  at = 4
  for name in (b"", b"\x18\x53\x80\x67"):  # the header's name is read already
    if data[at : at + len(name)] != name or at + len(name) >= len(data):
      return 0
    at += len(name)
    width = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + width], "big") & (1 << 7 * width) - 1
    if size == (1 << 7 * width) - 1:  # not known when it was written
      return 0
    at += width + size
  return max(0, at - len(data))
