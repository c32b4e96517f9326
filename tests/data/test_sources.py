import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data import files, sources
from gist_ray.data.sources import (
    Labelled,
    Reject,
    Triplet,
    columns_of,
    content_digest,
    find_units,
    read_labelled,
    read_unit,
)
from gist_ray.errors import InputError

ROWS = [
    {"query": "q1", "pos": "p1", "neg": "n1", "task_name": "t"},
    {"query": 'q2, "quoted"\nline', "pos": "päö ☕", "neg": None, "task_name": "t"},
    {"query": "q3", "pos": "p3", "neg": "n3", "task_name": "u"},
]
EXPECTED = [
    Triplet("q1", "p1", ("n1",), "t"),
    Triplet('q2, "quoted"\nline', "päö ☕", (), "t"),
    Triplet("q3", "p3", ("n3",), "u"),
]
NAN = float("nan")


def write(file: Path, rows=ROWS) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif ".jsonl" in file.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    elif file.suffix == ".csv":
        import csv

        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pairs = [
            {
                "query": ["Find:", r["query"]],
                "pos": ["Doc:", r["pos"]],
                "task_name": r["task_name"],
                "neg": r["neg"] and ["Doc:", r["neg"]],
            }
            for r in rows
        ]
        file.write_text(json.dumps(pairs))
    return file


def read(file: Path, **options):
    data = DataConfig(sources=(SourceConfig(path=str(file), **options),))
    return [row for unit in find_units(data.sources) for row in read_unit(unit, data)]


def labelled(file: Path, **options):
    units = find_units([SourceConfig(path=str(file), **options)], "labels")
    return [row for unit in units for row in read_labelled(unit, 99)]


# Where rows come from ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.json"])
def test_every_format_gives_the_same_triplets(tmp_path: Path, name: str):
    assert read(write(tmp_path / name)) == EXPECTED


def test_hub_datasets_go_through_the_same_reader(tmp_path: Path):
    for i in range(3):
        write(tmp_path / f"train-{i}.parquet", [ROWS[i]])
    # A local folder stands for the Hub: `load_dataset` takes both, and no network is needed.
    path = f"hf://{tmp_path}"
    assert read(path, revision="0" * 40) == EXPECTED
    units = find_units([SourceConfig(path=path, revision="0" * 40)])
    assert [unit.part for unit in units] == [(0, 3), (1, 3), (2, 3)] and units[1].name == f"{tmp_path}[shard 1 of 3]"
    assert content_digest(units[0]) == f"{tmp_path}@{'0' * 40}:train"
    assert read(path, revision="0" * 40, max_rows=2) == EXPECTED[:2]
    assert read(path, revision="0" * 40, columns={"query": "pos", "pos": "query"})[0].query == "p1"
    assert "task_name" in columns_of(units[0].source)
    with pytest.raises(InputError, match="cannot be had from the Hub"):
        find_units([SourceConfig(path="hf://no-such-org/none", revision="0" * 40)])


def test_folders_globs_caps_and_task_override(tmp_path: Path):
    write(tmp_path / "b.jsonl")
    write(tmp_path / "a.jsonl")
    (tmp_path / "notes.txt").write_text("not data")
    assert len(read(tmp_path)) == 6 and len(read(tmp_path / "*.jsonl")) == 6
    capped = read(tmp_path, max_rows=4, task_name="mine")
    assert [row.query for row in capped] == ["q1", EXPECTED[1].query, "q3", "q1"]
    assert {row.task for row in capped} == {"mine"}
    write(tmp_path / "c.csv")
    with pytest.raises(InputError, match="mixes formats"):
        read(tmp_path, max_rows=4)
    units = find_units([SourceConfig(path=str(tmp_path / "*.jsonl")), SourceConfig(path=str(tmp_path / "c.csv"))])
    assert [(Path(unit.name).name, unit.number) for unit in units] == [("a.jsonl", 0), ("b.jsonl", 0), ("c.csv", 1)]


