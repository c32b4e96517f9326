"""Time spent: sums, medians and waits against a plain reference over all lines."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.training import time_spent
from gist_ray.training.phases import PHASES
from gist_ray.training.time_spent import TimeSpent, TimeSums


def spent_of(lines: list[dict[str, Any]]) -> TimeSpent | None:
    sums = TimeSums()
    for line in lines:
        sums.add(line)
    return sums.result()


def line(seconds: float | None = None, **phases: list[float]) -> dict[str, Any]:
    return {"step": 1, "phases": phases} | ({} if seconds is None else {"seconds": seconds})


times = st.lists(st.integers(0, 10**8).map(lambda us: us / 1e6), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"forward": times, "gather": times}, optional={"reduce": times, "checkpoint": times, "extra": times}
        ),
        min_size=1,
        max_size=40,
    ),
    st.lists(st.floats(0, 900), min_size=40, max_size=40),
    st.integers(1, 7),
)
def test_sums_are_those_of_a_plain_reference(steps: list[dict[str, list[float]]], seconds: list[float], block: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_spent, "_LINES_AT_ONCE", block)
        spent = spent_of([line(s, **step) for step, s in zip(steps, seconds, strict=False)])
    totals = [max(s, sum(np.mean(values) for values in step.values())) for step, s in zip(steps, seconds, strict=False)]
    if sum(totals) == 0:
        assert spent is None
        return
    assert spent is not None and spent.step_s == pytest.approx(np.mean(totals))
    waits = sum(np.mean(s[name]) - np.min(s[name]) for s in steps for name in ("gather", "reduce") if name in s)
    assert spent.waiting == pytest.approx(waits / sum(totals))
    names = [name for name in (*PHASES, "extra") if any(np.sum(step.get(name, [0])) for step in steps)]
    assert [phase.name for phase in spent.phases] == names
    for phase in spent.phases:
        values = np.array([step.get(phase.name, [0.0] * 3) for step in steps])
        assert phase.share == pytest.approx(values.mean(axis=1).sum() / sum(totals))
        assert phase.rank_mean_s == pytest.approx(values.mean(axis=0))
        assert phase.median_s == pytest.approx(np.median(values[values > 0]), rel=1e-6)
        assert phase.p95_s == pytest.approx(np.quantile(values[values > 0], 0.95), rel=1e-5)
        for rank in range(3):
            there = values[values[:, rank] > 0, rank]
            assert phase.rank_median_s[rank] == pytest.approx(np.median(there) if len(there) else 0, rel=1e-6)
    assert spent.untimed == pytest.approx(max(0, 1 - sum(phase.share for phase in spent.phases)), abs=1e-9)


def test_medians_of_a_long_run_come_from_a_sample_and_sums_from_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time_spent, "_SAMPLED_VALUES", 8 * 2 * 300)
    monkeypatch.setattr(time_spent, "_LINES_AT_ONCE", 7)
    steps = 10_000
    sums = TimeSums()
    for step in range(steps):  # every 64th step has a checkpoint: a sample of every 64th would see all or none
        sums.add(line(forward=[step / steps, 1.0], checkpoint=[6.4 if step % 64 == 1 else 0.0] * 2))
    kept = sum(len(block) for block in sums._sample)
    assert 150 <= kept <= 300
    spent = sums.result()
    assert spent is not None
    forward, checkpoint = spent.phases
    assert forward.rank_median_s == pytest.approx([0.5, 1.0], abs=0.01)
    assert forward.rank_mean_s == pytest.approx([0.5, 1.0], abs=1e-3)
    assert checkpoint.rank_mean_s == pytest.approx([0.1, 0.1], rel=0.01)
    first = np.concatenate([block[:, 1, 0] for block in sums._sample])
    assert np.diff(first) == pytest.approx(64 / steps, rel=1e-3)  # one in 64, without a gap


def test_ranks_that_come_and_go_count_where_they_are():
    lines = [line(forward=[1.0, 3.0])] * 3 + [line(forward=[2.0])] + [line(forward=[1.0, 3.0, 8.0])] * 4
    spent = spent_of(lines)
    assert spent is not None
    (forward,) = spent.phases
    assert forward.rank_mean_s == pytest.approx([9 / 8, 3.0, 8.0])
    assert forward.rank_median_s == pytest.approx([1.0, 3.0, 8.0])
    assert forward.slowest() == (2, pytest.approx(8.0 / 2.0))


def test_the_slowest_rank_is_measured_against_the_others():
    spent = spent_of([line(forward=[1.0, 1.4], data=[0.0, 0.5])])
    assert spent is not None
    data, forward = spent.phases
    assert forward.slowest() == (1, pytest.approx(1.4))
    assert data.slowest() is None  # no other rank has it: there is nothing to measure against
    alone = spent_of([line(forward=[1.0])])
    assert alone is not None and alone.phases[0].slowest() is None
    assert alone.share("forward") == 1.0 and alone.share("reduce") == 0.0


def test_lines_without_phases_are_left_out():
    assert spent_of([]) is None
    assert spent_of([{"step": 1}, {"step": 2, "phases": {}}, {"step": 3, "phases": {"forward": []}}]) is None
    spent = spent_of([{"step": 1, "seconds": 50.0}, line(2.0, forward=[1.0])])
    assert spent is not None and spent.step_s == 2.0 and spent.untimed == 0.5
