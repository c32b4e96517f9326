import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_ray.config import FilterConfig, Recipe
from gist_ray.data.numbering import MISRANKED, filtered
from gist_ray.data.prepare import prepare
from gist_ray.data.report import read_data_report
from gist_ray.data.shards import Shards, token_dtype_for
from gist_ray.data.texts import text_key
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.recipe_file import parse_recipe

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
        "cluster": {"data_workers": 1},
    }
    return parse_recipe({**tree, **sections})


@pytest.fixture(scope="module")
def shards(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(recipe(source, tiny_model, tmp_path_factory.mktemp("runs"), cluster={"data_workers": 2}))


def content(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows_of(shards: Path) -> list[tuple[str, str, list[str], str]]:
    """Rows as texts, in order."""
    opened = Shards.open(shards)
    triplets, texts = opened.triplets, opened.texts.texts
    return [
        (*texts(np.array([q, p])), texts(triplets.negatives_of(np.array([i]))), opened.tasks[triplets.task[i]])
        for i, (q, p) in enumerate(zip(triplets.query, triplets.positive, strict=True))
    ]


def test_shards_hold_every_row_and_each_text_once(shards: Path, verse_rows):
    expected = [(r["query"], r["pos"], [r["neg"]], r["task_name"]) for r in verse_rows]
    assert rows_of(shards) == expected
    opened = Shards.open(shards)
    distinct = {text for row in expected for text in (row[0], row[1], row[2][0])}
    assert opened.texts.num_texts == len(distinct) == opened.manifest["texts"]
    assert opened.manifest["repeated_texts"] == 3 * len(verse_rows) - len(distinct)
    keys = [text_key(text) for text in opened.texts.texts(np.arange(opened.texts.num_texts))]
    assert keys == sorted(keys)


def test_tokens_and_guide_vectors_are_those_of_the_models(shards: Path, tiny_model: Path):
    opened = Shards.open(shards)
    ids = np.arange(opened.texts.num_texts)
    texts, tokens = opened.texts.texts(ids), opened.texts.tokens(ids)
    assert {row.dtype for row in tokens} == {np.dtype("uint16")}
    student = Encoder.load(tiny_model, max_tokens=32)
    assert [row.tolist() for row in tokens] == [row.tolist() for row in student.tokenize(texts)]
    assert [len(row) for row in tokens] == opened.texts.lengths.tolist()
    guide = opened.texts.guide(ids)
    np.testing.assert_allclose(guide, Encoder.load(tiny_model).encode(texts), atol=2e-3)  # stored fp16
    np.testing.assert_allclose(np.linalg.norm(guide, axis=1), 1, atol=1e-6)
    whole = [len(row) for row in student.tokenize(texts, truncate=False)]
    assert [n for _, block in opened.texts.blocks() for n in block["whole_tokens"].to_pylist()] == whole
    assert opened.manifest["truncated_texts"] == sum(length > 32 for length in whole) > 0
    assert opened.manifest["tokens"] == sum(map(len, tokens))


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
    other = prepare(recipe(source, tiny_model, tmp_path))
    assert content(other) == content(shards)


def test_a_finished_stage_returns_at_once_and_another_making_is_refused(shards: Path, source: Path, tiny_model: Path):
    out = shards.parent.parent
    before = {file: file.stat().st_mtime_ns for file in shards.rglob("*")}
    assert prepare(recipe(source, tiny_model, out)) == shards
    assert {file: file.stat().st_mtime_ns for file in shards.rglob("*")} == before
    with pytest.raises(InputError, match=r"guide\.max_tokens: 64 -> 48"):
        prepare(recipe(source, tiny_model, out, guide={"path": str(tiny_model), "max_tokens": 48}))


@pytest.mark.parametrize(("step", "lost"), [("number_all", "texts/block-00000.arrow"), ("write_manifest", "")])
def test_a_stopped_run_continues_with_what_is_missing(
    shards: Path, source: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, lost: str
):
    """Stop the driver before a step, lose a file, and run again. `tests/faults` does it with kill -9."""
    import gist_ray.data.prepare as module

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(source, tiny_model, tmp_path))
    out = tmp_path / "run" / "shards"
    assert not (out / "manifest.json").exists()
    if lost:
        (out / lost).unlink()
    kept = {file: file.stat().st_mtime_ns for file in segments(tmp_path)}
    assert kept
    prepare(recipe(source, tiny_model, tmp_path))
    assert content(out) == content(shards)
    assert {file: file.stat().st_mtime_ns for file in segments(tmp_path)} == kept


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "guide-vectors").rglob("*.arrow"))


def stored(folder: Path) -> int:
    """Guide vectors that were ever computed."""
    from gist_ray.data.texts import read_arrow

    return sum(read_arrow(file).num_rows for file in segments(folder))


