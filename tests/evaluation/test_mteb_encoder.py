"""RayEncoder: what mteb's own model conformance run asks, with the scores of a local encoder to the printed digit."""

import pytest

from gist_ray.encoder import Encoder
from gist_ray.evaluation.mteb_encoder import RayEncoder
from gist_ray.evaluation.pool import LocalPool, encoder_pool

TEXT_TASKS = 28


def printed(results) -> dict[str, dict]:
    return {name: result.to_dict()["scores"] for name, result in results.task_results.items() if result is not None}


@pytest.fixture(scope="module")
def pool(ray_session, minilm):
    with encoder_pool(minilm, workers=2, cpus=0.5) as pool:
        yield pool


def test_all_mock_tasks_pass_with_the_scores_of_sentence_transformers(pool, minilm):
    import mteb
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    ours = mteb.mock_run(RayEncoder(pool, "local/m", "1"))
    assert not [name for name, found in ours.task_results.items() if found is not None and not hasattr(found, "scores")]
    scores = printed(ours)
    assert len(scores) == TEXT_TASKS
    reference = printed(
        mteb.mock_run(SentenceTransformerEncoderWrapper(SentenceTransformer(str(minilm), device="cpu")))
    )
    assert scores.keys() <= reference.keys()
    for name in scores:
        for split, entries in scores[name].items():
            for entry, expected in zip(entries, reference[name][split], strict=True):
                assert entry["main_score"] == pytest.approx(expected["main_score"], abs=1e-5), name


def corpus_and_queries():
    from datasets import Dataset

    topics = ["rain and wind", "bread and butter", "piano and violin", "sea and river"]
    texts = [f"{topic}, note {i % 7}" for i, topic in enumerate(topics * 12)]
    corpus = Dataset.from_dict({"id": [f"d{i}" for i in range(48)], "title": ["about"] * 48, "text": texts})
    queries = Dataset.from_dict({"id": ["q0", "q1"], "text": ["storm", "music"]})
    return corpus, queries


@pytest.mark.parametrize("ranked", [False, True])
def test_search_finds_what_mteb_itself_finds(pool, minilm, monkeypatch, ranked):
    import mteb
    from mteb.models.search_wrappers import SearchEncoderWrapper

    monkeypatch.setattr("gist_ray.evaluation.mteb_encoder._SLICE_DOCUMENTS", 20)
    metadata = mteb.get_task("SciFact").metadata
    corpus, queries = corpus_and_queries()
    asked = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    top_ranked = {"q0": ["d0", "d5", "d9", "d4"], "q1": ["d2", "d3"]} if ranked else None
    ours, theirs = (
        RayEncoder(pool, "local/m", "1"),
        SearchEncoderWrapper(RayEncoder(LocalPool(Encoder.load(minilm)), "local/m", "1")),
    )
    found = []
    for model in (ours, theirs):
        model.index(corpus, num_proc=None, **asked)
        found.append(model.search(queries, top_k=10, top_ranked=top_ranked, num_proc=None, **asked))
    for query in ("q0", "q1"):
        mine, its = found[0][query], found[1][query]
        assert sorted(mine.values()) == pytest.approx(sorted(its.values()), abs=1e-5)
        shared = mine.keys() & its.keys()  # of equal documents at the last place either may be kept
        assert len(shared) >= len(its) - 6 and list(mine.values()) == sorted(mine.values(), reverse=True)
        assert {key: mine[key] for key in shared} == pytest.approx({key: its[key] for key in shared}, abs=1e-5)
    if ranked:
        assert found[0]["q0"].keys() == set(top_ranked["q0"])


def test_only_candidates_are_embedded_and_each_once(minilm, monkeypatch):
    import mteb

    pool, sent = LocalPool(Encoder.load(minilm)), []
    encode = pool.encode
    monkeypatch.setattr(pool, "encode", lambda texts, prompt="": sent.append(list(texts)) or encode(texts, prompt))
    corpus, queries = corpus_and_queries()
    model = RayEncoder(pool, "local/m", "1")
    model.index(corpus)
    top_ranked = {"q0": ["d0", "d28", "d5"], "q1": ["d5", "d0"]}  # d0 and d28 hold the same text
    model.search(queries, task_metadata=mteb.get_task("SciFact").metadata, top_k=10, top_ranked=top_ranked)
    assert corpus["text"][0] == corpus["text"][28]
    assert len(sent) == 2 and sorted(sent[1]) == ["about bread and butter, note 5", "about rain and wind, note 0"]
