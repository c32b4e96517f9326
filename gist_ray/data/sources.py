"""Sources: where rows come from. Files and Hub datasets become one stream of rows; nothing is dropped silently."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data.files import UNREADABLE, file_digest, file_size, is_local, list_files, readable_error, shown
from gist_ray.data.formats import (
    LINES_SUFFIXES,
    SUFFIXES,
    Head,
    Reject,
    kind_of,
    look,
    look_hub,
    read_hub,
    read_rows,
)
from gist_ray.data.rows import (
    LABEL_KEYS,
    ROLES,
    TASK_KEYS,
    Labelled,
    LabelledParser,
    TextRow,
    Triplet,
    TripletParser,
    text_row,
    their_columns,
)
from gist_ray.errors import InputError
from gist_ray.manifest import MANIFEST, digest_of

__all__ = [
    "Labelled",
    "Reject",
    "TextRow",
    "Triplet",
    "Unit",
    "columns_of",
    "content_digest",
    "find_units",
    "parse_row",
    "read_labelled",
    "read_texts",
    "read_unit",
]

_ROWS_PER_PART = 100_000
_BYTES_PER_PART = 64 << 20
_LOOKERS = 16  # threads that look at files: a bucket answers each request in tens of milliseconds

Kind = Literal["triplets", "labels", "texts"]


@dataclass(frozen=True)
class Unit:
    """What one reading task reads: a file or a part of it, or a whole source where its rows are capped."""

    files: tuple[str, ...]
    kind: str
    """parquet, jsonl, csv, medi, lines or hub."""
    source: SourceConfig
    number: int
    """Index of the source in the list given."""
    part: tuple[int, int] | None = None
    """Row groups [a, b) of a Parquet file, bytes [a, b) of a JSONL or text file in which its lines start, or (shard,
    number of shards) of a Hub dataset. None: all."""
    first_row: int = 0
    """Rows of the file before this part where that is known (Parquet), else 0."""

    @property
    def name(self) -> str:
        """What a message to the user calls it."""
        whole = shown(self.files[0] if len(self.files) == 1 else self.source.path)
        if self.part is None:
            return whole
        if self.kind == "hub":
            return f"{whole}[shard {self.part[0]} of {self.part[1]}]"
        return f"{whole}[{'row groups' if self.kind == 'parquet' else 'bytes'} {self.part[0]}-{self.part[1]}]"


# Units ---------------------------------------------------------------------------------------------------------------


def find_units(sources: Sequence[SourceConfig], kind: Kind = "triplets") -> list[Unit]:
    """Resolve sources, in order, look at the columns of each file, and cut large files into parts.

    Where files are cut depends on them alone, never on the number of workers.

    Raises:
        InputError: a path that matches nothing, an unknown format, a Hub dataset that cannot be had, or a file
            without the required columns.
    """
    return [unit for number, source in enumerate(sources) for unit in _units_of(source, number, kind)]


def columns_of(source: SourceConfig, kind: Kind = "triplets") -> list[str]:
    """Our names of the columns of a source's first file, after its `columns` mapping.

    Raises:
        InputError: as `find_units`, but for missing columns.
    """
    unit = _whole_files(source, 0, kind)[0]
    if unit.kind == "hub":
        head = look_hub(unit.files[0], source.revision, source.split)[0]
    else:
        head = look(unit.files[0], unit.kind, ())
    theirs = head.columns or []
    mapped = {ours: their_columns(source, ours) for ours in source.columns}
    taken = {name for names in mapped.values() for name in names}
    ours = [name for name, names in mapped.items() if set(names) <= set(theirs)]
    return [name for name in theirs if name not in taken and name not in mapped] + ours


def content_digest(unit: Unit) -> str:
    """What identifies the content of a unit's files (all of them, whatever its part), or the pinned Hub revision."""
    if unit.kind == "hub":
        return f"{unit.files[0]}@{unit.source.revision}:{unit.source.split}"
    try:
        digests = [file_digest(file) for file in unit.files]
    except UNREADABLE as error:
        raise readable_error(unit.files[0], error) from error
    return digests[0] if len(digests) == 1 else digest_of(digests)


