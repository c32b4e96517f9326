import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data.sources import Reject, Triplet, content_digest, find_units, parse_row, read_unit
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
    units = find_units(DataConfig(sources=(SourceConfig(path=str(file), **options),)))
    return [row for unit in units for row in read_unit(unit, keep_instructions=False, max_chars=1000)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv", "a.json"])
def test_every_format_gives_the_same_triplets(tmp_path: Path, name: str):
    assert read(write(tmp_path / name)) == EXPECTED


def test_hub_datasets_go_through_the_same_reader(tmp_path: Path):
    write(tmp_path / "train.parquet")
    # A local folder stands for the Hub: `load_dataset` takes both, and no network is needed.
    units = find_units(DataConfig(sources=(SourceConfig(path=f"hf://{tmp_path}", revision="0" * 40),)))
    assert list(read_unit(units[0], keep_instructions=False, max_chars=100)) == EXPECTED
    with pytest.raises(InputError, match="cannot be had from the Hub"):
        find_units(DataConfig(sources=(SourceConfig(path="hf://no-such-org/none", revision="0" * 40),)))


def test_folders_globs_caps_and_task_override(tmp_path: Path):
    write(tmp_path / "b.jsonl")
    write(tmp_path / "a.jsonl")
    (tmp_path / "notes.txt").write_text("not data")
    assert len(read(tmp_path)) == 6 and len(read(tmp_path / "*.jsonl")) == 6
    capped = read(tmp_path, max_rows=4, task_name="mine")
    assert [row.query for row in capped] == ["q1", EXPECTED[1].query, "q3", "q1"]
    assert {row.task for row in capped} == {"mine"}


def test_content_decides_the_digest(tmp_path: Path):
    def digest() -> str:
        return content_digest(find_units(DataConfig(sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),)))[0])

    write(tmp_path / "a.jsonl")
    first = digest()
    write(tmp_path / "a.jsonl")
    assert digest() == first
    write(tmp_path / "a.jsonl", ROWS[:2])
    assert digest() != first


def test_instructions_are_dropped_or_kept():
    row = {"query": "q", "pos": "p", "neg": ["n", "m"], "query_instruct": "Find:", "pos_instruct": "", "task_type": 3}
    assert parse_row(row, None, False, 99) == Triplet("q", "p", ("n", "m"), "3")
    assert parse_row(row, None, True, 99) == Triplet("Find: q", "p", ("n", "m"), "3")
    medi = {"query": ["Find:", "q"], "pos": ["Doc:", " p "], "neg": ["Doc:", "n"], "task_id": 7}
    assert parse_row(medi, None, False, 99) == Triplet("q", "p", ("n",), "7")
    assert parse_row(medi, None, True, 99) == Triplet("Find: q", "Doc: p", ("Doc: n",), "7")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": 3, "pos": "p"}, "query is not a string (int)"),
        ({"query": "q", "pos": float("nan")}, "pos is not a string (float)"),
        ({"query": "q", "pos": None}, "pos is missing"),
        ({"query": "q"}, "pos is missing"),
        ({"query": " ", "pos": "p"}, "query is empty"),
        ({"query": "q", "pos": "p", "neg": {"a": 1}}, "neg is not a string (dict)"),
        ({"query": "q", "pos": "p", "neg": ["n", None]}, "neg is not a string (NoneType)"),
        ({"query": "q", "pos": "p", "neg": ["n", ""]}, "neg is empty"),
        ({"query": ["i", ["t"]], "pos": ["i", "t"]}, "query is not a string (list)"),
        ({"query": "q", "pos": "q"}, "pos equals query"),
        ({"query": "q", "pos": "p", "neg": "q"}, "neg equals query"),
        ({"query": "q", "pos": "p", "neg": "p"}, "neg equals pos"),
        ({"query": "q" * 100, "pos": "p"}, "query has more than 99 characters"),
        ({"query": "\ud800", "pos": "p"}, "query is not valid Unicode"),
        ({"query": "q", "pos": "p", "task_name": "caf\udce9"}, "task_name is not valid Unicode"),
        (["q", "p"], "row is a list, not an object"),
    ],
)
def test_bad_rows_are_rejected_with_their_reason(row, reason: str):
    assert parse_row(row, None, False, 99) == Reject(reason, row)


def test_bad_lines_lose_no_good_row(tmp_path: Path):
    lines = [b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode(), b"{broken", b"\xff\xfe", b"", json.dumps(ROWS[2]).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert [row for row in rows if isinstance(row, Triplet)] == [EXPECTED[0], EXPECTED[2]]
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["line is not valid JSON", "not UTF-8"]

    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfquery,pos\nq,p\nonly one\nb\xed\xa0\x80,p\nr,s\n")
    rows = read(tmp_path / "b.csv")
    assert [row.query for row in rows if isinstance(row, Triplet)] == ["q", "r"]
    assert [row.reason for row in rows if isinstance(row, Reject)] == [
        "row has 1 cells, the header 2",
        "query is not valid Unicode",
    ]

    whole = json.dumps([{"query": ["i", "q"], "pos": ["i", "p"]}] * 3)
    (tmp_path / "c.json").write_text(whole[:-10])
    assert [type(row) for row in read(tmp_path / "c.json")] == [Triplet, Triplet, Reject]


def test_json_arrays_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"query": f"q{i} ☕", "pos": "p" * 300} for i in range(9000)]  # 2.8 MB: several blocks
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.query for row in read(tmp_path / "a.json")] == [row["query"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n', "no column `query`; it has text, label"),
        ("a.csv", b"query,positive\na,b\n", "no column `pos`; it has query, positive"),
        ("a.csv", b"query,pos,pos\na,b,c\n", "two columns are named pos"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.json", b'{"query": "q"}', "must be an array of rows"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.xlsx", b"", "does not exist or holds no data file|unknown format"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "missing.jsonl")
