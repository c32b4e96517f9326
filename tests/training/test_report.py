"""The training report: well-formed, self-contained, right figures, for runs of any length."""

import json
import re
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gist_ray.config import Recipe
from gist_ray.metrics import EVENTS, METRICS, VALIDATIONS, MetricsLog
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.report import TRAIN_REPORT_PAGE, write_train_report

NASTY = "<script>alert(1)</script> & \x00\ud800"


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(
        {
            "name": "verses",
            "data": {"sources": [{"path": "a.jsonl", "task_name": NASTY}]},
            "student": {"path": "org/student"},
            "guide": {"path": "org/guide"},
            "train": {"batch_size": 256},
        }
    )


def step_line(step: int, total: int = 400, **changes: Any) -> dict[str, Any]:
    line = {
        "step": step,
        "total_steps": total,
        "loss": 2.0 / step,
        "masked_share": 0.03,
        "learning_rate": 1e-5,
        "grad_norm": 0.8,
        "examples_per_s": 80.0 + step % 3,
        "tokens_per_s": 3000.0,
        "padding_share": 0.05,
        "recomputed_share": 0.0,
        "seconds": 3.0,
        "workers": 2,
        "phases": {
            "data": [0.0, 0.0],
            "forward": [0.9, 1.5],
            "gather": [0.61, 0.01],
            "backward": [1.4, 1.4],
            "reduce": [0.05, 0.05],
        },
    }
    return line | changes


