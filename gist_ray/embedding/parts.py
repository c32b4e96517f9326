"""Parts: the rows of a piece with their vectors, in the input's order; and parts joined to one file."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from gist_ray.data.texts import TextTable, keys_to_numpy, read_arrow
from gist_ray.embed_config import NumberType
from gist_ray.embedding.blocks import vector_column, vector_rows
from gist_ray.embedding.embedder import Rows, null_row
from gist_ray.embedding.staging import kept_columns

VECTOR = "embedding"
ROW = "row"
_COPIED = 4 << 20
_NUMPY = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "binary": "|i1", "ubinary": "|u1"}


def write_npy_part(stem: Path, table: TextTable, width: int, dtype: NumberType, file: Path) -> None:
    """The rows `[n, width]` of a piece; not-a-numbers for one without a text."""
    rows, missing = _rows_of(stem, table, width, dtype)
    if missing.any():
        rows[missing] = null_row(dtype, width)
    with _whole(file) as stream:
        np.save(stream, rows)


def write_parquet_part(
    stem: Path, first_row: int, table: TextTable, width: int, dtype: NumberType, schema: Any, file: Path
) -> None:
    """What is kept of a piece's rows (or their numbers, from `first_row`) and `embedding`, null without a text.

    Raises:
        InputError: as `kept_columns`.
    """
    import pyarrow.parquet as pq

    rows, missing = _rows_of(stem, table, width, dtype)
    columns = kept_columns(stem, schema, len(rows))
    columns = columns or {ROW: pa.array(np.arange(first_row, first_row + len(rows)))}
    vectors = vector_column(rows, mask=pa.array(missing) if missing.any() else None)
    whole = pa.table(columns | {VECTOR: vectors})
    with _whole(file) as stream:
        pq.write_table(whole, stream, **_options(whole.schema))


def join_npy(parts: Sequence[Path], file: Path) -> None:
    """One `.npy` of all rows, which `np.load(…, mmap_mode="r")` reads in place."""
    shapes = [np.load(part, mmap_mode="r") for part in parts]
    head = {
        "descr": np.lib.format.dtype_to_descr(shapes[0].dtype),
        "fortran_order": False,
        "shape": (sum(len(rows) for rows in shapes), shapes[0].shape[1]),
    }
    with _whole(file) as out:
        np.lib.format.write_array_header_1_0(out, head)
        for part in parts:
            with part.open("rb") as stream:
                np.lib.format.read_magic(stream)
                np.lib.format.read_array_header_1_0(stream)
                shutil.copyfileobj(stream, out, _COPIED)


def join_parquet(parts: Sequence[Path], file: Path) -> None:
    """One Parquet file with a row group for each part."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0])
    with _whole(file) as out, pq.ParquetWriter(out, schema, **_options(schema)) as writer:
        for part in parts:
            writer.write_table(pq.ParquetFile(part).read())


def _rows_of(stem: Path, table: TextTable, width: int, dtype: NumberType) -> tuple[Rows, Any]:
    """Vectors of a piece's rows `[n, width]`, and which rows have none `[n]`.

    One walk over all blocks; a block is mapped only while its vectors are copied out.
    """
    keys = keys_to_numpy(read_arrow(stem.with_name(f"{stem.name}.texts"))["key"])
    distinct = np.zeros((len(keys) + 1, width), dtype=_NUMPY[dtype])
    for _, columns, part, found in table.matches(keys):
        distinct[part] = vector_rows(columns["vector"])[found]
    column = read_arrow(stem.with_name(f"{stem.name}.rows"))["text"]
    missing = column.is_null().to_numpy(zero_copy_only=False)
    places = column.fill_null(len(keys)).to_numpy()  # the last one is of nobody
    return distinct[places], missing


def _options(schema: Any) -> dict[str, Any]:
    """How Parquet is written. A dictionary or bounds of numbers that never repeat would only cost time."""
    kept = [name for name in schema.names if name != VECTOR]
    return {"compression": "zstd", "use_dictionary": kept, "write_statistics": kept}


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as stream:
        yield cast(BinaryIO, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
