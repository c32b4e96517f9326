"""Small students: quality beside speed on one core, as CPU serving sees it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from figures import Figure
from quality_data import read_lines
from quality_runs import scores

REPEATS = 5


def small_figures(models: dict[str, Path], folder: Path) -> list[Figure]:
    """Mean score of each model on the development tasks of a study's folder, and its milliseconds a text."""
    tasks = folder / "data/development"
    points = {name: scores(model, tasks, folder / f"small/{name}") for name, model in models.items()}
    texts = [row["query"] for row in read_lines(folder / "data/paired.jsonl")][:512]
    speeds = milliseconds(models, texts)
    figures = []
    for name in models:
        mean, speed = float(np.mean(list(points[name].values()))), float(np.median(speeds[name]))
        figures.append(Figure(f"{name}: mean of the tasks", mean, "points"))
        figures.append(Figure(f"{name}: one text of {len(texts)}, one core", speed, "ms", None, speeds[name]))
    means = {name: float(np.mean(list(points[name].values()))) for name in models}
    draw_points(means, {name: float(np.median(found)) for name, found in speeds.items()}, folder / "small.png")
    return figures


def milliseconds(models: dict[str, Path], texts: list[str]) -> dict[str, list[float]]:
    """Milliseconds a text from string to vector, in batches of 32 on one thread, models in turn."""
    from gist_ray.serving.openvino_engine import OpenVinoEngine

    engines = {name: OpenVinoEngine.load(model) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(REPEATS + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            for first in range(0, len(texts), 32):
                engine.finish(engine.forward(engine.tokenize(texts[first : first + 32])))
            if turn:  # the first warms
                found[name].append((time.perf_counter() - started) / len(texts) * 1000)
    return found


def draw_points(means: dict[str, float], speeds: dict[str, float], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, mean in means.items():
        axis.plot(speeds[name], mean, "o")
        axis.annotate(name, (speeds[name], mean), xytext=(5, 4), textcoords="offset points", fontsize=9)
    axis.set_xscale("log")
    axis.margins(0.2, 0.1)  # room for the names
    axis.set_xlabel("milliseconds a text, one core")
    axis.set_ylabel("mean score of the development tasks")
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=120)
    plt.close(fig)
