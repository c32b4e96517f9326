"""train: shards in, checkpoint out. Ray Train runs the loop on the workers and restarts it when one dies."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gist_ray.cluster import connected
from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.encoder import load_model, model_fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, read_manifest, write_json, write_manifest
from gist_ray.metrics import METRICS, read_metrics
from gist_ray.training.checkpoint import KIND
from gist_ray.training.loop import count_steps, train_loop

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Fine-tune the student of a recipe and return the checkpoint folder; at once if it is already there.

    Prepares the shards first if need be. `resume` continues a run whose driver died; workers that die meanwhile are
    restarted from the last checkpoint without it.

    Raises:
        InputError: bad recipe parts, a checkpoint made from something else, or an unfinished run without `resume`.
        ray.train.v2.api.exceptions.TrainingFailedError: training failed more than `cluster.max_failures` times.
    """
    out = recipe.checkpoint_dir()
    shards_dir = prepare(recipe)
    made_from = checkpoint_fingerprint(recipe, shards_dir)
    if finished(out, KIND, made_from):
        return out
    load_model(recipe.student, layers=recipe.student.layers)  # a wrong student fails here, not on every worker
    run_name = f"train-{digest_of(made_from)[:8]}"
    run_dir = recipe.run_dir()
    if (run_dir / run_name).exists() and not resume:
        raise InputError(
            f"{run_dir / run_name} is an unfinished run of this very recipe; "
            "continue it with --resume, or remove that folder to start again"
        )
    _check_workers(recipe, run_dir / run_name)
    if not (run_dir / run_name).exists():
        (run_dir / METRICS).unlink(missing_ok=True)
    epoch_steps = count_steps(Shards.open(shards_dir), recipe)
    total_steps = sum(epoch_steps)
    log.info(
        "train: %d steps of %d triplets on %d workers", total_steps, recipe.train.batch_size, recipe.cluster.num_workers
    )
    with connected(recipe.cluster), _progress(run_dir / METRICS, total_steps):
        checkpoint = _fit(recipe, shards_dir, epoch_steps, run_name)
        shutil.rmtree(out, ignore_errors=True)
        checkpoint.to_directory(str(out))
    shutil.copyfile(run_dir / METRICS, out / METRICS)
    write_manifest(out, KIND, made_from, recipe=recipe.model_dump(mode="json"), steps=total_steps)
    shutil.rmtree(run_dir / run_name)
    (run_dir / run_name).with_suffix(".json").unlink()
    return out


def checkpoint_fingerprint(recipe: Recipe, shards_dir: Path) -> dict[str, Any]:
    """What decides the trained weights: shards, student, loss, training section.

    The number of workers is not in it: it changes rounding and dropout, not the batches.
    """
    shards = read_manifest(shards_dir)
    assert shards is not None, "prepare returns finished shards"
    passive = {"log_steps", "checkpoint_steps", "keep_checkpoints"}
    return {
        "shards": digest_of(shards["fingerprint"]),
        "student": model_fingerprint(recipe.student) | {"layers": recipe.student.layers},
        "loss": recipe.loss.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude=passive),
        "source_weights": [source.weight for source in recipe.data.sources],
    }


def _check_workers(recipe: Recipe, run: Path) -> None:
    """DeepSpeed loads a ZeRO checkpoint on the same number of workers only: say so before Ray starts.

    The number is kept beside the run's folder, which is Ray Train's own.
    """
    file = run.with_suffix(".json")
    workers = {"num_workers": recipe.cluster.num_workers}
    if run.exists() and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != workers and recipe.train.zero_stage > 0:
            raise InputError(
                f"{run} was started on {before['num_workers']} workers and ZeRO {recipe.train.zero_stage} cannot "
                f"resume it on {workers['num_workers']}; set cluster.num_workers back, or remove {run} to start again"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, workers)


def _fit(recipe: Recipe, shards_dir: Path, epoch_steps: list[int], run_name: str) -> Any:
    """Run Ray Train to the end and return its last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = recipe.cluster
    gpus = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpus else {})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "shards": str(shards_dir),
            "epoch_steps": epoch_steps,
            "run_dir": str(recipe.run_dir()),
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=cluster.num_workers, use_gpu=gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name=run_name,
            storage_path=str(recipe.run_dir()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.train.keep_checkpoints),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None, "the loop reports a checkpoint at its last step"
    return checkpoint


@contextmanager
def _progress(metrics_file: Path, total_steps: int) -> Iterator[None]:
    """Show the run's own metrics file as a bar: workers may sit on other nodes, the file is where all can see it."""
    stop = threading.Event()

    def follow(bar: Any) -> None:
        while not stop.wait(0.5):
            show(bar)

    def show(bar: Any) -> None:
        lines = read_metrics(metrics_file)
        if lines:
            last = lines[-1]
            bar.n = int(last["step"])
            bar.set_postfix_str(
                f"loss {last['loss']:.3f}, masked {last['masked_share']:.1%}, {last['tokens_per_s']:.0f} tokens/s"
            )

    with tqdm(total=total_steps, desc="train", unit="step", disable=None) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            show(bar)
