"""The user's own pictures and questions, and what is said when something is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probe.data import from_image, from_images, from_jsonl, pictures
from probe.errors import ProbeError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "red.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    (tmp_path / "notes.png").write_text("not a picture")
    return tmp_path


def _write(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_one_picture(folder: Path) -> None:
    sample = from_image(folder / "grey.png", "What is this?")
    assert sample.images[0].mode == "RGB"
    assert sample.images[0].getpixel((0, 0)) == (77, 77, 77)
    assert (sample.answers, sample.metric) == ((), "")


def test_several_pictures_keep_their_order(folder: Path) -> None:
    sample = from_images([folder / "grey.png", folder / "red.png"], "Same?")
    assert [image.size for image in sample.images] == [(8, 8), (30, 20)]
    assert sample.pictures == sample.images
    assert sample.id == "grey.png, red.png"
    with pytest.raises(ProbeError, match="at least one"):
        from_images([], "Same?")


def test_a_list_of_frames_is_one_clip(folder: Path) -> None:
    (sample,) = from_jsonl(_write(folder, {"frames": ["red.png", "grey.png", "red.png"], "question": "What happens?"}))
    assert [frame.size for frame in sample.frames] == [(30, 20), (8, 8), (30, 20)]
    assert (sample.images, sample.pictures) == ((), sample.frames)


def test_a_picture_is_turned_as_its_orientation_says(folder: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255  # upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; shown after a quarter turn clockwise
    Image.fromarray(pixels).save(folder / "lying.png", exif=exif)
    turned = from_image(folder / "lying.png", "?").images[0]
    assert turned.size == (4, 6)
    assert turned.getpixel((3, 0)) == (255, 255, 255)


def test_lines_become_samples(folder: Path) -> None:
    path = _write(
        folder,
        {"image": "red.png", "question": "Colour?", "answer": "red", "id": "a"},
        "",
        {
            "images": ["red.png", "grey.png"],
            "question": "Same?",
            "answers": ["no", "No."],
            "metric": "token_accuracy",
        },
        {"image": "grey.png", "question": "What?"},
    )
    one, two, three = from_jsonl(path)
    assert (one.id, one.answers, one.metric) == ("a", ("red",), "exact_match")
    assert (two.id, len(two.images), two.answers) == ("3", 2, ("no", "No."))
    assert two.metric == "token_accuracy"
    assert (three.answers, three.metric) == ((), "")


RIGHT = {"image": "red.png", "question": "?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": ', r"line 2: not JSON"),
        ([1], r"line 2: a JSON object is wanted, not list"),
        ({"image": "red.png", "qestion": "?"}, r"line 2: unknown field `qestion`; did you mean `question`"),
        ({"image": "red.png"}, r"line 2: `question` must be a text"),
        ({"image": "red.png", "question": "  "}, r"line 2: `question` must be a text"),
        ({"question": "?"}, r"line 2: no picture; give `image`"),
        ({"images": [], "question": "?"}, r"line 2: no picture; `images` is empty"),
        ({"frames": [], "question": "?"}, r"line 2: no picture; `frames` is empty"),
        ({"frames": "red.png", "question": "?"}, r"line 2: `frames` must be a list"),
        ({"image": "red.png", "frames": ["red.png"], "question": "?"}, r"line 2: both `image` and `frames`"),
        ({"images": ["red.png"], "video": "a.mp4", "question": "?"}, r"line 2: both `images` and `video`"),
        ({"video": "none.mp4", "question": "?"}, r"line 2: no video at .*none\.mp4"),
        ({"video": ["a.mp4"], "question": "?"}, r"line 2: `video` must be a text"),
        ({"video": "red.png", "frames": 0, "question": "?"}, r"line 2: beside `video`, `frames` is how many"),
        ({"video": "red.png", "frames": ["red.png"], "question": "?"}, r"line 2: beside `video`, `frames` is how many"),
        ({"image": 3, "question": "?"}, r"line 2: `image` must be a text"),
        ({"images": "red.png", "question": "?"}, r"line 2: `images` must be a list"),
        ({"image": "red.png", "images": ["red.png"], "question": "?"}, r"line 2: both `image` and `images`"),
        ({"image": "blue.png", "question": "?"}, r"line 2: no picture at .*blue\.png"),
        ({**RIGHT, "answers": ["x", 2]}, r"line 2: `answers` must be a list of texts"),
        ({**RIGHT, "answer": "x", "metric": "exact_mach"}, r"line 2: .*did you mean `exact_match`"),
        ({**RIGHT, "metric": "exact_match"}, r"line 2: the metric `exact_match` needs an `answer`"),
        ({**RIGHT, "id": "1"}, r"line 2: the id '1' was already used at .*line 1"),
        ({**RIGHT, "id": None}, r"line 2: `id` must be"),
    ],
)
def test_a_wrong_line_is_named_with_what_would_be_right(folder: Path, row: object, message: str) -> None:
    path = _write(folder, RIGHT, row, {**RIGHT, "id": "last"})
    samples = from_jsonl(path)
    assert next(samples).question == "?"
    with pytest.raises(ProbeError, match=message) as caught:
        next(samples)
    assert str(path) in str(caught.value)
    assert next(samples).id == "last", "the other lines are read all the same"


def test_a_file_without_a_right_line_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(ProbeError, match=r"line 1: not JSON.*none of the 2 lines is right"):
        from_jsonl(_write(folder, "{", {"image": "blue.png", "question": "?"}))


def test_reading_goes_on_after_a_damaged_picture(folder: Path) -> None:
    samples = from_jsonl(_write(folder, {**RIGHT, "image": "torn.png"}, {**RIGHT, "image": "notes.png"}, RIGHT))
    with pytest.raises(ProbeError, match=r"line 1: .*torn\.png cannot be read"):
        next(samples)
    with pytest.raises(ProbeError, match=r"line 2: .*notes\.png is not a picture"):
        next(samples)
    assert next(samples).id == "3"


def test_missing_and_empty_files(folder: Path) -> None:
    with pytest.raises(ProbeError, match=r"no file at .*none\.jsonl"):
        from_jsonl(folder / "none.jsonl")
    with pytest.raises(ProbeError, match="holds no samples"):
        from_jsonl(_write(folder, "", " "))
    with pytest.raises(ProbeError, match=r"no picture at .*nothing\.png"):
        from_image(folder / "nothing.png", "?")
    with pytest.raises(ProbeError, match="that is a folder"):
        from_image(folder, "?")
    with pytest.raises(ProbeError, match="empty question"):
        from_image(folder / "red.png", " ")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 599)
    with pytest.raises(ProbeError, match="megapixels"):
        from_image(folder / "red.png", "?")  # 30 x 20 = 600
    monkeypatch.setattr(pictures, "MOST_PIXELS", 600)
    from_image(folder / "red.png", "?")
