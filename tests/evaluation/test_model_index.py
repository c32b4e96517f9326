"""model-index.yml: what the Hub reads of a report."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from gist_ray.evaluation.hub_tasks import hub_tasks
from gist_ray.evaluation.model_index import MODEL_INDEX, write_model_index
from gist_ray.evaluation.store import Store
from gist_ray.evaluation.tasks import local_tasks
from gist_ray.evaluation.unit import ModelName


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "report", ModelName("org/model", "abc"))


def keep(store, tasks) -> None:
    """MTEB's result file of each task, with a score of 0.75."""
    from importlib.metadata import version

    store.folder.mkdir(parents=True)
    for task in tasks:
        [split] = task.make().metadata.eval_splits
        entry = {"main_score": 0.75, task.main_metric: 0.75, "hf_subset": "default", "languages": ["eng-Latn"]}
        found = {"dataset_revision": task.revision, "task_name": task.name, "mteb_version": version("mteb")}
        found |= {"scores": {split: [entry]}, "evaluation_time": 1.0, "kg_co2_emissions": None}
        (store.folder / f"{task.name}.json").write_text(json.dumps(found))


def read(store):
    """As the Hub does, out of the head of a README."""
    text = (store.output / MODEL_INDEX).read_text()
    assert yaml.safe_load(text)["tags"] == ["mteb"]
    return {result.dataset_name: result for result in ModelCard(f"---\n{text}---\n# A model\n").data.eval_results}


def test_tasks_of_the_hub_are_described_as_mteb_does(store):
    tasks, _ = hub_tasks(("STSBenchmark", "SciFact"))
    keep(store, tasks)
    write_model_index(store, tasks)
    found = read(store)
    sts = found["STSBenchmark (default)"]
    assert (sts.dataset_type, sts.dataset_revision) == ("mteb/stsbenchmark-sts", tasks[0].revision)
    assert (sts.metric_type, sts.metric_value, sts.dataset_split) == ("cosine_spearman", 0.75, "test")
    assert len(found) == 2 and found["SciFact (default)"].metric_type == "ndcg_at_10"


def test_local_data_does_not_pass_for_that_of_the_hub(store, tiny):
    tasks = [task for task in local_tasks(tiny) if task.name in ("STSBenchmark", "TinySTS")]
    keep(store, tasks)
    write_model_index(store, tasks)
    [found] = read(store).values()
    assert (found.dataset_type, found.dataset_revision) == ("local/STSBenchmark", tasks[0].revision)


def test_nothing_that_mteb_knows_leaves_no_file(store, tiny):
    known, unknown = (next(task for task in local_tasks(tiny) if task.name == n) for n in ("STSBenchmark", "TinySTS"))
    keep(store, [known, unknown])
    write_model_index(store, [known])
    assert (store.output / MODEL_INDEX).exists()
    write_model_index(store, [unknown])
    assert not (store.output / MODEL_INDEX).exists()
