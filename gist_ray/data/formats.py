"""Formats: from the bytes of a file to raw rows, in order, with bounded memory.

A row is what the file says, mostly a dict. A row that cannot be read is a `Reject` and reading goes on behind it. A
file that is damaged as a whole is one `InputError`.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from gist_ray.data.files import (
    BLOCK,
    UNREADABLE,
    open_text,
    readable_error,
    shown,
)
from gist_ray.data.parquet import open_parquet, read_parquet
from gist_ray.errors import InputError

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".json": "medi",
    ".json.gz": "medi",
}
LINES_SUFFIXES = (".txt", ".txt.gz")
"""Files of a text a line, kind `lines`. Data only where they are named: folders hold notes that end so too."""
ROW_LIMIT = 64 << 20
"""Bytes of a line, CSV record or array element above which it is a reject: it is held in memory as a whole."""
_ROWS_LOOKED_AT = 200
_SHOWN = 200
_LINE_OVERHEAD = 60  # bytes of an empty str: a record of blank lines is large too
_TOO_LONG = f"longer than {ROW_LIMIT >> 20} MB"
_BETWEEN = re.compile(r"[\s,]*")
_ROW_START = re.compile(r",\s*(?=\{)")


@dataclass(frozen=True)
class Reject:
    """One row that cannot be used, and why. `task`: where it is known."""

    reason: str
    row: Any
    task: str | None = None


@dataclass(frozen=True)
class Head:
    """What a first look at a file shows. `columns` is None where no row could be read. `group_rows`: Parquet only."""

    columns: list[str] | None
    group_rows: tuple[int, ...] = ()


def kind_of(name: str) -> str | None:
    """`parquet`, `jsonl`, `csv` or `medi` by the suffix of a file name; None for all others."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def look(file: str, kind: str, columns: Sequence[str]) -> Head:
    """Columns of a file, from its schema or its first rows.

    Raises:
        InputError: the file cannot be read, holds no row, or has two columns of a name in `columns`.
    """
    if kind == "parquet":
        metadata = open_parquet(file, columns).metadata
        names: list[str] = metadata.schema.to_arrow_schema().names
        head = Head(names, tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        _check_doubled(file, names, columns)
        rows = metadata.num_rows
    else:
        found, rows = _keys(read_rows(file, kind, columns))
        head = Head(found)
    if not rows:
        raise InputError(f"{shown(file)} is empty (it holds no row); remove it from the sources")
    return head


def look_hub(name: str, revision: str | None, split: str) -> tuple[Head, int]:
    """Columns of a Hub dataset, and the number of shards it can be read in."""
    dataset = _load_hub(name, revision, split)
    found, _ = _keys(_hub_rows(dataset, name, revision))
    return Head(found), int(dataset.num_shards)


def read_rows(file: str, kind: str, columns: Sequence[str], part: tuple[int, int] | None = None) -> Iterator[Any]:
    """Stream the raw rows of a file or of a part: row groups of Parquet, bytes of JSONL or text in which lines start.

    `columns`: those that are needed. Parquet reads no others; elsewhere rows may hold more.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    try:
        if kind == "parquet":
            yield from read_parquet(file, columns, part)
            return
        with open_text(file) as stream:
            if kind == "medi":
                yield from _read_array(stream)
            elif kind == "jsonl":
                yield from (_parse_line(line) for line in _lines(stream, part) if line is None or not line.isspace())
            elif kind == "lines":
                yield from map(_text_line, _lines(stream, part))
            else:
                yield from _read_csv(file, stream, columns)
    except (*UNREADABLE, csv.Error) as error:
        raise readable_error(file, error) from error


def read_hub(name: str, revision: str | None, split: str, part: tuple[int, int] | None = None) -> Iterator[Any]:
    """Stream a Hub dataset at a commit. `part`: (shard, number of shards).

    Raises:
        InputError: it cannot be had, or breaks off.
    """
    dataset = _load_hub(name, revision, split)
    if part:
        dataset = dataset.shard(num_shards=part[1], index=part[0])
    return _hub_rows(dataset, name, revision)


def _keys(rows: Iterator[Any]) -> tuple[list[str] | None, int]:
    """Names that occur in the first rows, and how many rows were looked at."""
    names: dict[str, None] = {}
    looked_at = 0
    for row in itertools.islice(rows, _ROWS_LOOKED_AT):
        looked_at += 1
        if isinstance(row, dict):
            names.update(dict.fromkeys(row))
    return list(names) or None, looked_at


def _check_doubled(file: str, names: list[str], columns: Sequence[str]) -> None:
    doubled = next((name for name in columns if names.count(name) > 1), None)
    if doubled is not None:
        raise InputError(f"{shown(file)} has two columns named {doubled}; rename one")


def _load_hub(name: str, revision: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, revision=revision, split=split, streaming=True)
    except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
        raise _hub_error(name, revision, error) from error


def _hub_rows(dataset: Any, name: str, revision: str | None) -> Iterator[Any]:
    try:
        yield from dataset
    except Exception as error:  # as in `_load_hub`
        raise _hub_error(name, revision, error) from error


def _hub_error(name: str, revision: str | None, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"dataset {name} at revision {revision} cannot be had from the Hub ({reason}); "
        "check the id, the revision, the split and the network, or download it and give a local path"
    )


# Text ----------------------------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO, part: tuple[int, int] | None = None) -> Iterator[bytes | None]:
    """Lines, or those that start at byte `part[0]` to `part[1]`. None stands for one that is too long."""
    at, stop = part or (0, None)
    if at:
        stream.seek(at - 1)
        at += _skip_line(stream) - 1  # what began before belongs to the part before
    elif stop is not None:
        stop = max(1, stop - stream.tell())  # behind the byte order mark: a line that starts there starts at 0
    while stop is None or at < stop:
        line = stream.readline(ROW_LIMIT)
        if not line:
            return
        at += len(line)
        if len(line) == ROW_LIMIT and not line.endswith(b"\n"):
            at += _skip_line(stream)
            yield None
        else:
            yield line


def _skip_line(stream: BinaryIO) -> int:
    """Go behind the next newline; return how many bytes that was."""
    skipped = 0
    while piece := stream.readline(BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; a reject where a key occurs twice, for then one of two values would be lost in silence."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    return Reject("a key occurs twice", row)  # which one is in the row: reasons are few, however many rows


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _parse_line(line: bytes | None) -> Any:
    if line is None:
        return Reject(f"line is {_TOO_LONG}", None)
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        # Bad bytes become lone surrogates: the row is lost only if they are in a column that is used.
        text, reason = line.decode("utf-8", "surrogateescape"), "not UTF-8"
    except (ValueError, RecursionError):
        return Reject("line is not valid JSON", line[:_SHOWN].decode("utf-8", "replace"))
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError):
        return Reject(reason, line[:_SHOWN].decode("utf-8", "replace"))


def _text_line(line: bytes | None) -> Any:
    """A row of one column, `text`. Blank lines are rows too: the number of a row is that of its line."""
    if line is None:
        return Reject(f"line is {_TOO_LONG}", None)
    return {"text": line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")}


def _read_csv(file: str, stream: BinaryIO, columns: Sequence[str]) -> Iterator[Any]:
    csv.field_size_limit(ROW_LIMIT)
    records = _records(_lines(stream))
    header = next(records, None)
    if isinstance(header, Reject):
        raise csv.Error(f"its header is {header.reason}")
    _check_doubled(file, header or [], columns)
    for cells in records:
        if isinstance(cells, Reject):
            yield cells
        elif header is not None and len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        else:
            yield Reject(f"row has {len(cells)} cells, the header {len(header or [])}", cells)


def _records(lines: Iterator[bytes | None]) -> Iterator[list[str] | Reject]:
    """CSV records, without blank lines. A quote that is never closed costs its own line: reading goes on with the next.

    The lines of the record being read are kept, up to ROW_LIMIT, so that they can be read again.
    """
    texts = (None if line is None else line.decode("utf-8", "surrogateescape") for line in lines)
    taken: list[str] = []
    again: deque[str | None] = deque()

    def feed() -> Iterator[str]:
        size = 0
        while (line := again.popleft() if again else next(texts, "")) != "":
            size = len(line or "") + _LINE_OVERHEAD + (size if taken else 0)
            if line is None or size > ROW_LIMIT:
                if taken:
                    again.appendleft(line)
                raise csv.Error(_TOO_LONG)
            taken.append(line)
            yield line

    reader = csv.reader(feed(), strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            again.extendleft(reversed(taken[1:]))
            yield Reject(f"malformed CSV ({error})", taken[0][:_SHOWN] if taken else None)
            reader = csv.reader(feed(), strict=True)
            continue
        if cells:
            yield cells


# JSON array ----------------------------------------------------------------------------------------------------------


def _read_array(stream: BinaryIO) -> Iterator[Any]:
    """Elements of a JSON array without holding the file: the 2.5 GB raw MEDI file is one array.

    Behind a malformed element, reading goes on where the next object can begin (a comma, then a brace).
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, at, done, opened, broken = "", 0, False, False, False
    while not done:
        # As much again as is still unread: a long element is scanned a few times, not once a block.
        block = stream.read(max(BLOCK, len(text) - at))
        done = not block
        text, at = text[at:] + decode(block, final=done), 0
        if not opened and text.strip():
            at = len(text) - len(text.lstrip())
            if text[at] != "[":
                raise OSError("a .json source must be an array of rows (raw MEDI); name it .jsonl for one row a line")
            opened, at = True, at + 1
        while opened:
            if broken and (start := _ROW_START.search(text, at)):
                at, broken = start.end(), False
            elif broken:
                at = max(at, len(text.rstrip()) - 1)  # the comma may be the last that was read
                break
            found, at = _element(text, at, done)
            if found is _MORE:
                break
            if found is _END:
                _check_rest(text[at:], stream)
                return
            broken = isinstance(found, Reject) and found.reason.startswith(_BROKEN)
            yield found
    if opened and not broken:
        yield Reject("the JSON array breaks off", None)


_MORE, _END = object(), object()
_BROKEN = "the JSON array is malformed here"


def _element(text: str, at: int, done: bool) -> tuple[Any, int]:
    """The element at `at` and where it ends, a reject, or `_MORE` where it goes on behind what was read."""
    at = cast(re.Match[str], _BETWEEN.match(text, at)).end()
    if at == len(text):
        return _MORE, at
    if text[at] == "]":
        return _END, at + 1
    try:
        row, end = _JSON.raw_decode(text, at)
        whole = done or text[end - 1] in '}]"' or end + 2 < len(text)  # a number may go on, by `e+` at most two behind
        return (row, end) if whole else (_MORE, at)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 10
        if cut and not done and len(text) - at <= ROW_LIMIT:
            return _MORE, at
        reason = f"{_BROKEN}: row is {_TOO_LONG}" if cut and not done else _BROKEN
    except (ValueError, RecursionError):  # an endless number, endless nesting
        reason = _BROKEN
    return Reject(reason, text[at : at + _SHOWN]), at + 1


def _check_rest(text: str, stream: BinaryIO) -> None:
    if text.strip() or stream.read(BLOCK).strip():
        raise OSError("text follows the end of its JSON array; are these two files joined?")
