"""Staging: source units in, pieces of rows out: their distinct texts, which row has which, and the columns to keep."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gist_ray.data.files import shown
from gist_ray.data.parquet import open_parquet
from gist_ray.data.rows import their_columns
from gist_ray.data.sources import Reject, TextRow, Unit, read_texts
from gist_ray.data.staging import CHARS_PER_PIECE, ROWS_PER_PIECE, piece_names, unit_reports
from gist_ray.data.texts import Piece, read_arrow, write_arrow
from gist_ray.errors import InputError
from gist_ray.manifest import write_json

_EXAMPLES = 3
_VALUE_SHOWN = 60
_REMEDY = "leave it out: name the columns to keep with --keep, or none with --keep alone"


@dataclass(frozen=True)
class Staged:
    """What staging counted, over all units."""

    pieces: list[str]
    """Names of the pieces' files, without suffix, in the order of the rows."""
    piece_rows: list[int]
    texts: int
    """Distinct within each piece, added up: at least the distinct texts of the whole."""
    bad_rows: dict[str, int]
    """Rows without a text, by reason."""
    examples: list[str]
    """The first of those: where, what is wrong, and the value."""

    @property
    def rows(self) -> int:
        """All rows, those without a text included."""
        return sum(self.piece_rows)


def stage_all(units: list[Unit], keep: Sequence[str] | None, work: Path) -> Staged:
    """Stage all units on Ray Data, except those that a killed run finished.

    Raises:
        InputError: a file that cannot be read, or a column that cannot be kept.
    """
    reports = unit_reports(len(units), lambda number: stage_unit(units[number], number, keep, work))
    bad_rows = sum((Counter(report["bad_rows"]) for report in reports), Counter[str]())
    return Staged(
        pieces=piece_names(reports),
        piece_rows=[rows for report in reports for rows in report["piece_rows"]],
        texts=sum(report["texts"] for report in reports),
        bad_rows=dict(sorted(bad_rows.items())),
        examples=_examples(units, reports),
    )


def stage_unit(unit: Unit, number: int, keep: Sequence[str] | None, work: Path) -> dict[str, Any]:
    """Stage one unit, unless a killed run already did; its report is written last."""
    report_file = work / "staging" / f"unit-{number:08d}.json"
    if not report_file.is_file():
        report_file.parent.mkdir(parents=True, exist_ok=True)
        bad_rows: Counter[str] = Counter()
        examples: list[tuple[int, str, str]] = []
        piece_rows: list[int] = []
        texts = 0
        column, types = their_columns(unit.source, "text")[0], _stored_types(unit)
        rows = _noted(read_texts(unit, keep), column, bad_rows, examples)
        for piece in _pieces(rows, column, keep):
            piece.write(work / "staging" / f"unit-{number:08d}-{len(piece_rows):05d}", types, unit)
            piece_rows.append(len(piece.numbers))
            texts += len(piece.texts)
        report = {"pieces": len(piece_rows), "piece_rows": piece_rows, "texts": texts}
        write_json(report_file, report | {"bad_rows": bad_rows, "examples": examples})
    loaded: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return loaded


def kept_schema(stems: Sequence[Path]) -> Any:
    """The Arrow schema that the kept columns of all pieces fit into: whole numbers among floats become floats.

    Raises:
        InputError: a column has values of types that do not go together.
    """
    schemas = [read_arrow(_kept_file(stem)).schema for stem in stems if _kept_file(stem).is_file()]
    try:
        return pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"a column has different types in different places ({error}); {_REMEDY}") from error


def kept_columns(stem: Path, schema: Any, rows: int) -> dict[str, Any]:
    """The kept columns of a piece of so many rows, in that schema; nulls where the piece has no such column.

    Raises:
        InputError: as `kept_schema`.
    """
    columns = {field.name: pa.nulls(rows, field.type) for field in schema}
    if not _kept_file(stem).is_file():
        return columns
    found = read_arrow(_kept_file(stem))
    for name in found.schema.names:
        try:
            columns[name] = found[name].cast(schema.field(name).type)
        except pa.ArrowException as error:
            raise InputError(f"column `{name}` has different types in different places ({error}); {_REMEDY}") from error
    return columns


def _kept_file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.kept")


