"""Answers: vectors as the numbers and bytes that a client asked for; no Python object for each number."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from gist_ray.serving.engine import Vectors

OutputType = Literal["float", "int8", "uint8", "binary", "ubinary"]
Rows = npt.NDArray[Any]

_INT8_MAX = 127


def cut(vectors: Vectors, dimensions: int, *, unit: bool = True) -> Vectors:
    """The first `dimensions` numbers of each row of `[n, dim]`; then, if `unit`, rows of length 1 again."""
    short = vectors[:, :dimensions]
    if unit:
        short = short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(short, dtype=np.float32)


def as_type(vectors: Vectors, kind: OutputType) -> Rows:
    """Rows of `[n, dim]` in fewer bits, little-endian.

    int8 scales each row so that its largest number is 127: cosines stay, to a thousandth or so, lengths do not. uint8
    is int8 + 128. ubinary packs the signs of 8 numbers, the first one highest, in a byte (dim is padded with zeros to
    a multiple of 8); binary is ubinary - 128, as sentence-transformers has it.
    """
    if kind == "float":
        floats: Rows = vectors.astype("<f4", copy=False)
        return floats
    if kind in ("int8", "uint8"):
        scale = _INT8_MAX / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
        whole = np.rint(vectors * scale).astype(np.int16)
        scaled: Rows = whole.astype(np.int8) if kind == "int8" else (whole + 128).astype(np.uint8)
        return scaled
    packed: Rows = np.packbits(vectors > 0, axis=1)
    if kind == "binary":
        packed = (packed.astype(np.int16) - 128).astype(np.int8)
    return packed


def json_rows(rows: Rows) -> list[bytes]:
    """Each row as a JSON array: a float32 in as few digits as give it back."""
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in np.ascontiguousarray(rows)]


def base64_rows(rows: Rows) -> list[bytes]:
    """Each row as a JSON string, the base64 of its bytes."""
    return [b'"%b"' % base64.b64encode(row.tobytes()) for row in rows]
