"""The project's own shards: their columns, the split of lesions and patients, and how they are written."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from PIL import Image as PillowImage

from medviz.errors import InputError
from train.datasets.isic2018 import ARTEFACTS, ATTRIBUTES
from train.datasets.originals import Fit, Frame, Original, mask_files, read_picture
from train.datasets.split import SPLITS

JPEG_QUALITY = 95
SHARES = (0.83, 0.08, 0.09)
"""Of lesions or patients, in the order of SPLITS."""
ROWS_PER_GROUP = 128
"""Images encoded and written together."""

_TEXT, _FIGURE = Value("string"), Value("float32")

FEATURES: dict[str, Features] = {
    "dermatology": Features(
        {
            **dict.fromkeys(("image_id", "source", "lesion_id", "diagnosis", "diagnosis_method"), _TEXT),
            "age": _FIGURE,
            **dict.fromkeys(("sex", "site"), _TEXT),
            "image": Image(),
            "lesion_mask": Image(),
            **{f"artefact_{name}": _FIGURE for name in ARTEFACTS},
            "artefact_source": _TEXT,
            **{f"attribute_{name}_mask": Image() for name in ATTRIBUTES},
        }
    ),
    "radiology": Features(
        {
            "image": Image(),
            **dict.fromkeys(("image_id", "source", "patient_id", "view"), _TEXT),
            "age": _FIGURE,
            **dict.fromkeys(("sex", "findings", "report", "boxes"), _TEXT),
            "lung_mask": Image(),
            "licence": _TEXT,
        }
    ),
}
"""Columns, types and order of each domain's shards; `datasets` decodes the image columns by them."""

MASK_SUFFIX = {"lesion_mask": "mask", "lung_mask": "lungs", **{f"attribute_{name}_mask": name for name in ATTRIBUTES}}


def split_of(group: str) -> str:
    """The split of a lesion or patient, by a hash of its name alone: the same whatever else is prepared with it."""
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=b"split").digest()
    draw = int.from_bytes(digest, "little") / 2**64
    edges = np.cumsum(SHARES[:-1])
    return SPLITS[int(np.searchsorted(edges, draw, side="right"))]


def shuffle_key(name: str) -> bytes:
    """Sorting by it mixes sources and labels, in the same way each time."""
    return hashlib.blake2b(name.encode(), digest_size=8, person=b"order").digest()


def _mask_png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def encode(original: Original, domain: str, fit: Fit) -> dict[str, Any]:
    """The row of one image in the domain's shards, pictures as {bytes, path}.

    Dermatology keeps colour, radiology becomes grey. Masks are 1-bit PNG; a structure that does not show in the square
    is null, as one not annotated. Raises InputError for a file that cannot be decoded and for a mask of another
    size than its image.
    """
    picture = read_picture(original.image, grey=domain == "radiology")
    frame = Frame(picture.shape[1], picture.shape[0], fit)
    _, jpeg = cv2.imencode(".jpg", frame.square(picture), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    row = dict(original.row)
    row["image"] = {"bytes": jpeg.tobytes(), "path": f"{original.image.stem}.jpg"}
    for column, paths in original.masks.items():
        covered = np.zeros(picture.shape[:2], bool)
        for path in mask_files(paths):
            mask = read_picture(path, grey=True)
            if mask.shape != picture.shape[:2]:
                raise InputError(
                    f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {original.image} "
                    f"{frame.width_px} x {frame.height_px}; expected the same"
                )
            covered |= mask > 0
        inside = frame.square(np.where(covered, np.uint8(255), np.uint8(0))) >= 128
        if column == "lesion_mask" or inside.any():
            row[column] = {"bytes": _mask_png(inside), "path": f"{row['image_id']}_{MASK_SUFFIX[column]}.png"}
    if domain == "radiology":
        row["findings"] = json.dumps(row["findings"])
        row["boxes"] = json.dumps([box for box in map(frame.box, original.boxes) if box])
    return row


def write_split(
    folder: Path, split: str, parts: Iterable[Sequence[dict[str, Any]]], features: Features, shard_bytes: int
) -> list[Path]:
    """Write the rows of `parts` as SPLIT-NNNNN-of-NNNNN.parquet into `folder` and return the files.

    A shard ends after the part with which it reaches `shard_bytes`; each part is one row group.
    """
    schema = features.arrow_schema
    paths: list[Path] = []
    writer, written = None, 0
    try:
        for rows in parts:
            if writer is None:
                paths.append(folder / f"{split}-{len(paths):05d}.writing")
                writer, written = pq.ParquetWriter(paths[-1], schema), 0
            table = pa.Table.from_pylist(list(rows), schema=schema)
            writer.write_table(table)
            written += table.nbytes
            if written >= shard_bytes:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    if not paths:
        paths.append(folder / f"{split}-00000.writing")
        pq.write_table(schema.empty_table(), paths[0])
    names = [folder / f"{split}-{i:05d}-of-{len(paths):05d}.parquet" for i in range(len(paths))]
    return [path.replace(name) for path, name in zip(paths, names, strict=True)]
