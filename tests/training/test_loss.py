"""The loss against a float64 transcription of the paper's formula, and against sentence-transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_ray.config import LossConfig
from gist_ray.training.loss import Candidates, guided_contrastive_loss


def paper_loss(student: dict[str, np.ndarray], guide: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """Equation of arXiv 2402.16829 as stated in its released code, row by row, float64. Rows [B]."""

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    losses = []
    size = len(student["q"])
    for i in range(size):
        threshold = cos(guide["q"][i], guide["p"][i])
        total = 0.0
        for left, right in (("q", "p"), ("q", "n"), ("q", "q"), ("p", "p")):
            for j in range(size):
                if cos(guide[left][i], guide[right][j]) <= threshold:
                    total += np.exp(cos(student[left][i], student[right][j]) / temperature)
        target = np.exp(cos(student["q"][i], student["p"][i]) / temperature)
        losses.append(-np.log(target / total))
    return np.array(losses)


def random_vectors(generator: np.random.Generator, size: int, dim: int) -> dict[str, np.ndarray]:
    """Queries, and positives and negatives that lean towards them, so that masks are neither empty nor full."""
    q = generator.normal(size=(size, dim))
    return {"q": q, "p": q + generator.normal(size=(size, dim)), "n": q + 2 * generator.normal(size=(size, dim))}


def candidates(student: np.ndarray, guide: np.ndarray, first_id: int, dtype=torch.float64) -> Candidates:
    def unit(values: np.ndarray) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor(values, dtype=dtype), dim=-1)

    return Candidates(unit(student), unit(guide), torch.arange(first_id, first_id + len(student)))


def roles(student: dict[str, np.ndarray], guide: dict[str, np.ndarray], dtype=torch.float64) -> list[Candidates]:
    return [candidates(student[r], guide[r], 1000 * k, dtype) for k, r in enumerate("qpn")]


def loss_of(parts: list[Candidates], **config) -> Tensor:
    return guided_contrastive_loss(*parts, torch.arange(len(parts[0].ids)), LossConfig(**config)).loss


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_paper_on_random_batches(seed: int):
    generator = np.random.default_rng(seed)
    size, temperature = int(generator.integers(2, 24)), float(generator.choice([0.01, 0.05, 0.5]))
    student, guide = random_vectors(generator, size, 16), random_vectors(generator, size, 12)
    ours = loss_of(roles(student, guide), temperature=temperature).numpy()
    np.testing.assert_allclose(ours, paper_loss(student, guide, temperature), rtol=1e-6, atol=1e-9)


def test_the_mask_of_those_batches_is_neither_empty_nor_full():
    generator = np.random.default_rng(0)
    parts = roles(random_vectors(generator, 20, 16), random_vectors(generator, 20, 12))
    result = guided_contrastive_loss(*parts, torch.arange(20), LossConfig())
    # four blocks of 20 x 20; identical texts are the target, the qq and the pp diagonal
    assert result.candidates == 4 * 400 - 3 * 20
    assert 0 < result.hidden < result.candidates / 2


def test_gradients_are_right():
    generator = np.random.default_rng(1)
    student, guide = random_vectors(generator, 5, 6), random_vectors(generator, 5, 6)
    guides = roles(guide, guide)

    def mean_loss(*vectors: Tensor) -> Tensor:
        units = [torch.nn.functional.normalize(v, dim=-1) for v in vectors]
        parts = [Candidates(u, g.guide, g.ids) for u, g in zip(units, guides, strict=True)]
        return loss_of(parts, temperature=0.3).mean()

    inputs = [torch.tensor(student[r], requires_grad=True) for r in "qpn"]
    assert torch.autograd.gradcheck(mean_loss, inputs)


@pytest.mark.parametrize(("margin", "kind"), [(0.0, "absolute"), (0.1, "absolute"), (0.05, "relative")])
def test_equals_sentence_transformers_on_real_text(minilm: Path, verse_rows, margin: float, kind: str):
    """Loss and gradients of `GISTEmbedLoss` on texts that do not repeat (with repeats theirs has a known defect)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    model = SentenceTransformer(str(minilm), device="cpu").eval()
    rows = verse_rows[:24:2]
    texts = {"q": [r["query"] for r in rows], "p": [r["pos"] for r in rows], "n": [r["neg"] for r in rows]}
    assert len({t for role in texts.values() for t in role}) == 36
    theirs_module = GISTEmbedLoss(model, model, temperature=0.05, margin=margin, margin_strategy=kind)
    features = [model.tokenize(texts[r]) for r in "qpn"]
    theirs = theirs_module(features, torch.zeros(12))
    model.zero_grad()
    theirs.backward()
    parameter = model[0].auto_model.encoder.layer[0].output.dense.weight
    their_gradient = parameter.grad.clone()

    vectors = [model(dict(f))["sentence_embedding"] for f in features]
    parts = [Candidates(v, v.detach(), torch.arange(100 * k, 100 * k + 12)) for k, v in enumerate(vectors)]
    ours = loss_of(parts, temperature=0.05, margin=margin, margin_kind=kind).mean()
    model.zero_grad()
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameter.grad, their_gradient, rtol=1e-3, atol=1e-6)


