"""HTML: data to one self-contained page. Pure functions, no scripts, no outside assets.

Every function returns a piece of HTML; texts are escaped here and nowhere else, and characters that XML forbids become
U+FFFD, because texts of data sets hold them. Colours follow the reader's light or dark setting. The pages are
well-formed XML too, so that tests (and other programs) can parse them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from gist_ray.style import STYLE

Cell = str | int | float | None
Point = tuple[float, float]
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_BARS_WIDTH, _BARS_START, _BARS_END = 820, 230, 690  # bars lie between; names to the left, numbers to the right
_STACK_START = 120
_DOTS_TOP, _DOTS_ROW = 26, 24  # the scale's numbers; a category or a pair of dots
_CHART_WIDTH, _CHART_HEIGHT = 420, 200
_CHART_POINTS = 350  # as many as a chart is wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 410, 10, 176  # of the area that a chart draws in
_CURVES = (
    ("loss", "loss", ""),
    ("masked_share", "negatives hidden", "share"),
    ("learning_rate", "learning rate", ""),
    ("tokens_per_s", "throughput", "tokens/s"),
)


def render_report(title: str, intro: str, sections: Sequence[str]) -> str:
    """A whole page from pieces made by the other functions.

    Args:
        title: plain text.
        intro: plain text, one paragraph under the title.
        sections: HTML from `section`, `tiles` and the rest, in order.
    """
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{_escaped(title)}</title><style>{STYLE}</style></head>
<body><main><h1>{_escaped(title)}</h1><p class="intro">{_escaped(intro)}</p>
{body}
</main></body></html>
"""


def section(heading: str, *pieces: str) -> str:
    """A card with a heading around pieces of HTML."""
    return f"<section><h2>{_escaped(heading)}</h2>{''.join(pieces)}</section>"


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{_escaped(text)}</p>"


def preformatted(text: str) -> str:
    """Plain text with its line breaks and columns."""
    return f"<pre>{_escaped(text)}</pre>"


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """The few numbers to read first: (name, value, remark) each."""
    cells = [
        f"<span>{_escaped(name)}</span><b>{_escaped(value)}</b><span>{_escaped(remark)}</span>"
        for name, value, remark in items
    ]
    return '<div class="tiles">' + "".join(f'<div class="tile">{cell}</div>' for cell in cells) + "</div>"


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, tall: bool = False) -> str:
    """A table. Columns of numbers are aligned right; floats get two decimals, None is a dash.

    Args:
        headers: one for each column.
        rows: of cells, in order.
        tall: scroll within a fixed height, below a header that stays, so that hundreds of rows leave the page short.

    Raises:
        ValueError: a row with more or fewer cells than there are headers.
    """
    if any(len(row) != len(headers) for row in rows):
        raise ValueError(f"a row has not {len(headers)} cells, one for each of {list(headers)}")
    numeric = [
        any(_is_number(row[i]) for row in rows) and all(row[i] is None or _is_number(row[i]) for row in rows)
        for i in range(len(headers))
    ]

    def line(tag: str, cells: Sequence[Cell]) -> str:
        marks = [' class="number"' if right else "" for right in numeric]
        pairs = zip(cells, marks, strict=True)
        return "<tr>" + "".join(f"<{tag}{mark}>{_escaped(_cell(cell))}</{tag}>" for cell, mark in pairs) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    box = "scroll tall" if tall else "scroll"
    return f'<div class="{box}"><table><thead>{line("th", headers)}</thead><tbody>{body}</tbody></table></div>'


def bars_before_after(rows: Sequence[tuple[str, float | None, float]]) -> str:
    """Horizontal bars from zero: (name, before or None, after) each, with the difference."""
    if not rows:
        return paragraph("nothing to show")
    paired = any(before is not None for _, before, _ in rows)
    scale = (_BARS_END - _BARS_START) / (max(max(after, before or 0.0) for _, before, after in rows) or 1.0)
    height = 44 if paired else 28
    parts = [_bar_group(row, height * i, height, scale, paired) for i, row in enumerate(rows)]
    bottom = height * len(rows)
    if paired:
        parts.append(_before_after_key(bottom, radius=2))
        bottom += 24
    return _svg(_BARS_WIDTH, bottom, f"bars of {len(rows)} scores", "".join(parts))


