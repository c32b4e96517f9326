"""Report: what `report.json` and `report.html` say of a model's scores."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_ray import html
from gist_ray.errors import InputError
from gist_ray.evaluation.contamination import contamination

if TYPE_CHECKING:
    from gist_ray.evaluation.eval_task import EvalTask
    from gist_ray.evaluation.store import Store

REPORT = "report.json"
REPORT_PAGE = "report.html"


def read_report(folder: Path) -> dict[str, Any]:
    """What `report.json` of a report folder holds; see `summary`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no report: {REPORT} cannot be read ({error})") from error
    return found


def summary(
    store: Store,
    tasks: list[EvalTask],
    averages: dict[str, float | None],
    earlier: dict[str, Any] | None,
    failures: dict[str, str],
) -> dict[str, Any]:
    """What `report.json` holds. Scores are MTEB's (0 to 1); `before` is the baseline's on the same data.

    `seconds` of a task is what passed from its start to its end, `cost` what was done for it: see `Cost`.
    """
    before = {(row["name"], row["revision"]): row["score"] for row in (earlier or {"tasks": []})["tasks"]}
    rows = []
    for task in tasks:
        result = store.result(task)
        if result is None:
            continue
        row = {"name": task.name, "type": task.type, "main_metric": task.main_metric, "score": result.get_score()}
        if earlier is not None:
            row["before"] = before.get((task.name, task.revision))
        row |= {"seconds": round(result.evaluation_time or 0.0, 2), "revision": task.revision}
        rows.append(
            {
                **row,
                "data": "local" if task.folder else "hub",
                "cost": store.cost(task),
                "trained_on": store.seen(task),
                "notes": store.notes(task),
            }
        )
    types = sorted({row["type"] for row in rows})
    by_type = {kind: _mean([row["score"] for row in rows if row["type"] == kind]) for kind in types}
    return {
        "model": store.model.name,
        "revision": store.model.revision,
        "mteb_version": version("mteb"),
        "baseline": earlier and {"model": earlier["model"], "revision": earlier["revision"]},
        "tasks": rows,
        "averages": averages,
        "failures": failures,
        "metrics": {
            "mean": _mean([row["score"] for row in rows]),
            "mean_over_types": _mean(list(by_type.values())),
            "mean_by_type": by_type,
        },
    }


def page(found: dict[str, Any], training: list[dict[str, float]]) -> str:
    """`report.html`: the summary for people, and the curves of the training that made the model, where they are."""
    sections = [html.tiles(_tiles(found))]
    if found["failures"]:
        failed = [[name, why] for name, why in found["failures"].items()]
        sections.append(html.section("Failed", html.table(["task", "reason"], failed)))
    if len(found["metrics"]["mean_by_type"]) > 1:
        sections.append(html.section("By type of task", html.bars_before_after(_type_bars(found))))
    sections += [
        _scores(found),
        html.section("Tasks", _table(found)),
        *_contamination(found),
        *_costs(found),
        *([html.section("Training", html.training_curves(training))] if training else []),
        html.section("Made from", html.table(["what", "value"], _made_from(found))),
    ]
    return html.render_report(
        f"Evaluation of {found['model']}", "Scores are MTEB's main score of each task, times 100.", sections
    )


