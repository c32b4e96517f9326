"""Verdict: each cause is told from where it is worth telling, and no sooner."""

from typing import Any

import pytest

from gist_ray.training.time_spent import TimeSpent, TimeSums
from gist_ray.training.verdict import RunFacts, explain

GOOD: dict[str, list[float]] = {
    "data": [0.01, 0.01],
    "forward": [0.30, 0.30],
    "gather": [0.01, 0.01],
    "loss": [0.02, 0.02],
    "backward": [0.60, 0.60],
    "reduce": [0.03, 0.03],
    "optimizer": [0.03, 0.03],
}


def spent_of(seconds: float = 1.0, *, steps: int = 1, **phases: list[float]) -> TimeSpent:
    sums = TimeSums()
    for _ in range(steps):
        sums.add({"step": 1, "seconds": seconds, "phases": GOOD | phases})
    spent = sums.result()
    assert spent is not None
    return spent


def test_a_run_that_computes_all_the_time_is_told_so():
    assert explain(spent_of(), RunFacts(padding_share=0.05, recomputed_share=0.0, checkpoint_share=0.001, steps=9)) == [
        "Forward and backward take 90\xa0% of the step: nothing but computing limits the speed."
    ]
    assert explain(None, RunFacts()) == ["No times of phases were logged, so there is nothing to say about the speed."]


@pytest.mark.parametrize(
    "phases,start",
    [
        ({"data": [0.12, 0.12]}, "Waiting for data is 11\xa0% of the step"),
        ({"reduce": [0.4, 0.4]}, "Reduce takes 29\xa0% of the step"),
        ({"gather": [0.3, 0.3]}, "Gather takes 23\xa0% of the step"),
        ({"optimizer": [0.3, 0.3]}, "The optimizer takes 24\xa0% of the step"),
    ],
)
def test_a_phase_that_takes_too_long_is_named(phases: dict[str, list[float]], start: str):
    (sentence,) = explain(spent_of(**phases), RunFacts())
    assert sentence.startswith(start)
    # Limits: data 2 %, reduce 15 %, gather 10 %, optimizer 15 %.
    limit = {"data": 0.02, "reduce": 0.15, "gather": 0.10, "optimizer": 0.15}
    (name,) = phases
    rest = sum(seconds[0] for phase, seconds in GOOD.items() if phase != name)
    at_limit = limit[name] * rest / (1 - limit[name])
    assert "nothing but computing" in explain(spent_of(0.0, **{name: [at_limit * 0.99] * 2}), RunFacts())[0]
    assert explain(spent_of(0.0, **{name: [at_limit * 1.02] * 2}), RunFacts())[0].startswith(start.split(" is ")[0][:6])


def test_time_in_no_phase_is_told():
    assert explain(spent_of(1.10), RunFacts())[0].startswith("Forward and backward take 82\xa0%")
    assert explain(spent_of(1.25), RunFacts()) == [
        "20\xa0% of the step is in none of the phases: work beside training, or a machine that does other jobs."
    ]


def test_a_slow_rank_is_named_and_not_what_others_do_while_they_wait():
    """Rank 1 needs 0.42 s and 0.75 s where rank 0 needs 0.30 s and 0.60 s, which waits for it in the exchanges."""
    slow = {"forward": [0.30, 0.42], "gather": [0.13, 0.01], "backward": [0.60, 0.75], "reduce": [0.18, 0.03]}
    (sentence,) = explain(spent_of(**slow), RunFacts())
    assert sentence.startswith("Rank 1 is slower than the others, 1.4x in forward and 1.2x in backward, and they wait")
    assert "21\xa0% of the step" in sentence  # 0.27 s of 1.27 s


def test_a_rank_that_is_hardly_slower_or_slower_in_little_is_not_named():
    assert len(explain(spent_of(forward=[0.30, 0.34]), RunFacts())) == 1
    assert "nothing but computing" in explain(spent_of(forward=[0.30, 0.34]), RunFacts())[0]
    assert "nothing but computing" in explain(spent_of(loss=[0.02, 0.035]), RunFacts())[0]


def test_ranks_that_wait_in_turn_are_told_from_one_slow_rank():
    sums = TimeSums()
    for step in range(20):
        fast, slow = (0.20, 0.50) if step % 2 else (0.50, 0.20)
        times = {"forward": [fast, slow], "gather": [0.51 - fast, 0.51 - slow]}
        sums.add({"step": step, "phases": GOOD | times})
    spent = sums.result()
    assert spent is not None and spent.waiting == pytest.approx(0.15 / 1.20, rel=0.01)
    (sentence,) = explain(spent, RunFacts())
    assert sentence.startswith("Ranks wait for one another for 12\xa0% of the step, in turn")


@pytest.mark.parametrize(
    "facts,limit,start",
    [
        ({"padding_share": 0.3}, {"padding_share": 0.1}, "Padding is 30\xa0% of the tokens"),
        ({"recomputed_share": 0.5}, {"recomputed_share": 0.1}, "50\xa0% of the tokens are computed twice"),
        ({"checkpoint_share": 0.08}, {"checkpoint_share": 0.03}, "Checkpoints stall training for 8.0\xa0% of its time"),
        (
            {"steps": 100, "repeated_steps": 40, "restarts": 2},
            {"steps": 100, "repeated_steps": 5, "restarts": 2},
            "Training restarted 2 times and did 40 steps again, 40\xa0% of the run",
        ),
    ],
)
def test_what_the_run_lost_beside_its_phases_is_told(facts: dict[str, Any], limit: dict[str, Any], start: str):
    (sentence,) = explain(spent_of(), RunFacts(**facts))
    assert sentence.startswith(start)
    assert "nothing but computing" in explain(spent_of(), RunFacts(**limit))[0]
    assert explain(None, RunFacts(**facts)) == [sentence]


def test_the_dearest_cause_comes_first():
    told = explain(spent_of(data=[0.05, 0.05], reduce=[0.6, 0.6]), RunFacts(padding_share=0.15, recomputed_share=1.0))
    assert [sentence.split()[0] for sentence in told] == ["Reduce", "100", "Padding", "Waiting"]
