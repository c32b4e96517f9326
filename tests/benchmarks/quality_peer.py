"""The cross-check: GISTEmbed as sentence-transformers computes it, on the rows and with the settings of our own arm."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_data import Row
from quality_runs import GUIDE_MAX_TOKENS, Arm, Study

from gist_ray.config import Recipe, TrainConfig
from gist_ray.data.shards import Shards
from gist_ray.recipe_file import load_recipe
from gist_ray.training.loop import planner_for

MINI_BATCH = 32
LOSSES = "losses.json"


def peer_model(study: Study, arm: Arm, seed: int, common: dict[str, Any]) -> Path:
    """Folder of the model that `CachedGISTEmbedLoss` makes, with the temperature of `arm`, of the batches of our model.

    Ours is trained before. Optimizer, schedule and precision are as ours have them: AdamW, and what a recipe with these
    settings says.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
    from transformers import get_linear_schedule_with_warmup

    out = study.folder / "models" / f"peer-{seed}"
    if (out / LOSSES).is_file():
        return out
    torch.manual_seed(seed)
    student, guide = (SentenceTransformer(str(path), device="cpu") for path in (study.student, study.guide))
    guide.max_seq_length = GUIDE_MAX_TOKENS
    train = TrainConfig(**common, **arm.train)
    if train.precision == "bf16":
        for model in (student, guide):
            compute_in_bf16(model[0].auto_model)
    # The plain loss pads all texts of a batch to the longest: 24 GB were not enough. This one is equal.
    guide.eval().requires_grad_(False)
    loss = CachedGISTEmbedLoss(student, guide, temperature=arm.loss["temperature"], mini_batch_size=MINI_BATCH)
    found = list(batches(load_recipe(study.recipe_file(arm, seed))))
    optimizer = torch.optim.AdamW(student.parameters(), train.learning_rate, weight_decay=train.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, train.warmup_steps(len(found)), len(found))
    collator = SentenceTransformerDataCollator(preprocess_fn=student.preprocess)
    student.train()
    losses = []
    for step, rows in enumerate(found):
        batch = collator(rows)
        features = [
            {key[len(column) + 1 :]: value for key, value in batch.items() if key.startswith(f"{column}_")}
            for column in rows[0]
        ]
        value = loss(features, torch.empty(0))
        losses.append(value.item())
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"\r  peer: step {step + 1} of {len(found)}, loss {losses[-1]:.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    student.save(str(out))
    (out / LOSSES).write_text(json.dumps(losses))
    return out


def compute_in_bf16(transformer: torch.nn.Module) -> None:
    """Its layers, in place; pooling and similarities stay in fp32, as ours have them."""
    forward = transformer.forward

    def in_bf16(*words: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*words, **named)
        output.last_hidden_state = output.last_hidden_state.float()
        return output

    transformer.forward = in_bf16


def batches(recipe: Recipe) -> Iterator[list[Row]]:
    """The very batches that ours trained on; a batch has negatives if each of its rows has one."""
    shards = Shards.open(recipe.shards_dir())
    for rows in planner_for(shards, recipe).epoch(0):
        some = shards.triplets.chosen(rows)
        texts = {"query": some.query, "pos": some.positive}
        if (np.diff(some.negative_starts) > 0).all():
            texts["neg"] = some.negatives[some.negative_starts[:-1]]
        columns = {name: shards.texts.texts(ids) for name, ids in texts.items()}
        yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
