"""The OpenVINO engine: a CPU at its fastest, in fp32 or in an int8 variant that `gist-ray export --int8` made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gist_ray.encoder import Encoder, TokenIds
from gist_ray.errors import InputError
from gist_ray.openvino_model import OpenVinoModel, converted
from gist_ray.serving.engine import Precision, Vectors
from gist_ray.serving.pieces import Piece, token_pieces


class OpenVinoEngine:
    """A converted encoder and its tokenizer."""

    def __init__(self, encoder: Encoder, model: OpenVinoModel, precision: str) -> None:
        self.encoder, self.precision = encoder, precision
        self._model = model

    @classmethod
    def load(
        cls, path: str | Path, *, precision: Precision = "fp32", threads: int = 1, device: str = "cpu"
    ) -> OpenVinoEngine:
        """Load a model folder; fp32 is converted here, in a few seconds.

        Raises:
            InputError: as `Encoder.load`, `converted` and `int8_model`; not a CPU, or another precision.
        """
        if device != "cpu" or precision not in ("fp32", "int8"):
            raise InputError(
                f"the openvino backend computes in fp32 or int8 on the CPU, not in {precision} on {device}"
            )
        if precision == "int8":
            from gist_ray.int8 import int8_file

            encoder, model = Encoder.load(path, weights=False), int8_file(path)
        else:
            encoder = Encoder.load(path)
            model = converted(encoder)
            encoder.model = None  # the weights are in the converted one
        pad_id = int(encoder.tokenizer.pad_token_id or 0)
        name = "float32" if precision == "fp32" else precision
        return cls(encoder, OpenVinoModel(model, threads=threads, pad_id=pad_id), name)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._model.dim

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

    def pieces(self, texts: Sequence[str], *, prompt: str = "", special: bool = True) -> list[list[Piece]]:
        """As `token_pieces` of the encoder's tokenizer."""
        return token_pieces(self.encoder, texts, prompt=prompt, special=special)

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Vectors `[n, dim]`."""
        return self._model.embed(tokens)

    def finish(self, result: Vectors) -> Vectors:
        """The same: they are here already."""
        return result
