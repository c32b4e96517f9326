"""The DeepSpeed engine: optimizer, ZeRO, precision and clipping, set up for encoders on CPU and GPU."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from gist_ray.config import TrainConfig
from gist_ray.errors import InputError

# What the recipe decides: DeepSpeed's key, and the recipe's.
_DECIDED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and cluster.num_workers",
    "gradient_accumulation_steps": "train.batch_size: a batch of any size is one step, with all its negatives",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_ratio",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "managed_gradient_accumulation": "nothing: gist-ray reduces gradients once per step",
    "zero_optimization.stage": "train.zero_stage",
}


def make_engine(model: torch.nn.Module, train: TrainConfig, world_size: int) -> Any:
    """Wrap a model in a DeepSpeed engine that makes one optimizer step per global batch, where the model is.

    The process group must exist. The learning rate of a step is set by `set_learning_rate`.

    Raises:
        InputError: `train.deepspeed` sets what the recipe decides.
    """
    # DeepSpeed would take a GPU that it sees, also for a model that is to be trained on the CPU beside it.
    os.environ["DS_ACCELERATOR"] = next(model.parameters()).device.type
    config = deepspeed_config(train, world_size)
    import deepspeed
    import deepspeed.ops

    # Else the first initialize on CPU compiles a C++ extension for about 40 s; gloo carries the reductions instead.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Fused AdamW as an object: DeepSpeed's own would be compiled, and the plain one is 3-5 times slower on CPU.
    optimizer = torch.optim.AdamW(parameter_groups(model, train.weight_decay), lr=train.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe, with the user's settings merged in.

    `train_micro_batch_size_per_gpu` is only a label here: batches come from the plan, and a worker's share may differ
    by one row from another's. Weights stay fp32 under `precision: bf16` too: the step runs the forward in
    autocast, so that what is saved is what the optimizer holds.

    One worker has nobody to share with: stages 1 and 2 become 0, whose step has no flat copies to make (0.1 s instead
    of 0.4 s, of a step of 5 s of all-MiniLM-L6-v2), unless the user configures ZeRO, for instance to offload the
    optimizer.

    Raises:
        InputError: the user sets what the recipe decides, to something else.
    """
    alone = world_size == 1 and train.zero_stage < 3 and "zero_optimization" not in train.deepspeed
    ours = {
        "train_micro_batch_size_per_gpu": max(1, train.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0 if alone else train.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    return _merged(ours, train.deepspeed, "")


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of the next step. No scheduler object: a pure function of the step has no state to lose."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def update(engine: Any) -> float:
    """Make the optimizer step on the reduced gradients and return their norm before clipping."""
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))  # DeepSpeed clips by it, and does not tell
    engine.step()
    return norm


def learning_rate_factor(step: int, train: TrainConfig, total_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): linear warm-up, then the schedule."""
    warmup = train.warmup_steps(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if train.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; biases and norms without weight decay, as in BERT."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _merged(ours: dict[str, Any], theirs: dict[str, Any], place: str) -> dict[str, Any]:
    """`ours` with `theirs` on top, section by section. "auto", as the transformers trainer has it, is ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        decided = _DECIDED.get(f"{place}{key}")
        if isinstance(value, str) and value == "auto":
            continue
        if decided and value != ours.get(key):
            raise InputError(f"train.deepspeed sets `{place}{key}`: {value}, which {decided} decides; remove it there")
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            value = _merged(ours.get(key, {}), value, f"{place}{key}.")
        merged[key] = value
    return merged
