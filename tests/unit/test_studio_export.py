"""What leaves the app says that it is synthetic and how it was made; stored examples come back as they were."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medviz.audit.watermark import is_marked
from medviz.domains import DOMAINS
from medviz.errors import InputError, ModelError
from medviz.export.archive import archive, image_png, overlay_png, report_json
from medviz.export.examples import read_example, read_examples, write_example
from medviz.results import Drawing, Pair
from tests.pairs import make_pair, noise_image


@pytest.fixture
def pair() -> Pair:
    return make_pair()


def test_pngs_carry_their_label_and_how_they_were_made(pair: Pair) -> None:
    for side, adapter in (("baseline", "none"), ("aligned", "attribute")):
        with Image.open(io.BytesIO(image_png(pair, side))) as image:
            assert image.text["Synthetic"] == "yes"
            assert (image.text["Seed"], image.text["Adapter"]) == ("7", adapter)
            assert image.text["ModelSha256"] == "ab" * 32
            assert np.asarray(image)[-8:].max() == 255
        with Image.open(io.BytesIO(image_png(pair, side, labelled=False))) as image:
            drawing = pair.baseline if side == "baseline" else pair.aligned
            assert image.tobytes() == drawing.image.tobytes()
            assert image.text["Synthetic"] == "yes"


def test_an_overlay_is_marked_too_and_shows_the_word(pair: Pair) -> None:
    hair, melanoma = (overlay_png(pair, "aligned", word) for word in ("hair", "melanoma"))
    assert hair != melanoma
    with Image.open(io.BytesIO(hair)) as image:
        assert image.text["Synthetic"] == "yes"


def test_the_archive_holds_everything_and_the_same_pair_gives_the_same_bytes(pair: Pair) -> None:
    with zipfile.ZipFile(io.BytesIO(archive(pair))) as packed:
        assert set(packed.namelist()) == {
            "baseline.png", "aligned.png", "pixels/baseline.png", "pixels/aligned.png",
            "maps/01-baseline.png", "maps/01-aligned.png", "maps/02-baseline.png", "maps/02-aligned.png",
            "overlays/01-baseline.png", "overlays/01-aligned.png",
            "overlays/02-baseline.png", "overlays/02-aligned.png",
            "figure.png", "report.json", "manifest.json", "NOTICE.txt",
        }  # fmt: skip
        assert b"Not for diagnosis" in packed.read("NOTICE.txt")
        report = json.loads(packed.read("report.json"))
        with Image.open(io.BytesIO(packed.read("maps/02-aligned.png"))) as image:
            assert np.abs(np.asarray(image) / 65535 - pair.attention("hair").aligned).max() <= 0.5 / 65535 + 1e-7
            assert (image.text["Word"], image.text["Synthetic"]) == ("hair", "yes")
        with Image.open(io.BytesIO(packed.read("aligned.png"))) as image:
            assert is_marked(image)
        with Image.open(io.BytesIO(packed.read("pixels/aligned.png"))) as image:
            assert image.tobytes() == pair.aligned.image.tobytes()
        with Image.open(io.BytesIO(packed.read("figure.png"))) as image:
            assert image.text["Synthetic"] == "yes"
            assert image.height > image.width, "images, then a row for each word"
    assert report["attention"][1]["regions"][0]["aligned_mass"] == 0.6
    assert archive(pair) == archive(pair)


def test_the_report_is_strict_json_with_null_for_what_was_not_computed(pair: Pair) -> None:
    report = json.loads(report_json(pair), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["scores"][0]["aligned"] is None


def test_an_example_comes_back_as_it_was(pair: Pair, tmp_path: Path) -> None:
    found = read_example(write_example(pair, tmp_path / "01"))
    assert found.report() == pair.report()
    assert found.scores == pair.scores
    for side in ("baseline", "aligned"):
        before, after = getattr(pair, side), getattr(found, side)
        assert after.image.tobytes() == before.image.tobytes()
        assert set(after.outlines) == set(before.outlines)
        assert all(np.array_equal(after.outlines[name], before.outlines[name]) for name in before.outlines)
    for word in pair.words:
        before, after = pair.attention(word), found.attention(word)
        assert after.regions == before.regions
        assert np.abs(after.baseline - before.baseline).max() <= 0.5 / 255 + 1e-6
        assert np.abs(after.aligned - before.aligned).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(InputError, match="melanoma, hair"):
        found.attention("ruler")


def test_an_example_without_words_or_regions_comes_back(pair: Pair, tmp_path: Path) -> None:
    from dataclasses import replace

    bare = replace(pair, words=(), baseline=Drawing(noise_image(1), {}), aligned=Drawing(noise_image(2), {}))
    found = read_example(write_example(bare, tmp_path / "01"))
    assert (found.words, found.outlines) == ((), {"baseline": {}, "aligned": {}})


def test_an_example_replaces_an_example_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    folder = write_example(pair, tmp_path / "01")
    (folder / "stale.png").write_bytes(b"")
    write_example(pair, folder)
    assert not (folder / "stale.png").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "draft.txt").write_text("years of work")
    with pytest.raises(InputError, match="no example"):
        write_example(pair, other)
    assert (other / "draft.txt").exists()


@pytest.mark.parametrize("broken", ["example.json", "baseline.png", "attention.png", "regions.png"])
def test_a_damaged_example_is_named_and_left_out(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    write_example(pair, tmp_path / "01")
    bad = write_example(pair, tmp_path / "02")
    content = (bad / broken).read_bytes()
    (bad / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="02"):
        read_example(bad)
    assert [found.seed for found in read_examples(tmp_path)] == [7]
    assert "left out" in caplog.text


def test_every_domain_has_an_example_prompt_to_store() -> None:
    assert all(domain.examples for domain in DOMAINS.values())
