"""Converted models, kept on this machine's disk from start to start: converting takes most of a replica's start."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from gist_ray.encoder import Encoder, fingerprint
from gist_ray.manifest import digest_of
from gist_ray.openvino_model import converted, written

log = logging.getLogger(__name__)

CACHE_VARIABLE = "GIST_RAY_CACHE"
"""Environment variable with the folder for what can be made again; unset: `gist-ray` in the user's cache."""
KEPT = 8
"""The models used last; each takes the bytes of its weights in fp32."""
_MODEL = "model.xml"


def converted_file(model: str | Path) -> Path | None:
    """The OpenVINO file of a model folder or Hub id, made if it is not there; None where it cannot be kept.

    It is found by the content of the weights, so a folder whose weights change has another.

    Raises:
        InputError: as `Encoder.load` and `converted`.
    """
    known = fingerprint(model, revision=None, max_tokens=None, pooling=None, prompt="")
    made_from = {name: known[name] for name in ("weights", "pooling")} | {"openvino": version("openvino"), "version": 1}
    folder = cache_folder() / "openvino" / digest_of(made_from)[:32]
    try:
        if not (folder / _MODEL).is_file():
            _make(model, folder)
        os.utime(folder)  # used now
        _forget(folder.parent)
    except OSError as error:  # no home, read-only, full
        log.warning("a converted model cannot be kept (%s); each start converts it. Set %s", error, CACHE_VARIABLE)
        return None
    return folder / _MODEL


def cache_folder() -> Path:
    """Where things are kept that can be made again."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gist-ray"


def _make(model: str | Path, folder: Path) -> None:
    """Write it beside, then by rename, so that what is there is whole. Of processes that start together, one does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.parent.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel, however this process ends
        if not (folder / _MODEL).is_file():
            _write(model, folder)


def _write(model: str | Path, folder: Path) -> None:
    encoder = Encoder.load(model)
    needed = 5 * sum(parameter.numel() for parameter in encoder.model.parameters())  # fp32, and room for others
    if (free := shutil.disk_usage(folder.parent).free) < needed:  # OpenVINO does not tell of a disk that fills up
        raise OSError(f"{folder.parent} has {free / 1e6:.0f} MB left, {needed / 1e6:.0f} MB are needed")
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        written(converted(encoder), unfinished / _MODEL)
        unfinished.rename(folder)
    except OSError:
        if not (folder / _MODEL).is_file():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget(place: Path) -> None:
    """Remove all but the models used last. Who has one open keeps it: the kernel holds its bytes."""
    models = [folder for folder in place.iterdir() if not folder.name.startswith(".")]
    for folder in sorted(models, key=lambda folder: folder.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
