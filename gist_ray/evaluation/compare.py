"""compare: two reports in, a verdict out. Is the second model better, on which tasks, and can it be chance?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gist_ray import html
from gist_ray.errors import InputError
from gist_ray.evaluation.contamination import contamination
from gist_ray.evaluation.paired import SAMPLES, Difference, difference, holm, together
from gist_ray.evaluation.report import read_report
from gist_ray.manifest import write_json

Outcome = Literal["win", "tie", "loss", "untested"]

ALPHA = 0.05
"""Of all tasks together, by Holm's correction: the chance to call any equal pair different."""


@dataclass(frozen=True)
class TaskComparison:
    """One task. Scores and differences are MTEB's times 100."""

    name: str
    type: str
    before: float
    after: float
    low: float | None
    high: float | None
    """95 % interval of the difference; None where there are no items to resample."""
    p: float | None
    p_holm: float | None
    outcome: Outcome
    """Of the second model."""
    trained_on: str
    """Which of the models was trained on the task's data, and on how much of it, as far as is known; else empty."""


@dataclass(frozen=True)
class Comparison:
    """Two reports, task by task, and together."""

    before: str
    after: str
    tasks: tuple[TaskComparison, ...]
    left_out: tuple[str, ...]
    """Tasks in only one of the reports, or on other data."""
    mean_difference: float
    low: float
    high: float
    p: float
    """Of the mean over the tasks that have items."""

    @property
    def verdict(self) -> str:
        """One line for people."""
        counts = {kind: sum(task.outcome == kind for task in self.tasks) for kind in ("win", "tie", "loss")}
        tally = f"{counts['win']} better, {counts['tie']} not told apart, {counts['loss']} worse"
        change = (
            f"{self.mean_difference:+.2f} points on average (95 % {self.low:+.2f} to {self.high:+.2f}, p {_p(self.p)})"
        )
        if self.p < ALPHA and not self.low <= 0 <= self.high:
            kind = "better" if self.mean_difference > 0 else "worse"
            return f"{self.after} is {kind} than {self.before}: {change}; tasks: {tally}"
        return f"{self.after} and {self.before} cannot be told apart: {change}; tasks: {tally}"


def compare(
    before: str | Path, after: str | Path, *, output: str | Path | None = None, samples: int = SAMPLES
) -> Comparison:
    """Compare two report directories on the tasks that both have, item by item.

    The same items were scored by both models, so their differences are tested in pairs: a permutation test gives p,
    Holm's correction keeps the error over all tasks at 5 %, and a bootstrap gives the interval. A task is won or lost
    when p, corrected, is below 0.05 and the interval excludes zero.

    Args:
        before: report directory of the first model.
        after: report directory of the second.
        output: folder for `compare.json` and `compare.html`; None: neither is written.
        samples: permutations, and bootstrap samples, of each task.

    Raises:
        InputError: a folder is no report, or the two have no task in common.
    """
    folders = [Path(before).expanduser(), Path(after).expanduser()]
    reports = [read_report(folder) for folder in folders]
    pairs, left_out = _common(*reports)
    differences = {
        first["name"]: found
        for first, _ in pairs
        if (found := _difference(folders, first["name"], samples)) is not None
    }
    corrected = dict(zip(differences, holm([one.p_value for one in differences.values()]), strict=True))
    tasks = tuple(
        _compared(first, second, differences.get(first["name"]), corrected.get(first["name"]), reports)
        for first, second in pairs
    )
    whole = together(list(differences.values()))
    low, high = whole.interval()
    names = [report["model"] for report in reports]
    if names[0] == names[1]:  # two checkpoints under one name
        names = [f"{report['model']}@{report['revision'][:8]}" for report in reports]
    verdict = Comparison(
        names[0], names[1], tasks, left_out, 100 * whole.observed, 100 * low, 100 * high, whole.p_value
    )
    if output is not None:
        _write(verdict, Path(output).expanduser())
    return verdict


