"""Files wherever they lie: local paths and globs, `s3://` and `gs://` through pyarrow, other schemes through fsspec.

A file is named by one string, a local absolute path or a URI, which any Ray worker can open again. A URI's path is
taken literally (`%20` is not a space); `?name=value&…` after it goes to pyarrow: `?endpoint_override=…&scheme=http`.
"""

from __future__ import annotations

import codecs
import functools
import glob
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from gist_ray.errors import InputError
from gist_ray.manifest import digest_files

BLOCK = 1 << 20
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)
"""What reading a damaged or vanished file raises."""

GZIP_LIMIT, GZIP_RATIO = 256 << 20, 200
"""A gzip file that grows beyond both is refused. Text compresses 3 to 20 times; deflate can do 1032."""

_REMOTE_BLOCK = 8 << 20  # one request a block: fewer round trips, 8 MB of memory a file
_ARROW_SCHEMES = ("s3", "gs", "gcs")
_GS_RETRY_SECONDS = 10  # Google's client retries for 15 minutes by default, without a word to the user
_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/?]*)/?(?P<key>.*?)(?P<query>\?\w+=.*)?", re.DOTALL)
_WILD = re.compile(r"[*?[]")


def list_files(path: str, is_data: Callable[[str], bool]) -> list[str]:
    """The files that a path, folder or glob names, sorted. In a folder: those that `is_data`, at any depth.

    Hidden and temporary entries of folders are not data. Globs know `*`, `**`, `[…]` and, on local paths, `?`.

    Raises:
        InputError: a symlink that leads out of the folder, or a store that cannot be reached. To find nothing is
            no error.
    """
    path = path.removeprefix("file://")
    return _list_remote(path, is_data) if "://" in path else _list_local(path, is_data)


def open_file(file: str) -> BinaryIO:
    """Open for reading bytes: buffered, seekable, with `peek`."""
    if "://" not in file:
        return Path(file).open("rb", buffering=BLOCK)
    store = _Store.of(file)
    return cast(BinaryIO, io.BufferedReader(store.filesystem.open_input_file(store.path), _REMOTE_BLOCK))


def open_text(file: str) -> BinaryIO:
    """Open a text file behind its byte order mark.

    Raises:
        InputError: it is UTF-16, UTF-32 or no text at all.
    """
    packed = shown(file).endswith(".gz")
    stream = cast(io.BufferedReader, io.BufferedReader(_Gunzip(file), BLOCK) if packed else open_file(file))
    try:
        start = stream.peek(4)[:4]
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start:
            raise InputError(
                f"{shown(file)} is not UTF-8 but UTF-16, UTF-32 or no text; convert it: iconv -f UTF-16 -t UTF-8"
            )
    except BaseException:
        stream.close()
        raise
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def open_for_arrow(file: str) -> Any:
    """What `pyarrow.parquet` opens without going through Python: the local path, or pyarrow's own file."""
    if "://" not in file:
        return file
    store = _Store.of(file)
    return store.filesystem.open_input_file(store.path)


def arrow_buffer_size(file: str) -> int:
    """Bytes that Parquet should read at once."""
    return _REMOTE_BLOCK if "://" in file else BLOCK


def is_local(file: str) -> bool:
    """Whether seeking in it is free."""
    return "://" not in file


def file_size(file: str) -> int:
    """Bytes as stored (compressed)."""
    if "://" not in file:
        return Path(file).stat().st_size
    store = _Store.of(file)
    return int(store.filesystem.get_file_info([store.path])[0].size)


def file_digest(file: str) -> str:
    """What identifies the content of a file.

    Local: sha256 of the bytes, remembered as long as size and time of change are the same. Remote: the store's own
    checksum (ETag, MD5 or CRC32C) with the size, which costs one request; without one, sha256 of all bytes.
    The same bytes uploaded in another way may get another ETag: that costs a new run, never a wrong one.
    """
    if "://" not in file:
        found = Path(file).stat()
        return _local_digest(file, found.st_size, found.st_mtime_ns, found.st_ino)
    store = _Store.of(file)
    if checksum := store.checksum():
        return f"{checksum}:{file_size(file)}"
    whole = hashlib.sha256()
    with open_file(file) as stream:
        while block := stream.read(_REMOTE_BLOCK):
            whole.update(block)
    return whole.hexdigest()


