import itertools
from pathlib import Path

import pytest

from gist_ray.config import TrainConfig
from gist_ray.encoder import Encoder
from gist_ray.training.engine import deepspeed_config, learning_rate_factor, parameter_groups


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_decays(schedule: str):
    train = TrainConfig(warmup_ratio=0.2, schedule=schedule)
    factors = [learning_rate_factor(step, train, 50) for step in range(51)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(factors) == 1.0 and min(factors) >= 0
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate_factor(0, TrainConfig(warmup_ratio=0), 10) == 1.0


def test_norms_and_biases_do_not_decay(tiny_model: Path):
    model = Encoder.load(tiny_model).model
    decay, rest = parameter_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decay["params"]) and all(p.ndim <= 1 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    model.requires_grad_(False)
    model.pooler.dense.weight.requires_grad_(True)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1]


def test_deepspeed_config_follows_the_recipe():
    config = deepspeed_config(TrainConfig(batch_size=10, zero_stage=2, precision="bf16", max_grad_norm=0.5), 4)
    assert config["zero_optimization"]["stage"] == 2 and "bf16" not in config  # autocast instead
    assert config["gradient_clipping"] == 0.5 and config["train_micro_batch_size_per_gpu"] == 2
