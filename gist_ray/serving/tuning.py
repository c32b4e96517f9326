"""Tuning: how many padded tokens a forward should have on this machine, measured at warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CANDIDATES = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""Padded tokens of a batch; each is tried until a larger one is no better."""
GOOD_ENOUGH = 0.97
"""Of the best rate: below it, a larger batch is worth that everybody waits longer for it."""
_REPEATS = 3


def tuned_batch_tokens(seconds: Callable[[int, int], float], lengths: Sequence[int]) -> int:
    """The smallest budget whose rate, over texts of each of `lengths` tokens, is near the best.

    Small batches answer sooner, and keep those who ask from all waiting for one another; a CPU, whose cache a large
    batch overflows, has nothing to gain from them, while a GPU wants to be filled.

    Args:
        seconds: what a forward of so many rows of so many tokens takes, measured now.
        lengths: tokens of typical texts.
    """
    rates: dict[int, float] = {}
    for budget in CANDIDATES:
        rates[budget] = _rate(seconds, budget, lengths)
        if _no_longer_gains(list(rates.values())):
            break
    best = max(rates.values())
    return min(budget for budget, rate in rates.items() if rate >= GOOD_ENOUGH * best)


def _rate(seconds: Callable[[int, int], float], budget: int, lengths: Sequence[int]) -> float:
    """Tokens a second over as many tokens of each length, by the fastest of some forwards: disturbance only slows."""
    took = 0.0
    for length in lengths:
        rows = max(1, budget // length)
        took += min(seconds(rows, length) for _ in range(_REPEATS)) / (rows * length)
    return len(lengths) / took


def _no_longer_gains(rates: list[float]) -> bool:
    """Whether the last two budgets were not much better than the best one before."""
    return len(rates) > 2 and GOOD_ENOUGH * max(rates[-2:]) <= max(rates[:-2])
