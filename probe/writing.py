"""The decorators with which a user adds to the vocabulary: `@probe.score`, `@probe.selection`, and so on.

Each registers a function (or, for policies, a class) under its own name, which is then what a recipe writes. They
stand bare, or with options: `@probe.score(kind="pairwise")`. `probe.nnsight` makes a probe of arbitrary code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from probe.errors import ProbeError
from probe.probe_code import code_probe
from probe.registry import (
    cachings,
    calibrations,
    lengths,
    nearest,
    operations,
    scores,
    selections,
    signals,
    unmaskings,
)
from probe.site import Site

__all__ = [
    "caching",
    "calibration",
    "length",
    "nnsight",
    "operation",
    "score",
    "selection",
    "signal",
    "unmasking",
]

score = scores.register
selection = selections.register
calibration = calibrations.register
unmasking = unmaskings.register
caching = cachings.register
length = lengths.register
nnsight = code_probe


def operation(
    function: Callable[..., Any] | None = None,
    *,
    sites: str | Iterable[str] | None = None,
    name: str | None = None,
    **meta: Any,
) -> Any:
    """Register what becomes of the tokens that a selection did not keep: a function that returns a `Plan`.

    It must take the keywords `positions` and `lasts`, which the engine carries out (`probe.operations`). `sites` are
    those at which it makes sense (None: all where tokens can leave).
    """

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        keywords = [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if meta.get("changes") != "attention" and (missing := {"positions", "lasts"} - set(keywords)):
            raise ProbeError(
                f"operation `{name or f.__name__}` lacks the keyword `{min(missing)}`; write `*, positions: "
                'Literal["keep", "compact"] = "keep", lasts: Literal["forward", "generation"] = "forward"`'
            )
        more = meta if sites is None else meta | {"sites": _sites(sites)}
        done: Callable[..., Any] = operations.register(f, name=name, **more)
        return done

    return add(function) if function is not None else add


def signal(
    function: Callable[..., Any] | None = None,
    *,
    site: str | Iterable[str] = (),
    dims: Any = (),
    units: str = "1",
    long_name: str = "",
    formula: str = "",
    name: str | None = None,
    **meta: Any,
) -> Any:
    """Register a quantity to record at `site` (one, or several): `(batch, *dims)`.

    `long_name` is what the trace says that it means, by default the first line of the docstring.
    """

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        said = long_name or (inspect.getdoc(f) or name or f.__name__).split("\n", 1)[0]
        where = _sites(site)
        if not where:
            raise ProbeError(
                f'signal `{name or f.__name__}` must say where it is recorded: @probe.signal(site="layer.output")'
            )
        done: Callable[..., Any] = signals.register(
            f, name=name, site=where, dims=dims, units=units, long_name=said, formula=formula, **meta
        )
        return done

    return add(function) if function is not None else add


def _sites(names: str | Iterable[str]) -> tuple[Site, ...]:
    known = [site.value for site in Site]
    given = (names,) if isinstance(names, str) else tuple(names)
    for one in given:
        if one not in known:
            raise ProbeError(f"there is no site `{one}`; {nearest(str(one), known)}")
    return tuple(Site(one) for one in given)
