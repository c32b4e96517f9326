from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data.formats import Reject
from gist_ray.data.rows import TextRow
from gist_ray.data.sources import Unit
from gist_ray.data.texts import TextTable, block_texts, key_column, write_arrow
from gist_ray.embedding.blocks import vector_column
from gist_ray.embedding.parts import join_npy, join_parquet, write_npy_part, write_parquet_part
from gist_ray.embedding.staging import _RowsPiece, kept_schema

WIDTH = 3
TEXTS = st.lists(st.one_of(st.none(), st.sampled_from("abcdefgh")), min_size=1, max_size=12)


def vector(text: str) -> list[float]:
    return [ord(text), ord(text) / 2, 1]


def stage(folder: Path, pieces: list[list[str | None]], blocks: int, keep=None) -> tuple[list[Path], TextTable]:
    """Pieces whose rows have those texts, None for none, and the vectors of all texts."""
    stems = []
    for number, texts in enumerate(pieces):
        piece = _RowsPiece("text", keep)
        for i, text in enumerate(texts):
            row = {"id": 100 * number + i, "text": text}
            piece.add(Reject("text is missing", row) if text is None else TextRow(text, row))
        stems.append(folder / f"unit-{number:08d}-00000")
        piece.write(stems[-1], {}, Unit((), "jsonl", None, 0))
    rows = []
    for number in range(blocks):
        keys, texts = block_texts([stem.with_suffix(".texts") for stem in stems], number, blocks)
        rows.append(len(keys))
        vectors = np.array([vector(text) for text in texts], np.float32).reshape(len(keys), WIDTH)
        columns = {"key": key_column(keys), "vector": vector_column(vectors)}
        write_arrow(folder / "vectors" / f"block-{number:05d}.arrow", columns)
    return stems, TextTable(folder / "vectors", in_place=False, rows=rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 5))
def test_every_row_meets_its_vector_in_the_order_of_the_input(tmp_path_factory, pieces, blocks: int):
    folder = tmp_path_factory.mktemp("parts")
    stems, table = stage(folder, pieces, blocks)
    schema, first_row = kept_schema(stems), 0
    for number, stem in enumerate(stems):
        write_npy_part(stem, table, WIDTH, "float32", folder / f"{number}.npy")
        write_parquet_part(stem, first_row, table, WIDTH, "float32", schema, folder / f"{number}.parquet")
        first_row += len(pieces[number])
    join_npy([folder / f"{i}.npy" for i in range(len(stems))], folder / "all.npy")
    join_parquet([folder / f"{i}.parquet" for i in range(len(stems))], folder / "all.parquet")
    texts = [text for piece in pieces for text in piece]
    array = np.load(folder / "all.npy", mmap_mode="r")
    expected = [[np.nan] * WIDTH if text is None else vector(text) for text in texts]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.array(expected))
    found = pq.read_table(folder / "all.parquet")
    ids = [100 * number + i for number, piece in enumerate(pieces) for i in range(len(piece))]
    assert found["id"].to_pylist() == ids and found["text"].to_pylist() == texts
    assert found["embedding"].to_pylist() == [None if text is None else vector(text) for text in texts]
    assert found["embedding"].type == pa.list_(pa.float32(), WIDTH)
    assert pq.ParquetFile(folder / "all.parquet").num_row_groups == len(pieces)


def test_without_kept_columns_there_is_the_number_of_the_row(tmp_path: Path):
    stems, table = stage(tmp_path, [["a", "b"]], 1, keep=())
    write_parquet_part(stems[0], 40, table, WIDTH, "float32", pa.schema([]), tmp_path / "0.parquet")
    found = pq.read_table(tmp_path / "0.parquet")
    assert found.column_names == ["row", "embedding"] and found["row"].to_pylist() == [40, 41]


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "f2"), ("int8", "i1"), ("ubinary", "u1")])
def test_an_array_has_the_type_of_its_numbers(tmp_path: Path, dtype: str, stored: str):
    stems, table = stage(tmp_path, [["a", "b"], ["a"]], 2)
    for i, stem in enumerate(stems):
        write_npy_part(stem, table, WIDTH, dtype, tmp_path / f"{i}.npy")
    join_npy([tmp_path / "0.npy", tmp_path / "1.npy"], tmp_path / "all.npy")
    found = np.load(tmp_path / "all.npy")
    assert found.dtype == stored and found.shape == (3, WIDTH) and (found[0] == found[2]).all()
