"""The adapter checklist: what must hold on a backbone, published or new, for probes and recipes to run on it.

A check is a small function of a `Patient`. The first line of its docstring is what is printed; what it returns says
what was seen; it raises `Unwell` with a reason, or `NotHere` where there is nothing to check. `adapter` and
`decoder` look at the model behind the contract, `caches` and `identities` at the engine on top of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from probe.doctor import adapter, caches, decoder, identities
from probe.doctor.patient import NotHere, Patient, Unwell
from probe.errors import ProbeError
from probe.registry import nearest

Check = Callable[[Patient], str]
Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """What one check came to: its name and text, the outcome, what was seen, and the time that it took."""

    name: str
    about: str
    status: Status
    detail: str
    seconds: float


def checks() -> dict[str, Check]:
    """Every check by name, in the order in which they are made."""
    made = (*adapter.CHECKS, *decoder.CHECKS, *caches.CHECKS, *identities.CHECKS)
    return {check.__name__: check for check in made}


def chosen(only: Collection[str] = ()) -> dict[str, Check]:
    """The checks of these names, all of them if there are none. Raises `ProbeError` for an unknown name."""
    known = checks()
    for name in only:
        if name not in known:
            raise ProbeError(f"there is no check `{name}`; {nearest(name, list(known))}")
    return {name: check for name, check in known.items() if not only or name in only}


def examine(patient: Patient, only: Collection[str] = ()) -> Iterator[Finding]:
    """Make the checks (all, or those named) and yield what each comes to."""
    for name, check in chosen(only).items():
        start = time.perf_counter()
        status, detail = _outcome(check, patient)
        about = (check.__doc__ or name).strip().split("\n", 1)[0]
        yield Finding(name, about, status, detail, time.perf_counter() - start)


def _outcome(check: Check, patient: Patient) -> tuple[Status, str]:
    try:
        with torch.inference_mode():
            return "pass", check(patient)
    except NotHere as reason:
        return "skip", str(reason)
    except Unwell as reason:
        return "fail", str(reason)
    except Exception as error:  # an adapter may fail in any way; the other checks still tell where
        return "fail", f"{type(error).__name__}: {error}"
