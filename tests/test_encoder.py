import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.encoder import Encoder, fingerprint, pool
from gist_ray.errors import InputError

TEXTS = ["a", "", "The cat sits outside. " * 40, "  spaces  ", "naïve café ☕ 東京", "A plane is taking off."]


def test_agrees_with_sentence_transformers_on_its_own_folder_and_on_ours(minilm: Path, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.load(minilm)
    ours = encoder.encode(TEXTS)
    assert ours.dtype == np.float32 and ours.shape == (6, 384)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(ours, SentenceTransformer(str(minilm)).encode(TEXTS), atol=1e-6)
    encoder.save(tmp_path / "saved")
    np.testing.assert_allclose(ours, SentenceTransformer(str(tmp_path / "saved")).encode(TEXTS), atol=1e-6)
    np.testing.assert_array_equal(ours, Encoder.load(tmp_path / "saved").encode(TEXTS))


def test_reads_what_sentence_transformers_writes(minilm: Path, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(minilm)).save(str(tmp_path / "theirs"))
    np.testing.assert_allclose(
        Encoder.load(tmp_path / "theirs").encode(TEXTS), Encoder.load(minilm).encode(TEXTS), atol=1e-6
    )


@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5), limits=st.lists(st.booleans(), max_size=3))
def test_token_ids_are_those_of_the_tokenizer_of_transformers(minilm: Path, texts: list[str], limits: list[bool]):
    encoder = short_minilm(minilm)
    for truncate in limits:
        cut = {"truncation": True, "max_length": 8} if truncate else {}
        expected = reference_tokenizer(minilm)([text.strip() for text in texts], verbose=False, **cut)["input_ids"]
        assert [row.tolist() for row in encoder.tokenize(texts, truncate=truncate)] == expected


@functools.cache
def short_minilm(folder: Path) -> Encoder:
    return Encoder.load(folder, max_tokens=8)


@functools.cache
def reference_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_prompt_max_tokens_and_pooling_change_the_vectors(tiny_model: Path):
    encoder = Encoder.load(tiny_model)
    np.testing.assert_array_equal(encoder.encode(["b"], prompt="query: "), encoder.encode(["query: b"]))
    assert len(encoder.tokenize(TEXTS)[2]) == 64 and len(encoder.tokenize(TEXTS, truncate=False)[2]) > 200
    assert len(Encoder.load(tiny_model, max_tokens=8).tokenize(TEXTS)[2]) == 8
    assert not np.allclose(Encoder.load(tiny_model, pooling="cls").encode(TEXTS), encoder.encode(TEXTS), atol=1e-2)


def test_a_bare_transformers_folder_is_mean_pooled(tiny_model: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (bare / name).unlink()
    encoder = Encoder.load(bare, max_tokens=64)
    assert encoder.pooling == "mean"
    np.testing.assert_array_equal(encoder.encode(TEXTS), Encoder.load(tiny_model).encode(TEXTS))


@pytest.mark.parametrize("batch_tokens", [16, 100, 5000])
def test_chunks_do_not_change_vectors(tiny_model: Path, batch_tokens: int):
    encoder = Encoder.load(tiny_model)
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_tokens=batch_tokens), encoder.encode(TEXTS), atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)


def test_pooling_ignores_padding():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").item() == 2 and pool(hidden, mask, "cls").item() == 1


@pytest.mark.parametrize("layers", [[0, 2, 4], []])
def test_keeping_layers(layers: list[int], minilm: Path, tmp_path: Path):
    cut = Encoder.load(minilm, layers=layers)
    assert cut.model.config.num_hidden_layers == len(layers)
    loaded = Encoder.load(cut.save(tmp_path / "cut"))
    np.testing.assert_array_equal(loaded.encode(TEXTS), cut.encode(TEXTS))
    with pytest.raises(InputError, match="layers 0 to 5"):
        Encoder.load(minilm, layers=[0, 6])


def test_fingerprint_sees_weights_and_settings_not_the_place(tiny_model: Path, tmp_path: Path):
    settings = {"revision": None, "max_tokens": None, "pooling": None, "prompt": ""}
    copied = shutil.copytree(tiny_model, tmp_path / "copy")
    same = fingerprint(tiny_model, **settings)
    assert fingerprint(copied, **settings) == same
    assert fingerprint(copied, **{**settings, "pooling": "cls"}) != same
    settings_file = copied / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace("}", ', "do_lower_case": false}', 1))
    assert fingerprint(copied, **settings)["tokenizer"] != same["tokenizer"]
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert fingerprint(copied, **settings)["weights"] != same["weights"]


def _without_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _dense(folder: Path):
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))


def _max_pooling(folder: Path):
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')


def _damaged_config(folder: Path):
    (folder / "config.json").write_text("{")


def _truncated_weights(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)


def _incomplete_weights(folder: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_weights, r"no \*\.safetensors weights"),
        (_pickled, "does not read pickled weights"),
        (_dense, "Dense is not supported"),
        (_max_pooling, "pooling .*max.* is not supported"),
        (_damaged_config, "cannot be loaded|cannot be read"),
        (_truncated_weights, "cannot be loaded"),
        (_incomplete_weights, "no weights for encoder"),
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), r"config\.json is missing"),
    ],
)
def test_bad_folders(tiny_model: Path, tmp_path: Path, damage, message: str):
    folder = shutil.copytree(tiny_model, tmp_path / "bad")
    damage(folder)
    with pytest.raises(InputError, match=message):
        Encoder.load(folder)


def test_bad_names_and_limits(tiny_model: Path):
    with pytest.raises(InputError, match="neither an existing folder nor a Hub id"):
        Encoder.load("../no/such/folder")
    with pytest.raises(InputError, match="cannot be had from the Hub"):
        Encoder.load("no-such-org/no-such-model")
    with pytest.raises(InputError, match="max_tokens 500 is above the 128 positions"):
        Encoder.load(tiny_model, max_tokens=500)
