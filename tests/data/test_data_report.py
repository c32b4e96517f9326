"""The data report: figures, the masked share against the loss, and the page that shows them."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from gist_ray.config import LossConfig
from gist_ray.data.report import DATA_REPORT, DATA_REPORT_PAGE, masked_share, read_data_report, write_data_report
from gist_ray.data.statistics import MeasuredRows, Statistics, TaskStatistics, measure
from gist_ray.errors import InputError
from gist_ray.training.loss import Candidates, guided_contrastive_loss

NASTY = "<script>alert(1)</script> & \x00\x1b[31m\ud800\ufffe"
FACTS = {"max_tokens": 100, "texts": 5_000, "guide": NASTY, "filters": {"guide_order": False}}


def vectors(generator: np.random.Generator, count: int, dim: int = 16) -> np.ndarray:
    values = generator.normal(size=(count, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(20))
def test_masked_share_counts_what_the_loss_counts(seed: int):
    """Texts repeat across roles, rows have none to several negatives, and every id has one vector, as in shards."""
    generator = np.random.default_rng(seed)
    size, negatives = int(generator.integers(2, 40)), int(generator.integers(0, 60))
    table = vectors(generator, 60)
    ids = [generator.integers(0, 60, count) for count in (size, size, negatives)]
    guide = [table[found] for found in ids]
    roles = [
        Candidates(torch.zeros(len(i), 4), torch.tensor(v), torch.tensor(i)) for v, i in zip(guide, ids, strict=True)
    ]
    losses = guided_contrastive_loss(*roles, torch.arange(size), LossConfig())
    assert losses.hidden > 0
    assert masked_share(*guide, *ids) == losses.hidden.item() / losses.candidates.item()


def test_a_row_alone_has_nothing_to_mask():
    one, none = vectors(np.random.default_rng(0), 1), vectors(np.random.default_rng(0), 0)
    assert masked_share(one, one, none, np.array([0]), np.array([1]), np.zeros(0, np.int64)) == 0.0


def rows_of(task: str, count: int, seed: int, text: str = "text", dropped: int = 0) -> Statistics:
    """`count` kept rows and `dropped` others. Every fourth positive repeats; every row has one negative."""
    generator = np.random.default_rng(seed)
    total = count + dropped
    keys = generator.integers(0, 256, (3 * total, 16), dtype=np.uint8).view("S16")[:, 0]
    positive = keys[np.arange(total) - np.arange(total) % 4]
    kept = np.arange(total) < count
    return measure(
        MeasuredRows(
            tasks=[task],
            task=np.zeros(total, np.int64),
            row=np.where(kept, np.arange(total), -1),
            reasons=["guide(q, p) is below data.filters.min_similarity"],
            dropped=np.where(kept, 0, 1),
            query_key=keys[total : 2 * total],
            positive_key=positive,
            negative_starts=np.arange(total + 1),
            negative_key=keys[2 * total :],
            query_tokens=np.full(total, 10),
            positive_tokens=np.full(total, 90),
            negative_tokens=np.arange(total) + 61,
            max_tokens=100,
            guide_positive=np.full(total, 0.5, np.float32),
            guide_negative=np.linspace(0, 1, total).astype(np.float32),
            text=lambda i: (f"{text} q{i}", f"{text} p{i}", [f"{text} n{i}"]),
        )
    )


def written(folder: Path, statistics: Statistics, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"name": "run", "rejects": {}, "not_selected": 0, "masked": {}, "facts": FACTS}
    write_data_report(folder, statistics=statistics, **{**given, **changes})
    return read_data_report(folder)


def page_of(folder: Path) -> ElementTree.Element:
    return ElementTree.fromstring((folder / DATA_REPORT_PAGE).read_text().removeprefix("<!DOCTYPE html>"))


def words_of(folder: Path) -> str:
    return " ".join(page_of(folder).itertext()).replace("\xa0", " ")


def test_figures_of_a_task_and_of_all(tmp_path: Path):
    statistics = rows_of("a", 80, 0, dropped=20).merge(rows_of("b", 240, 1))
    report = written(
        tmp_path,
        statistics,
        rejects={"a": {"pos equals query": 60}, "c": {"query is empty": 5}, "(no task)": {"not a mapping": 1}},
        masked={"a": 0.5, "b": 0.1, "c": None},
        not_selected=1234,
    )
    assert list(report["tasks"]) == ["b", "a", "(no task)", "c"]  # by rows
    a, whole = report["tasks"]["a"], report["all"]
    assert a["rejects"] == {"pos equals query": 60, "guide(q, p) is below data.filters.min_similarity": 20}
    assert a["rejected"] == 0.5 and (a["rows"], a["texts"], a["negatives"]) == (80, 240, 80)
    assert a["tokens"] == {"p5": 10, "p50": 90, "p95": 128, "p99": 138, "max": 140}
    assert a["truncated"] == pytest.approx(40 / 240)
    assert a["repeated_texts"] == pytest.approx(60 / 240) and a["repeated_rows"] == 0.0
    assert a["misranked"] == pytest.approx(30 / 80)  # linspace over 100, the first 80 kept
    assert a["guide_positive"] == 0.5 and a["guide_positive_p5"] == 0.5
    assert a["masked"] == 0.5 and whole["masked"] == pytest.approx((80 * 0.5 + 240 * 0.1) / 320)
    assert whole["rows"] == 320 and sum(whole["rejects"].values()) == 86
    assert whole["rejected"] == pytest.approx(86 / 406)
    assert report["not_selected"] == 1234
    empty = report["tasks"]["c"]
    assert empty["rows"] == 0 and empty["truncated"] is None and empty["masked"] is None and empty["rejected"] == 1
    assert sum(whole["histograms"]["tokens"].values()) == whole["texts"] == 960
    assert [len(found) for found in a["examples"].values()] == [5, 5, 5]
    assert (
        a["examples"]["longest"][0] | {"negative": "text n79", "tokens": [10, 90, 140]} == a["examples"]["longest"][0]
    )


def test_the_page_says_what_to_do(tmp_path: Path):
    statistics = rows_of("a", 80, 0, dropped=20).merge(rows_of("b", 240, 1))
    written(
        tmp_path, statistics, rejects={"a": {"pos equals query": 60}}, masked={"a": 0.5, "b": 0.1}, not_selected=1234
    )
    words = words_of(tmp_path)
    for key in ("data.filters.guide_order", "data.filters.min_similarity", "student.max_tokens", "loss.margin",
                "data.max_chars"):  # fmt: skip
        assert key in words
    for figure in ("misranked rows 46.9 % ▲ over 5 %", "expected masked 20.0 % fine", "1,234 rows of tasks",
                   "pos equals query 60 a (60)", "cut at 100", "Most in b (50.0 %) and a (37.5 %)"):  # fmt: skip
        assert figure in words, figure
    order = [words.index(figure) for figure in ("misranked rows", "truncated texts", "expected masked")]
    assert order == sorted(order)  # what is worth a look comes first
    headings = [heading.text for heading in page_of(tmp_path).iter("h2")]
    assert headings[0] == "What to look at" and "Longest texts" in headings


def test_texts_of_the_data_cannot_break_the_page_or_the_json(tmp_path: Path):
    written(tmp_path, rows_of(NASTY, 8, 0, text=NASTY), name=NASTY, rejects={NASTY: {NASTY: 1}}, masked={NASTY: 0.0})
    source = (tmp_path / DATA_REPORT_PAGE).read_text()
    page = page_of(tmp_path)
    assert not list(page.iter("script")) and "<script" not in source
    assert any("<script>alert(1)</script> & " in text for text in page.itertext())
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe]", source)
    assert not re.search(
        r"https?://|src=|href=|url\(|@import", source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    [task] = read_data_report(tmp_path)["tasks"].values()
    assert task["examples"]["misranked"][0]["query"] == f"{NASTY} q7".replace("\ud800", "?")


def test_hundreds_of_tasks_stay_readable(tmp_path: Path):
    one = rows_of("t", 40, 0).tasks["t"]
    statistics = Statistics({f"task-{i:03d}": one for i in range(300)})
    written(tmp_path, statistics)
    tall = [box for box in page_of(tmp_path).iter("div") if "tall" in box.get("class", "")]
    assert len(tall) == 1 and len(list(tall[0].iter("tr"))) == 301
    assert (tmp_path / DATA_REPORT_PAGE).stat().st_size < 200_000
    written(tmp_path, Statistics({"task": one}))
    assert not [box for box in page_of(tmp_path).iter("div") if "tall" in box.get("class", "")]


def test_one_dirty_task_does_not_hide_the_examples_of_others(tmp_path: Path):
    tasks = {f"task-{i}": rows_of("t", 40, i).tasks["t"] for i in range(5)}
    tasks["dirty"] = rows_of("t", 400, 9).tasks["t"]  # its longest texts are longer than any other's
    written(tmp_path, Statistics(tasks))
    longest = next(s for s in page_of(tmp_path).iter("section") if s.findtext("h2") == "Longest texts")
    where = [row.find("td").text.split(",")[0] for row in longest.iter("tr") if row.find("td") is not None]
    assert len(where) == 10 and where.count("dirty") == 2 and where[0] == "dirty"


def test_estimates_are_marked_and_the_exact_number_is_taken_where_it_is_known(tmp_path: Path):
    many = rows_of("a", 4_000, 0)
    assert not many.tasks["a"].distinct_texts.exact
    report = written(tmp_path, many, facts={"max_tokens": 100})
    assert not report["all"]["distinct_texts_exact"] and "≈ " in words_of(tmp_path)
    assert report["all"]["distinct_texts"] == pytest.approx(9_000, rel=5 / 64)
    assert "estimates in tasks with more than 4,096" in words_of(tmp_path)
    report = written(tmp_path, many, facts={"max_tokens": 100, "texts": 9_000})
    assert report["all"]["distinct_texts"] == 9_000 and report["all"]["repeated_texts"] == 0.25
    assert "≈ " not in words_of(tmp_path)
    written(tmp_path, many.merge(rows_of("a", 0, 1, dropped=1)), facts={"texts": 9_001})
    assert "≈ " in words_of(tmp_path)  # the exact number takes in the texts of dropped rows


def test_misranked_rows_are_a_share_of_the_rows_that_have_a_negative(tmp_path: Path):
    task = TaskStatistics(rows=10, texts=24, negatives=4, rows_with_negatives=4, misranked_rows=1)
    assert written(tmp_path, Statistics({"t": task}))["tasks"]["t"]["misranked"] == 0.25


def test_data_without_rows_or_rejects_still_make_a_page(tmp_path: Path):
    report = written(tmp_path, Statistics(), facts={})
    assert report["all"]["rows"] == 0 and report["tasks"] == {}
    words = words_of(tmp_path)
    assert "No row was rejected." in words and "no data" in words and "None." in words


def test_a_missing_or_damaged_report_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="run `gist-ray prepare` first"):
        read_data_report(tmp_path)
    (tmp_path / DATA_REPORT).write_text('{"name": ')
    with pytest.raises(InputError, match="cannot be read"):
        read_data_report(tmp_path)
