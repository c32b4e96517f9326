"""Pages: well-formed, escaped, self-contained."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray import html

NASTY = "<script>alert('x')</script> & \"quotes\""
CONTROL = "a\x00\x0b\x1f\ud800\udfff\ufffe\uffff\tb"


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def words(piece: str) -> str:
    return " ".join(parse(f"<x>{piece}</x>").itertext())


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
    return html.render_report(
        NASTY,
        NASTY,
        [
            html.tiles([(NASTY, NASTY, NASTY)]),
            html.section(NASTY, html.paragraph(NASTY), html.bars_before_after([(NASTY, 50.0, 61.25)])),
            html.section("table", html.table([NASTY, "score"], [[NASTY, 1.0], [None, None]])),
            html.section("training", html.training_curves(metrics)),
        ],
    )


def test_page_is_well_formed_and_escapes_every_text():
    source = full_page()
    page = parse(source)
    assert source.startswith("<!DOCTYPE html>")
    assert not list(page.iter("script"))
    assert "<script" not in source
    assert page.findtext("head/title") == NASTY
    assert page.findtext("body/main/h1") == NASTY


def test_page_needs_nothing_from_outside():
    source = full_page().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|src=|href=|url\(|@import", source)
    assert "prefers-color-scheme: dark" in source


def test_bars_show_values_and_the_gain():
    text = words(html.bars_before_after([("up", 50.0, 61.25), ("down", 3.0, 2.0), ("new", None, 7.0)]))
    for expected in ("50.00", "61.25", "+11.25", "-1.00", "not measured", "7.00", "before"):
        assert expected in text
    assert "before" not in words(html.bars_before_after([("alone", None, 7.0)]))


def test_bars_are_proportional_and_stay_inside():
    svg = parse(f"<x>{html.bars_before_after([('a', 25.0, 100.0), ('zero', 0.0, 0.0)])}</x>")
    bars = [rect for rect in svg.iter() if rect.tag.endswith("rect") and rect.get("height") == "14"]
    widths = [float(rect.get("width")) for rect in bars]
    assert widths[1] == pytest.approx(4 * widths[0], rel=1e-3)
    assert widths[1] + 230 <= 690
    assert widths[2:] == [1.0, 1.0]


def dumbbells(groups):
    """Dots and spans of a dumbbell plot, by row: their classes and places, from top to bottom."""
    rows: dict[float, dict[str, list[float]]] = {}
    for element in parse(f"<x>{html.dumbbells(groups)}</x>").iter():
        kind = element.get("class")
        if element.tag.endswith("circle"):
            rows.setdefault(float(element.get("cy")), {})[kind] = [float(element.get("cx"))]
        elif element.tag.endswith("line") and "span" in kind:
            ends = [float(element.get("x1")), float(element.get("x2"))]
            rows.setdefault(float(element.get("y1")), {})[kind] = ends
    return [rows[y] for y in sorted(rows)]


def test_dumbbells_join_before_and_after_on_one_scale():
    groups = [
        ("STS", [("up", 60.0, 80.0), ("down", 70.0, 65.0)]),
        ("<b> & c", [("new", None, 70.0), ("same", 60.0, 60.0)]),
    ]
    up, down, new, same = dumbbells(groups)
    per_point = (up["after"][0] - up["before"][0]) / 20
    assert per_point > 10, "a scale from zero"
    assert down["before"][0] - down["after"][0] == pytest.approx(5 * per_point, abs=0.1)
    assert down["before"] == new["after"] and up["before"] == same["before"] == same["after"]
    assert up["span up"] == up["before"] + up["after"] and down["span down"] == down["before"] + down["after"]
    assert list(new) == ["after"] and "span soft" in same
    text = words(html.dumbbells(groups))
    assert text.index("STS") < text.index("up") < text.index("<b> & c") < text.index("new")
    assert all(number in text for number in ("+20.00", "-5.00", "+0.00", "80.00", "before"))


values = st.floats(allow_nan=True, allow_infinity=True, width=16)


@given(st.lists(st.tuples(st.text(max_size=40), st.none() | values, values), max_size=8))
def test_any_scores_make_well_formed_dumbbells_inside_their_box(rows):
    for row in dumbbells([("kind", rows)]):
        assert all(230 <= x <= 700 for places in row.values() for x in places)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60))
def test_any_series_makes_a_well_formed_chart_inside_its_box(values):
    chart = parse(html.line_chart("loss", list(range(len(values))), values, "nats"))
    for line in (element for element in chart.iter() if element.tag.endswith("polyline")):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 420 and 0 <= y <= 200


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        html.line_chart("loss", [1, 2], [1.0])
    with pytest.raises(ValueError, match="2 cells"):
        html.table(["a", "b"], [["only one"]])


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.42, 0.44), (1e-6, 2e-5), (-3.0, 5.0), (7.0, 7.0), (0.0, 0.0)])
def test_ticks_are_round_and_enclose_the_data(low, high):
    ticks = html._ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7


def test_curves_without_metrics_say_so():
    assert "no metrics" in html.training_curves([])
    assert "no data" in html.line_chart("loss", [], [])


def test_numbers_align_right_and_missing_ones_are_a_dash():
    source = html.table(["name", "score", "rows"], [["a", 1.0, 1234], ["b", None, 5]])
    assert '<td class="number">1.00</td>' in source and '<td class="number">–</td>' in source
    assert "1,234" in source and "<td>a</td>" in source


def test_characters_that_xml_forbids_are_replaced():
    pieces = [
        html.paragraph(CONTROL),
        html.tiles([(CONTROL, CONTROL, CONTROL)]),
        html.table([CONTROL], [[CONTROL]]),
        html.bars_before_after([(CONTROL, 1.0, 2.0)]),
        html.dumbbells([(CONTROL, [("task", 1.0, 2.0)])]),
        html.dumbbells([("kind", [(CONTROL, 1.0, 2.0)])]),
        html.line_chart(CONTROL, [1, 2], [1, 2], CONTROL, x_name=CONTROL),
        html.histogram(CONTROL, [0, 1], {CONTROL: [1], "b": [1]}, CONTROL, mark=(0.5, CONTROL)),
    ]
    for piece in pieces:
        piece.encode()
        assert "a" + 7 * "\ufffd" + "\tb" in words(piece)
    assert words(html.paragraph("\U0001f600 \ue000 \ud7ff")) == "\U0001f600 \ue000 \ud7ff"


def rects(chart: str, kind: str) -> list[dict[str, float]]:
    """Bars of a chart, with `left`, `right`, `top` and `bottom`; the legend's squares are not among them."""
    found = [r for r in parse(chart).iter() if r.tag.endswith("rect") and r.get("class") == kind and len(r)]
    sides = [{k: float(r.get(k)) for k in ("x", "y", "width", "height")} for r in found]
    return [
        {"left": s["x"], "right": s["x"] + s["width"], "top": s["y"], "bottom": s["y"] + s["height"]} for s in sides
    ]


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=60),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e3),
)
def test_any_histogram_stands_on_its_axis_inside_its_box(counts, low, step):
    edges = [low + step * i for i in range(len(counts) + 1)]
    series = {"p": [a for a, _ in counts], "n": [b for _, b in counts]}
    chart = html.histogram("similarity", edges, series, mark=(edges[0], "limit"))
    for kind in ("after", "before over"):
        for bar in rects(chart, kind):
            assert bar["bottom"] == pytest.approx(176, abs=0.11)
            assert 56 <= bar["left"] and bar["right"] <= 411 and bar["top"] >= 9.9


