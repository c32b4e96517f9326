import threading
from pathlib import Path

import numpy as np
import pytest

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards, Triplets
from gist_ray.encoder import Encoder
from gist_ray.training.batch import made_ahead, make_batch, row_tokens
from tests.training.test_step import recipe_for


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory, ray_session) -> Recipe:
    rows = [dict(row, neg=[row["neg"], row["query"][::-1]] if i % 3 else None) for i, row in enumerate(verse_rows[:60])]
    made = recipe_for(tmp_path_factory.mktemp("batch"), tiny_model, rows, batch_size=20, chunk_tokens=128)
    prepare(made)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_share_a_batch_without_talking(recipe: Recipe, world_size: int):
    shards, encoder = Shards.open(recipe.shards_dir()), Encoder.load(recipe.student.path)
    batch = np.arange(5, 25)
    parts = [make_batch(encoder, shards, batch, recipe, rank, world_size) for rank in range(world_size)]
    texts = parts[0].texts.numpy()
    rows = []
    for rank, part in enumerate(parts):
        assert np.array_equal(part.texts, texts) and part.counts == parts[0].counts and part.size == 20
        assert np.array_equal(part.query, parts[0].query) and np.array_equal(part.negative, parts[0].negative)
        np.testing.assert_array_equal(part.guide, shards.texts.guide(texts))
        rows += part.own_rows.tolist()
        # The chunks hold this worker's texts, token by token, in the order of `texts`.
        start = sum(part.counts[:rank])
        held = [row[mask == 1] for c in part.chunks for row, mask in zip(c.ids.numpy(), c.mask.numpy(), strict=True)]
        own = shards.texts.tokens(texts[start : start + part.counts[rank]])
        assert len(held) == len(own) and all(map(np.array_equal, held, own))
        assert part.shapes[rank] == [tuple(chunk.ids.shape) for chunk in part.chunks]
        assert part.tokens == sum(map(len, own)) <= part.padded_tokens
        assert all(chunk.ids.shape[0] == 1 or chunk.ids.numel() <= 128 for chunk in part.chunks)
        wanted = set(shards.triplets.texts_of(batch))
        assert set(texts) == wanted
    assert sorted(rows) == list(range(20))
    assert max(p.tokens for p in parts) - min(p.tokens for p in parts) < 0.5 * parts[0].tokens
    queries = shards.triplets.query[batch]
    assert sorted(texts[parts[0].query]) == sorted(queries)
    pairs = set(zip(texts[parts[0].query].tolist(), texts[parts[0].positive].tolist(), strict=True))
    assert pairs == set(zip(queries.tolist(), shards.triplets.positive[batch].tolist(), strict=True))
    assert sorted(texts[parts[0].negative]) == sorted(shards.triplets.negatives_of(batch))


def test_without_a_guide_its_vectors_stay_on_the_disk(recipe: Recipe):
    shards, encoder = Shards.open(recipe.shards_dir()), Encoder.load(recipe.student.path)
    alone = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"guide": "none"})})
    assert make_batch(encoder, shards, np.arange(4), alone, 0, 1).guide.shape[1] == 0


def test_row_tokens_count_every_negative():
    triplets = Triplets(
        query=np.array([0, 1, 2]),
        positive=np.array([3, 3, 3]),
        negative_starts=np.array([0, 2, 2, 3]),
        negatives=np.array([1, 2, 0]),
        task=np.zeros(3, np.int64),
        source=np.zeros(3, np.int64),
    )
    lengths = np.array([1, 10, 100, 1000], dtype=np.uint16)
    assert row_tokens(triplets, lengths, np.arange(3)).tolist() == [1111, 1010, 1101]
    assert row_tokens(triplets, lengths, np.array([2, 0])).tolist() == [1101, 1111]


def test_batches_are_made_one_ahead_and_in_order():
    made, release = [], threading.Event()

    def items():
        for i in range(4):
            made.append(i)
            if i == 1:
                release.set()
            yield i

    ahead = made_ahead(items())
    assert next(ahead) == 0
    assert release.wait(10)  # the second is made although nobody has asked for it
    assert list(ahead) == [1, 2, 3] and made == [0, 1, 2, 3]


def test_an_error_in_making_a_batch_reaches_the_loop():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = made_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)
