from pathlib import Path

from gist_ray.metrics import MetricsLog, read_metrics


def test_metrics_after_the_checkpoint_are_taken_back(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # a kill in mid-write
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    MetricsLog(tmp_path, 2).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    MetricsLog(tmp_path, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert any(file.name.startswith("events") for file in (tmp_path / "tensorboard").iterdir())
