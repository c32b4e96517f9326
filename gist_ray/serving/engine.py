"""Engine: token ids in, vectors out. What the scheduler runs, and nothing that knows of HTTP or queues."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gist_ray.encoder import Encoder, TokenIds

Vectors = npt.NDArray[np.float32]


class Engine(Protocol):
    """A model that can be served.

    `tokenize` is called from one thread and `forward` from another, each never twice at a time.
    """

    @property
    def dim(self) -> int:
        """Length of a vector."""

    @property
    def max_tokens(self) -> int:
        """Longest text the model reads, special tokens included."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text that is put before the input."""

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """Token ids of each text, cut at `max_tokens` unless `truncate` is False."""

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """One padded batch to unit vectors, float32 `[n, dim]`, in the order given."""


class TorchEngine:
    """The encoder itself, in fp32 on torch."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 1, device: str = "cpu") -> TorchEngine:
        """Load a model folder and set the torch threads of this process.

        Raises:
            InputError: as `Encoder.load`.
        """
        torch.set_num_threads(threads)
        return cls(Encoder.load(path, device=device))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.encoder.dim

    @property
    def max_tokens(self) -> int:
        """Longest text the model reads, special tokens included."""
        return self.encoder.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text that is put before the input."""
        return self.encoder.prompts

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """As `Encoder.tokenize`."""
        return self.encoder.tokenize(texts, prompt=prompt, truncate=truncate)

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Float32 `[n, dim]` of unit norm, in one forward: the scheduler has already chosen the batch."""
        whole = len(tokens) * max((len(row) for row in tokens), default=0)
        with torch.inference_mode():
            vectors: Vectors = self.encoder.embed(tokens, batch_tokens=whole).float().cpu().numpy()
        return vectors


class FakeEngine:
    """Deterministic vectors without a model: words are tokens, a hash of the ids is the vector.

    An ordinary engine, so that the scheduler, the API and a load test can run where no model is.

    Args:
        dim: length of a vector.
        max_tokens: words per text, plus one token at either end.
        delay_s: how long each forward takes, whatever its size.
        prompts: prompt name to prompt.
    """

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

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Float32 `[n, dim]` of unit norm; a row depends on its own ids alone."""
        time.sleep(self.delay_s)
        return np.stack([self._vector(row) for row in tokens])

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
