"""The radiology vocabulary: laterality, zones, sources and what their labels leave unknown."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medviz.domains import get_domain
from medviz.domains.lung_places import LOCATIONS, box_locations, location_phrase, merged
from medviz.errors import InputError

RADIOLOGY = get_domain("radiology")
KERMANY, NIH = "Kermany 2018 paediatric", "NIH ChestX-ray14"


def box(x: float, y: float, w: float = 0.2, h: float = 0.2, label: str = "lung opacity") -> dict[str, object]:
    return {"label": label, "x": x, "y": y, "w": w, "h": h}


def captions(record: dict[str, object], count: int = 200) -> list[str]:
    rng = random.Random(0)
    return [RADIOLOGY.caption(record, rng) for _ in range(count)]


def test_validation_prompts_are_24_and_balanced_between_the_sides() -> None:
    prompts = RADIOLOGY.validation_prompts()
    assert len(prompts) == 24
    assert sum("PA view" in prompt for prompt in prompts) >= 6
    targets = [RADIOLOGY.parse(prompt).targets for prompt in prompts]
    assert {head.name for head in RADIOLOGY.heads} == {head for t in targets for head, asked in t.items() if asked}


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ((0.1, 0.7), "right lower zone"),
        ((0.1, 0.4), "right mid zone"),
        ((0.1, 0.1), "right upper zone"),
        ((0.7, 0.7), "left lower zone"),
        ((0.7, 0.1), "left upper zone"),
    ],
)
def test_the_patients_right_is_the_left_of_the_image(where: tuple[float, float], place: str) -> None:
    assert box_locations(box(*where)) == (place,)  # type: ignore[arg-type]


def test_a_tall_box_is_a_whole_lung_and_a_wide_one_both() -> None:
    assert box_locations(box(0.6, 0.1, h=0.7)) == ("left lung",)  # type: ignore[arg-type]
    assert box_locations(box(0.1, 0.1, w=0.8, h=0.7)) == ("right lung", "left lung")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(LOCATIONS), min_size=1))
def test_every_set_of_places_reads_back(places: set[str]) -> None:
    kept = merged(places)
    parsed = RADIOLOGY.parse(f"opacity in {location_phrase(kept)}")
    assert set(parsed.values["location"]) == set(kept)
    assert parsed.unknown_words == ()


@pytest.mark.parametrize(
    ("phrase", "regions"),
    [
        ("opacity in the right lower zone", ("right_lower_zone",)),
        ("opacity", ("right_lung", "left_lung")),
        ("Right middle lobe consolidation", ("right_mid_zone",)),
        ("left-sided effusion", ("left_lung",)),
        ("left base", ("left_lower_zone",)),
        ("upper zone of the left lung", ("left_upper_zone",)),
        ("bilateral infiltrates", ("right_lung", "left_lung")),
        ("both lower zones", ("right_lower_zone", "left_lower_zone")),
        ("cardiomegaly", ("mediastinum",)),
        ("no finding", ()),
    ],
)
def test_expected_regions(phrase: str, regions: tuple[str, ...]) -> None:
    assert RADIOLOGY.expected_regions(phrase) == regions


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Pneumonic infiltrates", {"findings": ("pneumonia", "lung opacity")}),
        ("COVID19, AP film", {"findings": ("COVID-19",), "view": ("AP",)}),
        ("normal CXR of a 7yo girl", {"findings": ("no finding",), "age": ("5",), "age_group": ("child",)}),
        ("62-year-old gentleman, PA", {"age": ("60",), "age_group": ("adult",), "sex": ("male",), "view": ("PA",)}),
        ("paediatric chest radiograph", {"age_group": ("child",)}),
    ],
)
def test_clinicians_words(prompt: str, said: dict[str, tuple[str, ...]]) -> None:
    parsed = RADIOLOGY.parse(prompt)
    assert {field: parsed.values.get(field) for field in said} == said
    assert parsed.unknown_words == ()


def test_denial_takes_the_place_with_it_but_not_the_patient() -> None:
    parsed = RADIOLOGY.parse("no pneumonia in the right lung of a 7 year old girl")
    assert "location" not in parsed.values
    assert parsed.words == ()
    assert parsed.targets == {
        "pneumonia": 0.0,
        "bacterial_pneumonia": 0.0,
        "viral_pneumonia": 0.0,
        "child": 1.0,
        "male": 0.0,
    }


def test_not_normal_denies_normal_and_no_finding_decides_all_findings() -> None:
    assert RADIOLOGY.parse("not normal").targets == {"normal": 0.0}
    targets = RADIOLOGY.parse("no finding").targets
    assert targets.pop("normal") == 1.0
    assert set(targets.values()) == {0.0}
    assert {"pneumonia", "opacity", "effusion", "covid_19"} <= set(targets)


def test_a_cause_implies_pneumonia_and_excludes_the_other_cause() -> None:
    targets = RADIOLOGY.parse("viral pneumonia").targets
    assert targets == {"normal": 0.0, "pneumonia": 1.0, "bacterial_pneumonia": 0.0, "viral_pneumonia": 1.0}


def test_an_unlearnt_finding_is_reported() -> None:
    assert RADIOLOGY.parse("left pneumothorax").unknown_words == ("pneumothorax",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"findings": ("no finding", "edema")}, "excludes edema"),
        ({"age_group": "child", "age": "60"}, "under 18"),
        ({"location": ("right lung",)}, "needs a finding"),
        ({"findings": ("cardiomegaly",), "location": ("right lung",)}, "needs a finding"),
    ],
)
def test_contradictory_choices_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RADIOLOGY.build_prompt(values)  # type: ignore[arg-type]


def test_canonical_prompts_read_as_documented() -> None:
    assert (
        RADIOLOGY.build_prompt({"age_group": "child", "findings": ["bacterial pneumonia"], "view": "AP"})
        == "a frontal chest X-ray of a child, bacterial pneumonia, AP view"
    )
    assert (
        RADIOLOGY.build_prompt(
            {"age": "80", "sex": "male", "findings": ["lung opacity", "edema"], "location": ["left mid zone"]}
        )
        == "a frontal chest X-ray of an 80 year old man, edema, lung opacity in the left mid zone"
    )


def test_a_box_is_captioned_with_its_place_and_anatomy_boxes_are_not_findings() -> None:
    record = {
        "source": NIH,
        "findings": '["pneumonia"]',
        "boxes": json.dumps([box(0.1, 0.7), box(0.6, 0.1, h=0.8, label="left lung")]),
    }
    parsed = [RADIOLOGY.parse(text).values for text in captions(record)]
    assert {values.get("location") for values in parsed} == {None, ("right lower zone",)}
    assert sum("location" in values for values in parsed) > 0.6 * len(parsed)


def test_a_readers_box_overrules_a_mined_no_finding() -> None:
    record = {"source": NIH, "findings": '["no finding"]', "boxes": json.dumps([box(0.1, 0.7)])}
    labels = RADIOLOGY.labels(record)
    assert (labels["normal"], labels["opacity"]) == (0.0, 1.0)
    assert "pneumonia" not in labels
    assert not any("no finding" in RADIOLOGY.parse(text).values.get("findings", ()) for text in captions(record))


def test_labels_of_a_source_that_did_not_look_are_unknown() -> None:
    child = {"source": KERMANY, "findings": '["pneumonia", "viral pneumonia"]', "boxes": "[]", "view": "AP"}
    assert RADIOLOGY.labels(child) == {
        "normal": 0.0,
        "pneumonia": 1.0,
        "bacterial_pneumonia": 0.0,
        "viral_pneumonia": 1.0,
        "covid_19": 0.0,
        "child": 1.0,
        "pa_view": 0.0,
    }
    adult = RADIOLOGY.labels({"source": NIH, "findings": '["effusion", "pneumonia"]', "age": 17.0, "sex": "male"})
    assert (adult["effusion"], adult["edema"], adult["child"], adult["male"]) == (1.0, 0.0, 1.0, 1.0)
    assert not {"bacterial_pneumonia", "viral_pneumonia", "opacity", "pa_view"} & set(adult)
    assert RADIOLOGY.labels({"source": KERMANY, "findings": "[]"}) == {"child": 1.0}


def test_a_germ_counts_as_its_kind_of_pneumonia() -> None:
    labels = RADIOLOGY.labels({"source": "covid-chestxray-dataset", "findings": '["klebsiella"]'})
    assert (labels["pneumonia"], labels["bacterial_pneumonia"], labels["viral_pneumonia"]) == (1.0, 1.0, 0.0)


def test_findings_nearly_always_stay_and_patients_are_often_left_out() -> None:
    record = {"source": NIH, "findings": '["edema"]', "age": 52.0, "sex": "female", "view": "AP"}
    said = [RADIOLOGY.parse(text).values for text in captions(record)]
    assert sum("findings" in values for values in said) > 0.9 * len(said)
    assert 0.2 * len(said) < sum("sex" in values for values in said) < 0.7 * len(said)
