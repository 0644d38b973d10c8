"""Benchmarks run end to end on a tiny model folder and report what they claim to."""

import json
from pathlib import Path

import pytest

from medviz.errors import InputError
from train.benchmarks import main


def test_capture_costs_are_measured_on_identical_pictures(model_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    options = {"domains": "dermatology", "models": model_root, "repeats": 1, "steps": 2, "out": out}
    main(["attention", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    found = json.loads(out.read_text())["dermatology"]
    assert found["bit_identical"] is True
    assert found["ratio"] == pytest.approx(found["captured_median_s"] / found["plain_median_s"])
    assert found["repeats"] == 1


def test_an_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="attention"):
        main(["speed"])