def dumbbells(groups: Sequence[tuple[str, Sequence[tuple[str, float | None, float]]]]) -> str:
    """Two dots a row, joined by a line, on one scale, which need not start at zero: for changes that bars would hide.

    Args:
        groups: from top to bottom, a category and its rows, (name, before or None, after) each. Values that are not
            finite have no dot, and a dash for a number.
    """
    rows = [row for _, members in groups for row in members]
    values = [value for _, *pair in rows for value in pair if value is not None and math.isfinite(value)]
    if not values:
        return paragraph("nothing to show")
    ticks = _ticks(min(values), max(values))
    bottom = _DOTS_TOP + _DOTS_ROW * (len(groups) + len(rows))
    parts = [_upright(tick, ticks, bottom) for tick in ticks]
    top = _DOTS_TOP
    for category, members in groups:
        parts.append(f'<text x="4" y="{top + 16}" class="category">{_escaped(clip(category, 34))}</text>')
        for i, row in enumerate(members, 1):
            parts.append(_dumbbell(row, top + _DOTS_ROW * i + _DOTS_ROW // 2, ticks))
        top += _DOTS_ROW * (1 + len(members))
    parts.append(_before_after_key(bottom, radius=5))
    return _svg(_BARS_WIDTH, bottom + 24, f"before and after of {len(rows)} scores", "".join(parts))


def line_chart(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    unit: str = "",
    *,
    x_name: str = "step",
    smooth: bool = True,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A curve with axes. Of a long series each pixel shows the lowest and the highest value.

    Args:
        title: what is drawn.
        xs: ascending positions, `[n]`.
        ys: values, `[n]`; points that are not finite are left out.
        unit: of `ys`.
        x_name: what `xs` counts.
        smooth: draw long series as a smoothed line over the faint raw one.
        marks: positions to draw a vertical line at, and their names; left out where they are beyond the curve.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    caption = f"<figcaption>{_escaped(title)} <span>{_escaped(unit)}</span></figcaption>"
    if not points:
        return f"<figure>{caption}{paragraph('no data')}</figure>"
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), _TOP + (1 - up) * (_BOTTOM - _TOP)

    parts = _grid(y_ticks)
    parts.append(_under(_LEFT, _short(x_low), "start"))
    parts.append(_under(_RIGHT, f"{x_name} {_short(points[-1][0])}", "end"))
    if len(points) == 1:
        x, y = place(*points[0])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="after"/>')
    else:
        parts += [_polyline([place(*point) for point in line], kind) for line, kind in _lines(points, smooth)]
    parts += [_mark(place(x, 0)[0], mark) for x, mark in marks if x_low <= x <= x_high]
    name = f"{title}: {_short(points[0][1])} at first, {_short(points[-1][1])} at last"
    return f"<figure>{caption}{_svg(_CHART_WIDTH, _CHART_HEIGHT, name, ''.join(parts))}</figure>"


def histogram(
    title: str,
    edges: Sequence[float],
    series: Mapping[str, Sequence[int]],
    unit: str = "",
    *,
    mark: tuple[float, str] | None = None,
) -> str:
    """Bars side by side, each as high as its share of the counts in percent.

    Args:
        title: what is counted.
        edges: ascending bounds of the bars, `[n + 1]`.
        series: name to counts `[n]`; a second one is drawn over the first.
        unit: of the shares.
        mark: a position to draw a vertical line at, and its name; left out where it is beyond the bars.

    Raises:
        ValueError: `edges` is not one longer than the counts.
    """
    if any(len(edges) != len(counts) + 1 for counts in series.values()):
        raise ValueError(f"{title}: {len(edges)} edges are not one more than the counts of each of {list(series)}")
    caption = f"<figcaption>{_escaped(title)} <span>{_escaped(unit)}</span></figcaption>"
    shares = {name: [100 * n / sum(counts) for n in counts] for name, counts in series.items() if sum(counts)}
    if not shares:
        return f"<figure>{caption}{paragraph('no data')}</figure>"
    low, high = edges[0], edges[-1]
    y_ticks = _ticks(0.0, max(max(values) for values in shares.values()))
    xs = [_LEFT + (edge - low) / (high - low) * (_RIGHT - _LEFT) for edge in edges]
    parts = _grid(y_ticks)
    for x in _ticks(low, high):
        if low <= x <= high:
            parts.append(_under(_LEFT + (x - low) / (high - low) * (_RIGHT - _LEFT), _short(x), "middle"))
    for i, (name, values) in enumerate(shares.items()):
        kind = "before over" if i else "after"
        for k, share in enumerate(values):
            height = share / y_ticks[-1] * (_BOTTOM - _TOP)
            box = f'x="{xs[k]:.1f}" width="{max(0.5, xs[k + 1] - xs[k] - 0.7):.1f}"'
            box += f' y="{_BOTTOM - height:.1f}" height="{height:.1f}" class="{kind}"'
            hover = f"{name}, {_short(edges[k])} to {_short(edges[k + 1])}: {share:.2f} %"
            parts.append(f"<rect {box}><title>{_escaped(hover)}</title></rect>")
        if len(shares) > 1:
            parts.append(f'<rect x="{_LEFT + 8}" y="{_TOP + 4 + 18 * i}" width="10" height="10" class="{kind}"/>')
            parts.append(f'<text x="{_LEFT + 24}" y="{_TOP + 13 + 18 * i}" class="soft">{_escaped(name)}</text>')
    if mark is not None and low <= mark[0] <= high:
        parts.append(_mark(_LEFT + (mark[0] - low) / (high - low) * (_RIGHT - _LEFT), mark[1]))
    return f"<figure>{caption}{_svg(_CHART_WIDTH, _CHART_HEIGHT, f'histogram: {title}', ''.join(parts))}</figure>"


def training_curves(metrics: Sequence[Mapping[str, float]]) -> str:
    """Charts of what training logged: one mapping a step, with `step` and any of the known measures."""
    charts = []
    for key, title, unit in _CURVES:
        points = [(row["step"], row[key]) for row in metrics if key in row and "step" in row]
        if points:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            charts.append(line_chart(title, xs, ys, unit, smooth=key != "learning_rate"))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else paragraph("no metrics were logged")


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[tuple[str, int]], unit: str) -> str:
    """Horizontal bars from zero, each cut into parts: (name, length of each part) each, with the sum.

    Args:
        rows: from top to bottom; lengths `[parts]` that are not negative.
        parts: their names, and the colour of each, 0 to 8, of which 8 is the faintest.
        unit: of the lengths.
    """
    longest = max((sum(lengths) for _, lengths in rows), default=0.0) or 1.0
    pieces = []
    for i, (name, lengths) in enumerate(rows):
        x, y = float(_STACK_START), 26 * i + 4
        pieces.append(f'<text x="{x - 10}" y="{y + 13}" text-anchor="end">{_escaped(clip(name, 16))}</text>')
        for (part, colour), length in zip(parts, lengths, strict=True):
            hover = f"<title>{_escaped(f'{name}, {part}: {_short(length)} {unit}')}</title>"
            width = length / longest * (_BARS_END - _STACK_START)  # a common factor may overflow
            box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" class="part{colour}"'
            pieces.append(f"<rect {box}>{hover}</rect>")
            x += width
        total = f"{_short(sum(lengths))} {unit}"
        pieces.append(f'<text x="{x + 8:.1f}" y="{y + 13}" class="soft">{_escaped(total)}</text>')
    keys = [f'<span><i class="part{colour}"></i>{_escaped(part)}</span>' for part, colour in parts]
    bars = _svg(_BARS_WIDTH, 26 * len(rows) + 4, f"stacked bars of {len(rows)} rows", "".join(pieces))
    return f'<figure><p class="legend">{" ".join(keys)}</p>{bars}</figure>'


def clip(text: str, length: int) -> str:
    """`text`, cut to `length` characters with a mark where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _bar_group(row: tuple[str, float | None, float], top: int, height: int, scale: float, paired: bool) -> str:
    """Name, one or two bars and the difference."""
    name, before, after = row
    middle, label = top + height // 2, _escaped(clip(name, 34))
    parts = [f'<text x="{_BARS_START - 10}" y="{middle + 3}" text-anchor="end">{label}</text>']
    values = [("before", before), ("after", after)] if paired else [("after", after)]
    parts += [_bar(top + 5 + 17 * i, scale, kind, name, value) for i, (kind, value) in enumerate(values)]
    if before is not None:
        parts.append(_gain(before, after, middle))
    return "".join(parts)


def _bar(y: int, scale: float, kind: str, name: str, value: float | None) -> str:
    if value is None:
        return f'<text x="{_BARS_START + 4}" y="{y + 11}" class="soft">not measured</text>'
    length = max(1.0, value * scale)
    hover = f"<title>{_escaped(name)}, {kind}: {value:.2f}</title>"
    box = f'x="{_BARS_START}" y="{y}" width="{length:.1f}" height="14"'
    number = f'<text x="{_BARS_START + length + 6:.1f}" y="{y + 11}" class="soft">{value:.2f}</text>'
    return f'<rect {box} rx="3" class="{kind}">{hover}</rect>{number}'


def _gain(before: float, after: float, middle: int) -> str:
    """The difference, at the right edge."""
    gain = after - before
    place = f'x="{_BARS_WIDTH - 4}" y="{middle + 3}" text-anchor="end"'
    return f'<text {place} class="{_tone(gain)}">{gain:+.2f}</text>'


def _tone(gain: float) -> str:
    return "up" if gain > 0 else "down" if gain < 0 else "soft"


def _before_after_key(top: int, radius: int) -> str:
    """Which colour is which."""
    return "".join(
        f'<rect x="{x}" y="{top + 6}" width="10" height="10" rx="{radius}" class="{kind}"/>'
        f'<text x="{x + 16}" y="{top + 15}" class="soft">{kind}</text>'
        for x, kind in ((_BARS_START, "before"), (_BARS_START + 80, "after"))
    )


def _upright(tick: float, ticks: Sequence[float], bottom: int) -> str:
    """A line of the scale from top to bottom, with its value above."""
    x = f"{_across(tick, ticks):.1f}"
    line = f'<line x1="{x}" x2="{x}" y1="{_DOTS_TOP - 6}" y2="{bottom}" class="grid"/>'
    return f'{line}<text x="{x}" y="12" text-anchor="middle" class="soft">{_short(tick)}</text>'


def _dumbbell(row: tuple[str, float | None, float], y: int, ticks: Sequence[float]) -> str:
    """Name, dots, the second value and the difference."""
    name, *pair = row
    before, after = (value if value is not None and math.isfinite(value) else None for value in pair)
    parts = [f'<text x="{_BARS_START - 10}" y="{y + 4}" text-anchor="end">{_escaped(clip(name, 34))}</text>']
    if before is not None and after is not None:
        ends = f'x1="{_across(before, ticks):.1f}" x2="{_across(after, ticks):.1f}" y1="{y}" y2="{y}"'
        parts += [f'<line {ends} class="span {_tone(after - before)}"/>', _gain(before, after, y + 1)]
    for kind, value in (("before", before), ("after", after)):
        if value is not None:
            hover = f"<title>{_escaped(f'{name}, {kind}: {value:.2f}')}</title>"
            parts.append(f'<circle cx="{_across(value, ticks):.1f}" cy="{y}" r="5" class="{kind}">{hover}</circle>')
    parts.append(f'<text x="{_BARS_END + 66}" y="{y + 4}" text-anchor="end" class="soft">{_cell(after)}</text>')
    return "".join(parts)


def _across(value: float, ticks: Sequence[float]) -> float:
    """Where a value lies on a scale that the ticks span."""
    return _BARS_START + 10 + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_BARS_END - _BARS_START - 10)


def _grid(y_ticks: Sequence[float]) -> list[str]:
    """Horizontal lines of a chart with their values."""
    parts = []
    for tick in y_ticks:
        up = (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        y = _TOP + (1 - up) * (_BOTTOM - _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="soft">{_short(tick)}</text>')
    return parts


def _mark(x: float, name: str) -> str:
    """A vertical line across a chart's area, its name on the side with more room."""
    side, shift = ("end", -5) if x > (_LEFT + _RIGHT) / 2 else ("start", 5)
    place = f'x="{x + shift:.1f}" y="{_TOP + 12}" text-anchor="{side}"'
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}" class="mark"/>'
    return f'{line}<text {place} class="down">{_escaped(name)}</text>'


