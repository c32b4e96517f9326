"""Sources: where triplets come from. Files and Hub datasets become one stream of rows; nothing is dropped silently."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.errors import InputError
from gist_ray.manifest import digest_files

_SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".json": "medi",
    ".json.gz": "medi",
}
_ROLES = ("query", "pos", "neg")
_TASK_KEYS = ("task_name", "task_type", "task_id")
_UNREADABLE = (OSError, EOFError, csv.Error, zlib.error, pa.ArrowException)
_CSV_CELL_LIMIT = 1 << 27


@dataclass(frozen=True)
class Unit:
    """What one reading task reads: a file, or a whole source where its rows are capped or come from the Hub."""

    files: tuple[str, ...]
    kind: str
    source: SourceConfig

    @property
    def name(self) -> str:
        """What a message to the user calls it."""
        return self.files[0] if len(self.files) == 1 else self.source.path


@dataclass(frozen=True)
class Triplet:
    """One valid row. `negatives` may be empty."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    task: str


@dataclass(frozen=True)
class Reject:
    """One row that cannot be used, and why."""

    reason: str
    row: Any


def find_units(data: DataConfig) -> list[Unit]:
    """Resolve the sources of a recipe, in order, and look at the columns of each file.

    Raises:
        InputError: a path that matches nothing, an unknown format, a Hub dataset that cannot be had, or a file
            without the required columns.
    """
    units: list[Unit] = []
    for source in data.sources:
        if source.path.startswith("hf://"):
            name = source.path.removeprefix("hf://")
            _check_columns(name, "hub", source)
            units.append(Unit((name,), "hub", source))
            continue
        files = _matching_files(source.path)
        kinds = {_kind(file) for file in files}
        for file in files:
            _check_columns(str(file), _kind(file), source)
        if source.max_rows is not None:
            if len(kinds) > 1:
                raise InputError(f"source {source.path} mixes formats {sorted(kinds)}; list them as separate sources")
            units.append(Unit(tuple(map(str, files)), kinds.pop(), source))
        else:
            units += [Unit((str(file),), _kind(file), source) for file in files]
    return units


def content_digest(unit: Unit) -> str:
    """What identifies the content of a unit: the bytes of its files, or the pinned Hub revision."""
    if unit.kind == "hub":
        return f"{unit.files[0]}@{unit.source.revision}:{unit.source.split}"
    return digest_files([Path(file) for file in unit.files])


