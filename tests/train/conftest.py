"""Nothing that a test computes of invented images stays in the folder of real runs."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _derived_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.datasets.split.DERIVED", tmp_path / "derived")
