"""A classifier with and without synthetic pictures: what the arms share, what they are judged on, figures by hand."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medviz.domains import get_domain
from medviz.errors import InputError
from tests import tiny
from train import calibration
from train.config import read_recipe
from train.datasets.split import Split, open_split
from train.evaluate.report import read_reports, section
from train.experiments import augmentation, crossed
from train.experiments.augmentation import ARMS, AugmentationConfig, check, gather, run
from train.experiments.classified import Subgroup, balanced_accuracy, classified_figures, mean_auroc, subgroups
from train.experiments.disease import DiseaseLearner
from train.experiments.subgroups import (
    NO_ARTEFACT,
    Described,
    cell_counts,
    described,
    drawn_again,
    prompt_of,
    rarest_cell,
)

RECIPE = Path(__file__).parents[2] / "train" / "recipes" / "augmentation-dermatology.yaml"
CODES = ("nv", "nv", "nv", "mel")
DISEASES = ("melanoma", "nevus")


def write_split(folder: Path, name: str, count: int, seed: int, lesion: str = "") -> None:
    """Invented records: melanomas are red and rare, two images to a lesion."""
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        image = rng.integers(60, 120, (32, 32, 3), dtype=np.uint8)
        image[..., 0] += 90 * (CODES[i % 4] == "mel")
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    table = pa.table(
        {
            "image": pictures,
            "image_id": [f"{name}-{i}" for i in range(count)],
            "source": ["HAM10000"] * count,
            "lesion_id": [f"{lesion or name}-lesion-{i // 2}" for i in range(count)],
            "diagnosis": [CODES[i % 4] for i in range(count)],
            "age": [30.0 + 5 * (i % 8) for i in range(count)],
            "sex": ["female"] * count,
            "site": ["back" if i % 2 else "face" for i in range(count)],
            **{f"artefact_{a}": [0.0] * count for a in ("hair", "gel_bubble", "ruler")},
            "artefact_ink": [float(i % 8 == 3) for i in range(count)],
            "artefact_source": ["manual"] * count,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_split(root / "dermatology", "train", 24, 1)
    write_split(root / "dermatology", "test", 16, 2)
    return root


@pytest.fixture
def config(model_root: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AugmentationConfig:
    monkeypatch.setenv("MEDVIZ_DATA", str(images))
    models = model_root / "dermatology"
    return AugmentationConfig(
        out=str(tmp_path / "run"),
        base=str(models),
        adapter=str(models / "adapters" / tiny.ADAPTER),
        synthetic=6,
        picture_steps=1,
        picture_batch=4,
        rare_below=10,
        least_images=2,
        width=0.125,
        depth=0.5,
        size_px=16,
        batch=4,
        steps=2,
        warmup=1,
        reports=str(tmp_path / "reports"),
        checkpoint_every_s=1e9,
    )


def test_a_run_reports_every_arm_and_finds_what_is_finished(
    config: AugmentationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    real_fit = augmentation.fit
    monkeypatch.setattr(
        augmentation, "fit", lambda learner, wanted: trained.append(wanted.out) or real_fit(learner, wanted)
    )
    found = run(config, "python -m train augmentation x")
    assert found is not None
    assert len(trained) == len(set(trained)) == 4 * 5
    (tmp_path / "run" / "answers" / "aligned-seed3.json").unlink()
    trained.clear()
    assert run(config, "python -m train augmentation x") == found
    assert [Path(name).name.rsplit("-", 1)[0] for name in trained] == ["aligned-seed3"]
    assert not list((tmp_path / "run" / "runs").iterdir())
    stored = json.loads((tmp_path / "reports" / "augmentation-dermatology.json").read_text())
    assert stored == found
    figures = {figure["name"]: figure for figure in stored["figures"]}
    assert len(figures) == len(stored["figures"])
    overall = figures["balanced_accuracy_all"]
    assert overall["counts"] == {"seeds": 5, "images": 16, "lesions": 8, "diagnoses": 2}
    assert set(overall["adapters"]) == {"oversampled", "baseline", "aligned"}
    assert overall["baseline"]["n"] == 8
    assert figures["auroc_rare"]["headline"]
    assert figures["balanced_accuracy_site_back"]["baseline"]["value"] is not None
    assert figures["balanced_accuracy_artefact_ink"]["baseline"] is None  # only melanomas of the test have ink
    assert stored["extra_by_diagnosis"]["melanoma"] > 0
    table = section(read_reports(tmp_path / "reports")[0])
    for label in ARMS.values():
        assert f"| {label} " in table
    # A change of an option trains all arms anew, and the pictures stay.
    trained.clear()
    config.learning_rate = 1e-3
    config.max_minutes = 1e-9
    assert run(config) is None
    assert trained == []


def test_arms_share_labels_prompts_and_noise_and_differ_in_the_extra_pixels_alone(
    config: AugmentationConfig, tmp_path: Path
) -> None:
    train, test = open_split("dermatology", "train"), open_split("dermatology", "test")
    material = gather(config, train, test)
    again = gather(config, train, test)
    assert material.request == again.request
    assert np.array_equal(material.extra, again.extra)
    pictures = augmentation.Synthetic(config, material.request)
    arms = augmentation.Arms(config, material, train, test, pictures)
    assert not (tmp_path / "run" / "pictures").exists()  # nothing is drawn before it is asked for
    pixels = {arm: arms.pixels(arm) for arm in ARMS}
    asked = [json.loads(path.read_text()) for path in (tmp_path / "run" / "pictures").glob("*/request.json")]
    assert [sorted(one["adapter"] or "" for one in asked)] == [["", augmentation.ADAPTER]]
    for key in ("prompts", "seeds", "steps", "guidance_scale"):
        assert asked[0][key] == asked[1][key]
    assert len(set(asked[0]["seeds"])) == config.synthetic
    count = len(material.training)
    for arm in ("oversampled", "baseline", "aligned"):
        assert np.array_equal(pixels[arm].images[:count], pixels["real"].images)
        assert np.array_equal(pixels[arm].labels, pixels["oversampled"].labels)
        assert len(pixels[arm].labels) == count + config.synthetic
        assert np.array_equal(pixels[arm].mean, pixels["real"].mean)
    again_drawn = pixels["oversampled"].images[count:]
    assert np.array_equal(again_drawn, pixels["real"].images[material.extra])
    assert not np.array_equal(pixels["baseline"].images[count:], pixels["aligned"].images[count:])
    # The network starts alike, and the same places of a batch are changed alike.
    one, other = (DiseaseLearner(config, 7, pixels[arm]) for arm in ("oversampled", "aligned"))
    first, second = one.model.state_dict(), other.model.state_dict()
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert np.array_equal(one.batch(3)[1], other.batch(3)[1])


def test_no_training_image_comes_from_test(
    config: AugmentationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = open_split("dermatology", "train"), open_split("dermatology", "test")
    material = gather(config, train, test)
    nothing = augmentation.Synthetic(config, material.request)
    read: dict[str, list[int]] = {}
    real_images = Split.images

    def noted(self: Split, size_px: int, indices: Any = None) -> np.ndarray:
        read.setdefault(self.name, []).extend(indices)
        return real_images(self, size_px, indices)

    monkeypatch.setattr(Split, "images", noted)
    arms = augmentation.Arms(config, material, train, test, nothing)
    learnt, judged = arms.pixels("oversampled").images, arms.pixels("oversampled").test
    assert read == {"train": list(range(24)), "test": list(range(16))}
    seen = {image.tobytes() for image in learnt}
    assert not seen & {image.tobytes() for image in judged}
    write_split(tmp_path / "leaky" / "dermatology", "train", 8, 1, lesion="shared")
    write_split(tmp_path / "leaky" / "dermatology", "test", 8, 2, lesion="shared")
    with pytest.raises(InputError, match="share 4 lesions"):
        gather(config, *(open_split("dermatology", name, tmp_path / "leaky") for name in ("train", "test")))


def test_a_subset_holds_whole_lesions(config: AugmentationConfig) -> None:
    config.real_images = 7
    material = gather(config, open_split("dermatology", "train"), open_split("dermatology", "test"))
    assert len(material.training) == 8
    assert len(set(material.training.groups)) == 4
    assert material.extra.max() < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 1, 2)}, "at least 5"),
        ({"architecture": "none"}, "unknown architecture"),
        ({"domain": "dentistry"}, "no domain"),
        ({"synthetic": 0}, "synthetic must be at least 1"),
    ],
)
def test_what_says_nothing_is_refused(config: AugmentationConfig, options: dict[str, Any], message: str) -> None:
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=message):
        check(config)


def test_the_recipe_holds_together() -> None:
    check(read_recipe(RECIPE, AugmentationConfig))


def records() -> list[dict[str, Any]]:
    known = {f"artefact_{a}": 0.0 for a in ("hair", "gel_bubble", "ruler", "ink")}
    common = {"source": "HAM10000", "artefact_source": "manual", "site": "back", "age": 50.0, **known}
    return [
        *({**common, "diagnosis": "nv"} for _ in range(30)),
        {**common, "diagnosis": "nv", "artefact_ink": 1.0},
        {**common, "diagnosis": "mel", "site": None, "age": None},
        {**common, "diagnosis": None},
    ]


def test_rare_cells_are_what_is_drawn_again() -> None:
    domain = get_domain("dermatology")
    found, rows = described(domain, records(), [str(i) for i in range(33)], ("hair", "ink"))
    assert rows.tolist() == list(range(32))
    assert found.parts[0] == (("artefact", NO_ARTEFACT), ("site", "back"), ("age", "40 to 59"))
    assert found.parts[30][0] == ("artefact", "ink")
    assert found.parts[31] == (("artefact", NO_ARTEFACT),)
    counts = cell_counts(found)
    nevus, melanoma = found.labels[0], found.labels[31]
    assert counts[(nevus, None)] == counts[(nevus, ("site", "back"))] == 31
    assert counts[(nevus, ("artefact", "ink"))] == counts[(melanoma, None)] == 1
    assert rarest_cell(found, counts)[[0, 30, 31]].tolist() == [30, 1, 1]
    drawn = drawn_again(found, rare_below=5, count=200, seed=0)
    assert set(drawn.tolist()) == {30, 31}
    assert 70 < (drawn == 30).sum() < 130
    assert np.array_equal(drawn, drawn_again(found, 5, 200, 0))
    with pytest.raises(InputError, match="as many or more"):
        drawn_again(found, rare_below=1, count=2, seed=0)


def test_a_prompt_names_the_disease_and_much_of_the_record() -> None:
    domain = get_domain("dermatology")
    record = {**records()[30], "sex": "female"}
    prompts = [prompt_of(domain, record, "nevus", 0, number) for number in range(20)]
    parsed = [domain.parse(prompt) for prompt in prompts]
    assert all(each.targets["nevus"] == 1.0 for each in parsed)
    assert sum(each.targets.get("ink") == 1.0 for each in parsed) >= 18
    assert sum("site" in each.values for each in parsed) >= 14
    assert sum("age" in each.values for each in parsed) >= 14
    assert len(set(prompts)) > 1
    with pytest.raises(InputError, match="names it"):
        prompt_of(domain, record, "melanoma", 0, 0)


def answers(*chosen: int) -> np.ndarray:
    """Logits (1, N, 2) of one seed that answers so."""
    return np.eye(2)[list(chosen)][None] * 4.0


def test_subgroup_figures_of_a_hand_made_case() -> None:
    hair, clear = (("artefact", "hair"),), (("artefact", NO_ARTEFACT),)
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    test = Described(DISEASES, labels, (hair,) * 4 + (clear,) * 4, tuple("aabbccdd"))
    groups = subgroups(test, np.array([1] * 4 + [99] * 4), 50, {"hair": "Hair"})
    assert [group.name for group in groups] == [
        "all", "rare", "common", "artefact_hair", "artefact_none_of_the_artefacts",
    ]  # fmt: skip
    assert groups[3].label == "artefact: hair"
    assert groups[3].rows.tolist() == groups[1].rows.tolist() == [0, 1, 2, 3]
    made = {
        "real": np.concatenate([answers(0, 1, 1, 1, 0, 0, 1, 1)] * 2),
        "aligned": np.concatenate([answers(0, 0, 1, 1, 0, 0, 1, 0), answers(0, 0, 1, 0, 0, 0, 1, 0)]),
    }
    found = {figure.name: figure for figure in classified_figures(made, test, groups, 2, {"melanoma": "Melanoma"})}
    overall = found["balanced_accuracy_all"]
    assert overall.baseline.value == pytest.approx((3 / 4 + 1) / 2)
    assert overall.aligned["aligned"].value == pytest.approx(((1 + 3 / 4) / 2 + (1 + 2 / 4) / 2) / 2)
    assert overall.baseline.n == 4
    rare = found["balanced_accuracy_rare"]
    assert rare.baseline.value == pytest.approx((1 / 2 + 1) / 2)
    assert rare.change["aligned"].value == pytest.approx((1 + 3 / 4) / 2 - 3 / 4)
    assert rare.change["aligned"].low < rare.change["aligned"].value < rare.change["aligned"].high
    assert found["recall_melanoma_artefact_hair"].baseline.value == pytest.approx(1 / 2)
    assert found["recall_melanoma_all"].label == "Recall of melanoma"
    assert found["recall_melanoma_all"].headline
    assert not found["recall_melanoma_artefact_hair"].headline
    # Of two positives one scores as the negatives do: 1 and 1/2.
    assert found["auroc_rare"].baseline.value == pytest.approx(0.75)
    few = {figure.name: figure for figure in classified_figures(made, test, groups, 3, {})}
    assert few["balanced_accuracy_rare"].baseline is None
    assert few["balanced_accuracy_rare"].note
    assert few["balanced_accuracy_all"].baseline is not None


def test_lesions_and_not_images_are_drawn() -> None:
    labels, units = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    statistic = balanced_accuracy(np.array([[1.0, 0.0, 1.0, 1.0]]), labels, units, [0, 1])
    times = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    assert statistic(np.ones((3, 1)), times).tolist() == [0.75, 0.5, 1.0]
    one = crossed.crossed_interval(statistic, 1, 2)
    assert (one.low, one.high) == (0.5, 1.0)


def test_the_weighted_auroc_counts_images_as_often_as_they_are_drawn() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=30).round(1), rng.random(30) < 0.4
    times = rng.integers(0, 3, (4, 30)).astype(float)
    found = calibration.weighted_auroc(scores, truth, times)
    for row, area in zip(times.astype(int), found, strict=True):
        assert area == pytest.approx(calibration.auroc(np.repeat(scores, row), np.repeat(truth, row)), abs=1e-5)
    assert np.isnan(calibration.weighted_auroc(scores, truth, truth[None] * 1.0)).all()
    labels = np.where(truth, 0, 1)
    both = mean_auroc(np.stack([scores, -scores], axis=1)[None], labels, np.arange(30), [0, 1])
    assert both(np.ones((1, 1)), np.ones((1, 30)))[0] == pytest.approx(calibration.auroc(scores, truth), abs=1e-5)


def test_an_empty_subgroup_is_not_computed() -> None:
    test = Described(DISEASES, np.array([0, 1]), ((), ()), ("a", "b"))
    empty = Subgroup("none", "none", np.zeros(0, np.int64))
    figures = classified_figures({"real": answers(0, 1), "x": answers(1, 1)}, test, [empty], 1, {})
    assert [figure.name for figure in figures] == ["balanced_accuracy_none", "auroc_none"]
    assert all(figure.baseline is None and figure.aligned == {"x": None} for figure in figures)
