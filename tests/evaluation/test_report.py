"""report.html: what a person sees of a report."""

from xml.etree import ElementTree

from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.report import page


def row(name: str, kind: str, score: float, before: float | None = None, cost: dict | None = None) -> dict:
    return {
        "name": name, "type": kind, "main_metric": "m", "score": score, "before": before, "seconds": 1.0,
        "revision": "r", "data": "hub", "cost": cost, "notes": [],
    }  # fmt: skip


def report(rows: list[dict], baseline: dict | None = None) -> dict:
    metrics = {"mean": 0.5, "mean_over_types": 0.5, "mean_by_type": {item["type"]: 0.5 for item in rows}}
    return {
        "model": "org/model", "revision": "abc", "mteb_version": "2", "baseline": baseline, "tasks": rows,
        "averages": {}, "failures": {}, "metrics": metrics,
    }  # fmt: skip


def sections(found: dict) -> dict[str, str]:
    """Text of each card, by heading."""
    root = ElementTree.fromstring(page(found, []).removeprefix("<!DOCTYPE html>"))
    return {card.findtext("h2"): " ".join(card.itertext()) for card in root.iter("section")}


def test_a_baseline_is_drawn_by_type_the_greatest_gain_first():
    rows = [row("a worse", "STS", 0.5, 0.6), row("new", "STS", 0.9), row("found", "Retrieval", 0.4, 0.3),
            row("better", "STS", 0.8, 0.7)]  # fmt: skip
    found = sections(report(rows, {"model": "org/old", "revision": "0" * 40}))
    drawn = found["Before and after"]
    places = [drawn.index(name) for name in ("Retrieval", "found", "STS", "better", "a worse", "new")]
    assert places == sorted(places)
    assert "+10.00" in drawn and "-10.00" in drawn and "Scores" not in found


def test_without_a_baseline_there_are_bars():
    found = sections(report([row("alone", "STS", 0.5)]))
    assert "50.00" in found["Scores"] and "Before and after" not in found


def test_the_dearest_task_comes_first_and_the_sum_last():
    costs = [Cost(texts=10, distinct=9, cached=8, encode_s=0.5, score_s=0.25), Cost(2000, 1000, 0, 1.0, 3.0)]
    rows = [row(name, "STS", 0.5, cost=cost.to_json()) for name, cost in zip(("cheap", "dear"), costs, strict=True)]
    rows.append(row("of an older version", "STS", 0.5))
    table = sections(report(rows))["Time and cost"]
    assert table.index("dear ") < table.index("cheap") < table.index("all 2,010")
    assert all(number in table for number in ("2,000", "2,010", "1,009", "1.50", "3.25"))
    assert "older" not in table
    assert "Time and cost" not in sections(report([row("of an older version", "STS", 0.5)]))
