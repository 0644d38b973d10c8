"""A synthetic image says so to the eye and to a program, and stays available as it was drawn."""

import io

import numpy as np
import pytest
from PIL import Image

from medviz.audit.provenance import MIN_SHOWN_SIDE_PX, Provenance, label, labelled_png, unlabelled_png

MADE = Provenance(
    domain="dermatology",
    prompt="a dermoscopic image with hair – 皮膚",
    seed=2**32 - 1,
    steps=20,
    guidance_scale=3.0,
    adapter="attribute",
    model_sha256="ab" * 32,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (512, 384)])
def test_the_footer_is_white_on_black_and_covers_little(size: tuple[int, int]) -> None:
    image = noise(*size)
    shown = label(image)
    assert min(shown.size) >= MIN_SHOWN_SIDE_PX
    factor = shown.width // image.width
    assert shown.size == (image.width * factor, image.height * factor)
    pixels = np.asarray(shown).astype(int)
    plain = np.asarray(image.resize(shown.size, Image.Resampling.BICUBIC)).astype(int)
    changed = np.abs(pixels - plain).max(axis=(1, 2)) > 0
    first = int(np.argmax(changed))
    assert changed[first:].all()
    assert 16 <= shown.height - first <= max(17, 0.08 * shown.height + 2)
    band = pixels[first:]
    assert band.max() > 240
    # Black stays most of the band; the letters stand free of its edges.
    assert np.median(band) == 0
    assert band[:, :5].max() == 0


def test_letters_differ_from_an_empty_band_in_many_columns() -> None:
    band = np.asarray(label(noise(128, 128)))[-16:]
    written = (band.max(axis=(0, 2)) > 128).sum()
    assert 50 <= written <= 120


def test_labelling_leaves_the_image_itself_as_it_was() -> None:
    image = noise(128, 128)
    before = image.tobytes()
    label(image)
    labelled_png(image, MADE)
    assert image.tobytes() == before


def test_the_png_text_says_how_the_image_was_made() -> None:
    with Image.open(io.BytesIO(labelled_png(noise(128, 128), MADE))) as found:
        text = found.text
    assert text["Synthetic"] == "yes"
    assert text["Software"].startswith("medviz ")
    assert text["Prompt"] == MADE.prompt
    assert {key: text[key] for key in ("Domain", "Seed", "Steps", "GuidanceScale", "Adapter", "ModelSha256")} == {
        "Domain": "dermatology",
        "Seed": "4294967295",
        "Steps": "20",
        "GuidanceScale": "3",
        "Adapter": "attribute",
        "ModelSha256": "ab" * 32,
    }


def test_the_pixels_as_drawn_keep_their_provenance() -> None:
    image = noise(128, 128)
    with Image.open(io.BytesIO(unlabelled_png(image, MADE))) as found:
        assert np.array_equal(found, image)
        assert found.text["Synthetic"] == "yes"


def test_the_baseline_has_no_adapter() -> None:
    baseline = Provenance("radiology", "an X-ray", 1, 20, 3.0, None, "0" * 64)
    assert baseline.png_text()["Adapter"] == "none"
