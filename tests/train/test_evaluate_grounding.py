"""Where phrases look: attention and Grad-CAM as maps, scores with intervals, and the evaluation end to end."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import ResNetConfig, ResNetForImageClassification

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.grounding.atlas import Box
from medviz.grounding.words import token_indices
from medviz.models.adapters import save_lora, zero_adapter
from medviz.rewards.classifier import AttributeClassifier
from tests import tiny
from tests.train.grounding_scenes import (
    SIDE,
    invented_set,
    mirrored,
    shown_rows,
    skin_rows,
    split_of,
    structures_table,
    train_rows,
)
from train.__main__ import main
from train.config import read_recipe
from train.datasets.grounded_phrases import (
    PhraseSet,
    boxed_findings,
    filled,
)
from train.evaluate.grounding import readings
from train.evaluate.grounding.priors import oracle, radiology_priors
from train.evaluate.grounding.readings import Reading, asked_head, cam_maps, grad_cam, phrase_maps
from train.evaluate.grounding.scores import METRICS, Arm, figures, interval, patient_means, score_maps
from train.evaluate.grounding.stage import GroundingConfig, run
from train.evaluate.report import section, tables

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


@pytest.fixture
def images_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of both domains, as MEDVIZ_DATA names them."""
    root = tmp_path / "images"
    written = {
        ("radiology", "train"): train_rows(),
        ("radiology", "test"): shown_rows(),
        ("dermatology", "train"): skin_rows(10, 3),
        ("dermatology", "test"): skin_rows(0, 3),
    }
    for (domain, name), rows in written.items():
        (root / domain).mkdir(parents=True, exist_ok=True)
        pq.write_table(split_of(domain, name, rows).table, root / domain / f"{name}-00000-of-00001.parquet")
    structures_table(root / "radiology" / "test-structures.parquet", ["chest-0", "chest-2"])
    monkeypatch.setenv("MEDVIZ_DATA", str(root))
    return root