def shown(file: str) -> str:
    """A file as messages and reports name it: a URI without user, password and query."""
    match = _URI.fullmatch(file)
    if not match:
        return file
    return f"{match['scheme']}://{match['host'].rpartition('@')[2]}/{match['key']}"


def readable_error(file: str, error: Exception) -> InputError:
    """One message for whatever a file's reader or its store raised."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if is_local(file):
        remedy = "replace it by an undamaged copy, or take it out of the sources"
    else:
        remedy = (
            "check bucket and key, the credentials (AWS_ACCESS_KEY_ID … or GOOGLE_APPLICATION_CREDENTIALS), "
            "region or endpoint (AWS_ENDPOINT_URL) and the network; or download it and give a local path"
        )
    return InputError(f"{shown(file)} cannot be read: {reason}; {remedy}")


# Local ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=100_000)
def _local_digest(file: str, _size: int, _mtime_ns: int, _inode: int) -> str:
    return digest_files([Path(file)])


def _list_local(path: str, is_data: Callable[[str], bool]) -> list[str]:
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        return _without_links_out(place, sorted(_walk(place, is_data)))
    if place.exists() or not _WILD.search(str(place)):
        return [str(place)] if place.is_file() else []
    fixed = next(i for i, part in enumerate(place.parts) if _WILD.search(part))
    matches = glob.glob(str(place), recursive=True)  # noqa: PTH207 - leaves dot files out, Path.glob does not
    matches = [match for match in matches if not any(map(_is_hidden, Path(match).parts[fixed:]))]
    return _without_links_out(Path(*place.parts[:fixed]), sorted(m for m in matches if Path(m).is_file()))


def _walk(folder: Path, is_data: Callable[[str], bool]) -> Iterator[str]:
    """Data files below a folder, and links to folders (which are not entered) so that they are looked at."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}; mend its permissions") from error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (file for name in folders if Path(file := f"{where}/{name}").is_symlink())
        for name in names:
            file = f"{where}/{name}"
            if is_data(name) and not _is_hidden(name) and (Path(file).is_file() or Path(file).is_symlink()):
                yield file


def _without_links_out(root: Path, files: list[str]) -> list[str]:
    """Refuse links that lead out of `root` or nowhere; leave out links to what is listed anyway.

    A folder from elsewhere must not be able to pull other files of this machine into a training run.
    """
    inside = root.resolve()
    kept: dict[Path, str] = {}
    for file in sorted(files, key=lambda file: (Path(file).is_symlink(), file)):
        target = Path(file).resolve()
        if not target.is_relative_to(inside):
            raise InputError(
                f"{file} is a link that leads out of {root}, to {target}; copy the file, or name it itself"
            )
        if not target.exists():
            raise InputError(f"{file} is a link to {target}, which does not exist; remove it")
        if target.is_file():
            kept.setdefault(target, file)
    return sorted(kept.values())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~", "_temporary"))


