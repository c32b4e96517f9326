import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.config import TrainConfig
from gist_ray.encoder import Encoder
from gist_ray.training.memory import ActivationMemory, free_bytes, probe

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=30)


@given(SHAPES, st.floats(0, 1e6))
def test_as_many_of_the_last_chunks_as_fit_are_kept(shapes: list[tuple[int, int]], budget: float):
    memory = ActivationMemory(budget, 10.0, 2.0, 0.5)
    kept = memory.kept(shapes)
    assert len(kept) == len(shapes) and kept == sorted(kept)
    assert sum(memory.needed(*shape) for shape, keep in zip(shapes, kept, strict=True) if keep) <= budget
    if not all(kept):  # one more would not fit
        one_more = shapes[kept.index(True) - 1 if any(kept) else -1 :]
        assert sum(memory.needed(*shape) for shape in one_more) > budget


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_probe_predicts_what_activations_take(minilm: Path, precision: str):
    """Against what autograd saves for other shapes than those that were probed."""
    from gist_ray.training.memory import _saved_bytes

    encoder = Encoder.load(minilm)
    encoder.model.train()
    memory = probe(encoder, TrainConfig(precision=precision, activation_mb=100))
    assert memory.budget == 100e6
    for rows, tokens in ((3, 10), (16, 30), (2, 200)):
        assert memory.needed(rows, tokens) == pytest.approx(_saved_bytes(encoder, rows, tokens, precision), rel=0.1)


def test_a_cpu_gives_at_most_two_gigabytes(tiny_model: Path):
    assert 0 < free_bytes(torch.device("cpu")) <= 4e9
    assert probe(Encoder.load(tiny_model), TrainConfig()).budget <= 2e9


FAULTS = """
import resource, sys, torch
from gist_ray.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    activations = [torch.zeros(5_000_000) for _ in range(10)]

step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    """Three steps of 200 MB: some 50,000 pages each, or none."""
    command = [sys.executable, "-c", FAULTS]
    as_ever, kept = (
        int(subprocess.run([*command, how], capture_output=True, check=True, text=True).stdout)
        for how in ("default", "keep")
    )
    assert kept < 1000
    assert as_ever > 10 * kept
