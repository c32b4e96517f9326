"""Sketch: how many hashes are distinct, in bounded memory and whatever the order in which they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SKETCH_HASHES = 4_096


@dataclass(frozen=True, eq=False)
class Sketch:
    """Which of many hashes are distinct: the smallest ones (Bar-Yossef et al. 2002, "k minimum values").

    The number of distinct hashes is exact up to `SKETCH_HASHES`. Beyond, it is estimated from how dense the kept ones
    lie, with a standard error of 1/sqrt(SKETCH_HASHES) = 1.6 %. Merging is set union: idempotent too.
    """

    hashes: Hashes
    """Ascending; one more than `SKETCH_HASHES` says that there are more."""

    @classmethod
    def of(cls, hashes: Hashes) -> Sketch:
        """The sketch of any hashes, repeated or not."""
        return cls(np.unique(hashes)[: SKETCH_HASHES + 1])

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of the hashes of both."""
        return Sketch.of(np.concatenate([self.hashes, other.hashes]))

    @property
    def exact(self) -> bool:
        """Whether `distinct` is the true number."""
        return len(self.hashes) <= SKETCH_HASHES

    def distinct(self) -> int:
        """Number of distinct hashes."""
        if self.exact:
            return len(self.hashes)
        return round((len(self.hashes) - 1) * 2.0**64 / (float(self.hashes[-1]) + 1))
