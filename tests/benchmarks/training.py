"""The training engine beside sentence-transformers' guided losses, the student alone, and itself on more workers.

    python tests/benchmarks/training.py [--quick] --json OUT [--only steady ceiling mixed table ...]

Full: about an hour on two cores. Needs the shared data folder beside the project, all-mpnet-base-v2, and the dev
extra. Cases are processes that take turns; a case's progress goes to stderr.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from data import minilm
from figures import Figure, interleaved, main, median_figure, ratios
from training_checkpoint import checkpoint_figures
from training_loss import loss_figures
from training_peers import CACHED, PLAIN, Peer
from training_processes import Group, in_fresh_process, resident_bytes
from training_scaling import reduction_figures, scaling_figures, with_train
from training_shards import (
    MIXED,
    SHORT,
    Embed,
    Row,
    distinct_rows,
    embedder,
    mpnet,
    random_bert,
    random_vectors,
    real_rows,
    recipe_for,
    widened,
    work_folder,
    write_shards,
)
from training_students import StudentAlone, Training, show

from gist_ray.config import Recipe
from gist_ray.manifest import digest_of

THREADS = 2
PLAIN_BYTES = 16e9  # it peaks at 6.3 GB at batch 128, about twice that at 256; ours takes up to 5 beside it


# Steady state --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """One case against the peer. `peers` are the losses to measure: all that may be the faster one, and fit."""

    name: str
    files: tuple[str, ...]
    guide: str
    embed: Embed
    goal: str
    peers: tuple[str, ...]
    repeats: int


def steady_figures(quick: bool) -> list[Figure]:
    """Rows a second of steady training, table at hand. Ours: an epoch a turn; the peer: a step a turn.

    The guide never runs in our steps, so its size counts by the width of its vectors only: those of all-mpnet-base-v2,
    widened with zeros to 1024, stand for BERT-large's, because random weights would hide candidates at random.
    GISTEmbedLoss keeps the graph of the whole padded batch, which does not fit 24 GB on mixed lengths. Beside a guide
    of BERT-large's size the difference between the two losses is small, and a step takes minutes: one of them.
    """
    cached = (CACHED,)
    fits = quick or psutil.virtual_memory().available > PLAIN_BYTES
    both = (CACHED, PLAIN) if fits else cached
    if not fits:
        print(f"  {PLAIN} is left out: it needs {PLAIN_BYTES / 1e9:g} GB of free memory", file=sys.stderr)
    base, base_name = (str(minilm()), "all-MiniLM-L6-v2") if quick else (mpnet(), "all-mpnet-base-v2")
    large = random_bert("large", 2, 64, 2) if quick else random_bert("large", 24, 1024, 16)
    large_name = "tiny BERT" if quick else "BERT-large (24 layers, 1024, random weights)"
    short, mixed = "short (e-SNLI)", "mixed (MedQuAD + trivia, at most 128 tokens)"
    races = [
        Race(f"{short}, guide {base_name}", SHORT, base, embedder(base), ">= 5", both, 2),
        Race(f"{mixed}, guide {base_name}", MIXED, base, embedder(base), ">= 5", cached, 2),
        Race(f"{short}, guide {large_name}", SHORT, large, widened(embedder(base), 1024), ">= 10", cached, 1),
        Race(f"{short}, guide all-MiniLM-L6-v2", SHORT, str(minilm()), embedder(str(minilm())), ">= 2.2", both, 2),
    ]
    return [figure for race in races for figure in race_figures(race, quick)]


def race_figures(race: Race, quick: bool) -> list[Figure]:
    batch_size, count = (16, 32) if quick else (256, 1024)
    rows = real_rows(race.files, count)
    recipe = recipe_for(f"steady-{digest_of(race.name)[:8]}", race.guide, train={"batch_size": batch_size})
    write_shards(recipe, rows, race.embed)
    with (
        Group(Training, recipe, threads=THREADS) as ours,
        Group(Peer, recipe, race.guide, rows, threads=THREADS) as peer,
    ):
        ours.turn("warm")
        for loss in race.peers:
            peer.turn(loss, 8)
        cases = {loss: functools.partial(peer_speed, peer, loss, batch_size) for loss in race.peers}
        runs = interleaved(1 if quick else race.repeats, ours=lambda: our_speed(race.name, ours), **cases)
    faster = max(race.peers, key=lambda loss: statistics.median(runs[loss]))
    name = f"steady, {race.name}, batch {batch_size}"
    return [
        median_figure(f"{name}: ours", runs["ours"], "rows/s"),
        *(median_figure(f"{name}: {loss}", runs[loss], "rows/s") for loss in race.peers),
        median_figure(f"{name}: ours / {faster}", ratios(runs["ours"], runs[faster]), "x", race.goal),
    ]


def our_speed(name: str, ours: Group) -> float:
    turn = ours.turn("epoch")[0]
    show(name, turn)
    return turn.rows_per_s


def peer_speed(peer: Group, loss: str, batch_size: int) -> float:
    seconds = peer.turn(loss, batch_size)[0]
    print(f"  {loss}: {batch_size} rows, {seconds:.1f} s, {batch_size / seconds:.1f} rows/s", file=sys.stderr)
    return batch_size / seconds


# Ceiling -------------------------------------------------------------------------------------------------------------


def ceiling_figures(quick: bool) -> list[Figure]:
    """Our rows a second over those of the student alone, on the same rows."""
    return _ceiling_of("short (e-SNLI)", SHORT, quick, variants=True)


def mixed_ceiling_figures(quick: bool) -> list[Figure]:
    """The same with texts of all lengths."""
    return _ceiling_of("mixed (MedQuAD + trivia, at most 128 tokens)", MIXED, quick, variants=False)


def _ceiling_of(name: str, files: tuple[str, ...], quick: bool, variants: bool) -> list[Figure]:
    batch_size, count, repeats = (16, 32, 1) if quick else (256, 1024, 2)
    recipe = recipe_for(f"ceiling-{files[0]}", str(minilm()), train={"batch_size": batch_size})
    write_shards(recipe, real_rows(files, count), random_vectors(768))
    where = f"ceiling, {name}, batch {batch_size}"
    with Group(StudentAlone, recipe, True, False, threads=THREADS) as alone:
        alone.turn("warm")
        figures = _beside(where, "ours", recipe, alone, repeats, ">= 0.95")
        if not variants:
            return figures
        for what, dropout, keep in (("dropout off", False, False), ("freed memory kept, as ours does", True, True)):
            with Group(StudentAlone, recipe, dropout, keep, threads=THREADS) as other:
                other.turn("warm")
                figures.append(Figure(f"{where}: student alone, {what}", other.turn("epoch")[0], "rows/s"))
        figures += _beside(where, "ours, dropout 0", with_train(recipe, dropout=0.0), alone, 1, None)
        if shutil.which(os.environ.get("CXX", "g++")) and not quick:
            figures += _beside(where, "ours, compiled", with_train(recipe, compile=True), alone, 1, None)
        return figures


def _beside(where: str, what: str, recipe: Recipe, alone: Group, repeats: int, goal: str | None) -> list[Figure]:
    """Our epochs and those of the student alone, in turn."""
    with Group(Training, recipe, threads=THREADS) as ours:
        ours.turn("epoch" if recipe.train.compile else "warm")  # the compiler takes its time for every new shape
        runs = interleaved(repeats, ours=lambda: our_speed(what, ours), alone=lambda: alone.turn("epoch")[0])
    return [
        median_figure(f"{where}: {what}", runs["ours"], "rows/s"),
        median_figure(f"{where}: student alone, beside {what}", runs["alone"], "rows/s"),
        median_figure(f"{where}: {what} / student alone", ratios(runs["ours"], runs["alone"]), "x", goal),
    ]


# The guide table included --------------------------------------------------------------------------------------------


def table_figures(quick: bool) -> list[Figure]:
    """Seconds of `gist-ray train`, from nothing: Ray's start, guide table, two epochs, checkpoint.

    Starts of Ray and its workers are in it, whatever the number of rows: 2,048 rows gave 2.3, and said little else.
    The peer's seconds are those of its steps alone, measured before and after, times their number.
    """
    batch_size, count = (16, 64) if quick else (256, 6144)
    guide = str(minilm()) if quick else mpnet()
    rows = real_rows(SHORT, count)
    recipe = recipe_for("table", guide, train={"batch_size": batch_size})
    with Group(Peer, recipe, guide, rows, threads=THREADS) as peer:
        peer.turn(CACHED, 8)
        before = peer_speed(peer, CACHED, batch_size)
        ours, steps = trained(rows, guide, batch_size)
        after = peer_speed(peer, CACHED, batch_size)
    peers = [2 * count / speed for speed in (before, after)]
    name = f"2 epochs of {count:,} rows (e-SNLI), guide all-mpnet-base-v2, batch {batch_size}"
    return [
        Figure(f"{name}: `gist-ray train` from nothing", ours, "s"),
        Figure(f"{name}: its steps", steps, "s"),
        median_figure(f"{name}: {CACHED}, steps alone", peers, "s"),
        median_figure(f"{name}: {CACHED} / ours", [seconds / ours for seconds in peers], "x", ">= 2.5"),
    ]


def trained(rows: list[Row], guide: str, batch_size: int) -> tuple[float, float]:
    """Seconds of the whole verb, and of its steps."""
    folder = work_folder() / "table"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(folder / "rows.parquet")}]},
        "student": {"path": str(minilm())},
        "guide": {"path": guide},
        "train": {"batch_size": batch_size, "epochs": 2},
        "cluster": {"threads_per_worker": THREADS, "data_workers": THREADS, "data_threads": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    started = time.perf_counter()
    command = [sys.executable, "-m", "gist_ray.cli", "train", str(folder / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = time.perf_counter() - started
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return seconds, sum(json.loads(line)["seconds"] for line in lines)


# Memory --------------------------------------------------------------------------------------------------------------


def memory_figures(quick: bool) -> list[Figure]:
    """Peak resident memory of a worker, whole process, default settings."""
    sizes = {16: 2, 32: 1} if quick else {256: 2, 8192: 1}  # steps of each
    peaks = {}
    for size, steps in sizes.items():
        recipe = recipe_for(f"memory-{size}", str(minilm()), train={"batch_size": size})
        write_shards(recipe, distinct_rows(SHORT, size), random_vectors(384))  # one batch: no repeated texts
        peaks[size] = in_fresh_process(peak_of_steps, recipe, steps, threads=THREADS)
    small, large = sizes
    name = "training, e-SNLI, peak resident memory"
    return [
        *(Figure(f"{name}, global batch {size}", peak / 1e6, "MB") for size, peak in peaks.items()),
        Figure(f"{name}, global batch {large} / {small}", peaks[large] / peaks[small], "x", "<= 1.25"),
    ]


def peak_of_steps(recipe: Recipe, steps: int) -> int:
    training = Training(0, 1, recipe)
    for _ in range(steps):
        show(f"batch {recipe.train.batch_size}", training("step"))
    return resident_bytes("VmHWM")


if __name__ == "__main__":
    main(
        "training",
        {
            "steady": steady_figures,
            "ceiling": ceiling_figures,
            "mixed": mixed_ceiling_figures,
            "table": table_figures,
            "loss": loss_figures,
            "memory": memory_figures,
            "scaling": scaling_figures,
            "reductions": reduction_figures,
            "checkpoint": checkpoint_figures,
        },
    )
