"""The Grafana dashboards of cluster/observability: what they ask, and what they look like where there is no Grafana."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.cluster.manifests import CLUSTER

OBSERVABILITY = CLUSTER / "observability"
DASHBOARDS = sorted(OBSERVABILITY.glob("*.json"))

Series = list[tuple[dict[str, str], list[tuple[float, float]]]]
"""Labels, and time in seconds with value, of each series."""

UNITS: dict[str, Callable[[float], str]] = {
    "s": lambda value: f"{value:g} s" if value >= 1 or value == 0 else f"{1e3 * value:g} ms",
    "percentunit": lambda value: f"{100 * value:g} %",
    "percent": lambda value: f"{value:g} %",
    "reqps": lambda value: f"{value:g}/s",
    "decbytes": lambda value: f"{value / 1e6:g} MB",
    "sci": lambda value: f"{value:.1e}",
    "none": lambda value: f"{value:g}",
}
"""Grafana's names of those that the dashboards use, and how they are written."""


@dataclass(frozen=True)
class Query:
    """One line, or bunch of lines, of a panel."""

    dashboard: str
    panel: str
    expression: str
    """PromQL, with Grafana's variables."""
    legend: str

    def filled(self) -> str:
        """With everything that a variable may be."""
        return re.sub(r"\$(?!__)\w+", ".*", self.expression)


@cache
def tree(file: Path) -> dict[str, Any]:
    """A dashboard."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def queries(file: Path) -> Iterator[Query]:
    """Of each panel."""
    for panel in tree(file)["panels"]:
        for target in panel["targets"]:
            yield Query(file.stem, panel["title"], target["expr"], target["legendFormat"])


def variables(file: Path) -> dict[str, tuple[str, str]]:
    """Variables that are asked for, by name: a selector of series, and the label whose values they may be."""
    found = {}
    for variable in tree(file)["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match, variable
            found[variable["name"]] = (match[1], match[2])
    return found


def metrics(expression: str) -> dict[str, set[str]]:
    """Names of metrics in PromQL, each with the labels that are asked of it."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"\b(up|(?:ray_|gist_ray_)\w+)(?:\{([^}]*)\})?", expression):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))
    return found


def draw(file: Path, ask: Callable[[str], Series], start: float, picture: Path) -> None:
    """Draw a dashboard as Grafana would lay it out, with the answers of `ask`, to a PNG. Times are since `start`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = tree(file)["panels"]
    rows = max(panel["gridPos"]["y"] // 8 for panel in panels) + 1
    figure = pyplot.figure(figsize=(18, 3.4 * rows))
    figure.suptitle(tree(file)["title"])
    for panel in panels:
        place = panel["gridPos"]
        bottom = 0.97 * (1 - (place["y"] // 8 + 1) / rows)
        axes = figure.add_axes((place["x"] / 24 + 0.04, bottom + 0.15 / rows, place["w"] / 24 - 0.05, 0.7 / rows))
        lines = []
        for query in (query for query in queries(file) if query.panel == panel["title"]):
            for labels, points in ask(query.filled()):
                name = re.sub(r"\{\{(\w+)\}\}", lambda match, of=labels: of.get(match[1], ""), query.legend)
                shown = [(at - start, value) for at, value in points if not math.isnan(value)]
                lines.append((name.strip()[:40], shown))
        _draw_panel(axes, panel, [line for line in lines if line[1]])
    figure.savefig(picture, dpi=60)
    pyplot.close(figure)


def _draw_panel(axes: Any, panel: dict[str, Any], lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    from matplotlib.ticker import FuncFormatter

    settings = panel["fieldConfig"]["defaults"]
    if "stacking" in settings["custom"]:
        _stack(axes, lines)
    else:
        for name, points in lines:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 9 else "", clip_on=False)
    low, high = axes.get_ylim()
    room = 1.4 if "stacking" in settings["custom"] else 1  # for the names, above what fills the panel
    axes.set_ylim(settings.get("min", low), settings.get("max", high * room))
    axes.set_title(panel["title"], fontsize=10)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: UNITS[settings["unit"]](value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:.0f} s"))
    if lines:
        axes.legend(fontsize=7, ncols=1 + len(lines) // 4, framealpha=0.5)


def _stack(axes: Any, lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    times = sorted({at for _, points in lines for at, _ in points})
    values = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
    axes.stackplot(times, values, labels=[name for name, _ in lines], alpha=0.6, step="post")
