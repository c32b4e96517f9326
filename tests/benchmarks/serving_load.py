"""Texts and load of the serving benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from data import SHARED
from serving_servers import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "serve"))
from loadtest import Load, Target, batched, closed_loop, open_loop

__all__ = ["Load", "Target", "batched", "closed_loop", "mixed_texts", "open_loop", "served", "short_texts"]


def short_texts(count: int) -> list[str]:
    """e-SNLI sentences of 10 to 14 words, all different; when they are used up, again with a number before them."""
    table = pq.read_table(SHARED / "train" / "esnli.parquet", columns=["query", "pos"])
    texts = dict.fromkeys(text for column in table.columns for text in column.to_pylist())
    fitting = [text for text in texts if 10 <= len(text.split()) <= 14]
    rounds = range(-(-count // len(fitting)))
    return [f"{turn} {text}" if turn else text for turn in rounds for text in fitting][:count]


def mixed_texts(count: int) -> list[str]:
    """SciFact abstracts and queries in turn, as one meets them: long and short, all different."""
    import gzip
    import json

    def lines(name: str) -> list[dict[str, str]]:
        with gzip.open(SHARED / "eval" / "SciFact" / name, "rt") as file:
            return [json.loads(line) for line in file]

    abstracts = [row["text"] for row in lines("corpus.jsonl.gz")]
    queries = short_texts(len(abstracts))
    return [text for pair in zip(abstracts, queries, strict=False) for text in pair][:count]


def served(server: Server, requests: Iterator[Sequence[str]], concurrency: int, seconds: float) -> Load:
    """A closed loop; the CPU seconds it took are put on stderr."""
    target = Target(f"{server.url}/v1/embeddings", model="model")
    before = server.cpu_s()
    load = closed_loop(target, requests, concurrency, seconds=seconds, warm_s=1.0)
    cpu_s = (server.cpu_s() - before) * seconds / (seconds + 1.0)
    statuses = load.statuses()
    assert set(statuses) == {200}, statuses
    print(
        f"  {concurrency} x {load.texts // statuses[200]}: {load.texts_per_s:.0f} texts/s, "
        f"p50 {load.latency_ms(50):.1f} ms, {1000 * cpu_s / load.texts:.2f} CPU-s per 1,000 texts",
        file=sys.stderr,
    )
    return load
