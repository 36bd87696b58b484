"""Whether decoding policies go together, and with a backbone. What cannot work is said before anything runs."""

from __future__ import annotations

from probe.decoding.policy import Caching, Unmasking
from probe.errors import ProbeError
from probe.registry import cachings, unmaskings


def name_of(policy: Unmasking | Caching) -> str:
    """What a recipe calls a policy."""
    names = [e.name for registry in (unmaskings, cachings) for e in registry if e.function is type(policy)]
    return names[0] if names else type(policy).__name__


def misfit(unmasking: Unmasking, caching: Caching, *, shift: int, causal: bool | None = None) -> tuple[str, str] | None:
    """Which setting of `generate` (`unmask` or `cache`) does not fit and why; None where all goes together."""
    name, cache = name_of(unmasking), name_of(caching)
    if unmasking.needs_shift is not None and not shift:
        return "unmask", f"`{name}` {unmasking.needs_shift}, but here a row predicts its own slot, not the next one"
    if unmasking.whole is not None and caching.stores:
        return "cache", f"`{name}` {unmasking.whole}; it goes with no cache, so not with `{cache}`"
    if caching.needs_causal is not None and causal is False:
        return "cache", f"`{cache}` {caching.needs_causal}, but here every row sees what follows it"
    return None


def check_fit(unmasking: Unmasking, caching: Caching, *, shift: int) -> None:
    """Raise `ProbeError` for what `misfit` finds."""
    if (found := misfit(unmasking, caching, shift=shift)) is not None:
        raise ProbeError(found[1])
