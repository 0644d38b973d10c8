"""The memorisation check finds the training image that was copied, and nothing among strangers."""

import numpy as np
import pytest

from medviz.audit.memorisation import Nearest, held_out_threshold, memorised_share, nearest_similarity
from medviz.errors import InputError


def embeddings(count: int, seed: int, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_a_copy_is_found_at_its_place_whatever_its_length() -> None:
    references = embeddings(50, 0)
    found = nearest_similarity(references[[7, 31]] * [[0.1], [30.0]], references)
    assert found.index.tolist() == [7, 31]
    assert found.similarity == pytest.approx(1.0)


def test_the_nearest_is_the_one_that_a_plain_search_finds_in_chunks_of_any_size() -> None:
    generated, references = embeddings(23, 1), embeddings(40, 2)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (generated, references)]
    cosines = unit[0] @ unit[1].T
    for chunk_rows in (1, 7, 23, 1000):
        found = nearest_similarity(generated, references, chunk_rows)
        assert np.array_equal(found.index, cosines.argmax(axis=1))
        assert found.similarity == pytest.approx(cosines.max(axis=1), abs=1e-6)


def test_the_share_counts_the_copies_and_stays_low_without_them() -> None:
    train, strangers, held_out = embeddings(200, 3), embeddings(100, 4), embeddings(400, 5)
    real = nearest_similarity(held_out, train)
    mixed = nearest_similarity(np.concatenate([train[:25], strangers[:75]]), train)
    fresh = nearest_similarity(strangers, train)
    found = memorised_share(mixed, real)
    assert 0.25 <= found.share <= 0.30
    assert (found.n, found.held_out_n) == (100, 400)
    assert memorised_share(fresh, real).share <= 0.05


def test_the_threshold_is_what_one_in_a_hundred_held_out_images_exceeds() -> None:
    real = Nearest(similarity=np.linspace(0, 1, 1001, dtype=np.float32), index=np.zeros(1001, dtype=np.int64))
    assert held_out_threshold(real, 0.99) == pytest.approx(0.99, abs=1e-6)
    assert memorised_share(real, real).held_out_share == pytest.approx(10 / 1001)
    assert memorised_share(real, real, quantile=1.0).held_out_share == 0.0


@pytest.mark.parametrize(
    ("generated", "references", "message"),
    [
        (np.ones((0, 4)), np.ones((3, 4)), r"generated embeddings must have the shape"),
        (np.ones((2, 4)), np.ones(4), r"reference embeddings must have the shape"),
        (np.ones((2, 4)), np.ones((3, 5)), "4 dimensions, references 5"),
        (np.zeros((1, 4)), np.ones((3, 4)), "all zeros"),
        (np.full((1, 4), np.nan), np.ones((3, 4)), "not finite"),
    ],
)
def test_embeddings_that_cannot_be_compared_are_named(generated, references, message: str) -> None:
    with pytest.raises(InputError, match=message):
        nearest_similarity(generated, references)


def test_quantiles_and_chunks_outside_their_range_are_refused() -> None:
    real = nearest_similarity(embeddings(3, 6), embeddings(3, 7))
    for quantile in (0.0, 1.1, -1.0):
        with pytest.raises(InputError, match="quantile"):
            held_out_threshold(real, quantile)
    with pytest.raises(InputError, match="chunk_rows"):
        nearest_similarity(embeddings(3, 6), embeddings(3, 7), 0)
