"""The student as it is trained: dropout, low-rank adapters, checkpointed activations, compiled blocks."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gist_ray.config import LoraConfig, Recipe
from gist_ray.encoder import Encoder, load_model
from gist_ray.errors import InputError
from gist_ray.training.attention import cheapen_attention
from gist_ray.training.dropout import cheapen_dropout

_ADAPTER = "default"  # peft's own name for the only adapter
# Compiled versions of a block: with and without gradient, padding, dropout, and for a single text. Torch stops at 8,
# and would run everything after that uncompiled, with a warning that nobody sees on a worker.
_COMPILED_VERSIONS = 32


def load_student(recipe: Recipe, device: str, *, training: bool = True) -> Encoder:
    """Load the student of a recipe on `device`, ready to be trained, the same on every worker.

    Its model is in train mode, and only what the loss reaches requires a gradient. With `train.lora` these are the
    adapters: save `merged_student`, not the encoder itself. `training=False` gives the same parameters in eval mode,
    nothing compiled or checkpointed: to read trained weights into.

    Raises:
        InputError: as `load_model`; or `train` asks for what the model, or this machine, does not have.
    """
    train = recipe.train
    encoder = load_model(recipe.student, layers=recipe.student.layers, device=device)
    model = encoder.model
    freeze_pooler(model)
    set_dropout(model, train.dropout)
    if train.lora:
        add_adapters(model, train.lora, train.seed)
    if training:
        # In this order: torch compiles no block with a checkpoint inside, but a checkpoint may hold a compiled block.
        if train.compile:
            compile_blocks(model)
        elif device == "cpu":  # the compiler makes its own random numbers
            cheapen_dropout(model)
            cheapen_attention(model)
        if train.activation_checkpointing:
            checkpoint_blocks(model)
    model.train(training)
    return encoder


def merged_student(encoder: Encoder) -> Encoder:
    """The student with its adapters added to the weights they adapt, as a plain encoder; without adapters, itself.

    The encoder given is not changed. Weights that no adapter touches are shared with it, so the cost is a copy of the
    adapted ones, and the result is to be saved or used before training goes on. Under ZeRO-3 the parameters must be
    gathered meanwhile.
    """
    model = encoder.model
    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    if not adapted:
        return encoder
    weights: dict[str, Tensor] = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    with torch.no_grad():
        for name, layer in adapted.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(_ADAPTER)
    with torch.device("meta"):  # the structure alone, without memory or initial values
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():  # the state has no position ids and no rotary frequencies
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, buffer)
    return dataclasses.replace(encoder, model=plain.eval())


def freeze_pooler(model: nn.Module) -> None:
    """Take the gradient from BERT's `pooler`, which no pooled embedding uses: DeepSpeed would carry it for nothing."""
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


def set_dropout(model: nn.Module, dropout: float | None) -> None:
    """Set every dropout of a model, unless None.

    Some models keep the dropout of their attention as a number, not as a module (ModernBERT).
    """
    if dropout is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, dropout)


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Put low-rank adapters (arXiv 2106.09685) on linear layers of a model, in place, and freeze everything else.

    Their first values depend on `seed` alone. The adapted layers are named in full for peft, which would otherwise
    find `dense` in the pooler too.

    Raises:
        InputError: peft is not installed, or `target_modules` names no linear layer of the model's blocks.
    """
    names = _targets(model, lora.target_modules)
    try:
        import peft
    except ImportError as error:
        raise InputError('train.lora needs peft; run: pip install "gist-ray[lora]"') from error

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=names,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, wherever the model is
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, _ADAPTER)


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block, once for all shapes and, as the blocks are alike, once for all of them.

    Names of parameters do not change. The first steps wait for the compiler.

    Raises:
        InputError: on a CPU without a C++ compiler, or a model without a list of blocks.
    """
    blocks = _blocks(model, "train.compile")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if next(model.parameters()).device.type == "cpu" and not shutil.which(compiler):
        raise InputError(
            f"train.compile needs a C++ compiler on the CPU, and {compiler} is not found; install one, set CXX, "
            "or leave train.compile off"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VERSIONS)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep of each transformer block only its input, and compute it again in the backward pass, dropout included.

    Not transformers' switch, which many classes lack (MPNet, ALBERT): this one needs no support by the model.

    Raises:
        InputError: a model without a list of blocks.
    """
    for block in _blocks(model, "train.activation_checkpointing"):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: nn.Module, setting: str) -> list[Any]:
    """The transformer blocks: elements of the outermost lists of modules."""
    blocks: list[Any] = []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        children = list(module.children())
        (blocks if isinstance(module, nn.ModuleList) else waiting).extend(children)
    if not blocks:
        raise InputError(
            f"{setting} is not supported for {type(model).__name__}: it has no list of blocks; leave it off"
        )
    return blocks


def _targets(model: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers to adapt: those that end in one of `wanted`, or all of the blocks'."""
    inside = {id(module) for block in _blocks(model, "train.lora") for module in block.modules()}
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    found = {want: [name for name in linear if f".{name}".endswith(f".{want}")] for want in wanted}
    unknown = [want for want, names in found.items() if not names]
    if unknown or not linear:
        valid = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(
            f"train.lora.target_modules {unknown}: the blocks of {type(model).__name__} have no such linear layer; "
            f"they have {', '.join([*valid, *linear[:2]]) or 'none'}"
        )
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen or not wanted]
