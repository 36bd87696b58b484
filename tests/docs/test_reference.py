"""The reference is what the registries say now, and every word of the vocabulary stands in it."""

from __future__ import annotations

import re

from probe.reference import CHAPTERS, PAGE, page


def test_the_page_is_written_anew_when_the_vocabulary_changes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it with `python -m probe.reference`"


def test_every_word_has_its_place_and_what_it_takes() -> None:
    chapters = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL))
    for title, _, words, _ in CHAPTERS:
        for entry in words:
            if not entry.function.__module__.startswith("probe."):
                continue
            text = chapters[title].split(f"### {entry.name}\n", 1)[1].split("\n### ", 1)[0]
            assert text.count("\n\n") >= 1
            fields = entry.params.model_fields
            for name in (*(field.alias or n for n, field in fields.items()), *entry.slots):
                assert re.search(rf"\b{re.escape(name)}\b", text), (entry.name, name)
