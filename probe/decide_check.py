"""Whether a part of the vocabulary returned what its kind has to: said of a user's own parts before torch stumbles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probe.compile_call import Call
from probe.errors import ProbeError
from probe.site import Choice, Plan

_SHAPES = {
    "per_token": "one number per token, ({n},)",
    "pairwise": "one number per pair of tokens, ({n}, {n})",
    "features": "one vector per token, ({n}, d)",
}


def check_result(call: Call, params: Mapping[str, Any], result: Any, n: int) -> None:
    """Raise `ProbeError` unless the result of a part that was given n tokens has the form that its kind has.

    Looks at types and shapes alone, so nothing waits for the device.
    """
    check = {"score": _score, "selection": _selection, "operation": _operation}.get(call.entry.kind)
    wanted = None if check is None else check(call, params, result, n)
    if wanted is not None:
        where = getattr(call.entry.function, "__code__", None)
        place = "" if where is None else f" ({where.co_filename}:{where.co_firstlineno})"
        raise ProbeError(f"the {call.entry.kind} `{call.entry.name}`{place} returned {_said(result)}; {wanted}")


def _said(result: Any) -> str:
    if isinstance(result, Tensor):
        kind = str(result.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(result.shape)}, {kind}"
    return (
        f"{result!r:.60}" if result is None or isinstance(result, int | float | str) else f"a {type(result).__name__}"
    )


def _score(call: Call, params: Mapping[str, Any], result: Any, n: int) -> str | None:
    kind = call.entry.meta.get("kind", "per_token")
    kind = str(kind(params) if callable(kind) else kind)
    fits = isinstance(result, Tensor) and result.shape[:1] == (n,)
    if fits and kind == "per_token":
        fits = result.dim() == 1
    elif fits:
        fits = result.dim() == 2 and (kind == "features" or result.shape[1] == n)
    return None if fits else f"with {n} tokens it should be {_SHAPES[kind].format(n=n)}"


def _selection(call: Call, params: Mapping[str, Any], result: Any, n: int) -> str | None:
    kept = result.kept if isinstance(result, Choice) else result
    fits = isinstance(kept, Tensor) and kept.dim() == 1 and kept.dtype == torch.int64 and kept.shape[0] <= n
    return None if fits else f"it should be the indices of those that stay, (k,) int64, at most {n}, or a `Choice`"


def _operation(call: Call, params: Mapping[str, Any], result: Any, n: int) -> str | None:
    return None if isinstance(result, Plan) else "it should be a `Plan` (from probe.site import Plan)"
