"""The cross-check: GISTEmbed as sentence-transformers computes it, on the rows and with the settings of our own arm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from quality_data import Row, read_lines
from quality_runs import GUIDE_MAX_TOKENS, Arm, Study

from gist_ray.config import TrainConfig

MINI_BATCH = 32
COLUMNS = ("query", "pos", "neg")


def peer_model(study: Study, arm: Arm, seed: int, common: dict[str, Any]) -> Path:
    """Folder of the model that `CachedGISTEmbedLoss` makes of the rows of `study`, with the temperature of `arm`.

    Optimizer, schedule and precision are as ours have them: AdamW, and what a recipe with these settings says.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
    from transformers import get_linear_schedule_with_warmup

    out = study.folder / "models" / f"peer-{seed}"
    if (out / "modules.json").is_file():
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
    found = batches(rows_of(study), train.batch_size, seed)
    optimizer = torch.optim.AdamW(student.parameters(), train.learning_rate, weight_decay=train.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, train.warmup_steps(len(found)), len(found))
    collator = SentenceTransformerDataCollator(preprocess_fn=student.preprocess)
    student.train()
    for step, rows in enumerate(found):
        columns = [column for column in COLUMNS if rows[0][column]]
        batch = collator([{column: row[column] for column in columns} for row in rows])
        features = [
            {key[len(column) + 1 :]: value for key, value in batch.items() if key.startswith(f"{column}_")}
            for column in columns
        ]
        value = loss(features, torch.empty(0))
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(
            f"\r  peer: step {step + 1} of {len(found)}, loss {value.item():.3f}", end="", file=sys.stderr, flush=True
        )
    print(file=sys.stderr)
    student.save(str(out))
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


def rows_of(study: Study) -> list[Row]:
    """All rows of its sources, `mine`'s folders and files of lines."""
    rows: list[Row] = []
    for source in study.sources:
        files = [source] if source.is_file() else sorted(source.glob("*.parquet"))
        for file in files:
            rows += pq.read_table(file).to_pylist() if file.suffix == ".parquet" else read_lines(file)
    return rows


def batches(rows: list[Row], batch_size: int, seed: int) -> list[list[Row]]:
    """Each row once, in batches of one task whose rows all have a negative, or none has; all in random order."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task_name"], bool(row["neg"])), []).append(row)
    generator = np.random.default_rng(seed)
    found = []
    for group in groups.values():
        order = generator.permutation(len(group)).tolist()
        found += [[group[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return [found[i] for i in generator.permutation(len(found)).tolist() if len(found[i]) > 1]
