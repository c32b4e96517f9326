"""Ours beside infinity-emb 0.0.78, which needs other releases of much that we need, so an environment of its own:

python -m venv infinity
infinity/bin/pip install "infinity-emb[torch,server]==0.0.78"
INFINITY_PYTHON=infinity/bin/python python tests/benchmarks/serving.py --only infinity --json OUT
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data import minilm
from figures import Figure, interleaved, median_figure, ratios
from serving_int8 import int8_model
from serving_load import batched, mixed_texts, served, short_texts
from serving_servers import Server, infinity_server, our_server

VARIABLE = "INFINITY_PYTHON"
# BetterTransformer is gone from the transformers it installs; it sorts by real lengths.
SETTINGS = ("--engine", "torch", "--no-bettertransformer", "--lengths-via-tokenize", "--log-level", "error")
BATCH_SIZES = (8, 16, 32, 64)


def infinity_figures(quick: bool) -> list[Figure]:
    """Texts a second with 64 clients of one text each, and the latency of one client; both may use both cores."""
    python = os.environ.get(VARIABLE)
    if not python:
        print(f"infinity: left out; set {VARIABLE}, see serving_infinity.py", file=sys.stderr)
        return []
    seconds, repeats, count = (3.0, 1, 400) if quick else (10.0, 3, 3000)
    short, mixed = short_texts(count), mixed_texts(count)
    best = best_batch_size(python, short, mixed, 3.0)
    with (
        infinity_server(python, minilm(), *SETTINGS, "--batch-size", str(best)) as infinity,
        ours("fp32") as fp32,
        ours("int8") as int8,
    ):
        servers = {"infinity": infinity, "fp32": fp32, "int8": int8}
        found = {}
        for name, texts, clients in (("mixed", mixed, 64), ("short", short, 64), ("alone", short, 1)):
            found[name] = interleaved(
                repeats,
                **{
                    who: lambda server=server, texts=texts, clients=clients: measured(server, texts, clients, seconds)
                    for who, server in servers.items()
                },
            )
    return [
        *_throughput("mixed lengths", found["mixed"], {"fp32": ">= 2"}),
        *_throughput("short texts", found["short"], {"fp32": ">= 1.3", "int8": ">= 2"}),
        median_figure("infinity, 1 client, short texts: p50", found["alone"]["infinity"], "ms"),
        median_figure("ours fp32, 1 client, short texts: p50", found["alone"]["fp32"], "ms"),
        median_figure(
            "p50 of 1 client, ours fp32 / infinity",
            ratios(found["alone"]["fp32"], found["alone"]["infinity"]),
            "x",
            "<= 0.6",
        ),
    ]


@contextmanager
def ours(precision: str) -> Iterator[Server]:
    """`gist-ray serve` on both cores."""
    model = int8_model() if precision == "int8" else minilm()
    with our_server(model, precision=precision, threads=2) as server:
        yield server


def measured(server: Server, texts: list[str], clients: int, seconds: float) -> float:
    """Texts a second of many clients; milliseconds (median) of one."""
    load = served(server, batched(texts, 1), clients, seconds)
    return load.texts_per_s if clients > 1 else load.latency_ms(50)


def best_batch_size(python: str, short: list[str], mixed: list[str], seconds: float) -> int:
    """The one with the largest product of both speeds."""
    speeds = {}
    for size in BATCH_SIZES:
        with infinity_server(python, minilm(), *SETTINGS, "--batch-size", str(size)) as server:
            speeds[size] = measured(server, short, 64, seconds) * measured(server, mixed, 64, seconds)
    best = max(speeds, key=speeds.__getitem__)
    print(f"  infinity: batches of {best} are its fastest of {BATCH_SIZES}", file=sys.stderr)
    return best


def _throughput(what: str, runs: dict[str, list[float]], goals: dict[str, str]) -> list[Figure]:
    name = f"{what}, 64 clients, both cores"
    return [
        *(median_figure(f"{name}: {who}", runs[who], "texts/s") for who in runs),
        *(
            median_figure(f"{name}: ours {who} / infinity", ratios(runs[who], runs["infinity"]), "x", goal)
            for who, goal in goals.items()
        ),
    ]
