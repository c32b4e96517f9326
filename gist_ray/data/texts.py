"""Texts: every distinct text once, in the order of its key, so that a text's id is its position.

Rows are staged in pieces, each with its own sorted texts. The key space is cut into blocks of about equal size; a block
is made from its range of every piece, so no step holds more than a piece or a block, however many rows there are.
Arrow files, read in place.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gist_ray.encoder import TokenIds

KEY_BYTES = 16
TEXTS_PER_BLOCK = 4_096
_MOST_BLOCKS = 32_768  # a process may map some 65,000 files
_KEY_SPACE = 1 << 64  # blocks are cut by the first eight bytes

Ids = npt.NDArray[np.int64]
Keys = npt.NDArray[np.bytes_]


def text_key(text: str) -> bytes:
    """Identity of a text: 128-bit hash of its exact bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=KEY_BYTES).digest()


class Piece:
    """Texts of some rows, numbered in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.chars = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, text: str) -> int:
        """Number of a text within this piece; equal texts have equal numbers."""
        new = len(self._numbers)
        known = self._numbers.setdefault(text, new)
        if known == new:
            self.chars += len(text)
        return known

    def write(self, file: Path) -> Ids:
        """Write the texts in key order and return each number's position in it, `[len(self)]`."""
        texts = list(self._numbers)
        keys = np.array([text_key(text) for text in texts], dtype=f"S{KEY_BYTES}")
        order = np.argsort(keys, kind="stable")
        write_arrow(
            file, {"key": key_column(keys[order]), "text": pa.array([texts[i] for i in order], pa.large_string())}
        )
        position = np.empty(len(texts), dtype=np.int64)
        position[order] = np.arange(len(texts))
        return position