def test_own_rows_are_parts_of_the_whole():
    generator = np.random.default_rng(2)
    parts = roles(random_vectors(generator, 9, 8), random_vectors(generator, 9, 8))
    whole = guided_contrastive_loss(*parts, torch.arange(9), LossConfig())
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([8]), torch.tensor([3, 7]), torch.tensor([], dtype=torch.long)):
        part = guided_contrastive_loss(*parts, rows, LossConfig())
        torch.testing.assert_close(part.loss, whole.loss[rows])


def test_identical_texts_are_never_negatives():
    """q = p leaves the others with a floor of log 3; repeated positives push each other away."""
    vectors = torch.eye(4, dtype=torch.float64)
    same = Candidates(vectors, vectors, torch.arange(4))
    none = Candidates(vectors[:0], vectors[:0], torch.arange(0))
    assert loss_of([same, same, none], temperature=0.01).max() < 1e-9

    repeated_positive = Candidates(vectors[[0, 0]], vectors[[0, 0]], torch.tensor([7, 7]))
    queries = Candidates(vectors[[0, 0]] + 0, vectors[[0, 0]], torch.tensor([1, 2]))
    result = guided_contrastive_loss(queries, repeated_positive, none, torch.arange(2), LossConfig(guided=False))
    assert result.candidates == 2 and result.loss.max() < 1  # only the other query is left; log 2


def test_hiding_everything_gives_zero_loss_and_finite_gradients():
    generator = np.random.default_rng(3)
    student, guide = random_vectors(generator, 4, 8), random_vectors(generator, 4, 8)
    parts = roles(student, guide)
    leaf = parts[0].student.clone().requires_grad_()
    parts[0] = Candidates(leaf, parts[0].guide, parts[0].ids)
    result = guided_contrastive_loss(*parts, torch.arange(4), LossConfig(margin=1.0, margin_kind="absolute"))
    unhidden = result.candidates - result.hidden
    result.loss.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    if unhidden == 0:
        assert result.loss.abs().max() == 0
    all_hidden = guided_contrastive_loss(
        *[Candidates(p.student, torch.ones_like(p.guide), p.ids) for p in parts],
        torch.arange(4),
        LossConfig(margin=0.5),
    )
    assert all_hidden.loss.abs().max() == 0


def test_the_comparison_is_strict_and_the_margin_moves_it():
    axis = torch.eye(3, dtype=torch.float64)
    query = Candidates(axis[[0]], axis[[0]], torch.tensor([0]))
    positive = Candidates(axis[[1]], torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64), torch.tensor([1]))
    tie = Candidates(axis[[2]], torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64), torch.tensor([2]))

    def hidden(**config) -> int:
        return int(guided_contrastive_loss(query, positive, tie, torch.arange(1), LossConfig(**config)).hidden)

    assert hidden() == 0
    assert hidden(margin=0.01) == 1 and hidden(margin=0.01, margin_kind="relative") == 1
    assert hidden(margin=0.01, guided=False) == 0


def test_a_relative_margin_keeps_its_sign_below_zero():
    axis = torch.eye(2, dtype=torch.float64)
    query = Candidates(axis[[0]], axis[[0]], torch.tensor([0]))
    opposite = torch.tensor([[-0.6, 0.8]], dtype=torch.float64)
    positive = Candidates(opposite, opposite, torch.tensor([1]))
    worse = torch.tensor([[-0.62, np.sqrt(1 - 0.62**2)]], dtype=torch.float64)
    negative = Candidates(worse, worse, torch.tensor([2]))
    config = LossConfig(margin=0.05, margin_kind="relative")  # threshold -0.6 - 0.03: -0.62 is above it
    assert int(guided_contrastive_loss(query, positive, negative, torch.arange(1), config).hidden) == 1


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.booleans(), st.integers(0, 100))
def test_blocks_can_be_left_out(queries: bool, positives: bool, seed: int):
    generator = np.random.default_rng(seed)
    parts = roles(random_vectors(generator, 6, 8), random_vectors(generator, 6, 8))
    config = LossConfig(contrast_queries=queries, contrast_positives=positives, guided=False)
    result = guided_contrastive_loss(*parts, torch.arange(6), config)
    assert result.candidates == 30 + 36 + 30 * (queries + positives)
    full = guided_contrastive_loss(*parts, torch.arange(6), LossConfig(guided=False))
    assert (result.loss <= full.loss + 1e-12).all()


def test_bf16_vectors_are_compared_in_fp32():
    generator = np.random.default_rng(4)
    parts = roles(random_vectors(generator, 8, 8), random_vectors(generator, 8, 8), torch.float32)
    low = [Candidates(p.student.bfloat16(), p.guide, p.ids) for p in parts]
    assert loss_of(low).dtype == torch.float32
