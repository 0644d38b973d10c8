"""Hand-made outlines of heart and lungs (`structures-SPLIT.parquet`): what a cardiothoracic ratio is measured on."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from medviz.errors import InputError
from train.datasets.split import images_root


@dataclass(frozen=True)
class Structures:
    """Masks as published: image_id -> structure ("heart", "right lung", "left lung") -> PNG."""

    pictures: dict[str, dict[str, bytes]]

    def mask(self, image_id: str, structure: str, size_px: int) -> np.ndarray:
        """One structure as bool (size_px, size_px). Raises InputError where it is not outlined."""
        if structure not in self.pictures.get(image_id, {}):
            known = ", ".join(self.pictures.get(image_id, {})) or "nothing"
            raise InputError(f"{image_id} has no outline of {structure!r}; outlined: {known}")
        mask = cv2.imdecode(np.frombuffer(self.pictures[image_id][structure], np.uint8), cv2.IMREAD_GRAYSCALE)
        return cv2.resize(mask, (size_px, size_px), interpolation=cv2.INTER_AREA) >= 128

    def cardiothoracic_ratio(self, image_id: str, size_px: int = 256) -> float:
        """Widest heart over widest chest (both lungs and what lies between). Raises InputError as `mask` does."""
        heart, right, left = (self.mask(image_id, name, size_px) for name in ("heart", "right lung", "left lung"))
        return _width(heart) / _width(right | left)


def _width(mask: np.ndarray) -> int:
    columns = np.nonzero(mask.any(axis=0))[0]
    if len(columns) == 0:
        raise InputError("a mask of heart or lungs is empty, so it has no width")
    return int(columns[-1] - columns[0] + 1)


def open_structures(folder: str, split: str, root: str | Path | None = None) -> Structures:
    """The outlines beside the shards of a folder. Raises InputError where there are none."""
    path = images_root(root) / folder / f"structures-{split}.parquet"
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}")
    pictures: dict[str, dict[str, bytes]] = {}
    for row in pq.read_table(path).to_pylist():
        pictures.setdefault(row["image_id"], {})[row["structure"]] = row["mask"]["bytes"]
    return Structures(pictures)
