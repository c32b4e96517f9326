from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gist_ray.serving.answers import as_type, base64_rows, cut, json_rows

NUMBERS = st.floats(-1, 1, width=32)
VECTORS = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 20)), elements=NUMBERS)


@given(VECTORS)
def test_floats_come_back_from_json_to_the_bit(vectors: np.ndarray):
    found = [np.array(json.loads(row), dtype=np.float32) for row in json_rows(vectors)]
    np.testing.assert_array_equal(np.stack(found), vectors)
    assert all(json.loads(row) for row in base64_rows(vectors))


@given(VECTORS)
def test_int8_keeps_directions_and_uint8_is_the_same_shifted(vectors: np.ndarray):
    small = as_type(vectors, "int8")
    assert small.dtype == np.int8 and np.abs(small.astype(int)).max(axis=1).max() <= 127
    np.testing.assert_array_equal(as_type(vectors, "uint8").astype(int), small.astype(int) + 128)
    for row, exact in zip(small.astype(np.float64), vectors.astype(np.float64), strict=True):
        if np.abs(exact).max() > 1e-6:
            assert np.abs(row).max() == 127
            assert np.abs(row / 127 - exact / np.abs(exact).max()).max() <= 0.5 / 127 + 1e-6


@given(VECTORS)
def test_binary_packs_signs_the_first_number_highest(vectors: np.ndarray):
    packed = as_type(vectors, "ubinary")
    assert packed.shape == (len(vectors), -(-vectors.shape[1] // 8)) and packed.dtype == np.uint8
    bits = np.unpackbits(packed, axis=1)[:, : vectors.shape[1]]
    np.testing.assert_array_equal(bits.astype(bool), vectors > 0)
    np.testing.assert_array_equal(as_type(vectors, "binary").astype(int), packed.astype(int) - 128)


def test_quantized_as_sentence_transformers_does():
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).standard_normal((7, 384)).astype(np.float32)
    for kind in ("binary", "ubinary"):
        np.testing.assert_array_equal(as_type(vectors, kind), quantize_embeddings(vectors, precision=kind))


@pytest.mark.parametrize("dim", [64, 384, 1024])
def test_cosines_survive_int8(dim: int):
    vectors = np.random.default_rng(dim).standard_normal((50, dim)).astype(np.float32)
    small = as_type(vectors, "int8").astype(np.float64)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, small)]
    assert np.abs(unit[0] @ unit[0].T - unit[1] @ unit[1].T).max() < 5e-3


def test_a_cut_of_a_zero_vector_is_zero():
    np.testing.assert_array_equal(cut(np.zeros((1, 4), np.float32), 2), np.zeros((1, 2)))
