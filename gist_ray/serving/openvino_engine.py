"""The OpenVINO engine: a CPU at its fastest, in fp32 or in an int8 variant that `gist-ray export --int8` made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gist_ray.converted_models import converted_file
from gist_ray.encoder import Encoder, TokenIds
from gist_ray.openvino_model import OpenVinoModel, converted
from gist_ray.serving.engine import Vectors
from gist_ray.serving.pieces import EncoderTexts
from gist_ray.serving_config import Precision


class OpenVinoEngine(EncoderTexts):
    """A converted encoder and its tokenizer."""

    def __init__(self, encoder: Encoder, model: OpenVinoModel, precision: str) -> None:
        super().__init__(encoder)
        self._model, self.precision = model, precision

    @classmethod
    def load(cls, path: str | Path, *, precision: Precision = "fp32", threads: int = 1) -> OpenVinoEngine:
        """Load a model folder. The first time fp32 is converted, in some seconds; see `converted_models`.

        Raises:
            InputError: as `Encoder.load`, `converted` and `int8_file`.
        """
        from gist_ray.int8 import int8_file

        model: Any = int8_file(path) if precision == "int8" else converted_file(path)
        if model:
            encoder = Encoder.load(path, weights=False)
        else:
            encoder = Encoder.load(path)
            model = converted(encoder)
            encoder.model = None  # the weights are in the converted one
        name = "float32" if precision == "fp32" else precision
        return cls(encoder, OpenVinoModel(model, encoder, threads=threads), name)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._model.dim

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Vectors `[n, dim]`."""
        return self._model.embed(tokens)

    def finish(self, result: Vectors) -> Vectors:
        """The same: they are here already."""
        return result
