"""Attention for training on the CPU, where torch's fast kernel has no dropout and the slow one keeps everything.

With dropout torch falls back on plain matrix products, and saves three matrices `[tokens, tokens]` a head for the
backward pass: at 128 tokens, 39 % of all that all-MiniLM-L6-v2 saves (288 MB of 1,024 tokens, here 175). Here they are
computed again in the backward pass, from queries, keys and a seed. Cheap random numbers pay for that: forward and
backward of 8 x 128 tokens take 16 ms instead of 20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gist_ray.training.dropout import LEVELS, drawn_seed, dropout_noise

_SPECIAL = ("position_bias", "softcap")  # options that change the shares
NAME = "gist_ray_cpu"
"""Under which transformers knows it."""


def cheapen_attention(model: Any) -> None:
    """Have a model of transformers compute its attention by `attention`, where it now asks torch for it.

    Models that compute attention themselves are left alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[batch, heads, tokens, head_dim]` to `[batch, tokens, heads, head_dim]`.

    Whatever is not plain attention with dropout on a CPU goes on to torch: without dropout its kernel is faster.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dropped = round(dropout * LEVELS)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = causal or key.shape[1] != query.shape[1] or any(options.get(name) is not None for name in _SPECIAL)
    if special or not 0 < dropped < LEVELS or query.device.type != "cpu" or options.get("output_attentions"):
        asked = {"dropout": dropout, "scaling": scaling, **options}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **asked)
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed: Tensor = _DroppedAttention.apply(query, key, value, attention_mask, scale, dropped)  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).contiguous(), None


class _DroppedAttention(torch.autograd.Function):
    """softmax(q k' scale + mask), dropped out, times v; saves its inputs and a seed."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropped: int
    ) -> Tensor:
        seed = drawn_seed()
        with torch.autocast("cpu", enabled=False):
            shares = _shares(query, key, mask, scale)
            mixed = (shares * dropout_noise(shares, dropped, seed)) @ value
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = scale, dropped, seed
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        scale, dropped, seed = ctx.settings
        shares = _shares(query, key, mask, scale)
        noise = dropout_noise(shares, dropped, seed)
        of_value = (shares * noise).transpose(-1, -2) @ gradient
        of_shares = (gradient @ value.transpose(-1, -2)).mul_(noise)
        # Of the softmax: a row's gradient, less its mean weighted by the shares.
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype).mul_(scale)
        return of_scores @ key, of_scores.transpose(-1, -2) @ query, of_value, None, None, None


def _shares(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What each token takes of each other one, `[batch, heads, tokens, tokens]`; a row sums to 1.

    `mask` is True for what may be seen, or is added.
    """
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)
