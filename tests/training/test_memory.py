import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.config import TrainConfig
from gist_ray.encoder import Encoder
from gist_ray.training.memory import ActivationMemory, free_bytes, probe

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=30)


@given(SHAPES, st.floats(0, 1e6), st.booleans())
def test_all_chunks_are_kept_if_they_fit_else_as_many_of_the_last_as_a_share_of_the_budget_holds(
    shapes: list[tuple[int, int]], budget: float, given: bool
):
    memory = ActivationMemory(budget, 10.0, 2.0, 0.5, given)
    needs = [memory.needed(*shape) for shape in shapes]
    kept = memory.kept(shapes)
    assert len(kept) == len(shapes) and kept == sorted(kept)
    assert all(kept) == (sum(needs) <= budget)
    share = budget * min(1, budget / sum(needs)) ** 1.5 if needs and not given else budget
    held = [need for need, keep in zip(needs, kept, strict=True) if keep]
    assert sum(held) <= share + 1e-6
    if not all(kept):  # one more would not fit
        assert sum(needs[len(needs) - len(held) - 1 :]) > share - 1e-6


def test_larger_batches_do_not_need_more_and_more():
    memory = ActivationMemory(1000.0, 0.0, 1.0, 0.0)
    held = [sum(memory.kept([(1, 10)] * chunks)) * 10 for chunks in (10, 100, 200, 1000, 10_000)]
    assert held == [100, 1000, 350, 30, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_probe_predicts_what_activations_take(minilm: Path, precision: str):
    """Against what autograd saves for other shapes than those that were probed."""
    from gist_ray.training.memory import _saved_bytes

    encoder = Encoder.load(minilm)
    encoder.model.train()
    memory = probe(encoder, TrainConfig(precision=precision, activation_mb=100))
    assert memory.budget == 100e6 and memory.given
    for rows, tokens in ((3, 10), (16, 30), (2, 200)):
        assert memory.needed(rows, tokens) == pytest.approx(_saved_bytes(encoder, rows, tokens, precision), rel=0.1)


def test_half_of_what_is_free_is_for_activations(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    available = psutil.virtual_memory().available
    assert 0.5 * available < free_bytes(torch.device("cpu")) <= 1.5 * available
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_bytes(torch.device("cpu")) <= 1.5 * available / 4
    assert 0 < probe(Encoder.load(tiny_model), TrainConfig()).budget <= 1.5 * available / 8


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gist_ray.training.memory._CGROUP", tmp_path)
    free = free_bytes(torch.device("cpu"))
    (tmp_path / "memory.current").write_text("35000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 5000000\n")
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert free_bytes(torch.device("cpu")) == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("50000000\n")
    assert free_bytes(torch.device("cpu")) == 20e6
    (tmp_path / "memory.current").write_text("66000000\n")
    assert free_bytes(torch.device("cpu")) == 0
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()  # version 1
    (tmp_path / "memory.stat").rename(tmp_path / "memory" / "memory.stat")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("70000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("35000000\n")
    assert free_bytes(torch.device("cpu")) == 40e6


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
    """Three steps of ten tensors of 20 MB, 4,883 pages each: all pages are new, or those of a tensor at most.

    The thresholds that glibc starts with are fixed from outside, because it moves them by itself, now and then so far
    that nothing is left to show; `mallopt` overrides them.
    """
    fixed = {"glibc.malloc.mmap_threshold": 1 << 17, "glibc.malloc.trim_threshold": 1 << 17}
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(f"{name}={value}" for name, value in fixed.items())}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)

    assert faults("keep") < 2 * 4883
    assert faults("default") > 20 * 4883
