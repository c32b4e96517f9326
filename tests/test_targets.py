"""Where Prometheus finds our Rays."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gist_ray.targets import listed, targets_folder


def test_a_ray_is_listed_while_it_runs_and_dead_ones_are_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIST_RAY_CACHE", str(tmp_path / "cache"))
    folder, host = targets_folder(), socket.gethostname()
    folder.mkdir(parents=True)
    alive, dead, elsewhere = (folder / f"{name}.json" for name in (f"{host}-1", f"{host}-4194999", "other-4194999"))
    for link in (alive, dead, elsewhere):
        link.symlink_to("/nowhere/prom.json")
    own = folder / f"{host}-{os.getpid()}.json"
    with listed(tmp_path / "ray"):
        assert set(folder.iterdir()) == {own, alive, elsewhere}
        assert own.readlink().parent == tmp_path / "ray"
    assert set(folder.iterdir()) == {alive, elsewhere}


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIST_RAY_CACHE", str(tmp_path / "file"))
    with listed(tmp_path / "ray"):
        pass
