import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medviz.errors import InputError, ModelError
from medviz.evidence.chest import cardiothoracic_ratio, finding_place, side_place
from medviz.evidence.detector import EvidenceDetector, largest_part
from medviz.evidence.networks import ARCHITECTURES, build
from medviz.evidence.presence import FLOOR, presence

WIDTHS = {"unet": [8, 16], "upernet": [8, 8, 16, 16]}
SIDE = 64


def card(attributes: tuple[str, ...], architecture: str = "unet", **changed) -> dict:
    numbers = {"share": 0.01, "mask_threshold": 0.5, "slope": 1.0, "intercept": 0.0}
    return {
        "format_version": 1,
        "architecture": architecture,
        "network": {"widths": WIDTHS[architecture]},
        "attributes": list(attributes),
        "size_px": SIDE,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "presence": {name: dict(numbers) for name in attributes},
        **changed,
    }


def write(folder: Path, attributes: tuple[str, ...] = ("ruler", "ink"), architecture: str = "unet", **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = build(architecture, len(attributes), {"widths": WIDTHS[architecture]})
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in network.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(card(attributes, architecture, **changed)))
    return folder


class Bright(nn.Module):
    """Sees every attribute where the image is bright: channel `number` looks at colour channel `number` % 3."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        halved = nn.functional.avg_pool2d(pixel_values, 2)
        return 10 * torch.stack([halved[:, number % 3] for number in range(self.count)], dim=1)


def bright(*attributes: str) -> EvidenceDetector:
    return EvidenceDetector(Bright(len(attributes)), card(attributes), Path("config.json"))


def picture(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """A black image with boxes (x, y, width, height) px of full brightness in one colour channel."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for x, y, width, height, channel in boxes:
        image[y : y + height, x : x + width, channel] = 255
    return image


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_answers_with_a_mask_at_half_the_side_of_its_square(architecture: str) -> None:
    network = build(architecture, 3, {"widths": WIDTHS[architecture]}).eval()
    assert network(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 3, SIDE // 2, SIDE // 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stored_detector_is_read_back_and_its_logits_are_differentiable(architecture: str, tmp_path: Path) -> None:
    detector = EvidenceDetector.load(write(tmp_path, architecture=architecture))
    images = (torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    logits = detector.logits(images)
    assert logits.shape == (2, 2, SIDE // 2, SIDE // 2)
    detector.score_logits(logits).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in detector.model.parameters())


def test_presence_grows_with_the_area_that_is_sure_and_a_speck_is_not_enough() -> None:
    logits = torch.full((3, 1, 32, 32), -9.0)
    logits[1, 0, :1, :2] = 9.0
    logits[2, 0, :4, :4] = 9.0
    nothing, speck, plain = presence(logits, [16 / 1024])[:, 0].tolist()
    assert nothing == -FLOOR
    assert nothing < speck < 0 < plain <= FLOOR


def test_what_is_seen_has_a_box_and_a_place_and_the_rest_has_neither() -> None:
    ruler, ink = bright("ruler", "ink")([picture((8, 56, 48, 6, 0))])[0]
    assert ruler.seen
    assert ruler.score >= 0.5
    assert ruler.where == "lower edge"
    assert ruler.box == pytest.approx((8 / SIDE, 56 / SIDE, 48 / SIDE, 6 / SIDE), abs=2.1 / SIDE)
    assert ruler.mask.shape == (SIDE, SIDE)
    assert ruler.mask[58, 20] > 0.9 > 0.1 > ruler.mask[10, 10]
    assert not ink.seen
    assert (ink.where, ink.box) == ("", None)


def test_a_box_holds_the_largest_part_and_near_pieces_are_one_part() -> None:
    mask = np.zeros((100, 100), bool)
    mask[50, 10:60:2] = True  # ticks: a pixel apart
    mask[5:8, 5:8] = True
    assert largest_part(mask, gap=0.03)[50].sum() == 25
    assert not largest_part(mask, gap=0.03)[5, 5]


def test_masks_lie_on_the_grid_of_images_of_any_size() -> None:
    tall = np.zeros((80, 40, 3), np.uint8)
    tall[60:, :, 0] = 255
    found = bright("ruler")([tall, picture()])
    assert found[0][0].mask.shape == (80, 40)
    assert found[0][0].where == "lower edge"
    assert not found[1][0].seen


def test_a_finding_is_placed_by_side_and_zone_of_the_patient() -> None:
    right, left = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    right[10:90, 10:45], left[10:90, 55:90] = True, True
    opacity = np.zeros((100, 100))
    opacity[70:80, 20:30] = 1
    assert finding_place(opacity, right, left) == "right lower zone"
    assert side_place(opacity, right, left) == "right lung"
    opacity[70:80, 70:80] = 1
    assert finding_place(opacity, right, left) == "both lower zones"
    assert finding_place(np.zeros((100, 100)), right, left) == ""
    # A heart shifted to the right moves the midline, and with it the side of what lies beside it.
    beside = np.zeros((100, 100))
    beside[45:50, 40:45] = 1
    shifted_right, shifted_left = right.copy(), left.copy()
    shifted_right[:, 30:], shifted_left[:, 36:90] = False, True
    assert finding_place(beside, right, left) == "right mid zone"
    assert finding_place(beside, shifted_right, shifted_left) == "left mid zone"


def test_cardiomegaly_is_read_from_the_widths_of_heart_and_chest() -> None:
    masks = {name: np.zeros((100, 100), bool) for name in ("heart", "right_lung", "left_lung")}
    masks["right_lung"][20:80, 10:40], masks["left_lung"][20:80, 60:90] = True, True
    masks["heart"][50:80, 30:74] = True
    assert cardiothoracic_ratio(masks) == pytest.approx(0.55)
    assert cardiothoracic_ratio({**masks, "heart": np.zeros((100, 100), bool)}) is None

    detector = bright("right_lung", "heart", "left_lung")
    image = picture((4, 10, 20, 40, 0), (16, 30, 34, 20, 1), (40, 10, 20, 40, 2))
    found = {each.name: each for each in detector([image])[0]}
    assert found["cardiomegaly"].seen
    assert found["cardiomegaly"].measure == pytest.approx(34 / 56, abs=0.05)
    small = picture((4, 10, 20, 40, 0), (22, 30, 20, 20, 1), (40, 10, 20, 40, 2))
    assert not {each.name: each for each in detector([small])[0]}["cardiomegaly"].seen
    no_heart = {each.name: each for each in detector([picture((4, 10, 20, 40, 0))])[0]}
    assert no_heart["cardiomegaly"].measure is None
    assert not no_heart["cardiomegaly"].seen


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"format_version": 2}, "version"),
        ({"architecture": "transformer"}, "architecture"),
        ({"attributes": ["ruler"]}, "weights"),
        ({"mean": [0.5]}, "mean"),
        ({"presence": {"ruler": {}}}, "presence"),
    ],
)
def test_a_damaged_card_is_named(changed: dict, named: str, tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "config.json").write_text(json.dumps({**card(("ruler", "ink")), **changed}))
    with pytest.raises(ModelError, match=named):
        EvidenceDetector.load(folder)


def test_a_threshold_out_of_range_and_lost_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["presence"]["ruler"]["slope"] = -1.0
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="slope"):
        EvidenceDetector.load(folder)
    write(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="weights"):
        EvidenceDetector.load(folder)


def test_an_image_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="uint8"):
        bright("ruler")([np.zeros((8, 8), np.uint8)])