def test_content_decides_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def units() -> list:
        return find_units([SourceConfig(path=str(tmp_path / "a.jsonl"))])

    write(tmp_path / "a.jsonl")
    first = content_digest(units()[0])
    write(tmp_path / "a.jsonl")
    assert content_digest(units()[0]) == first
    write(tmp_path / "a.jsonl", ROWS[:2])
    assert content_digest(units()[0]) != first

    write(tmp_path / "b.jsonl")
    both = find_units([SourceConfig(path=str(tmp_path / "*.jsonl"), max_rows=9)])
    assert len(both) == 1 and content_digest(both[0]) not in (first, content_digest(units()[0]))

    hashed = []
    real = files.digest_files
    monkeypatch.setattr(files, "digest_files", lambda paths: hashed.append(paths) or real(paths))
    monkeypatch.setattr(sources, "_BYTES_PER_PART", 10)
    write(tmp_path / "a.jsonl", ROWS * 2)
    parts = units()
    assert len(parts) > 10 and len({content_digest(part) for part in parts}) == 1 and len(hashed) == 1
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read: .*No such file"):
        content_digest(parts[0])


def test_the_real_training_files_read_as_their_readme_says(shared: Path):
    counts = {"esnli": 5883, "medquad": 16359, "trivia": 41705, "quora": 5363, "wikiqa": 1040}
    for name, count in counts.items():
        rows = read(shared / "data/train" / f"{name}.parquet")
        reasons = Counter(row.reason for row in rows if isinstance(row, Reject))
        assert len(rows) == count and reasons == ({"pos equals query": 3} if name == "esnli" else {})
    sample = read(shared / "data/train/medi_sample.json")
    assert len(sample) == 200 and all(isinstance(row, Triplet) and len(row.negatives) == 1 for row in sample)
    assert Counter(row.task for row in sample) == {"snli": 80, "medquad": 60, "trivia": 60}


