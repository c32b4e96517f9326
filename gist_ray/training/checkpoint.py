"""Checkpoint: the state of a run in parts that any number of workers can write, and any other number can read.

A part holds what one worker owns of the fp32 weights and of Adam's two moments, as slices of named parameters. ZeRO
decides who owns what; the format does not depend on it (DeepSpeed's own refuses another number of workers).

    state-00000-of-00002.safetensors   slices, named `kind/start/parameter`
    part-00000-of-00002.json           written last: names and sizes of the part's files, and the progress
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gist_ray.config import Recipe
from gist_ray.encoder import Encoder, load_model
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest, write_json
from gist_ray.training.student import load_student, merged_student

KIND = "checkpoint"
STUDENT = "student"
MOMENTS = ("exp_avg", "exp_avg_sq")
_PART = re.compile(r"part-(\d+)-of-(\d+)\.json$")


@dataclass(frozen=True)
class Slice:
    """What a worker owns of a parameter: elements `start` to `start + numel` of it, flattened."""

    name: str
    start: int
    numel: int
    weight: Tensor
    """View of the fp32 weights that the optimizer updates, `[numel]`."""
    state: dict[str, Any]
    """Adam's state of the tensor that `weight` lies in, from `offset` on."""
    offset: int

    def moment(self, kind: str) -> Tensor:
        """View of a moment, `[numel]`."""
        moment: Tensor = self.state[kind]
        return moment.view(-1)[self.offset : self.offset + self.numel]


def owned_slices(engine: Any) -> Iterator[Slice]:
    """What this worker's optimizer holds, under any ZeRO stage. Makes moments of zeros where no step was made yet."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    adam = optimizer if stage == 0 else optimizer.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        owned = _owner(optimizer, parameter, stage)
        if owned is None:
            continue
        held, offset, start, numel = owned
        state = adam.state[held]
        if "exp_avg" not in state:
            state |= {"step": torch.zeros((), dtype=torch.float32, device=held.device)}
            state |= {moment: torch.zeros_like(held, memory_format=torch.preserve_format) for moment in MOMENTS}
        yield Slice(name, start, numel, held.detach().view(-1)[offset : offset + numel], state, offset)


def _owner(optimizer: Any, parameter: Tensor, stage: int) -> tuple[Tensor, int, int, int] | None:
    """The tensor that the optimizer updates, the offset in it, and start and size of the part it has of a parameter."""
    if stage == 0:
        return parameter, 0, 0, parameter.numel()
    if stage < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:
            return None
        held = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        part = mapping.lp_fragment_address
        return held, mapping.hp_fragment_address.start, part.start, part.numel
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = optimizer._get_param_partition_rank(parameter) * size
    numel = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
    return (optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None


@dataclass(frozen=True)
class Snapshot:
    """A part in main memory, apart from the run: it can be written while training goes on."""

    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    part: int
    parts: int

    @classmethod
    def take(
        cls, engine: Any, progress: dict[str, Any], rank: int, world_size: int, into: Snapshot | None = None
    ) -> Snapshot:
        """Copy what this worker owns. Under ZeRO 0 each owns everything, and copies its share of each parameter.

        `into`: an earlier snapshot of the same engine that is no longer needed. Its memory is written to again: the
        pages of new memory the kernel must clear first.
        """
        tensors, adam_step = {}, 0.0
        shared = engine.zero_optimization_stage() == 0
        for owned in owned_slices(engine):
            adam_step = float(owned.state["step"])
            low, high = (owned.numel * (rank + i) // world_size for i in (0, 1)) if shared else (0, owned.numel)
            if low < high:
                place = f"{owned.start + low}/{owned.name}"
                tensors[f"weight/{place}"] = owned.weight[low:high]
                tensors |= {f"{kind}/{place}": owned.moment(kind)[low:high] for kind in MOMENTS}
        old = into.tensors if into else {}
        copies = {
            name: (old[name] if name in old else torch.empty_like(tensor, device="cpu")).copy_(tensor)
            for name, tensor in tensors.items()
        }
        return cls(copies, progress | {"adam_step": adam_step}, rank, world_size)

    def write(self, folder: Path) -> None:
        """Write the part's files; the one that says it is whole comes last.

        Raises:
            OSError: the disk is full, or cannot be written to. Nothing says then that the part is whole.
        """
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = folder / f"state-{self.part:05d}-of-{self.parts:05d}.safetensors"
        try:
            save_file(self.tensors, state)
            whole = {"files": {state.name: state.stat().st_size}, "progress": self.progress}
            write_json(folder / f"part-{self.part:05d}-of-{self.parts:05d}.json", whole)
        except Exception as error:  # safetensors has an error of its own for a full disk
            state.unlink(missing_ok=True)
            raise OSError(f"checkpoint {folder} cannot be written: {error}; the one before is whole") from error


def progress_of(folder: str, filesystem: Any = None) -> dict[str, Any] | None:
    """Progress of a whole checkpoint; None if a part is missing or a file has not the size it was written with.

    `filesystem` is pyarrow's; None: the local one.
    """
    from pyarrow import fs

    filesystem = filesystem or fs.LocalFileSystem()
    files = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    sizes = {file.base_name: file.size for file in files}
    for parts in sorted({int(found[2]) for name in sizes if (found := _PART.match(name))}):
        names = [f"part-{part:05d}-of-{parts:05d}.json" for part in range(parts)]
        written = [_read_json(filesystem, f"{folder}/{name}") for name in names]
        if all(part and all(sizes.get(n) == size for n, size in part["files"].items()) for part in written):
            progress: dict[str, Any] = written[0]["progress"]
            return progress | {"parts": parts}
    return None


def _read_json(filesystem: Any, path: str) -> Any:
    try:
        with filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError):
        return None


class SavedState:
    """Read access to the slices of a whole checkpoint, whoever wrote them."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        progress = progress_of(str(folder))
        if progress is None:
            raise InputError(f"{folder} is not a whole checkpoint: a file is missing or cut short")
        self.progress = progress
        names = [f"state-{i:05d}-of-{progress['parts']:05d}.safetensors" for i in range(progress["parts"])]
        self._files = [safe_open(folder / name, framework="pt") for name in names]
        self._slices: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # type: ignore[no-untyped-call]  # safetensors'
                kind, start, name = key.split("/", 2)
                self._slices.setdefault((kind, name), []).append((int(start), number, key))

    def names(self) -> set[str]:
        """Parameters there are."""
        return {name for _, name in self._slices}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements `start` to `start + numel` of a parameter's weight or moment, flattened."""
        found = torch.full((numel,), torch.nan)
        for begin, number, key in self._slices[(kind, name)]:
            saved = self._files[number].get_slice(key)  # type: ignore[no-untyped-call]
            low, high = max(start, begin), min(start + numel, begin + saved.get_shape()[0])
            if low < high:
                found[low - start : high - start] = saved[low - begin : high - begin]
        return found


