import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data import files
from gist_ray.data.files import file_digest, list_files, open_file, shown
from gist_ray.data.formats import kind_of
from gist_ray.data.sources import content_digest, find_units, read_unit
from gist_ray.errors import InputError

LINE = b'{"query": "q", "pos": "p"}\n'


def listed(path: Path | str) -> list[str]:
    return list_files(str(path), lambda name: kind_of(name) is not None)


def names(path: Path | str) -> list[str]:
    return [Path(file).name for file in listed(path)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "folder"
    for name in ("b.jsonl", "a.csv", "deep/er/c.parquet", "notes.txt"):
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).write_bytes(LINE)
    for name in (".hidden.jsonl", ".cache/x.jsonl", "~b.jsonl", "_temporary/0/part.jsonl", "b.jsonl.tmp"):
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).write_bytes(LINE)
    (tmp_path / "outside.jsonl").write_bytes(LINE)
    return inner


def test_folders_and_globs_leave_hidden_and_temporary_files_out(folder: Path):
    assert names(folder) == ["a.csv", "b.jsonl", "c.parquet"]
    assert listed(f"file://{folder}") == listed(folder)
    assert names(folder / "*.jsonl") == ["b.jsonl"] == names(folder / "**/*.jsonl")
    assert names(folder / "**" / "*.parquet") == ["c.parquet"] == names(folder / "d*/er/[bc].parquet")
    (folder / "odd[1].jsonl").write_bytes(LINE)
    assert names(folder / "odd[1].jsonl") == ["odd[1].jsonl"]
    assert listed(folder / "none.jsonl") == [] == listed(folder / "*.none")


def test_links_out_of_a_folder_are_refused(folder: Path, tmp_path: Path):
    (folder / "again.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "notes.md").symlink_to(tmp_path / "outside.jsonl")  # not data: nobody reads it
    (folder / "inner").symlink_to(folder / "deep")
    assert names(folder) == ["a.csv", "b.jsonl", "c.parquet"], "a link inside must not show rows twice"

    link = folder / "sub" / "link.jsonl"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "outside.jsonl")
    for place in (folder, folder / "**/*.jsonl", folder / "sub" / "*"):
        with pytest.raises(InputError, match=r"link\.jsonl is a link that leads out of .* copy the file"):
            listed(place)
    assert listed(link) == [str(link)], "a link that the user names is the user's wish"
    (tmp_path / "alias").symlink_to(folder / "deep")
    assert names(tmp_path / "alias") == ["c.parquet"]

    link.unlink()
    link.symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of"):
        listed(folder)
    link.unlink()
    link.symlink_to(folder / "gone.jsonl")
    with pytest.raises(InputError, match="does not exist; remove it"):
        listed(folder)


def test_a_local_digest_is_of_the_bytes_and_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[list[Path]] = []
    real = files.digest_files
    monkeypatch.setattr(files, "digest_files", lambda paths: calls.append(paths) or real(paths))
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINE)
    first = file_digest(str(file))
    assert file_digest(str(file)) == first and len(calls) == 1
    file.write_bytes(LINE * 2)
    assert file_digest(str(file)) != first
    (tmp_path / "b.jsonl").write_bytes(LINE)
    assert file_digest(str(tmp_path / "b.jsonl")) == first, "the name is not the content"


def test_messages_hide_credentials_and_queries():
    assert shown("s3://key:secret@bucket/a/b.jsonl?endpoint_override=x:1&scheme=http") == "s3://bucket/a/b.jsonl"
    assert shown("/data/why?.jsonl") == "/data/why?.jsonl"


# Object stores -------------------------------------------------------------------------------------------------------