class _Gunzip(io.RawIOBase):
    """The content of a gzip file, up to what is believable."""

    def __init__(self, file: str) -> None:
        self._file, self._size, self._grown = file, file_size(file), 0
        self._stored = open_file(file)
        self._content = gzip.GzipFile(fileobj=self._stored)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read(len(buffer))
        self._grown += len(data)
        if self._grown > GZIP_LIMIT and self._grown > GZIP_RATIO * self._size:
            raise InputError(
                f"{shown(self._file)} looks like a gzip bomb: {self._size:,} bytes have grown to "
                f"{self._grown:,} so far (allowed: {GZIP_LIMIT:,}, or {GZIP_RATIO} times the size); "
                "unpack it yourself if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stored.close()
        super().close()


# Remote --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """A file system, a path in it, and how to make a URI of another path in it."""

    filesystem: Any
    path: str
    uri: Callable[[str], str]

    @staticmethod
    def of(uri: str) -> _Store:
        match = _URI.fullmatch(uri)
        if not match:
            raise InputError(f"{uri} is not a URI; write it as scheme://bucket/key")
        scheme, host, key, query = match["scheme"], match["host"], match["key"], match["query"] or ""
        try:
            if scheme not in _ARROW_SCHEMES:
                return _Store._fsspec(uri)
            return _Store._arrow(scheme, host, key, query)
        except Exception as error:  # fsspec's many packages raise what they like; each means "not to be had"
            raise readable_error(uri, error) from error

    @staticmethod
    def _arrow(scheme: str, host: str, key: str, query: str) -> _Store:
        from pyarrow.fs import FileSystem

        options = query
        if scheme != "s3" and "retry_limit_seconds" not in query:
            options += f"{'&' if query else '?'}retry_limit_seconds={_GS_RETRY_SECONDS}"
        filesystem, _ = FileSystem.from_uri(f"{scheme}://{host}/{options}")  # the bucket alone: keys need no quoting
        user, at, bucket = host.rpartition("@")
        return _Store(filesystem, f"{bucket}/{key}".rstrip("/"), lambda path: f"{scheme}://{user}{at}{path}{query}")

    @staticmethod
    def _fsspec(uri: str) -> _Store:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        spec, path = url_to_fs(uri)
        return _Store(PyFileSystem(FSSpecHandler(spec)), path, spec.unstrip_protocol)

    def checksum(self) -> str | None:
        """The store's own, or None."""
        with self.filesystem.open_input_file(self.path) as stream:
            facts = {str(name).lower(): value for name, value in (stream.metadata() or {}).items()}
        handler = getattr(self.filesystem, "handler", None)
        if handler is not None:
            facts |= {name.lower(): value for name, value in handler.fs.info(self.path).items()}
        for name in ("etag", "md5hash", "content-md5", "crc32c"):
            if value := facts.get(name):
                return f"{name}:{value.decode() if isinstance(value, bytes) else value}".replace('"', "")
        return None


def _list_remote(uri: str, is_data: Callable[[str], bool]) -> list[str]:
    from pyarrow.fs import FileType

    store = _Store.of(uri)
    try:
        kind = store.filesystem.get_file_info([store.path])[0].type
        if kind == FileType.File:
            return [store.uri(store.path)]
        if kind == FileType.Directory:
            return sorted(map(store.uri, _walk_remote(store.filesystem, store.path, is_data)))
        if wild := _WILD.search(store.path):
            folder = store.path[: wild.start()].rpartition("/")[0]
            matches = re.compile(_glob_regex(store.path[len(folder) :].lstrip("/"))).fullmatch
            return sorted(map(store.uri, _walk_remote(store.filesystem, folder, lambda inner: bool(matches(inner)))))
        bucket = store.path.split("/")[0]
        if bucket and store.filesystem.get_file_info([bucket])[0].type == FileType.NotFound:
            raise FileNotFoundError(f"there is no bucket `{bucket}`")
    except Exception as error:  # see `_Store.of`
        raise readable_error(uri, error) from error
    return []


def _walk_remote(filesystem: Any, folder: str, is_data: Callable[[str], bool]) -> Iterator[str]:
    from pyarrow.fs import FileSelector, FileType

    for info in filesystem.get_file_info(FileSelector(folder, recursive=True)):
        inner = info.path.removeprefix(folder).lstrip("/")
        if info.type == FileType.File and not any(map(_is_hidden, inner.split("/"))) and is_data(inner):
            yield info.path


def _glob_regex(pattern: str) -> str:
    """A shell pattern over `/`-separated keys as a regular expression: `**/` is any depth, `*` stays in one level."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    return "".join(
        pieces.get(token) or (token.replace("[!", "[^") if token[:1] == "[" and token[-1:] == "]" else re.escape(token))
        for token in tokens
    )
