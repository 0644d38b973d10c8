"""Left is the patient's left, from the phrase to the named region, however the image was stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from medviz import Studio, workbench
from medviz.domains.chest_places import places_in
from medviz.grounding.anatomy import Anatomy, Mask, lung_regions
from medviz.grounding.atlas import Atlas, place_boxes
from tests.dicoms import dicom

WIDTH, HEIGHT = 160, 128
AIR, BODY, OPACITY = 40, 140, 255


@pytest.fixture
def studio(model_root: Path) -> Studio:
    return Studio(model_root, device="cpu")


def chest() -> Image.Image:
    """Two lungs, the left one narrower for the heart, and a round opacity in the left lower zone: on the right."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.full((HEIGHT, WIDTH), BODY, np.uint8)
    for x, half_width in ((52, 20), (112, 15)):
        pixels[((columns - x) / half_width) ** 2 + ((rows - 64) / 45) ** 2 < 1] = AIR
    pixels[(columns - 112) ** 2 + (rows - 92) ** 2 < 49] = OPACITY
    return Image.fromarray(pixels).convert("RGB")


def lungs_of(image: Image.Image) -> tuple[Mask, Mask]:
    """The right and the left lung: air on the image's left and right half."""
    air = np.asarray(image.convert("L")) != BODY
    right = np.arange(image.width) < image.width / 2
    return air & right, air & ~right


class AirSegmenter:
    """In place of a trained network: air is lung."""

    def segment(self, image: Image.Image) -> Anatomy:
        sharp = image.convert("L").point(lambda level: BODY if BODY - 50 < level < BODY + 50 else AIR)
        return lung_regions(*lungs_of(sharp))


def mirrored_side(side: str) -> str:
    return {"left": "right", "right": "left"}[side]


@pytest.mark.parametrize(("picture", "side"), [(chest(), "left"), (ImageOps.mirror(chest()), "right")])
def test_a_mirrored_image_and_a_swapped_phrase_are_found_on_the_other_side(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, picture: Image.Image, side: str
) -> None:
    """A model that looked for brightness where the phrase's place lies on average would be read rightly."""
    atlas = Atlas.of_boxes([place_boxes(*lungs_of(chest().crop((16, 0, 144, 128))))])

    def look(_: object, images: object, phrase: str, **__: object) -> tuple[np.ndarray, str]:
        return np.asarray(images)[:, 0], phrase

    def read(maps: tuple[np.ndarray, str], tokens: object, size_hw: tuple[int, int], sample: int) -> np.ndarray:
        return atlas.heat(places_in(maps[1]), size_hw) * (maps[0][sample] > 0.6)

    monkeypatch.setattr(workbench, "attention_on_image", look)
    monkeypatch.setattr(workbench, "grounding_heat_map", read)
    with studio._turns["radiology"]:
        studio._models["radiology"] = replace(studio._load("radiology"), segmenter=AirSegmenter())
    found = studio.ground("radiology", picture, f"opacity in the {side} lower zone")
    shares = {region["name"]: region["mass"] for region in found.regions if region["name"].endswith("_zone")}
    assert max(shares, key=shares.get) == f"{side}_lower_zone"
    assert shares[f"{mirrored_side(side)}_lower_zone"] == 0
    for name, on_right in (("left_lung", True), ("right_lung", False)):
        columns = np.nonzero(found.outlines[name])[1]
        assert (columns.mean() > WIDTH / 2) == on_right
    x0, _, x1, _ = found.box
    assert abs((x0 + x1) / 2 - (112 if side == "left" else WIDTH - 112)) <= 3
    other = studio.ground("radiology", picture, f"opacity in the {mirrored_side(side)} lower zone")
    assert other.box is None, "nothing bright lies on the other side"


def test_a_radiograph_is_grounded_and_scored_alike_however_it_was_stored(studio: Studio, tmp_path: Path) -> None:
    picture, phrase = chest(), "opacity in the left lower zone"
    expected = studio.ground("radiology", picture, phrase)
    scores = studio.score("radiology", picture, "a frontal chest X-ray with lung opacity")
    stored = np.asarray(picture.convert("L"))
    mirrored = np.ascontiguousarray(stored[:, ::-1])
    for name, content in {
        "upright": dicom(stored, PatientOrientation=["L", "F"]),
        "mirrored": dicom(mirrored, PatientOrientation=["R", "F"]),
        "inverted": dicom(255 - stored, PhotometricInterpretation="MONOCHROME1"),
    }.items():
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(content)
        found = studio.ground("radiology", path, phrase)
        assert np.array_equal(found.heat_map, expected.heat_map)
        assert found.report() == expected.report()
        assert np.array_equal(found.image, expected.image)
        assert studio.score("radiology", content, "a frontal chest X-ray with lung opacity") == scores
    unlabelled = studio.ground("radiology", dicom(mirrored), phrase)
    assert not np.array_equal(unlabelled.heat_map, expected.heat_map), "without the orientation it is another image"
