"""Load test of an embedding endpoint: closed loop (so many clients at a time) or open loop (so many requests a second).

    python serve/loadtest.py http://127.0.0.1:8000 --concurrency 64 --seconds 20
    python serve/loadtest.py http://127.0.0.1:8000 --rate 200 --seconds 20 --html report.html

A closed loop asks for the next answer when it has the last, so it hides how long people would wait; an open loop sends
on time whether or not the server keeps up. Needs httptools and uvloop, which `ray[serve]` brings along: a client beside
the server takes its CPU, and theirs is less than that of a whole HTTP library. Loopback or your own server only.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

LONGEST_S = 120.0
PERCENTILES = (50, 90, 95, 99)


@dataclass
class Load:
    """What a load test saw. Seconds of each answer, by status; -1 stands for no answer."""

    seconds: float = 0.0
    texts: int = 0
    """Of answers with status 200."""
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    """Start (seconds since the first), duration in seconds, status."""

    def statuses(self) -> Counter[int]:
        """Answers by status."""
        return Counter(status for _, _, status in self.answers)

    def latency_ms(self, percentile: float, status: int = 200) -> float:
        """A percentile of the times of answers with a status; NaN without any."""
        times = [duration for _, duration, of in self.answers if of == status]
        return float(np.percentile(times, percentile)) * 1000 if times else float("nan")

    @property
    def texts_per_s(self) -> float:
        """Texts answered a second."""
        return self.texts / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Requests answered with 200, a second."""
        return self.statuses()[200] / self.seconds


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    url: str
    """Of the route, `http://HOST:PORT/v1/embeddings`."""
    model: str | None = None
    api_key: str | None = None

    def body(self, texts: Sequence[str]) -> bytes:
        """A request for the vectors of texts, in base64."""
        tree = {"input": list(texts), "encoding_format": "base64"} | ({"model": self.model} if self.model else {})
        return json.dumps(tree).encode()

    def head(self) -> bytes:
        """Request line and headers, but for the length of the body; with the API key if there is one."""
        url = urlsplit(self.url)
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        path = url.path + (f"?{url.query}" if url.query else "")
        return f"POST {path} HTTP/1.1\r\nhost: {url.netloc}\r\n{key}content-type: application/json\r\n".encode()


class _Connection(asyncio.Protocol):
    """A connection that is kept: one request, its answer, the next request."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answer: asyncio.Future[int] | None = None
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes) -> int:
        """Status of the answer, -1 if there is none or it is not whole."""
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        late = loop.call_later(LONGEST_S, self._transport.abort)
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            late.cancel()

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return not self._transport.is_closing()

    def close(self) -> None:
        """End it."""
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
            self._end(-1)

    def on_message_complete(self) -> None:
        """The parser's: an answer is whole."""
        status = self._parser.get_status_code()
        if status >= 200:  # not a 100 that says that there is more to come
            if not self._parser.should_keep_alive():
                self.close()
            self._end(status)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(-1)

    def _end(self, status: int) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result(status)


