"""EmbeddingCache: vectors of texts on disk, for whatever process of this machine, or of a shared disk, asks next."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.manifest import digest_of

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
_KEY_BYTES = 16
_KEY = f"S{_KEY_BYTES}"  # of one length, so that numpy's taking off of zeros at the end makes no two alike
_SUFFIX = ".segment.npy"
_FOLD = 4  # what is new is sorted into the table when it holds a quarter of what the table holds


@dataclass(frozen=True)
class _Table:
    """Where vectors lie, by key, ascending."""

    keys: npt.NDArray[np.bytes_] = field(default_factory=lambda: np.zeros(0, _KEY))
    segment: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    row: Ids = field(default_factory=lambda: np.zeros(0, np.int64))

    def joined(self, keys: npt.NDArray[np.bytes_], segment: Ids, row: Ids) -> _Table:
        """This table and more, which need not be sorted. Of a key that is there twice one is kept."""
        keys, places = np.unique(np.concatenate([self.keys, keys]), return_index=True)
        return _Table(keys, np.concatenate([self.segment, segment])[places], np.concatenate([self.row, row])[places])

    def places(self, keys: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], Ids]:
        """Which of `keys` are here, `[n]`, and where, `[n]` (anywhere for those that are not)."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.keys[places] == keys, places


class EmbeddingCache:
    """Vectors by what they are of: everything that decides them (`made_from`), then the text.

    `put` writes one immutable file, a segment, by rename: writers need no lock, readers see whole segments alone, and
    who has one open when it is removed keeps its bytes. All segments below `folder`, of whatever model, are kept below
    `limit_bytes` together, by removing those that were used longest ago. Memory: 32 bytes a vector.

    A disk that fails is no error of the caller's: what cannot be kept or read is computed again.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], dim: int, *, limit_bytes: int) -> None:
        self._root, self._limit_bytes, self._dim = folder, limit_bytes, dim
        self._folder = folder / digest_of(made_from)[:32]
        self._layout = np.dtype([("key", _KEY), ("vector", np.float32, (dim,))])
        self._known: set[str] = set()
        self._segments: list[tuple[str, npt.NDArray[Any]]] = []
        self._table, self._recent = _Table(), _Table()

    def get(self, texts: Sequence[str]) -> tuple[Ids, Vectors]:
        """Places of those `texts` that are known, ascending, and their vectors `[known, dim]`."""
        self._take_in_new_segments()
        keys, segment, row = _keys(texts), np.full(len(texts), -1), np.zeros(len(texts), np.int64)
        for table in (self._table, self._recent):
            here, places = table.places(keys)
            segment[here], row[here] = table.segment[places[here]], table.row[places[here]]
        known = np.flatnonzero(segment >= 0)
        vectors = np.empty((len(known), self._dim), dtype=np.float32)
        for number in np.unique(segment[known]):
            name, rows = self._segments[number]
            of_this = segment[known] == number
            vectors[of_this] = rows["vector"][row[known][of_this]]
            with suppress(OSError):  # removed by now
                os.utime(self._folder / name)  # used now
        return known, vectors

    def put(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Keep `vectors [n, dim]` of texts."""
        if not len(texts):
            return
        rows = np.empty(len(texts), dtype=self._layout)
        rows["key"], rows["vector"] = _keys(texts), vectors
        name = f"{uuid.uuid4().hex}{_SUFFIX}"
        unfinished = self._folder / f".{name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(unfinished, rows)
            unfinished.replace(self._folder / name)
            self._make_room()
        except OSError as error:  # read-only, full
            log.warning("vectors cannot be kept in %s (%s); they will be computed again", self._folder, error)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _take_in_new_segments(self) -> None:
        """Those that others, or this process, have written since the last look."""
        try:
            names = {item.name for item in os.scandir(self._folder) if item.name.endswith(_SUFFIX)}
        except OSError:  # not written yet
            return
        keys, segments, places = [self._recent.keys], [self._recent.segment], [self._recent.row]
        for name in sorted(name for name in names - self._known if not name.startswith(".")):
            self._known.add(name)
            try:
                rows = np.load(self._folder / name, mmap_mode="r")
            except (OSError, ValueError):  # removed meanwhile, or damaged
                continue
            if rows.dtype != self._layout:
                continue
            self._segments.append((name, rows))
            keys.append(np.asarray(rows["key"]))
            segments.append(np.full(len(rows), len(self._segments) - 1))
            places.append(np.arange(len(rows)))
        if len(keys) > 1:  # sorted once, not with each segment: a process that starts finds thousands
            self._recent = _Table().joined(np.concatenate(keys), np.concatenate(segments), np.concatenate(places))
        if len(self._recent.keys) * _FOLD > len(self._table.keys):
            new = self._recent
            self._table, self._recent = self._table.joined(new.keys, new.segment, new.row), _Table()

    def _make_room(self) -> None:
        segments = []
        for file in self._root.glob(f"*/*{_SUFFIX}"):
            with suppress(OSError):  # another writer makes room as well
                segments.append((file.stat().st_mtime, file.stat().st_size, file))
        excess = sum(size for _, size, _ in segments) - self._limit_bytes
        for _, size, file in sorted(segments):
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= size


def _keys(texts: Sequence[str]) -> npt.NDArray[np.bytes_]:
    digests = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest() for text in texts
    ]
    return np.array(digests, dtype=_KEY)
