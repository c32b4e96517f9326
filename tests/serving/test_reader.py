"""Where texts are tokenized."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from gist_ray.serving.reader import INLINE_CHARACTERS, Reader

SHORT, LONG = ["a"], ["a" * INLINE_CHARACTERS, "b"]


def reading(test) -> None:
    async def run() -> None:
        reader = Reader()
        try:
            await test(reader)
        finally:
            reader.close()

    asyncio.run(run())


def test_a_few_words_are_read_at_once_and_more_in_a_thread():
    async def test(reader: Reader) -> None:
        here = threading.get_ident()
        assert await reader.read(SHORT, threading.get_ident) == here
        there = await reader.read(LONG, threading.get_ident)
        assert there != here and await reader.read(LONG, threading.get_ident) == there

    reading(test)


def test_never_in_two_threads_at_once():
    busy = []

    def work() -> None:
        busy.append(threading.get_ident())
        assert len(busy) == 1
        time.sleep(0.002)
        busy.pop()

    async def test(reader: Reader) -> None:
        asks = [reader.read(texts, work) for _ in range(30) for texts in (LONG, SHORT)]
        await asyncio.gather(*asks)

    reading(test)


def test_after_an_error_it_reads_on():
    def fails() -> None:
        raise ValueError("no such text")

    async def test(reader: Reader) -> None:
        for texts in (SHORT, LONG):
            with pytest.raises(ValueError, match="no such text"):
                await reader.read(texts, fails)
            assert await reader.read(texts, lambda: 3) == 3

    reading(test)
