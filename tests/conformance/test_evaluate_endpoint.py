"""`gist-ray evaluate --endpoint`: a served model scores what the same model in a folder does."""

import json
from pathlib import Path

import pytest

from gist_ray.cli import main
from gist_ray.errors import InputError
from gist_ray.evaluation.endpoint import endpoint_pool
from tests.conformance.served import KEY, MODEL_ID, PROMPTS, TEXTS, Served
from tests.evaluation.test_evaluate import scores
from tests.evaluation.tiny_tasks import write_tiny_tasks

pytestmark = pytest.mark.slow


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("GIST_RAY_API_KEY", KEY)


def test_vectors_are_those_of_the_model(served: Served, key):
    pool = endpoint_pool(f"{served.url}#{MODEL_ID}")
    assert pool.facts.dim == served.encoder.dim and pool.facts.max_tokens == served.encoder.max_tokens
    assert KEY not in repr(pool)
    served.agrees(pool.encode([*TEXTS, TEXTS[0]])[: len(TEXTS)])
    served.agrees(pool.encode(TEXTS[:3], "query"), TEXTS[:3], PROMPTS["query"])
    assert pool.revision == endpoint_pool(served.url).revision


def test_a_full_queue_is_waited_for(served: Served, key):
    """The server's queue holds 10,000 tokens; this is several times as much at once."""
    texts = [f"{i} " + "word " * 200 for i in range(150)]
    served.agrees(endpoint_pool(served.url).encode(texts)[::50], texts[::50])


def test_scores_are_those_of_the_folder(served: Served, key, model: Path, tmp_path: Path, capsys):
    write_tiny_tasks(tmp_path / "all")
    for name in ("SciFact", "TinySTS", "TinyReranking"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "all" / name).rename(tmp_path / "data" / name)
    common = ["--data", str(tmp_path / "data"), "--out"]
    assert main(["evaluate", "--endpoint", served.url, *common, str(tmp_path / "served")]) == 0
    assert main(["evaluate", str(model), *common, str(tmp_path / "folder"), "--workers", "1"]) == 0
    assert scores(tmp_path / "served") == pytest.approx(scores(tmp_path / "folder"), abs=1e-4)
    assert json.loads((tmp_path / "served/report.json").read_text())["model"].startswith("endpoint/")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "served"), str(tmp_path / "folder")]


def test_what_is_wrong_is_named(served: Served, key, monkeypatch):
    with pytest.raises(InputError, match=f"does not serve other; it serves {MODEL_ID}"):
        endpoint_pool(f"{served.url}#other")
    with pytest.raises(InputError, match="no embedding server that can be used"):
        endpoint_pool("http://127.0.0.1:9")
    monkeypatch.delenv("GIST_RAY_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="wants an API key; set GIST_RAY_API_KEY"):
        endpoint_pool(served.url)
