"""Shards: the prepared data set on disk, memory-mapped.

`texts/` holds one row per distinct text, ordered by key, so that a text's id is its position; `triplets/` holds rows
of text ids. Arrow files: self-describing, and read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gist_ray.encoder import TokenIds
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest

KIND = "shards"
KEY_BYTES = 16


@dataclass(frozen=True)
class TextBlock:
    """Distinct texts of one block, ordered by key."""

    keys: npt.NDArray[np.bytes_]
    """`[n]` S16."""
    tokens: list[TokenIds]
    guide: npt.NDArray[np.float16]
    """`[n, guide_dim]`, unit norm."""
    texts: list[str]


@dataclass(frozen=True)
class Triplets:
    """Rows of text ids. Negatives of row i are `negatives[negative_starts[i]:negative_starts[i + 1]]`."""

    query: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]
    negative_starts: npt.NDArray[np.int64]
    negatives: npt.NDArray[np.int64]
    task: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.query)

    def negatives_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Text ids of all negatives of `rows`, in row order."""
        starts, stops = self.negative_starts[rows], self.negative_starts[rows + 1]
        counts = stops - starts
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found: npt.NDArray[np.int64] = self.negatives[np.repeat(starts, counts) + offsets]
        return found

    def texts_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sorted distinct text ids of `rows`."""
        return np.unique(np.concatenate([self.query[rows], self.positive[rows], self.negatives_of(rows)]))


class Shards:
    """Read access to a finished shards folder; cheap to open, in any number of processes."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._blocks = [_columns(file) for file in sorted((directory / "texts").glob("*.arrow"))]
        self._starts = np.cumsum([0, *(block.num_rows for block in self._blocks)])

    @classmethod
    def open(cls, directory: str | Path) -> Shards:
        """Open a finished shards folder.

        Raises:
            InputError: the folder is missing, unfinished or something else.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if manifest is None or manifest.get("kind") != KIND:
            raise InputError(f"{directory} is not a finished shards folder; run `gist-ray prepare` first")
        return cls(directory, manifest)

    @property
    def num_texts(self) -> int:
        """Distinct texts."""
        return int(self._starts[-1])

    @property
    def tasks(self) -> list[str]:
        """Task names; `Triplets.task` indexes them."""
        return list(self.manifest["tasks"])

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Student tokens of every text, `[num_texts]`."""
        return np.concatenate([np.diff(_list_offsets(block["tokens"])) for block in self._blocks])

    @cached_property
    def triplets(self) -> Triplets:
        """All rows, in source order."""
        parts = [_columns(file) for file in sorted((self.directory / "triplets").glob("*.arrow"))]

        def joined(name: str) -> npt.NDArray[np.int64]:
            return np.concatenate([part[name].to_numpy().astype(np.int64) for part in parts])

        counts = [np.diff(_list_offsets(part["negatives"])) for part in parts]
        flat = [part["negatives"].values.to_numpy().astype(np.int64) for part in parts]
        starts = np.cumsum(np.concatenate([[0], *counts])).astype(np.int64)
        return Triplets(joined("query"), joined("positive"), starts, np.concatenate(flat), joined("task"))

    def tokens(self, ids: npt.NDArray[np.int64]) -> list[TokenIds]:
        """Student token ids of texts, read in place."""
        rows: list[TokenIds] = []
        blocks = np.searchsorted(self._starts, ids, side="right") - 1
        for block, i in zip(blocks, ids - self._starts[blocks], strict=True):
            column = self._blocks[block]["tokens"]
            offsets = _list_offsets(column)
            rows.append(column.values.to_numpy()[offsets[i] : offsets[i + 1]])
        return rows

    def guide(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Guide vectors of texts, `[len(ids), guide_dim]` fp32 of unit norm.

        Stored fp16; normalised again in fp32, because masks compare cosines against each other.
        """
        dim = int(self.manifest["guide_dim"])
        out = np.empty((len(ids), dim), dtype=np.float32)
        blocks = np.searchsorted(self._starts, ids, side="right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            table = self._blocks[block]["guide"].flatten().to_numpy().reshape(-1, dim)
            out[here] = table[ids[here] - self._starts[block]]
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out

    def text(self, text_id: int) -> str:
        """The exact text of an id."""
        block = int(np.searchsorted(self._starts, text_id, side="right")) - 1
        value: str = self._blocks[block]["text"][text_id - int(self._starts[block])].as_py()
        return value


def write_texts(file: Path, block: TextBlock, token_dtype: str) -> None:
    """Write one block of `texts/`, whole or not at all."""
    token_type = pa.from_numpy_dtype(np.dtype(token_dtype))
    offsets = np.cumsum([0, *(len(row) for row in block.tokens)])
    flat = np.concatenate(block.tokens) if block.tokens else np.zeros(0)
    guide = pa.FixedSizeListArray.from_arrays(pa.array(block.guide.reshape(-1)), block.guide.shape[1])
    _write(
        file,
        {
            "key": pa.array(_key_list(block.keys), pa.binary(KEY_BYTES)),
            "tokens": pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(token_dtype), token_type)),
            "guide": guide,
            "text": pa.array(block.texts, pa.large_string()),
        },
    )


def write_triplets(file: Path, triplets: Triplets) -> None:
    """Write one part of `triplets/`, whole or not at all."""
    ids = pa.uint32() if not len(triplets) or triplets.query.max() < 2**32 else pa.uint64()
    _write(
        file,
        {
            "query": pa.array(triplets.query, ids),
            "positive": pa.array(triplets.positive, ids),
            "negatives": pa.LargeListArray.from_arrays(triplets.negative_starts, pa.array(triplets.negatives, ids)),
            "task": pa.array(triplets.task, pa.uint32()),
        },
    )


def read_keys(directory: Path) -> npt.NDArray[np.bytes_]:
    """Keys of all text blocks in id order, `[num_texts]` S16, ascending."""
    parts = [keys_to_numpy(_columns(file)["key"]) for file in sorted((directory / "texts").glob("*.arrow"))]
    return np.concatenate(parts) if parts else np.zeros(0, f"S{KEY_BYTES}")


def keys_to_numpy(column: Any) -> npt.NDArray[np.bytes_]:
    """Arrow `binary(16)` to numpy S16, whose order and equality are those of the bytes: it pads with zeros."""
    buffer = column.buffers()[1]
    start = column.offset * KEY_BYTES
    return np.frombuffer(buffer, f"S{KEY_BYTES}")[start // KEY_BYTES :][: len(column)]


def token_dtype_for(vocabulary: int) -> str:
    """Smallest unsigned type that holds every token id."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _key_list(keys: Sequence[bytes] | npt.NDArray[np.bytes_]) -> list[bytes]:
    # numpy strips trailing zero bytes of S16: put them back, or Arrow refuses the short value.
    return [bytes(key).ljust(KEY_BYTES, b"\0") for key in keys]


def _columns(file: Path) -> Any:
    """First record batch of an Arrow file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def _list_offsets(column: Any) -> npt.NDArray[np.int64]:
    offsets: npt.NDArray[np.int64] = column.offsets.to_numpy()
    return offsets


def _write(file: Path, columns: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    batch = pa.record_batch(columns)
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    temporary.replace(file)
