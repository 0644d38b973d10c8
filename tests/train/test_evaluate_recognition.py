"""Fidelity and diversity apart, classes as often as each other, and what is taken for what."""

import random

import numpy as np
import pytest

from medviz.domains import get_domain
from train.evaluate.manifold import manifold
from train.evaluate.measure import CLASSES, Readings, alignment_figures, fidelity_figures
from train.evaluate.recognition import class_records, confusions, taken_for


def test_manifold_by_hand() -> None:
    """On a line, real images at 0, 1, 2 and 10; with one neighbour the balls reach 1, 1, 1 and 8."""
    reference = np.array([[0.0], [1.0], [2.0], [10.0]])
    generated = np.array([[0.5], [3.5], [30.0]])  # reach 3, 3 and 26.5
    found = manifold(generated, reference, neighbours=1)
    assert found.precision.tolist() == [1.0, 1.0, 0.0]
    assert found.density.tolist() == [2.0, 1.0, 0.0]  # 0.5 lies in the balls around 0 and 1, 3.5 in that around 10
    assert found.coverage.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert found.recall.tolist() == [1.0, 1.0, 1.0, 1.0]  # 10 is within 26.5 of 30
    assert manifold(generated[:2], reference, neighbours=1).recall.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_collapse_costs_coverage_and_blur_costs_density() -> None:
    rng = np.random.default_rng(0)
    reference, real = rng.normal(size=(300, 4)), rng.normal(size=(200, 4))
    floor = manifold(real, reference)
    collapsed = manifold(0.1 * rng.normal(size=(200, 4)), reference)
    far = manifold(4.0 + rng.normal(size=(200, 4)), reference)
    assert floor.density.mean() == pytest.approx(1.0, abs=0.15)
    assert collapsed.coverage.mean() < 0.5 * floor.coverage.mean()
    assert collapsed.precision.mean() >= floor.precision.mean()
    assert far.density.mean() < 0.1


@pytest.mark.parametrize(("generated", "reference"), [((5, 3), (9, 3)), ((9, 3), (5, 3)), ((9, 3), (9,))])
def test_manifold_refuses_too_few_images(generated: tuple[int, ...], reference: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features need shape"):
        manifold(np.zeros(generated), np.zeros(reference))


def test_fidelity_has_density_and_coverage_beside_the_distances() -> None:
    rng = np.random.default_rng(1)
    reference, real, drawn = (rng.normal(size=(40, 3)) for _ in range(3))
    figures = {f.name: f for f in fidelity_figures("s", "space", reference, real, {"baseline": drawn, "a": real})}
    assert {"kernel_distance_s", "density_s", "coverage_s", "precision_s", "recall_s"} <= figures.keys()
    coverage = figures["coverage_s"]
    assert coverage.real == coverage.aligned["a"]
    assert coverage.baseline is not None
    assert coverage.baseline.value == manifold(drawn, reference).coverage.mean()
    assert coverage.counts == {"reference": 40}


def records(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Mostly nevi, few melanomas, one with a ruler that no nevus has."""
    made = []
    for i in range(count):
        made.append(
            {
                "diagnosis": "mel" if i % 10 == 0 else "nv",
                "artefact_hair": float(i % 3 == 0),
                "artefact_ruler": float(i in (10, 40)),
                "artefact_source": "manual",
                "age": rng.choice([30.0, 60.0]),
            }
        )
    return made


def test_every_class_gets_the_same_number_where_there_are_as_many() -> None:
    domain, known = get_domain("dermatology"), records(random.Random(0), 100)
    heads = ("melanoma", "nevus", "hair", "ruler", "vascular_lesion")
    indices, captions = class_records(domain, known, heads, 6, seed=0)
    assert len(set(indices)) == len(indices) == len(captions)
    asked = [domain.parse(caption).targets for caption in captions]
    counts = {head: sum(targets.get(head) == 1.0 for targets in asked) for head in heads}
    assert counts["ruler"] == 2  # there are no more
    assert counts["vascular_lesion"] == 0
    assert min(counts["melanoma"], counts["nevus"], counts["hair"]) >= 6
    for index, targets in zip(indices, asked, strict=True):
        labels = domain.labels(known[index])
        assert all(labels[head] == wanted for head, wanted in targets.items() if head in labels)
    assert class_records(domain, known, heads, 6, seed=0) == (indices, captions)
    assert class_records(domain, known, heads, 6, seed=1) != (indices, captions)


def test_what_an_image_is_taken_for_is_read_above_each_threshold() -> None:
    probabilities = np.array([[0.30, 0.60, 0.9], [0.05, 0.60, 0.9], [0.05, 0.20, 0.9]])
    cut = {"melanoma": 0.1, "nevus": 0.5}
    heads, members = ("melanoma", "nevus", "hair"), ("melanoma", "nevus")
    assert taken_for(heads, cut, members, probabilities) == ["melanoma", "nevus", "melanoma"]


def test_confusion_counts_prompts_that_ask_for_one_of_a_group() -> None:
    domain = get_domain("dermatology")
    prompts = ["melanoma with hair", "melanoma", "melanocytic nevus", "hair", "melanoma or nevus"]
    parsed = [domain.parse(prompt) for prompt in prompts]
    heads = ("melanoma", "nevus", "hair")
    seen = np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5], [0.2, 0.8, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    (found,) = confusions(domain, heads, {}, parsed, {"baseline": seen, "real": 1 - seen})
    assert found["group"] == "diagnosis"
    assert found["heads"] == ["melanoma", "nevus"]
    assert found["counts"]["baseline"] == [[1, 1], [0, 1]]
    assert found["counts"]["real"] == [[1, 1], [1, 0]]
    assert confusions(domain, ("hair", "ruler"), {}, parsed, {"baseline": seen[:, :2]}) == []


def test_heads_by_class_stand_in_a_table_of_their_own() -> None:
    targets = [{"hair": 1.0}, {"hair": 0.0}]
    read = {"baseline": Readings(np.array([[0.9], [0.9]]), np.zeros(2))}
    figures = alignment_figures("judge", "classes", ("hair",), {}, {}, targets, read, real=read["baseline"])
    tables = {figure.name: (figure.table, figure.headline) for figure in figures}
    assert tables["judge_head_hair_classes"] == (CLASSES, False)
    assert tables["judge_accuracy_classes"] == ("", False)
