"""Where the anatomy lies in one image: a segmenter's masks and the regions that follow from them.

Sides are the patient's: the right lung is on the left of the image. A structure that was not found, or whose mask no
body could have, is missing, with a warning, and so is all that follows from it: no atlas stands in for it here. The
atlas prior is a comparison that knows nothing of the image, and belongs to the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from medviz.errors import InputError, ModelError
from medviz.images import to_tensor
from medviz.models.manifest import read_json
from medviz.models.networks import Preparation, load_network, read_names

Mask = NDArray[np.bool_]

CARD_NAME = "classes.json"
BACKGROUND = "background"
LESION, LUNGS = ("lesion",), ("right_lung", "left_lung")
LEVELS = ("upper", "mid", "lower")

# Share of the image that a mask may cover before it is taken for a failure of the segmenter.
LESION_AREA = (0.002, 0.98)
LUNG_AREA = (0.01, 0.45)
# Half width of the ring around a lesion's contour, as a share of the radius of a disc of the lesion's area.
BORDER_HALF_WIDTH = 0.15
# Masks are made on a grid no larger than this and enlarged afterwards; the network reads far fewer pixels.
MAX_GRID_PX = 768


@dataclass(frozen=True)
class Anatomy:
    """regions: name -> mask bool (H, W), never an empty one. warnings: what is missing and why, in plain words."""

    regions: Mapping[str, Mask]
    warnings: tuple[str, ...] = ()


class Segmenter:
    """A segmentation network with its classes, the first of which is the background.

    classes: names in the order of the outputs. card: classes.json.
    """

    def __init__(
        self, model: PreTrainedModel, card: Mapping[str, Any], where: Path, device: str | torch.device = "cpu"
    ) -> None:
        """Raises ModelError, naming `where`, when the card is damaged or does not fit the network."""
        self.model, self.card, self.device = model, dict(card), device
        self.classes = read_names(self.card, "classes", where, model.config.num_labels)
        if self.classes[0] != BACKGROUND or self.classes[1:] not in (LESION, LUNGS):
            allowed = " or ".join(", ".join((BACKGROUND, *names)) for names in (LESION, LUNGS))
            raise ModelError(f"{where} names the classes {', '.join(self.classes)}; this program reads {allowed}")
        self.prepare = Preparation(self.card, where, device)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Segmenter:
        """Read a folder with config.json, model.safetensors and classes.json; ModelError when one does not hold up."""
        where = Path(folder) / CARD_NAME
        card = read_json(where)
        if not isinstance(card, dict):
            raise ModelError(f"{where} is damaged: it holds no JSON object")
        return cls(load_network(Path(folder), AutoModelForSemanticSegmentation, device), card, where, device)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C, size_px, size_px) float32 of images (B, 3, H, W) in [-1, 1] of any size.

        The image is stretched to the network's square. Raises InputError for another shape.
        """
        pixels = self.prepare(images)
        logits = self.model(pixel_values=pixels).logits.float()
        return F.interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False).softmax(dim=1)

    def places(self, images: torch.Tensor) -> list[dict[str, Mask]]:
        """The regions of each of the images (B, 3, H, W) in [-1, 1], on their own grid; one not found is absent."""
        with torch.inference_mode():
            probabilities = self.probabilities(images)
            probabilities = F.interpolate(probabilities, images.shape[-2:], mode="bilinear", align_corners=False)
        labels = probabilities.argmax(dim=1).cpu().numpy()
        masks = [{name: row == index for index, name in enumerate(self.classes) if index} for row in labels]
        return [dict(regions_of(each).regions) for each in masks]

    def segment(self, image: Image.Image) -> Anatomy:
        """The regions of one image, on the image's own grid (height, width)."""
        with torch.inference_mode():
            probabilities = self.probabilities(to_tensor(image)[None])[0].cpu().numpy()
        grid = _grid(image.width, image.height)
        enlarged = [cv2.resize(plane, grid, interpolation=cv2.INTER_LINEAR) for plane in probabilities]
        labels = np.argmax(np.stack(enlarged), axis=0)
        found = regions_of({name: labels == index for index, name in enumerate(self.classes) if index})
        whole = {name: _enlarged(mask, (image.width, image.height)) for name, mask in found.regions.items()}
        return Anatomy(whole, found.warnings)

    def masks(self, image: Image.Image) -> dict[str, Mask]:
        """The regions of `segment` alone: name -> bool (H, W); a region that was not found is absent."""
        return dict(self.segment(image).regions)


