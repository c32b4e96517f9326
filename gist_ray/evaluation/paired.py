"""Paired statistics: is a difference between two models real, given the items that both were scored on?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata  # type: ignore[import-untyped]

from gist_ray.errors import InputError
from gist_ray.evaluation.items import Group, Items

Numbers = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 22  # numbers of one kind held at once: 32 MB
SAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """How a statistic of a second model differs from that of a first, on the same items."""

    observed: float
    resampled: Numbers
    """The difference on items drawn with replacement, `[samples]`: how it would spread on other items."""
    exchanged: Numbers
    """The difference when each item's two values change sides by chance, `[samples]`: what chance alone makes."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the difference lies with this confidence: percentiles of the bootstrap."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.resampled, [tail, 1 - tail])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Probability of so great a difference by chance, either way. Never 0: the observed one counts as a sample."""
        as_great = np.abs(self.exchanged) >= abs(self.observed) - 1e-12
        return float((1 + as_great.sum()) / (1 + len(self.exchanged)))


def difference(before: Items, after: Items, *, samples: int = SAMPLES, seed: int = 0) -> Difference:
    """Bootstrap and permutation of the items of one task.

    Values are put to ranks for Spearman's correlation and average precision, within each model, and ranks then
    exchanged or resampled: two models' cosines are on scales of their own. Ranks are not made anew in each resample,
    which is exact in the limit of many items.

    Raises:
        InputError: the items are not the same, or a value is not finite.
    """
    _check(before, after)
    generator = np.random.default_rng(seed)
    parts = []
    for first, second in zip(before.groups, after.groups, strict=True):
        statistic = _STATISTICS[before.statistic](first, second)
        items = len(first.values)
        observed = statistic(np.ones((1, items)), np.zeros((1, items), dtype=bool))
        resampled = [
            statistic(weights, np.zeros(weights.shape, dtype=bool)) for weights in _draws(generator, samples, items)
        ]
        exchanged = [statistic(np.ones(flips.shape), flips) for flips in _flips(generator, samples, items)]
        parts.append((observed[0], np.concatenate(resampled), np.concatenate(exchanged)))
    observed, resampled, exchanged = (np.mean([part[i] for part in parts], axis=0) for i in range(3))
    return Difference(float(observed), resampled, exchanged)


def together(differences: list[Difference]) -> Difference:
    """The difference of the mean over tasks, from those of the tasks, whose items have nothing in common.

    Raises:
        InputError: no tasks.
    """
    if not differences:
        raise InputError("there is nothing to compare: no task was scored on both sides with items")
    return Difference(
        float(np.mean([one.observed for one in differences])),
        np.mean([one.resampled for one in differences], axis=0),
        np.mean([one.exchanged for one in differences], axis=0),
    )


def holm(p_values: list[float]) -> list[float]:
    """P values corrected for their number, by Holm's step-down method (Scand. J. Statist. 6, 1979), in order."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = np.empty(len(p_values)), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return [float(value) for value in corrected]


def _check(before: Items, after: Items) -> None:
    names = [[(group.name, len(group.values)) for group in items.groups] for items in (before, after)]
    if before.statistic != after.statistic or names[0] != names[1]:
        raise InputError(f"a paired comparison needs the same items on both sides: got {names[0]} and {names[1]}")
    for first, second in zip(before.groups, after.groups, strict=True):
        if first.truth is not None and (second.truth is None or not np.array_equal(first.truth, second.truth)):
            raise InputError(f"{first.name}: the gold values differ; score both models on the same data")
        if not len(first.values):
            raise InputError(f"{first.name} has no items to compare")
        for group in (first, second):
            if not np.isfinite(group.values).all():
                item = int(np.flatnonzero(~np.isfinite(group.values))[0])
                raise InputError(f"{group.name}: item {item} is {group.values[item]}; look into its vectors")


_Statistic = Callable[[Weights, npt.NDArray[np.bool_]], Numbers]
"""Differences `[samples]` of items with weights `[samples, items]`, exchanged where `[samples, items]` is True."""


def _mean(first: Group, second: Group) -> _Statistic:
    change = second.values - first.values

    def statistic(weights: Weights, flips: npt.NDArray[np.bool_]) -> Numbers:
        signs = np.where(flips, -1.0, 1.0)
        means: Numbers = (weights * signs) @ change / weights.sum(1)
        return means

    return statistic


def _spearman(first: Group, second: Group) -> _Statistic:
    assert first.truth is not None
    gold, one, other = rankdata(first.truth), rankdata(first.values), rankdata(second.values)

    def statistic(weights: Weights, flips: npt.NDArray[np.bool_]) -> Numbers:
        return _pearson(weights, gold, np.where(flips, one, other)) - _pearson(
            weights, gold, np.where(flips, other, one)
        )

    return statistic


def _pearson(weights: Weights, gold: Numbers, values: Numbers) -> Numbers:
    """Weighted correlation of `gold [items]` with `values [samples, items]`, `[samples]`."""
    total = weights.sum(1)
    means = (weights @ gold / total, (weights * values).sum(1) / total)
    x, y = gold - means[0][:, None], values - means[1][:, None]
    products = ((weights * x * y).sum(1), (weights * x * x).sum(1), (weights * y * y).sum(1))
    correlation: Numbers = products[0] / np.sqrt(np.maximum(products[1] * products[2], 1e-300))
    return correlation


def _average_precision(first: Group, second: Group) -> _Statistic:
    assert first.truth is not None
    labels, one, other = first.truth, rankdata(first.values), rankdata(second.values)

    def statistic(weights: Weights, flips: npt.NDArray[np.bool_]) -> Numbers:
        return _precision(weights, labels, np.where(flips, one, other)) - _precision(
            weights, labels, np.where(flips, other, one)
        )

    return statistic


def _precision(weights: Weights, labels: Numbers, ranks: Numbers) -> Numbers:
    """Weighted average precision of `ranks [samples, items]`, greatest first, `[samples]`."""
    order = np.argsort(-ranks, axis=1, kind="stable")
    sorted_weights = np.take_along_axis(weights, order, 1)
    right = sorted_weights * labels[order]
    precision = np.cumsum(right, 1) / np.maximum(np.cumsum(sorted_weights, 1), 1e-300)
    mean: Numbers = (right * precision).sum(1) / np.maximum(right.sum(1), 1e-300)
    return mean


_STATISTICS = {"mean": _mean, "spearman": _spearman, "average_precision": _average_precision}


def _draws(generator: np.random.Generator, samples: int, items: int) -> Iterator[Weights]:
    """How often each item is drawn, with replacement, in blocks of samples `[rows, items]`."""
    shares = np.full(items, 1 / items)
    yield from _blocks(samples, items, lambda rows: generator.multinomial(items, shares, size=rows).astype(np.float64))


def _flips(generator: np.random.Generator, samples: int, items: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Which items change sides, in blocks of samples `[rows, items]`."""
    yield from _blocks(samples, items, lambda rows: generator.random((rows, items)) < 0.5)


def _blocks(samples: int, items: int, make: Callable[[int], npt.NDArray[np.generic]]) -> Iterator[npt.NDArray]:  # type: ignore[type-arg]
    block = max(1, _BLOCK_ELEMENTS // items)
    for start in range(0, samples, block):
        yield make(min(block, samples - start))