def read_unit(unit: Unit, *, keep_instructions: bool, max_chars: int) -> Iterator[Triplet | Reject]:
    """Stream the rows of a unit in order, each as a triplet or as a reject with its reason.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    try:
        rows = itertools.chain.from_iterable(_read(file, unit) for file in unit.files)
        for row in itertools.islice(rows, unit.source.max_rows):
            yield parse_row(row, unit.source.task_name, keep_instructions, max_chars)
    except _UNREADABLE as error:
        raise InputError(f"{unit.name} cannot be read: {error}") from error


def parse_row(row: Any, task_override: str | None, keep_instructions: bool, max_chars: int) -> Triplet | Reject:
    """Validate one raw row: the seven-column schema, or raw MEDI (`[instruction, text]` in each role)."""
    if isinstance(row, Reject):
        return row
    if not isinstance(row, dict):
        return Reject(f"row is a {type(row).__name__}, not an object", row)
    texts: dict[str, list[str]] = {}
    medi = isinstance(row.get("query"), list)
    for role in _ROLES:
        cells = _cells(row.get(role), role, medi)
        if isinstance(cells, str):
            return Reject(cells, row)
        instruct = row.get(f"{role}_instruct") or ""
        prefixed = [(i or instruct, text) for i, text in cells]
        texts[role] = [f"{i} {text}" if keep_instructions and i else text for i, text in prefixed]
        problem = next(filter(None, (_problem(text, role, max_chars) for text in texts[role])), None)
        if problem:
            return Reject(problem, row)
    query, positive, negatives = texts["query"][0], texts["pos"][0], tuple(dict.fromkeys(texts["neg"]))
    if query == positive:
        return Reject("pos equals query", row)
    if query in negatives or positive in negatives:
        return Reject(f"neg equals {'query' if query in negatives else 'pos'}", row)
    found = task_override or next((row[key] for key in _TASK_KEYS if row.get(key) not in (None, "")), "default")
    if problem := _problem(str(found), "task_name", max_chars):
        return Reject(problem, row)
    return Triplet(query, positive, negatives, str(found))


def _cells(value: Any, role: str, medi: bool) -> list[tuple[str, str]] | str:
    """(instruction, text) pairs of a role, or the reason why there are none. `medi`: each text is such a pair."""
    if role == "neg" and (value is None or value == "" or value == []):
        return []
    if value is None:
        return f"{role} is missing"
    several = role == "neg" and isinstance(value, list) and (not medi or isinstance(value[0], list))
    cells: list[tuple[str, str]] = []
    for part in value if several else [value]:
        if medi and isinstance(part, list) and len(part) == 2 and all(isinstance(text, str) for text in part):
            cells.append((part[0].strip(), part[1].strip()))
        elif isinstance(part, str) and not medi:
            cells.append(("", part))
        else:
            return f"{role} is not a string ({type(part).__name__})"
    return cells


def _problem(text: str, role: str, max_chars: int) -> str | None:
    if not text.strip():
        return f"{role} is empty"
    if len(text) > max_chars:
        return f"{role} has more than {max_chars} characters"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{role} is not valid Unicode"
    return None


def _matching_files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and _kind(file, None))
    else:
        files = sorted(match for match in _glob(place) if match.is_file())
    if not files:
        known = ", ".join(sorted(_SUFFIXES))
        raise InputError(f"source {path} does not exist or holds no data file; give a file, folder or glob of {known}")
    return [file.absolute() for file in files]


def _glob(pattern: Path) -> Iterator[Path]:
    """What a path with wildcards matches; without any, or where it exists as it is, the path itself."""
    if pattern.exists():
        return iter([pattern])
    fixed = next((i for i, part in enumerate(pattern.parts) if set(part) & set("*?[")), None)
    if fixed is None:
        return iter([pattern])
    return Path(*pattern.parts[:fixed]).glob(str(Path(*pattern.parts[fixed:])))


def _kind(file: Path, default: str | None = "") -> str:
    for suffix, kind in _SUFFIXES.items():
        if file.name.endswith(suffix):
            return kind
    if default is None:
        return ""
    raise InputError(f"{file} has an unknown format; known: {', '.join(sorted(_SUFFIXES))}")


def _check_columns(file: str, kind: str, source: SourceConfig) -> None:
    """Look at the first row, so that a wrong path, format or column is said before Ray starts."""
    if kind == "parquet":
        columns = _parquet(file).schema_arrow.names
    else:
        try:
            first = next(_read(file, Unit((file,), kind, source)), None)
        except _UNREADABLE as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        if first is None:
            raise InputError(f"{file} is empty; remove it from data.sources")
        if not isinstance(first, dict):
            return  # one bad row is a reject, not a bad file
        columns = list(first)
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise InputError(f"{file} has two columns named {doubled[0]}; rename one")
    missing = [name for name in ("query", "pos") if name not in columns]
    if missing:
        raise InputError(
            f"{file} has no column `{missing[0]}`; it has {', '.join(map(str, columns)) or 'none'}. "
            "Required: query, pos; optional: neg, task_name, query_instruct, pos_instruct, neg_instruct"
        )


def _read(file: str, unit: Unit) -> Iterator[Any]:
    if unit.kind == "hub":
        yield from _read_hub(file, unit.source)
    elif unit.kind == "parquet":
        for batch in _parquet(file).iter_batches(batch_size=4096):
            yield from batch.to_pylist()
    else:
        with _open(file) as stream:
            yield from {"jsonl": _read_jsonl, "csv": _read_csv, "medi": _read_json_array}[unit.kind](stream)


def _open(file: str) -> BinaryIO:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    return Path(file).open("rb")


def _parquet(file: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(name: str, source: SourceConfig) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, revision=source.revision, split=source.split, streaming=True)
    except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"dataset {name} at revision {source.revision} cannot be had from the Hub ({reason}); "
            "check the id, the revision and the network, or download it and give a local path"
        ) from error
    yield from dataset


def _read_jsonl(stream: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = line[:200].decode("utf-8", errors="replace")
            yield Reject("line is not valid JSON" if not isinstance(error, UnicodeDecodeError) else "not UTF-8", shown)


def _read_csv(stream: BinaryIO) -> Iterator[Any]:
    csv.field_size_limit(_CSV_CELL_LIMIT)
    lines = (
        line.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape") for number, line in enumerate(stream)
    )  # a bad byte becomes a surrogate, which rejects its row alone
    reader = csv.reader(lines, strict=False)
    header = next(reader, None)
    if header is None:
        return
    for cells in reader:
        if len(cells) != len(header):
            yield Reject(f"row has {len(cells)} cells, the header {len(header)}", cells)
        elif len(set(header)) != len(header):
            doubled = next(name for name in header if header.count(name) > 1)
            raise csv.Error(f"two columns are named {doubled}")
        else:
            yield dict(zip(header, cells, strict=True))


def _read_json_array(stream: BinaryIO) -> Iterator[Any]:
    """Elements of a JSON array without holding the file: the 2.5 GB raw MEDI file is one array."""
    decoder, text, done = json.JSONDecoder(), "", False
    utf8 = _incremental_utf8()
    opened = False
    while True:
        if not done:
            block = stream.read(1 << 20)
            done = not block
            text += utf8.decode(block, final=done)
        text = text.lstrip("\ufeff \t\r\n,")
        if not opened and text:
            if text[0] != "[":
                raise OSError("a .json source must be an array of rows (raw MEDI); use .jsonl for one row a line")
            text, opened = text[1:].lstrip(), True
        while text and text[0] != "]":
            try:
                row, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                break
            yield row
            text = text[end:].lstrip(" \t\r\n,")
        if text[:1] == "]" or (done and not text.strip()):
            return
        if done:
            yield Reject("the JSON array breaks off or is malformed here", text[:200])
            return


def _incremental_utf8() -> Any:
    import codecs

    return codecs.getincrementaldecoder("utf-8")("replace")
