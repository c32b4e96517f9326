import numpy as np

from gist_ray.data.shards import NO_LABEL, Triplets, text_labels


def triplets(rows: list[tuple[int, int, int]]) -> Triplets:
    query, positive, label = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    nothing = np.zeros(len(rows), dtype=np.int64)
    return Triplets(query, positive, np.zeros(len(rows) + 1, np.int64), nothing[:0], nothing, nothing, label)


def test_a_text_has_the_label_that_its_rows_agree_on():
    rows = [(0, 1, 7), (1, 2, 7), (3, 4, 9), (4, 5, 8), (6, 0, NO_LABEL), (5, 3, 9)]
    found = text_labels(triplets(rows), 8)
    assert found is not None
    assert found.tolist() == [7, 7, 7, 9, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL]


def test_without_labels_there_is_nothing_to_look_up():
    assert text_labels(triplets([(0, 1, NO_LABEL)]), 2) is None
    assert text_labels(triplets([]), 2) is None
