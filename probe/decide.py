"""From an intervention and one sample's tensors to a plan: score, select, do, as a recipe composes them.

The engine (or a test) is a `Source`: it gives, by name, what the parts of the vocabulary say they need. Everything else
that happens between a recipe's words and a `Plan` is here: counts, combinations, protected tokens, which tokens a
selection inside another one sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from probe.compile import Edit
from probe.compile_call import Call
from probe.decide_check import check_result
from probe.errors import ProbeError
from probe.inputs import TEXT_INPUT, TOKEN_AXIS, Source
from probe.selections.combinations import Groups, group_of
from probe.selections.counts import Around, attention_rank, how_many
from probe.site import Choice, Clock, Plan

INPUT_OF = {"per_token": "score", "pairwise": "similarity", "features": "features"}
"""What a selection calls a score of each kind."""


def decide(edit: Edit, source: Source, clock: Clock) -> Plan | None:
    """What becomes of one sample's visual tokens; None when all stay as they are.

    Not for operations that change attention (`entry.meta["changes"] == "attention"`): those give a `Reweight` by
    themselves.
    """
    n = int(source.give("n", {}))
    options = edit.do.params(clock)
    if n == 0:
        return None
    choosing = _Choosing(edit, source, clock, n, _protected(source, options.get("protect", ()), n))
    choice = choosing.choose()
    if choice is None or choice.kept.shape[0] == n:
        return None
    return choosing.operate(choice, options)


def _protected(source: Source, names: tuple[str, ...], n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    for name in names:
        mask = mask | source.give(name, {}).cpu()
    return mask


class _Choosing:
    """One decision. Scores are worked out once, for all alive tokens, and cut to those that a selection may choose."""

    def __init__(self, edit: Edit, source: Source, clock: Clock, n: int, protected: Tensor) -> None:
        self.edit = edit
        self.source = source
        self.clock = clock
        self.n = n
        self.everyone = torch.arange(n)
        self.protected = protected
        self.group = torch.zeros(n, dtype=torch.int64)
        self._values: dict[int, Tensor] = {}

    def choose(self) -> Choice | None:
        """What the outermost selection keeps, protected tokens included; None when it would keep everything."""
        call = self.edit.select
        if "protected" in call.entry.needs or not self.protected.any():
            return self._choice(call, self.everyone, outermost=True)
        free, safe = self.everyone[~self.protected], self.everyone[self.protected]
        choice = self._choice(call, free, outermost=True, reserved=safe.shape[0])
        if choice is None:
            return None
        part = None
        if choice.part is not None:
            part = torch.cat([choice.part, torch.full_like(safe, -1)])
        return Choice(torch.cat([choice.kept, safe.to(choice.kept.device)]), choice.into, part, choice.parts)

    def _choice(
        self,
        call: Call,
        candidates: Tensor,
        around: Around | None = None,
        *,
        outermost: bool = False,
        reserved: int = 0,
    ) -> Choice | None:
        """What one selection keeps of `candidates`, as indices of alive tokens; `reserved` others count as kept.

        None where the outermost one would keep them all.
        """
        params = call.params(self.clock)
        held = self.group, self._values
        if "groups" in params:  # scores inside may depend on the groups: nothing known before is reused
            self.group, self._values = self._grouped(params["groups"]), {}
        try:
            count = self._count(call, params, candidates, around, reserved)
            if outermost and count is not None and count >= candidates.shape[0]:
                return None
            picks = {k: _one_or_all(call, k, self._inside(call, k, candidates)) for k in call.nested}
            given = {
                "n": candidates.shape[0],
                "count": count,
                "candidate": candidates,
                "alive": self.n,
                "budget": None if around is None else around.budget,
            }
            found = self._call(call, params, given, candidates, picks)
        finally:
            self.group, self._values = held
        choice = found if isinstance(found, Choice) else Choice(found)
        if candidates.shape[0] == self.n:
            return choice
        candidates = candidates.to(choice.kept.device)
        into = choice.into
        if into is not None:
            matched = torch.where(into >= 0, candidates[into.clamp_min(0)], -1)
            into = torch.full((self.n,), -1, dtype=torch.int64, device=into.device)
            into[candidates] = matched
        return Choice(candidates[choice.kept], into, choice.part, choice.parts)

    def _inside(self, call: Call, name: str, candidates: Tensor) -> tuple[Callable[..., Tensor], ...]:
        """The parts that stand inside a selection, ready to be called: selections, or scores of its candidates."""
        calls = call.nested[name]
        if call.entry.slots[name].kind == "selection":
            return self._picks(calls, candidates)
        return tuple(lambda c=c: self.value(c)[candidates.to(self.source.device)] for c in calls)

    def _picks(self, calls: tuple[Call, ...], candidates: Tensor) -> tuple[Callable[..., Tensor], ...]:
        """The selections inside another one, which speaks of its candidates by their place among them."""

        def picker(call: Call) -> Callable[..., Tensor]:
            def pick(inner: Tensor, *, budget: int | None, left: int | None) -> Tensor:
                around = None if budget is None or left is None else Around(budget, left)
                choice = self._choice(call, candidates[inner], around)
                assert choice is not None
                place = torch.full((self.n,), -1, dtype=torch.int64)
                place[candidates] = torch.arange(candidates.shape[0])
                return place[choice.kept.cpu()]

            return pick

        return tuple(picker(call) for call in calls)

    # -- what parts are given -------------------------------------------------------------------------------------

    def _call(
        self, call: Call, params: dict[str, Any], given: dict[str, Any], candidates: Tensor, nested: dict[str, Any]
    ) -> Any:
        reads = call.entry.reads(params)
        for name in reads:
            if name not in given:
                given[name] = self._input(name, params, call, candidates)
        result = call.entry.function(*(given[n] if n in reads else None for n in call.entry.needs), **params, **nested)
        check_result(call, params, result, candidates.shape[0])
        self._spend(call, given | params | nested, candidates.shape[0])
        return result

    def _input(self, name: str, params: Mapping[str, Any], call: Call, candidates: Tensor) -> Any:
        if name in INPUT_OF.values():
            value = self._of_kind(name, call)
            if candidates.shape[0] == self.n:
                return value
            here = candidates.to(value.device)
            return value[here][:, here] if name == "similarity" else value[here]
        if name in ("group", "protected"):
            return getattr(self, name)[candidates].to(self.source.device)
        if name == "text_score":
            return self._text_score()
        value = self.source.give(name, params)
        axis = TOKEN_AXIS.get(name)
        if axis is None or candidates.shape[0] == self.n:
            return value
        return value.index_select(axis, candidates.to(value.device))

    def _grouped(self, groups: Groups) -> Tensor:
        view = self.source.give("view", {}) if groups.by == "view" else None
        columns = self.source.give("columns", {}) if groups.by == "window" else None
        return group_of(groups, self.n, None if view is None else view.cpu(), columns)

    def _of_kind(self, name: str, call: Call) -> Tensor:
        """The score that a selection reads under this name: its own if it has one of that kind, else the probe's."""
        for score in (call.score, self.edit.score):
            if score is not None and INPUT_OF[kind_of(score, self.clock)] == name:
                return self.value(score)
        raise ProbeError(f"`{call.entry.name}` reads `{name}`, but no score of that kind is there")

    def value(self, score: Call) -> Tensor:
        """A score's values for all alive tokens."""
        key = id(score)
        if key not in self._values:
            params = score.params(self.clock)
            nested = {
                k: _one_or_all(score, k, tuple(self._scorer(c) for c in calls)) for k, calls in score.nested.items()
            }
            value = self._call(score, params, {"n": self.n}, self.everyone, nested)
            self.source.doubt(value)
            self._values[key] = value.to(self.source.device)
        return self._values[key]

    def _scorer(self, call: Call) -> Callable[[], Tensor]:
        return lambda: self.value(call)

    def _text_score(self) -> Tensor:
        """The probe's score of the text rows."""
        score = self.edit.score
        assert score is not None
        params = score.params(self.clock)
        reads = score.entry.reads(params)
        given = {n: self.source.give(TEXT_INPUT[n], params) for n in reads if n in TEXT_INPUT}
        return score.entry.function(*(given.get(n) for n in score.entry.needs), **params)

    def _count(
        self, call: Call, params: Mapping[str, Any], candidates: Tensor, around: Around | None, reserved: int
    ) -> int | None:
        """How many of the candidates a selection keeps; None where it has no `keep`.

        A combination without one passes on what is left of that around it.
        """
        keep = params.get("keep")
        if keep is None:
            return around.left if around is not None and call.nested else None
        count = how_many(
            keep,
            candidates.shape[0] + reserved,
            original=int(self.source.give("original", {})),
            rounding=params.get("round", "floor"),
            progress=self.source.give("progress", {}),
            around=around,
            score=lambda: self._input("score", params, call, candidates),
            rank=lambda: self._rank(candidates),
        )
        return max(count - reserved, 0)

    def _rank(self, candidates: Tensor) -> int:
        assert self.edit.score is not None
        rows = self.source.give("attended", self.edit.score.params(self.clock))
        return attention_rank(rows.index_select(1, candidates.to(rows.device)))

    # -- what becomes of them -------------------------------------------------------------------------------------

    def operate(self, choice: Choice, options: dict[str, Any]) -> Plan:
        """The operation's plan."""
        call = self.edit.do
        device = self.source.device
        given: dict[str, Any] = {
            "kept": choice.kept.to(device),
            "into": None if choice.into is None else choice.into.to(device),
            "part": None if choice.part is None else choice.part.to(device),
            "parts": choice.parts,
        }
        nested = {name: self._scorer(calls[0]) for name, calls in call.nested.items()}
        plan = self._call(call, options, given, self.everyone, nested)
        return cast(Plan, plan)

    def _spend(self, call: Call, given: dict[str, Any], n: int) -> None:
        flops = call.entry.meta.get("flops")
        if flops is None:
            return
        if len(inspect.signature(flops).parameters) == 2:
            hidden = given.get("hidden")
            hidden = self.source.give("hidden", {}) if hidden is None else hidden
            self.source.spend(int(flops(n, hidden.shape[-1])))
        else:
            self.source.spend(int(flops(given)))


def _one_or_all(call: Call, name: str, parts: tuple[Any, ...]) -> Any:
    """What a parameter that takes parts is given: all of them, or the only one."""
    return parts if call.entry.slots[name].many else parts[0]


def kind_of(score: Call, clock: Clock) -> str:
    """Whether a score gives one number per token, one per pair, or vectors."""
    kind = score.entry.meta.get("kind", "per_token")
    return str(kind(score.params(clock)) if callable(kind) else kind)


def score_of(edit: Edit, source: Source, clock: Clock) -> Tensor | None:
    """What an intervention's score gives for all alive visual tokens, before anything is selected."""
    n = int(source.give("n", {}))
    choosing = _Choosing(edit, source, clock, n, torch.zeros(n, dtype=torch.bool))
    return None if edit.score is None else choosing.value(edit.score)