def regions_of(structures: Mapping[str, Mask]) -> Anatomy:
    """Regions from raw masks bool (H, W): {"lesion"}, or {"right_lung", "left_lung"}.

    The masks may come from a segmenter or from an expert. Raises InputError for other names.
    """
    names = tuple(structures)
    if names == LESION:
        return lesion_regions(structures["lesion"])
    if set(names) == set(LUNGS):
        return lung_regions(structures["right_lung"], structures["left_lung"])
    raise InputError(f"no regions are known for {', '.join(names)}; allowed: {LESION[0]}, or {' and '.join(LUNGS)}")


def lesion_regions(mask: Mask) -> Anatomy:
    """lesion; border, a ring on both sides of its contour; skin, all that is neither.

    mask: bool (H, W). Of several blots the largest is the lesion.
    """
    lesion = _largest(mask)
    if not _covers(lesion, LESION_AREA):
        return Anatomy({}, ("No lesion could be told from the skin: its regions are missing.",))
    half_width = max(1.5, BORDER_HALF_WIDTH * float(np.sqrt(lesion.sum() / np.pi)))
    border = (_depth(lesion) <= half_width) & (_depth(~lesion) <= half_width)
    regions = {"lesion": lesion, "border": border, "skin": ~lesion & ~border}
    missing = [name for name, region in regions.items() if not region.any()]
    warnings = tuple(f"The lesion fills the image: no {name} is left." for name in missing)
    return Anatomy({name: region for name, region in regions.items() if region.any()}, warnings)


def lung_regions(right: Mask, left: Mask) -> Anatomy:
    """Each lung, its thirds by height (upper, mid and lower zone), and the mediastinum between both lungs.

    right, left: bool (H, W), the patient's sides. The mediastinum holds what lies between the inner edges of the lungs
    on every row that both reach: heart, great vessels and spine.
    """
    lungs, warnings = {"right": _largest(right), "left": _largest(left)}, []
    for side in [side for side, mask in lungs.items() if not _covers(mask, LUNG_AREA)]:
        del lungs[side]
        warnings.append(f"The {side} lung was not found: its regions and the mediastinum are missing.")
    if len(lungs) == 2 and _middle_x(lungs["right"]) >= _middle_x(lungs["left"]):
        return Anatomy({}, ("The lungs were found on the wrong sides: no region is marked.",))
    regions = {f"{side}_lung": mask for side, mask in lungs.items()}
    for number, level in enumerate(LEVELS):
        regions |= {f"{side}_{level}_zone": _third(mask, number) for side, mask in lungs.items()}
    if len(lungs) == 2:
        between = _between(lungs["right"], lungs["left"])
        if between.any():
            regions["mediastinum"] = between
        else:
            warnings.append("The lungs touch: the mediastinum is missing.")
    return Anatomy(regions, tuple(warnings))


def _grid(width: int, height: int) -> tuple[int, int]:
    shrink = min(1.0, MAX_GRID_PX / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _enlarged(mask: Mask, size_wh: tuple[int, int]) -> Mask:
    if (mask.shape[1], mask.shape[0]) == size_wh:
        return mask
    return cv2.resize(mask.astype(np.uint8), size_wh, interpolation=cv2.INTER_NEAREST).astype(bool)


def _largest(mask: Mask) -> Mask:
    """The largest connected part of `mask`, its holes filled."""
    count, labels, figures, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 2:
        return np.zeros(mask.shape, bool)
    part = (labels == 1 + int(np.argmax(figures[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(part, contours, -1, 1, thickness=cv2.FILLED).astype(bool)


def _covers(mask: Mask, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= float(mask.mean()) <= bounds[1]


def _depth(mask: Mask) -> NDArray[np.float32]:
    """How far each pixel inside `mask` lies from the nearest one outside, in pixels; 0 outside.

    The edge of the image is no outside: a lesion that is cut by it has no border there.
    """
    if mask.all():
        return np.full(mask.shape, np.inf, np.float32)
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _middle_x(mask: Mask) -> float:
    return float(np.nonzero(mask)[1].mean())


def _third(mask: Mask, number: int) -> Mask:
    rows = np.nonzero(mask.any(axis=1))[0]
    edges = np.round(np.linspace(rows[0], rows[-1] + 1, len(LEVELS) + 1)).astype(int)
    zone = np.zeros_like(mask)
    zone[edges[number] : edges[number + 1]] = mask[edges[number] : edges[number + 1]]
    return zone


def _between(right: Mask, left: Mask) -> Mask:
    columns = np.arange(right.shape[1])
    inner_right = np.where(right, columns, -1).max(axis=1)
    inner_left = np.where(left, columns, right.shape[1]).min(axis=1)
    rows = right.any(axis=1) & left.any(axis=1)
    between = (columns > inner_right[:, None]) & (columns < inner_left[:, None])
    return between & rows.reshape(-1, 1) & ~right & ~left