def _units_of(source: SourceConfig, number: int, kind: Kind) -> list[Unit]:
    units = _whole_files(source, number, kind)
    columns = _columns_read(source, kind)
    if units[0].kind == "hub":
        head, shards = look_hub(units[0].files[0], source.revision, source.split)
        _check_columns(units[0], head, kind)
        if source.max_rows is not None or shards == 1:
            return units
        return [replace(units[0], part=(shard, shards)) for shard in range(shards)]
    with ThreadPoolExecutor(_LOOKERS) as pool:
        heads = list(pool.map(lambda unit: look(unit.files[0], unit.kind, columns), units))
    for unit, head in zip(units, heads, strict=True):
        _check_columns(unit, head, kind)
    if source.max_rows is None:
        return [part for unit, head in zip(units, heads, strict=True) for part in _parts(unit, head)]
    kinds = {unit.kind for unit in units}
    if len(kinds) > 1:
        raise InputError(f"source {shown(source.path)} mixes formats {sorted(kinds)}; list them as separate sources")
    return [replace(units[0], files=tuple(unit.files[0] for unit in units))]


def _whole_files(source: SourceConfig, number: int, kind: Kind) -> list[Unit]:
    """One unit for each file of a source, or for its Hub dataset."""
    if source.path.startswith("hf://"):
        return [Unit((source.path.removeprefix("hf://"),), "hub", source, number)]
    # An artifact of ours is a source too; its manifest is no data.
    files = list_files(source.path, lambda name: kind_of(name) is not None and name.rpartition("/")[2] != MANIFEST)
    lines = LINES_SUFFIXES if kind == "texts" else ()
    known = ", ".join(sorted({*SUFFIXES, *lines}))
    if not files:
        raise InputError(
            f"source {shown(source.path)} does not exist or holds no data file; give a file, folder or glob of {known}"
        )
    units = []
    for file in files:
        kind_of_file = "lines" if shown(file).endswith(lines) else kind_of(shown(file))
        if kind_of_file is None:
            raise InputError(f"{shown(file)} has an unknown format; known: {known}")
        units.append(Unit((file,), kind_of_file, source, number))
    return units


def _parts(unit: Unit, head: Head) -> Iterator[Unit]:
    """Cut a large file: Parquet between row groups, uncompressed local lines at fixed bytes."""
    file = unit.files[0]
    if unit.kind == "parquet":
        cuts, rows, row = [0], [0], 0
        for i, group_rows in enumerate(head.group_rows, start=1):
            row += group_rows
            if row - rows[-1] >= _ROWS_PER_PART or i == len(head.group_rows):
                cuts.append(i)
                rows.append(row)
    elif unit.kind in ("jsonl", "lines") and is_local(file) and not file.endswith(".gz"):
        cuts = [*range(0, file_size(file), _BYTES_PER_PART), file_size(file)]
        rows = [0] * len(cuts)
    else:
        cuts, rows = [], []
    if len(cuts) <= 2:
        yield unit
        return
    for part, first_row in zip(itertools.pairwise(cuts), rows, strict=False):
        yield replace(unit, part=part, first_row=first_row)


def _columns_read(source: SourceConfig, kind: Kind, instructions: Collection[str] = ROLES) -> tuple[str, ...]:
    """All columns of a source that may be looked at. `instructions`: roles whose instructions are."""
    if kind == "texts":
        return their_columns(source, "text")
    instruct = (f"{role}_instruct" for role in ROLES if role in instructions)
    of_kind = ("text", *LABEL_KEYS) if kind == "labels" else (*ROLES, "query_label", *instruct)
    return tuple(dict.fromkeys(name for ours in (*TASK_KEYS, *of_kind) for name in their_columns(source, ours)))


