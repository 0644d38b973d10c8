"""The watermark is read back after JPEG compression, is not seen, and is not found where it was not written."""

import cv2
import numpy as np
import pytest
from PIL import Image

from medviz.audit.provenance import label
from medviz.audit.watermark import THRESHOLD, compressed, embed, is_marked, score
from medviz.errors import InputError

COUNT, SIDE_PX = 200, 256


def picture(seed: int) -> Image.Image:
    """A picture of soft shapes, fine texture and flat corners, grey for odd seeds, with its visible label."""
    rng = np.random.default_rng(seed)
    shapes = sum(
        cv2.resize(rng.normal(size=(cells, cells, 3)), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
        * 60
        / cells**0.5
        for cells in (3, 6, 12, 24)
    )
    texture = cv2.GaussianBlur(rng.normal(size=(SIDE_PX, SIDE_PX, 3)), (0, 0), 0.8) * rng.uniform(0, 12)
    levels = rng.uniform(60, 200) + shapes + texture
    if seed % 2:
        levels = np.repeat(levels.mean(axis=2, keepdims=True), 3, axis=2)
    levels[: seed % 60, : seed % 90] = 0
    return label(Image.fromarray(levels.clip(0, 255).astype(np.uint8)))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(seed) for seed in range(COUNT)]


def test_the_mark_is_read_back_after_jpeg_compression_and_changes_little(pictures: list[Image.Image]) -> None:
    marked = [embed(image) for image in pictures]
    assert all(is_marked(image) for image in marked)
    assert np.mean([is_marked(compressed(image, 75)) for image in marked]) >= 0.99
    errors = [
        np.square(np.asarray(after, float) - np.asarray(before, float)).mean()
        for before, after in zip(pictures, marked, strict=True)
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 45, "mean PSNR in dB"


def test_unmarked_pictures_score_like_noise(pictures: list[Image.Image]) -> None:
    scores = np.array([value for image in pictures for value in (score(image), score(compressed(image, 75)))])
    assert abs(scores.mean()) < 0.5
    assert 0.5 < scores.std() < 1.3
    assert scores.max() < THRESHOLD


def test_grey_stays_grey_and_the_same_picture_gives_the_same_bytes() -> None:
    marked = np.asarray(embed(picture(1)))
    assert (marked == marked[..., :1]).all()
    assert embed(picture(1)).tobytes() == marked.tobytes()


def test_a_crop_from_the_top_left_keeps_the_mark_and_a_resized_picture_loses_it() -> None:
    marked = embed(picture(2))
    assert is_marked(marked.crop((0, 0, 200, 180)))
    assert not is_marked(marked.resize((400, 400)))


def test_a_flat_picture_has_no_score_and_a_small_one_is_refused() -> None:
    assert score(Image.new("RGB", (256, 256))) == 0.0
    with pytest.raises(InputError, match="at least 128 pixels, got 64 x 200"):
        embed(Image.new("RGB", (64, 200)))
