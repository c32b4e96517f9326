import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gist_ray.data.texts as texts_module
import gist_ray.embedding.run as module
from gist_ray import embed
from gist_ray.embed_config import EmbedConfig
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest
from gist_ray.recipe_file import parsed_settings

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def texts(verse_rows) -> list[str]:
    """Rows of which some are equal, far apart."""
    verses = [row["query"] for row in verse_rows[:400]]
    return [*verses, *verses[:50], " ".join(verses[:30])]


@pytest.fixture(scope="module")
def source(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, so that there are three pieces."""
    folder = tmp_path_factory.mktemp("source")
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    for name, part in (("a", rows[:200]), ("b", rows[200:201]), ("c", rows[201:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def expected(texts: list[str], tiny_model: Path) -> np.ndarray:
    return Encoder.load(tiny_model).encode(texts)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "TEXTS_PER_BLOCK", 100)


def config(source: Path, model: Path, **settings: Any) -> EmbedConfig:
    tree = {"model": str(model), "source": {"path": str(source)}, "backend": "torch", "cluster": {"data_workers": 1}}
    return parsed_settings(EmbedConfig, {**tree, **settings}, "embed")


def content(output: Path) -> dict[str, str]:
    files = sorted(file for file in [output, *output.rglob("*")] if file.is_file() and file.name != "manifest.json")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def folder(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "embedded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "TEXTS_PER_BLOCK", 100)
        return embed(config(source, tiny_model), out)


def test_a_folder_of_parquet_has_the_rows_and_their_vectors(
    folder: Path, texts: list[str], expected: np.ndarray, tiny_model: Path
):
    found = pq.read_table(folder / "embeddings")
    assert found.column_names == ["id", "text", "embedding"]
    assert found["id"].to_pylist() == list(range(len(texts))) and found["text"].to_pylist() == texts
    assert found["embedding"].type == pa.list_(pa.float32(), 32)
    np.testing.assert_allclose(np.array(found["embedding"].to_pylist()), expected, atol=1e-6)
    assert len(pd.read_parquet(folder / "embeddings")) == len(texts)  # no file of ours is in the way
    assert sorted(entry.name for entry in folder.iterdir()) == ["embeddings", "manifest.json"]
    manifest = read_manifest(folder)
    assert manifest and manifest["rows"] == len(texts) and manifest["texts"] == len(set(texts)) == len(texts) - 50
    lengths = [len(row) for row in Encoder.load(tiny_model).tokenize(list(set(texts)), truncate=False)]
    assert manifest["cut"] == sum(length > 64 for length in lengths) > 0 and manifest["bad_rows"] == {}


def test_two_workers_make_the_same_bytes_and_clear_what_another_making_left(
    folder: Path, source: Path, tiny_model: Path, tmp_path: Path
):
    work = tmp_path / "two" / ".work"
    for part, file in (
        ("staging", "unit-00000000.json"),
        ("vectors", "block-99999.arrow"),
        ("parts", "part-00000.parquet"),
    ):
        (work / part).mkdir(parents=True)
        (work / part / file).write_text("of other settings")
    (work / "made_from.json").write_text('{"digest": "other"}')
    assert content(embed(config(source, tiny_model, cluster={"data_workers": 2}), tmp_path / "two")) == content(folder)


def test_an_array_holds_the_rows_in_order_and_is_found_again(
    folder: Path, source: Path, tiny_model: Path, tmp_path: Path
):
    out, asked = tmp_path / "vectors.npy", config(source, tiny_model, keep=["id"])
    assert embed(asked, str(out)) == out
    array = np.load(out, mmap_mode="r")
    in_parquet = pq.read_table(folder / "embeddings")["embedding"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(array, in_parquet.reshape(-1, 32))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".vectors.npy.gist_ray", "vectors.npy"]
    assert [entry.name for entry in (tmp_path / ".vectors.npy.gist_ray").iterdir()] == ["manifest.json"]

    before = out.stat().st_mtime_ns
    assert embed(asked.model_copy(update={"bad_rows": "null"}), out) == out and out.stat().st_mtime_ns == before
    with pytest.raises(
        InputError, match=r"vectors\.npy was made from something else: vectors\.dimensions: null -> 8\. "
    ):
        embed(config(source, tiny_model, dimensions=8), out)
    out.unlink()  # as that message says
    assert module._finished(out, module._about(out), {"of": "something else"}) is None


def test_rows_without_a_text_end_it_before_anything_is_embedded_or_get_null(tiny_model: Path, tmp_path: Path):
    lines = ["in the beginning", "", "was the word", *[" "] * 4]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    asked = config(tmp_path / "a.txt", tiny_model, dtype="int8", dimensions=16)
    refused = r"5 of 7 rows have no text .*a\.txt line 2: text is empty \(''\); .* …\. .*--bad-rows null"
    with pytest.raises(InputError, match=refused):
        embed(asked, tmp_path / "out.parquet")
    assert not list(tmp_path.rglob("block-*"))
    lenient = asked.model_copy(update={"bad_rows": "null"})
    found = pq.read_table(embed(lenient, tmp_path / "out.parquet"))
    assert found["embedding"].type == pa.list_(pa.int8(), 16)
    assert found["text"].to_pylist() == [lines[0], None, lines[2], *[None] * 4]
    vectors = found["embedding"].to_pylist()
    assert [vector is None for vector in vectors] == [False, True, False, *[True] * 4]
    rows, whole = (
        np.array([vectors[0], vectors[2]], float),
        Encoder.load(tiny_model).encode([lines[0], lines[2]])[:, :16],
    )
    assert ((rows * whole).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(whole, axis=1)).min() > 0.999
    with pytest.raises(InputError, match=refused):  # it is finished, but not what is asked for
        embed(asked, tmp_path / "out.parquet")
    with pytest.raises(InputError, match="int8 has no number for a missing vector"):
        embed(lenient, tmp_path / "out.npy")


@pytest.mark.parametrize("name", ["things", "things.npy", "unfinished.npy", "mined"])
def test_what_is_not_ours_stays(source: Path, tiny_model: Path, tmp_path: Path, name: str):
    out = tmp_path / name
    if name.endswith(".npy"):
        out.write_text("precious")
        if name == "unfinished.npy":  # a killed run's work is there, and the file is not of that run
            asked = config(source, tiny_model, keep=[])
            made_from = module.embed_fingerprint(asked, module.find_units((asked.source,), kind="texts"))
            module._start_or_continue(tmp_path / "moved.npy", module._about(out), made_from)
    else:
        out.mkdir()
        (out / "manifest.json" if name == "mined" else out / "precious").write_text('{"kind": "triplets"}')
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"there already, and not made by|holds a finished triplets"):
        embed(config(source, tiny_model), out)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 33}, "dimensions 33 is above the 32"),
        ({"keep": ["nothing"]}, "no column `nothing` to keep; it has id, text"),
        ({"prompt_name": "query"}, "no prompt named query"),
        ({"precision": "fp16"}, "does not compute in fp16"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(source, tiny_model, tmp_path: Path, settings, message: str):
    with pytest.raises(InputError, match=message):
        embed(config(source, tiny_model, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_its_own_column_is_not_overwritten(folder: Path, tiny_model: Path, tmp_path: Path):
    with pytest.raises(InputError, match="has a column `embedding` already; keep the others"):
        embed(config(folder, tiny_model), tmp_path / "again")
    with pytest.raises(InputError, match="s3://bucket/x is not a path"):
        embed(config(folder, tiny_model), "s3://bucket/x")
