"""The YAML reader: plain data with positions, safe whatever the bytes, and the writer is its inverse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ProbeError
from probe.recipe_yaml import MAX_INT, Document, Place, dump_yaml, read_yaml


def data(text: str | bytes) -> object:
    return read_yaml(text, "x.yaml").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("1e-3", 0.001),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("50%", "50%"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("0x10", "0x10"),
        ("'0.5'", "0.5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        (str(MAX_INT), MAX_INT),
        ("$keep", "$keep"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{0%: 1, 0.5: 2, 0: 3}", {"0%": 1, "0.5": 2, "0": 3}),
    ],
)
def test_scalars_mean_what_a_reader_expects(text: str, value: object) -> None:
    read = data(f"a: {text}")
    assert read == {"a": value}
    assert type(read["a"]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: 1\nb: *x", "anchors and aliases"),
        ("&x a: 1", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !thing 1", "tag"),
        ("a: !!map [1]", "tag"),
        ("a: !!int x", "is no int"),
        ("a: 1\na: 2", "stands twice (first in line 1)"),
        ("true: 1", "cannot be a key"),
        ("~: 1", "cannot be a key"),
        ("[1]: 1", "a key must be a word"),
        ("{a: 1}: 1", "a key must be a word"),
        ("a: 010", "starts with a zero"),
        (f"a: {MAX_INT + 1}", "beyond 64 bits"),
        ("a: 1e999", "larger than"),
        ("a: .inf", "finite"),
        ("a: -.inf", "finite"),
        ("a: .nan", "finite"),
        ("a: 1\n---\nb: 2", "second document"),
        ("", "is empty"),
        ("# only a comment", "is empty"),
        ("a: [1", "not valid YAML"),
        ("a:\n\t- 1", "indent with spaces"),
        ('a: "\\0"', "control character"),
        ('a: "\\uD800"', "surrogate"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("%YAML " + "9" * 5000 + "\n--- a", "not valid YAML"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 100_000, "nested deeper than 32"),
        ("a: " + "x" * (256 * 1024), "longer than 256 KiB"),
    ],
)
def test_what_is_refused_says_why_and_where(text: str, words: str) -> None:
    with pytest.raises(ProbeError) as error:
        data(text)
    assert words in str(error.value)
    assert str(error.value).startswith("x.yaml:")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ProbeError, match="not UTF-8"):
        data(b"a: \xff")


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert data(b"\xef\xbb\xbfa: 1") == {"a": 1}
    assert data("\ufeffa: 1") == {"a": 1}


def test_positions_count_from_one_and_name_keys_and_values() -> None:
    document = read_yaml("a: 1\nlist:\n  - x\n  - {deep: true}\n", "x.yaml")
    assert str(document.place(("a",))) == "x.yaml:1:4"
    assert str(document.place(("a",), key=True)) == "x.yaml:1:1"
    assert str(document.place(("list", 0))) == "x.yaml:3:5"
    assert str(document.place(("list", 1, "deep"))) == "x.yaml:4:12"
    assert str(document.place(("list", 1, "deep"), key=True)) == "x.yaml:4:6"
    assert str(document.place(("list", 1, "missing", "deeper"))) == "x.yaml:4:5"


def test_items_of_a_list_carry_their_places() -> None:
    first, second = read_yaml("l:\n  - {a: 1}\n  - {b: 2}\n", "x").items(("l",))
    assert (first.data, second.data) == ({"a": 1}, {"b": 2})
    assert second.place(("b",)) == Place("x", 3, 9)
    assert second.place((), key=True) == Place("x", 3, 5)


def test_a_document_without_places_still_answers() -> None:
    assert str(Document({}).place(("a",))) == "<recipe>"


_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "",
        "~",
        "null",
        "true",
        "yes",
        "1",
        "1e-3",
        ".5",
        "010",
        ".inf",
        "50%",
        "$a",
        "- x",
        "a: b",
        "#",
        "'",
        '"',
        "\n",
        "a\nb",
        "*",
        "&x",
    ]
)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_INT, MAX_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT
)
_DATA = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=8
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_TEXT, _DATA, min_size=1, max_size=4))
def test_what_is_written_reads_back_the_same(value: dict[str, object]) -> None:
    back = data(dump_yaml(value))
    assert back == value
    assert _types(back) == _types(value)


def _types(value: object) -> object:
    if isinstance(value, dict):
        return {k: _types(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_types(v) for v in value]
    return type(value), math.copysign(1, value) if isinstance(value, float) else None


def test_a_value_that_occurs_twice_is_written_twice() -> None:
    shared = [1, 2]
    assert data(dump_yaml({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}
