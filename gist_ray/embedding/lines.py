"""Lines: the Unix filter. A line in, a vector out, as they come; memory holds a chunk, and there is no Ray."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from typing import BinaryIO, Literal

from gist_ray.data.formats import ROW_LIMIT
from gist_ray.data.rows import text_problem
from gist_ray.embed_config import VectorConfig
from gist_ray.embedding.embedder import Rows, TextEmbedder, null_row
from gist_ray.errors import InputError
from gist_ray.serving.answers import json_rows

log = logging.getLogger(__name__)

LineFormat = Literal["json", "raw"]

_CHUNK_LINES = 4_096
_CHUNK_BYTES = 1 << 20
_PATIENCE_S = 0.01  # a writer that is at work fills a chunk meanwhile; one that is not waits no longer for its vectors


def embed_lines(
    config: VectorConfig, lines: BinaryIO, out: BinaryIO, *, threads: int | None = None, output: LineFormat = "json"
) -> None:
    """Write a vector for each line, in order, as soon as no more lines are waiting.

    Equal lines of a chunk are embedded once. `lines` must have a file descriptor, of which nothing has been read.

    Args:
        config: the model, and what is asked of its vectors.
        lines: UTF-8 lines.
        out: gets a JSON array a line, or with `raw` the numbers' bytes alone, little-endian, row after row. A line
            without a text is `null` there, not-a-numbers here, if `config.bad_rows` allows it.
        threads: of the model; None: as many as this process may use.
        output: `json` or `raw`.

    Raises:
        InputError: as `TextEmbedder.load`; a line without a text, or one of more than `ROW_LIMIT` bytes. What came
            before it has been answered.
        BrokenPipeError: nobody reads `out` any more.
    """
    if output == "raw" and config.bad_rows == "null":
        null_row(config.dtype, 1)  # or says that there is none
    embedder = TextEmbedder.load(config, threads=threads or len(os.sched_getaffinity(0)))
    seen = cut = 0
    for chunk in _chunks(lines.fileno()):
        texts, problem = _texts(chunk, seen, null_allowed=config.bad_rows == "null")
        distinct = list(dict.fromkeys(text for text in texts if text is not None))
        rows, more = embedder.embed(distinct)
        out.write(_written(texts, {text: i for i, text in enumerate(distinct)}, rows, config, output))
        out.flush()
        if problem:
            raise InputError(problem)
        seen, cut = seen + len(chunk), cut + more
    if cut:
        log.warning("embed: %d texts were longer than the model's %d tokens, and were cut", cut, embedder.max_tokens)


def _chunks(descriptor: int) -> Iterator[list[bytes]]:
    """Whole lines as they come, without their ends."""
    waiting, done, seen = bytearray(), False, 0
    while not done:
        done = _read(descriptor, waiting)
        end = len(waiting) if done else waiting.rfind(b"\n") + 1
        if not end and len(waiting) > ROW_LIMIT:
            raise InputError(f"line {seen + 1} is longer than {ROW_LIMIT >> 20} MB; is this a file of lines?")
        lines = bytes(waiting[:end]).split(b"\n")
        if not lines[-1]:
            lines.pop()  # what follows the last newline
        del waiting[:end]
        for start in range(0, len(lines), _CHUNK_LINES):
            yield lines[start : start + _CHUNK_LINES]
        seen += len(lines)


def _read(descriptor: int, waiting: bytearray) -> bool:
    """Add to `waiting` what has arrived, up to a chunk more; whether that was the end."""
    full, patience = len(waiting) + _CHUNK_BYTES, None
    while len(waiting) < full and select.select([descriptor], [], [], patience)[0]:
        found = os.read(descriptor, full - len(waiting))
        if not found:
            return True
        waiting += found
        patience = _PATIENCE_S  # the first bytes may take as long as they like
    return False


def _texts(chunk: list[bytes], seen: int, *, null_allowed: bool) -> tuple[list[str | None], str | None]:
    """The texts of lines, None for a bad one; up to the first bad one, and what is wrong with it, unless allowed."""
    texts: list[str | None] = []
    for line in chunk:
        text = line.decode("utf-8", "surrogateescape")  # white space at the end, and so `\r`, is not seen by a model
        problem = text_problem(text)
        if problem and not null_allowed:
            shown = "" if problem == "is empty" else f" ({text[:60]!r})"
            remedy = "mend it, or put null in its place: --bad-rows null"
            return texts, f"line {seen + len(texts) + 1} {problem}{shown}; {remedy}"
        texts.append(None if problem else text)
    return texts, None


def _written(
    texts: list[str | None], place: dict[str, int], rows: Rows, config: VectorConfig, output: LineFormat
) -> bytes:
    """The answer to some lines; `place` is the row of each distinct text."""
    if output == "raw":
        missing = null_row(config.dtype, rows.shape[1]).tobytes() if None in texts else b""
        return b"".join(missing if text is None else rows[place[text]].tobytes() for text in texts)
    answers = json_rows(rows)
    return b"".join(b"null\n" if text is None else answers[place[text]] + b"\n" for text in texts)
