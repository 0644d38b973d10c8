"""Invented chests and lesions with regions that are known: what the grounding evaluation is tested on."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medviz.grounding.atlas import Box
from tests import tiny
from train.datasets.grounded_phrases import GroundedPhrase, PhraseClass, PhraseSet, filled, part_boxes
from train.datasets.split import Split

SIDE = tiny.IMAGE_SIZE_PX
RIGHT_LOW = {"label": "lung opacity", "x": 0.1, "y": 0.65, "w": 0.2, "h": 0.2}
LEFT_UP = {"label": "lung opacity", "x": 0.65, "y": 0.1, "w": 0.2, "h": 0.15}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Record = dict[str, Any]


def png(pixels: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def mask_png(mask: np.ndarray) -> dict[str, object]:
    return png((mask * 255).astype(np.uint8))


def lungs() -> dict[str, np.ndarray]:
    """The patient's right lung on the left of the image, narrower than the left one."""
    masks = {side: np.zeros((SIDE, SIDE), bool) for side in ("right", "left")}
    masks["right"][8:52, 8:24] = masks["left"][10:50, 36:58] = True
    return masks


def pixels(seed: int) -> np.ndarray:
    """Invented pictures, coarse enough to survive a change of size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((SIDE // 8, SIDE // 8, 1), np.uint8))


def split_of(domain: str, name: str, rows: Sequence[Record]) -> Split:
    columns: dict[str, pa.Array] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        columns[key] = pa.array(values, PICTURE if key == "image" or key.endswith("_mask") else pa.string())
    return Split(domain, name, pa.table(columns))


def chest(index: int, boxes: Sequence[dict], *, patient: str = "", mask: bool = False) -> Record:
    whole = lungs()["right"] | lungs()["left"]
    return {
        "image": png(pixels(index)),
        "image_id": f"chest-{index}",
        "source": "invented",
        "patient_id": patient or f"patient-{index}",
        "findings": "[]",
        "report": None,
        "boxes": json.dumps(list(boxes)),
        "lung_mask": mask_png(whole) if mask else None,
    }


def mirrored(record: Record) -> Record:
    """The same patient with right and left exchanged: the picture, the boxes and the mask turned over."""

    def turned(picture: dict) -> dict:
        return png(np.asarray(Image.open(io.BytesIO(picture["bytes"])))[:, ::-1])

    boxes = [{**box, "x": 1 - box["x"] - box["w"]} for box in json.loads(record["boxes"])]
    mask = record["lung_mask"] and turned(record["lung_mask"])
    return {**record, "image": turned(record["image"]), "boxes": json.dumps(boxes), "lung_mask": mask}


def train_rows() -> list[Record]:
    """Three chests: opacity in all, and in one of them a second box and pneumonia."""
    more = [LEFT_UP, {**LEFT_UP, "label": "pneumonia", "x": 0.55}, {**RIGHT_LOW, "label": "pneumonia"}]
    return [chest(i, [RIGHT_LOW, *(more if i == 101 else ())], mask=True) for i in (100, 101, 102)]


def shown_rows() -> list[Record]:
    return [
        chest(0, [RIGHT_LOW, {**RIGHT_LOW, "x": 0.25}], patient="ann"),
        chest(1, [RIGHT_LOW, LEFT_UP], patient="ann"),
        chest(2, [{**LEFT_UP, "label": "pneumonia"}], patient="bob"),
    ]


def structures_table(path: Path, ids: Sequence[str]) -> Path:
    tube = np.zeros((SIDE, SIDE), bool)
    tube[:30, 30:33] = True
    line = np.zeros((SIDE, SIDE), bool)
    line[5:8, 10:40] = True
    drawn = {
        "right lung": lungs()["right"],
        "left lung": lungs()["left"],
        "ground glass opacities": filled([Box(0.2, 0.6, 0.4, 0.8), Box(0.6, 0.6, 0.8, 0.8)], SIDE),
        "tubings": tube,
        "central venous line": line,
    }
    rows = [{"image_id": each, "structure": name, "mask": mask_png(m)} for each in ids for name, m in drawn.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def skin_rows(start: int, count: int) -> list[Record]:
    lesion, network = (filled([Box(*corners)], SIDE) for corners in ((0.2, 0.2, 0.8, 0.7), (0.3, 0.3, 0.5, 0.5)))
    columns = ("globules", "milia_like_cyst", "negative_network", "pigment_network", "streaks")
    return [
        {
            "image": png(pixels(start + i)),
            "image_id": f"skin-{start + i}",
            "lesion_id": f"lesion-{start + i}",
            "source": "ISIC2018-Task1-2",
            "lesion_mask": mask_png(lesion),
            **{f"attribute_{name}_mask": mask_png(network) if i % 2 == 0 else None for name in columns},
        }
        for i in range(count)
    ]


def invented_set(regions: Sequence[np.ndarray], kinds: Sequence[str], groups: Sequence[str]) -> PhraseSet:
    """A phrase "right lung" an image; groups: the patient of each."""
    phrases = [
        GroundedPhrase(i, kind, "right lung", region, part_boxes(region))
        for i, (kind, region) in enumerate(zip(kinds, regions, strict=True))
    ]
    classes = tuple(PhraseClass(kind, kind.capitalize(), kind) for kind in dict.fromkeys(kinds))
    images = np.stack([pixels(i) for i in range(len(regions))])
    return PhraseSet("invented", "Invented", classes, tuple(phrases), images, tuple(groups))
