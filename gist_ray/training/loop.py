"""The training loop that every worker runs: no trainer class, no callbacks, its events in plain sight."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from gist_ray.config import Recipe
from gist_ray.data.plan import Planner
from gist_ray.data.shards import Shards
from gist_ray.metrics import Line, MetricsLog
from gist_ray.training.batch import made_ahead, make_batch
from gist_ray.training.checkpoint import Snapshot, restore
from gist_ray.training.collectives import gather_numbers
from gist_ray.training.engine import learning_rate_factor, make_engine, set_learning_rate
from gist_ray.training.memory import keep_freed_memory, probe
from gist_ray.training.phases import PHASES, PhaseClock
from gist_ray.training.prometheus import RayMetrics
from gist_ray.training.step import Stepper, StepSums
from gist_ray.training.storage import PREFIX, RunStorage
from gist_ray.training.student import load_student
from gist_ray.training.validation import SCORE, UNSCORED, held_out_rows, training_weights

Ids = npt.NDArray[np.int64]

_PREEMPTION_EVERY_S = 2.0
_LONGEST_WRITE_S = 600.0  # Ray Train skips a report, and its write, when another worker has died


def train_loop(settings: dict[str, Any]) -> None:
    """Train the student of `settings["recipe"]` on `settings["shards"]`; Ray Train calls this on every worker.

    `settings["epoch_steps"]` are the steps of each epoch, `settings["run_dir"]` is where the metrics go.
    """
    import ray.train

    recipe = Recipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(recipe.cluster.threads_per_worker)
    keep_freed_memory()
    shards = Shards.open(settings["shards"])
    device = str(ray.train.torch.get_device()) if recipe.cluster.gpus_per_worker else "cpu"
    encoder = load_student(recipe, device)
    engine = make_engine(encoder.model, recipe.train, world_size)
    encoder.model = engine.module
    run_storage = context.get_storage()
    saver = Saver(engine, RunStorage(run_storage.storage_filesystem, run_storage.experiment_fs_path), rank, world_size)
    start_step = saver.restore()
    clock = PhaseClock(encoder.device)
    stepper = Stepper(encoder, engine, recipe.loss, recipe.train, probe(encoder, recipe.train), clock, rank)
    epoch_steps: list[int] = settings["epoch_steps"]
    total_steps = sum(epoch_steps)
    log = None
    if rank == 0:
        log = MetricsLog(Path(settings["run_dir"]), start_step, [RayMetrics(recipe.name)])
        log.write_event({"step": start_step, "event": "start", "workers": world_size})

    plan = batches_from(shards, recipe, epoch_steps, start_step)
    batches = made_ahead(
        (step, epoch, make_batch(encoder, shards, rows, recipe, rank, world_size)) for step, epoch, rows in plan
    )
    rates, preemption = Rates(total_steps), Preemption()
    while True:
        with clock("data"):
            step, epoch, batch = next(batches, (None, 0, None))
        if step is None or batch is None:
            break
        learning_rate = recipe.train.learning_rate * learning_rate_factor(step, recipe.train, total_steps)
        set_learning_rate(engine, learning_rate)
        sums = stepper.step(step, batch)
        done = step + 1
        metrics = {"step": done, "total_steps": total_steps, "epoch": epoch, "learning_rate": learning_rate}
        metrics |= global_metrics(sums, clock, batch.size, rates)
        metrics |= {"grad_norm": sums.grad_norm, "eta_s": rates.eta_s(done), "rows_crc32": batch.rows_crc32}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"loss is {metrics['loss']} at step {done}; lower train.learning_rate")
        if log and (done % recipe.train.log_steps == 0 or done == total_steps):
            log.write(metrics)
        if done % recipe.train.checkpoint_steps == 0 or done == total_steps or preemption.is_near(metrics["clock_s"]):
            with clock("checkpoint"):
                stall_s = saver.save(metrics, recipe.validation.wanted)
            if log:
                log.write_event({"step": done, "event": "checkpoint", "stall_s": stall_s})
    if log:
        log.close()


def batches_from(
    shards: Shards, recipe: Recipe, epoch_steps: list[int], start_step: int
) -> Iterator[tuple[int, int, Ids]]:
    """Yield (step, epoch, global batch of row numbers) from `start_step` on; finished epochs are not planned again."""
    planner, step = planner_for(shards, recipe), 0
    for epoch, steps in enumerate(epoch_steps):
        if start_step < step + steps:
            plan = planner.epoch(epoch)
            for number in range(max(0, start_step - step), steps):
                yield step + number, epoch, plan[number]
        step += steps


def count_steps(planner: Planner, epochs: int) -> list[int]:
    """Optimizer steps of each epoch."""
    return [len(planner.epoch(epoch)) for epoch in range(epochs)]


def planner_for(shards: Shards, recipe: Recipe) -> Planner:
    """The planner of a recipe's batches. Rows held out for validation, and what would give them away, are not shown."""
    train, triplets = recipe.train, shards.triplets
    of_source = np.array([source.weight for source in recipe.data.sources])
    weights = None if (of_source == 1).all() else of_source[triplets.source]
    if recipe.validation.rows:
        held_out = held_out_rows(triplets, recipe.validation.rows, train.seed)
        weights = training_weights(triplets, held_out, weights)
    return Planner(
        triplets,
        shards.texts.lengths,
        batch_size=train.batch_size,
        seed=train.seed,
        weights=weights,
        task_temperature=train.task_temperature,
        length_window=train.length_window,
    )


