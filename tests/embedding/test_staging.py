import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gist_ray.embedding.staging as module
from gist_ray.config import SourceConfig
from gist_ray.data import sources
from gist_ray.data.sources import find_units
from gist_ray.data.texts import block_texts, read_arrow
from gist_ray.embedding.staging import kept_columns, kept_schema, stage_unit
from gist_ray.errors import InputError


def staged(work: Path, path: Path, keep=None, **source) -> tuple[list[dict], list[Path]]:
    """Reports of all units of a source, and the pieces' stems."""
    units = find_units([SourceConfig(path=str(path), **source)], kind="texts")
    reports = [stage_unit(unit, number, keep, work) for number, unit in enumerate(units)]
    return reports, [file.with_suffix("") for file in sorted((work / "staging").glob("*.rows"))]


def texts_of(stem: Path) -> list[str | None]:
    """The text of each row."""
    texts = read_arrow(stem.with_name(f"{stem.name}.texts"))["text"].to_pylist()
    places = read_arrow(stem.with_name(f"{stem.name}.rows"))["text"].to_pylist()
    return [None if place is None else texts[place] for place in places]


def kept_of(stems: list[Path]) -> pa.Table:
    schema = kept_schema(stems)
    return pa.concat_tables(pa.table(kept_columns(stem, schema, len(texts_of(stem)))) for stem in stems)


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_row_keeps_its_place_and_its_columns(tmp_path: Path):
    rows = [{"id": i, "text": f"text {i % 3}", "tags": ["x", str(i)]} for i in range(7)]
    [report], [stem] = staged(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    assert texts_of(stem) == [row["text"] for row in rows]
    assert kept_of([stem]).to_pylist() == rows
    assert report == {"pieces": 1, "piece_rows": [7], "texts": 3, "bad_rows": {}, "examples": []}


def test_only_what_is_to_be_kept_is_kept(tmp_path: Path):
    rows = [{"id": i, "text": "t", "other": {"a": 1}} for i in range(3)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    _, stems = staged(tmp_path / "some", file, keep=("id",))
    assert kept_of(stems).to_pylist() == [{"id": i} for i in range(3)]
    _, stems = staged(tmp_path / "none", file, keep=())
    assert not kept_schema(stems).names and texts_of(stems[0]) == ["t"] * 3


def test_a_text_file_has_a_row_for_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["first", "", "  indented", "naïve", "last"]
    (tmp_path / "a.txt").write_text("\r\n".join(lines) + "\n", newline="")
    [report], [stem] = staged(tmp_path / "whole", tmp_path / "a.txt")
    assert texts_of(stem) == ["first", None, "  indented", "naïve", "last"]
    assert report["bad_rows"] == {"text is empty": 1} and report["examples"] == [[1, "text is empty", "''"]]
    monkeypatch.setattr(sources, "_BYTES_PER_PART", 9)
    reports, stems = staged(tmp_path / "parts", tmp_path / "a.txt")
    assert len(reports) > 2 and [text for stem in stems for text in texts_of(stem)] == texts_of(stem)
    with pytest.raises(InputError, match="unknown format"):
        find_units([SourceConfig(path=str(tmp_path / "a.txt"))], kind="labels")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "folder" / "a.txt")
    with pytest.raises(InputError, match="holds no data file"):  # of a folder, only what is certainly data
        find_units([SourceConfig(path=str(tmp_path / "folder"))], kind="texts")
    assert find_units([SourceConfig(path=str(tmp_path / "folder" / "*.txt"))], kind="texts")


def test_parquet_keeps_its_types_and_reads_no_more_than_it_must(tmp_path: Path):
    table = pa.table(
        {
            "id": pa.array([1, None, 3], pa.int32()),
            "body": pa.array(["a", "b", None]).dictionary_encode(),
            "when": pa.array([0, 1, 2], pa.timestamp("ms", tz="UTC")),
            "more": pa.array([{"x": 1.5}, None, {"x": None}], pa.struct({"x": pa.float32()})),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    [report], stems = staged(tmp_path, tmp_path / "a.parquet", columns={"text": "body"})
    kept = kept_of(stems)
    plain = table.set_column(1, "body", table["body"].cast(pa.string()))
    assert kept.equals(plain) and kept.schema == plain.schema
    assert report["bad_rows"] == {"body is missing": 1} and texts_of(stems[0]) == ["a", "b", None]


BAD = [
    ({"id": 1, "text": None}, "text is missing", "None"),
    ({"id": 2}, "text is missing", "None"),
    ({"id": 3, "text": 7}, "text is not a string (int)", "7"),
    ({"id": 4, "text": " \n"}, "text is empty", r"' \n'"),
    ([1, 2], "row is a list, not an object", "[1, 2]"),
]


@pytest.mark.parametrize(("row", "reason", "value"), BAD)
def test_a_row_without_a_text_stays_a_row(tmp_path: Path, row, reason: str, value: str):
    rows = [{"id": 0, "text": "good"}, row, {"id": 9, "text": "good too"}]
    [report], stems = staged(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    assert report["bad_rows"] == {reason: 1} and report["examples"] == [[1, reason, value]]
    assert texts_of(stems[0]) == ["good", None, "good too"]
    id_of_bad = row.get("id") if isinstance(row, dict) else None
    assert kept_of(stems).to_pylist() == [rows[0], {"id": id_of_bad, "text": None}, rows[2]]


def test_bytes_that_are_no_text_are_a_bad_row_or_a_column_that_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff", "id": 1}\nno json\n{"text": "b", "id": 2}\n')
    [report], stems = staged(tmp_path, tmp_path / "a.jsonl")
    assert report["bad_rows"] == {"line is not valid JSON": 1, "text is not valid Unicode": 1}
    assert kept_of(stems).to_pylist() == [{"text": None, "id": 1}, {"text": None, "id": None}, {"text": "b", "id": 2}]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b", "note": "a\xff"}\n')
    with pytest.raises(InputError, match=r"column `note` cannot be kept \(bytes that are not UTF-8\).*--keep"):
        staged(tmp_path / "b", tmp_path / "b.jsonl")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "b", "note": 1}, {"text": "b", "note": "x"}])
    with pytest.raises(InputError, match=r"c\.jsonl: column `note` cannot be kept"):
        staged(tmp_path / "c", tmp_path / "c.jsonl")


def test_bad_rows_are_told_by_their_number_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_BYTES_PER_PART", 100)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "" if i in (8, 15) else f"text number {i:02d}"} for i in range(20)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "fine"}, {"text": 3}])
    units = find_units([SourceConfig(path=str(tmp_path))], kind="texts")
    assert len(units) > 3
    reports = [stage_unit(unit, number, None, tmp_path) for number, unit in enumerate(units)]
    assert [line.rpartition("/")[2] for line in module._examples(units, reports)] == [
        "a.jsonl row 8: text is empty ('')",
        "a.jsonl row 15: text is empty ('')",
        "b.jsonl row 1: text is not a string (int) (3)",
    ]


@pytest.mark.parametrize(("limit", "value"), [("ROWS_PER_PIECE", 4), ("CHARS_PER_PIECE", 40)])
@pytest.mark.parametrize("column", ["text", "note"])
def test_a_piece_is_bounded_by_rows_and_chars(tmp_path: Path, monkeypatch, limit: str, value: int, column: str):
    rows = [{"text": "t", "note": "n"} | {column: f"ten {i:02d} chars"} for i in range(30)]
    monkeypatch.setattr(module, limit, value)
    [report], stems = staged(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    assert report["pieces"] == len(stems) == 8
    assert max(report["piece_rows"]) == 4 and sum(report["piece_rows"]) == 30
    assert kept_of(stems).to_pylist() == rows


def test_columns_of_pieces_get_one_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS_PER_PIECE", 2)
    rows = [
        {"text": "a", "n": 1},
        {"text": "b", "n": 2},
        {"text": "c", "n": 0.5},
        {"text": "d"},
        {"text": "e", "z": "!"},
    ]
    _, stems = staged(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))
    assert kept_of(stems).to_pylist() == [{"text": r["text"], "n": r.get("n"), "z": r.get("z")} for r in rows]
    rows[4] = {"text": "e", "n": "no number"}
    _, stems = staged(tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", rows))
    with pytest.raises(InputError, match=r"different types in different places .*--keep"):
        kept_schema(stems)


def test_a_finished_unit_is_not_read_again(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    [unit] = find_units([SourceConfig(path=str(file))], kind="texts")
    report = stage_unit(unit, 0, None, tmp_path)
    file.unlink()
    assert stage_unit(unit, 0, None, tmp_path) == report


def test_a_piece_without_any_text_has_no_texts(tmp_path: Path):
    reports, stems = staged(tmp_path, write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 3))
    assert reports[0]["texts"] == 0 and texts_of(stems[0]) == [None] * 3
    keys, texts = block_texts([stems[0].with_suffix(".texts")], 0, 1)
    assert len(keys) == 0 and texts == []
