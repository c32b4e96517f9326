"""The study: the arms on the evaluation sets, several seeds, with intervals over seeds and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figures import Figure, median_figure
from quality_runs import TRAIN_SECONDS, Arm, Study, kinds, scores

# GIST-all-MiniLM-L6-v2 and its gains over all-MiniLM-L6-v2, as published.
PUBLISHED = {
    "Banking77Classification": 84.24,
    "EmotionClassification": 52.06,
    "TweetSentimentExtractionClassification": 59.85,
}
PUBLISHED_GAINS = {
    "Banking77Classification": 4.20,
    "EmotionClassification": 11.23,
    "TweetSentimentExtractionClassification": 5.81,
}
PUBLISHED_STS_GAINS = {"STSBenchmark": 2.37, "STS12": 2.67, "STS13": 2.66, "STS14": 3.03, "STS15": 1.64}
SAMPLES = 20_000
MINE_SECONDS = "mine-seconds.json"

Scores = dict[str, float]


def study_figures(study: Study, arms: Sequence[Arm], common: dict, seeds: Sequence[int], tasks: Path) -> list[Figure]:
    """`arms` are no guide, GISTEmbed and ours. The untouched student is scored too."""
    no_guide, gistembed, ours = arms
    reports = study.folder / "evaluation"
    found: dict[str, list[Scores]] = {}
    for seed in seeds:
        for arm in (ours, gistembed, no_guide):  # ours first: with the guide's table it makes
            scored = scores(study.model(arm, seed, common), tasks, reports / f"{arm.name}-{seed}")
            found.setdefault(arm.name, []).append(scored)
    untouched = scores(study.student, tasks, reports / "untouched")
    write_table(study.folder / "scores.json", {"untouched": [untouched], **found})
    draw_gains(untouched, found, study.folder / "gains.png")
    kind = kinds(reports / "untouched")
    gains = [{task: one[task] - untouched[task] for task in one} for one in found[ours.name]]
    # The first seed of ours, trained first, embeds the pairs; mining has embedded the labelled texts.
    seconds = [study.folder / MINE_SECONDS, study.folder / f"models/{ours.name}-{seeds[0]}" / TRAIN_SECONDS]
    minutes = sum(json.loads(file.read_text()) for file in seconds) / 60
    figures = [Figure("mining, guide table and training of ours, no vectors kept", minutes, "minutes", "<= 60")]
    for arm in arms:  # the guide's vectors are there, but for the very first
        files = [study.folder / f"models/{arm.name}-{seed}" / TRAIN_SECONDS for seed in seeds]
        figures.append(
            median_figure(f"training, {arm.name}", [json.loads(f.read_text()) / 60 for f in files], "minutes")
        )
    figures += [Figure("mean of all tasks, untouched", np.mean(list(untouched.values())), "points")]
    for name, runs in found.items():
        figures.append(median_figure(f"mean of all tasks, {name}", [np.mean(list(run.values())) for run in runs]))
    for other, runs in (
        ("untouched", [untouched] * len(seeds)),
        *((n, found[n]) for n in (no_guide.name, gistembed.name)),
    ):
        figures += difference_figures(f"ours less {other}", found[ours.name], runs)
    figures += category_figures(gains, kind)
    for task, published in PUBLISHED.items():
        if task in untouched:
            runs = [run[task] for run in found[ours.name]]
            figures.append(mean_figure(f"{task}, ours", runs, f">= {published}"))
    return figures + sts_figures(gains)


def mean_figure(name: str, runs: Sequence[float], goal: str | None = None, unit: str = "points") -> Figure:
    return Figure(name, float(np.mean(runs)), unit, goal, list(runs))


def difference_figures(name: str, one: list[Scores], other: list[Scores]) -> list[Figure]:
    """Mean over tasks and seeds, and the low end of its 95 % interval."""
    differences = np.array([[a[task] - b[task] for task in sorted(a)] for a, b in zip(one, other, strict=True)])
    low, high = interval(differences)
    return [
        Figure(f"{name}, mean of all tasks", differences.mean(), "points", None, differences.mean(1).tolist()),
        Figure(f"{name}, low end of the 95 % interval (high: {high:+.2f})", low, "points", "> 0"),
    ]


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Bootstrap of `differences [seeds, tasks]` over both: where their mean lies, at 95 %."""
    generator = np.random.default_rng(0)
    seeds, tasks = differences.shape
    rows = generator.integers(0, seeds, (SAMPLES, seeds))
    columns = generator.integers(0, tasks, (SAMPLES, tasks))
    means = differences[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def category_figures(gains: list[Scores], kind: dict[str, str]) -> list[Figure]:
    """Gain of each kind of task over the untouched student."""
    figures = []
    for name in sorted(set(kind.values())):
        runs = [float(np.mean([gain for task, gain in run.items() if kind[task] == name])) for run in gains]
        goal = ">= 4.0" if name == "Classification" else ">= -0.3"
        figures.append(mean_figure(f"gain of {name}, ours", runs, goal))
    return figures


def sts_figures(gains: list[Scores]) -> list[Figure]:
    """Share of the published gains on STS."""
    figures, shares = [], []
    for task, published in PUBLISHED_STS_GAINS.items():
        if task in gains[0]:
            shares.append([run[task] / published for run in gains])
            figures.append(mean_figure(f"{task}, gain by the published one", shares[-1], unit="x"))
    if len(shares) == len(PUBLISHED_STS_GAINS):
        of_means = [sum(run[t] for t in PUBLISHED_STS_GAINS) / sum(PUBLISHED_STS_GAINS.values()) for run in gains]
        figures.append(mean_figure("STS, mean gain by the published one", of_means, ">= 0.5", "x"))
    return figures


def write_table(file: Path, table: dict[str, list[Scores]]) -> None:
    """Scores by arm, run and task: what the README's table is made of."""
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def draw_gains(untouched: Scores, found: dict[str, list[Scores]], file: Path) -> None:
    """Gain of each task over the untouched student: a row of dots, one a seed, for each arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ours = next(iter(found.values()))  # trained first
    tasks = sorted(untouched, key=lambda task: np.mean([run[task] for run in ours]) - untouched[task])
    fig, axis = plt.subplots(figsize=(8, 0.8 + 0.34 * len(tasks)), layout="constrained")
    for offset, (name, runs) in zip((0.2, 0, -0.2), found.items(), strict=True):
        gains = np.array([[run[task] - untouched[task] for task in tasks] for run in runs])
        places = np.tile(np.arange(len(tasks)) + offset, len(runs))
        axis.plot(gains.ravel(), places, "o", ms=4.5, alpha=0.85, label=name)
    axis.axvline(0, color="#222222", lw=1, ls="--")
    axis.set_yticks(range(len(tasks)), tasks, fontsize=9)
    axis.set_xlabel("points over the untouched student; a dot is a seed")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=120)
    plt.close(fig)
