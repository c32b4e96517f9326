"""The loss against float64 transcriptions of its formulas, row by row, and against sentence-transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from gist_ray.config import LossConfig
from gist_ray.errors import InputError
from gist_ray.training.loss import Candidates, RowLosses, guided_contrastive_loss

OPTIONS = {
    "default": {},
    "absolute margin": {"margin": 0.1},
    "relative margin": {"margin": -0.1, "margin_kind": "relative"},
    "two blocks": {"contrast_queries": False, "contrast_positives": False},
    "self-guide": {"guide": "student", "margin": 0.05},
    "no guide": {"guide": "none"},
    "soft labels": {"soft_label_weight": 0.3, "soft_label_temperature": 0.2},
    "Matryoshka": {"matryoshka_dims": (5, 2)},
    "Matryoshka soft labels": {"matryoshka_dims": (3,), "soft_label_weight": 1.0, "margin": -0.2},
}


def paper_loss(student: dict[str, np.ndarray], guide: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """Equation of arXiv 2402.16829 as stated in its released code, row by row, float64. Rows [B]."""

    def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b.T / np.sqrt((a * a).sum(1)[:, None] * (b * b).sum(1))

    blocks = (("q", "p"), ("q", "n"), ("q", "q"), ("p", "p"))
    students = [cosines(student[left], student[right]) / temperature for left, right in blocks]
    guides = [cosines(guide[left], guide[right]) for left, right in blocks]
    losses = []
    for i in range(len(student["q"])):
        threshold = guides[0][i, i]
        total = sum(np.exp(s[i])[g[i] <= threshold].sum() for s, g in zip(students, guides, strict=True))
        losses.append(-np.log(np.exp(students[0][i, i]) / total))
    return np.array(losses)


def may_be_negative(q: Candidates, p: Candidates, i: int, others: Candidates, config: LossConfig) -> Tensor:
    """Which of `others` row i knows nothing of, but by the guide."""
    kept = (others.ids != q.ids[i]) & (others.ids != p.ids[i])
    if q.labels is not None and q.labels[i] >= 0 and config.hide_same_label:
        kept &= others.labels != q.labels[i]
    return kept


def is_negative(q: Candidates, i: int, others: Candidates, config: LossConfig) -> Tensor:
    """Which of `others` row i knows to be wrong, whatever the guide says."""
    known = torch.zeros(len(others.ids), dtype=torch.bool)
    if q.labels is not None and config.show_other_labels:
        known |= torch.tensor([q.labels[i] >= 0 and label >= 0 and label != q.labels[i] for label in others.labels]) > 0
    if others.owners is not None and config.show_own_negatives:
        known |= others.owners == i
    return known


def row_by_row(parts: list[Candidates], rows: Tensor, config: LossConfig) -> RowLosses:
    """Every option as its docstring says it, float64, one row and one dimension at a time, differentiable."""
    q, p, n = parts
    blocks = [(q, p), (q, n)]
    blocks += [(q, q)] if config.contrast_queries else []
    blocks += [(p, p)] if config.contrast_positives else []
    losses, hidden, candidates = [], 0, 0
    for i in rows.tolist():
        of_dims = []
        for dim in (q.student.shape[1], *config.matryoshka_dims):
            hidden_here = candidates_here = 0

            def cosines(a: Tensor, others: Tensor, dim: int = dim) -> Tensor:
                if dim == len(a):
                    return others @ a
                return normalize(others[:, :dim], dim=1) @ normalize(a[:dim], dim=0)

            def guide_of(c: Candidates) -> Tensor:
                return c.student.detach() if config.guide == "student" else c.guide

            logits = [cosines(q.student[i], p.student[[i]]) / config.temperature]
            guide_logits = []
            if config.guide != "none":
                target = guide_of(q)[i] @ guide_of(p)[i]
                threshold = target - config.margin * (abs(target) if config.margin_kind == "relative" else 1)
                guide_logits = [target[None] / config.soft_label_temperature]
            for anchor, others in blocks:
                kept = may_be_negative(q, p, i, others, config)
                candidates_here += int(kept.sum())
                if config.guide != "none":
                    similarity = guide_of(others) @ guide_of(anchor)[i]
                    wrong = is_negative(q, i, others, config)
                    similar = (similarity > threshold) & ~wrong
                    hidden_here += int((kept & similar).sum())
                    kept = kept & ~similar
                    guide_logit = similarity / config.soft_label_temperature
                    guide_logits.append(guide_logit.masked_fill(wrong, -torch.inf)[kept])
                logits.append(cosines(anchor.student[i], others.student)[kept] / config.temperature)
            log_share = torch.log_softmax(torch.cat(logits), 0)
            loss = -log_share[0]
            if config.soft_label_weight:
                labels = torch.softmax(torch.cat(guide_logits), 0)
                divergence = (torch.special.xlogy(labels, labels) - labels * log_share).sum()
                loss = (1 - config.soft_label_weight) * loss + config.soft_label_weight * divergence
            of_dims.append(loss)
        losses.append(torch.stack(of_dims).mean())
        hidden, candidates = hidden + hidden_here, candidates + candidates_here
    return RowLosses(torch.stack(losses), torch.tensor(hidden), torch.tensor(candidates))


def random_vectors(generator: np.random.Generator, size: int, dim: int) -> dict[str, np.ndarray]:
    """Queries, and positives and negatives that lean towards them, so that masks are neither empty nor full."""
    q = generator.normal(size=(size, dim))
    return {"q": q, "p": q + generator.normal(size=(size, dim)), "n": q + 2 * generator.normal(size=(size, dim))}


def candidates(student: np.ndarray, guide: np.ndarray, first_id: int, dtype=torch.float64) -> Candidates:
    def unit(values: np.ndarray) -> Tensor:
        return normalize(torch.tensor(values, dtype=dtype), dim=-1)

    return Candidates(unit(student), unit(guide), torch.arange(first_id, first_id + len(student)))


def roles(student: dict[str, np.ndarray], guide: dict[str, np.ndarray], dtype=torch.float64) -> list[Candidates]:
    return [candidates(student[r], guide[r], 1000 * k, dtype) for k, r in enumerate("qpn")]


def random_roles(seed: int, size: int, dim: int = 8, dtype=torch.float64) -> list[Candidates]:
    generator = np.random.default_rng(seed)
    return roles(random_vectors(generator, size, dim), random_vectors(generator, size, dim), dtype)


def losses_of(parts: list[Candidates], tile: int | None = None, **config) -> RowLosses:
    query, positive, negative = parts
    rows = torch.arange(len(query.ids))
    return guided_contrastive_loss(query, positive, negative, rows, LossConfig(**config), tile=tile)


def with_gradient(parts: list[Candidates]) -> list[Candidates]:
    return [replace(part, student=part.student.clone().requires_grad_()) for part in parts]


@pytest.mark.parametrize("seed", range(100))
def test_equals_the_paper_on_random_batches(seed: int):
    generator = np.random.default_rng(seed)
    size, temperature = int(generator.integers(2, 24)), float(generator.choice([0.01, 0.05, 0.5]))
    student, guide = random_vectors(generator, size, 16), random_vectors(generator, size, 12)
    ours = losses_of(roles(student, guide), temperature=temperature).loss.numpy()
    np.testing.assert_allclose(ours, paper_loss(student, guide, temperature), rtol=1e-6, atol=1e-9)


def test_the_mask_of_those_batches_is_neither_empty_nor_full():
    result = losses_of(random_roles(0, 20, 16))
    # four blocks of 20 x 20; identical texts are the target, the qq and the pp diagonal
    assert result.candidates == 4 * 400 - 3 * 20
    assert 0 < result.hidden < result.candidates / 2


def test_candidates_of_the_querys_label_are_hidden_and_those_of_none_are_not():
    parts = random_roles(0, 20, 16)
    labels = [torch.arange(20) % 4 - 1, torch.arange(20) % 4 - 1, torch.full((20,), -1)]
    parts = [replace(part, labels=of_part) for part, of_part in zip(parts, labels, strict=True)]
    # Of 20 rows 15 have one of three labels: each hides the 5 texts of it in qp, qq and pp, its own row's among them.
    assert losses_of(parts).candidates == 4 * 400 - 3 * 20 - 3 * 15 * 4
    assert losses_of([replace(part, labels=None) for part in parts]).candidates == 4 * 400 - 3 * 20
    assert losses_of(parts, hide_same_label=False).candidates == 4 * 400 - 3 * 20


def all_alike(parts: list[Candidates]) -> list[Candidates]:
    """Texts of one guide vector: with a margin the guide hides whatever it may."""
    return [replace(part, guide=part.guide.new_ones(part.guide.shape) / part.guide.shape[1] ** 0.5) for part in parts]


def test_the_guide_cannot_hide_what_bears_another_label_if_so_asked():
    parts = random_roles(0, 20, 16)
    labels = [torch.arange(20) - 5, torch.arange(20) - 5, torch.full((20,), -1)]  # 15 rows with a label of their own
    parts = [replace(part, labels=of_part) for part, of_part in zip(parts, labels, strict=True)]
    alike = all_alike(parts)
    all_hidden = losses_of(alike, margin=0.5)
    assert all_hidden.hidden == all_hidden.candidates == 4 * 400 - 3 * 20 and not all_hidden.loss.any()
    shown = losses_of(alike, margin=0.5, show_other_labels=True)
    assert shown.candidates == all_hidden.candidates
    # A row with a label is shown the 14 others that have one, in qp, qq and pp; hard negatives have none.
    assert shown.candidates - shown.hidden == 3 * 15 * 14
    assert not shown.loss[:5].any() and (shown.loss[5:] > 0).all()


def test_the_guide_cannot_hide_a_rows_own_negatives_if_so_asked():
    query, positive, negative = random_roles(0, 20, 16)
    owners = torch.arange(20).roll(1)
    owned = all_alike([query, positive, replace(negative, owners=owners)])
    plain = losses_of(owned, margin=0.5)
    assert plain.hidden == plain.candidates and not plain.loss.any()
    theirs = negative.student[owners.argsort()]
    logits = 100 * torch.stack([(query.student * other).sum(1) for other in (positive.student, theirs)])
    cross_entropy = torch.logsumexp(logits, 0) - logits[0]
    for weight in (0.0, 0.7):  # soft labels give a negative no share, so they say what the hard one says
        shown = losses_of(owned, margin=0.5, show_own_negatives=True, soft_label_weight=weight)
        assert shown.candidates - shown.hidden == 20 and shown.candidates == plain.candidates
        torch.testing.assert_close(shown.loss, cross_entropy, rtol=1e-12, atol=1e-12)


@st.composite
def cases(draw):
    """A pool of texts with repeats within and across roles, some of the rows, any options, and tiles that split it.

    Some texts have labels, or none has.
    """
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    texts, size, dim = draw(st.integers(4, 30)), draw(st.integers(1, 9)), 6
    negatives = size * draw(st.sampled_from([0, 1, 3]))
    lean = generator.normal(size=(1, dim)) * draw(st.sampled_from([-1, 0, 1]))  # most similarities above 0, or around
    pool = torch.tensor(normalized(lean + generator.normal(size=(texts, dim))))
    guide = torch.tensor(normalized(0.8 * lean + generator.normal(size=(texts, dim))))
    places = [torch.tensor(generator.integers(0, texts, count)) for count in (size, size, negatives)]
    rows = torch.tensor(generator.permutation(size)[: draw(st.integers(1, size))])
    who = draw(st.sampled_from(["frozen", "frozen", "student", "none"]))
    config = LossConfig(
        temperature=draw(st.sampled_from([0.02, 0.1, 1.0])),
        guide=who,
        margin=draw(st.sampled_from([0.0, 0.1, -0.3, 1.0])),
        margin_kind=draw(st.sampled_from(["absolute", "relative"])),
        hide_same_label=draw(st.booleans()),
        show_other_labels=draw(st.booleans()),
        show_own_negatives=draw(st.booleans()),
        contrast_queries=draw(st.booleans()),
        contrast_positives=draw(st.booleans()),
        matryoshka_dims=draw(st.sampled_from([(), (3,), (5, 2)])),
        soft_label_weight=draw(st.sampled_from([0.0, 0.25, 1.0])) if who == "frozen" else 0.0,
        soft_label_temperature=draw(st.sampled_from([0.01, 0.1, 1.0])),
    )
    weights = torch.tensor(generator.normal(size=len(rows)))
    labels = torch.tensor(generator.integers(-1, 3, texts)) if draw(st.booleans()) else None
    pool = Candidates(pool, guide if who == "frozen" else guide[:, :0], torch.arange(texts), labels)
    return pool, places, rows, config, weights, draw(st.integers(1, 7))


def normalized(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_equals_the_formula_whatever_the_options_and_the_tile(case):
    pool, places, rows, config, weights, tile = case

    def outcome(how) -> tuple[RowLosses, Tensor]:
        leaf = pool.student.clone().requires_grad_()
        everyone = replace(pool, student=leaf)
        query, positive, negative = (everyone.rows(place) for place in places)
        negative = replace(negative, owners=torch.arange(len(places[2])) % len(places[0]))
        result = how([query, positive, negative], rows, config)
        (result.loss * weights).sum().backward()
        return result, leaf.grad

    expected, expected_gradient = outcome(row_by_row)
    for size in (tile, 1000):
        found, gradient = outcome(lambda parts, *rest, size=size: guided_contrastive_loss(*parts, *rest, tile=size))
        assert (found.hidden, found.candidates) == (expected.hidden, expected.candidates)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
        # A row that is almost solved has a gradient of differences of ones: to rounding, not to relative rounding.
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11 / config.temperature)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tile", [3, None])
def test_gradients_are_right(options: dict, tile: int | None):
    parts = random_roles(1, 5, 6)

    def row_losses(*vectors: Tensor) -> Tensor:
        units = [replace(part, student=normalize(v, dim=-1)) for v, part in zip(vectors, parts, strict=True)]
        return losses_of(units, tile, temperature=0.3, **options).loss

    assert torch.autograd.gradcheck(row_losses, [part.student.clone().requires_grad_() for part in parts])


def test_there_is_no_second_derivative():
    parts = with_gradient(random_roles(1, 4))
    with pytest.raises(RuntimeError, match="no second derivative: leave out create_graph"):
        torch.autograd.grad(losses_of(parts).loss.sum(), parts[0].student, create_graph=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiles_that_split_the_rows_change_nothing(options: dict):
    """37 rows and 37 negatives: tiles of 5, 16 and 36 leave a rest of 2, 5 and 1."""

    def outcome(tile: int | None) -> list[Tensor]:
        parts = with_gradient(random_roles(7, 37))
        result = losses_of(parts, tile, temperature=0.02, **options)
        result.loss.sum().backward()
        return [result.loss.detach(), result.hidden, *(part.student.grad for part in parts)]

    whole = outcome(None)
    for tile in (5, 16, 36):
        for part, of_whole in zip(outcome(tile), whole, strict=True):
            torch.testing.assert_close(part, of_whole, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def peer_model(minilm: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm), device="cpu").eval()


@pytest.mark.parametrize(
    ("cached", "margin", "kind", "queries", "positives"),
    [
        (False, 0.0, "absolute", True, True),
        (False, 0.1, "absolute", False, True),
        (False, 0.05, "relative", True, False),
        (True, 0.05, "relative", True, True),
    ],
)
def test_equals_sentence_transformers_on_real_text(
    peer_model, verse_rows, cached: bool, margin: float, kind: str, queries: bool, positives: bool
):
    """Loss and gradients on texts that do not repeat (with repeats theirs has a known defect)."""
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

    model, rows = peer_model, verse_rows[:24:2]
    texts = {"q": [r["query"] for r in rows], "p": [r["pos"] for r in rows], "n": [r["neg"] for r in rows]}
    assert len({t for role in texts.values() for t in role}) == 36
    options = {"contrast_anchors": queries, "contrast_positives": positives, "margin_strategy": kind}
    options |= {"mini_batch_size": 5} if cached else {}
    loss_class = CachedGISTEmbedLoss if cached else GISTEmbedLoss
    features = [model.tokenize(texts[r]) for r in "qpn"]
    theirs = loss_class(model, model, temperature=0.05, margin=margin, **options)(features, torch.zeros(12))
    model.zero_grad()
    theirs.backward()
    parameter = model[0].auto_model.encoder.layer[0].output.dense.weight
    their_gradient = parameter.grad.clone()

    vectors = [model(dict(f))["sentence_embedding"] for f in features]
    parts = [Candidates(v, v.detach(), torch.arange(100 * k, 100 * k + 12)) for k, v in enumerate(vectors)]
    same = {"contrast_queries": queries, "contrast_positives": positives, "margin": margin, "margin_kind": kind}
    ours = losses_of(parts, 5, temperature=0.05, **same).loss.mean()
    model.zero_grad()
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameter.grad, their_gradient, rtol=1e-3, atol=1e-6)


def test_own_rows_are_parts_of_the_whole():
    parts = random_roles(2, 9)
    whole = losses_of(parts)
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([8]), torch.tensor([7, 3]), torch.tensor([], dtype=torch.long)):
        part = guided_contrastive_loss(*parts, rows, LossConfig())
        torch.testing.assert_close(part.loss, whole.loss[rows])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_worker_without_rows_still_takes_part_in_the_backward_pass(options: dict):
    parts = with_gradient(random_roles(2, 5))
    result = guided_contrastive_loss(*parts, torch.tensor([], dtype=torch.long), LossConfig(**options))
    assert result.loss.shape == (0,) and result.hidden == 0 and result.candidates == 0
    result.loss.sum().backward()
    assert all((part.student.grad == 0).all() for part in parts)


def test_identical_texts_are_never_negatives():
    """q = p leaves the others with a floor of log 3; repeated positives push each other away."""
    vectors = torch.eye(4, dtype=torch.float64)
    same = Candidates(vectors, vectors, torch.arange(4))
    none = Candidates(vectors[:0], vectors[:0], torch.arange(0))
    assert losses_of([same, same, none], temperature=0.01).loss.max() < 1e-9

    repeated_positive = Candidates(vectors[[0, 0]], vectors[[0, 0]], torch.tensor([7, 7]))
    queries = Candidates(vectors[[0, 0]] + 0, vectors[[0, 0]], torch.tensor([1, 2]))
    result = losses_of([queries, repeated_positive, none], guide="none")
    assert result.candidates == 2 and result.loss.max() < 1  # only the other query is left; log 2


@pytest.mark.parametrize(
    "options", [{}, {"soft_label_weight": 0.5}, {"soft_label_weight": 1.0, "matryoshka_dims": (4,)}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hiding_everything_gives_zero_loss_and_zero_gradient(options: dict, dtype: torch.dtype):
    parts = with_gradient(
        [replace(part, guide=torch.ones_like(part.guide)) for part in random_roles(3, 4, dtype=dtype)]
    )
    result = losses_of(parts, margin=0.5, **options)
    assert result.hidden == result.candidates > 0
    assert (result.loss == 0).all()
    result.loss.sum().backward()
    assert all((part.student.grad == 0).all() for part in parts)


def test_the_comparison_is_strict_and_the_margin_moves_it():
    axis = torch.eye(3, dtype=torch.float64)
    query = Candidates(axis[[0]], axis[[0]], torch.tensor([0]))
    positive = Candidates(axis[[1]], torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64), torch.tensor([1]))
    tie = Candidates(axis[[2]], torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64), torch.tensor([2]))

    def hidden(**config) -> int:
        return int(losses_of([query, positive, tie], **config).hidden)

    assert hidden() == 0
    assert hidden(margin=0.01) == 1 and hidden(margin=0.01, margin_kind="relative") == 1
    assert hidden(margin=0.01, guide="none") == 0


def test_texts_with_equal_guide_vectors_fare_alike_in_every_tile_and_on_every_worker():
    """The negatives are the positives written otherwise: as similar to the query as the positive, to rounding."""
    generator = torch.Generator().manual_seed(5)
    q = normalize(torch.randn(60, 384, generator=generator), dim=1).half().float()
    p = normalize(q + 0.05 * torch.randn(60, 384, generator=generator), dim=1).half().float()
    plain = (q @ p.T).diagonal() > (q * p).sum(1)
    assert plain.any() and not plain.all(), "rounding decides nothing here: the test is empty"
    parts = [Candidates(torch.ones(60, 1), guide, 100 * k + torch.arange(60)) for k, guide in enumerate((q, p, p))]
    exact = sum(int((a.double() @ b.double().T > (q.double() * p.double()).sum(1)[:, None] + 1e-6).sum())
                for a, b in ((q, p), (q, p), (q, q), (p, p))) - 120  # fmt: skip
    for tile in (4, 7, 16, 60):
        for workers in (1, 3):
            parts_of = torch.arange(60).chunk(workers)
            hidden = [guided_contrastive_loss(*parts, rows, LossConfig(), tile=tile).hidden for rows in parts_of]
            assert sum(hidden) == exact


def test_a_relative_margin_keeps_its_sign_below_zero():
    axis = torch.eye(2, dtype=torch.float64)
    query = Candidates(axis[[0]], axis[[0]], torch.tensor([0]))
    opposite = torch.tensor([[-0.6, 0.8]], dtype=torch.float64)
    positive = Candidates(opposite, opposite, torch.tensor([1]))
    worse = torch.tensor([[-0.62, np.sqrt(1 - 0.62**2)]], dtype=torch.float64)
    negative = Candidates(worse, worse, torch.tensor([2]))
    # threshold -0.6 - 0.03: -0.62 is above it
    assert losses_of([query, positive, negative], margin=0.05, margin_kind="relative").hidden == 1


@pytest.mark.parametrize("dims", [(8,), (4, 9, 20)])
def test_a_dimension_that_the_student_has_not_is_refused(dims: tuple[int, ...]):
    with pytest.raises(InputError, match=r"matryoshka_dims \[(8|20, 9)\] must be below the 8 dimensions.*remove"):
        losses_of(random_roles(0, 3, 8), matryoshka_dims=dims)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bf16_vectors_are_compared_in_fp32_also_inside_autocast(options: dict):
    parts = [replace(part, student=part.student.bfloat16()) for part in random_roles(4, 8, dtype=torch.float32)]

    def outcome(parts: list[Candidates]) -> list[Tensor]:
        parts = with_gradient(parts)
        loss = losses_of(parts, **options).loss
        loss.mean().backward()
        return [loss.detach(), *(part.student.grad for part in parts)]

    wide = outcome([replace(part, student=part.student.float()) for part in parts])
    with torch.autocast("cpu", torch.bfloat16):
        low = outcome(parts)
    assert low[0].dtype == torch.float32
    torch.testing.assert_close(low[0], wide[0], rtol=0, atol=0)
    for gradient, of_wide in zip(low[1:], wide[1:], strict=True):
        torch.testing.assert_close(gradient, of_wide.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fp32_is_exact_to_rounding(options: dict):
    """Also where a row is almost solved: a loss of 1e-9 must not become 0 or 1e-7."""
    wide = with_gradient(random_roles(6, 40, 32))
    narrow = with_gradient([Candidates(part.student.detach().float(), part.guide.float(), part.ids) for part in wide])
    expected, found = losses_of(wide, temperature=0.02, **options), losses_of(narrow, 16, temperature=0.02, **options)
    assert found.hidden == expected.hidden
    if options == {}:
        assert expected.loss.min() < 1e-8 and expected.loss.max() > 1, "too easy or too hard: the test is empty"
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-4, atol=1e-6 if options else 0)
    for result in (expected, found):
        result.loss.sum().backward()
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.student.grad.double(), theirs.student.grad, rtol=1e-3, atol=1e-4)


def test_what_is_not_a_number_stays_visible():
    parts = random_roles(6, 4)
    parts[2].student[1, 1] = torch.nan
    assert losses_of(parts, guide="none").loss.isnan().all()


def allocations(size: int) -> tuple[int, int]:
    """Largest allocation and peak of a forward and a backward pass of `size` rows, in bytes, as the allocator saw."""
    generator = torch.Generator().manual_seed(0)
    vectors = [normalize(torch.randn(size, 16, generator=generator), dim=1) for _ in range(3)]
    parts = [
        Candidates(v.requires_grad_(), v.detach()[:, :8], torch.arange(size) + k * size) for k, v in enumerate(vectors)
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        losses_of(parts, 256).loss.sum().backward()
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    sizes = np.array([event.nbytes() for event in events])
    return int(sizes.max()), int(np.cumsum(sizes).max())


def test_memory_is_linear_in_the_batch():
    (_, base), (_, two), (largest, four) = [allocations(size) for size in (1024, 2048, 4096)]
    assert largest < 4096 * 4096 // 4  # no matrix of all rows and candidates, not even of bools
    assert four - two < 2.2 * (two - base)
    assert four < 2 * base
