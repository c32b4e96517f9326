import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gist_ray.encoder import Encoder
from gist_ray.training.batch import Chunk
from gist_ray.training.words import words_of


class Engine:
    """What `words_of` asks of DeepSpeed's."""

    def __init__(self, module: nn.Module, stage: int = 1) -> None:
        self.module, self._stage, self.backwards = module, stage, 0

    def zero_optimization_stage(self) -> int:
        return self._stage

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.backwards += 1
        loss.backward()


@pytest.fixture
def encoder(tiny_model: Path) -> Encoder:
    encoder = Encoder.load(tiny_model)
    encoder.model.double()
    return encoder


def chunks_of(encoder: Encoder) -> list[Chunk]:
    # "[PAD]" in a text is read like any word, and the model's table does not train it.
    texts = [["a man plays the guitar", "rain [PAD] and"], ["the guitar is played by a man in the rain"]]
    return [Chunk(i, *encoder.padded(encoder.tokenize(part))) for i, part in enumerate(texts)]


def gradients(encoder: Encoder, chunks: list[Chunk]) -> list[Tensor]:
    for chunk in chunks:
        vectors = encoder.forward(chunk.ids, chunk.mask)
        (vectors * torch.arange(vectors.numel()).view_as(vectors)).sum().backward()
    return [p.grad for p in encoder.model.parameters() if p.grad is not None]


def test_gradients_and_vectors_are_those_of_the_models_own_table(encoder: Encoder):
    chunks = chunks_of(encoder)
    expected = [gradient.clone() for gradient in gradients(encoder, chunks)]
    plain = encoder.forward(chunks[0].ids, chunks[0].mask)
    encoder.model.zero_grad()
    engine = Engine(encoder.model)
    embedding = encoder.model.get_input_embeddings()
    with words_of(engine, chunks) as words:
        assert words is not None
        assert torch.equal(encoder.forward(chunks[0].ids, chunks[0].mask), plain)
        gradients(encoder, chunks)
        assert embedding.weight.grad is None  # not at each chunk
        words.backward()
    assert engine.backwards == 1
    found = [p.grad for p in encoder.model.parameters() if p.grad is not None]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert embedding.weight.grad[embedding.padding_idx].abs().max() == 0


def test_afterwards_the_model_is_as_before_an_error_too(encoder: Encoder):
    chunks = chunks_of(encoder)
    embedding = encoder.model.get_input_embeddings()
    with pytest.raises(KeyError), words_of(Engine(encoder.model), chunks):
        assert "forward" in vars(embedding)
        raise KeyError
    assert "forward" not in vars(embedding)
    everything = torch.arange(embedding.num_embeddings)
    assert torch.equal(embedding(everything), embedding.weight)


def test_a_batch_that_left_no_gradient_passes_none_on(encoder: Encoder):
    engine = Engine(encoder.model)
    with words_of(engine, chunks_of(encoder)) as words:
        assert words is not None
        words.backward()
    assert engine.backwards == 0


def frozen(embedding: nn.Embedding) -> None:
    embedding.weight.requires_grad_(False)


def bounded(embedding: nn.Embedding) -> None:
    embedding.max_norm = 1.0


def own_class(embedding: nn.Embedding) -> None:
    embedding.__class__ = type("Scaled", (nn.Embedding,), {})


@pytest.mark.parametrize("change", [frozen, bounded, own_class])
def test_other_embeddings_are_left_alone(encoder: Encoder, change: Callable[[Any], None]):
    embedding = encoder.model.get_input_embeddings()
    change(embedding)
    with words_of(Engine(encoder.model), chunks_of(encoder)) as words:
        assert words is None and "forward" not in vars(embedding)


def test_partitioned_embeddings_are_left_alone():
    module = types.SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(3, 2))
    with words_of(Engine(module, stage=3), []) as words:  # type: ignore[arg-type]  # no module is needed
        assert words is None