def logs(folder: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def page_of(folder: Path, recipe: Recipe) -> ElementTree.Element:
    file = write_train_report(folder, recipe, folder)
    assert file == folder / TRAIN_REPORT_PAGE and not list(folder.glob(".*"))
    source = file.read_text(encoding="utf-8")
    assert not re.search(
        r"https?://|src=|href=|url\(|@import|<script", source.replace("http://www.w3.org/2000/svg", "")
    )
    return ElementTree.fromstring(source.removeprefix("<!DOCTYPE html>"))


def words(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def sections(page: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {section.findtext("h2") or "": section for section in page.iter("section")}


def tiles(page: ElementTree.Element) -> dict[str, str]:
    found = [tile for tile in page.iter("div") if tile.get("class") == "tile"]
    return {tile[0].text or "": f"{tile[1].text} {tile[2].text}" for tile in found}


def marks(section: ElementTree.Element) -> list[int]:
    """Vertical lines of each chart."""
    return [
        sum(line.get("class") == "mark" for line in figure.iter("{http://www.w3.org/2000/svg}line"))
        for figure in section.iter("figure")
    ]


def test_the_page_tells_a_run_with_its_restarts(tmp_path: Path, recipe: Recipe):
    events = [
        {"time": 1000.0, "step": 0, "event": "start", "workers": 2},
        {"time": 1600.0, "step": 200, "event": "checkpoint", "stall_s": 0.25},
        {"time": 1600.0, "step": 200, "event": "validation", "score": 0.93},
        {"time": 1700.0, "step": 200, "event": "taken_back", "steps": 37},
        {"time": 1700.0, "step": 200, "event": "start", "workers": 1},
        {"time": 4600.0, "step": 400, "event": "checkpoint", "stall_s": 0.75},
        {"time": 4600.0, "step": 400, "event": "validation", "score": 0.91},
    ]
    page = page_of(logs(tmp_path / "run", [step_line(step) for step in range(1, 401)], events), recipe)
    assert tiles(page) == {
        "steps": "400 of 400",
        "time": "20\xa0min of steps; 60\xa0min in all",
        "triplets/s": "81.0 median",
        "tokens/s": "3,000 median",
        "workers": "2 1 restart",
        "padding": "5.0\xa0% of tokens, mean",
        "negatives hidden": "3.0\xa0% by guide and labels, mean",
        "validation, best": "0.9300 at step 200",
    }
    parts = sections(page)
    speed = words(parts["What limits the speed"])
    assert "Rank 1 is slower than the others, 1.7x in forward" in speed and "did 37 steps again" in speed
    assert [figure.findtext("figcaption") for figure in parts["Curves"].iter("figure")] == [
        "loss ",
        "learning rate ",
        "negatives hidden ",
        "gradient norm, before clipping ",
        "throughput ",
        "validation score ",
    ]
    assert marks(parts["Curves"]) == [1] * 6 and words(parts["Curves"]).count("restart") == 6
    assert "2 checkpoints held up training for 1.0 s, 0.08\xa0% of the time of the steps" in " ".join(
        parts["Checkpoints"].itertext()
    )
    assert "step 200 1 37" in words(parts["Restarts"])
    assert "batch_size: 256" in "".join(parts["Recipe"].itertext())
    assert "alert(1)" in "".join(parts["Recipe"].itertext())


def test_the_bars_of_ranks_are_as_long_as_their_phases(tmp_path: Path, recipe: Recipe):
    page = page_of(logs(tmp_path / "run", [step_line(step) for step in range(1, 11)], []), recipe)
    section = sections(page)["Where the time went"]
    (legend,) = [p for p in section.iter("p") if p.get("class") == "legend"]
    names = [span[0].tail for span in legend.iter("span")]
    assert names == ["forward", "gather", "backward", "reduce", "other"]  # data took nothing
    rects = [rect for rect in section.iter() if rect.tag.endswith("rect")]
    widths = [float(rect.get("width") or 0) for rect in rects]
    scale = sum(widths[:5]) / 3.0
    expected = [0.9, 0.61, 1.4, 0.05, 0.04, 1.5, 0.01, 1.4, 0.05, 0.04]
    assert widths == pytest.approx([scale * seconds for seconds in expected], abs=0.11)
    assert [rect.get("class") for rect in rects[:5]] == ["part1", "part2", "part4", "part5", "part8"]
    assert "rank 1, forward: 1500 ms" in words(section).replace(",500", "500")
    table = words(section)
    assert "forward 40.00 1200.00 1500.00 rank 1 1.67x" in table
    assert "rank 1 1500.00 10.00 1400.00 50.00" in table


def test_of_many_ranks_those_with_most_work_are_shown(tmp_path: Path, recipe: Recipe):
    ranks = 40
    phases = {
        "forward": [1 + rank / 100 for rank in range(ranks)],
        "gather": [1.4 - rank / 100 for rank in range(ranks)],
    }
    page = page_of(logs(tmp_path / "run", [step_line(1, phases=phases, workers=ranks)], []), recipe)
    section = sections(page)["Where the time went"]
    assert "of 40 ranks the 16 with most work of their own" in words(section)
    bars = re.findall(r"rank (\d+), forward", words(section))
    assert bars == [str(rank) for rank in range(39, 23, -1)]


def test_a_hundred_thousand_steps_make_a_small_page_in_bounded_time(tmp_path: Path, recipe: Recipe):
    folder = tmp_path / "run"
    folder.mkdir()
    text = json.dumps(step_line(1))
    with (folder / METRICS).open("w") as stream:
        for step in range(1, 100_001):
            loss = 60.0 if step == 77_777 else 1.0
            stream.write(
                text.replace('"step": 1,', f'"step": {step},').replace('"loss": 2.0,', f'"loss": {loss},') + "\n"
            )
    started = time.monotonic()
    page = page_of(folder, recipe)
    assert time.monotonic() - started < 40
    assert (folder / TRAIN_REPORT_PAGE).stat().st_size < 150_000
    assert tiles(page)["steps"] == "100,000 of 400" and tiles(page)["time"] == "83.3\xa0h of steps"
    loss = next(sections(page)["Curves"].iter("figure"))
    raw = next(line for line in loss.iter() if line.tag.endswith("polyline") and line.get("class") == "faint")
    assert min(float(point.split(",")[1]) for point in (raw.get("points") or "").split()) < 15  # the peak is not lost


@pytest.mark.parametrize("lines", [[], [{"step": 3}], [{"step": 1, "loss": None, "phases": {}}], [step_line(1)]])
def test_runs_with_next_to_nothing_have_a_page(tmp_path: Path, recipe: Recipe, lines: list[dict[str, Any]]):
    page = page_of(logs(tmp_path / "run", lines, [{"step": 0, "event": "start"}] if lines else []), recipe)
    assert tiles(page)["steps"].split()[0] == str(lines[-1]["step"] if lines else 0)
    assert list(sections(page)) == [
        "What limits the speed", "Curves", "Where the time went", "Checkpoints", "Recipe",
    ]  # fmt: skip


def test_a_folder_without_logs_has_a_page_and_old_logs_too(tmp_path: Path, recipe: Recipe):
    (tmp_path / "none").mkdir()
    assert "No step was logged." in words(page_of(tmp_path / "none", recipe))
    old = [{"step": s, "total_steps": 9, "learning_rate": 1e-5, "loss": 1.0, "masked_share": 0.1,
            "examples_per_s": 80.0, "tokens_per_s": 900.0} for s in (1, 2)]  # fmt: skip
    page = page_of(logs(tmp_path / "old", old, []), recipe)
    assert tiles(page)["time"] == "– of steps" and len(list(sections(page)["Curves"].iter("figure"))) == 4


def test_lines_stand_for_the_steps_since_the_line_before(tmp_path: Path, recipe: Recipe):
    page = page_of(logs(tmp_path / "run", [step_line(step) for step in (10, 20, 25)], []), recipe)
    assert tiles(page)["time"] == "75\xa0s of steps"


def test_what_metrics_log_writes_is_what_the_report_reads(tmp_path: Path, recipe: Recipe):
    for start, stop in ((0, 12), (10, 20)):
        log = MetricsLog(tmp_path, start)
        log.write_event({"step": start, "event": "start", "workers": 2})
        for step in range(start + 1, stop + 1):
            log.write(step_line(step, 20))
        log.close()
        with (tmp_path / VALIDATIONS).open("a") as stream:
            stream.write(json.dumps({"step": stop, "event": "validation", "score": 0.5 + stop / 100}) + "\n")
    page = page_of(tmp_path, recipe)
    assert tiles(page)["steps"] == "20 of 20" and tiles(page)["validation, best"] == "0.7000 at step 20"
    assert "step 10 2 2" in words(sections(page)["Restarts"])
