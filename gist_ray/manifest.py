"""Manifest: what makes a directory a finished artifact, and what it was made from.

`manifest.json` is written last and by rename, so "the manifest exists" means "the artifact is whole".
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gist_ray.errors import InputError

MANIFEST = "manifest.json"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished artifact, or None where there is none.

    Raises:
        InputError: the manifest exists but is not JSON.
    """
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); remove {directory} and run the stage again") from error
    return manifest


def finished(
    directory: Path, kind: str, fingerprint: dict[str, Any], *, shown: Path | None = None
) -> dict[str, Any] | None:
    """Return the manifest if `directory` holds this very artifact, None if the stage must run.

    `shown` is what messages call the artifact, where that is a file whose manifest lies beside it.

    Raises:
        InputError: the directory holds a finished artifact of another kind or made from something else.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    if manifest.get("kind") != kind:
        raise InputError(
            f"{shown or directory} holds a finished {manifest.get('kind')}, not {kind}; choose another folder"
        )
    differing = differences(manifest["fingerprint"], json.loads(json.dumps(fingerprint)))
    if differing:
        raise InputError(
            f"{shown or directory} was made from something else: {'; '.join(differing)}. "
            f"Remove it, or give this run another {'output' if shown else '`name`'}"
        )
    return manifest


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Name every leaf in which two JSON trees differ, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [found for i in range(len(old)) for found in differences(old[i], new[i], f"{place}[{i}]")]
    return [] if old == new else [f"{place}: {_short(old)} -> {_short(new)}"]


def write_manifest(directory: Path, kind: str, fingerprint: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Finish an artifact: write `manifest.json` through a temporary name, and return what was written."""
    manifest = {"kind": kind, "fingerprint": fingerprint, **facts}
    write_json(directory / MANIFEST, manifest)
    return manifest


def write_json(file: Path, value: Any) -> None:
    """Write JSON as `write_whole`."""
    # A lone surrogate (a file name that is not UTF-8, say) is written as its JSON escape, and read back as it was.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(file, text.encode("utf-8", "backslashreplace"))


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def digest_of(value: Any) -> str:
    """Sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_files(files: list[Path]) -> str:
    """Sha256 over the content of files, in the order given."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                whole.update(block)
    return whole.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
