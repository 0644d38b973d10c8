"""Hair labels count only where the picture bears them out."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.train.test_generator_stages import invented_split
from train.datasets.visible import RULER, SEEN, UNSEEN, confirm_hair, confirmed, hair_length, hair_lengths


def skin() -> np.ndarray:
    return np.full((256, 256, 3), (220, 170, 150), np.uint8)


def test_a_hair_is_as_long_as_it_is_drawn() -> None:
    image = skin()
    cv2.line(image, (40, 60), (200, 180), (60, 40, 30), 2)
    assert hair_length(image) == pytest.approx(np.hypot(160, 120) / 256, rel=0.05)


def test_neither_skin_nor_a_mole_nor_a_light_line_is_hair() -> None:
    mole = skin()
    cv2.circle(mole, (128, 128), 50, (90, 50, 40), -1)
    light = skin()
    cv2.line(light, (40, 60), (200, 180), (250, 240, 235), 2)
    assert [hair_length(image) for image in (skin(), mole, light)] == [0, 0, 0]


def test_small_dots_are_no_hair_however_many() -> None:
    image = skin()
    for x in range(20, 240, 12):
        for y in range(20, 240, 12):
            cv2.circle(image, (x, y), 2, (60, 40, 30), -1)
    assert hair_length(image) == 0


@pytest.mark.parametrize(
    ("label", "ruler", "length", "expected"),
    [
        (1.0, 0.0, SEEN, 1.0),
        (1.0, 0.0, SEEN - 0.01, None),
        (0.0, 0.0, UNSEEN, 0.0),
        (0.0, 0.0, UNSEEN + 0.01, None),
        (1.0, 1.0, SEEN + RULER - 0.01, None),
        (0.0, 1.0, UNSEEN + RULER, 0.0),
        (0.9, None, 2.0, 0.9),
        (None, 0.0, 2.0, None),
    ],
)
def test_a_label_stays_where_the_picture_agrees(label, ruler, length, expected) -> None:
    assert confirmed(label, ruler, length) == expected


def test_lengths_are_kept_by_what_the_pictures_show(tmp_path: Path) -> None:
    first = invented_split("train", 6)
    lengths = hair_lengths(first, tmp_path)
    assert np.array_equal(hair_lengths(first, tmp_path), lengths)
    assert len(list(tmp_path.iterdir())) == 1
    hair_lengths(invented_split("train", 7), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_forgotten_labels_are_counted() -> None:
    records = [{"artefact_hair": 1.0}, {"artefact_hair": 0.0}, {"artefact_hair": None}, {}]
    assert confirm_hair(records, np.array([0.0, 0.0, 5.0, 0.0])) == 1
    assert [record["artefact_hair"] for record in records] == [None, 0.0, None, None]
