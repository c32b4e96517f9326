"""evaluate: local tasks, the scores of sequential mteb, a report that can be continued, published values."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest

from gist_ray.config import ClusterConfig
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation import run
from gist_ray.evaluation.run import evaluate, ndcg_at_10_per_query
from gist_ray.evaluation.tasks import hub_task, local_tasks, retrieval_qrels

TOPICS = {
    "weather": "rain snow storm cloud wind sun thunder fog".split(),
    "cooking": "bread soup oven salt pepper butter onion rice".split(),
    "music": "guitar piano song melody drum concert choir violin".split(),
}


def sentence(topic: str, generator: random.Random) -> str:
    return " ".join(["the", *generator.choices(TOPICS[topic], k=4)])


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)


def write_tiny_tasks(folder: Path) -> Path:
    """One task of every kind; `STSBenchmark`, `Banking77Classification` and others carry MTEB's names."""
    generator = random.Random(0)
    topics = list(TOPICS)
    pairs = [(generator.choice(topics), generator.choice(topics)) for _ in range(40)]
    texts = [(sentence(a, generator), sentence(b, generator), a == b) for a, b in pairs]
    sts = [{"sentence1": a, "sentence2": b, "score": 4.0 * same + generator.random()} for a, b, same in texts]
    labelled = [
        {"text": sentence(topic, generator), "label": i, "label_text": topic}
        for _ in range(20)
        for i, topic in enumerate(topics)
    ]
    write(folder / "STSBenchmark/test.jsonl.gz", sts)
    write(folder / "TinySTS/test.jsonl", sts[:20])
    write(
        folder / "TwitterURLCorpus/test.jsonl.gz",
        [{"sentence1": a, "sentence2": b, "label": int(same)} for a, b, same in texts],
    )
    write(folder / "Banking77Classification/train.jsonl.gz", labelled[:30])
    write(folder / "Banking77Classification/test.jsonl.gz", labelled[30:])
    write(folder / "AmazonCounterfactualClassification/train.jsonl.gz", labelled[:30])
    write(folder / "AmazonCounterfactualClassification/test.jsonl.gz", labelled[30:])
    write(folder / "TinyClusters/test.jsonl.gz", labelled)
    write(folder / "TwentyNewsgroupsClustering/test.jsonl.gz", labelled)
    write(
        folder / "TinyReranking/test.jsonl.gz",
        [
            {
                "query": sentence(topic, generator),
                "positive": [sentence(topic, generator)],
                "negative": [sentence(other, generator) for other in topics if other != topic],
            }
            for topic in topics * 3
        ]
        + [{"query": "nothing fits", "positive": [], "negative": ["soup"]}],
    )
    corpus = [(f"d{i}", sentence(topics[i % 3], generator)) for i in range(30)]
    queries = [(f"q{i}", sentence(topics[i % 3], generator)) for i in range(6)]
    write(folder / "SciFact/corpus.jsonl.gz", [{"_id": i, "title": "about", "text": t} for i, t in corpus])
    queries.append(("q9", "without a judgement"))
    write(folder / "SciFact/queries.jsonl.gz", [{"_id": i, "text": t} for i, t in queries])
    same_topic = [(q, d) for q in range(6) for d in range(30) if d % 3 == q % 3]
    qrels = [{"query-id": f"q{q}", "corpus-id": f"d{d}", "score": 1} for q, d in same_topic]
    write(folder / "SciFact/qrels.jsonl.gz", qrels)
    return folder


