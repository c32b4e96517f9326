"""The report page: well-formed, escaped, self-contained."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.evaluation import report

NASTY = "<script>alert('x')</script> & \"quotes\""


def parse(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def words(html: str) -> str:
    return " ".join(parse(f"<x>{html}</x>").itertext())


def full_page() -> str:
    metrics = [
        {
            "step": i,
            "loss": 3 / (i + 1),
            "learning_rate": 2e-5,
            "masked_share": 0.1,
            "tokens_per_s": 9000.0 + i,
        }
        for i in range(100)
    ]
    return report.render_report(
        NASTY,
        NASTY,
        [
            report.tiles([(NASTY, NASTY, NASTY)]),
            report.section(NASTY, report.paragraph(NASTY), report.bars_before_after([(NASTY, 50.0, 61.25)])),
            report.section("table", report.table([NASTY, "score"], [[NASTY, 1.0], [None, None]])),
            report.section("training", report.training_curves(metrics)),
        ],
    )


def test_page_is_well_formed_and_escapes_every_text():
    html = full_page()
    page = parse(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not list(page.iter("script"))
    assert "<script" not in html
    assert page.findtext("head/title") == NASTY
    assert page.findtext("body/main/h1") == NASTY


def test_page_needs_nothing_from_outside():
    html = full_page().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|src=|href=|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_bars_show_values_and_the_gain():
    text = words(report.bars_before_after([("up", 50.0, 61.25), ("down", 3.0, 2.0), ("new", None, 7.0)]))
    for expected in ("50.00", "61.25", "+11.25", "-1.00", "not measured", "7.00", "before"):
        assert expected in text
    assert "before" not in words(report.bars_before_after([("alone", None, 7.0)]))


def test_bars_are_proportional_and_stay_inside():
    svg = parse(f"<x>{report.bars_before_after([('a', 25.0, 100.0), ('zero', 0.0, 0.0)])}</x>")
    bars = [rect for rect in svg.iter() if rect.tag.endswith("rect") and rect.get("height") == "14"]
    widths = [float(rect.get("width")) for rect in bars]
    assert widths[1] == pytest.approx(4 * widths[0], rel=1e-3)
    assert widths[1] + 230 <= 690
    assert widths[2:] == [1.0, 1.0]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60))
def test_any_series_makes_a_well_formed_chart_inside_its_box(values):
    chart = parse(report.line_chart("loss", list(range(len(values))), values, "nats"))
    for line in (element for element in chart.iter() if element.tag.endswith("polyline")):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 420 and 0 <= y <= 200


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        report.line_chart("loss", [1, 2], [1.0])
    with pytest.raises(ValueError, match="2 cells"):
        report.table(["a", "b"], [["only one"]])


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.42, 0.44), (1e-6, 2e-5), (-3.0, 5.0), (7.0, 7.0), (0.0, 0.0)])
def test_ticks_are_round_and_enclose_the_data(low, high):
    ticks = report._ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7


def test_curves_without_metrics_say_so():
    assert "no metrics" in report.training_curves([])
    assert "no data" in report.line_chart("loss", [], [])


def test_numbers_align_right_and_missing_ones_are_a_dash():
    html = report.table(["name", "score", "rows"], [["a", 1.0, 1234], ["b", None, 5]])
    assert '<td class="number">1.00</td>' in html and '<td class="number">–</td>' in html
    assert "1,234" in html and "<td>a</td>" in html
