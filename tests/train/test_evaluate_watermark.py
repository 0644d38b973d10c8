"""The watermark's report: what was read, found by mistake and changed, with intervals, from tiny models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medviz import Studio
from medviz.domains import get_domain
from medviz.export.examples import write_example
from train.evaluate.watermark import WatermarkConfig, proportion, read_back, run, unmarked


def test_the_report_holds_every_figure_with_n_and_interval(model_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(model_root / "dermatology", root / "dermatology")
    example = get_domain("dermatology").examples[0].prompt
    pair = Studio(root, device="cpu").compare("dermatology", example, 1, steps=2)
    large = pair.baseline.image.resize((256, 256))
    write_example(_enlarged(pair, large), tmp_path / "examples" / "dermatology" / "01")
    path = tmp_path / "watermark.json"
    run(WatermarkConfig(count=2, real=0, models=str(root), report=str(path)), ["--count", "2"])
    report = json.loads(path.read_text())
    assert report["command"] == "python -m train watermark --count 2"
    found = report["domains"]["dermatology"]
    assert set(found["read"]) == {"png", "jpeg_90", "jpeg_75", "jpeg_60", "jpeg_50"}
    assert all(set(each) == {"value", "low", "high", "n"} for each in found["read"].values())
    assert found["read"]["png"]["n"] == found["unmarked_synthetic"]["found_marked"]["n"] == 2
    assert found["unmarked_real"] is None
    assert {row["role"] for row in found["effect_on_scores"]} == {"judge", "reward"}


def _enlarged(pair, image: Image.Image):
    from dataclasses import replace

    from medviz.results import Drawing

    return replace(pair, words=(), baseline=Drawing(image, {}), aligned=Drawing(image, {}))


def test_marked_pictures_are_told_from_unmarked_ones() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(60, 190, (256, 256, 3), dtype=np.uint8)) for _ in range(3)]
    assert read_back(pictures)["read"]["jpeg_75"]["value"] == 1.0
    assert unmarked(pictures)["found_marked"]["value"] == 0.0


def test_a_share_has_its_exact_interval() -> None:
    found = proportion(0, 200)
    # The rule of three's exact form: 1 - (alpha / 2) ** (1 / n).
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 200), rel=1e-6)
