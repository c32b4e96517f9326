"""Miners: what the mining actors do. A tile of queries in, its triplets out; some tiles make a Parquet file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gist_ray.data.mining import (
    NONE,
    Hashes,
    Ids,
    LabelIndex,
    PairIndex,
    chosen,
    drawn,
    margin_limit,
    mixed,
    nearest,
    rescored,
    softmax,
    uniforms,
)
from gist_ray.data.texts import TextTable
from gist_ray.manifest import write_json
from gist_ray.mine_config import MineConfig

QUERIES_PER_TILE = 1_024
_CANDIDATES_PER_TILE = 8_192  # with 1,024 queries 32 MB of similarities
_QUERIES_PER_RESCORING = 64
_SPARE = 16  # found beyond `top_k`, so that fp32 rounding and ties do not decide who is the last of them
LABELS = "labels.json"  # names of the labels by number, in the index
_INSTRUCTIONS = ("query_instruct", "pos_instruct", "neg_instruct")
_POSITIVE, _NEGATIVE = 1, 2  # what a hash is drawn for

Cosines = npt.NDArray[np.float64]
Hide = Callable[[Tensor, int], None]


@dataclass(frozen=True)
class Mined:
    """Triplets of one tile."""

    query: Ids
    """`[n]` text ids."""
    positive: Ids
    negatives: Ids
    """`[n, num_negatives]`, NONE where there are fewer."""
    task: Ids
    label: Ids
    """Number of the label that query and positive bear, NONE for pairs."""
    removed: int
    """Candidates that the margin took away."""


class _Search:
    """What both miners share: exact search by guide vectors, and the choice of hard negatives."""

    def __init__(self, config: MineConfig, table: TextTable, text_hash: Hashes, device: str) -> None:
        self._config, self._table, self._text_hash, self._device = config, table, text_hash, device

    def _vectors(self, ids: Ids) -> Tensor:
        # A copy in torch's own aligned memory: the same product is then rounded the same way in every process.
        return torch.tensor(self._table.guide(ids), device=self._device)

    def _nearest(self, query: Ids, candidates: Ids, first: int, stop: int, hide: Hide) -> tuple[Cosines, Ids]:
        """The `top_k` most similar of `candidates[first:stop]`: cosines and text ids (or NONE), `[q, top_k]`, sorted.

        `hide` is called with places in `candidates`.
        """

        def tiles() -> Iterator[tuple[int, Tensor]]:
            for start in range(first, stop, _CANDIDATES_PER_TILE):
                yield start, self._vectors(candidates[start : min(start + _CANDIDATES_PER_TILE, stop)])

        _, place = nearest(self._vectors(query), tiles(), self._config.top_k + _SPARE, hide)
        found = np.where(place == NONE, NONE, candidates[place])
        cosine = np.concatenate(
            [
                self._cosines(query[low : low + _QUERIES_PER_RESCORING], found[low : low + _QUERIES_PER_RESCORING])
                for low in range(0, len(query), _QUERIES_PER_RESCORING)
            ]
        )
        order = np.lexsort((found, -cosine), axis=1)[:, : self._config.top_k]  # equal cosines by id
        return np.take_along_axis(cosine, order, axis=1), np.take_along_axis(found, order, axis=1)

    def _cosines(self, query: Ids, found: Ids) -> Cosines:
        ids, row = np.unique(found, return_inverse=True)
        row = np.where(found == NONE, NONE, row.reshape(found.shape) - (ids[0] == NONE))
        return rescored(self._table.guide(query), self._table.guide(ids[ids != NONE]), row)

    def _hard(self, cosine: Cosines, found: Ids, positive_cosine: Cosines, stream: Hashes) -> tuple[Ids, int]:
        """Hard negatives of each row, `[n, num_negatives]`, and how many candidates the margin took away."""
        present = found != NONE
        allowed = present & (cosine < margin_limit(positive_cosine, self._config.margin)[:, None])
        order = None
        if self._config.sampling == "random":
            order = mixed(mixed(stream, _NEGATIVE)[:, None], self._text_hash[found])
        column = chosen(allowed, order, self._config.num_negatives)
        negatives = np.where(column == NONE, NONE, np.take_along_axis(found, column, axis=1))
        return negatives, int((present & ~allowed).sum())

    def _stream(self, first: Hashes, second: Hashes) -> Hashes:
        """Start of all randomness of each triplet: it depends on the seed and these two texts."""
        return mixed(mixed(mixed(np.array([self._config.seed % 2**64], np.uint64), first), second), 0)


class LabelMiner(_Search):
    """Tiles are ranges of entries of a `LabelIndex`, each within one task."""

    def __init__(
        self,
        config: MineConfig,
        table: TextTable,
        text_hash: Hashes,
        index: LabelIndex,
        label_hash: Hashes,
        device: str = "cpu",
    ) -> None:
        super().__init__(config, table, text_hash, device)
        self._index, self._label_hash = index, label_hash

    def mine(self, first: int, stop: int) -> Mined:
        """Triplets of the entries `first` to `stop - 1`; an entry alone under its label has none."""
        label, query = self._index.label[first:stop], self._index.text[first:stop]
        stream = self._stream(self._text_hash[query], self._label_hash[label])
        cosine, found = self._same_label(first, stop)
        column = drawn(softmax(cosine, self._config.temperature), uniforms(mixed(stream, _POSITIVE)))
        kept = np.flatnonzero(column != NONE)
        label, query, stream, column = label[kept], query[kept], stream[kept], column[kept]
        positive, positive_cosine = found[kept, column], cosine[kept, column]
        removed = 0
        if not len(kept):
            negatives = np.zeros((0, self._config.num_negatives), dtype=np.int64)
        elif self._config.negatives == "hard":
            negatives, removed = self._hard(*self._other_labels(query, label), positive_cosine, stream)
        else:
            draws = np.arange(self._config.num_negatives, dtype=np.uint64)
            negatives = self._index.others(label, uniforms(mixed(mixed(stream, _NEGATIVE)[:, None], draws)))
        return Mined(query, positive, negatives, self._index.label_task[label], label, removed)

    def _same_label(self, first: int, stop: int) -> tuple[Cosines, Ids]:
        index = self._index
        start, end = index.label_starts[[index.label[first], index.label[stop - 1] + 1]].tolist()
        label = torch.tensor(index.label[first:stop], device=self._device)
        same = torch.tensor(index.label[start:end], device=self._device)

        def hide(similarity: Tensor, place: int) -> None:
            beyond = place + similarity.shape[1]
            similarity.masked_fill_(label[:, None] != same[None, place - start : beyond - start], -torch.inf)
            itself = torch.from_numpy(np.arange(max(first, place), min(stop, beyond)))  # none in most tiles
            similarity[itself - first, itself - place] = -torch.inf

        return self._nearest(index.text[first:stop], index.text, start, end, hide)

    def _other_labels(self, query: Ids, label: Ids) -> tuple[Cosines, Ids]:
        index = self._index
        start, end = index.corpus_range(int(label[0]))
        low, high = np.searchsorted(index.also_label, [label[0], label[-1] + 1])
        also_label, also_place = index.also_label[low:high], index.also_place[low:high]
        own = torch.tensor(label, device=self._device)
        theirs = torch.tensor(index.corpus_label[start:end], device=self._device)

        def hide(similarity: Tensor, place: int) -> None:
            beyond = place + similarity.shape[1]
            similarity.masked_fill_(own[:, None] == theirs[None, place - start : beyond - start], -torch.inf)
            here = np.flatnonzero((also_place >= place) & (also_place < beyond))
            rows, also = np.nonzero(label[:, None] == also_label[here][None])
            similarity[torch.from_numpy(rows), torch.from_numpy(also_place[here][also] - place)] = -torch.inf

        return self._nearest(query, index.corpus, start, end, hide)


class PairMiner(_Search):
    """Tiles are ranges of pairs of a `PairIndex`, each within one task."""

    def __init__(
        self, config: MineConfig, table: TextTable, text_hash: Hashes, index: PairIndex, device: str = "cpu"
    ) -> None:
        super().__init__(config, table, text_hash, device)
        self._index = index

    def mine(self, first: int, stop: int) -> Mined:
        """Triplets of the pairs `first` to `stop - 1`."""
        index = self._index
        query, positive = index.query[first:stop], index.positive[first:stop]
        distinct, of = np.unique(query, return_inverse=True)
        cosine, found = self._candidates(distinct, int(index.task[first]))
        positive_cosine = self._cosines(query, positive[:, None])[:, 0]
        stream = self._stream(self._text_hash[query], self._text_hash[positive])
        negatives, removed = self._hard(cosine[of], found[of], positive_cosine, stream)
        no_label = np.full(len(query), NONE)
        return Mined(query, positive, negatives, index.task[first:stop], no_label, removed)

    def _candidates(self, query: Ids, task: int) -> tuple[Cosines, Ids]:
        index = self._index
        start, end = np.searchsorted(index.corpus_task, [task, task + 1]).tolist()
        rows, places = index.never(query, task)

        def hide(similarity: Tensor, place: int) -> None:
            low, high = np.searchsorted(places, [place - start, place - start + similarity.shape[1]])
            columns = places[low:high] - (place - start)
            similarity[torch.from_numpy(rows[low:high]), torch.from_numpy(columns)] = -torch.inf

        return self._nearest(query, index.corpus, start, end, hide)


class PartMiner:
    """Actor: some tiles in, one Parquet file out, unless a killed run already wrote it."""

    def __init__(self, config: MineConfig, kind: str, tasks: list[str], work: Path, output: Path) -> None:
        torch.set_num_threads(config.cluster.data_threads)
        self._config, self._tasks, self._work, self._output = config, tasks, work, output
        self._table = TextTable(work / "texts")
        self._labels: list[str] = []
        device = "cuda" if config.cluster.gpus_per_worker else "cpu"
        self._miner: LabelMiner | PairMiner
        if kind == "labels":
            index = LabelIndex(**self._arrays(LabelIndex))
            self._labels = json.loads((work / "index" / LABELS).read_text(encoding="utf-8"))
            hashes = self._array("text_hash"), self._array("label_hash")
            self._miner = LabelMiner(config, self._table, hashes[0], index, hashes[1], device)
        else:
            pairs = PairIndex(**self._arrays(PairIndex))
            self._miner = PairMiner(config, self._table, self._array("text_hash"), pairs, device)

    def mine(self, number: int, first: int, stop: int) -> dict[str, int]:
        """Mine the tiles `first` to `stop - 1` and return the counts."""
        report_file = self._work / "parts" / f"{number:05d}.json"
        if not report_file.is_file():
            report_file.parent.mkdir(exist_ok=True)
            write_json(report_file, dict(self._write(number, self._array("tiles")[first:stop])))
        report: dict[str, int] = json.loads(report_file.read_text(encoding="utf-8"))
        return report

    def _write(self, number: int, tiles: Ids) -> Counter[str]:
        """One row group a tile, so that memory holds one tile's texts. No triplet, no file."""
        import pyarrow.parquet as pq

        counts: Counter[str] = Counter()
        temporary = self._output / f".triplets-{number:05d}.tmp"
        with pq.ParquetWriter(temporary, self._schema(), compression="zstd") as writer:
            for first, stop in tiles.tolist():
                mined = self._miner.mine(first, stop)
                if len(mined.query):
                    writer.write_table(self._rows(mined))
                counts.update(self._counts(mined))
        if counts["triplets"]:
            temporary.replace(self._output / f"triplets-{number:05d}.parquet")
        else:
            temporary.unlink()
        return counts

    def _counts(self, mined: Mined) -> dict[str, int]:
        found = (mined.negatives != NONE).sum(axis=1)
        wanted = self._config.num_negatives
        return {
            "triplets": len(mined.query),
            "without_negative": int((found == 0).sum()) if wanted else 0,
            "with_fewer_negatives": int(((found > 0) & (found < wanted)).sum()),
            "removed_by_margin": mined.removed,
        }

    def _schema(self) -> Any:
        import pyarrow as pa

        several = self._config.num_negatives > 1
        columns = [
            ("query", pa.string()),
            ("pos", pa.string()),
            ("neg", pa.list_(pa.string()) if several else pa.string()),
        ]
        more = ("task_name", *_INSTRUCTIONS, "query_label")
        return pa.schema([*columns, *((name, pa.string()) for name in more)])

    def _rows(self, mined: Mined) -> Any:
        import pyarrow as pa

        texts = self._table.texts
        found = iter(texts(mined.negatives[mined.negatives != NONE]))
        negatives = [[next(found) for _ in range(n)] or None for n in (mined.negatives != NONE).sum(axis=1).tolist()]
        columns: list[list[Any]] = [
            texts(mined.query),
            texts(mined.positive),
            negatives if self._config.num_negatives > 1 else [row and row[0] for row in negatives],
            [self._tasks[task] for task in mined.task.tolist()],
            *([""] * len(mined.query) for _ in _INSTRUCTIONS),
            [None if label == NONE else self._labels[label] for label in mined.label.tolist()],
        ]
        return pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, self._schema(), strict=True)], schema=self._schema()
        )

    def _arrays(self, kind: Any) -> dict[str, Any]:
        return {field.name: self._array(field.name) for field in fields(kind)}

    def _array(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(np.load(self._work / "index" / f"{name}.npy", mmap_mode="r"))
