"""Where a finding is, by what a classifier loses when a place is painted over; chests are drawn here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medviz.domains import get_domain
from medviz.domains.chest_findings import PlacedHead, placed_head
from medviz.errors import InputError
from medviz.grounding.anatomy import regions_of
from medviz.rewards.placement import PLACES, place_evidence, placement_margin
from medviz.rewards.registry import Drawn, get_reward

SIDE = 48


def lungs() -> dict[str, np.ndarray]:
    masks = {side: np.zeros((SIDE, SIDE), bool) for side in ("right_lung", "left_lung")}
    masks["right_lung"][6:42, 4:20] = masks["left_lung"][6:42, 28:44] = True
    return masks


def regions() -> dict[str, np.ndarray]:
    return dict(regions_of(lungs()).regions)


class Lungs:
    """Knows where the lungs of every chest drawn here are."""

    classes = ("background", "right_lung", "left_lung")

    def __init__(self, missing: str = "") -> None:
        self.missing = missing

    def places(self, images: torch.Tensor) -> list[dict[str, np.ndarray]]:
        found = {name: mask for name, mask in regions().items() if name != self.missing}
        return [found for _ in images]


class Brightness:
    """Finds an opacity by how bright the image is, ten times the mean grey."""

    heads = ("normal", "opacity")

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        grey = 10 * images.mean(dim=(1, 2, 3))
        return torch.stack([-grey, grey], dim=1)


def chest(*places: str) -> torch.Tensor:
    """Dark lungs in a grey body, with an opacity in each of the places."""
    image = torch.full((3, SIDE, SIDE), 0.2)
    for mask in lungs().values():
        image[:, torch.from_numpy(mask)] = -0.8
    for place in places:
        image[:, torch.from_numpy(regions()[place])] = 0.6
    return image


def drawn(images: torch.Tensor, *prompts: str, anatomy: object | None = None) -> Drawn:
    parsed = tuple(get_domain("radiology").parse(prompt) for prompt in prompts)
    return Drawn(images, parsed, classifier=Brightness(), anatomy=anatomy or Lungs())  # type: ignore[arg-type]


def test_evidence_lies_where_the_opacity_was_drawn():
    images = torch.stack([chest("right_lower_zone"), chest("left_upper_zone")])
    before = images.clone()
    found = place_evidence(Brightness(), images, ["opacity", "opacity"], Lungs())
    assert [PLACES[i] for i in found[:, 2:].argmax(dim=1) + 2] == ["right_lower_zone", "left_upper_zone"]
    assert found[0, 0] > found[0, 1] + 0.3
    assert found[1, 1] > found[1, 0] + 0.3
    assert torch.equal(images, before)


def test_clear_lungs_hold_no_evidence_anywhere():
    found = place_evidence(Brightness(), chest()[None], ["opacity"], Lungs())
    # the soft edge darkens a little of the body: that much, and the same on both sides
    assert found.abs().max() < 0.25
    assert found[0, 0].item() == pytest.approx(found[0, 1].item(), abs=1e-4)


def test_a_mirrored_chest_has_mirrored_evidence():
    found = place_evidence(Brightness(), chest("right_mid_zone")[None], ["opacity"], Lungs())[0]
    turned = place_evidence(Brightness(), chest("right_mid_zone").flip(-1)[None], ["opacity"], Lungs())[0]
    swapped = [
        PLACES.index(place.replace("right", "x").replace("left", "right").replace("x", "left")) for place in PLACES
    ]
    torch.testing.assert_close(turned, found[swapped], atol=1e-4, rtol=0)


def test_the_margin_of_a_zone_is_held_against_the_other_zones_and_of_a_lung_against_the_other_lung():
    evidence = torch.tensor([1.0, 0.25, 0.0, 0.0, 3.0, 0.5, 0.0, 0.0])
    assert placement_margin(evidence, PlacedHead("opacity", ("right_lung",))).item() == 0.75
    assert placement_margin(evidence, PlacedHead("opacity", ("right_lower_zone",))).item() == pytest.approx(3 - 0.1)
    both = PlacedHead("opacity", ("right_mid_zone", "right_lower_zone"))
    assert placement_margin(evidence, both).item() == pytest.approx(1.5 - 0.125)


@pytest.mark.parametrize(
    ("prompt", "placed"),
    [
        ("lung opacity in the right lower zone", PlacedHead("opacity", ("right_lower_zone",))),
        ("pneumonia in the left lung", PlacedHead("pneumonia", ("left_lung",))),
        (
            "opacity in the left upper zone and the left mid zone",
            PlacedHead("opacity", ("left_upper_zone", "left_mid_zone")),
        ),
        ("pneumonia, lung opacity in the right lung", PlacedHead("opacity", ("right_lung",))),
        ("lung opacity in both lungs", None),
        ("lung opacity", None),
        ("no finding", None),
        ("cardiomegaly, the right lung", None),
    ],
)
def test_a_place_belongs_to_the_last_finding_and_to_one_side(prompt: str, placed: PlacedHead | None):
    assert placed_head(get_domain("radiology").parse(prompt)) == placed


def test_the_reward_prefers_the_named_side_and_ignores_prompts_without_a_place():
    images = torch.stack([chest("right_lower_zone")] * 4)
    words = [
        "lung opacity in the right lower zone",
        "lung opacity in the left lower zone",
        "lung opacity",
        "no finding",
    ]
    named, other, unplaced, clear = get_reward("placement")(drawn(images, *words)).tolist()
    assert named > 0.05 > -0.02 > other
    assert unplaced == clear == 0.0


def test_the_reward_of_lungs_that_were_not_found_is_nan_and_of_others_is_not():
    images = torch.stack([chest("right_lower_zone")] * 2)
    words = ("lung opacity in the right lower zone", "no finding")
    rewards = get_reward("placement")(drawn(images, *words, anatomy=Lungs(missing="left_mid_zone")))
    assert torch.isnan(rewards).tolist() == [True, False]


def test_the_reward_s_gradient_brightens_the_named_place():
    images = chest()[None].requires_grad_()
    get_reward("placement")(drawn(images, "lung opacity in the right lower zone")).sum().backward()
    gradient = images.grad[0].mean(dim=0)
    named, other = (
        gradient[torch.from_numpy(regions()[name])].mean() for name in ("right_lower_zone", "left_lower_zone")
    )
    assert named > 0 > other


def test_what_the_reward_needs_is_named():
    asked = drawn(chest()[None], "lung opacity in the right lung")
    with pytest.raises(InputError, match="needs a segmenter"):
        get_reward("placement")(Drawn(asked.images, asked.prompts, classifier=asked.classifier))
    with pytest.raises(InputError, match="needs an attribute classifier"):
        get_reward("placement")(Drawn(asked.images, asked.prompts, anatomy=asked.anatomy))
    with pytest.raises(InputError, match="no head effusion; it has normal, opacity"):
        place_evidence(Brightness(), asked.images, ["effusion"], SimpleNamespace(places=Lungs().places))
