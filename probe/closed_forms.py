"""The study's closed forms of cost (arXiv 2511.15098, equations 6 to 8), beside which executed FLOPs are printed.

They count one operation per multiply-add, an MLP of two matrices and as many key-value heads as heads; they leave out
encoder, projector, vocabulary head and the pruner. What really runs is counted by `probe.cost`. The two agree, but for
the factor 2, exactly for a decoder without grouped heads, whose gated MLP is 2/3 m wide and which caches nothing.

The equations' bodies are missing from the text at hand; (6) and (7) are as others quote them, (8) follows the words.
"""

from __future__ import annotations

from collections.abc import Sequence


def layer(tokens: int, width: int, mlp: int) -> int:
    """One layer over n tokens: ``4 n d^2 + 2 n^2 d + 2 n d m``."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp


def prefill(tokens: int, width: int, mlp: int, layers: int) -> int:
    """Equation (6), T layers over an input of n tokens: ``T (4 n d^2 + 2 n^2 d + 2 n d m)``."""
    return layers * layer(tokens, width, mlp)


def decode(tokens: int, outputs: int, width: int, mlp: int, layers: int) -> int:
    """Equation (7), L tokens one after the other with a cache, the i-th (from 0) over n + i positions.

    ``T (4 L d^2 + 2 L d m + d L (2 n + L - 1))``, the sum over i of ``T (4 d^2 + 2 d m + 2 d (n + i))``.
    """
    linear = 4 * outputs * width**2 + 2 * outputs * width * mlp
    return layers * (linear + width * outputs * (2 * tokens + outputs - 1))


def denoising(active: Sequence[int], width: int, mlp: int, layers: int) -> int:
    """Equation (8), S steps with n_s active tokens each: ``sum over s of T (4 n_s d^2 + 2 n_s^2 d + 2 n_s d m)``.

    With a cache the attention term is too small: the active rows meet all keys that are stored.
    """
    return sum(prefill(tokens, width, mlp, layers) for tokens in active)


def pruned(active: Sequence[Sequence[int]], width: int, mlp: int) -> int:
    """Equation (8) where layers differ: `active` holds every step's tokens layer by layer, as pruners leave them."""
    return sum(layer(tokens, width, mlp) for step in active for tokens in step)


def after_layer(tokens: int, kept: int, full_layers: int, layers: int) -> list[int]:
    """Tokens by layer where the first `full_layers` see all `tokens` and the others `kept`: FastV's and VTW's cost."""
    return [tokens] * full_layers + [kept] * (layers - full_layers)
