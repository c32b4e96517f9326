import shutil
from pathlib import Path

import pytest

from gist_ray.config import ClusterConfig, GuideConfig
from gist_ray.data.embedders import BlockEmbedder, EmbedderPool, actors_that_fit, guide_fingerprint
from gist_ray.data.texts import Piece, TextTable
from gist_ray.errors import InputError

PIECE = "unit-00000000-00000"


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    piece = Piece()
    for i in range(50):
        piece.number(f"text number {i}")
    folder = tmp_path / "staging"
    folder.mkdir()
    piece.write(folder / f"{PIECE}.texts")
    return folder


@pytest.fixture
def broken_guide(tiny_model: Path, tmp_path: Path) -> Path:
    """A guide whose weights are not numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, folder / "model.safetensors")
    return folder


def embedder(guide: GuideConfig, tmp_path: Path, expected=None) -> BlockEmbedder:
    return BlockEmbedder(guide, expected or guide_fingerprint(guide), tmp_path / "vectors", ClusterConfig(), None)


def test_a_guide_that_gives_no_vector_is_named_and_nothing_is_kept(broken_guide: Path, staging: Path, tmp_path: Path):
    actor = embedder(GuideConfig(path=str(broken_guide)), tmp_path)
    report = actor.embed(0, 1, staging, [PIECE], tmp_path / "texts")
    assert "gives no vector" in report["error"] and "text number" in report["error"]
    assert not list((tmp_path / "vectors").rglob("*.arrow")) and not list(tmp_path.glob("texts/*.arrow"))


def test_another_guide_on_a_node_is_refused(tiny_model: Path, staging: Path, tmp_path: Path):
    guide = GuideConfig(path=str(tiny_model))
    report = embedder(guide, tmp_path, guide_fingerprint(guide) | {"weights": "0"}).embed(
        0, 1, staging, [PIECE], tmp_path
    )
    assert "another model on this node" in report["error"]


def test_a_pool_says_what_its_actors_met(ray_session, tiny_model: Path, staging: Path, tmp_path: Path):
    guide = GuideConfig(path=str(tiny_model), max_tokens=4_096)  # more than its positions
    cluster = ClusterConfig(data_workers=1)
    with (
        EmbedderPool(guide, tmp_path / "vectors", cluster) as pool,
        pytest.raises(InputError, match="max_tokens 4096 is above"),
    ):
        pool.embed(staging, [PIECE], 50, tmp_path / "texts")


def test_more_workers_than_the_cluster_holds_do_not_hang(ray_session, tiny_model: Path, staging: Path, tmp_path: Path):
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    assert actors_that_fit(ClusterConfig(data_workers=cpus + 60)) == cpus
    assert actors_that_fit(ClusterConfig(data_workers=1)) == 1
    with pytest.raises(InputError, match=r"has [\d.]+ CPUs and 0 GPUs"):
        actors_that_fit(ClusterConfig(gpus_per_worker=1))
    guide = GuideConfig(path=str(tiny_model))
    with EmbedderPool(guide, tmp_path / "vectors", ClusterConfig(data_workers=cpus + 60)) as pool:
        [report] = pool.embed(staging, [PIECE], 50, tmp_path / "texts")
    assert report["texts"] == report["embedded"] == 50 == TextTable(tmp_path / "texts").num_texts