class Saver:
    """Writes and restores the checkpoints of one attempt of a run, on one worker."""

    def __init__(self, engine: Any, storage: RunStorage, rank: int, world_size: int) -> None:
        self._engine, self._storage, self._rank, self._world_size = engine, storage, rank, world_size
        # An attempt that repeats a step must not write into the folder of the attempt before.
        self._attempt = secrets.token_hex(4)
        self._written = threading.Event()
        self._written.set()
        self._last: Snapshot | None = None

    def restore(self) -> int:
        """Load the newest whole checkpoint; returns its step, or 0 if there is none."""
        found = [self._storage.newest() if self._rank == 0 else None]
        if self._world_size > 1:
            dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        with self._storage.local(found[0][0]) as folder:
            step = int(restore(self._engine, folder)["step"])
            if self._world_size > 1:
                dist.barrier()  # no worker may leave, and delete, while another still reads (ray #57118)
        return step

    def save(self, metrics: Line, validated: bool) -> float:
        """Copy this worker's part and have it written while training goes on; returns the seconds it held training up.

        Every worker must call it.
        """
        import ray.train

        started = time.perf_counter()
        # One copy at a time: a disk that is slower than training must not fill the memory with what waits for it.
        reusable = self._last if self._written.wait(_LONGEST_WRITE_S) else None
        self._written.clear()
        progress = {"step": metrics["step"], "total_steps": metrics["total_steps"]}
        snapshot = Snapshot.take(self._engine, progress, self._rank, self._world_size, into=reusable)
        self._last, storage = snapshot, self._storage

        def write(_: Any, name: str) -> Any:
            try:
                return ray.train.Checkpoint(storage.write(snapshot, name), filesystem=storage.filesystem)
            finally:
                self._written.set()

        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if validated:
            numbers[SCORE] = UNSCORED
        ray.train.report(
            numbers,
            checkpoint=ray.train.Checkpoint(storage.path, filesystem=storage.filesystem),
            checkpoint_dir_name=f"{PREFIX}{metrics['step']:08d}-{self._attempt}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
            validation=(ray.train.ValidationTaskConfig(fn_kwargs={"step": metrics["step"]}) if validated else False),
        )
        return time.perf_counter() - started


class Rates:
    """Speed of the steps, and what is left."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._last = time.perf_counter()
        self._mean_s: float | None = None

    def seconds(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._mean_s = seconds if self._mean_s is None else 0.9 * self._mean_s + 0.1 * seconds
        return seconds

    def eta_s(self, step: int) -> float:
        """Seconds that the steps after `step` will take."""
        return (self._mean_s or 0.0) * (self._total_steps - step)


class Preemption:
    """Whether nodes are about to be taken away. Asked for seldom: it is a barrier over all workers."""

    def __init__(self) -> None:
        self._asked_s, self._saved = 0.0, False

    def is_near(self, clock_s: float) -> bool:
        """True once, when a node's end is announced. `clock_s` must be the same on every worker."""
        import ray.train

        if self._saved or clock_s - self._asked_s < _PREEMPTION_EVERY_S:
            return False
        self._asked_s = clock_s
        self._saved = ray.train.get_preemption_info() is not None
        return self._saved


def global_metrics(sums: StepSums, clock: PhaseClock, batch_size: int, rates: Rates) -> Line:
    """Metrics of the global batch, and each worker's seconds: one small gather over the workers."""
    own = [sums.loss, sums.hidden, sums.candidates, sums.tokens, sums.padded_tokens, sums.recomputed_tokens]
    gathered = gather_numbers([*own, *clock.read(), rates.seconds(), time.time()])
    loss, hidden, candidates, tokens, padded, recomputed = gathered[:, : len(own)].sum(0).tolist()
    phases = gathered[:, len(own) : len(own) + len(PHASES)].T.tolist()
    seconds, clock_s = gathered[0, -2:].tolist()
    return {
        "loss": loss / batch_size,
        "masked_share": hidden / max(1.0, candidates),
        "batch_size": batch_size,
        "examples_per_s": batch_size / seconds,
        "tokens_per_s": tokens / seconds,
        "padding_share": 1 - tokens / max(1.0, padded),
        "recomputed_share": recomputed / max(1.0, padded),
        "seconds": seconds,
        "clock_s": clock_s,
        "workers": len(gathered),
        "phases": dict(zip(PHASES, phases, strict=True)),
    }