class _Client:
    """As many connections to a target as there are requests at a time."""

    def __init__(self, target: Target) -> None:
        self._target, self._head = target, target.head()
        self._idle: list[_Connection] = []

    async def ask(self, texts: Sequence[str]) -> int:
        """Status of the answer, -1 for none."""
        body = self._target.body(texts)
        try:
            connection = await self._connected()
        except (OSError, TimeoutError, asyncio.TimeoutError):
            return -1
        status = await connection.ask(b"%scontent-length: %d\r\n\r\n%s" % (self._head, len(body), body))
        if connection.is_open:
            self._idle.append(connection)
        return status

    def close(self) -> None:
        """End all connections."""
        for connection in self._idle:
            connection.close()

    async def _connected(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        url = urlsplit(self._target.url)
        secure = url.scheme == "https"
        made = asyncio.get_running_loop().create_connection(
            _Connection, url.hostname or "", url.port or (443 if secure else 80), ssl=secure or None
        )
        return (await asyncio.wait_for(made, LONGEST_S))[1]


def batched(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Groups of `size` texts, from the beginning again and again."""
    groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
    return itertools.cycle(groups)


def closed_loop(
    target: Target, requests: Iterable[Sequence[str]], concurrency: int, *, seconds: float, warm_s: float = 0.0
) -> Load:
    """`concurrency` clients, each asking for the next answer when it has one; the first `warm_s` do not count."""
    return uvloop.run(_closed_loop(target, iter(requests), concurrency, seconds, warm_s))


def open_loop(target: Target, requests: Iterable[Sequence[str]], rate: float, *, seconds: float) -> Load:
    """`rate` requests a second, at random times (Poisson), whether or not those before are answered."""
    return uvloop.run(_open_loop(target, iter(requests), rate, seconds))


async def _closed_loop(
    target: Target, requests: Iterator[Sequence[str]], concurrency: int, seconds: float, warm_s: float
) -> Load:
    load, client, start = Load(), _Client(target), time.perf_counter() + warm_s
    end = start + seconds

    async def one_after_another() -> None:
        while time.perf_counter() < end:
            texts = next(requests)
            began = time.perf_counter()
            status = await client.ask(texts)
            ended = time.perf_counter()
            if start <= ended <= end:
                load.answers.append((began - start, ended - began, status))
                load.texts += len(texts) if status == 200 else 0

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    client.close()
    load.seconds = seconds
    return load


async def _open_loop(target: Target, requests: Iterator[Sequence[str]], rate: float, seconds: float) -> Load:
    load, client, random = Load(), _Client(target), np.random.default_rng(0)

    async def one(began: float, texts: Sequence[str]) -> None:
        status = await client.ask(texts)
        load.answers.append((began - start, time.perf_counter() - began, status))
        load.texts += len(texts) if status == 200 else 0

    start = at = time.perf_counter()
    waiting: set[asyncio.Task[None]] = set()
    while at < start + seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        task = asyncio.create_task(one(at, next(requests)))  # from when it was due: no pause is hidden
        waiting.add(task)
        task.add_done_callback(waiting.discard)
        at += float(random.exponential(1 / rate))
    await asyncio.gather(*waiting)
    client.close()
    load.seconds = time.perf_counter() - start  # until the last answer: what still waited is no extra speed
    return load


def summary(load: Load) -> dict[str, object]:
    """The figures of a load test, for people and for JSON."""
    return {
        "seconds": round(load.seconds, 3),
        "texts_per_s": round(load.texts_per_s, 1),
        "requests_per_s": round(load.requests_per_s, 1),
        "latency_ms": {f"p{percentile}": round(load.latency_ms(percentile), 2) for percentile in PERCENTILES},
        "answers": {str(status): count for status, count in sorted(load.statuses().items())},
    }


def page(title: str, load: Load) -> str:
    """A page with each answer's time over the test, and their distribution."""
    width, height, left = 860, 300, 60
    longest = max((duration for _, duration, _ in load.answers), default=1e-3)
    last = max((began for began, _, _ in load.answers), default=1.0)
    dots = "".join(
        f'<circle cx="{left + began / last * (width - left - 10):.1f}" '
        f'cy="{height - 25 - duration / longest * (height - 40):.1f}" r="1.6" class="s{str(status)[0]}"/>'
        for began, duration, status in load.answers
        if began >= 0
    )
    ticks = "".join(
        f'<text x="4" y="{height - 21 - share * (height - 40):.0f}">{1000 * share * longest:.0f} ms</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    figures = html.escape(json.dumps(summary(load), indent=2))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; color-scheme: light dark; }}
circle {{ fill: #2f6fde; fill-opacity: .55; }} .s4 {{ fill: #e0a100; }} .s5, .s- {{ fill: #d5341e; fill-opacity: 1; }}
text {{ font-size: 11px; fill: gray; }} svg {{ width: 100%; border: 1px solid #8884; }}</style>
<h1>{html.escape(title)}</h1><p>Each dot is an answer: when it was asked for, and how long it took.
Blue 200, yellow 4xx, red 5xx or none.</p>
<svg viewBox="0 0 {width} {height}">{dots}{ticks}<text x="{width - 60}" y="{height - 6}">{last:.0f} s</text></svg>
<pre>{figures}</pre></html>
"""


def sample_texts(file: Path | None) -> list[str]:
    """Lines of a file, or made-up sentences of 4 to 40 words."""
    if file:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    random = np.random.default_rng(0)
    words = "the model reads each short text and gives a vector of numbers for it while others wait their turn".split()
    return [" ".join(random.choice(words, int(random.integers(4, 40)))) + f" {i}" for i in range(20_000)]


def main() -> int:
    """Run a load test from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url", help="root of the server, for instance http://127.0.0.1:8000")
    parser.add_argument("--route", default="/v1/embeddings")
    parser.add_argument("--model", help="name to ask for (default: none)")
    parser.add_argument("--concurrency", type=int, default=64, help="clients of the closed loop (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="requests a second: an open loop instead")
    parser.add_argument("--per-request", type=int, default=1, help="texts in a request (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--texts", type=Path, help="file with a text on each line (default: made-up sentences)")
    parser.add_argument("--html", type=Path, help="write a page with a plot")
    options = parser.parse_args()
    target = Target(options.url.rstrip("/") + options.route, options.model, os.environ.get("API_KEY"))
    requests = batched(sample_texts(options.texts), options.per_request)
    if options.rate:
        load = open_loop(target, requests, options.rate, seconds=options.seconds)
        title = f"Open loop, {options.rate:g} requests a second"
    else:
        load = closed_loop(target, requests, options.concurrency, seconds=options.seconds)
        title = f"Closed loop, {options.concurrency} clients"
    if options.html:
        options.html.write_text(page(title, load), encoding="utf-8")
    print(json.dumps(summary(load), indent=2))
    return 0 if load.statuses()[200] else 1


if __name__ == "__main__":
    sys.exit(main())
