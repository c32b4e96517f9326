"""The endpoint beside its own engine, sentence-transformers offline, a stock Ray Serve app and Infinity.

    python tests/benchmarks/serving.py [--quick] --json OUT [--only ceiling offline stock single repeats overload ...]

Full: about 50 minutes on two cores. The client shares the machine with the server. Needs the shared data folder beside
the project and the dev extra; `infinity` needs an environment of its own, see `serving_infinity.py`. One replica;
caches are off but where repeats are the subject.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from data import minilm
from figures import Figure, interleaved, main, median_figure, ratios
from serving_infinity import infinity_figures
from serving_int8 import int8_figures
from serving_load import Target, batched, open_loop, served, short_texts
from serving_offline import offline_figures
from serving_servers import our_server, stock_server
from training_processes import Group

from gist_ray.chunks import length_sorted_chunks
from gist_ray.serving.engine import load_engine
from gist_ray.serving.tuning import tuned_batch_tokens

BACKENDS = ("torch", "openvino")


class Ceiling:
    """The engine alone: forwards of length-sorted batches of the size it tunes itself to, token ids at hand."""

    def __init__(self, rank: int, size: int, model: str, backend: str, precision: str, texts: list[str]) -> None:
        self._engine = load_engine(model, backend=backend, precision=precision, threads=1)  # type: ignore[arg-type]
        self._tokens = self._engine.tokenize(texts)
        longest = max(self._tokens, key=len)

        def seconds(rows: int, length: int) -> float:
            started = time.perf_counter()
            self._engine.finish(self._engine.forward([longest[:length]] * rows))
            return time.perf_counter() - started

        budget = tuned_batch_tokens(seconds, [min(length, len(longest)) for length in (16, 64)])
        print(f"  {backend} {precision}: batches of {budget} tokens", file=sys.stderr)
        chunks = length_sorted_chunks(np.array([len(row) for row in self._tokens]), budget)
        self._batches = [[self._tokens[i] for i in chunk] for chunk in chunks]

    def __call__(self) -> float:
        """Texts a second, all of them once."""
        started = time.perf_counter()
        for batch in self._batches:
            self._engine.finish(self._engine.forward(batch))
        return len(self._tokens) / (time.perf_counter() - started)


def ceiling_figures(quick: bool) -> list[Figure]:
    """Texts a second over HTTP by those of the engine alone; one compute thread each."""
    seconds, repeats, count = (3.0, 1, 500) if quick else (10.0, 3, 4000)
    figures = []
    for backend in BACKENDS:
        texts = short_texts(count)
        with (
            Group(Ceiling, str(minilm()), backend, "fp32", texts, threads=1) as alone,
            our_server(minilm(), backend=backend) as server,
        ):
            alone.turn()
            cases: dict[str, Callable[[], float]] = {
                "alone": lambda alone=alone: alone.turn()[0],  # type: ignore[misc]
                "beside": lambda alone=alone: beside_a_busy_core(alone),  # type: ignore[misc]
                "many": lambda server=server, texts=texts: served(server, batched(texts, 32), 8, seconds).texts_per_s,  # type: ignore[misc]
                "one": lambda server=server, texts=texts: served(server, batched(texts, 1), 64, seconds).texts_per_s,  # type: ignore[misc]
            }
            runs = interleaved(repeats, **cases)
        name = f"short texts, {backend} fp32, one thread"
        figures += [
            median_figure(f"{name}: engine alone", runs["alone"], "texts/s"),
            median_figure(f"{name}: alone beside a busy core / alone", ratios(runs["beside"], runs["alone"]), "x"),
            median_figure(f"{name}: served, 8 x 32", runs["many"], "texts/s"),
            median_figure(f"{name}: served, 64 x 1", runs["one"], "texts/s"),
            median_figure(f"{name}: 8 x 32 / alone", ratios(runs["many"], runs["alone"]), "x", ">= 0.90"),
            median_figure(f"{name}: 64 x 1 / alone", ratios(runs["one"], runs["alone"]), "x", ">= 0.80"),
        ]
    return figures


def beside_a_busy_core(alone: Group) -> float:
    """Texts a second of the engine alone while another core counts: what two cores of the machine take of each other.

    What is served needs that other core, for requests, answers and who asks.
    """
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as counting:
        try:
            found: float = alone.turn()[0]
        finally:
            counting.kill()
    return found


def single_figures(quick: bool) -> list[Figure]:
    """Added latency over the raw forward, one request at a time."""
    seconds, count = (3.0, 300) if quick else (10.0, 1000)
    texts, figures = short_texts(count), []
    for backend in BACKENDS:
        forward_ms = raw_latency_ms(backend, texts[:200])
        with our_server(minilm(), backend=backend) as server:
            load = served(server, batched(texts, 1), 1, seconds)
        name = f"one short text at a time, {backend} fp32"
        figures += [
            Figure(f"{name}: raw forward, p50", forward_ms, "ms"),
            Figure(f"{name}: over HTTP, p50", load.latency_ms(50), "ms"),
            Figure(f"{name}: added", load.latency_ms(50) - forward_ms, "ms", "<= 3"),
        ]
    return figures


def raw_latency_ms(backend: str, texts: list[str]) -> float:
    with Group(OneByOne, str(minilm()), backend, texts, threads=1) as group:
        return float(group.turn()[0])


class OneByOne:
    """The engine alone, a text at a time."""

    def __init__(self, rank: int, size: int, model: str, backend: str, texts: list[str]) -> None:
        self._engine = load_engine(model, backend=backend, threads=1)  # type: ignore[arg-type]
        self._tokens = self._engine.tokenize(texts)

    def __call__(self) -> float:
        times = []
        for row in self._tokens * 2:
            started = time.perf_counter()
            self._engine.finish(self._engine.forward([row]))
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times[len(self._tokens) :])


def stock_figures(quick: bool) -> list[Figure]:
    """As `beside_stock`, of each engine."""
    return [figure for backend in BACKENDS for figure in beside_stock(backend, quick)]


def beside_stock(backend: str, quick: bool) -> list[Figure]:
    """Requests a second of one short text, and the tail at 80 % of our peak, beside stock on the same engine."""
    seconds, repeats = (3.0, 1) if quick else (10.0, 3)
    texts = short_texts(4000)
    with our_server(minilm(), backend=backend) as ours, stock_server(minilm(), backend) as stock:
        runs = interleaved(
            repeats,
            ours=lambda: served(ours, batched(texts, 1), 64, seconds).requests_per_s,
            stock=lambda: served(stock, batched(texts, 1), 64, seconds).requests_per_s,
        )
        rate = 0.8 * statistics.median(runs["ours"])
        tails = {
            name: open_loop(Target(f"{server.url}/v1/embeddings"), batched(texts, 1), rate, seconds=seconds)
            for name, server in (("ours", ours), ("stock", stock))
        }
    name = f"one short text a request, {backend} fp32"
    p99 = {who: load.latency_ms(99) for who, load in tails.items()}
    return [
        median_figure(f"{name}: ours, 64 clients", runs["ours"], "req/s"),
        median_figure(f"{name}: stock, 64 clients", runs["stock"], "req/s"),
        median_figure(f"{name}: ours / stock", ratios(runs["ours"], runs["stock"]), "x", ">= 2"),
        Figure(f"{name}: ours, p99 at {rate:.0f} req/s", p99["ours"], "ms"),
        Figure(f"{name}: stock, p99 at {rate:.0f} req/s", p99["stock"], "ms"),
        Figure(f"{name}: p99, ours / stock", p99["ours"] / p99["stock"], "x", "<= 0.25"),
    ]


def repeats_figures(quick: bool) -> list[Figure]:
    """Half of the texts asked for before, with and without the cache."""
    seconds, repeats = (3.0, 1) if quick else (10.0, 3)
    fresh = short_texts(40_000)
    halves = [text for i in range(0, len(fresh), 16) for text in (*fresh[i : i + 16], *fresh[max(0, i - 16) : i])]
    # Both go on from turn to turn: else the cache would know what came before, and one have longer texts.
    all_new, half_known = batched(fresh, 32), batched(halves, 32)
    with (
        our_server(minilm(), backend="torch") as without,
        our_server(minilm(), backend="torch", cache_mb=64) as server,
    ):
        runs = interleaved(
            repeats,
            fresh=lambda: served(without, all_new, 8, seconds).texts_per_s,
            halves=lambda: served(server, half_known, 8, seconds).texts_per_s,
        )
    name = "half of the texts repeated, 8 x 32, torch fp32"
    return [
        median_figure(f"{name}: all different, no cache", runs["fresh"], "texts/s"),
        median_figure(f"{name}: half repeated, cache", runs["halves"], "texts/s"),
        median_figure(f"{name}: gain", ratios(runs["halves"], runs["fresh"]), "x", ">= 1.8"),
    ]


def overload_figures(quick: bool) -> list[Figure]:
    """Three times as many requests as the server can answer."""
    seconds = 5.0 if quick else 60.0
    texts = short_texts(40_000)
    with our_server(minilm(), backend="torch", max_queue_tokens=4000) as server:
        target = Target(f"{server.url}/v1/embeddings")
        peak = served(server, batched(texts, 8), 16, min(seconds, 15.0)).texts_per_s
        before = server.memory_mb()
        load = open_loop(target, batched(texts, 8), 3 * peak / 8, seconds=seconds)
        after = server.memory_mb()
    statuses = load.statuses()
    others = sum(count for status, count in statuses.items() if status not in (200, 429))
    name = "overload, 3 x capacity, 8 texts a request"
    return [
        Figure(f"{name}: peak", peak, "texts/s"),
        Figure(f"{name}: goodput / peak", load.texts_per_s / peak, "x", ">= 0.95"),
        Figure(f"{name}: answers 429", statuses[429], ""),
        Figure(f"{name}: p99 of 429", load.latency_ms(99, status=429), "ms", "<= 100"),
        Figure(f"{name}: other answers", others, "", "== 0"),
        Figure(f"{name}: memory after / before", after / before, "x", "<= 1.1"),
    ]


if __name__ == "__main__":
    main(
        "serving",
        {
            "ceiling": ceiling_figures,
            "single": single_figures,
            "offline": offline_figures,
            "stock": stock_figures,
            "repeats": repeats_figures,
            "overload": overload_figures,
            "int8": int8_figures,
            "infinity": infinity_figures,
        },
    )
