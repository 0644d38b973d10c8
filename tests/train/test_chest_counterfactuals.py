"""Composed chest findings: equal outside their mask, where they were asked for, and named so."""

import io
import json
import random
from collections.abc import Iterator

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medviz.domains import get_domain
from medviz.domains.lung_places import box_locations
from medviz.errors import InputError
from train.datasets.counterfactuals import Counterfactual, Family, family
from train.datasets.counterfactuals.chest import PLACES, ZONES
from train.datasets.counterfactuals.lungs import film, plausible
from train.datasets.split import Split

RADIOLOGY = get_domain("radiology")
SIZE = 256
NARROW_HEART_PX = 26


def drawn_film(noise: int) -> tuple[np.ndarray, np.ndarray]:
    """A chest: body, two dark lungs, a heart on the image's right of the middle, ribs; and the mask of the lungs."""
    rng = np.random.default_rng(noise)
    body = np.full((SIZE, SIZE), 170, np.float32)
    lungs = np.zeros((SIZE, SIZE), np.uint8)
    for centre in (82, 174):
        cv2.ellipse(lungs, (centre, 125), (36, 88), 0, 0, 360, 1, -1)
    body[lungs == 1] = 90
    cv2.ellipse(body, (140, 165), (NARROW_HEART_PX, 42), 0, 0, 360, 175, -1)
    for row in range(50, 210, 20):
        cv2.line(body, (30, row + 8), (226, row), 110, 3)
    body = cv2.GaussianBlur(body, (0, 0), 1.5) + rng.normal(0, 2, body.shape)
    return np.clip(body, 0, 255).astype(np.uint8), lungs