def _under(x: float, text: str, anchor: str) -> str:
    """A text below a chart's area."""
    place = f'x="{x:.1f}" y="{_CHART_HEIGHT - 6}" text-anchor="{anchor}"'
    return f'<text {place} class="soft">{_escaped(text)}</text>'


def _svg(width: float, height: float, name: str, inner: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{_escaped(name)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inner}</svg>'
    )


def _polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _lines(points: Sequence[Point], smooth: bool) -> list[tuple[Sequence[Point], str]]:
    """The lines that show a series, and their kinds: itself, faint below its smoothed self if so wished."""
    extremes, means = _thinned(points)
    if not smooth:
        return [(extremes, "curve")]
    smoothed = zip([x for x, _ in means], _smoothed([y for _, y in means]), strict=True)
    return [(extremes, "faint"), (list(smoothed), "curve")]


def _thinned(points: Sequence[Point]) -> tuple[Sequence[Point], Sequence[Point]]:
    """The lowest and the highest point of each of a chart's pixels, and the mean points; few points as they are."""
    size = -(-len(points) // _CHART_POINTS)
    if size == 1:
        return points, points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    extremes = [{min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])} for g in groups]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [point for pair in extremes for point in sorted(pair)], means


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the series; short series stay as they are."""
    reach = len(values) // 40
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = high - low if high > low else abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float)


def _escaped(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))
