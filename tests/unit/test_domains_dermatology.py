"""The dermatology vocabulary: the paper's prompts, denial, records."""

import random

import pytest

from medviz.domains import get_domain
from medviz.domains.dermatology import ARTEFACTS, NO_ARTEFACTS
from medviz.errors import InputError

DERMATOLOGY = get_domain("dermatology")
ARTEFACT_HEADS = [head for head, _ in ARTEFACTS.values()]


def artefact_record(source: str | None, **labels: float | None) -> dict[str, object]:
    known = {f"artefact_{head}": labels.get(head, 0.0) for head in ARTEFACT_HEADS}
    return {"source": "HAM10000", "diagnosis": "mel", "artefact_source": source, **known}


def captions(record: dict[str, object], count: int = 200) -> list[str]:
    rng = random.Random(0)
    return [DERMATOLOGY.caption(record, rng) for _ in range(count)]


def test_the_papers_prompts_are_the_validation_prompts() -> None:
    prompts = DERMATOLOGY.validation_prompts()
    assert len(prompts) == 32
    assert "a dermoscopic image with melanoma (MEL) with no visible artifacts" in prompts
    assert "a dermoscopic image with melanocytic nevus (NV) showing hair, gel bubble, ruler, ink" in prompts


def test_each_of_the_papers_prompts_decides_its_six_attributes_as_worded() -> None:
    six = {"hair": "hair", "gel_bubble": "gel bubble", "ruler": "ruler", "ink": "ink"}
    six |= {"melanoma": "(MEL)", "nevus": "(NV)"}
    for prompt in DERMATOLOGY.validation_prompts():
        targets = DERMATOLOGY.parse(prompt).targets
        assert {head: targets[head] for head in six} == {head: float(word in prompt) for head, word in six.items()}


@pytest.mark.parametrize(
    ("prompt", "diagnosis"),
    [
        ("a mole", "melanocytic nevus"),
        ("benign naevi", "melanocytic nevus"),
        ("BCC", "basal cell carcinoma"),
        ("an AK on the scalp", "actinic keratosis"),
        ("Actinic Keratoses!", "actinic keratosis"),
        ("seborrhoeic keratosis", "benign keratosis"),
        ("MELANOMA", "melanoma"),
        ("cherry angiomas", "vascular lesion"),
        ("df", "dermatofibroma"),
    ],
)
def test_diagnoses_are_understood_in_a_clinicians_words(prompt: str, diagnosis: str) -> None:
    parsed = DERMATOLOGY.parse(prompt)
    assert parsed.values["diagnosis"] == (diagnosis,)
    assert parsed.unknown_words == ()


@pytest.mark.parametrize(
    ("prompt", "absent", "present"),
    [
        ("melanoma, no hair", {"hair"}, set()),
        ("a mole without rulers, hair visible", {"ruler"}, {"hair"}),
        ("no hair, ruler or ink", {"hair", "ruler", "ink"}, set()),
        ("no hair, ruler", {"hair"}, {"ruler"}),
        ("nevus without hair but with gel bubbles", {"hair"}, {"gel_bubble"}),
        ("hair-free melanoma with ink", {"hair"}, {"ink"}),
        ("ruler is absent; hair", {"ruler"}, {"hair"}),
        ("not showing hair", {"hair"}, set()),
        ("neither hair nor ruler", {"hair", "ruler"}, set()),
        ("melanoma, hair (no ruler) ink", {"ruler"}, {"hair", "ink"}),
        ("w/o ink on the back", {"ink"}, set()),
        ("negative network", set(), {"negative_network"}),
        ("no negative network", {"negative_network"}, set()),
    ],
)
def test_denial_reaches_as_far_as_its_clause(prompt: str, absent: set[str], present: set[str]) -> None:
    targets = DERMATOLOGY.parse(prompt).targets
    assert {head for head in absent if targets.get(head) == 0.0} == absent
    assert {head for head in present if targets.get(head) == 1.0} == present


def test_a_denied_artefact_leaves_the_others_undecided_and_a_named_one_excludes_them() -> None:
    assert DERMATOLOGY.parse("no hair").targets == {"hair": 0.0}
    named = DERMATOLOGY.parse("a lesion with hair").targets
    assert named == {head: float(head == "hair") for head in ARTEFACT_HEADS}
    assert set(DERMATOLOGY.parse("a lesion with no artefacts").targets.values()) == {0.0}


def test_a_site_or_age_after_a_denial_still_counts() -> None:
    parsed = DERMATOLOGY.parse("no hair on the back of a 57 year old man")
    assert parsed.values == {"site": ("back",), "age": ("55",), "sex": ("male",)}
    assert parsed.words == ()


def test_two_diagnoses_decide_only_that_it_is_none_of_the_others() -> None:
    targets = DERMATOLOGY.parse("melanoma or nevus").targets
    assert "melanoma" not in targets
    assert "nevus" not in targets
    assert targets["dermatofibroma"] == 0.0


def test_words_are_the_content_phrases_as_written_and_each_meaning_once() -> None:
    parsed = DERMATOLOGY.parse("Melanoma (MEL) showing Hairs, with pigment  network, on the back; shiny nail")
    assert parsed.words == ("Melanoma", "Hairs", "pigment  network")
    assert parsed.unknown_words == ("shiny", "nail")


