"""Counterfactual images of skin: one artefact more, and nothing else."""

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medviz.domains import get_domain
from medviz.domains.base import CAPTION_TOKENS, count_tokens
from medviz.domains.dermatology import ARTEFACTS
from medviz.domains.image_places import EDGES, IMAGE_PLACES, place_phrase
from medviz.errors import InputError
from medviz.evidence.places import place_of
from train.datasets.counterfactuals import Counterfactual, base, family, family_a
from train.datasets.counterfactuals.dermatology import ATTRIBUTES, ArtefactFamily
from train.datasets.counterfactuals.templates import read_templates, third_of
from train.datasets.split import Split
from train.evaluate import counterfactual_sheet

DERMATOLOGY = get_domain("dermatology")
NAMES = ("a", "b")


def png(pixels: np.ndarray) -> dict[str, Any]:
    return {"bytes": cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(), "path": None}


def skin(seed: int = 0, side: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), (212, 160, 148), np.float32) + rng.normal(0, 3, (side, side, 1))
    cv2.circle(image, (side // 2, side // 2), side // 7, (120, 70, 60), -1)
    return np.clip(image, 0, 255).astype(np.uint8)


def lesions(count: int, name: str = "train", **columns: Any) -> Split:
    absent = {f"artefact_{head}": 0.0 for head, _ in ARTEFACTS.values()}
    rows = [
        {
            "image": png(skin(i)),
            "image_id": f"I{i}",
            "lesion_id": f"L{i}",
            "source": "HAM10000",
            "diagnosis": "nv",
            "artefact_source": "manual",
            **absent,
            **columns,
        }
        for i in range(count)
    ]
    return Split("dermatology", name, pa.Table.from_pylist(rows))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An images' folder with invented templates, each artefact from twelve source images."""
    rows = []
    shapes = {"ruler": (40, 500), "gel_bubble": (40, 40), "ink": (80, 100)}
    for artefact, (height, width) in shapes.items():
        darker = np.zeros((height, width, 3), np.uint8)
        if artefact == "ruler":
            darker[10:30, ::12] = darker[10:30, 1::12] = 150
        elif artefact == "ink":
            darker[20:60, 20:80] = (120, 140, 60)
        else:
            cv2.circle(darker, (20, 20), 14, (120, 120, 120), 3)
        for source in range(12):
            rows.append(
                {
                    "image_id": f"{artefact}-{source}",
                    "artefact": artefact,
                    "darker": png(darker),
                    "lighter": png(np.zeros_like(darker)),
                }
            )
    folder = tmp_path / "images" / "dermatology-artefacts"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    monkeypatch.setenv("MEDVIZ_DATA", str(folder.parent))
    return folder.parent


def made(name: str, attribute: str, count: int = 8, place: str | None = None, side: int = 256) -> list[Counterfactual]:
    split, drawing, rng = lesions(2), family("dermatology", name), np.random.default_rng(3)
    found = [drawing.add(split, i % 2, attribute, rng, side, place) for i in range(count)]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_pictures_differ_exactly_where_the_mask_is(root: Path, name: str, attribute: str) -> None:
    pairs = made(name, attribute)
    assert len(pairs) >= 7
    for pair in pairs:
        differs = (pair.image != pair.without).any(axis=2)
        assert np.array_equal(differs, pair.mask > 0)
        assert pair.mask.dtype == np.float32
        assert pair.mask.max() == 1
        assert pair.without.dtype == pair.image.dtype == np.uint8
        assert pair.image.shape == (256, 256, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_addition_is_a_function_of_the_generator(root: Path, name: str, attribute: str) -> None:
    first, second = made(name, attribute, 3), made(name, attribute, 3)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].mask, first[2].mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_addition_lies_at_the_place_asked_for(root: Path, name: str, attribute: str) -> None:
    for place in EDGES:
        pairs = made(name, attribute, 3, place)
        assert pairs
        for pair in pairs:
            assert pair.place == place == place_of(pair.mask)
            assert pair.record["artefact_place"] == {attribute: place}


@pytest.mark.parametrize("name", NAMES)
def test_families_draw_at_other_sizes(root: Path, name: str) -> None:
    for attribute in ATTRIBUTES:
        assert made(name, attribute, 2, side=128)[0].mask.shape == (128, 128)


def test_without_templates_everything_is_drawn(tmp_path: Path) -> None:
    drawing = ArtefactFamily("a", family_a.PAINTERS, (0, 1), 0, tmp_path)
    assert drawing.templates == {}
    for attribute in ATTRIBUTES:
        assert drawing.add(lesions(1), 0, attribute, np.random.default_rng(0)) is not None


def test_what_hardly_changes_the_picture_is_refused() -> None:
    calls = []

    def faint(image: np.ndarray, place: str, rng: np.random.Generator, templates: Any) -> np.ndarray:
        calls.append(place)
        return image + 3.0

    def flood(image: np.ndarray, place: str, rng: np.random.Generator, templates: Any) -> np.ndarray:
        return image - 60.0

    drawing = ArtefactFamily("test", {"ruler": faint, "ink": flood}, (), 0)
    assert drawing.add(lesions(1), 0, "ruler", np.random.default_rng(0)) is None
    assert len(calls) > 1, "it is tried again before it is given up"
    assert drawing.add(lesions(1), 0, "ink", np.random.default_rng(0)) is None


def test_an_image_that_has_the_artefact_takes_none(root: Path) -> None:
    split = lesions(4, artefact_ruler=1.0)
    drawing, rng = family("dermatology", "a"), np.random.default_rng(0)
    assert drawing.add(split, 0, "ruler", rng) is None
    assert drawing.add(split, 0, "ink", rng) is not None
    assert drawing.eligible(split, "ruler").tolist() == []


@pytest.mark.parametrize(
    ("source", "label", "may"),
    [
        ("manual", 0.0, True),
        ("rl4med", 0.0, True),
        ("manual", 0.4, False),
        ("manual", 1.0, False),
        (None, None, True),
        ("inferred_probability", 0.1, True),
        ("inferred_probability", 0.5, False),
    ],
)
def test_a_label_by_hand_or_a_clear_picture_allows_an_addition(
    root: Path, source: str | None, label: float | None, may: bool
) -> None:
    split = lesions(1, "validation", artefact_source=source, artefact_ruler=label)
    assert (len(family("dermatology", "a").eligible(split, "ruler")) == 1) is may


def test_an_unlabelled_image_with_lines_takes_no_hair(root: Path) -> None:
    image = skin()
    for y in (40, 90, 140, 190):
        cv2.line(image, (20, y), (230, y + 30), (50, 30, 25), 2)
    split = lesions(1, "validation", artefact_hair=None, image=png(image))
    assert len(family("dermatology", "a").eligible(split, "hair")) == 0


def test_families_share_neither_templates_nor_lesions(root: Path) -> None:
    first, second = family("dermatology", "a"), family("dermatology", "b")
    assert isinstance(first, ArtefactFamily)
    assert isinstance(second, ArtefactFamily)
    for artefact in ("ruler", "gel_bubble", "ink"):
        sources = [{each.image_id for each in drawing.templates[artefact]} for drawing in (first, second)]
        assert sources[0]
        assert sources[1]
        assert not sources[0] & sources[1]
        assert len(sources[0] | sources[1]) == 12
    split = lesions(60)
    a, b = (set(drawing.eligible(split, "ink").tolist()) for drawing in (first, second))
    assert a
    assert b
    assert not a & b
    held_out = lesions(6, "validation")
    assert first.eligible(held_out, "ink").tolist() == second.eligible(held_out, "ink").tolist() == list(range(6))


def test_a_template_is_light_added_less_light_taken(root: Path) -> None:
    found = read_templates((0, 1, 2))
    assert len(found["ink"]) == 12
    assert found["ink"][0].change[40, 50].tolist() == [-120, -140, -60]
    assert {third_of(f"ISIC_{i:07d}") for i in range(30)} == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_captions_name_the_addition_and_its_place(root: Path, name: str, attribute: str) -> None:
    pair = made(name, attribute, 1, "lower edge")[0]
    choice = {head: choice for choice, (head, _) in ARTEFACTS.items()}[attribute]
    captions = [DERMATOLOGY.caption(pair.record, random.Random(seed)) for seed in range(200)]
    assert all(choice in caption for caption in captions)
    placed = sum(f"{choice} at the lower edge" in caption for caption in captions)
    assert 70 < placed < 130
    assert not any(choice in DERMATOLOGY.caption(pair.without_record, random.Random(seed)) for seed in range(200))
    assert DERMATOLOGY.labels(pair.record)[attribute] == 1
    assert DERMATOLOGY.labels(pair.without_record)[attribute] == 0


@pytest.mark.parametrize("place", IMAGE_PLACES)
def test_a_prompt_with_a_place_is_read_as_without(place: str) -> None:
    plain = DERMATOLOGY.parse("a dermoscopic image with melanoma (MEL) showing ruler")
    placed = DERMATOLOGY.parse(f"a dermoscopic image with melanoma (MEL) showing ruler {place_phrase(place)}")
    assert placed.unknown_words == ()
    assert (placed.targets, placed.values, placed.words) == (plain.targets, plain.values, plain.words)


def test_captions_with_places_stay_short() -> None:
    labels = {f"artefact_{head}": 1.0 for head, _ in ARTEFACTS.values()}
    record = {"diagnosis": "akiec", "artefact_source": "manual", **labels}
    record["artefact_place"] = {"ruler": "lower right corner", "gel_bubble": "upper left corner"}
    captions = [DERMATOLOGY.caption(record, random.Random(seed)) for seed in range(300)]
    assert max(map(count_tokens, captions)) <= CAPTION_TOKENS


def test_a_second_addition_keeps_the_place_of_the_first(root: Path) -> None:
    drawing, rng = family("dermatology", "a"), np.random.default_rng(1)
    assert isinstance(drawing, ArtefactFamily)
    first = made("a", "ruler", 1, "lower edge")[0]
    second = drawing.added_to(first.image, first.record, "ink", rng, "upper edge")
    assert second is not None
    assert second.record["artefact_place"] == {"ruler": "lower edge", "ink": "upper edge"}


def test_an_unknown_family_attribute_or_place_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match="dermatology a"):
        family("dermatology", "z")
    drawing, rng = family("dermatology", "a"), np.random.default_rng(0)
    with pytest.raises(InputError, match="ruler"):
        drawing.add(lesions(1), 0, "opacity", rng)
    with pytest.raises(InputError, match="lower edge"):
        drawing.add(lesions(1), 0, "ruler", rng, place="under the bed")


def test_relighting_changes_both_pictures_alike(root: Path) -> None:
    pair = made("a", "ruler", 1)[0]
    lit = base.relit(pair, np.random.default_rng(5))
    assert not np.array_equal(lit.without, pair.without)
    same = pair.mask == 0
    assert np.array_equal(lit.image[same], lit.without[same])
    again = base.relit(pair, np.random.default_rng(5))
    assert np.array_equal(lit.image, again.image)
    assert lit.mask is pair.mask


def test_relighting_keeps_grey_pictures_grey() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8), 3, axis=2)
    pair = Counterfactual(grey, grey, np.zeros((16, 16), np.float32), {}, {}, "opacity", "")
    lit = base.relit(pair, np.random.default_rng(2)).image
    assert np.ptp(lit.astype(int), axis=2).max() == 0