def test_more_rows_embed_only_their_new_texts_and_another_student_none(
    source: Path, tiny_model: Path, tmp_path: Path, shards: Path
):
    """Guide vectors are found by content, whichever run made them; the text's other columns are made anew."""
    few, more = tmp_path / "few", tmp_path / "more"
    few.mkdir(), more.mkdir()
    shutil.copy(source / "a.jsonl", few)
    for file in source.iterdir():
        shutil.copy(file, more)
    first = Shards.open(prepare(recipe(few, tiny_model, tmp_path)))
    assert stored(tmp_path) == first.texts.num_texts
    second = Shards.open(prepare(recipe(more, tiny_model, tmp_path, name="second")))
    assert stored(tmp_path) == second.texts.num_texts > first.texts.num_texts
    other = recipe(more, tiny_model, tmp_path, name="third", student={"path": str(tiny_model), "max_tokens": 16})
    third = Shards.open(prepare(other))
    assert stored(tmp_path) == third.texts.num_texts == second.texts.num_texts
    ids = np.arange(third.texts.num_texts)
    np.testing.assert_array_equal(third.texts.guide(ids), second.texts.guide(ids))
    assert max(third.texts.lengths) == 16 < max(second.texts.lengths)
    np.testing.assert_allclose(second.texts.guide(ids), Shards.open(shards).texts.guide(ids), atol=1e-3)


def test_filters_drop_rows_by_what_the_guide_says_and_count_them(
    shards: Path, source: Path, tiny_model: Path, tmp_path: Path
):
    opened = Shards.open(shards)
    triplets = opened.triplets
    query, positive, negative = (
        opened.texts.guide(ids) for ids in (triplets.query, triplets.positive, triplets.negatives)
    )
    right, wrong = (query * positive).sum(1), (query * negative).sum(1)
    floor = float(np.quantile(right, 0.1)) + 1e-6
    filters = {"guide_order": True, "min_similarity": floor}
    data = {"sources": [{"path": str(source)}], "filters": filters}
    out = prepare(recipe(source, tiny_model, tmp_path, data=data))
    kept = (right >= floor) & (wrong <= right)
    assert 0 < kept.sum() < len(kept)
    assert rows_of(out) == [row for row, keep in zip(rows_of(shards), kept, strict=True) if keep]
    manifest = Shards.open(out).manifest
    below = f"guide(query, pos) is below {floor}"
    assert manifest["rejects"][below] == (right < floor).sum()
    assert manifest["rejects"][MISRANKED] == ((wrong > right) & (right >= floor)).sum()
    lines = [json.loads(x) for file in (out / "rejects").glob("filtered-*") for x in file.read_text().splitlines()]
    assert len(lines) == (~kept).sum() and all(line["source"].endswith(".jsonl") for line in lines)
    assert read_data_report(out)["all"]["rows"] == kept.sum()


def test_filters_look_at_every_negative_of_a_row():
    positive, starts = np.array([0.5, 0.5, 0.2, 0.5], np.float32), np.array([0, 2, 2, 3, 4])
    negative = np.array([0.4, 0.6, 0.1, 0.5], np.float32)
    assert filtered(positive, negative, starts, FilterConfig()).tolist() == [0, 0, 0, 0]
    assert filtered(positive, negative, starts, FilterConfig(guide_order=True)).tolist() == [1, 0, 0, 0]
    assert filtered(positive, negative, starts, FilterConfig(min_similarity=0.3)).tolist() == [0, 0, 2, 0]


def test_the_report_says_what_the_shards_hold(shards: Path, verse_rows):
    report = read_data_report(shards)
    assert report["all"]["rows"] == len(verse_rows)
    assert (shards / "data_report.html").is_file()
    assert {task: facts["rows"] for task, facts in report["tasks"].items()} == {
        "book-0": 300,
        "book-1": 300,
        "default": 0,
    }
    assert report["tasks"]["default"]["rejects"] == {"pos equals query": 1, "query is not a string (int)": 1}


def test_rows_without_negatives_and_files_without_rows_are_prepared(tiny_model: Path, verse_rows, tmp_path: Path):
    """Also a task of one row, which has no candidate of another row, and two sources with a number each."""
    pairs = [(r["query"], r["pos"], "t" if i else "alone") for i, r in enumerate(verse_rows[:9])]
    rows = [{"query": query, "pos": positive, "task_name": task} for query, positive, task in pairs]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text('{"query": "q", "pos": ""}\n' * 4)
    data = {"sources": [{"path": str(tmp_path / name)} for name in ("bad.jsonl", "good.jsonl")]}
    out = prepare(recipe(tmp_path, tiny_model, tmp_path / "runs", data=data))
    assert rows_of(out) == [(query, positive, [], task) for query, positive, task in pairs]
    assert set(Shards.open(out).triplets.source) == {1}
    report = read_data_report(out)
    assert report["tasks"]["t"]["misranked"] is None and report["tasks"]["alone"]["masked"] is None
    assert 0 <= report["tasks"]["t"]["masked"] <= 1
    assert report["all"]["rejects"] == {"pos is empty": 4}

    nothing = data | {"filters": {"min_similarity": 1.0}}
    with pytest.raises(InputError, match=r"no usable row out of 13 \(guide\(query, pos\) is below 1\.0: 9 rows"):
        prepare(recipe(tmp_path, tiny_model, tmp_path / "runs", name="none", data=nothing))


def test_source_weights_do_not_belong_to_the_shards(shards: Path, source: Path, tiny_model: Path):
    data = {"sources": [{"path": str(source), "weight": 2.5}]}
    assert prepare(recipe(source, tiny_model, shards.parent.parent, data=data)) == shards
    assert set(Shards.open(shards).triplets.source) == {0}


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


def test_token_ids_take_the_smallest_type():
    assert token_dtype_for(65_536) == "uint16" and token_dtype_for(65_537) == "uint32"
