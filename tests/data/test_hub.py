"""Data sets in the Hub's formats, from files at hand: no network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from probe.data.hub import from_hub
from probe.errors import ProbeError
from probe.recipe import parse_recipe
from probe.runner import samples_of

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _picture(shade: int) -> Image.Image:
    return Image.new("RGB", (12, 8), (shade, shade, shade))


def _bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, rows: dict[str, list[Any]], **features: Any) -> Path:
    built = datasets.Dataset.from_dict(rows)
    for column, feature in {"image": datasets.Image(), **features}.items():
        built = built.cast_column(column, feature) if column in rows else built
    path.parent.mkdir(parents=True, exist_ok=True)
    built.to_parquet(path)
    return path


def _rows(n: int = 3) -> dict[str, list[Any]]:
    return {
        "image": [{"bytes": _bytes(_picture(40 * i)), "path": None} for i in range(n)],
        "question": [f"How dark is {i}?" for i in range(n)],
        "answer": [["black", "dark"], ["grey"], ["light"]][:n],
        "question_id": [70 + i for i in range(n)],
    }


def test_one_parquet_file(tmp_path: Path) -> None:
    found = list(from_hub(str(_write(tmp_path / "x.parquet", _rows())), metric="anls"))
    assert [(s.id, s.question, s.answers, s.metric) for s in found] == [
        ("70", "How dark is 0?", ("black", "dark"), "anls"),
        ("71", "How dark is 1?", ("grey",), "anls"),
        ("72", "How dark is 2?", ("light",), "anls"),
    ]
    assert [s.images[0].getpixel((0, 0)) for s in found] == [(0, 0, 0), (40, 40, 40), (80, 80, 80)]


def test_a_folder_of_files_has_splits_and_the_test_split_comes_first(tmp_path: Path) -> None:
    _write(tmp_path / "set/train.parquet", _rows(2))
    _write(tmp_path / "set/test.parquet", _rows(3))
    assert len(list(from_hub(str(tmp_path / "set")))) == 3
    assert len(list(from_hub(str(tmp_path / "set"), split="train"))) == 2
    with pytest.raises(ProbeError, match="no split `tests`; did you mean `test`"):
        from_hub(str(tmp_path / "set"), split="tests")


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(_rows()).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert [s.id for s in from_hub(str(tmp_path / "saved"))] == ["70", "71", "72"]


def test_columns_under_other_names_and_one_question_for_all(tmp_path: Path) -> None:
    rows = {"scan": _rows()["image"], "kind": [1, 0, 1]}
    kinds = datasets.ClassLabel(names=["letter", "bill"])
    path = str(_write(tmp_path / "x.parquet", rows, scan=datasets.Image(), kind=kinds))
    with pytest.raises(ProbeError, match="looks like the image .it has scan, kind.; say which"):
        from_hub(path, question="Letter or bill?")
    columns = {"image": "scan", "answers": "kind"}
    found = list(from_hub(path, columns=columns, question="Letter or bill?"))
    assert [(s.id, s.question, s.answers) for s in found] == [
        ("0", "Letter or bill?", ("bill",)),
        ("1", "Letter or bill?", ("letter",)),
        ("2", "Letter or bill?", ("bill",)),
    ]
    with pytest.raises(ProbeError, match="no column `scam`; did you mean `scan`"):
        from_hub(path, columns={"image": "scam"}, question="?")
    with pytest.raises(ProbeError, match="no field `images`"):
        from_hub(path, columns={"images": "scan"}, question="?")


def test_several_pictures_in_a_row(tmp_path: Path) -> None:
    one, two, three = _rows()["image"]
    rows = {"images": [[one, two], [three]], "question": ["Same?", "What?"]}
    path = _write(tmp_path / "x.parquet", rows, images=datasets.Sequence(datasets.Image()))
    assert [len(s.images) for s in from_hub(str(path))] == [2, 1]


def test_a_damaged_picture_and_a_missing_answer_cost_their_row_only(tmp_path: Path) -> None:
    rows = _rows()
    rows["image"][1] = {"bytes": b"torn", "path": None}
    rows["answer"][2] = None
    path = _write(tmp_path / "x.parquet", rows)
    recipe = parse_recipe(f"schema: 1\nname: r\ndata: {{hub: {path}, metric: exact_match}}\n")
    one, two, three = samples_of(recipe)
    assert not isinstance(one, ProbeError) and one.answers == ("black", "dark")
    assert isinstance(two, ProbeError) and "row 1: the picture cannot be read" in str(two)
    assert isinstance(three, ProbeError) and "row 2: the metric `exact_match` needs an answer" in str(three)


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="the data set nobody/nothing cannot be read: "):
        from_hub("nobody/nothing")
    with pytest.raises(ProbeError, match="no metric is called `anlz`; did you mean `anls`"):
        from_hub("x", metric="anlz")
