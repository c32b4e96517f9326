"""Is a difference real? Paired statistics over the items that two models were scored on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gist_ray.errors import InputError

_BLOCK_ELEMENTS = 1 << 22  # resampled values held at once: 32 MB of indices and 32 MB of differences


@dataclass(frozen=True)
class Interval:
    """A mean difference and where it lies with the confidence asked for."""

    mean_difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is significant at this confidence."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of `mean(after - before)` over resampled items.

    Args:
        before: score of each item under the first model, `[n]`.
        after: score of the same items in the same order under the second, `[n]`.
        samples: bootstrap resamples. Time grows with `samples * n`, memory does not.
        seed: of the resampling; the same seed gives the same interval.
        confidence: probability mass between `low` and `high`.

    Raises:
        InputError: no items, unequal numbers of items, a score that is not finite, or a bad setting.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(
            f"a paired comparison needs the same items on both sides, at least one: got {first.shape} and "
            f"{second.shape}; score both models on the same data"
        )
    if samples < 1 or not 0 < confidence < 1:
        raise InputError(f"samples {samples} must be at least 1 and confidence {confidence} between 0 and 1")
    difference = second - first
    if not np.isfinite(difference).all():
        item = int(np.flatnonzero(~np.isfinite(difference))[0])
        pair = f"{first[item]} before, {second[item]} after"
        raise InputError(f"item {item}: scores must be finite, got {pair}; look into its vectors")
    means = _resampled_means(difference, samples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(difference.mean()), float(low), float(high))


def _resampled_means(
    values: npt.NDArray[np.float64], samples: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Mean of each of `samples` draws of `len(values)` values with replacement, `[samples]`."""
    means = np.empty(samples)
    block = max(1, _BLOCK_ELEMENTS // len(values))
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        picks = generator.integers(0, len(values), size=(rows, len(values)))
        means[start : start + rows] = values[picks].mean(axis=1)
    return means


def paired_items(before: dict[str, float], after: dict[str, float]) -> tuple[list[float], list[float]]:
    """Two models' scores by item id, as two lists in one order.

    Raises:
        InputError: the ids differ, so the models were not scored on the same data.
    """
    if before.keys() != after.keys():
        lone = sorted(before.keys() ^ after.keys())
        raise InputError(f"{len(lone)} items are scored on one side only, e.g. {lone[0]}; score both on the same data")
    ids = sorted(before)
    return [before[item] for item in ids], [after[item] for item in ids]