def _check_columns(unit: Unit, head: Head, kind: Kind) -> None:
    """So that a wrong path, format or column is said before Ray starts."""
    if head.columns is None:
        return  # bad rows are rejects, not a bad file
    present, source = head.columns, unit.source
    needed = {"triplets": ("query", "pos"), "labels": ("text", "label"), "texts": ("text",)}[kind]
    for ours in dict.fromkeys((*needed, *source.columns)):
        if ours == "label" and ours not in source.columns and "label_text" in present:
            continue
        missing = next((name for name in their_columns(source, ours) if name not in present), None)
        if missing is not None:
            raise InputError(_missing_column(unit.name, ours, missing, [str(name) for name in present], needed, kind))


def _missing_column(file: str, ours: str, missing: str, present: list[str], needed: tuple[str, ...], kind: Kind) -> str:
    lower = {name.lower(): name for name in present if name not in needed}
    near = difflib.get_close_matches(missing.lower(), lower, n=1, cutoff=0.4)
    if kind == "texts":
        likely = lower[near[0]] if near else present[0]
        return f"{file} has no column `{missing}`; it has {', '.join(present)}. Say where texts are: --column {likely}"
    hint = f"did you mean `{lower[near[0]]}`? Then" if near else "where it has another name,"
    return (
        f"{file} has no column `{missing}`; it has {', '.join(present) or 'none'}. Required: {', '.join(needed)}. "
        f"{hint[0].upper()}{hint[1:]} add `columns: {{{ours}: {lower[near[0]] if near else '...'}}}` to the source"
    )


# Rows ----------------------------------------------------------------------------------------------------------------


def read_unit(unit: Unit, data: DataConfig) -> Iterator[Triplet | Reject | None]:
    """Stream the rows of a unit in order: triplets, rejects with their reason, None for a task that is not selected.

    Raises:
        InputError: a file as a whole cannot be read.
    """
    columns = _columns_read(unit.source, "triplets", data.instructions)
    return _capped(unit, columns, TripletParser(unit.source, data))


def read_labelled(unit: Unit, max_chars: int) -> Iterator[Labelled | Reject | None]:
    """Stream the rows of a unit as labelled texts; otherwise as `read_unit`.

    The label is `label_text` where there is one, else `label`; whole numbers are taken as their digits.
    """
    return _capped(unit, _columns_read(unit.source, "labels"), LabelledParser(unit.source, max_chars))


def read_texts(unit: Unit, keep: Sequence[str] | None) -> Iterator[TextRow | Reject]:
    """Stream every row of a unit, in order, as a text to embed; otherwise as `read_unit`.

    `keep`: the source's columns that are wanted beside the text's, None for all. Rows may hold more.
    """
    column = their_columns(unit.source, "text")[0]
    if keep is None and unit.kind == "parquet":
        names = {file: look(file, unit.kind, ()).columns or [] for file in unit.files}
        for file, own in names.items():
            look(file, unit.kind, own)  # none of them twice
        keep = [name for own in names.values() for name in own]
    return _capped(unit, (column, *(keep or ())), lambda row: text_row(row, column))


def parse_row(row: Any, source: SourceConfig, data: DataConfig) -> Triplet | Reject | None:
    """Validate one raw row: the seven-column schema, or raw MEDI (`[instruction, text]` in each role)."""
    parsed: Triplet | Reject | None = TripletParser(source, data)(row)
    return parsed


def _capped(unit: Unit, columns: tuple[str, ...], parse: Callable[[Any], Any]) -> Iterator[Any]:
    left = unit.source.max_rows
    for raw in _raw_rows(unit, columns):
        row = parse(raw)
        yield row
        if left is not None and row is not None:
            left -= 1
            if not left:
                return


def _raw_rows(unit: Unit, columns: tuple[str, ...]) -> Iterator[Any]:
    if unit.kind == "hub":
        yield from read_hub(unit.files[0], unit.source.revision, unit.source.split, unit.part)
        return
    for file in unit.files:
        yield from read_rows(file, unit.kind, columns, unit.part)
