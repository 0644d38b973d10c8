"""One split of a domain's images, read from the parquet shards in MEDVIZ_DATA/DOMAIN/SPLIT-*.parquet."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medviz.errors import InputError
from train.datasets import readings
from train.datasets.visible import confirm_hair, hair_lengths

logger = logging.getLogger(__name__)

DERIVED = Path("runs/derived")
"""What is computed of the images once, beside the runs."""
SPLITS = ("train", "validation", "test")


def images_root(root: str | Path | None = None) -> Path:
    """`root`, or the folder that MEDVIZ_DATA names, or `data`."""
    return Path(root or os.environ.get("MEDVIZ_DATA") or "data")


def _decode(value: Mapping[str, Any] | None, mode: int, size_px: int) -> np.ndarray | None:
    if value is None:
        return None
    picture = cv2.imdecode(np.frombuffer(value["bytes"], np.uint8), mode)
    if picture is None:
        raise InputError(f"an image of the split cannot be decoded (path {value.get('path')!r})")
    if picture.shape[:2] != (size_px, size_px):
        picture = cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return picture if mode == cv2.IMREAD_GRAYSCALE else np.ascontiguousarray(picture[..., ::-1])


@dataclass
class Split:
    """Records and images of one split.

    records: one dict an image with every column but the pictures; a mask column is there as True or False (has one).
    """

    domain: str
    name: str
    table: pa.Table
    records: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        plain = [c for c in self.table.column_names if not _is_image(self.table, c)]
        self.records = self.table.select(plain).to_pylist()
        for column in self.table.column_names:
            if _is_image(self.table, column) and column != "image":
                for record, there in zip(self.records, self.table[column].is_valid().to_pylist(), strict=True):
                    record[column] = there

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def groups(self) -> list[str]:
        """The lesion or patient of each image: what must stay on one side of any division."""
        column = "lesion_id" if self.domain == "dermatology" else "patient_id"
        return [str(r.get(column) or r["image_id"]) for r in self.records]

    @property
    def halves(self) -> np.ndarray:
        """0 or 1 for each image, by a hash of its group: reward networks learn on 0, judges on 1."""
        return np.array([hashlib.blake2b(g.encode(), digest_size=1).digest()[0] & 1 for g in self.groups])

    def image(self, i: int, size_px: int) -> np.ndarray:
        """Image `i` as uint8 RGB (size_px, size_px, 3)."""
        picture = _decode(self.table["image"][i].as_py(), cv2.IMREAD_COLOR, size_px)
        if picture is None:
            raise InputError(f"record {i} of {self.domain} {self.name} has no image")
        return picture

    def images(self, size_px: int, indices: Sequence[int] | None = None) -> np.ndarray:
        """All (or the chosen) images as uint8 (N, size_px, size_px, 3)."""
        chosen = range(len(self)) if indices is None else indices
        if len(chosen) == 0:
            return np.zeros((0, size_px, size_px, 3), np.uint8)
        return np.stack([self.image(int(i), size_px) for i in chosen])

    def mask(self, i: int, column: str, size_px: int) -> np.ndarray | None:
        """Mask `column` of image `i` as bool (size_px, size_px), None where the image has none."""
        if column not in self.table.column_names:
            raise InputError(f"{self.domain} has no mask {column!r}; columns are {self.table.column_names}")
        mask = _decode(self.table[column][i].as_py(), cv2.IMREAD_GRAYSCALE, size_px)
        return None if mask is None else mask >= 128


def _is_image(table: pa.Table, column: str) -> bool:
    kind = table.schema.field(column).type
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def open_split(domain: str, split: str, root: str | Path | None = None, extra_folders: Sequence[str] = ()) -> Split:
    """The split `split` (train, validation, test) of `domain`; hair labels only where the crop bears them out.

    extra_folders: names of folders beside the domain's with shards of the same columns ("radiology-nlm-jsrt"), whose
    images follow the domain's own.

    Raises InputError with the folder looked in when there are no shards: `python -m train prepare` builds them from
    the publishers' folders.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r}; allowed are {SPLITS}")
    tables = [_read_shards(images_root(root) / folder, split) for folder in (domain, *extra_folders)]
    opened = Split(
        domain, split, pa.concat_tables(tables, promote_options="permissive") if extra_folders else tables[0]
    )
    if domain == "dermatology":
        forgotten = confirm_hair(opened.records, hair_lengths(opened, DERIVED))
        logger.info("%s %s: %d hair labels are not borne out by the picture", domain, split, forgotten)
    else:
        opened.records = [readings.read(record) for record in opened.records]
    return opened


def _read_shards(folder: Path, split: str) -> pa.Table:
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if not shards:
        raise InputError(
            f"no {split}-*.parquet in {folder}: set MEDVIZ_DATA to the folder that holds {folder.name}/, or build "
            "shards from the publishers' folders with `python -m train prepare --help`"
        )
    total = int(shards[0].stem.rsplit("-", 1)[1])
    missing = [
        name for i in range(total) if not (folder / (name := f"{split}-{i:05d}-of-{total:05d}.parquet")).is_file()
    ]
    if missing or len(shards) != total:
        raise InputError(
            f"the {split} shards in {folder} are not one set of {total}: missing {missing or 'none, others lie beside'}"
        )
    return pa.concat_tables([_read_shard(path) for path in shards], promote_options="default")


def _read_shard(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged or no parquet file: {error}") from error


def source_weights(split: Split, shares: Mapping[str, float]) -> np.ndarray:
    """Sampling weight of each image so that its source makes up the share given (shares are normalised).

    A source that is not named keeps the weight 1 an image in proportion to its size among the unnamed.
    """
    sources = [r["source"] for r in split.records]
    counts = {s: sources.count(s) for s in set(sources)}
    unknown = sorted(set(shares) - set(counts))
    if unknown:
        raise InputError(f"no images come from {unknown}; the sources are {sorted(counts)}")
    total = sum(shares.get(s, counts[s] / len(sources)) for s in counts)
    return np.array([shares.get(s, counts[s] / len(sources)) / total / counts[s] for s in sources])


def boxes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The boxes of a radiology record: {label, x, y, w, h}, fractions of the image, origin top left."""
    return json.loads(record.get("boxes") or "[]")