class LocalPool:
    """An EncoderPool without Ray, for what does not depend on it."""

    def __init__(self, model, **settings):
        self._encoder = Encoder.load(model)
        self.dim, self.max_tokens = self._encoder.dim, self._encoder.max_tokens
        self.prompts = self._encoder.prompts

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def encode(self, texts, prompt=""):
        return self._encoder.encode(texts, prompt=prompt)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_tasks(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def small_model(minilm, tmp_path_factory):
    """MiniLM cut to one layer: another model, worse and fast."""
    return Encoder.load(minilm, layers=(0,)).save(tmp_path_factory.mktemp("models") / "one layer")


@pytest.fixture
def local_pool(monkeypatch, ray_session):
    monkeypatch.setattr(run, "EncoderPool", LocalPool)


@pytest.fixture(scope="module")
def report_dir(ray_session, minilm, tiny, tmp_path_factory):
    """A whole report on Ray actors, made once."""
    output = tmp_path_factory.mktemp("report") / "deep" / "er"
    return evaluate(minilm, output_dir=output, data=tiny, cluster=ClusterConfig(data_workers=2))


def scores(report_dir: Path) -> dict[str, float]:
    summary = json.loads((report_dir / "report.json").read_text())
    return {task["name"]: task["score"] for task in summary["tasks"]}


def sequential(model: Path, tasks) -> dict[str, float]:
    import mteb
    from sentence_transformers import SentenceTransformer

    results = mteb.evaluate(
        SentenceTransformer(str(model), device="cpu"),
        [task.make() for task in tasks],
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    return {result.task_name: result.get_score() for result in results.task_results}


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
    notes = {task.name: " ".join(task.check()) for task in local_tasks(tiny)}
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
        assert task.check() == ()


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
            task.check()


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
        local_tasks(tmp_path)[0].check()


def test_ids_must_be_unique(tmp_path):
    write(tmp_path / "T/corpus.jsonl", [{"_id": "d", "text": "t"}] * 2)
    write(tmp_path / "T/queries.jsonl", [{"_id": "q", "text": "t"}])
    write(tmp_path / "T/qrels.jsonl", [{"query-id": "q", "corpus-id": "d", "score": 1}])
    with pytest.raises(InputError, match="_id d occurs twice"):
        local_tasks(tmp_path)[0].check()


def test_missing_folder_and_missing_qrels_are_named(tmp_path, tiny):
    with pytest.raises(InputError, match="absent does not exist"):
        local_tasks(tmp_path / "absent")
    with pytest.raises(InputError, match="no local retrieval task"):
        retrieval_qrels(tiny / "TinySTS")


def test_hub_names_are_checked_and_being_offline_is_explained():
    with pytest.raises(InputError, match="MTEB has no task STSBenchmrk; near it are: STSBenchmark"):
        hub_task("STSBenchmrk")
    with pytest.raises(InputError, match="CQADupstackRetrieval is an average over tasks; name its parts"):
        hub_task("CQADupstackRetrieval")
    task = hub_task("STS17")
    assert task.type == "STS"
    with pytest.raises(InputError, match="data of task STS17 cannot be had from the Hub"):
        task.check()


def test_scores_equal_sequential_mteb_on_every_kind(report_dir, minilm, tiny):
    expected = sequential(minilm, local_tasks(tiny))
    assert len(expected) == 9
    assert scores(report_dir) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected.values()}) > 4, "scores that say nothing"


def test_prompts_of_the_folder_are_used_as_sequential_mteb_does(minilm, tiny, tmp_path, local_pool):
    model = tmp_path / "prompted"
    encoder = Encoder.load(minilm)
    encoder.prompts = {"query": "guitar: ", "document": "on weather: ", "passage": "no", "STS": "similar? "}
    encoder.save(model)
    for name in ("SciFact", "STSBenchmark", "TinyReranking"):
        shutil.copytree(tiny / name, tmp_path / "data" / name)
    found = scores(evaluate(model, output_dir=tmp_path / "prompted-report", data=tmp_path / "data"))
    assert found == pytest.approx(sequential(model, local_tasks(tmp_path / "data")), abs=1e-4)
    bare = scores(evaluate(minilm, output_dir=tmp_path / "bare-report", data=tmp_path / "data"))
    assert all(found[name] != pytest.approx(bare[name], abs=1e-4) for name in found)


def test_the_report_is_what_mteb_and_people_read(report_dir, minilm):
    import mteb

    summary = json.loads((report_dir / "report.json").read_text())
    assert summary["model"] == "local/model" and len(summary["revision"]) == 40
    assert len(summary["metrics"]["mean_by_type"]) == 6
    cache = mteb.ResultCache(cache_path=report_dir)
    stored = cache.load_task_result("SciFact", "local/model", summary["revision"])
    assert stored.get_score() == pytest.approx(scores(report_dir)["SciFact"], abs=1e-6)
    assert "SciFact" in (report_dir / "report.html").read_text()
    files = {file.name for file in (report_dir / "predictions").iterdir()}
    assert files == {f"{name}_predictions.json" for name in scores(report_dir)}
    assert not (report_dir / ".partial").exists()


def test_ndcg_of_each_query_averages_to_the_score(report_dir, tiny):
    found = ndcg_at_10_per_query(report_dir, tiny / "SciFact")
    assert sorted(found) == [f"q{i}" for i in range(6)]
    assert sum(found.values()) / 6 == pytest.approx(scores(report_dir)["SciFact"], abs=1e-5)
    assert len(set(found.values())) > 1
    with pytest.raises(InputError, match=r"SciFact_predictions\.json does not exist"):
        ndcg_at_10_per_query(report_dir / "elsewhere", tiny / "SciFact")


