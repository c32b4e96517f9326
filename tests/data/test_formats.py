"""Broken rows and files: each ends as counted rejects or as one clear error, and no good row is lost."""

import gzip
import json
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data import files, formats, parquet
from gist_ray.data.sources import Reject, Triplet, find_units, read_unit
from gist_ray.errors import InputError

GOOD = [{"query": "q1", "pos": "p1"}, {"query": "q2", "pos": "p2"}]
FIRST, LAST = (json.dumps(row).encode() for row in GOOD)
BOM = b"\xef\xbb\xbf"
INVALID, MALFORMED = "line is not valid JSON", "the JSON array is malformed here"
UNICODE, TOO_LONG = "query is not valid Unicode", "query has more than 100000 characters"


def between(*bad: bytes, newline: bytes = b"\n") -> bytes:
    """Bad lines between two good ones."""
    return newline.join((FIRST, *bad, LAST, b""))


def csv_between(*bad: str) -> bytes:
    return "\n".join(("query,pos", "q1,p1", *bad, "q2,p2", "")).encode("latin-1")


def table(*columns: object, names: tuple[str, ...] = ("query", "pos"), **options: object) -> Callable[[Path], None]:
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in columns]
    return lambda file: pq.write_table(pa.table(arrays, names=list(names)), file, **options)


def good_table(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(GOOD * 500), file, compression="none", use_dictionary=False)


def cut_off(file: Path) -> None:
    good_table(file)
    file.write_bytes(file.read_bytes()[:-20])


def garbage_page(file: Path) -> None:
    good_table(file)
    whole = bytearray(file.read_bytes())
    whole[4:40] = b"\xff" * 36
    file.write_bytes(bytes(whole))


def bad_checksum(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(GOOD), file, compression="none", write_page_checksum=True)
    file.write_bytes(file.read_bytes().replace(b"p2", b"p3", 1))