def num_blocks(staged_texts: int) -> int:
    """Blocks that the key space is cut into. Depends on the data alone, like everything that decides a byte."""
    return min(_MOST_BLOCKS, max(1, -(-staged_texts // TEXTS_PER_BLOCK)))


def block_texts(pieces: Sequence[Path], number: int, blocks: int) -> tuple[Keys, list[str]]:
    """Keys and texts of one block over all pieces, each text once, in key order."""
    low, high = (-(-_KEY_SPACE * i // blocks) for i in (number, number + 1))
    keys: list[Keys] = []
    texts: list[str] = []
    for piece in pieces:
        columns = read_arrow(piece)  # opened for this block alone: mapped pages count as memory of this process
        start, stop = (_first_at_or_above(columns["key"], bound) for bound in (low, high))
        keys.append(keys_to_numpy(columns["key"].slice(start, stop - start)).copy())
        texts += columns["text"].slice(start, stop - start).to_pylist()
    distinct, first = np.unique(np.concatenate([np.zeros(0, f"S{KEY_BYTES}"), *keys]), return_index=True)
    return distinct, [texts[i] for i in first]


@dataclass(frozen=True)
class TextBlock:
    """Distinct texts of one block, ordered by key."""

    keys: Keys
    """`[n]` S16."""
    texts: list[str]
    guide: npt.NDArray[np.float16]
    """`[n, guide_dim]`, unit norm."""
    tokens: list[TokenIds] | None = None
    """The student's, cut at its limit. None: nobody asked for them."""
    whole_tokens: Ids | None = None
    """`[n]` student tokens before the cut."""

    def write(self, file: Path, token_dtype: str = "uint32") -> None:
        """Write one block, whole or not at all."""
        guide = pa.FixedSizeListArray.from_arrays(pa.array(self.guide.reshape(-1)), self.guide.shape[1])
        columns = {"key": key_column(self.keys), "guide": guide, "text": pa.array(self.texts, pa.large_string())}
        if self.tokens is not None:
            offsets = np.cumsum([0, *(len(row) for row in self.tokens)])
            flat = np.concatenate(self.tokens) if self.tokens else np.zeros(0)
            values = pa.array(flat.astype(token_dtype), pa.from_numpy_dtype(np.dtype(token_dtype)))
            columns["tokens"] = pa.LargeListArray.from_arrays(offsets, values)
            columns["whole_tokens"] = pa.array(self.whole_tokens, pa.uint32())
        write_arrow(file, columns)


class TextTable:
    """Read access to a folder of blocks; cheap to open, in any number of processes.

    `in_place` keeps the blocks mapped, which random access wants. Without it a block is mapped while it is read, so
    that a pass over all of them costs the memory of one.
    """

    def __init__(self, directory: Path, *, in_place: bool = True, rows: Sequence[int] | None = None) -> None:
        """`rows`: texts of each block where they are known; without them each block is opened to count."""
        self._files = sorted(directory.glob("*.arrow"))
        self._mapped: list[Any] | None = [read_arrow(file) for file in self._files] if in_place else None
        if rows is None:
            rows = [len(block) for block in self._mapped or map(read_arrow, self._files)]
        assert len(rows) == len(self._files), "blocks are missing from the folder"
        self.starts: Ids = np.cumsum([0, *rows])

    @property
    def num_texts(self) -> int:
        """Distinct texts."""
        return int(self.starts[-1])

    @cached_property
    def guide_dim(self) -> int:
        """Length of a guide vector."""
        return int(self._block(0).schema.field("guide").type.list_size) if self._files else 0

    @cached_property
    def lengths(self) -> Ids:
        """Student tokens of every text after the cut, `[num_texts]`."""
        found = [np.diff(list_offsets(self._block(i)["tokens"])) for i in range(len(self._files))]
        return np.concatenate(found).astype(np.int64)

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """First id and columns of each block, in id order."""
        for i, start in enumerate(self.starts[:-1].tolist()):
            yield start, self._block(i)

    def tokens(self, ids: Ids) -> list[TokenIds]:
        """Student token ids of texts, in the order asked for."""
        rows: list[TokenIds] = [np.zeros(0, np.uint16)] * len(ids)
        for columns, places, within in self._grouped(ids):
            offsets, values = list_offsets(columns["tokens"]), columns["tokens"].values.to_numpy()
            for place, i in zip(places.tolist(), within.tolist(), strict=True):
                rows[place] = values[offsets[i] : offsets[i + 1]]
        return rows

    def guide(self, ids: Ids) -> npt.NDArray[np.float32]:
        """Guide vectors of texts, `[len(ids), guide_dim]` fp32 of unit norm.

        Stored fp16; normalised again in fp32, because masks compare cosines against each other.
        """
        out = np.empty((len(ids), self.guide_dim), dtype=np.float32)
        for columns, places, within in self._grouped(ids):
            out[places] = guide_matrix(columns)[within]
        return unit_rows(out)

    def guide_range(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Guide vectors of the texts `start` to `stop - 1`, `[stop - start, guide_dim]` fp32 of unit norm."""
        return self.guide(np.arange(start, stop))

    def texts(self, ids: Ids) -> list[str]:
        """The exact texts, in the order asked for."""
        found = [""] * len(ids)
        for columns, places, within in self._grouped(ids):
            values = columns["text"].take(pa.array(within)).to_pylist()
            for place, value in zip(places.tolist(), values, strict=True):
                found[place] = value
        return found

    def keys(self) -> Keys:
        """Keys of all texts, `[num_texts]` S16, ascending."""
        parts = [keys_to_numpy(self._block(i)["key"]).copy() for i in range(len(self._files))]
        return np.concatenate(parts) if parts else np.zeros(0, f"S{KEY_BYTES}")

    def ids_of(self, keys: Keys) -> Ids:
        """Ids of texts by key; every key must be there."""
        order = np.argsort(keys, kind="stable")
        ids = np.empty(len(keys), dtype=np.int64)
        for start, _, piece, found in self.matches(keys[order]):
            ids[order[piece]] = start + found
        return ids

    def matches(self, keys: Keys) -> Iterator[tuple[int, Any, slice, Ids]]:
        """Walk the blocks along ascending `keys`: (first id, columns, part of `keys`, their rows within the block)."""
        done = 0
        for start, columns in self.blocks():
            if not columns.num_rows or done == len(keys):
                continue
            here = keys_to_numpy(columns["key"])
            stop = int(np.searchsorted(keys, here[-1], side="right"))
            part = slice(done, stop)
            found = np.searchsorted(here, keys[part])
            assert np.array_equal(here[np.minimum(found, len(here) - 1)], keys[part]), "a key that no block holds"
            yield start, columns, part, found
            done = stop
        assert done == len(keys), "a key above every block"

    def _block(self, number: int) -> Any:
        return self._mapped[number] if self._mapped is not None else read_arrow(self._files[number])

    def _grouped(self, ids: Ids) -> Iterator[tuple[Any, Ids, Ids]]:
        """For each block that holds some of `ids`: its columns, their places in `ids`, their rows in the block."""
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        blocks = np.searchsorted(self.starts, ascending, side="right") - 1
        bounds = np.flatnonzero(np.diff(blocks)) + 1
        for places in np.split(np.arange(len(ids)), bounds) if len(ids) else []:
            block = int(blocks[places[0]])
            yield self._block(block), order[places], ascending[places] - self.starts[block]


def guide_matrix(columns: Any) -> npt.NDArray[np.float16]:
    """The stored guide vectors of a block, `[n, guide_dim]`, read in place."""
    column = columns["guide"]
    flat: npt.NDArray[np.float16] = column.flatten().to_numpy()
    return flat.reshape(len(column), column.type.list_size)


def unit_rows(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length one, in place."""
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def key_column(keys: Keys) -> Any:
    """Numpy S16 to Arrow `binary(16)`; by buffer, because as Python bytes numpy strips trailing zeros."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys.tobytes())])


def keys_to_numpy(column: Any) -> Keys:
    """Arrow `binary(16)` to numpy S16, whose order and equality are those of the bytes: it pads with zeros."""
    return np.frombuffer(column.buffers()[1], f"S{KEY_BYTES}")[column.offset :][: len(column)]


def list_offsets(column: Any) -> Ids:
    """Where the lists of a list column start, `[n + 1]`."""
    offsets: Ids = column.offsets.to_numpy()
    return offsets


def read_arrow(file: Path) -> Any:
    """The record batch of a file that `write_arrow` wrote, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def write_arrow(file: Path, columns: dict[str, Any]) -> None:
    """Write columns as one record batch, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A temporary name of its own: an orphan of a killed run may still write beside the run that continues it.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    batch = pa.record_batch(columns)
    with temporary.open("wb") as stream:
        with pa.ipc.new_file(pa.PythonFile(stream, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())  # a report will vouch for this file
    temporary.replace(file)


def _first_at_or_above(column: Any, bound: int) -> int:
    """First row of an ascending key column whose leading eight bytes are at least `bound`; reads only a few pages."""
    buffer, n = column.buffers()[1], len(column)
    if bound >= _KEY_SPACE:
        return n
    wanted = bound.to_bytes(8, "big")
    return bisect_left(range(n), wanted, key=lambda i: buffer[i * KEY_BYTES : i * KEY_BYTES + 8].to_pybytes())
