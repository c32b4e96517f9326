"""Over HTTP, 32 texts a request, beside sentence-transformers in process; both have both cores."""

from __future__ import annotations

import time
from pathlib import Path

from data import minilm
from figures import Figure, interleaved, median_figure, ratios
from serving_load import batched, mixed_texts, served, short_texts
from serving_servers import our_server
from training_processes import Group


class Offline:
    """`SentenceTransformer.encode`, batch 32, both cores."""

    def __init__(self, rank: int, size: int, model: str, texts: list[str]) -> None:
        from sentence_transformers import SentenceTransformer

        self._model, self._texts = SentenceTransformer(model, device="cpu"), texts

    def __call__(self) -> float:
        started = time.perf_counter()
        self._model.encode(self._texts, batch_size=32, show_progress_bar=False)
        return len(self._texts) / (time.perf_counter() - started)


def offline_figures(
    quick: bool, model: Path | None = None, precision: str = "fp32", goal: str = ">= 1.1"
) -> list[Figure]:
    """Texts a second of our `model` (None: all-MiniLM-L6-v2) by those of all-MiniLM-L6-v2 offline."""
    seconds, repeats, count = (3.0, 1, 300) if quick else (10.0, 3, 1500)
    figures = []
    for name, texts in (("short", short_texts(count)), ("mixed", mixed_texts(count))):
        with (
            Group(Offline, str(minilm()), texts, threads=2) as offline,
            our_server(model or minilm(), threads=2, precision=precision) as server,
        ):
            offline.turn()
            runs = interleaved(
                repeats,
                offline=lambda offline=offline: offline.turn()[0],  # type: ignore[misc]
                ours=lambda server=server, texts=texts: served(server, batched(texts, 32), 4, seconds).texts_per_s,  # type: ignore[misc]
            )
        where = f"{name} texts, {precision}, both cores"
        figures += [
            median_figure(f"{where}: SentenceTransformer.encode", runs["offline"], "texts/s"),
            median_figure(f"{where}: ours over HTTP, 4 x 32", runs["ours"], "texts/s"),
            median_figure(f"{where}: ours / encode", ratios(runs["ours"], runs["offline"]), "x", goal),
        ]
    return figures
