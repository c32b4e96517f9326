"""Tiny local tasks of every kind, with texts on three topics."""

import gzip
import json
import random
from pathlib import Path

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
