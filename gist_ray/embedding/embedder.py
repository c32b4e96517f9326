"""TextEmbedder: texts in, rows of numbers out. An engine of serving's, and what was asked of its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.chunks import BATCH_TOKENS, vectors_in_chunks
from gist_ray.data.embedders import check_vectors
from gist_ray.embed_config import NumberType, VectorConfig
from gist_ray.encoder import TokenIds
from gist_ray.errors import InputError
from gist_ray.serving.answers import as_type, cut
from gist_ray.serving.engine import Engine, Vectors, load_engine

Rows = npt.NDArray[Any]
"""`[n, width]`, of the type asked for: width is the number of dimensions, or an eighth of it for packed signs."""


class TextEmbedder:
    """A loaded model that gives vectors as a `VectorConfig` wants them."""

    def __init__(self, engine: Engine, config: VectorConfig, device: str = "cpu") -> None:
        """Check what is asked against what the model has.

        Raises:
            InputError: an unknown prompt, or too many dimensions.
        """
        self._engine, self._config = engine, config
        self._prompt = prompt_of(config, engine.prompts)
        check_dimensions(config, engine.dim)
        self._batch_tokens = config.batch_tokens or BATCH_TOKENS[device]

    @classmethod
    def load(cls, config: VectorConfig, *, threads: int, device: str = "cpu") -> TextEmbedder:
        """Load the model; it sets the compute threads of this process.

        Raises:
            InputError: as `load_engine`, an unknown prompt, or too many dimensions.
        """
        engine = load_engine(
            config.model, backend=config.backend, precision=config.precision, threads=threads, device=device
        )
        return cls(engine, config, device)

    @property
    def max_tokens(self) -> int:
        """Where texts are cut."""
        return self._engine.max_tokens

    def embed(self, texts: Sequence[str]) -> tuple[Rows, int]:
        """Rows of texts `[n, width]`, in order, and how many texts were longer than the model reads.

        Raises:
            InputError: a text gets no vector: the model is broken.
        """
        tokens = self._engine.tokenize(texts, prompt=self._prompt)
        vectors = vectors_in_chunks(tokens, self._engine.dim, self._batch_tokens, self._forward)
        check_vectors(vectors, texts, self._config.model)
        return as_asked(vectors, self._config), self._num_cut(texts, tokens)

    def _forward(self, tokens: list[TokenIds]) -> Vectors:
        return self._engine.finish(self._engine.forward(tokens))

    def _num_cut(self, texts: Sequence[str], tokens: list[TokenIds]) -> int:
        full = [text for text, row in zip(texts, tokens, strict=True) if len(row) == self.max_tokens]
        whole = self._engine.tokenize(full, prompt=self._prompt, truncate=False)
        return sum(len(row) > self.max_tokens for row in whole)


def as_asked(vectors: Vectors, config: VectorConfig) -> Rows:
    """Unit vectors `[n, dim]` float32, cut and in the type asked for, `[n, width]`."""
    if config.dimensions is not None:
        vectors = cut(vectors, config.dimensions)
    if config.dtype == "float16":
        halves: Rows = vectors.astype("<f2")
        return halves
    return as_type(vectors, "float" if config.dtype == "float32" else config.dtype)


def null_row(dtype: NumberType, width: int) -> Rows:
    """What stands for a missing vector where there are only numbers: not-a-numbers, `[width]`.

    Raises:
        InputError: a type of whole numbers, which has none.
    """
    if dtype not in ("float32", "float16"):
        raise InputError(f"{dtype} has no number for a missing vector; take float32, Parquet, or bad_rows: fail")
    return np.full(width, np.nan, dtype=dtype)


def prompt_of(config: VectorConfig, prompts: Mapping[str, str]) -> str:
    """The prompt that is put before every text.

    Raises:
        InputError: the model has no prompt of that name.
    """
    if config.prompt_name is None:
        return config.prompt
    if config.prompt_name not in prompts:
        known = ", ".join(prompts) or "none; give it in full with `prompt`"
        raise InputError(f"{config.model} has no prompt named {config.prompt_name}; it has {known}")
    return prompts[config.prompt_name]


def check_dimensions(config: VectorConfig, dim: int) -> None:
    """Refuse more dimensions than a vector has.

    Raises:
        InputError: there are fewer.
    """
    if config.dimensions is not None and config.dimensions > dim:
        raise InputError(f"dimensions {config.dimensions} is above the {dim} of {config.model}; lower it")