@pytest.mark.parametrize(
    ("rows", "columns", "place"),
    [
        (slice(220, 240), slice(20, 230), "lower edge"),
        (slice(5, 30), slice(100, 250), "upper edge"),
        (slice(30, 200), slice(4, 12), "left edge"),
        (slice(60, 200), slice(200, 256), "right edge"),
        (slice(200, 250), slice(0, 60), "lower left corner"),
        (slice(0, 60), slice(200, 256), "upper right corner"),
        (slice(100, 150), slice(90, 170), "centre"),
        (slice(0, 256), slice(0, 256), ""),
        (slice(0, 0), slice(0, 0), ""),
    ],
)
def test_a_mask_has_the_place_where_most_of_it_lies(rows: slice, columns: slice, place: str) -> None:
    mask = np.zeros((256, 256), np.float32)
    mask[rows, columns] = 1
    assert place_of(mask) == place
    assert place_of(mask * 0.2) == place


def test_the_command_writes_a_contact_sheet(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counterfactual_sheet, "open_split", lambda domain, split, root: lesions(6))
    out = tmp_path / "sheets" / "a.png"
    options = ["--count", "2", "--size-px", "64", "--attributes", "ruler", "ink"]
    counterfactual_sheet.main(["--domain", "dermatology", "--family", "a", "--out", str(out), *options])
    with Image.open(out) as picture:
        assert picture.size[0] > 2 * 64
        assert picture.size[1] > 6 * 64