def restore(engine: Any, folder: Path) -> dict[str, Any]:
    """Load a whole checkpoint into the engine of this worker and return the progress.

    Raises:
        InputError: the checkpoint is damaged, or of another model.
    """
    saved = SavedState(folder)
    stage = engine.zero_optimization_stage()
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if saved.names() != set(trained):
        differing = sorted(saved.names() ^ set(trained))[:3]
        raise InputError(f"{folder} is of another model: parameters {differing} are in one of them only")
    for name, parameter in trained.items():
        _set_weight(parameter, saved, name, stage)
    for owned in owned_slices(engine):
        owned.weight.copy_(saved.read("weight", owned.name, owned.start, owned.numel))
        for kind in MOMENTS:
            owned.moment(kind).copy_(saved.read(kind, owned.name, owned.start, owned.numel))
        owned.state["step"].fill_(saved.progress["adam_step"])
    return saved.progress


def _set_weight(parameter: Tensor, saved: SavedState, name: str, stage: int) -> None:
    """Set what the model computes with; what the optimizer updates may be another copy."""
    if stage < 3:
        parameter.data.copy_(saved.read("weight", name, 0, parameter.numel()).view_as(parameter))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # sends what worker 0 writes to all
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(saved.read("weight", name, 0, parameter.numel()).view_as(parameter))


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load the trained weights of a whole checkpoint into a plain model.

    Raises:
        InputError: the checkpoint is damaged, or of another model.
    """
    saved = SavedState(folder)
    parameters = dict(model.named_parameters())
    unknown = saved.names() - set(parameters)
    if unknown:
        raise InputError(f"{folder} is of another model: it has {sorted(unknown)[:3]}")
    for name in saved.names():
        parameter = parameters[name]
        parameter.data.copy_(saved.read("weight", name, 0, parameter.numel()).view_as(parameter))


def trained_student(recipe: Recipe, folder: Path) -> Encoder:
    """The student of a whole checkpoint, adapters merged, `start_share` of its start mixed in, ready to embed.

    Raises:
        InputError: the checkpoint is damaged, or of another model.
    """
    encoder = load_student(recipe, "cpu", training=False)
    load_weights(encoder.model, folder)
    student = merged_student(encoder)
    if recipe.train.start_share:
        start = load_model(recipe.student, layers=recipe.student.layers, device="cpu").model
        mix_in(start, student.model, recipe.train.start_share)
    student.model.eval()
    return student


@torch.no_grad()
def mix_in(start: torch.nn.Module, model: torch.nn.Module, share: float) -> None:
    """Set each weight of `model` to `share * start + (1 - share) * trained`, in place.

    On the line between a model and what it was fine-tuned to, tasks that were not trained for lose less than those that
    were gain (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 2).
    """
    starts = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.lerp_(starts[name], share)


def student_folder(checkpoint: Path) -> Path:
    """Model folder inside a finished checkpoint.

    Raises:
        InputError: the folder is not a finished checkpoint.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest.get("kind") != KIND:
        raise InputError(f"{checkpoint} is not a finished checkpoint; give the folder that `gist-ray train` printed")
    return checkpoint / STUDENT
