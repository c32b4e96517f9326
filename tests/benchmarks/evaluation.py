"""Evaluation beside sequential mteb: same scores, less time; the schedule of a benchmark; verdicts on planted data.

    python tests/benchmarks/evaluation.py [--quick] --json OUT [--only scores speed schedule compare]

Full: about half an hour on two cores. Needs the shared data folder beside the project, and the dev extra.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data import SHARED, minilm
from evaluation_schedule import schedule_figures
from figures import Figure, interleaved, main, median_figure, ratios
from scipy.stats import spearmanr

from gist_ray.evaluation.items import Group, Items
from gist_ray.evaluation.paired import difference

EVAL = SHARED / "eval"
QUICK_TASKS = ("STSBenchmark", "STS13", "Banking77Classification")
SEQUENTIAL = Path(__file__).with_name("evaluation_sequential.py")


def chosen_data(folder: Path, names: tuple[str, ...] | None) -> Path:
    """A folder of links to task folders; all of them for None."""
    folder.mkdir(parents=True)
    for task in sorted(EVAL.iterdir()):
        if task.is_dir() and (names is None or task.name in names):
            (folder / task.name).symlink_to(task)
    return folder


def run(command: list[str], cache: Path) -> float:
    """Seconds of a process from its start to its end."""
    environment = os.environ | {"GIST_RAY_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    print(f"  {Path(command[1]).name if command[1] != '-m' else 'gist-ray evaluate'}: {seconds:.1f} s", file=sys.stderr)
    return seconds


def sequential(data: Path, out: Path, cache: Path) -> float:
    """`mteb.evaluate(SentenceTransformer(...))` on both cores; seconds."""
    return run([sys.executable, str(SEQUENTIAL), str(minilm()), str(data), str(out)], cache)


def ours(model: Path, data: Path, out: Path, cache: Path, *options: str) -> float:
    """`gist-ray evaluate` from nothing: Ray's start, conversion, all tasks, report; seconds."""
    command = [sys.executable, "-m", "gist_ray.cli", "evaluate", str(model), "--data", str(data), "--out", str(out)]
    return run([*command, *options], cache)


def scores_of(report: Path) -> dict[str, float]:
    tasks = json.loads((report / "report.json").read_text())["tasks"]
    return {task["name"]: task["score"] for task in tasks}


def scores_figures(quick: bool) -> list[Figure]:
    """Greatest difference of any task's score from sequential mteb's, with 1, 2 and 4 actors."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = chosen_data(work / "data", QUICK_TASKS if quick else None)
        sequential(data, work / "sequential.json", work / "cache")
        expected = json.loads((work / "sequential.json").read_text())
        for workers in (1, 2) if quick else (1, 2, 4):
            out = work / f"report-{workers}"
            ours(minilm(), data, out, work / "cache", "--workers", str(workers), "--cache-gb", "0")
            found = scores_of(out)
            assert found.keys() == expected.keys(), "not the same tasks"
            worst = max(found, key=lambda name: abs(found[name] - expected[name]))
            name = f"scores of {len(found)} tasks, {workers} actors: greatest difference ({worst})"
            figures.append(Figure(name, abs(found[worst] - expected[worst]), "", "<= 0.0001"))
    return figures


def speed_figures(quick: bool) -> list[Figure]:
    """Seconds for all local tasks, from nothing; then of a second model, and of one changed task."""
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = chosen_data(work / "data", QUICK_TASKS if quick else None)
        turns = iter(range(100))

        def first() -> float:
            turn = next(turns)
            return ours(minilm(), data, work / f"first-{turn}", work / f"cache-{turn}")

        def second() -> float:
            """Another model beside the first one's cache."""
            turn = next(turns)
            model = other_model(work / f"other-{turn}", turn)
            return ours(model, data, work / f"second-{turn}", work / "cache-0")

        runs = interleaved(
            repeats,
            ours=first,
            sequential=lambda: sequential(data, work / "sequential.json", work / "cache-0"),
            second=second,
        )
        changed = chosen_data(work / "changed", QUICK_TASKS if quick else None)
        (changed / "STSBenchmark").unlink()
        shutil.copytree(EVAL / "STSBenchmark", changed / "STSBenchmark")
        cut_last_line(changed / "STSBenchmark" / "test.jsonl.gz")
        again = ours(minilm(), changed, work / "first-0", work / "cache-0")
        alone = ours(
            minilm(), chosen_data(work / "alone", ("STSBenchmark",)), work / "alone-report", work / "cache-alone"
        )
    what = f"whole of {len(list(EVAL.iterdir()))} tasks" if not quick else f"{len(QUICK_TASKS)} tasks"
    return [
        median_figure(f"{what}: sequential mteb, both cores", runs["sequential"], "s"),
        median_figure(f"{what}: gist-ray evaluate", runs["ours"], "s"),
        median_figure(f"{what}: sequential / ours", ratios(runs["sequential"], runs["ours"]), "x", ">= 1.5"),
        median_figure(f"{what}: a second model / the first", ratios(runs["second"], runs["ours"]), "x", "<= 1.05"),
        Figure("one changed task of a finished report / that task alone", again / alone, "x", "<= 1.5"),
    ]


