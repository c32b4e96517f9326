"""train: shards in, checkpoint out. Ray Train runs the loop on the workers and restarts it when one dies."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from gist_ray.cluster import connected
from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.encoder import model_fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, read_manifest, write_manifest
from gist_ray.metrics import EVENTS, METRICS, TENSORBOARD, VALIDATIONS, remove_logs
from gist_ray.training.checkpoint import KIND, STUDENT, trained_student
from gist_ray.training.crowding import crowded_tasks
from gist_ray.training.engine import deepspeed_config
from gist_ray.training.loop import count_steps, planner_for, train_loop
from gist_ray.training.loss import check_dims
from gist_ray.training.progress import progress
from gist_ray.training.report import TRAIN_REPORT_PAGE, write_train_report
from gist_ray.training.storage import RunStorage, fetch
from gist_ray.training.student import load_student
from gist_ray.training.tracking import check_trackers, tracked
from gist_ray.training.validation import SCORE, best_checkpoint, ray_validation

log = logging.getLogger(__name__)

_RESIZE_EVERY_S = 30.0  # how often an elastic run looks for more workers


class TrainingStopped(RuntimeError):
    """Training failed more often than it may, or its cluster is gone. The run can be resumed."""


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Fine-tune the student of a recipe and return the checkpoint folder; at once if it is already there.

    Prepares the shards first if need be. `resume` continues a run whose driver died, on any number of workers; workers
    that die meanwhile are replaced, and go on from the last checkpoint, without it.

    Raises:
        InputError: bad recipe parts, a checkpoint made from something else, or an unfinished run without `resume`.
        TrainingStopped: training failed more than `cluster.max_failures` times, or the cluster is gone.
    """
    out = recipe.checkpoint_dir()
    deepspeed_config(recipe.train, recipe.cluster.max_workers())
    shards_dir = prepare(recipe)
    made_from = checkpoint_fingerprint(recipe, shards_dir)
    if finished(out, KIND, made_from):
        return out
    # What is wrong with the student fails here, not on every worker.
    check_dims(recipe.loss, load_student(recipe, "cpu", training=False).dim)
    check_trackers(recipe)
    run_dir, run_name = recipe.run_dir(), f"train-{digest_of(made_from)[:8]}"
    storage_path = recipe.train.storage_path or str(run_dir)
    storage = RunStorage.at(storage_path, run_name)
    if storage.exists() and not resume:
        raise InputError(
            f"{storage.path} is an unfinished run of this very recipe; "
            "continue it with --resume, or remove that folder to start again"
        )
    if not storage.exists():
        remove_logs(run_dir)
    shards = Shards.open(shards_dir)
    planner = planner_for(shards, recipe)
    epoch_steps = count_steps(planner, recipe.train.epochs)
    total_steps = sum(epoch_steps)
    for crowded in crowded_tasks(shards, planner.epoch(0), recipe.train.batch_size):
        log.warning("train: %s", crowded)
    log.info("train: %d steps of %d triplets", total_steps, recipe.train.batch_size)
    log.info("train: each step in %s, curves by `tensorboard --logdir %s`", run_dir / METRICS, run_dir / TENSORBOARD)
    with connected(recipe.cluster), progress(run_dir / METRICS, total_steps), tracked(recipe, run_dir):
        result = _fit(recipe, shards_dir, epoch_steps, storage_path, run_name)
        folder, score = _chosen(recipe, storage, result)
        fetch(storage, folder, out)
    trained_student(recipe, out).save(out / STUDENT)
    for name in (METRICS, EVENTS, VALIDATIONS):
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, out / name)
    write_train_report(run_dir, recipe, out)
    log.info("train: how it went in %s", out / TRAIN_REPORT_PAGE)
    facts = {"recipe": recipe.model_dump(mode="json"), "steps": total_steps, "validation": score}
    write_manifest(out, KIND, made_from, **facts)
    storage.delete()
    return out


def checkpoint_fingerprint(recipe: Recipe, shards_dir: Path) -> dict[str, Any]:
    """What decides the trained weights: shards, student, loss, training and validation sections.

    The number of workers and the memory there is are not in it: they change rounding, not the batches.
    """
    shards = read_manifest(shards_dir)
    assert shards is not None, "prepare returns finished shards"
    passive = {"log_steps", "checkpoint_steps", "keep_checkpoints", "activation_mb", "storage_path"}
    return {
        "shards": digest_of(shards["fingerprint"]),
        "student": model_fingerprint(recipe.student) | {"layers": recipe.student.layers},
        "loss": recipe.loss.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=passive),
        "held_out_rows": recipe.validation.rows,
        "source_weights": [source.weight for source in recipe.data.sources],
    }


def _fit(recipe: Recipe, shards_dir: Path, epoch_steps: list[int], storage_path: str, run_name: str) -> Any:
    """Run Ray Train to the end."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster, validated = recipe.cluster, recipe.validation.wanted
    gpus = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpus else {})
    ranked = {"checkpoint_score_attribute": SCORE, "checkpoint_score_order": "max"} if validated else {}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "shards": str(shards_dir),
            "epoch_steps": epoch_steps,
            "run_dir": str(recipe.run_dir()),
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=gpus,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.train.keep_checkpoints, **ranked),
        ),
        validation_config=ray_validation(recipe, shards_dir) if validated else None,
    )
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except (TrainingFailedError, RayError) as error:
        causes = list(getattr(error, "worker_failures", {}).values()) or [error]
        for cause in causes:
            if isinstance(getattr(cause, "cause", cause), InputError):
                raise cause from error
        raise TrainingStopped(
            f"training stopped: {_last_line(causes[0])}; its checkpoints are kept, --resume goes on from the last one"
        ) from error


def _last_line(error: BaseException) -> str:
    """What an error says in the end: Ray's begin with the traceback of the worker."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _chosen(recipe: Recipe, storage: RunStorage, result: Any) -> tuple[str, float | None]:
    """Folder of the checkpoint that is the result: the best one, or the last; and its score."""
    if recipe.validation.wanted:
        checkpoint, metrics = best_checkpoint(result)
        if checkpoint is not None:
            return str(checkpoint.path), metrics.get(SCORE)
    newest = storage.newest()
    assert newest is not None, "the loop saves a checkpoint at its last step"
    return newest[0], None
