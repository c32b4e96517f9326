import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from gist_ray.errors import InputError
from gist_ray.evaluation.items import Group, Items
from gist_ray.evaluation.paired import difference, holm, together


def items(statistic, values, truth=None, name="default/test") -> Items:
    return Items(
        statistic, (Group(name, np.asarray(values, float), None if truth is None else np.asarray(truth, float)),)
    )


def pair_of_models(seed: int, kind: str, gain: float, count: int = 400) -> tuple[Items, Items]:
    """Two models with independent noise on the same items; `gain` is how much less the second has."""
    generator = np.random.default_rng(seed)
    truth = (
        (generator.random(count) < 0.3).astype(float) if kind == "average_precision" else generator.normal(size=count)
    )
    noise = 1.0
    first = truth + noise * generator.normal(size=count)
    second = truth + (noise - gain) * generator.normal(size=count)
    if kind == "mean":
        return items("mean", first), items("mean", second + gain)
    return items(kind, first, truth), items(kind, second * 10 - 3, truth)  # on another scale


@pytest.mark.parametrize("kind", ["mean", "spearman", "average_precision"])
def test_the_observed_difference_is_that_of_the_statistic(kind):
    first, second = pair_of_models(0, kind, 0.2)
    found = difference(first, second, samples=200)
    one, other = (group.groups[0] for group in (first, second))
    expected = {
        "mean": lambda g: g.values.mean(),
        "spearman": lambda g: spearmanr(g.truth, g.values)[0],
        "average_precision": lambda g: average_precision_score(g.truth, g.values),
    }[kind]
    assert found.observed == pytest.approx(expected(other) - expected(one), abs=1e-9)
    low, high = found.interval()
    assert low < found.observed < high
    assert found.resampled.mean() == pytest.approx(found.observed, abs=0.02)
    assert abs(found.exchanged.mean()) < 0.01


@pytest.mark.parametrize("kind", ["mean", "spearman", "average_precision"])
def test_equal_models_are_called_different_about_as_often_as_asked(kind):
    p_values = [
        difference(*pair_of_models(seed, kind, 0.0, 200), samples=400, seed=seed).p_value for seed in range(100)
    ]
    assert sum(p < 0.05 for p in p_values) <= 11  # 5 expected, 11 or more by chance in 1 of 90 runs
    assert 0.3 < np.mean(p_values) < 0.7


@pytest.mark.parametrize("kind", ["mean", "spearman", "average_precision"])
def test_a_real_difference_is_found(kind):
    found = [difference(*pair_of_models(seed, kind, 0.4), samples=400, seed=seed) for seed in range(10)]
    assert all(one.observed > 0 for one in found)
    assert sum(one.p_value < 0.05 and one.interval()[0] > 0 for one in found) >= 9


def test_a_model_beside_itself_is_no_different():
    first, _ = pair_of_models(1, "spearman", 0.0)
    found = difference(first, first, samples=100)
    assert found.observed == 0 and found.interval() == (0, 0) and found.p_value == 1


def test_the_same_seed_gives_the_same_and_blocks_change_nothing(monkeypatch):
    first, second = pair_of_models(2, "mean", 0.1)
    found = difference(first, second, samples=300, seed=3)
    again = difference(first, second, samples=300, seed=3)
    assert np.array_equal(found.resampled, again.resampled) and np.array_equal(found.exchanged, again.exchanged)
    monkeypatch.setattr("gist_ray.evaluation.paired._BLOCK_ELEMENTS", 1000)
    blocks = difference(first, second, samples=300, seed=3)
    assert len(blocks.resampled) == 300 and blocks.p_value == pytest.approx(found.p_value, abs=0.05)


def test_groups_count_alike_whatever_their_size():
    small, large = Group("a", np.array([1.0, 2.0])), Group("b", np.zeros(1000))
    better = Items("mean", (Group("a", small.values + 1), large))
    found = difference(Items("mean", (small, large)), better, samples=50)
    assert found.observed == pytest.approx(0.5)


def test_tasks_together_are_told_apart_where_each_alone_is_not():
    found = [difference(*pair_of_models(seed, "mean", 0.06), samples=500, seed=seed) for seed in range(30)]
    whole = together(found)
    assert whole.observed == pytest.approx(np.mean([one.observed for one in found]))
    assert whole.p_value < 0.01 < np.median([one.p_value for one in found])


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_at_least_each_and_at_most_bonferroni(p_values):
    corrected = holm(p_values)
    assert all(raw <= fixed <= 1 for raw, fixed in zip(p_values, corrected, strict=True))
    assert corrected[int(np.argmin(p_values))] == pytest.approx(min(1, len(p_values) * min(p_values)))
    # Each is the greatest up to it, in order of p, of every p times the number of those from it on.
    order = np.argsort(p_values, kind="stable")
    steps = [min(1, (len(order) - place) * p_values[i]) for place, i in enumerate(order)]
    assert [corrected[i] for i in order] == pytest.approx(list(np.maximum.accumulate(steps)))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (items("mean", [1, 2]), "needs the same items on both sides"),
        (items("spearman", [1, 2, 3], [1, 2, 3]), "needs the same items"),
        (items("mean", [1, 2, float("nan")]), "item 2 is nan"),
        (items("mean", [1, 2, 3], name="other"), "needs the same items"),
    ],
)
def test_what_cannot_be_compared_is_named(second, message):
    with pytest.raises(InputError, match=message):
        difference(items("mean", [1, 2, 3]), second)


def test_gold_values_must_be_the_same():
    with pytest.raises(InputError, match="gold values differ"):
        difference(items("spearman", [1, 2, 3], [1, 2, 3]), items("spearman", [1, 2, 3], [1, 2, 4]))
    with pytest.raises(InputError, match="nothing to compare"):
        together([])
