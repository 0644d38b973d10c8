"""Phrases with the region that a person drew for each, in images that nothing learns from.

Regions are those of hand-drawn masks and of readers' boxes. Sides are the patient's: the right lung is on the left of
the image.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from medviz.domains.chest_places import WORDINGS
from medviz.domains.dermatology import STRUCTURES
from medviz.domains.lung_places import MEDIASTINUM
from medviz.errors import InputError
from medviz.grounding.anatomy import Mask, lung_regions
from medviz.grounding.atlas import Atlas, Box
from train.datasets.placed_findings import placed_boxes
from train.datasets.split import Split, boxes, images_root
from train.segmenter import split_lungs

STRUCTURES_NAME = "test-structures.parquet"
TEMPLATE = "{location} {pathology}"
"""Wording of a finding with its place, as arXiv 2506.10633 has it."""


@dataclass(frozen=True)
class PhraseClass:
    """name: its key in a report. label: as a reader sees it. prior: the training region that knows no image."""

    name: str
    label: str
    prior: str


@dataclass(frozen=True, eq=False)
class GroundedPhrase:
    """One phrase in one image and where it should look.

    image: row of the image. kind: name of its class. region: bool (H, W), neither empty nor the whole image. outlines:
    the boxes of the region's parts. places: the places of the atlas that the phrase names, empty where it names none.
    """

    image: int
    kind: str
    phrase: str
    region: Mask
    outlines: tuple[Box, ...]
    places: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PhraseSet:
    """Phrases that are reported together.

    images: uint8 (N, H, W, 3) that the phrases' rows point to. groups: the patient or lesion of each image (N,).
    """

    name: str
    label: str
    classes: tuple[PhraseClass, ...]
    phrases: tuple[GroundedPhrase, ...]
    images: np.ndarray
    groups: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the images and of which phrase is read in which."""
        read = json.dumps([(each.image, each.phrase) for each in self.phrases])
        return hashlib.sha256(read.encode() + self.images.tobytes()).hexdigest()

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of images and regions."""
        return self.images.shape[1], self.images.shape[2]


@dataclass(frozen=True)
class _Structure:
    """masks: names in the table of hand-drawn structures, whose union is the region. places: what the phrase names."""

    name: str
    phrase: str
    masks: tuple[str, ...]
    prior: str
    places: tuple[str, ...] = ()


# No training image has tubes outlined: they run in the mediastinum. Airways are left out, for the vocabulary has no
# word for them and their region is most of the mediastinum's middle.
DRAWN = (
    _Structure("right_lung", "right lung", ("right lung",), "lungs", ("right lung",)),
    _Structure("left_lung", "left lung", ("left lung",), "lungs", ("left lung",)),
    _Structure("cardiomediastinum", "cardiac silhouette and mediastinum", ("cardiomediastinum",), "mediastinum"),
    _Structure("ground_glass", "ground glass opacity", ("ground glass opacities",), "lung opacity"),
    _Structure("consolidation", "consolidation", ("consolidation",), "lung opacity"),
    _Structure("endotracheal_tube", "endotracheal tube", ("endotracheal tube",), "mediastinum"),
    _Structure(
        "other_tubes", "tubes and lines", ("nosogastric tube", "tubings", "central venous line"), "mediastinum"
    ),
)  # fmt: skip

OUTLINED = dict(zip(DRAWN[:3], ("right_lung", "left_lung", MEDIASTINUM), strict=True))
"""Structures that follow from lung masks alone -> the region they are."""


def radiology_sets(split: Split, atlas: Atlas, size_px: int, limit: int = 0) -> tuple[PhraseSet, ...]:
    """Boxed findings of the split worded twice, with side and zone and by name alone; before them hand-drawn
    structures, whose table lies beside the shards and is of `test` images, elsewhere both lungs and what lies between.

    size_px: side of images and regions. limit: phrases of a class, evenly spaced (0: all). Raises InputError where a
    set would be empty, or the table is missing.
    """
    boxed = [boxed_findings(split, atlas, size_px, placed=placed, limit=limit) for placed in (True, False)]
    if split.name != "test":
        return (outlined_lungs(split, size_px, limit), *boxed)
    table = images_root() / split.domain / STRUCTURES_NAME
    return (drawn_structures(split, table, size_px, limit), *boxed)


def outlined_lungs(split: Split, size_px: int, limit: int = 0) -> PhraseSet:
    """Each lung of the split's lung masks, and the mediastinum between both: the first of the structures DRAWN."""
    found = []
    for index, record in enumerate(split.records):
        mask = split.mask(index, "lung_mask", size_px) if record.get("lung_mask") else None
        if mask is None or not mask.any():
            continue
        sides = split_lungs(mask)
        regions = lung_regions(sides == 1, sides == 2).regions
        for structure, region in OUTLINED.items():
            if region in regions:
                found.append(_grounded(index, structure, regions[region]))
    return _phrase_set("lungs", "Lung masks", _classes(OUTLINED), found, split, size_px, limit)


def drawn_structures(split: Split, table: Path, size_px: int, limit: int = 0) -> PhraseSet:
    """The structures DRAWN of `table` (image_id, structure, mask), in the images of `split`."""
    if not table.is_file():
        raise InputError(f"no hand-drawn structures at {table}")
    rows = {str(record["image_id"]): index for index, record in enumerate(split.records)}
    masks: dict[tuple[int, str], Mask] = {}
    for drawn in pq.read_table(table).to_pylist():
        if drawn["image_id"] in rows and drawn["mask"] is not None:
            masks[rows[drawn["image_id"]], drawn["structure"]] = _decoded(drawn["mask"], size_px, table)
    found = []
    for structure in DRAWN:
        for index in sorted(set(rows.values())):
            parts = [masks[index, name] for name in structure.masks if (index, name) in masks]
            if parts:
                found.append(_grounded(index, structure, np.any(parts, axis=0)))
    return _phrase_set("structures", "Hand-drawn masks", _classes(DRAWN), found, split, size_px, limit)


