import pickle

import pytest

from gist_ray.errors import InputError
from gist_ray.evaluation.hub_tasks import benchmark_tasks, hub_tasks


def test_names_are_checked_and_being_offline_is_explained():
    with pytest.raises(InputError, match="MTEB has no task STSBenchmrk; near it are: STSBenchmark"):
        hub_tasks(("STSBenchmrk",))
    [task], averages = hub_tasks(("STS17", "STS17"))
    assert task.type == "STS" and averages == []
    with pytest.raises(InputError, match="data of task STS17 cannot be had from the Hub"):
        task.loaded()
    with pytest.raises(InputError, match=r"no benchmark 'MTEB\(en, v1\)' not found. Did you mean: MTEB\(eng, v1\)"):
        benchmark_tasks("MTEB(en, v1)")


def test_an_average_becomes_its_parts():
    tasks, [average] = hub_tasks(("CQADupstackRetrieval", "SciFact"))
    assert average.name == "CQADupstackRetrieval" and len(average.parts) == 12
    assert [task.name for task in tasks] == [*average.parts, "SciFact"]
    made = tasks[3].make()
    assert made.metadata.name == tasks[3].name and made is not tasks[3].make()


def test_a_benchmark_has_its_splits_and_its_units():
    tasks, averages = benchmark_tasks("MTEB(eng, v1)")
    assert len(tasks) == 67 and len(averages) == 1
    found = {task.name: task for task in tasks}
    assert found["MSMARCO"].make().eval_splits == ["dev"]
    assert found["STS22"].make().hf_subsets == ["en"]
    order = sorted(found, key=lambda name: -found[name].cost)
    assert order[:4] == ["MSMARCO", "FEVER", "ClimateFEVER", "HotpotQA"]
    # Of all its languages STS22 would cost many times as much.
    assert found["STS22"].cost < 0.01 * found["SciFact"].cost + 2e6
    total = sum(task.cost for task in tasks)
    assert sum(found[name].cost for name in order[:6]) > 0.7 * total


def test_tasks_can_be_sent_and_are_fresh_where_they_arrive():
    tasks, _ = benchmark_tasks("MTEB(eng, v2)")
    sent = pickle.loads(pickle.dumps(tasks[5]))
    first, second = sent.make(), sent.make()
    assert first is not second and first.metadata.name == tasks[5].name
    assert not first.data_loaded
