"""The loss stage alone: from given vectors of student and guide to the gradient of the student's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import Figure, interleaved, median_figure, ratios
from training_peers import CACHED, MINI_BATCH, PLAIN
from training_processes import Group, PeakMemory, in_fresh_process
from training_shards import (
    ROLES,
    SHORT,
    Embed,
    Row,
    distinct_rows,
    embedder,
    minilm,
    mpnet,
    random_vectors,
    work_folder,
)

from gist_ray.config import LossConfig
from gist_ray.training.loss import Candidates, guided_contrastive_loss

OURS = "ours"
Vectors = list[torch.Tensor]


def read_vectors(file: str, rows: int | None = None) -> tuple[Vectors, Vectors]:
    """Student's and guide's vectors of each role, `[rows, dim]`; the student's with gradient."""
    with np.load(file) as saved:
        student, guide = ([torch.from_numpy(saved[f"{who}-{role}"][:rows]) for role in ROLES] for who in ("s", "g"))
    return [vectors.requires_grad_() for vectors in student], guide


def our_loss(student: Vectors, guide: Vectors) -> float:
    count = len(student[0])
    ids = torch.arange(len(ROLES) * count).view(len(ROLES), count)
    roles = (Candidates(*texts) for texts in zip(student, guide, ids, strict=True))
    loss = guided_contrastive_loss(*roles, torch.arange(count), LossConfig()).loss.mean()
    loss.backward()
    return float(loss.detach())


class GivenVectors(torch.nn.Module):
    """In the place of a SentenceTransformer: its vectors come with the features."""

    def __init__(self, who: str, tokenizer: Any) -> None:
        super().__init__()
        self.who, self.tokenizer, self.max_seq_length = who, tokenizer, 128

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features[self.who]}


def peer_loss(kind: str) -> Callable[[Vectors, Vectors], float]:
    """The peer's own code: the whole of `GISTEmbedLoss`, and what `CachedGISTEmbedLoss` does between its forwards."""
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model, guide_model = GivenVectors("student", tokenizer), GivenVectors("guide", tokenizer)
    plain = GISTEmbedLoss(model, guide_model)
    cached = CachedGISTEmbedLoss.__new__(CachedGISTEmbedLoss)  # its constructor wants modules of its own to look at
    torch.nn.Module.__init__(cached)
    cached.__dict__.update({key: value for key, value in plain.__dict__.items() if not key.startswith("_")})
    cached.similarity_fct, cached.cross_entropy_loss = plain.similarity_fct, plain.cross_entropy_loss
    cached.mini_batch_size, cached.show_progress_bar = MINI_BATCH, False

    def run(student: Vectors, guide: Vectors) -> float:
        if kind == CACHED:
            loss, _ = cached.calculate_loss_and_cache_gradients([[s] for s in student], [[g] for g in guide])
            return float(loss.detach())
        features = [{"student": s, "guide": g} for s, g in zip(student, guide, strict=True)]
        loss = plain(features, torch.empty(0))
        loss.backward()
        return float(loss.detach())

    return run


class LossCase:
    """Forward and backward of one loss on the vectors of a file."""

    def __init__(self, rank: int, world_size: int, kind: str, file: str) -> None:
        self._run = our_loss if kind == OURS else peer_loss(kind)
        self._student, self._guide = read_vectors(file)

    def __call__(self, rows: int | None = None) -> tuple[float, float]:
        """Seconds, and the loss."""
        student = [vectors.detach()[:rows].requires_grad_() for vectors in self._student]
        guide = [vectors[:rows] for vectors in self._guide]
        started = time.perf_counter()
        loss = self._run(student, guide)
        return time.perf_counter() - started, loss


def extra_peak(kind: str, file: str) -> int:
    """Bytes above what is resident before, vectors included; gradients count as extra."""
    case = LossCase(0, 1, kind, file)
    case(16)  # threads and libraries are there
    with PeakMemory() as memory:
        case()
    return memory.bytes


def save_vectors(name: str, student: Embed, guide: Embed, rows: list[Row]) -> str:
    """A file of both models' vectors of some rows, as `read_vectors` reads it."""
    file = work_folder() / f"{name}.npz"
    columns = {role: [row[role] for row in rows] for role in ROLES}
    sides = {"s": student, "g": guide}
    arrays = {f"{who}-{role}": columns[role] for who in sides for role in ROLES}
    np.savez(file, **{name: sides[name[0]](texts).astype(np.float32) for name, texts in arrays.items()})
    return str(file)


def random_file(rows: int) -> str:
    empty = [dict.fromkeys(ROLES, "")] * rows
    return save_vectors(f"random-{rows}", random_vectors(384), random_vectors(768), empty)


def loss_figures(quick: bool) -> list[Figure]:
    """Speed and memory beside the peer's, and how memory grows with the batch."""
    size = 64 if quick else 512
    guide = str(minilm()) if quick else mpnet()
    file = save_vectors("loss", embedder(str(minilm())), embedder(guide), distinct_rows(SHORT, size))
    return [*_speed_figures(file, size, 2 if quick else 3), *_memory_figures(file, size), *_growth_figures(quick)]


def _speed_figures(file: str, size: int, repeats: int) -> list[Figure]:
    with (
        Group(LossCase, OURS, file, threads=2) as ours,
        Group(LossCase, CACHED, file, threads=2) as cached,
        Group(LossCase, PLAIN, file, threads=2) as plain,
    ):
        groups = {OURS: ours, CACHED: cached, PLAIN: plain}
        losses = {name: group.turn(16)[0][1] for name, group in groups.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-3 * losses[OURS], losses
        turns = {name: (lambda group=group: group.turn()[0][0]) for name, group in groups.items()}
        runs = interleaved(repeats, **turns)
    faster = min((CACHED, PLAIN), key=lambda name: float(np.median(runs[name])))
    what = f"loss stage, B={size}, student 384, guide 768, e-SNLI"
    return [
        *(median_figure(f"{what}: {name}", seconds, "s") for name, seconds in runs.items()),
        median_figure(f"{what}: {faster} / ours", ratios(runs[faster], runs[OURS]), "x", ">= 30"),
    ]


def _memory_figures(file: str, size: int) -> list[Figure]:
    peaks = {kind: in_fresh_process(extra_peak, kind, file, threads=2) for kind in (OURS, CACHED, PLAIN)}
    what = f"loss stage, B={size}: extra peak memory"
    return [
        *(Figure(f"{what}, {kind}", peak / 1e6, "MB") for kind, peak in peaks.items()),
        Figure(f"{what}, ours / {PLAIN}", peaks[OURS] / peaks[PLAIN], "x", "<= 0.1"),
        Figure(f"{what}, ours / {CACHED}, mini-batch {MINI_BATCH}", peaks[OURS] / peaks[CACHED], "x"),
    ]


def _growth_figures(quick: bool) -> list[Figure]:
    sizes = (256, 512) if quick else (1024, 2048, 4096, 8192)
    peaks = {size: in_fresh_process(extra_peak, OURS, random_file(size), threads=2) for size in sizes}
    low, high = (256, 512) if quick else (2048, 8192)
    return [
        *(Figure(f"loss stage, B={size}: extra peak memory, ours", peak / 1e6, "MB") for size, peak in peaks.items()),
        Figure(
            f"loss stage: extra peak memory at B={high} / at B={low}", peaks[high] / peaks[low], "x", "<= 4.5"
        ),
    ]  # fmt: skip
