"""What holds training up beside its steps: checkpoints and waiting for data, in real runs on Ray Train."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from figures import Figure, median_figure, ratios
from training_shards import SHORT, minilm, random_vectors, real_rows, recipe_for, work_folder, write_shards
from training_students import Training

from gist_ray.config import Recipe
from gist_ray.metrics import METRICS, read_metrics
from gist_ray.training.checkpoint import Snapshot
from gist_ray.training.collectives import gather_numbers
from gist_ray.training.loop import Saver
from gist_ray.training.storage import PREFIX, RunStorage

_STEPS_BETWEEN = 3  # an upload has ended before the next save


def checkpoint_figures(quick: bool) -> list[Figure]:
    """Both parts in one Ray."""
    from gist_ray.cluster import connected

    batch_size, saves = (16, 2) if quick else (64, 5)
    recipe = recipe_for(
        "checkpoint",
        str(minilm()),
        train={"batch_size": batch_size},
        cluster={"num_workers": 2, "data_workers": 2, "threads_per_worker": 1},
    )
    write_shards(recipe, real_rows(SHORT, 8 * batch_size), random_vectors(384))
    with connected(recipe.cluster):
        return [*_stall_figures(recipe, saves), *_data_figures(quick)]


def _stall_figures(recipe: Recipe, saves: int) -> list[Figure]:
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    file = work_folder() / "stalls.json"
    TorchTrainer(
        saving_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "saves": saves, "file": str(file)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="stalls", storage_path=str(work_folder()), checkpoint_config=CheckpointConfig(num_to_keep=2)
        ),
    ).fit()
    found: dict[str, list[float]] = json.loads(file.read_text())
    what = f"checkpoint, all-MiniLM-L6-v2, 2 workers, ZeRO {recipe.train.zero_stage}"
    return [
        median_figure(f"{what}: seconds a save holds up training", found["save"], "s"),
        median_figure(f"{what}: seconds of a synchronous save", found["synchronous"], "s"),
        median_figure(f"{what}: stall / synchronous save", ratios(found["save"], found["synchronous"]), "", "<= 0.2"),
        median_figure(
            f"{what}: the steps beside the writing / after a synchronous save",
            ratios(found["steps after save"], found["steps after synchronous"]),
            "x",
        ),
    ]


def saving_loop(settings: dict[str, Any]) -> None:
    """Real steps with saves between them: the loop's own, and the same written before training goes on, in turn."""
    import ray.train
    import torch

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    training = Training(rank, world_size, recipe)
    run_storage = context.get_storage()
    storage = RunStorage(run_storage.storage_filesystem, run_storage.experiment_fs_path)
    saver = Saver(training.engine, storage, rank, world_size)
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(float(gather_numbers([seconds]).max()))

    def steps() -> float:
        return sum(training("step").seconds for _ in range(_STEPS_BETWEEN))

    steps()
    for step in range(1, 2 * settings["saves"] + 1):
        metrics = {"step": step, "total_steps": 2 * settings["saves"]}
        kind = "save" if step % 2 else "synchronous"
        gather_numbers([0.0])  # all workers are here
        if kind == "save":
            seconds = saver.save(metrics, validated=False)
        else:
            seconds = save_synchronously(training.engine, storage, metrics, rank, world_size)
        note(kind, seconds)
        note(f"steps after {kind}", steps())
    if rank == 0:
        Path(settings["file"]).write_text(json.dumps(found))


def save_synchronously(engine: Any, storage: RunStorage, metrics: dict[str, Any], rank: int, world_size: int) -> float:
    """Seconds of what `Saver.save` does, with the upload awaited."""
    import ray.train

    started = time.perf_counter()
    snapshot = Snapshot.take(engine, metrics, rank, world_size)

    def write(_: Any, name: str) -> Any:
        return ray.train.Checkpoint(storage.write(snapshot, name), filesystem=storage.filesystem)

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint(storage.path, filesystem=storage.filesystem),
        checkpoint_dir_name=f"{PREFIX}{metrics['step']:08d}-synchronous",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
        checkpoint_upload_fn=write,
        delete_local_checkpoint_after_upload=False,
    )
    return time.perf_counter() - started


def _data_figures(quick: bool) -> list[Figure]:
    """Share of a real run's steps that waited for their batch; the first one, which had nobody before it, aside."""
    from gist_ray.training.run import train

    batch_size, count = (16, 96) if quick else (128, 1536)
    guide = str(minilm())
    recipe = recipe_for(
        "waiting",
        guide,
        train={"batch_size": batch_size},
        cluster={"num_workers": 1, "threads_per_worker": 2, "data_workers": 2},
    )
    pq.write_table(pa.Table.from_pylist(real_rows(SHORT, count)), recipe.data.sources[0].path)
    train(recipe)
    lines = read_metrics(recipe.run_dir() / METRICS)[1:]
    shares = [max(line["phases"]["data"]) / line["seconds"] for line in lines]
    whole = sum(max(line["phases"]["data"]) for line in lines) / sum(line["seconds"] for line in lines)
    name = f"waiting for data / step time, e-SNLI, batch {batch_size}, {len(lines)} steps"
    return [
        Figure(name, whole, "", "<= 0.02"),
        Figure(f"{name}: median step", statistics.median(shares)),
    ]
