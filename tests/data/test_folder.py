"""A folder of pictures with one question, and what `--data` takes a text for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from probe import data
from probe.data.folder import from_folder
from probe.errors import ProbeError
from probe.recipe import load_recipe, parse_recipe
from probe.runner import samples_of

OLD = "schema: 1\nname: r\ndata: {task: world/long, limit: 3}\n"
HASH = "026ab8b557655be0"  # of this recipe, before a recipe's data could be more than a task or a file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), (0, 0, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "c.png").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("not a picture either")
    (tmp_path / "d.png").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "e.webp")
    return tmp_path


def test_every_picture_is_a_sample_and_a_damaged_one_does_not_end_the_rest(folder: Path) -> None:
    recipe = parse_recipe(f"schema: 1\nname: r\ndata: {{folder: {folder}, ask: 'What is this?'}}\n")
    found = list(samples_of(recipe))
    assert [s.id if isinstance(s, data.Sample) else "damaged" for s in found] == ["a.jpg", "b.png", "damaged", "e.webp"]
    assert "c.png" in str(found[2])
    first = found[0]
    assert isinstance(first, data.Sample)
    assert (first.question, first.images[0].size, first.answers, first.metric) == ("What is this?", (8, 8), (), "")
    assert len(list(samples_of(recipe.with_sets(["data.limit=2"])))) == 2


def test_a_folder_without_pictures_and_a_question_without_words_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProbeError, match="holds no pictures"):
        from_folder(tmp_path / "empty", "?")
    with pytest.raises(ProbeError, match="no folder"):
        from_folder(tmp_path / "none", "?")
    with pytest.raises(ProbeError, match="empty question"):
        from_folder(folder, " ")


def test_what_a_text_after_data_is_taken_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.parquet").write_bytes(b"")
    assert data.named("world/mixed") == {"task": "world/mixed"}
    assert data.named("world/mixd") == {"task": "world/mixd"}  # which is refused with the right name
    assert data.named("no/such.jsonl") == {"file": "no/such.jsonl"}
    assert data.named(str(folder), "What?") == {"folder": str(folder), "ask": "What?"}
    assert data.named(str(tmp_path / "set")) == {"hub": str(tmp_path / "set")}
    assert data.named(str(tmp_path / "set" / "test.parquet"), "What?")["ask"] == "What?"
    assert data.named("owner/name") == data.named("hub:owner/name") == {"hub": "owner/name"}
    assert data.named("lmms_eval:pope") == {"lmms_eval": "pope"}
    with pytest.raises(ProbeError, match="say what to ask"):
        data.named(str(folder))
    with pytest.raises(ProbeError, match="questions of its own"):
        data.named("world/mixed", "What?")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{folder: x}", "needs a question"),
        ("{folder: x, file: y, ask: z}", "names both a `file` and a `folder`"),
        ("{task: world/mixed, ask: z}", "`ask` is the question about"),
        ("{task: world/mixed, split: test}", "on the `hub` only"),
        ("{file: x, metric: anls}", "on the `hub` only"),
    ],
)
def test_parts_of_data_that_do_not_fit_are_named(said: str, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        parse_recipe(f"schema: 1\nname: r\ndata: {said}\n")


def test_keys_that_nobody_uses_do_not_change_what_a_recipe_is_called_by() -> None:
    recipe = load_recipe("fastv")
    assert set(recipe.model_dump()["data"]) == {"task", "file", "limit"}
    asked = [recipe.replace(data={"folder": "x", "ask": question}).hash for question in ("What?", "Why?")]
    assert len({recipe.hash, *asked}) == 3
    assert parse_recipe(OLD).hash == HASH, "traces made before these keys came could not be resumed"
