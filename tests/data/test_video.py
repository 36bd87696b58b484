"""Clips: which frames are taken, from files of several formats and from folders, and what is said of broken ones."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probe.data import from_jsonl, from_video, video
from probe.errors import ProbeError

av = pytest.importorskip("av")


def grey(number: int) -> int:
    """The brightness of frame `number`: far enough apart to survive compression."""
    return 16 + 9 * number


def write_clip(path: Path, frames: int, codec: str = "libx264", size: tuple[int, int] = (64, 48)) -> Path:
    """A clip whose frame i has brightness `grey(i)`, its upper left corner white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), grey(i), np.uint8)
            pixels[:16, :16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbers(frames: tuple[Image.Image, ...]) -> list[int]:
    """Which frames these are, by their brightness."""
    return [round((np.asarray(f)[-8:, -8:].mean() - 16) / 9) for f in frames]


@pytest.mark.parametrize(
    ("codec", "name"), [("libx264", "a.mp4"), ("mpeg4", "b.avi"), ("vp9", "c.webm"), ("ffv1", "d.mkv")]
)
def test_frames_are_spread_evenly_and_both_ends_are_taken(codec: str, name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, 23, codec)
    for count in (1, 2, 5, 8, 23):
        frames = video.read_clip(path, count)
        wanted = [int(i) for i in np.linspace(0, 22, count, dtype=int)]
        assert numbers(frames) == wanted
        assert {f.size for f in frames} == {(64, 48)}
        assert {f.mode for f in frames} == {"RGB"}
    assert wanted == list(range(23))


def test_the_usual_number_of_frames_and_a_clip_of_fewer(tmp_path: Path) -> None:
    frames = video.read_clip(write_clip(tmp_path / "a.mp4", 5))
    assert numbers(frames) == [i * 4 // 31 for i in range(32)]


def test_a_container_that_promises_another_number_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", 9)
    for promised in (4, 30):
        monkeypatch.setattr(video, "_packets", lambda av, path, promised=promised: promised)
        assert numbers(video.read_clip(path, 3)) == [0, 4, 8]


def test_a_clip_filmed_upright_is_turned(tmp_path: Path) -> None:
    """A phone stores its frames lying and says how to turn them: here a quarter clockwise."""
    path = write_clip(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # behind version, times, number, duration, layer, volume
    assert struct.unpack(">9i", data[at : at + 36])[0] == 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(bytes(data))
    (frame,) = video.read_clip(path, 1)
    assert frame.size == (48, 64)
    assert min(frame.getpixel((45, 3))) > 200, "what was upper left is upper right"
    assert max(frame.getpixel((3, 3))) < 100


def test_a_folder_of_pictures_is_a_clip_in_the_order_of_names(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("RGB", (30, 20), (grey(i),) * 3).save(tmp_path / f"frame{i:03}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    sample = from_video(tmp_path, "What happens?", frames=4)
    assert numbers(sample.frames) == [0, 2, 4, 6]
    assert (sample.images, sample.pictures, sample.id) == ((), sample.frames, tmp_path.name)


def test_lines_with_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 10)
    (tmp_path / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (30, 20), (grey(i),) * 3).save(tmp_path / "frames" / f"{i}.png")
    rows = [
        {"video": "a.mp4", "frames": 4, "question": "?"},
        {"video": "a.mp4", "question": "?", "answer": "yes"},
        {"video": "frames", "frames": 2, "question": "?"},
        {"frames": ["frames/2.png", "frames/0.png"], "question": "?"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert [numbers(s.frames) for s in from_jsonl(path)] == [
        [0, 3, 6, 9],
        [i * 9 // 31 for i in range(32)],
        [0, 2],
        [2, 0],
    ]


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "still.png")
    torn = write_clip(tmp_path / "torn.mp4", 10)
    torn.write_bytes(torn.read_bytes()[:300])
    for path, message in (
        (tmp_path / "none.mp4", "no video at"),
        (tmp_path / "notes.mp4", "is not a video that can be read"),
        (torn, "is not a video that can be read|holds no frames"),
        (tmp_path / "empty", "holds no pictures to take for frames"),
    ):
        with pytest.raises(ProbeError, match=message):
            video.read_clip(path)
    with pytest.raises(ProbeError, match="at least 1"):
        video.read_clip(tmp_path / "still.png", 0)


def test_sound_alone_is_no_clip(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ProbeError, match="has no video stream"):
        video.read_clip(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(video, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(ProbeError, match="megapixels"):
        video.read_clip(path)


def test_without_a_decoder_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4", 2)
    find = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ProbeError, match=r"pip install 'dmllm-probe\[video\]'"):
        video.read_clip(path)
