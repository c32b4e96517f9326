"""Our side of the training benchmark, in one process or several: the real loop's path, and the student alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gist_ray.config import Recipe
from gist_ray.data.shards import Shards
from gist_ray.encoder import load_model
from gist_ray.training.batch import WorkerBatch, made_ahead, make_batch
from gist_ray.training.engine import make_engine, set_learning_rate
from gist_ray.training.loop import Rates, batches_from, global_metrics, planner_for
from gist_ray.training.memory import keep_freed_memory, probe
from gist_ray.training.phases import PHASES, PhaseClock
from gist_ray.training.step import Stepper
from gist_ray.training.student import load_student

_EPOCHS = 50
_CHUNK = 32


@dataclass(frozen=True)
class Turn:
    """What some steps took."""

    seconds: float
    rows: int
    steps: int
    phases: dict[str, float]
    """Seconds of each phase, on this worker."""
    recomputed_share: float

    @property
    def rows_per_s(self) -> float:
        """Rows of the global batches a second."""
        return self.rows / self.seconds


class Training:
    """What `train_loop` does on a worker, without Ray and without files: planned batches, made ahead, real steps."""

    def __init__(self, rank: int, world_size: int, recipe: Recipe) -> None:
        keep_freed_memory()
        self._recipe, self._rank, self._world_size = recipe, rank, world_size
        self._shards = Shards.open(recipe.shards_dir())
        encoder = load_student(recipe, "cpu")
        self.engine = make_engine(encoder.model, recipe.train, world_size)
        encoder.model = self.engine.module
        self._encoder, self._clock = encoder, PhaseClock(encoder.device)
        memory = probe(encoder, recipe.train)
        self._stepper = Stepper(encoder, self.engine, recipe.loss, recipe.train, memory, self._clock, rank)
        planner = planner_for(self._shards, recipe)
        self._epoch_steps = [len(planner.epoch(epoch)) for epoch in range(_EPOCHS)]
        lengths, texts_of = self._shards.texts.lengths, self._shards.triplets.texts_of
        tokens = [int(lengths[texts_of(rows)].sum()) for rows in planner.epoch(0)]
        self._largest_batch = planner.epoch(0)[int(np.argmax(tokens))]
        self._batches = made_ahead(self._planned())
        self._rates, self._epoch, self._number = Rates(1), 0, 0

    def __call__(self, order: str) -> Turn:
        """`warm`: one step, of the largest batch, so that its memory is there. `step`: one step of the plan.
        `epoch`: all steps of the next epoch.
        """
        started = time.perf_counter()
        if order == "warm":
            batch = make_batch(
                self._encoder, self._shards, self._largest_batch, self._recipe, self._rank, self._world_size
            )
            steps: Iterator[tuple[int, WorkerBatch]] = iter([(0, batch)])
            count = 1
        else:
            count = 1 if order == "step" else self._epoch_steps[self._epoch]
            self._epoch += order == "epoch"
            steps = self._batches
        return self._steps(steps, count, started)

    def _planned(self) -> Iterator[tuple[int, WorkerBatch]]:
        for step, _, rows in batches_from(self._shards, self._recipe, self._epoch_steps, 0):
            yield (
                step,
                make_batch(self._encoder, self._shards, rows, self._recipe, self._rank, self._world_size),
            )

    def _steps(self, steps: Iterator[tuple[int, WorkerBatch]], count: int, started: float) -> Turn:
        rows, recomputed, padded = 0, 0.0, 1.0
        phases = dict.fromkeys(PHASES, 0.0)
        for _ in range(count):
            with self._clock("data"):
                step, batch = next(steps)
            set_learning_rate(self.engine, self._recipe.train.learning_rate)
            sums = self._stepper.step(step, batch)
            line = global_metrics(sums, self._clock, batch.size, self._rates)
            self.engine.get_global_grad_norm()
            rows += batch.size
            recomputed, padded = recomputed + sums.recomputed_tokens, padded + sums.padded_tokens
            for phase, seconds in line["phases"].items():
                phases[phase] += seconds[self._rank]
        return Turn(time.perf_counter() - started, rows, count, phases, recomputed / padded)


class StudentAlone:
    """The ceiling: random batches, all of a batch's texts sorted by length in chunks of 32, each chunk forward and
    backward once, fused AdamW; no guide, no loss, tokens at hand.
    """

    def __init__(self, rank: int, world_size: int, recipe: Recipe, dropout: bool, keep_memory: bool) -> None:
        if keep_memory:
            keep_freed_memory()
        shards = Shards.open(recipe.shards_dir())
        triplets = shards.triplets
        self._texts = np.stack([triplets.query, triplets.positive, triplets.negatives], axis=1)
        self._tokens = shards.texts.tokens(np.arange(shards.texts.num_texts))
        self._encoder = load_model(recipe.student)
        self._encoder.model.train(dropout)
        self._optimizer = torch.optim.AdamW(self._encoder.model.parameters(), lr=2e-5, fused=True)
        self._batch_size = recipe.train.batch_size
        self._random = np.random.default_rng(0)

    def __call__(self, order: str) -> float:
        """`warm`: one step. `epoch`: every row once. Returns rows a second."""
        order_of_rows = self._random.permutation(len(self._texts))
        if order == "warm":
            order_of_rows = order_of_rows[: self._batch_size]
        started = time.perf_counter()
        for start in range(0, len(order_of_rows), self._batch_size):
            self._step(self._texts[order_of_rows[start : start + self._batch_size]].reshape(-1))
        return len(order_of_rows) / (time.perf_counter() - started)

    def _step(self, texts: np.ndarray) -> None:
        texts = np.array(sorted(texts, key=lambda text: -len(self._tokens[text])))
        for start in range(0, len(texts), _CHUNK):
            ids, mask = self._encoder.padded([self._tokens[text] for text in texts[start : start + _CHUNK]])
            vectors = self._encoder.forward(ids, mask)
            vectors.backward(torch.full_like(vectors, 1e-3))
        self._optimizer.step()
        self._optimizer.zero_grad()


def show(name: str, turn: Turn) -> None:
    """One line about a turn, for whoever watches."""
    phases = " ".join(f"{phase} {seconds:.2f}" for phase, seconds in turn.phases.items() if seconds > 0.005)
    text = f"  {name}: {turn.rows} rows, {turn.steps} steps, {turn.seconds:.1f} s, {turn.rows_per_s:.1f} rows/s"
    print(f"{text}, recomputed {turn.recomputed_share:.0%}: {phases}", file=sys.stderr)


def slowest(turns: list[Any]) -> Any:
    """The slowest worker's turn: the others waited for it."""
    return max(turns, key=lambda turn: turn.seconds)