def _noted(
    rows: Iterator[TextRow | Reject], column: str, bad_rows: Counter[str], examples: list[tuple[int, str, str]]
) -> Iterator[TextRow | Reject]:
    """The rows as they come; those without a text are counted, and the first of them described."""
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            bad_rows[row.reason] += 1
            if len(examples) < _EXAMPLES:
                value = row.row.get(column) if isinstance(row.row, dict) else row.row
                examples.append((number, row.reason, ascii(value)[:_VALUE_SHOWN]))
        yield row


def _examples(units: list[Unit], reports: list[dict[str, Any]]) -> list[str]:
    """The first bad rows, by their number in their file: the parts of a file follow each other."""
    found, before = [], 0
    for i, (unit, report) in enumerate(zip(units, reports, strict=True)):
        if i and unit.files != units[i - 1].files:
            before = 0
        for number, reason, value in report["examples"]:
            where = shown(unit.files[0] if len(unit.files) == 1 else unit.source.path)
            place = f"line {before + number + 1}" if unit.kind == "lines" else f"row {before + number}"
            found.append(f"{where} {place}: {reason} ({value})")
        before += sum(report["piece_rows"])
    return found[:_EXAMPLES]


def _stored_types(unit: Unit) -> dict[str, Any]:
    """Types of a Parquet file's columns, which its values alone would not tell (whole numbers of 32 bits, …)."""
    if unit.kind != "parquet":
        return {}
    types: dict[str, set[Any]] = {}
    for field in itertools.chain.from_iterable(open_parquet(file, ()).schema_arrow for file in unit.files):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        types.setdefault(field.name, set()).add(kind)
    return {name: kinds.pop() for name, kinds in types.items() if len(kinds) == 1}


def _pieces(rows: Iterator[TextRow | Reject], column: str, keep: Sequence[str] | None) -> Iterator[_RowsPiece]:
    piece = _RowsPiece(column, keep)
    for row in rows:
        piece.add(row)
        if piece.is_full():
            yield piece
            piece = _RowsPiece(column, keep)
    if piece.numbers:
        yield piece


class _RowsPiece:
    """Rows as numbers of their texts, -1 where there is none, and what is kept of them."""

    def __init__(self, column: str, keep: Sequence[str] | None) -> None:
        self.texts = Piece()
        self.numbers: list[int] = []
        self._kept: list[dict[str, Any]] = []
        self._kept_chars = 0
        self._column, self._keep = column, keep

    def add(self, row: TextRow | Reject) -> None:
        """Append one row."""
        if isinstance(row, TextRow):
            self.numbers.append(self.texts.number(row.text))
            values = row.row
        else:
            self.numbers.append(-1)
            values = row.row if isinstance(row.row, dict) else {}
            values = values | ({self._column: None} if self._column in values else {})
        if self._keep is not None:
            values = {name: values.get(name) for name in self._keep}
        self._kept.append(values)
        self._kept_chars += sum(map(_size, values.values()))

    def is_full(self) -> bool:
        """Whether a piece must end here."""
        chars = max(self.texts.chars, self._kept_chars)
        return len(self.numbers) == ROWS_PER_PIECE or chars >= CHARS_PER_PIECE

    def write(self, stem: Path, types: dict[str, Any], unit: Unit) -> None:
        """Write `<stem>.texts` in key order, `<stem>.rows` with each row's position there, and `<stem>.kept`."""
        position = self.texts.write(stem.with_name(f"{stem.name}.texts"))
        numbers = np.array(self.numbers, dtype=np.int64)
        places = np.append(position, 0)[numbers]  # of a row without a text, -1, any
        write_arrow(stem.with_name(f"{stem.name}.rows"), {"text": pa.array(places, pa.uint32(), mask=numbers < 0)})
        names = dict.fromkeys(itertools.chain.from_iterable(self._kept))
        kept = {name: _column([row.get(name) for row in self._kept], types.get(name), name, unit) for name in names}
        if kept:
            write_arrow(_kept_file(stem), kept)


def _column(values: list[Any], kind: Any, name: str, unit: Unit) -> Any:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = "bytes that are not UTF-8" if isinstance(error, UnicodeError) else str(error).splitlines()[0]
        raise InputError(f"{unit.name}: column `{name}` cannot be kept ({reason}); {_REMEDY}") from error


def _size(value: Any) -> int:
    """About how many characters or numbers a value holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1