# Parts of large files ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.sampled_from([b"", b"\r", b" ", b"{broken", b"x" * 40, b"[1]", "é☕".encode(), b"\xff"])
        | st.integers(0, 99).map(lambda i: json.dumps({"query": f"q{i}", "pos": "ü☕"}, ensure_ascii=False).encode()),
        max_size=12,
    ),
    end=st.sampled_from([b"", b"\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    size=st.integers(1, 60),
)
def test_parts_of_jsonl_are_the_whole(tmp_path: Path, pieces: list[bytes], end: bytes, mark: bytes, size: int):
    file = tmp_path / "a.jsonl"
    file.write_bytes(mark + b'{"query": "first", "pos": "p"}\n' + b"\n".join(pieces) + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BYTES_PER_PART", 1 << 30)
        whole = read(file)
        patch.setattr(sources, "_BYTES_PER_PART", size)
        units = find_units([SourceConfig(path=str(file))])
        assert read(file) == whole
    length = file.stat().st_size
    assert len(units) == -(-length // size)
    assert units == [units[0]] or [unit.part for unit in units][-1][1] == length


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(st.integers(0, 7), min_size=1, max_size=8), per_part=st.integers(1, 12))
def test_parts_of_parquet_are_the_whole(tmp_path: Path, groups: list[int], per_part: int):
    file, schema = tmp_path / "a.parquet", pa.schema({"query": pa.string(), "pos": pa.string()})
    total = 0
    with pq.ParquetWriter(file, schema) as writer:
        for rows in [*groups, 1]:
            texts = [f"q{total + i}" for i in range(rows)]
            writer.write_table(pa.table({"query": texts, "pos": ["p"] * rows}, schema=schema), row_group_size=100)
            total += rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_ROWS_PER_PART", per_part)
        data = DataConfig(sources=(SourceConfig(path=str(file)),))
        units = find_units(data.sources)
        parts = [list(read_unit(unit, data)) for unit in units]
    assert [row.query for part in parts for row in part] == [f"q{i}" for i in range(total)]
    assert [unit.first_row for unit in units] == [int(part[0].query[1:]) for part in parts]
    assert all(len(part) >= per_part for part in parts[:-1])


def test_what_cannot_be_cut_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_BYTES_PER_PART", 20)
    monkeypatch.setattr(sources, "_ROWS_PER_PART", 1)
    for name in ("a.jsonl.gz", "a.csv", "a.json"):
        (unit,) = find_units([SourceConfig(path=str(write(tmp_path / name)))])
        assert unit.part is None
    file = str(write(tmp_path / "a.jsonl"))
    (capped,) = find_units([SourceConfig(path=file, max_rows=2)])
    assert capped.part is None and capped.name == file
    assert find_units([SourceConfig(path=file)])[1].name == f"{file}[bytes 20-40]"
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet", row_group_size=1)
    units = find_units([SourceConfig(path=str(tmp_path / "b.parquet"))])
    assert [Path(unit.name).name for unit in units] == [f"b.parquet[row groups {i}-{i + 1}]" for i in range(3)]


# Columns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_columns_are_mapped(tmp_path: Path, name: str):
    rows = [
        {"Question": "q1", "answer": "p1", "wrong 1": "n1", "wrong 2": "n2", "kind": "t", "query_label": "x"},
        {"Question": "q2", "answer": "p2", "wrong 1": None, "wrong 2": "n2", "kind": "t"},
        {"Question": "q3", "answer": "p3", "wrong 1": " ", "wrong 2": None, "kind": "t"},
    ]
    columns = {"query": "Question", "pos": "answer", "neg": ["wrong 1", "wrong 2"], "task_name": "kind"}
    file = write(tmp_path / name, rows)
    assert read(file, columns=columns) == [
        Triplet("q1", "p1", ("n1", "n2"), "t", "x"),
        Triplet("q2", "p2", ("n2",), "t"),
        Triplet("q3", "p3", (), "t"),
    ]
    found = columns_of(SourceConfig(path=str(file), columns=columns))
    assert sorted(found) == ["neg", "pos", "query", "query_label", "task_name"]
    assert columns_of(SourceConfig(path=str(file), columns={"text": "answer"})) == [
        "Question",
        "wrong 1",
        "wrong 2",
        "kind",
        "query_label",
        "text",
    ]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "x", "label": 1}, {}, "no column `query`; it has text, label. Required: query, pos"),
        ({"query": "q", "positive": "p"}, {}, "Did you mean `positive`? Then add `columns: {pos: positive}`"),
        ({"Query": "q", "pos": "p"}, {}, "Did you mean `Query`? Then add `columns: {query: Query}`"),
        ({"query": "q", "pos": "p"}, {"columns": {"neg": ["bad", "pos"]}}, "no column `bad`"),
        ({"query": "q", "zzzzz": "p"}, {}, "Where it has another name, add `columns: {pos: ...}` to the source"),
    ],
)
def test_a_missing_column_is_said_with_the_nearest(tmp_path: Path, row, options, message: str):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        with pytest.raises(InputError) as caught:
            read(write(tmp_path / name, [row]), **options)
        assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_first_row_without_a_column_is_a_bad_row_not_a_bad_file(tmp_path: Path):
    good, bad, reject = read(write(tmp_path / "a.jsonl", [ROWS[0], {"query": "q"}, {"x": 1}]))
    assert (good, bad.reason, reject.reason) == (EXPECTED[0], "pos is missing", "query is missing")
    assert read(write(tmp_path / "a.jsonl", [{"query": "q"}, ROWS[0]]))[1] == EXPECTED[0]


