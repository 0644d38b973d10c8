"""The history keeps what decides, compares like with like, and says when a model is worse than one before it."""

import json
from pathlib import Path
from typing import Any

import pytest

from medviz.errors import InputError
from train.evaluate import history
from train.evaluate.report import histories


def estimate(value: float, half: float = 0.01) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 256}


def evaluation(models: str, distance: float, accuracy: float = 0.8, **changes: Any) -> dict[str, Any]:
    def figure(name: str, value: float, higher: bool) -> dict[str, Any]:
        return {
            "name": name,
            "label": name.capitalize(),
            "prompts": "captions",
            "higher_is_better": higher,
            "baseline": estimate(value + 0.5),
            "adapters": {"attribute": {"value": estimate(value)}},
        }

    settings = {"split": "test", "captions": 256, "real_references": 800, "steps": 20, "seed": 0, "grid": "x"}
    return {
        "models": {"sha256": models, "eyes": changes.pop("eyes", "judge")},
        "preset": "cpu",
        "default_adapter": "attribute",
        "settings": {**settings, "guidance_scale": "1.5", **changes},
        "figures": [
            figure("kernel_distance_judge", distance, False),
            figure("judge_accuracy_captions", accuracy, True),
            figure("frechet_distance_judge", 3.0, False),
        ],
    }


def test_a_worse_model_is_named_and_a_better_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "history-dermatology.json"
    assert history.record(path, evaluation("a", 0.10)) == []
    assert history.record(path, evaluation("b", 0.05, accuracy=0.9)) == []
    found = history.record(path, evaluation("c", 0.09, accuracy=0.85))
    assert [sentence.split(" is ")[0] for sentence in found] == ["Kernel_distance_judge", "Judge_accuracy_captions"]
    assert "worse than 0.05 of models b" in found[0]
    assert history.record(path, evaluation("d", 0.065, accuracy=0.895)) == []  # within the intervals
    kept = history.read(path)
    assert [entry["models"] for entry in kept] == ["a", "b", "c", "d"]
    assert set(kept[0]["figures"]) == {"kernel_distance_judge", "judge_accuracy_captions"}


@pytest.mark.parametrize("other", [{"split": "validation"}, {"steps": 4}, {"eyes": "another judge"}])
def test_only_like_is_compared_with_like(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "history-dermatology.json"
    history.record(path, evaluation("a", 0.01))
    assert history.record(path, evaluation("b", 0.9, **other)) == []
    assert histories(tmp_path) == []


def test_the_same_models_measured_again_take_the_place_of_their_entry(tmp_path: Path) -> None:
    path = tmp_path / "history-dermatology.json"
    for report in (evaluation("a", 0.01), evaluation("b", 0.02), evaluation("a", 0.03)):
        history.record(path, report)
    assert [entry["models"] for entry in history.read(path)] == ["b", "a"]


def test_the_table_shows_what_was_measured_like_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "history-dermatology.json"
    for report in (evaluation("z" * 40, 0.3, split="validation"), evaluation("a" * 40, 0.1), evaluation("b" * 40, 0.2)):
        history.record(path, report)
    (text,) = histories(tmp_path)
    assert text.startswith("### Dermatology: every model")
    assert "| `aaaaaaaaaaaa`, cpu, guidance 1.5 | 0.6 → 0.1 | 1.3 → 0.8 |" in text.splitlines()
    assert "zzz" not in text


@pytest.mark.parametrize("content", ["no JSON", "[]", json.dumps({"other": []})])
def test_a_damaged_history_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "history-dermatology.json"
    path.write_text(content)
    with pytest.raises(InputError, match="no history of evaluations"):
        history.record(path, evaluation("a", 0.1))
