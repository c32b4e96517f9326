"""Parquet: rows of a columnar file, row group by row group, with bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from gist_ray.data.files import UNREADABLE, arrow_buffer_size, file_size, open_for_arrow, shown
from gist_ray.errors import InputError

GROUP_LIMIT, GROUP_RATIO = 1 << 30, 200
"""A row group that says it is larger than the first, and larger than the file by the second, is refused."""

_BATCH_ROWS, _BATCH_BYTES = 1024, 32 << 20


def open_parquet(file: str, columns: Sequence[str]) -> Any:
    """Open a Parquet file so that repeated strings stay one.

    A dictionary-encoded column is stored as small as its distinct values, and would be expanded to many times that.

    Raises:
        InputError: it is damaged, or a decompression bomb.
    """
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(open_for_arrow(file)).metadata
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        used = [any(f"{leaf.path}.".startswith(f"{name}.") for name in columns) for leaf in leaves]
        _check_groups(file, metadata, np.flatnonzero(used).tolist())
        texts = [
            leaf.path for leaf, use in zip(leaves, used, strict=True) if use and leaf.physical_type == "BYTE_ARRAY"
        ]
        return pq.ParquetFile(
            open_for_arrow(file),
            metadata=metadata,
            read_dictionary=texts,
            buffer_size=arrow_buffer_size(file),
            page_checksum_verification=True,
        )
    except (*UNREADABLE, UnicodeDecodeError) as error:
        raise InputError(
            f"{shown(file)} is not a readable Parquet file: {(str(error).splitlines() or [''])[0]}; "
            "replace it by an undamaged copy, or take it out of the sources"
        ) from error


def _check_groups(file: str, metadata: Any, leaves: list[int]) -> None:
    allowed = max(GROUP_LIMIT, GROUP_RATIO * file_size(file))
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        if size > allowed:
            raise InputError(
                f"{shown(file)} looks like a decompression bomb: row group {i} would be {size:,} bytes; allowed are "
                f"{allowed:,} for a file of {file_size(file):,}; write it again in smaller row groups if you trust it"
            )


def read_parquet(file: str, columns: Sequence[str], part: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """Rows of the given columns, of row groups [a, b) or all.

    Raises:
        InputError: as `open_parquet`. Damage further on raises what `files.UNREADABLE` lists.
    """
    parquet = open_parquet(file, columns)
    present = [name for name in parquet.schema_arrow.names if name in columns]
    for i in range(*(part or (0, parquet.metadata.num_row_groups))):
        group = parquet.metadata.row_group(i)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        for batch in parquet.iter_batches(batch_size=rows, row_groups=[i], columns=present):
            names = batch.schema.names
            for cells in zip(*map(_values, batch.columns), strict=True):
                yield dict(zip(names, cells, strict=True))


def _values(column: Any) -> Iterable[Any]:
    """Python values of an Arrow array. Equal strings of a batch are one object; odd types come one at a time."""
    if pa.types.is_dictionary(column.type):
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        dictionary = column.dictionary
        if len(dictionary) > 2 * len(codes):  # of a whole row group
            used, codes = np.unique(codes, return_inverse=True)
            codes -= int(used[0] < 0)
            dictionary = dictionary.take(pa.array(used[used >= 0]))
        values = np.empty(len(dictionary) + 1, dtype=object)  # the last, None, is found by -1
        values[:-1] = list(_values(dictionary))
        return cast(list[Any], values[codes].tolist())
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        items = iter(_values(column.flatten()))
        lengths = column.value_lengths().to_pylist()
        return (None if length is None else list(itertools.islice(items, length)) for length in lengths)
    if pa.types.is_nested(column.type):
        return map(_value, column)
    try:
        return cast(list[Any], column.to_pylist())
    except (ValueError, OverflowError, *UNREADABLE):  # one bad value must not cost the others
        return map(_value, column)


def _value(scalar: Any) -> Any:
    """A Python value; text of bad bytes with lone surrogates; what Python cannot hold as Arrow's own scalar."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        buffer = getattr(scalar, "as_buffer", None)
        return scalar if buffer is None else buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError, *UNREADABLE):
        return scalar