def test_histogram_bars_are_shares_of_their_own_series():
    chart = html.histogram("t", [0, 1, 2, 3], {"p": [1, 2, 1], "n": [10, 0, 0]}, mark=(2.0, "limit"))
    first, second = rects(chart, "after"), rects(chart, "before over")
    heights = [bar["bottom"] - bar["top"] for bar in first]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[0] == heights[2]
    assert second[0]["bottom"] - second[0]["top"] == pytest.approx(4 * heights[0], abs=0.4)
    assert "p, 1 to 2: 50.00 %" in words(chart) and "limit" in words(chart)
    alone = html.histogram("t", [0, 1], {"p": [1], "n": [0]}, mark=(7.0, "limit"))
    assert "limit" not in words(alone) and "before" not in alone  # out of range; nothing to draw, no legend
    assert "no data" in html.histogram("t", [0, 1], {"p": [0]})
    with pytest.raises(ValueError, match="2 edges"):
        html.histogram("t", [0, 1], {"p": [1, 2]})


def test_tall_tables_scroll():
    assert 'class="scroll tall"' in html.table(["a"], [["b"]], tall=True)
    assert "tall" not in html.table(["a"], [["b"]])
    assert html.clip("abcdef", 4) == "abc…" and html.clip("abcd", 4) == "abcd"