def test_a_finished_report_is_returned_at_once_and_kept(report_dir, minilm, small_model, tiny, monkeypatch):
    monkeypatch.setattr(run, "EncoderPool", None)
    before = (report_dir / "report.json").stat().st_mtime_ns
    assert evaluate(minilm, output_dir=report_dir, data=tiny) == report_dir
    assert (report_dir / "report.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"made from something else: .*model\.weights"):
        evaluate(small_model, output_dir=report_dir, data=tiny)


def test_an_interrupted_run_continues(report_dir, minilm, tiny, tmp_path, local_pool, monkeypatch):
    names = ["Banking77Classification", "TinyClusters", "TinyReranking", "TinySTS"]
    for name in names:
        shutil.copytree(tiny / name, tmp_path / "data" / name)
    output, data = tmp_path / "out", tmp_path / "data"
    ran, score = [], run._Store.score

    def dies_at_the_third(store, task, encoder):
        ran.append(task.name)
        if len(ran) == 3:
            (store.partial / f"{task.name}_predictions.json").write_text('{"half": ')
            raise KeyboardInterrupt
        score(store, task, encoder)

    monkeypatch.setattr(run._Store, "score", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(minilm, output_dir=output, data=data)
    assert not (output / "report.json").exists() and not (output / "manifest.json").exists()
    evaluate(minilm, output_dir=output, data=data)
    assert ran == [*names[:3], *names[2:]]
    uninterrupted = scores(report_dir)
    assert scores(output) == pytest.approx({name: uninterrupted[name] for name in names}, abs=1e-4)


def test_changed_data_is_scored_again_the_rest_is_not(minilm, tiny, tmp_path, local_pool, monkeypatch):
    for name in ("TinySTS", "TinyReranking"):
        shutil.copytree(tiny / name, tmp_path / "data" / name)
    output = evaluate(minilm, output_dir=tmp_path / "out", data=tmp_path / "data")
    (output / "manifest.json").unlink()  # as if the run had not come to its end
    file = tmp_path / "data/TinySTS/test.jsonl"
    file.write_text(file.read_text().replace("rain", "hail"))
    ran, score = [], run._Store.score
    monkeypatch.setattr(run._Store, "score", lambda *args: (ran.append(args[1].name), score(*args)))
    evaluate(minilm, output_dir=output, data=tmp_path / "data")
    assert ran == ["TinySTS"]


def test_a_baseline_is_shown_where_the_data_is_the_same(report_dir, small_model, tiny, tmp_path, local_pool):
    for name in ("TinySTS", "TinyReranking"):
        shutil.copytree(tiny / name, tmp_path / "data" / name)
    file = tmp_path / "data/TinySTS/test.jsonl"
    file.write_text(file.read_text().replace("rain", "hail"))
    output = evaluate(small_model, output_dir=tmp_path / "out", data=tmp_path / "data", baseline=report_dir)
    rows = {row["name"]: row for row in json.loads((output / "report.json").read_text())["tasks"]}
    assert rows["TinyReranking"]["before"] == scores(report_dir)["TinyReranking"]
    assert rows["TinySTS"]["before"] is None
    assert "before" in (output / "report.html").read_text()


def test_stdout_is_left_to_the_verb(small_model, tiny, tmp_path, local_pool, capsys):
    evaluate(small_model, output_dir=tmp_path / "out", data=tiny / "TinySTS")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/model/path"}, "neither an existing folder nor a Hub id"),
        ({"data": "absent"}, "absent does not exist"),
        ({"data": None}, "nothing to evaluate on"),
        ({"tasks": ("TinySTS",)}, "MTEB has no task TinySTS"),
        ({"tasks": ("STSBenchmark",)}, "both a name and a folder"),
        ({"baseline": "absent"}, "baseline absent is no report"),
    ],
)
def test_bad_input_is_named_before_ray_starts(small_model, tiny, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(run, "connected", None)
    data = tiny / "TinySTS" if change.get("tasks") == ("TinySTS",) else tiny
    if change.get("tasks") == ("TinySTS",):
        data = tiny / "TinyReranking"
    arguments = {"model": small_model, "output_dir": tmp_path / "out", "data": data, **change}
    with pytest.raises(InputError, match=message):
        evaluate(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # SciFact alone took 8 minutes on two busy cores
def test_published_scores_of_minilm(ray_session, minilm, shared, tmp_path):
    published = {
        "STSBenchmark": 82.03,
        "STS12": 72.37,
        "STS13": 80.60,
        "STS14": 75.59,
        "STS15": 85.39,
        "SciFact": 64.51,
    }
    for name in published:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(shared / "data/eval" / name)
    output = evaluate(minilm, output_dir=tmp_path / "out", data=tmp_path / "data")
    found = {name: 100 * score for name, score in scores(output).items()}
    print(found)
    assert found == pytest.approx(published, abs=0.05)
