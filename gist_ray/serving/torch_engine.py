"""The torch engine: the encoder itself, in fp32 on a CPU, also in bf16 or fp16 on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gist_ray.encoder import Encoder, TokenIds
from gist_ray.serving.engine import Vectors
from gist_ray.serving.pieces import EncoderTexts
from gist_ray.serving_config import Precision

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine(EncoderTexts):
    """An encoder on torch."""

    @classmethod
    def load(
        cls, path: str | Path, *, precision: Precision = "fp32", threads: int = 1, device: str = "cpu"
    ) -> TorchEngine:
        """Load a model folder and set the torch threads of this process.

        Raises:
            InputError: as `Encoder.load`.
        """
        torch.set_num_threads(threads)
        encoder = Encoder.load(path, device=device)
        encoder.model.to(_TYPES[precision])
        return cls(encoder)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.encoder.dim

    @property
    def precision(self) -> str:
        """Type of the weights."""
        return str(self.encoder.model.dtype).removeprefix("torch.")

    def forward(self, tokens: Sequence[TokenIds]) -> Tensor:
        """Vectors `[n, dim]` where the model is, in one forward: the scheduler has already chosen the batch."""
        whole = len(tokens) * max((len(row) for row in tokens), default=0)
        with torch.inference_mode():
            return self.encoder.embed(tokens, batch_tokens=whole).float()

    def finish(self, result: Tensor) -> Vectors:
        """Float32 `[n, dim]` in main memory."""
        vectors: Vectors = result.cpu().numpy()
        return vectors
