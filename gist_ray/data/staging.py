"""Staging: source units in, pieces of rows out. A piece is some rows and their distinct texts; memory holds one."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gist_ray.config import DataConfig
from gist_ray.counted import counted
from gist_ray.data.shards import NO_LABEL
from gist_ray.data.sources import Reject, Triplet, Unit, read_unit
from gist_ray.data.texts import Piece, text_key, write_arrow
from gist_ray.errors import InputError
from gist_ray.manifest import write_json

ROWS_PER_PIECE = 32_768
CHARS_PER_PIECE = 64_000_000  # long documents make a piece with fewer rows
TEXTS_PER_PIECE = 131_072  # so do rows with many negatives: numbering holds the guide vectors of a piece
_SHOWN_CHARS = 2_000
_ERRORS_SHOWN = 3
NO_TASK = "(no task)"


@dataclass(frozen=True)
class Staged:
    """What staging counted, over all units."""

    rows: int
    texts: int
    """Distinct within each piece, added up: at least the distinct texts of the whole."""
    occurrences: int
    not_selected: int
    rejects: dict[str, dict[str, int]]
    """By task, by reason."""
    tasks: list[str]
    pieces: list[str]
    """Names of the pieces' files, without suffix, in order."""

    @property
    def rejected(self) -> int:
        """Rows that cannot be used."""
        return sum(sum(reasons.values()) for reasons in self.rejects.values())


def stage_all(units: list[Unit], data: DataConfig, out: Path) -> Staged:
    """Stage all units, except those that a killed run finished.

    Raises:
        InputError: a file that cannot be read.
    """
    reports = unit_reports(len(units), lambda number: stage_unit(units[number], number, data, out))
    return Staged(
        **{key: sum(report[key] for report in reports) for key in ("rows", "texts", "occurrences", "not_selected")},
        rejects=added_rejects(report["rejects"] for report in reports),
        tasks=sorted({task for report in reports for task in report["tasks"]}),
        pieces=piece_names(reports),
    )


def piece_names(reports: list[dict[str, Any]]) -> list[str]:
    """Names of all pieces of units, in the units' order."""
    return [f"unit-{number:08d}-{i:05d}" for number, report in enumerate(reports) for i in range(report["pieces"])]


def check_pieces(staging: Path, names: list[str], suffix: str) -> list[Path]:
    """The pieces' files, which this process must see.

    Raises:
        InputError: another node wrote one to a disk that is not shared.
    """
    files = [staging / f"{name}.{suffix}" for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} was staged on another node and is not seen on this one ({len(missing)} of {len(files)} "
            "files); on several nodes, output_dir (of mine: the output folder) must be on storage that all of them see"
        )
    return files


def unit_reports(
    units: int, stage: Callable[[int], dict[str, Any]], *, shown: str = "read", unit: str = "unit"
) -> list[dict[str, Any]]:
    """What `stage` reports of each unit, in order, on Ray Data. `shown` and `unit` are for the progress.

    Raises:
        InputError: of all units that raised one.
    """
    import ray

    def read(item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**item, "report": json.dumps(stage(int(item["unit"])))}
        except InputError as error:  # as a value: Ray Data would retry it, and bury it in its own error
            return {**item, "report": json.dumps({"error": str(error)})}

    items = ray.data.from_items([{"unit": i} for i in range(units)], override_num_blocks=units)
    rows = counted(items.map(read, num_cpus=1).iter_rows(), units, shown, unit)
    reports = [json.loads(row["report"]) for row in sorted(rows, key=lambda row: int(row["unit"]))]
    if errors := [report["error"] for report in reports if "error" in report]:
        more = f"; and {len(errors) - _ERRORS_SHOWN} more files" if len(errors) > _ERRORS_SHOWN else ""
        raise InputError("; ".join(errors[:_ERRORS_SHOWN]) + more)
    return reports


def stage_unit(unit: Unit, number: int, data: DataConfig, out: Path) -> dict[str, Any]:
    """Stage one unit, unless a killed run already did; its report is written last."""
    report_file = out / "staging" / f"unit-{number:08d}.json"
    if not report_file.is_file():
        (out / "rejects").mkdir(parents=True, exist_ok=True)
        counts: Counter[str] = Counter(rows=0, texts=0, occurrences=0, not_selected=0)
        tasks: set[str] = set()
        pieces = 0
        with RejectLog(out / "rejects" / f"unit-{number:08d}.jsonl") as rejects:
            rows = _numbered(read_unit(unit, data), unit, rejects, counts)
            for pieces, piece in enumerate(_pieces(rows, unit.number), start=1):
                counts.update(piece.write(out / "staging" / f"unit-{number:08d}-{pieces - 1:05d}"))
                tasks |= piece.tasks.keys()
        report = {**counts, "pieces": pieces, "rejects": rejects.counts, "tasks": sorted(tasks)}
        write_json(report_file, report)  # after the log is closed: a report vouches for all that the unit leaves
    loaded: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return loaded


