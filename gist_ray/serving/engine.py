"""Engine: texts to token ids, token ids to vectors. What the scheduler runs; knows nothing of HTTP or queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gist_ray.encoder import TokenIds
from gist_ray.errors import InputError
from gist_ray.serving.pieces import Piece
from gist_ray.serving_config import Backend, Precision

Vectors = npt.NDArray[np.float32]


class Engine(Protocol):
    """A model that can be served, in three steps that can run beside each other for different batches.

    `tokenize` and `pieces` are called from one thread, `forward` and `finish` from another, each never twice at a time.
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

    @property
    def precision(self) -> str:
        """What it computes in: `float32`, `bfloat16`, `float16` or `int8`."""

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """Token ids of each text, cut at `max_tokens` unless `truncate` is False."""

    def pieces(self, texts: Sequence[str], *, prompt: str = "", special: bool = True) -> list[list[Piece]]:
        """The tokens of each text and the characters they stand for."""

    def forward(self, tokens: Sequence[TokenIds]) -> Any:
        """Start one padded batch; may return before a device is done with it."""

    def finish(self, result: Any) -> Vectors:
        """Wait for what `forward` returned: unit vectors, float32 `[n, dim]`, in the order of the tokens."""


def load_engine(
    path: str | Path,
    *,
    backend: Backend = "auto",
    precision: Precision = "fp32",
    threads: int = 1,
    device: str = "cpu",
) -> Engine:
    """Load a model folder, or a Hub id, as an engine. It sets the compute threads of this process.

    Raises:
        InputError: as `Encoder.load` and `chosen_backend`; or the backend is not installed.
    """
    from gist_ray.serving.openvino_engine import OpenVinoEngine
    from gist_ray.serving.torch_engine import TorchEngine

    if chosen_backend(backend, precision, device) == "openvino":
        return OpenVinoEngine.load(path, precision=precision, threads=threads)
    return TorchEngine.load(path, precision=precision, threads=threads, device=device)


def chosen_backend(backend: Backend, precision: Precision, device: str) -> Backend:
    """The backend given, or what `auto` is here: never `auto`.

    That is torch on a GPU, and OpenVINO on a CPU where it is installed: on all-MiniLM-L6-v2 it answers a lone short
    text in half of torch's time.

    Raises:
        InputError: it does not compute in this precision on this device.
    """
    from gist_ray.openvino_model import is_installed

    if backend == "auto":
        suits = device == "cpu" and precision in ("fp32", "int8")
        backend = "openvino" if suits and (precision == "int8" or is_installed()) else "torch"
    if backend == "openvino" and (device != "cpu" or precision not in ("fp32", "int8")):
        raise InputError(f"the openvino backend computes in fp32 or int8 on the CPU, not in {precision} on {device}")
    if backend == "torch" and (precision == "int8" or (device == "cpu" and precision != "fp32")):
        remedy = "use the openvino backend" if precision == "int8" else "take fp32 or int8, or serve on a GPU"
        raise InputError(f"the torch backend does not compute in {precision} on {device}; {remedy}")
    return backend
