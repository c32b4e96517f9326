"""Numbering: staged rows in, rows of text ids out. Here every row meets its guide vectors, so it is measured too."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.config import FilterConfig
from gist_ray.counted import counted
from gist_ray.data.report import masked_share
from gist_ray.data.shards import Triplets, joined_triplets, read_triplets, write_triplets
from gist_ray.data.sources import Unit
from gist_ray.data.staging import RejectLog, Staged, added_rejects, check_pieces, task_codes, unit_of
from gist_ray.data.statistics import MeasuredRows, Statistics, measure
from gist_ray.data.texts import Ids, Keys, TextTable, guide_matrix, keys_to_numpy, list_offsets, read_arrow, unit_rows
from gist_ray.manifest import write_json

_ROWS_AT_ONCE = 4_096  # fp32 vectors of this many rows are held at a time
_TASKS_AT_ONCE = 8
MISRANKED = "the guide ranks a negative above the positive"


@dataclass(frozen=True)
class Numbered:
    """What numbering counted, over all pieces."""

    starts: Ids
    """Number of the first row of each part of `triplets/`, then that of all rows, `[parts + 1]`."""
    rejects: dict[str, dict[str, int]]
    """Rows that `data.filters` dropped, by task and reason."""
    statistics: Statistics

    @property
    def rows(self) -> int:
        """Rows that were kept."""
        return int(self.starts[-1])


def number_all(
    out: Path, units: list[Unit], staged: Staged, block_rows: list[int], filters: FilterConfig, max_tokens: int
) -> Numbered:
    """Write `triplets/` from the staged pieces, on Ray Data; each part whole or not at all."""
    import ray

    stems = [file.with_suffix("") for file in check_pieces(out / "staging", staged.pieces, "rows")]

    def number(item: dict[str, Any]) -> dict[str, Any]:
        stem = stems[int(item["piece"])]
        table = TextTable(out / "texts", in_place=False, rows=block_rows)
        source = units[unit_of(stem)].name
        report = number_piece(stem, int(item["piece"]), out, table, source, staged.tasks, filters, max_tokens)
        return {"report": json.dumps(report)}

    items = ray.data.from_items([{"piece": i} for i in range(len(stems))], override_num_blocks=len(stems))
    rows = items.map(number, num_cpus=1).iter_rows()
    reports = [json.loads(row["report"]) for row in counted(rows, len(stems), "number rows", "piece")]
    reports.sort(key=lambda report: int(report["piece"]))
    starts = np.cumsum([0, *(report["rows"] for report in reports)])
    statistics = Statistics()
    for piece, start in enumerate(starts[:-1].tolist()):
        found = Statistics.from_json(json.loads(_statistics_file(out, piece).read_text(encoding="utf-8")))
        statistics = statistics.merge(found.moved(start))
    rejects = added_rejects(report["rejects"] for report in reports)
    filtered_out = sum(sum(reasons.values()) for reasons in rejects.values())
    assert starts[-1] + filtered_out == staged.rows, "every staged row is numbered or counted as filtered"
    return Numbered(starts, rejects, statistics)


def number_piece(
    stem: Path,
    number: int,
    out: Path,
    table: TextTable,
    source: str,
    tasks: list[str],
    filters: FilterConfig,
    max_tokens: int,
) -> dict[str, Any]:
    """Number the rows of one piece, measure them, and leave out what the filters say. `source` names their unit."""
    texts, rows = (read_arrow(stem.with_name(f"{stem.name}.{kind}")) for kind in ("texts", "rows"))
    measured, triplets = _measured(_Met.of(texts, table), rows, tasks, max_tokens)
    reasons = filter_reasons(filters)
    dropped = filtered(measured.guide_positive, measured.guide_negative, measured.negative_starts, filters)
    kept = dropped == 0
    row = np.where(kept, np.cumsum(kept) - 1, -1)
    with RejectLog(out / "rejects" / f"filtered-{number:08d}.jsonl") as rejects:
        for i in np.flatnonzero(dropped).tolist():
            place, task = int(rows["row"][i].as_py()), tasks[int(measured.task[i])]
            rejects.add(source, place, reasons[dropped[i] - 1], task, measured.text(i))
    measured = replace(measured, row=row, dropped=dropped, reasons=reasons)
    write_json(_statistics_file(out, number), measure(measured).to_json())
    write_triplets(out / "triplets" / f"part-{number:08d}.arrow", triplets.chosen(np.flatnonzero(kept)))
    return {"piece": number, "rows": int(kept.sum()), "rejects": rejects.counts}


def filter_reasons(filters: FilterConfig) -> list[str]:
    """What each filter says of a row that it drops."""
    return [MISRANKED, f"guide(query, pos) is below {filters.min_similarity}"]


def filtered(
    positive: npt.NDArray[np.float32], negative: npt.NDArray[np.float32], starts: Ids, filters: FilterConfig
) -> Ids:
    """0 for each row that is kept, else 1 + the index of its reason in `filter_reasons`, `[rows]`.

    `positive [rows]` and `negative [m]` are guide similarities to the query; row i has the negatives
    `starts[i]:starts[i + 1]`.
    """
    dropped = np.zeros(len(positive), dtype=np.int64)
    if filters.guide_order:
        row_of = np.repeat(np.arange(len(positive)), np.diff(starts))
        dropped[row_of[negative > positive[row_of]]] = 1
    if filters.min_similarity is not None:
        dropped[positive < filters.min_similarity] = 2
    return dropped


def masked_shares(out: Path, numbered: Numbered, block_rows: list[int]) -> dict[str, float | None]:
    """Share of in-batch candidates that the guide would hide, for a sample of rows of each task, on Ray.

    None where a task has fewer than two sampled rows: there is no candidate of another row.
    """
    import ray

    def some(tasks: dict[str, Ids]) -> dict[str, float | None]:
        table = TextTable(out / "texts", in_place=False, rows=block_rows)
        return {task: _masked_share(table, _rows_of(out, rows, starts)) for task, rows in tasks.items()}

    starts, remote = numbered.starts, ray.remote(num_cpus=1)(some)
    items = [(name, task.sampled_rows()) for name, task in sorted(numbered.statistics.tasks.items())]
    parts = [dict(items[i : i + _TASKS_AT_ONCE]) for i in range(0, len(items), _TASKS_AT_ONCE)]
    return {task: share for found in ray.get([remote.remote(part) for part in parts]) for task, share in found.items()}


@dataclass(frozen=True)
class _Met:
    """The texts of a piece, in key order, with what the blocks hold of them."""

    texts: Any
    keys: Keys
    ids: Ids
    whole_tokens: Ids
    vectors: npt.NDArray[np.float16]

    @classmethod
    def of(cls, texts: Any, table: TextTable) -> _Met:
        """One walk over all blocks; a block is mapped only while its texts are copied out."""
        keys = keys_to_numpy(texts["key"])
        ids, whole = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        vectors = np.empty((len(keys), table.guide_dim), np.float16)
        for start, columns, part, found in table.matches(keys):
            ids[part] = start + found
            whole[part] = columns["whole_tokens"].to_numpy()[found]
            vectors[part] = guide_matrix(columns)[found]
        return cls(texts, keys, ids, whole, vectors)

    def similarity(self, left: Ids, right: Ids) -> npt.NDArray[np.float32]:
        """Guide cosine of pairs of texts, `[len(left)]`, in fp32."""
        found = np.empty(len(left), np.float32)
        for start in range(0, len(left), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            a, b = (unit_rows(self.vectors[numbers[part]].astype(np.float32)) for numbers in (left, right))
            found[part] = np.einsum("ij,ij->i", a, b)
        return found


def _measured(met: _Met, rows: Any, tasks: list[str], max_tokens: int) -> tuple[MeasuredRows, Triplets]:
    """A piece's rows as `measure` wants them, and as text ids."""
    query, positive = (rows[role].to_numpy().astype(np.int64) for role in ("query", "positive"))
    starts, negative = list_offsets(rows["negatives"]), rows["negatives"].values.to_numpy().astype(np.int64)
    task = task_codes(rows["task"], tasks)
    anchor = query[np.repeat(np.arange(len(query)), np.diff(starts))]

    def text(i: int) -> tuple[str, str, list[str]]:
        numbers = [int(query[i]), int(positive[i]), *negative[starts[i] : starts[i + 1]].tolist()]
        q, p, *n = (met.texts["text"][number].as_py() for number in numbers)
        return q, p, n

    measured = MeasuredRows(
        task=task,
        tasks=tasks,
        row=np.arange(len(query)),
        query_key=met.keys[query],
        positive_key=met.keys[positive],
        negative_starts=starts,
        negative_key=met.keys[negative],
        query_tokens=met.whole_tokens[query],
        positive_tokens=met.whole_tokens[positive],
        negative_tokens=met.whole_tokens[negative],
        max_tokens=max_tokens,
        guide_positive=met.similarity(query, positive),
        guide_negative=met.similarity(anchor, negative),
        dropped=np.zeros(len(query), dtype=np.int64),
        reasons=[],
        text=text,
    )
    source = rows["source"].to_numpy().astype(np.int64)
    label = rows["label"].to_numpy()
    return measured, Triplets(met.ids[query], met.ids[positive], starts, met.ids[negative], task, source, label)


def _rows_of(out: Path, rows: Ids, starts: Ids) -> Triplets:
    """Some rows, by ascending number, from the parts that hold them."""
    parts = np.searchsorted(starts, rows, side="right") - 1
    found = []
    for part in np.unique(parts).tolist():
        here = read_triplets(out / "triplets" / f"part-{part:08d}.arrow")
        found.append(here.chosen(rows[parts == part] - starts[part]))
    return joined_triplets(found)


def _masked_share(table: TextTable, rows: Triplets) -> float | None:
    if len(rows) < 2:
        return None
    query, positive, negatives = (table.guide(ids) for ids in (rows.query, rows.positive, rows.negatives))
    return masked_share(query, positive, negatives, rows.query, rows.positive, rows.negatives)


def _statistics_file(out: Path, piece: int) -> Path:
    return out / "staging" / f"statistics-{piece:08d}.json"
