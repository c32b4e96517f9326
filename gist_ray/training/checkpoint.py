"""Checkpoint: the student as a model folder, DeepSpeed's state, and the progress of the run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest, write_json

KIND = "checkpoint"
STUDENT = "student"
PROGRESS = "progress.json"
_TAG = "deepspeed"


@contextmanager
def written_checkpoint(engine: Any, encoder: Encoder, progress: dict[str, Any], rank: int) -> Iterator[Path]:
    """Write this worker's part of a checkpoint to a temporary folder, for Ray Train to collect.

    Every worker must call it: ZeRO shards are written by all, the student and the progress by worker 0.
    """
    folder = Path(tempfile.mkdtemp(prefix="gist-ray-checkpoint-"))
    try:
        engine.save_checkpoint(str(folder), tag=_TAG)
        if rank == 0:
            encoder.save(folder / STUDENT)
            write_json(folder / PROGRESS, progress)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def restore(engine: Any, folder: Path) -> dict[str, Any]:
    """Load DeepSpeed's state into the engine and return the progress. The number of workers must be the same."""
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return progress


def student_folder(checkpoint: Path) -> Path:
    """Model folder inside a finished checkpoint.

    Raises:
        InputError: the folder is not a finished checkpoint.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest.get("kind") != KIND:
        raise InputError(f"{checkpoint} is not a finished checkpoint; give the folder that `gist-ray train` printed")
    return checkpoint / STUDENT
