from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gist_ray.encoder import Encoder
from gist_ray.training.attention import NAME, attention, cheapen_attention
from gist_ray.training.dropout import LEVELS, drawn_seed, dropout_noise
from gist_ray.training.memory import _saved_bytes

MODULE = SimpleNamespace(is_causal=False)


def inputs(batch: int = 3, heads: int = 2, tokens: int = 5, dim: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, tokens, dim, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def masks() -> dict[str, Tensor | None]:
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    boolean = seen[:, None, None, :].expand(3, 1, 5, 5)
    return {"none": None, "boolean": boolean, "added": torch.zeros(3, 1, 5, 5).double().masked_fill(~boolean, -1e9)}


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float) -> Tensor:
    """By the book, with autograd, and the same noise."""
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    shares = torch.softmax(scores, -1)
    return (shares * dropout_noise(shares, round(p * LEVELS), drawn_seed()) @ value).transpose(1, 2)


@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_those_of_autograd(mask: str, scale: float | None):
    tensors = inputs()
    weights = torch.randn(3, 5, 2, 4).double()
    torch.manual_seed(7)
    ours, _ = attention(MODULE, *tensors, masks()[mask], dropout=0.3, scaling=scale)  # type: ignore[arg-type]
    found = torch.autograd.grad((ours * weights).sum(), tensors)
    torch.manual_seed(7)
    by_the_book = reference(*tensors, masks()[mask], 0.3, scale or 4**-0.5)
    torch.testing.assert_close(ours, by_the_book, rtol=1e-12, atol=1e-13)
    for one, other in zip(found, torch.autograd.grad((by_the_book * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    def with_the_same_noise(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(MODULE, *tensors, masks()["boolean"], dropout=0.4)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(with_the_same_noise, inputs())


def test_without_dropout_it_is_torchs_own():
    tensors = inputs()
    ours, _ = attention(MODULE, *tensors, masks()["boolean"])  # type: ignore[arg-type]
    torchs = nn.functional.scaled_dot_product_attention(*tensors, attn_mask=masks()["boolean"]).transpose(1, 2)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"position_bias": torch.zeros(1, 2, 5, 5).double()}, {"softcap": 30.0}]
)
def test_what_is_not_plain_attention_goes_on_to_torch(options: dict, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def torchs(*arguments: object, **given: object) -> str:
        asked.append(given)
        return "torch's"

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", torchs)
    answer = attention(MODULE, *inputs(), None, dropout=0.1, **options)  # type: ignore[arg-type]
    assert answer == "torch's"
    assert asked[0]["dropout"] == 0.1 and options.keys() <= asked[0].keys()


def test_a_real_model_computes_the_same_and_saves_less(minilm: Path, tmp_path: Path):
    """Its own attention and ours, each with torch's seed; without dropout both give the same vectors."""
    plain, ours = Encoder.load(minilm), Encoder.load(minilm)
    cheapen_attention(ours.model)
    assert ours.model.config._attn_implementation == NAME
    tokens = plain.tokenize(["a man plays the guitar", "rain " * 120, "it is raining"])
    with torch.no_grad():
        torch.testing.assert_close(ours.embed(tokens), plain.embed(tokens), rtol=0, atol=1e-6)
    for encoder in (plain, ours):
        encoder.model.train()
    with torch.no_grad():
        means = [
            torch.nn.functional.normalize(torch.stack([encoder.embed(tokens) for _ in range(60)]).mean(0), dim=-1)
            for encoder in (plain, ours)
        ]
    assert float((means[0] * means[1]).sum(-1).min()) > 0.99  # the same mean, over the noise
    assert _saved_bytes(ours, 8, 128, "fp32") < 0.65 * _saved_bytes(plain, 8, 128, "fp32")
    ours.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert Encoder.load(tmp_path).model.config._attn_implementation == "sdpa"


def test_bf16_is_computed_in_bf16(minilm: Path):
    encoder = Encoder.load(minilm)
    cheapen_attention(encoder.model)
    encoder.model.train()
    tokens = encoder.tokenize(["a man plays the guitar", "rain"])
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encoder.embed(tokens)
    vectors.sum().backward()
    gradients = [p.grad for n, p in encoder.model.named_parameters() if "query.weight" in n]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_models_without_a_choice_are_left_alone(tiny_model: Path):
    cheapen_attention(nn.Linear(2, 2))
    encoder = Encoder.load(tiny_model)
    encoder.model.config._attn_implementation = "eager"
    cheapen_attention(encoder.model)
    assert encoder.model.config._attn_implementation == "eager"
