"""The optimiser of the miniature's training: a bfloat16 working copy, float32 masters, Muon and AdamW.

bfloat16 matrix products are four to five times as fast as float32 ones on a current CPU core. The forward
and the backward run on a bfloat16 copy of the weights; updates go to a float32 master, so that small steps
are not rounded away. Matrices inside blocks are updated by Muon (Jordan et al. 2024), everything else by
AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def schedule(progress: float, step: int, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Learning-rate factor: linear warm-up over ``warmup`` steps, constant, linear to 0.02 at progress 1."""
    rise = min(1.0, (step + 1) / warmup)
    fall = 1.0 if progress <= decay_from else max(0.02, (1 - progress) / (1 - decay_from))
    return rise * fall


class MixedTrainer:
    """Owns the float32 masters of some modules and steps them from the gradients of the bfloat16 copies.

    ``is_block_matrix(name, parameter)`` says which parameters Muon takes. Learning rates are those of the
    plateau; :meth:`step` scales them.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        is_block_matrix: Callable[[str, nn.Parameter], bool],
        muon: float = 3e-3,
        adamw: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        pairs = list(named)
        self.work = [p for _, p in pairs]
        self.masters = [p.detach().float().clone() for p in self.work]
        self.grads = [torch.zeros_like(m) for m in self.masters]
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        for parameter in self.work:
            parameter.data = parameter.data.to(torch.bfloat16)
        matrix = [is_block_matrix(name, p) for name, p in pairs]
        blocks = [m for m, yes in zip(self.masters, matrix, strict=True) if yes]
        others = [m for m, yes in zip(self.masters, matrix, strict=True) if not yes]
        self.rates = (muon, adamw)
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(blocks, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adamw, weight_decay=0.01, betas=(0.9, 0.95), foreach=True),
        ]

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> float:
        """Apply the gradients now on the working copies; returns the gradient norm before clipping."""
        torch._foreach_copy_(self.grads, [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.work])
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip, foreach=True)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        torch._foreach_copy_([p.data for p in self.work], self.masters)
        for parameter in self.work:
            parameter.grad = None
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Masters and optimiser states."""
        return {"masters": self.masters, "optimisers": [o.state_dict() for o in self.optimisers]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the working copies follow."""
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        torch._foreach_copy_([p.data for p in self.work], self.masters)
