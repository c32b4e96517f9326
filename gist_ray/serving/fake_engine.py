"""The fake engine: deterministic vectors without a model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np

from gist_ray.encoder import TokenIds
from gist_ray.serving.engine import Vectors
from gist_ray.serving.pieces import Piece


class FakeEngine:
    """Words are tokens, a hash of the ids is the vector.

    An ordinary engine, so that the scheduler, the API and a load test can run where no model is.

    Args:
        dim: length of a vector.
        max_tokens: words per text, plus one token at either end.
        delay_s: how long each forward takes, whatever its size.
        prompts: prompt name to prompt.
    """

    precision = "float32"

    def __init__(
        self,
        *,
        dim: int = 16,
        max_tokens: int = 128,
        delay_s: float = 0.0,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        self.dim = dim
        self.max_tokens = max_tokens
        self.delay_s = delay_s
        self.prompts: Mapping[str, str] = dict(prompts or {})

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """One id per word, between a start and an end token."""
        return [self._ids(prompt + text, truncate) for text in texts]

    def pieces(self, texts: Sequence[str], *, prompt: str = "", special: bool = True) -> list[list[Piece]]:
        """A piece for each word, between two special ones."""
        found = []
        for text in texts:
            whole, stop = prompt + text, 0
            pieces = [Piece(id=1, text="[start]", special=True, start=None, stop=None)] if special else []
            for word in whole.split():
                start = whole.index(word, stop)
                stop = start + len(word)
                number = 3 + _digest(word.encode()) % 30_000
                pieces.append(Piece(id=number, text=word, special=False, start=start, stop=stop))
            pieces += [Piece(id=2, text="[end]", special=True, start=None, stop=None)] if special else []
            found.append(pieces)
        return found

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Vectors `[n, dim]` of unit norm; a row depends on its own ids alone."""
        time.sleep(self.delay_s)
        return np.stack([self._vector(row) for row in tokens])

    def finish(self, result: Vectors) -> Vectors:
        """The same."""
        return result

    def _ids(self, text: str, truncate: bool) -> TokenIds:
        words = text.split()
        if truncate:
            words = words[: self.max_tokens - 2]
        return np.array([1, *(3 + _digest(word.encode()) % 30_000 for word in words), 2], dtype=np.int64)

    def _vector(self, ids: TokenIds) -> Vectors:
        seed = _digest(np.asarray(ids, dtype="<i8").tobytes())
        vector = np.random.default_rng(seed).standard_normal(self.dim).astype(np.float32)
        unit: Vectors = vector / np.linalg.norm(vector)
        return unit


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
