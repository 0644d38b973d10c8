"""Benchmarks run end to end on a tiny model folder and report what they claim to."""

import json
from pathlib import Path

import pytest

from medviz.errors import InputError
from train.benchmarks import main


def test_seconds_of_a_pair_are_measured_and_drawing_it_at_once_is_set_beside(model_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair.json"
    options = {"domains": "dermatology", "models": model_root, "repeats": 2, "steps": 2, "threads": 1, "out": out}
    main(["pair", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    found = json.loads(out.read_text())
    assert found["threads"] == 1
    measured = found["dermatology"]["2"]
    assert 0 < measured["pair_s"]["value"] <= measured["slowest_pair_s"]
    assert measured["pair_s"]["n"] == measured["apart_over_together"]["n"] == 2
    assert measured["apart_over_together"]["low"] < measured["apart_over_together"]["value"]
    with pytest.raises(InputError, match="at least 2 are needed"):
        main(["pair", "--repeats", "1"])


def test_an_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="pair"):
        main(["speed"])
