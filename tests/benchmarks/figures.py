"""Figures: what a benchmark measured, beside its goal; shared by all benchmarks."""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass
class Figure:
    """One number. `goal` is a comparison such as ">= 50", or None for a number that is only reported."""

    name: str
    value: float
    unit: str = ""
    goal: str | None = None
    holds: bool | None = field(init=False)
    runs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.value, self.runs = float(self.value), [float(run) for run in self.runs]
        self.holds = None
        if self.goal:
            sign, limit = self.goal.split()
            self.holds = bool(COMPARE[sign](self.value, float(limit)))

    def limit(self) -> float | None:
        """The number in the goal."""
        return float(self.goal.split()[1]) if self.goal else None


def median_figure(name: str, runs: Sequence[float], unit: str = "", goal: str | None = None) -> Figure:
    """The median of several runs."""
    return Figure(name, statistics.median(runs), unit, goal, list(runs))


def interleaved(repeats: int, **cases: Callable[[], float]) -> dict[str, list[float]]:
    """Run the cases in turn, `repeats` times, so that what else the machine does meets all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            found[name].append(case())
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratio of each turn of two interleaved cases."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def print_table(figures: Sequence[Figure]) -> None:
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        verdict = {True: "holds", False: "MISSED", None: ""}[figure.holds]
        runs = f"  [{min(figure.runs):.4g} .. {max(figure.runs):.4g}, {len(figure.runs)} runs]" if figure.runs else ""
        value = f"{figure.value:>10.4g} {figure.unit:<8}"
        print(f"{figure.name:<{width}}  {value} {figure.goal or '':<9} {verdict:<6}{runs}".rstrip())


def write_json(figures: Sequence[Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n", encoding="utf-8")


def _parts_of_goal(figure: Figure) -> list[float]:
    """Value and runs by the goal; what is less than a hundredth of it, or below zero, as a hundredth."""
    limit = figure.limit()
    assert limit
    return [max(0.01, value / limit) for value in (figure.value, *figure.runs)]


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Bars of value / goal for the figures with a goal above zero, on a log scale; dots are single runs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [figure for figure in figures if (figure.limit() or 0) > 0]
    fig, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * max(1, len(shown))), layout="constrained")
    bars = [_parts_of_goal(figure) for figure in shown]
    for place, (figure, parts) in enumerate(zip(shown, bars, strict=True)):
        axis.barh(place, parts[0], height=0.6, color="#4c8c6b" if figure.holds else "#b5483a", alpha=0.85)
        axis.plot(parts[1:], [place] * len(figure.runs), "o", ms=4, color="#222222")
        text = " ".join(part for part in (f"{figure.value:.4g}", figure.unit, f"(goal {figure.goal})") if part)
        axis.annotate(text, (max(parts), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.axvline(1, color="#222222", lw=1, ls="--")
    axis.set_yticks(range(len(shown)), [textwrap.fill(figure.name, 48) for figure in shown], fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log")
    ends = [end for parts in bars for end in parts]
    low, high = min([0.5, *ends]), max([2.0, *ends])
    axis.set_xlim(low / 1.2, high * (high / low) ** 0.7)  # room for the text beside the longest bar
    axis.set_xlabel("value / goal (the dashed line is the goal)")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(name: str, sections: dict[str, Callable[[bool], list[Figure]]]) -> None:
    """Command line of a benchmark: `[--quick] [--json OUT] [--only SECTION ...]`; exit code 1 if a goal is missed.

    The plot is drawn beside the JSON, with its name.
    """
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not what does it say")
    parser.add_argument("--json", type=Path, help="where to write the figures; a PNG with the same name is drawn")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="parts of the benchmark")
    options = parser.parse_args()
    figures: list[Figure] = []
    for section in options.only:  # what is measured is on disk before the next section, which may fail
        figures += sections[section](options.quick)
        if options.json:
            write_json(figures, options.json)
            draw(figures, options.json.with_suffix(".png"))
    print_table(figures)
    if any(figure.holds is False for figure in figures):
        raise SystemExit(1)
