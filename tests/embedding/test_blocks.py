import shutil
from pathlib import Path

import numpy as np
import pytest

from gist_ray.config import ClusterConfig, SourceConfig
from gist_ray.data.texts import Piece, keys_to_numpy, read_arrow, text_key
from gist_ray.embed_config import EmbedConfig
from gist_ray.embedding.blocks import BlockVectors, vector_column, vector_rows, vectors_fingerprint
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError

PIECE = "unit-00000000-00000"


@pytest.fixture
def config(tiny_model: Path) -> EmbedConfig:
    return EmbedConfig(model=str(tiny_model), source=SourceConfig(path="a.jsonl"), backend="torch")


def changed(config: EmbedConfig, **settings) -> EmbedConfig:
    return config.model_copy(update=settings)


def test_a_block_holds_its_texts_vectors_by_key_and_is_made_once(config: EmbedConfig, tiny_model: Path, tmp_path: Path):
    piece, texts = Piece(), [f"text number {i}" for i in range(20)]
    for text in texts:
        piece.number(text)
    piece.write(tmp_path / f"{PIECE}.texts")
    actor = BlockVectors(config, vectors_fingerprint(config))
    report = actor.embed(0, 1, tmp_path, [PIECE], tmp_path / "out")
    assert report == {"block": 0, "texts": 20, "width": 32, "cut": 0, "max_tokens": 64, "embedded": 20, "reused": 0}
    [file] = (tmp_path / "out").iterdir()
    columns = read_arrow(file)
    ordered = sorted(texts, key=text_key)
    assert [key.ljust(16, b"\0") for key in keys_to_numpy(columns["key"]).tolist()] == [text_key(t) for t in ordered]
    expected = Encoder.load(tiny_model).encode(ordered)
    np.testing.assert_allclose(vector_rows(columns["vector"]), expected, atol=1e-6)
    before = file.stat().st_mtime_ns
    assert actor.embed(0, 1, tmp_path, [PIECE], tmp_path / "out") == report | {"embedded": 0}
    assert file.stat().st_mtime_ns == before


def test_a_block_without_texts_tells_the_width_all_the_same(config: EmbedConfig, tmp_path: Path):
    Piece().write(tmp_path / f"{PIECE}.texts")
    config = changed(config, dtype="binary")
    report = BlockVectors(config, vectors_fingerprint(config)).embed(0, 1, tmp_path, [PIECE], tmp_path / "out")
    assert (report["texts"], report["width"]) == (0, 4)


def test_another_model_on_a_node_is_refused(config: EmbedConfig, tmp_path: Path):
    actor = BlockVectors(config, vectors_fingerprint(config) | {"weights": "0"})
    assert "another model on this node" in actor.embed(0, 1, tmp_path, [PIECE], tmp_path / "out")["error"]


def test_what_decides_a_vector_is_in_the_fingerprint_and_nothing_else(config: EmbedConfig, tiny_model, tmp_path: Path):
    one = vectors_fingerprint(config)
    for setting in (
        {"dimensions": 8},
        {"dtype": "int8"},
        {"prompt": "p "},
        {"batch_tokens": 64},
        {"backend": "openvino"},
    ):
        assert vectors_fingerprint(changed(config, **setting)) != one
    assert vectors_fingerprint(changed(config, backend="auto")) == vectors_fingerprint(
        changed(config, backend="openvino")
    )
    for setting in ({"cluster": ClusterConfig(data_workers=7, data_threads=3)}, {"bad_rows": "null"}, {"keep": ()}):
        assert vectors_fingerprint(changed(config, **setting)) == one
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert vectors_fingerprint(changed(config, model=str(tmp_path / "copy"))) == one
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"other")
    assert vectors_fingerprint(changed(config, model=str(tmp_path / "copy"))) != one


def test_what_cannot_be_computed_is_refused_without_loading(config: EmbedConfig):
    for settings, message in (
        ({"precision": "bf16"}, "take fp32 or int8"),
        ({"precision": "int8", "backend": "openvino"}, "has no int8 variant"),
        ({"prompt_name": "query"}, "no prompt named query; it has none"),
    ):
        with pytest.raises(InputError, match=message):
            vectors_fingerprint(changed(config, **settings))


def test_vectors_survive_arrow():
    rows = np.arange(12, dtype=np.float16).reshape(4, 3)
    np.testing.assert_array_equal(vector_rows(vector_column(rows).slice(1, 2)), rows[1:3])
