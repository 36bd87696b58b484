"""Pictures, questions and files that are wrong: each is recorded as failed with its reason, and the run goes on."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import probe
from probe.__main__ import load_cli
from probe.data import Sample
from probe.data.own import from_jsonl, open_image
from probe.data.sample import LONGEST_SIDE
from probe.errors import ProbeError
from probe.trace import open_trace, verify

RECIPE = """
schema: 1
name: plain
generate: {gen_length: 2, steps: 2, block_length: 2}
probes:
  - {at: {site: layer.input, layer: 1}, score: norm, select: {top_k: {keep: 0.5}}, do: drop}
"""


def png(width: int, height: int, data: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that says its size and holds `data`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    extra = b"".join(chunk(kind, body) for kind, body in more)
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
GOOD: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: saved(Image.new("RGB", (96, 96), "blue"), "PNG"),
    "one_pixel.png": lambda: saved(Image.new("RGB", (1, 1)), "PNG"),
    "animated.gif": lambda: saved(
        Image.new("RGB", (32, 32), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")]
    ),
    "animated.webp": lambda: saved(
        Image.new("RGB", (32, 32), "red"), "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 32))]
    ),
    "sixteen.png": lambda: saved(Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
    "sixteen.tif": lambda: saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"),
    "cmyk.jpg": lambda: saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"),
    "lab.tif": lambda: saved(Image.new("LAB", (32, 32), (128, 128, 128)), "TIFF"),
    "sideways.jpg": sideways,
    "bits.png": lambda: saved(Image.new("1", (32, 32), 1), "PNG"),
    "palette.png": lambda: saved(Image.new("P", (32, 32), 3), "PNG"),
    "clear.png": lambda: saved(Image.new("RGBA", (32, 32), (9, 8, 7, 0)), "PNG"),
    "strip.png": lambda: saved(Image.new("RGB", (LONGEST_SIDE, 1)), "PNG"),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "is not a picture"),
    "text.png": (lambda: b"hello", "is not a picture"),
    "no_width.png": (lambda: png(0, 10), "is not a picture"),
    "cut.png": (lambda: saved(Image.effect_noise((99, 99), 50), "PNG")[:900], "cannot be read"),
    "cut.jpg": (lambda: saved(Image.effect_noise((99, 99), 50), "JPEG")[:900], "cannot be read"),
    "bomb.png": (lambda: png(20_000, 20_000), "more than 100 megapixels"),
    "vast.png": (lambda: png(2**31 - 1, 2**31 - 1), "more than 100 megapixels"),
    "long.png": (lambda: saved(Image.new("RGB", (20_000, 1)), "PNG"), "20000 x 1 pixels; 1 to 16384 are read"),
    "text_bomb.png": (
        lambda: png(8, 8, bytes(200), (b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))),
        "cannot be read",
    ),
    "float.tif": (lambda: saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "unknown range"),
    "program.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(w) run\n", "is not a picture"),
    "drawing.svg": (lambda: b"<svg/>", "is not a picture"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, make in GOOD.items():
        (tmp_path / name).write_bytes(make())
    for name, (make, _) in BAD.items():
        (tmp_path / name).write_bytes(make())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


LINES: dict[str, str] = {  # a wrong line, and what is said of it
    "{": "not JSON",
    "[]": "a JSON object is wanted",
    "[" * 100_000: "nested too deeply",
    '{"image": "rgb.png", "question": "q", "id": ' + "9" * 5000 + "}": "a number too long",
    '{"image": "rgb.png"}': "`question` must be a text that is not empty",
    '{"image": "rgb.png", "question": " "}': "`question` must be a text that is not empty",
    '{"image": "rgb.png", "qestion": "q"}': "did you mean `question`",
    '{"image": "none.png", "question": "q"}': "no picture at",
    '{"image": "folder.png", "question": "q"}': "no picture at",
    '{"image": "pipe.png", "question": "q"}': "no picture at",
    '{"image": "circle.png", "question": "q"}': "no picture at",
    '{"image": "' + "a" * 5000 + '", "question": "q"}': "no picture at",
    '{"image": "a\\u0000b", "question": "q"}': "no picture at",
    '{"image": "rgb.png", "question": "q", "metric": "exact"}': "did you mean `exact_match`",
    '{"image": "rgb.png", "question": "half \\ud800"}': "half of a surrogate pair",
    '{"image": "rgb.png", "question": "' + "red " * 20_000 + '"}': "positions",
    '{"images": ["rgb.png", "rgb.png"], "question": "<image> what?"}': "names 1 place",
}


def test_every_odd_picture_is_read(folder: Path) -> None:
    for name in GOOD:
        assert open_image(folder / name).mode == "RGB", name
    assert open_image(folder / "sideways.jpg").size == (20, 40)
    for name in ("sixteen.png", "sixteen.tif"):
        values = np.asarray(open_image(folder / name))[..., 0]
        np.testing.assert_array_equal(values, np.rint(RAMP.astype(np.uint16) / 257).astype(np.uint8))
    red = np.asarray(open_image(folder / "cmyk.jpg")).reshape(-1, 3).mean(0)
    assert red[0] > 250 and red[1] < 5 and red[2] < 5
    first, second = Image.open(folder / "animated.gif"), Image.open(folder / "animated.gif")
    second.seek(1)
    shown = np.asarray(open_image(folder / "animated.gif"))
    np.testing.assert_array_equal(shown, np.asarray(first.convert("RGB")))
    assert np.asarray(second.convert("RGB"))[0, 0].tolist() == [0, 0, 255]


def test_every_wrong_picture_is_refused_with_the_reason(folder: Path) -> None:
    for name, (_, words) in BAD.items():
        with pytest.raises(ProbeError, match=words):
            open_image(folder / name)
    for name in ("pipe.png", "circle.png", "folder.png", "a" * 5000, "a\0b"):
        with pytest.raises(ProbeError, match="no picture at"):
            open_image(folder / name)


def test_a_run_over_all_of_them(folder: Path, tiny_folder: Path) -> None:
    """One file with every right and every wrong sample: the right ones are answered, the wrong ones say why."""
    rows = [json.dumps({"image": name, "question": "What colour?"}) for name in GOOD]
    rows += [json.dumps({"image": name, "question": "What colour?"}) for name in BAD]
    rows += list(LINES)
    rows.append(json.dumps({"image": "rgb.png", "question": "and the last?"}))
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "plain.yaml").write_text(RECIPE)
    words = ["run", str(folder / "plain.yaml"), "--backbone", str(tiny_folder), "--no-time"]
    words += ["--data", str(folder / "data.jsonl"), "--out", str(folder / "out")]
    said = CliRunner().invoke(load_cli().app, words, catch_exceptions=False, env={"COLUMNS": "300"})
    bad = len(BAD) + len(LINES)
    assert said.exit_code == 1
    assert f"{bad} of {len(rows)} samples failed; the trace says why" in said.output
    assert f"{bad - 10} more samples failed" in said.output
    reasons = [words for _, words in BAD.values()] + list(LINES.values())
    for side in ("plain", "plain.baseline"):
        assert verify(folder / "out" / f"{side}.trace.h5") == []
        with open_trace(folder / "out" / f"{side}.trace.h5") as trace:
            assert trace.samples.tolist() == list(range(len(rows)))
            failed = trace.array("failed").tolist()
            assert failed[: len(GOOD)] == [""] * len(GOOD) and failed[-1] == ""
            for reason, words in zip(failed[len(GOOD) : -1], reasons, strict=True):
                assert words in reason and "\n" not in reason
    again = CliRunner().invoke(load_cli().app, [*words_of(folder, tiny_folder), "--resume"], env={"COLUMNS": "300"})
    assert again.exit_code == 1 and f"{bad} samples had failed before this run was resumed" in again.output


def words_of(folder: Path, backbone: Path) -> list[str]:
    words = ["run", str(folder / "plain.yaml"), "--backbone", str(backbone), "--no-time"]
    return [*words, "--data", str(folder / "data.jsonl"), "--out", str(folder / "out")]


def test_a_run_in_which_everything_fails(tiny: Any, tmp_path: Path) -> None:
    samples = [Sample(str(i), (), " ") for i in range(3)]
    result = probe.run(probe.parse_recipe(RECIPE), backbone=tiny, samples=samples, out=tmp_path)
    assert (result.failed, result.samples, result.picture) == (3, 3, None)
    assert result.rows[0].n == 0 and np.isnan(result.rows[0].score)
    assert verify(result.trace) == []


def test_samples_given_in_python_are_looked_at_too(tiny: Any, tmp_path: Path) -> None:
    good = Image.new("RGB", (40, 40))
    samples = [
        Sample("long", (Image.new("RGB", (20_000, 1)),), "?"),
        Sample("two", (good, Image.new("L", (30, 9))), "Which?"),
        Sample("modes", (Image.new("RGBA", (30, 30)),), "Which?"),
        Sample("[/bold]", (good,), "[/red] is no markup"),
    ]
    result = probe.run(probe.parse_recipe(RECIPE), backbone=tiny, samples=samples, out=tmp_path, timed=False)
    assert result.failed == 1 and "20000 x 1" in result.notes[0]


def test_files_that_hold_no_data(tmp_path: Path) -> None:
    for content, words in ((b"\xff\xfe\x00", "UTF-8"), (b"", "holds no samples"), (b"\n \n", "holds no samples")):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(ProbeError, match=words):
            from_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(ProbeError, match="cannot be read"):
        from_jsonl(tmp_path)
    with pytest.raises(ProbeError, match="cannot be read"):
        from_jsonl("a" * 5000)
