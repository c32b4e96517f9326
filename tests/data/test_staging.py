import json
from pathlib import Path

import pytest

import gist_ray.data.staging as module
from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data import files, parquet, sources
from gist_ray.data.sources import find_units
from gist_ray.data.staging import added_rejects, check_pieces, stage_unit
from gist_ray.data.texts import read_arrow
from gist_ray.errors import InputError
from tests.data.test_formats import BROKEN


def staged(source: Path, out: Path) -> dict:
    """The report of the only unit of a source."""
    data = DataConfig(sources=(SourceConfig(path=str(source)),))
    [unit] = find_units(data.sources)
    (out / "staging").mkdir(parents=True, exist_ok=True)
    return stage_unit(unit, 0, data, out)


def reject_lines(out: Path) -> list[dict]:
    files = sorted((out / "rejects").iterdir())  # no reject, no file
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("what", "name", "content", "expected"), BROKEN, ids=[f"{row[0]} {row[1]}" for row in BROKEN])
def test_broken_rows_and_files_end_as_counted_rejects_or_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what, name, content, expected
):
    """The dirty data of `test_formats`, all the way to what is on disk."""
    monkeypatch.setattr(files, "GZIP_LIMIT", 32 << 20)
    monkeypatch.setattr(parquet, "GROUP_LIMIT", 32 << 20)
    source, out = tmp_path / name, tmp_path / "out"
    if callable(content):
        content(source)
    else:
        source.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            staged(source, out)
        return
    report = staged(source, out)
    reasons = {reason: n for of_task in report["rejects"].values() for reason, n in of_task.items()}
    assert sum(reasons.values()) == len(expected) == len(reject_lines(out))
    assert [line["reason"] for line in reject_lines(out)] == expected
    assert report["rows"] == sum(read_arrow(file).num_rows for file in (out / "staging").glob("*.rows"))


def test_a_report_vouches_for_a_log_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed right after the report, the rerun reads nothing again: the rejects must be on disk before it."""
    (tmp_path / "a.jsonl").write_text('{"query": "q", "pos": "p"}\n{"query": 3, "pos": "p"}\n')
    seen = []
    write_json = module.write_json

    def watched(file: Path, value) -> None:
        seen.append(reject_lines(tmp_path / "out"))
        write_json(file, value)

    monkeypatch.setattr(module, "write_json", watched)
    staged(tmp_path / "a.jsonl", tmp_path / "out")
    assert [line["reason"] for line in seen[0]] == ["query is not a string (int)"]


def test_a_reject_of_a_part_tells_its_row_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(sources, "_ROWS_PER_PART", 4)
    rows = [{"query": f"q{i}", "pos": "" if i == 6 else f"p{i}"} for i in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "a.parquet")),))
    units = find_units(data.sources)
    assert len(units) > 1
    (tmp_path / "out" / "staging").mkdir(parents=True)
    for number, unit in enumerate(units):
        stage_unit(unit, number, data, tmp_path / "out")
    [file] = (tmp_path / "out" / "rejects").iterdir()
    line = json.loads(file.read_text())
    assert (line["row"], line["reason"]) == (6, "pos is empty") and "a.parquet" in line["source"]


@pytest.mark.parametrize(("limit", "value"), [("ROWS_PER_PIECE", 4), ("TEXTS_PER_PIECE", 12), ("CHARS_PER_PIECE", 40)])
def test_a_piece_is_bounded_by_rows_texts_and_chars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
):
    rows = [{"query": f"query {i:02d}", "pos": f"pos {i:02d}", "neg": [f"n{i:02d}", "same"]} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, limit, value)
    report = staged(tmp_path / "a.jsonl", tmp_path / "out")
    pieces = sorted((tmp_path / "out" / "staging").glob("*.rows"))
    assert len(pieces) == report["pieces"] >= 7 and report["rows"] == 30 and report["occurrences"] == 120
    found = []
    for piece in pieces:
        rows_of, texts = read_arrow(piece), read_arrow(piece.with_suffix(".texts"))["text"].to_pylist()
        assert rows_of.num_rows <= 5
        found += [
            (texts[row["query"]], texts[row["positive"]], [texts[n] for n in row["negatives"]])
            for row in rows_of.to_pylist()
        ]
    assert found == [(row["query"], row["pos"], row["neg"]) for row in rows]


def test_a_piece_that_this_node_does_not_see_is_no_silence(tmp_path: Path):
    (tmp_path / "unit-00000000-00000.rows").touch()
    assert check_pieces(tmp_path, ["unit-00000000-00000"], "rows") == [tmp_path / "unit-00000000-00000.rows"]
    with pytest.raises(InputError, match=r"unit-00000001-00000\.rows was staged on another node .*1 of 2.*output_dir"):
        check_pieces(tmp_path, ["unit-00000000-00000", "unit-00000001-00000"], "rows")


def test_rejects_of_units_are_added_by_task_and_reason():
    parts = [{"b": {"x": 1}, "a": {"y": 2}}, {"a": {"y": 1, "x": 4}}, {}]
    assert json.dumps(added_rejects(parts)) == json.dumps({"a": {"x": 4, "y": 3}, "b": {"x": 1}})
