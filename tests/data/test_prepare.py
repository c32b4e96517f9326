import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_ray.config import Recipe, parse_recipe
from gist_ray.data.prepare import prepare, text_key
from gist_ray.data.shards import Shards, keys_to_numpy, token_dtype_for
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def source(verse_rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    bad = [{"query": 3, "pos": "p"}, {"query": "same", "pos": "same"}]
    half = len(verse_rows) // 2
    for name, rows in (("a", verse_rows[:half]), ("b", [*bad, *verse_rows[half:]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(source: Path, model: Path, out: Path, **sections: Any) -> Recipe:
    tree = {
        "name": "run",
        "output_dir": str(out),
        "data": {"sources": [{"path": str(source)}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
    }
    return parse_recipe({**tree, **sections})


@pytest.fixture(scope="module")
def shards(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(recipe(source, tiny_model, tmp_path_factory.mktemp("runs")))


def content(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_shards_hold_every_row_and_each_text_once(shards: Path, verse_rows):
    opened = Shards.open(shards)
    triplets = opened.triplets
    expected = [(r["query"], r["pos"], [r["neg"]], r["task_name"]) for r in verse_rows]
    found = [
        (
            opened.text(q),
            opened.text(p),
            [opened.text(n) for n in triplets.negatives_of(np.array([i]))],
            opened.tasks[triplets.task[i]],
        )
        for i, (q, p) in enumerate(zip(triplets.query, triplets.positive, strict=True))
    ]
    assert found == expected
    distinct = {text for row in expected for text in (row[0], row[1], row[2][0])}
    assert opened.num_texts == len(distinct) == opened.manifest["texts"]
    assert opened.manifest["repeated_texts"] == 3 * len(verse_rows) - len(distinct)
    keys = [text_key(opened.text(i)) for i in range(opened.num_texts)]
    assert keys == sorted(keys)


def test_tokens_and_guide_vectors_are_those_of_the_models(shards: Path, tiny_model: Path):
    opened = Shards.open(shards)
    ids = np.array([5, 3, opened.num_texts - 1, 5])
    texts = [opened.text(i) for i in ids]
    tokens = opened.tokens(ids)
    assert {row.dtype for row in tokens} == {np.dtype("uint16")}
    student = Encoder.load(tiny_model, max_tokens=32)
    assert [row.tolist() for row in tokens] == [row.tolist() for row in student.tokenize(texts)]
    assert [len(row) for row in tokens] == opened.lengths[ids].tolist()
    guide = opened.guide(ids)
    np.testing.assert_allclose(guide, Encoder.load(tiny_model).encode(texts), atol=2e-3)  # stored fp16
    np.testing.assert_allclose(np.linalg.norm(guide, axis=1), 1, atol=1e-6)
    whole = student.tokenize([opened.text(i) for i in range(opened.num_texts)], truncate=False)
    assert opened.manifest["truncated_texts"] == sum(len(row) > 32 for row in whole)


def test_rejects_are_kept_with_their_reason(shards: Path):
    lines = [json.loads(line) for file in (shards / "rejects").iterdir() for line in file.read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (0, "query is not a string (int)"),
        (1, "pos equals query"),
    ]
    manifest = Shards.open(shards).manifest
    assert manifest["rows_read"] == manifest["triplets"] + 2
    assert not (shards / "staging").exists()


def test_the_number_of_workers_does_not_change_a_byte(shards: Path, source: Path, tiny_model: Path, tmp_path: Path):
    other = prepare(recipe(source, tiny_model, tmp_path, cluster={"data_workers": 1}))
    assert content(other) == content(shards)


def test_a_finished_stage_returns_at_once_and_another_making_is_refused(shards: Path, source: Path, tiny_model: Path):
    out = shards.parent.parent
    before = {file: file.stat().st_mtime_ns for file in shards.rglob("*")}
    assert prepare(recipe(source, tiny_model, out)) == shards
    assert {file: file.stat().st_mtime_ns for file in shards.rglob("*")} == before
    with pytest.raises(InputError, match=r"guide\.max_tokens: 64 -> 48"):
        prepare(recipe(source, tiny_model, out, guide={"path": str(tiny_model), "max_tokens": 48}))


def test_a_killed_run_continues_without_redoing_finished_blocks(
    shards: Path, source: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stop the driver right after the blocks are written, lose one block, and run again."""
    import gist_ray.data.prepare as module

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_number_rows", killed)
        patch.setattr(module, "_TEXTS_PER_BLOCK", 200)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(source, tiny_model, tmp_path))
    out = tmp_path / "run" / "shards"
    blocks = sorted((out / "texts").glob("*.arrow"))
    assert len(blocks) > 2 and not (out / "manifest.json").exists()
    blocks[1].unlink()
    kept = {file: file.stat().st_mtime_ns for file in blocks if file.exists()}
    monkeypatch.setattr(module, "_TEXTS_PER_BLOCK", 200)
    prepare(recipe(source, tiny_model, tmp_path))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert blocks[1].is_file()
    resumed, whole = Shards.open(out), Shards.open(shards)
    np.testing.assert_array_equal(resumed.triplets.query, whole.triplets.query)
    assert [resumed.text(i) for i in range(resumed.num_texts)] == [whole.text(i) for i in range(whole.num_texts)]


def test_unfinished_shards_of_another_making_are_cleared(source: Path, tiny_model: Path, shards: Path, tmp_path: Path):
    half_done = tmp_path / "run" / "shards"
    shutil.copytree(shards, half_done)
    (half_done / "manifest.json").unlink()
    (half_done / "texts" / "block-99999.arrow").write_bytes(b"left by another recipe")
    assert content(prepare(recipe(source, tiny_model, tmp_path))) == content(shards)


def test_nothing_usable_is_an_input_error(tiny_model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "pos": 1}\n' * 3)
    with pytest.raises(InputError, match=r"no usable row out of 3 \(pos is not a string \(int\): 3 rows\)"):
        prepare(recipe(tmp_path / "a.jsonl", tiny_model, tmp_path / "runs"))
    cut_off = gzip.compress(b'{"query": "q", "pos": "p"}\n' * 5000)[:-20]
    (tmp_path / "b.jsonl.gz").write_bytes(cut_off)
    with pytest.raises(InputError, match=r"b\.jsonl\.gz cannot be read"):
        prepare(recipe(tmp_path / "b.jsonl.gz", tiny_model, tmp_path / "runs-b"))
    with pytest.raises(InputError, match="not a finished shards folder"):
        Shards.open(tmp_path)


def test_keys_survive_trailing_zero_bytes():
    import pyarrow as pa

    raw = [b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"b" * 16]
    column = pa.array(raw, pa.binary(16))
    keys = keys_to_numpy(column)
    assert np.searchsorted(np.sort(keys), keys).tolist() == [1, 0, 2]
    assert keys_to_numpy(column.slice(1)).tolist() == keys[1:].tolist()
    assert token_dtype_for(65_536) == "uint16" and token_dtype_for(65_537) == "uint32"
