"""Checkpoints on a disk and in a bucket (moto, over HTTP)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gist_ray.training.checkpoint import SavedState, Snapshot
from gist_ray.training.storage import RunStorage, fetch


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"s3://runs/below?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    server.stop()


def snapshots(step: int) -> list[Snapshot]:
    """Both parts of a checkpoint."""
    weight = torch.arange(6.0) + step
    progress = {"step": step, "adam_step": step}
    parts = [
        {f"{kind}/{3 * p}/w": weight[3 * p : 3 * p + 3].clone() for kind in ("weight", "exp_avg")} for p in range(2)
    ]
    return [Snapshot(part, progress, number, 2) for number, part in enumerate(parts)]


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> RunStorage:
    where = str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket")
    return RunStorage.at(where, f"train-{request.node.callspec.id}")


def test_the_newest_whole_checkpoint_is_found_wherever_it_is(storage: RunStorage, tmp_path: Path):
    assert not storage.exists() and storage.newest() is None
    for step in (10, 20):
        for snapshot in snapshots(step):
            folder = storage.write(snapshot, f"step-{step:08d}-a")
            assert folder == f"{storage.path}/step-{step:08d}-a"
    storage.write(snapshots(30)[0], "step-00000030-a")  # its other part was never written
    found = storage.newest()
    assert storage.exists() and found == (
        f"{storage.path}/step-00000020-a",
        {"step": 20, "adam_step": 20, "parts": 2},
    )
    fetch(storage, found[0], tmp_path / "out")
    assert torch.equal(SavedState(tmp_path / "out").read("weight", "w", 0, 6), torch.arange(6.0) + 20)
    with storage.local(found[0]) as local:
        assert torch.equal(SavedState(local).read("weight", "w", 2, 3), torch.arange(6.0)[2:5] + 20)
    storage.delete()
    assert storage.newest() is None
    storage.delete()  # what is gone can be deleted again


def test_a_checkpoint_cut_short_is_passed_over(storage: RunStorage):
    for step in (1, 2):
        for snapshot in snapshots(step):
            storage.write(snapshot, f"step-{step:08d}-b")
    name = f"{storage.path}/step-00000002-b/state-00001-of-00002.safetensors"
    with storage.filesystem.open_input_stream(name) as stream:
        whole = stream.read()
    with storage.filesystem.open_output_stream(name) as stream:
        stream.write(whole[:-5])
    found = storage.newest()
    assert found is not None and found[1]["step"] == 1
    storage.delete()
