"""Lungs of chest X-rays: the published mask where there is one, else the shipped segmenter's, found once and kept."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from medviz.domains.lung_places import LEVELS, MID_ENDS, SIDES, UPPER_ENDS
from medviz.grounding.anatomy import LUNG_AREA, Segmenter, lung_regions
from train.datasets.latents import to_pixels
from train.datasets.split import DERIVED, Split
from train.segmenter import split_lungs

SEGMENTER = Path(__file__).parents[3] / "assets/models/radiology/segmenter"
GRID_PX = 128
"""Side of the grid that masks are kept on; the segmenter reads no finer one."""
LABELS = {side: number for number, side in enumerate(SIDES, start=1)}
SOLID = 0.86
"""Least area of a lung as a share of its convex hull."""
BATCH = 32


def lung_labels(split: Split, cache: Path = DERIVED, segmenter: Path = SEGMENTER) -> np.ndarray:
    """Lungs of every image: uint8 (N, GRID_PX, GRID_PX), 0 outside, 1 right and 2 left lung, mapped from a file.

    An image whose lungs were not found, or were found on the wrong sides, is 0 everywhere. The file in `cache` is named
    by a digest of the images' names and of the segmenter's weights.
    """
    digest = hashlib.sha256((segmenter / "model.safetensors").read_bytes())
    digest.update(repr([(record["image_id"], bool(record.get("lung_mask"))) for record in split.records]).encode())
    path = cache / f"lungs-{split.name}-{digest.hexdigest()[:16]}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".{os.getpid()}-{path.name}")
        np.save(writing, _found(split, segmenter))
        os.replace(writing, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _found(split: Split, segmenter: Path) -> np.ndarray:
    labels = np.zeros((len(split), GRID_PX, GRID_PX), np.uint8)
    unmasked = []
    for index, record in enumerate(split.records):
        mask = split.mask(index, "lung_mask", GRID_PX) if record.get("lung_mask") else None
        if mask is not None and mask.any():
            labels[index] = _checked(split_lungs(mask))
        else:
            unmasked.append(index)
    network = Segmenter.load(segmenter) if unmasked else None
    for start in tqdm(range(0, len(unmasked), BATCH), unit="batch", desc=f"lungs {split.name}"):
        if network is None:
            break
        chosen = unmasked[start : start + BATCH]
        images = to_pixels(split.images(GRID_PX, chosen))
        with torch.inference_mode():
            guesses = network.probabilities(images)
            guesses = torch.nn.functional.interpolate(guesses, (GRID_PX, GRID_PX), mode="bilinear", align_corners=False)
        for index, guess in zip(chosen, guesses.argmax(dim=1).numpy(), strict=True):
            labels[index] = _checked(guess)
    return labels


def _checked(labels: np.ndarray) -> np.ndarray:
    """The largest part of each lung; all 0 unless both lungs were found, each on its own side."""
    found = lung_regions(labels == LABELS["right"], labels == LABELS["left"]).regions
    checked = np.zeros_like(labels, np.uint8)
    if {"right_lung", "left_lung"} <= set(found):
        for side, number in LABELS.items():
            if not LUNG_AREA[0] <= found[f"{side}_lung"].mean() <= LUNG_AREA[1]:
                return np.zeros_like(checked)
            checked[found[f"{side}_lung"]] = number
    return checked


@dataclass(frozen=True)
class Film:
    """One film and its lungs.

    grey: float32 (S, S), 0 to 255. lungs: side -> soft mask float32 (S, S) in [0, 1], 0.5 at the lung's edge.
    """

    grey: np.ndarray
    lungs: dict[str, np.ndarray]

    @cached_property
    def size_px(self) -> int:
        """Side of the film."""
        return len(self.grey)

    @cached_property
    def low(self) -> np.ndarray:
        """The film without ribs and vessels, float32 (S, S)."""
        return cv2.GaussianBlur(self.grey, (0, 0), 5 * self.size_px / 256)

    @cached_property
    def tissue(self) -> float:
        """Grey level of soft tissue: between the lungs, in their lower half."""
        inside = self.outline["right"] | self.outline["left"]
        rows = np.nonzero(inside.any(axis=1))[0]
        middle = (rows[0] + rows[-1]) // 2
        columns = [np.nonzero(self.outline[side].any(axis=0))[0].mean() for side in SIDES]
        block = self.low[middle : rows[-1], int(columns[0]) : int(columns[1])]
        between = block[~inside[middle : rows[-1], int(columns[0]) : int(columns[1])]]
        return float(np.percentile(between, 60)) if between.size else float(np.percentile(self.low, 75))

    @cached_property
    def borders(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Side -> (rows, inner, outer): columns where air begins beside the mediastinum and ends at the chest wall.

        The masks take in the lung behind the heart, so the inner border is read from the film: where a row falls to
        half way between its mediastinum and its darkest lung. Smoothed over rows; float32 (R,).
        """
        blurred = cv2.GaussianBlur(self.grey, (0, 0), 2.5 * self.size_px / 256)
        return {side: _borders(blurred, mask, side == "left") for side, mask in self.outline.items()}

    @cached_property
    def aerated(self) -> dict[str, np.ndarray]:
        """Side -> where the lung is seen beside the heart, bool (S, S)."""
        found = {}
        columns = np.arange(self.size_px)[None, :]
        for side, mask in self.outline.items():
            rows, inner, _ = self.borders[side]
            found[side] = mask.copy()
            found[side][rows] &= columns >= inner[:, None] if side == "left" else columns <= inner[:, None]
        return found

    @cached_property
    def outline(self) -> dict[str, np.ndarray]:
        """Side -> bool (S, S)."""
        return {side: mask >= 0.5 for side, mask in self.lungs.items()}

    def zone(self, place: str) -> np.ndarray:
        """Where in the lung a place lies, bool (S, S): "right upper zone", or "right lung".

        Heights are those that name a box; where a film's own thirds overlap with them, the overlap. The lung behind
        the heart is left out.
        """
        side, level = place.split()[:2]
        lung = self.aerated[side] if self.aerated[side].any() else self.outline[side]
        if level == "lung":
            return lung
        number = LEVELS.index(level)
        edges = np.round(np.array([0.0, UPPER_ENDS, MID_ENDS, 1.0]) * self.size_px).astype(int)
        named = _rows(lung, edges[number], edges[number + 1])
        rows = np.nonzero(lung.any(axis=1))[0]
        thirds = np.round(np.linspace(rows[0], rows[-1] + 1, len(LEVELS) + 1)).astype(int)
        both = _rows(named, thirds[number], thirds[number + 1])
        return both if both.sum() >= 0.3 * named.sum() else named


