"""One trained and scored model of the quality study, made by the verbs that a user calls; what is there is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TRAIN_SECONDS = "train-seconds.json"
GUIDE_MAX_TOKENS = 128


@dataclass(frozen=True)
class Arm:
    """A way to train; the same rows, batches and steps for all arms of a comparison."""

    name: str
    loss: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)


class Study:
    """A folder of runs on one set of sources."""

    def __init__(self, folder: Path, sources: list[Path], student: Path, guide: Path, vectors: Path) -> None:
        """`student` and `guide` are model folders; `vectors` is where the guide's are kept for all studies."""
        self.folder, self.sources, self.student, self.guide, self.vectors = folder, sources, student, guide, vectors

    def model(self, arm: Arm, seed: int, common: dict[str, Any]) -> Path:
        """Folder of the exported model; `common` are train settings of all arms."""
        name = f"{arm.name}-{seed}"
        out = self.folder / "models" / name
        file = self.recipe_file(arm, seed)
        recipe = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "data": {"sources": [{"path": str(source)} for source in self.sources]},
            "student": {"path": str(self.student), **arm.student},
            "guide": {"path": str(self.guide), "max_tokens": GUIDE_MAX_TOKENS, "vectors_dir": str(self.vectors)},
            "loss": arm.loss,
            "train": {**common, **arm.train, "seed": seed, "checkpoint_steps": 1000},
            "cluster": {"num_workers": 2, "data_workers": 2},
        }
        text = yaml.safe_dump(recipe)
        if (out / "manifest.json").is_file():
            if file.read_text(encoding="utf-8") != text:
                raise SystemExit(f"{out} was trained with other settings; remove it, or set another GIST_RAY_QUALITY")
            return out
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        begun = self.folder / "recipes" / f"{name}.begun"
        if not begun.is_file():
            begun.write_text(json.dumps(time.time()))
        call("train", "--resume", str(file))
        # From the first start on: an interrupted run counts its pauses rather than forget what it had done before.
        seconds = time.time() - json.loads(begun.read_text())
        call("export", str(self.folder / "runs" / name / "checkpoint"), str(out))
        (out / TRAIN_SECONDS).write_text(json.dumps(seconds))
        begun.unlink()
        return out

    def recipe_file(self, arm: Arm, seed: int) -> Path:
        return self.folder / "recipes" / f"{arm.name}-{seed}.yaml"

    def mixed(self, arm: Arm, seed: int, common: dict[str, Any], start_share: float) -> Path:
        """Folder of `model`'s with another share of its start."""
        self.model(arm, seed, common)
        out = self.folder / "models" / f"{arm.name}-{seed}-share-{start_share}"
        checkpoint = self.folder / "runs" / f"{arm.name}-{seed}" / "checkpoint"
        call("export", "--start-share", str(start_share), str(checkpoint), str(out))
        return out


def call(verb: str, *words: str) -> float:
    """Run a verb; its seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "gist_ray.cli", verb, *words], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"gist-ray {verb} {' '.join(words)} failed:\n{done.stderr[-4000:]}")
    print(f"  gist-ray {verb} {Path(words[-1]).name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


def scores(model: Path, data: Path, report: Path) -> dict[str, float]:
    """Scores of a folder of tasks by name, times 100."""
    call("evaluate", str(model), "--data", str(data), "--out", str(report))
    tasks = json.loads((report / "report.json").read_text())["tasks"]
    return {task["name"]: 100 * task["score"] for task in tasks}


def kinds(report: Path) -> dict[str, str]:
    """Kind of each task."""
    return {task["name"]: task["type"] for task in json.loads((report / "report.json").read_text())["tasks"]}