def _tiles(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    metrics, tasks = found["metrics"], len(found["tasks"])
    by_type = metrics["mean_by_type"]
    tiles = [("mean over tasks", f"{100 * metrics['mean']:.2f}", f"{tasks} tasks")]
    if len(by_type) > 1:
        tiles.append(("mean over types", f"{100 * metrics['mean_over_types']:.2f}", f"{len(by_type)} types"))
    return tiles + [(kind, f"{100 * mean:.2f}", "mean") for kind, mean in by_type.items() if len(by_type) > 1]


def _type_bars(found: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """Mean of each type; `before` over the same tasks, where all of them were scored before."""
    bars: list[tuple[str, float | None, float]] = []
    for kind, mean in found["metrics"]["mean_by_type"].items():
        before = [row.get("before") for row in found["tasks"] if row["type"] == kind]
        known = [score for score in before if score is not None]
        bars.append((kind, 100 * _mean(known) if len(known) == len(before) else None, 100 * mean))
    return bars


def _scores(found: dict[str, Any]) -> str:
    """Every task's score: bars, or with a baseline pairs of dots by type, the greatest gain of each type first."""
    rows = [(row["type"], row["name"], _percent(row.get("before")), 100 * row["score"]) for row in found["tasks"]]
    if all(before is None for _, _, before, _ in rows):
        return html.section("Scores", html.bars_before_after([row[1:] for row in rows]))
    rows.sort(key=lambda row: (row[0], row[2] is None, (row[2] or 0.0) - row[3]))
    groups = [(kind, [row[1:] for row in rows if row[0] == kind]) for kind in dict.fromkeys(row[0] for row in rows)]
    return html.section("Before and after", html.dumbbells(groups))


def _table(found: dict[str, Any]) -> str:
    headers = ["task", "type", "metric", "before", "score", "seconds", "remarks"]
    cells = [
        [row["name"], row["type"], row["main_metric"], _percent(row.get("before")), 100 * row["score"],
         row["seconds"], "; ".join(row["notes"])]
        for row in found["tasks"]
    ]  # fmt: skip
    cells += [
        [name, "average", "", None, _percent(score), None, "" if score else "a part is missing"]
        for name, score in found["averages"].items()
    ]
    if found["baseline"] is None:
        headers.remove("before")
        cells = [[*row[:3], *row[4:]] for row in cells]
    return html.table(headers, cells)


def _contamination(found: dict[str, Any]) -> list[str]:
    """Tasks whose data the model was trained on; nothing where nothing is known."""
    rows = [(row["name"], contamination(found, row)) for row in found["tasks"]]
    flattered: list[list[html.Cell]] = [[task, why] for task, why in rows if why]
    known = any(row.get("trained_on") is not None for row in found["tasks"])
    if not flattered and not known:
        return []
    text = (
        "Texts of the task's data that are, to the letter, among those the model was trained on. Labels of a training "
        "split are fair where the task gives them to every model; texts of a test split are not."
        if known
        else "By the names of what the model was trained on; the texts themselves are not known."
    )
    what = html.table(["task", "what"], flattered) if flattered else html.paragraph("None of these tasks.")
    return [html.section("Trained on", html.paragraph(text), what)]


def _costs(found: dict[str, Any]) -> list[str]:
    """What tasks took, the dearest first, and all together; nothing where nothing was measured."""
    rows = [(row["name"], row["cost"], row["seconds"]) for row in found["tasks"] if row["cost"]]
    if not rows:
        return []
    rows.sort(key=lambda row: -row[1]["encode_s"] - row[1]["score_s"])
    names = ("texts", "distinct", "cached", "encode_s", "score_s")
    cells: list[list[html.Cell]] = [[task, *(cost[name] for name in names), passed] for task, cost, passed in rows]
    cells.append(["all", *(sum(cost[name] for _, cost, _ in rows) for name in names), None])
    text = (
        "The dearest task first. Encode: seconds of all encoders together. Score: CPU seconds of the task's own "
        "process. Start to end: what passed; tasks run side by side, so these do not add up. A vector from the cache "
        "costs next to nothing."
    )
    headers = ["task", "texts", "distinct", "from the cache", "encode, s", "score, s", "start to end, s"]
    return [html.section("Time and cost", html.paragraph(text), html.table(headers, cells))]


def _made_from(found: dict[str, Any]) -> list[list[html.Cell]]:
    made: list[list[html.Cell]] = [
        ["model", found["model"]],
        ["content hash", found["revision"]],
        ["mteb", found["mteb_version"]],
    ]
    if found["baseline"]:
        made.append(["before", f"{found['baseline']['model']} @ {found['baseline']['revision'][:12]}"])
    return made


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score
