"""Sequential mteb, as people run it: `evaluation_sequential.py MODEL DATA OUT` writes {task: score}."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import mteb
import torch
from sentence_transformers import SentenceTransformer

from gist_ray.evaluation.tasks import local_tasks

if __name__ == "__main__":
    model, data, out = sys.argv[1:]
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    results = mteb.evaluate(
        SentenceTransformer(model, device="cpu"),
        [task.make() for task in local_tasks(Path(data))],
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    scores = {result.task_name: result.get_score() for result in results.task_results}
    Path(out).write_text(json.dumps(scores))
