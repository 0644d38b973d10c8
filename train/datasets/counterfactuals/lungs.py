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
MEDIAL_SHARE = 0.02
"""Of the film's side: how far from a lung's mask the mediastinum's brightness is read."""
BATCH = 32


def lung_labels(split: Split, cache: Path = DERIVED, segmenter: Path = SEGMENTER) -> np.ndarray:
    """Lungs of every image: uint8 (N, GRID_PX, GRID_PX), 0 outside, 1 right and 2 left lung.

    An image whose lungs were not found, or were found on the wrong sides, is 0 everywhere. Each source has a file in
    `cache`, named by a digest of its images' names and of the segmenter's weights.
    """
    weights = hashlib.sha256((segmenter / "model.safetensors").read_bytes()).digest()
    sources = np.array([str(record.get("source")) for record in split.records])
    labels = np.zeros((len(split), GRID_PX, GRID_PX), np.uint8)
    for source in sorted(set(sources)):
        indices = np.nonzero(sources == source)[0]
        digest = hashlib.sha256(weights)
        digest.update(repr([split.records[i]["image_id"] for i in indices]).encode())
        path = cache / f"lungs-{split.name}-{digest.hexdigest()[:16]}.npy"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            writing = path.with_name(f".{os.getpid()}-{path.name}")
            np.save(writing, _found(split, indices, segmenter))
            os.replace(writing, path)
        labels[indices] = np.load(path, mmap_mode="r", allow_pickle=False)
    return labels


def _found(split: Split, indices: np.ndarray, segmenter: Path) -> np.ndarray:
    labels = np.zeros((len(indices), GRID_PX, GRID_PX), np.uint8)
    unmasked = []
    for row, index in enumerate(indices):
        mask = split.mask(index, "lung_mask", GRID_PX) if split.records[index].get("lung_mask") else None
        if mask is not None and mask.any():
            labels[row] = _checked(split_lungs(mask))
        else:
            unmasked.append(row)
    network = Segmenter.load(segmenter) if unmasked else None
    for start in tqdm(range(0, len(unmasked), BATCH), unit="batch", desc=f"lungs {split.name}"):
        if network is None:
            break
        rows = unmasked[start : start + BATCH]
        images = to_pixels(split.images(GRID_PX, [int(indices[row]) for row in rows]))
        with torch.inference_mode():
            guesses = network.probabilities(images)
            guesses = torch.nn.functional.interpolate(guesses, (GRID_PX, GRID_PX), mode="bilinear", align_corners=False)
        for row, guess in zip(rows, guesses.argmax(dim=1).numpy(), strict=True):
            labels[row] = _checked(guess)
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
class Heart:
    """Borders of the heart and of the lungs beside it, in columns at every row from top to bottom, float32 (R,).

    bottom is where the right lung meets heart and diaphragm. chest_px: the widest distance between the lungs' outer
    borders. middle: column of the spine. right_reach, left_reach: how far the heart extends from it, in pixels.
    """

    top: int
    bottom: int
    right: np.ndarray
    left: np.ndarray
    right_wall: np.ndarray
    left_wall: np.ndarray
    chest_px: float
    middle: float
    right_reach: float
    left_reach: float

    @property
    def ratio(self) -> float:
        """The cardiothoracic ratio."""
        return (self.right_reach + self.left_reach) / self.chest_px


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
    def heart(self) -> Heart | None:
        """Heart and chest as the borders give them; None where the lungs share too few rows."""
        (right_rows, right, right_wall), (left_rows, left, left_wall) = (self.borders[side] for side in SIDES)
        top, end = int(max(right_rows[0], left_rows[0])), int(min(right_rows[-1], left_rows[-1]))
        lung = self.outline["right"]
        columns = np.nonzero(lung.any(axis=0))[0]
        medial = lung[:, (columns[0] + columns[-1]) // 2 :]
        bottom = min(int(np.nonzero(medial.any(axis=1))[0][-1]), end)
        if bottom - top < 0.25 * self.size_px:
            return None
        whole, rows = np.arange(top, end + 1), np.arange(top, bottom + 1)
        chest = np.interp(whole, left_rows, left_wall) - np.interp(whole, right_rows, right_wall)
        right, right_wall = (np.interp(rows, right_rows, line).astype(np.float32) for line in (right, right_wall))
        left, left_wall = (np.interp(rows, left_rows, line).astype(np.float32) for line in (left, left_wall))
        middle = float(np.median((right + left)[: len(rows) // 2]) / 2)
        lower = slice(round(0.45 * len(rows)), round(0.95 * len(rows)))
        reaches = middle - float(right[lower].min()), float(left[lower].max()) - middle
        return Heart(top, bottom, right, left, right_wall, left_wall, float(chest.max()), middle, *reaches)

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
    columns = np.arange(mask.shape[1])[None, :]
    # Just medial of the mask is mediastinum, whether or not the mask takes in the lung behind the heart.
    medial = np.clip(first - MEDIAL_SHARE * mask.shape[1], 0, None).astype(int)
    bright = _smoothed(levels[np.arange(len(rows)), medial], 4.0)
    lateral = inside & (columns > (0.5 * (first + outer))[:, None])
    beside = (levels * lateral).sum(axis=1) / np.maximum(lateral.sum(axis=1), 1)
    dark = _smoothed(0.5 * (np.where(inside, levels, 255).min(axis=1) + beside), 4.0)
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