def test_a_long_series_is_drawn_with_few_points_and_all_its_peaks():
    values = [0.0] * 100_000
    values[54_321] = 8.0
    chart = parse(html.line_chart("loss", list(range(100_000)), values))
    faint, curve = (line.get("points").split() for line in chart.iter() if line.tag.endswith("polyline"))
    assert len(faint) <= 700 and len(curve) <= 350
    peak = min(faint, key=lambda point: float(point.split(",")[1])).split(",")
    assert float(peak[1]) == pytest.approx(10) and float(peak[0]) == pytest.approx(56 + 0.54321 * 354, abs=1)
    assert [float(p.split(",")[0]) for p in faint] == sorted(float(p.split(",")[0]) for p in faint)
    assert min(float(point.split(",")[1]) for point in curve) > 150  # one value among a thousand barely moves the mean
    (raw,) = (
        e for e in parse(html.line_chart("lr", [1, 2], [1, 2], smooth=False)).iter() if e.tag.endswith("polyline")
    )
    assert raw.get("class") == "curve"


def test_marks_are_drawn_where_they_are_and_left_out_beyond_the_curve():
    chart = html.line_chart("loss", [0, 10], [1, 2], marks=[(5, "restart"), (10, ""), (11, "late"), (-1, "early")])
    lines = [e for e in parse(chart).iter() if e.tag.endswith("line") and e.get("class") == "mark"]
    assert [float(line.get("x1")) for line in lines] == [233.0, 410.0]
    assert "restart" in words(chart) and "late" not in words(chart) and "early" not in words(chart)


@given(st.lists(st.lists(st.floats(0, 1e9), min_size=3, max_size=3), max_size=20))
def test_stacked_bars_are_proportional_and_stay_inside(rows):
    parts = [(CONTROL, 0), ("b", 3), ("other", 8)]
    bars = parse(html.stacked_bars([(f"rank {i}", row) for i, row in enumerate(rows)], parts, "ms"))
    rects = [e for e in bars.iter() if e.tag.endswith("rect")]
    assert len(rects) == 3 * len(rows)
    longest = max((sum(row) for row in rows), default=0) or 1
    for i, row in enumerate(rows):
        x = 120.0
        for rect, length, (_, colour) in zip(rects[3 * i : 3 * i + 3], row, parts, strict=True):
            assert float(rect.get("x")) == pytest.approx(x, abs=0.06)
            assert float(rect.get("width")) == pytest.approx(length / longest * 570, abs=0.06)
            assert rect.get("class") == f"part{colour}"
            x += length / longest * 570
        assert x <= 690.1


def test_stacked_bars_want_a_length_for_each_part():
    with pytest.raises(ValueError, match="zip"):
        html.stacked_bars([("rank 0", [1.0])], [("a", 0), ("b", 1)], "ms")


def test_preformatted_text_keeps_its_lines_and_is_escaped():
    assert html.preformatted(f"a: 1\n  b: {NASTY}").count("\n") == 1
    assert "<script" not in html.preformatted(NASTY) and words(html.preformatted(NASTY)) == NASTY