def _grounded(index: int, structure: _Structure, region: Mask) -> GroundedPhrase:
    return GroundedPhrase(index, structure.name, structure.phrase, region, part_boxes(region), structure.places)


def _classes(structures: Iterable[_Structure]) -> list[PhraseClass]:
    return [PhraseClass(each.name, each.name.replace("_", " ").capitalize(), each.prior) for each in structures]


def boxed_findings(split: Split, atlas: Atlas, size_px: int, *, placed: bool, limit: int = 0) -> PhraseSet:
    """Findings in readers' boxes: one phrase for each finding and place, or for each finding. placed: word the place.

    The region is the union of the boxes that the phrase stands for.
    """
    found: dict[tuple[int, str, str], list[Box]] = {}
    for index, record in enumerate(split.records):
        for box, finding, wordings in placed_boxes(boxes(record), atlas):
            if wordings:
                outline = Box(box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])
                found.setdefault((index, finding, wordings[0] if placed else ""), []).append(outline)
    phrases = [
        GroundedPhrase(
            index,
            finding.replace(" ", "_"),
            TEMPLATE.format(location=wording, pathology=finding) if placed else finding,
            filled(outlines, size_px),
            tuple(outlines),
            WORDINGS[wording] if placed else (),
        )
        for (index, finding, wording), outlines in found.items()
    ]
    findings = dict.fromkeys(finding for _, finding, _ in found)
    classes = [PhraseClass(each.replace(" ", "_"), each.capitalize(), each) for each in findings]
    name, label = (
        ("placed_boxes", "Readers' boxes, side and zone") if placed else ("named_boxes", "Readers' boxes, name alone")
    )
    return _phrase_set(name, label, classes, phrases, split, size_px, limit)


def dermatology_sets(split: Split, atlas: Atlas | None, size_px: int, limit: int = 0) -> tuple[PhraseSet, ...]:
    """Lesions and dermoscopic structures with an expert's mask; artefacts have none. See `radiology_sets`."""
    found = []
    for kind, (column, phrase) in dermoscopic_masks().items():
        for index, record in enumerate(split.records):
            mask = split.mask(index, column, size_px) if record.get(column) else None
            if mask is not None:
                found.append(GroundedPhrase(index, kind, phrase, mask, part_boxes(mask)))
    classes = [PhraseClass(kind, phrase.capitalize(), kind) for kind, (_, phrase) in dermoscopic_masks().items()]
    return (_phrase_set("structures", "Expert masks", classes, found, split, size_px, limit),)


def dermoscopic_masks() -> dict[str, tuple[str, str]]:
    """Class -> (mask column, phrase) of the lesion and of every dermoscopic structure."""
    structures = {head: (f"attribute_{head}_mask", choice) for choice, (head, _) in STRUCTURES.items()}
    return {"lesion": ("lesion_mask", "lesion"), **structures}


SETS: Mapping[str, Callable[..., tuple[PhraseSet, ...]]] = {
    "dermatology": dermatology_sets,
    "radiology": radiology_sets,
}
"""Domain -> (split, atlas, size_px, limit) -> its phrase sets."""


def filled(outlines: Iterable[Box], size_px: int) -> Mask:
    """The union of boxes as bool (size_px, size_px)."""
    region = np.zeros((size_px, size_px), bool)
    for box in outlines:
        left, right = (round(edge * size_px) for edge in (box.x0, box.x1))
        top, bottom = (round(edge * size_px) for edge in (box.y0, box.y1))
        region[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return region


def part_boxes(region: Mask) -> tuple[Box, ...]:
    """The smallest box around each connected part of a region."""
    height, width = region.shape
    _, _, figures, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    return tuple(
        Box(float(x) / width, float(y) / height, float(x + w) / width, float(y + h) / height)
        for x, y, w, h, _ in figures[1:]
    )


def _decoded(mask: Mapping[str, bytes], size_px: int, where: Path) -> Mask:
    picture = cv2.imdecode(np.frombuffer(mask["bytes"], np.uint8), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise InputError(f"{where} holds a mask that cannot be decoded")
    return cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA) >= 128


def _phrase_set(
    name: str,
    label: str,
    classes: Iterable[PhraseClass],
    found: list[GroundedPhrase],
    split: Split,
    size_px: int,
    limit: int,
) -> PhraseSet:
    """The set of what was found, each class cut to `limit`; only the images that are left, in the split's order."""
    usable = [each for each in found if each.region.any() and not each.region.all()]
    chosen: list[GroundedPhrase] = []
    for kind in dict.fromkeys(each.kind for each in usable):
        mine = [each for each in usable if each.kind == kind]
        kept = min(limit or len(mine), len(mine))
        chosen += [mine[round(i)] for i in np.linspace(0, len(mine) - 1, kept)]
    if not chosen:
        raise InputError(f"the {split.name} split of {split.domain} has no region for {label.lower()!r}")
    indices = sorted({each.image for each in chosen})
    rows = {index: row for row, index in enumerate(indices)}
    there = {each.kind for each in chosen}
    return PhraseSet(
        name,
        label,
        tuple(each for each in classes if each.name in there),
        tuple(replace(each, image=rows[each.image]) for each in chosen),
        split.images(size_px, indices),
        tuple(split.groups[index] for index in indices),
    )
