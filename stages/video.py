"""Videos as RGB frames, read and written by PyAV (the optional extra `video`).

for frame in read_frames(path): ...
with FrameWriter(path, rate=25, size=(height, width)) as video: video.write(frame)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
CODECS = ("libx264", "mpeg4")
"""Encoders, the first that PyAV has is taken."""


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the way out."""


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a video's header says."""

    num_frames: int | None
    """None: the container does not say."""
    rate: Fraction
    """Frames per second, on average."""


def describe_video(path: Path) -> VideoFacts:
    """The facts of a video's first picture stream.

    Raises:
        VideoError: it cannot be opened, holds no pictures, or PyAV is not installed.
    """
    with _opened(path) as container:
        stream = _pictures_of(container, path)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        return VideoFacts(num_frames=stream.frames or None, rate=Fraction(rate))


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """All frames as uint8 RGB [H, W, 3], turned upright, in order of display.

    Raises:
        VideoError: as `describe_video`; also where a decoder is missing, a frame is damaged, or
            there is no frame at all.
    """
    av = _av()
    count = 0
    with _opened(path) as container:
        stream = _pictures_of(container, path)
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                yield np.ascontiguousarray(_upright(frame))
                count += 1
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(
                f"{path}: the video cannot be decoded after {count} frames ({error}). Convert it, "
                "for example to MP4 with H.264."
            ) from error
    if count == 0:
        raise VideoError(f"{path}: the video holds no frames.")


class FrameWriter:
    """Writes an MP4, whole or not at all: the file takes its name when the last frame is in it.

    Args:
        path: of the MP4.
        rate: frames per second.
        size: (height, width) of the frames; odd sides lose a pixel, as H.264 wants them even.
    """

    def __init__(self, path: Path, *, rate: Fraction, size: tuple[int, int]) -> None:
        if min(size) < 2:
            raise VideoError(f"{path}: frames of {size[0]}x{size[1]} pixels are too small for MP4.")
        self._av = _av()
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        codec = next(name for name in CODECS if name in self._av.codecs_available)
        self._even = size[0] // 2 * 2, size[1] // 2 * 2
        self._container = self._av.open(str(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=rate.limit_denominator(60_000))
        self._stream.height, self._stream.width = self._even
        self._stream.pix_fmt = "yuv420p"

    def write(self, frame_HW3: np.ndarray) -> None:
        """Add a frame, uint8 RGB [H, W, 3]."""
        cut = np.ascontiguousarray(frame_HW3[: self._even[0], : self._even[1]])
        self._mux(self._av.VideoFrame.from_ndarray(cut, format="rgb24"))

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._container.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._mux(None)
        self._container.close()
        self._temporary.replace(self._path)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            "reading videos needs PyAV, which is not installed: pip install av (the extra `video` "
            "of this package), or cut the video into pictures first."
        ) from error
    return av


def _opened(path: Path) -> Any:
    av = _av()
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty.")
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: not a video that can be opened ({error}).") from error


def _pictures_of(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise VideoError(f"{path}: the file has no pictures (sound only?).")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(
            f"{path}: this PyAV has no decoder for its pictures. Convert it, for example to MP4 "
            "with H.264."
        )
    return stream


def _upright(frame: Any) -> np.ndarray:
    """Telephones film lying and note the angle; it is a multiple of 90 degrees."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)
