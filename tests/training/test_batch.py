import threading
from pathlib import Path

import numpy as np
import pytest

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder
from gist_ray.training.batch import made_ahead, make_batch
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
        assert sorted(texts) == sorted(shards.triplets.texts_of(batch))  # each text once, over all workers
    assert sorted(rows) == list(range(20))
    assert max(p.padded_tokens for p in parts) <= sum(p.padded_tokens for p in parts) / world_size + 128  # one chunk
    queries = shards.triplets.query[batch]
    assert texts[parts[0].query].tolist() == queries.tolist()
    assert texts[parts[0].positive].tolist() == shards.triplets.positive[batch].tolist()
    assert texts[parts[0].negative].tolist() == shards.triplets.negatives_of(batch).tolist()
    for place, row in enumerate(batch):  # 0 or 2 negatives each
        own = texts[parts[0].negative[parts[0].owners == place]]
        assert own.tolist() == shards.triplets.negatives_of(np.array([row])).tolist()


def test_without_a_guide_its_vectors_stay_on_the_disk(recipe: Recipe):
    shards, encoder = Shards.open(recipe.shards_dir()), Encoder.load(recipe.student.path)
    alone = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"guide": "none"})})
    assert make_batch(encoder, shards, np.arange(4), alone, 0, 1).guide.shape[1] == 0


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