def picture(pixels: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def split() -> Split:
    """Twelve films without finding, one with pneumonia, one without finding but boxed; all of them with lung masks."""
    rows = []
    for number in range(14):
        grey, lungs = drawn_film(number)
        box = {"label": "lung opacity", "x": 0.25, "y": 0.4, "w": 0.12, "h": 0.2}
        rows.append(
            {
                "image": picture(grey),
                "lung_mask": picture(lungs * 255),
                "image_id": f"film_{number}",
                "patient_id": f"patient_{number}",
                "source": "NIH ChestX-ray14",
                "view": "PA",
                "age": 50.0,
                "sex": "male",
                "findings": json.dumps(["pneumonia" if number == 12 else "no finding"]),
                "report": None,
                "boxes": json.dumps([box] if number == 13 else []),
            }
        )
    return Split("radiology", "train", pa.Table.from_pylist(rows))


@pytest.fixture(scope="module", params=["a", "b"])
def drawing(request: pytest.FixtureRequest, split: Split, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """Each family, with the split above as its training images and its lungs kept in a folder of the test."""
    patch = pytest.MonkeyPatch()
    place = tmp_path_factory.mktemp("derived")
    patch.chdir(place)
    patch.setattr("train.datasets.counterfactuals.chest_a.open_split", lambda domain, name: split)
    made = family("radiology", request.param)
    for attribute in made.attributes:
        made.eligible(split, attribute)
    yield made
    patch.undo()


def added(
    drawing: Family, split: Split, attribute: str, place: str | None = None, count: int = 6
) -> list[Counterfactual]:
    indices = drawing.eligible(split, attribute)
    found = []
    for seed in range(4 * count):
        index = int(indices[seed % len(indices)])
        pair = drawing.add(split, index, attribute, np.random.default_rng(seed), SIZE, place)
        if pair is not None:
            found.append(pair)
    assert len(found) >= count
    return found


@pytest.mark.parametrize("attribute", list(PLACES))
def test_pictures_differ_inside_the_mask_alone(drawing: Family, split: Split, attribute: str) -> None:
    for pair in added(drawing, split, attribute):
        assert pair.image.shape == pair.without.shape == (SIZE, SIZE, 3)
        assert pair.image.dtype == np.uint8
        assert np.array_equal(pair.image[pair.mask == 0], pair.without[pair.mask == 0])
        assert pair.mask.dtype == np.float32
        assert pair.mask.min() >= 0
        assert pair.mask.max() == 1
        assert np.abs(pair.image.astype(int) - pair.without).max() >= 15


@pytest.mark.parametrize("place", ZONES)
def test_an_opacity_is_where_it_was_asked_for_and_so_captioned(drawing: Family, split: Split, place: str) -> None:
    for pair in added(drawing, split, "opacity", place, 3):
        (box,) = json.loads(pair.record["boxes"])
        assert pair.place == place
        assert box_locations(box) == (place,)
        rise = (pair.image[..., 0].astype(float) - pair.without[..., 0]).clip(0)
        middle = (rise * np.arange(SIZE)).sum() / rise.sum()
        assert (middle < SIZE / 2) == place.startswith("right")
        captions = [RADIOLOGY.caption(pair.record, random.Random(k)) for k in range(30)]
        assert any(f"in the {place}" in caption for caption in captions)
        without = [RADIOLOGY.caption(pair.without_record, random.Random(k)) for k in range(30)]
        assert not any("zone" in caption or "opacity" in caption for caption in without)
        assert RADIOLOGY.labels(pair.record)["opacity"] == 1.0
        assert RADIOLOGY.labels(pair.without_record)["opacity"] == 0.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_effusion_hides_the_base_of_the_named_side(drawing: Family, split: Split, side: str) -> None:
    for pair in added(drawing, split, "pleural_effusion", f"{side} lung", 4):
        rise = pair.image[..., 0].astype(float) - pair.without[..., 0]
        base, apex = (slice(175, 205), slice(40, 90))
        mine, other = (slice(60, 104), slice(152, 196)) if side == "right" else (slice(152, 196), slice(60, 104))
        assert rise[base, mine].mean() > 10
        assert abs(rise[apex]).max() == 0
        assert abs(rise[:, other]).max() == 0
        captions = {RADIOLOGY.caption(pair.record, random.Random(k)) for k in range(60)}
        assert any(f"effusion on the {side}" in caption for caption in captions)
        assert all(
            RADIOLOGY.parse(caption).values.get("location", (f"{side} lung",)) == (f"{side} lung",)
            for caption in captions
        )


def heart_px(image: np.ndarray) -> int:
    """Width of what is as bright as the heart at its height, around the middle."""
    row = cv2.GaussianBlur(image[..., 0], (0, 0), 3)[165] > 130
    left = 128 - int(np.argmin(row[128::-1]))
    return 128 + int(np.argmin(row[128:])) - left


def test_a_heart_widens_and_the_lungs_keep_their_outer_borders(drawing: Family, split: Split) -> None:
    for pair in added(drawing, split, "cardiomegaly", count=4):
        assert heart_px(pair.image) >= heart_px(pair.without) + 10
        assert np.abs(pair.image[:200, :46].astype(int) - pair.without[:200, :46]).max() <= 12
        assert np.array_equal(pair.image[:60], pair.without[:60])
        assert pair.place == ""
        assert RADIOLOGY.labels(pair.record)["cardiomegaly"] == 1.0


def test_a_cavity_is_darker_inside_than_its_wall(drawing: Family, split: Split) -> None:
    for pair in added(drawing, split, "cavity"):
        (box,) = json.loads(pair.record["boxes"])
        rise = cv2.GaussianBlur(pair.image[..., 0].astype(np.float32) - pair.without[..., 0], (0, 0), 1.5)
        row, column = (int((box[at] + box[size] / 2) * SIZE) for at, size in (("y", "h"), ("x", "w")))
        assert rise[row - 2 : row + 3, column - 2 : column + 3].mean() < 0.7 * rise.max()


@pytest.mark.parametrize("attribute", ["nodule", "cavity", "consolidation"])
def test_new_words_are_said_with_their_place_and_read_back(drawing: Family, split: Split, attribute: str) -> None:
    pair = added(drawing, split, attribute, "left upper zone", 1)[0]
    caption = next(c for k in range(60) if "zone" in (c := RADIOLOGY.caption(pair.record, random.Random(k))))
    assert f"{attribute} in the left upper zone" in caption
    parsed = RADIOLOGY.parse(caption)
    assert parsed.values["location"] == ("left upper zone",)
    assert parsed.unknown_words == ()
    assert attribute in parsed.words


def test_only_films_without_finding_of_the_family_s_patients_take_one(drawing: Family, split: Split) -> None:
    eligible = drawing.eligible(split, "opacity")
    half = {"a": 0, "b": 1}[drawing.name]
    assert set(eligible) == {i for i in range(12) if split.halves[i] == half}
    for index in (12, 13):
        assert drawing.add(split, index, "opacity", np.random.default_rng(0)) is None


def test_the_same_generator_draws_the_same(drawing: Family, split: Split) -> None:
    index = int(drawing.eligible(split, "opacity")[0])
    one, two = (drawing.add(split, index, "opacity", np.random.default_rng(5)) for _ in range(2))
    assert one is not None
    assert two is not None
    assert np.array_equal(one.image, two.image)
    assert one.record == two.record


@pytest.mark.parametrize(
    ("attribute", "place"), [("ruler", None), ("opacity", "left elbow"), ("cardiomegaly", "left lung")]
)
def test_what_a_family_does_not_draw_is_refused(
    drawing: Family, split: Split, attribute: str, place: str | None
) -> None:
    with pytest.raises(InputError):
        drawing.add(split, 0, attribute, np.random.default_rng(0), place=place)


def test_the_lung_behind_the_heart_is_not_where_findings_are_laid() -> None:
    grey, lungs = drawn_film(0)
    small = cv2.resize(lungs, (128, 128), interpolation=cv2.INTER_NEAREST)
    labels = np.where(np.arange(128)[None, :] < 64, small, small * 2).astype(np.uint8)
    found = film(np.repeat(grey[..., None], 3, 2), labels)
    assert found is not None
    assert found.outline["left"][165, 150]
    assert not found.aerated["left"][165, 150]
    assert found.aerated["left"][165, 190]


def test_a_mask_with_a_limb_or_at_the_edge_is_no_lung() -> None:
    labels = np.zeros((128, 128), np.uint8)
    cv2.ellipse(labels, (40, 64), (18, 40), 0, 0, 360, 1, -1)
    cv2.ellipse(labels, (88, 64), (18, 40), 0, 0, 360, 2, -1)
    assert plausible(labels)
    limb = labels.copy()
    limb[60:66, 100:126] = 2
    edge = labels.copy()
    edge[60:66, 100:] = 2
    assert not plausible(limb)
    assert not plausible(edge)
