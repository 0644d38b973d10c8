"""NIH ChestX-ray14 as the NIH Clinical Center distributes it (Wang et al. 2017, arXiv 1705.02315).

Labels are mined from reports by text and noisy. The boxes of BBox_List_2017.csv were drawn by hand.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from train.datasets.originals import Original, age_years, complete, file_in, files_by_stem, read_table

SOURCE = "NIH ChestX-ray14"
LICENCE = "NIH Clinical Center, unrestricted use with attribution"
BOX_GRID_PX = 1024.0
"""Boxes are in pixels of the published 1024 x 1024 images, also where a mirror made these smaller."""
SEXES = {"M": "male", "F": "female"}
VIEWS = ("PA", "AP")


def read_boxes(table: Path) -> dict[str, list[dict[str, Any]]]:
    """Image file -> boxes {label, x, y, w, h} in fractions of the image.

    The header's "Bbox [x,y,w,h]" falls into four columns without a name of their own, so columns count by place.
    """
    boxes = defaultdict(list)
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        if header[:2] != ["Image Index", "Finding Label"] or len(header) < 6:
            raise InputError(f"{table} must begin with Image Index, Finding Label, Bbox [x, y, w, h]; found {header}")
        for row in reader:
            if not any(row):
                continue
            try:
                x, y, w, h = (float(value) / BOX_GRID_PX for value in row[2:6])
            except ValueError as error:
                message = f"{table}, line {reader.line_num}: x, y, w and h must be numbers, found {row}"
                raise InputError(message) from error
            boxes[row[0]].append({"label": label(row[1]), "x": x, "y": y, "w": w, "h": h})
    return boxes


def label(text: str) -> str:
    """A finding as the shards word it: "Pleural_Thickening" becomes "pleural thickening"."""
    return text.strip().replace("_", " ").lower()


def read_originals(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images, findings and boxes in `folder`.

    Expects Data_Entry_2017.csv (or Data_Entry_2017_v2020.csv, which wins) with Image Index, Finding Labels, Patient ID,
    Patient Age, Patient Gender (or Sex), View Position; BBox_List_2017.csv; and the images *.png below images*/ .
    Raises InputError for what is not there.
    """
    columns = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
    table = file_in(folder, ("Data_Entry_2017*.csv",), "the table of NIH ChestX-ray14")
    boxes = read_boxes(file_in(folder, ("BBox_List_2017.csv",), "the boxes of NIH ChestX-ray14"))
    rows = read_table(table, columns)
    if rows and not {"Patient Gender", "Patient Sex"} & set(rows[0]):
        raise InputError(f"{table} lacks the column Patient Gender (or Patient Sex); it has {sorted(rows[0])}")
    images: dict[str, Path] = {}
    for place in sorted(folder.glob("images*")):
        images |= files_by_stem(place, "*.png")
    originals = []
    for row in rows:
        file, stem = row["Image Index"], Path(row["Image Index"]).stem
        try:
            patient = f"nih_{int(row['Patient ID'])}"
        except ValueError as error:
            raise InputError(f"{table}: {file} has the patient {row['Patient ID']!r}; expected a number") from error
        columns_of_image = {
            "image_id": f"nih_{stem}",
            "source": SOURCE,
            "patient_id": patient,
            "view": row["View Position"] if row["View Position"] in VIEWS else None,
            "age": age_years(row["Patient Age"]),
            "sex": SEXES.get(row.get("Patient Gender") or row.get("Patient Sex", "")),
            "findings": sorted(label(finding) for finding in row["Finding Labels"].split("|") if finding.strip()),
            "licence": LICENCE,
        }
        image = images.get(stem, folder / "images" / file)
        originals.append(Original(columns_of_image, image, boxes=tuple(boxes.get(file, ()))))
    return complete(originals, allow_missing)
