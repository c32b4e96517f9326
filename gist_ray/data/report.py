"""Data report: statistics of a data set to `data_report.json` and `data_report.html`, and what to do about them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray import html
from gist_ray.data.sketch import SKETCH_HASHES
from gist_ray.data.statistics import GUIDE_BINS, Statistics, TaskStatistics
from gist_ray.errors import InputError
from gist_ray.manifest import write_json, write_whole

DATA_REPORT = "data_report.json"
DATA_REPORT_PAGE = "data_report.html"

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Summary = dict[str, Any]

_QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
_EXAMPLES_SHOWN = 10
_CHARS_SHOWN = 200
_NAME_CHARS = 48
_TALL_FROM = 25
_LENGTH_BARS = 40
# Rules of thumb in percent; what is above gets a mark. None is a limit of the method.
_LOOK_ABOVE = {"rejected": 1.0, "truncated": 5.0, "repeated_texts": 50.0, "repeated_rows": 2.0, "misranked": 5.0,
               "masked": 30.0}  # fmt: skip


def masked_share(
    query: Floats,
    positive: Floats,
    negatives: Floats,
    query_ids: Ints,
    positive_ids: Ints,
    negative_ids: Ints,
) -> float:
    """Share of the in-batch candidates that the guide hides when b rows of one task are a batch, at margin 0.

    The same four blocks and the same exclusion of identical texts as `gist_ray.training.loss.guided_contrastive_loss`
    (arXiv 2402.16829): the expected false-negative rate, as far as the guide can tell.

    Args:
        query: guide vectors, `[b, dim]` fp32 of unit norm.
        positive: `[b, dim]`.
        negatives: of all rows, `[m, dim]`.
        query_ids: text ids, `[b]`; equal ids mean equal texts.
        positive_ids: `[b]`.
        negative_ids: `[m]`.

    Returns:
        hidden / candidates; 0 where there is no candidate.
    """
    threshold = (query * positive).sum(axis=1, keepdims=True)
    hidden = candidates = 0
    for anchor, others, ids in (
        (query, positive, positive_ids),
        (query, negatives, negative_ids),
        (query, query, query_ids),
        (positive, positive, positive_ids),
    ):
        other = (ids != query_ids[:, None]) & (ids != positive_ids[:, None])
        hidden += int(((anchor @ others.T > threshold) & other).sum())
        candidates += int(other.sum())
    return hidden / candidates if candidates else 0.0


def write_data_report(
    folder: Path,
    *,
    name: str,
    statistics: Statistics,
    rejects: dict[str, dict[str, int]],
    not_selected: int,
    masked: dict[str, float | None],
    facts: dict[str, Any],
) -> None:
    """Write `data_report.json` and `data_report.html` into `folder`.

    Args:
        folder: of the shards; exists.
        name: of the run.
        statistics: of the rows that were kept, and how many each filter dropped.
        rejects: rows that reading rejected: task, or a name for those without one, to reason to number.
        not_selected: rows of tasks that the recipe leaves out.
        masked: `masked_share` of a sample of each task, None where it was not measured.
        facts: what the data were made with, JSON-able, shown as it is. `max_tokens` (of the student) and `texts`
            (exact number of distinct texts) are used in the figures too.
    """
    report = _report(name, statistics, rejects, not_selected, masked, facts)
    # Rejected rows may name their task with half a surrogate pair, which UTF-8 cannot hold.
    report = json.loads(json.dumps(report, ensure_ascii=False).encode("utf-8", "replace"))
    write_json(folder / DATA_REPORT, report)
    write_whole(folder / DATA_REPORT_PAGE, _page(report).encode())


def read_data_report(folder: Path) -> dict[str, Any]:
    """What `write_data_report` wrote.

    Raises:
        InputError: the folder has no data report, or it is damaged.
    """
    file = folder / DATA_REPORT
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); run `gist-ray prepare` first") from error
    return report


# Figures -------------------------------------------------------------------------------------------------------------


def _report(
    name: str,
    statistics: Statistics,
    rejects: dict[str, dict[str, int]],
    not_selected: int,
    masked: dict[str, float | None],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What `data_report.json` holds. Shares are of 1; None where there is nothing to take a share of."""
    names = {*statistics.tasks, *rejects}
    tasks = {
        task: _summary(statistics.tasks.get(task, TaskStatistics()), Counter(rejects.get(task, {})), masked.get(task))
        for task in names
    }
    total = statistics.total()
    all_rejects = sum((Counter(reasons) for reasons in rejects.values()), Counter[str]())
    measured = [(tasks[task]["rows"], share) for task, share in masked.items() if task in tasks and share is not None]
    rows = sum(count for count, _ in measured)
    # Batches are of one task, so a task counts by its rows.
    whole = _summary(total, all_rejects, sum(n * share for n, share in measured) / rows if rows else None)
    if not whole["distinct_texts_exact"] and "texts" in facts and not total.dropped:
        texts = {"distinct_texts": facts["texts"], "distinct_texts_exact": True}
        whole |= {**texts, "repeated_texts": _share(total.texts - facts["texts"], total.texts)}
    ordered = sorted(tasks, key=lambda task: (-tasks[task]["rows"], task))
    return {
        "name": name,
        "facts": facts,
        "not_selected": not_selected,
        "all": whole,
        "tasks": {task: tasks[task] for task in ordered},
    }