def bad_utf8_cells(file: Path) -> None:
    cells = pa.array([b"q1", b"caf\xe9", b"q2"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, cells.buffers())  # nothing checks the bytes
    pq.write_table(pa.table({"query": texts, "pos": ["p1", "p", "p2"]}), file)


def gzip_bomb(file: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = b" " * (16 << 20)
    with file.open("wb") as stream:
        stream.write(packer.compress(FIRST + b"\n"))
        for _ in range(3):
            stream.write(packer.compress(block))
        stream.write(packer.flush())


def parquet_bomb(file: Path) -> None:
    texts = pa.table({"query": [" " * (1 << 20)] * 40, "pos": ["p"] * 40})
    pq.write_table(texts, file, use_dictionary=False, compression="zstd")


MEDI = [{"query": ["i", f"q{i}"], "pos": ["i", f"p{i}"]} for i in (1, 2)]
MEDI_FIRST, MEDI_LAST = (json.dumps(row) for row in MEDI)

# (what is broken, file name, content or how to write it, reasons of the rejects or the error). Good: q1 and q2.
BROKEN: list[tuple[str, str, bytes | Callable[[Path], None], list[str] | str]] = [
    ("latin-1 line", "a.jsonl", between('{"query": "café", "pos": "p"}'.encode("latin-1")), [UNICODE]),
    ("latin-1 in a column nobody reads", "a.jsonl", b'{"query":"q1","pos":"p1","x":"\xe9"}\n' + LAST, []),
    ("bytes that are no text", "a.jsonl", between(b"\xff\xfe\xfd"), ["not UTF-8"]),
    ("latin-1 csv", "a.csv", csv_between("café,p"), [UNICODE]),
    ("latin-1 medi", "a.json",
     f'[{MEDI_FIRST}, {{"query": ["i", "é"], "pos": ["i", "p"]}}, {MEDI_LAST}]'.encode("latin-1"),
     [UNICODE]),
    ("utf-16", "a.jsonl", between().decode().encode("utf-16"), "not UTF-8 but UTF-16.* iconv -f UTF-16"),
    ("utf-16 without mark", "a.csv", csv_between().decode().encode("utf-16-le"), "not UTF-8 but UTF-16"),
    ("byte order mark", "a.jsonl", BOM + between(), []),
    ("byte order mark", "a.csv", BOM + csv_between(), []),
    ("byte order mark", "a.json", BOM + f"[{MEDI_FIRST},{MEDI_LAST}]".encode(), []),
    ("truncated parquet", "a.parquet", cut_off, "a.parquet is not a readable Parquet file: .*; replace it"),
    ("not parquet", "a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
    ("parquet with a garbage page", "a.parquet", garbage_page, "a.parquet cannot be read: .*; replace it"),
    ("parquet with a wrong checksum", "a.parquet", bad_checksum, "cannot be read: .*CRC"),
    ("parquet with bad text", "a.parquet", bad_utf8_cells, [UNICODE]),
    ("truncated gzip", "a.jsonl.gz", gzip.compress(between() * 5000)[:-900],
     "a.jsonl.gz cannot be read: .*; replace it"),
    ("not gzip", "a.jsonl.gz", b"not gzip", "cannot be read: Not a gzipped file"),
    ("gzip with a flipped byte", "a.csv.gz", gzip.compress(csv_between(), 0).replace(b"p1", b"p3"),
     "cannot be read: CRC"),
    ("gzip bomb", "a.jsonl.gz", gzip_bomb, r"looks like a gzip bomb: [\d,]+ bytes have grown to 3\d,\d+,\d+ so far"),
    ("parquet bomb", "a.parquet", parquet_bomb, r"looks like a decompression bomb: row group 0 would be 41,\d+"),
    ("null query", "a.jsonl", between(b'{"query": null, "pos": "p"}'), ["query is missing"]),
    ("null query", "a.parquet", table(["q1", None, "q2"], ["p1", "p", "p2"]), ["query is missing"]),
    ("null in a list", "a.jsonl", between(b'{"query": "q", "pos": "p", "neg": ["n", null]}'),
     ["neg is not a string (NoneType)"]),
    ("null in a list", "a.parquet", table(["q1", "q", "q2"], ["p1", "p", "p2"], [None, ["n", None], ["m"]],
     names=("query", "pos", "neg")), ["neg is not a string (NoneType)"]),
    ("struct for a string", "a.parquet", table([{"a": "x"}], ["p"]), ["query is not a string (dict)"]),
    ("list of structs", "a.parquet", table(["q1", "q", "q2"], ["p1", "p", "p2"], [None, [{"a": 1}], []],
     names=("query", "pos", "neg")), ["neg is not a string (dict)"]),
    ("year 60,000", "a.parquet", table(pa.array([1 << 60], pa.timestamp("us")), ["p"]),
     ["query is not a string (TimestampScalar)"]),
    ("10 MB text", "a.jsonl", between(b'{"query": "' + b"x" * 10_000_000 + b'", "pos": "p"}'), [TOO_LONG]),
    ("10 MB text", "a.csv", csv_between("x" * 10_000_000 + ",p"), [TOO_LONG]),
    ("two columns of a name", "a.csv", b"query,pos,pos\na,b,c\n", "has two columns named pos; rename one"),
    ("two columns of a name", "a.parquet", table(["a"], ["b"],
     ["c"], names=("query", "pos", "pos")), "has two columns named pos"),
    ("two columns nobody reads", "a.csv", b"query,pos,,\nq1,p1,,\nq2,p2,,\n", []),
    ("NaN", "a.jsonl", between(b'{"query": "q", "pos": NaN}'), ["pos is not a string (float)"]),
    ("mixed types", "a.jsonl", between(b'{"query": 3, "pos": "p"}', b'{"query": "q", "pos": {"a": 1}}'),
     ["query is not a string (int)", "pos is not a string (dict)"]),
    ("empty and blank", "a.jsonl", between(b'{"query": "", "pos": "p"}', b'{"query": "q", "pos": " \\u2003"}'),
     ["query is empty", "pos is empty"]),
    ("empty and blank", "a.csv", csv_between(",p", "q, \t"), ["query is empty", "pos is empty"]),
    ("NUL", "a.jsonl", between(b'{"query": "a\\u0000b", "pos": "p"}', b'{"query": "a\0b", "pos": "p"}'),
     ["query contains a NUL character", INVALID]),
    ("lone surrogate", "a.jsonl",
     between(b'{"query": "\\ud800", "pos": "p"}', b'{"query": "\xed\xa0\x80", "pos": "p"}'),
     [UNICODE, UNICODE]),
    ("ragged", "a.csv", csv_between("one", "1,2,3"),
     ["row has 1 cells, the header 2", "row has 3 cells, the header 2"]),
    ("quote never closed", "a.csv", csv_between('"q,p'), ["malformed CSV (unexpected end of data)"]),
    ("quote closed by a later quote", "a.csv", csv_between('q,"p', '"q3","p3"')[:-6] + b'"q2","p2"\n',
     ["malformed CSV (',' expected after '\"')"]),
    ("quote never closed in the header", "a.csv", b'query,"pos\nq1,p1\n', "its header is malformed CSV"),
    ("array, number, string for a row", "a.jsonl", between(b'["q", "p"]', b"3", b'"q"', b"null"),
     [f"row is a {kind}, not an object" for kind in ("list", "int", "str", "NoneType")]),
    ("blank lines", "a.jsonl", between(b"", b"  \t", b"\r"), []),
    ("blank lines", "a.csv", csv_between("", ""), []),
    ("CRLF", "a.jsonl", between(newline=b"\r\n"), []),
    ("CRLF", "a.csv", csv_between().replace(b"\n", b"\r\n"), []),
    ("no newline at the end", "a.jsonl", between().rstrip(), []),
    ("empty file", "a.jsonl", b"", "a.jsonl is empty .* remove it from the sources"),
    ("empty file", "a.json", b"", "is empty"),
    ("empty file", "a.parquet", b"", "not a readable Parquet file"),
    ("header only", "a.csv", b"query,pos\n", "is empty"),
    ("schema only", "a.parquet", table(pa.array([], pa.string()), pa.array([], pa.string())), "is empty"),
    ("endless integer", "a.jsonl", between(b'{"query": ' + b"9" * 5000 + b', "pos": "p"}'), [INVALID]),
    ("endless nesting", "a.jsonl", between(b"[" * 100_000), [INVALID]),
    ("endless nesting", "a.json", f"[{MEDI_FIRST},{'[' * 100_000},{MEDI_LAST}]".encode(), [MALFORMED]),
    ("key twice", "a.jsonl", between(b'{"query": "q", "query": "r", "pos": "p"}'), ["a key occurs twice"]),
    ("broken line", "a.jsonl", between(b'{"query": "q", "pos', b'"}'), [INVALID] * 2),
    ("not an array", "a.json", FIRST, "must be an array of rows"),
    ("array broken off", "a.json", f"[{MEDI_FIRST},{MEDI_LAST},".encode(), ["the JSON array breaks off"]),
    ("array broken off in a row", "a.json", f"[{MEDI_FIRST},{MEDI_LAST},{MEDI_LAST[:-9]}".encode(), [MALFORMED]),
    ("two arrays", "a.json", f"[{MEDI_FIRST},{MEDI_LAST}]\n[{MEDI_FIRST}]".encode(),
     "text follows the end of its JSON array"),
    ("quote missing in an array", "a.json", f'[{MEDI_FIRST}, {{"query": ["i, "q"]}}, {MEDI_LAST}]'.encode(),
     [MALFORMED]),
    ("bracket missing in an array", "a.json", f'[{MEDI_FIRST}, {{"query": ["i", "q"}}, {MEDI_LAST}]'.encode(),
     [MALFORMED]),
]  # fmt: skip


def read(file: Path, **options: object) -> list[Triplet | Reject | None]:
    data = DataConfig(sources=(SourceConfig(path=str(file), **options),))
    return [row for unit in find_units(data.sources) for row in read_unit(unit, data)]


def kinds_of(rows: list[Triplet | Reject | None]) -> tuple[list[str], list[str]]:
    return [r.query for r in rows if isinstance(r, Triplet)], [r.reason for r in rows if isinstance(r, Reject)]


@pytest.mark.parametrize(("what", "name", "content", "expected"), BROKEN, ids=[f"{row[0]} {row[1]}" for row in BROKEN])
def test_broken_rows_are_rejects_and_broken_files_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what, name, content, expected
):
    monkeypatch.setattr(files, "GZIP_LIMIT", 32 << 20)
    monkeypatch.setattr(parquet, "GROUP_LIMIT", 32 << 20)
    file = tmp_path / name
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as caught:
            read(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
        return
    good, reasons = kinds_of(read(file))
    assert reasons == expected
    alone = what in ("struct for a string", "year 60,000")  # a column has one type: there is no good row
    assert [query for query in good if query != "q3"] == ([] if alone else ["q1", "q2"])
    assert "q3" not in str(content) or good == ["q1", "q3", "q2"]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """1,000 bytes a row, blocks of 256: what lies on the border of two blocks is everywhere."""
    monkeypatch.setattr(formats, "ROW_LIMIT", 1000)
    monkeypatch.setattr(formats, "BLOCK", 256)
    return 1000


def test_a_row_above_the_limit_is_one_reject(tmp_path: Path, small_limit: int):
    (tmp_path / "a.jsonl").write_bytes(between(b"x" * 5000, b"y" * 999))
    good, reasons = kinds_of(read(tmp_path / "a.jsonl"))
    assert good == ["q1", "q2"] and reasons == ["line is longer than 64 MB", INVALID]

    (tmp_path / "b.csv").write_bytes(csv_between("x" * 5000, '"q', *["w,v"] * 50, "y" * 3000))
    good, reasons = kinds_of(read(tmp_path / "b.csv"))
    assert good == ["q1", *["w"] * 50, "q2"], "what follows an open quote within the limit is read again"
    assert reasons == ["malformed CSV (longer than 64 MB)"] * 3

    long = json.dumps({"query": ["i", "x" * 5000], "pos": ["i", "p"]})
    (tmp_path / "c.json").write_text(f"[{MEDI_FIRST}, {long}, {MEDI_LAST}, {long}]")
    good, reasons = kinds_of(read(tmp_path / "c.json"))
    assert good == ["q1", "q2"]
    assert reasons == ["the JSON array is malformed here: row is longer than 64 MB"] * 2


@given(st.data())
def test_any_json_array_is_read_as_json_loads_does(data: st.DataObject):
    import io

    values = st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists, max_leaves=5)
    rows = data.draw(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3) | values, max_size=20))
    text = json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 1])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", data.draw(st.integers(1, 40)))
        patch.setattr(formats, "ROW_LIMIT", 1 << 20)
        stream = io.BytesIO(text.encode("utf-8", "surrogatepass"))
        if "\\ud" in ascii(text):
            return  # lone surrogates become three escapes: rejected later
        assert list(formats._read_array(stream)) == rows


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), min_size=2, max_size=3)))
def test_any_csv_is_read_as_the_csv_module_does(rows: list[list[str]]):
    import csv
    import io

    text = io.StringIO()
    csv.writer(text).writerows(rows)
    lines = iter(text.getvalue().encode().splitlines(keepends=True))
    assert list(formats._records(formats._lines(io.BytesIO(b"".join(lines))))) == rows


