"""Local tasks on verses: enough texts for something to die among them."""

from pathlib import Path

from gist_ray.tour import Verse
from tests.evaluation.tiny_tasks import write

VERSE_TASKS = {"Verses", "Books", "Pairs"}


def write_verse_tasks(folder: Path, verses: list[Verse]) -> Path:
    """Retrieval in two translations, books to tell apart, pairs."""
    write(folder / "Verses/corpus.jsonl", [{"_id": str(v.verse_id), "text": v.ylt} for v in verses])
    asked = verses[::100]
    write(folder / "Verses/queries.jsonl", [{"_id": f"q{v.verse_id}", "text": v.web} for v in asked])
    qrels = [{"query-id": f"q{v.verse_id}", "corpus-id": str(v.verse_id), "score": 1} for v in asked]
    write(folder / "Verses/qrels.jsonl", qrels)
    labelled = [{"text": v.web, "label": v.book % 5} for v in verses]
    write(folder / "Books/train.jsonl", labelled[::20])
    write(folder / "Books/test.jsonl", labelled[1::4])
    pairs = [
        {"sentence1": v.web, "sentence2": verses[(i + i % 3) % len(verses)].ylt, "score": 3 - i % 3}
        for i, v in enumerate(verses[:3000])
    ]
    write(folder / "Pairs/test.jsonl", pairs)
    return folder
