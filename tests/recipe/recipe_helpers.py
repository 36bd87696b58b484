"""A small vocabulary of the tests' own, so that what is tested here does not depend on the built-in one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from probe.compile import Vocabulary
from probe.registry import Registry
from probe.site import Clock, Site


def _keep(value: Any) -> Any:
    if isinstance(value, str) and value.endswith("%"):
        value = float(value[:-1]) / 100
    if not isinstance(value, int | float):
        raise ValueError("keep must be a share or a number")
    return value


Keep = Annotated[int | float, BeforeValidator(_keep)]


def make_vocabulary() -> Vocabulary:
    scores, selections = Registry("score"), Registry("selection")
    operations, signals = Registry("operation"), Registry("signal")

    @scores.register
    def attention(
        received: Any, *, layer: int = 0, queries: Literal["last", "all"] = "last", flag: bool = False
    ) -> Any:
        """Attention received."""

    @scores.register
    def norm(hidden: Any, *, p: float = 2.0) -> Any:
        """A norm."""

    @scores.register(kind=lambda params: "pairwise" if params["stat"] == "pairwise" else "per_token")
    def similarity(hidden: Any, *, stat: Literal["pairwise", "nearest"] = "pairwise") -> Any:
        """Likeness."""

    @selections.register
    def top(score: Any, count: int, *, keep: Keep, shares: list[float] | None = None) -> Any:
        """The best."""

    @selections.register
    def diverse(similarity: Any, count: int, *, keep: Keep) -> Any:
        """The most different."""

    @selections.register(name="none")
    def nothing(n: int) -> Any:
        """Nothing."""

    @operations.register
    def drop(
        kept: Any,
        *,
        positions: Literal["keep", "compact"] = "keep",
        lasts: Literal["forward", "generation"] = "forward",
    ) -> Any:
        """Take out."""

    @operations.register(default_select="none")
    def withdraw(kept: Any, *, lasts: Literal["forward", "generation"] = "forward") -> Any:
        """Take all out."""

    @signals.register(site=Site.LAYER_ATTENTION)
    def mass(received: Any, *, queries: str = "answer", weights: tuple[float, ...] = ()) -> Any:
        """Mass."""

    @signals.register(site=(Site.LOGITS, Site.FINAL))
    def entropy(logits: Any) -> Any:
        """Entropy."""

    @signals.register(site=Site.FINAL)
    def anywhere(hidden: Any, *, needed: int) -> Any:
        """Recorded at any site."""

    return Vocabulary(scores, selections, operations, signals)


def clock(step: int, nominal: int = 24) -> Clock:
    return Clock(pass_index=step, step=step, block=0, step_in_block=step, nominal_steps=nominal, n_blocks=1)


FASTV = """\
schema: 1
name: fastv
dial: {keep: 0.5, start: 0.0}
probes:
  - name: prune
    at: {site: layer.input, layer: 2, steps: {from: $start}}
    score: {attention: {layer: -1}}
    select: {top: {keep: $keep}}
    do: {drop: {lasts: forward}}
  - at: {site: layer.attention, layers: all}
    record: [mass, {mass: {queries: last, as: mass_last}}]
"""