def _common(first: dict[str, Any], second: dict[str, Any]) -> tuple[list[tuple[dict, dict]], tuple[str, ...]]:  # type: ignore[type-arg]
    rows = {(row["name"], row["revision"]): row for row in second["tasks"]}
    pairs = [(row, rows[key]) for row in first["tasks"] if (key := (row["name"], row["revision"])) in rows]
    shared = {row["name"] for row, _ in pairs}
    left_out = {row["name"] for report in (first, second) for row in report["tasks"]} - shared
    if not pairs:
        raise InputError(
            f"the reports of {first['model']} and {second['model']} have no task in common on the same data; "
            "evaluate both on the same tasks"
        )
    return pairs, tuple(sorted(left_out))


def _difference(folders: list[Path], task: str, samples: int) -> Difference | None:
    from gist_ray.evaluation.store import stored_items

    before, after = (stored_items(folder, task) for folder in folders)
    if before is None or after is None:
        return None
    try:
        return difference(before, after, samples=samples)
    except InputError as error:
        raise InputError(f"{task}: {error}") from None


def _compared(
    first: dict[str, Any],
    second: dict[str, Any],
    found: Difference | None,
    p_holm: float | None,
    reports: list[dict[str, Any]],
) -> TaskComparison:
    outcome: Outcome = "untested"
    low = high = p = None
    if found is not None and p_holm is not None:
        low, high = (100 * bound for bound in found.interval())
        p = found.p_value
        different = p_holm < ALPHA and not low <= 0 <= high
        outcome = ("win" if found.observed > 0 else "loss") if different else "tie"
    found_in = [
        (report["model"], contamination(report, row)) for report, row in zip(reports, (first, second), strict=True)
    ]
    known = [f"{model} ({why})" for model, why in found_in if why]
    return TaskComparison(
        name=first["name"],
        type=first["type"],
        before=100 * first["score"],
        after=100 * second["score"],
        low=low,
        high=high,
        p=p,
        p_holm=p_holm,
        outcome=outcome,
        trained_on=", ".join(dict.fromkeys(known)),
    )


def table(found: Comparison) -> str:
    """The comparison as text, the verdict last."""
    headers = ["task", "before", "after", "difference", "95 % interval", "p (Holm)", "", "trained on it"]
    rows = [
        [
            task.name,
            f"{task.before:.2f}",
            f"{task.after:.2f}",
            f"{task.after - task.before:+.2f}",
            "" if task.low is None else f"{task.low:+.2f} to {task.high:+.2f}",
            "" if task.p_holm is None else _p(task.p_holm),
            task.outcome,
            task.trained_on,
        ]
        for task in found.tasks
    ]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) if i in (0, 6, 7) else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in [headers, *rows])
    ]
    if found.left_out:
        lines.append(f"not in both reports on the same data: {', '.join(found.left_out)}")
    return "\n".join([*(line.rstrip() for line in lines), "", found.verdict])


def _write(found: Comparison, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", {**asdict(found), "verdict": found.verdict})
    headers = ["task", "type", "before", "after", "difference", "low", "high", "p (Holm)", "outcome", "trained on it"]
    rows: list[list[html.Cell]] = [
        [task.name, task.type, task.before, task.after, task.after - task.before, task.low, task.high,
         "" if task.p_holm is None else _p(task.p_holm), task.outcome, task.trained_on]
        for task in found.tasks
    ]  # fmt: skip
    sections = [
        html.section("Verdict", html.paragraph(found.verdict)),
        html.section("Scores", html.bars_before_after([(task.name, task.before, task.after) for task in found.tasks])),
        html.section("Tasks", html.table(headers, rows)),
    ]
    text = html.render_report(f"{found.after} against {found.before}", "Scores are MTEB's, times 100.", sections)
    (folder / "compare.html").write_text(text, encoding="utf-8")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
