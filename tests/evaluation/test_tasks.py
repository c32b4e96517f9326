"""Local tasks: what folders of files become, and what is said of bad ones."""

import pytest

from gist_ray.errors import InputError
from gist_ray.evaluation.tasks import local_tasks, retrieval_qrels
from tests.evaluation.tiny_tasks import write


def test_kinds_follow_from_files_and_columns(tiny):
    found = {task.name: (task.type, task.main_metric) for task in local_tasks(tiny)}
    assert found == {
        "STSBenchmark": ("STS", "cosine_spearman"),
        "TinySTS": ("STS", "cosine_spearman"),
        "TwitterURLCorpus": ("PairClassification", "max_ap"),
        "Banking77Classification": ("Classification", "accuracy"),
        "AmazonCounterfactualClassification": ("Classification", "accuracy"),
        "TinyClusters": ("Clustering", "v_measure"),
        "TwentyNewsgroupsClustering": ("Clustering", "v_measure"),
        "TinyReranking": ("Reranking", "map_at_1000"),
        "SciFact": ("Retrieval", "ndcg_at_10"),
    }
    assert [task.name for task in local_tasks(tiny / "TinySTS")] == ["TinySTS"]


def test_a_known_name_keeps_mtebs_settings(tiny):
    import mteb

    [task] = local_tasks(tiny / "AmazonCounterfactualClassification")
    local, official = task.make(), mteb.get_task("AmazonCounterfactualClassification")
    assert isinstance(local, type(official))
    assert local.samples_per_label == official.samples_per_label == 32
    assert local.n_experiments == official.n_experiments
    assert local.metadata.eval_splits == ["test"] and local.hf_subsets == ["en"]
    assert local.metadata.revision == task.revision != official.metadata.revision


def test_notes_say_what_a_score_cannot_be_compared_with(tiny):
    notes = {task.name: " ".join(task.loaded()[1]) for task in local_tasks(tiny)}
    assert "40 items, MTEB's has 51,534: not comparable" in notes["TwitterURLCorpus"]
    assert "1 queries without a judgement" in notes["SciFact"]
    assert "1 queries without a right or a wrong candidate" in notes["TinyReranking"]
    assert notes["TinySTS"] == notes["TinyClusters"] == ""


def test_revision_is_the_content(tiny, tmp_path):
    [task] = local_tasks(tiny / "TinySTS")
    copy = tmp_path / "TinySTS/test.jsonl"
    copy.parent.mkdir()
    copy.write_bytes((tiny / "TinySTS/test.jsonl").read_bytes())
    assert local_tasks(tmp_path)[0].revision == task.revision
    copy.write_text(copy.read_text().replace("rain", "hail"))
    assert local_tasks(tmp_path)[0].revision != task.revision


def test_full_sets_have_no_remark(shared):
    for name in ("STSBenchmark", "SciFact", "AmazonCounterfactualClassification"):
        [task] = local_tasks(shared / "data/eval" / name)
        assert task.loaded()[1] == ()


STS = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no tasks"),
        ({"T/notes.txt": "x"}, r"T is no task: it needs test.jsonl"),
        ({"T/train.jsonl": STS}, r"T is no task"),
        ({"T/test.jsonl": ""}, r"test.jsonl is empty"),
        ({"T/test.jsonl": "\n\n"}, r"test.jsonl is empty"),
        ({"T/test.jsonl": '{"a": 1}'}, r"columns a fit no kind of task; expected sentence1"),
        ({"T/test.jsonl": STS + "{oops}\n"}, r"test.jsonl, line 2: not valid JSON"),
        ({"T/test.jsonl": STS + "[1]\n"}, r"line 2: a JSON list"),
        ({"T/test.jsonl": STS + '{"sentence1": "a", "score": 1}'}, r"line 2: column sentence2 is missing"),
        ({"T/test.jsonl": STS + STS.replace("1}", "null}")}, r"line 2: score is null, expected a finite"),
        ({"T/test.jsonl": STS.replace('"a"', "7")}, r"line 1: sentence1 is 7, expected a string"),
        ({"T/test.jsonl": STS.replace("score", "label").replace("1}", "2}")}, r"label is 2, expected 0 or 1"),
        ({"T/test.jsonl.gz": "not gzip"}, r"test.jsonl.gz, after line 0: cannot be read"),
        ({"T/corpus.jsonl": '{"_id": "d", "text": "t"}'}, r"queries.jsonl, qrels.jsonl is missing"),
        ({"SciFact/test.jsonl": STS}, r"SciFact has the name of an MTEB Retrieval task but holds STS data"),
        ({"Banking77Classification/test.jsonl": '{"text": "a", "label": 0}'}, r"train.jsonl\[.gz\] is miss"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        for task in local_tasks(tmp_path):
            task.loaded()


@pytest.mark.parametrize(
    ("qrel", "message"),
    [
        (("q", "x", 1), "corpus-id x is in no other file"),
        (("x", "d", 1), "query-id x is in no other file"),
        (("q", "d", 0.5), "score is 0.5, expected a whole number"),
    ],
)
def test_judgements_must_name_what_exists(tmp_path, qrel, message):
    write(tmp_path / "T/corpus.jsonl", [{"_id": "d", "text": "t"}])
    write(tmp_path / "T/queries.jsonl", [{"_id": "q", "text": "t"}])
    write(tmp_path / "T/qrels.jsonl", [dict(zip(("query-id", "corpus-id", "score"), qrel, strict=True))])
    with pytest.raises(InputError, match=message):
        local_tasks(tmp_path)[0].loaded()


def test_ids_must_be_unique(tmp_path):
    write(tmp_path / "T/corpus.jsonl", [{"_id": "d", "text": "t"}] * 2)
    write(tmp_path / "T/queries.jsonl", [{"_id": "q", "text": "t"}])
    write(tmp_path / "T/qrels.jsonl", [{"query-id": "q", "corpus-id": "d", "score": 1}])
    with pytest.raises(InputError, match="_id d occurs twice"):
        local_tasks(tmp_path)[0].loaded()


def test_missing_folder_and_missing_qrels_are_named(tmp_path, tiny):
    with pytest.raises(InputError, match="absent does not exist"):
        local_tasks(tmp_path / "absent")
    with pytest.raises(InputError, match="no local retrieval task"):
        retrieval_qrels(tiny / "TinySTS")
