import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from medviz.errors import InputError
from medviz.evidence.detector import EvidenceDetector
from train import augment
from train.datasets.counterfactuals import Counterfactual
from train.datasets.evidence import dermatology, radiology
from train.datasets.evidence.dermatology import ATTRIBUTES, ArtefactExamples
from train.datasets.evidence.examples import SOMEWHERE, UNKNOWN, Example, changed, halved
from train.datasets.evidence.labels import crop_readings, labelled
from train.datasets.evidence.radiology import ChestExamples, opacity_target, read_structures
from train.datasets.split import Split
from train.evidence import EvidenceConfig, EvidenceLearner, Known, Shown, fit_presence, mask_loss
from train.loop import fit

SIDE = 64
COLOURS = {"hair": (10, 10, 10), "ruler": (250, 20, 20), "gel_bubble": (20, 250, 20), "ink": (20, 20, 250)}


def split(count: int, domain: str = "dermatology", **columns) -> Split:
    """Noisy skin without any artefact; columns: name -> values."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        skin = (rng.uniform(120, 220, 3) + rng.normal(0, 6, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
        pictures.append({"bytes": cv2.imencode(".png", skin)[1].tobytes(), "path": None})
    table = pa.table({
        "image": pictures,
        "image_id": [f"image-{i}" for i in range(count)],
        "lesion_id": [f"lesion-{i}" for i in range(count)],
        "source": ["HAM"] * count,
        **columns,
    })  # fmt: skip
    return Split(domain, "train", table)


def skin_split(count: int = 24) -> Split:
    """Half of the images are labelled to have each attribute, though none shows it."""
    labels = [float(i % 2) for i in range(count)]
    return split(count, artefact_source=["manual"] * count, **{f"artefact_{name}": labels for name in ATTRIBUTES})


class Bars:
    """Draws a bar for every attribute, each in its colour."""

    name = "bars"
    attributes = ATTRIBUTES

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        return np.flatnonzero([record[f"artefact_{attribute}"] == 0 for record in split.records])

    def add(self, split, index, attribute, rng, size_px=256, place=None):
        without = split.image(index, size_px)
        x, y = rng.integers(4, size_px - 24, 2)
        mask = np.zeros((size_px, size_px), np.float32)
        mask[y : y + 6, x : x + 20] = 1
        image = without.copy()
        image[mask > 0] = COLOURS[attribute]
        return Counterfactual(without, image, mask, {}, {}, attribute, "")


def examples(distractors: float = 0.5) -> ArtefactExamples:
    return ArtefactExamples(skin_split(), Bars(), 0, SIDE, distractors)


def config(out: Path, **options) -> EvidenceConfig:
    small = EvidenceConfig(
        out=str(out), size_px=SIDE, widths=(8, 16), batch=8, steps=60, warmup=5, learning_rate=1e-2, ema_decay=0.9,
        blank=0.0, checkpoint_every_s=1e9,
    )  # fmt: skip
    return replace(small, **options)


def test_the_pictures_of_a_pair_differ_in_one_attribute_alone() -> None:
    source = examples(distractors=1.0)
    for seed in range(8):
        without, there = source.pair(np.random.default_rng(seed))
        differ = [k for k in range(len(ATTRIBUTES)) if not np.array_equal(without.targets[k], there.targets[k])]
        assert len(differ) == 1
        assert not without.targets[differ[0]].any()
        inside = there.targets[differ[0]] > 0
        assert inside.any()
        assert np.array_equal(without.image[~inside], there.image[~inside])
        others = [k for k in range(len(ATTRIBUTES)) if k != differ[0]]
        assert (there.targets[others] > 0).any(axis=(1, 2)).sum() == 1  # the distractor, in both


def test_light_and_place_change_alike_in_both_pictures_of_a_pair() -> None:
    without, there = changed(
        examples(0.0).pair(np.random.default_rng(3)), augment.EVIDENCE["dermatology"], np.random.default_rng(4), 0.0,
        [True] * 4,
    )  # fmt: skip
    outside = cv2.dilate(there.targets.max(axis=0), np.ones((7, 7))) <= 0
    assert np.abs(without.image[outside].astype(int) - there.image[outside]).max() <= 1
    assert np.abs(without.image.astype(int) - there.image).max() > 20


def test_a_thumbnail_shows_no_finding_and_says_nothing_of_anatomy() -> None:
    seen = Example(np.full((SIDE, SIDE, 3), 90, np.uint8), np.ones((2, SIDE, SIDE), np.float32), np.ones(2, np.float32))
    (blank,) = changed([seen], augment.EVIDENCE["radiology"], np.random.default_rng(0), 1.0, [True, False])
    assert (blank.targets[0] == 0).all()
    assert (blank.targets[1] == UNKNOWN).all()
    assert not blank.weights.any()


def test_a_thin_line_stays_on_half_the_side() -> None:
    line = np.zeros((1, 8, 8), np.float32)
    line[0, 3] = 1
    assert halved(line)[0, 1].tolist() == [1, 1, 1, 1]
    nowhere = np.full((1, 8, 8), SOMEWHERE, np.float32)
    assert (halved(nowhere) == SOMEWHERE).all()


def test_a_label_says_somewhere_and_its_absence_says_nowhere() -> None:
    found = [examples().real(np.random.default_rng(seed)) for seed in range(20)]
    kinds = {float(each.targets[0].flat[0]) for each in found}
    assert kinds == {0.0, SOMEWHERE}
    for each in found:
        assert each.weights[0] == (dermatology.SOMEWHERE_WEIGHTS["hair"] if each.targets[0].flat[0] < 0 else 0)


def test_an_image_that_shows_nothing_of_its_label_hardly_asks_for_it() -> None:
    known = Known(torch.full((1, 1, 8, 8), SOMEWHERE).half(), torch.ones(1, 1))
    pulls = []
    for logit in (-7.0, -1.0):
        logits = torch.full((1, 1, 8, 8), -9.0)
        logits[0, 0, 3, 3] = logit
        logits.requires_grad_()
        mask_loss(logits, known, [1 / 64])["somewhere"].backward()
        pulls.append(-float(logits.grad[0, 0, 3, 3]))
    assert pulls[0] < 0.02 < 0.4 < pulls[1]


def test_unknown_pixels_have_no_gradient_and_somewhere_lifts_the_most_probable() -> None:
    targets = torch.full((1, 2, 8, 8), UNKNOWN)
    targets[0, 0, :2] = 0
    targets[0, 1, 4:] = SOMEWHERE
    logits = torch.zeros(1, 2, 8, 8)
    logits[0, 1, 5, 5] = 2.0
    logits.requires_grad_()
    known = Known(targets.half(), torch.tensor([[0.0, 1.0]]))
    parts = mask_loss(logits, known, [1 / 64, 1 / 64])
    sum(parts.values()).backward()
    moved = logits.grad[0] != 0
    assert moved[0, :2].all()
    assert not moved[0, 2:].any()
    assert moved[1].nonzero().tolist() == [[5, 5]]
    assert logits.grad[0, 1, 5, 5] < 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evidence")
    source = examples()
    family, skin = Bars(), skin_split()
    pictures, truth = [], []
    for index in range(0, 24, 2):
        pair = family.add(skin, index, "ruler", np.random.default_rng(100 + index), SIDE)
        pictures += [pair.without, pair.image]
        truth += [False, True]
    options = config(out, pair_share=1.0)  # the labels of the real images are as bad as none
    return out, fit(EvidenceLearner(options, source, {"ruler": Shown(np.stack(pictures), np.array(truth))}), options)


def test_a_detector_learns_to_mark_what_pairs_differ_in(trained: tuple[Path, dict]) -> None:
    out, metrics = trained
    assert metrics["attributes"]["ruler"]["auroc"] >= 0.95
    detector = EvidenceDetector.load(out / "model")
    assert detector.card["trained_on"] == "half A of train by lesion"
    pair = Bars().add(skin_split(), 2, "ruler", np.random.default_rng(5), SIDE)
    before, after = ({each.name: each for each in found} for found in detector([pair.without, pair.image]))
    assert not before["ruler"].seen
    assert after["ruler"].seen
    assert after["ruler"].mask[pair.mask > 0].mean() > 2 * after["ruler"].mask[pair.mask == 0].mean()
    x, y, w, h = np.array(after["ruler"].box) * SIDE
    rows, columns = np.nonzero(pair.mask)
    assert x - 4 <= columns.min()
    assert columns.max() <= x + w + 4
    assert y - 4 <= rows.min()
    assert rows.max() <= y + h + 4


def test_a_stopped_training_goes_on_to_the_same_weights(trained: tuple[Path, dict], tmp_path: Path) -> None:
    short = config(tmp_path, steps=6)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fit(EvidenceLearner(replace(short, out=str(whole)), examples(), {}), replace(short, out=str(whole)))
    stopped = replace(short, out=str(halves), max_minutes=1e-9)
    assert fit(EvidenceLearner(stopped, examples(), {}), stopped) is None
    going_on = replace(short, out=str(halves), resume=True)
    fit(EvidenceLearner(going_on, examples(), {}), going_on)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, halves)]
    assert weights[0] == weights[1]


def test_calibration_parts_both_kinds_at_one_half_and_refuses_a_mask_that_means_the_opposite() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(100) < 20
    found = np.where(truth, 1.0, -3.0) + rng.normal(0, 0.5, 100)
    slope, intercept = fit_presence(found, truth)
    assert slope > 0
    assert ((slope * found + intercept > 0) == truth).mean() > 0.97
    with pytest.raises(InputError, match="without the attribute"):
        fit_presence(-found, truth)
    with pytest.raises(InputError, match="both kinds"):
        fit_presence(found, truth & False)


@pytest.mark.parametrize(
    ("option", "value"), [("family", "c"), ("architecture", "vit"), ("batch", 7), ("pair_share", 0.0)]
)
def test_an_option_out_of_range_is_named(option: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=option.split("_")[0]):
        config(tmp_path, **{option: value}).checked()


def film(findings: list[str], boxes: list[dict] | None = None, **record) -> dict:
    return {
        "image_id": "film", "source": "NIH", "view": "PA", "findings": json.dumps(findings),
        "boxes": json.dumps(boxes or []), **record,
    }  # fmt: skip


def box(label: str, x: float, y: float, w: float, h: float) -> dict:
    return {"label": label, "x": x, "y": y, "w": w, "h": h}


def test_what_is_known_of_an_opacity_depends_on_who_marked_it() -> None:
    lungs = np.zeros((128, 128), np.uint8)
    lungs[30:100, 20:50], lungs[30:100, 80:110] = 1, 2
    target, weight = opacity_target(film(["pneumonia"], [box("lung opacity", 0.25, 0.5, 0.25, 0.25)]), lungs, SIDE)
    assert (target[32:48, 16:32] == SOMEWHERE).all()
    assert (target == 0).sum() == SIDE**2 - 16 * 16
    assert weight == radiology.BOXED_WEIGHT

    target, _ = opacity_target(
        film(["tuberculosis"], finding_places=json.dumps({"lung opacity": ["left upper zone"]})), lungs, SIDE
    )
    assert (target[:20, SIDE // 2 :] == SOMEWHERE).all()
    assert (target[:, : SIDE // 2] == UNKNOWN).all()

    target, weight = opacity_target(film(["pneumonia"]), lungs, SIDE)
    assert target[32, 16] == SOMEWHERE
    assert target[0, 0] == UNKNOWN
    assert weight == radiology.LABEL_WEIGHT


def test_a_nodule_counts_where_a_box_marks_it() -> None:
    marked = [box("nodule", 0.2, 0.2, 0.1, 0.1)]
    assert radiology.shows(film(["nodule"], marked), "nodule") is True
    assert radiology.shows(film(["nodule"]), "nodule") is None  # too faint to be boxed
    assert radiology.shows(film(["no finding"]), "nodule") is False
    disc = radiology.discs(marked, 100)
    assert disc[25, 25] == 1
    assert disc[20, 20] == 0


class Blobs:
    """Draws a bright square in the right lung."""

    name = "blobs"
    attributes = tuple(radiology.DRAWN)

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        return np.flatnonzero([radiology.is_clear(record) for record in split.records])

    def add(self, split, index, attribute, rng, size_px=256, place=None):
        without = split.image(index, size_px)
        mask = np.zeros((size_px, size_px), np.float32)
        mask[30:40, 14:24] = 1
        image = np.where(mask[..., None] > 0, 250, without).astype(np.uint8)
        return Counterfactual(without, image, mask, {}, {}, attribute, "right mid zone")


def test_films_are_compared_within_one_source_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 12
    kinds = ["no finding" if i % 2 else "pneumonia" for i in range(count)]
    views = ["PA" if i < 8 else "AP" for i in range(count)]
    sources = ["NIH"] * 8 + ["clinic"] * 4
    films = split(
        count, "radiology", patient_id=[f"p{i}" for i in range(count)], source=sources, view=views,
        findings=[json.dumps([kind]) for kind in kinds], boxes=["[]"] * count, report=[""] * count,
    )  # fmt: skip
    lungs = np.zeros((count, 128, 128), np.uint8)
    lungs[:, 30:100, 20:50], lungs[:, 30:100, 80:110] = 1, 2
    monkeypatch.setattr("train.datasets.evidence.radiology.lung_labels", lambda split: lungs)
    heart = {"heart": np.eye(SIDE, dtype=bool)}
    half = int(films.halves[1])
    source = ChestExamples(films, Blobs(), half, {"image-1": heart}, SIDE, 0.0)
    for rows, others in source.strata["opacity"]:
        pictured = {radiology.stratum(films.records[index]) for index in [*rows.tolist(), *others.tolist()]}
        assert len(pictured) == 1
    without, there = source.pair(np.random.default_rng(0))
    heart_column = radiology.ATTRIBUTES.index("heart")
    right = radiology.ATTRIBUTES.index("right_lung")
    assert without.targets[right, 32, 16] == 1
    assert (there.targets[:3] > 0).any()
    assert not (without.targets[:3] > 0).any()
    target, _ = source._known(1)
    assert np.array_equal(target[heart_column], heart["heart"])
    assert (source._known(3)[0][heart_column] == UNKNOWN).all()


def test_structures_are_read_by_image_and_name(tmp_path: Path) -> None:
    assert read_structures("train", SIDE, tmp_path) == {}
    folder = tmp_path / radiology.NLM_JSRT
    folder.mkdir()
    mask = np.zeros((256, 256), np.uint8)
    mask[:128] = 255
    png = {"bytes": cv2.imencode(".png", mask)[1].tobytes(), "path": None}
    table = pa.table({"image_id": ["one", "one"], "structure": ["heart", "right lung"], "mask": [png, png]})
    pa.parquet.write_table(table, folder / "structures-train.parquet")
    found = read_structures("train", SIDE, tmp_path)
    assert set(found["one"]) == {"heart", "right_lung"}
    assert found["one"]["heart"][:32].all()
    assert not found["one"]["heart"][32:].any()


def test_readings_of_the_crop_stand_beside_the_published_labels() -> None:
    image = next(name for name, seen in crop_readings().items() if seen.get("ruler") == 1)
    skin = split(2, artefact_source=["manual"] * 2, artefact_ruler=[0.0, 1.0], image_id=[image, "unread"])
    seen, published = labelled(skin, "ruler"), labelled(skin, "ruler", published=True)
    assert seen.indices.tolist() == [0]
    assert seen.truth.tolist() == [True]
    assert published.truth.tolist() == [False, True]
