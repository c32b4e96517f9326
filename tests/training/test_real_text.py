"""Real triplets, a real student: two workers under ZeRO 1 lower the loss and raise held-out STSBenchmark."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gist_ray.encoder import Encoder
from gist_ray.evaluation.run import evaluate
from gist_ray.metrics import read_metrics
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.checkpoint import student_folder
from gist_ray.training.run import train

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)
def test_three_layers_learn_from_esnli(minilm: Path, shared: Path, tmp_path: Path, ray_session):
    recipe = parse_recipe(
        {
            "name": "esnli",
            "output_dir": str(tmp_path),
            "data": {"sources": [{"path": str(shared / "data/train/esnli.parquet"), "max_rows": 2000}]},
            "student": {"path": str(minilm), "layers": [0, 2, 4], "max_tokens": 64},
            "guide": {"path": str(minilm), "max_tokens": 128},
            "train": {"batch_size": 64, "learning_rate": 2e-4, "zero_stage": 1},
            "loss": {"temperature": 0.05},
            "cluster": {"num_workers": 2},
        }
    )
    checkpoint = train(recipe)
    losses = [line["loss"] for line in read_metrics(recipe.run_dir() / "metrics.jsonl")]
    assert len(losses) >= 2000 // 64 and np.mean(losses[-5:]) < np.mean(losses[:5])

    tasks = tmp_path / "tasks"
    shutil.copytree(shared / "data/eval/STSBenchmark", tasks / "STSBenchmark")
    before = Encoder.load(minilm, layers=[0, 2, 4], max_tokens=64).save(tmp_path / "before")
    scores = []
    for name, model in (("before", before), ("after", student_folder(checkpoint))):
        report = evaluate(model, output_dir=tmp_path / f"report-{name}", data=tasks)
        scores.append(json.loads((report / "report.json").read_text())["tasks"][0]["score"])
    print(
        f"loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-5:]):.3f}, STSBenchmark {scores[0]:.4f} -> {scores[1]:.4f}"
    )
    assert scores[1] > scores[0] + 0.01
