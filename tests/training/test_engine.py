import itertools
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from gist_ray.config import TrainConfig
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
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


@pytest.mark.parametrize(
    ("world_size", "stage", "theirs", "expected"),
    [
        (1, 1, {}, 0),
        (1, 2, {}, 0),
        (1, 3, {}, 3),
        (2, 1, {}, 1),
        (1, 2, {"zero_optimization": {"sub_group_size": 9}}, 2),
    ],
)
def test_one_worker_partitions_nothing_unless_told(world_size: int, stage: int, theirs: dict, expected: int):
    config = deepspeed_config(TrainConfig(zero_stage=stage, deepspeed=theirs), world_size)  # type: ignore[arg-type]
    assert config["zero_optimization"]["stage"] == expected


def test_the_users_deepspeed_settings_are_merged(tmp_path: Path):
    theirs = {
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 5, "overlap_comm": True},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,  # what the recipe says too
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True},
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    config = deepspeed_config(TrainConfig(deepspeed=str(file)), 1)  # type: ignore[arg-type]  # a path is read
    assert config["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 5, "overlap_comm": True}
    assert config["wall_clock_breakdown"] is True and config["flops_profiler"] == {"enabled": True}
    assert "train_batch_size" not in config
    with pytest.raises(ValidationError, match="not a readable JSON file"):
        TrainConfig(deepspeed=str(tmp_path / "none.json"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "where"),
    [
        ({"train_batch_size": 64}, "`train_batch_size`: 64, which train.batch_size decides"),
        ({"zero_optimization": {"stage": 3}}, "`zero_optimization.stage`: 3, which train.zero_stage decides"),
        ({"bf16": {"enabled": True}}, "train.precision decides"),
        ({"optimizer": {"type": "AdamW"}}, "train.learning_rate and train.weight_decay decides"),
    ],
)
def test_what_the_recipe_decides_cannot_be_set_twice(theirs: dict, where: str):
    with pytest.raises(InputError, match=where):
        deepspeed_config(TrainConfig(deepspeed=theirs), 1)
