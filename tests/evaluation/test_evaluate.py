"""evaluate: the scores of sequential mteb, a report that can be continued, published values."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from gist_ray.config import ClusterConfig
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation import run, schedule
from gist_ray.evaluation.run import evaluate
from gist_ray.evaluation.store import stored_items
from gist_ray.evaluation.tasks import local_tasks
from gist_ray.evaluation.unit import scored
from tests.evaluation.in_process import here


@pytest.fixture(scope="module")
def small_model(minilm, tmp_path_factory):
    """MiniLM cut to one layer: another model, worse and fast."""
    return Encoder.load(minilm, layers=(0,)).save(tmp_path_factory.mktemp("models") / "one layer")


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
    index = yaml.safe_load((report_dir / "model-index.yml").read_text())["model-index"]
    assert index[0]["name"] == "local/model" and len(index[0]["results"]) == 6


def test_what_each_task_took_is_told(report_dir):
    rows = {row["name"]: row for row in json.loads((report_dir / "report.json").read_text())["tasks"]}
    assert (rows["STSBenchmark"]["cost"]["texts"], rows["SciFact"]["cost"]["texts"]) == (80, 36)
    for name, row in rows.items():
        cost = row["cost"]
        assert 0 < cost["distinct"] <= cost["texts"] and cost["cached"] <= cost["distinct"], name
        assert cost["score_s"] > 0 and row["seconds"] > 0, name
        assert cost["encode_s"] > 0 or cost["cached"] == cost["distinct"], name
    assert "Time and cost" in (report_dir / "report.html").read_text()


def test_items_average_to_the_scores(report_dir):
    for name, score in scores(report_dir).items():
        items = stored_items(report_dir, name)
        if items.statistic == "mean":
            assert items.groups[0].values.mean() == pytest.approx(score, abs=1e-5), name
            assert len(set(items.groups[0].values)) > 1 or score == 1, name
    assert len(stored_items(report_dir, "SciFact").groups[0].values) == 6
    assert len(stored_items(report_dir, "Banking77Classification").groups[0].values) == 30
    sts = stored_items(report_dir, "STSBenchmark")
    assert sts.statistic == "spearman" and len(sts.groups[0].truth) == 40


def test_a_finished_report_is_returned_at_once_and_kept(report_dir, minilm, small_model, tiny, monkeypatch):
    monkeypatch.setattr(run, "encoder_pool", lambda *args, **settings: pytest.fail("a model is loaded"))
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
    ran = []

    def dies_at_the_third(tasks, pool, model, **settings):
        for task, unit in here(tasks, pool, model):
            ran.append(task.name)
            if len(ran) == 3:
                raise KeyboardInterrupt
            yield task, unit

    monkeypatch.setattr(schedule, "outcomes", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(minilm, output_dir=output, data=data)
    assert not (output / "report.json").exists() and not (output / "manifest.json").exists()
    evaluate(minilm, output_dir=output, data=data)
    assert ran[:2] + ran[3:] != ran and sorted(ran[:2] + ran[3:]) == names and ran[2] in ran[3:]
    uninterrupted = scores(report_dir)
    assert scores(output) == pytest.approx({name: uninterrupted[name] for name in names}, abs=1e-4)


def names_run(monkeypatch) -> list[str]:
    """Names of the tasks that are scored from now on."""
    ran: list[str] = []

    def noted(tasks, pool, model, **settings):
        ran.extend(task.name for task in tasks)
        yield from here(tasks, pool, model)

    monkeypatch.setattr(schedule, "outcomes", noted)
    return ran


def test_changed_data_is_scored_again_the_rest_is_not(minilm, tiny, tmp_path, local_pool, monkeypatch):
    for name in ("TinySTS", "TinyReranking"):
        shutil.copytree(tiny / name, tmp_path / "data" / name)
    output = evaluate(minilm, output_dir=tmp_path / "out", data=tmp_path / "data")
    file = tmp_path / "data/TinySTS/test.jsonl"
    file.write_text(file.read_text().replace("rain", "hail"))
    ran = names_run(monkeypatch)

    def unwritten(*arguments):
        assert not (output / "manifest.json").exists(), "a report is called whole while it changes"

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_report", unwritten)
        evaluate(minilm, output_dir=output, data=tmp_path / "data")
    assert ran == ["TinySTS"]
    evaluate(minilm, output_dir=output, data=tmp_path / "data")
    assert ran == ["TinySTS"]
    shutil.copytree(tiny / "SciFact", tmp_path / "data/SciFact")
    evaluate(minilm, output_dir=output, data=tmp_path / "data")
    assert ran == ["TinySTS", "SciFact"] and len(scores(output)) == 3


def test_a_task_that_fails_leaves_the_others_and_is_tried_again(minilm, tiny, tmp_path, local_pool, monkeypatch):
    for name in ("TinySTS", "TinyReranking"):
        shutil.copytree(tiny / name, tmp_path / "data" / name)

    def one_fails(tasks, pool, model, **settings):
        for task in tasks:
            yield task, (scored(task, pool, model) if task.name == "TinySTS" else RuntimeError("no memory\nleft"))

    monkeypatch.setattr(schedule, "outcomes", one_fails)
    with pytest.raises(RuntimeError, match=r"1 of 2 tasks failed, e.g. TinyReranking \(RuntimeError: left\)"):
        evaluate(minilm, output_dir=tmp_path / "out", data=tmp_path / "data")
    assert list(scores(tmp_path / "out")) == ["TinySTS"]
    summary = json.loads((tmp_path / "out/report.json").read_text())
    assert summary["failures"] == {"TinyReranking": "RuntimeError: left"}
    assert "RuntimeError: left" in (tmp_path / "out/report.html").read_text()
    ran = names_run(monkeypatch)
    evaluate(minilm, output_dir=tmp_path / "out", data=tmp_path / "data")
    assert ran == ["TinyReranking"] and len(scores(tmp_path / "out")) == 2


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
        ({"baseline": "absent"}, "absent is no report: report.json cannot be read"),
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
