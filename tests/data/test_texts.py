import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gist_ray.data.texts as module
from gist_ray.data.texts import (
    Piece,
    TextBlock,
    TextTable,
    block_texts,
    guide_matrix,
    key_column,
    keys_to_numpy,
    num_blocks,
    text_key,
    unit_rows,
)

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=40)


def staged(folder: Path, pieces: list[list[str]]) -> list[Path]:
    files = []
    for i, texts in enumerate(pieces):
        piece = Piece()
        for text in texts:
            piece.number(text)
        files.append(folder / f"unit-{i:05d}.texts")
        piece.write(files[-1])
    return files


def table_of(folder: Path, texts: list[str], blocks: int, dim: int = 8, **options) -> TextTable:
    """A table whose guide vectors follow from the text alone."""
    [file] = staged(folder, [texts])
    for number in range(blocks):
        keys, found = block_texts([file], number, blocks)
        tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in found]
        whole = np.array([len(row) + 1 for row in tokens], dtype=np.int64)
        vectors = np.array([vector(text, dim) for text in found], np.float16).reshape(len(found), dim)
        TextBlock(keys, found, vectors, tokens, whole).write(folder / "texts" / f"block-{number:05d}.arrow", "uint16")
    return TextTable(folder / "texts", **options)


def vector(text: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    row = np.random.default_rng(seed).normal(size=(1, dim)).astype(np.float32)
    return unit_rows(row)[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 9))
def test_blocks_hold_each_text_once_in_key_order_wherever_it_was_staged(tmp_path_factory, pieces, blocks: int):
    files = staged(tmp_path_factory.mktemp("pieces"), pieces)
    found = [block_texts(files, number, blocks) for number in range(blocks)]
    texts = [text for _, block in found for text in block]
    expected = {text for piece in pieces for text in piece}
    assert texts == sorted(expected, key=text_key)
    assert [key.ljust(16, b"\0") for keys, _ in found for key in keys.tolist()] == [text_key(text) for text in texts]
    first_bytes = [[text_key(text)[0] for text in block] for _, block in found]
    assert all(
        number * 256 / blocks - 1 <= byte < (number + 1) * 256 / blocks
        for number, block in enumerate(first_bytes)
        for byte in block
    )


def test_positions_lead_from_numbers_to_the_written_order(tmp_path: Path):
    piece = Piece()
    texts = ["b", "a", "a", "b", "c"]
    numbers = [piece.number(text) for text in texts]
    assert numbers == [0, 1, 1, 0, 2] and len(piece) == 3 and piece.chars == 3
    position = piece.write(tmp_path / "x.texts")
    written = module.read_arrow(tmp_path / "x.texts")["text"].to_pylist()
    assert [written[position[number]] for number in numbers] == texts


@pytest.mark.parametrize("in_place", [True, False])
def test_a_table_answers_in_the_order_asked_for(tmp_path: Path, in_place: bool):
    texts = sorted({f"text {i}" for i in range(300)}, key=text_key)
    table = table_of(tmp_path, texts, blocks=7, in_place=in_place)
    assert table.num_texts == 300 and table.guide_dim == 8
    ids = np.array([299, 0, 150, 0, 42, 299, 7])
    assert table.texts(ids) == [texts[i] for i in ids]
    assert [bytes(row.tolist()).decode() for row in table.tokens(ids)] == [texts[i] for i in ids]
    assert {row.dtype for row in table.tokens(ids)} == {np.dtype("uint16")}
    expected = np.array([vector(texts[i], 8) for i in ids])
    np.testing.assert_allclose(table.guide(ids), expected, atol=2e-3)  # stored fp16
    np.testing.assert_allclose(np.linalg.norm(table.guide(ids), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(table.guide_range(40, 60), table.guide(np.arange(40, 60)))
    assert table.lengths.tolist() == [len(text) for text in texts]
    keys = table.keys()
    np.testing.assert_array_equal(keys, np.sort(keys))
    np.testing.assert_array_equal(table.ids_of(keys[ids]), ids)
    with pytest.raises(AssertionError):
        table.ids_of(np.array([b"\xff" * 16], dtype="S16"))
    none = np.zeros(0, dtype=np.int64)
    assert table.texts(none) == [] and table.guide(none).shape == (0, 8) and table.ids_of(keys[none]).tolist() == []


def test_matches_skip_empty_blocks(tmp_path: Path):
    table = table_of(tmp_path, ["only"], blocks=5)
    [(start, columns, part, found)] = list(table.matches(table.keys()))
    assert (start, part, found.tolist()) == (0, slice(0, 1), [0])
    assert guide_matrix(columns).shape == (1, 8)


def test_blocks_are_bounded_in_size_and_number():
    assert num_blocks(0) == num_blocks(1) == num_blocks(4_096) == 1
    assert num_blocks(4_097) == 2 and num_blocks(6_000_000) == 1_465
    assert num_blocks(10**12) == 32_768


def test_keys_survive_trailing_zero_bytes():
    raw = [b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"b" * 16]
    column = key_column(np.array(raw, dtype="S16"))
    assert column.to_pylist() == raw
    keys = keys_to_numpy(column)
    assert np.searchsorted(np.sort(keys), keys).tolist() == [1, 0, 2]
    assert keys_to_numpy(column.slice(1)).tolist() == keys[1:].tolist()
    assert keys_to_numpy(pa.array(raw, pa.binary(16)).slice(1, 1)).tolist() == [keys[1]]
