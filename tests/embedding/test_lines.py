"""The Unix filter: in process where that suffices, else as a shell starts it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gist_ray.embedding.lines as module
from gist_ray.cli import main
from gist_ray.embed_config import VectorConfig
from gist_ray.embedding.lines import embed_lines
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError


def answered(config: VectorConfig, content: bytes, tmp_path: Path, **options) -> bytes:
    out = io.BytesIO()
    (tmp_path / "lines.txt").write_bytes(content)
    with (tmp_path / "lines.txt").open("rb") as lines:
        try:
            embed_lines(config, lines, out, threads=1, **options)
        except InputError as error:
            raise InputError(f"{error} AFTER {out.getvalue().count(b'[')} ANSWERS") from error
    return out.getvalue()


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> VectorConfig:
    return VectorConfig(model=str(tiny_model), backend="torch")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"\n", b"bb\nc", b"\r\n", b"ddd" * 5]), max_size=30), st.integers(1, 40))
def test_chunks_are_the_lines_wherever_the_stream_is_cut(writes: list[bytes], chunk_bytes: int):
    read, write = os.pipe()

    def feed() -> None:
        for piece in writes:
            os.write(write, piece)
        os.close(write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(module, "_CHUNK_LINES", 3)
        thread = threading.Thread(target=feed)
        thread.start()
        chunks = list(module._chunks(read))
        thread.join()
    os.close(read)
    whole = b"".join(writes)
    assert [line for chunk in chunks for line in chunk] == whole.split(b"\n")[
        : -1 if whole[-1:] in (b"", b"\n") else None
    ]
    assert all(1 <= len(chunk) <= 3 for chunk in chunks)


def test_a_vector_a_line_in_order(config: VectorConfig, tiny_model: Path, verse_rows, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LINES", 7)  # several chunks, equal lines in one and in several
    texts = [row["query"] for row in verse_rows[:20]] + ["naïve café — 数学 🙂", "twice", "twice", "last"]
    out = answered(config, "\r\n".join(texts).encode(), tmp_path)
    assert out.endswith(b"]\n")
    rows = np.array([json.loads(line) for line in out.splitlines()])
    np.testing.assert_allclose(rows, Encoder.load(tiny_model).encode(texts), atol=1e-5)
    raw = np.frombuffer(answered(config, "\n".join(texts).encode(), tmp_path, output="raw"), "<f4")
    np.testing.assert_array_equal(raw.reshape(len(texts), 32), rows.astype(np.float32))
    assert answered(config, b"", tmp_path) == b""


def test_equal_lines_of_a_chunk_are_embedded_once(config: VectorConfig, tmp_path: Path, monkeypatch):
    asked = []
    embed = module.TextEmbedder.embed
    monkeypatch.setattr(module.TextEmbedder, "embed", lambda self, texts: asked.append(texts) or embed(self, texts))
    out = answered(config, b"a\nb\na\na\n", tmp_path).splitlines()
    assert asked == [["a", "b"]] and out[0] == out[2] == out[3] != out[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "line 3 is empty; "),
        (b" \t", "line 3 is empty; "),
        (b"a\xff", r"line 3 is not valid Unicode \('a\\udcff'\)"),
    ],
)
def test_a_line_without_a_text_ends_it_unless_null_is_asked_for(
    config: VectorConfig, tmp_path: Path, line: bytes, message: str
):
    content = b"one\ntwo\n" + line + b"\nfour\n"
    with pytest.raises(InputError, match=message + ".*--bad-rows null AFTER 2 ANSWERS"):
        answered(config, content, tmp_path)
    lenient = config.model_copy(update={"bad_rows": "null"})
    assert [json.loads(row) is None for row in answered(lenient, content, tmp_path).splitlines()] == [0, 0, 1, 0]
    raw = np.frombuffer(answered(lenient, content, tmp_path, output="raw"), "<f4").reshape(4, 32)
    assert np.isnan(raw).all(axis=1).tolist() == [False, False, True, False]
    with pytest.raises(InputError, match="int8 has no number"):
        answered(lenient.model_copy(update={"dtype": "int8"}), content, tmp_path, output="raw")


def test_a_bad_line_of_a_later_chunk_is_counted_from_the_start(config: VectorConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LINES", 2)
    with pytest.raises(InputError, match=r"line 6 is empty.*AFTER 5 ANSWERS"):
        answered(config, b"1\n2\n3\n4\n5\n\n7\n", tmp_path)


def test_an_endless_line_is_refused(config: VectorConfig, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "ROW_LIMIT", 1 << 20)
    with pytest.raises(InputError, match="line 2 is longer than 1 MB"):
        answered(config, b"one\n" + b"x" * (3 << 20), tmp_path)


def test_long_lines_are_told(config: VectorConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    answered(config, b"word " * 100 + b"\nshort\n", tmp_path)
    assert "1 texts were longer than the model's 64 tokens" in caplog.text


UNLESS_RAY = (
    "import atexit, sys; from gist_ray.cli import main; atexit.register(lambda: {'ray'} & {*sys.modules} and 1 / 0)"
)


def test_lines_are_answered_as_they_come_without_ray_and_ctrl_c_is_quiet(tiny_model: Path):
    # Tests that run in the background (`pytest &`) ignore Ctrl-C, and what they start would too.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; {UNLESS_RAY}; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "embed", str(tiny_model), "--backend", "torch", "--dimensions", "4"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command, env=buffered, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    for text in (b"first\n", b"second\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert len(json.loads(process.stdout.readline())) == 4  # while more may come
    process.send_signal(signal.SIGINT)
    process.wait(60)  # its input stays open, as a terminal's: the end of it would be another good reason to end
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_reader_that_has_enough_ends_it_quietly(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "lines.txt").write_text("a line\n")  # so that its answer waits in the buffer
    read, write = os.pipe()
    os.close(read)
    stdout = os.fdopen(write, "w")
    with (tmp_path / "lines.txt").open() as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        assert main(["embed", str(tiny_model), "--backend", "torch", "--threads", "1"]) == 0
    stdout.close()  # as Python does at its end: what it still holds must not raise again
    assert capsys.readouterr().err == ""
