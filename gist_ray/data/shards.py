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

from gist_ray.data.texts import TextTable, list_offsets, read_arrow, write_arrow
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest

KIND = "shards"
NO_LABEL = -1


@dataclass(frozen=True)
class Triplets:
    """Rows of text ids. Negatives of row i are `negatives[negative_starts[i]:negative_starts[i + 1]]`."""

    query: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]
    negative_starts: npt.NDArray[np.int64]
    negatives: npt.NDArray[np.int64]
    task: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    """Number of the recipe's source that the row came from."""
    label: npt.NDArray[np.int64]
    """Number of the label that query and positive bear, NO_LABEL where the source says none."""

    def __len__(self) -> int:
        return len(self.query)

    def negatives_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Text ids of all negatives of `rows`, in row order."""
        starts, counts = self.negative_starts[rows], self.num_negatives(rows)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found: npt.NDArray[np.int64] = self.negatives[np.repeat(starts, counts) + offsets]
        return found

    def num_negatives(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many negatives each of `rows` has."""
        counts: npt.NDArray[np.int64] = self.negative_starts[rows + 1] - self.negative_starts[rows]
        return counts

    def chosen(self, rows: npt.NDArray[np.int64]) -> Triplets:
        """Some of the rows, in the order given."""
        counts = self.num_negatives(rows)
        return Triplets(
            query=self.query[rows],
            positive=self.positive[rows],
            negative_starts=np.cumsum([0, *counts]).astype(np.int64),
            negatives=self.negatives_of(rows),
            task=self.task[rows],
            source=self.source[rows],
            label=self.label[rows],
        )

    def texts_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sorted distinct text ids of `rows`."""
        return np.unique(np.concatenate([self.query[rows], self.positive[rows], self.negatives_of(rows)]))


class Shards:
    """Read access to a finished shards folder; cheap to open, in any number of processes."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.texts = TextTable(directory / "texts")

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
    def tasks(self) -> list[str]:
        """Task names; `Triplets.task` indexes them."""
        return list(self.manifest["tasks"])

    @cached_property
    def triplets(self) -> Triplets:
        """All rows, in source order."""
        return joined_triplets([read_triplets(file) for file in sorted((self.directory / "triplets").glob("*.arrow"))])

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Label of each text, `[texts]`; None where no row says any."""
        return text_labels(self.triplets, self.texts.num_texts)


def text_labels(triplets: Triplets, num_texts: int) -> npt.NDArray[np.int64] | None:
    """Label of each text, `[num_texts]`, NO_LABEL where rows say none or several; None where no row says any."""
    rows = np.flatnonzero(triplets.label != NO_LABEL)
    if not len(rows):
        return None
    texts = np.concatenate([triplets.query[rows], triplets.positive[rows]])
    said = np.tile(triplets.label[rows], 2)
    labels = np.full(num_texts, NO_LABEL)
    labels[texts] = said
    labels[texts[labels[texts] != said]] = NO_LABEL
    return labels


def read_triplets(file: Path) -> Triplets:
    """One part of `triplets/`."""
    part = read_arrow(file)

    def ids(column: Any) -> npt.NDArray[np.int64]:
        return np.asarray(column.to_numpy(), dtype=np.int64)

    return Triplets(
        query=ids(part["query"]),
        positive=ids(part["positive"]),
        negative_starts=list_offsets(part["negatives"]),
        negatives=ids(part["negatives"].values),
        task=ids(part["task"]),
        source=ids(part["source"]),
        label=ids(part["label"]),
    )


def joined_triplets(parts: Sequence[Triplets]) -> Triplets:
    """Rows of several parts, one after the other."""
    counts = [np.diff(part.negative_starts) for part in parts]
    columns = {
        name: np.concatenate([np.zeros(0, np.int64), *(getattr(part, name) for part in parts)])
        for name in ("query", "positive", "negatives", "task", "source", "label")
    }
    starts = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return Triplets(**columns, negative_starts=starts)


def write_triplets(file: Path, triplets: Triplets) -> None:
    """Write one part of `triplets/`, whole or not at all."""
    largest = max(int(ids.max(initial=0)) for ids in (triplets.query, triplets.positive, triplets.negatives))
    ids = pa.uint32() if largest < 1 << 32 else pa.uint64()
    write_arrow(
        file,
        {
            "query": pa.array(triplets.query, ids),
            "positive": pa.array(triplets.positive, ids),
            "negatives": pa.LargeListArray.from_arrays(triplets.negative_starts, pa.array(triplets.negatives, ids)),
            "task": pa.array(triplets.task, pa.uint32()),
            "source": pa.array(triplets.source, pa.uint16()),
            "label": pa.array(triplets.label, pa.int64()),
        },
    )


def token_dtype_for(vocabulary: int) -> str:
    """Smallest unsigned type that holds every token id."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"
