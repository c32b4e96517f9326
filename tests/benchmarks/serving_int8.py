"""The int8 variant: how fast it is over HTTP, and what it costs in MTEB scores."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from data import SHARED, minilm
from figures import Figure
from serving_offline import offline_figures

CALIBRATION_ROWS = 1000


@cache
def int8_model() -> Path:
    """all-MiniLM-L6-v2 exported with `--int8`, calibrated with training texts: none that is measured on."""
    import pyarrow.parquet as pq

    from gist_ray.model_folder import export

    folder = Path(tempfile.mkdtemp(prefix="int8-"))
    texts: list[str] = []
    for name in ("quora.parquet", "medquad.parquet", "trivia.parquet"):
        columns = pq.read_table(SHARED / "train" / name, columns=["query", "pos"])[:CALIBRATION_ROWS].to_pydict()
        texts += [text for column in columns.values() for text in column]
    lines = folder / "texts.txt"
    lines.write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
    return export(minilm(), folder / "model", int8=True, texts=lines)


def int8_figures(quick: bool) -> list[Figure]:
    """Over HTTP by sentence-transformers offline, and the scores."""
    return [*offline_figures(quick, int8_model(), "int8", ">= 2.5"), *score_figures(quick)]


def score_figures(quick: bool) -> list[Figure]:
    """MTEB scores of fp32 and of int8 on the shared evaluation data, in points of 100."""
    from gist_ray.config import ClusterConfig
    from gist_ray.evaluation.report import read_report
    from gist_ray.evaluation.run import evaluate

    work, data = Path(tempfile.mkdtemp(prefix="scores-")), SHARED / "eval"
    if quick:
        data = work / "eval"
        for task in ("STSBenchmark", "Banking77Classification"):
            shutil.copytree(SHARED / "eval" / task, data / task)
    scores = {}
    for precision in ("fp32", "int8"):
        report = evaluate(
            int8_model(),
            output_dir=work / precision,
            data=data,
            precision=precision,
            cluster=ClusterConfig(data_workers=2),
        )
        tree = read_report(report)
        scores[precision] = {task["name"]: 100 * task["score"] for task in tree["tasks"]}
    lost = {task: scores["fp32"][task] - scores["int8"][task] for task in scores["fp32"]}
    for task, points in lost.items():
        print(f"  {task}: fp32 {scores['fp32'][task]:.2f}, int8 {scores['int8'][task]:.2f}, lost {points:+.2f}")
    name = f"MTEB, {len(lost)} tasks, int8"
    return [
        Figure(f"{name}: points lost on average", sum(lost.values()) / len(lost), "", "<= 0.5"),
        Figure(f"{name}: points lost on the worst task", max(lost.values()), "", "<= 1.0"),
    ]