def other_model(folder: Path, turn: int) -> Path:
    """The same weights but one number, another one each turn: as dear, and nothing that is kept is of use."""
    from gist_ray.encoder import Encoder

    encoder = Encoder.load(minilm())
    next(iter(encoder.model.parameters())).data[0, 0] += 0.001 * (1 + turn)
    saved: Path = encoder.save(folder)
    return saved


def cut_last_line(file: Path) -> None:
    import gzip

    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(b"".join(lines[:-1])))


def compare_figures(quick: bool) -> list[Figure]:
    """Verdicts on STSBenchmark's pairs with planted noise: 200 equal models, and models that gain two points."""
    pairs, samples = (40, 500) if quick else (200, 2000)
    cosines, gold = stsb()
    noise = noise_for(cosines, gold, loss=0.02)
    equal = [judged(cosines, gold, noise, noise, seed, samples) for seed in range(pairs)]
    gains = [judged(cosines, gold, noise, 0.0, 10_000 + seed, samples) for seed in range(pairs)]
    return [
        Figure(f"STSBenchmark, {pairs} pairs of equal models: called different", np.mean(equal), "", "<= 0.05"),
        Figure(f"STSBenchmark, {pairs} pairs, 2 points planted: called better", np.mean(gains), "", ">= 0.8"),
    ]


def stsb() -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's cosines of the pairs, and their gold scores."""
    import gzip

    from gist_ray.encoder import Encoder

    text = gzip.decompress((EVAL / "STSBenchmark" / "test.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    encoder = Encoder.load(minilm())
    first, second = (encoder.encode([row[key] for row in rows]) for key in ("sentence1", "sentence2"))
    return (first * second).sum(1), np.array([row["score"] for row in rows])


def noise_for(cosines: np.ndarray, gold: np.ndarray, loss: float) -> float:
    """Spread of noise on the cosines that costs so much of Spearman's correlation."""
    best = spearmanr(cosines, gold)[0]
    noise = np.random.default_rng(0).normal(size=(20, len(cosines)))

    def lost(spread: float) -> float:
        return best - float(np.mean([spearmanr(cosines + spread * one, gold)[0] for one in noise]))

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) < loss else (low, middle)
    return high


def judged(cosines: np.ndarray, gold: np.ndarray, before: float, after: float, seed: int, samples: int) -> bool:
    """Whether two models with so much noise each are called different, the second one the better where it is."""
    generator = np.random.default_rng(seed)
    models = [
        Items("spearman", (Group("default/test", cosines + spread * generator.normal(size=len(gold)), gold),))
        for spread in (before, after)
    ]
    found = difference(*models, samples=samples, seed=seed)
    low, high = found.interval()
    different = found.p_value < 0.05 and not low <= 0 <= high
    return bool(different and (before == after or found.observed > 0))


if __name__ == "__main__":
    sections = {
        "scores": scores_figures,
        "speed": speed_figures,
        "schedule": schedule_figures,
        "compare": compare_figures,
    }
    main(__doc__.splitlines()[0], sections)