def test_no_visible_artifacts_excludes_a_named_one() -> None:
    with pytest.raises(InputError, match="excludes hair"):
        DERMATOLOGY.build_prompt({"artefacts": ("hair", NO_ARTEFACTS)})


def test_the_canonical_prompt_reads_as_documented() -> None:
    prompt = DERMATOLOGY.build_prompt(
        {
            "diagnosis": "melanoma",
            "artefacts": ["ruler", "hair"],
            "structures": ["pigment network"],
            "site": "back",
            "age": "55",
            "sex": "female",
        }
    )
    opening = "a dermoscopic image with melanoma (MEL) showing hair, ruler"
    assert prompt == f"{opening}, with pigment network, on the back, 55 year old woman"


def test_artefacts_are_captioned_all_or_not_at_all_and_the_canonical_wording_is_common() -> None:
    said = [DERMATOLOGY.parse(caption).values for caption in captions(artefact_record("manual", hair=1.0, ink=0.6))]
    assert {frozenset(values.get("artefacts", ())) for values in said} == {frozenset(), frozenset({"hair", "ink"})}
    assert sum("artefacts" in values for values in said) > 0.85 * len(said)
    texts = captions(artefact_record("manual", hair=1.0))
    assert texts.count("a dermoscopic image with melanoma (MEL) showing hair") > 0.3 * len(texts)


def test_no_artefacts_is_said_only_when_all_are_known_absent() -> None:
    def clear(record: dict[str, object]) -> int:
        return sum(NO_ARTEFACTS in DERMATOLOGY.parse(text).values.get("artefacts", ()) for text in captions(record))

    assert 100 < clear(artefact_record("rl4med")) < 200
    assert clear(artefact_record("manual", ink=None)) == 0
    assert clear(artefact_record("inferred_probability", ink=0.3)) == 0
    assert clear(artefact_record("inferred_probability", ink=0.1)) > 100
    assert clear(artefact_record(None, **dict.fromkeys(ARTEFACT_HEADS))) == 0


def test_a_guessed_artefact_is_mentioned_only_when_the_network_was_sure() -> None:
    unsure = artefact_record("inferred_probability", hair=0.7, ruler=0.9)
    said = {DERMATOLOGY.parse(text).values.get("artefacts", ()) for text in captions(unsure)}
    assert said == {(), ("ruler",)}


def test_labels_leave_out_what_is_guessed_or_not_annotated() -> None:
    guessed = DERMATOLOGY.labels(artefact_record("inferred_probability", hair=0.99))
    assert not set(guessed) & set(ARTEFACT_HEADS)
    assert guessed["melanoma"] == 1.0
    assert guessed["nevus"] == 0.0
    masks = {"attribute_globules_mask": True, "attribute_streaks_mask": False, "attribute_pigment_network_mask": None}
    ham = DERMATOLOGY.labels({**artefact_record("manual", hair=0.6), **masks})
    assert ham["hair"] == 0.6
    assert "globules" not in ham
    isic = DERMATOLOGY.labels({**artefact_record("manual"), **masks, "source": "ISIC2018-Task1-2"})
    assert (isic["globules"], isic["streaks"], isic["pigment_network"]) == (1.0, 0.0, 0.0)
    assert "negative_network" not in isic


@pytest.mark.parametrize(
    ("word", "regions"),
    [
        ("melanoma", ("lesion",)),
        ("the lesion", ("lesion",)),
        ("hair", ()),
        ("skin", ("skin",)),
        ("border", ("border",)),
    ],
)
def test_expected_regions(word: str, regions: tuple[str, ...]) -> None:
    assert DERMATOLOGY.expected_regions(word) == regions


@pytest.mark.parametrize(
    ("prompt", "named", "unnamed"),
    [
        (
            "hairy mole on the arm and back, 40 year old woman",  # one site of two would be a guess
            "a dermoscopic image with melanocytic nevus (NV) showing hair, 40 year old woman",
            "a dermoscopic image with melanocytic nevus (NV) with no visible artifacts, 40 year old woman",
        ),
        (
            "melanoma with ruler, ink and hairs",
            "a dermoscopic image with melanoma (MEL) showing hair, ruler, ink",
            "a dermoscopic image with melanoma (MEL) showing ruler, ink",
        ),
    ],
)
def test_a_contrast_differs_in_what_the_head_asks_for_alone(prompt: str, named: str, unnamed: str) -> None:
    assert DERMATOLOGY.contrast(prompt, ("hair",)) == (named, unnamed)


@pytest.mark.parametrize("prompt", ["", "melanoma with ruler", "melanoma without hair", "hair, no visible artifacts"])
def test_no_contrast_where_the_head_is_not_asked_for_or_the_prompt_contradicts_itself(prompt: str) -> None:
    assert DERMATOLOGY.contrast(prompt, ("hair",)) is None


def test_a_contrast_over_several_heads_takes_all_that_are_asked_for() -> None:
    assert DERMATOLOGY.contrast("hair, ruler", ("hair", "ruler", "melanoma")) == (
        "a dermoscopic image showing hair, ruler",
        "a dermoscopic image with no visible artifacts",
    )
    with pytest.raises(InputError, match="fur"):
        DERMATOLOGY.contrast("hair", ("fur",))
