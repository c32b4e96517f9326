"""Training report: the logs of a run to `train_report.html`: how it learned, and why it was as fast as it was."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from gist_ray import html
from gist_ray.config import Recipe
from gist_ray.manifest import write_whole
from gist_ray.metrics import EVENTS, METRICS, VALIDATIONS, Line, iter_metrics, read_metrics
from gist_ray.training.phases import PHASES
from gist_ray.training.time_spent import EXCHANGES, TimeSpent, TimeSums
from gist_ray.training.verdict import RunFacts, explain

TRAIN_REPORT_PAGE = "train_report.html"

Floats = npt.NDArray[np.float64]

_COLUMNS = ("step", "total_steps", "loss", "masked_share", "learning_rate", "grad_norm", "examples_per_s",
            "tokens_per_s", "padding_share", "recomputed_share", "seconds", "workers")  # fmt: skip
_CURVES = (
    ("loss", "loss", ""),
    ("learning_rate", "learning rate", ""),
    ("masked_share", "negatives hidden", "share"),
    ("grad_norm", "gradient norm, before clipping", ""),
    ("examples_per_s", "throughput", "triplets/s"),
)
_OTHER, _OTHER_COLOUR = "other", 8  # time in no phase
_RANKS_SHOWN = 16
_RECIPE_CHARS = 100_000  # a recipe may name thousands of sources
_TALL_FROM = 25


def write_train_report(run_dir: Path, recipe: Recipe, folder: Path) -> Path:
    """Write `train_report.html` into `folder` and return its path.

    Args:
        run_dir: holds `metrics.jsonl`, `events.jsonl` and `validation.jsonl`; any of them may be absent, and any key of
            a line but `step`.
        recipe: of the run; shown as it is.
        folder: exists.
    """
    page = folder / TRAIN_REPORT_PAGE
    write_whole(page, _page(_read(run_dir), recipe).encode())
    return page


@dataclass
class _Run:
    """What the logs say."""

    columns: dict[str, Floats]
    """`[lines]` each, NaN where a line has no such key."""
    spent: TimeSpent | None
    events: list[Line] = field(default_factory=list)

    def of_kind(self, event: str) -> list[Line]:
        """Events of a kind, in the order of their happening."""
        return [line for line in self.events if line.get("event") == event]

    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.columns["step"].max(initial=0))

    def seconds(self) -> float:
        """Time of all steps; a line stands for those since the line before."""
        steps = np.diff(self.columns["step"], prepend=0)
        return float(np.nansum(self.columns["seconds"] * steps))

    def restarts(self) -> list[Line]:
        """Starts but for the first."""
        return self.of_kind("start")[1:]

    def repeated_steps(self) -> int:
        """Steps that restarts did again."""
        return sum(int(line.get("steps", 0)) for line in self.of_kind("taken_back"))

    def stalls(self) -> Floats:
        """Seconds that each checkpoint held up training."""
        return np.array([line["stall_s"] for line in self.of_kind("checkpoint") if "stall_s" in line], np.float64)

    def validation(self) -> list[tuple[float, float]]:
        """(step, score) in ascending order; of a step that was done again, what was said last."""
        scores = {line["step"]: line["score"] for line in self.of_kind("validation") if "score" in line}
        return sorted(scores.items())

    def facts(self) -> RunFacts:
        """What a verdict needs beside the phases."""
        seconds = self.seconds()
        return RunFacts(
            padding_share=_mean(self.columns["padding_share"]),
            recomputed_share=_mean(self.columns["recomputed_share"]),
            checkpoint_share=float(self.stalls().sum()) / seconds if seconds else None,
            steps=self.steps(),
            repeated_steps=self.repeated_steps(),
            restarts=len(self.restarts()),
        )


def _read(run_dir: Path) -> _Run:
    columns, times = {name: array("d") for name in _COLUMNS}, TimeSums()
    for line in iter_metrics(run_dir / METRICS):
        for name, values in columns.items():
            value = line.get(name)
            values.append(math.nan if value is None else value)
        times.add(line)
    return _Run({name: np.array(values) for name, values in columns.items()}, times.result(),
                [*read_metrics(run_dir / EVENTS), *read_metrics(run_dir / VALIDATIONS)])  # fmt: skip


def _page(run: _Run, recipe: Recipe) -> str:
    verdict = [html.paragraph(sentence) for sentence in explain(run.spent, run.facts())]
    return html.render_report(
        f"Training of {recipe.name}",
        f"Student {Path(recipe.student.path).name}, guide {Path(recipe.guide.path).name}; "
        f"{recipe.train.batch_size:,} triplets a step.",
        [
            _tiles(run),
            html.section("What limits the speed", *verdict),
            html.section("Curves", _curves(run)),
            html.section("Where the time went", *_time(run.spent)),
            html.section("Checkpoints", *_checkpoints(run)),
            *([html.section("Restarts", *_restarts(run))] if run.restarts() else []),
            html.section("Recipe", html.preformatted(_recipe_text(recipe))),
        ],
    )


def _tiles(run: _Run) -> str:
    columns, total = run.columns, _last(run.columns["total_steps"])
    workers = sorted({int(value) for value in columns["workers"][np.isfinite(columns["workers"])]})
    best = max(run.validation(), key=lambda score: score[1], default=None)
    restarts = len(run.restarts())
    times = [line["time"] for line in run.events if "time" in line]
    whole, seconds = max(times, default=0.0) - min(times, default=0.0), run.seconds()
    return html.tiles(
        [
            ("steps", f"{run.steps():,}", f"of {total:,.0f}" if total else "done"),
            ("time", _duration(seconds) if seconds else "–",
             f"of steps; {_duration(whole)} in all" if whole > 1.02 * seconds else "of steps"),
            ("triplets/s", _number(_median(columns["examples_per_s"])), "median"),
            ("tokens/s", _number(_median(columns["tokens_per_s"])), "median"),
        ]
    ) + html.tiles(
        [
            ("workers", "–".join(map(str, sorted({min(workers), max(workers)}))) if workers else "–",
             "1 restart" if restarts == 1 else f"{restarts} restarts"),
            ("padding", _percent(_mean(columns["padding_share"])), "of tokens, mean"),
            ("negatives hidden", _percent(_mean(columns["masked_share"])), "by guide and labels, mean"),
            ("validation, best", f"{best[1]:.4f}" if best else "–", f"at step {best[0]:,}" if best else "none made"),
        ]
    )  # fmt: skip


def _curves(run: _Run) -> str:
    steps = run.columns["step"]
    marks = [(float(line["step"]), "restart" if i == 0 else "") for i, line in enumerate(run.restarts())]
    charts = [
        html.line_chart(
            title,
            steps.tolist(),
            run.columns[name].tolist(),
            unit,
            smooth=name != "learning_rate",
            marks=marks,
        )
        for name, title, unit in _CURVES
        if np.isfinite(run.columns[name]).any()
    ]
    if run.validation():
        xs, ys = zip(*run.validation(), strict=True)
        charts.append(html.line_chart("validation score", xs, ys, smooth=False, marks=marks))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else html.paragraph("No step was logged.")


def _time(spent: TimeSpent | None) -> list[str]:
    if spent is None:
        return [html.paragraph("No times of phases were logged.")]
    ranks = len(spent.phases[0].rank_mean_s)
    busy = sum(phase.rank_mean_s for phase in spent.phases if phase.name not in EXCHANGES)
    shown = np.argsort(-np.asarray(busy), kind="stable")[:_RANKS_SHOWN]
    if ranks <= _RANKS_SHOWN:
        shown = np.arange(ranks)
    bars = []
    for rank in shown:
        parts = [1000 * float(phase.rank_mean_s[rank]) for phase in spent.phases]
        bars.append((f"rank {rank}", [*parts, max(0.0, 1000 * spent.step_s - sum(parts))]))
    note = f"Mean step, {_milliseconds(spent.step_s)} ms"
    note += f"; of {ranks:,} ranks the {_RANKS_SHOWN} with most work of their own." if ranks > _RANKS_SHOWN else "."
    names = [phase.name for phase in spent.phases]
    colours = {name: PHASES.index(name) if name in PHASES else _OTHER_COLOUR for name in names}
    pieces = [
        html.paragraph(note),
        html.stacked_bars(bars, [*colours.items(), (_OTHER, _OTHER_COLOUR)], "ms"),
        _phase_table(spent),
    ]
    if ranks > 1:
        headers = ["median, ms", *names]
        rows: list[list[html.Cell]] = [
            [f"rank {rank}", *(1000 * float(phase.rank_median_s[rank]) for phase in spent.phases)] for rank in shown
        ]
        pieces += [
            html.paragraph(
                "In gather and reduce ranks meet: there the slowest rank is the one that came first and waited longest."
            ),
            html.table(headers, rows, tall=len(rows) >= _TALL_FROM),
        ]
    return pieces


def _phase_table(spent: TimeSpent) -> str:
    rows: list[list[html.Cell]] = []
    for phase in spent.phases:
        slowest = phase.slowest()
        who: list[html.Cell] = [f"rank {slowest[0]}", f"{slowest[1]:.2f}x"] if slowest else [None, None]
        rows.append([phase.name, 100 * phase.share, 1000 * phase.median_s, 1000 * phase.p95_s, *who])
    rows.append([_OTHER, 100 * spent.untimed, None, None, None, None])
    return html.table(["phase", "% of the time", "median, ms", "95 %, ms", "slowest", "to the others"], rows)


def _checkpoints(run: _Run) -> list[str]:
    stalls = run.stalls()
    if not len(stalls):
        return [html.paragraph("None was logged.")]
    seconds = run.seconds()
    share = f", {100 * stalls.sum() / seconds:.2f}\xa0% of the time of the steps" if seconds else ""
    text = (
        f"{len(stalls):,} checkpoints held up training for {stalls.sum():.1f} s{share}: median {np.median(stalls):.2f} "
        f"s, longest {stalls.max():.2f} s."
    )
    steps = [float(line["step"]) for line in run.of_kind("checkpoint") if "stall_s" in line]
    order = np.argsort(steps, kind="stable")
    chart = html.line_chart("stall of each checkpoint", np.take(steps, order).tolist(), stalls[order].tolist(), "s",
                            smooth=False)  # fmt: skip
    return [html.paragraph(text), *([f'<div class="charts">{chart}<span></span></div>'] if len(stalls) > 1 else [])]


def _restarts(run: _Run) -> list[str]:
    rows: list[list[html.Cell]] = []
    back = 0
    for line in run.events:
        if line.get("event") == "taken_back":
            back = int(line.get("steps", 0))
        elif line.get("event") == "start":
            rows.append([f"step {line['step']:,}", str(line.get("workers", "–")), f"{back:,}"])
            back = 0
    return [html.table(["from", "workers", "steps done again"], rows[1:], tall=len(rows) >= _TALL_FROM)]


def _recipe_text(recipe: Recipe) -> str:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    return html.clip(text, _RECIPE_CHARS)


def _median(values: Floats) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _mean(values: Floats) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _last(values: Floats) -> float | None:
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}\xa0%"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f}\xa0s"
    return f"{seconds / 60:.0f}\xa0min" if seconds < 7200 else f"{seconds / 3600:.1f}\xa0h"