@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_is_not_expanded_in_memory(tmp_path: Path, nested: bool):
    """50 KB on disk, 15 GB as plain strings."""
    rows = 30_000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 500_000]))
    if nested:
        texts = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), texts)
    other = pa.array([f"q{i}" for i in range(rows)])
    pq.write_table(pa.table({"query": other, "pos": other, "neg": texts}), tmp_path / "a.parquet", store_schema=False)
    code = (
        "import sys; from gist_ray.data.parquet import read_parquet; import resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(1 for _ in read_parquet(sys.argv[1], ('query', 'pos', 'neg'), None))\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True)
    count, grown = map(int, done.stdout.split())
    assert count == rows and grown < 100_000, f"{grown} KB"


@pytest.mark.parametrize("dictionary_bytes", [4096, 1 << 20])
def test_parquet_values_are_those_of_pyarrow(tmp_path: Path, dictionary_bytes: int):
    import random

    chance = random.Random(1)
    words = [None, "", "a", "bé", "c" * 50]
    columns = {
        "text": [chance.choice(words) for _ in range(5000)],
        "distinct": [f"text {i}" if i % 7 else None for i in range(5000)],
        "none": pa.array([None] * 5000, pa.string()),
        "list": [chance.choice([None, [], ["a", None], ["b", "c"]]) for _ in range(5000)],
        "deep": [chance.choice([None, [["i", "t"], ["i", "u"]], [[], None]]) for _ in range(5000)],
        "large": pa.array([chance.choice(words) for _ in range(5000)], pa.large_string()),
        "number": list(range(5000)),
        "struct": [chance.choice([None, {"a": "x", "b": [1]}]) for _ in range(5000)],
        "dictionary": pa.array([chance.choice(words) for _ in range(5000)]).dictionary_encode(),
    }
    whole = pa.table(columns)
    pq.write_table(whole, tmp_path / "a.parquet", row_group_size=4000, dictionary_pagesize_limit=dictionary_bytes)
    assert list(parquet.read_parquet(str(tmp_path / "a.parquet"), whole.column_names, None)) == whole.to_pylist()
    part = list(parquet.read_parquet(str(tmp_path / "a.parquet"), ["list", "text"], (1, 2)))
    assert part == whole.slice(4000).select(["text", "list"]).to_pylist()


def test_gzip_grows_as_much_as_text_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "GZIP_LIMIT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(between() * 100))
    assert len(read(tmp_path / "a.jsonl.gz")) == 200  # far above the limit, but no bomb


def test_reading_a_large_file_keeps_memory_small(tmp_path: Path):
    (tmp_path / "a.json").write_text("[" + ",\n".join([MEDI_FIRST + " " * 5000] * 20_000) + "]")  # 100 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in formats.read_rows(str(tmp_path / "a.json"), "medi", ())) == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