def _borders(blurred: np.ndarray, mask: np.ndarray, is_left: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not is_left:
        rows, inner, outer = _borders(blurred[:, ::-1], mask[:, ::-1], True)
        last = mask.shape[1] - 1
        return rows, last - inner, last - outer
    rows = np.nonzero(mask.any(axis=1))[0]
    inside, levels = mask[rows], blurred[rows]
    first = inside.argmax(axis=1).astype(np.float32)
    outer = (mask.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)).astype(np.float32)
    beside = inside & (np.arange(mask.shape[1])[None, :] < (first + 0.35 * (outer - first))[:, None])
    bright = _smoothed(np.where(beside, levels, 0).max(axis=1), 4.0)
    dark = _smoothed(np.where(inside, levels, 255).min(axis=1), 4.0)
    lucent = inside & (levels < (0.5 * (bright + dark))[:, None])
    inner = np.where(lucent.any(axis=1), lucent.argmax(axis=1), first).astype(np.float32)
    inner = cv2.medianBlur(np.repeat(inner[None], 5, 0), 5)[2] if len(inner) >= 5 else inner
    return rows, _smoothed(inner, 3.0), _smoothed(outer, 3.0)


def _smoothed(line: np.ndarray, sigma: float) -> np.ndarray:
    line = line.astype(np.float32)[None]
    return cv2.GaussianBlur(line, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)[0]


def plausible(labels: np.ndarray) -> bool:
    """Whether uint8 labels (S, S) look like two lungs: both there, neither at a side edge, neither with a limb."""
    for number in LABELS.values():
        mask = (labels == number).astype(np.uint8)
        if not mask.any() or mask[:, 0].any() or mask[:, -1].any():
            return False
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        contour = max(contours, key=cv2.contourArea)
        if cv2.contourArea(contour) < SOLID * cv2.contourArea(cv2.convexHull(contour)):
            return False
    return True


def _rows(mask: np.ndarray, first: int, end: int) -> np.ndarray:
    kept = np.zeros_like(mask)
    kept[first:end] = mask[first:end]
    return kept


def film(image: np.ndarray, labels: np.ndarray) -> Film | None:
    """The film of a uint8 RGB image (S, S, 3) with its labels of `lung_labels`; None where they are not plausible."""
    if not plausible(labels):
        return None
    size = (image.shape[1], image.shape[0])
    lungs = {
        side: cv2.GaussianBlur(
            cv2.resize((labels == number).astype(np.float32), size, interpolation=cv2.INTER_LINEAR), (0, 0), 1.5
        )
        for side, number in LABELS.items()
    }
    return Film(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), lungs)
