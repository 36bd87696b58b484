"""The page of pruners lists every shipped recipe as it is."""

from __future__ import annotations

from recipe_table import PAGE, table, told


def test_the_table_is_what_the_recipes_say() -> None:
    assert told(PAGE.read_text()) == table(), "run `python tests/docs/recipe_table.py`"
