import gzip
import hashlib
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gist_ray.data import mine as module
from gist_ray.data.mine import mine
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.data.staging import label_number
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest
from gist_ray.mine_config import MineConfig
from gist_ray.recipe_file import parse_recipe, parsed_settings

pytestmark = pytest.mark.usefixtures("ray_session")

COLUMNS = ["query", "pos", "neg", "task_name", "query_instruct", "pos_instruct", "neg_instruct", "query_label"]


def settings(source: Path, model: Path, **sections: Any) -> MineConfig:
    tree = {"source": {"path": str(source)}, "guide": {"path": str(model)}, "top_k": 20}
    return parsed_settings(MineConfig, {**tree, **sections}, "mine")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def triplets(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("triplets-*.parquet"))
    assert all(pq.read_schema(file).names == COLUMNS for file in files)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def content(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def labelled(verse_rows) -> list[dict[str, Any]]:
    """Verses by length in two tasks; a repeated row, a text of two labels, a label of one text, two bad rows."""
    rows = [
        {"text": row[role], "label": min(len(row[role]) // 60, 3), "task_name": f"task-{i % 2}"}
        for i, row in enumerate(verse_rows)
        for role in ("query", "pos")
    ]
    several = [{**rows[0], "label": 3}, {**rows[2], "label": 2}]
    alone = {"text": "A text like no other.", "label": 77, "task_name": "task-0"}
    return [*rows, rows[4], *several, alone, {"text": "", "label": 1}, {"text": "no label", "label": None}]


@pytest.fixture(scope="module")
def source(labelled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_rows(folder / "a.jsonl", labelled[:500])
    write_rows(folder / "b.jsonl", labelled[500:])
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERIES_PER_TILE", 64)
        yield


@pytest.fixture(scope="module")
def mined(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mine(settings(source, tiny_model), tmp_path_factory.mktemp("mined") / "triplets")


HARD = {"negatives": "hard", "num_negatives": 3, "sampling": "top", "margin": 0.02}


@pytest.fixture(scope="module")
def hard(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mine(settings(source, tiny_model, **HARD), tmp_path_factory.mktemp("hard") / "triplets")


def check_labelled(rows: list[dict[str, Any]], labelled: list[dict[str, Any]]) -> None:
    labels: dict[tuple[str, str], set[Any]] = {}
    for row in labelled:
        labels.setdefault((row.get("task_name", ""), row["text"]), set()).add(row["label"])
    for row in rows:
        query, pos = (labels[row["task_name"], row[role]] for role in ("query", "pos"))
        assert row["query"] != row["pos"] and query & pos
        negatives = row["neg"] if isinstance(row["neg"], list) else [row["neg"]]
        for negative in negatives:
            assert negative not in (row["query"], row["pos"])
            assert query - labels[row["task_name"], negative]
        assert [row[name] for name in COLUMNS[4:7]] == ["", "", ""]
        assert row["query_label"] in map(str, query & pos)


def test_labelled_texts_become_triplets_of_their_labels(mined: Path, labelled):
    rows = triplets(mined)
    check_labelled(rows, labelled)
    good = [row for row in labelled if row["text"] and row["label"] is not None]
    entries = {(row["task_name"], row["label"], row["text"]) for row in good}
    sizes = Counter((task, label) for task, label, _ in entries)
    expected = Counter((task, text) for task, label, text in entries if sizes[task, label] > 1)
    assert Counter((row["task_name"], row["query"]) for row in rows) == expected
    manifest = read_manifest(mined)
    assert manifest and manifest["kind"] == "triplets"
    assert manifest["triplets"] == len(rows) == sum(expected.values())
    assert (manifest["rows_read"], manifest["queries"], manifest["labels"]) == (len(labelled), len(entries), len(sizes))
    assert manifest["texts"] == len({row["text"] for row in good})
    assert manifest["labels_with_one_text"] == 1
    assert manifest["texts_with_several_labels"] == sum(
        len({label for task, label, text in entries if (task, text) == key}) > 1
        for key in {(t, x) for t, _, x in entries}
    )
    assert (manifest["without_negative"], manifest["removed_by_margin"]) == (0, 0)


def test_rejects_are_counted_and_kept_where_no_source_looks(mined: Path):
    manifest = read_manifest(mined)
    assert manifest and manifest["rejects"] == {"label is missing": 1, "text is empty": 1}
    lines = [json.loads(line) for file in (mined / "rejects").iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == 2
    assert {file.suffix for file in mined.rglob("*") if file.is_file()} == {".parquet", ".log", ".json"}
    assert {entry.name.split("-")[0] for entry in mined.iterdir()} == {"triplets", "rejects", "manifest.json"}


@pytest.mark.parametrize(
    ("negatives", "workers"), [("uniform", 1), pytest.param("uniform", 4, marks=pytest.mark.slow), ("hard", 1)]
)
def test_the_number_of_workers_does_not_change_a_byte(
    mined: Path, hard: Path, source: Path, tiny_model: Path, tmp_path: Path, negatives: str, workers: int
):
    """The fixtures were made by two."""
    same, options = (mined, {}) if negatives == "uniform" else (hard, HARD)
    out = mine(settings(source, tiny_model, cluster={"data_workers": workers}, **options), tmp_path / "triplets")
    assert content(out) == content(same)
    assert len(list(out.glob("triplets-*.parquet"))) > 4


def test_neither_the_order_of_the_rows_nor_their_files_matter(labelled, mined: Path, tiny_model: Path, tmp_path: Path):
    file = write_rows(tmp_path / "all.jsonl", labelled[::-1])
    assert triplets(mine(settings(file, tiny_model), tmp_path / "out" / "triplets")) == triplets(mined)


def test_a_finished_run_returns_at_once_and_another_making_is_refused(mined: Path, source: Path, tiny_model: Path):
    before = {file: file.stat().st_mtime_ns for file in mined.rglob("*")}
    assert mine(settings(source, tiny_model, cluster={"data_workers": 1}), mined) == mined
    assert {file: file.stat().st_mtime_ns for file in mined.rglob("*")} == before
    with pytest.raises(InputError, match=r"settings\.seed: 1029 -> 7"):
        mine(settings(source, tiny_model, seed=7), mined)


def test_another_seed_draws_other_triplets_of_the_same_queries(
    mined: Path, source: Path, tiny_model: Path, tmp_path: Path
):
    other = triplets(mine(settings(source, tiny_model, seed=7), tmp_path / "triplets"))
    same = triplets(mined)
    assert [row["query"] for row in other] == [row["query"] for row in same]
    for role in ("pos", "neg"):
        changed = sum(a[role] != b[role] for a, b in zip(same, other, strict=True))
        assert changed > len(same) / 2


def test_hard_negatives_are_the_most_similar_below_the_margin(hard: Path, labelled, tiny_model: Path):
    from gist_ray.encoder import Encoder

    rows = triplets(hard)
    check_labelled([{**row, "neg": row["neg"] or []} for row in rows], labelled)
    texts = sorted({text for row in rows for text in (row["query"], row["pos"], *(row["neg"] or []))})
    vectors = dict(zip(texts, Encoder.load(tiny_model).encode(texts), strict=True))
    counts: Counter[str] = Counter()
    for row in rows:
        query, positive = vectors[row["query"]], vectors[row["pos"]]
        scores = [float(query @ vectors[text]) for text in row["neg"] or []]
        # Vectors are stored as fp16: 2e-3.
        assert all(first > second - 2e-3 for first, second in itertools.pairwise(scores))
        assert all(score < 0.98 * float(query @ positive) + 2e-3 for score in scores)
        counts["without_negative" if not scores else "with_fewer_negatives" if len(scores) < 3 else "full"] += 1
    manifest = read_manifest(hard)
    assert manifest and manifest["removed_by_margin"] > 0 and counts["full"] > 0
    assert all(manifest[key] == counts[key] for key in ("without_negative", "with_fewer_negatives"))


@pytest.mark.slow
def test_a_killed_run_continues_without_redoing_finished_parts(
    mined: Path, source: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stop the driver right after the parts are written, lose one, and run again."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "triplets"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_keep_rejects", killed)
        with pytest.raises(KeyboardInterrupt):
            mine(settings(source, tiny_model), out)
    assert read_manifest(out) is None
    parts = sorted(out.glob("triplets-*.parquet"))
    parts[1].unlink()
    (out / ".work/parts/00001.json").unlink()
    kept = {file: file.stat().st_mtime_ns for file in parts if file.exists()}
    assert mine(settings(source, tiny_model), out) == out
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert content(out) == content(mined)


def test_an_unfinished_run_of_another_making_is_cleared(
    mined: Path, source: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "triplets"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_mine_all", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine(settings(source, tiny_model, seed=3), out)
    (out / "triplets-99999.parquet").write_bytes(b"left by another run")
    assert content(mine(settings(source, tiny_model), out)) == content(mined)


def test_a_folder_of_other_files_is_left_alone(source: Path, tiny_model: Path, tmp_path: Path):
    theirs = tmp_path / "triplets-00000.parquet"
    theirs.write_bytes(b"somebody's")
    with pytest.raises(InputError, match="choose a new or empty folder"):
        mine(settings(source, tiny_model), tmp_path)
    assert theirs.read_bytes() == b"somebody's"


@pytest.fixture(scope="module")
def pair_rows(verse_rows) -> list[dict[str, Any]]:
    """Pairs of verses; each tenth query has a second positive, each seventh row a negative of its own."""
    rows = [
        {"query": row["query"], "pos": row["pos"], "neg": f"Given: {row['neg']}" if i % 7 == 0 else None}
        for i, row in enumerate(verse_rows)
    ]
    second = [{**row, "pos": f"Again: {row['pos']}", "neg": None} for row in rows[::10]]
    return [{**row, "task_name": f"task-{i % 2}"} for i, row in enumerate(rows)] + [
        {**row, "task_name": f"task-{i * 10 % 2}"} for i, row in enumerate(second)
    ]


def test_pairs_get_negatives_from_the_corpus_of_their_task(pair_rows, tiny_model: Path, tmp_path: Path):
    source = write_rows(tmp_path / "pairs.jsonl", [*pair_rows, pair_rows[0], {"query": "q", "pos": 3}])
    config = settings(source, tiny_model, num_negatives=4, margin=0.0, cluster={"data_workers": 1})
    out = mine(config, tmp_path / "out" / "triplets")
    rows = triplets(out)
    expected = Counter((row["task_name"], row["query"], row["pos"]) for row in pair_rows)
    assert Counter((row["task_name"], row["query"], row["pos"]) for row in rows) == expected
    known: dict[str, set[str]] = {}
    corpus: dict[str, set[str]] = {}
    for row in pair_rows:
        known.setdefault(row["query"], set()).add(row["pos"])
        corpus.setdefault(row["task_name"], set()).update(filter(None, (row["pos"], row["neg"])))
    negatives = [(row, negative) for row in rows for negative in row["neg"] or []]
    for row, negative in negatives:
        assert negative in corpus[row["task_name"]] and negative not in known[row["query"]] | {row["query"]}
    assert any(negative.startswith("Given: ") for _, negative in negatives)
    manifest = read_manifest(out)
    assert manifest and manifest["candidates"] == sum(map(len, corpus.values()))
    assert manifest["queries"] == len(known) and manifest["triplets"] == len(expected)
    more = mine(settings(source, tiny_model, num_negatives=4, margin=0.0), tmp_path / "more" / "triplets")
    assert content(more) == content(out)


def test_prepare_reads_the_mined_folder(mined: Path, tiny_model: Path, tmp_path: Path):
    recipe = parse_recipe(
        {
            "name": "run",
            "output_dir": str(tmp_path),
            "data": {"sources": [{"path": str(mined)}]},
            "student": {"path": str(tiny_model)},
            "guide": {"path": str(tiny_model)},
        }
    )
    shards = Shards.open(prepare(recipe))
    rows, manifest = triplets(mined), shards.manifest
    assert manifest["triplets"] == len(rows) == manifest["rows_read"]
    assert manifest["tasks"] == ["task-0", "task-1"]
    expected = Counter(label_number(row["task_name"], row["query_label"]) for row in rows)
    assert Counter(shards.triplets.label.tolist()) == expected
    assert len(expected) == len({(row["task_name"], row["query_label"]) for row in rows})


def test_what_cannot_be_mined_is_an_input_error(source: Path, tiny_model: Path, tmp_path: Path):
    def refused(message: str, rows: list[dict[str, Any]], **sections: Any) -> None:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(InputError, match=message):
            mine(settings(file, tiny_model, **sections), tmp_path / f"out-{len(list(tmp_path.iterdir()))}")

    pair = {"query": "a", "pos": "b"}
    refused("mining takes `text` and `label`, or `query` and `pos`", [{"question": "a"}])
    refused("say which with kind", [{**pair, "text": "c", "label": 1}])
    refused("uniform needs labels", [pair], negatives="uniform")
    refused("num_negatives 30 is above top_k 20; raise top_k", [pair], num_negatives=30)
    refused("no usable row out of 1", [{"text": " ", "label": 1}])
    refused("no triplet: each of its 2 labels has one text", [{"text": "a", "label": 1}, {"text": "b", "label": 2}])


@pytest.mark.parametrize("count", [0, 1])
def test_no_negatives_on_request_and_none_where_there_is_one_label(tiny_model: Path, tmp_path: Path, count: int):
    source = write_rows(tmp_path / "toys.train.jsonl", [{"text": f"text {i}", "label": "x"} for i in range(9)])
    out = mine(settings(source, tiny_model, num_negatives=count), tmp_path / "out")
    assert [(row["neg"], row["task_name"]) for row in triplets(out)] == [(None, "toys")] * 9
    manifest = read_manifest(out)
    assert manifest and manifest["without_negative"] == (9 if count else 0)


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("/data/banking77/train.jsonl.gz", "train"),
        ("/data/banking77", "banking77"),
        ("/data/banking77/part-*.jsonl", "banking77"),
        ("s3://bucket/a/emotion.csv?scheme=http", "emotion"),
        ("hf://mteb/emotion", "emotion"),
        ("*.jsonl", "default"),
    ],
)
def test_rows_without_a_task_are_of_the_task_that_the_source_names(path: str, task: str):
    assert module._default_task(path) == task


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", ["Banking77Classification", "EmotionClassification"])
def test_real_labels_are_mined_alike_on_one_two_and_four_workers(
    task: str, shared: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first 1,000 texts of each: all of them give the same bytes too, in minutes more."""
    monkeypatch.setattr(module, "QUERIES_PER_TILE", 128)
    source = tmp_path / f"{task}.jsonl.gz"
    with gzip.open(shared / "data/eval" / task / "train.jsonl.gz", "rt") as file, gzip.open(source, "wt") as part:
        part.writelines(itertools.islice(file, 1000))
    found = []
    for workers in (1, 2, 4):
        start = time.perf_counter()
        config = settings(source, minilm, top_k=100, cluster={"data_workers": workers})
        found.append(content(mine(config, tmp_path / str(workers) / "triplets")))
        print(f"{task}: {workers} workers, {time.perf_counter() - start:.1f} s")
    assert found[0] == found[1] == found[2]
    rows = triplets(tmp_path / "1" / "triplets")
    with gzip.open(source, "rt") as file:
        labelled = [json.loads(line) for line in file]
    for row in labelled:
        row |= {"task_name": rows[0]["task_name"], "label": row["label_text"]}
    check_labelled(rows, labelled)
    assert len(rows) == len({(row["text"], row["label"]) for row in labelled})