@pytest.mark.parametrize("path", ["a.xlsx", "missing.jsonl", "empty", "*.nothing"])
def test_a_path_without_data_is_one_clear_error(tmp_path: Path, path: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no data")
    with pytest.raises(InputError, match=r"does not exist or holds no data file; give a file, folder or glob of \.csv"):
        read(tmp_path / path)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(InputError, match="unknown format"):
        read(tmp_path / "a.xlsx")


# Rows -----------------------------------------------------------------------------------------------------------------


def test_tasks_are_selected_and_the_cap_counts_only_those(tmp_path: Path):
    rows = [{"query": f"q{i}", "pos": f"p{i}", "task_name": ("mteb-a", "mteb_b", "other")[i % 3]} for i in range(9)]
    rows[3]["query"] = ""
    rows[2]["query"] = ""  # of a task that is not selected: no reject
    file = write(tmp_path / "a.jsonl", rows)
    found = read(file, tasks="^mteb[-_]")
    assert [getattr(row, "query", getattr(row, "reason", None)) for row in found] == [
        "q0", "q1", None, "query is empty", "q4", None, "q6", "q7", None,
    ]  # fmt: skip
    assert found[3].task == "mteb-a"
    capped = read(file, tasks="^mteb[-_]", max_rows=3)
    assert [type(row) for row in capped] == [Triplet, Triplet, type(None), Reject]
    assert read(file, tasks="^mteb", task_name="other") == [None] * 9
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n{broken\n")
    assert read(file, tasks="^mteb")[1].reason == "line is not valid JSON", "of an unknown task: not lost"


# Labels --------------------------------------------------------------------------------------------------------------


def test_labelled_texts_are_read(tmp_path: Path):
    rows = [
        {"text": "a", "label": 3, "label_text": "sad"},
        {"text": "b", "label": 3, "label_text": ""},
        {"text": "c", "label": "x", "label_text": None},
        {"text": "d", "label": 3.0},
        {"text": "e", "label": True, "task_name": "t"},
        {"text": "f", "label": NAN},
        {"text": "g", "label": None},
        {"text": "h", "label": [1]},
        {"text": " ", "label": 1},
        {"text": None, "label": 1},
        {"text": ["i"], "label": 1},
        {"text": "j", "label": 3.5},
        {"text": "k" * 100, "label": 1},
    ]
    found = labelled(write(tmp_path / "a.jsonl", rows))
    good = [
        ("a", "sad", "default"),
        ("b", "3", "default"),
        ("c", "x", "default"),
        ("d", "3", "default"),
        ("e", "True", "t"),
    ]
    assert found[:5] == [Labelled(*row) for row in good]
    assert [row.reason for row in found[5:]] == [
        "label is neither a string nor a whole number (float)",
        "label is missing",
        "label is neither a string nor a whole number (list)",
        "text is empty",
        "text is missing",
        "text is not a string (list)",
        "label is neither a string nor a whole number (float)",
        "text has more than 99 characters",
    ]


def test_labels_have_their_own_columns(tmp_path: Path):
    file = write(tmp_path / "a.csv", [{"sentence": "a", "label": 1, "label_text": "one", "topic": "x"}])
    assert labelled(file, columns={"text": "sentence"}) == [Labelled("a", "one", "default")]
    assert labelled(file, columns={"text": "sentence", "label": "topic"}) == [Labelled("a", "x", "default")]
    with pytest.raises(InputError, match=r"no column `text`; .* Required: text, label"):
        labelled(file)
    only = write(tmp_path / "b.parquet", [{"text": "a", "label_text": "one"}])
    assert labelled(only, tasks="default", max_rows=1) == [Labelled("a", "one", "default")]
    assert columns_of(SourceConfig(path=str(only))) == ["text", "label_text"]


def test_real_labelled_texts(shared: Path):
    (folder,) = [path for path in (shared / "data/eval").iterdir() if "Banking77" in path.name]
    rows = labelled(next(folder.glob("train*")))
    rejected = {row.reason for row in rows if isinstance(row, Reject)}
    assert len(rows) > 9000 and rejected == {"text has more than 99 characters"}
    assert len({row.label for row in rows if isinstance(row, Labelled)}) == 77
