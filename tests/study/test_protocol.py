"""A protocol is frozen: it is read back with its hash, and a change is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medviz.domains import DOMAINS
from medviz.errors import InputError, StudyError
from medviz.study.design import draw_up, stratified_prompts
from medviz.study.pictures import find_real_images
from medviz.study.protocol import PROTOCOL_NAME, Protocol, RealImage, read_protocol, write_protocol
from tests.study.studies import draw_noise, make_real_images, make_study, noise_image


def test_protocol_is_read_back_with_its_hash(protocol: Protocol, tmp_path: Path) -> None:
    write_protocol(protocol, tmp_path)
    again = read_protocol(tmp_path)
    assert again == protocol
    assert again.sha256 == protocol.sha256


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 8), ("rating_margin", 1.0), ("consent", "Other words."), ("repeat_share", 0.0)]
)
def test_a_changed_protocol_is_refused(protocol: Protocol, tmp_path: Path, field: str, value: object) -> None:
    path = write_protocol(protocol, tmp_path)
    content = json.loads(path.read_text())
    content["protocol"][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="changed after it was frozen"):
        read_protocol(tmp_path)


def test_a_protocol_is_never_overwritten(protocol: Protocol, tmp_path: Path) -> None:
    write_protocol(protocol, tmp_path)
    with pytest.raises(StudyError, match="never overwritten"):
        write_protocol(replace(protocol, seed=8), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": "", "protocol": {"title": 1}}'])
def test_a_damaged_protocol_has_a_named_error(tmp_path: Path, text: str) -> None:
    (tmp_path / PROTOCOL_NAME).write_text(text)
    with pytest.raises(StudyError, match=PROTOCOL_NAME):
        read_protocol(tmp_path)


def test_a_missing_protocol_has_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no protocol"):
        read_protocol(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": "cardiology"}, "unknown domain"),
        ({"real": ()}, "needs at least 4 real images"),
        ({"repeat_share": 0.5}, "allowed: 0 to 0.2"),
        ({"size_px": 4}, "size_px is 4"),
        ({"auc_margin": 0.6}, "margins"),
        ({"consent": " "}, "no consent text"),
        ({"tasks": ()}, "allowed: one or more of rating, detection, preference"),
    ],
)
def test_contradictions_are_refused(protocol: Protocol, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(protocol, **changes)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "", "a\\b.png"])
def test_an_image_outside_its_folder_is_refused(protocol: Protocol, name: str) -> None:
    image = RealImage("r999", name, "0" * 64)
    with pytest.raises(InputError, match="inside the folder"):
        replace(protocol, real=(*protocol.real, image))


def test_two_cases_with_one_key_are_refused(protocol: Protocol) -> None:
    with pytest.raises(InputError, match="one key"):
        replace(protocol, cases=(*protocol.cases, protocol.cases[0]))


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_prompts_are_balanced_over_the_heads_and_ask_for_them(domain: str) -> None:
    chosen = DOMAINS[domain]
    prompts = stratified_prompts(chosen, 2 * len(chosen.heads), seed=3)
    strata = [stratum for stratum, _ in prompts]
    assert all(strata.count(head.name) == 2 for head in chosen.heads)
    assert len({prompt for _, prompt in prompts}) == len(prompts)
    assert all(chosen.parse(prompt).targets[stratum] == 1.0 for stratum, prompt in prompts)
    assert prompts == stratified_prompts(chosen, 2 * len(chosen.heads), seed=3)
    assert prompts != stratified_prompts(chosen, 2 * len(chosen.heads), seed=4)


def test_one_seed_gives_one_protocol(tmp_path: Path) -> None:
    first, second, other = (
        make_study(tmp_path / name, cases=4, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.sha256 == second.sha256
    assert first.sha256 != other.sha256


@pytest.mark.parametrize(
    "changes", [{"cases": 3}, {"repeat_share": 0.9}, {"phases": ("detection",)}, {"auc_margin": 2}]
)
def test_a_protocol_that_cannot_be_is_refused_before_images_are_drawn(tmp_path: Path, changes: dict) -> None:
    drawn: list[str] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int], adapter: str | None) -> list[Image.Image]:
        drawn.extend(prompts)
        return draw_noise(prompts, seeds, adapter)

    arguments = {"adapter": "attribute", "models": {}, "cases": 8, "seed": 0, **changes}
    with pytest.raises(InputError):
        draw_up(tmp_path / "s", "dermatology", draw, **{"phases": ("rating",), **arguments})
    assert len(drawn) <= 1
    assert not (tmp_path / "s").exists()


def test_real_images_are_hashed_and_not_copied(study_folder: Path, protocol: Protocol) -> None:
    assert len(protocol.real) == 8
    assert len(protocol.practice_real) == 2
    names = {path.name for path in study_folder.rglob("*") if path.is_file()}
    assert not [name for name in names if "patient" in name]
    assert len([name for name in names if name.endswith(".png")]) == 2 * (12 + 2)


def test_a_real_image_that_would_be_enlarged_is_refused(tmp_path: Path) -> None:
    folder = make_real_images(tmp_path / "real", 2)
    noise_image(0, 16 * 2).save(folder / "small.png")
    with pytest.raises(InputError, match=r"small\.png.*smaller than the study's 40 pixels"):
        find_real_images(folder, 40)
