"""What evaluation's tests share."""

import contextlib
from pathlib import Path

import pytest

from gist_ray.evaluation import run, schedule
from tests.evaluation.in_process import here, local
from tests.evaluation.tiny_tasks import write_tiny_tasks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tasks(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def local_pool(monkeypatch):
    monkeypatch.setattr(run, "encoder_pool", local)
    monkeypatch.setattr(run, "connected", contextlib.nullcontext)
    monkeypatch.setattr(schedule, "outcomes", here)