def _summary(task: TaskStatistics, rejects: Counter[str], masked: float | None) -> Summary:
    reasons = rejects + task.dropped
    distinct, distinct_rows = task.distinct_texts, task.distinct_rows
    return {
        "rows": task.rows,
        "rejects": dict(sorted(reasons.items(), key=lambda reason: (-reason[1], reason[0]))),
        "rejected": _share(reasons.total(), reasons.total() + task.rows),
        "texts": task.texts,
        "negatives": task.negatives,
        "distinct_texts": min(distinct.distinct(), task.texts),
        "distinct_texts_exact": distinct.exact,
        "repeated_texts": _share(max(0, task.texts - distinct.distinct()), task.texts),
        "repeated_rows": _share(max(0, task.rows - distinct_rows.distinct()), task.rows),
        "repeated_rows_exact": distinct_rows.exact,
        "tokens": {name: task.length_quantile(share) for name, share in _QUANTILES.items()} | {"max": task.max_length},
        "truncated": _share(task.truncated, task.texts),
        "guide_positive": task.mean_guide_positive(),
        "guide_positive_p5": _guide_quantile(task, 0.05),
        "rows_with_negatives": task.rows_with_negatives,
        "misranked": _share(task.misranked_rows, task.rows_with_negatives),
        "masked": masked if task.rows else None,
        "histograms": {
            "tokens": {str(length): task.lengths[length] for length in sorted(task.lengths)},
            "guide_positive": task.guide_positive.tolist(),
            "guide_negative": task.guide_negative.tolist(),
        },
        "examples": {
            kind: [{k: v for k, v in asdict(example).items() if k != "row_hash"} for example in found]
            for kind, found in task.examples.items()
        },
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _guide_quantile(task: TaskStatistics, share: float) -> float | None:
    """Lower bound of the bin of guide(q, p) that holds the quantile."""
    if not task.rows:
        return None
    bin_index = int(np.searchsorted(np.cumsum(task.guide_positive), share * task.rows))
    return round(2 * bin_index / GUIDE_BINS - 1, 6)


# Page ----------------------------------------------------------------------------------------------------------------


def _page(report: dict[str, Any]) -> str:
    whole, tasks = report["all"], report["tasks"]
    sections = [
        _tiles(whole, sum(task["rows"] > 0 for task in tasks.values())),
        html.section("What to look at", _findings(report)),
        html.section("Shape of the data", _charts(whole, report["facts"].get("max_tokens"))),
        html.section("Rejected rows", _rejects(tasks, report["not_selected"])),
        html.section("Tasks", *_task_table(tasks)),
        html.section("Negatives that the guide ranks above the positive", *_examples(tasks, "misranked")),
        html.section("Positives least like their query", *_examples(tasks, "dissimilar")),
        html.section("Longest texts", *_examples(tasks, "longest")),
        html.section("Made with", html.table(["what", "value"], [[k, _plain(v)] for k, v in report["facts"].items()])),
    ]
    intro = (
        "What gist-ray prepare found in the data, before any training. q, p, n: query, positive, hard negative. "
        "guide(a, b): cosine similarity of two texts by the guide model."
    )
    return html.render_report(f"Data report of {report['name']}", intro, sections)


def _tiles(whole: Summary, tasks: int) -> str:
    rejected = sum(whole["rejects"].values())
    about = "" if whole["distinct_texts_exact"] else "≈ "
    return html.tiles(
        [
            ("rows kept", f"{whole['rows']:,}", f"of {tasks:,} tasks"),
            ("rows rejected", f"{rejected:,}", f"{_percent(whole['rejected'])} of all read"),
            (
                "distinct texts",
                f"{about}{whole['distinct_texts']:,}",
                f"{_percent(whole['repeated_texts'])} repeated",
            ),
            ("truncated", _percent(whole["truncated"]), "of texts"),
            ("misranked", _percent(whole["misranked"]), "of rows with n"),
            ("masked", _percent(whole["masked"]), "expected, in batch"),
        ]
    )


def _findings(report: dict[str, Any]) -> str:
    """Each figure: whether it is worth a look, what it means, which recipe key acts on it, and where it is worst."""
    limit = report["facts"].get("max_tokens", "few")
    known = [
        ("misranked", "misranked rows", "The guide finds a negative closer to the query than the positive: a wrong "
         "label, or a negative that is right too. The loss hides that negative. To drop the row: "
         "data.filters.guide_order: true."),
        ("masked", "expected masked", "In-batch candidates that the guide finds closer than the positive, so that the "
         "loss hides them: likely false negatives. Near 0 the guide changes little; where most are hidden, little is "
         "left to learn from. A larger loss.margin hides more."),
        ("truncated", "truncated texts", f"Longer than the {limit} tokens that the student reads: student.max_tokens."),
        ("rejected", "rejected rows", "Unusable (see below), longer than data.max_chars, or dropped by data.filters."),
        ("repeated_texts", "repeated texts", "Embedded once, and never twice in a batch. A few texts that answer most "
         "queries teach little: look at the source."),
        ("repeated_rows", "repeated rows", "The same texts in the same roles, which weigh double: clean the source."),
    ]  # fmt: skip
    rows: list[list[html.Cell]] = []
    for key, figure, meaning in known:
        share = report["all"][key]
        mark = "–" if share is None else "fine"
        if share is not None and 100 * share > _LOOK_ABOVE[key]:
            mark = f"▲ over\xa0{_LOOK_ABOVE[key]:.0f}\xa0%"
        rows.append([figure, _percent(share), mark, f"{meaning}{_worst_tasks(report['tasks'], key)}"])
    rows.sort(key=lambda row: not str(row[2]).startswith("▲"))
    mean, low = report["all"]["guide_positive"], report["all"]["guide_positive_p5"]
    if mean is not None:
        meaning = (
            f"Similarity of query and positive; a twentieth of the rows is below {low + 2 / GUIDE_BINS:.2f}. Guides "
            "differ in scale: judge by the examples below. To drop rows below a value: data.filters.min_similarity."
        )
        rows.append(["mean guide(q, p)", f"{mean:.2f}", "", meaning])
    return html.table(["figure", "all tasks", "", "what it means, and what acts on it"], rows)


def _worst_tasks(tasks: dict[str, Summary], key: str) -> str:
    """A sentence on the two tasks that most of a figure comes from, each with its own share."""
    if len(tasks) < 2:
        return ""
    of = {"misranked": "rows_with_negatives"}.get(key, "texts" if key in ("truncated", "repeated_texts") else "rows")

    def amount(task: Summary) -> float:
        return float(sum(task["rejects"].values()) if key == "rejected" else (task[key] or 0.0) * task[of])

    worst = sorted((task for task in tasks if amount(tasks[task]) > 0), key=lambda task: (-amount(tasks[task]), task))
    named = [f"{html.clip(task, _NAME_CHARS)} ({_percent(tasks[task][key])})" for task in worst[:2]]
    return f" Most in {' and '.join(named)}." if named else ""


def _charts(whole: Summary, max_tokens: int | None) -> str:
    lengths = {int(length): count for length, count in whole["histograms"]["tokens"].items()}
    top = max(whole["tokens"]["p99"], 1)
    top = max(top, max_tokens) if max_tokens and max_tokens < 2 * top else top
    step = -(-(top + 1) // _LENGTH_BARS)
    edges = list(range(0, top + step + 1, step))
    counts = np.histogram(list(lengths), edges, weights=list(lengths.values()))[0].astype(int).tolist()
    longer = sum(lengths.values()) - sum(counts)
    mark = (float(max_tokens), f"cut at {max_tokens}") if max_tokens else None
    beyond = f"% of texts; {_percent(_share(longer, sum(lengths.values())))} are longer" if longer else "% of texts"
    tokens = html.histogram("Tokens of a text", edges, {"texts": counts}, beyond, mark=mark)
    # Two bins to a bar, without the empty ends.
    series = {
        "guide(q, p)": whole["histograms"]["guide_positive"],
        "guide(q, n)": whole["histograms"]["guide_negative"],
    }
    filled = np.flatnonzero(np.sum(list(series.values()), axis=0))
    low, high = (filled[0] // 10 * 10, filled[-1] // 10 * 10 + 10) if len(filled) else (0, GUIDE_BINS)
    bounds = (np.arange(low, high + 1, 2) * 2 / GUIDE_BINS - 1).round(6).tolist()
    bars = {name: np.reshape(bins[low:high], (-1, 2)).sum(axis=1).tolist() for name, bins in series.items()}
    similarities = html.histogram("Similarity to the query", bounds, bars, "% of positives, of negatives")
    return f'<div class="charts">{tokens}{similarities}</div>'


def _rejects(tasks: dict[str, Summary], not_selected: int) -> str:
    note = f"{not_selected:,} rows of tasks that the recipe does not select were left out. " if not_selected else ""
    reasons = sum((Counter(task["rejects"]) for task in tasks.values()), Counter[str]())
    if not reasons:
        return html.paragraph(f"{note}No row was rejected.")
    rows: list[list[html.Cell]] = []
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        where = Counter({task: summary["rejects"].get(reason, 0) for task, summary in tasks.items()})
        rows.append(
            [
                reason,
                count,
                ", ".join(f"{html.clip(task, _NAME_CHARS)} ({n:,})" for task, n in where.most_common(3) if n),
            ]
        )
    note += "The rows themselves, with their place in the source, are in the folder rejects."
    return html.paragraph(note) + html.table(["reason", "rows", "most in"], rows, tall=len(rows) >= _TALL_FROM)


def _task_table(tasks: dict[str, Summary]) -> list[str]:
    headers = ["task", "rows", "rejected", "tokens: half", "95 %", "max", "truncated %", "repeated texts %",
               "repeated rows %", "guide(q, p)", "misranked %", "masked %"]  # fmt: skip
    rows: list[list[html.Cell]] = [
        [task, s["rows"], sum(s["rejects"].values()), s["tokens"]["p50"], s["tokens"]["p95"], s["tokens"]["max"],
         *(_hundred(s[key]) for key in ("truncated", "repeated_texts", "repeated_rows")), s["guide_positive"],
         *(_hundred(s[key]) for key in ("misranked", "masked"))]
        for task, s in tasks.items()
    ]  # fmt: skip
    estimated = not all(s["distinct_texts_exact"] and s["repeated_rows_exact"] for s in tasks.values())
    note = (
        f"Repeats are estimates in tasks with more than {SKETCH_HASHES:,} distinct texts or rows: "
        f"about {100 / SKETCH_HASHES**0.5:.1f} points off."
    )
    return [html.table(headers, rows, tall=len(rows) >= _TALL_FROM), *([html.paragraph(note)] if estimated else [])]


def _examples(tasks: dict[str, Summary], kind: str) -> list[str]:
    """The worst rows over all tasks, not more than a fair part of them from one task."""
    each = max(2, -(-_EXAMPLES_SHOWN // max(1, len(tasks))))
    found = [(task, example) for task, s in tasks.items() for example in s["examples"][kind][:each]]
    found.sort(key=lambda pair: (-pair[1]["badness"], pair[0], pair[1]["row"]))
    if not found:
        return [html.paragraph("None.")]
    headers = ["tokens"] if kind == "longest" else ["guide(q, p)", "guide(q, n)"]
    rows: list[list[html.Cell]] = []
    for task, e in found[:_EXAMPLES_SHOWN]:
        figures = [max(e["tokens"])] if kind == "longest" else [e["guide_positive"], e["guide_negative"]]
        texts = [text and html.clip(text, _CHARS_SHOWN) for text in (e["query"], e["positive"], e["negative"])]
        rows.append([f"{html.clip(task, _NAME_CHARS)}, row\xa0{e['row']:,}", *figures, *texts])
    return [html.table(["where", *headers, "query", "positive", "negative"], rows)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}\xa0%"


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
