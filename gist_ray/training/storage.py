"""Storage: where a run's checkpoints are while it trains. A folder, or a bucket."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist_ray.training.checkpoint import Snapshot, progress_of

PREFIX = "step-"


class RunStorage:
    """The checkpoints of one run, on a pyarrow filesystem. Each has a folder `step-00000200-name`."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self.filesystem, self.path = filesystem, path

    @classmethod
    def at(cls, storage_path: str, run_name: str) -> RunStorage:
        """The storage of a run below a folder or a URI such as `s3://bucket/folder`."""
        from ray.train.v2._internal.execution.storage import get_fs_and_path

        filesystem, path = get_fs_and_path(storage_path)
        return cls(filesystem, f"{path}/{run_name}")

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """Folder and progress of the newest whole checkpoint. One that was cut short is passed over."""
        for name in self._names():
            progress = progress_of(f"{self.path}/{name}", self.filesystem)
            if progress is not None:
                return f"{self.path}/{name}", progress
        return None

    @contextmanager
    def local(self, folder: str) -> Iterator[Path]:
        """A checkpoint as a local folder: itself, or a copy for the length of the block."""
        import ray.train

        with ray.train.Checkpoint(folder, filesystem=self.filesystem).as_directory() as directory:
            yield Path(directory)

    def write(self, snapshot: Snapshot, name: str) -> str:
        """Write a part of the checkpoint `name` and return the checkpoint's folder.

        Raises:
            OSError: it cannot be written. The checkpoint is not whole then.
        """
        from pyarrow import fs

        folder = f"{self.path}/{name}"
        if isinstance(self.filesystem, fs.LocalFileSystem):
            snapshot.write(Path(folder))
            return folder
        with tempfile.TemporaryDirectory(prefix="gist-ray-checkpoint-") as local:
            snapshot.write(Path(local))
            for file in sorted(Path(local).iterdir(), reverse=True):  # state first: the part's file says it is whole
                fs.copy_files(str(file), f"{folder}/{file.name}", destination_filesystem=self.filesystem)
        return folder

    def exists(self) -> bool:
        """Whether the run has written anything."""
        from pyarrow import fs

        return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def delete(self) -> None:
        """Remove the run's folder."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def _names(self) -> list[str]:
        """Checkpoints, newest first."""
        from pyarrow import fs

        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted((entry.base_name for entry in found if entry.base_name.startswith(PREFIX)), reverse=True)


def fetch(storage: RunStorage, folder: str, out: Path) -> None:
    """Copy a checkpoint to a local folder, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    with storage.local(folder) as local:
        shutil.copytree(local, out)
