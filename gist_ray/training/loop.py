"""The training loop that every worker runs: no trainer class, no callbacks, five events in plain sight."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from gist_ray.config import Recipe
from gist_ray.data.plan import Planner, worker_rows
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder, load_model
from gist_ray.metrics import MetricsLog
from gist_ray.training.checkpoint import restore, written_checkpoint
from gist_ray.training.collectives import gather_rows
from gist_ray.training.engine import make_engine
from gist_ray.training.loss import Candidates, guided_contrastive_loss

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepSums:
    """Sums over the rows of one worker; added over workers they describe the global batch."""

    loss: float
    hidden: float
    candidates: float
    tokens: float


def train_loop(settings: dict[str, Any]) -> None:
    """Train the student of `settings["recipe"]` on `settings["shards"]`; Ray Train calls this on every worker.

    `settings["epoch_steps"]` are the steps of each epoch, `settings["run_dir"]` is where the metrics go.
    """
    import ray.train

    recipe = Recipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(recipe.cluster.threads_per_worker)
    shards = Shards.open(settings["shards"])
    device = str(ray.train.torch.get_device()) if recipe.cluster.gpus_per_worker else "cpu"
    encoder = load_model(recipe.student, layers=recipe.student.layers, device=device)
    set_dropout(encoder.model, recipe.train.dropout)
    encoder.model.train()

    epoch_steps: list[int] = settings["epoch_steps"]
    total_steps = sum(epoch_steps)
    engine = make_engine(encoder.model, recipe.train, total_steps, world_size)
    encoder.model = engine.module
    start_step, last = 0, ray.train.get_checkpoint()
    if last:
        with last.as_directory() as folder:
            start_step = restore(engine, Path(folder))["step"]
            dist.barrier()  # no worker may leave, and delete, while another still reads (ray #57118)

    log = MetricsLog(Path(settings["run_dir"]), start_step) if rank == 0 else None
    for step, batch in batches_from(shards, recipe, epoch_steps, start_step):
        started = time.perf_counter()
        seed_step(recipe.train.seed, step, rank)
        learning_rate = engine.get_lr()[0]
        loss, sums = batch_loss(encoder, shards, batch, recipe, rank, world_size)
        engine.backward(loss)
        engine.step()
        done = step + 1
        metrics = {"step": done, "total_steps": total_steps, "learning_rate": learning_rate, **totals(sums, len(batch))}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"loss is {metrics['loss']} at step {done}; lower train.learning_rate")
        seconds = time.perf_counter() - started
        metrics |= {"examples_per_s": len(batch) / seconds, "tokens_per_s": metrics.pop("tokens") / seconds}
        if log and (done % recipe.train.log_steps == 0 or done == total_steps):
            log.write(metrics)
        if done % recipe.train.checkpoint_steps == 0 or done == total_steps:
            with written_checkpoint(engine, encoder, {"step": done, "total_steps": total_steps}, rank) as folder:
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    if log:
        log.close()


def batches_from(shards: Shards, recipe: Recipe, epoch_steps: list[int], start_step: int) -> Iterator[tuple[int, Ids]]:
    """Yield (step, global batch of row numbers) from `start_step` to the end; finished epochs are not planned again."""
    planner, step = planner_for(shards, recipe), 0
    for epoch, steps in enumerate(epoch_steps):
        if start_step < step + steps:
            plan = planner.epoch(epoch)
            for number in range(max(0, start_step - step), steps):
                yield step + number, plan[number]
        step += steps


def count_steps(shards: Shards, recipe: Recipe) -> list[int]:
    """Optimizer steps of each epoch."""
    planner = planner_for(shards, recipe)
    return [len(planner.epoch(epoch)) for epoch in range(recipe.train.epochs)]


def planner_for(shards: Shards, recipe: Recipe) -> Planner:
    """The planner of a recipe's batches."""
    train = recipe.train
    weights = np.array([source.weight for source in recipe.data.sources])
    return Planner(
        shards.triplets,
        shards.texts.lengths,
        batch_size=train.batch_size,
        seed=train.seed,
        weights=None if (weights == 1).all() else weights[shards.triplets.source],
        task_temperature=train.task_temperature,
        length_window=train.length_window,
    )


def batch_loss(
    encoder: Encoder, shards: Shards, batch: Ids, recipe: Recipe, rank: int, world_size: int
) -> tuple[Tensor, StepSums]:
    """Loss to backpropagate on this worker for a global batch, and the sums to report.

    Each worker embeds the distinct texts of its own rows and gathers the others' vectors. Which worker holds which
    text follows from the plan, so only vectors travel. The returned loss is (world_size / B) * sum of own row losses:
    DeepSpeed's mean over workers makes it the mean over the batch.
    """
    triplets, lengths = shards.triplets, shards.texts.lengths
    weights = lengths[triplets.query[batch]] + lengths[triplets.positive[batch]]
    rows_of = [worker_rows(batch, weights, r, world_size) for r in range(world_size)]
    texts_of = [triplets.texts_of(rows) for rows in rows_of]
    own = texts_of[rank]
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        if len(own):
            vectors = encoder.embed(shards.texts.tokens(own), batch_tokens=recipe.train.chunk_tokens)
        else:  # fewer rows than workers: take part in the collectives with no rows, but through the model
            vectors = encoder.embed(shards.texts.tokens(texts_of[0][:1]))[:0]
    everyone = gather_rows(vectors, [len(texts) for texts in texts_of])

    held = np.concatenate(texts_of)
    device = everyone.device
    pool = Candidates(
        everyone, torch.from_numpy(shards.texts.guide(held)).to(device), torch.from_numpy(held).to(device)
    )
    order = np.argsort(held, kind="stable")

    def role(texts: Ids) -> Candidates:
        place = order[np.searchsorted(held, texts, sorter=order)]
        return pool.rows(torch.from_numpy(place).to(device))

    global_rows = np.concatenate(rows_of)
    start = sum(map(len, rows_of[:rank]))
    result = guided_contrastive_loss(
        role(triplets.query[global_rows]),
        role(triplets.positive[global_rows]),
        role(triplets.negatives_of(global_rows)),
        torch.arange(start, start + len(rows_of[rank]), device=device),
        recipe.loss,
    )
    loss = result.loss.sum() * (world_size / len(batch))
    sums = StepSums(
        loss=float(result.loss.detach().sum()),
        hidden=float(result.hidden),
        candidates=float(result.candidates),
        tokens=float(lengths[own].sum()),
    )
    return loss, sums


def totals(sums: StepSums, batch_size: int) -> dict[str, float]:
    """Metrics of the global batch: one small reduction over the workers."""
    values = torch.tensor([sums.loss, sums.hidden, sums.candidates, sums.tokens], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_backend() == "nccl":
            values = values.cuda()
        dist.all_reduce(values)
    loss, hidden, candidates, tokens = values.tolist()
    return {"loss": loss / batch_size, "masked_share": hidden / max(1.0, candidates), "tokens": tokens}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on (seed, step, worker) alone, so a resumed run repeats it exactly."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def set_dropout(model: torch.nn.Module, dropout: float | None) -> None:
    """Set every dropout of a model, unless None."""
    if dropout is None:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
