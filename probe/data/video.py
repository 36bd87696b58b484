"""Frames of a clip: from a video file (through PyAV, an optional package), or from a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probe.data.pictures import MOST_PIXELS, open_image
from probe.errors import ProbeError

FRAMES = 32
"""Frames that are taken of a clip when nobody says how many, as in LLaDA-V's published evaluation."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""What counts as a picture in a folder of frames."""


def uniform(total: int, count: int) -> list[int]:
    """Indices of `count` frames of `total`, evenly spread, first and last included, rounded down.

    A clip of fewer frames repeats some, as the published evaluation has it.
    """
    return [int(i) for i in np.linspace(0, total - 1, count).astype(int)]


def read_clip(path: str | Path, count: int = FRAMES) -> tuple[Image.Image, ...]:
    """`count` frames in RGB of a video file, or of a folder of pictures in the order of their names."""
    path = Path(path)
    if count < 1:
        raise ProbeError(f"{count} frames of {path}; at least 1 would be right")
    if path.is_dir():
        return _from_folder(path, count)
    if not path.is_file():
        raise ProbeError(f"no video at {path}")
    av = _decoder(path)
    try:
        total = _packets(av, path)
        while True:
            wanted = uniform(total, count)
            found, decoded = _decode(av, path, set(wanted))
            if decoded == total:
                return tuple(found[i] for i in wanted)
            if not decoded:
                raise ProbeError(f"{path} holds no frames that can be decoded")
            total = decoded  # the container promised another number: once more with the right one
    except av.error.FFmpegError as error:
        raise ProbeError(f"{path} is not a video that can be read: {error.strerror or error}") from None


def _from_folder(path: Path, count: int) -> tuple[Image.Image, ...]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ProbeError(f"the folder {path} holds no pictures to take for frames; known: {', '.join(SUFFIXES)}")
    return tuple(open_image(files[i]) for i in uniform(len(files), count))


def _decoder(path: Path) -> Any:
    try:
        import av
    except ImportError:
        how = "pip install 'dmllm-probe[video]'"
        raise ProbeError(f"reading {path} takes a video decoder: {how}, or give its frames as pictures") from None
    return av


def _packets(av: Any, path: Path) -> int:
    """How many frames the container holds, without decoding any."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ProbeError(f"{path} has no video stream")
        total = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    if not total:
        raise ProbeError(f"{path} holds no frames")
    return total


def _decode(av: Any, path: Path, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The wanted frames by their index, and how many frames there are."""
    found: dict[int, Image.Image] = {}
    number = -1
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(_frames(container)):
            if number not in wanted:
                continue
            if frame.width * frame.height > MOST_PIXELS:
                raise ProbeError(f"{path} has frames of more than {MOST_PIXELS // 10**6} megapixels")
            image = frame.to_image()
            found[number] = image.rotate(frame.rotation, expand=True) if frame.rotation else image
    return found, number + 1


def _frames(container: Any) -> Iterator[Any]:
    yield from container.decode(video=0)
