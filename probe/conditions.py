"""When conditional interventions act: the scalars of one batch's passes, and which conditions have held for whom.

A condition (`recipe_when`) looks at what was observed up to the previous pass, so a probe can first act in the second
pass. Once its conditions have held for a sample, the probe stays on for that sample (`once: true`, the default).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from probe.recipe_when import LOGIT_SIGNALS, Condition
from probe.site import Clock


class Watch:
    """The scalars of one batch's passes, and which conditions have held for whom.

    Values stay on the device until they are asked for, once per pass.
    """

    def __init__(self, conditions: Iterable[Condition], batch: int, layers: int, model: str) -> None:
        self.conditions = tuple(dict.fromkeys(conditions))
        self.batch = batch
        self.layers = {c: c.layers.resolve(layers, model) for c in self.conditions if c.signal == "attention_mass"}
        self._history: dict[Condition, list[list[float]]] = {c: [[] for _ in range(batch)] for c in self.conditions}
        self._held: dict[Condition, list[bool]] = {c: [False] * batch for c in self.conditions}
        self._seen: dict[Condition, list[Tensor]] = {}
        self._pending: dict[Condition, Tensor] = {}

    def wanted(self, layer: int) -> list[Condition]:
        """The conditions on attention that look at a layer."""
        return [c for c, layers in self.layers.items() if layer in layers]

    def note_attention(self, condition: Condition, mass: Tensor) -> None:
        """One layer's `(batch,)` share of attention from a condition's rows to its keys."""
        self._seen.setdefault(condition, []).append(mass)

    def note_logits(self, logits: Tensor, confidence: Tensor, eligible: Tensor, clock: Clock) -> None:
        """A pass has decided: `logits (batch, c, vocabulary)`, `confidence`, `eligible (batch, c)`."""
        values: dict[str, Tensor] = {}
        for name in {c.signal for c in self.conditions}:
            if name == "committed":
                values[name] = torch.tensor(clock.committed, dtype=torch.float64)
            elif name in LOGIT_SIGNALS and confidence.shape[1]:
                each = confidence if name == "confidence" else _of_logits(name, logits)
                count = eligible.sum(1)
                mean = torch.where(eligible, each, 0.0).sum(1) / count
                values[name] = torch.where(count > 0, mean, torch.nan)
        for condition in self.conditions:
            if condition.signal in values:
                self._pending[condition] = values[condition.signal]

    def end_of_pass(self) -> None:
        """What was seen in the pass joins the history: one synchronisation for all of it."""
        for condition, masses in self._seen.items():
            self._pending[condition] = torch.stack(masses).nanmean(0)
        self._seen = {}
        for condition, value in self._pending.items():
            for b, number in enumerate(value.tolist()):
                if number == number:
                    self._history[condition][b].append(number)
                    self._held[condition][b] |= condition.holds(self._history[condition][b])
        self._pending = {}

    def allows(self, conditions: tuple[Condition, ...], sample: int) -> bool:
        """Whether all conditions hold for a sample: now, or at some pass before where they say `once`."""
        return all(self._held[c][sample] if c.once else c.holds(self._history[c][sample]) for c in conditions)


def _of_logits(name: str, logits: Tensor) -> Tensor:
    if name == "margin":
        top = logits.softmax(-1).topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(-1)