def equivariant(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline that sees a mirrored image as it sees the image, mirrored: its kernels are made symmetric."""
    with torch.no_grad():
        for layer in (*pipeline.unet.modules(), *pipeline.vae.encoder.modules()):
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                weight = layer.weight
                if layer.stride == (2, 2):  # of an even width, output i then reads columns 2 i and 2 i + 1 alike
                    weight[..., 1:] = weight[..., 1:].mean(dim=-1, keepdim=True)
                    weight[..., 0] = 0
                else:
                    weight.copy_((weight + weight.flip(-1)) / 2)
        # To an untrained network an image is faint beside the edges of its grid.
        for layer in pipeline.vae.encoder.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.mul_(2.5)
    return pipeline


def test_left_and_right_follow_the_patient_through_phrases_regions_and_maps(tmp_path: Path) -> None:
    rows = [row for row in shown_rows() if len(json.loads(row["boxes"])) == 2]
    train = train_rows()
    sides = []
    for turn in (lambda record: record, mirrored):
        priors = radiology_priors(split_of("radiology", "train", [turn(row) for row in train]), SIDE)
        assert priors.atlas is not None
        split = split_of("radiology", "test", [turn(row) for row in rows])
        sets = [boxed_findings(split, priors.atlas, SIDE, placed=placed) for placed in (True, False)]
        sides.append((priors, *sets))
    (priors, placed, named), (turned_priors, turned_placed, turned_named) = sides
    swap = {"right": "left", "left": "right"}
    for one, other in zip(placed.phrases, turned_placed.phrases, strict=True):
        first, rest = one.phrase.split(" ", 1)
        assert other.phrase == f"{swap[first]} {rest}"
        np.testing.assert_array_equal(other.region, one.region[:, ::-1])
    pairs = [
        (priors.of_place(placed), turned_priors.of_place(turned_placed)),
        (priors.of_class(placed), turned_priors.of_class(turned_placed)),
        (oracle(placed, 3), oracle(turned_placed, 3)),
    ]
    for ones, others in pairs:
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_allclose(other, one[:, ::-1], atol=1e-5)
    pipeline = equivariant(tiny.make_pipeline("radiology"))
    both = (named, turned_named)
    seen = [np.stack([inverted_map(pipeline, each, row) for row in range(len(each.phrases))]) for each in both]
    np.testing.assert_allclose(seen[1], seen[0][:, :, ::-1], atol=0.02)
    assert np.abs(seen[0] - seen[0][:, :, ::-1]).max() > 0.2, "the maps are not symmetric themselves"


def inverted_map(pipeline: StableDiffusionPipeline, phrases: PhraseSet, row: int) -> np.ndarray:
    """Where a phrase looks by DDIM inversion, which draws no noise that would have to be mirrored."""
    phrase = phrases.phrases[row]
    images = readings.to_pixels(phrases.images[[phrase.image]])
    maps = readings.attention_on_image(pipeline, images, phrase.phrase, method="inversion", steps=10, time_bins=10)
    tokens = readings.content_indices(pipeline.tokenizer, phrase.phrase)
    return readings.grounding_heat_map(maps, tokens, phrases.size_hw, blur_sigma_px=2.5)


def reworded(phrases: PhraseSet, words: Sequence[str]) -> PhraseSet:
    changed = [replace(each, phrase=word) for each, word in zip(phrases.phrases, words, strict=True)]
    return replace(phrases, phrases=tuple(changed))


def test_maps_belong_to_their_phrase_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = filled([Box(0.2, 0.2, 0.6, 0.6)], SIDE)
    phrases = invented_set([region] * 3, ["lung"] * 3, ["a", "b", "c"])
    worded = reworded(phrases, ("left lung", "lung opacity", "pneumonia"))
    pipeline, reading = tiny.make_pipeline("radiology"), Reading()
    read: list[int] = []
    real = readings.attention_on_image

    def counted(pipeline: Any, images: torch.Tensor, prompts: Any, **options: Any) -> Any:
        read.append(len(prompts))
        return real(pipeline, images, prompts, **options)

    monkeypatch.setattr(readings, "attention_on_image", counted)
    first = phrase_maps(pipeline, None, worded, reading, tmp_path, {"base": "x"}, batch=2)
    assert first.shape == (3, SIDE, SIDE)
    assert first.min() >= 0
    assert first.max() <= 1
    maps = real(pipeline, readings.to_pixels(worded.images[:1]), "left lung", method="one_step", seeds=reading.seeds)
    tokens = token_indices(pipeline.tokenizer, "left lung", "left lung")
    np.testing.assert_allclose(first[0], readings.grounding_heat_map(maps, tokens, (SIDE, SIDE)), atol=1e-3)
    sorted(tmp_path.rglob("*.npz"))[1].unlink()  # a stop between the two batches
    np.testing.assert_array_equal(phrase_maps(pipeline, None, worded, reading, tmp_path, {"base": "x"}, batch=2), first)
    assert read == [2, 1, 1]
    alone = phrase_maps(
        pipeline, None, replace(worded, phrases=worded.phrases[1:2]), reading, tmp_path, {"base": "x"}, batch=1
    )
    np.testing.assert_allclose(alone[0], first[1], atol=1e-3)
    for options in ({"base": "y"}, {"base": "x", "adapter": "z"}):
        phrase_maps(pipeline, None, worded, reading, tmp_path, options, batch=2)
    again = phrase_maps(pipeline, None, worded, Reading(seeds=(7,)), tmp_path, {"base": "x"}, batch=2)
    assert np.abs(again - first).max() > 1e-3
    phrase_maps(pipeline, None, phrases, reading, tmp_path, {"base": "x"}, batch=2)
    assert sum(read) == 3 + 1 + 1 + 4 * 3, "other weights, phrases or readings are read anew"


def make_resnet(folder: Path, heads: Sequence[str]) -> AttributeClassifier:
    torch.manual_seed(0)
    network = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=len(heads))
    ).eval()
    card = {
        "heads": list(heads), "size_px": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3,
        "temperature": dict.fromkeys(heads, 1.0), "threshold": dict.fromkeys(heads, 0.5),
    }  # fmt: skip
    return AttributeClassifier(network.requires_grad_(False), card, folder)


def test_grad_cam_is_the_heads_weighted_sum_of_the_last_feature_map(tmp_path: Path) -> None:
    classifier = make_resnet(tmp_path, ("normal", "pneumonia", "opacity"))
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    outputs = [2, 1]
    found = grad_cam(classifier, images, outputs)
    with torch.no_grad():
        features = classifier.model(classifier.prepare(images), output_hidden_states=True).hidden_states[-1]
    # Pooled by the mean and read by one linear layer: each channel's gradient is its weight over the number of cells.
    linear = classifier.model.classifier[-1].weight[outputs]
    wanted = torch.einsum("bchw,bc->bhw", features, linear).relu() / features[0, 0].numel()
    torch.testing.assert_close(found, wanted)
    assert bool((wanted > 0).any())


def test_grad_cam_asks_the_phrases_head_and_is_missing_without_one(tmp_path: Path) -> None:
    radiology, dermatology = get_domain("radiology"), get_domain("dermatology")
    classifier = make_resnet(tmp_path, ("normal", "pneumonia", "opacity"))
    wanted = {
        "right lower zone lung opacity": "opacity",
        "ground glass opacity": "opacity",
        "consolidation": "opacity",
        "pneumonia": "pneumonia",
        "right lung": None,
        "pleural effusion": None,
    }
    assert {phrase: asked_head(radiology, phrase, classifier) for phrase in wanted} == wanted
    skin = make_resnet(tmp_path, ("melanoma", "pigment_network"))
    assert asked_head(dermatology, "pigment network", skin) == "pigment_network"
    assert asked_head(dermatology, "globules", skin) is None
    region = filled([Box(0.2, 0.2, 0.6, 0.6)], SIDE)
    phrases = invented_set([region] * 3, ["lung"] * 3, ["a", "b", "c"])
    maps = cam_maps(classifier, radiology, reworded(phrases, ("right lung", "pneumonia", "opacity")))
    assert maps[0] is None
    for row, output in ((1, 1), (2, 2)):
        heat = maps[row]
        assert heat is not None
        assert heat.shape == (SIDE, SIDE)
        alone = grad_cam(classifier, readings.to_pixels(phrases.images[row : row + 1]), [output])
        wanted_heat = readings.joint_scale(readings.resize(alone[0], (SIDE, SIDE)).numpy())[0]
        np.testing.assert_allclose(heat, wanted_heat, atol=1e-5)
    assert np.isnan(score_maps(maps, phrases)[0]).all()


def test_scores_are_averaged_by_patient_then_class_then_seed() -> None:
    region = filled([Box(0, 0, 0.5, 1)], SIDE)
    phrases = invented_set([region] * 4, ["lung", "lung", "lung", "tube"], ["ann", "ann", "bob", "bob"])
    scores = np.array([[1.0], [3.0], [6.0], [10.0]])
    means = patient_means(scores, phrases)
    np.testing.assert_array_equal(means[..., 0], [[2.0, np.nan], [6.0, 10.0]])
    two_seeds = np.stack([means, means + 2])[..., 0]
    # lung: patients 2 and 6, tube: 10; seeds add 0 and 2
    assert interval(two_seeds).value == pytest.approx(((2 + 6) / 2 + 10) / 2 + 1)
    assert interval(two_seeds).n == 2
    of_tube = interval(two_seeds[:, :, 1:])
    assert (of_tube.value, of_tube.n) == (11.0, 1)
    assert (of_tube.low, of_tube.high) == (10.0, 12.0), "with one patient the seeds alone are drawn"
    of_lung = interval(means[None, :, :1, 0])
    assert (of_lung.value, of_lung.low, of_lung.high, of_lung.n) == (4.0, 2.0, 6.0, 2)
    assert math.isnan(interval(np.full((1, 2, 1), np.nan)).value)
    gap = patient_means(np.array([[1.0], [np.nan], [6.0], [10.0]]), phrases)
    assert np.isnan(gap[0, 0, 0])


def test_changes_and_leads_are_paired_and_a_missing_class_leaves_no_macro() -> None:
    rng = np.random.default_rng(0)
    regions = [filled([Box(0, 0, 0.5, 1)], SIDE)] * 24
    phrases = invented_set(regions, ["lung", "tube"] * 12, [str(i // 2) for i in range(24)])
    base = patient_means(rng.normal(size=(24, len(METRICS))) * 5, phrases)[None]
    partial = base.copy()
    partial[:, :, 1] = np.nan
    values = {
        "frozen": base,
        "tuned": np.concatenate([base + 1, base + 1]),
        "cam": partial,
        "prior": base + 0.25,
        "poor": base - 9,
    }
    arms = [
        Arm("frozen", "frozen"),
        Arm("tuned", "tuned"),
        Arm("cam", "cam"),
        Arm("prior", "prior", held=False),
        Arm("poor", "poor", held=False),
    ]
    found = {each.name: each for each in figures(phrases, arms, values, ["poor", "prior"], ["lung", "tube"])}
    macro = found["invented_macro_cnr"]
    assert macro.baseline is not None
    assert macro.baseline.high - macro.baseline.low > 1, "patients differ much"
    change = macro.change["tuned"]
    assert change is not None
    assert (change.low, change.high) == (pytest.approx(1), pytest.approx(1)), "what the patients share cancels"
    assert math.isnan(macro.aligned["cam"].value)
    assert set(macro.change) == {"tuned"}, "none for a row that is not held against the first, nor where none exists"
    lead = found["invented_macro_cnr_lead"]
    assert (lead.baseline.value, lead.aligned["tuned"].value) == (pytest.approx(-0.25), pytest.approx(0.75))
    assert lead.aligned["prior"].value == 0
    assert found["invented_lung_miou"].headline
    assert not found["invented_lung_mass"].headline
    assert found["invented_lung_cnr"].aligned["cam"].value == found["invented_lung_cnr"].baseline.value
    only = {each.name: each for each in figures(phrases, arms, values, ["poor", "prior"], ["lung"])}
    assert only["invented_macro_cnr"].baseline.value == only["invented_lung_cnr"].baseline.value
    assert only["invented_macro_cnr"].counts == {"phrases": 12}


def tuned_folders(folder: Path) -> tuple[str, ...]:
    """A LoRA adapter of two seeds, and one of zeros."""
    folders = []
    for seed, zero in ((1, False), (2, False), (3, True)):
        unet = tiny.make_unet(1)
        tiny.add_lora(unet, "mine", seed)
        if zero:
            zero_adapter(unet, "mine")
        folders.append(str(save_lora(unet, folder / str(seed), "mine", details={"title": "Mine"})))
    return tuple(folders)


def test_radiology_from_end_to_end(model_root: Path, images_folder: Path, tmp_path: Path) -> None:
    one, two, zeros = tuned_folders(tmp_path / "adapters")
    config = GroundingConfig(
        out=str(tmp_path / "run"),
        models=str(model_root),
        tuned={"mine": (one, two), "none": (zeros,)},
        one_step_seeds=(0, 1),
        batch=4,
        reports=str(tmp_path / "reports"),
    )
    report = run(config, "python -m train evaluate grounding x.yaml")
    stored = json.loads((tmp_path / "reports" / "grounding-radiology.json").read_text())
    assert stored == json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    arms = [arm["name"] for arm in report["arms"]]
    assert arms == [
        "frozen_one_step", "mine_one_step", "none_one_step",
        "judge_grad_cam", "uniform", "prior_class", "prior_place", "oracle_3", "oracle_6",
    ]  # fmt: skip
    beside = run(replace(config, tuned={"mine": (one, two)}, suffix="mine"))
    assert [arm["name"] for arm in beside["arms"]] == ["frozen_one_step", "mine_one_step", *arms[3:]]
    assert beside == json.loads((tmp_path / "reports" / "grounding-radiology-mine.json").read_text())
    assert stored == json.loads((tmp_path / "reports" / "grounding-radiology.json").read_text())
    assert list(report["sets"]) == ["structures", "placed_boxes", "named_boxes"]
    structures = report["sets"]["structures"]
    assert structures["macro"] == ["right_lung", "left_lung", "ground_glass"], "no caption has a word for tubes"
    assert structures["classes"]["ground_glass"]["judge_head"] == "opacity"
    found = {each["name"]: each for each in report["figures"]}
    assert len(found) == len(report["figures"])
    macro = found["placed_boxes_macro_cnr"]
    assert macro["adapters"]["none_one_step"]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert macro["adapters"]["mine_one_step"]["change"]["value"] != 0
    assert macro["adapters"]["uniform"] == {"value": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}, "change": None}
    assert macro["adapters"]["judge_grad_cam"]["value"]["value"] is not None
    assert found["structures_macro_cnr"]["adapters"]["judge_grad_cam"]["value"]["value"] is None
    assert found["structures_right_lung_auroc"]["adapters"]["oracle_3"]["value"]["value"] > 0.95
    for name in ("placed_boxes_macro_cnr", "placed_boxes_macro_miou"):
        leads = found[f"{name}_lead"]["adapters"]
        assert max(leads[prior]["value"]["value"] for prior in ("prior_class", "prior_place")) == 0
        assert min(leads[prior]["value"]["value"] for prior in ("prior_class", "prior_place")) < 0
    of_lung = found["structures_right_lung_miou_lead"]["adapters"]
    assert of_lung["prior_place"]["value"]["value"] == 0, "the side is known: the better prior"
    assert of_lung["prior_class"]["value"]["value"] < -0.3
    text = section({**report, "file": "grounding-radiology.json"})
    assert text in tables([{**report, "file": "grounding-radiology.json"}])
    assert text not in tables([{**report, "file": "grounding-radiology.json", "tables": False}])
    assert "| Hand-drawn masks | CNR ↑, n 2 |" in text
    assert "| Readers' boxes, side and zone: mIoU by class | Lung opacity ↑, n 1 | Pneumonia ↑, n 1 |" in text
    assert "Mine (`mine`, 2 training seeds)" in text
    made = len(list((tmp_path / "run").rglob("*.npz")))
    apart = []
    for folder in (one, two):
        again = run(replace(config, tuned={"mine": (folder,)}, reports=""))
        (value,) = (
            each["adapters"]["mine_one_step"]["value"] for each in again["figures"] if each["name"] == macro["name"]
        )
        apart.append(value["value"])
    assert len(list((tmp_path / "run").rglob("*.npz"))) == made, "every map was found again"
    assert apart[0] != apart[1]
    assert macro["adapters"]["mine_one_step"]["value"]["value"] == pytest.approx(sum(apart) / 2)
    assert not list((tmp_path / "run").rglob(".writing*"))


def test_dermatology_from_the_command_line_and_without_places(
    model_root: Path, images_folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\ndomain: dermatology\nmodels: {model_root}\nreports: ''\n")
    assert main(["evaluate", "grounding", str(recipe), "--limit", "2", "--batch", "8"]) == 0
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["command"] == f"python -m train evaluate grounding {recipe} --limit 2 --batch 8"
    (structures,) = report["sets"].values()
    assert structures["macro"] == list(structures["classes"]) == [
        "lesion", "pigment_network", "globules", "streaks", "milia_like_cyst", "negative_network",
    ]  # fmt: skip
    assert {each["count"] for each in structures["classes"].values()} == {2}
    assert structures["classes"]["milia_like_cyst"]["phrases"] == ["milia-like cysts"]
    assert [arm["name"] for arm in report["arms"]][2:] == ["uniform", "prior_class", "oracle_3", "oracle_6"]
    found = {each["name"]: each for each in report["figures"]}
    # All invented masks are alike, so the training mean is the region itself.
    assert found["structures_lesion_miou"]["adapters"]["prior_class"]["value"]["value"] == 1.0
    assert found["structures_macro_miou_lead"]["adapters"]["prior_class"]["value"]["value"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "cardiology"}, "domain must be one of dermatology, radiology"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"one_step_seeds": ()}, "one_step_seeds"),
        ({"tuned": {"mine": ()}}, "tuned needs names"),
        ({"tuned": {"../x": ("a",)}}, "tuned needs names"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(GroundingConfig(out="nowhere", **options))


@pytest.mark.parametrize("domain", ["radiology", "dermatology"])
def test_the_recipes_read(domain: str, tmp_path: Path) -> None:
    found = read_recipe(RECIPES / "grounding.yaml", GroundingConfig, ["--domain", domain]).checked()
    assert (found.domain, found.split) == (domain, "test")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("out: x\ntuned:\n  paper: [a, b]\n  best: [c]\n")
    named = read_recipe(recipe, GroundingConfig, ["--tuned.best", "d", "e"])
    assert named.tuned == {"paper": ("a", "b"), "best": ("d", "e")}
