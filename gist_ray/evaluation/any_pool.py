"""AnyPool: what MTEB's tasks need of whatever embeds for them: actors, this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.encoder_actor import ModelFacts

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class AnyPool(Protocol):
    """Where texts become vectors."""

    @property
    def actors(self) -> tuple[Any, ...]:
        """What computes at once; their number says how many tasks are worth having at work."""

    @property
    def facts(self) -> ModelFacts:
        """Of the model."""

    @property
    def spent(self) -> Cost:
        """What encoders did for this process."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> Vectors:
        """Vectors of texts, `[n, dim]` float32 of unit norm, in order."""

    def nearest(self, queries: Vectors, texts: Sequence[str], prompt: str, most: int) -> Iterator[tuple[Ids, Vectors]]:
        """Of part after part of `texts`: places in `texts` nearest to each of `queries [n, dim]`, and cosines."""
