"""A model is converted once, found again by its content, and never needed."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gist_ray.converted_models as kept
from gist_ray.converted_models import CACHE_VARIABLE, KEPT, converted_file
from gist_ray.encoder import Encoder
from gist_ray.serving.openvino_engine import OpenVinoEngine

TEXTS = ["a", "The cat sits outside.", "naïve café ☕ 東京"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def embedded(model: Path) -> np.ndarray:
    engine = OpenVinoEngine.load(model)
    return engine.finish(engine.forward(engine.tokenize(TEXTS)))


def test_it_is_converted_once(cache: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = Encoder.load(tiny_model).encode(TEXTS)
    np.testing.assert_allclose(embedded(tiny_model), expected, atol=1e-5)
    (folder,) = cache.iterdir()
    monkeypatch.setattr(kept, "converted", None)  # may not be called again
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    np.testing.assert_array_equal(embedded(elsewhere), embedded(tiny_model))
    np.testing.assert_allclose(embedded(elsewhere), expected, atol=1e-5)
    assert list(cache.iterdir()) == [folder]


def test_of_those_that_start_together_one_converts(cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    times, real = [], kept.converted

    def slow(encoder: Encoder) -> object:
        times.append(1)
        time.sleep(0.5)
        return real(encoder)

    monkeypatch.setattr(kept, "converted", slow)
    with ThreadPoolExecutor(3) as replicas:
        files = list(replicas.map(converted_file, [tiny_model] * 3))
    assert len(set(files)) == 1 and files[0].is_file() and len(times) == 1


def test_other_weights_or_pooling_are_another_model(cache: Path, tiny_model: Path, tmp_path: Path):
    files = {converted_file(tiny_model)}
    encoder = Encoder.load(tiny_model, pooling="cls")
    files.add(converted_file(encoder.save(tmp_path / "cls")))
    next(encoder.model.parameters()).data.add_(1)
    files.add(converted_file(encoder.save(tmp_path / "moved")))
    assert len(files) == 3 and None not in files
    np.testing.assert_allclose(embedded(tmp_path / "moved"), encoder.encode(TEXTS), atol=1e-5)


def test_a_half_written_one_is_not_taken(cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(model: object, file: Path) -> Path:
        file.write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept, "written", fails)
        converted_file(tiny_model)
    assert list(cache.iterdir()) == []
    assert converted_file(tiny_model).stat().st_size > 1000


def test_where_nothing_can_be_kept_it_is_converted_each_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    np.testing.assert_allclose(embedded(tiny_model), Encoder.load(tiny_model).encode(TEXTS), atol=1e-5)
    assert CACHE_VARIABLE in caplog.text


def test_a_disk_that_is_nearly_full_is_left_alone(cache: Path, tiny_model: Path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    np.testing.assert_allclose(embedded(tiny_model), Encoder.load(tiny_model).encode(TEXTS), atol=1e-5)
    assert "0 MB left" in caplog.text and list(cache.iterdir()) == []


def test_the_ones_used_last_are_kept(cache: Path, tiny_model: Path):
    used = converted_file(tiny_model).parent
    os.utime(used, (0, 0))  # made long ago
    for number in range(KEPT + 3):
        (cache / f"old-{number}").mkdir()
        os.utime(cache / f"old-{number}", (number, number))
    assert converted_file(tiny_model).parent == used
    assert {folder.name for folder in cache.iterdir()} == {used.name} | {f"old-{n}" for n in range(4, KEPT + 3)}
    assert (used / "model.bin").is_file()
