"""Metrics of a training run: one line a step, written by training and read by whoever draws curves."""

from __future__ import annotations

import json
from pathlib import Path

METRICS = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` and TensorBoard files of a run; on resume, lines after the checkpoint are taken back."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = run_dir / METRICS
        kept = [line for line in read_metrics(self._file) if line["step"] <= start_step] if start_step else []
        self._file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step or None)

    def write(self, metrics: dict[str, float]) -> None:
        """Append one line and the same scalars."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Flush the TensorBoard file."""
        self._board.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines: list[dict[str, float]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
