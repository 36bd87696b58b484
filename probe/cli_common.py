"""What the command line's files share: consoles, arguments that several commands take, and how they are read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from probe.errors import ProbeError

if TYPE_CHECKING:
    from probe.recipe import Recipe

out = Console()
err = Console(stderr=True)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a shipped recipe's name, or a trace to repeat.")
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", "-b", help="Name, folder or Hub id; default: the recipe's, else `miniature`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Turn a dial (keep=0.25) or a setting (generate.steps=8)."),
]

PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file with words of your own: scores, code probes, a backbone, ..."),
]


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: what they make stays for good, so nothing looks for garbage in it.

    Importing torch takes a sixth less without.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def size_of(text: str) -> tuple[int, int]:
    """`--picture WxH`: (width, height) in pixels."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ProbeError(f"--picture {text}: write WIDTHxHEIGHT in pixels, for example 640x480")
    return int(width), int(height)


def shard_of(text: str | None) -> tuple[int, int] | None:
    """`--shard I/N`: (which, of how many)."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ProbeError(f"--shard {text}: write I/N with I from 0 to N-1, for example 0/4")
    return int(index), int(count)


def recipe_of(
    recipe: str,
    sets: list[str] | None,
    *,
    backbone: str | None = None,
    data: str | None = None,
    ask: str | None = None,
    own_samples: bool = False,
) -> Recipe:
    """The recipe of a file, of a shipped name or of a trace, with what the command line changes of it."""
    from probe.recipe import load_recipe, parse_recipe

    overrides = list(sets or ())
    at_once = overrides if data is None else []  # what is set about the data is about --data, so that comes first
    if recipe.endswith((".h5", ".h5.partial")):
        from probe.trace import open_trace

        with open_trace(Path(recipe)) as trace:
            if trace.header.extra.get("own_samples") and not own_samples:
                raise ProbeError(f"{recipe} is of a picture and a question of your own; give --image and --ask again")
            loaded = parse_recipe(trace.header.recipe_yaml, source=recipe, sets=at_once)
    else:
        loaded = load_recipe(recipe, at_once)
    if backbone is not None:
        loaded = loaded.model_copy(update={"backbone": backbone})
    if data is not None:
        from probe.data import named

        kept = {} if loaded.data.limit is None else {"limit": loaded.data.limit}
        loaded = loaded.replace(data={**named(data, ask), **kept}).with_sets(overrides)
    return loaded