class RejectLog:
    """A file with a line for each row that is not used: where it stood, why, and what it held. No row, no file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: TextIO | None = None
        self.counts: dict[str, dict[str, int]] = {}

    def __enter__(self) -> RejectLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream:
            self._stream.close()

    def add(self, source: str, row: int, reason: str, task: str | None, content: Any) -> None:
        """Write and count one row."""
        reasons = self.counts.setdefault(task or NO_TASK, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        line = {"source": source, "row": row, "reason": reason, "content": _shown(content)}
        self._stream = self._stream or self._file.open("w", encoding="utf-8")
        self._stream.write(json.dumps(line) + "\n")


def _shown(content: Any) -> str:
    """What a rejected row held, clipped. A value that JSON does not know may have no text either: its type is named."""
    return json.dumps(content, default=lambda value: f"({type(value).__name__})")[:_SHOWN_CHARS]


def added_rejects(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Sum of counts by task and reason, both in order."""
    total: Counter[tuple[str, str]] = Counter()
    for part in parts:
        total.update({(task, reason): n for task, reasons in part.items() for reason, n in reasons.items()})
    grouped = itertools.groupby(sorted(total.items()), key=lambda item: item[0][0])
    return {task: {reason: n for (_, reason), n in group} for task, group in grouped}


def _numbered(
    rows: Iterator[Triplet | Reject | None], unit: Unit, rejects: RejectLog, counts: Counter[str]
) -> Iterator[tuple[int, Triplet]]:
    """The usable rows with their numbers; the others are counted."""
    for number, row in enumerate(rows, start=unit.first_row):
        if row is None:
            counts["not_selected"] += 1
        elif isinstance(row, Reject):
            rejects.add(unit.name, number, row.reason, row.task, row.row)
        else:
            yield number, row


def _pieces(rows: Iterator[tuple[int, Triplet]], source: int) -> Iterator[_RowsPiece]:
    piece = _RowsPiece(source)
    for number, row in rows:
        piece.add(number, row)
        if piece.is_full():
            yield piece
            piece = _RowsPiece(source)
    if piece.query:
        yield piece


class _RowsPiece:
    """Rows as numbers of their texts and task."""

    def __init__(self, source: int) -> None:
        self.texts = Piece()
        self.tasks: dict[str, int] = {}
        self.query: list[int] = []
        self.positive: list[int] = []
        self._negatives: list[int] = []
        self._negative_starts: list[int] = [0]
        self._task: list[int] = []
        self._label: list[int] = []
        self._place: list[int] = []
        self._source = source

    def add(self, place: int, row: Triplet) -> None:
        """Append one row, which stood at `place` in its unit."""
        self._place.append(place)
        number = self.texts.number
        self.query.append(number(row.query))
        self.positive.append(number(row.positive))
        self._negatives += map(number, row.negatives)
        self._negative_starts.append(len(self._negatives))
        self._task.append(self.tasks.setdefault(row.task, len(self.tasks)))
        self._label.append(NO_LABEL if row.label is None else label_number(row.task, row.label))

    def is_full(self) -> bool:
        """Whether a piece must end here."""
        texts = self.texts
        return len(self.query) == ROWS_PER_PIECE or len(texts) >= TEXTS_PER_PIECE or texts.chars >= CHARS_PER_PIECE

    def write(self, stem: Path) -> dict[str, int]:
        """Write `<stem>.texts`, in key order, and `<stem>.rows`, which refer to them by position."""
        position = self.texts.write(stem.with_name(f"{stem.name}.texts"))

        def column(numbers: list[int]) -> Any:
            return pa.array(position[np.array(numbers, dtype=np.int64)], pa.uint32())

        negatives = pa.LargeListArray.from_arrays(np.array(self._negative_starts), column(self._negatives))
        rows = {
            "query": column(self.query),
            "positive": column(self.positive),
            "negatives": negatives,
            "task": pa.DictionaryArray.from_arrays(pa.array(self._task, pa.int32()), pa.array(list(self.tasks))),
            "source": pa.array(np.full(len(self.query), self._source), pa.uint16()),
            "label": pa.array(self._label, pa.int64()),
            "row": pa.array(self._place, pa.uint64()),
        }
        write_arrow(stem.with_name(f"{stem.name}.rows"), rows)
        occurrences = 2 * len(self.query) + len(self._negatives)
        return {"rows": len(self.query), "texts": len(self.texts), "occurrences": occurrences}


def label_number(task: str, label: str) -> int:
    """Identity of a label of a task, from 0: 63 bits of a hash, the same wherever and whenever it is made."""
    return int.from_bytes(text_key(json.dumps([task, label]))[:8], "big") >> 1


def unit_of(stem: Path) -> int:
    """Number of the unit that a piece belongs to."""
    return int(stem.name.split("-")[1])


def task_codes(column: Any, tasks: list[str]) -> npt.NDArray[np.int64]:
    """A staged task column as positions in the sorted `tasks` of the whole, `[rows]`."""
    place = {task: i for i, task in enumerate(tasks)}
    local = np.array([place[task] for task in column.dictionary.to_pylist()], dtype=np.int64)
    codes: npt.NDArray[np.int64] = local[column.indices.to_numpy()]
    return codes