class Bucket:
    """A real S3 over HTTP on this machine."""

    def __init__(self, host: str, port: int) -> None:
        import boto3

        self.endpoint, self.query = f"http://{host}:{port}", f"?endpoint_override={host}:{port}&scheme=http"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        self._client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)
        self._client.create_bucket(Bucket="bucket")

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket="bucket", Key=key, Body=content)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(params=["environment", "query"])
def bucket(server: tuple[str, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = Bucket(*server)
    if request.param == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        bucket.query = ""
    return bucket


def queries(path: str, **options) -> list[str]:
    data = DataConfig(sources=(SourceConfig(path=path, **options),))
    return [row.query for unit in find_units(data.sources) for row in read_unit(unit, data)]


def test_s3_reads_files_folders_and_globs(bucket: Bucket):
    rows = [{"query": f"q{i}", "pos": f"p{i}"} for i in range(5)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    bucket.put("in/a.parquet", sink.getvalue().to_pybytes())
    bucket.put("in/deep/b c#?%41é.jsonl.gz", gzip.compress(b'{"query": "z", "pos": "y"}\n'))
    bucket.put("in/.hidden.jsonl", LINE)
    bucket.put("in/notes.txt", b"no data")

    def at(key: str) -> str:
        return f"s3://bucket/{key}{bucket.query}"

    assert queries(at("in/a.parquet")) == ["q0", "q1", "q2", "q3", "q4"]
    assert queries(at("in/deep/b c#?%41é.jsonl.gz")) == ["z"]
    assert queries(at("in")) == queries(at("in/")) == ["q0", "q1", "q2", "q3", "q4", "z"]
    assert queries(at("in/*.parquet")) == queries(at("i*/[ab].parquet")) == ["q0", "q1", "q2", "q3", "q4"]
    assert queries(at("**/*.gz")) == ["z"]
    assert queries(at("in/a*"), max_rows=3) == ["q0", "q1", "q2"]
    unit = find_units([SourceConfig(path=at("in/a.parquet"))])[0]
    assert unit.name == "s3://bucket/in/a.parquet"
    with pytest.raises(InputError, match=r"s3://bucket/in/x.jsonl does not exist or holds no data file"):
        queries(at("in/x.jsonl"))
    with pytest.raises(InputError, match=r"s3://none/x.jsonl cannot be read: there is no bucket `none`; check bucket"):
        queries(f"s3://none/x.jsonl{bucket.query}")


def test_s3_content_decides_the_digest_in_one_request(bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    def digest() -> str:
        return content_digest(find_units([SourceConfig(path=f"s3://bucket/digest.jsonl{bucket.query}")])[0])

    found = []
    for content in (LINE, LINE.replace(b'"p"}', b'"x"}'), LINE):
        bucket.put("digest.jsonl", content)
        found.append(digest())
    assert found[0] == found[2] != found[1] and found[0].startswith("etag:")
    monkeypatch.setattr(files._Store, "checksum", lambda self: None)  # a store that keeps none: all bytes are read
    (hashed,) = {digest()}
    assert len(hashed) == 64 and hashed != found[0]


def test_remote_files_are_read_as_local_ones_are(bucket: Bucket):
    bucket.put("seek.jsonl", b"0123456789")
    with open_file(f"s3://bucket/seek.jsonl{bucket.query}") as stream:
        assert stream.peek(2)[:2] == b"01" and stream.read(3) == b"012"
        assert stream.seek(8) == 8 and stream.read() == b"89"


def test_other_schemes_go_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/fold/a.jsonl", LINE * 2)
    memory.pipe("/fold/b.jsonl", LINE)
    assert queries("memory://fold") == ["q", "q", "q"] and queries("memory:///fold/a*") == ["q", "q"]
    first = file_digest("memory:///fold/a.jsonl")
    assert len(first) == 64, "no checksum is kept there: the bytes are hashed"
    memory.pipe("/fold/a.jsonl", LINE * 2)
    assert file_digest("memory:///fold/a.jsonl") == first
    with pytest.raises(InputError, match=r"nosuch://a/b.jsonl cannot be read: Protocol not known: nosuch"):
        listed("nosuch://a/b.jsonl")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1",
        "gs://anonymous@bucket/a.jsonl?endpoint_override=127.0.0.1:9&scheme=http",
    ],
)
def test_a_store_that_does_not_answer_is_said_soon(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(files, "_GS_RETRY_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"://bucket/a.jsonl cannot be read: .*; check bucket and key, the credentials"
    ):
        listed(uri)
    assert time.monotonic() - started < 30


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_error(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINE)
    file.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied"):
        queries(str(file))
