"""OpenVINO: an encoder converted for fast inference on a CPU. Same vectors, no torch while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gist_ray.chunks import BATCH_TOKENS, vectors_in_chunks
from gist_ray.encoder import Encoder, TokenIds
from gist_ray.errors import InputError

Vectors = npt.NDArray[np.float32]


class OpenVinoModel:
    """Padded token ids in, unit vectors out, on `threads` threads of this machine's CPU."""

    def __init__(self, model: Any, encoder: Encoder, *, threads: int) -> None:
        """`model` is what `converted` returned for `encoder`, or a file that was written from it.

        The encoder pads, as ever; its weights are not used.
        """
        openvino = _openvino()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Else a CPU with bf16 would compute in it: faster on some chips, and other vectors.
            "INFERENCE_PRECISION_HINT": "f32",
            # It would pin every process of a machine to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.dim = int(compiled.output(0).get_partial_shape()[1].get_length())
        self._request = compiled.create_infer_request()
        self._encoder = encoder

    def embed(self, tokens: Sequence[TokenIds]) -> Vectors:
        """Vectors `[n, dim]` of unit norm, in one forward, in the order given. Not from two threads at once."""
        inputs = [tensor.numpy() for tensor in self._encoder.padded(tokens)]
        vectors: Vectors = self._request.infer(inputs, share_inputs=True)[0]
        return vectors

    def embed_sorted(self, tokens: Sequence[TokenIds], *, batch_tokens: int | None = None) -> Vectors:
        """Vectors `[n, dim]` of any number of texts, in forwards of similar lengths, in the order given."""
        return vectors_in_chunks(tokens, self.dim, batch_tokens or BATCH_TOKENS["cpu"], self.embed)


def converted(encoder: Encoder) -> Any:
    """The encoder, pooling and normalisation included, as an OpenVINO model of any batch size and length.

    Raises:
        InputError: OpenVINO is not installed, or cannot convert this architecture.
    """
    openvino = _openvino()
    example = {
        "input_ids": torch.tensor([[1, 2, 3], [1, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    shapes = [("input_ids", [-1, -1]), ("attention_mask", [-1, -1])]
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # what the tracer takes for constants are no facts of the example
            return openvino.convert_model(_Vectors(encoder).eval(), example_input=example, input=shapes)
    except Exception as error:  # the converter raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"OpenVINO cannot convert {encoder.source} ({type(encoder.model).__name__}): {reason}; "
            "serve it with backend: torch"
        ) from error


def written(model: Any, file: Path) -> Path:
    """Write a converted model as `file` (.xml) and its weights beside it (.bin); returns `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _openvino().save_model(model, file, compress_to_fp16=False)
    return file


def is_installed() -> bool:
    """Whether OpenVINO is there; it has no wheels for some machines."""
    try:
        _openvino()
    except InputError:
        return False
    return True


class _Vectors(torch.nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model, self._encoder = encoder.model, encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._encoder.forward(input_ids, attention_mask)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise InputError("the openvino backend needs OpenVINO; run: pip install openvino") from error
    return openvino
