from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray import int8
from gist_ray.cli import main
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.int8 import int8_file, neighbour_overlap, quantize
from gist_ray.model_folder import export
from gist_ray.openvino_model import OpenVinoModel


@pytest.fixture(scope="module")
def texts(verse_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "lines.txt"
    file.write_text("\n".join(row["query"] for row in verse_rows[:400]) + "\n\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def exported(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_model, tmp_path_factory.mktemp("int8") / "model", int8=True, texts=texts)


def test_the_variant_is_near_the_model_and_its_accuracy_is_on_record(exported: Path, tiny_model: Path, texts: Path):
    record = json.loads((exported / "gist_ray.json").read_text())["int8"]
    assert record["passed"] and record["calibration_texts"] + record["measured_on_texts"] <= 400
    encoder, lines = Encoder.load(tiny_model), texts.read_text().splitlines()[:100]
    tokens = encoder.tokenize(lines)
    rough = OpenVinoModel(int8_file(exported), encoder, threads=1).embed(tokens)
    cosines = (encoder.encode(lines) * rough).sum(1) / np.linalg.norm(rough, axis=1)
    assert cosines.mean() == pytest.approx(record["mean_cosine"], abs=0.01)
    assert cosines.mean() > 0.99 and not np.array_equal(rough, encoder.encode(lines))
    small, whole = (exported / "openvino" / "int8.bin").stat().st_size, (exported / "model.safetensors").stat().st_size
    assert small < 0.5 * whole
    np.testing.assert_array_equal(Encoder.load(exported).encode(lines), encoder.encode(lines))  # fp32 stays


def test_a_finished_variant_is_returned_and_another_calibration_refused(
    exported: Path, tiny_model: Path, texts: Path, tmp_path: Path
):
    before = (exported / "gist_ray.json").stat().st_mtime_ns
    assert export(tiny_model, exported, int8=True, texts=texts) == exported
    assert (exported / "gist_ray.json").stat().st_mtime_ns == before
    other = tmp_path / "other.txt"
    other.write_text("another text\n")
    with pytest.raises(InputError, match="made from something else: int8"):
        export(tiny_model, exported, int8=True, texts=other)


@pytest.mark.parametrize("limit", ["MIN_COSINE", "MIN_OVERLAP"])
def test_a_variant_that_is_not_accurate_is_kept_on_record_and_not_served(
    limit: str,
    tiny_model: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(int8, limit, 1.01)
    folder = export(tiny_model, tmp_path / "model", int8=True, texts=texts)
    assert "not accurate enough" in caplog.text
    with pytest.raises(InputError, match=r"not accurate enough .*mean_cosine.*precision: fp32"):
        int8_file(folder)


def test_without_a_variant_the_way_to_make_one_is_named(tiny_model: Path, exported: Path, tmp_path: Path):
    with pytest.raises(InputError, match="gist-ray export MODEL OUT --int8 --texts FILE"):
        int8_file(tiny_model)
    (tmp_path / "gist_ray.json").write_text((exported / "gist_ray.json").read_text())
    with pytest.raises(InputError, match="has no int8 variant"):  # recorded, and its file is gone
        int8_file(tmp_path)


def test_too_few_texts_and_missing_files_are_said_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(f"text {i % 50}" for i in range(1000)))
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--int8"]
    for options, message in (
        (["--texts", str(few)], "at least 200 different real texts"),
        (["--texts", str(tmp_path / "none.txt")], "is not a file"),
        ([], "give a file of lines with --texts"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [few]
    assert main([*command[:-1], "--texts", str(few)]) == 2
    assert "add --int8" in capsys.readouterr().err
    assert main(command[:-1]) == 2  # without --int8 there is nothing to do for a model
    assert "not a finished checkpoint" in capsys.readouterr().err


def test_nncf_is_asked_for_by_name(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    encoder = Encoder.load(tiny_model)
    with pytest.raises(InputError, match=r'pip install "gist-ray\[int8\]"'):
        quantize(encoder, encoder.tokenize(["a text"] * 300), tmp_path)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_overlap_is_one_for_the_same_and_chance_for_strangers(seed: int, neighbours: int):
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rotation = np.linalg.qr(random.standard_normal((8, 8)))[0].astype(np.float32)
    assert neighbour_overlap(vectors, vectors, neighbours) == 1
    assert neighbour_overlap(vectors, vectors @ rotation, neighbours) > 0.95  # angles stay
    assert neighbour_overlap(vectors, -vectors, neighbours) == 1
    strangers = random.standard_normal((30, 8)).astype(np.float32)
    assert neighbour_overlap(vectors, strangers, neighbours) < 0.7
